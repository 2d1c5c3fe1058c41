"""Supervised fine-tuning: what is learned, what is masked, and that it learns."""

import math
from typing import Any

import pytest
import torch
from conftest import random_model
from test_ppo import perturb
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agents import dpo, sft
from agents.learner import Learner, LearnerConfig
from lmgym import LanguageModel, Policy, Prompt, TokenVectorEnv
from lmgym.models import Example, encode_example
from lmgym.preferences import Comparison
from lmgym.tasks.probe import Tree

PAD, EOS, A, B, C, D = range(6)


def by_hand(lm: LanguageModel, ids: list[int], start: int, adapter: str | None = None) -> list[float]:
    with torch.no_grad(), lm.adapters.using(adapter):
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0]
    return [-float(logits[t - 1].log_softmax(0)[ids[t]]) for t in range(start, len(ids))]


def test_prompt_is_given_completion_and_its_end_are_learned(probe: LanguageModel) -> None:
    assert encode_example(probe, Example("ab", "cd"), 10) == ([A, B, C, D, EOS], 2)
    assert encode_example(probe, Example("ab", "cd", finished=False), 10) == ([A, B, C, D], 2)
    assert encode_example(probe, Example("", "cd"), 10) == ([C, D, EOS], 1)
    assert encode_example(probe, Example("ab", "cdcd"), 3) == ([A, B, C], 2)


