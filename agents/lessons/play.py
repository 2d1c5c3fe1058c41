"""A person as the policy: the most probable tokens, what each is worth where that can be computed, and the price."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.env import TokenAction, TokenVectorEnv
from lmgym.exact import Path, Tree, enumerate_tree
from lmgym.models import Sequences
from lmgym.policy import Policy

SMALL = 20_000
"""Worlds with at most this many completions are listed, and the best choice is shown."""


@dataclass(frozen=True)
class Choice:
    """A token that can be chosen.

    Attributes:
        token: its id.
        text: what it adds, or "(end)".
        probability: π_ref(token | text so far).
        value: Q, the largest score − β·KL that can still be reached after it; None if the world is too large.
        optimal: π*(token | text so far) of the soft-optimal policy; None if the world is too large.
    """

    token: int
    text: str
    probability: float
    value: float | None
    optimal: float | None


class Game:
    """One episode of an environment with one row and `kl="sampled"`, played from its reference.

    A person who picks a token chooses it with probability 1, so it costs β · (0 − log π_ref) of reward.

    Args:
        env: the environment; it must have a score.
        seed: draws the prompt.
    """

    def __init__(self, env: TokenVectorEnv, seed: int = 0):
        self.env, self.beta = env, env.kl_controller.beta
        self._policy = Policy(env.model, adapter=None, temperature=env.reference.temperature)
        env.reset(seed=seed)
        self.prompt = env.prompts[0]
        self.path: Path = ()
        self.total, self.kl_nats, self.score, self.over = 0.0, 0.0, math.nan, False
        self.tree = self._tree()
        self._values = {} if self.tree is None else self.tree.soft_values()
        self._ends = {} if self.tree is None else dict(zip(self.tree.paths, self.tree.scores.tolist(), strict=True))

    def _tree(self) -> Tree | None:
        widest = int(self.env.action_mask_table.sum(1).max())
        if self.env.stop or self.env.on_limit != "terminate" or widest**self.env.max_new_tokens > 50 * SMALL:
            return None
        try:
            return enumerate_tree(self.env, self.prompt, SMALL)
        except ValueError:
            return None

    def log_probs(self) -> Tensor:
        """[V] log π_ref of the next token, −∞ for what the environment does not allow."""
        ids, mask = self.env.prompt_block()
        tokens = torch.tensor([[*self.path, self.env.model.pad_id]], device=ids.device)
        table = self.env.action_mask_table[: tokens.shape[1]]
        asked = Sequences(ids, mask, tokens, torch.ones_like(tokens, dtype=torch.bool), table)
        with torch.no_grad():
            found = self._policy.log_probs(asked)[0, -1]
        return found.masked_fill(~table[-1], -torch.inf).cpu()

    def choices(self, count: int = 8) -> list[Choice]:
        """The most probable tokens, the most probable first."""
        logp = self.log_probs()
        best = logp.topk(min(count, int((logp > -torch.inf).sum()))).indices.tolist()
        return [self._choice(token, float(logp[token])) for token in best]

    def _choice(self, token: int, logp: float) -> Choice:
        path = (*self.path, token)
        value = self._ends.get(path, self._values.get(path))
        optimal = None
        if value is not None:
            optimal = math.exp(logp + (value - self._values[self.path]) / self.beta)
        ids = self.env.model.text.encode_prompts([self.prompt])[0]
        text = self.env.model.text
        added = text.decode_completion(ids, list(path))[len(text.decode_completion(ids, list(self.path))) :]
        shown = "(end)" if token in self.env.model.eos_ids else added
        return Choice(token, shown, math.exp(logp), value, optimal)

    def take(self, token: int) -> None:
        """Chooses a token."""
        self.kl_nats -= float(self.log_probs()[token])
        action = TokenAction(torch.tensor([token]), torch.zeros(1))
        _, reward, terminated, truncated, _ = self.env.step(action)
        self.path, self.total = (*self.path, token), self.total + float(reward[0])
        self.over = bool(terminated[0] or truncated[0])
        if self.over:
            self.score = float(self.env.rewards.score[0])

    @property
    def text(self) -> str:
        """What has been written after the prompt."""
        ids = self.env.model.text.encode_prompts([self.prompt])[0]
        return self.env.model.text.decode_completion(ids, list(self.path))


def play(game: Game, answers: Iterable[str], count: int = 8) -> Iterator[str]:
    """Plays one episode: yields what to print, and reads an answer after each list of choices.

    Args:
        game: the episode.
        answers: the number of a choice, or an empty line for a token drawn from the reference.
        count: how many choices to show.
    """
    generator = torch.Generator().manual_seed(0)
    lines = iter(answers)
    while not game.over:
        choices = game.choices(count)
        yield "\n".join([f"{game.prompt.text}|{game.text}", *_table(choices)])
        token: int | None = None
        while token is None:
            answer = next(lines, None)
            if answer is None:
                yield "stopped before the end"
                return
            if not answer.strip():
                token = int(torch.multinomial(game.log_probs().exp(), 1, generator=generator))
            elif answer.strip().isdecimal() and 1 <= int(answer) <= len(choices):
                token = choices[int(answer) - 1].token
            else:
                most = len(choices)
                yield f"{answer.strip()!r} is no choice: a number from 1 to {most}, or an empty line to draw one"
        game.take(token)
    yield _result(game)


def _table(choices: list[Choice]) -> list[str]:
    # Who picks with certainty pays −β log π_ref: the largest Q + β log π_ref is the largest π*.
    best = max((c.optimal for c in choices if c.optimal is not None), default=None)
    lines = []
    for number, choice in enumerate(choices, 1):
        line = f"  {number}  {choice.text!r:16} π_ref {choice.probability:.3f}"
        if choice.value is not None and choice.optimal is not None:
            line += f"   Q {choice.value:+.3f}   π* {choice.optimal:.3f}" + ("  *" if choice.optimal == best else "")
        lines.append(line)
    return lines


def _result(game: Game) -> str:
    lines = [
        f"{game.prompt.text}|{game.text}",
        f"score {game.score:.3f} − β {game.beta:g} · {game.kl_nats:.2f} nats = {game.total:.3f}",
    ]
    if game.tree is not None:
        lines.append(
            f"The best score is {float(game.tree.scores.max()):.3f}. The soft-optimal policy has score − β·KL = "
            f"{game.tree.optimum:.3f} on average: it pays less KL, because it does not always choose the same."
        )
    return "\n".join(lines)
