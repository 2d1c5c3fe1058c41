"""What surrounds every algorithm: optimizer steps, the learning-rate schedule, minibatches, metrics, checkpoints."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from agents import functional as F
from agents.training import (
    Batch,
    Loss,
    Metrics,
    MicroBatches,
    MovingAverage,
    OnBadStep,
    ShuffledMinibatches,
    State,
    Stateful,
    StepGuard,
    require,
)
from agents.training.nonfinite import Examine, examine_batch, examine_items
from agents.training.optimizer_state import moments_as_tensors, take_moments
from lmgym.env import Finish
from lmgym.models import Example, ExampleBatch, LanguageModel, collate_examples, encode_example
from lmgym.policy import Evaluation, Policy, TokenPolicy
from lmgym.reward import kl_estimates
from lmgym.rollout import RolloutBuffer

Part = TypeVar("Part", bound=Stateful)


@dataclass(frozen=True)
class LearnerConfig:
    """Settings of the optimizer."""

    lr: float = 1e-3
    """Peak learning rate. LoRA needs about ten times that of full fine-tuning."""
    schedule: F.Schedule = "linear"
    """What follows the warm-up: a straight line to 0, half a cosine to 0, or a constant."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises from a tenth to its peak (Ouyang et al. 2022)."""
    max_grad_norm: float = 1.0
    """Gradient clipping: the gradient is scaled down to this norm; 0 does not clip."""
    adam_eps: float = 1e-5
    """Adam's epsilon, as in PPO's reference code."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    micro_tokens: int = 0
    """Tokens in one pass through the model, padding included: fewer take less memory and give the same step (gradient
    accumulation). 0 takes as many as a CPU's caches hold, or as fill a GPU."""
    bucket: bool = True
    """Let completions of similar length share a pass, so that little of it is padding."""
    compile: bool = False
    """Compile the policy's differentiable pass with torch.compile: half a minute at the first step, some percent less
    for every other, and the same gradients up to rounding. Needs a C++ compiler."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the parameters over the optimizer steps, with which the run ends
    (Ouyang et al. 2022: 0.992); 0 keeps no average."""

    def __post_init__(self) -> None:
        require.one_of("schedule", self.schedule, get_args(F.Schedule))
        require.in_range(self, "lr", "max_grad_norm", "weight_decay", "micro_tokens", least=0)
        require.in_range(self, "warmup", least=0, most=1)
        require.in_range(self, "adam_eps", above=0)
        require.in_range(self, "ema_decay", least=0, below=1)


ROLLOUT_METRICS = {
    "score/mean": "composed score of the rollout's completions, mean over rows",
    "reward/sequence": "what the environment paid: score less β·KL where it pays KL; summed over a row, mean over rows",
    "kl/sequence_nats": "KL to the reference, k1 summed over a row's tokens, mean over rows, in nats",
    "kl/token_k3_nats": "KL to the reference by k3, mean over tokens, in nats",
    "kl/beta": "β with which the rollout was paid, in score per nat",
    "tokens/mean": "tokens per completion",
    "tokens/unfinished_share": "share of completions that reached the token budget",
    "optimizer/lr": "learning rate",
    "optimizer/steps": "optimizer steps of the update",
}
"""What `Learner.summarise` measures for every algorithm, and "score/NAME" for each component of a composed score."""

STEP_METRICS = {
    "optimizer/grad_norm": "norm of the gradient before clipping, mean over optimizer steps",
    "optimizer/bad_steps": "optimizer steps that were not taken, because the gradient was not finite",
}
"""What `Learner.optimizer_step` measures."""

METRICS = (
    ROLLOUT_METRICS
    | STEP_METRICS
    | {
        "policy/loss": "the loss, each action weighted as the algorithm weighs it, mean over optimizer steps",
        "policy/entropy_nats": "entropy of the next-token distribution, mean over tokens of the whole update, in nats",
        "policy/approx_kl_nats": "KL(old ‖ new) by k3, mean over tokens of the whole update, in nats",
        "policy/ratio_deviation": "|ratio − 1|, mean over tokens of the first minibatch; 0 up to rounding",
    }
)
"""What `Learner.step` and `Learner.summarise` measure."""


