"""Stable-Baselines3 on the token environments: for comparison, and for algorithms that this package does not have.

SB3 trains on `gymnasium.make(...)` without changes, with its own networks. This module adds what it lacks:

- `SB3VecEnv`: all rows of a `TokenVectorEnv` in one batched call, where SB3's own DummyVecEnv steps them one by one.
- `LMPolicy`, `MaskableLMPolicy` and `LMQPolicy`: a language model with its adapter as the network of PPO and A2C, of
  sb3-contrib's MaskablePPO, and of DQN. SB3 gets only the trained parameters, and never the language model as one of
  its modules: it cannot re-initialise it, enable its dropout, move it, or pass all of it to an optimizer.
- `SampledKL`: a callback that pays the exact `−β (log π − log π_ref)`, which an environment alone cannot.

The cost of SB3: it knows steps and not sequences, so each action is scored with a pass over its whole prefix, without a
KV cache. The algorithms of `agents` score a whole sequence in one pass.

    env = SB3VecEnv(gym.make_vec("lmgym/Tree-v0", 64, model=lm, kl="none", autoreset_mode="SameStep"))
    model = PPO(LMPolicy, env, policy_kwargs=policy_kwargs(Policy(lm), env), n_steps=16, gamma=1.0, device=lm.device)
    model.learn(100_000, callback=SampledKL(beta=0.05))

`model.save(path)` writes adapter, critic and optimizer, not the base model. To continue training, make the algorithm as
before and call `model.set_parameters(path)`. To save only the adapter, for plain peft: `policy.save(folder)`.
"""

from agents.integrations.sb3.handle import LMHandle
from agents.integrations.sb3.kl import SampledKL
from agents.integrations.sb3.policies import LMPolicy, LMQNetwork, LMQPolicy, MaskableLMPolicy, policy_kwargs
from agents.integrations.sb3.training import train_with_sb3
from agents.integrations.sb3.vec_env import SB3VecEnv, token_env

__all__ = [
    "LMHandle",
    "LMPolicy",
    "LMQNetwork",
    "LMQPolicy",
    "MaskableLMPolicy",
    "SB3VecEnv",
    "SampledKL",
    "policy_kwargs",
    "token_env",
    "train_with_sb3",
]
