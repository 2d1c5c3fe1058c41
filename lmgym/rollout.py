"""Rollouts: a policy drives an environment, and what happened is kept on the device."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.profiler import record_function

from lmgym.decoding import Bottom
from lmgym.devices import free_to_look, sent
from lmgym.env import Finish, TokenVectorEnv
from lmgym.models import Sequences
from lmgym.policy import Policy, SelectingPolicy, TokenPolicy
from lmgym.sampling import packed_width
from lmgym.static import StaticLoop, refusal
from lmgym.tasks.base import Prompt

CHECK_EVERY = 8
"""Steps between two questions which rows still run: each makes the host wait for the device, or read stop strings."""
LOOK_EVERY = 2
"""The same where nobody has to wait, and nothing has to be read."""


class RolloutBuffer:
    """One rollout of B rows by T steps, preallocated on the policy's device and written in place.

    Attributes:
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] True on the prompt's tokens.
        tokens: [B, T] the actions.
        is_action: [B, T] True where an action was taken, up to and including the last.
        logp: [B, T] log π(action) when it was taken, in nats.
        values: [B, T] the critic's estimate when it was taken.
        reference_logp: [B, T] log π_ref(action) in nats.
        rewards: [B, T].
        bootstrap: [B] the critic's estimate at the end of rows that were cut off, else 0.
        score: [B] the composed score.
        breakdown: [B] per component of the score, unweighted.
        finish: [B] why the row ended, a `lmgym.env.Finish` number.
        action_mask: [T, V] True where a token was allowed.
        kept: [B, T, W] the tokens that truncated sampling kept, as bits; None until a policy truncates.
        prompt_width: how many of the P columns the longest prompt of this rollout takes.
        bottom: what the layers below the policy's adapter made of prompts and actions; None where it adapts all layers.
        loop: what was captured to fill it, where steps are captured.
    """

    kept: UInt8[Tensor, "B T W"] | None = None
    bottom: Bottom | None = None
    loop: StaticLoop | None = None

    def __init__(self, rows: int, prompt_tokens: int, new_tokens: int, action_mask: Tensor):
        device = action_mask.device

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.prompt_ids = empty(rows, prompt_tokens, dtype=torch.long)
        self.prompt_mask = empty(rows, prompt_tokens, dtype=torch.bool)
        self.tokens = empty(rows, new_tokens, dtype=torch.long)
        self.is_action = empty(rows, new_tokens, dtype=torch.bool)
        self.logp = empty(rows, new_tokens)
        self.values = empty(rows, new_tokens)
        self.reference_logp = empty(rows, new_tokens)
        self.rewards = empty(rows, new_tokens)
        self.bootstrap = empty(rows)
        self.score = empty(rows)
        self.breakdown: Mapping[str, Tensor] = {}
        self.finish = empty(rows, dtype=torch.int8)
        self.action_mask = action_mask
        self.prompt_width = prompt_tokens

    @classmethod
    def like(cls, env: TokenVectorEnv) -> "RolloutBuffer":
        """A buffer for an environment's rows and budgets."""
        return cls(env.num_envs, env.max_prompt_tokens, env.max_new_tokens, env.action_mask_table)

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def sequences(self) -> Sequences:
        """Prompts and actions, without the columns that pad every prompt."""
        prompt_ids, prompt_mask = (x[:, -self.prompt_width :] for x in (self.prompt_ids, self.prompt_mask))
        return Sequences(prompt_ids, prompt_mask, self.tokens, self.is_action, self.action_mask, self.kept, self.bottom)

    def at_last(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B T"]:
        """`x` of each row at the row's last action, 0 elsewhere: where a score is paid."""
        last = self.is_action.sum(1, keepdim=True) - 1
        return torch.zeros_like(self.rewards).scatter_(1, last, x[:, None])

    def clear(self, kept_bytes: int = 0) -> None:
        """Forgets a rollout; with `kept_bytes`, makes room for that many bytes of truncation for each token."""
        for tensor in (self.prompt_mask, self.is_action, self.logp, self.values, self.bootstrap):
            tensor.zero_()
        self.bottom = None
        if not kept_bytes:
            self.kept = None
        elif self.kept is None:
            self.kept = torch.empty(*self.tokens.shape, kept_bytes, dtype=torch.uint8, device=self.tokens.device)
        if self.kept is not None:
            self.kept.fill_(255)  # steps that are never taken keep everything, so that their log-probabilities exist


@dataclass(frozen=True)
class Stream:
    """Which random numbers a rollout uses: fixed by four integers, whatever the batch.

    Attributes:
        seed: the run's.
        update: counts rollouts.
        samples: completions per prompt; row i is sample i % samples of prompt i // samples.
    """

    seed: int
    update: int
    samples: int = 1

    def prompt_seeds(self, rows: int) -> list[int]:
        """One seed a row for drawing its prompt; the same for all samples of a prompt."""
        sequences = [np.random.SeedSequence((self.seed, self.update, row // self.samples, 0)) for row in range(rows)]
        return [int(s.generate_state(1)[0]) for s in sequences]

    def uniforms(self, rows: int, steps: int, device: torch.device) -> Tensor:
        """[B, T] numbers in [0, 1), one transfer: row i draws from a counter-based generator of its own."""
        drawn = np.empty((rows, steps), np.float32)
        for row in range(rows):
            key = np.random.SeedSequence((self.seed, self.update, row // self.samples, 1 + row % self.samples))
            drawn[row] = np.random.Generator(np.random.Philox(key)).random(steps, dtype=np.float32)
        return sent(torch.from_numpy(drawn), device)


def collect(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    buffer: RolloutBuffer,
    stream: Stream,
    prompts: Sequence[Prompt | str] | None = None,
    compact: bool = True,
    slots: int = 0,
) -> RolloutBuffer:
    """Fills the buffer with one episode a row: `decode`, then the rewards of the whole batch at once.

    Args:
        policy: chooses the tokens.
        env: B rows.
        buffer: for B rows; overwritten.
        stream: the random numbers of prompts and tokens.
        prompts: one a row, instead of drawing them.
        compact: as in `decode`.
        slots: as in `decode`.

    Raises:
        ValueError: policy and environment disagree about model or temperature, or the policy is its own reference.
    """
    with record_function("lmgym/decode"):
        decode(policy, env, buffer, stream, prompts, compact, slots)
    with torch.inference_mode():
        if isinstance(policy, Policy) and (policy.rescores or policy.values_late):
            _rescore(policy, env, buffer)
        outcome = env.settle(buffer.logp, buffer.bottom)
        sequences = env.sequences()
    _keep_prompts(buffer, sequences)
    buffer.tokens.copy_(sequences.tokens)
    buffer.is_action.copy_(outcome.is_action)
    buffer.reference_logp.copy_(outcome.reference_logp)
    buffer.rewards.copy_(outcome.rewards)
    buffer.score.copy_(outcome.score)
    buffer.breakdown = outcome.breakdown
    buffer.finish.copy_(outcome.finish)
    buffer.bootstrap *= outcome.truncated
    buffer.logp *= outcome.is_action
    buffer.values *= outcome.is_action
    return buffer


def _keep_prompts(buffer: RolloutBuffer, sequences: Sequences) -> None:
    buffer.prompt_width = sequences.prompt_ids.shape[1]
    buffer.prompt_ids[:, -buffer.prompt_width :] = sequences.prompt_ids
    buffer.prompt_mask[:, -buffer.prompt_width :] = sequences.prompt_mask


def _rescore(policy: Policy, env: TokenVectorEnv, buffer: RolloutBuffer) -> None:
    """Log-probabilities and values from passes like those of the update, where decoding gives others or none."""
    sequences = replace(env.sequences(), kept=buffer.kept, bottom=buffer.bottom)
    bootstrapped = env.on_limit == "truncate"
    if bootstrapped:
        # The state after the last token is that of one more token, whatever it is.
        ends = torch.zeros_like(sequences.tokens[:, :1])
        mask = torch.cat([sequences.action_mask, sequences.action_mask[-1:]])
        kept = None if buffer.kept is None else torch.cat([buffer.kept, torch.full_like(buffer.kept[:, :1], 255)], 1)
        is_action = torch.cat([sequences.is_action, sequences.is_action[:, -1:]], 1)
        tokens = torch.cat([sequences.tokens, ends], 1)
        sequences = Sequences(sequences.prompt_ids, sequences.prompt_mask, tokens, is_action, mask, kept, buffer.bottom)
    for rows, steps in sequences.buckets():
        part, taken = sequences[rows].first_steps(steps), min(steps, buffer.logp.shape[1])
        if policy.rescores:
            logp, values, _ = policy.evaluate(part, entropies=False)
            buffer.logp[rows, :taken] = logp[:, :taken]
        else:
            values = policy.values(part)
        buffer.values[rows, :taken] = values[:, :taken]
        if bootstrapped and steps > taken:
            buffer.bootstrap[rows] = values[:, taken]


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

    It is an environment loop: start, act, append, advance. The policy's KV cache is its hidden state. Nothing in it
    waits for the device, but one question every `CHECK_EVERY` steps which rows still run. What is random belongs to a
    row, so neither who its neighbours are nor when they leave changes its tokens.

    Args:
        policy: chooses the tokens.
        env: B rows.
        buffer: for B rows; overwritten.
        stream: the random numbers of prompts and tokens.
        prompts: one a row, instead of drawing them.
        compact: whether rows that have ended leave the batch.
        slots: rows that are decoded at a time; a row that ends makes place for the next. 0 decodes all together.
            Fewer slots take less memory, and keep batches full where completions differ much in length.
    """
    check_agreement(policy, env)
    if isinstance(policy, Policy):
        policy.room = env.max_new_tokens
    uniforms = stream.uniforms(buffer.rows, env.max_new_tokens, policy.device)
    env.reset(seed=stream.prompt_seeds(buffer.rows), options=None if prompts is None else {"prompt": list(prompts)})
    buffer.clear(packed_width(env.model.vocabulary) if policy.keeps else 0)
    batch = _Batch(policy, env, buffer, uniforms)
    if slots and slots < buffer.rows:
        if not isinstance(policy, SelectingPolicy) or env.on_limit == "truncate":
            raise ValueError(
                "slots needs a policy with select() and put(), and on_limit='terminate': decode all rows together"
            )
        if batch.refill(slots):
            return
    if refusal(policy, env) is None:
        batch.replay(compact, stream.samples)
    else:
        batch.lockstep(compact, stream.samples)


class _Batch:
    """Rows that are decoded together.

    Attributes:
        rows: [R] the environment's rows in this batch; None while all are, in their order.
    """

    def __init__(self, policy: TokenPolicy, env: TokenVectorEnv, buffer: RolloutBuffer, uniforms: Tensor):
        self.policy, self.env, self.buffer, self.uniforms = policy, env, buffer, uniforms
        self.rows: Tensor | None = None
        self.decoding: Any = None
        self.check_every = LOOK_EVERY if free_to_look(policy.device) and not env.stop else CHECK_EVERY

    def lockstep(self, compact: bool, samples: int) -> None:
        """All rows take their t-th step together."""
        env, policy = self.env, self.policy
        self.decoding = self._start(samples)
        for t in range(env.max_new_tokens):
            token = self._act(t)
            last = t + 1 == env.max_new_tokens
            if (t + 1) % self.check_every == 0 and not last:
                running = env.running()
                if not running:
                    break
                # Compacting copies the cache, so only for a good part of the rows; the cut-off are bootstrapped.
                count = env.num_envs if self.rows is None else len(self.rows)
                if compact and len(running) <= 0.8 * count and isinstance(policy, SelectingPolicy):
                    token = self._leave(running, token)
            if not last or env.on_limit == "truncate":  # rows that are cut off are bootstrapped from what comes after
                self.decoding = policy.advance(self.decoding, token)
        self._end()

    def replay(self, compact: bool, samples: int) -> None:
        """The same in steps that a CUDA graph repeats; rows leave by halves, each of which has a graph."""
        env, policy, buffer = self.env, self.policy, self.buffer
        assert isinstance(policy, Policy)
        loop = buffer.loop
        if loop is None or loop.policy is not policy or loop.env is not env:
            loop = buffer.loop = StaticLoop(policy, env, buffer)
        loop.begin(self._start(samples), self.uniforms)
        self.decoding, self.rows = loop.decoding, loop.rows
        for t in range(env.max_new_tokens):
            loop.step()
            if (t + 1) % CHECK_EVERY or t + 1 == env.max_new_tokens:
                continue
            running = env.running()
            if not running:
                break
            if compact:
                self._keep_bottom()
                loop.leave(running)
                self.decoding, self.rows = loop.decoding, loop.rows
        self._end()

    def _end(self) -> None:
        """What is to be kept of the rows that are left."""
        env, policy = self.env, self.policy
        self._keep_bottom()
        if env.on_limit == "truncate":
            rows = slice(None) if self.rows is None else self.rows
            end = policy.act(self.decoding, self.uniforms[rows, 0], env.action_mask_table[-1])
            self.buffer.bootstrap[rows] = end.value

    def refill(self, slots: int) -> bool:
        """Rows take the place of those that have ended, and so are at different steps.

        Returns:
            False, having done nothing, where the policy's cache cannot do that.
        """
        env, policy, device = self.env, self.policy, self.policy.device
        assert isinstance(policy, SelectingPolicy)
        ids, mask = env.prompt_block()
        self.rows = torch.arange(slots, device=device)
        self.decoding = policy.start(ids[:slots], mask[:slots])
        if policy.select(self.decoding, self.rows[:1]) is None:
            self.rows = None
            return False
        waiting, began = list(range(slots, env.num_envs)), [0] * slots
        for step in itertools.count(1):
            token = self._act(None)
            # A row at its budget must leave at once: it may stand at the model's last position.
            full = any(step - start == env.max_new_tokens for start in began)
            self.decoding = policy.advance(self.decoding, token)
            if step % self.check_every and not full:
                continue
            running = set(env.running())
            ended = [slot for slot, row in enumerate(self.rows.tolist()) if row not in running]
            if not ended:
                continue
            self._keep_bottom()
            joining, waiting = waiting[: len(ended)], waiting[len(ended) :]
            if joining:
                places, new = (torch.tensor(x, device=device) for x in (ended[: len(joining)], joining))
                self.decoding = policy.put(self.decoding, places, policy.start(ids[new], mask[new]))
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
        raise AssertionError  # counting does not end

    def _start(self, samples: int) -> Any:
        """Reads the prompts, those of a group once."""
        ids, mask = self.env.prompt_block()
        policy, texts = self.policy, [prompt.text for prompt in self.env.prompts]
        rows = len(texts)
        grouped = texts == [texts[i - i % samples] for i in range(rows)]
        if samples > 1 and rows % samples == 0 and grouped and isinstance(policy, SelectingPolicy):
            decoding = policy.start(ids[::samples], mask[::samples])
            copies = torch.arange(rows, device=policy.device) // samples
            copied = policy.select(decoding, copies)
            if copied is not None:
                return copied
        return policy.start(ids, mask)

    def _act(self, t: int | None) -> Tensor:
        """Chooses tokens and writes down what is known of them; `t` is the step of all rows, where they share it."""
        env, buffer, rows = self.env, self.buffer, self.rows
        if t is None:
            assert rows is not None
            at: Any = (rows, env.length[rows].clamp(max=env.max_new_tokens - 1))
            allowed = env.action_mask_table[at[1]] if env.min_new_tokens else env.action_mask_table[0]
            running = env.finish[rows] == Finish.RUNNING
        else:
            at = (slice(None) if rows is None else rows, t)
            allowed, running = env.action_mask_table[t], None
        action = self.policy.act(self.decoding, self.uniforms[at], allowed)
        for store, new in ((buffer.logp, action.logp), (buffer.values, action.value), (buffer.kept, action.kept)):
            if store is not None and new is not None:
                if running is not None:  # a slot whose row has ended must not overwrite the row's last token
                    new = torch.where(running.view(-1, *[1] * (new.ndim - 1)), new, store[at])
                store[at] = new
        env.append(action.token, rows)
        return action.token

    def _leave(self, running: list[int], token: Tensor) -> Tensor:
        """Only the running rows stay, where the policy can do that; returns their tokens."""
        self._keep_bottom()
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

    def _keep_bottom(self) -> None:
        """Copies what the layers below the adapter made of the rows, before the rows leave."""
        bottom = getattr(self.decoding, "bottom", None)
        if bottom is None:
            return
        kept = self.buffer.bottom
        if kept is None:
            columns = self.env.max_prompt_tokens + self.env.max_new_tokens
            store = bottom.hidden.new_zeros(self.buffer.rows, columns, bottom.hidden.shape[2])
            kept = self.buffer.bottom = bottom._replace(hidden=store)
        rows = slice(None) if self.rows is None else self.rows
        kept.hidden[rows, : bottom.hidden.shape[1]] = bottom.hidden


def check_agreement(policy: TokenPolicy, env: TokenVectorEnv, pays_kl: bool | None = None) -> None:
    """Refuses a policy that would be paid for something else than it does.

    Args:
        policy: what acts.
        env: what it acts in.
        pays_kl: whether KL is paid, by the environment (None: as its `kl` says) or by somebody else.

    Raises:
        ValueError: they disagree about temperature or vocabulary, or KL is paid and the policy is its own reference.
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
            "adapter of its own, lm.add_adapter('policy'), or make the environment with kl='none', or with another "
            "reference_adapter"
        )
    if policy.lm.vocabulary != env.model.vocabulary or policy.lm.eos_ids != env.model.eos_ids:
        raise ValueError(
            f"the policy's model {policy.lm.name!r} and the environment's {env.model.name!r} have different "
            "vocabularies: build both on one LanguageModel"
        )
