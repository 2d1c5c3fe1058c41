"""A language model with its adapter as the network of Stable-Baselines3's policies."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from gymnasium import spaces
from jaxtyping import Float, Int
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn

from lmgym.env import TokenVectorEnv
from lmgym.policy import Policy
from lmgym.rollout import check_agreement
from lmgym.sampling import log_probs

if TYPE_CHECKING:
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
else:
    try:
        from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
    except ImportError:  # an extra: all but MaskableLMPolicy works without it
        MaskableActorCriticPolicy = None
from agents.integrations.sb3.handle import LMHandle, Observation
from agents.integrations.sb3.vec_env import token_env


def policy_kwargs(policy: Policy, env: Any) -> dict[str, Any]:
    """The value of SB3's `policy_kwargs` for `LMPolicy`, `MaskableLMPolicy` or `LMQPolicy`.

    Args:
        policy: its adapter and critic are trained.
        env: the environment in which it acts, for its action masks: an SB3VecEnv, wrapped or not, or one of lmgym.

    Raises:
        ValueError: the policy cannot be trained by SB3, or disagrees with the environment.
    """
    environment = token_env(env)
    _check_policy(policy, environment)
    return {"handle": LMHandle(policy, environment.action_mask_table, environment.state.reads_text)}


def _check_policy(policy: Policy, env: TokenVectorEnv) -> None:
    policy.parameters()  # raises for a policy without an adapter
    if policy.truncates:
        raise ValueError(
            "the policy samples only from the most probable tokens (top_k, top_p), and SB3's buffers do not store "
            "which tokens those were, so the actions cannot be scored again: make it with top_k=0, top_p=1"
        )
    check_agreement(policy, env, pays_kl=True)


class _Trained(BasePolicy):
    """An SB3 policy whose registered parameters are the trained ones, and stay on the language model's device."""

    handle: LMHandle

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # .to(), .cuda() and .half() all call this; they would move the adapter away from its base model.
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

    SB3's own constructor is not called, because it would make networks and initialise them.
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
        """Samples actions; returns them, the values, and log π(action) in nats."""
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
    """The same for sb3-contrib's MaskablePPO, which gets the environment's action masks at every step.

    Raises:
        ImportError: sb3-contrib is not installed.
        ValueError: as for `LMPolicy`, except for the action mask.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ):
        if MaskableActorCriticPolicy is None:
            raise ImportError("MaskableLMPolicy needs sb3-contrib: pip install 'lmgym[sb3-contrib]'")
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)


class LMQNetwork(_Trained):
    """Q of every next token: a linear head on the last hidden state of the language model with one adapter.

    The head is initialised to zero, so that all Q are 0.
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
        self.trained = nn.ParameterList(lm.adapters.parameters(adapter))
        self.head = nn.Linear(lm.hidden_size, lm.vocabulary, device=lm.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, obs: Observation) -> Float[Tensor, "B V"]:
        """Q of every token; −∞ for banned ones in a target network, which is only used for the maximum."""
        _, hidden = self.handle.read(obs, self.adapter)
        values = self.head(hidden.float())
        return self._allowed(values) if self.best_of_allowed else values

    def _allowed(self, values: Tensor) -> Tensor:
        return values.masked_fill(~self.handle.constant_mask(), -torch.inf)

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        return self._allowed(self(observation)).argmax(1)


class LMQPolicy(_Trained, DQNPolicy):
    """A language model as the Q-network of DQN.

    The target network is a copy of what is trained: a second, frozen adapter on the same base, and a second head. SB3
    alone would share one language model between the two, and the target would change with every step. DQN explores
    with uniform tokens, including banned ones, and learns their value; the greedy action and the target's maximum are
    taken over the allowed tokens. The policy's temperature and critic are not used.

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
        lm.adapters.copy(adapter, f"{adapter}_target")
        networks: list[Any] = [
            LMQNetwork(observation_space, action_space, handle, name, best_of_allowed=name != adapter)
            for name in (adapter, f"{adapter}_target")
        ]
        self.q_net, self.q_net_target = networks
        self.q_net_target.requires_grad_(False)
        rate: Any = lr_schedule(1)
        make: Any = optimizer_class
        self.optimizer = make(self.q_net.parameters(), lr=rate, **self.optimizer_kwargs)
