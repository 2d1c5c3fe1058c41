"""Where a sequence-classification model of transformers reads its score, and the padding token that this depends on.

A decoder's score is read at the last token that is not `config.pad_token_id`. If that is also an end, the end of a text
is never read; if it is None, transformers reads the very last token, and refuses several texts at a time.
"""

import copy
from typing import Any

from peft import PeftModel
from torch import nn

from lmgym.models import choose_padding


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that a model's config or its tokenizer name as the end of a text."""
    named = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = named if isinstance(named, list | tuple) else [named]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def set_padding(model: Any, pad_id: int | None) -> None:
    """Sets the padding id in the config, and in the text config inside a composite one, where the head reads it."""
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_id


def pad_for_reading(model: Any, tokenizer: Any) -> Any:
    """The tokenizer for a reward model that is trained here: with a padding token that does not end texts.

    Without any such token, the model's config gets None: every token of a text is then read. The vocabulary stays as it
    is, and so does the given tokenizer.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    pad_id = choose_padding(tokenizer, ends_of(model, tokenizer), vocabulary)
    set_padding(model, pad_id)
    if pad_id in (None, tokenizer.pad_token_id):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return changed


def last_linear(model: Any) -> nn.Linear:
    """The last layer of a model with one label. peft keeps its trained copy beside the original.

    Raises:
        ValueError: there is none.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    found = [(name, m) for name, m in inner.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    heads = [m for name, m in found if "original_module" not in name]
    if not heads:
        raise ValueError("the model has no linear layer with one output")
    return heads[-1]
