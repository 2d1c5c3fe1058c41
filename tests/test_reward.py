"""KL forms, estimators and controllers, against torch.distributions and published constants."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from lmgym import AdaptiveKL, Completion, FixedKL, Prompt, Score
from lmgym.reward import (
    LARGEST_SCORE,
    KLController,
    ScoreError,
    check_loss_estimator,
    check_reward_estimator,
    exact_kl,
    kl_estimates,
    kl_reward,
)


def two_policies(vocabulary: int = 50) -> tuple[Categorical, Categorical]:
    generator = torch.Generator().manual_seed(0)
    return (
        Categorical(logits=torch.randn(vocabulary, generator=generator)),
        Categorical(logits=torch.randn(vocabulary, generator=generator)),
    )


def test_exact_kl_equals_torch_and_ignores_banned_tokens() -> None:
    policy, reference = two_policies()
    expected = float(kl_divergence(policy, reference))
    assert float(exact_kl(policy.logits, reference.logits)) == pytest.approx(expected, abs=1e-6)
    banned = torch.full((3,), -torch.inf)
    with_banned = exact_kl(torch.cat([policy.logits, banned]), torch.cat([reference.logits, banned]))
    assert float(with_banned) == pytest.approx(expected, abs=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    """Expectations by summation over the vocabulary, not by sampling."""
    policy, reference = two_policies()
    estimates = kl_estimates(policy.logits.double(), reference.logits.double())
    kl = float(kl_divergence(policy, reference))
    expected = {name: float((policy.probs.double() * values).sum()) for name, values in estimates.items()}
    assert expected["k1"] == pytest.approx(kl, abs=1e-6)
    assert expected["k3"] == pytest.approx(kl, abs=1e-6)
    assert abs(expected["k2"] - kl) > 0.1
    assert bool((estimates["k3"] >= 0).all())
    assert all(float(values.abs().max()) == 0 for values in kl_estimates(policy.logits, policy.logits).values())


def test_kl_reward_forms() -> None:
    logp, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    assert kl_reward("none", 0.1, None, reference).tolist() == [0, 0]
    assert kl_reward("reference", 0.1, None, reference).tolist() == pytest.approx([-0.15, -0.05])
    assert kl_reward("sampled", 0.1, logp, reference).tolist() == pytest.approx([-0.05, 0.15])
    with pytest.raises(ValueError, match="bind a policy"):
        kl_reward("sampled", 0.1, None, reference)


def bandit() -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """The scores of six actions, log π_ref, β and the optimum π_ref·exp(score/β)."""
    generator = torch.Generator().manual_seed(0)
    score, reference = torch.randn(6, generator=generator).double(), torch.randn(6, generator=generator).double()
    reference, beta = reference.log_softmax(0), 0.5
    return score, reference, beta, torch.softmax(reference + score / beta, 0)


@pytest.mark.parametrize(("estimator", "distance"), [("k1", 0.0), ("k2", 0.247), ("k3", 0.755)])
def test_what_the_estimators_optimise_when_they_stand_in_the_reward(estimator: str, distance: float) -> None:
    """Exact on-policy gradient ascent on a bandit: k1 finds π_ref·exp(score/β), k2 and k3 do not, and are refused."""
    score, reference, beta, optimum = bandit()
    logits = reference.clone()
    for _ in range(4000):
        logp = logits.log_softmax(0)
        reward = score - beta * kl_estimates(logp, reference)[estimator]
        advantage = reward - (logp.exp() * reward).sum()
        # The score-function gradient: the reward counts as a constant.
        logits = logits + 0.5 * logp.exp() * advantage
    variation = float((logits.softmax(0) - optimum).abs().sum() / 2)
    if estimator == "k1":
        assert variation < 1e-3
        check_reward_estimator(estimator)
    else:
        assert not variation < 0.05  # k3 diverges, as far as to NaN
        with pytest.raises(ValueError, match=f"{distance} in total variation"):
            check_reward_estimator(estimator)


@pytest.mark.parametrize(
    ("estimator", "distance", "reason"),
    [("k1", 0.714, "gradient is 0 on average"), ("k3", 0.382, "gradient is that of KL"), ("k2", 0.0, "")],
)
def test_what_the_estimators_optimise_when_they_stand_in_the_loss(estimator: str, distance: float, reason: str) -> None:
    """Exact gradient ascent on the same bandit, where the estimator is differentiated and the actions are constants."""
    score, reference, beta, optimum = bandit()
    logits = reference.clone()
    for _ in range(4000):
        logits = logits.detach().requires_grad_()
        logp = logits.log_softmax(0)
        actions = logp.detach().exp()
        value = (actions * (score * logp - beta * kl_estimates(logp, reference)[estimator])).sum()
        (gradient,) = torch.autograd.grad(value, logits)
        logits = logits + 0.5 * gradient
    variation = float((logits.detach().softmax(0) - optimum).abs().sum() / 2)
    if not reason:
        assert variation < 1e-3
        check_loss_estimator(estimator)
        return
    assert variation > 0.05
    with pytest.raises(ValueError, match=f"{reason}.*{distance} in total variation"):
        check_loss_estimator(estimator)


def test_adaptive_kl_has_the_published_constants() -> None:
    controller = AdaptiveKL(beta=0.2, target_nats_per_sequence=6.0, horizon=10_000.0)
    controller.update(9.0, 256)
    # Clipped at 0.2: 0.2 · (1 + 0.2 · 256 / 10000).
    assert controller.beta == pytest.approx(0.201024, abs=1e-12)
    for kl, error in ((6.6, 0.1), (6.0, 0.0), (5.4, -0.1), (0.0, -0.2)):
        controller = AdaptiveKL(beta=0.2, target_nats_per_sequence=6.0, horizon=10_000.0)
        controller.update(kl, 1000)
        assert controller.beta == pytest.approx(0.2 * (1 + error * 0.1), abs=1e-12)


def test_controllers_start_from_what_their_pages_say() -> None:
    """Ziegler et al. 2019 hold 6 nats a sequence; their code moves β over 10,000 sequences."""
    controller = AdaptiveKL()
    assert (controller.beta, controller.target_nats_per_sequence, controller.horizon) == (0.2, 6.0, 10_000)
    assert FixedKL().beta == 0.05


def test_adaptive_kl_holds_a_system_at_its_target() -> None:
    """A policy whose KL is inversely proportional to β."""
    controller = AdaptiveKL(beta=0.01, target_nats_per_sequence=6.0, horizon=10_000.0)
    for _ in range(2000):
        controller.update(0.6 / controller.beta, 256)
    assert 0.6 / controller.beta == pytest.approx(6.0, rel=0.02)


def test_fixed_kl_stays() -> None:
    controller = FixedKL(0.1)
    controller.update(100.0, 1000)
    assert controller.beta == 0.1
    assert isinstance(controller, KLController)


def test_scores_are_weighted_summed_and_shifted() -> None:
    score = Score({"a": lambda p, c: [1.0, 2.0], "b": (-0.5, lambda p, c: [4.0, 8.0])}, shift=0.25)
    prompts, completions = [Prompt("x")] * 2, [Completion("y")] * 2
    assert score.names == ("a", "b")
    assert score(prompts, completions) == [-1.25, -2.25]
    assert score.breakdown(prompts, completions) == {"a": [1.0, 2.0], "b": [4.0, 8.0]}
    with pytest.raises(ValueError, match="at least one component"):
        Score({})


@pytest.mark.parametrize(
    "values", [[1, 2], (1.0, 2.0), np.array([1.0, 2.0], np.float32), torch.tensor([1.0, 2.0]), np.array([1, 2])]
)
def test_scores_of_any_numeric_kind_are_taken(values: Any) -> None:
    score = Score({"a": lambda p, c: values})
    assert score([Prompt("x")] * 2, [Completion("y")] * 2) == [1.0, 2.0]


def _fails_deep(prompts: Any, completions: Any) -> Any:
    return _fails(prompts)


def _fails(prompts: Any) -> Any:
    return 1 / (len(prompts) - len(prompts))


def test_the_error_of_a_score_function_names_the_line_that_raised_it() -> None:
    line = _fails.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"\(test_reward.py, line {line}\)"):
        Score({"deep": _fails_deep})([Prompt("x")], [Completion("y")])


def test_a_reached_target_leaves_beta() -> None:
    """The target may be below one nat."""
    controller = AdaptiveKL(beta=0.2, target_nats_per_sequence=0.5)
    controller.update(0.5, 1000)
    assert controller.beta == 0.2
    with pytest.raises(ValueError, match="target"):
        AdaptiveKL(target_nats_per_sequence=0.0)


def test_the_borders_of_beta_and_of_a_score() -> None:
    assert FixedKL(0.0).beta == 0
    assert AdaptiveKL(0.0).beta == 0
    with pytest.raises(ValueError, match="beta"):
        FixedKL(-1e-9)
    prompts, completions = [Prompt("a")], [Completion("b")]
    assert Score({"one": lambda *_: [LARGEST_SCORE]})(prompts, completions) == [LARGEST_SCORE]
    with pytest.raises(ScoreError, match="must be finite"):
        Score({"one": lambda *_: [2 * LARGEST_SCORE]})(prompts, completions)
