"""Ensembles of reward models, and which queries they choose."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.special import expit
from test_reward_model import TEXTS, perturbed

from agents import reward_modelling as training
from agents.learner import Learner, LearnerConfig
from agents.pipeline import Options, PreferenceOptions, RewardOptions, Setting, gather_preferences, learn_reward
from agents.pipeline import stages as pipeline_stages
from agents.pipeline.queries import Queries, most_informative
from agents.runs import Run
from lmgym import Completion, LanguageModel, Prompt, RewardModel
from lmgym.preferences import Comparison, collect_comparisons
from lmgym.preferences.queries import disagreement, largest, margin
from lmgym.reward import RewardEnsemble, load_reward_model
from lmgym.tasks.probe import Tree

PAIRS = [Comparison("a", (better, worse)) for better, worse in (("b", "c"), ("bb", "d"), ("ab", "ac"), ("bd", "dd"))]


def ensemble_of(lm: LanguageModel, rank: int = 4) -> RewardEnsemble:
    made = RewardEnsemble.from_language_model(lm, 3, rank)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def test_the_score_is_the_mean_of_the_members_and_the_spread_their_deviation(llama: LanguageModel) -> None:
    ensemble = ensemble_of(llama)
    for index, member in enumerate(ensemble.members):
        member.shift = 0.1 * index
    ensemble.shift = -2.0
    prompts, completions = [Prompt("a")] * 2, [Completion("b", "stop"), Completion("dcb", "length")]
    alone = np.array([member(prompts, completions) for member in ensemble.members])
    assert ensemble(prompts, completions) == pytest.approx((alone.mean(0) + 2).tolist(), abs=1e-5)
    assert ensemble.spread(prompts, completions) == pytest.approx(alone.std(0, ddof=1).tolist(), abs=1e-5)
    assert min(ensemble.spread(prompts, completions)) > 1e-3


def test_members_with_adapters_share_one_trunk_and_differ_otherwise(llama: LanguageModel) -> None:
    ensemble = RewardEnsemble.from_language_model(llama, 3, rank=4)
    first, *others = (dict(member.model.named_parameters()) for member in ensemble.members)
    trunk = [name for name, p in first.items() if not p.requires_grad and "original_module" not in name]
    assert len(trunk) > 10
    for other in others:
        assert all(other[name].data_ptr() == first[name].data_ptr() for name in trunk)
        heads = [name for name, p in other.items() if p.requires_grad and "lora_B" not in name]
        assert heads
        assert all(not torch.equal(other[name], first[name]) for name in heads), "random weights of its own"
    own = [id(p) for p in ensemble.parameters()]
    assert len(own) == len(set(own))
    assert all(p.requires_grad for p in ensemble.parameters())


@pytest.mark.parametrize("rank", [4, 0])
def test_it_comes_back_from_its_folder(llama: LanguageModel, rank: int, tmp_path: Path) -> None:
    llama.save(tmp_path / "base")
    llama.name = str(tmp_path / "base")
    ensemble = ensemble_of(llama, rank)
    ensemble.members[1].shift, ensemble.shift = 0.5, 0.25
    ensemble.save(tmp_path / "ensemble")
    again = load_reward_model(tmp_path / "ensemble")
    assert isinstance(again, RewardEnsemble)
    torch.testing.assert_close(again.member_scores(TEXTS), ensemble.member_scores(TEXTS), atol=1e-5, rtol=0)
    assert again.shift == 0.25
    if rank:
        size = sum(file.stat().st_size for file in (tmp_path / "ensemble").rglob("*.safetensors"))
        trunks = [next(iter(member.model.parameters())).data_ptr() for member in again.members]
        assert size < 3 * 40_000, "adapters alone"
        assert len(set(trunks)) == 1
    (tmp_path / "ensemble" / "ensemble.json").write_text(json.dumps({"members": "3", "shift": 0.0}))
    with pytest.raises(ValueError, match=r"ensemble\.json: expected are members"):
        load_reward_model(tmp_path / "ensemble")


def test_one_member_is_no_ensemble(llama: LanguageModel) -> None:
    with pytest.raises(ValueError, match="an ensemble of 1 has no spread: give at least 2"):
        RewardEnsemble([RewardModel.from_language_model(llama)])


def test_each_member_learns_as_it_would_alone_from_its_own_draw(llama: LanguageModel) -> None:
    """One step of plain gradient descent on the mean loss of its draw, member by member."""
    config = LearnerConfig(lr=1e-2, schedule="constant", warmup=0.0, max_grad_norm=1e9)
    ensemble, twin = ensemble_of(llama), ensemble_of(llama)
    draws = [training.bootstrap(PAIRS, 7, member) for member in range(3)]
    assert len({tuple(c.ranked for c in draw) for draw in draws}) == 3, "no two members see the same comparisons"
    assert all(len(draw) == len(PAIRS) and set(draw) <= set(PAIRS) for draw in draws)
    learner = Learner(ensemble.parameters(), config, seed=7)
    list(training.train(ensemble, PAIRS, [], learner, training.Config(epochs=2, minibatch_prompts=4)))
    for member, draw, trained in zip(twin.members, draws, ensemble.members, strict=True):
        alone = Learner(member.parameters(), config, seed=7)
        list(training.train(member, draw, [], alone, training.Config(epochs=2, minibatch_prompts=4)))
        torch.testing.assert_close(trained.score_texts(TEXTS), member.score_texts(TEXTS), atol=1e-4, rtol=1e-4)


def test_every_member_is_normalised(llama: LanguageModel) -> None:
    ensemble = ensemble_of(llama)
    ensemble.members[0].scale(20.0)
    training.normalise(ensemble, TEXTS)
    scores = ensemble.member_scores(TEXTS)
    torch.testing.assert_close(scores.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.std(1), torch.ones(3), atol=1e-4, rtol=0)
    held_out = training.evaluate(ensemble, PAIRS)
    mean = scores.mean(0)
    assert mean.tolist() == pytest.approx(ensemble.score_texts(TEXTS).tolist())
    better, worse = (ensemble.score_texts([f"a{c.ranked[i]}" for c in PAIRS]) for i in (0, 1))
    assert held_out["accuracy/test"] == pytest.approx(float((better > worse).float().mean()))


# Queries -----------------------------------------------------------------------------------------------------------


def test_the_value_of_a_query_by_hand() -> None:
    scores = np.array([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.1, 0.0]]])
    high, low = expit(2.0), expit(-2.0)
    spread = (high - low) ** 2 / 2, (expit(0.1) - 0.5) ** 2 / 2
    assert disagreement(scores).tolist() == pytest.approx(spread)
    assert margin(scores).tolist() == pytest.approx([0.0, -0.05])
    assert largest(disagreement(scores), 1).tolist() == [0]
    assert largest(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="one reward model cannot disagree"):
        disagreement(scores[:1])
    with pytest.raises(ValueError, match="5 queries were requested, and there are 4"):
        largest(np.zeros(4), 5)


def test_prompts_are_chosen_by_all_pairs_of_their_completions(llama: LanguageModel) -> None:
    ensemble = ensemble_of(llama)
    prompts = [Prompt(letter) for letter in "abcd"]
    groups = [[Completion(text, "stop") for text in (letter, "bb", "dca")] for letter in "dcba"]
    values = []
    for prompt, group in zip(prompts, groups, strict=True):
        scores = np.array([member([prompt] * 3, group) for member in ensemble.members])
        pairs = [expit(scores[:, i] - scores[:, j]).var(ddof=1) for i in range(3) for j in range(i + 1, 3)]
        values.append(np.mean(pairs))
    order = sorted(range(4), key=lambda i: -values[i])
    assert most_informative(ensemble, prompts, groups, 3, "disagreement") == order[:3]
    alone = perturbed(llama)
    closest = []
    for prompt, group in zip(prompts, groups, strict=True):
        scores = alone([prompt] * 3, group)
        closest.append(np.mean([abs(scores[i] - scores[j]) for i in range(3) for j in range(i + 1, 3)]))
    assert most_informative(alone, prompts, groups, 2, "margin") == sorted(range(4), key=lambda i: closest[i])[:2]


@pytest.mark.parametrize("queries", ["disagreement", "margin"])
def test_the_pipeline_asks_about_what_its_reward_models_choose(
    queries: Literal["disagreement", "margin"],
    probe: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many prompts are compared as with random queries: half of them at random, and the rest of twice as many."""
    asked: list[tuple[int, list[Any]]] = []
    compared: list[list[Any]] = []

    def collected(task: Any, prompts: Any, groups: Any, *rest: Any, **more: Any) -> list[Comparison]:
        compared.append(list(groups))
        return collect_comparisons(task, prompts, groups, *rest, **more)

    def seen(model: Any, prompts: Any, groups: Any, count: int, queries: Queries) -> list[int]:
        chosen = most_informative(model, prompts, groups, count, queries)
        asked.append((len(prompts), [groups[i] for i in chosen]))
        members = len(model.members) if isinstance(model, RewardEnsemble) else 1
        assert members == (3 if queries == "disagreement" else 1)
        return chosen

    monkeypatch.setattr(pipeline_stages, "most_informative", seen)
    monkeypatch.setattr(pipeline_stages, "collect_comparisons", collected)
    setting = Setting(Tree(), probe, {"max_prompt_tokens": 1, "max_new_tokens": 3})
    preferences = PreferenceOptions(prompts=24, test_prompts=8, completions=3, queries=queries)
    options = Options(preferences=preferences, reward=RewardOptions(epochs=1, normalise_on=8))
    with Run(tmp_path / "run", {"seed": 0}) as run:
        comparisons, held_out, _ = gather_preferences(setting, options, run)
    candidates, chosen = asked[0]
    assert (candidates, len(chosen)) == (24, 12)
    assert compared[1] == chosen
    assert 12 < len(comparisons) <= 24
    assert held_out
    with pytest.raises(ValueError, match=f"--preferences.queries {queries} chooses what simulated annotators compare"):
        gather_preferences(replace(setting, comparisons=PAIRS), options, run)


def test_the_pipeline_learns_and_keeps_an_ensemble(probe: LanguageModel, tmp_path: Path) -> None:
    setting = Setting(Tree(), probe, {"max_prompt_tokens": 1, "max_new_tokens": 3})
    options = Options(
        preferences=PreferenceOptions(completions=2), reward=RewardOptions(epochs=1, normalise_on=16, ensemble=2)
    )
    prompts, completions = [Prompt("a")], [Completion("b", "stop")]
    with Run(tmp_path / "run", {"seed": 0}) as run:
        made = learn_reward(setting, options, run, PAIRS * 4, PAIRS, [], 1.0)
        again = learn_reward(setting, options, run, PAIRS * 4, PAIRS, [], 1.0)
    assert isinstance(made, RewardEnsemble)
    assert isinstance(again, RewardEnsemble)
    assert made is not again
    assert again(prompts, completions) == pytest.approx(made(prompts, completions), abs=1e-5)
    assert (tmp_path / "run" / "reward_model" / "1" / "config.json").is_file()
