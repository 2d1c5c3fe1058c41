"""Decoding a batch: a policy writes a completion in every row of an environment."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmgym.devices import host_reads_are_free
from lmgym.env import Finish, TokenVectorEnv
from lmgym.io import report_progress
from lmgym.models import Decoding
from lmgym.policy import Policy, SelectingPolicy, TokenPolicy
from lmgym.rollout.agreement import check_agreement
from lmgym.rollout.buffer import RolloutBuffer
from lmgym.rollout.cuda_graph import CapturedLoop, unsupported_reason
from lmgym.rollout.own_rows import OwnRows
from lmgym.rollout.stream import Stream
from lmgym.sampling import packed_width
from lmgym.tasks.base import Prompt

CHECK_INTERVAL = 8
"""Steps between two checks which rows still run. Each check synchronises with the device, or searches stop strings."""
CHECK_INTERVAL_NO_SYNC = 2
"""The same on a device that needs no synchronisation, for an environment without stop strings."""


@torch.inference_mode()
def decode(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    buffer: RolloutBuffer,
    stream: Stream,
    prompts: Sequence[Prompt | str] | None = None,
    compact: bool = True,
    slots: int = 0,
) -> None:
    """Writes a completion in every row of the environment, and log-probabilities and values into the buffer.

    It is an environment loop: start, act, append, advance. The policy's KV cache is its hidden state. The loop
    synchronises with the device only once every `CHECK_INTERVAL` steps, to read which rows are still running. Each row
    has its own random numbers, so its tokens depend neither on the other rows nor on when they leave the batch.

    Args:
        policy: chooses the tokens.
        env: B rows.
        buffer: for B rows; overwritten.
        stream: the random numbers of prompts and tokens.
        prompts: one for each row, used instead of drawing them.
        compact: whether rows that have ended leave the batch.
        slots: the number of rows that are decoded at a time (continuous batching): when a row ends, the next one takes
            its slot. 0 decodes all rows together. Fewer slots need less memory, and keep the batch full when
            completions differ much in length.
    """
    decode_own_rows(policy, env, buffer, stream, prompts, compact, slots).exchange(paid=False)


@torch.inference_mode()
def decode_own_rows(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    buffer: RolloutBuffer,
    stream: Stream,
    prompts: Sequence[Prompt | str] | None = None,
    compact: bool = True,
    slots: int = 0,
) -> OwnRows:
    """The same, for the rows of this rank alone; returns them. Whoever calls it has them exchanged."""
    check_agreement(policy, env)
    if isinstance(policy, Policy):
        policy.reserve_tokens = env.max_new_tokens
    env.reset(seed=stream.prompt_seeds(buffer.rows), options=None if prompts is None else {"prompt": list(prompts)})
    buffer.clear(packed_width(env.model.vocabulary) if policy.truncates else 0)
    own = OwnRows.of(env, buffer, stream.samples)
    if own.buffer.rows:
        uniforms = stream.uniforms(own.buffer.rows, env.max_new_tokens, policy.device, own.first)
        _decode(_Batch(policy, own.env, own.buffer, uniforms), stream.samples, compact, slots)
    return own


def _decode(batch: "_Batch", samples: int, compact: bool, slots: int) -> None:
    policy, env, buffer = batch.policy, batch.env, batch.buffer
    if slots and slots < buffer.rows:
        if not isinstance(policy, SelectingPolicy) or env.on_limit == "truncate":
            raise ValueError(
                "slots needs a policy with select() and replace_rows(), and on_limit='terminate': decode all rows "
                "together"
            )
        if batch.refill(slots):
            return
    if unsupported_reason(policy, env) is None:
        batch.replay(compact, samples)
    else:
        batch.lockstep(compact, samples)


class _Batch:
    """Rows that are decoded together.

    Attributes:
        rows: [R] the environment's rows in this batch; None while it holds all of them, in order.
    """

    def __init__(self, policy: TokenPolicy, env: TokenVectorEnv, buffer: RolloutBuffer, uniforms: Tensor):
        self.policy, self.env, self.buffer, self.uniforms = policy, env, buffer, uniforms
        self.rows: Tensor | None = None
        self.decoding: Any = None
        self.tokens = 0  # chosen so far
        self.check_every = (
            CHECK_INTERVAL_NO_SYNC if host_reads_are_free(policy.device) and not env.stop else CHECK_INTERVAL
        )

    def lockstep(self, compact: bool, samples: int) -> None:
        """All rows take their t-th step together."""
        env, policy = self.env, self.policy
        self.decoding = self._start(samples)
        for t in range(env.max_new_tokens):
            token = self._act(t)
            last = t + 1 == env.max_new_tokens
            if (t + 1) % self.check_every == 0 and not last:
                running = env.running_rows()
                if not running:
                    break
                # Compacting copies the cache, so it has to remove a good part of the rows.
                count = env.num_envs if self.rows is None else len(self.rows)
                if compact and len(running) <= 0.8 * count and isinstance(policy, SelectingPolicy):
                    token = self._leave(running, token)
            if not last or env.on_limit == "truncate":  # truncated rows are bootstrapped from the state after the end
                self.decoding = policy.advance(self.decoding, token)
        self._end()

    def replay(self, compact: bool, samples: int) -> None:
        """The same, replaying a CUDA graph at each step. Each batch size (all rows, half ...) has its own graph."""
        env, policy, buffer = self.env, self.policy, self.buffer
        assert isinstance(policy, Policy)
        loop = buffer.loop
        if loop is None or loop.policy is not policy or loop.env is not env:
            loop = buffer.loop = CapturedLoop(policy, env, buffer)
        loop.begin(self._start(samples), self.uniforms)
        self.decoding, self.rows = loop.decoding, loop.rows
        for t in range(env.max_new_tokens):
            loop.step()
            if (t + 1) % CHECK_INTERVAL or t + 1 == env.max_new_tokens:
                continue
            self._report(t + 1, CHECK_INTERVAL * len(self.uniforms if self.rows is None else self.rows))
            running = env.running_rows()
            if not running:
                break
            if compact:
                self._store_frozen_prefix()
                loop.leave(running)
                self.decoding, self.rows = loop.decoding, loop.rows
        self._end()

    def _end(self) -> None:
        """Stores what the remaining rows leave: the frozen prefix, and the bootstrap values of truncated rows."""
        env, policy = self.env, self.policy
        self._report(env.max_new_tokens, 0)
        self._store_frozen_prefix()
        if env.on_limit == "truncate":
            rows = slice(None) if self.rows is None else self.rows
            end = policy.act(self.decoding, self.uniforms[rows, 0], env.action_mask_table[-1])
            self.buffer.bootstrap[rows] = end.value

    def refill(self, slots: int) -> bool:
        """Continuous batching: waiting rows take the slots of rows that have ended, so rows are at different steps.

        Returns:
            False, without having decoded anything, if the policy's cache does not support it.
        """
        env, policy, device = self.env, self.policy, self.policy.device
        assert isinstance(policy, SelectingPolicy)
        ids, mask = env.prompt_block()
        self.rows = torch.arange(slots, device=device)
        self.decoding = policy.start(ids[:slots], mask[:slots])
        restarts = not isinstance(self.decoding, Decoding) or self.decoding.replaceable
        if not restarts or policy.select(self.decoding, self.rows[:1]) is None:
            self.rows = None
            return False
        waiting, began = list(range(slots, env.num_envs)), [0] * slots
        for step in itertools.count(1):
            token = self._act(None)
            # A row at its budget must leave immediately: it may be at the model's last position.
            full = any(step - start == env.max_new_tokens for start in began)
            self.decoding = policy.advance(self.decoding, token)
            if step % self.check_every and not full:
                continue
            running = set(env.running_rows())
            ended = [slot for slot, row in enumerate(self.rows.tolist()) if row not in running]
            if not ended:
                continue
            self._store_frozen_prefix()
            joining, waiting = waiting[: len(ended)], waiting[len(ended) :]
            if joining:
                places, new = (torch.tensor(x, device=device) for x in (ended[: len(joining)], joining))
                self.decoding = policy.replace_rows(self.decoding, places, policy.start(ids[new], mask[new]))
                self.rows = self.rows.index_copy(0, places, new)
                for slot in ended[: len(joining)]:
                    began[slot] = step
            gone = set(ended[len(joining) :])
            stay = [slot for slot in range(len(began)) if slot not in gone]
            if not stay:
                return True
            if gone:
                index = torch.tensor(stay, device=device)
                self.decoding, self.rows = policy.select(self.decoding, index), self.rows[index]
                began = [began[slot] for slot in stay]
        raise AssertionError  # itertools.count does not end

    def _start(self, samples: int) -> Any:
        """Reads the prompts; the prompt of a group is read once."""
        ids, mask = self.env.prompt_block()
        policy, prompts = self.policy, self.env.prompts
        rows = len(prompts)
        grouped = all(_reads_the_same(prompts[i], prompts[i - i % samples]) for i in range(rows))
        if samples > 1 and rows % samples == 0 and grouped and isinstance(policy, SelectingPolicy):
            decoding = policy.start(ids[::samples], mask[::samples])
            copies = torch.arange(rows, device=policy.device) // samples
            copied = policy.select(decoding, copies)
            if copied is not None:
                return copied
        return policy.start(ids, mask)

    def _act(self, t: int | None) -> Tensor:
        """Chooses a token in each row, and stores its log-probability and value; `t` is the common step, if any."""
        env, buffer, rows = self.env, self.buffer, self.rows
        if t is None:
            assert rows is not None
            at: Any = (rows, env.length[rows].clamp(max=env.max_new_tokens - 1))
            allowed = env.action_mask_table[at[1]] if env.min_new_tokens else env.action_mask_table[0]
        else:
            at = (slice(None) if rows is None else rows, t)
            allowed = env.action_mask_table[t]
        if env.state.reads_text:
            allowed = env.state.action_mask(rows)
        running = env.finish[rows] == Finish.RUNNING if t is None else None
        action = self.policy.act(self.decoding, self.uniforms[at], allowed)
        for store, new in (
            (buffer.logp, action.logp),
            (buffer.values, action.value),
            (buffer.sampling_mask, action.sampling_mask),
        ):
            if store is not None and new is not None:
                if running is not None:  # a slot whose row has ended must not overwrite the row's last token
                    new = torch.where(running.view(-1, *[1] * (new.ndim - 1)), new, store[at])
                store[at] = new
        env.append(action.token, rows)
        self._report(self.tokens // env.num_envs if t is None else t + 1, len(action.token))
        return action.token

    def _report(self, step: int, tokens: int) -> None:
        self.tokens += tokens
        report_progress("rollout", step, self.env.max_new_tokens, self.tokens)

    def _leave(self, running: list[int], token: Tensor) -> Tensor:
        """Removes ended rows from the batch, if the policy supports it; returns the tokens of the others."""
        self._store_frozen_prefix()
        held = list(range(self.env.num_envs)) if self.rows is None else self.rows.tolist()
        stay = set(running)
        index = torch.tensor([i for i, row in enumerate(held) if row in stay], device=self.policy.device)
        assert isinstance(self.policy, SelectingPolicy)
        fewer = self.policy.select(self.decoding, index)
        if fewer is None:
            return token
        self.decoding = fewer
        self.rows = torch.tensor(running, device=self.policy.device)
        return token[index]

    def _store_frozen_prefix(self) -> None:
        """Copies the activations below the adapter into the buffer, before rows leave the batch."""
        frozen_prefix = getattr(self.decoding, "frozen_prefix", None)
        if frozen_prefix is None:
            return
        kept = self.buffer.frozen_prefix
        if kept is None:
            columns = self.env.max_prompt_tokens + self.env.max_new_tokens
            store = frozen_prefix.hidden.new_zeros(self.buffer.rows, columns, frozen_prefix.hidden.shape[2])
            kept = self.buffer.frozen_prefix = frozen_prefix._replace(hidden=store)
        rows = slice(None) if self.rows is None else self.rows
        kept.hidden[rows, : frozen_prefix.hidden.shape[1]] = frozen_prefix.hidden


def _reads_the_same(one: Prompt, other: Prompt) -> bool:
    """Whether the model reads the same prompt, whatever the data for scoring."""
    return (one.text, one.messages, one.token_ids) == (other.text, other.messages, other.token_ids)
