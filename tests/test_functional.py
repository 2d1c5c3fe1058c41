"""The equations, against hand-worked values, SB3 and torch."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import functional as F


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(lengths: list[int], steps: int) -> Tensor:
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


# Returns and advantages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_sb3(gamma: float, lam: float) -> None:
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    steps, rows = 7, 3
    rewards, values, last = random(rows, steps), random(rows, steps, seed=1), random(rows, seed=2)
    done = torch.tensor([True, False, True])
    buffer = RolloutBuffer(steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", lam, gamma, rows)
    buffer.reset()
    for t in range(steps):
        starts = np.full(rows, t == 0)
        nothing = np.zeros((rows, 1))
        buffer.add(nothing, nothing, rewards[:, t].numpy(), starts, values[:, t], torch.zeros(rows))
    buffer.compute_returns_and_advantage(last, done.numpy())
    advantages, returns = F.gae(rewards, values, torch.ones(rows, steps, dtype=torch.bool), last * ~done, gamma, lam)
    np.testing.assert_allclose(advantages.T, buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(returns.T, buffer.returns, atol=1e-5)


def test_gae_with_lambda_one_is_the_return_less_the_value() -> None:
    rewards, values, bootstrap = random(2, 4), random(2, 4, seed=1), torch.tensor([0.0, 0.7])
    advantages, returns = F.gae(rewards, values, torch.ones(2, 4, dtype=torch.bool), bootstrap, 0.9, 1.0)
    for row in range(2):
        for t in range(4):
            expected = sum(0.9 ** (k - t) * float(rewards[row, k]) for k in range(t, 4))
            expected += 0.9 ** (4 - t) * float(bootstrap[row])
            assert float(returns[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(advantages[row, t]) == pytest.approx(expected - float(values[row, t]), abs=1e-5)


def test_gae_with_lambda_zero_is_the_td_error() -> None:
    rewards, values = random(1, 3), random(1, 3, seed=1)
    advantages, _ = F.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), torch.tensor([2.0]), 0.9, 0.0)
    following = [float(values[0, 1]), float(values[0, 2]), 2.0]
    for t in range(3):
        assert float(advantages[0, t]) == pytest.approx(float(rewards[0, t]) + 0.9 * following[t] - float(values[0, t]))


def test_gae_of_rows_of_different_length_equals_each_row_alone() -> None:
    lengths = [1, 4, 6]
    mask, rewards, values = rows_of(lengths, 6), random(3, 6), random(3, 6, seed=1)
    bootstrap = torch.tensor([0.5, 0.0, -1.0])
    advantages, returns = F.gae(rewards, values, mask, bootstrap, 0.99, 0.9)
    for row, length in enumerate(lengths):
        alone = F.gae(
            rewards[row : row + 1, :length], values[row : row + 1, :length],
            torch.ones(1, length, dtype=torch.bool), bootstrap[row : row + 1], 0.99, 0.9,
        )  # fmt: skip
        torch.testing.assert_close(advantages[row, :length], alone[0][0])
        torch.testing.assert_close(returns[row, :length], alone[1][0])
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_a_terminal_score_returns_itself_at_every_step_whatever_the_length() -> None:
    """The length-bias trap: a score spread over tokens, or paid at each of them, prefers some lengths."""
    lengths = [1, 3, 6]
    mask = rows_of(lengths, 6)
    rewards = torch.zeros(3, 6)
    rewards[torch.arange(3), torch.tensor(lengths) - 1] = 2.5
    for lam in (1.0, 0.95):
        advantages, returns = F.gae(rewards, torch.zeros(3, 6), mask, torch.zeros(3), 1.0, lam)
        if lam == 1.0:
            assert returns[mask].tolist() == [2.5] * 10
        assert advantages[torch.arange(3), torch.tensor(lengths) - 1].tolist() == [2.5] * 3


# Means -------------------------------------------------------------------------------------------------------------


def test_masked_mean_reads_only_what_counts() -> None:
    x, mask = torch.tensor([[1.0, torch.nan], [3.0, torch.inf]]), torch.tensor([[True, False], [True, False]])
    assert float(F.masked_mean(x, mask)) == 2.0
    assert float(F.masked_mean(x, torch.zeros_like(mask))) == 0.0


def test_whiten_centres_and_scales_what_counts() -> None:
    x, mask = random(5, 8) * 3 + 7, rows_of([1, 8, 3, 5, 2], 8)
    white = F.whiten(x, mask)
    assert float(white[mask].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(white[mask].var(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    assert not white[~mask].any()
    torch.testing.assert_close(F.whiten(x + 100, mask), white, atol=1e-4, rtol=0)
    assert not F.whiten(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)).any()


def test_explained_variance_equals_sb3() -> None:
    from stable_baselines3.common.utils import explained_variance

    returns, mask = random(4, 6), rows_of([6, 2, 3, 4], 6)
    values = returns + 0.5 * random(4, 6, seed=1)
    expected = explained_variance(values[mask].numpy(), returns[mask].numpy())
    assert float(F.explained_variance(values, returns, mask)) == pytest.approx(float(expected), abs=1e-5)
    assert float(F.explained_variance(values, torch.ones(4, 6), mask)) == 0.0


# PPO ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.5, 2.0, -2.4, False),  # good, and already 1.5 times as likely: clipped at 1.2
        (0.5, 2.0, -1.0, True),  # good, and less likely than before: pulled back
        (1.5, -2.0, 3.0, True),  # bad, and more likely: pushed down
        (0.5, -2.0, 1.6, False),  # bad, and already half as likely: clipped at 0.8
        (1.1, 2.0, -2.2, True),
        (0.9, -2.0, 1.8, True),
    ],
)
def test_clipped_surrogate_on_both_sides(ratio: float, advantage: float, loss: float, moves: bool) -> None:
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    value = F.clipped_surrogate(logp, torch.zeros(1), torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert float(value.detach()) == pytest.approx(loss, abs=1e-6)
    assert logp.grad is not None
    assert float(logp.grad) == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-6)


def test_the_first_gradient_of_ppo_is_the_policy_gradient() -> None:
    logits, tokens, advantages = random(5, 4).requires_grad_(), torch.tensor([0, 1, 2, 3, 1]), random(5, seed=1)
    chosen = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    (ppo,) = torch.autograd.grad(
        F.clipped_surrogate(chosen, chosen.detach(), advantages).mean(), logits, retain_graph=True
    )
    one_hot = torch.nn.functional.one_hot(tokens, 4)
    expected = -(advantages[:, None] * (one_hot - logits.detach().softmax(1))) / 5
    torch.testing.assert_close(ppo, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [(1.5, 1.0, 2.0, 0.32), (1.1, 1.0, 2.0, 0.405), (0.0, 1.0, 0.5, 0.125), (3.0, 1.0, 1.0, 2.0)],
)
def test_clipped_value_loss(value: float, old: float, target: float, loss: float) -> None:
    found = F.clipped_value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), 0.2)
    assert float(found) == pytest.approx(loss, abs=1e-6)


# Preferences -------------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    better, worse = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert float(F.bradley_terry(better, worse)) == pytest.approx(expected, abs=1e-6)
    shifted = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2.5))) / 2
    assert float(F.bradley_terry(better, worse, 0.5)) == pytest.approx(shifted, abs=1e-6)
    assert float(F.bradley_terry(torch.tensor([-500.0]), torch.tensor([500.0]))) == pytest.approx(1000.0)


@pytest.mark.parametrize("count", [2, 4, 9])
def test_the_gradient_of_a_ranking_is_the_mean_over_its_pairs(count: int) -> None:
    scores = random(count).double().requires_grad_()
    (together,) = torch.autograd.grad(F.ranking_loss(scores), scores)
    gradients = []
    for i in range(count):
        for j in range(i + 1, count):
            (one,) = torch.autograd.grad(-torch.log(torch.sigmoid(scores[i] - scores[j])), scores)
            gradients.append(one)
    assert len(gradients) == math.comb(count, 2)
    torch.testing.assert_close(together, torch.stack(gradients).mean(0), atol=1e-7, rtol=0)


def test_maximum_likelihood_recovers_utilities() -> None:
    """The reference page's figure is an RMSE of 3.5/sqrt N for 6 items; asserted: 6/sqrt N."""
    generator = torch.Generator().manual_seed(0)
    utilities = torch.tensor([-1.5, -0.7, -0.2, 0.3, 0.8, 1.3])
    for count in (800, 12_800):
        first, second = torch.randint(6, (2, count), generator=generator)
        keep = first != second
        first, second = first[keep], second[keep]
        wins = torch.rand(len(first), generator=generator) < torch.sigmoid(utilities[first] - utilities[second])
        better, worse = torch.where(wins, first, second), torch.where(wins, second, first)
        found = torch.zeros(6, requires_grad=True)
        optimizer = torch.optim.LBFGS([found], max_iter=100)

        def closure(
            found: Tensor = found,
            better: Tensor = better,
            worse: Tensor = worse,
            optimizer: torch.optim.LBFGS = optimizer,
        ) -> float:
            optimizer.zero_grad()
            loss = F.bradley_terry(found[better], found[worse])
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        centred = found.detach() - found.detach().mean()
        error = float((centred - (utilities - utilities.mean())).square().mean().sqrt())
        assert error < 6 / math.sqrt(count)


def test_expected_calibration_error_by_hand() -> None:
    probability = torch.tensor([0.95, 0.92, 0.15, 0.11, 0.55, 1.0])
    outcome = torch.tensor([True, False, False, False, True, True])
    bins = [abs((0.95 + 0.92 + 1.0) - 2), abs((0.15 + 0.11) - 0), abs(0.55 - 1)]
    assert float(F.expected_calibration_error(probability, outcome)) == pytest.approx(sum(bins) / 6, abs=1e-6)


def test_honest_probabilities_are_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(100_000, generator=generator)
    outcome = torch.rand(100_000, generator=generator) < probability
    assert float(F.expected_calibration_error(probability, outcome)) < 0.01
    assert float(F.expected_calibration_error((2 * probability).clamp(max=1), outcome)) > 0.2
