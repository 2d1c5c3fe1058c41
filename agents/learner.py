"""Around every algorithm: optimizer steps, learning-rate schedule, shuffled minibatches, masked means of metrics."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.profiler import record_function

from agents import functional as F
from lmgym.env import Finish, TokenVectorEnv
from lmgym.models import LanguageModel, Sequences, buckets, default_pass_tokens
from lmgym.policy import Evaluation, Policy, TokenPolicy
from lmgym.reward import kl_estimates
from lmgym.rollout import RolloutBuffer
from lmgym.texts import Example, Texts, encode, pack

Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class LearnerConfig:
    """How parameters are moved."""

    lr: float = 1e-3
    """Peak learning rate. LoRA wants about ten times that of full fine-tuning."""
    schedule: Schedule = "linear"
    """What follows the warm-up: a straight line to 0, half a cosine to 0, or a constant."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises from a tenth to its peak (Ouyang et al. 2022)."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm; 0 never scales."""
    adam_eps: float = 1e-5
    """Adam's epsilon, as in PPO's reference code."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    micro_tokens: int = 0
    """Tokens that go through the model at a time, padding included: less takes less memory and gives the same step. 0
    takes as many as a CPU's caches hold, or as fill a GPU."""
    bucket: bool = True
    """Let completions of similar length go through the model together, so that little of a pass is padding."""
    compile: bool = False
    """Compile the policy's differentiable pass with torch.compile: half a minute at the first step, some percent less
    for every other, and the same gradients but for rounding. Needs a C++ compiler."""
    ema_decay: float = 0.0
    """Keeps an exponential moving average of the parameters over the optimizer steps, with which the run ends (Ouyang
    et al. 2022: 0.992); 0 keeps none."""

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and 0 <= self.warmup <= 1 and 0 <= self.ema_decay < 1):
            raise ValueError(
                f"lr={self.lr} must be 0 or more, warmup={self.warmup} a share of the run from 0 to 1, and "
                f"ema_decay={self.ema_decay} at least 0 and below 1"
            )


ROLLOUT_METRICS = {
    "score/mean": "composed score of the rollout's completions, mean over rows",
    "reward/sequence": "what the environment paid: score less β·KL where it pays KL; summed over a row, mean over rows",
    "kl/sequence_nats": "KL to the reference, k1 summed over a row's tokens, mean over rows, in nats",
    "kl/token_k3_nats": "KL to the reference by k3, mean over tokens, in nats",
    "kl/beta": "β, in score per nat",
    "tokens/mean": "tokens per completion",
    "tokens/unfinished_share": "share of completions that reached the token budget",
    "optimizer/lr": "learning rate",
    "optimizer/steps": "optimizer steps of the update",
}
"""What `Learner.report` measures, whatever the algorithm; and "score/NAME" for each component of a composed score."""

STEP_METRICS = {"optimizer/grad_norm": "norm of the gradient before clipping, mean over optimizer steps"}
"""What `Learner.step` measures."""

METRICS = (
    ROLLOUT_METRICS
    | STEP_METRICS
    | {
        "policy/loss": "the loss, each action weighted as the algorithm weighs it, mean over optimizer steps",
        "policy/entropy_nats": "entropy of the next-token distribution, mean over tokens of the whole update, in nats",
        "policy/old_kl_nats": "KL(old ‖ new) by k3, mean over tokens of the whole update, in nats",
        "policy/ratio_deviation": "|ratio − 1|, mean over tokens of the first minibatch; 0 but for rounding",
    }
)
"""What `Learner.fit` and `Learner.report` measure."""


@dataclass(frozen=True)
class Batch:
    """A rollout as an update learns from it; indexing takes rows.

    Attributes:
        sequences: prompts and actions.
        mask: [B, T] True where an action was taken.
        logp: [B, T] log π_old of the actions in nats.
        values: [B, T] the critic's estimates when they were taken.
        reference_logp: [B, T] log π_ref of the actions in nats.
        advantages: [B, T] how much better than expected an action was.
        returns: [B, T] what the critic should have said.
    """

    sequences: Sequences
    mask: Bool[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    reference_logp: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]

    @classmethod
    def of(cls, buffer: RolloutBuffer, advantages: Tensor, returns: Tensor | None = None) -> "Batch":
        """A rollout with its advantages: [B, T], or [B] for all of a row's actions alike."""
        advantages = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(buffer.logp)
        kept = (buffer.sequences, buffer.is_action, buffer.logp, buffer.values, buffer.reference_logp)
        return cls(*kept, advantages, buffer.values if returns is None else returns)

    def __getitem__(self, rows: Tensor) -> "Batch":
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def first_steps(self, steps: int) -> "Batch":
        """Without the steps that follow the first `steps`."""
        rest = (getattr(self, name)[:, :steps] for name in self.__dataclass_fields__ if name != "sequences")
        return Batch(self.sequences.first_steps(steps), *rest)


