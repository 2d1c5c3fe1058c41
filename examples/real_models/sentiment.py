"""Positive continuations of film reviews (Ziegler et al. 2019) with a real model: data, and scores no learner sees.

    python examples/real_models/sentiment.py DATA.jsonl       # rows {"text", "label"}: writes the four files below
    lmgym reward --model FOLDER --preferences pairs_a.jsonl --test-preferences pairs_test.jsonl --out runs/reward_a
    lmgym reward --model FOLDER --preferences pairs_b.jsonl --test-preferences pairs_test.jsonl --out runs/reward_b
    lmgym train --model FOLDER --prompts openings.jsonl --opening-words 4 \\
        --reward runs/reward_a/reward_model --gold examples/real_models/sentiment.py:gold

The policy is paid by the reward model of one half of the sentences. The gold score is the probability of "positive" by
a reward model of the other half, so the policy cannot exploit errors that only its own reward model makes. A word list
is a third judge. Paper: https://arxiv.org/abs/1909.08593.
"""

import functools
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import lmgym
from lmgym.io import read_jsonl

_GOOD = """good great best better love loved loves lovely funny fun charming beautiful beautifully delightful enjoyable
entertaining fascinating moving powerful brilliant wonderful touching fresh clever smart perfect excellent superb
compelling engaging rich warm strong remarkable satisfying terrific hilarious honest heart gem"""
_BAD = """bad worst worse boring dull awful terrible poor poorly lame stupid silly tired weak flat empty waste mess
mediocre predictable pointless tedious unfunny bland fails failed lacks lacking hollow shallow contrived annoying ugly
forgettable clumsy ridiculous disappointing disappointment unfortunately nothing never"""
GOOD, BAD = frozenset(_GOOD.split()), frozenset(_BAD.split())


def gold(prompts: Sequence[lmgym.Prompt], completions: Sequence[lmgym.Completion]) -> list[float]:
    """The probability that the text is positive, by the reward model in the folder $SENTIMENT_GOLD."""
    model = _judge(os.environ.get("SENTIMENT_GOLD", "runs/reward_b/reward_model"))
    return [1 / (1 + math.exp(-score / model.gain)) for score in model(prompts, completions)]


def words(prompts: Sequence[lmgym.Prompt], completions: Sequence[lmgym.Completion]) -> list[float]:
    """The share of good words among the good and bad words of the completion; 0.5 without any."""
    found = []
    for completion in completions:
        text = [word.strip(".,!?\"'()").lower() for word in completion.text.split()]
        good, bad = sum(word in GOOD for word in text), sum(word in BAD for word in text)
        found.append(good / (good + bad) if good + bad else 0.5)
    return found


@functools.cache
def _judge(folder: str) -> lmgym.RewardModel:
    return lmgym.RewardModel.load(folder)


def main(data: str, folder: str = ".") -> None:
    """Writes pairs (positive, negative) of two halves of the sentences and held-out ones, and openings to continue."""
    rng = random.Random(0)
    by_label: dict[int, list[str]] = {0: [], 1: []}
    for row in read_jsonl(data, required=("text", "label")):
        by_label[row["label"]].append(row["text"])
    pairs = []
    for texts in by_label.values():
        rng.shuffle(texts)
    for good, bad in zip(by_label[1], by_label[0], strict=False):
        pairs.append({"prompt": "", "chosen": good, "rejected": bad})
    held_out = len(pairs) // 10
    half = (len(pairs) - held_out) // 2
    parts = {
        "pairs_test.jsonl": pairs[:held_out],
        "pairs_a.jsonl": pairs[held_out : held_out + half],
        "pairs_b.jsonl": pairs[held_out + half :],
        "openings.jsonl": [{"text": text} for row in pairs for text in (row["chosen"], row["rejected"])],
    }
    for name, rows in parts.items():
        (Path(folder) / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
