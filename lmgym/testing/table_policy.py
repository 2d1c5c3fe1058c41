"""`TablePolicy`: a policy that is a table."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmgym.env import TokenVectorEnv
from lmgym.exact import Tree
from lmgym.models import Mask, Sequences
from lmgym.policy import Action, Evaluation
from lmgym.sampling import draw, log_probs


class TablePolicy:
    """A policy without a network: a logit for every state and token, and a value for every state.

    A state is the whole text so far, so the table has (V + 1)^(P + T) rows and suits small probes only. It can
    represent every policy: if an algorithm misses the optimum with it, the algorithm is at fault.

    Args:
        vocabulary: V.
        tokens: P + T, the longest text.
        temperature: divides the logits.
        critic: "none" has no values.
        device: where the table is stored.
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
        """The trained parameters: the logits, and the values if there is a critic."""
        return [self.logits] if self.critic == "none" else [self.logits, self.values]

    def _read(self, state: Int[Tensor, " B"], token: Int[Tensor, " B"], is_token: Bool[Tensor, " B"]) -> Tensor:
        # A text is a number in base V + 1 without the digit 0, so that padding on the left does not change it.
        return torch.where(is_token, state * self.base + token + 1, state)

    def _states(self, sequences: Sequences) -> Int[Tensor, "B T"]:
        state = self.start(sequences.prompt_ids, sequences.prompt_mask)
        states = [state]
        for t in range(sequences.tokens.shape[1] - 1):
            state = self._read(state, sequences.tokens[:, t], sequences.is_action[:, t])
            states.append(state)
        return torch.stack(states, 1)

    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Int[Tensor, " B"]:
        """Reads the prompts. The decoding state is one number for each row."""
        state = torch.zeros_like(input_ids[:, 0])
        for column in range(input_ids.shape[1]):
            state = self._read(state, input_ids[:, column], attention_mask[:, column].bool())
        return state

    @torch.no_grad()
    def act(
        self, decoding: Int[Tensor, " B"], uniform: Float[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]
    ) -> Action:
        # Rows that have ended are still read while others run; their actions are not used.
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
