"""One run of a benchmark: the meter, the budget, what is measured, and agents of every kind."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import lmgym
from agents import functional as F
from agents.benchmark.agents import _of_world, find_agent, find_agents, known_agents
from agents.benchmark.measure import BestOf, Measure, UniformPolicy
from agents.benchmark.meter import BudgetSpent, Meter, MeteredEnv, MeteredLearner
from agents.benchmark.run import cells_of, run
from agents.benchmark.suite import Row, Suite
from agents.benchmark.suites import SUITES, find_suite
from agents.benchmark.table import suite_table
from agents.benchmark.world import World
from agents.experiments import Cell
from agents.learner import LearnerConfig
from agents.pipeline import RLOptions
from lmgym.env import Finish
from lmgym.exact import enumerate_tree
from lmgym.models import load
from lmgym.tasks.probe import BANDIT_SCORES, Tree

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmark.md"
TREE = Row(
    "Tree", "lmgym/Tree-v0", "decoy", "objective", tokens=700, passes=4000, beta=0.05, reference=0.3, best=0.71,
    test_rows=32,
)  # fmt: skip
BANDIT = replace(find_suite("text-v1").row("Bandit"), tokens=48, test_rows=8)


def metered(budget: int, rows: int = 8, **arguments: Any) -> tuple[MeteredEnv, Meter]:
    meter = Meter(budget)
    arguments = {"task": Tree(), "model": load("probe"), "max_prompt_tokens": 4, "max_new_tokens": 3} | arguments
    return MeteredEnv(rows, meter=meter, **arguments), meter


def cell_of(spec: str, row: Row = BANDIT, index: int = 0) -> Cell:
    return next(c for c in cells_of(Suite("small", (row,)), [find_agent(spec)], index + 1) if c.index == index)


# The meter ------------------------------------------------------------------------------------------------------------


def test_a_rollout_costs_its_tokens() -> None:
    env, meter = metered(10_000, kl="none")
    policy = lmgym.Policy(env.model, None, critic="none")
    total = 0
    for update in range(3):
        buffer = lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, update))
        total += int(buffer.is_action.sum())
        assert meter.spent == total
    assert meter.left == 10_000 - total


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_step_costs_a_token_in_each_row_that_is_running(mode: str) -> None:
    env, meter = metered(10_000, kl="none", autoreset_mode=mode)
    env.reset(seed=0)
    total = 0
    for _ in range(12):
        total += int((env.finish == Finish.RUNNING).sum())
        env.step(torch.full((8,), 2))
        assert meter.spent == total
    assert total < 12 * 8 or mode == "SameStep"


def test_a_rollout_that_was_left_is_paid_for() -> None:
    env, meter = metered(100, kl="none")
    env.reset(seed=0)
    env.append(torch.full((8,), 2))
    assert meter.spent == 0
    env.reset(seed=1)
    assert meter.spent == 8
    env.reset(seed=1)
    assert meter.spent == 8


def test_it_raises_when_the_budget_is_spent() -> None:
    env, meter = metered(20, kl="none")
    policy = lmgym.Policy(env.model, None, critic="none")
    buffer = lmgym.RolloutBuffer.like(env)
    with pytest.raises(BudgetSpent, match=r"budget of 20 sampled tokens is spent .*learner.updates"):
        [lmgym.collect(policy, env, buffer, lmgym.Stream(0, update)) for update in range(3)]
    env, meter = metered(20, kl="none", autoreset_mode="SameStep")
    env.reset(seed=0)
    env.step(torch.full((8,), 2))
    env.step(torch.full((8,), 2))
    with pytest.raises(BudgetSpent):
        env.step(torch.full((8,), 2))
    assert meter.left < 0


def learner_of(meter: Meter, rollout: int) -> MeteredLearner:
    learner = MeteredLearner([torch.nn.Parameter(torch.zeros(1))], LearnerConfig(lr=1.0, warmup=0.0))
    learner.meter, learner.rollout = meter, rollout
    return learner


def test_updates_end_with_the_budget_and_the_learning_rate_with_them() -> None:
    meter, rates = Meter(100), []
    learner = learner_of(meter, 12)
    for update in learner.updates(3):
        assert learner.position == update + 1
        rates.append(learner.lr)
        meter.spend(10)
    assert (meter.spent, len(rates)) == (90, 9), "10 are left, and an update may need 12"
    assert rates == pytest.approx([1 - i / 10 for i in range(9)])

    meter, update = Meter(100), -1
    for update in learner_of(meter, 1).updates(3):
        meter.spend(min(40 if update else 10, meter.left))
    assert (meter.spent, update) == (90, 2), "it remembers the dearest update"


@pytest.mark.parametrize("spent", [0, 100])
def test_updates_that_sample_nothing_end_after_their_number(spent: int) -> None:
    meter, rates = Meter(100), []
    meter.spend(spent)
    learner = learner_of(meter, 12)
    for _ in learner.updates(5):
        rates.append(learner.lr)
    assert (len(rates), meter.spent) == (5, spent)
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_passes_are_counted_as_torch_sees_them() -> None:
    """The oracle: hooks on the embedding, which every pass goes through, of a model without the fused pass."""
    counts = []
    for fast in (True, False):
        lm = load("probe")
        lm.fast = fast
        lm.adapters.add("policy", rank=2)
        env = lmgym.TokenVectorEnv(6, task=Tree(), model=lm, max_prompt_tokens=4, max_new_tokens=3, kl="sampled")
        policy, seen = lmgym.Policy(lm, critic="none"), [0]

        def look(module: Any, args: Any, output: torch.Tensor, seen: list[int] = seen) -> None:
            seen[0] += output.shape[0] * output.shape[1]

        lm.model.get_input_embeddings().register_forward_hook(look)
        buffer = lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0), compact=False)
        rollout = lm.passes.forward
        policy.evaluate(buffer.sequences).logp.sum().backward()
        assert lm.passes.forward == seen[0] or fast
        assert lm.passes.backward == lm.passes.forward - rollout == buffer.sequences.left_aligned()[0].numel()
        counts.append(lm.passes)
    assert counts[0] == counts[1], "the fused pass counts the same"


# Suites ---------------------------------------------------------------------------------------------------------------


def test_a_suite_is_frozen_data() -> None:
    suite = find_suite("text-v1")
    assert Suite.from_data(suite.name, [row.as_data() for row in reversed(suite.rows)]).hash == suite.hash
    assert len({row.name for row in suite.rows}) == len(suite.rows) >= 10
    changed = replace(suite.rows[0], beta=suite.rows[0].beta + 1)
    assert Suite(suite.name, (changed, *suite.rows[1:])).hash != suite.hash
    with pytest.raises(ValueError, match="no suite 'text-v0': choose from text-v1"):
        find_suite("text-v0")
    with pytest.raises(ValueError, match="has no task 'Trees': choose from Bandit, Tree"):
        suite.row("Trees")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": 0.3}, "best 0.3 must be above"),
        ({"tokens": 0}, "budgets must be at least 1"),
        ({"beta": -1.0}, "β not negative"),
    ],
)
def test_wrong_rows_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(**{**TREE.as_data(), **change})


@pytest.mark.parametrize("row", [row for suite in SUITES.values() for row in suite.rows], ids=lambda row: row.name)
def test_every_row_is_a_registered_environment_with_true_levels(row: Row) -> None:
    env: Any = gym.make(row.id, **dict(row.arguments), beta=row.beta)
    env.reset(seed=0)
    env.close()
    if not row.exact:
        return
    measure = World(replace(row, test_rows=1), 0)._measure
    assert row.reference == pytest.approx(measure.reference_level(), rel=1e-3)
    if row.metric == "objective":
        assert row.best == pytest.approx(measure.optimum(), rel=1e-3)


def test_the_level_of_first_is_that_of_its_first_letter() -> None:
    row = find_suite("text-v1").row("First")
    env: Any = gym.make(row.id, **dict(row.arguments), max_new_tokens=1).unwrapped
    trees = [enumerate_tree(env.row, lmgym.Prompt(letter)) for letter in "abcd"]
    assert row.reference == pytest.approx(
        np.mean([float((t.reference_logp.exp() * t.scores).sum()) for t in trees]), rel=1e-3
    )


def test_the_level_of_goodhart_is_the_best_of_the_frontier() -> None:
    row = find_suite("text-v1").row("Goodhart")
    env: Any = gym.make(row.id).unwrapped
    prompts = [lmgym.Prompt(letter) for letter in "abcd"]
    proxy = [enumerate_tree(env.row, prompt) for prompt in prompts]
    env = lmgym.TokenVectorEnv(
        1, task=env.row.task, model=env.row.model, score=env.row.task.gold, max_prompt_tokens=4, max_new_tokens=4
    )
    gold = [enumerate_tree(env, prompt).scores for prompt in prompts]

    def frontier(beta: float) -> float:
        return float(
            np.mean(
                [
                    float(((t.reference_logp + t.scores / beta).softmax(0) * g).sum())
                    for t, g in zip(proxy, gold, strict=True)
                ]
            )
        )

    levels = {beta: frontier(beta) for beta in np.geomspace(0.02, 1, 200)}
    assert row.best == pytest.approx(max(levels.values()), rel=5e-3)
    assert abs(max(levels, key=lambda beta: levels[beta]) - 0.095) < 0.01


def curve(*points: tuple[float, float, float, float]) -> list[dict[str, float]]:
    names = ("gold", "kl", "forward", "backward")
    return [dict(zip(names, point, strict=True)) for point in points]


def test_the_headline_is_the_last_evaluation_within_the_limits() -> None:
    row = Row("x", "x", "x", "gold", tokens=10, passes=100, beta=0.1, reference=0.2, best=0.7, max_kl=3.0)
    points = curve((0.2, 0, 0, 0), (0.45, 2, 20, 10), (0.6, 3, 40, 31), (0.7, 3.1, 80, 60))
    assert row.headline(points) == pytest.approx(0.8), "the last one is beyond the KL limit"
    assert row.headline(points, "passes") == pytest.approx(0.5), "and 40 + 2 · 31 is more than 100 passes"
    later = curve((0.2, 0, 50, 0), (0.45, 2, 70, 10), (0.6, 3, 90, 31))
    assert row.headline(later, "passes") == pytest.approx(0.5), "passes count from the first evaluation"
    assert row.headline(curve((0.6, 9, 0, 0))) == 0.0, "nothing is within the limit"
    free = replace(row, max_kl=None)
    assert free.headline(points) == pytest.approx(1.0)
    both = replace(row, max_kl=None, metric="objective")
    assert both.headline(points) == pytest.approx((0.7 - 0.31 - 0.2) / 0.5)


# Measuring ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> World:
    return World(TREE, seed=5)


def test_exact_figures_are_those_of_many_samples(world: World) -> None:
    lm = world.model
    lm.adapters.add("moved", rank=2, seed=1)
    policy = lmgym.Policy(lm, "moved", critic="none")
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.adapters.parameters("moved"):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    exact = world._measure(policy)
    many = replace(TREE, exact=False, test_rows=2000)
    sampled = Measure(many, world._arguments("test", kl="none"))(policy)
    assert exact["kl"] > 0.1
    for name, tolerance in (("gold", 0.03), ("kl", 0.04), ("length", 0.08)):
        assert exact[name] == pytest.approx(sampled[name], abs=tolerance), name
    assert world._measure(lmgym.Policy(lm, None, critic="none"))["kl"] == pytest.approx(0.0, abs=1e-6)


def test_measuring_costs_nothing(world: World) -> None:
    before = (world.meter.spent, replace(world.model.passes))
    world.record(lmgym.Policy(world.model, None, critic="none"))
    assert (world.meter.spent, world.model.passes) == before


def test_chance_is_uniform() -> None:
    row = replace(TREE, id="lmgym/Bandit-v0", name="Bandit")
    world = World(row, 0)
    policy = UniformPolicy(world.model.device)
    found = world._measure(policy)
    assert found["gold"] == pytest.approx(sum(BANDIT_SCORES.values()) / 5), "four letters and the end of sequence"
    reference = np.mean([float(tree.reference_logp.mean()) for tree in world._measure.trees])
    assert found["kl"] == pytest.approx(-math.log(5) - reference, abs=1e-5)
    env = world.env(4, kl="none")
    buffer = lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    assert torch.equal(policy.evaluate(buffer.sequences).logp, buffer.logp)
    assert buffer.logp[buffer.is_action].tolist() == pytest.approx([-math.log(5)] * 4)


def test_best_of_n_against_the_enumerated_distribution(world: World) -> None:
    reference = lmgym.Policy(world.model, None, critic="none")
    measure = Measure(replace(TREE, test_rows=320), world._arguments("test", kl="none"))
    found = measure(BestOf(reference, 4))
    expected = [
        float((F.best_of_n_probs(tree.scores, tree.reference_logp.exp(), 4) * tree.scores).sum())
        for tree in world._measure.trees
    ]
    assert found["gold"] == pytest.approx(float(np.mean(expected)), abs=0.02)
    assert found["score"] == pytest.approx(found["gold"]), "the tree's score is its gold score"
    assert 0.5 * F.best_of_n_kl(4) < found["kl"] <= F.best_of_n_kl(4) + 1e-6


# Agents ---------------------------------------------------------------------------------------------------------------

MINE = '''
"""A bandit's greedy learner."""
from dataclasses import dataclass
from agents import rloo

