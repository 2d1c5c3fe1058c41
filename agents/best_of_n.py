"""Best of n (Nakano et al. 2021; Stiennon et al. 2020): no training; sample n completions and choose the best.

It is a simple and strong baseline. From a group of completions of each prompt it estimates the score of the best of 1,
2, 4, … completions, and the KL to the policy, ties included.

Papers: https://arxiv.org/abs/2112.09332 (Nakano et al.), https://arxiv.org/abs/2009.01325 (Stiennon et al.).
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
    """Completions of each prompt. The best of n is measured for each power of two n up to this number."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", least=0)


METRICS = ROLLOUT_METRICS | {
    "best_of/{n}/score": "score of the best of n, mean over all subsets of n of a group, then over prompts",
    "best_of/{n}/kl_nats": "KL(best of n ‖ policy) in nats, for the uniform distribution over the group, ties included",
    "best_of/{n}/kl_bound_nats": "log n − (n − 1)/n: the KL in nats if no two scores are equal",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Yields the `METRICS` of each rollout, for n = 1, 2, 4, … `group`. It does not train the policy."""
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
