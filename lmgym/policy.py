"""A policy over tokens: a language model with an adapter, a sampler and a critic."""

import copy
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from lmgym.critic import VALUE_ADAPTER, Critic, load_value_adapter, load_value_head, save_critic
from lmgym.devices import reduced_precision
from lmgym.fused import chosen_log_probs_from_hidden, draw_from_logits
from lmgym.models import Decoding, LanguageModel, Mask, Sequences
from lmgym.sampling import Truncation, chosen_log_probs, draw, log_probs, pack_bits


class Action(NamedTuple):
    """The actions that `Policy.act` chose.

    Attributes:
        token: [B] the chosen tokens.
        logp: [B] log π(token | state) in nats, float32.
        value: [B] the critic's estimate of the return from this state; 0 without a critic.
        sampling_mask: [B, W] the tokens that truncated sampling allowed, as bits (`lmgym.sampling.pack_bits`); None
            without truncation.
    """

    token: Int[Tensor, " B"]
    logp: Float[Tensor, " B"]
    value: Float[Tensor, " B"]
    sampling_mask: UInt8[Tensor, "B W"] | None = None


class Evaluation(NamedTuple):
    """The result of `Policy.evaluate` for tokens that were chosen earlier; other entries are undefined.

    Attributes:
        logp: [B, T] log π(token | state) in nats.
        value: [B, T] the critic's estimate.
        entropy: [B, T] of the distribution from which the token was drawn, in nats.
    """

    logp: Float[Tensor, "B T"]
    value: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]


@runtime_checkable
class TokenPolicy(Protocol):
    """The interface that `collect` and the algorithms need: of `Policy`, or of a table (`lmgym.testing`).

    `lmgym.testing.check_policy` checks the whole contract. The state that `start` returns belongs to the policy; its
    contents are private.

    Attributes:
        device: the device of its tensors.
        temperature: divides the logits, in sampling and in scoring.
        critic: "none" if `Action.value` and `Evaluation.value` are always 0.
        truncates: whether it samples from the most probable tokens alone, and returns them in `Action.sampling_mask`.
    """

    temperature: float
    critic: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def truncates(self) -> bool: ...
    def parameters(self) -> list[nn.Parameter]: ...
    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Any: ...
    def act(self, decoding: Any, uniform: Float[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]) -> Action: ...
    def advance(self, decoding: Any, token: Int[Tensor, " B"]) -> Any: ...
    def evaluate(self, sequences: Sequences) -> Evaluation: ...
    def log_probs(self, sequences: Sequences) -> Float[Tensor, "B T V"]: ...


@runtime_checkable
class SelectingPolicy(Protocol):
    """An optional interface with which a rollout can drop ended rows, and read the prompt of a group only once."""

    def select(self, decoding: Any, rows: Int[Tensor, " R"]) -> Any:
        """The state of these rows, in this order; a row may occur several times. None if that is not supported."""
        ...

    def replace_rows(self, decoding: Any, rows: Int[Tensor, " R"], fresh: Any) -> Any:
        """The state with these rows replaced by those of `fresh`."""
        ...


