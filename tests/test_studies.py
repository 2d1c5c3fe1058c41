"""Studies: verdicts follow from numbers, pages from results, and the worlds from formulas."""

import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import slow
from scipy import stats

import lmgym
from agents import cli
from agents.experiments.results import read_results
from agents.experiments.statistics import Estimate
from agents.studies import (
    STUDIES,
    Claim,
    bai,
    christiano,
    deepseek_r1,
    gao,
    judge,
    limits,
    measured,
    nvidia,
    ouyang,
    stiennon,
    study_named,
    trial_runs,
    ziegler,
)
from agents.studies.form import cells_of, mean_curves, run_cell
from agents.studies.letter_world import PROMPT, LetterWorld, train_reward_model, tree_of
from agents.studies.page import command_of, figure_text, page_text
from agents.studies.token_world import TokenWorld, collected, fit, spearman
from agents.tools import make_study_pages
from lmgym.preferences import SimulatedAnnotator
from lmgym.tasks.base import Completion, Prompt

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "studies"
RECORDED = sorted(path.stem for path in (PAGES / "results").glob("*.jsonl"))


# Verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "values", "outcome"),
    [
        (Claim("x", "", low=0.0), [1.0, 1.2, 0.8], "held"),
        (Claim("x", "", low=0.0), [-1.0, -1.2, -0.8], "did not"),
        (Claim("x", "", low=0.0), [1.0, -0.5, 0.8], "cannot be told"),
        (Claim("x", "", low=0.0), [1.0, 1.1], "cannot be told"),
        (Claim("x", "", high=0.5), [0.1, 0.1, 0.1], "held"),
        (Claim("x", "", 0.9, 1.1), [1.0, 1.01, 0.99], "held"),
        (Claim("x", "", 0.9, 1.1), [1.3, 1.31, 1.29], "did not"),
        (Claim("x", "", 0.9, 1.1, "identity"), [1.0, 1.0, 1.2], "did not"),
        (Claim("x", "", 0.9, 1.1, "identity"), [1.0, 1.09, 0.91], "held"),
        (Claim("x", "", low=1.0, kind="count"), [1.0] * 8 + [0.0] * 2, "held"),
        (Claim("x", "", low=1.0, kind="count"), [1.0] * 7 + [0.0] * 3, "did not"),
        (Claim("x", "", 0.0, 0.0, "contains"), [0.1, -0.2, 0.3], "held"),
        (Claim("x", "", 0.0, 0.0, "contains"), [1.1, 1.2, 1.3], "did not"),
    ],
)
def test_a_verdict_follows_from_the_values(claim: Claim, values: list[float], outcome: str) -> None:
    assert judge(claim, values).outcome == outcome


def test_a_verdict_shows_its_interval_and_its_power() -> None:
    values = [0.3, 0.5, 0.4, 0.7, 0.2]
    found = judge(Claim("x", "", low=0.0), values)
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.estimate.low, found.estimate.high) == pytest.approx(expected)
    assert found.detectable == pytest.approx(1.682 * np.std(values, ddof=1), rel=1e-3)
    assert Claim("x", "", low=1.0, high=2.0, kind="count", enough=0.5).wanted == "1 to 2, in 50% of the seeds"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_is(name: str) -> None:
    study = study_named(name)
    assert study.PAPER.startswith(("https://arxiv.org/abs/", "https://developer.nvidia.com/blog/"))
    assert "What differs here" in (study.__doc__ or "")
    names = [claim.name for claim in study.CLAIMS]
    assert len(names) == len(set(names)) >= 3
    assert study.Config().seeds >= study.QUICK.seeds >= 5
    keys = {cell.key for config in (study.Config(), study.QUICK, study.SMOKE) for cell in cells_of(study, config)}
    assert len(keys) == study.Config().seeds + study.QUICK.seeds + study.SMOKE.seeds
    bounds = [(claim.low, claim.high) for claim in study.CLAIMS]
    assert all(low > -math.inf or high < math.inf for low, high in bounds), "a claim that cannot fail"


