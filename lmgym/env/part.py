"""Some rows of an environment as an environment of its own, for a process that works on its share of the rows."""

import copy

from lmgym.env.vector import TokenVectorEnv


def part_of(env: TokenVectorEnv, rows: slice, before: TokenVectorEnv | None = None) -> TokenVectorEnv:
    """An environment of some rows, in the same memory: what is written to it is in the whole environment too.

    It is for the bulk path: `append`, then `pay_rewards`. Everything else, a reset above all, is for the whole one, and
    makes a part stale.

    Args:
        env: the whole environment.
        rows: which rows.
        before: an earlier part of the same rows, which is brought up to date; CUDA graphs are bound to it.
    """
    part = before or copy.copy(env)
    state = env.state.part(rows)
    own = {name: getattr(state, name) for name in ("prompt_ids", "prompt_mask", "tokens", "length", "finish")}
    part.__dict__.update(env.__dict__, num_envs=state.rows, state=state, rewards=env.rewards.part(rows), **own)
    return part
