"""The contract of a policy, and a policy that is a table."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmgym.env import TokenVectorEnv
from lmgym.exact import Tree
from lmgym.models import Mask, Sequences
from lmgym.policy import Action, Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect
from lmgym.sampling import draw, log_probs


class TablePolicy:
    """A policy without a network: a logit for every state and token, and a value for every state.

    A state is all of the text so far, so the table has (V + 1)^(P + T) rows: it is for probes. What it can represent is
    everything, so that an algorithm that misses the optimum on it has nobody else to blame.

    Args:
        vocabulary: V.
        tokens: P + T, the longest text.
        temperature: divides the logits.
        critic: "none" has no values.
        device: where it lives.
    """

    truncates = False

    def __init__(
        self,
        vocabulary: int,
        tokens: int,
        temperature: float = 1.0,
        critic: str = "head",
        device: torch.device | str = "cpu",
    ):
        self.base = vocabulary + 1
        if self.base**tokens > 2_000_000:
            raise ValueError(
                f"a table for {tokens} tokens of a vocabulary of {vocabulary} needs {self.base}^{tokens} rows: it is "
                "for probes such as lmgym/Tree-v0; lower max_prompt_tokens or max_new_tokens"
            )
        self.temperature, self.critic = temperature, critic
        self.logits = nn.Parameter(torch.zeros(self.base**tokens, vocabulary, device=device))
        self.values = nn.Parameter(torch.zeros(self.base**tokens, device=device))

    @classmethod
    def of(cls, env: TokenVectorEnv, trees: "list[Tree]", critic: str = "head") -> "TablePolicy":
        """A table for an environment, equal to its reference on every text of these trees."""
        tokens = env.max_prompt_tokens + env.max_new_tokens
        policy = cls(env.model.vocabulary, tokens, env.reference.temperature, critic, env.model.device)
        for tree in trees:
            with torch.no_grad():
                logits, _ = env.model.evaluate(tree.sequences, env.reference.adapter)
                policy.logits[policy._states(tree.sequences)] = logits.float()
        return policy

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the logits, and the values where there is a critic."""
        return [self.logits] if self.critic == "none" else [self.logits, self.values]

    def _read(self, state: Int[Tensor, " B"], token: Int[Tensor, " B"], is_token: Bool[Tensor, " B"]) -> Tensor:
        # A text is a number in base V + 1 without the digit 0, so that padding on the left is nothing.
        return torch.where(is_token, state * self.base + token + 1, state)

    def _states(self, sequences: Sequences) -> Int[Tensor, "B T"]:
        state = self.start(sequences.prompt_ids, sequences.prompt_mask)
        states = [state]
        for t in range(sequences.tokens.shape[1] - 1):
            state = self._read(state, sequences.tokens[:, t], sequences.is_action[:, t])
            states.append(state)
        return torch.stack(states, 1)

    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Int[Tensor, " B"]:
        """The state is a number."""
        state = torch.zeros_like(input_ids[:, 0])
        for column in range(input_ids.shape[1]):
            state = self._read(state, input_ids[:, column], attention_mask[:, column].bool())
        return state

    @torch.no_grad()
    def act(
        self, decoding: Int[Tensor, " B"], uniform: Float[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]
    ) -> Action:
        # Ended rows are read on for as long as others run; what they say is not used.
        state = decoding % len(self.logits)
        logp = log_probs(self.logits[state], self.temperature, action_mask)
        token = draw(logp, uniform)
        value = torch.zeros_like(uniform) if self.critic == "none" else self.values[state]
        return Action(token, logp.gather(1, token[:, None])[:, 0], value)

    def advance(self, decoding: Int[Tensor, " B"], token: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return decoding * self.base + token + 1

    def select(self, decoding: Int[Tensor, " B"], rows: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        return decoding[rows]

    def replace_rows(
        self, decoding: Int[Tensor, " B"], rows: Int[Tensor, " R"], fresh: Int[Tensor, " R"]
    ) -> Int[Tensor, " B"]:
        return decoding.index_copy(0, rows, fresh)

    def log_probs(self, sequences: Sequences) -> Float[Tensor, "B T V"]:
        """log π over the whole vocabulary at every step, −∞ for banned tokens."""
        return log_probs(self.logits[self._states(sequences)], self.temperature, sequences.behaviour_mask())

    def evaluate(self, sequences: Sequences) -> Evaluation:
        """Log-probability, value and entropy of tokens that were chosen earlier, differentiable."""
        logp = self.log_probs(sequences)
        entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)
        chosen = logp.gather(2, sequences.tokens[..., None])[..., 0].masked_fill(~sequences.is_action, 0.0)
        values = torch.zeros_like(chosen) if self.critic == "none" else self.values[self._states(sequences)]
        return Evaluation(chosen, values, entropy)


def check_policy(policy: TokenPolicy, env: TokenVectorEnv, tolerance: float = 1e-4, seed: int = 0) -> None:
    """Checks that a policy keeps its promises; put it into the test of a policy of your own.

    One rollout is drawn, and the policy is asked about it again: what was sampled must be what is scored. Then the same
    texts are given with more padding, in another order and in parts, none of which may matter. Banned tokens are never
    drawn, tokens follow the probabilities that are claimed for them, and log-probabilities can be differentiated.

    Args:
        policy: what is checked; its parameters are left as they are.
        env: gives prompts, masks and budget. 64 rows or more make the check of the frequencies mean something.
        tolerance: how far two passes may differ, in nats and in units of value. Use about 0.15 for bfloat16.
        seed: of prompts and samples.

    Raises:
        AssertionError: it says which promise is broken, by what value.
    """
    assert isinstance(policy, TokenPolicy), (
        f"{policy!r} lacks a part of lmgym.policy.TokenPolicy: it needs temperature, critic, device, keeps, "
        "parameters, start, act, advance, evaluate and log_probs"
    )
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(seed, 0))
    sequences, mask = buffer.sequences, buffer.is_action
    with torch.no_grad():
        found, everything = policy.evaluate(sequences), policy.log_probs(sequences)

    def near(what: str, one: Tensor, other: Tensor, where: Tensor = mask) -> None:
        gap = torch.where(where, (one - other).abs(), 0.0)
        row = int(gap.flatten(1).amax(1).argmax()) if gap.ndim > 1 else int(gap.argmax())
        assert float(gap.max()) <= tolerance, f"{what}: they differ by {float(gap.max()):.2g}, most in row {row}"

    near("act() and evaluate() give different log-probabilities of the same tokens", buffer.logp, found.logp)
    near("act() and evaluate() give different values of the same states", buffer.values, found.value)
    chosen = everything.gather(2, sequences.tokens[..., None])[..., 0]
    near("evaluate() and log_probs() give different log-probabilities", found.logp, chosen.masked_fill(~mask, 0.0))
    total = everything.logsumexp(-1)
    near("log_probs() are no log-probabilities: they do not add up to 1", total, torch.zeros_like(total))
    own_entropy = torch.special.entr(everything.exp()).sum(-1)
    near("evaluate() gives an entropy that is not −Σ p log p", found.entropy, own_entropy)
    banned = torch.where(sequences.action_mask, -torch.inf, everything).amax(-1)
    assert float(banned[mask].max()) == -torch.inf, "log_probs() gives banned tokens a probability: mask them with −∞"
    drawn = sequences.action_mask.expand_as(everything).gather(2, sequences.tokens[..., None])[..., 0]
    assert bool(drawn[mask].all()), "act() drew a token that the action mask forbids"

    again = collect(policy, env, RolloutBuffer.like(env), Stream(seed, 0))
    assert torch.equal(again.tokens, buffer.tokens), "the same random numbers gave other tokens: act() has its own"
    with torch.no_grad():
        backwards = policy.evaluate(sequences[torch.arange(buffer.rows - 1, -1, -1, device=policy.device)])
        near("the order of the rows matters to evaluate()", found.logp, backwards.logp.flip(0))
        halves = torch.arange(buffer.rows, device=policy.device).tensor_split(2)
        parts = torch.cat([policy.evaluate(sequences[half]).logp for half in halves if len(half)])
        near("evaluate() gives other log-probabilities in smaller batches", found.logp, parts)
        near("padding on the left matters to evaluate()", found.logp, policy.evaluate(_wider(sequences, env)).logp)
        _check_frequencies(policy, env, sequences)

    evaluation = policy.evaluate(sequences)
    gradients = torch.autograd.grad(
        torch.where(mask, evaluation.logp, 0.0).sum(), policy.parameters(), allow_unused=True
    )
    assert any(g is not None and bool(g.any()) for g in gradients), (
        "the log-probabilities of evaluate() have no gradient for any of parameters()"
    )
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients), (
        "the gradient of evaluate()'s log-probabilities is not finite: is −∞ of a banned token multiplied somewhere?"
    )


