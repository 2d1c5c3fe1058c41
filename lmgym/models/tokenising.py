"""Text to token ids and back: special tokens, the end of a completion, and a cache of encoded prompts."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lmgym.models.chat import ChatTemplate
from lmgym.models.padding import choose_padding, padding_note
from lmgym.tasks.base import Prompt


class TextCodec:
    """Encodes prompts and decodes completions, with one tokenizer.

    Text stays text: the name of a special token inside a prompt, such as "<eos>", is encoded as its letters.

    Args:
        tokenizer: of transformers.
        eos_ids: the tokens that end a completion.
        vocabulary: V, the width of the model's logits.
        name: the model's name, for error messages.

    Attributes:
        chat: the tokenizer's chat template, for prompts that are conversations.
        pad_id: fills rows up. It may be an end, or occur in texts: masks tell what is padding.
        padding_note: what to tell the user about it; None if the tokenizer has a padding token as it should be.
        banned_ids: tokens that are not text: padding, special tokens other than ends, and ids that the tokenizer does
            not know.

    Raises:
        ValueError: there is no end-of-sequence token that the model has.
    """

    CACHE_SIZE = 1 << 16
    """The number of prompts whose token ids are cached."""

    def __init__(self, tokenizer: Any, eos_ids: tuple[int, ...], vocabulary: int, name: str):
        ends, eos_ids = eos_ids, tuple(i for i in eos_ids if i < vocabulary)
        if not eos_ids:
            problem = (
                f"ends a text with token {ends[0]}, but has only {vocabulary}" if ends else "has no end of sequence"
            )
            raise ValueError(
                f"the model {name!r} {problem}: set tokenizer.eos_token, or eos_token_id in the model's config"
            )
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.vocabulary, self.name = vocabulary, name
        chosen = choose_padding(tokenizer, eos_ids, vocabulary)
        self.pad_id = eos_ids[0] if chosen is None else chosen
        self.padding_note = padding_note(tokenizer, self.pad_id, eos_ids, name)
        unknown = set(range(vocabulary)).difference(tokenizer.get_vocab().values())
        banned = (unknown | {*tokenizer.all_special_ids, self.pad_id}).difference(eos_ids)
        self.banned_ids = tuple(sorted(i for i in banned if i < vocabulary))
        # The text itself begins after `_prefix_length` special tokens and must not contain any. Two exceptions: the
        # unknown token marks an unknown word, and an end that is an ordinary token (a line feed) may occur in a text.
        self._prefix_length = count_prefix_tokens(tokenizer)
        self._never_text = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._encoded: dict[str, tuple[int, ...]] = {}
        self.chat = ChatTemplate(tokenizer, eos_ids, name)
        self._conversations: dict[str, tuple[int, ...]] = {}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids of prompts: texts, conversations (see `chat`), and token ids as they are.

        Raises:
            ValueError: as in `encode`; the chat template refuses a conversation; or a token id is too large.
        """
        texts = [prompt.text for prompt in prompts if not (prompt.messages or prompt.token_ids)]
        encoded = iter(self.encode_all(texts))
        return [self._encode_prompt(prompt, encoded) for prompt in prompts]

    def _encode_prompt(self, prompt: Prompt, encoded_texts: Iterator[list[int]]) -> list[int]:
        if prompt.token_ids:
            if max(prompt.token_ids) >= self.vocabulary:
                raise ValueError(
                    f"{prompt.place or 'the prompt'} has the token id {max(prompt.token_ids)}, but the model knows "
                    f"{self.vocabulary} tokens: encode the prompt with this model's tokenizer"
                )
            return list(prompt.token_ids)
        if not prompt.messages:
            return next(encoded_texts)
        key = json.dumps(prompt.messages, sort_keys=True, default=repr)
        if key not in self._conversations:
            if len(self._conversations) > self.CACHE_SIZE:
                self._conversations.clear()
            try:
                self._conversations[key] = tuple(self.chat.encode(prompt.messages))
            except ValueError as error:
                raise ValueError(f"{prompt.place}: {error}" if prompt.place else str(error)) from error
        return list(self._conversations[key])

    def text_tokens(self) -> list[int]:
        """The tokens that are text: neither ends nor banned. All tokens, if fewer than two are."""
        found = sorted(set(range(self.vocabulary)).difference(self.banned_ids, self.eos_ids))
        return found if len(found) > 1 else list(range(self.vocabulary))

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with the model's beginning-of-sequence token if it has one, and without an end.

        Raises:
            ValueError: the text has no tokens, is not valid Unicode, or contains what the tokenizer always reads as a
                special token.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of many prompts; the results are cached.

        Raises:
            ValueError: as in `encode`.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        if len(self._encoded) > self.CACHE_SIZE:
            self._encoded.clear()
            new = list(dict.fromkeys(texts))
        for text, ids in zip(new, token_ids(self.tokenizer, new), strict=True):
            while len(ids) > 1 and ids[-1] in self.eos_ids:
                ids = ids[:-1]
            if misread := self._never_text.intersection(ids[self._prefix_length :]):
                special = self.tokenizer.decode([min(misread)])
                raise ValueError(
                    f"the prompt {text[:80]!r} contains what this tokenizer reads as its special token {special!r}: "
                    "the token's name or a character that it does not know. Remove it from the text"
                )
            if ids and max(ids) >= self.vocabulary:
                unknown = self.tokenizer.convert_ids_to_tokens(max(ids))
                raise ValueError(
                    f"the text {text[:80]!r} has the token {max(ids)} ({unknown!r}), but the model {self.name!r} has "
                    f"only {self.vocabulary}: the tokenizer is of another model, or tokens were added to it alone"
                )
            if not ids:
                raise ValueError(f"the prompt {text!r} has no tokens; a prompt needs at least one")
            self._encoded[text] = tuple(ids)
        return [list(self._encoded[text]) for text in texts]

    def last_tokens(self, ids: list[int], most: int) -> list[int]:
        """The last tokens of a prompt that is too long, after the special tokens that it begins with."""
        begins = self._never_text.issuperset(ids[: self._prefix_length])
        return last_tokens(ids, most, self._prefix_length if begins else 0)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_completion(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to the prompt.

        It is decoded together with the prompt, because some tokenizers drop the first space of a text on its own.
        """
        return self.decode_completions([prompt_ids], [ids])[0]

    def decode_completions(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[str]:
        """The texts of many completions; see `decode_completion`."""
        before = self._decode_all(prompts)
        whole = self._decode_all([[*p, *c] for p, c in zip(prompts, completions, strict=True)])
        return [
            w[len(b) :] if w.startswith(b) else self.decode(c)
            for b, w, c in zip(before, whole, completions, strict=True)
        ]

    def _decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        if not rows:
            return []
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """The token ids of texts. The names of special tokens inside a text are encoded as text: anybody can write them.

    Args:
        tokenizer: of transformers.
        texts: of any length; none is truncated.
        add_special_tokens: whether to add the special tokens that the model expects around a text.

    Raises:
        ValueError: a text is not valid Unicode.
    """
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text {text[:80]!r} contains half a character (a lone surrogate), which UTF-8 cannot "
                    "represent: remove it"
                ) from error
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]


def last_tokens(ids: list[int], most: int, prefix: int) -> list[int]:
    """At most `most` of the token ids of a text: its first `prefix` ones and its last ones."""
    prefix = prefix if prefix < most else 0
    return ids if len(ids) <= most else ids[:prefix] + ids[len(ids) - most + prefix :]


def count_prefix_tokens(tokenizer: Any) -> int:
    """The number of special tokens that a tokenizer puts before a text."""
    (plain,), (whole,) = (token_ids(tokenizer, ["a"], add_special_tokens=special) for special in (False, True))
    starts = (i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain)
    return next(starts, 0)


def count_added_ends(tokenizer: Any) -> int:
    """The number of end-of-sequence tokens that a tokenizer itself puts after a text."""
    (plain,), (whole,) = (token_ids(tokenizer, ["a"], add_special_tokens=special) for special in (False, True))
    after = whole[count_prefix_tokens(tokenizer) + len(plain) :]
    return len(after) if after and set(after) == {tokenizer.eos_token_id} else 0


def eos_ids_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a completion: all that the generation config, the config or the tokenizer names, in this order.

    Models disagree with themselves: some name the end of a text in one place, and the end of a turn in another.
    """
    found: list[int] = []
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found += ids if isinstance(ids, (list, tuple)) else [int(ids)]
    return tuple(dict.fromkeys(found))
