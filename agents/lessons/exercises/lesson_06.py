"""Exercises of lesson 6: PPO's clip."""

import torch
from torch import Tensor

from agents.lessons.exercise import Answer, demand, exercise, expect, lengths_mask, numbers

RATIOS = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 0.5, 0.9, 1.0, 1.1, 1.5], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0] * 5 + [-2.0] * 5, dtype=torch.float64)


def pessimistic(ratio: float, advantage: float, clip: float) -> float:
    """PPO's objective from its drawing (figure 1 of the paper): a straight line that becomes flat on one side."""
    if advantage >= 0:
        return advantage * (ratio if ratio < 1 + clip else 1 + clip)
    return advantage * (ratio if ratio > 1 - clip else 1 - clip)


@exercise(
    "6.1",
    "The clipped loss",
    "fill",
    '''
"""Exercise 6.1: the clipped loss.

PPO takes several steps from one rollout. ρ = π(a)/π_old(a) says how much more probable an action has become since it
was sampled. PPO maximises, per token,

    min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)

so that an action gains nothing from a ratio beyond 1 ± ε. Write `clipped_loss`: minus that, because optimizers
minimise. The arguments are log-probabilities.
"""

import torch


def clipped_loss(logp, old_logp, advantages, clip):
    """[N] the loss of each token; `clip` is ε."""
    ...
''',
    (
        "ρ = exp(log π − log π_old).",
        "ratio.clamp(1 - clip, 1 + clip) is the clipped ratio. Multiply both by the advantage before the minimum.",
        "-torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
    ),
)
def clipped_loss(answer: Answer) -> None:
    """The two broken lines of the paper's figure 1; and the gradient at ratio 1."""
    old = numbers((10,), 1)
    new, clip = old + RATIOS.log(), 0.2
    wanted = [-pessimistic(r, a, clip) for r, a in zip(RATIOS.tolist(), ADVANTAGES.tolist(), strict=True)]
    clipped = RATIOS.clamp(1 - clip, 1 + clip)
    mistakes = {
        "The sign is wrong: an optimizer minimises the loss": [-value for value in wanted],
        "You clip without the minimum: a bad action that became too probable must still be pushed down": -clipped
        * ADVANTAGES,
        "You do not clip": -RATIOS * ADVANTAGES,
        "You take the maximum: PPO takes the smaller, pessimistic value": -torch.maximum(
            RATIOS * ADVANTAGES, clipped * ADVANTAGES
        ),
        "You take the minimum of the ratios; multiply by the advantage first": -torch.minimum(RATIOS, clipped)
        * ADVANTAGES,
        "ρ is the exponential of the difference of the log-probabilities": -torch.minimum(
            (new - old) * ADVANTAGES, (new - old).clamp(1 - clip, 1 + clip) * ADVANTAGES
        ),
        "The ratio is upside down: π/π_old": -torch.minimum(
            ADVANTAGES / RATIOS, (1 / RATIOS).clamp(1 - clip, 1 + clip) * ADVANTAGES
        ),
    }
    expect(answer.clipped_loss(new, old, ADVANTAGES, clip), wanted, "ratios from 0.5 to 1.5, A = 2 and −2", mistakes)
    leaf = old.clone().requires_grad_(True)
    loss = answer.clipped_loss(leaf, old, ADVANTAGES, clip)
    demand(isinstance(loss, Tensor) and loss.requires_grad, "The loss has no gradient: do not detach `logp`.")
    expect(torch.autograd.grad(loss.sum(), leaf)[0], -ADVANTAGES, "the gradient at ratio 1, which is REINFORCE's, −A")


