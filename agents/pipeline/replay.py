"""One update of a run again, with all that happened in it.

A rollout depends on nothing but the weights and four integers, so an update that starts from a checkpoint is the one
that the run itself makes from there. The algorithm, its loss and the learner's steps are the run's own; `Recorder` only
notes what they compute.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents import functional as F
from agents.evaluate import token_texts
from agents.learner import Learner
from agents.pipeline.best import ControllerState
from agents.pipeline.build import TrainingSetup, build_training, extra_values
from agents.pipeline.options import Algorithm, Options, Setting
from agents.pipeline.stages import before_training
from agents.runs import StoredRun
from agents.runs.randomness import seed_everything
from agents.training import Batch, Loss, Metrics
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer

CLIPPED = "policy/clip_fraction"
"""The metric that algorithms with a clip add to, token by token."""


@dataclass
class Pass:
    """What an algorithm's loss saw in one pass over the rows (an epoch). Entries that it did not see are NaN.

    Attributes:
        logp: [B, T] log π of the actions at the step that used them, in nats.
        push: [B, T] −∂loss/∂log π: how strongly the step raised the action's log-probability, before the mean.
        clipped: [B, T] 1 where the algorithm counted the ratio as clipped, else 0; None: it clips nothing.
        step: [B] the optimizer step of the update that used the row, from 0; −1: none did.
    """

    logp: Tensor
    push: Tensor
    clipped: Tensor | None
    step: Tensor


@dataclass(frozen=True)
class Update:
    """One update of an algorithm.

    Attributes:
        number: from 0.
        setup: policy, environment, learner and setting; the environment still holds the update's completions.
        batch: the rows that the steps used, with advantages and returns.
        rows: [B] the row of the rollout that each row of the batch is.
        rollout: all rows.
        passes: one for each time that the algorithm went over the batch.
        after: [B, T] log π of the batch's actions after the last step, in nats.
        metrics: what the algorithm yielded.
    """

    number: int
    setup: TrainingSetup
    batch: Batch
    rows: Tensor
    rollout: RolloutBuffer
    passes: Sequence[Pass]
    after: Tensor
    metrics: Mapping[str, float]

    @property
    def clips(self) -> bool:
        """Whether the algorithm clips ratios."""
        return any(one.clipped is not None for one in self.passes)

    @property
    def has_critic(self) -> bool:
        """Whether the policy has a critic, and the batch its values and returns."""
        return self.setup.policy.critic != "none"

    def token_texts(self, row: int) -> list[str]:
        """What each token of a row of the rollout adds to its completion."""
        prompt = self.rollout.prompt_ids[row][self.rollout.prompt_mask[row]].tolist()
        return token_texts(
            self.setup.setting.lm, prompt, self.rollout.tokens[row][self.rollout.is_action[row]].tolist()
        )


class _NotedMetrics(Metrics):
    """Metrics that also keep the values which were added last."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, mask: Tensor | None = None) -> None:
        self.last[name] = value.detach()
        super().add(name, value, mask)


@dataclass
class _Notes:
    """What is known of an update while it runs."""

    batch: Batch | None = None
    policy: TokenPolicy | None = None
    passes: list[Pass] = field(default_factory=list)
    rollout: RolloutBuffer | None = None
    after: Tensor | None = None


class Recorder(Learner):
    """A learner that also notes what the steps of an update see; it takes the same steps.

    Attributes:
        notes: of the update since they were last replaced; None: nothing is noted.
    """

    notes: _Notes | None = None
    _minibatch: Tensor
    _part: Tensor

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self.metrics = self.micro_batches.metrics = _NotedMetrics()

    def minibatches(self, batch: Batch, rows: int) -> Iterator[Batch]:
        """Those of `Learner`."""
        if self.notes is not None:
            empty = torch.full_like(batch.logp, torch.nan)
            self.notes.batch = batch
            step = torch.full((len(batch),), -1, device=empty.device)
            self.notes.passes.append(Pass(empty, empty.clone(), None, step))
        yield from super().minibatches(batch, rows)

    def minibatch_indices(self, count: int, size: int) -> Iterator[Tensor]:
        """Those of `Learner`."""
        for self._minibatch in super().minibatch_indices(count, size):
            yield self._minibatch

    def step(
        self,
        policy: TokenPolicy,
        minibatch: Batch,
        loss: Loss,
        weigh: Callable[[Tensor], Tensor] = F.token_mean,
        extra: Callable[[], Tensor] | None = None,
    ) -> None:
        """Takes the step of `Learner`."""
        if self.notes is None or not self.notes.passes:
            return super().step(policy, minibatch, loss, weigh, extra)
        self.notes.policy = policy
        self.notes.passes[-1].step[self._minibatch] = self.steps
        over_rows = self.micro_batches.over_rows
        self.micro_batches.over_rows = partial(self._over_rows, over_rows)
        try:
            super().step(policy, minibatch, partial(self._noted_loss, loss), weigh, extra)
        finally:
            self.micro_batches.over_rows = over_rows

    def _over_rows(self, over_rows: Callable[..., None], minibatch: Batch, backward: Callable[..., None]) -> None:
        def noted(part: Batch, rows: Tensor, steps: int) -> None:
            self._part = self._minibatch[rows]
            backward(part, rows, steps)

        over_rows(minibatch, noted)

    def _noted_loss(self, loss: Loss, new: Evaluation, old: Batch) -> Tensor:
        """The algorithm's own loss of some rows, and its gradient with respect to their log-probabilities."""
        assert self.notes is not None
        assert isinstance(self.metrics, _NotedMetrics)
        self.metrics.last.clear()
        each = loss(new, old)
        (gradient,) = torch.autograd.grad(torch.where(old.mask, each, 0.0).sum(), new.logp, retain_graph=True)
        noted, steps = self.notes.passes[-1], old.mask.shape[1]
        clipped = self.metrics.last.get(CLIPPED)
        found = [(noted.logp, new.logp.detach()), (noted.push, -gradient)]
        if clipped is not None:
            noted.clipped = torch.full_like(noted.logp, torch.nan) if noted.clipped is None else noted.clipped
            found.append((noted.clipped, clipped))
        for whole, part in found:
            whole[self._part, :steps] = torch.where(old.mask, part, torch.nan)
        return each

    @torch.no_grad()
    def summarise(self, rollout: RolloutBuffer) -> dict[str, float]:
        """Ends the update, as `Learner` does."""
        notes = self.notes
        if notes is not None:
            notes.rollout = rollout
        if notes is not None and notes.batch is not None and notes.policy is not None:
            notes.after = torch.full_like(notes.batch.logp, torch.nan)
            for rows, steps in self.micro_batches.split(notes.batch):
                part = notes.batch[rows].first_steps(steps)
                logp = notes.policy.evaluate(part.sequences).logp
                notes.after[rows, :steps] = torch.where(part.mask, logp, torch.nan)
        return super().summarise(rollout)


