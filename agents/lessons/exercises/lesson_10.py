"""Exercises of lesson 10: the whole pipeline."""

from itertools import combinations

from agents.lessons.exercise import Answer, demand, exercise, expect


@exercise(
    "10.1",
    "Held-out prompts",
    "mend",
    '''
"""Exercise 10.1: held-out prompts. This code has a bug.

`split` sorts prompts into those to train on and those to test on. The same text may occur several times in the list.
No text may be in both parts, and no prompt may be lost. The test part should hold the first `test` different texts,
with all their copies. Find the bug and mend it.
"""


def split(prompts, test):
    """Two lists, (train, test), from a list of texts."""
    return prompts[test:], prompts[:test]
''',
    (
        "Split ['a', 'b', 'a', 'c'] with test = 1. Where is 'a'?",
        "Collect the first `test` different texts in a set before you split.",
        "chosen = set(list(dict.fromkeys(prompts))[:test]), and then two lists with `in chosen`.",
    ),
)
def split(answer: Answer) -> None:
    """The properties: nothing in both parts, nothing lost, the right number of texts."""
    for prompts, test in ((["a", "b", "a", "c"], 1), (["x", "x", "y", "z", "y"], 2), (["p", "q"], 0)):
        got = answer.split(list(prompts), test)
        demand(isinstance(got, tuple) and len(got) == 2, "Return two lists, (train, test).")
        train, held_out = map(list, got)
        case = f"prompts {prompts} and test = {test}"
        both = sorted(set(train) & set(held_out))
        demand(not both, f"For {case}, {both} is in both parts: the test would measure what was learned by heart.")
        demand(
            sorted(train + held_out) == sorted(prompts),
            f"For {case}, a prompt was lost or doubled: every copy belongs to one part.",
        )
        wanted = set(list(dict.fromkeys(prompts))[:test])
        demand(
            set(held_out) == wanted,
            f"For {case}, the test part holds {sorted(set(held_out))}; "
            f"expected the first different texts, {sorted(wanted)}.",
        )


@exercise(
    "10.2",
    "From a ranking to pairs",
    "fill",
    '''
"""Exercise 10.2: from a ranking to pairs.

An annotator ranks K texts, the best first. A reward model is trained on pairs (chosen, rejected). Write `pairs`: every
pair of the ranking, once, the better text first. Equal texts say nothing: leave such pairs out.
"""


def pairs(ranking):
    """A list of tuples (chosen, rejected), from a list of texts, the best first."""
    ...
''',
    (
        "Three texts give three pairs.",
        "itertools.combinations(ranking, 2) keeps the order.",
        "[(a, b) for a, b in combinations(ranking, 2) if a != b]",
    ),
)
def pairs(answer: Answer) -> None:
    """Every pair of places is looked up."""
    for ranking in (["good", "fair", "bad"], ["a", "b", "c", "d"], ["a", "a", "b"], ["alone"]):
        got = [tuple(pair) for pair in answer.pairs(list(ranking))]
        wanted = [(a, b) for a, b in combinations(ranking, 2) if a != b]
        backwards = [pair for pair in got if pair[0] == pair[1] or (pair[::-1] in wanted and pair not in wanted)]
        equal = [pair for pair in backwards if pair[0] == pair[1]]
        demand(not equal, f"For {ranking}, {equal[:1]} compares a text with itself or its copy: leave it out.")
        demand(not backwards, f"For {ranking}, {backwards[:1]} is the wrong way round: the better text comes first.")
        missing = [pair for pair in wanted if pair not in got]
        demand(not missing, f"For {ranking}, {missing[:1]} is missing: K texts give K(K − 1)/2 pairs.")
        demand(
            len(got) == len(wanted),
            f"For {ranking}, a pair occurs too often: {len(got)} pairs, expected {len(wanted)}.",
        )


@exercise(
    "10.3",
    "What is learned from a demonstration",
    "mend",
    '''
"""Exercise 10.3: what is learned from a demonstration. This code has a bug.

A demonstration is a prompt, a completion, and the end token; padding fills the row up. Fine-tuning makes the completion
and its end token more probable. The prompt is read, not learned. `learned` says at which places there is a loss. Find
the bug and mend it.
"""


def learned(prompt, completion, width):
    """A list of `width` booleans: `prompt` tokens, `completion` tokens, one end token, then padding."""
    places = []
    for place in range(width):
        places.append(place >= prompt and place < prompt + completion)
    return places
''',
    (
        "Write the row down for a prompt of 2 tokens, a completion of 3, and a width of 8.",
        "At which place does the end token stand? A model that never learns it never stops.",
        "place <= prompt + completion",
    ),
)
def learned(answer: Answer) -> None:
    """Writes the row out, letter by letter."""
    for prompt, completion, width in ((2, 3, 8), (0, 2, 3), (3, 0, 5)):
        row = "p" * prompt + "c" * completion + "e" + "." * (width - prompt - completion - 1)
        mistakes = {
            "The end token is not learned: the model would never stop": [float(c == "c") for c in row],
            "The prompt is learned: it is given, and only read": [float(c in "pce") for c in row],
            "The padding is learned": [float(c != "p") for c in row],
            "You are one place too early": [float(c in "ce") for c in row[1:] + "."],
        }
        got = [float(bool(x)) for x in answer.learned(prompt, completion, width)]
        expect(
            got,
            [float(c in "ce") for c in row],
            f"a prompt of {prompt}, a completion of {completion}, {width} places",
            mistakes,
        )
