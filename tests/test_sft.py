"""Supervised fine-tuning: what is learned, what is masked, and that it learns."""

import math

import pytest
import torch
from test_ppo import perturb

from agents import sft
from agents.learner import Learner, LearnerConfig
from lmgym import LanguageModel, Policy
from lmgym.models import Example, encode_example

PAD, EOS, A, B, C, D = range(6)


def by_hand(lm: LanguageModel, ids: list[int], start: int, adapter: str | None = None) -> list[float]:
    with torch.no_grad(), lm.adapters.using(adapter):
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0]
    return [-float(logits[t - 1].log_softmax(0)[ids[t]]) for t in range(start, len(ids))]


def test_prompt_is_given_completion_and_its_end_are_learned(probe: LanguageModel) -> None:
    assert encode_example(probe, Example("ab", "cd"), 10) == ([A, B, C, D, EOS], 2)
    assert encode_example(probe, Example("ab", "cd", finished=False), 10) == ([A, B, C, D], 2)
    assert encode_example(probe, Example("", "cd"), 10) == ([C, D, EOS], 1)
    assert encode_example(probe, Example("ab", "cdcd"), 3) == ([A, B, C], 2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_by_hand_over_padded_rows(architecture: str, request: pytest.FixtureRequest) -> None:
    lm: LanguageModel = request.getfixturevalue(architecture)
    examples = [Example("a", "bcd"), Example("abc", "d"), Example("", "dd", finished=False)]
    rows = [encode_example(lm, example, 10) for example in examples]
    loss, mask = sft.nll(lm, rows)
    expected = [by_hand(lm, ids, start) for ids, start in rows]
    for row, values in enumerate(expected):
        assert loss[row][mask[row]].tolist() == pytest.approx(values, abs=1e-5)
    every = [value for values in expected for value in values]
    assert sft.evaluate(lm, examples, sft.Config()) == pytest.approx(sum(every) / len(every), abs=1e-5)
    # The end-of-sequence token is learned where the text ends.
    assert [int(m.sum()) for m in mask] == [4, 2, 1]


def test_it_learns_and_reports_what_it_says(probe: LanguageModel) -> None:
    """Two texts, each half of the time: the entropy is log 2 spread over five tokens."""
    probe.adapters.add("sft", rank=8)
    examples = [Example("a", "bcdb"), Example("a", "dcdb")] * 64
    for parameter in probe.adapters.parameters("sft"):
        parameter.requires_grad_(True)
    learner = Learner(probe.adapters.parameters("sft"), LearnerConfig(lr=1e-2))
    config = sft.Config(epochs=8, minibatch_rows=16)
    rows = list(sft.train(probe, examples, examples[:4], learner, config, "sft"))
    assert len(rows) == 8 * 8
    assert set().union(*rows) == set(sft.METRICS)
    assert [i for i, row in enumerate(rows) if "loss/test" in row] == [0, 63]
    # Observed: 0.15 nats a token against the 0.139 that nobody can beat.
    assert math.log(2) / 5 - 1e-3 < rows[-1]["loss/test"] < 0.2 < rows[0]["loss/test"]
    assert rows[-1]["loss/test"] == pytest.approx(sft.evaluate(probe, examples[:4], config, "sft"), abs=1e-6)
    ended = by_hand(probe, [A, B, C, D, B, EOS], 5, "sft")
    assert ended[0] < 0.2, "stopping is learned"


def test_no_examples_are_refused(probe: LanguageModel) -> None:
    learner = Learner([torch.nn.Parameter(torch.zeros(1))], LearnerConfig())
    with pytest.raises(ValueError, match="no examples"):
        next(sft.train(probe, [], [], learner, sft.Config()))


def test_a_step_goes_down_the_mean_over_learned_tokens(probe: LanguageModel) -> None:
    """Its gradient's norm, and the schedule over all steps of all passes; held-out loss before the first and last."""
    probe.adapters.add("policy")
    perturb(Policy(probe))
    given = [Example("ab", "cd"), Example("a", "bcdd", finished=False), Example("c", "")]
    learner = Learner(probe.adapters.parameters("policy"), LearnerConfig(lr=0.0, max_grad_norm=0.0))
    (row,) = list(sft.train(probe, given, [], learner, sft.Config(minibatch_rows=3), "policy"))
    encoded, losses = [encode_example(probe, example) for example in given], []
    for ids, start in encoded:
        with probe.adapters.using("policy"):
            logp = probe.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logp[t - 1, ids[t]] for t in range(start, len(ids))]
    mean = torch.stack(losses).mean()
    gradient = torch.autograd.grad(mean, probe.adapters.parameters("policy"))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert row["optimizer/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["loss/train"] == pytest.approx(float(mean.detach()), rel=1e-5)

    learner = Learner(probe.adapters.parameters("policy"), LearnerConfig(lr=1e-3, warmup=0.0))
    rows, rates = [], []
    for one in sft.train(probe, given, given, learner, sft.Config(epochs=2, minibatch_rows=2), "policy"):
        rows.append(one)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert ["loss/test" in one for one in rows] == [True, False, False, True]
    assert rows[0]["loss/test"] == pytest.approx(float(mean.detach()), rel=1e-5), "before the first step"
    assert rows[3]["loss/test"] < rows[0]["loss/test"]
    assert sft.evaluate(probe, [], sft.Config(), "policy") == 0.0
    many = sft.evaluate(probe, given * 30, sft.Config(), "policy")
    assert many == pytest.approx(rows[3]["loss/test"], rel=1e-5), "however many are read at a time"


def test_the_held_out_loss_of_a_single_token(probe: LanguageModel) -> None:
    example = Example("ab", "c", finished=False)
    ids, start = encode_example(probe, example)
    assert sft.evaluate(probe, [example], sft.Config()) == pytest.approx(by_hand(probe, ids, start)[0], abs=1e-5)


def test_a_text_longer_than_the_models_positions_is_refused(probe: LanguageModel) -> None:
    """The probe has 64 positions."""
    assert sft.nll(probe, [encode_example(probe, Example("", "a" * 63), None)])[0].shape == (1, 63)
    with pytest.raises(ValueError, match="a text has 65 tokens, but the model 'probe' has only 64 positions"):
        sft.nll(probe, [encode_example(probe, Example("", "a" * 64), None)])
