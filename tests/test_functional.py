"""The equations, against hand-worked values, enumeration and torch. Against other libraries: test_oracles.py."""

import itertools
import math
from collections.abc import Callable

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


def test_reward_to_go_by_hand() -> None:
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]]), rows_of([3, 2], 3)
    found = F.reward_to_go(rewards, mask, torch.tensor([0.0, 8.0]), 0.5)
    # The second row was cut off after two actions: what follows is worth 8.
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0, 4.0], [7.5, 9.0, 0.0]]))
    plain = F.reward_to_go(rewards, mask, torch.zeros(2))
    torch.testing.assert_close(plain, torch.tensor([[7.0, 6.0, 4.0], [8.0, 5.0, 0.0]]))


@pytest.mark.parametrize("group", [2, 3, 5])
def test_leave_one_out_is_the_return_less_the_mean_of_the_others(group: int) -> None:
    returns = random(4 * group).double()
    expected = []
    for g in range(4):
        one = returns[g * group : (g + 1) * group].tolist()
        expected += [one[i] - sum(one[:i] + one[i + 1 :]) / (group - 1) for i in range(group)]
    torch.testing.assert_close(F.leave_one_out(returns, group), torch.tensor(expected, dtype=torch.float64))
    if group == 2:
        differences = returns[::2] - returns[1::2]
        torch.testing.assert_close(F.leave_one_out(returns, 2), torch.stack([differences, -differences], 1).flatten())


def test_group_relative_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    centred = F.group_relative(returns, 4, scale=False)
    assert centred.tolist() == [-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    scaled = F.group_relative(returns, 4)
    deviation = float(np.std([1, 2, 3, 6], ddof=1))
    assert scaled.tolist() == pytest.approx([x / (deviation + 1e-4) for x in centred.tolist()], abs=1e-6)
    assert not scaled[4:].any(), "a group that agrees teaches nothing"
    torch.testing.assert_close(centred * 4 / 3, F.leave_one_out(returns, 4))


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


def test_whiten_without_shift_keeps_the_mean() -> None:
    x, mask = random(5, 8) * 3 + 7, rows_of([1, 8, 3, 5, 2], 8)
    white = F.whiten(x, mask, shift_mean=False)
    assert float(white[mask].mean()) == pytest.approx(float(x[mask].mean()), abs=1e-5)
    assert float(white[mask].var(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    assert not white[~mask].any()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (F.token_mean, [[1 / 4] * 3, [1 / 4, 0.0, 0.0]]),
        (F.sequence_mean, [[1 / 6] * 3, [1 / 2, 0.0, 0.0]]),
        (F.sequence_sum, [[1 / 2] * 3, [1 / 2, 0.0, 0.0]]),
        (F.constant_mean, [[1 / 6] * 3, [1 / 6, 0.0, 0.0]]),
    ],
)
def test_what_an_action_weighs(weights: Callable[[Tensor], Tensor], expected: list[list[float]]) -> None:
    mask = rows_of([3, 1], 3)
    torch.testing.assert_close(weights(mask).float(), torch.tensor(expected))
    assert bool(torch.isfinite(weights(torch.zeros(2, 3, dtype=torch.bool))).all())
    # On rows that are all full, three of them are the same mean.
    full = torch.ones(4, 5, dtype=torch.bool)
    if weights is not F.sequence_sum:
        torch.testing.assert_close(weights(full), torch.full((4, 5), 1 / 20))


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


def test_the_surrogate_is_the_ratio_times_the_advantage() -> None:
    logp, old, advantages = random(6).requires_grad_(), random(6, seed=1), random(6, seed=2)
    loss = F.surrogate(logp, old, advantages)
    expected = [-math.exp(a - b) * c for a, b, c in zip(logp.tolist(), old.tolist(), advantages.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(F.surrogate(logp, logp.detach(), advantages).sum(), logp)
    torch.testing.assert_close(gradient, -advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.25, 2.0, -2.5),  # 1.2 < 1.25 < 1.28: not yet clipped
        (1.5, 2.0, -2.56),
        (0.5, -2.0, 1.6),  # below, ε is as it was
        (0.75, -2.0, 1.6),
        (1.5, -2.0, 3.0),
    ],
)
def test_a_clip_that_is_higher_above(ratio: float, advantage: float, loss: float) -> None:
    found = F.clipped_surrogate(torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), 0.2, 0.28)
    assert float(found) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (10.0, -2.0, 6.0, False),  # bad, and ten times as likely: bounded to 3 · 2
        (2.5, -2.0, 5.0, True),
        (0.5, -2.0, 1.6, False),
        (10.0, 2.0, -2.4, False),  # what is good is clipped as ever
        (10.0, 0.5, -0.6, False),
        (0.5, 2.0, -1.0, True),
    ],
)
def test_the_dual_clip_bounds_what_is_bad(ratio: float, advantage: float, loss: float, moves: bool) -> None:
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    found = F.clipped_surrogate(logp, torch.zeros(1), torch.tensor([advantage]), 0.2, dual_clip=3.0)
    (gradient,) = torch.autograd.grad(found.sum(), logp)
    assert float(found.detach()) == pytest.approx(loss, abs=1e-5)
    assert float(gradient) == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-5)


