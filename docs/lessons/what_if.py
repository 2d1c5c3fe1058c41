"""Makes the page "What if?": PPO on a world of 85 texts, with every combination of some β, clip ranges and λ.

    python docs/lessons/what_if.py             # trains (two minutes), writes what_if.json and what_if.html
    python docs/lessons/what_if.py --page      # writes what_if.html anew from what_if.json

The page asks no server for anything. Without its script, what_if.js, it shows the same numbers as a table.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from agents.report.document import style_sheet
from agents.report.html import Html, small_print, tag
from agents.runs.machine import hardware, revision
from lmgym.exact import Tree, enumerate_tree, policy_logp
from lmgym.io import atomic
from lmgym.tasks import Prompt
from lmgym.tasks import Tree as TreeTask

FOLDER = Path(__file__).resolve().parent
DATA, PAGE = FOLDER / "what_if.json", FOLDER / "what_if.html"
CHOICES: Mapping[str, Sequence[float]] = {
    "beta": (0.03, 0.1, 0.3),
    "clip": (0.05, 0.2, 1000.0),
    "lam": (0.0, 0.95, 1.0),
}
"""The values of each setting; a clip range of 1000 clips nothing."""
START = {"beta": 0.1, "clip": 0.2, "lam": 0.95}
"""The combination that the page shows first."""
SEEDS = (0, 1)
UPDATES, ROWS, MINIBATCH, EPOCHS, LR = 24, 64, 16, 4, 0.01
FRONTIER = (30.0, 3.0, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03)
"""The β of the soft-optimal policies that make the edge of what is possible."""


class OnePrompt(TreeTask):
    """The tree with one prompt, so that one tree holds all texts."""

    def sample(self, rng: Any, split: Any = "train") -> Prompt:
        """The prompt "a"."""
        return Prompt("a")


def score_and_kl(tree: Tree, probs: Any) -> tuple[float, float]:
    """The exact mean score of a distribution over the texts, and its KL to the reference in nats."""
    kept = probs > 1e-30
    kl = (probs[kept] * (probs[kept].log() - tree.reference_logp[kept])).sum()
    return round(float(probs @ tree.scores), 4), round(float(kl), 4)


def train(beta: float, clip: float, lam: float, seed: int) -> Iterator[tuple[float, float]]:
    """Trains PPO; yields exact score and KL before the first update and after each one."""
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=8, seed=seed)
    policy = lmgym.Policy(lm, critic="head", seed=seed)
    budgets = {"max_prompt_tokens": 1, "max_new_tokens": 3}
    env = lmgym.TokenVectorEnv(ROWS, task=OnePrompt(), model=lm, kl="sampled", beta=beta, **budgets)
    tree = enumerate_tree(env, Prompt("a"))
    learner = Learner(policy.parameters(), LearnerConfig(lr=LR), seed)
    config = ppo.Config(
        updates=UPDATES,
        epochs=EPOCHS,
        minibatch_rows=MINIBATCH,
        clip=clip,
        lam=lam,
        target_kl=0,
        whiten_advantages=False,
    )
    yield score_and_kl(tree, policy_logp(tree, policy.log_probs).exp())
    for _ in ppo.train(policy, env, learner, config):
        yield score_and_kl(tree, policy_logp(tree, policy.log_probs).exp())


def optima() -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Score and KL of the soft-optimal policies, and β log Z of each β on the page."""
    lm = lmgym.load("probe")
    lm.adapters.add("policy")
    env = lmgym.TokenVectorEnv(1, task=OnePrompt(), model=lm, max_prompt_tokens=1, max_new_tokens=3, kl="none")
    tree = enumerate_tree(env, Prompt("a"))
    at = {beta: dataclasses.replace(tree, beta=beta) for beta in (*FRONTIER, *CHOICES["beta"])}
    return (
        [score_and_kl(tree, at[beta].soft_optimal()) for beta in FRONTIER],
        {f"{beta:g}": round(at[beta].optimum, 4) for beta in CHOICES["beta"]},
    )


def key(beta: float, clip: float, lam: float) -> str:
    """The name of a combination in the data and on the page."""
    return f"{beta:g} {clip:g} {lam:g}"


def combination(beta: float, clip: float, lam: float) -> dict[str, list[float]]:
    """Score and KL after each update, mean over the seeds, and the final score − β·KL of each seed."""
    runs = [list(train(beta, clip, lam, seed)) for seed in SEEDS]
    score, kl = ([round(sum(r[u][i] for r in runs) / len(runs), 4) for u in range(UPDATES + 1)] for i in (0, 1))
    return {"score": score, "kl": kl, "end": [round(r[-1][0] - beta * r[-1][1], 4) for r in runs]}


