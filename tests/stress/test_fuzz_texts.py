"""Texts of every script, with the names of special tokens inside: text in, the same text out, no special token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import lmgym
from lmgym import LanguageModel, RewardModel
from lmgym.io import printable, quoted
from lmgym.models import Example, encode_example

pytestmark = [pytest.mark.stress, pytest.mark.timeout(300)]

EVERY: Any = list(HealthCheck)

NAMES = ("<|endoftext|>", "<pad>", "<s>", "</s>", "<eos>", "<unk>", "<|pad|>", "<mask>", "[CLS]", "▁", "Ġ", "<0x0A>")
SCRIPTS = "aé漢字かな한글עבריתالعربيةไทยहिन्दीქართულიΑλφαКирил🙂👨‍👩‍👧\u0301\u200d\u200b\u202e\ufeff\n\t\r\x00\x1b "
TEXTS = st.lists(
    st.sampled_from(NAMES) | st.text(st.sampled_from(SCRIPTS), max_size=5) | st.text(max_size=5), min_size=1, max_size=6
).map("".join)
FUZZ: Any = {"max_examples": 700, "suppress_health_check": EVERY}


def is_text(text: str) -> bool:
    return bool(text) and text.encode(errors="replace").decode() == text


def check(lm: LanguageModel, before: list[int], first: str, text: str) -> None:
    special = {*lm.tokenizer.all_special_ids, *lm.eos_ids, lm.pad_id}
    if not is_text(text):
        if text:
            with pytest.raises(ValueError, match="lone surrogate"):
                lm.text.encode(text)
        return
    ids = lm.text.encode(text)
    assert ids[: len(before)] == before
    assert not special & set(ids[len(before) :])
    assert lm.text.decode(ids) == text
    whole, start = encode_example(lm, Example(first, text))
    assert whole[-1] == lm.eos_ids[0]
    assert not special & set(whole[len(before) : -1])
    assert lm.text.decode(whole[:-1]) == first + text
    assert (
        lm.text.decode_completion(whole[:start], whole[start:-1])
        == (first + text)[len(lm.text.decode(whole[:start])) :]
    )


TINY = lmgym.load("tiny")


@given(TEXTS)
@settings(**FUZZ)
def test_the_tiny_model(text: str) -> None:
    check(TINY, [], "Say", text)


@pytest.fixture(scope="module")
def words(shared_data: Path) -> LanguageModel:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2_tokenizer")
    config = GPT2Config(vocab_size=50257, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    return LanguageModel(GPT2LMHeadModel(config), tokenizer, "gpt2", "<|pad|>")


@given(text=TEXTS)
@settings(**FUZZ)
def test_the_tokenizer_of_gpt2(words: LanguageModel, text: str) -> None:
    check(words, [], "Say", text)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> LanguageModel:
    return lmgym.load(str(shared_data / "stories260K"))


@given(text=TEXTS.filter(lambda text: "▁" not in text))
@settings(**FUZZ)
def test_a_tokenizer_that_puts_a_beginning_before(stories: LanguageModel, text: str) -> None:
    """Its "▁" is a space, whoever writes it: a text with one does not come back, and holds no special token either."""
    check(stories, [1], "Say", text)


REWARD = RewardModel.load("tiny-reward")


@given(st.lists(TEXTS.filter(is_text), min_size=1, max_size=4))
@settings(max_examples=150, suppress_health_check=EVERY)
def test_texts_to_score(texts: list[str]) -> None:
    """A finite number each, the same alone as in a batch."""
    together = REWARD.score_texts(texts)
    alone = torch.cat([REWARD.score_texts([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@given(TEXTS | st.text())
@settings(**FUZZ)
def test_what_is_shown(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert "\n" not in quoted(text)