def _wider(sequences: Sequences, env: TokenVectorEnv, columns: int = 2) -> Sequences:
    ids = nn.functional.pad(sequences.prompt_ids, (columns, 0), value=env.model.pad_id)
    return replace(sequences, prompt_ids=ids, prompt_mask=nn.functional.pad(sequences.prompt_mask, (columns, 0)))


def _check_frequencies(policy: TokenPolicy, env: TokenVectorEnv, sequences: Sequences, count: int = 1024) -> None:
    """The first token of one prompt, on a grid of uniform numbers, against the probabilities that are claimed."""
    first: Any = sequences[torch.zeros(count, dtype=torch.long, device=policy.device)]
    grid = (torch.arange(count, device=policy.device) + 0.5) / count
    state = policy.start(first.prompt_ids, first.prompt_mask)
    token = policy.act(state, grid, env.action_mask_table[0]).token
    shares = torch.bincount(token, minlength=env.model.vocabulary) / count
    claimed = policy.log_probs(first[torch.arange(1, device=policy.device)])[0, 0].exp()
    gap = float((shares - claimed).abs().max())
    assert gap < 3 / count + 1e-3, (
        f"act() draws a token up to {gap:.3f} more or less often than log_probs() says: are temperature and masks the "
        "same in both?"
    )
