"""Sums as questions to a chat model, with a rule that pays the right answer: "R1-Zero" (Guo et al. 2025) in small.

    python examples/real_models/sums.py            # writes sums.jsonl
    lmgym train --model FOLDER --chat --prompts sums.jsonl --reward examples/real_models/sums.py:score --algorithm grpo

The questions are all a + b with a total of at most 20. lmgym assigns each question to the training or the held-out
prompts by a hash of its text. Paper: https://arxiv.org/abs/2501.12948.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import lmgym

LARGEST = 20
QUESTION = "What is {a} + {b}? Reply with the number only."


def score(prompts: Sequence[lmgym.Prompt], completions: Sequence[lmgym.Completion]) -> list[float]:
    """1 where the last number of the answer is the sum, else 0."""
    return [float(_last_number(c.text) == p.data["answer"]) for p, c in zip(prompts, completions, strict=True)]


def number_only(prompts: Sequence[lmgym.Prompt], completions: Sequence[lmgym.Completion]) -> list[float]:
    """1 where the answer is a number alone: the format that the question asks for, which no learner is paid for."""
    return [float(re.fullmatch(r"\s*\d+\s*\.?\s*", completion.text) is not None) for completion in completions]


def _last_number(text: str) -> int | None:
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else None


def main(path: str = "sums.jsonl") -> None:
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1 - a)]
    rows = [{"prompt": QUESTION.format(a=a, b=b), "answer": a + b} for a, b in pairs]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} questions: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