def test_what_lies_outside_the_clip() -> None:
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
    assert F.is_clipped(ratio.log(), torch.zeros(7), 0.2).tolist() == [1, 1, 0, 0, 0, 1, 1]


def test_the_ratio_of_a_sequence_and_its_gradient() -> None:
    """GSPO: s_i = (π(y)/π_old(y))^{1/|y|} at every token, and ∂ log s_i / ∂ log π(y_t) = 1/|y|."""
    mask = rows_of([3, 1, 4], 4)
    logp, old = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    found = F.sequence_logp_ratio(logp, old, mask)
    for row, length in enumerate([3, 1, 4]):
        gap = logp[row, :length].detach() - old[row, :length]
        geometric = float(gap.exp().prod() ** (1 / length))
        assert found[row].exp().tolist() == pytest.approx([geometric] * 4, rel=1e-5)
    weights = random(3, 4, seed=2)
    (gradient,) = torch.autograd.grad((found * weights * mask).sum(), logp)
    share = (weights * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(gradient, torch.where(mask, share.expand_as(mask), 0.0))


def bandit() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy over 5 actions, log-probabilities of an older one, and of a reference."""
    old, reference = random(5, seed=1).double().log_softmax(0), random(5, seed=2).double().log_softmax(0)
    return random(5).double().requires_grad_(), old, reference


@pytest.mark.parametrize(
    ("estimator", "fresh", "target"),
    [
        ("k2", True, "KL(π ‖ π_ref)"),
        ("ratio_k3", True, "KL(π ‖ π_ref)"),
        ("ratio_k3", False, "KL(π ‖ π_ref)"),
        ("k3", True, "KL(π_ref ‖ π)"),
    ],
)
def test_whose_gradient_a_kl_loss_has(estimator: str, fresh: bool, target: str) -> None:
    """Over every action, weighted by the probability with which it was taken: no sampling noise."""
    logits, old, reference = bandit()
    logp = logits.log_softmax(0)
    old = logp.detach() if fresh else old
    loss = (old.exp() * F.kl_loss(estimator, logp, old, reference)).sum()
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    forward, backward = (logp.exp() * (logp - reference)).sum(), (reference.exp() * (reference - logp)).sum()
    (of_forward,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (of_backward,) = torch.autograd.grad(backward, logits)
    expected = of_forward if target == "KL(π ‖ π_ref)" else of_backward
    torch.testing.assert_close(found, expected)
    assert float((of_forward - of_backward).norm()) > 0.1, "the two are not the same"


def test_what_a_kl_loss_says() -> None:
    """k3 and ρ·k3 are the KL on average, k2 is not; k2 is for fresh actions alone."""
    logits, old, reference = bandit()
    logp = logits.log_softmax(0)
    kl = float((logp.exp() * (logp - reference)).sum().detach())

    def mean(estimator: str, taken_by: Tensor) -> float:
        return float((taken_by.exp() * F.kl_loss(estimator, logp, taken_by, reference)).sum().detach())

    assert mean("k3", logp.detach()) == pytest.approx(kl)
    assert mean("ratio_k3", old) == pytest.approx(kl)
    assert mean("k2", logp.detach()) != pytest.approx(kl, rel=0.05)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [(1.5, 1.0, 2.0, 0.32), (1.1, 1.0, 2.0, 0.405), (0.0, 1.0, 0.5, 0.125), (3.0, 1.0, 1.0, 2.0)],
)
def test_clipped_value_loss(value: float, old: float, target: float, loss: float) -> None:
    found = F.clipped_value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), 0.2)
    assert float(found) == pytest.approx(loss, abs=1e-6)


def test_a_value_loss_without_its_clip_is_half_the_squared_error() -> None:
    """torch's own, with its gradient, however far the value has moved from the old one."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (3 * torch.randn(4, 5, generator=generator) for _ in range(3))
    values.requires_grad_()
    expected = torch.nn.functional.mse_loss(values, returns, reduction="none") / 2
    found = F.clipped_value_loss(values, old, returns, 0.0)
    torch.testing.assert_close(found, expected)
    (wanted,), (given,) = (torch.autograd.grad(loss.sum(), values) for loss in (expected, found))
    torch.testing.assert_close(given, wanted)
    assert bool((F.clipped_value_loss(values, old, returns, 0.2) > expected + 0.1).any()), "the clip would matter here"


# Preferences -------------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    better, worse = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert float(F.bradley_terry(better, worse)) == pytest.approx(expected, abs=1e-6)
    shifted = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2.5))) / 2
    assert float(F.bradley_terry(better, worse, 0.5)) == pytest.approx(shifted, abs=1e-6)
    assert float(F.bradley_terry(torch.tensor([-500.0]), torch.tensor([500.0]))) == pytest.approx(1000.0)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.17])