LONG = ("ouyang", "stiennon", "ziegler")  # 5 to 10 s each, even in the smoke size


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in STUDIES])
def test_a_study_runs_at_smoke_size(name: str) -> None:
    """Every measure and every curve is there, finite, and JSON data; the same seed gives the same."""
    study = study_named(name)
    cell = cells_of(study, study.SMOKE)[0]
    found = run_cell(cell)
    data = json.loads(json.dumps(found, allow_nan=False))
    assert {claim.name for claim in study.CLAIMS} == set(data["measures"])
    assert {panel.name for panel in study.PANELS} == set(data["curves"])
    rows = [{"status": "ok", "result": data}]
    for panel in study.PANELS:
        assert mean_curves(rows, panel.name), panel.name
    figure = figure_text(study, rows)
    assert figure.count('<g id="axes_') == len(study.PANELS)


# Pages -------------------------------------------------------------------------------------------------------------


def recorded(name: str) -> tuple[ModuleType, list[dict[str, object]]]:
    return study_named(name), read_results(PAGES / "results" / f"{name}.jsonl")


def test_the_index_counts_the_verdicts() -> None:
    assert set(RECORDED) <= set(STUDIES)
    assert (PAGES / "README.md").read_text(encoding="utf-8") == make_study_pages.index()


@pytest.mark.parametrize("name", RECORDED)
def test_a_page_is_written_from_the_results(name: str) -> None:
    """Every figure of it: the page is the one that the code writes from the committed rows."""
    study, rows = recorded(name)
    assert (PAGES / f"{name}.md").read_text(encoding="utf-8") == page_text(study, rows, f"{name}.svg")
    assert (PAGES / f"{name}.svg").is_file()
    verdicts = json.loads((PAGES / f"{name}.json").read_text(encoding="utf-8"))
    assert verdicts == json.loads(json.dumps([verdict.as_data() for verdict in measured(study, rows)]))
    assert "with other settings" not in command_of(study, rows)
    assert all("dirty" not in str(row["revision"]) for row in rows)


def test_a_page_changes_with_a_result() -> None:
    study, rows = recorded(RECORDED[0])
    text = page_text(study, rows, "x.svg")
    changed = json.loads(json.dumps(rows))
    changed[0]["result"]["measures"][study.CLAIMS[0].name] += 1.0
    assert page_text(study, changed, "x.svg") != text


def test_a_failed_seed_is_no_verdict() -> None:
    study, rows = recorded(RECORDED[0])
    broken = [{**rows[0], "status": "error", "error": "Traceback\nValueError: no"}, *rows[1:]]
    with pytest.raises(ValueError, match=r"1 of 10 seeds have no result \(error: ValueError: no\)"):
        measured(study, broken)


