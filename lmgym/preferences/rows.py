"""Rows of data as comparisons, in the forms that people use (docs/data.md has the table)."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lmgym.io import Source, names_in, quoted, read_rows, source_name
from lmgym.preferences.comparisons import Comparison
from lmgym.tasks.prompt_rows import answer_text, as_messages

TIES = "are ties, or compare a text with itself: left out"
EQUAL = "rank some texts as equal, or a text twice: one of those is kept"
REPEATED = "hold texts that begin with the prompt: it is cut off them"
IMPLICIT = "have no prompt: it is the beginning that their texts have in common"

ANSWERS = ("responses", "completions", "answers", "generations")
"""Fields with a list of completions of one prompt."""
GRADES = ("scores", "ratings", "ranks")
"""Fields with one number for each of them; of ranks, the lowest is best."""
TEXTS = ("response", "text", "answer", "completion", "content")
"""The text, where each completion is a mapping of its own."""
GRADE = ("overall_score", "score", "rating", "rank")
"""Its number."""
PAIRS = (
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("conversation_a", "conversation_b"),
)
CHOICES = ("winner", "preference", "label", "better_response_id")
"""Fields that say which one of a pair is better."""
_ANSWER_BEGINS = re.compile(r"\bAssistant:|\n#+ ?Response:|\[/INST\]|<\|assistant\|>|<\|im_start\|>assistant\n")
"""What comes directly before an answer in texts that hold a whole dialogue."""


def read_comparisons(
    source: Source,
    fields: Mapping[str, str] | None = None,
    *,
    as_written: bool = False,
    ties: Literal["drop", "half"] = "drop",
    say: Callable[[str], object] | None = None,
) -> list[Comparison]:
    """Reads comparisons in any common form, such as {"prompt", "chosen", "rejected"} or {"prompt", "ranking"}.

    Where at least half of the rows hold texts that begin with the prompt, it is cut off them.

    Args:
        source: a file, a folder, the name of a data set, or rows; see `lmgym.io.read_rows`.
        fields: other names for fields: {"question": "prompt"}; see `lmgym.io.rows.renamed`.
        as_written: whether the file is from `write_comparisons`, so that nothing is cut off.
        say: receives messages for the user, such as the number of ties; by default, they are warnings.

    Raises:
        ValueError: the source has no comparisons, or a row is malformed. The message names the file and the line.
        FileNotFoundError: the file does not exist.
    """
    notes: Counter[str] = Counter()
    rows = [comparison_of(row, place, notes, ties) for place, row in read_rows(source, fields)]
    found = [comparison for comparison in rows if comparison is not None]
    if not found:
        raise ValueError(f"{source_name(source)}: all {len(rows)} rows are ties; give some with a preference")
    repeating = {i for i, comparison in enumerate(found) if _repeats_prompt(comparison)}
    if not as_written and 2 * len(repeating) >= len(found):
        notes[REPEATED] = len(repeating)
        found = [_without_prompt(comparison) if i in repeating else comparison for i, comparison in enumerate(found)]
    for what, count in notes.items():
        (say or partial(warnings.warn, stacklevel=2))(f"{source_name(source)}: {count} of {len(rows)} rows {what}")
    return found


def leave_out(comparisons: Sequence[Comparison], held_out: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons that are not also among the held-out ones: the same completions of the same prompt.

    Raises:
        ValueError: none is left.
    """
    held = {(comparison.prompt, frozenset(comparison.ranked)) for comparison in held_out}
    found = [c for c in comparisons if (c.prompt, frozenset(c.ranked)) not in held]
    if not found:
        raise ValueError("every comparison is also held out for testing, so none is left to train on")
    return found


def _repeats_prompt(comparison: Comparison) -> bool:
    prompt = comparison.prompt
    return (
        bool(prompt.strip()) and not comparison.messages and all(text.startswith(prompt) for text in comparison.ranked)
    )


def _without_prompt(comparison: Comparison) -> Comparison:
    return replace(comparison, ranked=tuple(text[len(comparison.prompt) :] for text in comparison.ranked))


def comparison_of(
    row: Mapping[str, Any], place: str, notes: Counter[str], ties: Literal["drop", "half"] = "drop"
) -> Comparison | None:
    """The comparison in a row; None for a tie.

    Args:
        row: in one of the forms of docs/data.md.
        place: where the row is, for errors.
        notes: counts the rows that were changed or left out, by what was done.
        ties: as in `read_comparisons`.

    Raises:
        ValueError: the row has another form.
    """
    row = {name: value for name, value in row.items() if value is not None}
    keeps = ties == "half" and ("ranking" in row or ("chosen" in row and "rejected" in row)) and _is_tie(row)
    if keeps:
        row = {name: value for name, value in row.items() if name not in TIED_BY}
    try:
        answers = _ranked(row, notes)
        is_tie = all(answer == answers[0] for answer in answers)
        found = None if is_tie else _comparison(row, answers, notes)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if found is None or len(set(found.ranked)) < 2:
        notes[TIES] += 1
        return None
    if len(set(found.ranked)) < len(found.ranked):
        notes[EQUAL] += 1
        found = replace(found, ranked=tuple(dict.fromkeys(found.ranked)))
    return replace(found, is_tie=True) if keeps else found


