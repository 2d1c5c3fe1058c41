"""A gold score for stories: how happy they are. Use it as `--gold examples/happy_stories.py:happy`.

    lmgym train --model path/to/a/story/model --prompts stories.jsonl --opening-words 20 \
        --gold examples/happy_stories.py:happy
"""

import re
from collections.abc import Sequence

from lmgym.tasks import Completion, Prompt

HAPPY = frozenset(
    {
        "played",
        "playing",
        "kind",
        "nice",
        "good",
        "great",
        "best",
        "proud",
        "excited",
        "thank",
        "thanked",
        "share",
        "shared",
        "enjoy",
        "enjoyed",
        "beautiful",
        "safe",
        "joy",
    }
)
SAD = frozenset(
    {
        "no",
        "not",
        "never",
        "couldn't",
        "didn't",
        "fell",
        "scream",
        "screamed",
    }
)


def happy(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """The number of different happy words minus the number of sad words, clipped to ±5 and divided by 5: in [−1, 1].

    A happy word counts once, however often it occurs, so that repetition does not increase the score.
    """
    scores = []
    for completion in completions:
        words = re.findall(r"[a-z']+", completion.text.lower())
        balance = len(HAPPY & set(words)) - sum(word in SAD for word in words)
        scores.append(max(-5, min(5, balance)) / 5)
    return scores
