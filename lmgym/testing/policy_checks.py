"""The contract of a policy."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lmgym.env import TokenVectorEnv
from lmgym.models import Sequences
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect


def check_policy(policy: TokenPolicy, env: TokenVectorEnv, tolerance: float = 1e-4, seed: int = 0) -> None:
    """Checks that a policy keeps its contract. Call it in the tests of your own policy.

    It collects one rollout and evaluates the policy on it again: what was sampled must be what is scored. It then
    evaluates the same texts with more padding, in another order and in parts, which must not change the result. Banned
    tokens must never be drawn, tokens must be as frequent as `log_probs` says, and log-probabilities must be
    differentiable.

    Args:
        policy: the policy to check. Its parameters are not changed.
        env: gives prompts, masks and budget. Use 64 rows or more, so that the check of the frequencies means something.
        tolerance: how far two passes may differ, in nats and in units of value. Use about 0.15 for bfloat16.
        seed: of prompts and samples.

    Raises:
        AssertionError: a part of the contract is broken. The message names it and gives the value.
    """
    assert isinstance(policy, TokenPolicy), (
        f"{policy!r} lacks a part of lmgym.policy.TokenPolicy: it needs temperature, critic, device, truncates, "
        "parameters, start, act, advance, evaluate and log_probs"
    )
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(seed, 0))
    with torch.no_grad():
        evaluation, log_probs = policy.evaluate(buffer.sequences), policy.log_probs(buffer.sequences)
    _check_evaluation(buffer, evaluation, log_probs, tolerance)
    _check_masks(buffer, log_probs)
    again = collect(policy, env, RolloutBuffer.like(env), Stream(seed, 0))
    assert torch.equal(again.tokens, buffer.tokens), "the same random numbers gave other tokens: act() has its own"
    with torch.no_grad():
        _check_batching(policy, env, buffer, evaluation, tolerance)
        _check_frequencies(policy, env, buffer.sequences)
    _check_gradient(policy, buffer)


def _check_close(what: str, one: Tensor, other: Tensor, where: Tensor, tolerance: float) -> None:
    gap = torch.where(where, (one - other).abs(), 0.0)
    row = int(gap.flatten(1).amax(1).argmax()) if gap.ndim > 1 else int(gap.argmax())
    assert float(gap.max()) <= tolerance, f"{what}: they differ by {float(gap.max()):.2g}, most in row {row}"


def _check_evaluation(buffer: RolloutBuffer, evaluation: Evaluation, log_probs: Tensor, tolerance: float) -> None:
    """Log-probabilities, values and entropies agree with one another and with those of the rollout."""
    sequences, mask = buffer.sequences, buffer.is_action

    def close(what: str, one: Tensor, other: Tensor) -> None:
        _check_close(what, one, other, mask, tolerance)

    close("act() and evaluate() give different log-probabilities of the same tokens", buffer.logp, evaluation.logp)
    close("act() and evaluate() give different values of the same states", buffer.values, evaluation.value)
    chosen = log_probs.gather(2, sequences.tokens[..., None])[..., 0]
    close(
        "evaluate() and log_probs() give different log-probabilities", evaluation.logp, chosen.masked_fill(~mask, 0.0)
    )
    total = log_probs.logsumexp(-1)
    close("log_probs() are not normalised: the probabilities do not add up to 1", total, torch.zeros_like(total))
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    close("evaluate() gives an entropy that is not −Σ p log p", evaluation.entropy, entropy)


def _check_masks(buffer: RolloutBuffer, log_probs: Tensor) -> None:
    """Banned tokens have probability 0 and were not drawn."""
    sequences, mask = buffer.sequences, buffer.is_action
    allowed = sequences.environment_mask().expand_as(log_probs)
    banned = torch.where(allowed, -torch.inf, log_probs).amax(-1)
    assert float(banned[mask].max()) == -torch.inf, "log_probs() gives banned tokens a probability: mask them with −∞"
    drawn = allowed.gather(2, sequences.tokens[..., None])[..., 0]
    assert bool(drawn[mask].all()), "act() drew a token that the action mask forbids"


def _check_batching(
    policy: TokenPolicy, env: TokenVectorEnv, buffer: RolloutBuffer, evaluation: Evaluation, tolerance: float
) -> None:
    """Order, batch size and padding do not change a log-probability."""
    sequences, rows = buffer.sequences, torch.arange(buffer.rows, device=policy.device)

    def close(what: str, logp: Tensor) -> None:
        _check_close(what, evaluation.logp, logp, buffer.is_action, tolerance)

    close("the order of the rows matters to evaluate()", policy.evaluate(sequences[rows.flip(0)]).logp.flip(0))
    parts = torch.cat([policy.evaluate(sequences[half]).logp for half in rows.tensor_split(2) if len(half)])
    close("evaluate() gives other log-probabilities in smaller batches", parts)
    close("padding on the left matters to evaluate()", policy.evaluate(_with_more_padding(sequences, env)).logp)


def _check_gradient(policy: TokenPolicy, buffer: RolloutBuffer) -> None:
    """The log-probabilities have a finite gradient with respect to the parameters."""
    logp = policy.evaluate(buffer.sequences).logp
    gradients = torch.autograd.grad(
        torch.where(buffer.is_action, logp, 0.0).sum(), policy.parameters(), allow_unused=True
    )
    assert any(g is not None and bool(g.any()) for g in gradients), (
        "the log-probabilities of evaluate() have no gradient for any of parameters()"
    )
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients), (
        "the gradient of evaluate()'s log-probabilities is not finite: is a banned token's −∞ multiplied somewhere?"
    )


def _with_more_padding(sequences: Sequences, env: TokenVectorEnv, columns: int = 2) -> Sequences:
    ids = nn.functional.pad(sequences.prompt_ids, (columns, 0), value=env.model.pad_id)
    return replace(sequences, prompt_ids=ids, prompt_mask=nn.functional.pad(sequences.prompt_mask, (columns, 0)))


def _check_frequencies(policy: TokenPolicy, env: TokenVectorEnv, sequences: Sequences, count: int = 1024) -> None:
    """Draws the first token of one prompt on a grid of uniform numbers: tokens are as frequent as they are probable."""
    first: Any = sequences[torch.zeros(count, dtype=torch.long, device=policy.device)]
    grid = (torch.arange(count, device=policy.device) + 0.5) / count
    state = policy.start(first.prompt_ids, first.prompt_mask)
    token = policy.act(state, grid, first.environment_mask()[..., 0, :]).token
    shares = torch.bincount(token, minlength=env.model.vocabulary) / count
    claimed = policy.log_probs(first[torch.arange(1, device=policy.device)])[0, 0].exp()
    gap = float((shares - claimed).abs().max())
    assert gap < 3 / count + 1e-3, (
        f"act() draws a token up to {gap:.3f} more or less often than log_probs() says: are temperature and masks the "
        "same in both?"
    )
