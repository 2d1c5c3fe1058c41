"""Memory stays flat over a long training."""

import resource

import pytest

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from lmgym.tasks import Sort

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]


def test_two_hundred_updates_take_no_more_memory_than_twenty() -> None:
    lm = lmgym.load("tiny")
    lm.adapters.add("policy", rank=4)
    policy = lmgym.Policy(lm)
    env = lmgym.TokenVectorEnv(16, task=Sort(), model=lm, max_new_tokens=12, kl="sampled")
    learner = Learner(policy.parameters(), LearnerConfig(lr=1e-4), seed=0)
    peaks = []
    for _ in ppo.train(policy, env, learner, ppo.Config(updates=200)):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert len(peaks) == 200
    assert peaks[-1] <= 1.02 * peaks[19]
