"""What the benchmark measures of a policy: gold score, KL to the reference, length and variety."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from agents import functional as F
from agents.benchmark.suite import Row
from agents.evaluate import distinct, evaluate
from lmgym.env import TokenVectorEnv
from lmgym.exact import Tree, enumerate_tree
from lmgym.models import Mask, Sequences
from lmgym.policy import Action, Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect
from lmgym.sampling import draw, log_probs
from lmgym.tasks.base import Prompt

SEED = 20_240_229
"""Of the evaluation's prompts and random numbers, which are the same for all agents."""
GROUP = 8
"""Best of n is measured from groups of this times n completions, and on this many rollouts."""
PASS_ROWS = 4096
"""Completions in one pass, when all are listed."""


class BestOf:
    """A policy that answers with the best of n completions of another one, by the score.

    Attributes:
        policy: writes the completions.
        n: how many.
    """

    def __init__(self, policy: TokenPolicy, n: int):
        self.policy, self.n = policy, n


class Measure:
    """Measures policies on held-out prompts of a row. The meter counts nothing of it.

    Args:
        row: of the suite.
        arguments: of the environment, with test prompts and the row's β.
    """

    def __init__(self, row: Row, arguments: Mapping[str, Any]):
        self.row, self.arguments = row, arguments
        self.env = TokenVectorEnv(row.test_rows, **arguments)
        self.trees = self._all_trees() if row.exact else []
        self._joined = _join([tree.sequences for tree in self.trees]) if self.trees else None

    @torch.no_grad()
    def __call__(self, policy: "TokenPolicy | BestOf") -> dict[str, float]:
        """Gold and score, KL in nats per completion, tokens per completion, and the variety of word pairs."""
        if isinstance(policy, BestOf):
            return self._best_of(policy)
        figures = {name: figure.mean for name, figure in evaluate(policy, self.env, SEED, samples=0).figures.items()}
        kl = figures.get("kl_exact_nats_per_sequence", 0.0)
        found = {"gold": figures["gold"], "score": figures["score"], "kl": kl}
        found |= {"length": figures["tokens"], "distinct_2": figures["distinct_2"]}
        return found | self._exact(policy) if self.trees else found

    def reference_level(self) -> float:
        """The metric of the reference, over all completions. Its KL is 0."""
        return float(np.mean([float((tree.reference_logp.exp() * tree.scores).sum()) for tree in self.trees]))

    def optimum(self) -> float:
        """The largest gold − β·KL of all policies: β log Z, mean over prompts."""
        return float(np.mean([tree.optimum for tree in self.trees]))

    def _all_trees(self) -> list[Tree]:
        """All completions of all test prompts, with their gold scores."""
        task, rng = self.env.task, np.random.default_rng(SEED)
        texts = sorted({task.sample(rng, "test").text for _ in range(2000)})
        env = TokenVectorEnv(1, **{**self.arguments, "score": task.gold})
        return [enumerate_tree(env, Prompt(text)) for text in texts]

    def _exact(self, policy: TokenPolicy) -> dict[str, float]:
        """Gold, KL and length as expectations over all completions."""
        assert self._joined is not None
        steps = torch.cat([_chosen(policy, part) for part in _chunks(self._joined)])
        sizes = [len(tree.scores) for tree in self.trees]
        golds, kls, lengths = [], [], []
        for tree, logp in zip(self.trees, steps.split(sizes), strict=True):
            probs = logp.exp()
            golds.append(float((probs * tree.scores).sum()))
            kls.append(float(torch.where(probs > 0, probs * (logp - tree.reference_logp), 0.0).sum()))
            lengths.append(float((probs * tree.sequences.is_action.sum(1)).sum()))
        return {"gold": float(np.mean(golds)), "kl": float(np.mean(kls)), "length": float(np.mean(lengths))}

    def _best_of(self, best: BestOf) -> dict[str, float]:
        """The same of the best of n, from groups of `GROUP` · n completions of a prompt."""
        env, n, group = self.env, best.n, GROUP * best.n
        rows = -(-env.num_envs // group) * group
        env = TokenVectorEnv(rows, **self.arguments)
        buffer, weights = RolloutBuffer.like(env), torch.tensor(F.best_weights(group, n))
        columns: dict[str, list[Tensor]] = {"gold": [], "score": [], "kl": [], "length": []}
        texts: list[str] = []
        for update in range(GROUP):
            collect(best.policy, env, buffer, Stream(SEED, update, samples=group))
            completions = env.completions()
            scores = buffer.score.cpu().view(-1, group)
            order = scores.sort(dim=1, stable=True).indices  # equal scores are in random order already
            gold = torch.tensor(env.task.gold(env.prompts, completions)).view(-1, group)
            tokens = buffer.is_action.sum(1).cpu().view(-1, group).float()
            for name, column in (("gold", gold), ("score", scores), ("length", tokens)):
                columns[name].append(column.float().gather(1, order) @ weights)
            alike = torch.full_like(scores, 1 / group)
            columns["kl"].append(F.forward_kl(F.best_of_n_probs(scores, alike, n).log(), alike.log()))
            texts += [completions[i * group + int(k)].text for i, k in enumerate(scores[:, :n].argmax(1))]
        found = {name: float(torch.cat(parts).double().mean()) for name, parts in columns.items()}
        return found | {"distinct_2": distinct(texts)}


def _chosen(policy: TokenPolicy, sequences: Sequences) -> Tensor:
    """[N] log π of whole completions, in nats."""
    each = policy.log_probs(sequences).double().cpu()
    chosen = each.gather(2, sequences.tokens.cpu()[..., None])[..., 0]
    return torch.where(sequences.is_action.cpu(), chosen, 0.0).sum(1)


def _join(parts: list[Sequences]) -> Sequences:
    """The rows of several batches under one mask, whose prompts are left-padded to the longest."""
    width = max(part.prompt_ids.shape[1] for part in parts)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (width - x.shape[1], 0))

    return replace(
        parts[0],
        prompt_ids=torch.cat([padded(part.prompt_ids) for part in parts]),
        prompt_mask=torch.cat([padded(part.prompt_mask) for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        is_action=torch.cat([part.is_action for part in parts]),
    )


def _chunks(sequences: Sequences) -> list[Sequences]:
    return [sequences[start : start + PASS_ROWS] for start in range(0, len(sequences.tokens), PASS_ROWS)]


class UniformPolicy:
    """Chooses uniformly among the allowed tokens: the level of chance.

    Args:
        device: of its tensors.
    """

    critic, truncates = "none", False

    def __init__(self, device: torch.device):
        self.device, self.temperature = device, 1.0

    def parameters(self) -> list[nn.Parameter]:
        """There is nothing to train."""
        return []

    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Int[Tensor, " B"]:
        """The text does not matter."""
        return torch.zeros_like(input_ids[:, 0])

    def act(self, decoding: Tensor, uniform: Float[Tensor, " B"], action_mask: Bool[Tensor, "*rows V"]) -> Action:
        """Draws a token."""
        logp = log_probs(action_mask.expand(len(uniform), -1) * 0.0, 1.0, action_mask)
        token = draw(logp, uniform)
        return Action(token, logp.gather(1, token[:, None])[:, 0], torch.zeros_like(uniform))

    def advance(self, decoding: Tensor, token: Int[Tensor, " B"]) -> Tensor:
        """The text does not matter."""
        return torch.zeros_like(token)

    def log_probs(self, sequences: Sequences) -> Float[Tensor, "B T V"]:
        """−log of the number of allowed tokens, −∞ for the others."""
        mask = sequences.environment_mask()
        return log_probs(mask.expand(*sequences.tokens.shape, -1) * 0.0, 1.0, mask)

    def evaluate(self, sequences: Sequences) -> Evaluation:
        """Log-probability and entropy of the chosen tokens."""
        logp = self.log_probs(sequences)
        chosen = logp.gather(2, sequences.tokens[..., None])[..., 0].masked_fill(~sequences.is_action, 0.0)
        return Evaluation(chosen, torch.zeros_like(chosen), torch.special.entr(logp.exp()).sum(-1))
