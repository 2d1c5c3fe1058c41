"""Direct preference optimisation, DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

The policy is its own reward model: there is no rollout, no separate reward model and no critic. The loss raises the
probability of each comparison's chosen completion, and lowers that of the rejected one, both relative to the reference.
A ranking of K completions counts as K (K − 1) / 2 pairs. β is the environment's; a larger β keeps the policy closer to
the reference.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents import functional as F
from agents.learner import STEP_METRICS, Learner
from agents.training import require
from lmgym.env import TokenVectorEnv
from lmgym.models import EncodedExample, Example, ExampleBatch, collate_examples, encode_example
from lmgym.policy import Policy, TokenPolicy
from lmgym.preferences import Comparison
from lmgym.tasks.base import Prompt


@dataclass(frozen=True)
class Config:
    """DPO's own settings."""

    epochs: int = 1
    """Passes over the pairs."""
    minibatch_pairs: int = 16
    """Pairs per optimizer step."""
    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong (conservative DPO, Mitchell 2023)."""
    finished: bool = True
    """Whether the texts are complete, so that the policy also learns to end them; turn it off for truncated texts."""
    max_tokens: int = 512
    """Token budget; longer texts are truncated."""

    def __post_init__(self) -> None:
        require.in_range(self, "epochs", "minibatch_pairs", "max_tokens", least=1)
        require.in_range(self, "label_smoothing", least=0, below=0.5)


METRICS = {
    "loss/train": "DPO's loss, mean over the minibatch's pairs",
    "margin/train": "β (log-ratio of the chosen − log-ratio of the rejected), mean over pairs, before the step",
    "accuracy/train": "share of pairs whose margin is positive",
    "optimizer/lr": "learning rate",
} | STEP_METRICS


def train(
    policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config, comparisons: Sequence[Comparison]
) -> Iterator[dict[str, float]]:
    """Trains on comparisons, with the environment's reference and β; yields the `METRICS` of each step."""
    require.given(comparisons, "comparisons", "dpo", "pass comparisons (--preferences FILE.jsonl), or use online_dpo")
    whole, _ = require.adapter(policy, "dpo")
    require.reference(policy, env)
    pairs = encode_pairs(whole, comparisons, config)
    learned = [any(len(ids) > given for ids, given in pair) for pair in pairs]
    require.something_to_learn(learned, "pairs", config.max_tokens, learner.say)
    pairs = [pair for pair, teaches in zip(pairs, learned, strict=True) if teaches]
    beta, metrics = env.kl_controller.beta, learner.metrics

    def loss(part: Sequence[tuple[EncodedExample, EncodedExample]]) -> Tensor:
        """[pairs] DPO's loss of each pair."""
        chosen, rejected = log_ratios(whole, env, part)
        loss, margin = F.dpo(chosen, rejected, beta, config.label_smoothing), beta * (chosen - rejected)
        metrics.add("loss/train", loss)
        metrics.add("margin/train", margin)
        metrics.add("accuracy/train", (margin > 0).float())
        return loss

    def describe(pair: tuple[EncodedExample, EncodedExample]) -> str:
        return repr([whole.lm.text.decode(ids) for ids, _ in pair])

    def length(pair: tuple[EncodedExample, EncodedExample]) -> int:
        return 2 * max(len(ids) for ids, _ in pair)

    for _, indices in learner.shuffled_minibatches(len(pairs), config.minibatch_pairs, config.epochs):
        minibatch = [pairs[i] for i in indices.tolist()]
        count = len(minibatch)
        learner.minimise(minibatch, lambda part, n=count: loss(part).sum() / n, describe, model=whole, tokens=length)
        yield learner.drain() | {"optimizer/lr": learner.lr}


def encode_pairs(
    policy: Policy, comparisons: Sequence[Comparison], config: Config
) -> list[tuple[EncodedExample, EncodedExample]]:
    """All pairs of all rankings, each with the better completion first."""

    def row(prompt: Prompt, text: str) -> EncodedExample:
        return encode_example(policy.lm, Example.of(prompt, text, config.finished), config.max_tokens)

    ranked = [[row(c.as_prompt, text) for text in c.ranked] for c in comparisons]
    return [(rows[i], rows[j]) for rows in ranked for i in range(len(rows)) for j in range(i + 1, len(rows))]


def log_ratios(
    policy: Policy, env: TokenVectorEnv, pairs: Sequence[tuple[EncodedExample, EncodedExample]]
) -> tuple[Tensor, Tensor]:
    """log π(y)/π_ref(y) in nats of the chosen and of the rejected completions, [pairs] each."""
    texts: ExampleBatch = collate_examples(policy.lm, [row for pair in pairs for row in pair])
    logp = policy.truncated().evaluate(texts.sequences).logp
    reference = env.reference.evaluate(texts.sequences)
    ratios = torch.where(texts.is_learned, logp - reference, 0.0).sum(1)
    return ratios[::2], ratios[1::2]


@torch.no_grad()
def evaluate(
    policy: Policy, env: TokenVectorEnv, comparisons: Sequence[Comparison], config: Config
) -> dict[str, float]:
    """Margin and accuracy on held-out comparisons."""
    pairs = encode_pairs(policy, comparisons, config)
    parts = [log_ratios(policy, env, pairs[i : i + 64]) for i in range(0, len(pairs), 64)]
    margin = env.kl_controller.beta * torch.cat([chosen - rejected for chosen, rejected in parts])
    return {"margin/test": float(margin.mean()), "accuracy/test": float((margin > 0).float().mean())}
