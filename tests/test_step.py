"""`lmgym step`: the update that is shown is the one that the run makes, and the figures are those of its loss."""

import io
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_survival import at, terminate

from agents import cli
from agents.cli import step
from agents.lessons.walk import WIDE, as_page, print_walk, walk_through
from agents.pipeline import Algorithm, RLOptions, Setting, build_training, load_algorithm, replay
from agents.pipeline.replay import Recorder, Update, record
from agents.runs import StoredRun, read_rows
from lmgym.io import atomic
from lmgym.models import load
from lmgym.policy import Policy
from lmgym.tasks.probe import Tree

TRAIN = [
    "train", "Sort", "--sft.examples=0", "--test-prompts=4", "--samples=1", "--max-new-tokens=5", "--ppo.rows=8",
    "--ppo.minibatch-rows=4", "--ppo.epochs=3", "--ppo.updates=3", "--ppo.lr=2e-2", "--ppo.kl-target-nats=0.5",
    "--ppo.critic=head", "--checkpoint-seconds=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was interrupted after its first update, and a copy that went on to its end."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("agents.report.write_report", lambda folder: Path(folder) / "report.html")
        at(monkeypatch, "ppo", 1, terminate)
        assert cli.main([*TRAIN, "--out", str(folder / "cut")]) == 143
        shutil.copytree(folder / "cut", folder / "whole")
        assert cli.main(["train", "--resume", str(folder / "whole")]) == 0
    return folder / "cut", folder / "whole"


def made_again(folder: Path, number: int | None = None) -> Update:
    options, algorithm, setting = step._of_run(folder)
    return replay(setting, options.options, algorithm, StoredRun(folder, lambda text: None), number)


@pytest.fixture(scope="module")
def update(runs: tuple[Path, Path]) -> Update:
    """The second update, from the checkpoint after the first."""
    return made_again(runs[0])


def logged(folder: Path, number: int) -> dict[str, Any]:
    (row,) = [r for r in read_rows(folder / "metrics.jsonl") if r["stage"] == "ppo" and r["step"] == number]
    return row


def test_it_is_the_update_that_the_run_makes_next(runs: tuple[Path, Path], update: Update) -> None:
    row = logged(runs[1], 1)
    assert update.number == 1
    assert len(update.metrics) >= 12
    assert update.metrics == {name: row[name] for name in update.metrics}, "the same bits"
    assert row["policy/clip_fraction"] > 0.05, "something is clipped, or this test shows little"


def test_an_update_of_a_finished_run_is_made_from_its_beginning(runs: tuple[Path, Path]) -> None:
    found = made_again(runs[1], 2)
    row = logged(runs[1], 2)
    assert found.metrics == {name: row[name] for name in found.metrics}


def test_what_is_shown_of_each_token_adds_up_to_the_metrics(update: Update) -> None:
    mask, old = update.batch.mask, update.batch.logp
    assert len(update.passes) == 3
    assert all(sorted(one.step.unique().tolist()) == [2 * i, 2 * i + 1] for i, one in enumerate(update.passes))
    ratios = torch.stack([(one.logp - old)[mask].exp() for one in update.passes]).double()
    outside = ((ratios - 1).abs() > 0.2).double().mean()
    assert float(outside) == pytest.approx(update.metrics["policy/clip_fraction"], abs=1e-6)
    shown = torch.stack([one.clipped[mask] for one in update.passes if one.clipped is not None])
    assert float(shown.mean()) == pytest.approx(update.metrics["policy/clip_fraction"], abs=1e-6)
    assert float((ratios - 1 - ratios.log()).mean()) == pytest.approx(update.metrics["policy/approx_kl_nats"], rel=1e-4)
    assert float(update.rollout.score.mean()) == pytest.approx(update.metrics["score/mean"])
    assert not any(bool(one.logp[~mask].isfinite().any()) for one in update.passes)


def test_the_push_is_the_derivative_of_the_papers_objective(update: Update) -> None:
    """ρA, but 0 where the clipped term is the smaller one (Schulman et al. 2017, section 3)."""
    mask = update.batch.mask
    for one in update.passes:
        for logp, old, a, push in zip(
            one.logp[mask].tolist(),
            update.batch.logp[mask].tolist(),
            update.batch.advantages[mask].tolist(),
            one.push[mask].tolist(),
            strict=True,
        ):
            ratio = math.exp(logp - old)
            still = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
            assert push == pytest.approx(0.0 if still else ratio * a, rel=1e-4, abs=1e-6)


def test_the_new_probabilities_are_those_after_the_last_step(update: Update) -> None:
    mask, policy = update.batch.mask, update.setup.policy
    with torch.no_grad():
        log_probs = policy.log_probs(update.batch.sequences)  # the whole vocabulary, by another way than the loss
    now = log_probs.gather(2, update.batch.sequences.tokens[..., None])[..., 0]
    torch.testing.assert_close(update.after[mask], now[mask], atol=1e-5, rtol=0)
    assert float((update.after - update.passes[-1].logp)[mask].abs().max()) > 1e-3, "the last step changed something"


def test_the_command_prints_it_and_leaves_the_run_alone(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    before = atomic.digest(runs[0])
    page = tmp_path / "walk.html"
    assert cli.main(["step", str(runs[0]), "--rows", "2", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert atomic.digest(runs[0]) == before
    assert "Update 1 of ppo" in out
    assert "The run has not made this update yet" in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert "ρ 3" in out
    assert "ρ 2" not in out, "the first and the last pass"
    html = page.read_text(encoding="utf-8")
    assert "ρ 2" in html
    assert "<script" not in html
    assert not re.search(r"(?:src|href)=\"(?!#)", html)
    for arguments, message in (
        ([str(tmp_path)], "config.json"),
        ([str(runs[0]), "--update", "3"], "the run has the updates 0 to 2"),
        ([str(runs[0]), "--rows", "8"], "row 8 cannot be shown: there is no such row"),
    ):
        assert cli.main(["step", *arguments]) == 2
        assert message in capsys.readouterr().err


def printed(walk: Any) -> str:
    said = io.StringIO()
    print_walk(walk, Console(file=said, width=80, color_system=None))
    return said.getvalue()


def test_the_tables_hold_these_numbers(runs: tuple[Path, Path], update: Update) -> None:
    walk = walk_through(update, "ppo", [3], logged(runs[1], 1), WIDE)
    assert any("this is the update that the run made" in fact for fact in walk.facts)
    (_, text, (rewards, steps)) = walk.completions[0]
    assert text == f"{update.setup.env.prompts[3].text}|{update.setup.env.completions([3])[0].text}"
    count = int(update.batch.mask[3].sum())
    assert len(rewards.rows) == len(steps.rows) == count
    for t, cells in enumerate(rewards.rows):
        named = dict(zip(rewards.names, cells, strict=True))
        number = {n: float(v.replace("−", "-")) for n, v in named.items() if n not in ("", "token")}
        assert number["reward"] == pytest.approx(float(update.rollout.rewards[3, t]), abs=0.006)
        assert number["reward"] == pytest.approx(number["score"] + number["−β·KL"], abs=0.011)
        assert number["A"] == pytest.approx(float(update.batch.advantages[3, t]), abs=0.006)
        assert (number["score"] == 0) or t == count - 1
    assert all(name in printed(walk) for name in ("π_old", "reward", "push 3", "π_new"))
    other = logged(runs[1], 1) | {"score/mean": 0.123}
    assert "1 of" in " ".join(walk_through(update, "ppo", [3], other).facts)
    assert as_page(walk, "<b>run</b>").count("<b>run</b>") == 0, "escaped"


@pytest.mark.parametrize(
    ("name", "config", "critic", "clips"),
    [
        ("reinforce", {}, False, False),
        ("rloo", {"group": 4}, False, False),
        ("a2c", {}, True, False),
        ("grpo", {"group": 4}, False, True),
        ("nlpo", {}, True, True),
        ("expert_iteration", {"group": 4, "keep": 2}, False, False),
    ],
)
def test_other_algorithms_say_what_they_do_not_have(
    name: str, config: dict[str, Any], critic: bool, clips: bool
) -> None:
    module, lm = load_algorithm.find(name), load("probe")
    setting = Setting(Tree(), lm, {"max_prompt_tokens": 4, "max_new_tokens": 3}, teacher=Policy(lm, None, 1.0), seed=1)
    rl = RLOptions(**{"rows": 8, **getattr(module, "DEFAULTS", {})})
    algorithm = Algorithm(name, module, module.Config(updates=2, **config), rl)
    made = record(build_training(setting, rl, algorithm.config, learner=Recorder), algorithm, 1)
    assert (made.has_critic, made.clips) == (critic, clips)
    walk = walk_through(made, name)
    facts = " ".join(walk.facts)
    assert ("has no critic" in facts) == (not critic)
    assert ("clips nothing" in facts) == (not clips)
    assert ("value" in walk.completions[0][2][0].names) == critic
    assert (
        ("A" in walk.completions[0][2][0].names) == ("has no advantages" not in facts) == (name != "expert_iteration")
    )
    assert len(made.rows) == (4 if name == "expert_iteration" else 8)
    torch.testing.assert_close(made.rollout.tokens[made.rows], made.batch.sequences.tokens)
    if name == "expert_iteration":
        assert made.rows.tolist() != [0, 1, 2, 3], "which rows were used can be seen"
        (unused, *_) = set(range(8)) - set(made.rows.tolist())
        with pytest.raises(ValueError, match=f"row {unused} cannot be shown: no step used it"):
            walk_through(made, name, [unused])


def test_an_algorithm_without_steps_on_tokens_is_refused_in_words() -> None:
    module, lm = load_algorithm.find("best_of_n"), load("probe")
    setting = Setting(Tree(), lm, {"max_prompt_tokens": 4, "max_new_tokens": 3})
    rl = RLOptions(rows=8)
    algorithm = Algorithm("best_of_n", module, module.Config(group=4), rl)
    with pytest.raises(ValueError, match="best_of_n takes no step on the tokens of a rollout in this update"):
        record(build_training(setting, rl, algorithm.config, learner=Recorder), algorithm, 0)
