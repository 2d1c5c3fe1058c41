"""Conversations to token ids, by the tokenizer's own chat template.

The control tokens that the template writes are real; the contents of the messages stay text, so nobody can write a
control token into a message. transformers does both (`apply_chat_template(…, sanitize_control_tokens=True)`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError

from lmgym.io import quoted
from lmgym.models.encode_after import encode_after
from lmgym.tasks.messages import Message, check_messages


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: of transformers.
        end_ids: the tokens that may end an assistant's turn.
        name: the model's name, for error messages.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], name: str):
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids)
        self.name = name

    @property
    def available(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to where the assistant's next answer begins.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        return self._render(messages, add_generation_prompt=True)

    def encode_whole(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a finished conversation, with everything that the template writes after the last message.

        Raises:
            ValueError: as in `encode`.
        """
        return self._render(messages)

    def encode_answer(self, messages: Sequence[Message], answer: str, finished: bool) -> tuple[list[int], list[int]]:
        """The token ids of a conversation and of the assistant's answer to it.

        The answer's tokens are those that the template writes after the tokens of the conversation, up to the one that
        ends the turn. Where the template writes a conversation otherwise once it is answered, the answer is encoded on
        its own.

        Args:
            messages: the conversation; the last message is the user's.
            answer: the content of the assistant's message.
            finished: whether the answer ends here, so that the token that ends the turn belongs to it.

        Returns:
            The ids of the conversation, as in `encode`, and those of the answer.

        Raises:
            ValueError: as in `encode`.
        """
        prompt = self.encode(messages)
        whole = self._render([*messages, {"role": "assistant", "content": answer}], names_are_tokens=True)
        before = prompt
        if whole[: len(prompt)] != prompt:  # such as where a message has the name of an added token
            before = self._render(messages, names_are_tokens=True, add_generation_prompt=True)
        if whole[: len(before)] == before:
            written = whole[len(before) :]
        else:
            written = [*encode_after(self.tokenizer, prompt, answer), *self._turn_end(whole)]
        text, end = self._split_at_end(written)
        return prompt, [*text, *(end or self._turn_end(whole))] if finished else text

    def _split_at_end(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The ids before the first end of a turn, and this end; all of the ids if there is no end."""
        at = next((i for i, index in enumerate(ids) if index in self.end_ids), None)
        return (ids, []) if at is None else (ids[:at], ids[at : at + 1])

    def _turn_end(self, whole: list[int]) -> list[int]:
        """The last end of a turn in a finished conversation; the model's first one if the template writes none."""
        return [next((index for index in reversed(whole) if index in self.end_ids), self.end_ids[0])]

    def _render(self, messages: Sequence[Message], names_are_tokens: bool = False, **more: Any) -> list[int]:
        """The token ids of a conversation.

        Args:
            messages: the conversation.
            names_are_tokens: whether the name of an added token that is not special, such as "<think>", is this token
                in a message too, as it is in what a model samples. Special tokens are letters in every message.
            more: arguments of the template.
        """
        if not self.available:
            raise ValueError(
                f"the tokenizer of {self.name!r} has no chat template, so it cannot read a conversation: use a chat "
                "model, give a template with --chat-template FILE.jinja, or use prompts that are plain text"
            )
        named = self.tokenizer.chat_control_tokens
        try:
            self.tokenizer.chat_control_tokens = [] if names_are_tokens else named
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **more,
            )
        except (TemplateError, TypeError, ValueError, KeyError, NotImplementedError) as error:
            raise ValueError(
                f"the chat template of {self.name!r} refuses the conversation {quoted(list(messages))}: {error}"
            ) from error
        finally:
            self.tokenizer.chat_control_tokens = named
        if not ids:
            raise ValueError(f"the chat template of {self.name!r} writes nothing for {quoted(list(messages))}")
        return ids


def set_template(tokenizer: Any, template: str | None = None, options: Mapping[str, Any] | None = None) -> None:
    """Gives a tokenizer a chat template, or options of its template; both are saved with the tokenizer.

    Args:
        tokenizer: of transformers.
        template: a Jinja template; None keeps the tokenizer's own.
        options: values of the template's variables, such as {"enable_thinking": False}, as JSON could write them.

    Raises:
        ValueError: the template is not valid Jinja, there is no template that could have options, or an option's name
            is not an identifier.
    """
    template = tokenizer.get_chat_template() if template is None and options else template
    if template is None:
        return
    for name, value in (options or {}).items():
        if not name.isidentifier():
            raise ValueError(f"{name!r} cannot be an option of a chat template: give the name of one of its variables")
        template = f"{{%- set {name} = {_literal(value)} -%}}{template}"
    try:
        Environment().parse(template)
    except TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error
    tokenizer.chat_template = template


def _literal(value: Any) -> str:
    """A JSON value as a Jinja literal."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def assistant_turns(messages: Sequence[Message]) -> list[tuple[tuple[Message, ...], str]]:
    """Every turn of the assistant in a conversation: the messages before it, and its content."""
    checked = check_messages(messages)
    return [
        (checked[:i], message["content"])
        for i, message in enumerate(checked)
        if message["role"] == "assistant" and message["content"]
    ]