def test_the_command_runs_a_study_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is recorded is not run again: the committed results of --quick are enough for its page."""
    name = RECORDED[0]
    study, rows = recorded(name)
    source = {"source": str(rows[0]["setting"]["source"])}  # type: ignore[index]
    monkeypatch.setattr("agents.studies.form._source_of", lambda study: source["source"])
    (tmp_path / "results.jsonl").write_bytes((PAGES / "results" / f"{name}.jsonl").read_bytes())
    assert cli.main(["study", name, "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "its intervals are wide" in said.err
    assert study.TITLE in said.out
    assert said.out.count(" held ") >= 3
    assert (tmp_path / f"{name}.md").read_text() == (PAGES / f"{name}.md").read_text()
    assert cli.main(["study", "christianno"]) == 2
    assert "no study 'christianno'. Did you mean 'christiano'?" in capsys.readouterr().err
    assert cli.main(["studies"]) == 0
    assert all(name in capsys.readouterr().out for name in ["christiano"])


# Each study's own machinery ----------------------------------------------------------------------------------------


def test_christiano_tells_the_likelihood_the_rate_of_wrong_labels() -> None:
    world, config = TokenWorld.draw(np.random.default_rng(0)), christiano.Config(noisy_pairs=8000)
    told, untold = (christiano.scale_found(config, world, np.random.default_rng(1), 0.17, rate) for rate in (0.17, 0.0))
    assert told == pytest.approx(1.0, abs=0.15)
    assert untold < 0.7


def test_gao_learns_its_proxy_from_labels() -> None:
    """More labels, a better proxy; it is never gold itself, and a narrow one cannot tell tokens apart."""
    world, rng = TokenWorld.draw(np.random.default_rng(0)), np.random.default_rng(1)
    true = world.worth - world.worth.mean()
    errors = []
    for size in (100, 400, 6400):
        proxy = gao.learned(world, rng, size, 16)
        errors.append(float(np.abs(proxy - proxy.mean() - true).mean()))
    assert errors[0] > 2 * errors[2] > 0.01
    assert len(set(gao.learned(world, rng, 400, 4).round(9))) == 4
    d = np.linspace(0.1, 4, 30)
    assert gao.r2(d, d * (3 - 0.5 * np.log(d)), np.log) == pytest.approx(1.0)
    assert gao.peak(d, -((d - 1.234) ** 2)) == pytest.approx(1.234)


def test_bai_has_two_halves() -> None:
    """The policy is the optimum for the train half, which likes it better and better than the test half does."""
    world = TokenWorld.draw(np.random.default_rng(0))
    curves = bai.halves(world, np.random.default_rng(1), bai.Config(half=200))
    gap = [train[1] - test[1] for train, test in zip(curves["train"], curves["test"], strict=True)]
    assert gap[-1] > gap[0] > 0
    _, slope, r2 = bai.square_root_law(world, world.worth)
    assert slope == pytest.approx(1.0, abs=0.1)
    assert r2 > 0.99


def test_limits_finds_the_planted_bias() -> None:
    found = limits.run(limits.Config(comparisons=500, shares=(0.0, 0.2), letters=4, texts=50), seed=0)["measures"]
    assert found["planted_p"] < 0.01
    assert found["planted_effect"] > 0.3 > abs(found["fair_effect"])
    assert found["majority_accuracy"] == pytest.approx(1 - found["minority_accuracy"])


def test_ouyang_ptx_holds_the_pretraining_loss() -> None:
    config, rng = ouyang.Config(letters=3, updates=8, rows=64), np.random.default_rng(0)
    world = LetterWorld.make(3)
    tree = tree_of(world.lm, 3)
    plain, ptx = (ouyang.train(config, world, tree, rng, 0, weight)[-1] for weight in (0.0, 1.0))
    assert plain[1] > 2 * ptx[1] > 0
    assert ouyang.at([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]], 2.0) == 3.0


def test_ziegler_steers_towards_its_target() -> None:
    """β rises while KL is above the target; without a target it stays 0."""
    config = ziegler.Config(letters=3, updates=12, free_updates=2, rows=32)
    score = ziegler.Letters(ziegler.gold).gold
    steered, free = (ziegler.train(config, score, 0, target) for target in (0.1, 0.0))
    assert free[-1]["beta"] == 0.0
    assert steered[-1]["beta"] > 0.16
    assert ziegler.mean_of_last([{"a": 1.0}, {"a": 2.0}, {"a": 4.0}], 2) == {"a": 3.0}


def test_trial_runs_see_their_share() -> None:
    config = trial_runs.Config(full=2000, shares=(0.05, 0.5), repeats=2, tokens=64)
    sizes, values, full = trial_runs.curve(config, np.random.default_rng(0))
    assert sizes == [100.0, 100.0, 1000.0, 1000.0]
    assert max(values[:2]) < min(values[2:]) < full + 0.02


def test_stiennon_controls_for_length_and_sees_a_bias_for_it() -> None:
    """PPO on a reward model wins by gold; a score that likes length has the bias that was put in."""
    world, rng = LetterWorld.make(4), np.random.default_rng(0)

    def judged(text: str) -> float:
        return 2 * stiennon.gold(text) + 0.5 * len(text)

    model = train_reward_model(world.lm, world.compare(rng, judged, 600), 0)
    planted = world.gold(stiennon.gold) + 0.3 * world.gold(len)
    deviation = np.sqrt(world.reference @ planted**2 - (world.reference @ planted) ** 2)
    assert stiennon.length_bias(world, planted) == pytest.approx(0.3 / deviation)
    assert stiennon.length_bias(world, world.gold(stiennon.gold)) == pytest.approx(0.0, abs=1e-9)
    curve, raw, controlled = stiennon.train(stiennon.Config(letters=4, updates=15, rows=64), world, model, rng, 0)
    assert [number for number, _ in curve] == [0.0, 5.0, 10.0, 15.0]
    assert raw == curve[-1][1] > 0.5
    assert controlled != raw


def test_deepseek_compares_at_equal_tokens_and_replaces_its_reference() -> None:
    """The policy of the first part is what the second starts from; rules are those on the letters."""
    curve = [{"tokens": tokens, "right": right} for tokens, right in ((0.0, 0.0), (90.0, 0.4), (200.0, 0.9))]
    assert [deepseek_r1.at_tokens(curve, tokens) for tokens in (0.0, 100.0, 200.0)] == [0.0, 0.4, 0.9]
    prompts = [Prompt("ab"), Prompt("cd"), Prompt("cd"), Prompt("cd")]
    completions = [Completion("c"), Completion("a"), Completion("b"), Completion("a", "length")]
    assert deepseek_r1.Following().score(prompts, completions) == [1.2, 1.2, 0.2, 0.0]
    whole, half = (sum(p.numel() for p in lm.model.transformer.h.parameters()) for lm in
                   (lmgym.load("probe"), deepseek_r1.half(lmgym.load("probe"))))  # fmt: skip
    assert half * 2 == whole
    config = deepseek_r1.Config(updates=8, rows=32, lr=2e-2)
    curve, policy = deepseek_r1.train(config, deepseek_r1.grpo, lmgym.load("probe"), 0, beta=0.3, parts=2)
    assert [row["update"] for row in curve] == [0, 4, 5, 8]
    assert policy.lm.adapters.merges == 1
    base, tokens = lmgym.load("probe"), torch.tensor([[2, 3]])
    with torch.no_grad():
        assert not torch.allclose(base.model(tokens).logits, policy.lm.model(tokens).logits, atol=1e-3)
    assert deepseek_r1.first(curve, "form") in (4, 5, 8)


def test_nvidia_tunes_the_small_model_on_noisy_labels_of_its_teacher() -> None:
    """The adapter learns reports; without it the model is as before, bit by bit."""
    assert [nvidia.answer(text) for text in ("aaaaaab", "adddddd", "bdcbaaa", "cdcbaaa", "ddcbaaa")] == [
        "a", "d", "dcb", "bcd", "bcd",
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    reports = [nvidia.Letters("a").sample(rng).text for _ in range(600)]
    labels = [nvidia.labelled(rng, text, 0.2) for text in reports]
    wrong = np.mean([label.completion != nvidia.answer(label.prompt) for label in labels])
    assert wrong == pytest.approx(0.2, abs=0.05)
    assert nvidia.difficulty("aaaaaaa") < nvidia.difficulty("addbaaa")
    config = nvidia.Config(passes=4, tested=64)
    lm = nvidia.new_model(nvidia.SMALL, 0)
    before = [weight.clone() for weight in lm.model.parameters()]
    curve = nvidia.tuned(config, lm, "curriculum", labels, 0)
    assert curve[0][1] < 0.1
    assert curve[-1][1] > 0.3
    lm.adapters.drop("curriculum")
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


# The world of letters ----------------------------------------------------------------------------------------------


def test_the_world_of_letters_is_all_of_its_texts() -> None:
    """Its probabilities are those of plain transformers, and sum to 1; its optimum has the largest objective."""
    world = LetterWorld.make(2)
    assert len(world.texts) == 1 + 4 + 16
    assert world.reference.sum() == pytest.approx(1.0)
    lm = world.lm
    with torch.no_grad():
        ids = lm.text.encode_prompts([PROMPT])[0]
        first = lm.model(torch.tensor([ids])).logits[0, -1].double()
    letters = [token for token in range(lm.vocabulary) if token != lm.pad_id]
    chance = torch.softmax(first[letters], 0)[letters.index(next(iter(lm.eos_ids)))]
    assert world.reference[world.texts.index("")] == pytest.approx(float(chance), rel=1e-5)
    scores = np.random.default_rng(0).normal(size=21)
    best = world.optimum(scores, 0.5)

    def objective(policy: np.ndarray) -> float:
        return float(policy @ scores - 0.5 * world.kl(policy))

    other = world.optimum(scores, 0.6)
    assert objective(best) > objective(other) > objective(world.reference)
    ranked = world.compare(np.random.default_rng(1), len, 50, 3, SimulatedAnnotator(0.0, scale=1e6))
    assert all(list(map(len, c.ranked)) == sorted(map(len, c.ranked), reverse=True) for c in ranked)


# The world of tokens -----------------------------------------------------------------------------------------------


def test_the_optimum_is_that_of_every_text() -> None:
    """Against the closed form over all texts of two tokens, in which nothing is assumed about tokens."""
    rng = np.random.default_rng(0)
    world = TokenWorld.draw(rng, vocabulary=3, length=2, tiring=0.4)
    weights, beta = rng.normal(size=3), 0.7
    texts = [(a, b) for a in range(3) for b in range(3)]
    reference = np.array([world.reference[a] * world.reference[b] for a, b in texts])
    best = reference * np.exp([(weights[a] + weights[b]) / beta for a, b in texts])
    best /= best.sum()
    policy = world.optimum(weights, beta)
    assert [policy[a] * policy[b] for a, b in texts] == pytest.approx(best)
    assert world.kl(policy) == pytest.approx(stats.entropy(best, reference))
    counts = np.array([np.bincount(text, minlength=3) for text in texts])
    golds = world.gold(counts)
    assert world.expected_gold(policy) == pytest.approx(golds @ best - golds @ reference)
    assert world.expected(weights, policy) == pytest.approx((counts @ weights) @ (best - reference))
    repeated = TokenWorld(world.reference, world.worth, length=5, tiring=0.4, often=3)
    assert repeated.gold(np.array([[5, 0, 0]])) == pytest.approx(5 * world.worth[0] - 2 * 0.4)


def test_the_frontier_has_the_kl_that_was_asked_for() -> None:
    world = TokenWorld.draw(np.random.default_rng(1))
    nats = np.array([0.1, 1.0, 8.0])
    policies = world.frontier(world.worth, nats)
    assert world.kl(policies) == pytest.approx(nats, rel=1e-3)
    assert world.optimum_at(world.worth, 8.0) == pytest.approx(policies[2], abs=1e-4)
    assert world.kl(world.optimum_at(np.eye(16)[0], 1e9)) == pytest.approx(-24 * math.log(world.reference[0]))


def test_the_linear_reward_model_finds_the_worths() -> None:
    """And the likelihood that knows of wrong labels finds their scale, where plain Bradley-Terry does not."""
    rng = np.random.default_rng(0)
    world = TokenWorld.draw(rng)
    texts = world.pairs(rng, world.reference, 20_000)
    pairs = world.compare(rng, *texts, SimulatedAnnotator(0.17, scale=1.0))
    true = world.worth - world.worth.mean()
    slopes = [float(fit(*pairs, error_rate=rate, l2=0.0) @ true / (true @ true)) for rate in (0.17, 0.0)]
    assert slopes[0] == pytest.approx(1.0, abs=0.08)
    assert slopes[1] < 0.7
    assert spearman(fit(*pairs).tolist(), world.worth.tolist()) > 0.95
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_rounds_of_comparisons_use_every_label() -> None:
    """The last round's reward model is that of all rounds: for offline rounds, that of one large set."""
    world = TokenWorld.draw(np.random.default_rng(2), tiring=1.0)
    rounds = collected(world, np.random.default_rng(0), [300, 300], 6.0, online=False)
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        texts = world.pairs(rng, world.reference, 300)
        parts.append(world.compare(rng, *texts, SimulatedAnnotator(0.0, scale=1.0)))
    better, worse = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    assert rounds[-1] == pytest.approx(float(world.expected_gold(world.optimum_at(fit(better, worse), 6.0))))
    online = collected(world, np.random.default_rng(0), [300, 300], 6.0, online=True)
    assert online[0] == rounds[0]
    assert online[1] != rounds[1]


def test_estimates_without_an_interval_are_judged_by_their_value() -> None:
    assert judge(Claim("x", "", low=0.5), [1.0, 1.0, 1.0]).estimate == Estimate(
        1.0, note="the seeds do not differ, so that their spread is unknown"
    )