def replay(
    setting: Setting, options: Options, algorithm: Algorithm, run: StoredRun, update: int | None = None
) -> Update:
    """Makes one update of a run again. In the folder of the run, nothing changes.

    Args:
        setting: of the run.
        options: of the run.
        algorithm: of the run.
        run: its folder.
        update: its number, from 0. None takes the one that follows the newest checkpoint, or the first of a finished
            run, which keeps no checkpoint of its training. A later one takes all updates before it, too.

    Raises:
        ValueError: there is no such update, or the algorithm takes no steps on the tokens of a rollout.
    """
    total, done = getattr(algorithm.config, "updates", None), run.updates_done(algorithm.name)
    update = done if update is None else update
    if total is not None and not 0 <= update < total:
        raise ValueError(f"there is no update {update}: the run has the updates 0 to {total - 1}")
    seed_everything(setting.seed)
    score, comparisons = before_training(setting, options, algorithm, run)
    extra = extra_values(setting, options, algorithm, comparisons)
    setup = build_training(
        setting, algorithm.rl, algorithm.config, score, learner=Recorder, on_bad_step=options.on_bad_step, say=run.say
    )
    score.finite = options.on_bad_step == "stop"
    first = done if update >= done else 0
    if first:
        run.restore(algorithm.name, {"learner": setup.learner, "kl": ControllerState(setup.env.kl_controller)})
    elif update:
        run.say(f"updates 0 to {update - 1} come first: there is no checkpoint between them and update {update}")
    return record(setup, algorithm, update, first, **extra)


def record(setup: TrainingSetup, algorithm: Algorithm, update: int, first: int = 0, **extra: Any) -> Update:
    """Makes updates with a `Recorder`, and returns the last one.

    Args:
        setup: made with the learner `Recorder`.
        algorithm: of the updates.
        update: the number of the last one.
        first: the number of the first one, where the learner is.
        **extra: the values of `train`'s further arguments.

    Raises:
        ValueError: there is no such update, or the algorithm takes no steps on the tokens of a rollout.
    """
    assert isinstance(setup.learner, Recorder)
    rows, metrics = setup.train(algorithm.module, algorithm.config, **extra), None
    for number in range(first, update + 1):
        setup.learner.notes = _Notes() if number == update else None
        metrics = next(rows, None)
        if metrics is None:
            raise ValueError(f"there is no update {update}: {algorithm.name} ends after {number} updates")
    assert metrics is not None
    assert setup.learner.notes is not None
    return _as_update(update, algorithm.name, setup, setup.learner.notes, metrics)


def _as_update(number: int, name: str, setup: TrainingSetup, notes: _Notes, metrics: Mapping[str, float]) -> Update:
    if notes.batch is None or notes.rollout is None or notes.after is None:
        raise ValueError(
            f"{name} takes no step on the tokens of a rollout in this update, so there is nothing to walk through: "
            "rewards per token, advantages and steps are what ppo, grpo, rloo, reinforce, a2c, nlpo and "
            "expert_iteration have"
        )
    # An algorithm may use a part of the rows, in their order: find each by its prompt and its tokens.
    rollout, rows, start = notes.rollout, [], 0
    used = notes.batch.sequences
    for ids, tokens, mask in zip(used.prompt_ids, used.tokens, used.is_action, strict=True):
        same = (
            (rollout.sequences.prompt_ids[start:] == ids).all(1)
            & (rollout.is_action[start:] == mask).all(1)
            & ((rollout.tokens[start:] == tokens) | ~mask).all(1)
        )
        rows.append(start + int(same.nonzero()[0, 0]))
        start = rows[-1] + 1
    return Update(number, setup, notes.batch, torch.tensor(rows), rollout, notes.passes, notes.after, metrics)
