"""A policy over tokens: a language model with an adapter, a sampler and a critic."""

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from lmgym.devices import rounds
from lmgym.fused import chosen_log_probs_of, draw_from
from lmgym.models import Decoding, LanguageModel, Mask, Sequences, check_shapes, read_weights
from lmgym.models import load as load_model
from lmgym.sampling import chosen_log_probs, draw, log_probs, most_probable, pack_bits

Critic = Literal["head", "adapter", "network", "none"]


class Action(NamedTuple):
    """What `Policy.act` chose.

    Attributes:
        token: [B].
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
    """What `Policy.evaluate` finds for tokens that were chosen earlier; entries where no token was chosen mean nothing.

    Attributes:
        logp: [B, T] log π(token | state) in nats.
        value: [B, T] the critic's estimate.
        entropy: [B, T] of the distribution that the token was drawn from, in nats.
    """

    logp: Float[Tensor, "B T"]
    value: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]


@runtime_checkable
class TokenPolicy(Protocol):
    """What `collect` and the algorithms ask of a policy; `Policy` is one, and so is a table (`lmgym.testing`).

    `lmgym.testing.check_policy` checks the whole contract. The state that `start` returns belongs to the policy, and
    nobody else looks into it.

    Attributes:
        device: where its tensors live.
        temperature: divides the logits wherever it samples or scores.
        critic: "none" where `Action.value` and `Evaluation.value` are zeros.
        truncates: whether it samples from the most probable tokens alone, and says which in `Action.sampling_mask`.
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
    """What a policy may offer besides, so that a rollout drops rows that have ended and reads a group's prompt once."""

    def select(self, decoding: Any, rows: Int[Tensor, " R"]) -> Any:
        """The state of these rows, in this order, as often as they are named; None where that cannot be had."""
        ...

    def put(self, decoding: Any, rows: Int[Tensor, " R"], fresh: Any) -> Any:
        """The state with these rows replaced by those of `fresh`."""
        ...


