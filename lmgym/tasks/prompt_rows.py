"""Rows of data as prompts: texts, openings of texts, conversations in the forms that people use, and token ids."""

from collections.abc import Mapping
from typing import Any

from lmgym.io import names_in, quoted
from lmgym.tasks.base import Prompt
from lmgym.tasks.messages import check_messages

HOLDERS = ("messages", "prompt", "conversations", "token_ids")
"""Fields that can hold the prompt; the first that a row has counts."""
ROLE_OF = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""Roles in other words, as in ShareGPT's {"from", "value"}."""


def prompt_of(row: Mapping[str, Any], place: str, named: bool = False) -> Prompt:
    """The prompt in a row; the other fields become its data.

    If a conversation ends with the assistant's message, that is the demonstration, and the messages before it are the
    prompt.

    Args:
        row: has one of `HOLDERS`.
        place: where the row is, for errors.
        named: whether the user said which field is "prompt", so that no other is considered.

    Raises:
        ValueError: the row has none of them, or its prompt is malformed.
    """
    holders = [name for name in (("prompt",) if named else HOLDERS) if row.get(name) is not None]
    if not holders:
        hint = "; to take openings of whole texts, give --opening-words" if "text" in row else ""
        raise ValueError(
            f"{place}: no 'prompt' and no 'messages'; {names_in(row)}. Say which is the prompt, such as --field "
            f"question=prompt{hint}"
        )
    holder = next((name for name in holders if _fits(name, row[name])), holders[0])
    data = {name: value for name, value in row.items() if name != holder}
    if data.get("demonstration", "") is None:  # tables have a column where only some rows have a value
        del data["demonstration"]
    value = row[holder]
    try:
        if not isinstance(data.get("demonstration", ""), str):
            data["demonstration"] = answer_text(data["demonstration"])
        if holder == "token_ids":
            return Prompt(data=data, token_ids=value, place=place)
        if isinstance(value, str) and holder == "prompt":
            return Prompt(_text(holder, value), data, place=place)
        messages = check_messages(as_messages(value))
        if messages[-1]["role"] == "assistant":
            data.setdefault("demonstration", messages[-1]["content"])
            messages = messages[:-1]
        return Prompt(data=data, messages=messages, place=place)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def opening_of(row: Mapping[str, Any], place: str, words: int) -> Prompt | None:
    """The first words of a row's "text" (or "prompt") as the prompt, the rest as the demonstration.

    Returns:
        The prompt; None if the text is so short that nothing is left to write.

    Raises:
        ValueError: the row has no text.
    """
    holder = next((name for name in ("text", "prompt") if row.get(name) is not None), None)
    if holder is None:
        raise ValueError(f"{place}: no 'text' to take an opening from; {names_in(row)}. Name it: --field story=text")
    try:
        parts = _text(holder, row[holder]).split()
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if len(parts) <= words:
        return None
    data = {name: value for name, value in row.items() if name != holder}
    demonstration = " " + " ".join(parts[words:])
    return Prompt(" ".join(parts[:words]), data | {"demonstration": demonstration}, place=place)


def as_messages(value: Any) -> Any:
    """Messages as {"role", "content"}, also from ShareGPT's {"from", "value"}; anything else as it is."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [_as_message(message) if isinstance(message, Mapping) else message for message in value]


def _as_message(message: Mapping[str, Any]) -> dict[str, Any]:
    rest = dict(message)
    if "role" not in rest and "from" in rest:
        rest["role"], rest["content"] = rest.pop("from"), rest.pop("value", None)
    role = rest.get("role")
    return rest | {"role": ROLE_OF[role]} if isinstance(role, str) and role in ROLE_OF else rest


def answer_text(value: Any) -> str:
    """A completion that is given as a text, or as the assistant's message.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return value
    messages = as_messages(value)
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], Mapping):
        role, content = messages[0].get("role"), messages[0].get("content")
        if role == "assistant" and isinstance(content, str):
            return content
    raise ValueError(f"{quoted(value, 100)} is not an answer: give a text, or one message of the assistant")


def _fits(holder: str, value: Any) -> bool:
    if isinstance(value, str):
        return holder == "prompt" and bool(value)
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) == (holder != "token_ids")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is {quoted(value)}; give a text that is not empty")
    return value
