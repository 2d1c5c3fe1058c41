"""Baselines and variance: how much a policy gradient varies from rollout to rollout, with and without a baseline.

A baseline does not change the mean of the gradient; it changes the gradient's variance. Measured on sums
(lmgym/Arithmetic-v0) in two cases:

1. Every answer scores 1 more, so scores are from 1 to 2. The best policy is the same, but without a baseline every
   answer, right or wrong, becomes more probable, and this noise hides the difference between the answers.
2. Scores are from 0 to 1, as the task gives them. A baseline does not always help: compare no baseline, the rollout's
   mean, the mean of the siblings (the other completions of the same prompt, as in RLOO), a critic, and the constant
   that gives the least variance.

python examples/06_baselines_and_variance.py    # draws runs/examples/06_baselines_and_variance.png
"""

from pathlib import Path
from typing import Literal

import matplotlib as mpl
import torch
from torch import Tensor

import lmgym
from agents import functional as F
from agents import reinforce
from agents.learner import Learner, LearnerConfig
from lmgym.policy import Critic
from lmgym.tasks import Arithmetic

mpl.use("Agg")
import matplotlib.pyplot as plt

GROUP, ROWS = 4, 64
Baseline = Literal["none", "mean"]


def world(seed: int, critic: Critic = "none", plus: float = 0.0) -> tuple[lmgym.Policy, lmgym.TokenVectorEnv]:
    lm = lmgym.load("tiny")
    lm.adapters.add("policy", seed=seed)
    task = Arithmetic()
    score = lmgym.Score({"sum": task.score}, shift=-plus)
    env = lmgym.TokenVectorEnv(
        ROWS, task=task, model=lm, score=score, max_prompt_tokens=12, max_new_tokens=8, kl="none"
    )
    return lmgym.Policy(lm, critic=critic), env


def scatter(rollouts: int, seed: int) -> dict[str, float]:
    """The gradient's variance with each baseline, summed over the parameters, over rollouts of one policy."""
    policy, env = world(seed, critic="head")
    buffer = lmgym.RolloutBuffer.like(env)
    head = list(policy.value_head.parameters())
    optimizer = torch.optim.Adam(head, lr=1e-2)
    for update in range(rollouts):  # the critic learns on other rollouts; the policy does not change
        lmgym.collect(policy, env, buffer, lmgym.Stream(seed + 1, update, GROUP))
        error = policy.evaluate(buffer.sequences).value - buffer.score[:, None]
        optimizer.zero_grad()
        error.square()[buffer.is_action].mean().backward(inputs=head)
        optimizer.step()
    parameters = policy.lm.adapters.parameters("policy")
    found: dict[str, list[Tensor]] = {}
    for update in range(rollouts):
        lmgym.collect(policy, env, buffer, lmgym.Stream(seed, update, GROUP))
        mask, logp = buffer.is_action, policy.evaluate(buffer.sequences).logp
        returns = F.reward_to_go(buffer.rewards, mask, buffer.bootstrap)  # the score, at every token
        for name, advantages in {
            "none": returns,
            "batch mean": returns - F.masked_mean(returns, mask),
            "siblings' mean": F.leave_one_out(buffer.score, GROUP)[:, None],
            "critic": returns - buffer.values,
            "one": torch.ones_like(returns),
        }.items():
            loss = -torch.where(mask, advantages * logp, 0.0).sum() / ROWS
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
            found.setdefault(name, []).append(torch.cat([g.flatten() for g in gradient]))
    stacked = {name: torch.stack(gradients) for name, gradients in found.items()}
    none, one = stacked["none"], stacked.pop("one")
    # A constant b makes the gradient none − b · one; this b makes its variance least.
    best = float(((none - none.mean(0)) * (one - one.mean(0))).sum() / (one - one.mean(0)).square().sum())
    stacked |= {f"best constant, {best:.2f}": none - best * one, "none, scores + 1": none + one}
    return {name: float(gradients.var(0).sum()) for name, gradients in stacked.items()}


def curve(baseline: Baseline, plus: float, updates: int, seed: int) -> list[float]:
    """Mean scores of REINFORCE, minus `plus`, which is added to every score."""
    policy, env = world(seed, plus=plus)
    learner = Learner(policy.parameters(), LearnerConfig(lr=5e-3, schedule="constant"), seed)
    config = reinforce.Config(updates=updates, baseline=baseline)
    return [row["score/mean"] - plus for row in reinforce.train(policy, env, learner, config)]


def print_case(title: str, variances: dict[str, float], ends: dict[Baseline, list[tuple[float, float]]]) -> None:
    print(f"{title}. Variance of the gradient, no baseline = 1:")
    for name, variance in variances.items():
        print(f"    {name:20} {variance / variances['none']:.2f}")
    print("  Mean score of REINFORCE, minus the added constant: first update -> mean of the last five, one seed each:")
    for name, pairs in ends.items():
        print(f"    baseline {name:11} " + ", ".join(f"{first:.2f} -> {last:.2f}" for first, last in pairs))


def verdict(variances: dict[str, float], ends: dict[Baseline, list[tuple[float, float]]]) -> str:
    """The result of a case, in one sentence."""
    ratio = variances["batch mean"] / variances["none"]
    without, with_mean = (sum(last for _, last in ends[name]) / len(ends[name]) for name in ("none", "mean"))
    return (
        f"the batch mean gives {ratio:.2f} times the variance without a baseline; REINFORCE ends at {with_mean:.2f} "
        f"with it and at {without:.2f} without it"
    )


def main(rollouts: int = 60, updates: int = 30, seed: int = 0) -> dict[str, float]:
    torch.set_num_threads(1)
    found = scatter(rollouts, seed)
    shifted = {"none": found["none, scores + 1"], "batch mean": found["batch mean"]}
    plain = {name: variance for name, variance in found.items() if name != "none, scores + 1"}
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    cases = ((1.0, "Scores from 1 to 2", shifted), (0.0, "Scores from 0 to 1", plain))
    told, mean = [], 0.0
    for (bars, curves), (plus, title, variances) in zip(panels, cases, strict=True):
        bars.barh(list(variances), [variance / variances["none"] for variance in variances.values()], color="C0")
        bars.invert_yaxis()
        bars.set(xlabel="variance of the gradient, no baseline = 1", title=f"{title}: {rollouts} rollouts, one policy")
        ends: dict[Baseline, list[tuple[float, float]]] = {"none": [], "mean": []}
        for colour, name in enumerate(ends):
            for one in (seed, seed + 1):
                scores = curve(name, plus, updates, one)
                label = f"baseline: {name}" if one == seed else None
                curves.plot(scores, color=f"C{colour}", linewidth=0.9, label=label)
                ends[name].append((scores[0], sum(scores[-5:]) / len(scores[-5:])))
        curves.set(
            xlabel="update", ylabel="mean score, minus the added constant", title=f"{title}: REINFORCE, two seeds"
        )
        curves.legend(frameon=False)
        mean = ends["none"][0][0]
        print_case(title, variances, ends)
        told.append(f"{title}: {verdict(variances, ends)}.")
    path = Path("runs/examples/06_baselines_and_variance.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    constant = next(name for name in found if name.startswith("best constant")).replace(",", " is")
    print("", *told, sep="\n")
    print(f"On scores from 0 to 1 the {constant}, and the mean score is {mean:.2f}: the constant is a mean")
    print(
        "of the scores, weighted by the squared norm of the gradients; improbable answers have gradients of large norm."
    )
    print(f"The plot is in {path}.")
    return found


if __name__ == "__main__":
    main()
