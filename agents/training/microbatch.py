"""Micro-batches: a minibatch goes through the model in several passes, which become smaller if memory runs out."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from agents.training.batch import Batch
from agents.training.master_weights import MasterWeights
from agents.training.metrics import Metrics
from agents.training.nonfinite import out_of_memory
from agents.training.pass_memory import Trained, activation_budget, bytes_per_token
from lmgym.io import first_line, report_progress
from lmgym.models import buckets
from lmgym.ranks import balanced, current


class Epoch:
    """Counts the rows of one epoch over a rollout, and reports the progress."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, rows: int) -> None:
        """An epoch over this many rows begins."""
        self._rows, self._done, self._tokens = rows, 0, 0

    def add(self, rows: int, tokens: int) -> None:
        """A pass over some rows is done."""
        self._done, self._tokens = self._done + rows, self._tokens + tokens
        report_progress("epoch", min(self._done, self._rows), self._rows, self._tokens)


class MicroBatches:
    """Splits a minibatch into passes whose gradients add up to the gradient of the minibatch.

    Args:
        parameters: the trained parameters.
        weights: hold the gradients of the passes so far, which are cleared before a step is tried again.
        metrics: are restored before a step is tried again.
        max_tokens: maximum tokens in a pass, padding included; 0 chooses it at the first step, from the model's size.
        by_length: whether to put rows of similar length into the same pass, which reduces padding.
        notify: receives a message if memory is short and the passes become smaller.
        recompute: whether passes use gradient checkpointing, and so keep less.

    Attributes:
        pass_tokens: maximum tokens in a pass; 0 while it is not chosen.
        pass_items: maximum texts or comparisons in a pass; 0 for as many as `pass_tokens` allows.
        epoch: how far the present pass over a rollout is, for progress reports.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        weights: MasterWeights,
        metrics: Metrics,
        max_tokens: int,
        by_length: bool,
        notify: Callable[[str], object],
        recompute: bool = False,
    ):
        self.parameters, self.weights = parameters, weights
        self.metrics = metrics
        self.by_length = by_length
        self.notify = notify
        self.recompute = recompute
        self.pass_tokens = max_tokens
        self.pass_items = 0
        self.epoch = Epoch()

    def fit(self, model: Trained, most: int = 0, whole_logits: bool = False) -> None:
        """Chooses `pass_tokens`, once, so that the activations of a pass fit into memory.

        Args:
            model: what the passes go through.
            most: maximum of `pass_tokens`; 0: none.
            whole_logits: whether the loss reads the logits of the whole vocabulary.
        """
        if self.pass_tokens:
            return
        each = bytes_per_token(model, self.recompute, whole_logits)
        if not each:
            self.pass_tokens = most
            return
        budget = activation_budget(
            self.parameters[0].device, sum(p.numel() * p.element_size() for p in self.parameters)
        )
        fitting = max(1, budget.size // each)
        self.pass_tokens = min(fitting, most or fitting)
        if budget.short and self.pass_tokens == fitting:
            self.notify(f"little memory is free: passes take at most {fitting} tokens, which costs only time")

    def split(self, minibatch: Batch) -> list[tuple[Tensor, int]]:
        """The rows of each pass of this rank, and the number of actions of the longest of them."""
        lengths, width = minibatch.mask.sum(1).tolist(), minibatch.sequences.prompt_ids.shape[1]
        if not self.by_length:
            lengths = [max(lengths)] * len(lengths)
        own = _own_share([width + length for length in lengths])
        parts = buckets([lengths[row] for row in own], width, self.pass_tokens)
        device = minibatch.mask.device
        return [(torch.tensor([own[row] for row in rows], device=device), steps) for rows, steps in parts]

    def over_rows(self, minibatch: Batch, backward: Callable[[Batch, Tensor, int], None]) -> None:
        """Accumulates the gradient of a minibatch of a rollout.

        Args:
            minibatch: the rows.
            backward: adds the gradient of one pass. Its arguments: the rows of the pass, cut to `steps` actions; their
                indices in the minibatch; and `steps`.

        Raises:
            MemoryError: a single row does not fit into memory.
        """

        def attempt() -> None:
            for rows, steps in self.split(minibatch):
                backward(minibatch[rows].first_steps(steps), rows, steps)
                done = len(rows) * current().world  # the other ranks work at the same time
                self.epoch.add(done, done * (minibatch.sequences.prompt_ids.shape[1] + steps))

        def shrink() -> str:
            parts, width = self.split(minibatch), minibatch.sequences.prompt_ids.shape[1]
            if max(len(rows) for rows, _ in parts) == 1:
                return ""
            self.pass_tokens = max(len(rows) * (width + steps) for rows, steps in parts) // 2
            return f"at most {self.pass_tokens} tokens"

        with self.metrics.of_own_rows():
            self._within_memory(attempt, shrink)

    def split_items(self, tokens: Sequence[int]) -> list[slice]:
        """The items of each pass: neighbours, of which no more than `pass_items` or `pass_tokens` are in a pass.

        Args:
            tokens: of each item; 0 if its size is not known. Items of a pass are padded to the longest.
        """
        parts: list[slice] = []
        start = longest = 0
        for i, size in enumerate(tokens):
            longest, count = max(longest, size), i - start + 1
            full = self.pass_tokens and count * longest > self.pass_tokens
            if i > start and (full or (self.pass_items and count > self.pass_items)):
                parts.append(slice(start, i))
                start, longest = i, size
        return [*parts, slice(start, len(tokens))]

    def over_items(self, items: Any, tokens: Callable[[Any], int] | int, backward: Callable[[slice], None]) -> None:
        """Accumulates the gradient of a minibatch of texts or comparisons.

        Args:
            items: a sequence of any items, or a tensor of row indices.
            tokens: the number of tokens of an item, or of every item; 0 if it is not known.
            backward: adds the gradient of the items in a slice.

        Raises:
            MemoryError: a single item does not fit into memory.
        """

        sizes = [tokens] * len(items) if isinstance(tokens, int) else [tokens(item) for item in items]
        own = _own_block(sizes)

        def passes() -> list[slice]:
            parts = self.split_items(sizes[own]) if sizes[own] else []
            return [slice(own.start + part.start, own.start + part.stop) for part in parts]

        def attempt() -> None:
            for part in passes():
                backward(part)

        def shrink() -> str:
            size = max(part.stop - part.start for part in passes())
            self.pass_items = (size + 1) // 2
            return f"at most {self.pass_items} rows" if size > 1 else ""

        with self.metrics.of_own_rows():
            self._within_memory(attempt, shrink)

    def _within_memory(self, attempt: Callable[[], None], shrink: Callable[[], str]) -> None:
        """Accumulates the gradient of a step. If memory runs out, it starts again with smaller passes.

        Args:
            attempt: accumulates the gradient, starting from none.
            shrink: makes the passes smaller and returns their new size in words, or "" if they cannot be smaller.
        """
        while True:
            measured = self.metrics.copy()
            try:
                return attempt()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            # Outside the handler, because the exception keeps the tensors of the failed pass alive.
            self.metrics.put_back(measured)
            for parameter in (*self.parameters, *self.weights.values):
                parameter.grad = None  # what the failed attempt has accumulated
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            now = shrink()
            if not now:
                raise MemoryError(
                    f"memory ran out ({reason}), and a pass of one row is the smallest possible: use fewer or shorter "
                    "completions (rows, max_new_tokens), gradient_checkpointing, a lower rank, or a smaller model"
                )
            self.notify(f"memory ran out ({reason}): the step is repeated in passes of {now}, with the same result")


def _own_share(sizes: Sequence[int]) -> Sequence[int]:
    """The rows that this rank takes, so that all ranks have about the same number of tokens."""
    ranks = current()
    return range(len(sizes)) if ranks.world == 1 else balanced(sizes, ranks.world)[ranks.rank]


def _own_block(sizes: Sequence[int]) -> slice:
    """The same for items that are taken as slices: neighbours, with about the same number of tokens on each rank."""
    ranks = current()
    if ranks.world == 1:
        return slice(0, len(sizes))
    ends = list(accumulate((max(1, size) for size in sizes), initial=0))
    middles = [(a + b) / 2 for a, b in pairwise(ends)]
    first, last = (bisect_left(middles, ends[-1] * rank / ranks.world) for rank in (ranks.rank, ranks.rank + 1))
    return slice(first, last)
