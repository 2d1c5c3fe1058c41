"""Training a language model with one of Stable-Baselines3's algorithms, for comparison with those of `agents`."""

from collections.abc import Callable
from typing import Any, Literal

from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.utils import FloatSchedule

from agents.integrations.sb3.kl import SampledKL
from agents.integrations.sb3.policies import LMPolicy, policy_kwargs
from agents.integrations.sb3.vec_env import SB3VecEnv
from lmgym.env import TokenVectorEnv
from lmgym.policy import Policy

ALGORITHMS = {"ppo": PPO, "a2c": A2C}


class _AfterUpdate(BaseCallback):
    """Calls a function after each update: SB3 begins the next rollout then."""

    def __init__(self, function: Callable[[], object]):
        super().__init__()
        self.function = function

    def _on_rollout_start(self) -> None:
        self.function()

    def _on_step(self) -> bool:
        return True


def train_with_sb3(
    algorithm: Literal["ppo", "a2c"],
    policy: Policy,
    env: TokenVectorEnv,
    tokens: int,
    beta: float,
    seed: int,
    lr: float,
    after_update: Callable[[], object],
    **settings: Any,
) -> None:
    """Trains a policy in place, with a learning rate that decays linearly to 0.

    Other settings are SB3's defaults, except for the length of a rollout, which is that of a completion, and PPO's
    minibatches, which are a quarter of a rollout.

    Args:
        algorithm: "ppo" or "a2c".
        policy: has an adapter and a critic.
        env: made with kl="none" and autoreset_mode="SameStep".
        tokens: at most so many are sampled.
        beta: β of the sampled KL, in score per nat.
        seed: of SB3's random numbers.
        lr: learning rate at the start.
        after_update: called before the first update and after each but the last.
        **settings: of the algorithm.
    """
    view = SB3VecEnv(env)
    steps = settings.pop("n_steps", env.max_new_tokens)
    rollout = steps * env.num_envs
    if algorithm == "ppo":
        settings.setdefault("batch_size", max(2, rollout // 4))
    model = ALGORITHMS[algorithm](
        LMPolicy,
        view,
        policy_kwargs=policy_kwargs(policy, env),
        n_steps=steps,
        gamma=1.0,
        learning_rate=FloatSchedule(lambda left: lr * left),
        seed=seed,
        device=policy.device,
        **settings,
    )
    if tokens >= rollout:
        callbacks = CallbackList([SampledKL(beta), _AfterUpdate(after_update)])
        model.learn(tokens // rollout * rollout, callback=callbacks)
