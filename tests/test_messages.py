"""Conversations as prompts: their form, their order, and what a task and a comparison make of them."""

import numpy as np
import pytest

from lmgym import Prompt
from lmgym.preferences import Comparison, read_comparisons, write_comparisons
from lmgym.tasks import Conversational, Sort, check_messages

HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_conversation_has_a_transcript_unless_a_text_is_given():
    assert Prompt(messages=[SYSTEM, HELLO]).text == "system: Be brief.\nuser: Hello\nassistant: "
    assert Prompt("Hello", messages=[HELLO]).text == "Hello"
    assert Prompt(messages=[HELLO]).messages == (HELLO,)
    assert Prompt("plain").messages == ()


def test_parts_of_a_content_are_joined_and_other_fields_kept():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts, "name": "Ada"}]) == (
        {"role": "user", "content": "ab", "name": "Ada"},
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([HI], "message 1 has the role 'assistant' at the start"),
        ([HELLO, HELLO], "message 2 has the role 'user' after 'user'"),
        ([HELLO, SYSTEM], "message 2 has the role 'system' after 'user'"),
        ([HELLO, HI], "the last message has the role 'assistant'"),
        ([SYSTEM], "the last message has the role 'system'"),
        ([{"role": "human", "content": "Hello"}], "has the role 'human': known are system"),
        ([{"role": "user", "content": "  "}], "the content '  ': give a text that is not empty"),
        ([{"role": "user"}], "the content None"),
        (["Hello"], "message 1 is 'Hello'"),
        ("Hello", "messages are 'Hello'"),
        ([], "messages are \\[\\]"),
        ([{"role": "user", "content": [{"type": "image"}]}], "give a text"),
    ],
)
def test_wrong_conversations_are_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        check_messages(messages, last=("user", "tool"))


def test_a_prompt_checks_its_messages():
    with pytest.raises(ValueError, match="the last message has the role 'assistant'"):
        Prompt(messages=[HELLO, HI])


def test_token_ids_are_checked():
    assert Prompt(token_ids=[3, 4]).token_ids == (3, 4)
    for ids in ((-1,), (True,)):
        with pytest.raises(ValueError, match="token_ids contain"):
            Prompt(token_ids=ids)
    with pytest.raises(ValueError, match="not both"):
        Prompt(messages=[HELLO], token_ids=(3,))


def test_a_task_becomes_a_conversation_with_the_same_scores():
    task, rng = Conversational(Sort(), system="Sort."), np.random.default_rng(0)
    prompt, plain = task.sample(rng), Sort().sample(np.random.default_rng(0))
    assert (prompt.text, prompt.data) == (plain.text, plain.data)
    assert prompt.messages == ({"role": "system", "content": "Sort."}, {"role": "user", "content": plain.text})
    assert task.wrap(Prompt(messages=[HELLO])).messages[0] == {"role": "system", "content": "Sort."}
    assert task.wrap(Prompt(messages=[SYSTEM, HELLO])).messages == (SYSTEM, HELLO)
    assert task.wrap(Prompt(token_ids=(3,))) == Prompt(token_ids=(3,))
    assert task.best == Sort().best
    assert task.demonstrate(prompt, rng) == Sort().demonstrate(plain, rng)


def test_comparisons_of_conversations_are_written_and_read(tmp_path):
    given = [Comparison("", ("a", "b"), (HELLO,)), Comparison("plain", ("c", "d", "e"))]
    write_comparisons(tmp_path / "c.jsonl", given)
    assert read_comparisons(tmp_path / "c.jsonl") == given
    assert given[0].as_prompt.messages == (HELLO,)
