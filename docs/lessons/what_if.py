"""Makes the page "What if?": PPO on a world of 85 texts, with every combination of some β, clip ranges and λ.

    python docs/lessons/what_if.py             # trains (seconds), writes what_if.json and what_if.html
    python docs/lessons/what_if.py --page      # writes what_if.html anew from what_if.json

The world is that of lesson 5. All runs train at the same time: each is a small network that is added to the reference's
logits, and another one for the critic. The equations are those of agents/functional.py. The page asks no server for
anything. Without its script, what_if.js, it shows the same numbers as a table.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lmgym
from agents import functional as F
from agents.report.document import style_sheet
from agents.report.html import Html, small_print, tag
from agents.runs.machine import hardware, revision
from lmgym.exact import Tree, enumerate_tree
from lmgym.tasks import Prompt
from lmgym.tasks import Tree as TreeTask

FOLDER = Path(__file__).resolve().parent
DATA, PAGE = FOLDER / "what_if.json", FOLDER / "what_if.html"
CHOICES: Mapping[str, Sequence[float]] = {
    "beta": (0.03, 0.1, 0.3, 1.0),
    "clip": (0.05, 0.2, 0.5, 1000.0),
    "lam": (0.0, 0.5, 0.95, 1.0),
}
"""The values of each setting; a clip range of 1000 clips nothing."""
START = {"beta": 0.1, "clip": 0.2, "lam": 0.95}
"""The combination that the page shows first."""
SEEDS, UPDATES, ROWS, MINIBATCH, EPOCHS, LR, HIDDEN = 10, 40, 64, 16, 4, 0.02, 16
FRONTIER = (30.0, 3.0, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03)
"""The β of the soft-optimal policies that make the edge of what is possible."""


def score_and_kl(tree: Tree, probs: Tensor) -> tuple[float, float]:
    """The exact mean score of a distribution over the texts, and its KL to the reference in nats."""
    kept = probs > 1e-30
    kl = (probs[kept] * (probs[kept].log() - tree.reference_logp[kept])).sum()
    return round(float(probs @ tree.scores), 4), round(float(kl), 4)


def small_world() -> Tree:
    """All texts after the prompt "a"."""
    lm = lmgym.load("probe")
    lm.adapters.add("policy")
    env = lmgym.TokenVectorEnv(1, task=TreeTask(), model=lm, max_prompt_tokens=1, max_new_tokens=3, kl="none")
    return enumerate_tree(env, Prompt("a"))


class World:
    """The tree as tables: S states (texts so far), A actions, N texts.

    Attributes:
        reference_logp: [S, A] log π_ref of each action, in nats.
        following: [S, A] the state after an action; −1 if the text ends.
        text: [S, A] the text that ends with an action; −1 if it goes on.
        features: [S, F] what the networks see of a state.
        steps: [N, T, 2] state and action of each step of each text, −1 behind its end.
    """

    def __init__(self, tree: Tree):
        self.tree = tree
        tokens = sorted({token for path in tree.paths for token in path})
        states = sorted({path[:t] for path in tree.paths for t in range(len(path))}, key=lambda s: (len(s), s))
        place, budget = {state: i for i, state in enumerate(states)}, max(map(len, tree.paths))
        mass = torch.zeros(len(states), len(tokens), dtype=torch.float64)
        self.following = torch.full(mass.shape, -1)
        self.text = torch.full(mass.shape, -1)
        self.steps = torch.full((len(tree.paths), budget, 2), -1)
        for number, (path, logp) in enumerate(zip(tree.paths, tree.reference_logp.tolist(), strict=True)):
            for t, token in enumerate(path):
                here, action = place[path[:t]], tokens.index(token)
                self.steps[number, t] = torch.tensor([here, action])
                mass[here, action] += torch.tensor(logp).exp()
                if t + 1 < len(path):
                    self.following[here, action] = place[path[: t + 1]]
                else:
                    self.text[here, action] = number
        self.reference_logp = (mass / mass.sum(1, keepdim=True)).log().float()
        rows = []
        for state in states:
            letters = [float(t < len(state) and state[t] == token) for t in range(budget - 1) for token in tokens]
            rows.append([1.0, *(float(len(state) == t) for t in range(budget)), *letters])
        self.features = torch.tensor(rows)

    def logp_of_texts(self, logp: Tensor) -> Tensor:
        """[R, N] log π of each text, from [R, S, A]."""
        state, action = self.steps[..., 0], self.steps[..., 1]
        return torch.where(state >= 0, logp[:, state, action].double(), 0.0).sum(-1)


class Networks:
    """R policies and R critics, one for each run.

    Args:
        world: what they see.
        seeds: [R] runs of the same seed begin with the same weights.
    """

    def __init__(self, world: World, seeds: Sequence[int]):
        self.world = world
        inputs, actions = world.features.shape[1], world.reference_logp.shape[1]
        self.weights = []
        for size, scale in (
            ((inputs, HIDDEN), 1.0),
            ((HIDDEN, actions), 0.0),
            ((inputs, HIDDEN), 1.0),
            ((HIDDEN, 1), 0.0),
        ):
            drawn = {s: torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in set(seeds)}
            self.weights.append((scale * torch.stack([drawn[s] for s in seeds])).requires_grad_(True))

    def logp(self) -> Tensor:
        """[R, S, A] log π of every action in every state; the reference's, as long as the second layer is 0."""
        first, second, *_ = self.weights
        return torch.log_softmax(self.world.reference_logp + torch.tanh(self.world.features @ first) @ second, -1)

    def values(self) -> Tensor:
        """[R, S] the critics' estimates."""
        *_, first, second = self.weights
        return (torch.tanh(self.world.features @ first) @ second)[..., 0]


