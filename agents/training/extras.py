"""Additions from other papers: score scaling, reference refresh, and the pretraining loss of PPO-ptx."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from agents import functional as F
from agents.training import require
from agents.training.metrics import Metrics
from agents.training.stateful import State
from lmgym.env import TokenVectorEnv
from lmgym.models import Example, ExampleBatch, LanguageModel
from lmgym.policy import TokenPolicy
from lmgym.rollout import RolloutBuffer


class AdapterCopy:
    """A frozen copy of an adapter. An algorithm renews it from time to time; checkpoints include it.

    Args:
        lm: the model that has both adapters.
        source: the adapter to copy.
        name: the name of the copy.
        then: is called with the copy's name after each change, for example `env.set_reference`.
    """

    def __init__(self, lm: LanguageModel, source: str, name: str, then: Callable[[str], object] = lambda name: None):
        self.lm, self.source, self.name, self.then = lm, source, name, then
        self._made = False

    def renew(self) -> None:
        """Copies the source's current weights."""
        self.lm.adapters.copy(self.source, self.name)
        self._made = True
        self.then(self.name)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{i:04}": p for i, p in enumerate(self.lm.adapters.parameters(self.name))} if self._made else {}

    def state(self) -> State:
        return State({"made": self._made}, self._tensors())

    def restore(self, state: State) -> None:
        if state.data.get("made"):
            self.renew()
        state.copy_to(self._tensors())


class RunningScale:
    """The standard deviation of all values so far, computed on their device (parallel updates: Chan et al. 1979)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def update(self, x: Tensor) -> Tensor:
        """Adds the finite values of `x`. Returns the standard deviation of all so far, or 1 if that is 0."""
        known = x.isfinite()
        count, before = known.sum(), self._mean.to(x.device)
        self._count = self._count.to(x.device) + count
        mean = torch.where(known, x, 0.0).sum() / count.clamp(min=1)
        share = count / self._count.clamp(min=1)
        gap = mean - before
        spread = torch.where(known, x - mean, 0.0).square().sum()
        self._squares = self._squares.to(x.device) + spread + gap.square() * (self._count - count) * share
        self._mean = before + gap * share
        deviation = (self._squares / (self._count - 1).clamp(min=1)).sqrt()
        return torch.where(deviation > 0, deviation, 1.0)

    def state(self) -> State:
        return State({}, {"count": self._count, "mean": self._mean, "squares": self._squares})

    def restore(self, state: State) -> None:
        state.copy_to({"count": self._count, "mean": self._mean, "squares": self._squares})


class ScoreShaping:
    """Divides scores by their running standard deviation, and clips them, before they enter the rewards.

    Args:
        scale: divide by the standard deviation of all scores so far (Engstrom et al. 2020,
            https://arxiv.org/abs/2005.12729).
        clip: clip the result to ± this; 0 is off.
    """

    def __init__(self, scale: bool, clip: float):
        self.scale, self.clip = scale, clip
        self.deviation = RunningScale()

    def rewards(self, rollout: RolloutBuffer) -> Tensor:
        """[B, T] the rollout's rewards, with the shaped score in place of the original one."""
        score = rollout.score / self.deviation.update(rollout.score) if self.scale else rollout.score
        score = score.clamp(-self.clip, self.clip) if self.clip else score
        return rollout.rewards + rollout.at_last(score - rollout.score)

    def state(self) -> State:
        return self.deviation.state()

    def restore(self, state: State) -> None:
        self.deviation.restore(state)


class ReferenceRefresh:
    """Makes the current policy the reference at regular intervals (DeepSeek-R1, https://arxiv.org/abs/2501.12948).

    Args:
        policy: the policy to train; its adapter is copied.
        env: uses the copy as its reference after each refresh.
        every: number of updates between two refreshes; 0 never changes the reference.
    """

    def __init__(self, policy: TokenPolicy, env: TokenVectorEnv, every: int):
        self.every = every
        self.copy: AdapterCopy | None = None
        if every:
            lm_policy, adapter = require.adapter(policy, "reference_refresh")
            self.copy = AdapterCopy(lm_policy.lm, adapter, "reference", env.set_reference)

    def before(self, update: int) -> None:
        """Refreshes the reference before each update whose index is a positive multiple of `every`."""
        if self.copy is not None and update and update % self.every == 0:
            self.copy.renew()

    def state(self) -> State:
        return State() if self.copy is None else self.copy.state()

    def restore(self, state: State) -> None:
        if self.copy is not None:
            self.copy.restore(state)


def pretraining_loss(
    policy: TokenPolicy,
    example_batches: Callable[[LanguageModel, Sequence[Example], int], Iterator[ExampleBatch]],
    metrics: Metrics,
    examples: Sequence[Example] | None,
    coef: float,
    rows: int,
) -> Callable[[], Tensor] | None:
    """PPO-ptx's loss (Ouyang et al. 2022, eq. 2, https://arxiv.org/abs/2203.02155): −coef · log-likelihood of texts.

    Args:
        policy: the policy to train.
        example_batches: draws minibatches, as `Learner.example_batches` does.
        metrics: receives "ptx/loss".
        examples: the texts.
        coef: the weight γ of the loss; if 0, the function returns None.
        rows: number of texts per optimizer step.
    """
    if not coef:
        return None
    require.given(examples, "texts", "ptx_coef", "give train() examples, or set ptx_coef to 0")
    assert examples is not None
    imitator, _ = require.adapter(policy, "ptx_coef")
    imitator = imitator.truncated()  # the texts may contain tokens that truncated sampling excludes
    batches = example_batches(imitator.lm, examples, rows)

    def loss() -> Tensor:
        texts = next(batches)
        nll = F.masked_mean(-imitator.evaluate(texts.sequences).logp, texts.is_learned)
        metrics.add("ptx/loss", nll)
        return coef * nll

    return loss
