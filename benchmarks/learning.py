"""All algorithms on one task, with the same start: exact answers to held-out sums against processor time.

    python -m benchmarks.learning              # run all, three seeds each, then draw
    python -m benchmarks.learning --only ppo   # run some, keep the results of the others
    python -m benchmarks.learning --draw       # only draw the existing results

Every run trains a LoRA adapter of rank 16 on the built-in model, on lmgym/Arithmetic-v0, on one thread. The time is
the processor time of training alone. Results are in benchmarks/learning.jsonl; curves and table go to
docs/algorithms.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmgym
from agents import a2c, best_of_n, distill, dpo, expert_iteration, grpo, nlpo, online_dpo, ppo, reinforce, rloo, sft
from agents.pipeline import RLOptions, Setting, TrainingSetup, build_training
from agents.pipeline import load_algorithm as catalog
from agents.runs.machine import hardware, revision
from lmgym.models import Example
from lmgym.policy import Critic
from lmgym.preferences import SimulatedAnnotator, collect_comparisons
from lmgym.tasks import Arithmetic

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGES = ROOT / "benchmarks" / "learning.jsonl", ROOT / "docs" / "algorithms"
ROWS, TEST_PROMPTS, SECONDS, GOAL, SEEDS = 128, 1024, 180.0, 0.8, (0, 1, 2)
BUDGETS: dict[str, Any] = {"max_prompt_tokens": 12, "max_new_tokens": 8}
TASK = Arithmetic()


@dataclass(frozen=True)
class Entry:
    """How an algorithm runs here.

    Attributes:
        module: the algorithm.
        config: its settings.
        lr: peak learning rate; it decreases linearly to 0.
        critic: the policy's.
        beta: β, in score per nat.
        extra: returns the further arguments of `train`.
        note: what a reader must know in addition to the figures.
    """

    module: Any
    config: Any
    lr: float = 2e-3
    critic: Critic = "none"
    beta: float = 0.01
    extra: Callable[[lmgym.LanguageModel, int], dict[str, Any]] = lambda lm, seed: {}
    note: str = ""


def comparisons(lm: lmgym.LanguageModel, seed: int) -> dict[str, Any]:
    """Rankings of four answers of the starting model to each of 2,000 sums, by an annotator without errors."""
    policy = lmgym.Policy(lm, None, critic="none")
    env = lmgym.TokenVectorEnv(400, task=TASK, model=lm, kl="none", **BUDGETS)
    buffer, rng, found = lmgym.RolloutBuffer.like(env), np.random.default_rng(seed), []
    for update in range(20):
        lmgym.collect(policy, env, buffer, lmgym.Stream(seed, update, samples=4))
        answers = env.completions()
        groups = [answers[i : i + 4] for i in range(0, len(answers), 4)]
        found += collect_comparisons(TASK, env.prompts[::4], groups, SimulatedAnnotator(0.0, 1e6), rng, skip_ties=True)
    return {"comparisons": found}


def teacher(lm: lmgym.LanguageModel, seed: int) -> dict[str, Any]:
    """The policy after 150 updates of PPO from the same start; their time is not counted."""
    entry = ENTRIES["ppo"]
    setup = build(entry, seed)
    for _ in setup.train(ppo, replace(entry.config, updates=150)):
        pass
    return {"teacher": setup.policy}


ENTRIES = {
    "reinforce": Entry(reinforce, reinforce.Config(updates=400), lr=5e-3),
    "rloo": Entry(rloo, rloo.Config(updates=600, group=8), lr=5e-3),
    "a2c": Entry(a2c, a2c.Config(updates=400), lr=5e-3, critic="head"),
    "ppo": Entry(ppo, ppo.Config(updates=350, minibatch_rows=32), critic="head"),
    "grpo": Entry(grpo, grpo.Config(updates=450, minibatch_rows=32), lr=3e-3),
    "nlpo": Entry(nlpo, nlpo.Config(updates=200, minibatch_rows=32), critic="head"),
    "expert_iteration": Entry(expert_iteration, expert_iteration.Config(updates=250, keep=2, threshold=1.0)),
    "online_dpo": Entry(online_dpo, online_dpo.Config(updates=250), beta=0.1),
    "dpo": Entry(dpo, dpo.Config(epochs=2, minibatch_pairs=32), lr=2e-4, beta=0.1, extra=comparisons),
    "distill": Entry(distill, distill.Config(updates=150, minibatch_rows=64), extra=teacher, note="from PPO's policy"),
    "best_of_n": Entry(best_of_n, best_of_n.Config(updates=8), note="trains nothing: the best of 16 answers"),
    "sft": Entry(sft, sft.Config(epochs=1), note="8,000 demonstrations, half of them wrong"),
}


def build(entry: Entry, seed: int) -> TrainingSetup:
    """A new policy, its environment and a learner."""
    rl = RLOptions(lr=entry.lr, rows=ROWS, lora_rank=16, critic=entry.critic, beta=entry.beta)
    return build_training(Setting(TASK, lmgym.load("tiny"), BUDGETS, seed=seed), rl, entry.config)


def measure(policy: lmgym.Policy, test: lmgym.TokenVectorEnv) -> tuple[float, float]:
    """Share of exact answers to held-out sums, and KL to the start in nats per answer."""
    buffer = lmgym.collect(policy.truncated(), test, lmgym.RolloutBuffer.like(test), lmgym.Stream(99, 0))
    return float((buffer.score == 1).float().mean()), float((buffer.logp - buffer.reference_logp).sum(1).mean())


def run(name: str, seed: int, code: str, points: int = 12) -> dict[str, Any]:
    """One curve of points [processor seconds, exact share, KL], until the algorithm or its time ends."""
    entry = ENTRIES[name]
    setup = build(entry, seed)
    policy, test = setup.policy, setup.evaluation_env(TEST_PROMPTS)
    extra = entry.extra(policy.lm, seed)
    curve = [[0.0, *measure(policy, test)]]
    clock, next_point = 0.0, SECONDS / points
    updates = updates_of(entry, setup, extra)
    last: dict[str, float] = {}
    while clock < SECONDS:
        began = time.process_time()
        row = next(updates, None)
        clock += time.process_time() - began
        if row is None:
            break
        last = row
        if clock >= next_point:
            curve.append([clock, *measure(policy, test)])
            next_point += SECONDS / points
    exact, kl = measure(policy, test)
    if name == "best_of_n":
        exact, kl = best_of(policy, test, entry.config.group), last[f"best_of/{entry.config.group}/kl_nats"]
    curve.append([clock, exact, kl])
    curve = [[round(x, 4) for x in point] for point in curve]
    print(f"{name} seed {seed}: exact {curve[0][1]:.3f} -> {exact:.3f}, KL {kl:.2f} nats, {clock:.0f} s", flush=True)
    return {
        "algorithm": name, "seed": seed, "curve": curve, "config": repr(entry.config), "lr": entry.lr,
        "beta": entry.beta, "rows": ROWS, "hardware": hardware(), "torch": torch.__version__, "revision": code,
    }  # fmt: skip


def updates_of(entry: Entry, setup: TrainingSetup, extra: dict[str, Any]) -> Iterator[dict[str, float]]:
    """The algorithm's updates; for fine-tuning, which uses no environment, the steps on 8,000 demonstrations."""
    if entry.module is not sft:
        yield from setup.train(entry.module, entry.config, **extra)
        return
    policy, learner = setup.policy, setup.learner
    rng = np.random.default_rng(learner.seed)
    prompts = [TASK.sample(rng) for _ in range(8000)]
    examples = [Example(prompt.text, TASK.demonstrate(prompt, rng)) for prompt in prompts]
    yield from sft.train(policy.lm, examples, [], learner, entry.config, policy.adapter)


