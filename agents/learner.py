"""The parts that all algorithms share: optimizer steps, learning-rate schedule, minibatches, metrics, checkpoints."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from agents import functional as F
from agents.training import (
    Batch,
    Loss,
    MasterWeights,
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
from agents.training.optimizer_state import groups_by_lr, moments_as_tensors, take_moments
from agents.training.over_ranks import CHECK_INTERVAL, check_equal
from agents.training.pass_memory import Trained
from lmgym.env import Finish
from lmgym.fused import gradient_checkpointing
from lmgym.models import Example, ExampleBatch, LanguageModel, collate_examples, default_pass_tokens, encode_turns
from lmgym.policy import Evaluation, Policy, TokenPolicy
from lmgym.ranks import current
from lmgym.reward import kl_estimates
from lmgym.rollout import RolloutBuffer

Part = TypeVar("Part", bound=Stateful)


@dataclass(frozen=True)
class LearnerConfig:
    """Settings of the optimizer."""

    lr: float = 1e-3
    """Peak learning rate. LoRA needs about ten times the learning rate of full fine-tuning."""
    schedule: F.Schedule = "linear"
    """Learning rate after the warm-up: linear decay to 0, half a cosine to 0, or constant."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises from a tenth of the peak to the peak (Ouyang et al. 2022)."""
    max_grad_norm: float = 1.0
    """Gradient clipping: a larger gradient is scaled down to this norm; 0 is off."""
    adam_eps: float = 1e-5
    """Adam's epsilon, as in PPO's reference code."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    micro_tokens: int = 0
    """Maximum tokens in one pass through the model, padding included. A smaller number needs less memory and gives the
    same step (gradient accumulation). 0 chooses a number by the size of the model and of the memory."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer, and compute the rest again in the backward pass. A step takes a third to a
    half longer, and its activations a tenth of the memory; the gradients are the same. For texts that do not fit."""
    bucket: bool = True
    """Put completions of similar length into the same pass, which reduces padding."""
    compile: bool = False
    """Compile the policy's differentiable pass with torch.compile. The first step takes half a minute longer; later
    steps are a few percent faster. Gradients are the same up to rounding. Needs a C++ compiler."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the parameters over optimizer steps; the trained policy is the average
    (0.992 in Ouyang et al. 2022). 0 is off."""

    def __post_init__(self) -> None:
        require.one_of("schedule", self.schedule, get_args(F.Schedule))
        require.in_range(self, "lr", "max_grad_norm", "weight_decay", "micro_tokens", least=0)
        require.in_range(self, "warmup", least=0, most=1)
        require.in_range(self, "adam_eps", above=0)
        require.in_range(self, "ema_decay", least=0, below=1)
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile and gradient_checkpointing exclude one another: choose one")


ROLLOUT_METRICS = {
    "score/mean": "composed score of the rollout's completions, mean over rows",
    "reward/sequence": "reward: score, minus β·KL if the environment pays KL; summed over a row, mean over rows",
    "kl/sequence_nats": "KL to the reference, k1 summed over a row's tokens, mean over rows, in nats",
    "kl/token_k3_nats": "KL to the reference by k3, mean over tokens, in nats",
    "kl/beta": "β in the rollout's rewards, in score per nat",
    "tokens/mean": "tokens per completion",
    "tokens/unfinished_share": "share of completions that reached the token budget",
    "optimizer/lr": "learning rate",
    "optimizer/steps": "optimizer steps of the update",
}
"""What `Learner.summarise` measures for every algorithm, and "score/NAME" for each component of a composed score."""

STEP_METRICS = {
    "optimizer/grad_norm": "norm of the gradient before clipping, mean over optimizer steps",
    "optimizer/bad_steps": "optimizer steps that were skipped, because the gradient was not finite",
}
"""What `Learner.optimizer_step` measures."""

METRICS = (
    ROLLOUT_METRICS
    | STEP_METRICS
    | {
        "policy/loss": "the algorithm's loss, weighted over actions, mean over optimizer steps",
        "policy/entropy_nats": "entropy of the next-token distribution, mean over tokens of the whole update, in nats",
        "policy/approx_kl_nats": "KL(old ‖ new) by k3, mean over tokens of the whole update, in nats",
        "policy/ratio_deviation": "|ratio − 1|, mean over tokens of the first minibatch; 0 up to rounding",
    }
)
"""What `Learner.step` and `Learner.summarise` measure."""


class Learner:
    """Takes optimizer steps, and measures an update.

    Args:
        parameters: the parameters to train; those with requires_grad=False are ignored.
        config: the optimizer's settings.
        seed: the seed of the shuffles, and of the prompts and samples that an algorithm draws.
        lr_factors: learning rates of some of the parameters, as multiples of the config's.
        on_bad_step: the reaction to a gradient that is not finite. The step is never taken. "stop" raises `BadStep`: on
            a CPU immediately, on other devices at the end of the update. "skip" counts it in "optimizer/bad_steps".
        say: receives messages for the user, for example that memory ran out and the passes became smaller.

    Attributes:
        weights: what the optimizer steps: the parameters, and float32 copies of those in half precision.
        metrics: means over the current update.
        seed: of the run; `Stream(learner.seed, update)` gives the random numbers of a rollout.
        position: number of updates (in supervised learning: steps) so far, including the current one.
        steps: number of optimizer steps since the last `summarise`.

    Raises:
        ValueError: no parameter requires a gradient.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: LearnerConfig,
        seed: int = 0,
        *,
        lr_factors: Mapping[nn.Parameter, float] = MappingProxyType({}),
        on_bad_step: OnBadStep = "stop",
        say: Callable[[str], object] | None = None,
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("there is nothing to train: no parameter requires a gradient")
        self.config = config
        self.seed = seed
        self.device = self.parameters[0].device
        self.weights = MasterWeights(self.parameters)
        groups = groups_by_lr(self.parameters, self.weights.values, config.lr, lr_factors)
        self.optimizer = torch.optim.AdamW(groups, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)
        # On the device, so that shuffling needs no transfer of indices.
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.say = say or partial(warnings.warn, stacklevel=2)
        self.metrics = Metrics()
        self.position = 0
        self.steps = 0
        self.average = MovingAverage(self.weights, config.ema_decay)
        passes = (config.micro_tokens, config.bucket, lambda text: self.say(text), config.gradient_checkpointing)
        self.micro_batches = MicroBatches(self.parameters, self.weights, self.metrics, *passes)
        self.guard = StepGuard(self.parameters, on_bad_step)
        self._checkpointing = partial(gradient_checkpointing, config.gradient_checkpointing)
        self._compiled: TokenPolicy | None = None
        self._registered: dict[str, Stateful] = {}
        self._restored: State | None = None

    # Progress and checkpoints --------------------------------------------------------------------------------------

    def updates(self, total: int) -> Iterator[int]:
        """The indices of the updates: 0 to `total` − 1, or the remaining ones if the run was resumed.

        It sets the learning rate of each update. An algorithm that loops over it can be interrupted at each `yield` and
        resumed later.
        """
        first = 0 if self._restored is None else self.position
        for update in range(first, total):
            if (update - first) % CHECK_INTERVAL == 0:
                check_equal(self.weights.values, f"update {update}")
            self.position = update + 1
            self.lr = self.config.lr * F.schedule_factor(self.config.schedule, update / total, self.config.warmup)
            yield update
        self._restored = None  # training with this learner again starts from the beginning

    @property
    def lr(self) -> float:
        """The current learning rate, without the factors."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group["factor"]

    @lr.setter
    def lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]

    def register(self, name: str, part: Part) -> Part:
        """Adds the state of an object to the checkpoints, and restores it if the run was resumed.

        Args:
            name: a unique name for the part.
            part: an object with `state` and `restore`.

        Returns:
            The part.

        Raises:
            ValueError: the name is "learner" or contains a "/".
        """
        if name == "learner" or "/" in name:
            raise ValueError(f"a part cannot be called {name!r}: choose a name without '/' that is not 'learner'")
        self._registered[name] = part
        if self._restored is not None:
            part.restore(self._restored.part(name))
        return part

    def state(self) -> State:
        """All that later steps depend on: weights, moments, average, generator, position, registered parts."""
        tensors = self._tensors() | {"generator": self.generator.get_state()}
        tensors |= moments_as_tensors(self.optimizer, self.weights.values)
        passes = {"pass_tokens": self.micro_batches.pass_tokens, "pass_items": self.micro_batches.pass_items}
        own = State({"position": self.position, "steps": self.steps, **passes}, tensors)
        return State.of({"learner": own} | {name: part.state() for name, part in self._registered.items()})

    def restore(self, state: State) -> None:
        """Restores a state, so that training continues from it. Call it before training begins.

        Raises:
            ValueError: the state does not fit this learner; nothing was changed.
        """
        own = state.part("learner")
        counts = {name: own.count(name) for name in ("position", "steps", "pass_tokens", "pass_items")}
        tensors = dict(own.tensors)
        moments = take_moments(tensors, self.weights.values)
        generator = torch.empty_like(self.generator.get_state())
        State({}, tensors).copy_to(self._tensors() | {"generator": generator})
        self.weights.write()
        self.generator.set_state(generator)
        for parameter, of in zip(self.weights.values, moments, strict=True):
            self.optimizer.state[parameter] = of
        self.position, self.steps = counts["position"], counts["steps"]
        self.micro_batches.pass_tokens, self.micro_batches.pass_items = counts["pass_tokens"], counts["pass_items"]
        self._restored = state

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"parameter/{i:04}": p for i, p in enumerate(self.weights.values)}
        return named | {f"average/{i:04}": p for i, p in enumerate(self.average.values)}

    # Minibatches ---------------------------------------------------------------------------------------------------

    def minibatches(self, batch: Batch, rows: int) -> Iterator[Batch]:
        """Minibatches of `rows` rows of a batch, in random order; 0 gives one minibatch of all rows."""
        self.micro_batches.epoch.begin(len(batch))
        for indices in self.minibatch_indices(len(batch), rows):
            yield batch[indices]

    def minibatch_indices(self, count: int, size: int) -> Iterator[Tensor]:
        """The indices 0 to `count` − 1 in random order, `size` at a time (0: all), on the device."""
        yield from torch.randperm(count, generator=self.generator, device=self.device).split(size or count)

    def shuffled_minibatches(self, count: int, size: int, epochs: int) -> Iterator[tuple[int, Tensor]]:
        """The remaining steps of `epochs` passes over `count` items, each with the indices of its minibatch."""
        shuffle = self.register("shuffle", ShuffledMinibatches(count, size, self.generator))
        for step in self.updates(epochs * -(-count // size)):
            yield step, next(shuffle)

    def example_batches(self, lm: LanguageModel, examples: Sequence[Example], rows: int) -> Iterator[ExampleBatch]:
        """An endless iterator over minibatches of examples, in random order."""
        encoded = [row for example in examples for row in encode_turns(lm, example)]
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
        """Takes one optimizer step on an algorithm's loss.

        Args:
            policy: the policy to train.
            minibatch: rows of a rollout with their advantages.
            loss: the loss of each action.
            weigh: computes the weight of each action's loss from the minibatch's mask, for example `F.token_mean`.
            extra: an additional loss, whose gradient is added.
        """
        if self.config.compile and self._compiled is not policy:
            _compile(policy)
            self._compiled = policy
        require.gradients(self.parameters, self.say)
        self.micro_batches.fit(policy, most=default_pass_tokens(self.device))
        weights = weigh(minibatch.mask)

        def backward(part: Batch, rows: Tensor, steps: int) -> None:
            with record_function("lmgym/forward"), self._checkpointing():
                weighted = _weighted(policy, part, loss, weights[rows, :steps], self.metrics, not self.steps)
            self.weights.backward(weighted)

        self.micro_batches.over_rows(minibatch, backward)
        self.metrics.end_sum("policy/loss")
        if extra is not None:
            with self._checkpointing():
                added = extra()
            self.backward(added)
        self.optimizer_step(partial(examine_batch, policy, minibatch, loss, weights))

    @property
    def approx_kl(self) -> float:
        """KL(old ‖ new) by k3, mean over the tokens of this update so far, in nats. Synchronises with the device."""
        return self.metrics.mean("policy/approx_kl_nats")

    def minimise(
        self,
        items: Any,
        part_of_loss: Callable[[Any], Tensor],
        describe: Callable[[Any], str] = repr,
        *,
        model: Trained | None = None,
        tokens: Callable[[Any], int] | int = 0,
        whole_logits: bool = False,
    ) -> None:
        """Takes one optimizer step on a loss that is a sum over the items of a minibatch.

        Args:
            items: the minibatch: a sequence of any items, or a tensor of row indices.
            part_of_loss: the contribution of some of the items to the loss. It gets all of them if memory allows.
            describe: describes an item in an error message, if its gradient is not finite.
            model: what the loss passes through. With it, passes are chosen so that they fit into memory.
            tokens: the number of tokens of an item, or of every item; 0 if it is not known.
            whole_logits: whether the loss reads the logits of the whole vocabulary.
        """
        require.gradients(self.parameters, self.say)
        if model is not None:
            self.micro_batches.fit(model, whole_logits=whole_logits)

        def backward(part: slice) -> None:
            with self._checkpointing():
                loss = part_of_loss(items[part])
            self.weights.backward(loss)

        self.micro_batches.over_items(items, tokens, backward)
        self.optimizer_step(lambda: examine_items(self.parameters, items, part_of_loss, describe))

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the gradient of the next step. Every rank computes the whole loss."""
        world = current().world
        self.weights.backward(loss if world == 1 else loss / world)

    def optimizer_step(self, examine: Examine | None = None) -> None:
        """Takes one step with the accumulated gradient, if the gradient is finite.

        Args:
            examine: finds the rows whose gradient is not finite.

        Raises:
            BadStep: the gradient is not finite and `on_bad_step` is "stop". On devices where reading a value needs a
                synchronisation, `drain` raises it instead.
        """
        self.weights.end_gradient()
        norm = nn.utils.clip_grad_norm_(self.weights.values, self.config.max_grad_norm or torch.inf)
        refused = ~norm.isfinite()
        self.guard.check(refused, examine, self._place)
        self.metrics.add("optimizer/grad_norm", norm, ~refused)
        self.metrics.add_to_sum("optimizer/bad_steps", refused)
        with record_function("lmgym/step"):
            # If this is 1, the fused step leaves parameters, moments and step count unchanged, so the host need not
            # read it.
            self.optimizer.found_inf = refused.float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
            self.weights.write()
        self.steps += 1
        self.average.update(refused)

    @property
    def _place(self) -> str:
        return f"update {self.position - 1}, step {self.steps}" if self.position else f"an update, step {self.steps}"

    # Metrics and the average ---------------------------------------------------------------------------------------

    def summarise(self, rollout: RolloutBuffer) -> dict[str, float]:
        """Ends an update. Returns `ROLLOUT_METRICS` and all other `metrics`, in one transfer from the device."""
        _add_rollout(self.metrics, rollout)
        settings = {"kl/beta": rollout.beta, "optimizer/lr": self.lr, "optimizer/steps": float(self.steps)}
        row = self.drain() | settings
        self.steps = 0
        return row

    def drain(self) -> dict[str, float]:
        """The metrics since the last call, in one transfer from the device.

        Raises:
            BadStep: a gradient was not finite, and `on_bad_step` is "stop".
        """
        row = self.metrics.drain()
        self.guard.drain(bool(row.get("optimizer/bad_steps")), self._place)
        return row

    def averaged(self) -> AbstractContextManager[None]:
        """Runs the body with the moving average of the parameters, if `ema_decay` is not 0."""
        return self.average.swapped_in()

    def use_average(self) -> None:
        """Replaces the parameters by their moving average, if `ema_decay` is not 0."""
        self.average.copy_to_parameters()


