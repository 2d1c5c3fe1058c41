"""`lmgym chat`: a conversation with a chat model."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from agents.cli.finished import parse_with_run
from agents.cli.names import CHAT_TOKENS, model_named, policy_in, require_template
from agents.cli.options import Common
from agents.pipeline.samples import unscored
from lmgym.env import TokenVectorEnv
from lmgym.io import printable
from lmgym.policy import Policy
from lmgym.registry import find_spec
from lmgym.rollout import RolloutBuffer, Stream, decode
from lmgym.tasks import Completion, Prompt, Split, Task


@dataclass(frozen=True)
class Chat(Common):
    """Talk with a chat model, line by line."""

    task: tyro.conf.Positional[str] = "Sentiment"
    """Folder of a finished run, whose policy then answers. Without one, --model answers."""
    policy: str | None = None
    """Folder of an adapter, trained on --model; or the folder of a run."""
    temperature: float = 1.0
    """Sampling temperature; lower values give more probable answers."""


def run(argv: Sequence[str]) -> int:
    """Reads a user's message from each line of the standard input, and prints the answers.

    An empty line begins a new conversation; the end of the input ends the command.
    """
    wanted, _ = parse_with_run("chat", Chat, argv, ("policy", "temperature"))
    lm = model_named(wanted.model or find_spec(wanted.task).model, wanted)
    require_template(lm)
    policy = policy_in(wanted.policy, lm, wanted.temperature)
    answer = wanted.max_new_tokens or CHAT_TOKENS
    longest = (lm.positions or 8192) - answer
    env = TokenVectorEnv(
        1, task=_Talk(), model=lm, max_prompt_tokens=longest, max_new_tokens=answer, kl="none",
        temperature=wanted.temperature,
    )  # fmt: skip
    asks = sys.stdin.isatty()
    if asks:
        print("An empty line begins a new conversation; Ctrl-D ends.")
    for text in answers(policy, env, _lines(asks), wanted.system, wanted.seed):
        print(text, flush=True)
    return 0


class _Talk(Task):
    """What the user types. The data of a run are not needed for it, and need not be there."""

    name = "chat"

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return Prompt(messages=[{"role": "user", "content": "Hello"}])

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return unscored(prompts, completions)


def answers(policy: Policy, env: Any, lines: Iterable[str], system: str | None = None, seed: int = 0) -> Iterator[str]:
    """The policy's answer to each line, with "…" where the token budget ended it.

    Args:
        policy: a chat model with an adapter, or without.
        env: an environment of one row, with room for a long prompt.
        lines: the user's messages; an empty one begins a new conversation, and gets no answer.
        system: an instruction that comes first in every conversation.
        seed: of sampling.
    """
    instruction: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    messages, buffer = list(instruction), RolloutBuffer.like(env)
    for number, line in enumerate(lines):
        if not line.strip():
            messages = list(instruction)
            continue
        messages.append({"role": "user", "content": line})
        length = len(env.model.text.chat.encode(messages))
        if length > env.max_prompt_tokens:
            messages.pop()
            yield (
                f"(not sent: the conversation would have {length} tokens, and {env.max_prompt_tokens} leave room for "
                "an answer. Write less, or begin a new conversation with an empty line)"
            )
            continue
        decode(policy, env, buffer, Stream(seed, number), [Prompt(messages=messages)])
        (completion,) = env.completions()
        messages.append({"role": "assistant", "content": completion.text.strip() or "…"})
        yield printable(completion.text) + ("" if completion.finish_reason == "stop" else " …")


def _lines(asks: bool) -> Iterator[str]:
    """The lines of the standard input, with a prompt where a person types them."""
    if not asks:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    console = Console()
    while True:
        try:
            yield console.input("> ")
        except EOFError:
            return
