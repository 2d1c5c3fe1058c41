"""Exercises of lesson 4: the critic, and generalised advantages."""

import torch
from torch import Tensor

from agents.lessons.exercise import Answer, demand, exercise, expect, lengths_mask, numbers

LENGTHS, WIDTH = [4, 2, 3], 4


def example(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, is_action and bootstrap of three rows; the last row was truncated."""
    mask = lengths_mask(LENGTHS, WIDTH)
    rewards = torch.where(mask, numbers((3, WIDTH), seed), 0.0)
    return rewards, numbers((3, WIDTH), seed + 1), mask, torch.tensor([0.0, 0.0, 0.7], dtype=torch.float64)


def deltas_by_hand(rewards: Tensor, values: Tensor, bootstrap: Tensor, gamma: float, after: str = "right") -> Tensor:
    """δ, one entry after the other; `after` says what follows a row's last token, for typical mistakes."""
    found = torch.zeros_like(rewards)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            last = t + 1 == length
            following = values[row, t + 1] if t + 1 < WIDTH else torch.tensor(0.0)
            if last and after == "right":
                following = bootstrap[row]
            elif last and after == "zero":
                following = torch.tensor(0.0)
            elif last and after == "always":
                following = values[row, t]
            found[row, t] = rewards[row, t] + gamma * following - values[row, t]
    return found


def advantages_by_hand(
    rewards: Tensor, values: Tensor, bootstrap: Tensor, gamma: float, lam: float, after: str = "right"
) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k}, as the double sum of the paper's equation 16."""
    deltas = deltas_by_hand(rewards, values, bootstrap, gamma, after)
    found = torch.zeros_like(rewards)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            found[row, t] = sum(float(deltas[row, k]) * (gamma * lam) ** (k - t) for k in range(t, length))
    return found


@exercise(
    "4.1",
    "The temporal difference",
    "fill",
    '''
"""Exercise 4.1: the temporal difference.

A critic predicts the return from each state, V(s_t). How much better did one step go than predicted?

    δ_t = r_t + γ V(s_{t+1}) − V(s_t)

At the last token of a row, V(s_{t+1}) is the number `bootstrap`: 0 if the text has ended, and the critic's value if the
row was cut off. All T entries of this row are tokens. Write `td_errors`.
"""

import torch


def td_errors(rewards, values, bootstrap, gamma):
    """[T] from rewards [T], values [T], and one number."""
    ...
''',
    (
        "You need the values one place to the left: values[1:], and one more at the end.",
        "torch.cat([values[1:], torch.tensor([bootstrap])]) has T entries; mind the dtype.",
        "rewards + gamma * torch.cat([values[1:], values.new_tensor([bootstrap])]) - values",
    ),
)
def td_errors(answer: Answer) -> None:
    """The equation in a loop over plain numbers."""
    for bootstrap, gamma in ((0.0, 1.0), (0.7, 0.9)):
        rewards, values = numbers((4,), 1), numbers((4,), 2)
        r, v = rewards.tolist(), [*values.tolist(), bootstrap]
        wanted = [r[t] + gamma * v[t + 1] - v[t] for t in range(4)]
        zero = [r[t] + gamma * v[t + 1] * (t < 3) - v[t] for t in range(4)]
        mistakes = {
            "You take 0 after the last token; a row that was cut off continues with `bootstrap`": zero,
            "You forget γ": [r[t] + v[t + 1] - v[t] for t in range(4)],
            "You subtract the next value and add the present one: it is the other way round": [
                r[t] - gamma * v[t + 1] + v[t] for t in range(4)
            ],
            "You use the present value twice: the next value is one place later": [
                r[t] + gamma * v[t] - v[t] for t in range(4)
            ],
        }
        expect(
            answer.td_errors(rewards, values, bootstrap, gamma), wanted, f"bootstrap {bootstrap}, γ {gamma}", mistakes
        )


@exercise(
    "4.2",
    "Generalised advantage estimation",
    "fill",
    '''
"""Exercise 4.2: generalised advantage estimation (GAE).

GAE adds up the temporal differences from t on, each counted less by a factor γλ:

    A_t = δ_t + γλ A_{t+1}

With λ = 0 it is the temporal difference alone; with λ = 1 it is the return less the value. Write `gae` for one row:
start at the end and go backwards.
"""

import torch


def gae(deltas, gamma, lam):
    """[T] the advantages of one row, from its temporal differences [T]."""
    ...
''',
    (
        "After the last token there is no advantage: start with running = 0.",
        "Go through the tokens with reversed(range(len(deltas))).",
        "running = deltas[t] + gamma * lam * running; advantages[t] = running",
    ),
)
def gae(answer: Answer) -> None:
    """The double sum of the paper's equation 16, and the two reductions."""
    deltas = numbers((5,), 3)
    for gamma, lam in ((1.0, 0.0), (1.0, 1.0), (0.9, 0.8)):
        each = deltas.tolist()
        wanted = [sum(each[k] * (gamma * lam) ** (k - t) for k in range(t, 5)) for t in range(5)]
        mistakes = {
            "You forget λ": [sum(each[k] * gamma ** (k - t) for k in range(t, 5)) for t in range(5)],
            "You forget γ": [sum(each[k] * lam ** (k - t) for k in range(t, 5)) for t in range(5)],
            "You go forwards: an advantage must contain the later differences, not the earlier ones": [
                sum(each[k] * (gamma * lam) ** (t - k) for k in range(t + 1)) for t in range(5)
            ],
            "You return the temporal differences themselves": each,
        }
        expect(answer.gae(deltas, gamma, lam), wanted, f"γ = {gamma} and λ = {lam}", mistakes)