def test_the_likelihood_of_a_label_that_may_be_wrong(rate: float) -> None:
    """P = ε + (1 − 2ε) σ(Δ), by its definition in double precision; it stays finite, and its gradient vanishes."""
    difference = torch.linspace(-8, 8, 33, dtype=torch.float64)
    expected = torch.log(rate + (1 - 2 * rate) * torch.sigmoid(difference))
    torch.testing.assert_close(F.noisy_logsigmoid(difference, rate), expected, atol=1e-12, rtol=0)
    zeros = torch.zeros_like(difference)
    assert float(F.bradley_terry(difference, zeros, error_rate=rate)) == pytest.approx(-float(expected.mean()))
    far = torch.tensor([-2000.0], requires_grad=True)
    loss = F.bradley_terry(far, torch.zeros(1), error_rate=rate)
    (gradient,) = torch.autograd.grad(loss, far)
    assert float(loss.detach()) == pytest.approx(-math.log(rate) if rate else 2000.0, rel=1e-5)
    assert float(gradient) == pytest.approx(0.0 if rate else -1.0, abs=1e-6)
    pair = torch.tensor([0.3, -0.4])
    assert float(F.ranking_loss(pair, rate)) == pytest.approx(float(F.bradley_terry(pair[:1], pair[1:], 0.0, rate)))


def test_the_loss_of_a_choice_is_a_cross_entropy() -> None:
    scores = random(4).double()
    expected = torch.nn.functional.cross_entropy(scores[None], torch.tensor([0]))
    assert float(F.choice_loss(scores)) == pytest.approx(float(expected))
    assert float(F.choice_loss(scores[[0, 3, 1, 2]])) == pytest.approx(float(expected)), "the order of the rest"
    assert float(F.choice_loss(scores[:2])) == pytest.approx(float(F.ranking_loss(scores[:2]))), "of two, a pair"


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


def test_dpo_is_the_papers_formula() -> None:
    """Rafailov et al. 2023, eq. 7, in numpy from probabilities; and Mitchell 2023 for labels that may be wrong."""
    rng = np.random.default_rng(0)
    chosen, rejected, chosen_reference, rejected_reference = np.log(rng.random((4, 8)))

    def minus_log_sigmoid(x: np.ndarray) -> np.ndarray:
        return -np.log(1 / (1 + np.exp(-x)))

    margin = 0.4 * np.log(np.exp(chosen) / np.exp(chosen_reference)) - 0.4 * np.log(
        np.exp(rejected) / np.exp(rejected_reference)
    )
    ratios = torch.from_numpy(chosen - chosen_reference), torch.from_numpy(rejected - rejected_reference)
    np.testing.assert_allclose(F.dpo(*ratios, 0.4), minus_log_sigmoid(margin), atol=1e-12)
    smooth = 0.8 * minus_log_sigmoid(margin) + 0.2 * minus_log_sigmoid(-margin)
    np.testing.assert_allclose(F.dpo(*ratios, 0.4, 0.2), smooth, atol=1e-12)
    assert F.dpo(torch.zeros(1), torch.zeros(1), 0.1).tolist() == pytest.approx([math.log(2)])
    assert F.dpo(torch.tensor([-5000.0]), torch.tensor([5000.0]), 0.1).tolist() == pytest.approx([1000.0])


