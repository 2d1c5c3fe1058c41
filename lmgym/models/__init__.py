"""Language models: tokenizer, adapters, loading, cached decoding, and the frozen reference."""

from lmgym.models.adapters import load_onto, read_adapter
from lmgym.models.decoding import Decoding
from lmgym.models.demonstrations import EncodedExample, Example, ExampleBatch, collate, encode
from lmgym.models.fused_decoding import FusedDecoding
from lmgym.models.language_model import LanguageModel
from lmgym.models.loading import load, load_folder
from lmgym.models.model_files import BUILT_IN, DTYPES, read_model
from lmgym.models.reference import Reference
from lmgym.models.safe_weights import check_folder, check_names, check_shapes, first_line, read_settings, read_weights
from lmgym.models.sequences import Mask, Sequences, buckets, default_pass_tokens
from lmgym.models.text import token_ids
from lmgym.models.transformers_quirks import quietly, without_dropout

__all__ = [
    "BUILT_IN",
    "DTYPES",
    "Decoding",
    "EncodedExample",
    "Example",
    "ExampleBatch",
    "FusedDecoding",
    "LanguageModel",
    "Mask",
    "Reference",
    "Sequences",
    "buckets",
    "check_folder",
    "check_names",
    "check_shapes",
    "collate",
    "default_pass_tokens",
    "encode",
    "first_line",
    "load",
    "load_folder",
    "load_onto",
    "quietly",
    "read_adapter",
    "read_model",
    "read_settings",
    "read_weights",
    "token_ids",
    "without_dropout",
]
