"""Stable-Baselines3 on the token environments: for comparison, and for algorithms that are not written here.

SB3 trains on `gymnasium.make(...)` as it is, with networks of its own. This module adds what it cannot know:

- `SB3VecEnv`: all rows of a `TokenVectorEnv` in one batched call, where SB3's own DummyVecEnv steps them one by one.
- `LMPolicy`, `MaskableLMPolicy` and `LMQPolicy`: a language model with its adapter as the network of PPO and A2C, of
  sb3-contrib's MaskablePPO, and of DQN. SB3 gets the trained parameters alone, and never the language model as one of
  its modules: it cannot re-initialise it, switch its dropout on, move it, or hand all of it to an optimizer.
- `SampledKL`: a callback that pays the exact `−β (log π − log π_ref)`, which an environment alone cannot.

What SB3 costs: it knows steps and no sequences, so each action is scored with a pass over its whole prefix, and the KV
cache is of no use. The algorithms of `agents` score a whole sequence in one pass.

    env = SB3VecEnv(gym.make_vec("lmgym/Tree-v0", 64, model=lm, kl="none", autoreset_mode="SameStep"))
    model = PPO(LMPolicy, env, policy_kwargs=policy_kwargs(Policy(lm), env), n_steps=16, gamma=1.0, device=lm.device)
    model.learn(100_000, callback=SampledKL(beta=0.05))

`model.save(path)` writes adapter, critic and optimizer, not the base model. To go on, make the algorithm as before and
call `model.set_parameters(path)`. The adapter alone, for plain peft: `policy.save(folder)`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from jaxtyping import Bool, Float, Int
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn

from lmgym.env import Finish, TokenVectorEnv
from lmgym.models import Sequences, log_probs
from lmgym.policy import Policy
from lmgym.reward import FixedKL, KLController
from lmgym.rollout import check_agreement

if TYPE_CHECKING:
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
else:
    try:
        from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
    except ImportError:  # an extra: all but MaskableLMPolicy works without it
        MaskableActorCriticPolicy = None

Observation = Any
"""A dict of `input_ids` and `attention_mask`, [B, L], left-padded. Any, because SB3 declares a single tensor."""


# The environment ---------------------------------------------------------------------------------------------------

ROW_ATTRIBUTES = ("prompts", "prompt_ids", "prompt_mask", "tokens", "length", "finish")
ROW_METHODS = ("action_masks", "completions", "render")


class SB3VecEnv(VecEnv):
    """All rows of a `TokenVectorEnv` as an SB3 VecEnv: one batched call a step.

    Observations, rewards (float32 [B]) and dones (bool [B]) are NumPy, copied from the device once a step. `info` of
    a row holds what `TokenEnv` gives (`action_mask`, `reference_logp`, `finish_reason`, `score`, `scores`), and
    `TimeLimit.truncated`; where the row ended, it is of the text that ended, with `terminal_observation` beside it,
    and what belongs to the next text is in `reset_infos`. Episode statistics: wrap it in SB3's VecMonitor.

    Args:
        env: in torch or NumPy, made with `autoreset_mode="SameStep"`. It is stepped and reset through this view only.

    Raises:
        ValueError: the environment has another autoreset mode, is wrapped, or wants log-probabilities (`kl="sampled"`).
    """

    def __init__(self, env: gym.vector.VectorEnv):
        if not isinstance(env, TokenVectorEnv):
            raise ValueError(
                f"SB3VecEnv takes a TokenVectorEnv, not {type(env).__name__}: pass what gymnasium.make_vec gives, "
                "without wrappers, and wrap the SB3VecEnv in SB3's own (VecMonitor for episode statistics)"
            )
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the environment has autoreset_mode={env.autoreset_mode.value!r}, and SB3 expects that a row restarts "
                "in the step in which it ends: make it with autoreset_mode='SameStep'"
            )
        if env.kl == "sampled":
            raise ValueError(
                "kl='sampled' needs the log-probability of each action, and SB3 gives actions alone: make the "
                "environment with kl='none' and pass callback=SampledKL(beta), which pays the same, or kl='reference'"
            )
        self.env = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> dict[str, np.ndarray]:
        """Draws new prompts, with the seeds of `seed` and the prompts of `set_options({"prompt": ...})`, once."""
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        prompts = [options.get("prompt") for options in self._options]
        given = sum(prompt is not None for prompt in prompts)
        if 0 < given < self.num_envs:
            raise ValueError(
                f"set_options gives a prompt to {given} of {self.num_envs} rows: give one to each, or to none"
            )
        observation, infos = self.env.reset(seed=seeds, options={"prompt": prompts} if given else None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _infos_of_rows(infos, range(self.num_envs))
        return _arrays(observation)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Takes the actions of `step_async`, [B] token ids."""
        observation, rewards, terminated, truncated, infos = self.env.step(self._actions)
        terminated, truncated = _array(terminated), _array(truncated)
        dones = terminated | truncated
        rows = _infos_of_rows(infos, range(self.num_envs))
        if dones.any():
            ended = np.flatnonzero(dones).tolist()
            final = _arrays(infos["final_obs"]) if isinstance(infos["final_obs"], dict) else infos["final_obs"]
            for row, info in zip(ended, _infos_of_rows(infos["final_info"], ended), strict=True):
                self.reset_infos[row], rows[row] = rows[row], info
                last = {key: x[row] for key, x in final.items()} if isinstance(final, dict) else final[row]
                info["terminal_observation"] = {key: x.copy() for key, x in last.items()}
        for info, cut in zip(rows, (truncated & ~terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = cut
        # A copy of its own: SB3 adds the bootstrap value, and SampledKL the KL, to this array in place.
        return _arrays(observation), np.array(_array(rewards), np.float32), dones, rows

    def close(self) -> None:
        self.env.close()

    def action_masks(self) -> Bool[np.ndarray, "B V"]:
        """True where a token is allowed next."""
        return _array(self.env.action_masks())

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """One value a row: the row's own of `ROW_ATTRIBUTES`, else the environment's."""
        value = getattr(self.env, attr_name)
        return [value[row] if attr_name in ROW_ATTRIBUTES else value for row in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the environment, which all rows share.

        Raises:
            ValueError: for single rows.
        """
        self._all_rows(f"set_attr({attr_name!r})", indices)
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Calls a method once, and gives one value a row: the row's own of `ROW_METHODS`, else the same one.

        Raises:
            ValueError: a method that is about all rows, for single rows.
        """
        if method_name not in ROW_METHODS:
            self._all_rows(f"env_method({method_name!r})", indices)
        value = getattr(self.env, method_name)(*method_args, **method_kwargs)
        if method_name not in ROW_METHODS or value is None:
            return [value for _ in self._get_indices(indices)]
        value = _array(value) if isinstance(value, Tensor) else value
        return [value[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """False: there are no scalar environments that could be wrapped."""
        return [False for _ in self._get_indices(indices)]

    def _all_rows(self, what: str, indices: Any) -> None:
        if sorted(set(self._get_indices(indices))) != list(range(self.num_envs)):
            raise ValueError(f"{what} for rows {indices}: all rows share one environment, so leave indices out")


def _array(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {key: _array(value) for key, value in values.items()}


def _infos_of_rows(infos: Mapping[str, Any], rows: Iterable[int]) -> list[dict[str, Any]]:
    """The infos of single rows, as `TokenEnv` gives them, from either output form of `TokenVectorEnv`."""
    masks, finish = _array(infos["action_mask"]), _array(infos["finish_reason"])
    reference_logp, score = _array(infos["reference_logp"]), _array(infos["score"])
    scores = {name: _array(column) for name, column in infos["scores"].items() if not name.startswith("_")}
    return [
        {
            "action_mask": masks[row],
            "reference_logp": float(reference_logp[row]),
            "finish_reason": finish[row] if isinstance(finish[row], str) else Finish(int(finish[row])).text,
            "score": float(score[row]),
            "scores": {name: float(column[row]) for name, column in scores.items()},
        }
        for row in rows
    ]


def token_env(env: Any) -> TokenVectorEnv:
    """The `TokenVectorEnv` behind an SB3VecEnv, or behind SB3's own DummyVecEnv of a `TokenEnv` (of its first row).

    Raises:
        ValueError: there is none.
    """
    base: Any = env.unwrapped if isinstance(env, (VecEnv, gym.Env, gym.vector.VectorEnv)) else env
    if isinstance(base, TokenVectorEnv):
        return base
    if isinstance(base, SB3VecEnv):
        return base.env
    try:
        return base.get_attr("row")[0] if isinstance(base, VecEnv) else base.row
    except AttributeError:
        raise ValueError(f"{type(base).__name__} is no token environment: pass an SB3VecEnv, or a lmgym one") from None


# The language model as a network -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LMHandle:
    """How a policy reaches SB3: by reference. It is never copied, pickled, or registered as a module.

    Attributes:
        policy: language model, adapter, temperature and critic.
        action_mask: [T, V] True where the environment allows a token at that step.
    """

    policy: Policy
    action_mask: Bool[Tensor, "T V"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "LMHandle":
        return self

    def __reduce__(self) -> Any:
        # SB3 pickles policy_kwargs into its file. What is in the file is the parameters; the handle is made anew.
        return _no_handle, ()

    def read(self, observation: Observation, adapter: str | None) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B D"]]:
        """Logits of the next token and the last hidden state, differentiable, of texts that end at the right edge."""
        ids, mask = observation["input_ids"].long(), observation["attention_mask"].bool()
        width = max(1, int(mask.sum(1).max()))  # the columns left of it are padding in every row
        ids, mask = ids[:, -width:], mask[:, -width:]
        after = ids.new_zeros(len(ids), 1)  # the token to choose, which nobody reads
        logits, hidden = self.policy.lm.evaluate(Sequences(ids, mask, after, after == 0, self.action_mask[:1]), adapter)
        return logits[:, 0], hidden[:, 0]

    def constant_mask(self) -> Bool[Tensor, " V"]:
        """What is allowed at every step.

        Raises:
            ValueError: it differs between steps.
        """
        if bool((self.action_mask != self.action_mask[0]).any()):
            raise ValueError(
                "the environment allows different tokens at different steps (min_new_tokens), and an observation does "
                "not say which step it is: use MaskablePPO with MaskableLMPolicy, which is given the masks (and give "
                "them to predict(observation, action_masks=...)), or make the environment with min_new_tokens=0"
            )
        return self.action_mask[0]


def _no_handle() -> NoReturn:
    raise ValueError(
        "this file holds an adapter and a critic, not the language model that they belong to: make the algorithm as "
        "before, with policy_kwargs(policy, env), and read the file with model.set_parameters(path)"
    )


def policy_kwargs(policy: Policy, env: Any) -> dict[str, Any]:
    """What SB3's `policy_kwargs` must be for `LMPolicy`, `MaskableLMPolicy` or `LMQPolicy`.

    Args:
        policy: what is trained: its adapter and critic.
        env: the environment that it will act in, for its action masks; an SB3VecEnv, wrapped or not, or a lmgym one.

    Raises:
        ValueError: the policy cannot be trained by SB3, or disagrees with the environment.
    """
    environment = token_env(env)
    _check_policy(policy, environment)
    return {"handle": LMHandle(policy, environment.action_mask_table)}


def _check_policy(policy: Policy, env: TokenVectorEnv) -> None:
    policy.parameters()  # raises for a policy without an adapter
    if policy.keeps:
        raise ValueError(
            "the policy samples from the most probable tokens alone (top_k, top_p), and SB3's buffers do not hold "
            "which were kept, so that they could not be scored again: make it with top_k=0, top_p=1"
        )
    check_agreement(policy, env, pays_kl=True)


class _Trained(BasePolicy):
    """An SB3 policy whose registered parameters are the trained ones, and stay where the language model is."""

    handle: LMHandle

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # .to(), .cuda() and .half() all come through here; they would move the adapter away from its base model.
        lm = self.handle.policy.lm
        moved = fn(torch.zeros(1, device=lm.device))
        if moved.device != lm.device or moved.dtype != torch.float32:
            raise ValueError(
                f"the language model is on {lm.device} and SB3 would move its adapter to {moved.device} "
                f"({moved.dtype}): pass device={str(lm.device)!r} to the algorithm, or load the model there with "
                "lmgym.load(..., device=...)"
            )
        return self

    def _get_constructor_parameters(self) -> dict[str, Any]:
        spaces_ = {"observation_space": self.observation_space, "action_space": self.action_space}
        return spaces_ | {"lr_schedule": self._dummy_schedule, "handle": self.handle}


class _LMActorCritic(_Trained):
    """Actor and critic from a `Policy`: the same logits, masks, temperature and value head.

    SB3's own constructor is passed over, because it would make networks and initialise them.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        handle: LMHandle,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        if handle.policy.critic == "none":
            raise ValueError(
                "the policy has critic='none', and SB3's actor-critics need values: Policy(lm, critic='head')"
            )
        if optimizer_kwargs is None:
            optimizer_kwargs = {"eps": 1e-5} if optimizer_class is torch.optim.Adam else {}
        BasePolicy.__init__(
            self, observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        self.handle = handle
        self.use_sde = use_sde
        self.trained = nn.ParameterList(handle.policy.parameters())
        rate: Any = lr_schedule(1)
        make: Any = optimizer_class
        self.optimizer = make(self.trained, lr=rate, **optimizer_kwargs)

    def forward(
        self, obs: Observation, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, "B 1"], Float[Tensor, " B"]]:
        """Draws actions; gives them, the values, and log π(action) in nats."""
        logp, values = self._read(obs, action_masks)
        actions = self._distribution(logp).get_actions(deterministic=deterministic)
        return actions, values, logp.gather(1, actions[:, None])[:, 0]

    def evaluate_actions(
        self, obs: Observation, actions: Tensor, action_masks: Any = None
    ) -> tuple[Float[Tensor, "B 1"], Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Values, log π(action), and entropies in nats, differentiable."""
        logp, values = self._read(obs, action_masks)
        chosen = logp.gather(1, actions.long().reshape(-1, 1))[:, 0]
        # p·log p is 0 where a banned token has log-probability −∞.
        entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(1)
        return values, chosen, entropy

    def get_distribution(self, obs: Observation, action_masks: Any = None) -> Any:
        """The distribution of the next token."""
        return self._distribution(self._read(obs, action_masks)[0])

    def predict_values(self, obs: Observation) -> Float[Tensor, "B 1"]:
        """The critic's estimates."""
        policy = self.handle.policy
        _, hidden = self.handle.read(obs, policy.adapter if policy.critic == "head" else "value")
        return policy.value_head(hidden.float())

    def _predict(self, observation: Any, deterministic: bool = False, action_masks: Any = None) -> Tensor:
        return self.get_distribution(observation, action_masks).get_actions(deterministic=deterministic)

    def _read(self, obs: Observation, action_masks: Any) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B 1"]]:
        """log π over the vocabulary, −∞ for banned tokens, and the values."""
        policy = self.handle.policy
        logits, hidden = self.handle.read(obs, policy.adapter)
        if action_masks is None:
            allowed = self.handle.constant_mask()
        else:
            allowed = torch.as_tensor(action_masks, device=logits.device).bool().reshape(logits.shape)
        logp = log_probs(logits, policy.temperature, allowed)
        if policy.critic == "adapter":
            return logp, self.predict_values(obs)
        return logp, policy.value_head(hidden.float())

    def _distribution(self, logp: Tensor) -> CategoricalDistribution:
        return CategoricalDistribution(logp.shape[1]).proba_distribution(action_logits=logp)


class LMPolicy(_LMActorCritic, ActorCriticPolicy):
    """A language model as the actor and critic of PPO, A2C and SB3's other on-policy algorithms.

    Pass it as the algorithm's `policy`, with `policy_kwargs=policy_kwargs(policy, env)`, to which `optimizer_class`
    and `optimizer_kwargs` may be added.

    Raises:
        ValueError: the environment's action mask differs between steps, the policy has no critic, or the algorithm's
            device is not the language model's.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ):
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        self.handle.constant_mask()


class MaskableLMPolicy(_LMActorCritic, MaskableActorCriticPolicy or ActorCriticPolicy):
    """The same for sb3-contrib's MaskablePPO, which is given the environment's action masks at every step.

    Raises:
        ImportError: sb3-contrib is not installed.
        ValueError: as `LMPolicy`, but for the action mask.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ):
        if MaskableActorCriticPolicy is None:
            raise ImportError("MaskableLMPolicy needs sb3-contrib: pip install 'lmgym[sb3-contrib]'")
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)


class LMQNetwork(_Trained):
    """Q of every next token: a linear head on the last hidden state of the language model with one adapter.

    The head is zero at first: no opinion.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        handle: LMHandle,
        adapter: str,
        best_of_allowed: bool,
    ):
        super().__init__(observation_space, action_space)
        lm = handle.policy.lm
        self.handle = handle
        self.adapter = adapter
        self.best_of_allowed = best_of_allowed
        self.trained = nn.ParameterList(lm.adapter_parameters(adapter))
        self.head = nn.Linear(lm.hidden_size, lm.vocabulary, device=lm.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, obs: Observation) -> Float[Tensor, "B V"]:
        """Q of every token; −∞ for banned ones in a target network, whose only use is the best next action."""
        _, hidden = self.handle.read(obs, self.adapter)
        values = self.head(hidden.float())
        return self._allowed(values) if self.best_of_allowed else values

    def _allowed(self, values: Tensor) -> Tensor:
        return values.masked_fill(~self.handle.constant_mask(), -torch.inf)

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        return self._allowed(self(observation)).argmax(1)


class LMQPolicy(_Trained, DQNPolicy):
    """A language model as the Q-network of DQN.

    The target network is a real copy of what is trained: a second, frozen adapter on the same base, and a second head.
    SB3 would share one language model between the two, and the target would move with every step. DQN explores with
    uniform tokens, banned ones too, and learns what they earn; the greedy action and the target's maximum are among
    the allowed ones. The policy's temperature and critic are not used.

    Pass it as the algorithm's `policy`, with `policy_kwargs=policy_kwargs(policy, env)`.

    Raises:
        ValueError: the environment's action mask differs between steps, or the algorithm's device is not the model's.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        handle: LMHandle,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        handle.constant_mask()
        # As in _LMActorCritic, SB3's constructor is passed over: it would make networks of its own.
        BasePolicy.__init__(
            self, observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        lm, adapter = handle.policy.lm, cast(str, handle.policy.adapter)
        self.handle = handle
        lm.copy_adapter(adapter, f"{adapter}_target")
        networks: list[Any] = [
            LMQNetwork(observation_space, action_space, handle, name, best_of_allowed=name != adapter)
            for name in (adapter, f"{adapter}_target")
        ]
        self.q_net, self.q_net_target = networks
        self.q_net_target.requires_grad_(False)
        rate: Any = lr_schedule(1)
        make: Any = optimizer_class
        self.optimizer = make(self.q_net.parameters(), lr=rate, **self.optimizer_kwargs)


# The KL ------------------------------------------------------------------------------------------------------------


class SampledKL(BaseCallback):
    """Pays `−β (log π − log π_ref)` for every token, with SB3's algorithms as they are.

    The algorithm knows log π of the action it drew, the environment gives log π_ref of it in
    `info["reference_logp"]`. SB3 calls callbacks between the step and the buffer, and lets them see the rewards that
    it will store: they are changed in place. So it is with PPO, A2C, MaskablePPO and all of SB3's on-policy algorithms.
    Episode statistics (VecMonitor's) were taken before, and stay the task's scores.

    Records `kl/sequence_nats` (k1 summed over the tokens of a completion, mean over those that ended in the rollout)
    and `kl/beta`.

    Args:
        beta: β in score per nat, or a controller such as `AdaptiveKL`, updated after every rollout; None takes the
            environment's own.

    Raises:
        ValueError: when training starts: the algorithm has no log-probabilities, the environment pays a KL of its own,
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
                "VecNormalize scales the rewards before SampledKL adds to them, and β would mean something else: "
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
