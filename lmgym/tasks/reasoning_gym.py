"""The data sets of reasoning-gym as tasks: `gymnasium.make("reasoning/chain_sum")`. Needs the extra `[reasoning]`.

reasoning-gym (Stojanovski et al. 2025, https://arxiv.org/abs/2505.24760) makes questions by rules, and scores answers
from 0 to 1. Some of its data sets pass what the model wrote to Python's `eval` or to SymPy's parser, which evaluates
it: a completion could run any program. Those need `allow_code=True`. All others were read, in the version that
`READ_VERSION` names, and load in that version alone; names that nobody has read are refused.
"""

import copy
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from lmgym.reasoning_names import READ_NAMES, READ_VERSION, RUN_CODE
from lmgym.tasks.answers import tagged_in
from lmgym.tasks.base import Completion, Prompt, Split, Task, sample_in_split

NOT_A_NUMBER = ("complex_arithmetic", "number_sorting")
"""Data sets that pay 1 for the answer "nan", because no comparison with it is true."""
HASHED = ("isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note")
"""Data sets that go through sets of texts, whose order Python changes from process to process."""
HUGE = {
    "coin_flip": re.compile(r"e[-+]?\d{4}", re.I),
    "rubiks_cube": re.compile(r"\d{4}"),
    "rush_hour": re.compile(r"\d{3}"),
}
"""Short answers for which a data set would compute for ever or use up the memory: 1e999999999, or so many turns."""


def answer_in(text: str) -> str:
    """What the last <answer>…</answer> of a completion holds; without these tags, the whole completion."""
    return tagged_in(text) or text.strip()


class ReasoningGym(Task):
    """A data set of reasoning-gym.

    A prompt belongs to train or test by a hash of its text. The data set scores a completion, from 0 to 1. One for
    which it raises, or gives a number that is not finite, scores 0.

    Args:
        name: of the data set, such as "chain_sum".
        allow_code: let a data set run code: its own, or what the model wrote. Give it in a sandbox only.
        size: number of different questions.
        seed: of the questions.
        extract: takes the answer out of a completion; None scores 0.
        **config: the data set's own options, such as `max_terms=3`.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: the name is unknown, the data set runs code, its options are wrong, or another version is installed.
    """

    best = 1.0

    def __init__(
        self,
        name: str,
        *,
        allow_code: bool = False,
        size: int = 10_000,
        seed: int = 0,
        extract: Callable[[str], str | None] = answer_in,
        **config: Any,
    ):
        check_name(name, allow_code)
        self._library = _library(allow_code)
        self.name, self.size, self.extract = name, size, extract
        if name in HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            warnings.warn(
                f"the questions of reasoning/{name} change from process to process, so no run can be repeated or "
                "resumed exactly: set PYTHONHASHSEED=0",
                stacklevel=2,
            )
        try:
            self._dataset = self._library.create_dataset(name, seed=seed, size=size, **config)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"reasoning/{name} does not take these options: {error}") from error
        self._entries: dict[int, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReasoningGym":
        return self  # the state is a cache alone, and data sets hold large word lists

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return sample_in_split(lambda: self._prompt(int(rng.integers(self.size))), split)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [self._score(p.data["index"], c.text) for p, c in zip(prompts, completions, strict=True)]

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        answer = prompt.data["answer"]
        return super().demonstrate(prompt, rng) if answer is None else f" {answer}"

    def _entry(self, index: int) -> Any:
        """A question; kept, because some take long to make."""
        if index not in self._entries:
            self._entries[index] = self._dataset[index]
        return self._entries[index]

    def _prompt(self, index: int) -> Prompt:
        entry = self._entry(index)
        answer = entry["answer"]
        data = {"index": index, "answer": None if answer is None else str(answer)}
        return Prompt(entry["question"], data, place=f"reasoning/{self.name}, question {index}")

    def _score(self, index: int, text: str) -> float:
        answer = self.extract(text)
        if answer is None or (self.name in NOT_A_NUMBER and "nan" in answer.lower()):
            return 0.0
        if self.name in HUGE and HUGE[self.name].search(answer):
            return 0.0
        try:
            value = float(self._dataset.score_answer(answer, copy.deepcopy(self._entry(index))))
        except Exception:  # of a data set's own code, on a text that it did not expect
            return 0.0
        return value if math.isfinite(value) else 0.0


def check_name(name: str, allow_code: bool = False) -> None:
    """Refuses a data set that runs code, or that nobody has read.

    Raises:
        ValueError: it says why, and what to do.
    """
    if allow_code:
        return
    if name in RUN_CODE:
        raise ValueError(
            f"reasoning/{name} {RUN_CODE[name]}: it needs ReasoningGym({name!r}, allow_code=True), in a sandbox. "
            "Register it under a name of your own with lmgym.register_task"
        )
    if name not in READ_NAMES:
        raise ValueError(
            f"no data set {name!r} among those of reasoning-gym {READ_VERSION} that were read and run no code: "
            f"{', '.join(READ_NAMES)}. Others need allow_code=True"
        )


def _library(allow_code: bool) -> Any:
    try:
        found = version("reasoning-gym")
        import reasoning_gym
    except (ImportError, PackageNotFoundError) as error:
        raise ImportError("the tasks reasoning/… need another package: pip install 'lmgym[reasoning]'") from error
    if found != READ_VERSION and not allow_code:
        raise ValueError(
            f"reasoning-gym {found} is installed, but its data sets were read in version {READ_VERSION}. Another may "
            f"run code: pip install reasoning-gym=={READ_VERSION}, or give allow_code=True in a sandbox"
        )
    return reasoning_gym
