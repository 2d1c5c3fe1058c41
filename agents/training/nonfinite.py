"""Gradients that are not finite: refuses the step and finds the rows that caused it. Also detects out of memory."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.training.batch import Batch, Loss
from agents.training.stateful import State
from lmgym.devices import host_reads_are_free
from lmgym.policy import Evaluation, Policy, TokenPolicy

OnBadStep = Literal["stop", "skip"]
SHOWN = 3
"""The maximum number of rows that an error message shows; it counts the others."""
SMALL = 16_000_000
"""The maximum number of parameters that a reproduction includes."""


class BadStep(ArithmeticError):
    """An optimizer step that was not taken, because its gradient is not finite.

    Attributes:
        reproduction: the rows, and the parameters if there are at most `SMALL`, to reproduce the error.
    """

    def __init__(self, message: str, reproduction: State):
        super().__init__(message)
        self.reproduction = reproduction


@dataclass(frozen=True)
class Finding:
    """A quantity that is not finite.

    Attributes:
        row: the index of the row in the minibatch.
        what: the quantity, its value and its position.
        text: the text of the row.
    """

    row: int
    what: str
    text: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.what}. Its text: {self.text}"


Examine = Callable[[], tuple[list[Finding], State]]
"""Finds the cause in a minibatch whose gradient is not finite."""


class StepGuard:
    """Reacts to gradients that are not finite.

    Args:
        parameters: the trained parameters.
        on_bad_step: "stop" raises `BadStep`; "skip" only skips the step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], on_bad_step: OnBadStep):
        self.parameters = parameters
        self.on_bad_step = on_bad_step
        # The steps since the last drain(), on devices where reading a value needs a synchronisation. An update has
        # fewer than `maxlen`.
        self._unread: deque[tuple[Tensor, Examine | None]] = deque(maxlen=4096)

    def check(self, refused: Tensor, examine: Examine | None, when: str) -> None:
        """Raises if the step was refused. If reading the device needs a synchronisation, it leaves this to `drain`.

        Args:
            refused: a boolean on the device.
            examine: finds the rows that caused it.
            when: the step, in words.

        Raises:
            BadStep: the step was refused, and `on_bad_step` is "stop".
        """
        if self.on_bad_step != "stop":
            return
        if not host_reads_are_free(refused.device):
            self._unread.append((refused, examine))
        elif bool(refused):
            raise bad_step(when, examine, self.parameters)

    def drain(self, any_refused: bool, when: str) -> None:
        """Discards the stored steps.

        Args:
            any_refused: whether a step was refused.
            when: the last step, in words.

        Raises:
            BadStep: a step was refused, and `on_bad_step` is "stop".
        """
        unread = list(self._unread)
        self._unread.clear()
        if any_refused and self.on_bad_step == "stop":
            examine = next((examine for refused, examine in unread if bool(refused)), None)
            raise bad_step(when, examine, self.parameters)


def bad_step(when: str, examine: Examine | None, parameters: Sequence[nn.Parameter]) -> BadStep:
    """The error for a step that was refused.

    Args:
        when: the step, in words.
        examine: examines the minibatch row by row; None if the minibatch is not known.
        parameters: the trained parameters.
    """
    ruined = [i for i, p in enumerate(parameters) if not bool(p.isfinite().all())]
    findings: list[Finding] = []
    state, otherwise = State(), "It is not known which row caused it."
    if examine is not None:
        with torch.enable_grad():
            findings, state = examine()
        otherwise = "The gradient of each single row is finite, but their sum is not."
    rows = "; ".join(str(finding) for finding in findings[:SHOWN])
    more = f" (and {len(findings) - SHOWN} rows more)" if len(findings) > SHOWN else ""
    why = f"{len(ruined)} of the parameters themselves are not finite. " if ruined else ""
    tensors = dict(state.tensors)
    if sum(p.numel() for p in parameters) <= SMALL:
        tensors |= {f"parameter/{i:04}": p.detach().clone() for i, p in enumerate(parameters)}
    return BadStep(
        f"{when}: the gradient is not finite, and the step was not taken. {why}{rows + more if rows else otherwise}",
        State(state.data | {"when": when, "findings": [str(f) for f in findings]}, tensors),
    )


