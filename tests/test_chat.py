"""Conversations to token ids: what the chat template writes, and nothing that a message could smuggle in."""

import copy
from itertools import chain

import pytest
import torch
from chat_templates import FORMATS, tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

from agents import dpo, sft
from lmgym import LanguageModel, Policy, Prompt, RewardModel, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.models import Example, encode_example, encode_turns, set_template
from lmgym.preferences import Comparison
from lmgym.reward import read_text
from lmgym.tasks import Completion, Conversational, PromptList

HELLO = [{"role": "user", "content": "Hello, how are you?"}]
ANSWER = {"role": "assistant", "content": "The answer is five."}
LONG = [*HELLO, ANSWER, {"role": "user", "content": "What is 2 plus 3? <b>"}]


def model_of(name: str) -> LanguageModel:
    tokenizer = tokenizer_of(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=int(tokenizer.convert_tokens_to_ids(FORMATS[name][1])),  # pyright: ignore[reportArgumentType]
    )
    return LanguageModel(LlamaForCausalLM(config), tokenizer, name)


@pytest.fixture(scope="module")
def chatml() -> LanguageModel:
    return model_of("chatml")


@pytest.mark.parametrize("name", FORMATS)
def test_ids_are_those_of_the_tokenizers_own_template(name: str) -> None:
    lm = model_of(name)
    for messages in (HELLO, LONG):
        own = lm.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert lm.text.encode_prompts([Prompt(messages=messages)]) == [own]
        assert lm.text.chat.encode_whole([*messages, ANSWER]) == lm.tokenizer.apply_chat_template(
            [*messages, ANSWER], tokenize=True, return_dict=False
        )


@pytest.mark.parametrize("name", FORMATS)
def test_no_message_can_contain_a_control_token(name: str) -> None:
    lm = model_of(name)
    tokens = [token.removeprefix("+") for token in FORMATS[name][0]]
    control = set(lm.tokenizer.convert_tokens_to_ids(tokens))
    attack = "a" + "b".join(tokens) + "c" + "".join(tokens[:2])[:-1]
    attacks = (attack, tokens[0][:3] + tokens[0] + tokens[0][3:])
    for content in attacks:
        ids = lm.text.chat.encode([{"role": "user", "content": content}])
        harmless = lm.text.chat.encode([{"role": "user", "content": "abc"}])
        assert [i for i in ids if i in control] == [i for i in harmless if i in control]
        # What is read is what was written, letter by letter.
        rendered = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert lm.tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == rendered.replace(" ", "")


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_is_what_the_template_writes_up_to_the_end_of_the_turn(name: str) -> None:
    lm = model_of(name)
    prompt, answer = lm.text.chat.encode_answer(LONG, "I am five.", finished=True)
    assert prompt == lm.text.chat.encode(LONG)
    assert answer[-1] in lm.eos_ids
    assert sum(i in lm.eos_ids for i in answer) == 1
    assert lm.text.decode_completion(prompt, answer).strip() == "I am five."
    whole = lm.text.chat.encode_whole([*LONG, {"role": "assistant", "content": "I am five."}])
    if whole[: len(prompt)] == prompt:
        assert whole[: len(prompt) + len(answer)] == prompt + answer
    unfinished = lm.text.chat.encode_answer(LONG, "I am five.", finished=False)
    assert unfinished == (prompt, answer[:-1])


def test_the_names_of_tokens_in_an_answer() -> None:
    """A thought is marked by tokens that the model itself samples; a special token cannot be in an answer."""
    lm = model_of("thoughts")
    think, closed = lm.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    _, answer = lm.text.chat.encode_answer(HELLO, "<think>\nfive\n</think>\nHello", finished=True)
    assert [i for i in answer if i in (think, closed)] == [think, closed]
    assert lm.text.decode_completion(lm.text.chat.encode(HELLO), answer) == "<think>\nfive\n</think>\nHello"
    user = lm.text.chat.encode([{"role": "user", "content": "<think>five</think>"}])
    assert not {think, closed} & set(user), "the user's are letters"
    prompt, answer = lm.text.chat.encode_answer(
        [{"role": "user", "content": "<think>"}], "<think>five</think><|im_end|>", finished=True
    )
    assert not {think, closed} & set(prompt)
    assert [i for i in answer if i in (think, closed)] == [think, closed]
    assert sum(i in lm.eos_ids for i in answer) == 1