# Which answer is better -----------------------------------------------------------------------------------------------


def _ranked(row: Mapping[str, Any], notes: Counter[str]) -> list[Any]:
    """The answers, the best first; none if they are equally good."""
    answers = next((name for name in ANSWERS if isinstance(row.get(name), list)), None)
    if "ranking" in row and answers is None:
        if isinstance(row["ranking"], list) and len(row["ranking"]) >= 2:
            return [] if _is_tie(row) else row["ranking"]
        raise ValueError(f"{_NEEDS}; 'ranking' is {quoted(row['ranking'], 100)}")
    if "chosen" in row and "rejected" in row:
        return [] if _is_tie(row) else [row["chosen"], row["rejected"]]
    if answers is not None:
        return _graded(row, answers, notes)
    for pair in PAIRS:
        if all(name in row for name in pair):
            best = _winner(row, pair)
            return [] if best is None else [row[pair[best]], row[pair[1 - best]]]
    if "completion" in row and "label" in row:
        raise ValueError(
            "these rows are unpaired ('completion' with a 'label', as for KTO), and cannot be used here: "
            "give two completions of the same prompt, 'chosen' and 'rejected'"
        )
    raise ValueError(f"{_NEEDS}; {names_in(row)}")


_NEEDS = (
    "a comparison needs 'prompt', 'chosen' and 'rejected' (texts or messages), or 'prompt' and 'ranking', a list of at "
    "least two texts, the best first"
)


TIED_BY = ("score_chosen", "score_rejected", "label", "margin")
"""Fields beside "chosen" and "rejected" that can say that they are equally good."""


def _is_tie(row: Mapping[str, Any]) -> bool:
    """Whether what a row says beside "chosen" and "rejected" is that they are equally good."""
    scores = [row.get(name) for name in ("score_chosen", "score_rejected")]
    equal = None not in scores and scores[0] == scores[1]
    return equal or _says_tie(row.get("label")) or ("margin" in row and _number(row["margin"], "margin") == 0)


def _says_tie(value: Any) -> bool:
    return value == 0.5 or (isinstance(value, str) and value.strip().lower().startswith(("tie", "both", "equal")))


def _graded(row: Mapping[str, Any], name: str, notes: Counter[str]) -> list[Any]:
    """The answers of a list by their numbers, the best first; of equally good ones the first."""
    answers = row[name]
    if all(isinstance(answer, Mapping) and any(key in answer for key in TEXTS) for answer in answers):
        texts = [next(answer[key] for key in TEXTS if key in answer) for answer in answers]
        key = next((key for key in GRADE if all(answer.get(key) is not None for answer in answers)), None)
        grades = None if key is None else [answer[key] for answer in answers]
    else:
        texts, key, grades = answers, None, None
    if grades is None and isinstance(row.get("ranking"), list):
        return _in_order(texts, row["ranking"])
    if grades is None:
        key = next((key for key in GRADES if isinstance(row.get(key), list)), None)
        grades = None if key is None else row[key]
    if key is None or grades is None:
        raise ValueError(
            f"{name!r} holds completions, and nothing says which is better: add 'scores', a number for each"
        )
    if len(grades) != len(texts):
        raise ValueError(f"{len(texts)} {name} and {len(grades)} {key}: give one for each")
    sign = 1 if key in ("rank", "ranks") else -1
    numbers = [sign * _number(grade, key) for grade in grades]
    best_first = sorted(range(len(texts)), key=numbers.__getitem__)
    kept = [i for n, i in enumerate(best_first) if n == 0 or numbers[i] != numbers[best_first[n - 1]]]
    if 2 <= len(kept) < len(texts):
        notes[EQUAL] += 1
    return [texts[i] for i in kept] if len(kept) >= 2 else []


def _in_order(texts: Sequence[Any], ranking: Sequence[Any]) -> list[Any]:
    if sorted(map(str, ranking)) != sorted(map(str, range(len(texts)))):
        raise ValueError(
            f"'ranking' is {quoted(ranking, 100)}: give the positions of the {len(texts)} completions, counted from 0, "
            "the best first; or name it 'ranks' if it has the rank of each"
        )
    return [texts[int(i)] for i in ranking]


