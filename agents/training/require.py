"""Checks of an algorithm's arguments. Each raises an error that says what to change."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lmgym.env import TokenVectorEnv
from lmgym.policy import Policy, TokenPolicy
from lmgym.reward import check_loss_estimator
from lmgym.rollout import check_agreement


def critic(policy: TokenPolicy, algorithm: str) -> None:
    """Raises unless the policy has a critic."""
    if policy.critic == "none":
        raise ValueError(
            f"{algorithm} needs a critic, but the policy has none: make it with Policy(lm, critic='head') "
            "(--critic head), or choose an algorithm without one: reinforce, rloo, grpo"
        )


def adapter(policy: TokenPolicy, what: str) -> tuple[Policy, str]:
    """The policy as an `lmgym.Policy`, and its adapter's name; raises unless it is one and has an adapter."""
    if not isinstance(policy, Policy) or policy.adapter is None:
        raise ValueError(f"{what} works on the adapter of an lmgym.Policy, but this policy has no adapter")
    return policy, policy.adapter


def kl(
    policy: TokenPolicy, env: TokenVectorEnv, algorithm: str, in_loss: str = "none", biased: tuple[str, ...] = ()
) -> None:
    """Raises if the algorithm cannot use the environment's KL, or if the KL estimator in the loss is wrong.

    Args:
        policy: the policy to train.
        env: the environment, which may pay a KL in the reward.
        algorithm: the algorithm's name.
        in_loss: the estimator in the algorithm's loss, or "none".
        biased: biased estimators that the algorithm uses on purpose.
    """
    if env.kl == "reference":
        raise ValueError(
            f"{algorithm} cannot use kl='reference': the environment then pays only the term β log π_ref, and the "
            "algorithm does not add the term −β log π. Make the environment with kl='sampled', which pays both, or "
            "with kl='none'"
        )
    if in_loss != "none":
        check_agreement(policy, env, pays_kl=True)
        if in_loss not in biased:
            check_loss_estimator(in_loss)
        if env.kl != "none":
            raise ValueError(
                f"{algorithm} has KL in its loss (kl_loss={in_loss!r}) and the environment pays it in the reward too "
                f"(kl={env.kl!r}): make the environment with kl='none', or set kl_loss to 'none'"
            )


def reference(policy: TokenPolicy, env: TokenVectorEnv) -> None:
    """Raises if the policy is its own reference, for a loss that compares the two."""
    check_agreement(policy, env, pays_kl=True)


def groups(rows: int, group: int, algorithm: str, least: int = 2) -> None:
    """Raises unless the rows divide into groups of at least `least`."""
    if group < least or rows % group:
        sizes = [size for size in range(least, rows + 1) if rows % size == 0]
        raise ValueError(
            f"{algorithm} compares {group} completions of each prompt, but {rows} rows do not divide into such "
            f"groups: choose a group of {', '.join(map(str, sizes)) or 'at least ' + str(least)}, or other rows"
        )


def pairs(rows: int, algorithm: str) -> None:
    """Raises unless the number of rows is even."""
    if rows % 2:
        raise ValueError(f"{algorithm} compares two completions of each prompt, so {rows} rows must be an even number")


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(map(repr, choices))}")


def in_range(
    settings: Any,
    *names: str,
    least: float | int = -math.inf,
    most: float | int = math.inf,
    above: float | int = -math.inf,
    below: float | int = math.inf,
) -> None:
    """Raises unless each value x is finite, least ≤ x ≤ most, and above < x < below.

    Args:
        settings: an object with the settings as attributes, such as a `Config`.
        names: the settings to check; None, which means that a setting is off, is allowed.
        least: inclusive lower bound.
        most: inclusive upper bound.
        above: exclusive lower bound.
        below: exclusive upper bound.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None or (least <= value <= most and above < value < below and math.isfinite(value)):
            continue
        bounds = (
            f"at least {least:g}" if least > -math.inf else "",
            f"above {above:g}" if above > -math.inf else "",
            f"at most {most:g}" if most < math.inf else "",
            f"below {below:g}" if below < math.inf else "",
        )
        raise ValueError(f"{name}={value!r} must be {' and '.join(filter(None, bounds)) or 'a finite number'}")


def gradients(parameters: Sequence[nn.Parameter], say: Callable[[str], object]) -> None:
    """Lets frozen parameters require gradients again, and says so: without it, a run would train only the rest."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    if frozen:
        say(
            f"{len(frozen)} of {len(parameters)} trained parameters had requires_grad=False, set from outside the "
            "learner (peft's disable_adapter() and set_adapter() do that): they are trained again. To use the base "
            "model, take lm.adapters.using(None)"
        )


def given(value: Any, name: str, algorithm: str, remedy: str) -> None:
    """Raises if an argument that the algorithm needs is None or empty."""
    if value is None or (hasattr(value, "__len__") and len(value) == 0):
        raise ValueError(f"{algorithm} needs {name}, but got none: {remedy}")


def something_to_learn(
    learned: Sequence[bool], what: str, max_tokens: int, say: Callable[[str], object] = lambda text: None
) -> None:
    """Says how many texts teach nothing, because their prompts alone fill the token budget; raises if all do.

    Args:
        learned: of each text, whether it has a token to learn.
        what: the texts, in words.
        max_tokens: the budget.
        say: receives the message.
    """
    wasted = len(learned) - sum(learned)
    found = f"{wasted} of {len(learned)} {what} have no token to learn within max_tokens={max_tokens}"
    remedy = "raise it, or shorten the prompts"
    if wasted and wasted == len(learned):
        raise ValueError(f"{found}: the prompts alone fill it; {remedy}")
    if wasted:
        say(f"{found} and are left out: the prompt alone fills it; {remedy}")
