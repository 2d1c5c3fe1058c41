"""`lmgym play`: you are the policy."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import tyro

from agents.cli.names import setting_of
from agents.cli.options import Common, parse
from agents.lessons.play import Game, play
from lmgym.io import printable


@dataclass(frozen=True)
class Play(Common):
    """Be the policy: choose among the most probable tokens, and see score and KL."""

    task: tyro.conf.Positional[str] = "Tree"
    """A registered environment, such as "Tree" or "Sentiment"."""
    beta: float = 0.1
    """β, in score per nat of KL."""
    count: int = 8
    """How many tokens to choose from."""


def run(argv: Sequence[str]) -> int:
    """Plays one episode, line by line."""
    wanted = parse("play", Play, argv)
    if wanted.count < 1:
        raise ValueError(f"--count is {wanted.count}: show 1 token or more")
    setting = setting_of(wanted, "task")
    game = Game(setting.env(1, "test", kl="sampled", beta=wanted.beta), wanted.seed)
    print("Choose a token by its number; an empty line draws one. π_ref: the reference's probability.")
    if game.tree is not None:
        print("Q: the largest score − β·KL that can follow; π*: the soft-optimal policy's probability; *: the largest.")
    for text in play(game, _answers(), wanted.count):
        print("\n".join(printable(line) for line in text.splitlines()), flush=True)
    return 0


def _answers() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line
