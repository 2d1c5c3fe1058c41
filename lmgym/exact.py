"""Exact optima of environments that are small enough to enumerate, with any model.

With reward `score − β · KL(π ‖ π_ref)` the optimal policy is known in closed form: Ziegler et al. 2019, eq. 3
(https://arxiv.org/abs/1909.08593); Rafailov et al. 2023, eq. 4 (https://arxiv.org/abs/2305.18290); Levine 2018 for the
recursion (https://arxiv.org/abs/1805.00909). Over a tree of tokens, backwards from the leaves:

    Q(s, a) = score(s + a)  at the end,  V(s + a)  otherwise
    V(s)    = β log Σ_a π_ref(a | s) exp(Q(s, a) / β)
    π*(a|s) = π_ref(a | s) exp((Q(s, a) − V(s)) / β)

so V(prompt) = β log Z is the largest value of the objective. The tests compare the algorithms with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lmgym.env import TokenVectorEnv
from lmgym.models import Sequences
from lmgym.sampling import log_probs, pack_bits
from lmgym.tasks.base import Completion, Prompt

Path = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Every completion of one prompt.

    Attributes:
        prompt: the prompt.
        paths: the N token sequences that end an episode.
        scores: [N] their scores.
        reference_logp: [N] log π_ref of each whole sequence, in nats.
        sequences: the paths as padded tensors, N rows.
        beta: β, in score per nat.
        eos_ids: the end-of-sequence tokens.
    """

    prompt: Prompt
    paths: tuple[Path, ...]
    scores: Float[Tensor, " N"]
    reference_logp: Float[Tensor, " N"]
    sequences: Sequences
    beta: float
    eos_ids: tuple[int, ...]
    _steps: Float[Tensor, "N T V"]

    @property
    def log_z(self) -> float:
        """log Z = log Σ π_ref(y) exp(score(y) / β), summed over whole sequences."""
        return float((self.reference_logp + self.scores / self.beta).logsumexp(0))

    @property
    def optimum(self) -> float:
        """β log Z: the largest value of E[score] − β·KL over all policies."""
        return self.beta * self.log_z

    def soft_values(self) -> dict[Path, float]:
        """V(s) of every inner state, by backward recursion; V of the empty path is β log Z."""
        children: dict[Path, dict[int, float]] = {}
        reference = {
            path[:t]: row[t]
            for path, row in zip(self.paths, self._steps.double(), strict=True)
            for t in range(len(path))
        }
        values: dict[Path, float] = dict(zip(self.paths, self.scores.double().tolist(), strict=True))
        leaves = set(self.paths)
        for length in range(max(map(len, self.paths)), 0, -1):
            for path in [p for p in values if len(p) == length]:
                children.setdefault(path[:-1], {})[path[-1]] = values[path]
            for state in [s for s in children if len(s) == length - 1]:
                tokens = torch.tensor(list(children[state]))
                q = torch.tensor(list(children[state].values()), dtype=torch.float64)
                values[state] = float(self.beta * (reference[state][tokens] + q / self.beta).logsumexp(0))
        return {state: value for state, value in values.items() if state not in leaves}

    def soft_optimal(self) -> Float[Tensor, " N"]:
        """π*(y) of every sequence: π_ref(y) exp(score(y)/β) / Z."""
        return (self.reference_logp + self.scores / self.beta - self.log_z).exp()

    def objective(self, logp: Float[Tensor, " N"]) -> float:
        """The exact E_π[score] − β·KL(π ‖ π_ref) of a policy, given the log-probability of each sequence in nats."""
        gain = self.scores - self.beta * (logp - self.reference_logp)
        return float(torch.where(logp > -torch.inf, logp.exp() * gain, 0.0).sum())

    def total_variation(self, logp: Float[Tensor, " N"]) -> float:
        """The total variation distance from the optimum, ½ Σ_y |π(y) − π*(y)|."""
        return float((logp.exp() - self.soft_optimal()).abs().sum() / 2)

    def sequence_logp(self, step_log_probs: Float[Tensor, "N T V"]) -> Float[Tensor, " N"]:
        """Sums per-step log-probabilities, such as `Policy.log_probs(tree.sequences)`, along each sequence."""
        chosen = step_log_probs.gather(2, self.sequences.tokens[..., None])[..., 0]
        return torch.where(self.sequences.is_action, chosen, 0.0).sum(1)


