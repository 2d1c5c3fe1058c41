"""Several runs: the seeds of one command, a sweep, the page that compares runs, and `lmgym check`."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_report import HOSTILE, Page
from test_testing import CHECKS

from agents import cli
from agents.cli import several_runs, sweep
from agents.cli.options import without_options
from agents.experiments import Cell
from agents.experiments.comparison import Group, compared_figures, difference, paired_interval, read_groups
from agents.experiments.comparison_page import write_comparison
from agents.experiments.statistics import permutation_p_value
from agents.report.series import mean_of_runs
from agents.runs.compare import compare
from lmgym.testing import algorithm_checks

pytestmark = pytest.mark.timeout(400)

LINE = ["train", "Bandit", "--sft.examples=0", "--reinforce.updates=2", "--reinforce.rows=8", "--test-prompts=32"]
LINE += ["--samples=2", "--algorithm=reinforce"]


def in_process(cells: Sequence[Cell], function: str, *_: object, **__: object) -> list[dict[str, Any]]:
    """What `run_cells` returns, without worker processes."""
    assert function == "agents.cli.several_runs:train_cell"
    rows = []
    for cell in cells:
        try:
            row = {"status": "ok", "error": "", "result": several_runs.train_cell(cell)}
        except ValueError as error:
            row = {"status": "error", "error": f"ValueError: {error}", "result": None}
        rows.append(cell.as_data() | row)
    return rows


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`--seeds 3 4` in a worker process."""
    out = tmp_path_factory.mktemp("runs") / "own"
    assert cli.main([*LINE, "--seeds", "3", "4", f"--out={out}"]) == 0
    return out


def test_a_seed_of_several_is_the_run_that_it_would_be_alone(seeds: Path, tmp_path: Path) -> None:
    assert cli.main([*LINE, "--seed=4", f"--out={tmp_path / 'alone'}"]) == 0
    found = compare(seeds / "seed-4", tmp_path / "alone")
    assert {"scores.jsonl", "policy", "evaluation.json"} <= set(found)
    assert all(found.values()), found
    assert not all(compare(seeds / "seed-3", tmp_path / "alone").values())
    assert (seeds / "compare.html").is_file()


