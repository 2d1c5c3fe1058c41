"""Text to token ids: what a tokenizer does with special tokens, and where a completion ends."""

from collections.abc import Sequence
from typing import Any


def token_ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of texts. The names of special tokens inside a text are read as text, for anybody may write them.

    Args:
        tokenizer: of transformers.
        texts: any; none is cut.
        add_special_tokens: whether to put the special tokens around a text that its model wants there.

    Raises:
        ValueError: a text is no Unicode.
    """
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text {text[:80]!r} holds half a character (a lone surrogate), which no UTF-8 file can: take "
                    "it out"
                ) from error
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]


def tokens_before(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts before a text."""
    (plain,), (whole,) = (token_ids(tokenizer, ["a"], add_special_tokens=special) for special in (False, True))
    starts = (at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain)
    return next(starts, 0)


def eos_ids_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a completion, as the generation config, the config or the tokenizer names them."""
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None) if source is not None else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    raise ValueError("the model has no end-of-sequence token: set tokenizer.eos_token, or eos_token_id in its config")