@torch.no_grad()
def sample(world: World, logp: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples texts with the uniform numbers [R, B, T].

    Returns:
        States, actions and masks [R, B, T], and the texts [R, B].
    """
    runs = torch.arange(len(logp))[:, None]
    state = torch.zeros(uniform.shape[:2], dtype=torch.long)
    running, text = torch.ones_like(state, dtype=torch.bool), torch.full_like(state, -1)
    states, actions, masks = [], [], []
    for t in range(uniform.shape[2]):
        chances = logp[runs, state].exp().cumsum(-1)
        action = (chances < uniform[..., t, None] * chances[..., -1:]).sum(-1)
        states.append(state)
        actions.append(action)
        masks.append(running)
        text = torch.where(running & (world.text[state, action] >= 0), world.text[state, action], text)
        following = world.following[state, action]
        running = running & (following >= 0)
        state = following.clamp(min=0)
    return torch.stack(states, -1), torch.stack(actions, -1), torch.stack(masks, -1), text


def grouped(values: Tensor, function: Any, *arguments: Tensor) -> Any:
    """Calls a function of scalar settings once for each value of a setting, with the runs that have it."""
    found: dict[str, list[Tensor]] = {}
    order = []
    for value in values.unique().tolist():
        runs = (values == value).nonzero()[:, 0]
        order.append(runs)
        results = function(value, *(a[runs] for a in arguments))
        for i, result in enumerate(results if isinstance(results, tuple) else (results,)):
            found.setdefault(str(i), []).append(result)
    back = torch.cat(order).argsort()
    joined = tuple(torch.cat(parts)[back] for parts in found.values())
    return joined if len(joined) > 1 else joined[0]


def train(world: World, combinations: Sequence[tuple[float, float, float]]) -> tuple[Tensor, Tensor]:
    """Trains PPO for every combination and seed at the same time.

    Returns:
        The exact mean score and KL to the reference, in nats, before training and after each update: [C, SEEDS, U + 1].
    """
    beta, clip, lam = (torch.tensor([c[i] for c in combinations]).repeat_interleave(SEEDS) for i in range(3))
    networks = Networks(world, list(range(SEEDS)) * len(combinations))
    optimizer = torch.optim.Adam(networks.weights, lr=LR, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    runs, every = torch.arange(len(beta))[:, None, None], torch.arange(len(beta))[:, None]
    scores, kls = [], []
    for update in range(UPDATES + 1):
        with torch.no_grad():
            logp_all, values_all = networks.logp(), networks.values()
            exact = world.logp_of_texts(logp_all)
            scores.append(exact.exp() @ world.tree.scores)
            kls.append((exact.exp() * (exact - world.tree.reference_logp)).sum(-1))
        if update == UPDATES:
            break
        # Common random numbers: a seed draws the same numbers for all combinations.
        uniform = torch.rand(SEEDS, ROWS, world.steps.shape[1], generator=generator).repeat(len(combinations), 1, 1)
        state, action, mask, text = sample(world, logp_all, uniform)
        old, values = logp_all[runs, state, action], torch.where(mask, values_all[runs, state], 0.0)
        rewards = -beta[:, None, None] * (old - world.reference_logp[state, action])
        rewards = torch.where(mask, rewards, 0.0)
        last = (mask.sum(-1) - 1)[..., None]
        rewards = rewards.scatter_add(-1, last, world.tree.scores.float()[text][..., None])

        def gae(value: float, r: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            flat = [x.flatten(0, 1) for x in (r, v, m)]
            return tuple(x.view(r.shape) for x in F.gae(*flat, torch.zeros(len(flat[0])), 1.0, value))

        advantages, returns = grouped(lam, gae, rewards, values, mask)
        for _ in range(EPOCHS):
            order = torch.rand(SEEDS, ROWS, generator=generator).argsort(-1).repeat(len(combinations), 1)
            for rows in order.split(MINIBATCH, dim=-1):
                s, a, m = state[every, rows], action[every, rows], mask[every, rows]
                arguments = (networks.logp()[runs, s, a], old[every, rows], advantages[every, rows])
                policy = grouped(clip, lambda value, *x: F.clipped_surrogate(*x, value), *arguments)
                critic = F.clipped_value_loss(
                    networks.values()[runs, s], values[every, rows], returns[every, rows], 0.0
                )
                each = torch.where(m, policy + critic, 0.0).sum((1, 2)) / m.sum((1, 2))
                optimizer.zero_grad()
                each.sum().backward()
                optimizer.step()
    shape = (len(combinations), SEEDS, UPDATES + 1)
    return torch.stack(scores, -1).view(shape), torch.stack(kls, -1).view(shape)


def optima(tree: Tree) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Score and KL of the soft-optimal policies, and β log Z of each β on the page."""
    at = {beta: dataclasses.replace(tree, beta=beta) for beta in (*FRONTIER, *CHOICES["beta"])}
    return (
        [score_and_kl(tree, at[beta].soft_optimal()) for beta in FRONTIER],
        {f"{beta:g}": round(at[beta].optimum, 4) for beta in CHOICES["beta"]},
    )


def key(beta: float, clip: float, lam: float) -> str:
    """The name of a combination in the data and on the page."""
    return f"{beta:g} {clip:g} {lam:g}"


def shown(name: str, value: float) -> str:
    """A value of a setting, as text."""
    return "off" if name == "clip" and value == CHOICES["clip"][-1] else f"{value:g}"


ABOUT = (
    (
        "β, the price of a nat of KL.",
        "A low β lets the policy go far and win a high score. A high β keeps it near the reference. The policy that "
        "is best for each β lies on the dashed curve, and no policy lies above it. With β = 0.03 some seeds stay at "
        "texts that begin with “a”, which are good but not the best: see the lowest seed in the table.",
    ),
    (
        "Clip, how far a ratio may move in one update.",
        "Without it, several steps from one rollout tear the policy apart: it pays for many nats that buy no score, "
        "and with a high β it ends below the reference. A small range is safe and slow.",
    ),
    (
        "λ, whom the advantage trusts.",
        "λ = 0 trusts the critic, which knows nothing at first, so the first updates gain less. λ = 1 trusts the "
        "sampled rewards. A text has three tokens at most here, so the difference is small; lesson 4 has eight.",
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
        f"PPO trains {UPDATES} updates on a world of 85 texts, so score and KL are computed and not sampled. The "
        f"reference has the score {start:.2f}; the best text has 1. Each result is the mean of {SEEDS} seeds.",
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


def measured() -> dict[str, Any]:
    """All that the page shows: the mean over the seeds after each update, and the last score − β·KL of each seed."""
    world, combinations = World(small_world()), list(itertools.product(*CHOICES.values()))
    scores, kls = train(world, combinations)
    frontier, optimum = optima(world.tree)
    rows = {}
    for (beta, clip, lam), score, kl in zip(combinations, scores, kls, strict=True):
        means = {"score": score.mean(0), "kl": kl.mean(0), "end": score[:, -1] - beta * kl[:, -1]}
        rows[key(beta, clip, lam)] = {name: [round(x, 4) for x in mean.tolist()] for name, mean in means.items()}
    made = (
        f"python docs/lessons/what_if.py: PPO, {ROWS} completions per update, {EPOCHS} passes, {MINIBATCH} completions "
        f"per step, Adam with learning rate {LR:g}, advantages not whitened, seeds 0 to {SEEDS - 1}. {hardware()}, "
        f"torch {torch.__version__}, revision {revision()}."
    )
    return {"made": made, "frontier": frontier, "optimum": optimum, "combinations": rows}


def main() -> None:
    """Trains, unless the data are there and only the page is wanted, and writes the page."""
    if sys.argv[1:] != ["--page"]:
        text = json.dumps(measured(), ensure_ascii=False).replace("}, ", "},\n")
        DATA.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
