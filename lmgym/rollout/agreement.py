"""Whether a policy and an environment agree about temperature, vocabulary and reference."""

from lmgym.env import TokenVectorEnv
from lmgym.policy import Policy, TokenPolicy


def check_agreement(policy: TokenPolicy, env: TokenVectorEnv, pays_kl: bool | None = None) -> None:
    """Refuses a policy whose samples the environment would reward wrongly.

    Args:
        policy: chooses the tokens.
        env: pays the rewards.
        pays_kl: whether KL is part of the reward; None takes it from `env.kl`.

    Raises:
        ValueError: temperature or vocabulary differ, or KL is paid and the policy is its own reference.
    """
    if policy.temperature != env.reference.temperature:
        raise ValueError(
            f"the policy samples at temperature {policy.temperature} and the environment measures its reference at "
            f"{env.reference.temperature}: make the environment with temperature={policy.temperature}"
        )
    if not isinstance(policy, Policy):
        return
    pays_kl = env.kl != "none" if pays_kl is None else pays_kl
    if policy.lm is env.model and policy.adapter == env.reference.adapter and pays_kl:
        raise ValueError(
            f"the policy (adapter {policy.adapter!r}) is its own reference, and KL would read as 0: give the policy an "
            "adapter of its own, lm.adapters.add('policy'), or make the environment with kl='none', or with another "
            "reference_adapter"
        )
    if policy.lm.vocabulary != env.model.vocabulary or policy.lm.eos_ids != env.model.eos_ids:
        raise ValueError(
            f"the policy's model {policy.lm.name!r} and the environment's {env.model.name!r} have different "
            "vocabularies: build both on one LanguageModel"
        )
