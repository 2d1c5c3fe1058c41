"""The tokens of a text that follows other tokens, where the two cannot be tokenised together."""

import warnings
from collections.abc import Sequence
from typing import Any

ANCHORS = ("a", "\n", ".", "(", "1")
"""Texts before which a text is tokenised, because some tokenizers change the beginning of one that stands alone."""


def encode_after(tokenizer: Any, before: Sequence[int], text: str, otherwise: Sequence[int] | None = None) -> list[int]:
    """Token ids that decode to a text when they follow others.

    Llama's tokenizer, and others of its kind, put a space before a text that stands alone. Here the text is also
    tokenised behind other characters, and the first result that decodes to it is taken.

    Args:
        tokenizer: of transformers.
        before: the token ids that it follows.
        text: the text, whose names of special tokens are letters.
        otherwise: the ids to return if none decode to the text; by default those of the text that stands alone.

    Warns:
        UserWarning: none decode to it, so that another text is learned.
    """
    texts = [text, *ANCHORS, *(anchor + text for anchor in ANCHORS)]
    settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    alone, *others = tokenizer(texts, **settings)["input_ids"]
    pairs = zip(others[: len(ANCHORS)], others[len(ANCHORS) :], strict=True)
    candidates = [alone, *(ids[len(anchor) :] for anchor, ids in pairs if ids[: len(anchor)] == anchor)]
    decoded = tokenizer.batch_decode(
        [before, *([*before, *ids] for ids in candidates)], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    for ids, whole in zip(candidates, decoded[1:], strict=True):
        if whole == decoded[0] + text:
            return ids
    warnings.warn(
        "the tokenizer changes some of the texts to learn from (letters, spaces or unknown characters): their tokens "
        "do not decode to what was given, and what they decode to is learned",
        stacklevel=4,
    )
    return list(alone if otherwise is None else otherwise)