def test_every_answer_of_a_conversation_is_learned(chatml: LanguageModel) -> None:
    """The mask of transformers for templates that mark what an assistant writes is the oracle."""
    conversation = [*LONG, {"role": "assistant", "content": "It is five."}]
    rows = encode_turns(chatml, Example("", "It is five.", messages=LONG))
    marked = copy.deepcopy(chatml.tokenizer)
    marked.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
    )
    own = marked.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    learned = [ids[start:] for ids, start in rows]
    expected = [i for i, mask in zip(own["input_ids"], own["assistant_masks"], strict=True) if mask]
    assert list(chain(*learned)) == expected
    assert all(own["input_ids"][: len(ids)] == ids for ids, _ in rows)
    assert sft.encode(chatml, [Example("", "It is five.", messages=LONG), Example("a", "b")], sft.Config())[:2] == rows


def test_rollouts_on_conversations_equal_plain_transformers(chatml: LanguageModel) -> None:
    """Prompts of several lengths and kinds in one batch; the log-probabilities row by row, without padding."""
    lm = model_of("chatml")
    lm.adapters.add("policy", rank=4)
    policy = Policy(lm, critic="none", temperature=0.8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt(messages=HELLO), Prompt(messages=LONG), Prompt(token_ids=[5, 6, 7]), Prompt("Hello")]
    task = PromptList(prompts * 5, lambda prompts, completions: [float(len(c.text)) for c in completions])
    env = TokenVectorEnv(4, task=task, model=lm, kl="sampled", temperature=0.8, max_prompt_tokens=200, max_new_tokens=6)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), prompts)
    assert env.prompts[2].text == lm.text.decode([5, 6, 7])
    assert env.prompts[0].text == "user: Hello, how are you?\nassistant: "
    for row, prompt in enumerate(prompts):
        ids = lm.text.encode_prompts([prompt])[0]
        assert buffer.prompt_ids[row][buffer.prompt_mask[row]].tolist() == ids
        chosen = buffer.tokens[row][buffer.is_action[row]].tolist()
        for adapter, found in (("policy", buffer.logp), (None, buffer.reference_logp)):
            with torch.no_grad(), lm.adapters.using(adapter):
                logits = lm.model(input_ids=torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1] / 0.8
            logits[:, list(lm.banned_ids)] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, torch.tensor(chosen)[:, None])[:, 0]
            assert (found[row, : len(chosen)] - expected).abs().max() < 1e-4


def test_a_reward_model_reads_a_conversation_by_its_template(chatml: LanguageModel) -> None:
    prompt, completion = Prompt(messages=LONG), "I am five."
    for own in (True, False):
        model = RewardModel.from_language_model(chatml, rank=0, ends_with_eos=own)
        for finished in (True, False):
            whole = [*chain(*chatml.text.chat.encode_answer(LONG, completion, finished))]
            if finished and not own:
                whole = chatml.tokenizer.apply_chat_template(
                    [*LONG, {"role": "assistant", "content": completion}], return_dict=False
                )
            with torch.no_grad():
                expected = float(model.model(input_ids=torch.tensor([whole])).logits[0, 0])
            reason = "stop" if finished else "length"
            found = model([prompt, Prompt("Hi")], [Completion(completion, reason), Completion(" you")])
            assert found[0] == pytest.approx(expected, abs=1e-5)
    model.tokenizer = copy.deepcopy(chatml.tokenizer)
    model.tokenizer.chat_template = model.chat.tokenizer.chat_template = None
    try:
        assert model([prompt], [Completion("x")]) == model([Prompt(prompt.text)], [Completion("x")])
    finally:
        chatml.tokenizer.chat_template = tokenizer_of("chatml").chat_template


