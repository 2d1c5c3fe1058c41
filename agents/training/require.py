"""What an algorithm needs of what it is given; where that is missing, an error that says what to change."""

import math
from collections.abc import Iterable
from typing import Any

from lmgym.env import TokenVectorEnv
from lmgym.policy import Policy, TokenPolicy
from lmgym.reward import check_loss_estimator
from lmgym.rollout import check_agreement


def critic(policy: TokenPolicy, algorithm: str) -> None:
    """Refuses a policy without values."""
    if policy.critic == "none":
        raise ValueError(
            f"{algorithm} needs a critic and the policy has none: make it with Policy(lm, critic='head') "
            "(--critic head), or take an algorithm without one: reinforce, rloo, grpo"
        )


def adapter(policy: TokenPolicy, what: str) -> tuple[Policy, str]:
    """The policy as a language model with an adapter, and the adapter's name."""
    if not isinstance(policy, Policy) or policy.adapter is None:
        raise ValueError(f"{what} works on the adapter of an lmgym.Policy, and this policy has none")
    return policy, policy.adapter


def kl(
    policy: TokenPolicy, env: TokenVectorEnv, algorithm: str, in_loss: str = "none", biased: tuple[str, ...] = ()
) -> None:
    """Refuses KL forms that an algorithm cannot use, and estimators that are wrong where they stand.

    Args:
        policy: what is trained.
        env: pays KL in the reward, or not.
        algorithm: its name.
        in_loss: the estimator in the algorithm's loss, or "none".
        biased: estimators that the algorithm has on purpose, though they are biased.
    """
    if env.kl == "reference":
        raise ValueError(
            f"{algorithm} cannot use kl='reference': the environment pays β log π_ref, and nothing here pays the other "
            "half, −β log π. Make the environment with kl='sampled', which pays both, or kl='none'"
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
    """Refuses a policy that is its own reference, where the loss compares the two."""
    check_agreement(policy, env, pays_kl=True)


def groups(rows: int, group: int, algorithm: str, least: int = 2) -> None:
    """Refuses groups that do not fill the batch."""
    if group < least or rows % group:
        sizes = [size for size in range(least, rows + 1) if rows % size == 0]
        raise ValueError(
            f"{algorithm} compares {group} completions of each prompt, and {rows} rows are no whole number of such "
            f"groups: choose a group of {', '.join(map(str, sizes)) or 'at least ' + str(least)}, or other rows"
        )


def pairs(rows: int, algorithm: str) -> None:
    """Refuses a batch that does not split into pairs."""
    if rows % 2:
        raise ValueError(f"{algorithm} compares two completions of each prompt: {rows} rows must be an even number")


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a setting that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(map(repr, choices))}")


def in_range(
    name: str,
    value: int | float,
    least: int | float = -math.inf,
    most: int | float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Refuses a number outside a range.

    Args:
        name: of the setting.
        value: an int or a float; NaN is in no range, and ±∞ is refused too.
        least: its smallest value.
        most: its largest value.
        above: whether `least` itself is excluded.
        below: whether `most` itself is excluded.

    Raises:
        ValueError: it names the setting, its value and the range.
    """
    # Comparisons and not isfinite(), which fails for an integer beyond the floats.
    fits = (value > least if above else value >= least) and (value < most if below else value <= most)
    if fits and -math.inf < value < math.inf:
        return
    lower = "" if least == -math.inf else f"above {least:g}" if above else f"at least {least:g}"
    upper = "" if most == math.inf else f"below {most:g}" if below else f"at most {most:g}"
    raise ValueError(f"{name}={value!r} must be {' and '.join(filter(None, (lower, upper))) or 'finite'}")


def given(value: Any, name: str, algorithm: str, remedy: str) -> None:
    """Refuses to go on without what only the caller can give."""
    if value is None or (hasattr(value, "__len__") and len(value) == 0):
        raise ValueError(f"{algorithm} needs {name}, and none are given: {remedy}")