@exercise(
    "6.2",
    "Where the gradient vanishes",
    "mend",
    '''
"""Exercise 6.2: where the gradient vanishes. This code has a bug.

`has_gradient` says for which tokens PPO's loss has a gradient. A token has none if its ratio has already gone too far
in the direction that its advantage asks for: up for A > 0, down for A < 0. Find the bug and mend it.
"""

import torch


def has_gradient(ratios, advantages, clip):
    """[N] True where the clipped loss has a gradient; no ratio is exactly at 1 ± clip."""
    return (ratios > 1 - clip) & (ratios < 1 + clip)
''',
    (
        "Take A < 0 and ρ = 1.5: the bad action became more probable. Should PPO push it back?",
        "Only one of the two bounds matters, and the sign of the advantage says which.",
        "torch.where(advantages > 0, ratios < 1 + clip, ratios > 1 - clip)",
    ),
)
def has_gradient(answer: Answer) -> None:
    """Autograd of the minimum, token by token."""
    clip = 0.2
    leaf = RATIOS.clone().requires_grad_(True)
    gain = torch.minimum(leaf * ADVANTAGES, leaf.clamp(1 - clip, 1 + clip) * ADVANTAGES)
    wanted = torch.autograd.grad(gain.sum(), leaf)[0] != 0
    mistakes = {
        "A token outside both bounds can still have a gradient: one that moved against its advantage is pulled back": (
            1 - clip < RATIOS
        )
        & (1 + clip > RATIOS),
        "This is the opposite: True is where there is a gradient": ~wanted,
        "The two bounds are exchanged: for A > 0 the upper bound matters": torch.where(
            ADVANTAGES > 0, 1 - clip < RATIOS, 1 + clip > RATIOS
        ),
    }
    expect(answer.has_gradient(RATIOS, ADVANTAGES, clip), wanted, "ratios from 0.5 to 1.5, A = 2 and −2", mistakes)


@exercise(
    "6.3",
    "Old means old",
    "mend",
    '''
"""Exercise 6.3: old means old. This code has a bug.

`ppo_update` makes `epochs` steps of plain gradient descent on the clipped loss of one rollout of a bandit. The old
log-probabilities are those of the policy that sampled the actions. They must not change during the update. Find the
bug and mend it.
"""

import torch


def ppo_update(logits, actions, advantages, lr, epochs, clip):
    """[V] the logits after the update, from sampled actions [N] and their advantages [N]."""
    z = logits.clone().requires_grad_(True)
    for _ in range(epochs):
        logp = torch.log_softmax(z, 0)[actions]
        old_logp = logp.detach()
        ratio = (logp - old_logp).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        (gradient,) = torch.autograd.grad(-gain.mean(), z)
        z = (z - lr * gradient).detach().requires_grad_(True)
    return z.detach()
''',
    (
        "Print the ratio in every epoch.",
        "The ratio is always 1, so nothing is ever clipped. Who acted: the policy before the loop, or inside it?",
        "Compute old_logp once, before the loop, from `logits`.",
    ),
)
def ppo_update(answer: Answer) -> None:
    """Steps along a gradient in closed form: A ρ (e_a − π) where the clip leaves it, and 0 elsewhere."""
    actions, advantages = torch.tensor([0, 1, 2, 2, 3]), torch.tensor([1.0, -1.0, 2.0, 0.5, -0.5], dtype=torch.float64)
    start, lr, clip = numbers((4,), 2), 1.0, 0.2

    def path(epochs: int, old: str = "fixed", clip: float = clip) -> Tensor:
        z, first = start.clone(), start.log_softmax(0)[actions]
        for _ in range(epochs):
            logp, probs = z.log_softmax(0)[actions], z.softmax(0)
            ratio = (logp - (first if old == "fixed" else logp)).exp()
            moves = torch.where(advantages > 0, ratio < 1 + clip, ratio > 1 - clip)
            each = torch.where(moves, ratio * advantages, 0.0)
            z = z + lr * (each[:, None] * (torch.eye(4, dtype=torch.float64)[actions] - probs)).mean(0)
        return z

    for epochs in (1, 4):
        mistakes = {
            "The ratio is always 1: the old log-probabilities are computed anew in each epoch": path(epochs, "new"),
            "Nothing is clipped": path(epochs, clip=1e9),
            "You make only one step": path(1),
        }
        got = answer.ppo_update(start, actions, advantages, lr, epochs, clip)
        expect(got, path(epochs), f"{epochs} epochs", mistakes)


