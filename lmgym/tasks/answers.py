"""Score functions for prompts with one right answer, by how a completion states it. Nothing is executed.

Each takes a batch of prompts and completions and gives 1 for a right answer and 0 for any other, so that it can be a
task's score: `PromptList.from_rows("gsm8k.jsonl", answers.hashes, fields={"question": "prompt"})`, or, on the command
line, `--prompts gsm8k.jsonl --field question=prompt --gold lmgym.tasks.answers:hashes`. The right answer is the field
"answer" of the row: a text, a number, or a list of which any is right. A whole solution, such as the "answer" of GSM8K
or a text with \\boxed{…}, is read in the same way as the completion.

    exact         the whole completion is the answer
    last_number   the last number in it
    hashes        what follows the last "####" (GSM8K, Cobbe et al. 2021, https://arxiv.org/abs/2110.14168)
    boxed         what the last \\boxed{…} holds (MATH, Hendrycks et al. 2021, https://arxiv.org/abs/2103.03874)
    tagged        what the last <answer>…</answer> holds (DeepSeek-AI 2025, https://arxiv.org/abs/2501.12948)

Two answers are the same if their texts are, but for white space, a last period and LaTeX's spacing; or if both are
numbers and equal: 1,000 and 1000.0, 3/4 and 0.75, $5 and 5. For algebra, use a package such as math-verify.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lmgym.io import quoted
from lmgym.tasks.base import Completion, Prompt

Extract = Callable[[str], str | None]
"""Takes the answer out of a text; None if it states none."""

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?<=\d)")
MAX_DIGITS = 1000
"""A longer answer is compared as a text alone: arithmetic with huge numbers takes forever."""
_LATEX_SPACE = re.compile(r"\\[,!;: ]|\\left(?![a-z])|\\right(?![a-z])")


def exact(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """1 if the whole completion is the answer."""
    return _scores(whole_in, prompts, completions)


def last_number(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """1 if the last number of the completion is the answer."""
    return _scores(last_number_in, prompts, completions)


def hashes(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """1 if what follows the last "####" is the answer."""
    return _scores(hashes_in, prompts, completions)


def boxed(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """1 if the last \\boxed{…} holds the answer."""
    return _scores(boxed_in, prompts, completions)


def tagged(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """1 if the last <answer>…</answer> holds the answer."""
    return _scores(tagged_in, prompts, completions)


# Reading --------------------------------------------------------------------------------------------------------------


def whole_in(text: str) -> str | None:
    """The text without white space around it; None if nothing is left."""
    return text.strip() or None


def last_number_in(text: str) -> str | None:
    """The last number of a text, such as "-1,234.5" or "3/4"."""
    text = text.replace("−", "-")
    found = [match for match in _NUMBER.finditer(text) if match[0]]
    if not found:
        return None
    number, start = found[-1][0], found[-1].start()
    # "10-3" is no negative number: a sign after a digit or a letter joins two things.
    return number.lstrip("+-") if start and text[start - 1].isalnum() else number


def hashes_in(text: str) -> str | None:
    """What follows the last "####", to the end of the line."""
    _, mark, after = text.rpartition("####")
    return whole_in(after.strip().partition("\n")[0]) if mark else None


def boxed_in(text: str) -> str | None:
    """What the last \\boxed{…} holds, with braces in balance."""
    at = text.rfind("\\boxed{")
    depth = 0
    for end in range(at + len("\\boxed"), len(text) if at >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return whole_in(text[at + len("\\boxed{") : end])
    return None


def tagged_in(text: str) -> str | None:
    """What the last <answer>…</answer> holds."""
    before, mark, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return whole_in(inside) if mark and opened else None


# Comparing ------------------------------------------------------------------------------------------------------------


def same(one: str, other: str) -> bool:
    """Whether two answers are the same text or the same number."""
    one, other = _normal(one), _normal(other)
    if one == other:
        return True
    numbers = _number(one), _number(other)
    return None not in numbers and numbers[0] == numbers[1]


def _normal(text: str) -> str:
    text = _LATEX_SPACE.sub(
        "", text.replace("−", "-").strip().strip("$").replace("\\dfrac", "\\frac").replace("\\%", "%")
    )
    return " ".join(text.split()).removesuffix(".")


def _number(text: str) -> Fraction | None:
    """The text as an exact number; None if it is not a number."""
    text = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text.replace(" ", ""))
    text = text.removeprefix("\\").removeprefix("$").removesuffix("%")
    if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    whole, _, under = text.replace(",", "").partition("/")
    below = Fraction(under or 1)
    return Fraction(whole) / below if below else None


def _scores(extract: Extract, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [_score(extract, prompt.data, c.text) for prompt, c in zip(prompts, completions, strict=True)]


def _score(extract: Extract, data: Mapping[str, Any], text: str) -> float:
    if data.get("answer") is None:
        raise ValueError(
            f"the row has no 'answer' to compare with; its fields are {quoted(list(data))}. Name the field that holds "
            "it: --field solution=answer"
        )
    given = extract(text)
    if given is None:
        return 0.0
    right = data["answer"] if isinstance(data["answer"], list | tuple) else [data["answer"]]
    return float(any(same(given, stated) for answer in right for stated in _readings(extract, str(answer))))


def _readings(extract: Extract, answer: str) -> list[str]:
    """A right answer as it is, and the answer that it states if it is a whole solution."""
    stated = None if extract in (whole_in, last_number_in) else extract(answer)
    return [answer if stated is None else stated]
