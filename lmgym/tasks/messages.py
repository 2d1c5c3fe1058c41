"""Conversations: messages with a role and a content, as chat models read them. Plain Python."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmgym.io import quoted

Message = Mapping[str, Any]
"""{"role": "user", "content": "Hello"}; further fields, such as "tool_calls", go to the chat template as they are."""

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Any, last: tuple[str, ...] = ROLES) -> tuple[dict[str, Any], ...]:
    """The messages as plain dicts, after a check of their form and order.

    An instruction ("system" or "developer") comes first; then "user" and "assistant" alternate, beginning with "user";
    "tool" messages follow the "assistant" that called the tools.

    Args:
        messages: a sequence of mappings with "role" and "content". A content is a text, or a list of parts of the form
            {"type": "text", "text": …}, which are joined.
        last: the roles that the last message may have.

    Raises:
        ValueError: a message has another form, or a role is out of order.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f'messages are {quoted(messages)}: give a list of at least one {{"role": …, "content": …}}, such as '
            '[{"role": "user", "content": "Hello"}]'
        )
    checked = [_check_message(message, number) for number, message in enumerate(messages, start=1)]
    before = "start"
    for number, message in enumerate(checked, start=1):
        role = message["role"]
        if role not in _FOLLOWERS[before]:
            raise ValueError(
                f"message {number} has the role {role!r} "
                + (f"after {before!r}" if number > 1 else "at the start")
                + f": expected {' or '.join(map(repr, _FOLLOWERS[before]))}. 'user' and 'assistant' alternate, and "
                "a 'system' message can only come first"
            )
        before = role
    if checked[-1]["role"] not in last:
        raise ValueError(
            f"the last message has the role {checked[-1]['role']!r}, but it must be from {' or '.join(map(repr, last))}"
        )
    return tuple(checked)


_FOLLOWERS = {
    "start": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""The roles that may come after each role."""


def _check_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f'message {number} is {quoted(message)}: give {{"role": …, "content": …}}')
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {quoted(role)}: known are {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""  # the assistant only called tools
    elif not isinstance(content, str) or not content.strip():
        raise ValueError(
            f"message {number} (role {role!r}) has the content {quoted(content)}: give a text that is not empty"
        )
    return {**{str(key): value for key, value in message.items() if value is not None}, "content": content}


def transcript(messages: Sequence[Message]) -> str:
    """The messages as plain text, for people and for score functions that read one text: "user: …", line by line."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\nassistant: "
