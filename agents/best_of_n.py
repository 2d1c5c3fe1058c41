"""Best of n (Nakano et al. 2021; Stiennon et al. 2020): no training; sample n completions and keep the best.

The simplest policy improvement, and the one to beat: from a group of completions of each prompt it reports what the
best of 1, 2, 4, … would score, and at what KL, ties included.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agents import functional as F
from agents.learner import ROLLOUT_METRICS, Learner
from agents.training import require
from lmgym.env import TokenVectorEnv
from lmgym.policy import TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect


@dataclass(frozen=True)
class Config:
    """Best of n's own settings."""

    updates: int = 4
    """Rollouts."""
    group: int = 16
    """Completions of each prompt, from which the best of every power of two up to it is measured."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", least=0)


METRICS = ROLLOUT_METRICS | {
    "best_of/{n}/score": "score of the best of n, mean over prompts: an average over all choices of n from the group",
    "best_of/{n}/kl_nats": "KL(best of n ‖ policy) in nats, on the group as the policy's distribution, ties included",
    "best_of/{n}/kl_bound_nats": "log n − (n − 1)/n: the KL where no two scores are equal",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains nothing; yields the `METRICS` of each rollout, for n = 1, 2, 4, … `group`."""
    require.groups(env.num_envs, config.group, "best_of_n")
    buffer = RolloutBuffer.like(env)
    sizes = [2**k for k in range(config.group.bit_length()) if 2**k <= config.group]
    for update in learner.updates(config.updates):
        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update, config.group))

        # Scores -> the best of n.
        groups = rollout.score.view(-1, config.group)
        for n in sizes:
            learner.metrics.add(f"best_of/{n}/score", F.expected_best(groups, n))
            learner.metrics.add(f"best_of/{n}/kl_nats", _kl(groups, n))
            learner.metrics.add(f"best_of/{n}/kl_bound_nats", torch.tensor(F.best_of_n_kl(n)))
        yield learner.summarise(rollout)


def _kl(groups: Tensor, n: int) -> Tensor:
    alike = torch.full_like(groups, 1 / groups.shape[1])
    return F.forward_kl(F.best_of_n_probs(groups, alike, n).log(), alike.log())
