"""Rollouts: a policy drives an environment, and what happened is kept on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lmgym.env import TokenVectorEnv
from lmgym.models import Sequences
from lmgym.policy import Policy, TokenPolicy
from lmgym.sampling import packed_width
from lmgym.tasks.base import Prompt

CHECK_EVERY = 8
"""Steps between two questions whether every row has ended: each makes the host wait for the device."""


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
    """

    kept: UInt8[Tensor, "B T W"] | None = None

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
        return Sequences(prompt_ids, prompt_mask, self.tokens, self.is_action, self.action_mask, self.kept)

    def at_last(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B T"]:
        """`x` of each row at the row's last action, 0 elsewhere: where a score is paid."""
        last = self.is_action.sum(1, keepdim=True) - 1
        return torch.zeros_like(self.rewards).scatter_(1, last, x[:, None])

    def clear(self, kept_bytes: int = 0) -> None:
        """Forgets a rollout; with `kept_bytes`, makes room for that many bytes of truncation for each token."""
        for tensor in (self.prompt_mask, self.is_action, self.logp, self.values, self.bootstrap):
            tensor.zero_()
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
        return torch.from_numpy(drawn).to(device)


def collect(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    buffer: RolloutBuffer,
    stream: Stream,
    prompts: Sequence[Prompt | str] | None = None,
) -> RolloutBuffer:
    """Fills the buffer with one episode a row: `decode`, then the rewards of the whole batch at once.

    Args:
        policy: chooses the tokens.
        env: B rows.
        buffer: for B rows; overwritten.
        stream: the random numbers of prompts and tokens.
        prompts: one a row, instead of drawing them.

    Raises:
        ValueError: policy and environment disagree about model or temperature, or the policy is its own reference.
    """
    decode(policy, env, buffer, stream, prompts)
    with torch.inference_mode():
        outcome = env.settle(buffer.logp)
        sequences = env.sequences()
    buffer.prompt_width = sequences.prompt_ids.shape[1]
    buffer.prompt_ids[:, -buffer.prompt_width :] = sequences.prompt_ids
    buffer.prompt_mask[:, -buffer.prompt_width :] = sequences.prompt_mask
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


@torch.inference_mode()
def decode(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    buffer: RolloutBuffer,
    stream: Stream,
    prompts: Sequence[Prompt | str] | None = None,
) -> None:
    """Writes a completion in every row of the environment, and log-probabilities and values into the buffer.

    It is an environment loop: start, act, append, advance. The policy's KV cache is its hidden state. Nothing in it
    waits for the device, but one question every `CHECK_EVERY` steps whether all rows have ended. Arguments as in
    `collect`.
    """
    check_agreement(policy, env)
    uniforms = stream.uniforms(buffer.rows, env.max_new_tokens, policy.device)
    env.reset(seed=stream.prompt_seeds(buffer.rows), options=None if prompts is None else {"prompt": list(prompts)})
    buffer.clear(packed_width(env.model.vocabulary) if policy.keeps else 0)
    decoding = policy.start(*env.prompt_block())
    for t in range(env.max_new_tokens):
        action = policy.act(decoding, uniforms[:, t], env.action_mask_table[t])
        buffer.logp[:, t] = action.logp
        buffer.values[:, t] = action.value
        if buffer.kept is not None and action.kept is not None:
            buffer.kept[:, t] = action.kept
        env.append(action.token)
        last = t + 1 == env.max_new_tokens
        if (t + 1) % CHECK_EVERY == 0 and not last and not env.any_running():
            break
        if not last or env.on_limit == "truncate":  # rows that are cut off are bootstrapped from what comes after
            decoding = policy.advance(decoding, action.token)
    if env.on_limit == "truncate":
        buffer.bootstrap.copy_(policy.act(decoding, uniforms[:, 0], env.action_mask_table[-1]).value)


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
