"""The small world of the algorithm checks: a task that can be enumerated, and variants of environment and policy.

The variants change what must not matter to an algorithm: padding, the order of the rows, the split of a batch, and what
a policy returns behind the end of a row.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmgym.env import TokenVectorEnv
from lmgym.models import LanguageModel, Sequences, load
from lmgym.policy import Action, Evaluation
from lmgym.tasks.base import Completion, Prompt, ScoreFunction, Split
from lmgym.tasks.probe import Tree as TreeTask


class SmallTree(TreeTask):
    """Write up to two letters after a prompt of one or two letters, under any score."""

    def __init__(self, score: ScoreFunction | None = None):
        self._score = score

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return PROMPTS[rng.integers(len(PROMPTS))]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return super().score(prompts, completions) if self._score is None else self._score(prompts, completions)


# No prompt is the prefix of another one: after the prompt "a", the text "ab" has one token left, and as a prompt it
# would have two. A policy that reads the text only could not tell them apart.
PROMPTS = [Prompt(text) for text in ("a", "b", "ca", "cb", "dc", "dd")]


class PaddedEnv(TokenVectorEnv):
    """The same environment with all prompt columns, including those that are padding in every row."""

    def prompt_block(self) -> tuple[Tensor, Tensor]:
        return self.prompt_ids, self.prompt_mask


class ReversedEnv(TokenVectorEnv):
    """The same environment with its rows in the opposite order."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=seed[::-1] if isinstance(seed, list) else seed, options=options)


@dataclass
class WrappedPolicy:
    """Forwards everything to another policy."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def temperature(self) -> float:
        return self.inner.temperature

    @property
    def critic(self) -> Any:
        return self.inner.critic

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def truncates(self) -> bool:
        return self.inner.truncates

    def parameters(self) -> list[nn.Parameter]:
        return self.inner.parameters()

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner.start(input_ids, attention_mask)

    def act(self, decoding: Any, uniform: Tensor, action_mask: Tensor) -> Action:
        return self.inner.act(decoding, uniform, action_mask)

    def advance(self, decoding: Any, token: Tensor) -> Any:
        return self.inner.advance(decoding, token)

    def evaluate(self, sequences: Sequences) -> Evaluation:
        return self.inner.evaluate(sequences)

    def log_probs(self, sequences: Sequences) -> Tensor:
        return self.inner.log_probs(sequences)


class ReversedPolicy(WrappedPolicy):
    """Gives each row the random number of its mirror image: with `ReversedEnv`, the same rollout in reverse order."""

    def act(self, decoding: Any, uniform: Tensor, action_mask: Tensor) -> Action:
        return self.inner.act(decoding, uniform.flip(0), action_mask)


class GarbagePolicy(WrappedPolicy):
    """Returns large arbitrary values, with a gradient, where no action was taken. An algorithm must not use them."""

    def evaluate(self, sequences: Sequences) -> Evaluation:
        def spoil(x: Tensor, by: float) -> Tensor:
            return torch.where(sequences.is_action, x, by + 7 * x[:, :1])

        found = self.inner.evaluate(sequences)
        return Evaluation(spoil(found.logp, 3.0), spoil(found.value, -50.0), spoil(found.entropy, 20.0))


class SplitPolicy(WrappedPolicy):
    """Evaluates a batch in two parts."""

    def evaluate(self, sequences: Sequences) -> Evaluation:
        rows = torch.arange(len(sequences.tokens), device=sequences.tokens.device).tensor_split(2)
        parts = [self.inner.evaluate(sequences[part]) for part in rows if len(part)]
        return Evaluation(*(torch.cat(column) for column in zip(*parts, strict=True)))


def load_probe() -> LanguageModel:
    """A new probe model that caches the few texts it encodes and decodes, which halves the time of the checks."""
    lm = load("probe")
    encode = functools.cache(lm.text.encode)
    decode = functools.cache(lambda ids, decode=lm.text.decode: decode(ids))
    lm.text.encode, lm.text.decode = lambda text: list(encode(text)), lambda ids: decode(tuple(ids))
    return lm
