"""What an evaluation reports, against numbers worked out one completion at a time."""

import math
import statistics
from typing import Any

import pytest
import torch
from test_ppo import Run, make, perturb

from agents import evaluate
from agents.evaluate import distinct
from lmgym import Policy, RolloutBuffer, Stream, collect
from lmgym.env import Finish


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),
        (["a b a b"], 3, 1.0),
        (["a b", "a b", "b c"], 2, 2 / 3),
        (["a b c", "d"], 2, 1.0),
        (["a b"], 2, 1.0),
        (["a", ""], 2, 0.0),
        ([], 2, 0.0),
    ],
)
def test_distinct_counts_word_groups_by_hand(texts: list[str], n: int, share: float) -> None:
    assert distinct(texts, n) == pytest.approx(share)
    if n == 2:
        assert distinct(texts) == pytest.approx(share), "pairs, unless told otherwise"


def moved(**arguments: Any) -> Run:
    run = make(rows=40, **arguments)
    perturb(run.policy)
    torch.nn.init.normal_(run.policy.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return run


def test_figures_are_means_over_completions_worked_out_one_by_one() -> None:
    run = moved()
    found = evaluate.evaluate(run.policy, run.env, seed=5).figures
    buffer = collect(run.policy, run.env, RolloutBuffer.like(run.env), Stream(5, 0))
    logp = run.policy.log_probs(buffer.sequences).detach()
    logits, _ = run.policy.lm.evaluate(buffer.sequences, None)
    columns: dict[str, list[float]] = {name: [] for name in found if name != "distinct_2"}
    for row in range(40):
        length = int(buffer.is_action[row].sum())
        kl = exact = entropy = 0.0
        for t in range(length):
            allowed = buffer.action_mask[t]
            policy = torch.distributions.Categorical(logits=logp[row, t][allowed])
            reference = torch.distributions.Categorical(logits=logits[row, t][allowed].detach())
            chosen = int(allowed[: buffer.tokens[row, t]].sum())
            kl += float(policy.logits[chosen] - reference.logits[chosen])
            exact += float(torch.distributions.kl_divergence(policy, reference))
            entropy += float(policy.entropy())
        columns["kl_nats_per_sequence"].append(kl)
        columns["kl_exact_nats_per_sequence"].append(exact)
        columns["entropy_nats_per_token"].append(entropy / length)
        columns["tokens"].append(length)
        columns["finished_share"].append(float(buffer.finish[row] == Finish.STOP))
        columns["score"].append(float(buffer.score[row]))
    if "gold" in columns:
        columns["gold"] = [float(x) for x in run.env.task.gold(run.env.prompts, run.env.completions())]
    for name, values in columns.items():
        assert found[name].mean == pytest.approx(statistics.fmean(values), abs=1e-4), name
        assert found[name].stderr == pytest.approx(statistics.stdev(values) / math.sqrt(40), abs=1e-4), name
    assert found["distinct_2"].mean == distinct([c.text for c in run.env.completions()])
    assert 0 < found["finished_share"].mean < 1


def test_a_policy_that_is_the_reference_has_no_kl_to_it() -> None:
    run = make(rows=8, kl="none")
    own = Policy(run.policy.lm, None, critic="none")
    figures = evaluate.evaluate(own, run.env).figures
    assert not [name for name in figures if name.startswith("kl_")]
    assert {"score", "entropy_nats_per_token", "tokens", "finished_share", "distinct_2"} <= set(figures)


def test_one_completion_has_no_standard_error() -> None:
    run = make(rows=1)
    figures = evaluate.evaluate(run.policy, run.env).figures
    assert all(figure.stderr == 0 and math.isfinite(figure.mean) for figure in figures.values())
    run = make(rows=2)
    assert evaluate.evaluate(run.policy, run.env).figures["entropy_nats_per_token"].stderr > 0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_samples_show_the_four_quantities_of_every_token(gamma: float, lam: float) -> None:
    run = moved()
    defaults: dict[str, Any] = {} if (gamma, lam) == (1.0, 0.95) else {"gamma": gamma, "lam": lam}
    report = evaluate.evaluate(run.policy, run.env, seed=3, **defaults)
    buffer = collect(run.policy, run.env, RolloutBuffer.like(run.env), Stream(3, 0))
    assert len(report.samples) == 12
    assert len(evaluate.evaluate(run.policy, run.env, samples=3).samples) == 3
    assert len(evaluate.evaluate(run.policy, run.env, samples=99).samples) == 40
    run.env.reset(seed=Stream(3, 0).prompt_seeds(40))
    for row, sample in enumerate(report.samples):
        assert sample["prompt"] == run.env.prompts[row].text
        assert sample["score"] == pytest.approx(float(buffer.score[row]))
        length = int(buffer.is_action[row].sum())
        assert len(sample["tokens"]) == length
        letters = "".join(token["text"] for token in sample["tokens"])
        assert letters.startswith(sample["completion"])
        # Schulman et al. 2016, eq. 16, from the end backwards; nothing is bootstrapped, for every row has ended.
        advantage = following = 0.0
        for t in reversed(range(length)):
            shown, value = sample["tokens"][t], float(buffer.values[row, t])
            reward = float(buffer.rewards[row, t])
            advantage = reward + gamma * following - value + gamma * lam * advantage
            following = value
            assert shown["reward"] == pytest.approx(reward, abs=1e-5)
            assert shown["value"] == pytest.approx(value, abs=1e-5)
            assert shown["kl"] == pytest.approx(float(buffer.logp[row, t] - buffer.reference_logp[row, t]), abs=1e-5)
            assert shown["advantage"] == pytest.approx(advantage, abs=1e-4)


def test_a_report_comes_back_from_plain_data() -> None:
    run = moved()
    report = evaluate.evaluate(run.policy, run.env)
    data = report.to_dict()
    again = evaluate.EvaluationReport.from_dict(data)
    assert again.figures == report.figures
    assert list(again.samples) == list(report.samples)
    data["figures"]["score"]["mean"] = None
    assert math.isnan(evaluate.EvaluationReport.from_dict(data).figures["score"].mean)
    assert evaluate.EvaluationReport.from_dict(data).figures["score"].stderr == report.figures["score"].stderr
