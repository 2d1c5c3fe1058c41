"""Stable-Baselines3 trains on the environments as they are.

python examples/05_stable_baselines3.py
"""

import gymnasium as gym
import numpy as np
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.evaluation import evaluate_policy

import lmgym  # registers the environments


def main(steps: int = 4096) -> None:
    env = gym.make("lmgym/Bandit-v0", kl="none")
    print(f"lmgym {lmgym.__version__}: the bandit's best arm scores 1.0, a random one about 0.3")
    # An episode's only reward comes at its end: a discount below 1 would shrink it.
    for model in (
        PPO("MultiInputPolicy", env, gamma=1.0, n_steps=256, batch_size=64, learning_rate=3e-3, seed=0, device="cpu"),
        A2C("MultiInputPolicy", env, gamma=1.0, n_steps=64, learning_rate=3e-3, seed=0, device="cpu"),
    ):
        model.learn(steps)
        mean, _ = evaluate_policy(model, env, n_eval_episodes=50, warn=False)
        print(f"{type(model).__name__}: mean score {np.mean(mean):.2f} after {steps} steps")


if __name__ == "__main__":
    main()
