"""The choice of a token id that fills rows up, for tokenizers that name none, or one that also ends texts.

Masks tell padding from text, so any id would do for a language model. A token that no text contains is still better:
the sequence-classification models of transformers find the last token of a text by the padding id alone.
"""

from collections.abc import Collection
from typing import Any


def choose_padding(tokenizer: Any, eos_ids: Collection[int], vocabulary: int) -> int | None:
    """The tokenizer's own padding token, else another special token; None if all of them end texts.

    Args:
        tokenizer: of transformers; it is not changed.
        eos_ids: the tokens that end a text.
        vocabulary: V; ids from there on cannot be used.
    """
    names = {i: str(tokenizer.convert_ids_to_tokens(i)).lower() for i in sorted(tokenizer.all_special_ids)}
    # A model of several modalities may look for the places of its images.
    special = [
        i for i, name in names.items() if not any(word in name for word in ("image", "video", "vision", "audio"))
    ]
    spare = [i for i in special if "pad" in names[i]]
    wanted = [tokenizer.pad_token_id, *spare, tokenizer.unk_token_id, tokenizer.bos_token_id, *special]
    return next((i for i in wanted if i is not None and i < vocabulary and i not in eos_ids), None)


def padding_note(tokenizer: Any, pad_id: int, eos_ids: Collection[int], name: str) -> str | None:
    """What to tell the user about the token that fills rows up; None if it is a padding token as it should be."""
    own, token = tokenizer.pad_token_id, tokenizer.convert_ids_to_tokens(pad_id)
    if pad_id == own and own not in eos_ids:
        return None
    problem = "no padding token" if own is None else f"a padding token that also ends texts ({tokenizer.pad_token!r})"
    if own is not None and own not in eos_ids:
        problem = f"a padding token that the model does not have ({tokenizer.pad_token!r})"
    return (
        f"the tokenizer of {name!r} has {problem}: rows are filled up with {token!r}, and masks tell it from text; "
        "nothing is added to the vocabulary"
    )
