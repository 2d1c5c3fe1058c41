"""Exercises of lesson 0: text as a game."""

from itertools import product
from typing import Any

from agents.lessons.exercise import Answer, demand, exercise, expect


@exercise(
    "0.1",
    "The return of an episode",
    "fill",
    '''
"""Exercise 0.1: the return of an episode.

An episode pays the rewards r_0, r_1, …, one for each token. The return is their discounted sum:

    G = r_0 + γ r_1 + γ² r_2 + …

Write `episode_return`. The list may be empty; its return is 0.
"""


def episode_return(rewards, gamma):
    """The discounted sum of a list of numbers."""
    ...
''',
    (
        "With γ = 1 the return is the plain sum. What changes for the second reward when γ = 0.5?",
        "Reward number t is multiplied by gamma ** t, and t starts at 0.",
        "Use sum(...) over enumerate(rewards).",
    ),
)
def episode_return(answer: Answer) -> None:
    """A sum by Horner's rule, which an answer is not likely to use."""
    for rewards, gamma in (([1.0, 2.0, 4.0], 0.5), ([0.0, 0.0, 1.0], 0.9), ([3.0, -1.0], 1.0), ([], 0.5)):
        wanted = 0.0
        for reward in reversed(rewards):
            wanted = reward + gamma * wanted
        mistakes = {
            "You do not discount: multiply reward t by γ to the power t": sum(rewards),
            "Your discount starts one step too early: the first reward is not discounted": gamma * wanted,
            "You multiply by γ·t instead of γ to the power t": sum(gamma * t * r for t, r in enumerate(rewards)),
            "You discount every reward by the same γ": rewards[0] + gamma * sum(rewards[1:]) if rewards else 0.0,
        }
        expect(answer.episode_return(list(rewards), gamma), wanted, f"rewards {rewards} and γ = {gamma}", mistakes)


class _Game:
    """A Gymnasium environment in miniature: tokens are numbers, and 0 ends the text."""

    def __init__(self, budget: int, truncates: bool):
        self.budget, self.truncates, self.taken, self.over, self.resets = budget, truncates, 0, True, 0

    def reset(self, seed: int | None = None) -> tuple[int, dict[str, Any]]:
        self.taken, self.over, self.resets = 0, False, self.resets + 1
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        demand(not self.over, "You call env.step after the episode has ended: stop at `terminated` and at `truncated`.")
        self.taken += 1
        terminated = action == 0 or (self.taken == self.budget and not self.truncates)
        truncated = self.taken == self.budget and not terminated
        self.over = terminated or truncated
        return self.taken, float(action) if not truncated else 0.5, terminated, truncated, {}


@exercise(
    "0.2",
    "An episode to its end",
    "mend",
    '''
"""Exercise 0.2: an episode to its end. This code has a bug.

`play` plays one episode of a Gymnasium environment and returns the sum of its rewards. `choose` takes an observation
and returns a token. An episode ends in one of two ways: `terminated`, the text is finished, or `truncated`, the
budget of tokens has run out. Find the bug and mend it.
"""


def play(env, choose):
    """The sum of the rewards of one episode."""
    observation, info = env.reset()
    total = 0.0
    terminated = False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(choose(observation))
        total += reward
    return total
''',
    (
        "Play a game in your head in which the policy never chooses the end token. What stops it?",
        "env.step returns two flags. The loop looks at one of them.",
        "Loop while not (terminated or truncated), and set both to False before the loop.",
    ),
)
def play(answer: Answer) -> None:
    """A game whose end and whose rewards are known, in each of the two ways to end."""
    for name, tokens, budget, truncates, wanted in (
        ("the tokens 3, 2 and the end", [3, 2, 0], 9, False, 5.0),
        ("a game that truncates after 3 tokens", [3, 2, 4, 1, 1, 1], 3, True, 5.5),
        ("a game that terminates after 2 tokens", [3, 2, 4, 1], 2, False, 5.0),
        ("an end at once", [0, 1, 1], 5, True, 0.0),
    ):
        env = _Game(budget, truncates)
        script = [*tokens, *[1] * 20]
        got = answer.play(env, lambda observation, script=script: script[observation])
        demand(env.resets == 1, f"For {name}, you call env.reset {env.resets} times: once starts the episode.")
        demand(env.over, f"For {name}, you stop before the episode has ended.")
        last = script[env.taken - 1] if not truncates else 0.5
        expect(got, wanted, name, {"You leave out the reward of the last step": wanted - last})


@exercise(
    "0.3",
    "How many texts are there?",
    "fill",
    '''
"""Exercise 0.3: how many texts are there?

The vocabulary has `letters` letters and one end token. An episode ends when the end token is chosen, or when `budget`
tokens have been chosen. Write `count_episodes`: the number of different episodes.

Example: with 2 letters and a budget of 2 there are 7: the end at once; a or b and then the end (2); two letters (4).
"""


def count_episodes(letters, budget):
    """The number of different token sequences that end an episode."""
    ...
''',
    (
        "List the episodes of the example by their length.",
        "An episode of k letters and an end exists for every k below the budget; there are letters ** k of them.",
        "Add the texts that reach the budget without an end: letters ** budget. Then use sum(... for k in range(...)).",
    ),
)
def count_episodes(answer: Answer) -> None:
    """Counts by listing every sequence of tokens and cutting it at its first end."""
    for letters, budget in ((2, 2), (4, 3), (1, 5), (3, 1)):
        end = letters
        cut = {
            path[: path.index(end) + 1] if end in path else path for path in product(range(letters + 1), repeat=budget)
        }
        mistakes = {
            "You count the texts that reach the budget without an end token, and not those that end earlier": letters
            ** budget,
            "You count tokens after the end: an episode stops at its first end token": (letters + 1) ** budget,
            "You leave out the texts that reach the budget without an end token": len(cut) - letters**budget,
        }
        expect(
            answer.count_episodes(letters, budget), len(cut), f"{letters} letters and a budget of {budget}", mistakes
        )