class Policy:
    """Samples tokens, and scores them, at one temperature and under one set of masks.

    Args:
        lm: the language model.
        adapter: the adapter that is trained, added beforehand with `lm.add_adapter`; None is the model as it is, which
            can be sampled from and evaluated but not trained, because it would be its own reference.
        temperature: divides the logits, in sampling and in scoring.
        critic: "head" reads the value from the policy's own trunk with a linear layer; "adapter" gives the critic a
            LoRA adapter of its own on the same base (a second pass); "network" is a copy of the base of its own, all of
            whose weights are trained (as TRL has it), and gives no value while acting: `collect` computes values
            afterwards, in one pass; "none" has no values.
        seed: draws the value adapter.
        top_k: samples from this many most probable tokens alone; 0 from all. What was kept is stored with a rollout
            and scored: log π is that of the truncated distribution. The reference is not truncated, so that KL is not 0
            before training but −log of the probability that was kept.
        top_p: samples from the fewest most probable tokens that hold this much probability; 1 from all.

    Attributes:
        room: how many tokens `start` makes room for; a rollout sets it, for a cache that is larger than it must be is
            read more slowly.
    """

    room = 64

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
                f"the model has no adapter {adapter!r}: add one with lm.add_adapter({adapter!r}); without an adapter a "
                "policy has no reference to measure KL from (adapter=None gives a policy for sampling only)"
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if critic not in ("head", "adapter", "network", "none"):
            raise ValueError(f"critic={critic!r} is unknown: choose 'head', 'adapter', 'network' or 'none'")
        self.lm = lm
        self.adapter = adapter
        self.temperature = temperature
        self.critic = critic
        self._truncate(top_k, top_p, adapter)
        # Zero, so that the critic starts from no opinion (Ziegler et al. 2019); float32 whatever the model's dtype.
        self.value_head = nn.Linear(lm.hidden_size, 1, device=lm.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if critic == "adapter" and "value" not in lm.adapters:
            rank = lm.adapter_rank(adapter) if adapter is not None else 8
            lm.add_adapter("value", rank=rank, alpha=2 * rank, seed=seed + 1)
        self.network = lm.copy_of_base() if critic == "network" else None
        for parameter in self.parameters() if adapter is not None else ():
            parameter.requires_grad_(True)

    def _truncate(self, top_k: int, top_p: float, by: str | None) -> None:
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k={top_k} must not be negative, and top_p={top_p} must lie in (0, 1]")
        self.top_k, self.top_p, self.truncated_by = top_k, top_p, by

    def truncated(self, top_k: int = 0, top_p: float = 1.0, by: str | None = None) -> "Policy":
        """The same policy, sharing its weights, that samples from the most probable tokens alone.

        Args:
            top_k: how many; 0 is all.
            top_p: how much probability they hold; 1 is all.
            by: the adapter under which they are the most probable; None is the policy's own.
        """
        other = copy.copy(self)
        other._truncate(top_k, top_p, self.adapter if by is None else by)
        return other

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def truncates(self) -> bool:
        """Whether it samples from the most probable tokens alone."""
        return self.top_k > 0 or self.top_p < 1

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the adapter, and the critic's head and adapter.

        Raises:
            ValueError: the policy has no adapter.
        """
        if self.adapter is None:
            raise ValueError(
                "a policy without an adapter cannot be trained: the frozen reference shares its weights, so KL would "
                "read as 0. Add an adapter: lm.add_adapter('policy'); Policy(lm, adapter='policy')"
            )
        parameters = self.lm.adapter_parameters(self.adapter)
        if self.critic == "adapter":
            parameters += self.lm.adapter_parameters("value")
        if self.network is not None:
            parameters += self.network.trunk_parameters()
        if self.critic != "none":
            parameters += list(self.value_head.parameters())
        return parameters

    @torch.no_grad()
    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Decoding:
        """Reads left-padded prompts and stands ready to act."""
        trunk = self.lm.trunk(self.adapter)
        some_layers = trunk is not None and self.adapter is not None and trunk.lowest(self.adapter) > 0
        decoding = self.lm.start(input_ids, attention_mask, self.adapter, self.room, some_layers)
        if self.critic == "adapter":
            decoding.critic = self.lm.start(input_ids, attention_mask, "value", self.room)
        if self.truncates and self.truncated_by != self.adapter:
            decoding.nucleus = self.lm.start(input_ids, attention_mask, self.truncated_by, self.room)
        return decoding

    @torch.no_grad()
    def act(self, decoding: Decoding, uniform: Float[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]) -> Action:
        """Draws the next token by inverse CDF, and gives its log-probability and the state's value.

        Args:
            decoding: where decoding stands.
            uniform: [B] one number in [0, 1) a row. All of the randomness is here, so a row's tokens depend on nothing
                but its own numbers.
            action_mask: [V] or [B, V], True where a token is allowed.
        """
        if not self.truncates:
            token, logp = draw_from(decoding.masked_logits(self.temperature, action_mask), uniform)
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
        """The state of these rows, in this order, as often as they are named; None where the cache cannot do that."""
        return decoding.select(rows)

    def put(self, decoding: Decoding, rows: Int[Tensor, " R"], fresh: Decoding) -> Decoding:
        """The state with these rows replaced by those of `fresh`."""
        if not decoding.replace_rows(rows, fresh):
            raise ValueError(f"the cache of {self.lm.name!r} cannot restart single rows: decode without slots")
        return decoding

    @property
    def rescores(self) -> bool:
        """Whether `collect` computes log-probabilities and values anew, in passes like those of the update.

        In low precision, decoding with merged weights rounds otherwise than training does, and the probability ratio
        would start away from 1.
        """
        return rounds(self.lm.model.dtype, self.device)

    @property
    def values_late(self) -> bool:
        """Whether values come after the rollout: a critic that is a network of its own says nothing while acting."""
        return self.critic == "network"

    def value(self, decoding: Decoding) -> Float[Tensor, " B"]:
        """The critic's estimate of the return from where decoding stands."""
        if self.critic in ("none", "network"):
            return torch.zeros(decoding.hidden.shape[0], device=decoding.hidden.device)
        hidden = decoding.hidden if decoding.critic is None else decoding.critic.hidden
        return self.value_head(hidden.float())[:, 0]

    def logp(
        self, decoding: Decoding, token: Int[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]
    ) -> Float[Tensor, " B"]:
        """log π of a token that may come next, in nats; of a banned one, see `chosen_log_probs`."""
        return chosen_log_probs(decoding.logits, token, self.temperature, self._allowed(decoding, action_mask))

    def _allowed(self, decoding: Decoding, action_mask: Tensor) -> Tensor:
        if not self.truncates:
            return action_mask
        judge = decoding if decoding.nucleus is None else decoding.nucleus
        return self._most_probable(judge.logits, action_mask)

    def _most_probable(self, logits: Tensor, action_mask: Tensor) -> Tensor:
        return most_probable(log_probs(logits, self.temperature, action_mask), self.top_k, self.top_p)

    def log_probs(self, sequences: Sequences) -> Float[Tensor, "B T V"]:
        """log π over the whole vocabulary at every step, −∞ for banned tokens and those that truncation leaves out."""
        logits, _ = self.lm.evaluate(sequences, self.adapter)
        return log_probs(logits, self.temperature, self._behaviour_mask(sequences, logits))

    def _behaviour_mask(self, sequences: Sequences, logits: Tensor) -> Tensor:
        """What could have been chosen: as it was kept, or, for sequences that this policy did not draw, as it would."""
        if not self.truncates or sequences.sampling_mask is not None:
            return sequences.behaviour_mask()
        with torch.no_grad():
            if self.truncated_by != self.adapter:
                logits, _ = self.lm.evaluate(sequences, self.truncated_by)
            return self._most_probable(logits, sequences.action_mask)

    def evaluate(self, sequences: Sequences, entropies: bool = True) -> Evaluation:
        """Log-probability, value and entropy of tokens that were chosen earlier, in one differentiable pass.

        Args:
            sequences: prompts and tokens.
            entropies: whether they are wanted; the fused pass gives zeros otherwise.
        """
        replayable = sequences.sampling_mask is not None or not self.truncates
        if replayable and self.lm.trunk(self.adapter) is not None and not self.lm.head_is_trained:
            hidden = self.lm.hidden(sequences, self.adapter)
            head, mask = self.lm.output_head(self.temperature), self.lm.mask(sequences.action_mask)
            sampling_mask = sequences.sampling_mask if self.truncates else None
            chosen, entropy = chosen_log_probs_of(hidden, sequences.tokens, head, mask, sampling_mask, entropies)
        else:
            logits, hidden = self.lm.evaluate(sequences, self.adapter)
            mask = self._behaviour_mask(sequences, logits)
            logp = log_probs(logits, self.temperature, mask)
            probs = logp.exp()
            # A banned token has probability 0 and log-probability −∞; p·log p is 0 there, and its gradient too.
            entropy = -(probs * logp.masked_fill(~mask, 0.0)).sum(-1)
            chosen = logp.gather(2, sequences.tokens[..., None])[..., 0]
        chosen = chosen.masked_fill(~sequences.is_action, 0.0)
        return Evaluation(chosen, self.values(sequences, hidden), entropy)

    def compile(self) -> None:
        """Lets torch compile the fused pass of `evaluate` where it is differentiated: half a minute, once.

        Raises:
            ValueError: the pass goes through transformers, or there is no C++ compiler.
        """
        models = [(self.lm, self.adapter), *([] if self.network is None else [(self.network, None)])]
        for lm, adapter in models:
            trunk = lm.trunk(adapter)
            if trunk is None:
                raise ValueError(f"only the fused pass can be compiled, and this model's is {lm.path(adapter)}")
            trunk.compile()

    def values(self, sequences: Sequences, hidden: Float[Tensor, "B T D"] | None = None) -> Float[Tensor, "B T"]:
        """The critic's estimates alone, differentiable.

        Args:
            sequences: prompts and tokens.
            hidden: the policy's own hidden states, where they are known.
        """
        if self.critic == "none":
            return torch.zeros(sequences.tokens.shape, device=self.device)
        if self.network is not None:
            hidden = self.network.hidden(sequences)
        elif self.critic == "adapter":
            hidden = self.lm.hidden(sequences, "value")
        elif hidden is None:
            hidden = self.lm.hidden(sequences, self.adapter)
        return self.value_head(hidden.float())[..., 0]

    def save(self, folder: str | Path) -> None:
        """Saves the adapter as plain peft loads it, with the critic beside it."""
        if self.adapter is None:
            raise ValueError("a policy without an adapter has nothing to save but the model: use lm.save(folder)")
        self.lm.save_adapter(folder, self.adapter)
        if self.critic != "none":
            save_file(self.value_head.state_dict(), str(Path(folder) / "value_head.safetensors"))
        if self.critic == "adapter":
            self.lm.save_adapter(Path(folder) / "value", "value")
        if self.network is not None:
            self.network.save(Path(folder) / "value_network")

    @classmethod
    def load(cls, lm: LanguageModel, folder: str | Path, temperature: float = 1.0, adapter: str = "policy") -> "Policy":
        """Loads what `save` wrote onto the base model that it was trained on.

        Raises:
            ValueError: there is no adapter in the folder, or a file is pickled, damaged, or another model's. The model
                is then as it was.
        """
        folder, before = Path(folder), lm.adapters
        head = folder / "value_head.safetensors"
        try:
            lm.load_adapter(folder, adapter)
            critic: Critic = "head" if head.is_file() else "none"
            if (folder / "value").is_dir():
                lm.load_adapter(folder / "value", "value")
                critic = "adapter"
            if (folder / "value_network").is_dir():
                critic = "network"
            weights = {} if critic == "none" else read_weights(head)
            policy = cls(lm, adapter, temperature, critic)
            if critic != "none":
                check_shapes(head, weights, policy.value_head.state_dict())
                policy.value_head.load_state_dict(weights)
            if policy.network is not None:
                saved = load_model(str(folder / "value_network"), device=lm.device).model.state_dict()
                check_shapes(folder / "value_network", saved, policy.network.model.state_dict())
                policy.network.model.load_state_dict(saved)
        except ValueError:
            for name in set(lm.adapters) - set(before):
                lm.drop_adapter(name)
            raise
        return policy
