"""Stable-Baselines3's PPO: with one of its own networks, then with a language model and its KL to the reference.

python examples/05_stable_baselines3.py
"""

from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import lmgym
from agents.integrations.sb3 import LMPolicy, SampledKL, SB3VecEnv, policy_kwargs
from lmgym.exact import enumerate_tree, policy_logp
from lmgym.tasks.probe import Bandit


def main(steps: int = 8192) -> None:
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=16, alpha=32)
    policy = lmgym.Policy(lm)
    arguments: dict[str, Any] = {"max_prompt_tokens": 1, "max_new_tokens": 1, "kl": "none", "beta": 0.2}
    environment = lmgym.TokenVectorEnv(32, task=Bandit(), model=lm, autoreset_mode="SameStep", **arguments)
    env = VecMonitor(SB3VecEnv(environment))  # all 32 rows in one call
    # An episode's only score comes at its end: a discount below 1 would reduce it.
    settings: dict[str, Any] = {
        "gamma": 1.0,
        "n_steps": 4,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "seed": 0,
        "device": "cpu",
    }

    own = PPO("MultiInputPolicy", env, **settings)
    own.learn(steps)
    print(f"one of SB3's own networks, no KL: mean score {mean_score(own):.2f}; the best arm scores 1")

    model = PPO(LMPolicy, env, policy_kwargs=policy_kwargs(policy, env), **settings)
    model.learn(steps, callback=SampledKL())
    tree = enumerate_tree(environment, lmgym.Prompt("a"))
    objective = tree.objective(policy_logp(tree, policy.log_probs))
    print(f"a language model, β = 0.2: mean score {mean_score(model):.2f}")
    print(f"E[score] − β·KL for the prompt 'a': {objective:.3f}; no policy exceeds β log Z = {tree.optimum:.3f}")


def mean_score(model: PPO) -> float:
    """The mean score of the last 100 episodes of training."""
    return sum(float(episode["r"]) for episode in model.ep_info_buffer or ()) / len(model.ep_info_buffer or (0,))


if __name__ == "__main__":
    main()
