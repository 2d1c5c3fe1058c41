"""The world of one run: what an agent gets to work with, and the record of how far it came."""

import time
from dataclasses import dataclass, replace
from typing import Any

from agents.benchmark.measure import BestOf, Measure
from agents.benchmark.meter import Meter, MeteredEnv
from agents.benchmark.suite import Row
from agents.pipeline import Setting
from lmgym.env import TokenVectorEnv
from lmgym.models import LanguageModel, TokenPasses
from lmgym.policy import TokenPolicy
from lmgym.registry import env_arguments
from lmgym.tasks.base import Split, Task

POINTS = 10
"""Evaluations of a run, beside the one before it."""


class World:
    """What an agent gets: a task, a model, environments that count tokens, and a budget.

    Args:
        row: of the suite.
        seed: of all random numbers.
        device: of the model.

    Attributes:
        task: gives prompts and scores.
        model: the language model; add an adapter to it, or replace it in no way.
        beta: β of the row, in score per nat; an agent may choose another.
        lr: a learning rate that suits the model; an agent may choose another.
        meter: counts the sampled tokens of all environments.
        curve: the evaluations so far.
    """

    def __init__(self, row: Row, seed: int, device: str = "cpu"):
        self.row, self.seed, self.device = row, seed, device
        self.arguments = env_arguments(row.id, {**row.arguments, "device": device})
        self.task: Task = self.arguments["task"]
        self.model: LanguageModel = self.arguments["model"]
        self.beta, self.lr = row.beta, row.lr
        self.meter = Meter(row.tokens)
        self.curve: list[dict[str, float]] = []
        self._measure = Measure(row, self._arguments("test", kl="none"))
        self.model.passes = TokenPasses()  # the levels of the row are not the agent's compute
        self._seconds, self._since = 0.0, time.process_time()

    def env(self, rows: int = 64, **arguments: Any) -> MeteredEnv:
        """An environment of training prompts, whose sampled tokens count.

        Args:
            rows: B, the completions of a rollout.
            **arguments: as for `lmgym.TokenVectorEnv`, such as kl="sampled" (the default), β or temperature.
        """
        return MeteredEnv(rows, meter=self.meter, **self._arguments("train", **{"kl": "sampled", **arguments}))

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be sampled. A rollout of B rows takes at most B times `max_new_tokens`."""
        return self.meter.left

    def progress(self, policy: TokenPolicy) -> None:
        """Evaluates the policy if another tenth of the budget is spent. Call it after each update."""
        if self.meter.spent * POINTS >= len(self.curve) * self.meter.budget and len(self.curve) < POINTS:
            self.record(policy)

    def record(self, policy: TokenPolicy | BestOf) -> None:
        """Evaluates the policy now. Neither tokens nor passes nor seconds of it count."""
        self._seconds += time.process_time() - self._since
        passes = replace(self.model.passes)
        point = {"tokens": self.meter.spent, "forward": passes.forward, "backward": passes.backward}
        point |= {"cpu_seconds": round(self._seconds, 3)}
        self.curve.append(point | self._measure(policy))
        self.model.passes.forward, self.model.passes.backward = passes.forward, passes.backward
        self._since = time.process_time()

    def setting(self) -> Setting:
        """Task, model and seed for `agents.pipeline.build_training`; its environments count tokens."""
        arguments = self._arguments("train")
        budgets = {k: v for k, v in arguments.items() if k not in ("task", "model", "score", "split", "beta")}
        return _MeteredSetting(self.task, self.model, budgets, seed=self.seed, world=self)

    def _arguments(self, split: Split, **more: Any) -> dict[str, Any]:
        return {"beta": self.beta, **self.arguments, "split": split, **more}


@dataclass(frozen=True)
class _MeteredSetting(Setting):
    world: World | None = None

    def env(self, rows: int, split: Split = "train", **more: Any) -> TokenVectorEnv:
        assert self.world is not None
        assert split == "train"
        return self.world.env(rows, **{k: v for k, v in more.items() if k != "score"})