def test_the_gradient_of_dpo_is_the_papers() -> None:
    """Section 4: −β σ(r̂_rejected − r̂_chosen) of what the chosen completion's log-probability moves."""
    chosen, rejected = random(6).double().requires_grad_(), random(6, seed=1).double().requires_grad_()
    up, down = torch.autograd.grad(F.dpo(chosen, rejected, 0.3).sum(), [chosen, rejected])
    expected = -0.3 * torch.sigmoid(0.3 * (rejected - chosen)).detach()
    torch.testing.assert_close(up, expected)
    torch.testing.assert_close(down, -expected)


# Best of n ---------------------------------------------------------------------------------------------------------


def test_best_of_n_kl_by_hand() -> None:
    assert F.best_of_n_kl(1) == 0.0
    assert F.best_of_n_kl(2) == pytest.approx(0.19314718)
    assert F.best_of_n_kl(16) == pytest.approx(1.83508872)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_probs_against_every_draw(n: int) -> None:
    """All 5ⁿ tuples, each with its probability, the winner drawn evenly among the best: with ties, and without."""
    probs = random(5).double().softmax(0)
    for scores in ([0.0, 1.0, 1.0, 0.5, 1.0], [3.0, 1.0, 4.0, 1.5, 9.0], [2.0] * 5):
        expected = np.zeros(5)
        for draws in itertools.product(range(5), repeat=n):
            best = max(scores[i] for i in draws)
            winners = [i for i in draws if scores[i] == best]
            for winner in winners:
                expected[winner] += math.prod(float(probs[i]) for i in draws) / len(winners)
        found = F.best_of_n_probs(torch.tensor(scores, dtype=torch.float64), probs, n)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_ties_and_coarse_scores_make_the_kl_less_than_the_formula() -> None:
    """p_i = F_iⁿ − F_{i−1}ⁿ over outcomes in order; the formula is its limit for outcomes without end.

    Observed: 3e-6 nats below it with 2048 outcomes; 1.330 against 1.835 nats with 4 (n = 16).
    """

    def kl(scores: Tensor, n: int) -> float:
        alike = torch.full_like(scores, 1 / len(scores))
        return float(F.forward_kl(F.best_of_n_probs(scores, alike, n).log(), alike.log()))

    four = torch.arange(4, dtype=torch.float64)
    cumulative = [(i / 4) ** 16 for i in range(5)]
    p = [cumulative[i + 1] - cumulative[i] for i in range(4)]
    assert kl(four, 16) == pytest.approx(sum(x * math.log(4 * x) for x in p), abs=1e-9)
    assert kl(four, 16) == pytest.approx(1.330, abs=1e-3)
    assert kl(torch.zeros(4, dtype=torch.float64), 16) == pytest.approx(0.0, abs=1e-9)
    many = torch.arange(2048, dtype=torch.float64)
    assert 0 < F.best_of_n_kl(16) - kl(many, 16) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_expected_best_is_the_mean_over_every_choice(n: int) -> None:
    scores = random(3, 6)
    scores[1] = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 2.0])
    for row, found in zip(scores.tolist(), F.expected_best(scores, n).tolist(), strict=True):
        best = [max(choice) for choice in itertools.combinations(row, n)]
        assert found == pytest.approx(sum(best) / math.comb(6, n), abs=1e-6)


def test_best_of_group_marks_the_best_rows() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 4.0])
    assert F.best_of_group(scores, 3).tolist() == [False, True, False, True, False, False]
    assert F.best_of_group(scores, 3, keep=2).tolist() == [False, True, True, True, True, False]
    assert F.best_of_group(scores, 3, keep=3).all()
    assert F.best_of_group(scores, 2).tolist() == [False, True, False, True, True, False]


