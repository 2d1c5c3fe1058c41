"""Three common bugs in REINFORCE, their effect on the learning curve, and which checks find them. Needs only `lmgym`.

score on every token    the score is paid at every token instead of the last one: longer texts earn more
EOS out of the loss     the end-of-sequence token is masked like padding: the policy cannot learn when to stop
padding is read         the loss ignores the padding mask of the prompt: tokens are scored in another context

Dashed lines: the best mean score that any policy can have, computed from all completions (lmgym.exact).

python examples/08_break_it_and_watch.py    # draws runs/examples/08_break_it_and_watch.png
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

import lmgym
from lmgym.exact import enumerate_tree
from lmgym.tasks import Split
from lmgym.testing import check_algorithm

mpl.use("Agg")
import matplotlib.pyplot as plt


def early(prompt: str, completion: lmgym.Completion) -> float:
    return (prompt[0] in "ab") * (1.0 if completion.tokens == 2 else 0.5)


BUGS: dict[str, Any] = {  # the metric that shows the bug, and a score for which it does
    "score on every token": ("tokens", "any text scores 1", lambda prompt, c: 1),
    "EOS out of the loss": ("score", "after a or b: one letter 1, more ½", early),
    "padding is read": ("score", "the prompt's first letter: 1", lambda prompt, c: c.text[:1] == prompt[0]),
}
SKIP = ("seed", "lr", "metrics", "order", "split", "mask", "optimum")


def reinforce(
    policy: Any, env: lmgym.TokenVectorEnv, *, seed: int, lr: float, updates: int, bug: str = ""
) -> Iterator[dict[str, float]]:
    """The correct loop, and three ways to break it."""
    buffer = lmgym.RolloutBuffer.like(env)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for update in range(updates):
        lmgym.collect(policy, env, buffer, lmgym.Stream(seed, update))
        rewards, learned, sequences = buffer.rewards, buffer.is_action, buffer.sequences
        if bug == "score on every token":
            rewards = torch.where(learned, rewards - buffer.at_last(buffer.score) + buffer.score[:, None], 0.0)
        if bug == "EOS out of the loss":
            learned = learned & (buffer.tokens != env.model.eos_ids[0])
        if bug == "padding is read":
            sequences = replace(sequences, prompt_mask=torch.ones_like(sequences.prompt_mask))
        returns = rewards.flip(1).cumsum(1).flip(1)
        advantages = returns - returns[buffer.is_action].mean()
        logp = policy.evaluate(sequences).logp
        loss = -torch.where(learned, advantages * logp, 0.0).sum() / buffer.rows
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield {"score": float(buffer.score.mean()), "tokens": float(buffer.is_action.sum(1).float().mean())}


class Letters(lmgym.Task):
    """The prompt has two to five letters; the policy writes more. Each bug is visible with its own score."""

    name, best = "letters", 1.0

    def __init__(self, rule: Callable[[str, lmgym.Completion], float]):
        self.rule = rule

    def sample(self, rng: np.random.Generator, split: Split = "train") -> lmgym.Prompt:
        return lmgym.Prompt("".join(rng.choice(list("abcd"), rng.integers(2, 6))))

    def score(self, prompts: Any, completions: Any) -> list[float]:
        return [float(self.rule(p.text, c)) for p, c in zip(prompts, completions, strict=True)]


def world(task: Letters) -> lmgym.TokenVectorEnv:
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=16, alpha=32)
    return lmgym.TokenVectorEnv(128, task=task, model=lm, max_prompt_tokens=5, max_new_tokens=6, kl="none")


def best_attainable(task: Letters) -> float:
    """The best mean score of any policy. The scores depend only on the prompt's first letter: one tree for each."""
    trees = [enumerate_tree(world(task), lmgym.Prompt(first)) for first in "abcd"]
    return sum(float(tree.scores.max()) for tree in trees) / len(trees)


def curve(task: Letters, metric: str, updates: int, bug: str) -> list[float]:
    env = world(task)
    lm = env.model
    rows = reinforce(lmgym.Policy(lm, critic="none"), env, seed=0, lr=1e-2, updates=updates, bug=bug)
    return [row[metric] for row in rows]


def failures(bug: str, skip: Sequence[str]) -> list[str]:
    """The lines of `check_algorithm`'s table that fail."""
    try:
        check_algorithm(partial(reinforce, bug=bug), skip=skip, show=False)
    except AssertionError as error:
        return [" ".join(line.split()) for line in str(error).splitlines() if line.startswith("FAIL")]
    return ["nothing fails"]


def main(updates: int = 80, skip: Sequence[str] = SKIP) -> None:
    torch.set_num_threads(1)
    print("without a bug:", *failures("", skip))
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, (bug, (metric, what, rule)) in zip(panels, BUGS.items(), strict=True):
        right, wrong = (curve(Letters(rule), metric, updates, which) for which in ("", bug))
        axes.plot(right, label="correct")
        axes.plot(wrong, label=bug)
        axes.set(title=what, xlabel="update", ylabel={"tokens": "tokens per completion", "score": "mean score"}[metric])
        axes.set_ylim((0, 7) if metric == "tokens" else (0, 1.4))
        line = f"{bug}: {metric} {wrong[0]:.2f} -> {wrong[-1]:.2f}; without the bug {right[0]:.2f} -> {right[-1]:.2f}"
        if metric == "score":
            best = best_attainable(Letters(rule))
            axes.axhline(best, color="0.4", linestyle="--", linewidth=0.9, label=f"best attainable: {best:g}")
            line += f"; the best attainable is {best:g}"
        axes.legend(frameon=False)
        print(line)
        print(*(f"    {line}" for line in failures(bug, skip)), sep="\n")
    path = Path("runs/examples/08_break_it_and_watch.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nThe plot is in {path}. Each run with a bug finishes and prints plausible numbers. Only a correct")
    print("run for comparison, or a check, shows the bug. Now change the EOS bug's score to `c.tokens == 2` after any")
    print("prompt, and compare the curves and the gradient's line in the table again.")


if __name__ == "__main__":
    main()
