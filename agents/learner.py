"""Around every algorithm: optimizer steps, learning-rate schedule, shuffled minibatches, masked means of metrics."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from agents import functional as F
from agents.training import Batch, Loss, Metrics, ShuffledMinibatches, State, Stateful, nonfinite
from lmgym.devices import host_reads_are_free
from lmgym.env import Finish, TokenVectorEnv
from lmgym.models import (
    Example,
    ExampleBatch,
    LanguageModel,
    buckets,
    collate_examples,
    default_pass_tokens,
    encode_example,
)
from lmgym.policy import Evaluation, Policy, TokenPolicy
from lmgym.reward import kl_estimates
from lmgym.rollout import RolloutBuffer

Schedule = Literal["linear", "cosine", "constant"]
Part = TypeVar("Part", bound=Stateful)


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
"""What `Learner.summarise` measures for every algorithm, and "score/NAME" for each component of a composed score."""

STEP_METRICS = {
    "optimizer/grad_norm": "norm of the gradient before clipping, mean over optimizer steps",
    "optimizer/bad_steps": "optimizer steps that were not taken, because the gradient was not finite",
}
"""What `Learner.step` measures."""

METRICS = (
    ROLLOUT_METRICS
    | STEP_METRICS
    | {
        "policy/loss": "the loss, each action weighted as the algorithm weighs it, mean over optimizer steps",
        "policy/entropy_nats": "entropy of the next-token distribution, mean over tokens of the whole update, in nats",
        "policy/approx_kl_nats": "KL(old ‖ new) by k3, mean over tokens of the whole update, in nats",
        "policy/ratio_deviation": "|ratio − 1|, mean over tokens of the first minibatch; 0 but for rounding",
    }
)
"""What `Learner.fit` and `Learner.summarise` measure."""


_COUNTS = ("position", "steps", "_pass_tokens", "_pass_items")


class Learner:
    """Moves parameters and keeps the score of an update.

    Args:
        parameters: what is trained.
        config: how.
        seed: of the shuffles, and of the prompts and samples that an algorithm draws.
        on_bad_step: what a gradient that is not finite does: "stop" raises `BadStep`, on a CPU before the step and
            elsewhere at the end of the update; "skip" counts it in "optimizer/bad_steps". It is taken in no case.
        say: is told what the user should know, such as that memory ran out and smaller passes were taken.

    Attributes:
        position: how many updates (or, in supervised learning, steps) are done, the present one included.

    Raises:
        ValueError: there is nothing to train.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: LearnerConfig,
        seed: int = 0,
        *,
        on_bad_step: nonfinite.OnBadStep = "stop",
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
        self.metrics = Metrics()
        self.steps = 0
        self.position = 0
        self.on_bad_step = on_bad_step
        self.say = say or partial(warnings.warn, stacklevel=2)
        self._begins = True
        self._average = [p.detach().clone() for p in self.parameters] if config.ema_decay else []
        self._pass_tokens = config.micro_tokens or default_pass_tokens(self.device)
        self._pass_items = 0
        # Where nobody looks at once, the steps since metrics were drained; no more than anybody takes in an update.
        self._unseen: deque[tuple[Tensor, nonfinite.Examine | None]] = deque(maxlen=4096)
        self._parts: dict[str, Stateful] = {}
        self._restored: State | None = None

    # Where it stands -----------------------------------------------------------------------------------------------

    def updates(self, total: int) -> Iterator[int]:
        """The numbers of the updates to be made: 0 to `total` − 1, or, where a run goes on, those that are left.

        An algorithm that counts its updates with it can be interrupted at each `yield` and resumed.
        """
        first = 0 if self._restored is None else self.position
        for update in range(first, total):
            self.position = update + 1
            yield update
        self._restored = None  # whoever trains with this learner again starts again

    def register(self, name: str, part: Part) -> Part:
        """Makes something that an algorithm remembers from update to update a part of the checkpoints.

        Args:
            name: tells it from other parts.
            part: has `state` and `restore`; where a run goes on, it is restored now.

        Raises:
            ValueError: the name is taken, or has a "/".
        """
        if name == "learner" or "/" in name:
            raise ValueError(f"a part cannot be called {name!r}: take a name without '/' that is not 'learner'")
        self._parts[name] = part
        if self._restored is not None:
            part.restore(self._restored.part(name))
        return part

    def state(self) -> State:
        """Parameters, moments, moving average, generator, position, and what was kept: all that a later step needs."""
        tensors = self._tensors() | {"generator": self.generator.get_state()}
        moments = [self.optimizer.state.get(p, {}) for p in self.parameters]
        tensors |= {f"optimizer/{i:04}/{key}": t for i, of in enumerate(moments) for key, t in of.items()}
        counts = {name: getattr(self, name) for name in _COUNTS}
        return State.of({"learner": State(counts, tensors)} | {name: p.state() for name, p in self._parts.items()})

    def restore(self, state: State) -> None:
        """Goes on from where `state` was taken; call it before training begins.

        Raises:
            ValueError: the state is not one of such a learner; nothing was changed.
        """
        own = state.part("learner")
        counts = {name: own.count(name) for name in _COUNTS}
        tensors = dict(own.tensors)
        moments = [self._moments(i, p, tensors) for i, p in enumerate(self.parameters)]
        generator = torch.empty_like(self.generator.get_state())
        State({}, tensors).copy_to(self._tensors() | {"generator": generator})
        self.generator.set_state(generator)
        for parameter, of in zip(self.parameters, moments, strict=True):
            self.optimizer.state[parameter] = of
        for name, count in counts.items():
            setattr(self, name, count)
        self._restored = state

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"parameter/{i:04}": p for i, p in enumerate(self.parameters)}
        return named | {f"average/{i:04}": p for i, p in enumerate(self._average)}

    def _moments(self, number: int, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adam's numbers for one parameter, taken out of a checkpoint's tensors; none before its first step."""
        start = f"optimizer/{number:04}/"
        found = {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
        step = torch.zeros((), device=self.device)
        like = {"step": step, "exp_avg": parameter.detach(), "exp_avg_sq": parameter.detach()} if found else {}
        fresh = {name: torch.empty_like(t) for name, t in like.items()}
        State({}, found).copy_to(fresh)
        return fresh

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
                passes = partial(self._micro_batches, rows, lengths, width)
                self._require_gradients()
                attempt = partial(self._run_passes, policy, batch, rows, loss, weights, passes)
                self._within_memory(attempt, partial(self._shorter_passes, passes, width))
                self.metrics.end_sum("policy/loss")
                if extra is not None:
                    self.backward(extra())
                self.optimizer_step(partial(self._examine, policy, batch, rows, loss, weights))
            if target_kl and self.metrics.mean("policy/approx_kl_nats") > target_kl:
                break

    def minimise(
        self,
        items: Any,
        share: Callable[[Any], Tensor],
        describe: Callable[[Any], str] = repr,
    ) -> None:
        """One optimizer step down the gradient of a loss that is a sum over a minibatch.

        Args:
            items: the minibatch, a sequence of anything, or a tensor of row numbers.
            share: the part of the loss that some of them contribute. It is given all, as long as memory allows.
            describe: says what an item is, where its gradient is not finite.
        """

        self._require_gradients()

        def attempt() -> None:
            size = self._pass_items or len(items)
            for start in range(0, len(items), size):
                self.backward(share(items[start : start + size]))

        self._within_memory(attempt, lambda: self._fewer_items(len(items)))
        self.optimizer_step(lambda: nonfinite.examine_items(self.parameters, items, share, describe))

    def _require_gradients(self) -> None:
        """Switches gradients on again for parameters that somebody froze, and tells the user."""
        frozen = [p for p in self.parameters if not p.requires_grad]
        if not frozen:
            return
        for parameter in frozen:
            parameter.requires_grad_(True)
        self.say(
            f"{len(frozen)} of the {len(self.parameters)} parameters in training did not require gradients any more, "
            "and do again: peft's disable_adapter() switches gradients off. To look at the base model, use "
            "lm.adapters.using(None); to train fewer parameters, give only these to a new Learner"
        )

    def _run_passes(
        self,
        policy: TokenPolicy,
        batch: Batch,
        rows: Tensor,
        loss: Loss,
        weights: Tensor,
        passes: Callable[[], list[tuple[Tensor, int]]],
    ) -> None:
        """Adds up the gradient of a minibatch."""
        for part, steps in passes():
            old = batch[rows[part]].first_steps(steps)
            with record_function("lmgym/forward"):
                weighted = self._weighted(policy, old, loss, weights[part, :steps])
            self.backward(weighted)

    @staticmethod
    def _examine(policy: TokenPolicy, batch: Batch, rows: Tensor, loss: Loss, weights: Tensor) -> Any:
        return nonfinite.examine_batch(policy, batch[rows], loss, weights)

    def _within_memory(self, attempt: Callable[[], None], smaller: Callable[[], str]) -> None:
        """Makes an attempt at a step's gradient; where memory runs out, again in smaller passes.

        Args:
            attempt: adds up the gradient, from nothing.
            smaller: makes the passes of the next attempt smaller and says how; "" where they cannot be.

        Raises:
            MemoryError: the smallest pass does not fit.
        """
        while True:
            kept = self.metrics.copy()
            try:
                return attempt()
            except (MemoryError, RuntimeError) as error:
                if not nonfinite.out_of_memory(error):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
            # Out of the handler, which holds on to the tensors of the failed pass.
            self.metrics.put_back(kept)
            for parameter in self.parameters:
                parameter.grad = None  # what the failed attempt has added up
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            now = smaller()
            if not now:
                raise MemoryError(
                    f"memory ran out ({reason}), and a pass of one row is the smallest there is: take fewer or shorter "
                    "completions (rows, max_new_tokens), a lower rank, or a smaller model"
                )
            self.say(f"memory ran out ({reason}): the step is taken again in passes of {now}, with the same result")

    def _shorter_passes(self, passes: Callable[[], list[tuple[Tensor, int]]], width: int) -> str:
        tried = passes()
        if max(len(part) for part, _ in tried) == 1:
            return ""
        self._pass_tokens = max(len(part) * (width + steps) for part, steps in tried) // 2
        return f"at most {self._pass_tokens} tokens"

    def _fewer_items(self, count: int) -> str:
        size = min(self._pass_items or count, count)
        self._pass_items = (size + 1) // 2
        return f"at most {self._pass_items} rows" if size > 1 else ""

    def _micro_batches(self, rows: Tensor, lengths: Sequence[int], width: int) -> list[tuple[Tensor, int]]:
        """Which of a minibatch's rows go through the model together, and for how many steps."""
        most = self._pass_tokens
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
        self.metrics.add("policy/approx_kl_nats", torch.expm1(log_ratio) - log_ratio, old.mask)
        return weighted

    def summarise(self, buffer: RolloutBuffer, env: TokenVectorEnv) -> dict[str, float]:
        """Ends an update: `ROLLOUT_METRICS` and whatever else was added to `metrics`, in one transfer; and steers β."""
        estimates = kl_estimates(buffer.logp, buffer.reference_logp)
        self.metrics.add("score/mean", buffer.score, buffer.score.isfinite())
        for name, column in buffer.breakdown.items() if len(buffer.breakdown) > 1 else ():
            self.metrics.add(f"score/{name}", column)
        self.metrics.add("reward/sequence", buffer.rewards.sum(1))
        self.metrics.add("kl/sequence_nats", torch.where(buffer.is_action, estimates["k1"], 0.0).sum(1))
        self.metrics.add("kl/token_k3_nats", estimates["k3"], buffer.is_action)
        self.metrics.add("tokens/mean", buffer.is_action.sum(1))
        self.metrics.add("tokens/unfinished_share", (buffer.finish == Finish.LENGTH).float())
        beta, lr = env.kl_controller.beta, self.optimizer.param_groups[0]["lr"]
        row = self.drain() | {"kl/beta": beta, "optimizer/lr": lr, "optimizer/steps": float(self.steps)}
        self.steps = 0
        if math.isfinite(row["kl/sequence_nats"]):
            env.kl_controller.update(row["kl/sequence_nats"], buffer.rows)
        return row

    def drain(self) -> dict[str, float]:
        """The metrics since the last call, in one transfer.

        Raises:
            nonfinite.BadStep: a gradient was not finite, and that is to stop the run.
        """
        row, unseen = self.metrics.drain(), list(self._unseen)
        self._unseen.clear()
        if row.get("optimizer/bad_steps") and self.on_bad_step == "stop":
            raise self._bad_step(next((examine for bad, examine in unseen if bool(bad)), None))
        return row

    def _bad_step(self, examine: nonfinite.Examine | None) -> nonfinite.BadStep:
        when = f"update {self.position - 1}" if self.position else "an update"
        return nonfinite.bad_step(f"{when}, step {self.steps}", examine, self.parameters)

    def minibatches(self, rows: int, size: int) -> Iterator[Tensor]:
        """Indices of all rows in random order, `size` at a time, on the device."""
        yield from torch.randperm(rows, generator=self.generator, device=self.device).split(size)

    def step(self, loss: Tensor) -> None:
        """One optimizer step down the gradient of `loss`."""
        self.backward(loss)
        self.optimizer_step()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to that of the step to come."""
        if self._begins:
            self.optimizer.zero_grad(set_to_none=True)
            self._begins = False
        with record_function("lmgym/backward"):
            loss.backward()

    def optimizer_step(self, examine: nonfinite.Examine | None = None) -> None:
        """One optimizer step down the gradient that has been added up, if it is finite.

        Args:
            examine: finds out which rows are to blame if it is not.

        Raises:
            nonfinite.BadStep: it is not, that is to stop the run, and looking is free; elsewhere `drain` raises it.
        """
        self._begins = True
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or torch.inf)
        bad = ~norm.isfinite()
        if self.on_bad_step == "stop" and not host_reads_are_free(self.device):
            self._unseen.append((bad, examine))
        elif self.on_bad_step == "stop" and bool(bad):
            raise self._bad_step(examine)
        self.metrics.add("optimizer/grad_norm", norm, ~bad)
        self.metrics.add_to_sum("optimizer/bad_steps", bad)
        with record_function("lmgym/step"):
            # The fused step leaves parameters, moments and its own count alone where this is 1: nobody has to look.
            self.optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        self.steps += 1
        if self._average:
            share = (1 - self.config.ema_decay) * ~bad
            with torch.no_grad():
                for average, parameter in zip(self._average, self.parameters, strict=True):
                    average.lerp_(parameter, share.to(parameter.dtype))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Runs the body with the moving average of the parameters, where `ema_decay` keeps one."""
        kept = [p.detach().clone() for p in self.parameters] if self._average else []
        self.use_average()
        try:
            yield
        finally:
            self._copy(kept)

    def use_average(self) -> None:
        """Ends with the moving average of the parameters, where `ema_decay` keeps one."""
        self._copy(self._average)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=False):
            parameter.copy_(value)

    def shuffled_minibatches(self, rows: int, size: int, epochs: int) -> Iterator[tuple[int, Tensor]]:
        """The steps that are left of so many passes over all rows, each with the numbers of its minibatch's rows."""
        shuffle = self.register("shuffle", ShuffledMinibatches(rows, size, self.generator))
        for step in self.updates(epochs * -(-rows // size)):
            yield step, next(shuffle)

    def example_batches(self, lm: LanguageModel, examples: Sequence[Example], rows: int) -> Iterator[ExampleBatch]:
        """Minibatches of texts in random order, without end."""
        encoded = [encode_example(lm, example) for example in examples]
        for batch in self.register("examples", ShuffledMinibatches(len(encoded), rows, self.generator)):
            yield collate_examples(lm, [encoded[i] for i in batch.tolist()])


def _compile(policy: TokenPolicy) -> None:
    if not isinstance(policy, Policy):
        raise ValueError(f"compile=True compiles an lmgym.Policy, and this is a {type(policy).__name__}: leave it off")
    policy.compile()
