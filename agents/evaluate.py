"""Evaluation of a policy on held-out prompts: scores, KL to the reference, diversity, texts."""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import functional as F
from agents.training.pass_memory import decoding_slots
from lmgym.env import Finish, TokenVectorEnv
from lmgym.models import LanguageModel, Sequences
from lmgym.policy import Policy, TokenPolicy
from lmgym.ranks import current, gather_blocks, in_shares, shares
from lmgym.reward import exact_kl
from lmgym.rollout import RolloutBuffer, Stream, collect
from lmgym.sampling import log_probs


@dataclass(frozen=True)
class Figure:
    """A mean over completions and its standard error."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class EvaluationReport:
    """The result of `evaluate`.

    Attributes:
        figures: the measured quantities by name; see `METRICS`.
        samples: some completions as plain data, with the reward, KL, value and advantage of each token.
        rows: for every completion the CRC-32 of its prompt, as "prompt", and its `ROW_FIGURES`: what a paired
            comparison of two policies needs.
    """

    figures: Mapping[str, Figure]
    samples: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, float]] = ()

    def figures_to_dict(self) -> dict[str, dict[str, float]]:
        """The figures, as plain data."""
        return {name: {"mean": f.mean, "stderr": f.stderr} for name, f in self.figures.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return {"figures": self.figures_to_dict(), "samples": list(self.samples), "rows": list(self.rows)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EvaluationReport":
        """The inverse of `to_dict`, also after a round trip through JSON, where values that are not finite are null."""

        def number(value: float | None) -> float:
            return math.nan if value is None else value

        figures = {k: Figure(number(f["mean"]), number(f["stderr"])) for k, f in data["figures"].items()}
        samples = [{**sample, "score": number(sample["score"])} for sample in data["samples"]]
        return cls(figures, samples, data.get("rows", ()))


METRICS = {
    "gold": "gold score, which no learner sees, of held-out completions",
    "score": "the score that the policy is trained on",
    "kl_nats_per_sequence": "KL to the reference, k1 summed over a completion's tokens, in nats",
    "kl_exact_nats_per_sequence": "KL to the reference, exact over the vocabulary at visited states, summed, in nats",
    "entropy_nats_per_token": "entropy of the next-token distribution, in nats",
    "tokens": "tokens per completion",
    "finished_share": "share of completions that ended before the token budget",
    "distinct_2": "number of distinct word pairs / number of word pairs, over all completions",
}

ROW_FIGURES = ("gold", "score", "kl_nats_per_sequence", "tokens")
"""The figures that are kept for every completion, where they are measured."""


@torch.no_grad()
def evaluate(
    policy: TokenPolicy, env: TokenVectorEnv, seed: int = 0, samples: int = 12, gamma: float = 1.0, lam: float = 0.95
) -> EvaluationReport:
    """Runs one episode in each row and measures the completions.

    The same seed gives the same prompts and the same random numbers, which reduces the noise of a comparison of two
    policies. "gold" is left out if the task has no gold score; KL is left out if the policy is the reference itself.

    Args:
        policy: the policy to evaluate.
        env: has one row for each prompt; make it with split="test".
        seed: the seed of prompts and samples.
        samples: the number of completions to return with their tokens.
        gamma: γ of GAE, for the advantages of the samples.
        lam: λ of GAE, for the advantages of the samples.
    """
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(seed, 0), slots=decoding_slots(policy, env))
    completions = env.completions()
    gold = torch.tensor(in_shares(env.task.gold, env.prompts, completions)).float() if env.task.has_gold else None
    exact, entropy = _over_vocabulary(policy, env, buffer.sequences)
    tokens = buffer.is_action.sum(1).float()
    columns = {
        **({} if gold is None else {"gold": gold}),
        "score": buffer.score,
        "kl_nats_per_sequence": ((buffer.logp - buffer.reference_logp) * buffer.is_action).sum(1),
        "kl_exact_nats_per_sequence": exact.sum(1),
        "entropy_nats_per_token": entropy.sum(1) / tokens,
        "tokens": tokens,
        "finished_share": (buffer.finish != Finish.LENGTH).float(),
    }
    if isinstance(policy, Policy) and policy.lm is env.model and policy.adapter == env.reference.adapter:
        columns = {name: column for name, column in columns.items() if not name.startswith("kl_")}
    rows = len(completions)
    figures = {
        name: Figure(float(column.mean()), float(column.std() / rows**0.5) if rows > 1 else 0.0)
        for name, column in columns.items()
    }
    figures["distinct_2"] = Figure(distinct([c.text for c in completions]), 0.0)
    advantages, _ = F.gae(buffer.rewards, buffer.values, buffer.is_action, buffer.bootstrap, gamma, lam)
    shown = [
        _sample(env, buffer, advantages, row, None if gold is None else float(gold[row]))
        for row in range(min(samples, rows))
    ]
    kept = {name: columns[name].tolist() for name in ROW_FIGURES if name in columns}
    kept["prompt"] = [zlib.crc32(p.text.encode(errors="surrogatepass")) for p in env.prompts]
    return EvaluationReport(
        figures, shown, [dict(zip(kept, row, strict=True)) for row in zip(*kept.values(), strict=True)]
    )


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams / all word n-grams; 1 if no n-gram repeats.

    Li et al. 2016 (https://arxiv.org/abs/1510.03055).
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
    """The mean BLEU of each text against all others: 1 if all are equal, 0 if no two share a word.

    Zhu et al. 2018 (https://arxiv.org/abs/1802.01886). BLEU is the geometric mean over k = 1 … n of the clipped
    precision of word k-grams, times the brevity penalty (Papineni et al. 2002, https://aclanthology.org/P02-1040).
    Above k = 1, one is added to both counts, so that a short text has no precision of 0 (Lin & Och 2004, "ORANGE").
    Texts without words are left out.

    Args:
        texts: at least two.
        n: the longest k-gram.

    Raises:
        ValueError: fewer than two texts have words.
    """
    split = [words for words in map(str.split, texts) if words]
    if len(split) < 2:
        raise ValueError(f"self-BLEU compares texts, and {len(split)} of {len(texts)} have words: give at least two")
    lengths, precisions = Counter(map(len, split)), np.ones(len(split))
    for k in range(1, n + 1):
        counts = [Counter(tuple(words[i : i + k]) for i in range(len(words) - k + 1)) for words in split]
        most: dict[tuple[str, ...], list[int]] = {}  # how often the two texts that hold a k-gram most often hold it
        for gram, times in ((gram, times) for own in counts for gram, times in own.items()):
            most[gram] = sorted([*most.get(gram, [0, 0]), times])[-2:]
        for row, own in enumerate(counts):
            # Among the other texts: the second one, if this text is the first.
            matched = sum(min(times, most[gram][times < most[gram][1]]) for gram, times in own.items())
            precisions[row] *= (matched + (k > 1)) / max(1, own.total() + (k > 1))
    total = 0.0
    for words, precision in zip(split, precisions, strict=True):
        length = len(words)
        others = (other for other, texts in lengths.items() if texts > (other == length))
        nearest = min(others, key=lambda other: (abs(other - length), other))
        total += precision ** (1 / n) * math.exp(min(0.0, 1 - nearest / length))
    return float(total / len(split))


def _over_vocabulary(
    policy: TokenPolicy, env: TokenVectorEnv, sequences: Sequences, rows: int = 32, max_logits: int = 2**23
) -> tuple[Tensor, Tensor]:
    """[B, T] exact KL to the reference and [B, T] entropy, in nats, at each visited state; 0 outside the actions.

    A pass takes at most `rows` rows, and fewer where they would have more than `max_logits` logits.
    """
    kls, entropies = (torch.zeros(sequences.tokens.shape) for _ in range(2))
    rows = max(1, min(rows, max_logits // (sequences.tokens.shape[1] * env.model.vocabulary)))
    ranks = current()
    blocks = shares(len(kls), ranks.world)
    own = blocks[ranks.rank]
    for start in range(own.start, own.stop, rows):
        chosen = slice(start, min(start + rows, own.stop))
        part = sequences[chosen]
        logp = policy.log_probs(part)
        logits, _ = env.model.evaluate(part, env.reference.adapter)
        reference = log_probs(logits, env.reference.temperature, part.environment_mask())
        kls[chosen] = (exact_kl(logp, reference) * part.is_action).cpu()
        entropies[chosen] = (torch.special.entr(logp.exp()).sum(-1) * part.is_action).cpu()
    if ranks.world > 1:
        gather_blocks(ranks, [kls, entropies], blocks)
    return kls, entropies


def token_texts(lm: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What each token of a completion adds to its text; the name of an end-of-sequence token.

    Args:
        lm: whose tokenizer made the tokens.
        prompt: the ids of the prompt, without padding.
        tokens: the ids of the completion.
    """
    pieces, before = [], ""
    for count, token in enumerate(tokens, start=1):
        text = lm.text.decode_completion(prompt, list(tokens[:count]))
        # An end-of-sequence token decodes to an empty text, so show its name instead.
        pieces.append(text[len(before) :] if token not in lm.eos_ids else str(lm.tokenizer.decode([token])))
        before = text
    return pieces


def _sample(
    env: TokenVectorEnv, buffer: RolloutBuffer, advantages: Tensor, row: int, gold: float | None
) -> dict[str, Any]:
    completion = env.completions([row])[0]
    prompt = buffer.prompt_ids[row][buffer.prompt_mask[row]].tolist()
    chosen = buffer.tokens[row][buffer.is_action[row]].tolist()
    kl = (buffer.logp - buffer.reference_logp)[row].tolist()
    pieces = token_texts(env.model, prompt, chosen)
    columns = zip(
        pieces, buffer.rewards[row].tolist(), kl, buffer.values[row].tolist(), advantages[row].tolist(), strict=False
    )
    names = ("text", "reward", "kl", "value", "advantage")
    tokens = [dict(zip(names, row, strict=True)) for row in columns]
    return {
        "prompt": env.prompts[row].text,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "score": float(buffer.score[row]),
        "gold": gold,
        "tokens": tokens,
    }
