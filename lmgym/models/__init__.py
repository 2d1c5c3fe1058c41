"""Language models: tokenizer, adapters, loading, cached decoding, and the frozen reference."""

from lmgym.models.adaptable import all_linear
from lmgym.models.adapter_files import attach_adapter, read_adapter
from lmgym.models.adapters import Adapters
from lmgym.models.base_weights import (
    CHECKSUM,
    BaseMismatch,
    check_base,
    load_base,
    name_base,
    read_checksum,
    record_base,
    weights_checksum,
)
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
from lmgym.models.padding import choose_padding
from lmgym.models.passes import TokenPasses
from lmgym.models.positions import position_limit
from lmgym.models.reference import Reference
from lmgym.models.safe_weights import check_folder, check_names, check_shapes, first_line, read_settings, read_weights
from lmgym.models.sequences import Mask, Sequences, buckets, default_pass_tokens
from lmgym.models.tokenising import (
    TextCodec,
    count_added_ends,
    count_prefix_tokens,
    eos_ids_of,
    last_tokens,
    token_ids,
)
from lmgym.models.transformers_quirks import disable_dropout, keep_evaluating, seeded, silence_libraries

__all__ = [
    "BUILT_IN",
    "CHECKSUM",
    "DTYPES",
    "Adapters",
    "BaseMismatch",
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
    "TokenPasses",
    "all_linear",
    "attach_adapter",
    "buckets",
    "check_base",
    "check_folder",
    "check_names",
    "check_shapes",
    "checkpointed_layers",
    "choose_padding",
    "collate_examples",
    "count_added_ends",
    "count_prefix_tokens",
    "default_pass_tokens",
    "disable_dropout",
    "encode_example",
    "encode_turns",
    "eos_ids_of",
    "first_line",
    "keep_evaluating",
    "last_tokens",
    "load",
    "load_base",
    "load_folder",
    "name_base",
    "position_limit",
    "read_adapter",
    "read_checksum",
    "read_model",
    "read_settings",
    "read_weights",
    "record_base",
    "seeded",
    "set_template",
    "silence_libraries",
    "token_ids",
    "token_nll",
    "weights_checksum",
]