def _compile(policy: TokenPolicy) -> None:
    if not isinstance(policy, Policy):
        raise ValueError(
            f"compile=True needs an lmgym.Policy, and this is a {type(policy).__name__}: leave compile off"
        )
    policy.compile()


def _weighted(
    policy: TokenPolicy, old: Batch, loss: Loss, weights: Tensor, metrics: Metrics, is_first_step: bool
) -> Tensor:
    """The weighted loss of some rows; it adds to the metrics too."""
    # Entries without an action may hold any value, also −∞. Mask them before the loss, not only after it: if a loss
    # is not finite, neither is its gradient, and multiplication by 0 gives NaN.
    new = Evaluation(*(torch.where(old.mask, part, 0.0) for part in policy.evaluate(old.sequences)))
    weighted = (weights * torch.where(old.mask, loss(new, old), 0.0)).sum()
    metrics.add_to_sum("policy/loss", weighted)
    log_ratio = (new.logp - old.logp).detach()
    if is_first_step:
        metrics.add("policy/ratio_deviation", log_ratio.exp().sub(1).abs(), old.mask)
    metrics.add("policy/entropy_nats", new.entropy, old.mask)
    metrics.add("policy/approx_kl_nats", torch.expm1(log_ratio) - log_ratio, old.mask)
    return weighted


def _add_rollout(metrics: Metrics, rollout: RolloutBuffer) -> None:
    """Adds what `ROLLOUT_METRICS` says of a rollout."""
    estimates = kl_estimates(rollout.logp, rollout.reference_logp)
    metrics.add("score/mean", rollout.score, rollout.score.isfinite())
    for name, column in rollout.breakdown.items() if len(rollout.breakdown) > 1 else ():
        metrics.add(f"score/{name}", column)
    metrics.add("reward/sequence", rollout.rewards.sum(1))
    metrics.add("kl/sequence_nats", torch.where(rollout.is_action, estimates["k1"], 0.0).sum(1))
    metrics.add("kl/token_k3_nats", estimates["k3"], rollout.is_action)
    metrics.add("tokens/mean", rollout.is_action.sum(1))
    metrics.add("tokens/unfinished_share", (rollout.finish == Finish.LENGTH).float())
