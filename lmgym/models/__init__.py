"""Language models: tokenizer, adapters, loading, cached decoding, and the frozen reference."""

from lmgym.models.adapter_files import attach_adapter, read_adapter
from lmgym.models.adapters import Adapters
from lmgym.models.chat import ChatTemplate, set_template
from lmgym.models.checkpointing import checkpointed_layers
from lmgym.models.decoding import Decoding
from lmgym.models.demonstrations import (
    EncodedExample,
    Example,
    ExampleBatch,
    collate_examples,
    encode_example,
    encode_turns,
)
from lmgym.models.fused_decoding import FusedDecoding
from lmgym.models.language_model import LanguageModel
from lmgym.models.likelihood import token_nll
from lmgym.models.loading import load, load_folder
from lmgym.models.model_files import BUILT_IN, DTYPES, read_model
from lmgym.models.reference import Reference
from lmgym.models.safe_weights import check_folder, check_names, check_shapes, first_line, read_settings, read_weights
from lmgym.models.sequences import Mask, Sequences, buckets, default_pass_tokens
from lmgym.models.tokenising import TextCodec, eos_ids_of, token_ids
from lmgym.models.transformers_quirks import disable_dropout, silence_libraries

__all__ = [
    "BUILT_IN",
    "DTYPES",
    "Adapters",
    "ChatTemplate",
    "Decoding",
    "EncodedExample",
    "Example",
    "ExampleBatch",
    "FusedDecoding",
    "LanguageModel",
    "Mask",
    "Reference",
    "Sequences",
    "TextCodec",
    "attach_adapter",
    "buckets",
    "check_folder",
    "check_names",
    "check_shapes",
    "checkpointed_layers",
    "collate_examples",
    "default_pass_tokens",
    "disable_dropout",
    "encode_example",
    "encode_turns",
    "eos_ids_of",
    "first_line",
    "load",
    "load_folder",
    "read_adapter",
    "read_model",
    "read_settings",
    "read_weights",
    "set_template",
    "silence_libraries",
    "token_ids",
    "token_nll",
]
