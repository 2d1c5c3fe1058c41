"""Expert iteration (Anthony et al. 2017) as rejection-sampling fine-tuning (Dong et al. 2023; Gulcehre et al. 2023).

Sample a group of completions of each prompt, keep the best, and imitate them: maximum likelihood, no negative examples.
What differs from the papers: each round goes on from the policy as it stands, not from the start.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents import learner as common
from agents.learner import Batch, Learner
from agents.training import require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect


@dataclass(frozen=True)
class Config:
    """Expert iteration's own settings."""

    updates: int = 50
    """Rollouts, each followed by `epochs` passes over what was kept."""
    group: int = 8
    """Completions of each prompt."""
    keep: int = 1
    """How many of them are imitated."""
    threshold: float | None = None
    """Imitates only completions of at least this score."""
    epochs: int = 1
    """Passes over what was kept."""
    minibatch_rows: int = 0
    """Completions per optimizer step; 0 takes all."""


METRICS = common.METRICS | {
    "kept/score": "score of the completions that are imitated, mean over them",
    "kept/share": "share of the rollout's completions that are imitated",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "expert_iteration")
    require.groups(env.num_envs, config.group, "expert_iteration")
    buffer = RolloutBuffer.like(env)
    for update in learner.updates(config.updates):
        learner.schedule(update / config.updates)

        # Prompts -> tokens -> scores.
        collect(policy, env, buffer, Stream(learner.seed, update, config.group))

        # Scores -> which to imitate.
        kept = F.best_of_group(buffer.score, config.group, config.keep)
        if config.threshold is not None:
            kept &= buffer.score >= config.threshold
        learner.metrics.add("kept/score", buffer.score, kept)
        learner.metrics.add("kept/share", kept.float())

        # Imitation -> steps.
        def loss(new: Evaluation, old: Batch) -> Tensor:
            return -new.logp

        if bool(kept.any()):  # waits for the device, once an update
            batch = Batch.of(buffer, buffer.logp)[kept.nonzero()[:, 0]]
            learner.fit(policy, batch, loss, epochs=config.epochs, minibatch_rows=config.minibatch_rows)
        yield learner.summarise(buffer, env)
