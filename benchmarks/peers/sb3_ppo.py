"""Stable-Baselines3's PPO on the token environment as `gymnasium.make` gives it: scalar environments, one by one.

SB3 has no concept of sequences, only of steps: its policy reads the whole text again for every token, in the rollout
and in every epoch. The policy is `LMPolicy` of agents.integrations.sb3, the same adapter and value head on
the same model, with the forward pass of transformers, as for a user of SB3. The environment is unchanged.

An iteration takes more than a minute, and its time is proportional to the number of texts. So only a share of the texts
is sampled, each to its end, and used for learning; the reported time is multiplied accordingly.
"""

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

import lmgym
from agents.integrations.sb3 import LMPolicy, policy_kwargs
from benchmarks.ours import FOREVER, Prompts, build
from benchmarks.worker import BETA, LR, Turn
from lmgym.reward import RewardModel

SHARE = 4
"""The contender samples and learns from one of this many completions."""
TRANSITIONS = 256
"""Transitions per minibatch: all 3,072 texts of up to 64 tokens at the same time would need several gigabytes."""


class RolloutEnds(BaseCallback):
    """Ends the turn after every iteration, that is before the next rollout begins."""

    def __init__(self, turn: Turn):
        super().__init__()
        self.turn = turn
        self.iterations = 0
        self.collected = 0.0

    def _on_rollout_start(self) -> None:
        if self.iterations:
            now = self.turn.clock()
            phases = {"collect": self.collected - self.began, "update": now - self.collected}
            self.turn.done({name: SHARE * x for name, x in phases.items()}, times=SHARE)
        self.iterations += 1
        self.began = self.turn.clock()

    def _on_rollout_end(self) -> None:
        self.collected = self.turn.clock()

    def _on_step(self) -> bool:
        return True


def main() -> None:
    """One PPO iteration on a share of the rows per turn."""
    turn = Turn()
    job = turn.job()
    policy = build(job)
    policy.lm.fast = False
    model = lmgym.load(job.part("policy"), device=job.device, dtype=job.dtype)
    prompts = job.prompts()
    lmgym.register_task("benchmarks/Prompts-v0", lambda: Prompts([model.text.decode(ids) for ids in prompts]))
    reward = RewardModel.load(job.part("reward"))

    def make() -> gym.Env:
        return gym.make(
            "benchmarks/Prompts-v0", model=model, score=reward, beta=BETA, max_prompt_tokens=len(prompts[0]),
            max_new_tokens=job.new_tokens,
        )  # fmt: skip

    env = DummyVecEnv([make] * (job.rows // SHARE))
    algorithm = PPO(
        LMPolicy, env, policy_kwargs=policy_kwargs(policy, env), n_steps=job.new_tokens, batch_size=TRANSITIONS,
        n_epochs=job.epochs, learning_rate=LR, gamma=1.0, device=job.device, seed=0,
    )  # fmt: skip
    turn.ready()
    algorithm.learn(FOREVER, callback=RolloutEnds(turn))


if __name__ == "__main__":
    main()