class Learner:
    """Takes optimizer steps, and measures an update.

    Args:
        parameters: what is trained; those that require no gradient are left out.
        config: the optimizer's settings.
        seed: of the shuffles, and of the prompts and samples that an algorithm draws.
        on_bad_step: what a gradient that is not finite does: "stop" raises `BadStep`, on a CPU before the step and
            elsewhere at the end of the update; "skip" counts it in "optimizer/bad_steps". The step is never taken.
        say: receives messages for the user, such as that memory ran out and smaller passes were taken.

    Attributes:
        metrics: means over the present update.
        position: how many updates (in supervised learning: steps) are done, the present one included.
        steps: optimizer steps since the last `summarise`.

    Raises:
        ValueError: no parameter requires a gradient.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: LearnerConfig,
        seed: int = 0,
        *,
        on_bad_step: OnBadStep = "stop",
        say: Callable[[str], object] | None = None,
    ):
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
        self.say = say or partial(warnings.warn, stacklevel=2)
        self.metrics = Metrics()
        self.position = 0
        self.steps = 0
        self.average = MovingAverage(self.parameters, config.ema_decay)
        self.micro_batches = MicroBatches(
            self.parameters, self.metrics, config.micro_tokens, config.bucket, lambda text: self.say(text)
        )
        self.guard = StepGuard(self.parameters, on_bad_step)
        self._accumulating = False
        self._compiled: TokenPolicy | None = None
        self._registered: dict[str, Stateful] = {}
        self._restored: State | None = None

    # Progress and checkpoints --------------------------------------------------------------------------------------

    def updates(self, total: int) -> Iterator[int]:
        """The numbers of the updates to do: 0 to `total` − 1, or those that are left where a run is resumed.

        Sets the learning rate of each. An algorithm that counts its updates with it can be interrupted at each `yield`
        and resumed.
        """
        first = 0 if self._restored is None else self.position
        for update in range(first, total):
            self.position = update + 1
            self.lr = self.config.lr * F.schedule_factor(self.config.schedule, update / total, self.config.warmup)
            yield update
        self._restored = None  # training with this learner again starts from the beginning

    @property
    def lr(self) -> float:
        """The present learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def register(self, name: str, part: Part) -> Part:
        """Makes the state of an object part of the checkpoints.

        Args:
            name: tells it from other parts.
            part: has `state` and `restore`; where a run is resumed, it is restored now.

        Raises:
            ValueError: the name is taken, or contains a "/".
        """
        if name == "learner" or "/" in name:
            raise ValueError(f"a part cannot be called {name!r}: take a name without '/' that is not 'learner'")
        self._registered[name] = part
        if self._restored is not None:
            part.restore(self._restored.part(name))
        return part

    def state(self) -> State:
        """All that later steps depend on: parameters, moments, average, generator, position, registered parts."""
        tensors = self._tensors() | {"generator": self.generator.get_state()}
        tensors |= moments_as_tensors(self.optimizer, self.parameters)
        passes = {"pass_tokens": self.micro_batches.pass_tokens, "pass_items": self.micro_batches.pass_items}
        own = State({"position": self.position, "steps": self.steps, **passes}, tensors)
        return State.of({"learner": own} | {name: part.state() for name, part in self._registered.items()})

    def restore(self, state: State) -> None:
        """Continues from where `state` was taken; call it before training begins.

        Raises:
            ValueError: the state does not belong to such a learner; nothing was changed.
        """
        own = state.part("learner")
        counts = {name: own.count(name) for name in ("position", "steps", "pass_tokens", "pass_items")}
        tensors = dict(own.tensors)
        moments = take_moments(tensors, self.parameters)
        generator = torch.empty_like(self.generator.get_state())
        State({}, tensors).copy_to(self._tensors() | {"generator": generator})
        self.generator.set_state(generator)
        for parameter, of in zip(self.parameters, moments, strict=True):
            self.optimizer.state[parameter] = of
        self.position, self.steps = counts["position"], counts["steps"]
        self.micro_batches.pass_tokens, self.micro_batches.pass_items = counts["pass_tokens"], counts["pass_items"]
        self._restored = state

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"parameter/{i:04}": p for i, p in enumerate(self.parameters)}
        return named | {f"average/{i:04}": p for i, p in enumerate(self.average.values)}

    # Minibatches ---------------------------------------------------------------------------------------------------

    def minibatches(self, batch: Batch, rows: int) -> Iterator[Batch]:
        """The rows of a batch in random order, `rows` at a time; 0 takes them all together."""
        for indices in self.minibatch_indices(len(batch), rows):
            yield batch[indices]

    def minibatch_indices(self, count: int, size: int) -> Iterator[Tensor]:
        """The numbers below `count` in random order, `size` at a time (0: all), on the device."""
        yield from torch.randperm(count, generator=self.generator, device=self.device).split(size or count)

    def shuffled_minibatches(self, count: int, size: int, epochs: int) -> Iterator[tuple[int, Tensor]]:
        """The remaining steps of `epochs` passes over `count` items, each with the numbers of its minibatch."""
        shuffle = self.register("shuffle", ShuffledMinibatches(count, size, self.generator))
        for step in self.updates(epochs * -(-count // size)):
            yield step, next(shuffle)

    def example_batches(self, lm: LanguageModel, examples: Sequence[Example], rows: int) -> Iterator[ExampleBatch]:
        """Minibatches of examples in random order, without end."""
        encoded = [encode_example(lm, example) for example in examples]
        for indices in self.register("examples", ShuffledMinibatches(len(encoded), rows, self.generator)):
            yield collate_examples(lm, [encoded[i] for i in indices.tolist()])

    # Steps ---------------------------------------------------------------------------------------------------------

    def step(
        self,
        policy: TokenPolicy,
        minibatch: Batch,
        loss: Loss,
        weigh: Callable[[Tensor], Tensor] = F.token_mean,
        extra: Callable[[], Tensor] | None = None,
    ) -> None:
        """One optimizer step down the gradient of an algorithm's loss.

        Args:
            policy: what is trained.
            minibatch: rows of a rollout with their advantages.
            loss: of each action.
            weigh: the weight of each action's loss, from the minibatch's mask: `F.token_mean` and its like.
            extra: a further loss, whose gradient is added.
        """
        if self.config.compile and self._compiled is not policy:
            _compile(policy)
            self._compiled = policy
        self._require_gradients()
        weights = weigh(minibatch.mask)

        def backward(part: Batch, rows: Tensor, steps: int) -> None:
            with record_function("lmgym/forward"):
                weighted = self._weighted(policy, part, loss, weights[rows, :steps])
            self.backward(weighted)

        self.micro_batches.over_rows(minibatch, backward)
        self.metrics.end_sum("policy/loss")
        if extra is not None:
            self.backward(extra())
        self.optimizer_step(partial(examine_batch, policy, minibatch, loss, weights))

    def _weighted(self, policy: TokenPolicy, old: Batch, loss: Loss, weights: Tensor) -> Tensor:
        """The weighted loss of some rows, measured on the way."""
        # Entries without an action may hold anything, −∞ too. They are masked before the loss and not after it: the
        # gradient of a loss that is not finite is not finite, and stays so when it is multiplied by 0.
        new = Evaluation(*(torch.where(old.mask, part, 0.0) for part in policy.evaluate(old.sequences)))
        weighted = (weights * torch.where(old.mask, loss(new, old), 0.0)).sum()
        self.metrics.add_to_sum("policy/loss", weighted)
        log_ratio = (new.logp - old.logp).detach()
        if not self.steps:
            self.metrics.add("policy/ratio_deviation", log_ratio.exp().sub(1).abs(), old.mask)
        self.metrics.add("policy/entropy_nats", new.entropy, old.mask)
        self.metrics.add("policy/approx_kl_nats", torch.expm1(log_ratio) - log_ratio, old.mask)
        return weighted

    @property
    def approx_kl(self) -> float:
        """KL(old ‖ new) by k3 so far in this update, mean over tokens, in nats. Waits for the device."""
        return self.metrics.mean("policy/approx_kl_nats")

    def minimise(
        self, items: Any, part_of_loss: Callable[[Any], Tensor], describe: Callable[[Any], str] = repr
    ) -> None:
        """One optimizer step down the gradient of a loss that is a sum over a minibatch.

        Args:
            items: the minibatch: a sequence of anything, or a tensor of row numbers.
            part_of_loss: the part of the loss that some of the items contribute. It gets all, if memory allows.
            describe: says what an item is, where its gradient is not finite.
        """
        self._require_gradients()
        self.micro_batches.over_items(len(items), lambda part: self.backward(part_of_loss(items[part])))
        self.optimizer_step(lambda: examine_items(self.parameters, items, part_of_loss, describe))

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to that of the next step."""
        if not self._accumulating:
            self.optimizer.zero_grad(set_to_none=True)
            self._accumulating = True
        with record_function("lmgym/backward"):
            loss.backward()

    def optimizer_step(self, examine: Examine | None = None) -> None:
        """One step down the gradient that has been accumulated, if it is finite.

        Args:
            examine: finds the rows that are to blame if it is not.

        Raises:
            BadStep: it is not finite, such a step stops the run, and reading the device is free; otherwise `drain`
                raises it.
        """
        self._accumulating = False
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or torch.inf)
        refused = ~norm.isfinite()
        self.guard.check(refused, examine, self._place)
        self.metrics.add("optimizer/grad_norm", norm, ~refused)
        self.metrics.add_to_sum("optimizer/bad_steps", refused)
        with record_function("lmgym/step"):
            # The fused step leaves parameters, moments and its own count unchanged where this is 1, so that the host
            # need not read it.
            self.optimizer.found_inf = refused.float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        self.steps += 1
        self.average.update(refused)

    def _require_gradients(self) -> None:
        """Trains what was frozen from outside again: without it, a run would go on and train only the rest."""
        frozen = [p for p in self.parameters if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        if frozen:
            self.say(
                f"{len(frozen)} of {len(self.parameters)} trained parameters had requires_grad=False, set from outside "
                "the learner (peft's disable_adapter() and set_adapter() do that): they are trained again"
            )

    @property
    def _place(self) -> str:
        return f"update {self.position - 1}, step {self.steps}" if self.position else f"an update, step {self.steps}"

    # Metrics and the average ---------------------------------------------------------------------------------------

    def summarise(self, rollout: RolloutBuffer) -> dict[str, float]:
        """Ends an update: `ROLLOUT_METRICS` and whatever else was added to `metrics`, in one transfer."""
        estimates = kl_estimates(rollout.logp, rollout.reference_logp)
        self.metrics.add("score/mean", rollout.score, rollout.score.isfinite())
        for name, column in rollout.breakdown.items() if len(rollout.breakdown) > 1 else ():
            self.metrics.add(f"score/{name}", column)
        self.metrics.add("reward/sequence", rollout.rewards.sum(1))
        self.metrics.add("kl/sequence_nats", torch.where(rollout.is_action, estimates["k1"], 0.0).sum(1))
        self.metrics.add("kl/token_k3_nats", estimates["k3"], rollout.is_action)
        self.metrics.add("tokens/mean", rollout.is_action.sum(1))
        self.metrics.add("tokens/unfinished_share", (rollout.finish == Finish.LENGTH).float())
        settings = {"kl/beta": rollout.beta, "optimizer/lr": self.lr, "optimizer/steps": float(self.steps)}
        row = self.drain() | settings
        self.steps = 0
        return row

    def drain(self) -> dict[str, float]:
        """The metrics since the last call, in one transfer.

        Raises:
            BadStep: a gradient was not finite, and such a step stops the run.
        """
        row = self.metrics.drain()
        self.guard.drain(bool(row.get("optimizer/bad_steps")), self._place)
        return row

    def averaged(self) -> AbstractContextManager[None]:
        """Runs the body with the moving average of the parameters, where `ema_decay` keeps one."""
        return self.average.swapped_in()

    def use_average(self) -> None:
        """Replaces the parameters by their moving average, where `ema_decay` keeps one."""
        self.average.copy_to_parameters()


def _compile(policy: TokenPolicy) -> None:
    if not isinstance(policy, Policy):
        raise ValueError(f"compile=True compiles an lmgym.Policy, and this is a {type(policy).__name__}: leave it off")
    policy.compile()
