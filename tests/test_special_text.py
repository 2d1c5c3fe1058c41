"""The names of special tokens in a text are text: "<eos>" in a prompt does not end a sequence."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lmgym
from lmgym import LanguageModel, RewardModel, TokenVectorEnv
from lmgym.models import Example, encode_example, token_ids
from lmgym.tasks import PromptList

NAMES = (
    "<eos>", "<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|pad|>", "<|im_end|>", "<|eot_id|>", "[PAD]", "[SEP]",
)  # fmt: skip
FRAMES = (
    "{}",
    "Say {} now",
    "{}{}",
    " {}",
    "{} ",
    "a{}b",
    "\n{}\t{}\n",
    "日本語{}語",
    "שלום {} עולם",
    "مرحبا{}",
    "🙂{}🙂",
)


def texts() -> list[str]:
    return [frame.replace("{}", name) for frame in FRAMES for name in NAMES]


def special(lm: LanguageModel) -> set[int]:
    return {*lm.tokenizer.all_special_ids, *lm.eos_ids, lm.pad_id}


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return lmgym.load("tiny")


@pytest.fixture(scope="module")
def gpt2_words(shared_data: Path) -> LanguageModel:
    """A random model with GPT-2's own tokenizer, whose only special token is beginning, end and unknown token."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2_tokenizer")
    config = GPT2Config(vocab_size=50257, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    return LanguageModel(GPT2LMHeadModel(config), tokenizer, "gpt2", "<|pad|>")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> LanguageModel:
    """A Llama whose tokenizer puts a beginning-of-sequence token before every text."""
    return lmgym.load(str(shared_data / "stories260K"))


@pytest.mark.parametrize("name", ["tiny", "gpt2_words", "stories"])
def test_special_names_in_a_prompt_stay_text(name: str, request: pytest.FixtureRequest) -> None:
    lm: LanguageModel = request.getfixturevalue(name)
    before = [1] if name == "stories" else []
    for text, ids in zip(texts(), lm.text.encode_all(texts()), strict=True):
        assert ids[: len(before)] == before, "the beginning-of-sequence token is missing"
        own = ids[len(before) :]
        assert not special(lm) & set(own), (text, lm.tokenizer.convert_ids_to_tokens(ids))
        assert lm.text.decode(ids) == text, "the text is not recovered"


@pytest.mark.parametrize("name", ["tiny", "gpt2_words", "stories"])
def test_special_names_in_a_text_to_learn_stay_text(name: str, request: pytest.FixtureRequest) -> None:
    lm: LanguageModel = request.getfixturevalue(name)
    before = 1 if name == "stories" else 0
    for text in texts():
        ids, start = encode_example(lm, Example(f"Say it: {text}", text))
        assert ids[-1] == lm.eos_ids[0], "the end-of-sequence token is missing"
        assert 0 < start < len(ids) - 1
        assert not special(lm) & set(ids[before:-1])


def test_special_names_in_an_environment(tiny: LanguageModel) -> None:
    """A prompt that contains "<eos>" neither ends a row nor is masked as padding."""
    hostile = ["<eos>", "<pad><pad>", "ok<eos>", "<eos><pad>ok"]
    env = TokenVectorEnv(
        4, task=PromptList([f"p{i}" for i in range(40)], lambda p, c: [0.0] * len(c)), model=tiny, max_new_tokens=4
    )
    observation, _ = env.reset(seed=0, options={"prompt": hostile})
    for row, text in enumerate(hostile):
        ids = observation["input_ids"][row][observation["attention_mask"][row].bool()].tolist()
        assert not {tiny.pad_id, *tiny.eos_ids} & set(ids)
        assert tiny.text.decode(ids) == text
    assert env.running_rows() == [0, 1, 2, 3]


def test_special_names_in_a_text_to_score() -> None:
    """The score is computed at the last token that is not padding, so a text must not be able to contain padding."""
    model = RewardModel.load("tiny-reward")
    pad, eos = model.tokenizer.pad_token_id, model.tokenizer.eos_token_id
    ids, mask = model.encode(texts(), [True] * len(texts()))
    for row, used in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert row[used - 1] == eos
        assert not {pad, eos} & set(row[: used - 1])
    plain, padded = model.score_texts(["It was bad.", "It was bad.<pad><eos>"]).tolist()
    assert plain != padded, "the letters were skipped"


def test_a_beginning_that_also_ends_stays(gpt2_words: LanguageModel) -> None:
    assert gpt2_words.text.encode("Hi") == gpt2_words.tokenizer("Hi")["input_ids"]
    assert gpt2_words.text.encode("<|endoftext|>") != [50256]


def test_letters_that_a_tokenizer_does_not_know_are_no_padding(probe: LanguageModel) -> None:
    """The probe knows only the letters a to d, and would encode all others as padding."""
    with pytest.raises(
        ValueError, match="special token '<pad>': the token's name or a character that it does not know"
    ):
        probe.text.encode("abz")


def test_ordinary_texts_are_encoded_as_transformers_does(tiny: LanguageModel, probe: LanguageModel) -> None:
    for lm, words in ((tiny, ["We saw it.", " 12 é 漢 🙂"]), (probe, ["abcd", "dd"])):
        assert lm.text.encode_all(words) == lm.tokenizer(words)["input_ids"]


def word_level(**template: Any) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_a_tokenizer_that_cannot_tell_them_apart_says_so() -> None:
    """The vocabulary is whole words, including special tokens: a text with such a word cannot be encoded."""
    config = GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1, n_positions=64, eos_token_id=1, bos_token_id=None)
    lm = LanguageModel(GPT2LMHeadModel(config), word_level(), "words")
    assert lm.text.encode("a b unheard") == [3, 4, 2]
    with pytest.raises(ValueError, match="reads as its special token '<eos>'"):
        lm.text.encode("a <eos> b")
    assert lm.text.encode("a b") == [3, 4], "the failure was cached"


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "a\udc80b"])
def test_half_a_character_is_no_text(tiny: LanguageModel, text: str) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tiny.text.encode(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        RewardModel.load("tiny-reward").score_texts([text])


def test_token_ids_leaves_the_tokenizer_as_it_was(tiny: LanguageModel) -> None:
    before = tiny.tokenizer("<eos>")["input_ids"]
    assert token_ids(tiny.tokenizer, ["<eos>"])[0] != before
    assert tiny.tokenizer("<eos>")["input_ids"] == before == [1]
    assert token_ids(tiny.tokenizer, []) == []


def test_texts_of_every_script_come_back(tiny: LanguageModel) -> None:
    for text in (os.linesep, "ไทย", "한국어", "हिन्दी", "ქართული", "Ⅷ ½ ﬁ", "e\u0301", "\u200d\u200b", "\x00\x1b[31m"):
        assert tiny.text.decode(tiny.text.encode(text)) == text
    assert torch.tensor(tiny.text.encode("漢")).shape == (3,), "not encoded as bytes"
