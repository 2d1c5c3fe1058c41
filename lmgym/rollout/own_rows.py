"""The rows of a rollout that this rank decodes and scores, and their exchange with the other ranks."""

import copy
import hashlib
from dataclasses import dataclass

import torch

from lmgym.env import TokenVectorEnv, part_of
from lmgym.ranks import Ranks, current, gather_blocks, same, shares
from lmgym.rollout.buffer import RolloutBuffer


@dataclass
class OwnRows:
    """A rank's block of rows: a part of environment and buffer, in their memory. For a single rank, they themselves.

    Attributes:
        ranks: the ranks.
        blocks: the rows of each rank.
        env: the environment of this rank's rows.
        buffer: the buffer of this rank's rows.
        whole_env: the whole environment.
        whole_buffer: the whole buffer.
    """

    ranks: Ranks
    blocks: list[slice]
    env: TokenVectorEnv
    buffer: RolloutBuffer
    whole_env: TokenVectorEnv
    whole_buffer: RolloutBuffer

    @classmethod
    def of(cls, env: TokenVectorEnv, buffer: RolloutBuffer, samples: int) -> "OwnRows":
        """The rows of this rank. Call it when environment and buffer were reset.

        Args:
            env: B rows.
            buffer: for B rows.
            samples: completions per prompt, which stay on one rank if there are enough prompts.

        Raises:
            ValueError: the ranks have different prompts.
        """
        ranks = current()
        if ranks.world == 1:
            return cls(ranks, [slice(0, env.num_envs)], env, buffer, env, buffer)
        texts = hashlib.sha256(repr([prompt.text for prompt in env.prompts]).encode("utf-8", "replace"))
        if not same(texts.hexdigest(), ranks):
            raise ValueError(
                f"the task {env.task.name!r} drew different prompts on different ranks: sample() may use no randomness "
                "but that of the generator that it is given"
            )
        blocks = shares(env.num_envs, ranks.world, samples)
        rows = blocks[ranks.rank]
        before = buffer.own_rows
        if before is None or before.whole_env is not env or before.blocks != blocks:
            before = cls(ranks, blocks, part_of(env, rows), copy.copy(buffer), env, buffer)
            buffer.own_rows = before
        before.env, before.buffer = part_of(env, rows, before.env), buffer.part(rows, before.buffer)
        return before

    @property
    def first(self) -> int:
        """The number of the first of these rows."""
        return self.blocks[self.ranks.rank].start

    def exchange(self, paid: bool) -> None:
        """Completes the texts, and what environment and buffer hold of them, by the rows of the other ranks.

        Args:
            paid: whether the rewards have been paid.
        """
        if self.ranks.world == 1:
            return
        env, buffer, prefix = self.whole_env, self.whole_buffer, self.buffer.frozen_prefix
        found = [env.tokens, env.length, env.finish, *env.state.chosen_under()]
        found += [buffer.logp, buffer.values, buffer.bootstrap]
        if buffer.sampling_mask is not None:
            found.append(buffer.sampling_mask)
        if paid:
            buffer.breakdown = {name: torch.zeros_like(buffer.score) for name in env.score.names}
            for name, column in self.buffer.breakdown.items():
                buffer.breakdown[name][self.blocks[self.ranks.rank]] = column
            found += [buffer.is_action, buffer.reference_logp, buffer.rewards, buffer.score, buffer.finish]
            found += buffer.breakdown.values()
        if prefix is not None and all(rows.stop > rows.start for rows in self.blocks):
            hidden = prefix.hidden.new_zeros(buffer.rows, *prefix.hidden.shape[1:])
            hidden[self.blocks[self.ranks.rank]] = prefix.hidden
            buffer.frozen_prefix = prefix._replace(hidden=hidden)
            found.append(hidden)
        gather_blocks(self.ranks, found, self.blocks)
        if paid:
            env.rewards.token_rewards.copy_(buffer.rewards)
            env.rewards.score.copy_(buffer.score)