Loss = Callable[[Evaluation, Batch], Tensor]
"""An algorithm's loss of each action, [B, T], from what the policy says now and what was true when it acted.

It sees some rows of a minibatch at a time, cut to the longest of them, so a row's loss may not depend on other rows.
"""


class Learner:
    """Moves parameters and keeps the score of an update.

    Args:
        parameters: what is trained.
        config: how.
        seed: of the shuffles, and of the prompts and samples that an algorithm draws.

    Raises:
        ValueError: there is nothing to train.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: LearnerConfig, seed: int = 0):
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("there is nothing to train: no parameter requires a gradient")
        self.config = config
        self.seed = seed
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
        )
        # On the device, so that shuffling moves no indices.
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.metrics = Metrics()
        self.steps = 0
        self._begins = True
        self._average = [p.detach().clone() for p in self.parameters] if config.ema_decay else []

    def schedule(self, progress: float) -> float:
        """Sets the learning rate for a point of the run between 0 and 1, and returns it."""
        warmup = self.config.warmup
        if progress < warmup:
            factor = 0.1 + 0.9 * progress / warmup
        else:
            rest = (progress - warmup) / max(1e-9, 1 - warmup)
            shapes = {"linear": 1 - rest, "cosine": 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * rest)))}
            factor = shapes.get(self.config.schedule, 1.0)
        lr = self.config.lr * max(0.0, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def fit(
        self,
        policy: TokenPolicy,
        batch: Batch,
        loss: Loss,
        *,
        epochs: int = 1,
        minibatch_rows: int = 0,
        weigh: Callable[[Tensor], Tensor] = F.token_mean,
        target_kl: float = 0.0,
        extra: Callable[[], Tensor] | None = None,
    ) -> None:
        """Steps down the gradient of an algorithm's loss.

        Args:
            policy: what is trained.
            batch: a rollout with its advantages.
            loss: of each action.
            epochs: passes over the rollout.
            minibatch_rows: rows per optimizer step; 0 takes them all.
            weigh: the weight of each action's loss in a minibatch, from its mask: `F.token_mean` and its like.
            target_kl: ends the epochs when KL(old ‖ new) per token, in nats, exceeds this; 0 never does.
            extra: a loss that is added in every step.
        """
        if self.config.compile:
            _compile(policy)
        lengths, width = batch.mask.sum(1).tolist(), batch.sequences.prompt_ids.shape[1]
        for _ in range(epochs):
            for rows in self.minibatches(len(batch.mask), minibatch_rows or len(batch.mask)):
                weights = weigh(batch.mask[rows])
                for part, steps in self._passes(rows, lengths, width):
                    old = batch[rows[part]].first_steps(steps)
                    with record_function("lmgym/forward"):
                        weighted = self._weighted(policy, old, loss, weights[part, :steps])
                    self.backward(weighted)
                self.metrics.end_sum("policy/loss")
                if extra is not None:
                    self.backward(extra())
                self.move()
            if target_kl and self.metrics.mean("policy/old_kl_nats") > target_kl:
                break

    def _passes(self, rows: Tensor, lengths: Sequence[int], width: int) -> list[tuple[Tensor, int]]:
        """Which of a minibatch's rows go through the model together, and for how many steps."""
        most = self.config.micro_tokens or default_pass_tokens(self.device)
        if self.config.bucket:
            parts = buckets([lengths[row] for row in rows.tolist()], width, most)
        else:
            parts = buckets([max(lengths)] * len(rows), width, most)
        return [(torch.tensor(part, device=self.device), steps) for part, steps in parts]

    def _weighted(self, policy: TokenPolicy, old: Batch, loss: Loss, weights: Tensor) -> Tensor:
        """These rows' share of the minibatch's loss."""
        # An entry without an action may hold anything, −∞ too. Left out before the loss, and not after it: the gradient
        # of a loss that is not finite is no number, and times 0 it still is none.
        new = Evaluation(*(torch.where(old.mask, part, 0.0) for part in policy.evaluate(old.sequences)))
        weighted = (weights * torch.where(old.mask, loss(new, old), 0.0)).sum()
        self.metrics.add_to_sum("policy/loss", weighted)
        log_ratio = (new.logp - old.logp).detach()
        if not self.steps:
            self.metrics.add("policy/ratio_deviation", log_ratio.exp().sub(1).abs(), old.mask)
        self.metrics.add("policy/entropy_nats", new.entropy, old.mask)
        self.metrics.add("policy/old_kl_nats", torch.expm1(log_ratio) - log_ratio, old.mask)
        return weighted

    def report(self, buffer: RolloutBuffer, env: TokenVectorEnv) -> dict[str, float]:
        """Ends an update: `ROLLOUT_METRICS` and whatever else was added to `metrics`, in one transfer; and steers β."""
        estimates = kl_estimates(buffer.logp, buffer.reference_logp)
        self.metrics.add("score/mean", buffer.score)
        for name, column in buffer.breakdown.items() if len(buffer.breakdown) > 1 else ():
            self.metrics.add(f"score/{name}", column)
        self.metrics.add("reward/sequence", buffer.rewards.sum(1))
        self.metrics.add("kl/sequence_nats", torch.where(buffer.is_action, estimates["k1"], 0.0).sum(1))
        self.metrics.add("kl/token_k3_nats", estimates["k3"], buffer.is_action)
        self.metrics.add("tokens/mean", buffer.is_action.sum(1))
        self.metrics.add("tokens/unfinished_share", (buffer.finish == Finish.LENGTH).float())
        beta, lr = env.kl_controller.beta, self.optimizer.param_groups[0]["lr"]
        row = self.metrics.drain() | {"kl/beta": beta, "optimizer/lr": lr, "optimizer/steps": float(self.steps)}
        self.steps = 0
        env.kl_controller.update(row["kl/sequence_nats"], buffer.rows)
        return row

    def minibatches(self, rows: int, size: int) -> Iterator[Tensor]:
        """Indices of all rows in random order, `size` at a time, on the device."""
        yield from torch.randperm(rows, generator=self.generator, device=self.device).split(size)

    def step(self, loss: Tensor) -> None:
        """One optimizer step down the gradient of `loss`."""
        self.backward(loss)
        self.move()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to that of the step to come."""
        if self._begins:
            self.optimizer.zero_grad(set_to_none=True)
            self._begins = False
        with record_function("lmgym/backward"):
            loss.backward()

    def move(self) -> None:
        """One optimizer step down the gradient that has been added up."""
        self._begins = True
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or torch.inf)
        self.metrics.add("optimizer/grad_norm", norm)
        with record_function("lmgym/step"):
            self.optimizer.step()
        self.steps += 1
        if self._average:
            with torch.no_grad():
                for average, parameter in zip(self._average, self.parameters, strict=True):
                    average.lerp_(parameter, 1 - self.config.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Runs the body with the moving average of the parameters, where `ema_decay` keeps one."""
        kept = [p.detach().clone() for p in self.parameters] if self._average else []
        self.keep_average()
        try:
            yield
        finally:
            self._copy(kept)

    def keep_average(self) -> None:
        """Ends with the moving average of the parameters, where `ema_decay` keeps one."""
        self._copy(self._average)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=False):
            parameter.copy_(value)

    def example_batches(self, lm: LanguageModel, examples: Sequence[Example], rows: int) -> Iterator[Texts]:
        """Minibatches of texts in random order, without end."""
        encoded = [encode(lm, example) for example in examples]
        while True:
            for batch in self.minibatches(len(encoded), rows):
                yield pack(lm, [encoded[i] for i in batch.tolist()])


