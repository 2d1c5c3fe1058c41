"""Reward hacking: training on a learned reward model, with and without a penalty on KL to the reference.

The reward model is the proxy: the policy is trained on its score. It was trained on reviews, and orders about 85 % of
pairs of reviews correctly. The gold score is a rule that the policy never sees: positive sentences minus negative ones;
repeated and incomplete sentences do not count. Both runs have the same start, seed and learning rate; only β differs.

python examples/07_reward_hacking.py    # draws runs/examples/07_reward_hacking.png
"""

from pathlib import Path

import matplotlib as mpl
import torch

import lmgym
from agents import reinforce
from agents.learner import Learner, LearnerConfig
from lmgym.tasks import Sentiment

mpl.use("Agg")
import matplotlib.pyplot as plt

Curve = list[tuple[float, float, float]]
"""KL in nats per completion, proxy score and gold score, after each update."""


def train(beta: float, updates: int, rows: int, seed: int) -> tuple[Curve, list[str]]:
    """Trains on the built-in reward model; returns the curve, and completions of held-out prompts."""
    lm = lmgym.load("tiny")
    lm.adapters.add("policy", seed=seed)
    policy = lmgym.Policy(lm, critic="none")
    task = Sentiment(lmgym.RewardModel.load("tiny-reward"))
    env = lmgym.TokenVectorEnv(
        rows, task=task, model=lm, max_prompt_tokens=40, max_new_tokens=48, kl="sampled", beta=beta
    )
    # With a high learning rate a few dozen updates show the effect that otherwise takes thousands.
    learner = Learner(policy.parameters(), LearnerConfig(lr=1e-2, schedule="constant"), seed)
    curve: Curve = []
    for metrics in reinforce.train(policy, env, learner, reinforce.Config(updates=updates)):
        gold = sum(task.gold(env.prompts, env.completions())) / rows
        curve.append((metrics["kl/sequence_nats"], metrics["score/mean"], gold))
    test = lmgym.TokenVectorEnv(
        4, task=task, model=lm, split="test", max_prompt_tokens=40, max_new_tokens=48, kl="none"
    )
    lmgym.collect(policy, test, lmgym.RolloutBuffer.like(test), lmgym.Stream(seed, 0))
    judged = zip(test.prompts, test.completions(), task.score(test.prompts, test.completions()), strict=True)
    return curve, [
        f"proxy {score:+.1f}, gold {task.gold([p], [c])[0]:+.1f}: {p.text} |{c.text}" for p, c, score in judged
    ]


def draw(curves: dict[float, Curve], path: Path) -> None:
    figure, panels = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for beta, curve in curves.items():
        kl, *scores = zip(*curve, strict=True)
        distance = [max(0.0, nats) ** 0.5 for nats in kl]  # the KL of the first update is 0 up to rounding
        for axes, score in zip(panels, scores, strict=True):
            axes.plot(distance, score, marker=".", linewidth=0.8, label=f"β = {beta:g}")
            axes.plot(distance[-1], score[-1], marker="o", color=axes.lines[-1].get_color())
    panels[0].set(ylabel="proxy: the reward model's score", title="The score that is trained on, and the true score")
    panels[1].set(
        ylabel="gold score (best: 1)", xlabel="√KL to the reference, √nats per completion; large dot: the last update"
    )
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def moments(curve: Curve) -> dict[str, tuple[float, float, float]]:
    """KL, proxy and gold at some points of a curve."""
    kl, proxy, gold = (sum(column) / len(column) for column in zip(*curve[-5:], strict=True))
    return {
        "at the start": curve[0],
        "where gold is best": max(curve, key=lambda point: point[2]),
        "where the proxy is best": max(curve, key=lambda point: point[1]),
        "in the last five updates": (kl, proxy, gold),
    }


def verdict(curves: dict[float, Curve]) -> list[str]:
    """The result in sentences, computed from the runs: another seed or machine may give another result."""
    told, ends = [], {}
    for beta, curve in curves.items():
        found = moments(curve)
        _, start_proxy, start = found["at the start"]
        best_kl, best_proxy, best = found["where gold is best"]
        _, end_proxy, end = ends[beta] = found["in the last five updates"]
        told.append(
            f"β = {beta:g}: the gold score went from {start:.2f} to {best:.2f} at {best_kl:.0f} nats of KL, and to "
            f"{end:.2f} in the last five updates; the proxy from {start_proxy:.2f} to {best_proxy:.2f}, and to "
            f"{end_proxy:.2f}."
        )
        if best > start:
            told[-1] += (
                f" By the end {100 * (best - end) / (best - start):.0f} % of the gain in the gold score was lost again."
            )
    by_proxy, by_gold = (max(ends, key=lambda beta: ends[beta][place]) for place in (1, 2))
    told.append(
        f"Judged by the proxy at the end, β = {by_proxy:g} is better; judged by the gold score, β = {by_gold:g}."
    )
    return told


def main(updates: int = 40, rows: int = 64, seed: int = 0) -> dict[float, Curve]:
    torch.set_num_threads(1)
    curves: dict[float, Curve] = {}
    for beta in (0.0, 0.1):
        curves[beta], texts = train(beta, updates, rows, seed)
        print(f"β = {beta:g}")
        for when, (kl, proxy, gold) in moments(curves[beta]).items():
            print(f"    {when:25} proxy {proxy:5.2f}  gold {gold:5.2f}  KL {max(0.0, kl):4.0f} nats")
        print(*(f"    {text}" for text in texts), sep="\n")
    path = Path("runs/examples/07_reward_hacking.png")
    draw(curves, path)
    print("", *verdict(curves), sep="\n")
    print(f"The plot is in {path}. Where do the two scores begin to differ? Do the texts above read like reviews?")
    return curves


if __name__ == "__main__":
    main()