def enumerate_tree(env: TokenVectorEnv, prompt: Prompt, max_sequences: int = 100_000) -> Tree:
    """Lists every completion that the environment's masks and budget allow, with its score and reference probability.

    Args:
        env: gives model, reference, masks, budget, score and β. Its state is not changed.
        prompt: the start of all sequences.
        max_sequences: the largest number of sequences to list.

    Raises:
        ValueError: there are more sequences than `max_sequences`, or the environment truncates or has stop strings.
    """
    if env.on_limit != "terminate" or env.stop:
        raise ValueError("only environments with on_limit='terminate' and without stop strings can be enumerated")
    steps, eos = env.max_new_tokens, env.model.eos_ids
    open_paths: list[Path] = [()]
    paths: list[Path] = []
    masks: dict[Path, UInt8[Tensor, " W"]] = {}
    for t in range(steps):
        if not open_paths:
            break
        allowed = env.state.masks.after([prompt] * len(open_paths), open_paths)
        masks |= zip(open_paths, pack_bits(allowed), strict=True)
        longer = [(*open_paths[i], token) for i, token in allowed.nonzero().tolist()]
        paths += [p for p in longer if p[-1] in eos or t + 1 == steps]
        open_paths = [p for p in longer if p[-1] not in eos and t + 1 < steps]
        if len(paths) + len(open_paths) > max_sequences:
            raise ValueError(
                f"more than {max_sequences} completions of {prompt.text!r}: lower max_new_tokens or ban more tokens"
            )
    sequences = _pack(env, prompt, paths, masks)
    completions = [
        Completion(
            env.model.text.decode_completion(env.model.text.encode_prompts([prompt])[0], list(path)),
            "stop" if path[-1] in env.model.eos_ids else "length",
            len(path),
            list(path),
        )
        for path in paths
    ]
    scores = torch.tensor(env.score([prompt] * len(paths), completions), dtype=torch.float64)
    if env.missing_eos_score is not None:
        unfinished = torch.tensor([c.finish_reason == "length" for c in completions])
        scores[unfinished] = env.missing_eos_score
    with torch.no_grad():
        logits, _ = env.model.evaluate(sequences, env.reference.adapter)
        each = log_probs(logits, env.reference.temperature, sequences.environment_mask()).double().cpu()
    chosen = each.gather(2, sequences.tokens.cpu()[..., None])[..., 0]
    reference_logp = torch.where(sequences.is_action.cpu(), chosen, 0.0).sum(1)
    return Tree(
        prompt, tuple(paths), scores, reference_logp, sequences, env.kl_controller.beta, env.model.eos_ids, each
    )


def policy_logp(tree: Tree, step_log_probs: Callable[[Sequences], Tensor]) -> Float[Tensor, " N"]:
    """log π of every sequence of a tree, for a policy's `log_probs` method."""
    with torch.no_grad():
        return tree.sequence_logp(step_log_probs(tree.sequences)).double().cpu()


def _pack(env: TokenVectorEnv, prompt: Prompt, paths: list[Path], masks: dict[Path, Tensor]) -> Sequences:
    device, count, steps = env.model.device, len(paths), env.max_new_tokens
    ids = env.model.text.encode_prompts([prompt])[0]
    tokens: Int[Tensor, "N T"] = torch.full((count, steps), env.model.pad_id, device=device)
    is_action: Bool[Tensor, "N T"] = torch.zeros(count, steps, dtype=torch.bool, device=device)
    text_mask: UInt8[Tensor, "N T W"] | None = None
    if env.state.reads_text:
        text_mask = torch.full((count, steps, len(masks[()])), 255, dtype=torch.uint8, device=device)
    for row, path in enumerate(paths):
        tokens[row, : len(path)] = torch.tensor(path, device=device)
        is_action[row, : len(path)] = True
        if text_mask is not None:
            text_mask[row, : len(path)] = torch.stack([masks[path[:t]] for t in range(len(path))])
    prompt_ids = torch.tensor(ids, device=device).repeat(count, 1)
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    return Sequences(prompt_ids, prompt_mask, tokens, is_action, env.action_mask_table, text_mask=text_mask)