class Policy:
    """Samples tokens, and scores them, at one temperature and under one set of masks.

    Args:
        lm: the language model.
        adapter: the adapter to train, added before with `lm.adapters.add`. None is the model itself: it can be sampled
            from and evaluated but not trained, because it would be its own reference.
        temperature: divides the logits, in sampling and in scoring.
        critic: "head" computes the value from the policy's own hidden state with a linear layer. "adapter" gives the
            critic its own LoRA adapter on the same base (a second pass). "network" is a separate copy of the base, and
            all its weights are trained, as in TRL; it gives no values while acting, and `collect` computes them
            afterwards in one pass. "none" has no values.
        seed: of the value adapter's random weights.
        top_k: samples from this many most probable tokens; 0 from all. A rollout stores the tokens that were kept, and
            log π is that of the truncated distribution. The reference is not truncated, so that KL before training is
            not 0 but −log of the probability that was kept.
        top_p: samples from the fewest most probable tokens that hold this much probability; 1 from all.

    Attributes:
        truncation: the settings of truncated sampling.
        value_head: the linear layer of the critic.
        network: the model of a "network" critic; None otherwise.
        reserve_tokens: how many new tokens the cache of `start` can hold before it must grow. A rollout sets it: a
            cache that is larger than necessary is read more slowly.

    Raises:
        ValueError: there is no such adapter, or a setting is out of range.
    """

    reserve_tokens = 64

    def __init__(
        self,
        lm: LanguageModel,
        adapter: str | None = "policy",
        temperature: float = 1.0,
        critic: Critic = "head",
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        if adapter is not None and adapter not in lm.adapters:
            raise ValueError(
                f"the model has no adapter {adapter!r}: add it with lm.adapters.add({adapter!r}). Without one, a "
                "policy has no reference to measure KL from; adapter=None makes a policy for sampling only"
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if critic not in ("head", "adapter", "network", "none"):
            raise ValueError(f"critic={critic!r} is unknown: choose 'head', 'adapter', 'network' or 'none'")
        self.lm = lm
        self.adapter = adapter
        self.temperature = temperature
        self.critic: Critic = critic
        self.truncation = Truncation(top_k, top_p, adapter)
        # The critic starts from value 0 (Ziegler et al. 2019), and is float32 whatever the model's dtype.
        self.value_head = nn.Linear(lm.hidden_size, 1, device=lm.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if critic == "adapter" and VALUE_ADAPTER not in lm.adapters:
            rank = lm.adapters.rank(adapter) if adapter is not None else 8
            lm.adapters.add(VALUE_ADAPTER, rank=rank, alpha=2 * rank, seed=seed + 1)
        self.network = lm.copy_of_base() if critic == "network" else None
        if adapter is not None:
            self.parameters()  # from now on they require gradients

    def truncated(self, top_k: int = 0, top_p: float = 1.0, by: str | None = None) -> "Policy":
        """A policy with the same weights that samples from the most probable tokens alone; by default from all.

        Args:
            top_k: a number of tokens; 0 is all.
            top_p: the probability that they hold; 1 is all.
            by: the adapter whose probabilities decide; None is the policy's own.
        """
        other = copy.copy(self)
        other.truncation = Truncation(top_k, top_p, self.adapter if by is None else by)
        return other

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def truncates(self) -> bool:
        """Whether it samples from the most probable tokens alone."""
        return self.truncation.active

    def parameters(self) -> list[nn.Parameter]:
        """The weights to train: of the adapter and of the critic.

        All of them require gradients afterwards. peft's own switches, such as `disable_adapter()`, turn that off.

        Raises:
            ValueError: the policy has no adapter.
        """
        if self.adapter is None:
            raise ValueError(
                "a policy without an adapter cannot be trained: the frozen reference shares its weights, so KL would "
                "be 0. Add an adapter: lm.adapters.add('policy'); Policy(lm, adapter='policy')"
            )
        parameters = self.lm.adapters.parameters(self.adapter) + self.critic_parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def critic_parameters(self) -> list[nn.Parameter]:
        """Those of `parameters` that belong to the critic alone: its last layer, and its adapter or network."""
        if self.critic == "none":
            return []
        trunk = self.lm.adapters.parameters(VALUE_ADAPTER) if self.critic == "adapter" else []
        trunk += [] if self.network is None else self.network.trunk_parameters()
        return [*trunk, *self.value_head.parameters()]

    @torch.no_grad()
    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Decoding:
        """Reads left-padded prompts; the result is the state for `act`."""
        fused, reserve = self.lm.fused(self.adapter), self.reserve_tokens
        frozen = fused is not None and self.adapter is not None and fused.weights.frozen_layers(self.adapter) > 0
        decoding = self.lm.start(input_ids, attention_mask, self.adapter, reserve, store_frozen_prefix=frozen)
        if self.critic == "adapter":
            decoding.critic = self.lm.start(input_ids, attention_mask, VALUE_ADAPTER, reserve)
        if self.truncates and self.truncation.judge != self.adapter:
            decoding.nucleus = self.lm.start(input_ids, attention_mask, self.truncation.judge, reserve)
        return decoding

    @torch.no_grad()
    def act(self, decoding: Decoding, uniform: Float[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]) -> Action:
        """Draws the next token by inverse CDF, and computes its log-probability and the state's value.

        Args:
            decoding: the state.
            uniform: [B] one number in [0, 1) per row. It is the only source of randomness, so that the tokens of a row
                depend on its own numbers alone.
            action_mask: [V] or [B, V], True where a token is allowed.
        """
        if not self.truncates:
            token, logp = draw_from_logits(decoding.masked_logits(self.temperature, action_mask), uniform)
            return Action(token, logp, self.value(decoding))
        allowed = self._allowed(decoding, action_mask)
        logp = log_probs(decoding.logits, self.temperature, allowed)
        token = draw(logp, uniform)
        return Action(token, logp.gather(1, token[:, None])[:, 0], self.value(decoding), pack_bits(allowed))

    @torch.no_grad()
    def advance(self, decoding: Decoding, token: Int[Tensor, " B"]) -> Decoding:
        """Reads the chosen tokens."""
        return decoding.advance(token)

    def select(self, decoding: Decoding, rows: Int[Tensor, " R"]) -> Decoding | None:
        """The state of these rows, in this order; a row may occur several times. None if the cache cannot do that."""
        return decoding.select(rows)

    def replace_rows(self, decoding: Decoding, rows: Int[Tensor, " R"], fresh: Decoding) -> Decoding:
        """The state with these rows replaced by those of `fresh`."""
        if not decoding.replace_rows(rows, fresh):
            raise ValueError(f"the cache of {self.lm.name!r} cannot restart single rows: decode without slots")
        return decoding

    @property
    def rescores(self) -> bool:
        """Whether `collect` computes log-probabilities and values again, in passes like those of the update.

        In reduced precision, decoding with merged weights rounds differently from training, and the first probability
        ratios would not be 1.
        """
        return reduced_precision(self.lm.model.dtype, self.device)

    @property
    def values_late(self) -> bool:
        """Whether values are computed after the rollout: a "network" critic gives none while acting."""
        return self.critic == "network"

    def value(self, decoding: Decoding) -> Float[Tensor, " B"]:
        """The critic's estimate of the return from the current state."""
        if self.critic in ("none", "network"):
            return torch.zeros(decoding.hidden.shape[0], device=decoding.hidden.device)
        hidden = decoding.hidden if decoding.critic is None else decoding.critic.hidden
        return self.value_head(hidden.float())[:, 0]

    def logp(
        self, decoding: Decoding, token: Int[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]
    ) -> Float[Tensor, " B"]:
        """log π of a possible next token, in nats; for a banned one, see `chosen_log_probs`."""
        return chosen_log_probs(decoding.logits, token, self.temperature, self._allowed(decoding, action_mask))

    def _allowed(self, decoding: Decoding, action_mask: Tensor) -> Tensor:
        if not self.truncates:
            return action_mask
        judge = decoding if decoding.nucleus is None else decoding.nucleus
        return self.truncation.mask(judge.logits, self.temperature, action_mask)

    def log_probs(self, sequences: Sequences) -> Float[Tensor, "B T V"]:
        """log π over the whole vocabulary at every step, −∞ for banned and truncated tokens."""
        logits, _ = self.lm.evaluate(sequences, self.adapter)
        return log_probs(logits, self.temperature, self._behaviour_mask(sequences, logits))

    def _behaviour_mask(self, sequences: Sequences, logits: Tensor) -> Tensor:
        """The tokens that could have been chosen: as stored, or recomputed for sequences of another policy."""
        if not self.truncates or sequences.sampling_mask is not None:
            return sequences.behaviour_mask()
        with torch.no_grad():
            if self.truncation.judge != self.adapter:
                logits, _ = self.lm.evaluate(sequences, self.truncation.judge)
            return self.truncation.mask(logits, self.temperature, sequences.environment_mask())

    def evaluate(self, sequences: Sequences, entropies: bool = True) -> Evaluation:
        """Log-probability, value and entropy of tokens that were chosen earlier, in one differentiable pass.

        Args:
            sequences: prompts and tokens.
            entropies: whether to compute the entropies; the fused pass returns zeros otherwise.
        """
        replayable = sequences.sampling_mask is not None or not self.truncates
        if replayable and self.lm.fused(self.adapter) is not None and not self.lm.head_is_trained:
            hidden = self.lm.hidden(sequences, self.adapter)
            head, mask = self.lm.output_head(self.temperature), self.lm.token_mask(sequences.action_mask)
            bits, tokens = sequences.mask_bits(sampling=self.truncates), sequences.tokens
            chosen, entropy = chosen_log_probs_from_hidden(hidden, tokens, head, mask, bits, entropies)
        else:
            logits, hidden = self.lm.evaluate(sequences, self.adapter)
            mask = self._behaviour_mask(sequences, logits)
            logp = log_probs(logits, self.temperature, mask)
            probs = logp.exp()
            # A banned token has probability 0 and log-probability −∞; p·log p must be 0 there, and its gradient too.
            entropy = -(probs * logp.masked_fill(~mask, 0.0)).sum(-1)
            chosen = logp.gather(2, sequences.tokens[..., None])[..., 0]
        chosen = chosen.masked_fill(~sequences.is_action, 0.0)
        return Evaluation(chosen, self.values(sequences, hidden), entropy)

    def compile(self) -> None:
        """Compiles the fused pass of `evaluate`, as far as it is differentiated: takes half a minute, once.

        Raises:
            ValueError: the pass goes through transformers, or there is no C++ compiler.
        """
        models = [(self.lm, self.adapter), *([] if self.network is None else [(self.network, None)])]
        for lm, adapter in models:
            fused = lm.fused(adapter)
            if fused is None:
                raise ValueError(f"only the fused pass can be compiled; this model's passes go {lm.path(adapter)}")
            fused.compile()

    def values(self, sequences: Sequences, hidden: Float[Tensor, "B T D"] | None = None) -> Float[Tensor, "B T"]:
        """The critic's estimates alone, differentiable.

        Args:
            sequences: prompts and tokens.
            hidden: the policy's own hidden states, if they are known.
        """
        if self.critic == "none":
            return torch.zeros(sequences.tokens.shape, device=self.device)
        if self.network is not None:
            hidden = self.network.hidden(sequences)
        elif self.critic == "adapter":
            hidden = self.lm.hidden(sequences, VALUE_ADAPTER)
        elif hidden is None:
            hidden = self.lm.hidden(sequences, self.adapter)
        return self.value_head(hidden.float())[..., 0]

    def save(self, folder: str | Path) -> None:
        """Saves the adapter in peft's format, with the critic beside it.

        Raises:
            ValueError: the policy has no adapter.
        """
        if self.adapter is None:
            raise ValueError("a policy without an adapter has nothing to save but the model: use lm.save(folder)")
        self.lm.adapters.save(folder, self.adapter)
        save_critic(folder, self.critic, self.value_head, self.lm, self.network)

    @classmethod
    def load(cls, lm: LanguageModel, folder: str | Path, temperature: float = 1.0, adapter: str = "policy") -> "Policy":
        """Loads a policy that `save` wrote, onto the base model that it was trained on.

        Raises:
            ValueError: there is no adapter in the folder, or a file is pickled, damaged, or of another model. The model
                is then as it was.
        """
        folder, before = Path(folder), set(lm.adapters)
        try:
            lm.adapters.load(folder, adapter)
            policy = cls(lm, adapter, temperature, load_value_adapter(folder, lm))
            if policy.critic != "none":
                load_value_head(folder, policy.value_head, policy.network)
        except ValueError:
            for name in set(lm.adapters) - before:
                lm.adapters.drop(name)
            raise
        return policy
