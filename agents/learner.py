"""Around every algorithm: optimizer steps, learning-rate schedule, shuffled minibatches, masked means of metrics."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

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
            self.parameters, lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay
        )
        # On the device, so that shuffling moves no indices.
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.metrics = Metrics()

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

    def minibatches(self, rows: int, size: int) -> Iterator[Tensor]:
        """Indices of all rows in random order, `size` at a time, on the device."""
        yield from torch.randperm(rows, generator=self.generator, device=self.device).split(size)

    def step(self, loss: Tensor) -> None:
        """One optimizer step down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or torch.inf)
        self.metrics.add("optimizer/grad_norm", norm)
        self.optimizer.step()


class Metrics:
    """Masked means over a whole update, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

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