def _compile(policy: TokenPolicy) -> None:
    if not isinstance(policy, Policy):
        raise ValueError(f"compile=True compiles an lmgym.Policy, and this is a {type(policy).__name__}: leave it off")
    policy.compile()


class Metrics:
    """Masked means over a whole update, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._open: dict[str, Tensor] = {}

    def add_to_sum(self, name: str, value: Tensor) -> None:
        """Adds to a number that comes in parts; `end_sum` makes one value of `name` of them."""
        self._open[name] = self._open.get(name, torch.zeros((), device=value.device)) + value.detach().float()

    def end_sum(self, name: str) -> None:
        """Adds the sum of the parts to the mean of `name`."""
        self.add(name, self._open.pop(name))

    def add(self, name: str, value: Tensor, mask: Tensor | None = None) -> None:
        """Adds values to the mean of `name`; only entries where `mask` is True count."""
        value = value.detach().float()
        mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
        total, count = torch.where(mask, value, 0.0).sum(), mask.sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def mean(self, name: str) -> float:
        """The mean of one metric so far. Waits for the device."""
        return float(self._sums[name] / self._counts[name].clamp(min=1))

    def drain(self) -> dict[str, float]:
        """All means, in one transfer from the device, and starts afresh."""
        if not self._sums:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[n] / self._counts[n].clamp(min=1) for n in names]).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, means, strict=True))


class RunningScale:
    """The standard deviation of all numbers seen so far (Chan et al. 1979), to scale scores by; on their device."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, torch.zeros(()), torch.zeros(())

    def update(self, x: Tensor) -> Tensor:
        """Takes in more numbers; returns the standard deviation, 1 until there is one."""
        count, mean = x.numel(), x.mean()
        before = self._mean.to(x.device)
        share = count / (self._count + count)
        gap = mean - before
        self._squares = self._squares.to(x.device) + (x - mean).square().sum() + gap.square() * self._count * share
        self._mean, self._count = before + gap * share, self._count + count
        deviation = (self._squares / max(1, self._count - 1)).sqrt()
        return torch.where(deviation > 0, deviation, 1.0)
