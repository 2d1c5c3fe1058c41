"""Your own prompts, from a file or a dataset, scored by any callable."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmgym.io import quoted, read_jsonl, read_lines
from lmgym.tasks.base import Completion, Prompt, ScoreFunction, Split, Task, split_of


class PromptList(Task):
    """Continue one of the given prompts.

    `split_of` assigns each prompt to train or test by its text alone, so other prompts in the file do not matter. A
    prompt has a demonstration if its data has the field "demonstration", as rows split by `opening_words` have.

    Args:
        prompts: prompts or plain texts.
        score: computes the scores of a batch of completions; None if only comparisons define what is good.
        name: the name in logs.
        best: the best attainable score, if it is known.
        test_share: the share of prompts in the test split.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt | str],
        score: ScoreFunction | None,
        name: str = "prompts",
        best: float | None = None,
        test_share: float = 0.2,
    ):
        self.name = name
        self.best = best
        self._score = score
        self.has_gold = score is not None
        self._prompts: dict[Split, list[Prompt]] = {"train": [], "test": []}
        for prompt in prompts:
            prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
            if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
                raise ValueError(f"{name}: {quoted(prompt)} is not a prompt; give texts, or Prompts with a text")
            identity = prompt.text or " ".join(map(str, prompt.token_ids))
            self._prompts[split_of(identity, test_share)].append(prompt)
        for split, own in self._prompts.items():
            if not own:
                total = sum(map(len, self._prompts.values()))
                raise ValueError(
                    f"{name}: none of the {total} prompts is in the {split!r} split, which a hash of the text decides; "
                    f"give more different prompts, or a test_share other than {test_share}"
                )

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        score: ScoreFunction | None,
        field: str = "prompt",
        opening_words: int | None = None,
        **options: Any,
    ) -> "PromptList":
        """Reads rows such as {"prompt": "2 + 2 =", "answer": "4"}; the other fields become the data of the prompt.

        Args:
            path: a JSON Lines file.
            score: computes the scores of a batch of completions.
            field: the field with the prompt, or with the whole text if `opening_words` is given.
            opening_words: number of words, from the start of the text, that form the prompt; the rest is the
                demonstration. For rows with whole texts, for example `field="text", opening_words=8`.
            options: `name`, `best`, `test_share`.
        """
        rows = read_jsonl(path, required=(field,))
        return cls._from_rows(rows, os.fspath(path), score, field, opening_words, options)

    @classmethod
    def from_text(cls, path: str | os.PathLike[str], score: ScoreFunction | None, **options: Any) -> "PromptList":
        """Reads a text file with one prompt per line; empty lines are skipped."""
        lines = read_lines(path)
        if not lines:
            raise ValueError(f"{os.fspath(path)}: no prompts; write one prompt per line")
        return cls([Prompt(line) for _, line in lines], score, **{"name": os.fspath(path), **options})

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        score: ScoreFunction | None,
        field: str = "prompt",
        opening_words: int | None = None,
        dataset_split: str = "train",
        **options: Any,
    ) -> "PromptList":
        """Reads rows from a dataset of the `datasets` library, or from any other iterable of mappings.

        Args:
            dataset: the rows, or a name or path for `datasets.load_dataset`.
            score: computes the scores of a batch of completions.
            field: see `from_jsonl`.
            opening_words: see `from_jsonl`.
            dataset_split: the dataset's own split to load, if `dataset` is a name. `split_of` still divides the rows
                into train and test prompts.
            options: `name`, `best`, `test_share`.
        """
        name = dataset if isinstance(dataset, str) else "dataset"
        if isinstance(dataset, str):
            try:
                from datasets import load_dataset  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise ImportError(
                    f"loading the dataset {dataset!r} by name needs another package: pip install 'lmgym[datasets]'"
                ) from error
            dataset = load_dataset(dataset, split=dataset_split)
        return cls._from_rows(dataset, name, score, field, opening_words, options)

    @classmethod
    def _from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        source: str,
        score: ScoreFunction | None,
        field: str,
        opening_words: int | None,
        options: Mapping[str, Any],
    ) -> "PromptList":
        prompts = []
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{source}, row {number}: not a mapping but {type(row).__name__}; give rows with named fields"
                )
            text = row.get(field)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{source}, row {number}: {field!r} is {quoted(text)}; give a text that is not empty")
            data = {key: value for key, value in row.items() if key != field}
            if opening_words is not None:
                text, data["demonstration"] = _cut(text, opening_words, f"{source}, row {number}")
            prompts.append(Prompt(text, data))
        if not prompts:
            raise ValueError(f"{source}: no rows; give at least one with the field {field!r}")
        return cls(prompts, score, **{"name": source, **options})

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts of both splits."""
        return [*self._prompts["train"], *self._prompts["test"]]

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        prompts = self._prompts[split]
        return prompts[rng.integers(len(prompts))]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        if self._score is None:
            raise NotImplementedError(f"{self.name}: these prompts have no score of their own; pass a score function")
        return self._score(prompts, completions)

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        if "demonstration" in prompt.data:
            return str(prompt.data["demonstration"])
        return super().demonstrate(prompt, rng)


def _cut(text: str, words: int, where: str) -> tuple[str, str]:
    """Splits a text into its first words, and the rest with a leading space."""
    if not isinstance(words, int) or words < 1:
        raise ValueError(f"opening_words is {words!r}, but a prompt needs at least 1 word")
    parts = text.split()
    if len(parts) <= words:
        raise ValueError(
            f"{where}: the text has {len(parts)} words, so nothing is left to write after opening_words={words}; "
            "lower opening_words or remove the row"
        )
    return " ".join(parts[:words]), " " + " ".join(parts[words:])