def best_of(policy: lmgym.Policy, test: lmgym.TokenVectorEnv, n: int) -> float:
    """Share of held-out sums for which at least one of n answers is exact; best of n selects that one."""
    buffer = lmgym.collect(policy, test, lmgym.RolloutBuffer.like(test), lmgym.Stream(99, 0, samples=n))
    return float((buffer.score.view(-1, n).amax(1) == 1).float().mean())


# Plots and table ---------------------------------------------------------------------------------------------------


def read() -> dict[str, list[dict[str, Any]]]:
    """The results, by algorithm."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    found: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        found.setdefault(row["algorithm"], []).append(row)
    return {name: sorted(found[name], key=lambda row: row["seed"]) for name in ENTRIES if name in found}


def seconds_to(curve: list[list[float]], goal: float) -> float | None:
    """Processor seconds after which the exact share first reaches a goal."""
    return next((point[0] for point in curve if point[1] >= goal), None)


def summary(rows: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    """Exact share before and after, seconds to the goal, KL: the mean, and the value of each seed."""
    ends = [row["curve"][-1] for row in rows]
    reached = [seconds_to(row["curve"], GOAL) for row in rows]
    shares = ", ".join(f"{end[1]:.2f}" for end in ends)
    times = ", ".join("-" if t is None else f"{t:.0f}" for t in reached)
    start = np.mean([row["curve"][0][1] for row in rows])
    kl = ", ".join(f"{end[2]:.1f}" for end in ends)
    return f"{start:.2f} → {np.mean([end[1] for end in ends]):.2f}", shares, times, kl


def changed(config: Any) -> str:
    """The settings that differ from an algorithm's defaults."""
    default = type(config)()
    pairs = [(f.name, getattr(config, f.name)) for f in fields(config)]
    return ", ".join(f"{name}={value}" for name, value in pairs if value != getattr(default, name)) or "defaults"