def test_what_is_done_is_not_run_again(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a cell with a row, nor a finished run whose row is missing: it was killed before the row was written."""
    before = (seeds / "results.jsonl").read_bytes()
    assert cli.main([*LINE, "--seeds", "3", "4", f"--out={seeds}"]) == 0
    assert (seeds / "results.jsonl").read_bytes() == before
    assert "seed 4" in capsys.readouterr().out
    rows = [json.loads(line) for line in before.decode().splitlines()]
    began = (seeds / "seed-3" / "report.html").stat().st_mtime_ns
    assert several_runs.train_cell(Cell.from_data(rows[0])) == rows[0]["result"]
    assert (seeds / "seed-3" / "report.html").stat().st_mtime_ns == began
    other = Cell.from_data(rows[0] | {"config": {"arguments": [*LINE[1:], "--reinforce.lr=1"]}})
    with pytest.raises(ValueError, match="holds another run"):
        several_runs.train_cell(other)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seeds", "0", "0"], "the seed 0 is given twice"),
        (["--seeds", "-1"], "the seed -1 is negative"),
        (["--seeds", "0", "--seed=1"], "--seed and --seeds cannot be given together"),
        (["--seeds", "0", "--procs=1"], "several runs at the same time are --jobs"),
        (["--seeds", "0", "--jobs", "0"], "jobs"),
    ],
)
def test_seeds_that_make_no_sense(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*LINE, f"--out={tmp_path / 'new'}", *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_folder_of_a_single_run_stays_its_own(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*LINE, "--seeds", "0", f"--out={seeds / 'seed-3'}"]) == 2
    assert "holds a single run" in capsys.readouterr().err
    assert not (seeds / "seed-3" / "results.jsonl").exists()


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads((seeds / "results.jsonl").read_text().splitlines()[0])

    def run_cells(cells: Sequence[Cell], *_: object, **__: object) -> list[dict[str, Any]]:
        bad = {"status": "error", "error": "Traceback ...\nValueError: too hot", "result": None}
        return [good, cells[1].as_data() | bad]

    (tmp_path / "own").mkdir()
    monkeypatch.setattr(several_runs, "run_cells", run_cells)
    assert cli.main([*LINE, "--seeds", "0", "1", f"--out={tmp_path / 'own'}"]) == 2
    said = capsys.readouterr()
    assert "1 of 2 runs failed; the others are finished" in said.err
    assert "seed-1: too hot" in said.err
    assert (tmp_path / "own" / "compare.html").is_file()
    assert re.search(r"gold +│ +[\d.]+ +│ +– +│ +–", said.out), "no mean of the runs that did not fail"


def test_options_are_left_out_with_their_values() -> None:
    line = ["Sort", "--seeds", "0", "1", "--jobs=2", "--out", "x", "--ppo.lr", "1", "--over", "a=1", "--over=b=2"]
    assert without_options(line, {"--seeds": 2, "--jobs": 1, "--out": 1, "--over": 1}) == ["Sort", "--ppo.lr", "1"]


# A sweep ------------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_combination_and_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(several_runs, "run_cells", in_process)
    line = ["sweep", *LINE[1:], "--over", "reinforce.lr=1e-9,0.3", "--seeds=1", f"--out={tmp_path / 's'}"]
    assert cli.main(line) == 0
    said = capsys.readouterr()
    rows = re.findall(r"reinforce\.lr=(\S+)\s*│\s*([\d.]+)", said.out)
    figures = {}
    for value, shown in rows:
        run = json.loads((tmp_path / "s" / f"reinforce.lr={value}" / "seed-0" / "evaluation.json").read_text())
        figures[value] = run["after"]["gold"]["mean"]
        assert float(shown) == pytest.approx(figures[value], abs=6e-4)
    assert [value for value, _ in rows] == sorted(figures, key=lambda value: -figures[value])
    assert set(figures) == {"1e-9", "0.3"}
    assert "--seeds 1)" in said.err
    assert "reinforce.lr 0.3" in Page(tmp_path / "s" / "compare.html").text


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ([], "nothing to vary"),
        (["--over", "ppo.lr"], "must be NAME=VALUE"),
        (["--over", "ppo.lr=1,2", "--over", "ppo.lr=3"], "given twice"),
        (["--over", "ppo.lr=1,,2"], "empty or given twice"),
        (["--over", "ppo.lr=1,1"], "empty or given twice"),
        (["--over", "seed=1,2"], "not a setting"),
        (["--over", "out=a,b"], "not a setting"),
        (["--over", "ppo.lr=1e-4..1e-2"], "a range needs --trials"),
        (["--over", "ppo.lr=1..0", "--trials=2"], "LOW < HIGH"),
        (["--over", "ppo.lr=0..1:log", "--trials=2"], "LOW > 0"),
        (["--over", "ppo.lr=0..1:lin", "--trials=2"], "no range"),
        (["--over", "ppo.lr=1,2", "--seeds=0"], "at least 1"),
        (["--over", "ppo.lr=1,2", "--metric=gould"], "choose from auto, gold"),
        (["--over", "ppo.lr=-1,2"], "lr"),
        (["--over", "algorithm=ppo,rloo", "--algorithm=ppo"], "cannot be given together"),
        (["--over", "algorithm=ppoo,rloo"], "Did you mean 'ppo'"),
    ],
)
def test_bad_sweeps(over: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "Bandit", *over, f"--out={tmp_path / 'new'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_choices_are_those_of_optuna_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna: Any = pytest.importorskip("optuna")

    def searched(trials: int) -> list[str]:
        asked: list[str] = []

        def run_all(lines: dict[str, list[str]], seeds: range, *_: object) -> dict[str, Any]:
            ((name, line),) = lines.items()
            asked.append(line[-1])
            lr = float(line[-1].partition("=")[2])
            figures = {"after": {"gold": {"mean": -((np.log10(lr) + 3) ** 2)}}}
            return {name: {0: {"status": "ok", "result": {"evaluation": figures, "folder": "none"}}}}

        monkeypatch.setattr(sweep, "run_all", run_all)
        monkeypatch.setattr(sweep, "finish", lambda *_: None)
        over = ["--over", "ppo.lr=1e-6..1:log", f"--trials={trials}", "--seeds=1", f"--out={tmp_path}"]
        assert cli.main(["sweep", "Bandit", *over]) == 0
        return asked

    asked = searched(14)
    assert asked[:4] == searched(4)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    for option in asked:  # plain Optuna, told the same
        trial = study.ask()
        lr = trial.suggest_float("ppo.lr", 1e-6, 1, log=True)
        assert option == f"--ppo.lr={lr:.4g}"
        study.tell(trial, -((np.log10(float(f"{lr:.4g}")) + 3) ** 2))


# The comparison -----------------------------------------------------------------------------------------------------


def test_the_interval_of_one_pair_of_runs_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=64), rng.exponential(size=64)
    wanted = stats.ttest_rel(one, other).confidence_interval(0.95)
    found = paired_interval([one - other])
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert found.value == pytest.approx((one - other).mean(), abs=1e-12)


def test_coverage_over_prompts() -> None:
    """Three pairs of runs with effects of their own, 64 prompts, scores of 0 and 1: observed 0.945 to 0.955."""
    rng, effects = np.random.default_rng(1), np.array([0.0, 0.1, 0.3])
    held = 0
    for _ in range(2000):
        ones = rng.random((3, 64)) < 0.5 + effects[:, None]
        others = rng.random((3, 64)) < 0.5
        found = paired_interval(list(ones.astype(float) - others))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= effects.mean() <= found.high
    assert 0.93 < held / 2000 < 0.97


def test_no_interval_where_there_is_nothing_to_go_by() -> None:
    few, same = paired_interval([np.arange(29.0)]), paired_interval([np.full(64, 0.5)])
    assert (few.low, few.note) == (None, "fewer than 30 held-out prompts")
    assert (same.low, same.note) == (None, "the same difference on every prompt")
    assert same.value == 0.5


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes the folder of a run."""

    def write(
        name: str, seed: int = 0, gold: float = 0.5, text: str = "ok", algorithm: str = "ppo", **more: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        options = {"seed": seed, "algorithm": algorithm, "options": {algorithm: {"lr": more.pop("lr", 1e-3)}}}
        config = {"format": 2, "task": more.pop("task", "sort"), "seed": seed, "command": name, "options": options}
        (folder / "config.json").write_text(json.dumps(config))
        rows = [{"stage": algorithm, "step": i, "seconds": i, "gold/mean": gold, "score/mean": 0.0} for i in range(3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        noise = np.random.default_rng(seed).normal(size=more.pop("prompts", 40))
        scores = gold + 0.1 * (noise - noise.mean()) + 0.01 * np.random.default_rng(len(name)).permutation(noise.size)
        mean = float(scores.mean())
        figures = {"gold": {"mean": mean, "stderr": 0.1}, "score": {"mean": 0.0, "stderr": 0.0}}
        evaluation = {"before": {"gold": {"mean": 0.1, "stderr": 0.1}}, "after": figures, "best_gold": 2.0}
        (folder / "evaluation.json").write_text(json.dumps(evaluation | more))
        samples = [{"when": when, "prompt": "p", "completion": f"{when} {text}"} for when in ("before", "after")]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        rows = [{"when": "after", "prompt": seed * 100 + i, "gold": score} for i, score in enumerate(scores)]
        (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def after(folder: Path) -> np.ndarray:
    return np.array([json.loads(line)["gold"] for line in (folder / "scores.jsonl").read_text().splitlines()])


def groups_of(*folders: Path) -> list[Group]:
    (groups,) = read_groups(folders).values()
    return groups


def test_runs_that_differ_in_their_seed_are_a_group_and_differences_are_paired(make: Make, tmp_path: Path) -> None:
    for seed in (10, 2, 0):
        make(f"a/seed-{seed}", seed, 0.5)
        make(f"b/seed-{seed}", seed, 0.7 + seed / 100, lr=2e-3)
    groups = groups_of(tmp_path / "a", tmp_path / "b")
    assert [(group.label, list(group.runs)) for group in groups] == [
        ("ppo.lr 0.001", [0, 2, 10]),
        ("ppo.lr 0.002", [0, 2, 10]),
    ]
    assert compared_figures(groups) == ["gold"]
    found = difference(groups[1], groups[0], "gold")
    pairs = {seed: after(tmp_path / f"b/seed-{seed}") - after(tmp_path / f"a/seed-{seed}") for seed in (0, 2, 10)}
    assert found.by_seed == pytest.approx({seed: pair.mean() for seed, pair in pairs.items()})
    assert found.over_prompts == paired_interval([pairs[0], pairs[2], pairs[10]])
    assert found.p_value == permutation_p_value(groups[1].figure("gold"), groups[0].figure("gold")) == 0.1


def test_runs_on_other_prompts_have_no_interval(make: Make) -> None:
    one, other = make("a"), make("b", algorithm="grpo")
    rows = [
        json.loads(line) | {"prompt": i} for i, line in enumerate((other / "scores.jsonl").read_text().splitlines())
    ]
    rows[7]["prompt"] = 999
    (other / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ppo, grpo = groups_of(one, other)
    assert (ppo.label, grpo.label) == ("ppo", "grpo")
    found = difference(grpo, ppo, "gold")
    assert found.over_prompts is not None
    assert (found.over_prompts.low, found.over_prompts.note) == (None, "the runs were measured on different prompts")
    assert found.p_value is None
    (other / "scores.jsonl").unlink()
    again = difference(groups_of(one, other)[1], ppo, "gold").over_prompts
    assert again is not None
    assert "older version" in again.note


def test_the_same_command_twice_makes_two_groups(make: Make) -> None:
    groups = groups_of(make("x/one"), make("y/two"))
    assert [list(group.runs) for group in groups] == [[0], [0]]
    assert [Path(group.label).name for group in groups] == ["one", "two"]


def test_what_cannot_be_compared(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("a/seed-0")
    (tmp_path / "empty").mkdir()
    unfinished = make("c")
    (unfinished / "evaluation.json").unlink()
    for arguments, said in (
        ([], "no runs to compare"),
        ([run, tmp_path / "a"], "given twice"),
        ([tmp_path / "empty"], "no runs in"),
        ([tmp_path / "nothing"], "no such folder"),
        ([run, unfinished], "is not finished"),
    ):
        assert cli.main(["compare", *map(str, arguments), f"--out={tmp_path / 'page.html'}"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_the_page_shows_everything_escaped_and_is_always_the_same(make: Make, tmp_path: Path) -> None:
    folders = [make(f"a/seed-{seed}", seed, 0.5, HOSTILE) for seed in range(3)]
    folders += [make(f"b/seed-{seed}", seed, 0.9, "better", algorithm=f"x{HOSTILE[:20]}") for seed in range(3)]
    folders.append(make("other", task="reverse"))
    page = Page(write_comparison(folders, tmp_path / "page.html"))
    assert not page.unclosed
    assert not page.all("script")
    assert not page.all("img")
    assert {"reached", "differences", "curves", "generations", "reached-2"} <= page.sections()
    assert len(page.all("svg")) >= 3
    assert "after better" in page.text
    again = write_comparison(folders, tmp_path / "again.html")
    assert again.read_bytes() == (tmp_path / "page.html").read_bytes()
    found = difference(*read_groups(folders)["sort"][1::-1], name="gold").over_prompts
    assert found is not None
    assert f"{found.value:+.3f}" in page.text
    assert f"{found.low:+.3f} to {found.high:+.3f}" in page.text


def test_the_mean_of_runs_keeps_to_their_shared_updates() -> None:
    short, long = np.array([[0.0, 1.0], [1.0, 3.0]]), np.array([[0.0, 3.0], [1.0, np.nan], [2.0, 9.0]])
    np.testing.assert_array_equal(mean_of_runs([short, long]), [[0, 2], [1, np.nan]])
    np.testing.assert_array_equal(mean_of_runs([short]), short)


def test_compare_prints_the_difference(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make("a", gold=0.5), make("b", gold=0.8, lr=2e-3)
    assert cli.main(["compare", str(one), str(other), f"--out={tmp_path / 'page.html'}"]) == 0
    said = capsys.readouterr().out
    found = difference(*groups_of(one, other)[1::-1], name="gold").over_prompts
    assert found is not None
    assert f"{found.value:+.3f}" in said
    assert str(tmp_path / "page.html") in said.replace("\n", "")


# Check --------------------------------------------------------------------------------------------------------------

TASKS = """
import lmgym
from lmgym.tasks import sample_in_split

class Good(lmgym.Task):
    name = "good"
    def sample(self, rng, split="train"):
        return sample_in_split(lambda: lmgym.Prompt(f"say {rng.integers(10**6)}"), split)
    def score(self, prompts, completions):
        return [float(len(c.text)) for c in completions]
"""


def checked(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    (tmp_path / "mine.py").write_text(source)
    status = cli.main(["check", str(tmp_path / "mine.py"), *more])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_check_finds_the_tasks_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = checked(tmp_path, TASKS, capsys)
    assert (status, said.splitlines()[0]) == (0, "task Good")
    assert "ok  " in said
    shares = TASKS + "class Few(Good):\n    def sample(self, rng, split='train'): return lmgym.Prompt('a')\n"
    status, said = checked(tmp_path, shares, capsys)
    assert (status, said.count("ok  "), said.count("FAIL")) == (1, 1, 1)
    assert "sample_in_split" in said
    assert checked(tmp_path, shares, capsys, "--allow-shared-prompts")[0] == 0
    status, said = checked(tmp_path, TASKS + "class Raises(Good):\n    def score(self, *_):\n        1 / 0\n", capsys)
    assert status == 1
    assert "FAIL  it raised ZeroDivisionError: division by zero (mine.py, line 13)" in said
    needs = TASKS + "class Needs(Good):\n    def __init__(self, n):\n        self.n = n\n"
    status, said = checked(tmp_path, needs, capsys)
    assert status == 1
    assert "Needs cannot be made without arguments" in said
    assert checked(tmp_path, needs + "task = Needs(3)\n", capsys)[0] == 0


ALGORITHM = """
from dataclasses import dataclass
from agents import functional as F
from agents.training import Batch
from lmgym.rollout import RolloutBuffer, Stream, collect

@dataclass(frozen=True)
class Config:
    updates: int = 20
    broken: float = 0.0

def train(policy, env, learner, config):
    buffer = RolloutBuffer.like(env)
    for update in learner.updates(config.updates):
        rollout = collect(policy, env, buffer, Stream(learner.seed, update))
        advantages = F.reward_to_go(rollout.rewards, rollout.is_action, rollout.bootstrap, 1.0)
        advantages = advantages - F.masked_mean(advantages, rollout.is_action)
        for minibatch in learner.minibatches(Batch.of(rollout, advantages), 0):
            learner.step(policy, minibatch, lambda new, old: -old.advantages * new.logp,
                         weigh=F.sequence_sum)
        yield learner.summarise(rollout) | ({"x": float("nan")} if config.broken else {})
"""
OTHERS = ("length", "stop", "optimum", "padding", "order", "split", "mask", "seed", "gradient")
"""The checks that take seconds."""


def test_check_names_key_and_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = checked(tmp_path, ALGORITHM, capsys, "--skip", *OTHERS)
    assert status == 0
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["ok", "ok"]
    status, said = checked(tmp_path, ALGORITHM, capsys, "--mine.broken=1", "--skip", *OTHERS)
    assert status == 1
    (failed,) = re.findall(r"^FAIL  .* metrics  .*\n +usual cause: (.*)$", said, re.M)
    assert failed == algorithm_checks.CAUSES["metrics"]
    status, said = checked(tmp_path, ALGORITHM, capsys, "--skip", "speed")
    assert (status, "choose from seed, lr, metrics" in said) == (2, True)


def test_every_check_has_a_usual_cause() -> None:
    assert set(algorithm_checks.CAUSES) == set(CHECKS)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1", "nothing to check in"),
        ("import nothing_of_the_kind", "cannot be imported"),
        ("from dataclasses import dataclass\n@dataclass\nclass Config:\n    x: int = 1\ndef train(): pass", "takes ()"),
        (ALGORITHM.replace("learner, config)", "learner, config, comparisons)"), "needs comparisons"),
    ],
)
def test_check_refuses(source: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = checked(tmp_path, source, capsys)
    assert status == 2
    assert said in found


def test_a_folder_of_runs_that_was_moved_is_compared_as_it_is(seeds: Path, tmp_path: Path) -> None:
    shutil.copytree(seeds, tmp_path / "moved")
    (group,) = groups_of(tmp_path / "moved")
    assert list(group.runs) == [3, 4]
    rows = [row for row in group.runs[3].scores if row["when"] == "after"]
    assert len(rows) == 32
    assert np.mean([row["gold"] for row in rows]) == pytest.approx(group.figure("gold")[3], abs=1e-6)