def _winner(row: Mapping[str, Any], pair: tuple[str, str]) -> int | None:
    """Which one of a pair is better: 0 or 1; None if neither is."""
    choice = next((name for name in CHOICES if name in row), None)
    if choice is None:
        raise ValueError(f"nothing says which of {pair[0]!r} and {pair[1]!r} is better: add 'winner'; {names_in(row)}")
    value = row[choice]
    if _says_tie(value):
        return None
    ends = [name.rpartition("_")[2] for name in pair]  # "0" and "1", or "a" and "b"
    said = str(value).strip().lower().removesuffix(".0").rpartition("_")[2]
    known = {end: i for i, end in enumerate(ends)} if ends[0].isdigit() else {"0": 0, "1": 1, ends[0]: 0, ends[1]: 1}
    if isinstance(value, bool) or said not in known:
        raise ValueError(f"{choice!r} is {quoted(value, 100)}: give {' or '.join(map(repr, known))}, or 'tie'")
    return known[said]


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name!r} has {quoted(value, 100)}: give a finite number")
    return number


# What the answers continue --------------------------------------------------------------------------------------------


def _comparison(row: Mapping[str, Any], answers: Sequence[Any], notes: Counter[str]) -> Comparison:
    conversation = _conversation(row)
    text = row["prompt"] if isinstance(row.get("prompt"), str) else ""
    if all(isinstance(answer, str) for answer in answers):
        if conversation:
            return Comparison(text, tuple(answers), tuple(conversation))
        if "prompt" in row and not isinstance(row["prompt"], str):
            raise ValueError(f"{_NEEDS}; 'prompt' is {quoted(row['prompt'], 100)}")
        if "prompt" not in row:
            text, answers = _without_common_text(answers) if "chosen" in row else ("", answers)
            if not text.strip():
                raise ValueError(
                    f"no 'prompt'; {names_in(row)}. Say which is the prompt, such as --field question=prompt"
                )
            notes[IMPLICIT] += 1
        return Comparison(text, tuple(answers))
    if not all(isinstance(answer, list | Mapping) for answer in answers):
        raise ValueError(f"{_NEEDS}; some answers are {quoted(answers, 100)}")
    dialogues = [_plain(answer) for answer in answers]
    if conversation:
        size = len(conversation)
        dialogues = [d[size:] if d[:size] == conversation else d for d in dialogues]
    else:
        conversation = _common(dialogues)
        dialogues = [dialogue[len(conversation) :] for dialogue in dialogues]
        if not conversation and not text:
            raise ValueError("no 'prompt', and the messages of the answers do not begin with the same ones")
    if any(len(dialogue) != 1 for dialogue in dialogues):
        raise ValueError(
            "after the messages that the answers have in common, each must have one message of the assistant, but they "
            f"have {' and '.join(str(len(dialogue)) for dialogue in dialogues)}"
        )
    return Comparison("" if conversation else text, tuple(map(answer_text, dialogues)), tuple(conversation))


def _conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that the answers continue; none if the row does not hold them apart from the answers."""
    for name in ("messages", "prompt", "conversations"):
        messages = row.get(name)
        if isinstance(messages, list) and messages and all(isinstance(message, Mapping) for message in messages):
            found = _plain(messages)
            if found[-1].get("role") != "assistant":
                return found
    return []


def _plain(messages: Any) -> list[dict[str, Any]]:
    """Messages without fields that hold nothing, which tables add."""
    found = as_messages(messages)
    if not all(isinstance(message, Mapping) for message in found):
        raise ValueError(f"{quoted(messages, 100)} are not messages: give {{'role', 'content'}} each")
    return [{key: value for key, value in message.items() if value is not None} for message in found]


def _common(dialogues: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first messages, which all dialogues share; each keeps at least one of its own."""
    most = min(map(len, dialogues)) - 1
    equal = (all(dialogue[i] == dialogues[0][i] for dialogue in dialogues) for i in range(most))
    size = next((i for i, same in enumerate(equal) if not same), max(0, most))
    return dialogues[0][:size]


def _without_common_text(texts: Sequence[str]) -> tuple[str, list[str]]:
    """The prompt that whole texts begin with, and the rest of each: cut where an answer begins, or between words.

    The prompt is empty if the texts begin differently.
    """
    common = texts[0][: _common_size(texts)]
    borders = [match.end() for match in _ANSWER_BEGINS.finditer(common)]
    last = common.split()[-1] if common.strip() and not common[-1].isspace() else ""
    size = borders[-1] if borders else len(common.removesuffix(last).rstrip())
    return common[:size], [text[size:] for text in texts]


def _common_size(texts: Sequence[str]) -> int:
    """How many characters the texts have in common at the beginning; by bisection, for texts are long."""
    least, most = 0, min(map(len, texts))
    while least < most:
        middle = (least + most + 1) // 2
        if all(text.startswith(texts[0][:middle]) for text in texts):
            least = middle
        else:
            most = middle - 1
    return least