def examine_batch(policy: TokenPolicy, batch: Batch, loss: Loss, weights: Tensor) -> tuple[list[Finding], State]:
    """Examines a minibatch: first the values that the rollout recorded, then each row's forward pass and gradient."""
    found: dict[int, str] = {}
    names = ("rewards", "reference_logp", "logp", "values", "advantages", "returns")
    for name in names:
        column = getattr(batch, name)
        for row in range(len(batch.mask)):
            bad = batch.mask[row] & ~column[row].isfinite()
            if bool(bad.any()):
                step = int(bad.nonzero()[0, 0])
                found[row] = f"{_WORDS[name]} is {column[row, step].item()} at token {step}"
        if found:  # later columns depend on this one; whitened advantages even on all rows
            break
    for row in range(len(batch.mask)) if not found else ():
        why = _examine_row(policy, batch[torch.tensor([row], device=batch.mask.device)], loss, weights[row : row + 1])
        if why:
            found[row] = why
    findings = [Finding(row, why, _text(policy, batch, row)) for row, why in found.items()]
    rows = torch.tensor(list(found)[:8], dtype=torch.long, device=batch.mask.device)
    sequences = batch.sequences[rows]
    tensors = {name: getattr(batch, name)[rows] for name in ("mask", *names)} | {
        name: getattr(sequences, name) for name in ("prompt_ids", "prompt_mask", "tokens")
    }
    return findings, State({"rows": rows.tolist()}, tensors)


_WORDS = {
    "rewards": "the reward",
    "reference_logp": "the reference's log-probability",
    "logp": "the log-probability with which a token was sampled",
    "values": "the critic's value",
    "advantages": "the advantage",
    "returns": "the return",
}


def _examine_row(policy: TokenPolicy, row: Batch, loss: Loss, weights: Tensor) -> str:
    new = Evaluation(*(torch.where(row.mask, part, 0.0) for part in policy.evaluate(row.sequences)))
    for name, column in zip(("log-probability", "value", "entropy"), new, strict=True):
        bad = row.mask & ~column.isfinite()
        if bool(bad.any()):
            return f"the policy's {name} is {column[bad][0].item()} at token {int(bad.nonzero()[0, 1])}"
    value = loss(new, row)
    bad = row.mask & ~value.isfinite()
    if bool(bad.any()):
        return f"the loss is {value[bad][0].item()} at token {int(bad.nonzero()[0, 1])}"
    return _gradient(policy.parameters(), (weights * torch.where(row.mask, value, 0.0)).sum())


def _gradient(parameters: Sequence[nn.Parameter], loss: Tensor) -> str:
    """What is not finite: a loss or its gradient; "" if both are finite."""
    if not bool(loss.isfinite()):
        return f"the loss is {loss.item()}"
    parts = torch.autograd.grad(loss, [p for p in parameters if p.requires_grad], allow_unused=True)
    return "" if all(bool(p.isfinite().all()) for p in parts if p is not None) else "the gradient is not finite"


def examine_items(
    parameters: Sequence[nn.Parameter],
    items: Any,
    share: Callable[[Any], Tensor],
    describe: Callable[[Any], str],
) -> tuple[list[Finding], State]:
    """Examines the texts or comparisons of a minibatch one by one."""
    findings = []
    for row in range(len(items)):
        why = _gradient(parameters, share(items[row : row + 1]))
        if why:
            findings.append(Finding(row, why, describe(items[row])[:2000]))
    return findings, State({"rows": [f.row for f in findings], "items": [f.text for f in findings]})


def _text(policy: TokenPolicy, batch: Batch, row: int) -> str:
    sequences = batch.sequences
    prompt = sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist()
    tokens = sequences.tokens[row][batch.mask[row]].tolist()
    if not isinstance(policy, Policy):
        return f"tokens {prompt} | {tokens}"
    return f"{policy.lm.text.decode(prompt)!r} | {policy.lm.text.decode_completion(prompt, tokens)!r}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the host or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
