"""The closed forms of the KL-regularised optimum, against one another and against policies that are not optimal."""

from collections import Counter
from typing import Any

import pytest
import torch

from lmgym import LanguageModel, Policy, Prompt, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.env import Finish
from lmgym.exact import Tree, enumerate_tree, policy_logp
from lmgym.tasks.probe import TREE_SCORES
from lmgym.tasks.probe import Tree as TreeTask


def make(lm: LanguageModel, rows: int = 1, **arguments: Any) -> TokenVectorEnv:
    settings: dict[str, Any] = {"max_prompt_tokens": 4, "max_new_tokens": 3, "beta": 0.1, "kl": "sampled"} | arguments
    return TokenVectorEnv(rows, task=TreeTask(), model=lm, **settings)


@pytest.fixture(params=[{}, {"temperature": 0.6, "min_new_tokens": 1, "missing_eos_score": -0.5, "beta": 0.3}])
def tree(probe: LanguageModel, request: pytest.FixtureRequest) -> Tree:
    return enumerate_tree(make(probe, **request.param), Prompt("ab"))


def test_the_tree_holds_every_completion_once(probe: LanguageModel) -> None:
    tree = enumerate_tree(make(probe), Prompt("a"))
    # Up to two letters and an end, or three letters: 1 + 4 + 16 + 64.
    assert len(set(tree.paths)) == len(tree.paths) == 85
    assert float(tree.reference_logp.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    for path, score in zip(tree.paths, tree.scores.tolist(), strict=True):
        text = "".join("..abcd"[token] for token in path).strip(".")
        assert score == pytest.approx(TREE_SCORES.get(text, 0.0))
    with pytest.raises(ValueError, match="more than 50 completions"):
        enumerate_tree(make(probe), Prompt("a"), max_sequences=50)
    with pytest.raises(ValueError, match="on_limit='terminate'"):
        enumerate_tree(make(probe, stop=("b",)), Prompt("a"))


def test_the_recursion_equals_the_sum_over_sequences(tree: Tree) -> None:
    assert tree.soft_values()[()] == pytest.approx(tree.optimum, abs=1e-9)


def test_the_optimal_policy_sums_to_one_and_follows_the_recursion(tree: Tree) -> None:
    probability = tree.soft_optimal()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-9)
    # V of the state after the first token is β log of what is left there.
    values = tree.soft_values()
    first = tree.paths[-1][0]
    inside = torch.tensor([path[0] == first for path in tree.paths])
    log_first = float(tree._steps.double()[inside.nonzero()[0, 0], 0, first])
    rest = (tree.reference_logp + tree.scores / tree.beta)[inside].logsumexp(0) - log_first
    assert values[(first,)] == pytest.approx(tree.beta * float(rest), abs=1e-9)


def test_reward_less_kl_is_constant_under_the_optimum(tree: Tree) -> None:
    gain = tree.scores - tree.beta * (tree.soft_optimal().log() - tree.reference_logp)
    assert float(gain.std()) < 1e-9
    assert float(gain.mean()) == pytest.approx(tree.optimum, abs=1e-9)


def test_the_optimum_is_reached_by_the_optimal_policy_and_by_no_other(tree: Tree) -> None:
    best = tree.soft_optimal().log()
    assert tree.objective(best) == pytest.approx(tree.optimum, abs=1e-9)
    assert tree.total_variation(best) == pytest.approx(0.0, abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        for _ in range(20):
            noise = torch.randn(len(tree.paths), generator=generator, dtype=torch.float64) * scale
            other = (best + noise).log_softmax(0)
            assert tree.objective(other) < tree.optimum
    assert tree.objective(tree.reference_logp) == pytest.approx(
        float((tree.reference_logp.exp() * tree.scores).sum()), abs=1e-6
    )
    greedy = torch.full((len(tree.paths),), -torch.inf, dtype=torch.float64)
    greedy[tree.scores.argmax()] = 0.0
    assert tree.objective(greedy) < tree.optimum


def test_a_policy_is_read_off_the_tree_and_sampling_agrees(probe: LanguageModel) -> None:
    """The enumeration's probabilities, scores and rewards are those that a rollout meets."""
    probe.adapters.add("policy")
    for parameter in probe.adapters.parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    env = make(probe, 2000)
    policy = Policy(probe)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    chosen = torch.tensor([prompt.text == "c" for prompt in env.prompts])
    tree = enumerate_tree(env, Prompt("c"))
    logp = policy_logp(tree, policy.log_probs)
    assert float(logp.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    place = {path: i for i, path in enumerate(tree.paths)}
    counts = Counter()
    for row in chosen.nonzero()[:, 0].tolist():
        path = tuple(buffer.tokens[row][buffer.is_action[row]].tolist())
        at = place[path]
        counts[at] += 1
        assert float(buffer.score[row]) == pytest.approx(float(tree.scores[at]), abs=1e-6)
        assert float(buffer.logp[row].sum()) == pytest.approx(float(logp[at]), abs=1e-4)
        assert float(buffer.reference_logp[row].sum()) == pytest.approx(float(tree.reference_logp[at]), abs=1e-4)
        gain = float(tree.scores[at] - 0.1 * (logp[at] - tree.reference_logp[at]))
        assert float(buffer.rewards[row].sum()) == pytest.approx(gain, abs=1e-4)
        assert (int(buffer.finish[row]) == Finish.STOP) == (path[-1] == 1)
    total = sum(counts.values())
    shares = torch.tensor([counts[i] / total for i in range(len(tree.paths))])
    # About 500 samples over 85 sequences: total variation near 0.12 from sampling alone.
    assert float((shares - logp.exp()).abs().sum() / 2) < 0.2
    mean = float((logp.exp() * tree.scores).sum())
    assert float(buffer.score[chosen].mean()) == pytest.approx(
        mean, abs=4 * float(buffer.score[chosen].std()) / total**0.5
    )


def test_total_variation_by_hand_and_the_limit_of_sequences(probe: LanguageModel) -> None:
    tree = enumerate_tree(make(probe), Prompt("a"))
    best = tree.soft_optimal()
    uniform = torch.full_like(best, 1 / len(best))
    by_hand = sum(abs(a - b) for a, b in zip(uniform.tolist(), best.tolist(), strict=True)) / 2
    assert tree.total_variation(uniform.log()) == pytest.approx(by_hand, rel=1e-4)
    count = len(tree.scores)
    assert len(enumerate_tree(make(probe), Prompt("a"), max_sequences=count).scores) == count
    with pytest.raises(ValueError, match=f"more than {count - 1} completions"):
        enumerate_tree(make(probe), Prompt("a"), max_sequences=count - 1)
