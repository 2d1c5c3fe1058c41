"""`SampledKL`: the callback that pays the sampled KL to Stable-Baselines3's algorithms."""

from typing import cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from agents.integrations.sb3.policies import _check_policy, _Trained
from agents.integrations.sb3.vec_env import token_env
from lmgym.reward import FixedKL, KLController


class SampledKL(BaseCallback):
    """Adds `−β (log π − log π_ref)` to the reward of every token, with SB3's own algorithms.

    The algorithm knows log π of the action that it sampled; the environment gives log π_ref in
    `info["reference_logp"]`. SB3 calls callbacks between the step and the buffer and passes them the rewards that it
    will store; they are changed in place. This holds for PPO, A2C, MaskablePPO and all on-policy algorithms of SB3.
    Episode statistics (of VecMonitor) are computed before, so they remain the task's scores.

    Records `kl/sequence_nats` (k1 summed over the tokens of a completion, mean over those that ended in the rollout)
    and `kl/beta`.

    Args:
        beta: β in score per nat, or a controller such as `AdaptiveKL`, updated after every rollout; None takes the
            environment's own.

    Raises:
        ValueError: when training starts: the algorithm has no log-probabilities, the environment pays KL itself,
            policy and environment disagree, or rewards are normalised.
    """

    def __init__(self, beta: float | KLController | None = None, verbose: int = 0):
        super().__init__(verbose)
        self.controller = FixedKL(float(beta)) if isinstance(beta, (int, float)) else beta
        self._running = np.zeros(0, np.float32)
        self._ended: list[float] = []

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise ValueError(
                f"{type(self.model).__name__} has no log-probabilities of its actions, which SampledKL needs: make the "
                "environment with kl='reference', whose reward any algorithm can use"
            )
        env = token_env(self.training_env)
        if env.kl != "none":
            raise ValueError(
                f"the environment pays kl={env.kl!r} itself, and SampledKL would pay it again: make it with kl='none'"
            )
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_reward:
            raise ValueError(
                "VecNormalize scales the rewards before SampledKL adds KL, which changes the meaning of β: use "
                "VecNormalize(..., norm_reward=False)"
            )
        if isinstance(self.model.policy, _Trained):
            _check_policy(self.model.policy.handle.policy, env)
        self.controller = self.controller or env.kl_controller

    def _on_training_start(self) -> None:
        self._running = np.zeros(self.training_env.num_envs, np.float32)

    def _on_step(self) -> bool:
        logp: Tensor = self.locals["log_probs"]
        reference_logp = np.array([info["reference_logp"] for info in self.locals["infos"]], np.float32)
        kl = logp.detach().float().cpu().numpy().reshape(-1) - reference_logp
        rewards: np.ndarray = self.locals["rewards"]
        rewards -= self._beta.beta * kl
        self._running += kl
        dones: np.ndarray = self.locals["dones"]
        self._ended += self._running[dones].tolist()
        self._running[dones] = 0.0
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record("kl/beta", self._beta.beta)
        if self._ended:
            mean = float(np.mean(self._ended))
            self.logger.record("kl/sequence_nats", mean)
            self._beta.update(mean, len(self._ended))
        self._ended = []

    @property
    def _beta(self) -> KLController:
        return cast(KLController, self.controller)
