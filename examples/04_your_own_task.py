"""Your own task in plain Python: check it, register it, and train on it.

python examples/04_your_own_task.py
"""

from collections.abc import Sequence

import gymnasium as gym
import numpy as np

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from lmgym.tasks import Split, sample_in_split
from lmgym.tasks.grammar import opening
from lmgym.testing import check_task


class Brief(lmgym.Task):
    """Continue a review in exactly `words` words."""

    name = "brief"
    best = 1.0

    def __init__(self, words: int = 8):
        self.words = words

    def sample(self, rng: np.random.Generator, split: Split = "train") -> lmgym.Prompt:
        return sample_in_split(lambda: lmgym.Prompt(opening(rng)), split)

    def score(self, prompts: Sequence[lmgym.Prompt], completions: Sequence[lmgym.Completion]) -> list[float]:
        return [1 - min(1.0, abs(len(c.text.split()) - self.words) / self.words) for c in completions]


def main(updates: int = 20) -> None:
    check_task(Brief())
    if "you/Brief-v0" not in gym.registry:
        lmgym.register_task("you/Brief-v0", Brief, max_prompt_tokens=40, max_new_tokens=32)
    lm = lmgym.load("tiny")
    lm.adapters.add("policy")
    env = gym.make_vec("you/Brief-v0", num_envs=32, model=lm, kl="sampled", beta=0.02).unwrapped
    assert isinstance(env, lmgym.TokenVectorEnv)
    policy = lmgym.Policy(lm)
    learner = Learner(policy.parameters(), LearnerConfig(lr=3e-3))
    for update, metrics in enumerate(ppo.train(policy, env, learner, ppo.Config(updates=updates))):
        if update % 5 == 0 or update == updates - 1:
            print(f"update {update:3}  score {metrics['score/mean']:.3f}  KL {metrics['kl/sequence_nats']:.2f} nats")
    for prompt, completion in list(zip(env.prompts, env.completions(), strict=True))[:3]:
        print(f"{len(completion.text.split())} words: {prompt.text}|{completion.text}")


if __name__ == "__main__":
    main()
