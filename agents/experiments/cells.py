"""A cell: one run of an experiment, with a key that is a hash of all that decides its result."""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def run_seed(task: str, index: int) -> int:
    """The seed of a task's run: crc32("task/index").

    It differs between tasks: with the same seeds on all tasks, their errors are correlated, and the interval of the
    suite mean, which takes them for independent, covers far too little.
    """
    return zlib.crc32(f"{task}/{index}".encode())


@dataclass(frozen=True)
class Cell:
    """One run: one agent, on one task, with one seed.

    Attributes:
        study: name of the suite or study.
        task: name of the task.
        agent: name of the agent.
        index: index of the seed, starting at 0.
        config: the agent's settings, as JSON data. Of an agent in a file, also the hash of that file.
        setting: everything else that decides the result, as JSON data: the model, budgets, the hash of the suite.

    Raises:
        ValueError: a name is empty, the index is negative, or the settings are not JSON data.
    """

    study: str
    task: str
    agent: str
    index: int
    config: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("study", "task", "agent"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} of a cell is {getattr(self, name)!r}, and must be a name")
        if type(self.index) is not int or self.index < 0:
            raise ValueError(f"index of a cell is {self.index!r}, and must be 0, 1, 2, …")
        for name in ("config", "setting"):
            try:
                canonical(getattr(self, name))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} of {self.name} must be JSON data, with finite numbers: {error}") from error

    @property
    def name(self) -> str:
        """The cell in words, for messages."""
        return f"{self.study}: {self.agent} on {self.task}, seed {self.index}"

    @property
    def seed(self) -> int:
        """The run's seed: the same for every agent, so that agents can be compared in pairs."""
        return run_seed(self.task, self.index)

    @property
    def key(self) -> str:
        """80 bits of the SHA-256 of all fields."""
        return hashlib.sha256(canonical(self.as_data()).encode()).hexdigest()[:20]

    def as_data(self) -> dict[str, Any]:
        """All fields, as JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Cell":
        """The cell with these fields; others are ignored.

        Raises:
            ValueError: a field is missing or wrong.
        """
        missing = [f.name for f in fields(cls) if f.name not in data]
        if missing:
            raise ValueError(f"lacks the field {missing[0]!r}")
        return cls(**{f.name: data[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Shard:
    """One part of an experiment that several machines share.

    Attributes:
        number: which part, from 1.
        of: number of parts.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"shard {self.number}/{self.of}: the first number must be from 1 to the second")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """A shard such as "2/4", the second of four.

        Raises:
            ValueError: it is not of this form.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if not found:
            raise ValueError(f"shard {text!r} must be NUMBER/OF, such as 2/4 for the second of four")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        return "results" if self.of == 1 else f"results-{self.number}-of-{self.of}"

    def holds(self, cell: Cell) -> bool:
        """Whether the cell belongs to this part.

        The seeds of a task and agent go round the parts, from a part that depends on their names: the parts are about
        equal, and a cell keeps its part when others are added to the experiment.
        """
        first = zlib.crc32(canonical(cell.as_data() | {"index": 0}).encode())
        return (first + cell.index) % self.of == self.number - 1


def canonical(data: Any) -> str:
    """JSON that is the same for the same data: sorted fields, no spaces.

    Raises:
        TypeError, ValueError: it is not JSON data, or holds a number that is not finite.
    """
    return json.dumps(data, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