# Distillation ------------------------------------------------------------------------------------------------------


def test_forward_kl_equals_torch_and_skips_what_the_teacher_never_says() -> None:
    teacher, student = random(4, 7).log_softmax(-1), random(4, 7, seed=1).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    )
    torch.testing.assert_close(F.forward_kl(teacher, student), expected)
    banned = torch.tensor([0.5, 0.5, 0.0]).log()
    narrow = torch.tensor([0.25, 0.75, 0.0]).log()
    assert float(F.forward_kl(banned, narrow)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    for other in (narrow, torch.tensor([0.2, 0.3, 0.5]).log()):
        other = other.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.forward_kl(banned, other), other)
        torch.testing.assert_close(gradient, torch.tensor([-0.5, -0.5, 0.0]))


def test_what_an_equation_takes_where_nobody_says_otherwise() -> None:
    """No discount, λ = 0.95 and a clip of 0.2 (Schulman et al. 2017); centred, scaled, one kept, ten bins."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(4, 5, generator=generator) for _ in range(3))
    mask, ends = torch.rand(4, 5, generator=generator) < 2, torch.zeros(4)
    for default, told in (
        (F.gae(x, y, mask, ends), F.gae(x, y, mask, ends, 1.0, 0.95)),
        ((F.reward_to_go(x, mask, ends),), (F.reward_to_go(x, mask, ends, 1.0),)),
        ((F.clipped_surrogate(x, y, z),), (F.clipped_surrogate(x, y, z, 0.2, 0.2, 0.0),)),
        ((F.is_clipped(x, y),), (F.is_clipped(x, y, 0.2),)),
        ((F.is_clipped(x / 3, y / 3),), (F.is_clipped(x / 3, y / 3, 0.2),)),
        ((F.clipped_value_loss(x, y, z),), (F.clipped_value_loss(x, y, z, 0.2),)),
        ((F.group_relative(ends + x[:, 0], 2),), (F.group_relative(ends + x[:, 0], 2, True),)),
        ((F.whiten(x, mask),), (F.whiten(x, mask, True),)),
        ((F.best_of_group(x[:, 0], 2),), (F.best_of_group(x[:, 0], 2, 1),)),
        ((F.dpo(x[:, 0], y[:, 0], 0.5),), (F.dpo(x[:, 0], y[:, 0], 0.5, 0.0),)),
        ((F.bradley_terry(x[:, 0], y[:, 0]),), (F.bradley_terry(x[:, 0], y[:, 0], 0.0, 0.0),)),
        ((F.ranking_loss(x[:, 0]),), (F.ranking_loss(x[:, 0], 0.0),)),
    ):
        for one, other in zip(default, told, strict=True):
            torch.testing.assert_close(one, other)
    told = F.expected_calibration_error(x.flatten().sigmoid(), y.flatten() > 0, 10)
    torch.testing.assert_close(F.expected_calibration_error(x.flatten().sigmoid(), y.flatten() > 0), told)


def test_where_one_entry_counts_or_none() -> None:
    """A mean over one entry is the entry, and over none it is 0: in every form of a mean."""
    one = torch.tensor([[True, False], [False, False]])
    none = torch.zeros_like(one)
    x = torch.tensor([[3.0, 5.0], [7.0, 9.0]])
    assert float(F.masked_mean(x, one)) == 3.0
    assert float(F.masked_mean(x, none)) == 0.0
    for weights in (F.token_mean, F.sequence_mean, F.sequence_sum, F.constant_mean):
        assert not weights(none).any()
    assert F.token_mean(one).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert F.sequence_mean(one).tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert F.sequence_logp_ratio(x, torch.ones(2, 2), one).tolist() == [[2.0, 2.0], [0.0, 0.0]]
    assert float(F.explained_variance(x, x, one)) == 0.0, "one return does not vary"
    small = torch.tensor([[1e-3, -1e-3]]), torch.ones(1, 2, dtype=torch.bool)
    assert float(F.explained_variance(small[0] / 2, *small)) == pytest.approx(0.75, abs=1e-4)