def draw() -> None:
    """Writes a plot for each algorithm, with the others in grey, and the table."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lmgym"  # the same figures give the same file
    import matplotlib.pyplot as plt

    found = read()
    (PAGES / "curves").mkdir(parents=True, exist_ok=True)
    for name in found:
        figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
        for other, rows in found.items():
            own = other == name
            for i, row in enumerate(rows):
                x, y, _ = zip(*row["curve"], strict=True)
                label = (name if own else "the others") if i == 0 and (own or other == next(iter(found))) else None
                if other == name == "best_of_n":
                    axes.axhline(y[-1], color="C0", label=label)
                elif other != "best_of_n":
                    colour, width = ("C0", 1.6) if own else ("0.82", 0.8)
                    axes.plot(x, y, color=colour, linewidth=width, zorder=3 if own else 1, label=label)
        axes.axhline(GOAL, color="0.4", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel="processor seconds of training", ylabel="exact answers, held out", ylim=(0, 1), xlim=(0, SECONDS)
        )
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PAGES / "curves" / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
        page = PAGES / f"{name}.md"
        if page.is_file():
            change, shares, times, kl = summary(found[name])
            note = f" ({ENTRIES[name].note})" if ENTRIES[name].note else ""
            write_between(
                page,
                "measured",
                f"Measured on Arithmetic{note}: exact answers {change} (each seed: {shares}), processor seconds to "
                f"{GOAL}: {times}; KL {kl} nats per answer. [All figures](README.md#measured).",
            )
    table = [
        f"| algorithm | exact answers | seeds 0, 1, 2 | seconds to {GOAL} | KL, nats | settings |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        own = rows[0]
        settings = f"`{changed(ENTRIES[name].config)}`, lr {own['lr']:g}, β {own['beta']:g}"
        table.append(f"| [{name}]({name}.md) | {' | '.join(summary(rows))} | {ENTRIES[name].note or settings} |")
    machines = sorted({f"{row['hardware']}, torch {row['torch']}" for rows in found.values() for row in rows})
    revisions = sorted({row["revision"] for rows in found.values() for row in rows})
    table.append("")
    table.append(
        f"`python -m benchmarks.learning`, {ROWS} completions per rollout, 1,024 held-out sums, at most {SECONDS:.0f} "
        f"processor seconds per run; {'; '.join(machines)}; revision {', '.join(revisions)}."
    )
    write_between(PAGES / "README.md", "table", "\n".join(table))


def write_between(page: Path, name: str, body: str) -> None:
    """Replaces the text between the two markers of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->")
    _, _, after = rest.partition(f"<!-- {name}:end -->")
    page.write_text(f"{before}<!-- {name}:begin -->\n\n{body}\n\n<!-- {name}:end -->{after}", encoding="utf-8")


def main() -> None:
    """Runs the chosen algorithms, one curve after another, and draws."""
    parser = argparse.ArgumentParser(description="All algorithms on one task.")
    parser.add_argument("--only", nargs="+", choices=tuple(ENTRIES), default=tuple(ENTRIES), help="algorithms")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="seeds")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert set(catalog.BUILT_IN) <= set(ENTRIES), "an algorithm has no entry here"
    code = revision()  # before the results change the tree
    for name in () if options.draw else options.only:
        for seed in options.seeds:
            fresh = run(name, seed, code)
            others = [r for rows in read().values() for r in rows if (r["algorithm"], r["seed"]) != (name, seed)]
            RESULTS.write_text("".join(json.dumps(r) + "\n" for r in [*others, fresh]), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
