"""Collecting a rollout: decode a completion in every row, then pay the rewards of the batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import record_function

from lmgym.devices import return_freed_memory
from lmgym.env import TokenVectorEnv
from lmgym.models import Sequences, default_pass_tokens
from lmgym.policy import Policy, TokenPolicy
from lmgym.rollout.buffer import RolloutBuffer
from lmgym.rollout.stream import Stream
from lmgym.rollout.token_loop import decode_own_rows
from lmgym.tasks.base import Prompt

LARGE = 50_000_000
"""Weights of a model whose rollouts leave so much freed memory that it is worth a few milliseconds to return it."""
MAX_LOGITS = 2**25
"""Logits of a pass through transformers, when a rollout is scored again."""


def collect(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    buffer: RolloutBuffer,
    stream: Stream,
    prompts: Sequence[Prompt | str] | None = None,
    *,
    compact: bool = True,
    slots: int = 0,
) -> RolloutBuffer:
    """Fills the buffer with one episode for each row: `decode`, then the rewards of the whole batch.

    Args:
        policy: what acts.
        env: what it acts in, B rows.
        buffer: receives the B episodes; what it held is overwritten.
        stream: the random numbers of prompts and tokens.
        prompts: one for each row, used instead of drawing them.
        compact: see `decode`.
        slots: see `decode`.

    Returns:
        The buffer.

    Raises:
        ValueError: model or temperature of policy and environment differ, or the policy is its own reference.
    """
    with record_function("lmgym/decode"):
        own = decode_own_rows(policy, env, buffer, stream, prompts, compact, slots)
    large = isinstance(policy, Policy) and policy.lm.model.num_parameters() > LARGE
    if large:
        return_freed_memory()
    with torch.inference_mode():
        if own.buffer.rows:
            _pay(policy, own.env, own.buffer)
        own.exchange(paid=True)
        sequences = env.sequences()
    _keep_prompts(buffer, sequences)
    buffer.text_mask = sequences.text_mask
    buffer.tokens.copy_(sequences.tokens)
    buffer.beta = env.kl_controller.beta
    if large:
        return_freed_memory()
    return buffer


def _pay(policy: TokenPolicy, env: TokenVectorEnv, buffer: RolloutBuffer) -> None:
    """Pays the rewards of a finished batch."""
    if isinstance(policy, Policy) and (policy.rescores or policy.values_late):
        _rescore(policy, env, buffer)
    outcome = env.pay_rewards(buffer.logp, buffer.frozen_prefix)
    buffer.is_action.copy_(outcome.is_action)
    buffer.reference_logp.copy_(outcome.reference_logp)
    buffer.rewards.copy_(outcome.rewards)
    buffer.score.copy_(outcome.score)
    buffer.breakdown = outcome.breakdown
    buffer.finish.copy_(outcome.finish)
    buffer.bootstrap *= outcome.truncated
    buffer.logp *= outcome.is_action
    buffer.values *= outcome.is_action


def _keep_prompts(buffer: RolloutBuffer, sequences: Sequences) -> None:
    buffer.prompt_width = sequences.prompt_ids.shape[1]
    buffer.prompt_ids[:, -buffer.prompt_width :] = sequences.prompt_ids
    buffer.prompt_mask[:, -buffer.prompt_width :] = sequences.prompt_mask


def _rescore(policy: Policy, env: TokenVectorEnv, buffer: RolloutBuffer) -> None:
    """Computes log-probabilities and values in passes like those of the update, if decoding does not give the same."""
    sequences = replace(env.sequences(), sampling_mask=buffer.sampling_mask, frozen_prefix=buffer.frozen_prefix)
    bootstrapped = env.on_limit == "truncate"
    if bootstrapped:
        # The state after the last token is that of one more token, whatever it is and whatever is allowed there.
        sequences = Sequences(
            sequences.prompt_ids,
            sequences.prompt_mask,
            torch.cat([sequences.tokens, torch.zeros_like(sequences.tokens[:, :1])], 1),
            torch.cat([sequences.is_action, sequences.is_action[:, -1:]], 1),
            torch.cat([sequences.action_mask, sequences.action_mask[-1:]]),
            _with_everything_allowed(sequences.sampling_mask),
            sequences.frozen_prefix,
            _with_everything_allowed(sequences.text_mask),
        )
    # A pass through transformers returns the logits of every token.
    fewer = 0 if policy.lm.fused(policy.adapter) else MAX_LOGITS // policy.lm.vocabulary
    for rows, steps in sequences.buckets(fewer and min(fewer, default_pass_tokens(policy.device))):
        part, taken = sequences[rows].first_steps(steps), min(steps, buffer.logp.shape[1])
        if policy.rescores:
            logp, values, _ = policy.evaluate(part, entropies=False)
            buffer.logp[rows, :taken] = logp[:, :taken]
        else:
            values = policy.values(part)
        buffer.values[rows, :taken] = values[:, :taken]
        if bootstrapped and steps > taken:
            buffer.bootstrap[rows] = values[:, taken]


def _with_everything_allowed(mask: Tensor | None) -> Tensor | None:
    """A mask of bits [B, T, W] with one more step, at which it allows all tokens."""
    return None if mask is None else torch.cat([mask, torch.full_like(mask[:, :1], 255)], 1)
