"""Micro-batches: a minibatch goes through the model in several passes, which become smaller if memory runs out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from agents.training.batch import Batch
from agents.training.master_weights import MasterWeights
from agents.training.metrics import Metrics
from agents.training.nonfinite import out_of_memory
from lmgym.models import buckets, default_pass_tokens


class MicroBatches:
    """Splits a minibatch into passes whose gradients add up to the gradient of the minibatch.

    Args:
        parameters: the trained parameters.
        weights: hold the gradients of the passes so far, which are cleared before a step is tried again.
        metrics: are restored before a step is tried again.
        max_tokens: maximum tokens in a pass, padding included; 0 chooses a number that suits the device.
        by_length: whether to put rows of similar length into the same pass, which reduces padding.
        notify: receives a message if memory runs out and the passes become smaller.

    Attributes:
        pass_tokens: maximum tokens in a pass over rows of a rollout.
        pass_items: maximum texts or comparisons in a pass; 0 for the whole minibatch.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        weights: MasterWeights,
        metrics: Metrics,
        max_tokens: int,
        by_length: bool,
        notify: Callable[[str], object],
    ):
        self.parameters, self.weights = parameters, weights
        self.metrics = metrics
        self.by_length = by_length
        self.notify = notify
        self.pass_tokens = max_tokens or default_pass_tokens(parameters[0].device)
        self.pass_items = 0

    def split(self, minibatch: Batch) -> list[tuple[Tensor, int]]:
        """The rows of each pass, and the number of actions of the longest of them."""
        lengths, width = minibatch.mask.sum(1).tolist(), minibatch.sequences.prompt_ids.shape[1]
        if not self.by_length:
            lengths = [max(lengths)] * len(lengths)
        parts = buckets(lengths, width, self.pass_tokens)
        return [(torch.tensor(rows, device=minibatch.mask.device), steps) for rows, steps in parts]

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

        def shrink() -> str:
            parts, width = self.split(minibatch), minibatch.sequences.prompt_ids.shape[1]
            if max(len(rows) for rows, _ in parts) == 1:
                return ""
            self.pass_tokens = max(len(rows) * (width + steps) for rows, steps in parts) // 2
            return f"at most {self.pass_tokens} tokens"

        self._within_memory(attempt, shrink)

    def over_items(self, count: int, backward: Callable[[slice], None]) -> None:
        """Accumulates the gradient of a minibatch of `count` texts or comparisons.

        Args:
            count: the number of items.
            backward: adds the gradient of the items in a slice.

        Raises:
            MemoryError: a single item does not fit into memory.
        """

        def attempt() -> None:
            size = self.pass_items or count
            for start in range(0, count, size):
                backward(slice(start, start + size))

        def shrink() -> str:
            size = min(self.pass_items or count, count)
            self.pass_items = (size + 1) // 2
            return f"at most {self.pass_items} rows" if size > 1 else ""

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
                reason = (str(error).splitlines() or [type(error).__name__])[0]
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
                    "completions (rows, max_new_tokens), a lower rank, or a smaller model"
                )
            self.notify(f"memory ran out ({reason}): the step is repeated in passes of {now}, with the same result")