@dataclass(frozen=True)
class Config:
    updates: int = 1
    rate: float = 0.5

DEFAULTS = {"rows": 16}
METRICS = {}

def train(policy, env, learner, config):
    yield from rloo.train(policy, env, learner, rloo.Config(group=4))
'''

MAKE = '''
import lmgym

def make(world):
    """An adapter, and nothing learned."""
    world.model.adapters.add("policy", rank=2)
    policy = lmgym.Policy(world.model, critic="none")
    env, update = world.env(8), 0
    buffer = lmgym.RolloutBuffer.like(env)
    while world.tokens_left >= 8 * env.max_new_tokens:
        lmgym.collect(policy, env, buffer, lmgym.Stream(world.seed, update))
        world.progress(policy)
        update += 1
    return policy
'''


SLOW = [pytest.param(spec, marks=pytest.mark.slow) for spec in ("ppo", "sb3_ppo", "sb3_a2c")]


@pytest.mark.parametrize("spec", ["rloo", "dpo", "sft", "best_of_n", "reference", "random", *SLOW])
def test_agents_of_every_kind_run(spec: str) -> None:
    small = ("ppo", "dpo", "sft", "sb3_ppo", "sb3_a2c")
    settings = {"rloo": ":group=4:rows=16"} | dict.fromkeys(small, ":rows=16")
    row = replace(BANDIT, tokens=160) if spec == "rloo" else BANDIT
    points = run(cell_of(spec + settings.get(spec, ""), row))["curve"]
    first, last = points[0], points[-1]
    assert first["tokens"] == first["kl"] == 0
    assert first["gold"] == pytest.approx(BANDIT.reference, abs=1e-3)
    assert last["tokens"] <= row.tokens
    trained = spec not in ("best_of_n", "reference", "random")
    assert (last["tokens"] > 0.8 * row.tokens) == trained
    assert (last["backward"] > 0) == trained
    assert all(math.isfinite(value) for point in points for value in point.values())
    if spec == "rloo":
        assert len(points) == 11, "ten evaluations, and one before"
        spent = [point["tokens"] for point in points]
        assert all(p >= row.tokens / 10 * i for i, p in enumerate(spent[:-1])), "each after another tenth of the budget"
    if spec in ("ppo", "sb3_ppo", "sb3_a2c"):
        assert len(points) >= 4, "after every update"
    if trained:
        assert last["kl"] > 0


@pytest.mark.slow
def test_a_run_is_its_seed() -> None:
    def without_time(result: dict[str, Any]) -> list[dict[str, float]]:
        return [{k: v for k, v in point.items() if k != "cpu_seconds"} for point in result["curve"]]

    one, again, other = (without_time(run(cell_of("rloo:group=4:rows=16", index=i))) for i in (0, 0, 1))
    assert one == again
    assert one[-1] != other[-1]


def test_a_file_is_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("made.py").write_text(MAKE)
    agent = find_agent("mine.py:rate=0.25")
    assert agent.name == "mine:rate=0.25"
    assert agent.config["config"] == {"updates": 1, "rate": 0.25}
    assert agent.config["rl"] == {"rows": 16}
    assert len(run(cell_of("mine.py:rate=0.25"))["curve"]) == 5, (
        "one evaluation before, one after each of three updates, and one at the end"
    )
    assert len(run(cell_of("made.py"))["curve"]) == 8, "likewise, of six updates"
    cell = cell_of("mine.py")
    Path("mine.py").write_text(MINE + "\n# changed\n")
    assert cell_of("mine.py").key != cell.key, "another file is another agent"
    with pytest.raises(ValueError, match=r"agent 'mine.py' was changed since the run began"):
        run(cell)


@pytest.mark.slow
def test_the_agent_of_the_documentation_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(# mine\.py.*?)^```$", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    assert len(block.splitlines()) <= 40
    Path("mine.py").write_text(block)
    points = run(cell_of("mine.py", replace(BANDIT, tokens=1280)))["curve"]
    assert points[-1]["gold"] > points[0]["gold"] + 0.1, "it learns"


def test_the_documentation_lists_the_suite() -> None:
    page = DOCS.read_text(encoding="utf-8")
    listed = page.partition("<!-- suite:begin -->\n")[2].partition("\n<!-- suite:end -->")[0].strip()
    assert listed == suite_table(find_suite("text-v1"))


def test_an_installed_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "theirs", "their.module:make"

        def load(self) -> Any:
            return lambda world: lmgym.Policy(world.model, None, critic="none")

    monkeypatch.setattr("agents.benchmark.agents.entry_points", lambda group: [Point()])
    assert "theirs" in known_agents()
    assert [agent.name for agent in find_agents(["theirs"])] == ["theirs", "reference", "random"]
    assert len(run(cell_of("theirs"))["curve"]) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pppo", "no algorithm 'pppo' .* Did you mean 'ppo'"),
        ("nothing.py", "no algorithm 'nothing.py'"),
        ("ppo:lrr=1", "no setting 'lrr'. Did you mean 'lr'"),
        ("ppo:lr=fast", "lr=fast is not of the type of its default"),
        ("ppo:epochs=1.5", "epochs=1.5 is not of the type of its default, 2"),
        ("ppo:epochs=0", "epochs"),
        ("ppo:epochs=true", "epochs=true is not of the type of its default, 2"),
        ("ppo:lr=null", "lr=null is not of the type of its default"),
        ("ppo:whiten_advantages=1", "whiten_advantages=1 is not of the type of its default, True"),
        ("ppo:=1", "must be NAME or NAME:SETTING=VALUE"),
        ("ppo:lr=-1", "lr"),
        ("ppo:lr=1:", "must be NAME or NAME:SETTING=VALUE"),
        ("", "must be NAME or NAME:SETTING=VALUE"),
        ("distill", "`train` of the agent 'distill' requires 'teacher'"),
        ("random:n=1", "has no settings"),
        ("best_of_n:n=1", "n of at least 2"),
        ("json", "no algorithm 'json'"),
        ("lmgym.exact", "has no dataclass `Config`"),
    ],
)
def test_wrong_agents_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_agent(spec)


def test_the_factor_of_a_rows_learning_rate(world: World) -> None:
    assert _of_world(find_agent("rloo:lr_factor=0.5").config["rl"], world).lr == pytest.approx(0.5 * world.lr)
    assert _of_world(find_agent("rloo:lr=0.5").config["rl"], world).lr == 0.5
    for spec in ("rloo:lr_factor=2:lr=0.1", "rloo:lr_factor=0"):
        with pytest.raises(ValueError, match="lr_factor must be above 0, and lr is not given beside it"):
            find_agent(spec)


def test_an_agent_that_returns_no_policy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing.py").write_text("def make(world):\n    pass\n")
    with pytest.raises(ValueError, match=r"make\(world\) of 'nothing\.py' returned None, and must return the trained"):
        run(cell_of("nothing.py"))


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ppo.py").write_text(MAKE)
    Path("number.py").write_text("make = 3")
    Path("broken.py").write_text("import nothing_of_this_name")
    Path("sub").mkdir()
    Path("sub/made.py").write_text(MAKE)
    Path("made.py").write_text(MAKE)
    for spec, message in (
        ("ppo.py", "has the name of another one, 'ppo': rename the file"),
        ("number.py", "`make` of the agent 'number.py' is int"),
        ("broken.py", "cannot be imported: ModuleNotFoundError"),
        ("made.py:lr=1", "takes no settings"),
    ):
        with pytest.raises(ValueError, match=message):
            find_agent(spec)
    with pytest.raises(ValueError, match="two agents are called 'made'"):
        find_agents(["made.py", "sub/made.py"])


def test_comparisons_are_bought_from_the_budget_by_their_score() -> None:
    from agents.benchmark.offline import buy_comparisons

    world = World(replace(TREE, id="lmgym/Bandit-v0", tokens=300), 0)
    found, finished = buy_comparisons(world)
    assert 300 - 64 < world.meter.spent <= 300
    assert not finished, "after one letter the budget of a completion is spent"
    for comparison in found:
        better, worse = (BANDIT_SCORES.get(text, 0.0) for text in comparison.ranked)
        assert better > worse


def test_a_setting_of_every_agent_is_in_its_config() -> None:
    config = find_agent("expert_iteration:threshold=1:keep=2").config["config"]
    assert (config["threshold"], config["keep"]) == (1.0, 2)
    assert find_agent("expert_iteration:threshold=null").config["config"]["threshold"] is None
    assert find_agent("ppo:whiten_advantages=false").config["config"]["whiten_advantages"] is False
    for spec in ("ppo:lr=0.1", "sft:lr=0.1", "sb3_ppo:lr=0.1", "dpo:lr=0.1"):
        assert find_agent(spec).config["rl"]["lr"] == 0.1
        assert RLOptions(**find_agent(spec).config["rl"]).lr == 0.1
    assert find_agent("ppo").config["rl"] == {"critic": "adapter", "critic_lr_factor": 4.0}