@exercise(
    "6.4",
    "The share of clipped tokens",
    "fill",
    '''
"""Exercise 6.4: the share of clipped tokens.

A metric to watch: the share of tokens whose ratio is outside 1 ± ε. If it is large, the steps are too large. Padding
(`is_action` False) does not count. Write `clip_fraction`.
"""

import torch


def clip_fraction(logp, old_logp, is_action, clip):
    """One number from 0 to 1, from three arrays [B, T]."""
    ...
''',
    (
        "A token is clipped if |ρ − 1| > ε.",
        "Divide the number of clipped tokens by the number of tokens, not by B · T.",
        "clipped = ((logp - old_logp).exp() - 1).abs() > clip; return clipped[is_action].float().mean()",
    ),
)
def clip_fraction(answer: Answer) -> None:
    """Counts by hand."""
    ratios = torch.tensor([[1.0, 1.3, 0.7, 0.99], [1.1, 1.25, 5.0, 5.0]], dtype=torch.float64)
    mask = lengths_mask([4, 2], 4)
    old = numbers((2, 4), 3)
    mistakes = {
        "You count the padding": 5 / 8,
        "You divide by all entries; divide by the number of tokens": 3 / 8,
        "You count only ratios above 1 + ε": 2 / 6,
        "You count only ratios below 1 − ε": 1 / 6,
    }
    got = answer.clip_fraction(old + ratios.log(), old, mask, 0.2)
    expect(got, 3 / 6, "six tokens, of which three are clipped", mistakes)
    ratios[0, 0] = 0.81
    got = answer.clip_fraction(old + ratios.log(), old, mask, 0.2)
    log_ratio = {"You compare the log-ratio with ε; compare the ratio itself": 4 / 6}
    expect(got, 3 / 6, "a ratio of 0.81, whose logarithm is below −0.2", log_ratio)
    ratios[0, 1:3] = 1.0
    got = answer.clip_fraction(old + ratios.log(), old, mask, 0.2)
    expect(got, 1 / 6, "six tokens, of which one is clipped", {"You return the share that is not clipped": 5 / 6})


@exercise(
    "6.5",
    "Whitened advantages",
    "mend",
    '''
"""Exercise 6.5: whitened advantages. This code has a bug.

PPO shifts and scales the advantages of a rollout to mean 0 and standard deviation 1, over the tokens alone. The padding
must not matter, and stays 0. Find the bug in `whiten` and mend it.
"""

import torch


def whiten(advantages, is_action):
    """[B, T] advantages with mean 0 and standard deviation 1 over the tokens, and 0 in the padding."""
    centred = advantages - advantages.mean()
    scaled = centred / (advantages.std() + 1e-8)
    return torch.where(is_action, scaled, 0.0)
''',
    (
        "Over which entries are the mean and the deviation taken?",
        "advantages[is_action] holds the tokens alone.",
        "kept = advantages[is_action]; use kept.mean() and kept.std(unbiased=False).",
    ),
)
def whiten(answer: Answer) -> None:
    """The definition: mean 0 and deviation 1 over the tokens, for any padding, in the same order."""
    mask = lengths_mask([4, 1, 2], 4)
    advantages = torch.where(mask, numbers((3, 4), 4) * 3 + 1, 0.0)
    got = torch.as_tensor(answer.whiten(advantages, mask), dtype=torch.float64)
    demand(got.shape == advantages.shape, f"You return the shape {list(got.shape)}; expected [3, 4].")
    demand(bool((got[~mask] == 0).all()), "The padding must stay 0.")
    kept = got[mask]
    mean, deviation = float(kept.mean()), float(kept.std(unbiased=False))
    spoiled = torch.as_tensor(answer.whiten(torch.where(mask, advantages, 50.0), mask), dtype=torch.float64)
    demand(
        torch.allclose(spoiled, got),
        "The result changes with the numbers in the padding: take mean and deviation over the tokens alone.",
    )
    demand(
        abs(mean) < 1e-6, f"The mean over the tokens is {mean:.3f} and not 0: do not leave the mean in, or add it back."
    )
    # With seven tokens, the unbiased deviation makes this 0.926, which is usual too.
    demand(0.92 < deviation < 1.01, f"The standard deviation over the tokens is {deviation:.3f} and not 1.")
    order = torch.corrcoef(torch.stack([kept, advantages[mask]]))[0, 1]
    demand(float(order) > 0.999999, "The result is not a shift and a positive scale of the advantages.")
