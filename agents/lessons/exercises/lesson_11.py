"""Exercises of lesson 11: your own algorithm. `lmgym.testing.check_algorithm` is the oracle."""

from agents.lessons.exercise import Answer, Wrong, described, exercise
from lmgym.testing import check_algorithm

MEANINGS = {
    "a seed is a run": "Two runs with the same seed must be equal: take random numbers from Stream(seed, update) alone",
    "a learning rate of 0": "A learning rate of 0 still changes the policy: give `lr` to the optimizer",
    "it yields finite metrics": "Yield a dictionary of finite numbers after each update",
    "its gradient is the policy gradient": "The gradient does not point where the exact policy gradient points: look "
    "at the sign, the baseline, the returns, and which tokens the loss contains",
    "the order of the rows": "The result depends on the order of the rows: compare a row only with its own group",
    "padding does not matter": "The padding of the prompts reaches the result: evaluate `buffer.sequences` as they are",
    "the split of a batch": "The result depends on how a batch is split",
    "what lies behind the end": "Numbers behind the end of a text reach your loss: choose tokens with buffer.is_action",
    "a constant score": "Your loss makes texts longer or shorter although every text scores the same: do not divide by "
    "the length of a row",
    "it learns when to stop": "The policy does not learn to stop: the end token is an action, so leave it in the loss",
}
"""What a failed check means, by the beginning of its name."""


def grade(answer: Answer, skip: tuple[str, ...]) -> None:
    """Runs the checks of the contract but for the names in `skip`, and says what the failed ones mean."""

    def train(policy: object, env: object, *, seed: int, lr: float, updates: int) -> object:
        return answer.train(policy, env, seed, lr, updates)

    try:
        check_algorithm(train, skip=("optimum", *skip), show=False)  # type: ignore[arg-type]
    except AssertionError as error:
        failed = [line[6:] for line in str(error).splitlines() if line.startswith("FAIL")]
        said = [
            f"{meaning}. ({line})" for line in failed for name, meaning in MEANINGS.items() if line.startswith(name)
        ]
        raise Wrong(" ".join(said) or str(error)) from None
    except Wrong:
        raise
    except Exception as error:  # `train` is a generator: its errors come while it runs
        raise Wrong(f"`train` raises an error: {described(error, answer.file)}") from error


LOOP = '''
import torch

import lmgym


def train(policy, env, seed, lr, updates):
    """Trains the policy; yields a dictionary of metrics after each update."""
    buffer = lmgym.RolloutBuffer.like(env)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for update in range(updates):
        lmgym.collect(policy, env, buffer, lmgym.Stream(seed, update))
        returns = buffer.rewards.flip(1).cumsum(1).flip(1)
        advantages = returns - returns[buffer.is_action].mean()
        logp = policy.evaluate(buffer.sequences).logp
LOSS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield {"score": float(buffer.score.mean())}
'''


@exercise(
    "11.1",
    "Numbers behind the end",
    "mend",
    '"""Exercise 11.1: numbers behind the end. This code has a bug.\n\n'
    "`train` is REINFORCE, written with `lmgym` alone. Texts end at different places. What a policy returns behind\n"
    "the end of a text means nothing. `buffer.is_action` is True where there is a token. Find the bug and mend it.\n"
    '"""\n' + LOOP.replace("LOSS", "        loss = -(advantages * logp).sum() / buffer.rows"),
    (
        "Which entries does the sum contain?",
        "Choose the tokens before the sum: torch.where(buffer.is_action, …, 0.0).",
        "loss = -torch.where(buffer.is_action, advantages * logp, 0.0).sum() / buffer.rows",
    ),
)
def behind_the_end(answer: Answer) -> None:
    """The checks that take milliseconds, and the gradient."""
    grade(answer, ("length", "stop"))


@exercise(
    "11.2",
    "Learning to stop",
    "mend",
    '"""Exercise 11.2: learning to stop. This code has a bug.\n\n'
    "`train` is REINFORCE, written with `lmgym` alone. Somebody thought that the end token is padding, and left it\n"
    'out of the loss. Find the line and mend it.\n"""\n'
    + LOOP.replace(
        "LOSS",
        "        learned = buffer.is_action & (buffer.tokens != env.model.eos_ids[0])\n"
        "        loss = -torch.where(learned, advantages * logp, 0.0).sum() / buffer.rows",
    ),
    (
        "Which decision of the policy makes a text shorter?",
        "The end token is a sampled action like any other. buffer.is_action contains it.",
        "learned = buffer.is_action",
    ),
)
def learning_to_stop(answer: Answer) -> None:
    """The gradient, and whether the policy learns when to stop."""
    grade(answer, ("seed", "lr", "metrics", "order", "padding", "split", "length"))


@exercise(
    "11.3",
    "Your own RLOO",
    "fill",
    '''
"""Exercise 11.3: your own RLOO.

Write REINFORCE with the leave-one-out baseline of exercise 3.1. Each prompt has `GROUP` completions, which are adjacent
rows: lmgym.Stream(seed, update, GROUP) arranges that. The return of a completion is the sum of its rewards, KL
included. Fill in the two lines.
"""

import torch

import lmgym

GROUP = 4


def train(policy, env, seed, lr, updates):
    """Trains the policy; yields a dictionary of metrics after each update."""
    buffer = lmgym.RolloutBuffer.like(env)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for update in range(updates):
        lmgym.collect(policy, env, buffer, lmgym.Stream(seed, update, GROUP))
        returns = buffer.rewards.sum(1).view(-1, GROUP)
        advantages = ...  # [prompts, GROUP]: each return less the mean of the others of its group
        logp = policy.evaluate(buffer.sequences).logp
        loss = ...  # one number: minus advantage · logp, summed over a row's tokens, mean over the rows
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield {"score": float(buffer.score.mean())}
''',
    (
        "The sum of the others is returns.sum(1, keepdim=True) - returns.",
        "advantages.view(-1, 1) has one entry per row of the batch, and fits logp [B, T].",
        "loss = -torch.where(buffer.is_action, advantages.view(-1, 1) * logp, 0.0).sum() / buffer.rows",
    ),
)
def own_rloo(answer: Answer) -> None:
    """All checks but those of lesson 11.1 and 11.2 that take longest."""
    # Another order of the rows is another assignment of prompts to groups, which RLOO may notice.
    grade(answer, ("order", "stop"))
