"""Suites as data: each row is a registered environment with a budget, and the two levels that its score is read by."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from agents.experiments.cells import canonical

Metric = Literal["objective", "gold"]
"""The headline of a row: gold − β·KL to the reference, in score, or gold within the row's KL limit."""
League = Literal["tokens", "passes"]
"""Agents are compared at equal sampled tokens, or at equal compute."""


@dataclass(frozen=True)
class Row:
    """A task of a suite. Rows are frozen: a change is a new suite.

    Attributes:
        name: of the task, in tables.
        id: of the registered environment, as for `gymnasium.make`.
        capability: what it tests, in a few words.
        metric: "objective": gold − β·KL; "gold": gold at the last evaluation whose KL is within `max_kl`.
        tokens: budget in sampled tokens.
        passes: budget of the league of equal compute, in token passes; a differentiated pass counts three times.
        beta: β, in score per nat: of the objective, and the default of agents.
        reference: the metric of the reference policy.
        best: the best attainable metric.
        arguments: of the environment, beyond its defaults.
        max_kl: limit of KL to the reference, in nats per completion; None: no limit.
        lr: a learning rate that suits the model, the default of agents.
        test_rows: held-out completions of an evaluation.
        exact: whether gold and KL are computed over all completions, not from a sample.
    """

    name: str
    id: str
    capability: str
    metric: Metric
    tokens: int
    passes: int
    beta: float
    reference: float
    best: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    max_kl: float | None = None
    lr: float = 0.01
    test_rows: int = 128
    exact: bool = True

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise ValueError(
                f"metric of {self.name} is {self.metric!r}, and must be one of {', '.join(get_args(Metric))}"
            )
        if not self.best > self.reference or not math.isfinite(self.best - self.reference):
            raise ValueError(f"{self.name}: best {self.best} must be above the reference's level {self.reference}")
        if min(self.tokens, self.passes) < 1 or not self.beta >= 0:
            raise ValueError(f"{self.name}: budgets must be at least 1, and β not negative")

    def value(self, point: Mapping[str, Any]) -> float:
        """The metric at one evaluation."""
        return point["gold"] - (self.beta * point["kl"] if self.metric == "objective" else 0.0)

    def headline(self, curve: Sequence[Mapping[str, Any]], league: League = "tokens") -> float:
        """The metric at the last evaluation that is within the row's limits, normalised: 0 reference, 1 best."""
        before = cost(curve[0])
        within = [p for p in curve if self._is_within(p, cost(p) - before, league)]
        return (self.value(within[-1]) - self.reference) / (self.best - self.reference) if within else 0.0

    def _is_within(self, point: Mapping[str, Any], passes: float, league: League) -> bool:
        return (self.max_kl is None or point["kl"] <= self.max_kl) and (league == "tokens" or passes <= self.passes)

    def as_data(self) -> dict[str, Any]:
        """All fields, as JSON data."""
        return asdict(self)


def cost(point: Mapping[str, Any]) -> float:
    """Token passes at an evaluation: a backward pass computes twice as much as a forward pass."""
    return float(point["forward"] + 2 * point["backward"])


@dataclass(frozen=True)
class Suite:
    """A list of tasks.

    Attributes:
        name: what `lmgym benchmark` calls it.
        rows: the tasks.
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def hash(self) -> str:
        """64 bits of the SHA-256 of everything that is in it: results of another hash cannot be compared."""
        data = {"name": self.name, "rows": sorted((row.as_data() for row in self.rows), key=lambda row: row["name"])}
        return hashlib.sha256(canonical(data).encode()).hexdigest()[:16]

    def row(self, name: str) -> Row:
        """The row of a task.

        Raises:
            ValueError: the suite has no such row.
        """
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise ValueError(f"the suite {self.name} has no task {name!r}: choose from {', '.join(self.tasks)}")
        return found

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return [row.name for row in self.rows]

    @classmethod
    def from_data(cls, name: str, rows: Sequence[Mapping[str, Any]]) -> "Suite":
        """The suite of these rows, as `as_data` gives them.

        Raises:
            ValueError: a field is missing, unknown or wrong.
        """
        try:
            return cls(name, tuple(Row(**row) for row in rows))
        except TypeError as error:
            raise ValueError(f"no rows of a suite: {error}") from error
