"""Expert iteration (Anthony et al. 2017) as rejection-sampling fine-tuning (Dong et al. 2023; Gulcehre et al. 2023).

Sample a group of completions of each prompt, select the best, and imitate them by maximum likelihood. There are no
negative examples. What differs from the papers: each round continues from the current policy, not from the initial one.

Papers: https://arxiv.org/abs/1705.08439 (Anthony et al.), https://arxiv.org/abs/2304.06767 (RAFT: Dong et al.),
https://arxiv.org/abs/2308.08998 (ReST: Gulcehre et al.).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents.learner import METRICS as LEARNER_METRICS
from agents.learner import Learner
from agents.training import Batch, require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect


@dataclass(frozen=True)
class Config:
    """Expert iteration's own settings."""

    updates: int = 50
    """Rollouts, each followed by `epochs` passes over the imitated completions."""
    group: int = 8
    """Completions of each prompt."""
    keep: int = 1
    """Completions of each group to imitate: those of the highest score."""
    threshold: float | None = None
    """Imitate only completions whose score is at least this; None imitates all that `keep` selects."""
    epochs: int = 1
    """Passes over the imitated completions."""
    minibatch_rows: int = 0
    """Completions per optimizer step; 0 for all."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", "minibatch_rows", least=0)
        require.in_range(self, "epochs", "keep", least=1)
        require.in_range(self, "threshold")


METRICS = LEARNER_METRICS | {
    "imitated/score": "score of the completions that are imitated, mean over them",
    "imitated/share": "share of the rollout's completions that are imitated",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "expert_iteration")
    require.groups(env.num_envs, config.group, "expert_iteration")
    buffer = RolloutBuffer.like(env)

    def loss(new: Evaluation, old: Batch) -> Tensor:
        return -new.logp

    for update in learner.updates(config.updates):
        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update, config.group))

        # Scores -> which completions to imitate.
        imitated = F.best_of_group(rollout.score, config.group, config.keep)
        if config.threshold is not None:
            imitated &= rollout.score >= config.threshold
        learner.metrics.add("imitated/score", rollout.score, imitated)
        learner.metrics.add("imitated/share", imitated.float())

        # Imitated completions -> steps.
        batch = Batch.of(rollout, rollout.logp)[imitated.nonzero()[:, 0]]  # waits for the device, once per update
        for _ in range(config.epochs if len(batch) else 0):
            for minibatch in learner.minibatches(batch, config.minibatch_rows):
                learner.step(policy, minibatch, loss)

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