def test_dpo_reads_the_answers_to_a_conversation(chatml: LanguageModel) -> None:
    policy = Policy(chatml, None, critic="none")
    ((chosen, rejected),) = dpo.encode_pairs(policy, [Comparison("", ("five", "six"), LONG)], dpo.Config())
    for (ids, start), text in ((chosen, "five"), (rejected, "six")):
        prompt, answer = chatml.text.chat.encode_answer(LONG, text, True)
        assert (ids, start) == (prompt + answer, len(prompt))
        assert encode_example(chatml, Example.of(Prompt(messages=LONG), text)) == (ids, start)
    assert read_text(Prompt("ab"), "c") == "abc"


def test_a_template_and_its_options_are_part_of_the_tokenizer(tmp_path) -> None:
    lm = model_of("thoughts")
    own = lm.tokenizer.apply_chat_template(
        HELLO, enable_thinking=False, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    assert lm.text.chat.encode(HELLO) != own
    set_template(lm.tokenizer, options={"enable_thinking": False, "list": [1, None, {"a": "b"}]})
    assert lm.text.chat.encode(HELLO) == own
    lm.save(tmp_path)
    assert type(lm.tokenizer).from_pretrained(tmp_path).chat_template == lm.tokenizer.chat_template
    set_template(lm.tokenizer, "{{ messages[0].content }}")
    assert lm.text.decode(lm.text.chat.encode(HELLO)) == HELLO[0]["content"]
    with pytest.raises(ValueError, match="not valid Jinja"):
        set_template(lm.tokenizer, "{% if %}")
    with pytest.raises(ValueError, match="cannot be an option"):
        set_template(lm.tokenizer, options={"a b": 1})


def test_what_cannot_be_read_is_refused(chatml: LanguageModel) -> None:
    lm = model_of("inst")
    with pytest.raises(ValueError, match=r"refuses the conversation.*only user and assistant"):
        lm.text.chat.encode([{"role": "system", "content": "Be brief."}, *HELLO])
    lm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*--chat-template"):
        lm.text.encode_prompts([Prompt(messages=HELLO)])
    with pytest.raises(ValueError, match=r"the token id 99999, but the model knows \d+ tokens"):
        chatml.text.encode_prompts([Prompt(token_ids=[99999])])


def test_a_wrapped_task_is_read_as_messages(chatml: LanguageModel) -> None:
    task = Conversational(PromptList([f"What is {i}?" for i in range(20)], lambda p, c: [0.0] * len(c)), "Be brief.")
    env = TokenVectorEnv(2, task=task, model=chatml, kl="none", max_prompt_tokens=200, max_new_tokens=4)
    env.reset(seed=0)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": env.prompts[0].text}]
    assert env.prompts[0].messages == tuple(messages)
    assert env.observation()["input_ids"][0][env.observation()["attention_mask"][0].bool()].tolist() == (
        chatml.text.chat.encode(messages)
    )


def test_every_named_end_ends_a_completion() -> None:
    """The generation config, the config and the tokenizer may each name another one."""
    lm = model_of("turns")
    model, tokenizer = lm.model, lm.tokenizer
    model.generation_config.eos_token_id, model.config.eos_token_id = [7, 8], 9
    again = LanguageModel(model, tokenizer)
    assert again.eos_ids == (7, 8, 9, tokenizer.eos_token_id)
    assert not set(again.eos_ids) & set(again.banned_ids)


def test_a_group_reads_its_own_conversation(chatml: LanguageModel) -> None:
    """The samples of a group share the reading of their prompt, but only if it is the same conversation."""
    policy = Policy(chatml, None, critic="none")
    prompts = [Prompt("same", messages=HELLO), Prompt("same", messages=LONG)]
    task = PromptList([f"{i}" for i in range(20)], lambda p, c: [0.0] * len(c))
    env = TokenVectorEnv(2, task=task, model=chatml, kl="none", max_prompt_tokens=200, max_new_tokens=4)
    buffer = RolloutBuffer.like(env)
    collect(policy, env, buffer, Stream(0, 0, samples=2), prompts)
    for row, prompt in enumerate(prompts):
        ids = chatml.text.chat.encode(prompt.messages)
        with torch.no_grad():
            logits = chatml.model(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[list(chatml.banned_ids)] = -torch.inf
        first = int(buffer.tokens[row, 0])
        assert float(buffer.logp[row, 0]) == pytest.approx(float(logits.log_softmax(-1)[first]), abs=1e-4)