def shown(name: str, value: float) -> str:
    """A value of a setting, as text."""
    return "off" if name == "clip" and value == CHOICES["clip"][-1] else f"{value:g}"


ABOUT = (
    (
        "β, the price of a nat of KL.",
        "A low β lets the policy go far and win a high score. A high β keeps it near the reference. The policy that "
        "is best for each β lies on the grey curve, and no policy lies above it.",
    ),
    (
        "Clip, how far a ratio may move in one update.",
        "Without it, several steps from one rollout tear the policy apart: it ends far from the reference, with a low "
        "score. A small range is safe and slow.",
    ),
    (
        "λ, whom the advantage trusts.",
        "λ = 0 trusts the critic, which knows nothing at first. λ = 1 trusts the sampled rewards.",
    ),
)


def page(data: Mapping[str, Any]) -> str:
    """The page as HTML."""
    start, combinations = data["frontier"][0][0], itertools.product(*CHOICES.values())
    names = ("β", "clip", "λ", "score", "KL, nats", "score − β·KL", "lowest and highest seed", "best possible")
    rows = []
    for values in combinations:
        found, best = data["combinations"][key(*values)], data["optimum"][f"{values[0]:g}"]
        end = sum(found["end"]) / len(found["end"])
        cells = [*(shown(n, v) for n, v in zip(CHOICES, values, strict=True)), f"{found['score'][-1]:.3f}"]
        cells += [f"{found['kl'][-1]:.2f}", f"{end:.3f}", f"{min(found['end']):.3f} to {max(found['end']):.3f}"]
        series = {f"data-{n}": " ".join(map(str, found[n])) for n in ("score", "kl")}
        rows.append(tag("tr", *(tag("td", c.replace("-", "−")) for c in [*cells, f"{best:.3f}"]), **series))
    head = tag("tr", *(tag("th", name, scope="col") for name in names))
    frontier = " ".join(f"{kl},{score}" for score, kl in data["frontier"])
    table = tag(
        "table", tag("thead", head), tag("tbody", *rows), class_="numbers", id="results", data_frontier=frontier
    )
    first = tag(
        "p",
        f"PPO trains {UPDATES} updates on a world of 85 texts, so every number here is exact and not sampled. The "
        f"reference has the score {start:.2f}; the best text has 1. Each result is the mean of {len(SEEDS)} seeds.",
        class_="lead",
    )
    main = tag(
        "main",
        first,
        tag("div", id="controls", data_start=" ".join(shown(n, START[n]) for n in CHOICES)),
        tag("p", id="said", aria_live="polite"),
        tag("div", id="charts", class_="panels large"),
        *(tag("p", tag("b", name), " ", text) for name, text in ABOUT),
        tag("h2", "All combinations"),
        tag("div", table, class_="wide", tabindex=0, role="region", aria_label="Table of all combinations"),
        small_print(data["made"]),
    )
    header = tag(
        "header",
        tag("p", "lmgym, lessons 4 to 6", class_="kicker"),
        tag("h1", "What if? β, clip and λ in a small world"),
        tag("nav", *(tag("a", text, href=to) for text, to in LINKS), aria_label="Lessons"),
    )
    body = tag("body", header, main, tag("script", src="what_if.js"))
    return f"<!DOCTYPE html>\n{tag('html', _head(), body, lang='en')}\n"


LINKS = tuple((f"Lesson {n}", f"lesson_{n:02}.html") for n in (4, 5, 6))


def _head() -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", "What if? β, clip and λ"),
        tag("style", Html(style_sheet() + (FOLDER / "what_if.css").read_text(encoding="utf-8"))),
    )


def made() -> str:
    """Command, settings, machine and revision."""
    return (
        f"python docs/lessons/what_if.py: PPO, {ROWS} completions per update, {EPOCHS} passes, {MINIBATCH} completions "
        f"per step, learning rate {LR:g}, advantages not whitened, seeds {', '.join(map(str, SEEDS))}. "
        f"{hardware()}, torch {torch.__version__}, revision {revision()}."
    )


def main() -> None:
    """Trains what is not in the data yet, and writes the page."""
    data: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"combinations": {}}
    if sys.argv[1:] != ["--page"]:
        torch.set_num_threads(1)
        began = time.perf_counter()
        data["frontier"], data["optimum"] = optima()
        data["made"] = made()
        for values in itertools.product(*CHOICES.values()):
            if key(*values) not in data["combinations"]:  # an interrupted call goes on
                data["combinations"][key(*values)] = combination(*values)
                print(f"{key(*values)}: {time.perf_counter() - began:.0f} s", flush=True)
                atomic.write(DATA, json.dumps(data, ensure_ascii=False).replace("}, ", "},\n") + "\n")
    PAGE.write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    main()
