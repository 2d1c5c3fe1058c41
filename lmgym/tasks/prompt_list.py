"""Your own prompts, from a file or a data set, scored by any callable."""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from lmgym.io import Source, quoted, read_rows, source_name
from lmgym.tasks.base import Completion, Prompt, ScoreFunction, Split, Task, split_of
from lmgym.tasks.prompt_rows import opening_of, prompt_of


class PromptList(Task):
    """Continue one of the given prompts.

    `split_of` assigns each prompt to train or test by its text alone, so other prompts in the file do not matter. With
    `test_prompts`, those are the test split and all others are for training. A prompt has a demonstration if its data
    has the field "demonstration", as rows split by `opening_words` have, and conversations that the assistant ends.

    Args:
        prompts: prompts or plain texts.
        score: computes the scores of a batch of completions; None if only comparisons define what is good.
        name: the name in logs.
        best: the best attainable score, if it is known.
        test_share: the share of prompts in the test split, unless there are `test_prompts`.
        test_prompts: held-out prompts, such as a benchmark's own test split. Prompts with the same text are not
            trained on.
        say: receives messages for the user, such as the number of rows left out; by default, they are warnings.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt | str],
        score: ScoreFunction | None,
        name: str = "prompts",
        best: float | None = None,
        test_share: float = 0.2,
        test_prompts: Iterable[Prompt | str] | None = None,
        say: Callable[[str], object] | None = None,
    ):
        self.name = name
        self.best = best
        self._score = score
        self.has_gold = score is not None
        self._prompts: dict[Split, list[Prompt]] = {"train": [], "test": []}
        found = [self._checked(prompt) for prompt in prompts]
        if test_prompts is None:
            for prompt in found:
                self._prompts[split_of(_identity(prompt), test_share)].append(prompt)
        else:
            held_out = [self._checked(prompt) for prompt in test_prompts]
            held = set(map(_identity, held_out))
            self._prompts = {"train": [prompt for prompt in found if _identity(prompt) not in held], "test": held_out}
            both = len(found) - len(self._prompts["train"])
            if both:
                (say or _warn)(f"{name}: {both} of {len(found)} prompts are among the test prompts: not trained on")
        for split, own in self._prompts.items():
            if not own:
                raise ValueError(
                    f"{name}: none of the {len(found)} prompts is in the {split!r} split, which a hash of the text "
                    f"decides; give more different prompts, or a test_share other than {test_share}"
                    if test_prompts is None
                    else f"{name}: no prompts to {split}; give some that are in one of the two files only"
                )

    def _checked(self, prompt: Prompt | str) -> Prompt:
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ValueError(f"{self.name}: {quoted(prompt)} is not a prompt; give texts, or Prompts with a text")
        return prompt

    @classmethod
    def from_rows(
        cls,
        source: Source,
        score: ScoreFunction | None,
        *,
        fields: Mapping[str, str] | None = None,
        opening_words: int | None = None,
        test_source: Source | None = None,
        say: Callable[[str], object] | None = None,
        **options: Any,
    ) -> "PromptList":
        """Reads rows such as {"prompt": "2 + 2 =", "answer": "4"} or {"messages": [...]}; see docs/data.md.

        The other fields become the data of the prompt.

        Args:
            source: a file, a folder, the name of a data set, or rows; see `lmgym.io.read_rows`.
            score: computes the scores of a batch of completions.
            fields: other names for fields: {"question": "prompt"}; see `lmgym.io.rows.renamed`.
            opening_words: number of words, from the start of the field "text", that form the prompt; the rest is the
                demonstration. Texts without a rest are left out.
            test_source: where the test prompts are, in the same forms; by default `split_of` chooses them.
            say: as in the constructor.
            options: `name`, `best`, `test_share`.

        Raises:
            ValueError: a row has no prompt, or is malformed; the message names it.
        """
        say = say or _warn
        if opening_words is not None and (not isinstance(opening_words, int) or opening_words < 1):
            raise ValueError(f"opening_words is {opening_words!r}, but a prompt needs at least 1 word")

        split = isinstance(source, str) and not os.path.exists(source) and source.rpartition(":")[2]
        if test_source is None and split == "test":
            say(
                f"{source}: four fifths of this test split are for training. To keep it apart, give the train split "
                "here, and this one as the test prompts (--test-prompts-file)"
            )
        prompts = _read(source, fields or {}, opening_words, say)
        held_out = None if test_source is None else _read(test_source, fields or {}, opening_words, say)
        return cls(prompts, score, **{"name": source_name(source), "test_prompts": held_out, "say": say, **options})

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts of both splits."""
        return [*self._prompts["train"], *self._prompts["test"]]

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        prompts = self._prompts[split]
        if not prompts:  # of `demonstrated`
            raise NotImplementedError(f"{self.name}: no prompt of the {split!r} split has a demonstration")
        return prompts[rng.integers(len(prompts))]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        if self._score is None:
            raise NotImplementedError(f"{self.name}: these prompts have no score of their own; pass a score function")
        return self._score(prompts, completions)

    def prompt_from(self, text: str) -> Prompt:
        if self.prompts[0].messages:
            return Prompt(messages=[{"role": "user", "content": text}])
        return Prompt(text)

    def demonstrated(self) -> Task:
        found: dict[Split, list[Prompt]] = {
            split: list(filter(_has_demonstration, prompts)) for split, prompts in self._prompts.items()
        }
        if found == self._prompts or not any(found.values()):
            return self
        fewer = copy.copy(self)
        fewer._prompts = found
        return fewer

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        if _has_demonstration(prompt):
            return str(prompt.data["demonstration"])
        return super().demonstrate(prompt, rng)


def _has_demonstration(prompt: Prompt) -> bool:
    """Whether there is something to learn to write; a table has empty cells where a row has nothing."""
    found = prompt.data.get("demonstration")
    return found is not None and bool(str(found).strip())


def _identity(prompt: Prompt) -> str:
    """What makes two prompts the same: the text, or the token ids of a prompt without one."""
    return prompt.text or " ".join(map(str, prompt.token_ids))


def _read(
    source: Source, fields: Mapping[str, str], opening_words: int | None, say: Callable[[str], object]
) -> list[Prompt]:
    rows = read_rows(source, fields)
    if opening_words is None:
        return [prompt_of(row, place, "prompt" in fields.values()) for place, row in rows]
    found = [opening_of(row, place, opening_words) for place, row in rows]
    prompts = [prompt for prompt in found if prompt is not None]
    short = f"texts have at most {opening_words} words, so nothing is left to write after opening_words={opening_words}"
    if not prompts:
        raise ValueError(f"{source_name(source)}: all {len(found)} {short}; lower opening_words")
    if len(prompts) < len(found):
        say(f"{source_name(source)}: {len(found) - len(prompts)} of {len(found)} {short}: left out")
    return prompts


_warn = partial(warnings.warn, stacklevel=4)