@exercise(
    "4.3",
    "Behind the end of a text",
    "mend",
    '''
"""Exercise 4.3: behind the end of a text. This code has a bug.

`gae_batch` computes GAE for rows of different lengths. `is_action` is False in the padding behind a row's last token.
The numbers in `values` there mean nothing. Find the bug and mend it.
"""

import torch


def gae_batch(rewards, values, is_action, bootstrap, gamma, lam):
    """[B, T] advantages, 0 in the padding; `bootstrap` [B] is V after each row's last token."""
    batch, steps = rewards.shape
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(bootstrap)
    for t in reversed(range(steps)):
        next_value = values[:, t + 1] if t + 1 < steps else bootstrap
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(is_action[:, t], delta + gamma * lam * running, 0.0)
        advantages[:, t] = running
    return advantages
''',
    (
        "Take a row with two tokens in a batch of width four. Which value follows its second token?",
        "The row's last token is not always at the last column.",
        "Use values[:, t + 1] only where is_action[:, t + 1] is True, and bootstrap elsewhere: torch.where.",
    ),
)
def gae_batch(answer: Answer) -> None:
    """The double sum, row by row."""
    for seed, gamma, lam in ((4, 1.0, 0.95), (6, 0.9, 0.5)):
        rewards, values, mask, bootstrap = example(seed)
        arguments = (rewards, values, bootstrap, gamma, lam)
        mistakes = {
            "After a short row's last token you use a value from the padding": advantages_by_hand(
                *arguments, "padding"
            ),
            "You never use `bootstrap`: a row that was cut off has a future": advantages_by_hand(*arguments, "zero"),
            "After the last token you use that token's own value": advantages_by_hand(*arguments, "always"),
        }
        got = answer.gae_batch(rewards, values, mask, bootstrap, gamma, lam)
        expect(got, advantages_by_hand(*arguments), f"rows of 4, 2 and 3 tokens, γ {gamma}, λ {lam}", mistakes)


@exercise(
    "4.4",
    "Terminated or truncated",
    "mend",
    '''
"""Exercise 4.4: terminated or truncated. This code has a bug.

`bootstrap_values` chooses what follows the last token of each row. A row that is `terminated` has ended: nothing
follows, and the value is 0. A row that is `truncated` was cut off by the budget, and the critic's value after its last
token, `last_values`, stands for the rest. Find the bug and mend it.
"""

import torch


def bootstrap_values(last_values, terminated, truncated):
    """[B] the value after each row's last token."""
    ended = terminated | truncated
    return torch.where(ended, 0.0, last_values)
''',
    (
        "What does the function return for a row that was truncated?",
        "Both kinds of ends are treated alike. Which flag alone decides?",
        "torch.where(truncated, last_values, 0.0)",
    ),
)
def bootstrap_values(answer: Answer) -> None:
    """Four rows: ended, cut off, ended with a value that must not count, cut off."""
    values = torch.tensor([0.5, 0.7, -2.0, 1.5], dtype=torch.float64)
    terminated = torch.tensor([True, False, True, False])
    mistakes = {
        "A truncated row gets 0: its text would have gone on, so it gets the critic's value": torch.zeros(4),
        "You bootstrap every row: a text that has ended has no future": values,
        "The two kinds of ends are exchanged": torch.where(terminated, values, 0.0),
    }
    wanted = [0.0, 0.7, 0.0, 1.5]
    expect(answer.bootstrap_values(values, terminated, ~terminated), wanted, "two rows of each kind", mistakes)


@exercise(
    "4.5",
    "Explained variance",
    "fill",
    '''
"""Exercise 4.5: explained variance.

How good is a critic? 1 means that its values V are equal to the returns R; 0 means: no better than a constant.

    1 − Var(R − V) / Var(R)

Write `explained_variance`. If all returns are equal, return 0. A critic that is worse than a constant has a negative
explained variance.
"""

import torch


def explained_variance(values, returns):
    """One number, from values [N] and returns [N]."""
    ...
''',
    (
        "Try V = R, V = 0 and V = R + 5: the results are 1, 0 and 1.",
        "Var is the mean of the squared distance from the mean; x.var() serves as well, for both.",
        "Return 0.0 if returns.var() == 0, and else 1 - (returns - values).var() / returns.var().",
    ),
)
def explained_variance(answer: Answer) -> None:
    """Plain Python, from the definition."""

    def variance(x: Tensor) -> float:
        each = x.tolist()
        return sum((e - sum(each) / len(each)) ** 2 for e in each) / len(each)

    returns = numbers((30,), 8)
    for case, values in (
        ("the returns plus 5", returns + 5),
        ("values near the returns", returns + 0.3 * numbers((30,), 9)),
        ("values far from the returns", 3 * numbers((30,), 10)),
    ):
        share = variance(returns - values) / variance(returns)
        centred = values - values.mean()
        correlation = (
            float((centred * (returns - returns.mean())).mean()) / (variance(values) * variance(returns)) ** 0.5
        )
        mistakes = {
            "This is the share that is not explained: subtract it from 1": share,
            "You use the mean squared error; a constant error does not count": 1
            - float((returns - values).square().mean()) / float(returns.var()),
            "You square the correlation: explained variance also falls when the scale is wrong": correlation**2,
            "You cut it off at 0; a bad critic has a negative explained variance": max(0.0, 1 - share),
        }
        expect(answer.explained_variance(values, returns), 1 - share, case, mistakes)
    equal = torch.as_tensor(answer.explained_variance(numbers((5,), 1), torch.ones(5, dtype=torch.float64)))
    demand(bool(torch.isfinite(equal).all()), "For equal returns you divide by 0: return 0 then.")
    expect(equal, 0.0, "equal returns")
