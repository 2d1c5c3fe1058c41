"""Float32 copies of parameters in half precision, which the optimizer steps in their place."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from agents.training.over_ranks import sum_gradients
from lmgym.ranks import current

HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """Master weights (Micikevicius et al. 2018, section 3.1, https://arxiv.org/abs/1710.03740).

    bfloat16 has 8 significant bits, so adding a step of less than 1/512 of a weight changes nothing, and most steps are
    smaller. The optimizer therefore adds its steps to a float32 copy, which is rounded into the weight after each step.
    Gradients of several passes are added up in float32 too. Memory per weight: 2 bytes, and 16 for copy, gradient and
    Adam's moments; a float32 weight needs 16 in all.

    Args:
        parameters: the trained parameters.

    Attributes:
        values: the tensors to optimize: copies of the parameters in half precision, and the other ones themselves.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.values: list[Tensor] = [p.detach().float() if p.dtype in HALF else p for p in parameters]
        self._pairs = [(p, v) for p, v in zip(parameters, self.values, strict=True) if p.dtype in HALF]
        self._versions = [p._version for p, _ in self._pairs]
        self._accumulating = False

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the gradient of the next step."""
        self._begin_once()
        with record_function("lmgym/backward"):
            loss.backward()
        self.take_gradients()

    def _begin_once(self) -> None:
        if not self._accumulating:
            self.begin_step()
            self._accumulating = True

    def end_gradient(self) -> None:
        """The gradient of the step is complete: adds it up over the ranks. The next `backward` begins a new one."""
        if current().world > 1:
            self._begin_once()  # a rank without rows has not called `backward`
            sum_gradients(self.values)
        self._accumulating = False

    @torch.no_grad()
    def begin_step(self) -> None:
        """Clears the gradients, and copies parameters again that were changed meanwhile, for example by loading."""
        for value in self.values:
            value.grad = None
        for (parameter, value), version in zip(self._pairs, self._versions, strict=True):
            parameter.grad = None
            if parameter._version != version:
                value.copy_(parameter)

    def take_gradients(self) -> None:
        """Adds the gradients of the parameters to those of their copies, and clears them."""
        for parameter, value in self._pairs:
            if parameter.grad is None:
                continue
            gradient, parameter.grad = parameter.grad.float(), None
            value.grad = gradient if value.grad is None else value.grad.add_(gradient)

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the copies into the parameters."""
        for parameter, value in self._pairs:
            parameter.copy_(value)
        self._versions = [p._version for p, _ in self._pairs]
