"""Baselines and variance: the same rollouts, four baselines, and how much the policy gradient scatters with each.

A baseline leaves the gradient's mean where it is and changes how far one rollout's gradient lies from it. Measured on
sums (lmgym/Arithmetic-v0): no baseline, the rollout's mean, the mean of the siblings (RLOO), a critic, and the best
constant that there is. Scores are from 0 to 1; what if they were from 1 to 2, which asks for the same policy?

python examples/06_baselines_and_variance.py    # draws runs/examples/06_baselines_and_variance.png
"""

from pathlib import Path

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
    """For each baseline the gradient's variance, summed over parameters."""
    policy, env = world(seed, critic="head")
    buffer = lmgym.RolloutBuffer.like(env)
    head = list(policy.value_head.parameters())
    optimizer = torch.optim.Adam(head, lr=1e-2)
    for update in range(rollouts):  # the critic learns on rollouts of its own; the policy stands still
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


def curve(baseline: str, updates: int, seed: int) -> list[float]:
    plus = 1.0 if baseline.endswith("+ 1") else 0.0
    policy, env = world(seed, plus=plus)
    learner = Learner(policy.parameters(), LearnerConfig(lr=5e-3, schedule="constant"), seed)
    config = reinforce.Config(updates=updates, baseline="mean" if baseline == "batch mean" else "none")
    return [row["score/mean"] - plus for row in reinforce.train(policy, env, learner, config)]


def main(rollouts: int = 60, updates: int = 40, seed: int = 0) -> dict[str, float]:
    torch.set_num_threads(1)
    found = scatter(rollouts, seed)
    shares = {name: variance / found["none"] for name, variance in found.items()}
    print("Variance of the gradient, none = 1:", *(f"    {name:20} {x:.2f}" for name, x in shares.items()), sep="\n")
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    bars.barh(list(shares), list(shares.values()), color="C0")
    bars.invert_yaxis()
    bars.set(xlabel="variance of the gradient, none = 1", title=f"{rollouts} rollouts of {ROWS} answers, one policy")
    print("Mean score of REINFORCE, first update and mean of the last five:")
    for colour, name in enumerate(("none", "batch mean", "none, scores + 1")):
        for one in (seed, seed + 1):
            scores = curve(name, updates, one)
            curves.plot(scores, color=f"C{colour}", linewidth=0.9, label=name if one == seed else None)
            print(f"    {name:20} seed {one}: {scores[0]:.2f} -> {sum(scores[-5:]) / len(scores[-5:]):.2f}")
    curves.set(xlabel="update", ylabel="mean score (less what was added)", title="REINFORCE, two seeds each")
    curves.legend(frameon=False)
    path = Path("runs/examples/06_baselines_and_variance.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nLook at {path}. Here no baseline scatters less than most: the answers with long")
    print("gradients are the improbable ones, and score little, so that the best constant lies below the mean score.")
    print("What a baseline is for is the last bar. 1 more for every answer changes nothing about what is best; without")
    print("a baseline it drowns what there is to learn, and the other bars stay as they are, whatever is added.")
    return found


if __name__ == "__main__":
    main()