def test_a_prompt_of_token_ids_is_given(probe: LanguageModel) -> None:
    prompt = Prompt(token_ids=[A, B])
    assert encode_example(probe, Example.of(prompt, "cd"), 10) == ([A, B, C, D, EOS], 2)
    assert encode_example(probe, Example.of(prompt, "cd", finished=False), 3) == ([A, B, C], 2)
    with pytest.raises(ValueError, match="the token id 9"):
        encode_example(probe, Example.of(Prompt(token_ids=[9]), "cd"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_by_hand_over_padded_rows(architecture: str, request: pytest.FixtureRequest) -> None:
    lm: LanguageModel = request.getfixturevalue(architecture)
    examples = [Example("a", "bcd"), Example("abc", "d"), Example("", "dd", finished=False)]
    rows = [encode_example(lm, example, 10) for example in examples]
    loss, mask = sft.nll(lm, rows)
    expected = [by_hand(lm, ids, start) for ids, start in rows]
    for row, values in enumerate(expected):
        assert loss[row][mask[row]].tolist() == pytest.approx(values, abs=1e-5)
    every = [value for values in expected for value in values]
    assert sft.evaluate(lm, examples, sft.Config()) == pytest.approx(sum(every) / len(every), abs=1e-5)
    # The end-of-sequence token is learned where the text ends.
    assert [int(m.sum()) for m in mask] == [4, 2, 1]


def test_it_learns_and_reports_what_it_says(probe: LanguageModel) -> None:
    """Two texts, each half of the time: the entropy is log 2 spread over five tokens."""
    probe.adapters.add("sft", rank=8)
    examples = [Example("a", "bcdb"), Example("a", "dcdb")] * 64
    for parameter in probe.adapters.parameters("sft"):
        parameter.requires_grad_(True)
    learner = Learner(probe.adapters.parameters("sft"), LearnerConfig(lr=1e-2))
    config = sft.Config(epochs=8, minibatch_rows=16)
    rows = list(sft.train(probe, examples, examples[:4], learner, config, "sft"))
    assert len(rows) == 8 * 8
    assert set().union(*rows) == set(sft.METRICS)
    assert [i for i, row in enumerate(rows) if "loss/test" in row] == [0, 63]
    # Observed: 0.15 nats a token against the 0.139 that nobody can beat.
    assert math.log(2) / 5 - 1e-3 < rows[-1]["loss/test"] < 0.2 < rows[0]["loss/test"]
    assert rows[-1]["loss/test"] == pytest.approx(sft.evaluate(probe, examples[:4], config, "sft"), abs=1e-6)
    ended = by_hand(probe, [A, B, C, D, B, EOS], 5, "sft")
    assert ended[0] < 0.2, "stopping is learned"


def test_no_examples_are_refused(probe: LanguageModel) -> None:
    learner = Learner([torch.nn.Parameter(torch.zeros(1))], LearnerConfig())
    with pytest.raises(ValueError, match="no examples"):
        next(sft.train(probe, [], [], learner, sft.Config()))


def test_a_step_goes_down_the_mean_over_learned_tokens(probe: LanguageModel) -> None:
    """Its gradient's norm, and the schedule over all steps of all passes; held-out loss before the first and last."""
    probe.adapters.add("policy")
    perturb(Policy(probe))
    given = [Example("ab", "cd"), Example("a", "bcdd", finished=False), Example("c", "")]
    learner = Learner(probe.adapters.parameters("policy"), LearnerConfig(lr=0.0, max_grad_norm=0.0))
    (row,) = list(sft.train(probe, given, [], learner, sft.Config(minibatch_rows=3), "policy"))
    encoded, losses = [encode_example(probe, example) for example in given], []
    for ids, start in encoded:
        with probe.adapters.using("policy"):
            logp = probe.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logp[t - 1, ids[t]] for t in range(start, len(ids))]
    mean = torch.stack(losses).mean()
    gradient = torch.autograd.grad(mean, probe.adapters.parameters("policy"))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert row["optimizer/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["loss/train"] == pytest.approx(float(mean.detach()), rel=1e-5)

    learner = Learner(probe.adapters.parameters("policy"), LearnerConfig(lr=1e-3, warmup=0.0))
    rows, rates = [], []
    for one in sft.train(probe, given, given, learner, sft.Config(epochs=2, minibatch_rows=2), "policy"):
        rows.append(one)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert ["loss/test" in one for one in rows] == [True, False, False, True]
    assert rows[0]["loss/test"] == pytest.approx(float(mean.detach()), rel=1e-5), "before the first step"
    assert rows[3]["loss/test"] < rows[0]["loss/test"]
    assert sft.evaluate(probe, [], sft.Config(), "policy") == 0.0
    many = sft.evaluate(probe, given * 30, sft.Config(), "policy")
    assert many == pytest.approx(rows[3]["loss/test"], rel=1e-5), "however many are read at a time"


def test_the_held_out_loss_of_a_single_token(probe: LanguageModel) -> None:
    example = Example("ab", "c", finished=False)
    ids, start = encode_example(probe, example)
    assert sft.evaluate(probe, [example], sft.Config()) == pytest.approx(by_hand(probe, ids, start)[0], abs=1e-5)


# What is learned is what was given -----------------------------------------------------------------------------------

TEXTS = [
    "Once upon a time the cat sat on the mat.",
    "She said: \"Hello\" and print('x') \n\n 12 + 34 = 46",
    "playing it",
]
PAIRS = [
    ("Once upon ", "a time"),
    ("Once upon", " a time"),
    ("the cat sat on the m", "at."),
    ("print(", "'x')"),
    ("play", "ing"),
    ("12 + 34 =", "46"),
    ("She said:", "\n\n Hello"),
    ("a  ", "  on"),
    ("cat", " "),
]


def tokenizer_of(kind: str) -> Any:
    """A small tokenizer of a kind, trained on `TEXTS`: those of Llama, GPT-2, T5 and BERT."""
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend: Any = Tokenizer(
        models.WordPiece(unk_token="<unk>") if kind == "wordpiece" else models.BPE(unk_token="<unk>")
    )
    trainer: Any = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    if kind.startswith("metaspace"):
        scheme: Any = kind.partition(" ")[2]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif kind == "prepended":  # Llama 1 and 2
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind.startswith("bytes"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space" in kind)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, show_progress=False, initial_alphabet=alphabet
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def model_with(tokenizer: Any) -> LanguageModel:
    return LanguageModel(random_model("LlamaConfig", vocab_size=len(tokenizer)).model, tokenizer)


@pytest.mark.parametrize(
    "kind", ["metaspace first", "metaspace always", "metaspace never", "prepended", "bytes", "bytes with a space"]
)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_tokens_of_a_completion_decode_to_it(kind: str, prompt: str, completion: str) -> None:
    """A tokenizer that puts a space before a text must not put one between a prompt and its completion."""
    lm = model_with(tokenizer_of(kind))
    ids, given = encode_example(lm, Example(prompt, completion))
    assert ids[:given] == lm.text.encode(prompt), "the prompt's tokens are those that the policy sees"
    assert ids[-1] == 1
    assert lm.text.decode_completion(ids[:given], ids[given:]) == completion
    assert lm.tokenizer.decode(ids[:-1]).removeprefix(" ") == prompt + completion


def test_where_no_tokens_decode_to_the_completion_it_is_said() -> None:
    lm = model_with(tokenizer_of("wordpiece"))
    for prompt, completion in (("play", "ing"), ("sat", " on the mat"), ("Once upon ", "a time")):
        ids, _ = encode_example(lm, Example(prompt, completion))
        assert lm.text.decode(ids) == prompt + completion
    with pytest.warns(UserWarning, match="do not decode to what was given"):
        ids, given = encode_example(lm, Example("sat", " on the\n\nmat"))
    assert lm.text.decode_completion(ids[:given], ids[given:]) == " on the mat"


def test_prompts_that_fill_the_budget_are_left_out_and_counted(probe: LanguageModel) -> None:
    probe.adapters.add("sft")
    said: list[str] = []

    def learner() -> Learner:
        parameters = probe.adapters.parameters("sft")
        for parameter in parameters:
            parameter.requires_grad_(True)
        return Learner(parameters, LearnerConfig(), say=said.append)

    config = sft.Config(max_tokens=4, minibatch_rows=2)
    good, long = Example("ab", "cd"), Example("abcdab", "cd")
    rows = list(sft.train(probe, [good, long, good, long, long], [], learner(), config, "sft"))
    assert len(rows) == 1, "two examples teach something: one step"
    assert said == [
        "3 of 5 examples have no token to learn within max_tokens=4 and are left out: the prompt alone fills it; raise "
        "it, or shorten the prompts"
    ]
    with pytest.raises(ValueError, match=r"2 of 2 examples have no token to learn within max_tokens=4"):
        list(sft.train(probe, [long, long], [], learner(), config, "sft"))
    with pytest.raises(ValueError, match=r"1 of 1 held-out examples have no token to learn within max_tokens=4"):
        list(sft.train(probe, [good], [long], learner(), config, "sft"))


def test_pairs_whose_prompts_fill_the_budget_are_left_out_and_counted(probe: LanguageModel) -> None:
    probe.adapters.add("policy")
    policy = Policy(probe, critic="none")
    env = TokenVectorEnv(2, task=Tree(), model=probe, kl="none", max_prompt_tokens=4, max_new_tokens=3)
    said: list[str] = []
    good, long = Comparison("a", ("b", "c", "d")), Comparison("abcdab", ("c", "d"))
    config = dpo.Config(max_tokens=4, minibatch_pairs=8)
    learner = Learner(policy.parameters(), LearnerConfig(), say=said.append)
    (row,) = list(dpo.train(policy, env, learner, config, [long, good, long]))
    assert row["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["optimizer/grad_norm"] > 0
    assert [text[:53] for text in said] == ["2 of 5 pairs have no token to learn within max_tokens"]
    with pytest.raises(ValueError, match="1 of 1 pairs have no token to learn"):
        list(dpo.train(policy, env, learner, config, [long]))
