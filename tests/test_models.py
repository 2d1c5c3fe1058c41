"""Models and adapters, against plain transformers and peft."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_gpt2, random_model
from families import make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmgym
from lmgym import LanguageModel, Policy, TokenVectorEnv
from lmgym.models import Decoding, FusedDecoding, Sequences, TextCodec, choose_padding, position_limit
from lmgym.models.transformers_decoding import CachedDecoding
from lmgym.sampling import log_probs
from lmgym.tasks.probe import Tree

PAD, EOS, A, B, C, D = range(6)


@pytest.fixture(params=["llama", "gpt2", "llama through transformers", "gpt2 through transformers"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    name, _, through = request.param.partition(" ")
    lm: LanguageModel = request.getfixturevalue(name)
    lm.fast = not through
    assert lm.path() == ("through transformers: fast is off" if through else "fused")
    return lm


def perturb(lm: LanguageModel, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm.adapters.parameters(name):
        nn.init.normal_(parameter, std=0.3, generator=generator)


def left_padded(rows: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def plain_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """[L, V] logits of the plain model: one row, no padding, no cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


PROMPTS = [[A], [B, C, D], [D, D], [C, A, B, A]]
TOKENS = torch.randint(1, 6, (4, 6), generator=torch.Generator().manual_seed(0))


def sequences(steps: int = 6) -> Sequences:
    ids, mask = left_padded(PROMPTS, 5)
    tokens = TOKENS[:, :steps]
    allowed = torch.ones(steps, 6, dtype=torch.bool)
    allowed[:, PAD] = False
    return Sequences(ids, mask.bool(), tokens, torch.ones_like(tokens, dtype=torch.bool), allowed)


def test_cached_decoding_and_one_pass_equal_the_plain_model(lm: LanguageModel) -> None:
    ids, mask = left_padded(PROMPTS, 5)
    decoding = lm.start(ids, mask)
    whole, hidden = lm.evaluate(sequences())
    for t in range(6):
        for row, prompt in enumerate(PROMPTS):
            plain = plain_logits(lm.model, prompt + TOKENS[row, :t].tolist())[-1]
            # Observed: 1e-6.
            torch.testing.assert_close(decoding.logits[row], plain, atol=1e-4, rtol=0)
            torch.testing.assert_close(whole[row, t], plain, atol=1e-4, rtol=0)
        torch.testing.assert_close(decoding.hidden, hidden[:, t], atol=1e-4, rtol=0)
        decoding = decoding.advance(TOKENS[:, t])
    assert isinstance(decoding, (CachedDecoding, FusedDecoding))
    position = decoding.position if isinstance(decoding, CachedDecoding) else decoding.cache.length - 1
    assert position.tolist() == [len(p) + 5 for p in PROMPTS]


@pytest.mark.parametrize("config", ["GPTNeoXConfig", "Qwen2Config", "Qwen3Config", "MistralConfig", "Gemma3TextConfig"])
def test_other_architectures_decode_as_they_evaluate(config: str) -> None:
    """Gemma 3 and Mistral attend to a window of four tokens only."""
    extra: dict[str, Any] = {"sliding_window": 4} if config[0] in "GM" and config != "GPTNeoXConfig" else {}
    extra |= {} if config == "GPTNeoXConfig" else {"num_key_value_heads": 1, "head_dim": 16}
    test_cached_decoding_and_one_pass_equal_the_plain_model(random_model(config, **extra))


def test_generate_of_transformers_walks_the_same_path(lm: LanguageModel) -> None:
    ids, mask = left_padded(PROMPTS, 5)
    out = lm.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=PAD
    )
    decoding, chosen = lm.start(ids, mask), []
    for _ in range(5):
        logits = decoding.logits.clone()
        logits[:, EOS] = -torch.inf
        chosen.append(logits.argmax(1))
        decoding = decoding.advance(chosen[-1])
    assert torch.equal(torch.stack(chosen, 1), out[:, 5:])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_and_scoring_agree(lm: LanguageModel, temperature: float) -> None:
    lm.adapters.add("policy")
    perturb(lm, "policy")
    for critic in ("head", "adapter", "none"):
        policy = Policy(lm, temperature=temperature, critic=critic)
        nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(2))
        decoding = policy.start(*left_padded(PROMPTS, 5))
        table = sequences().action_mask
        uniform = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
        tokens, logp, value = [], [], []
        for t in range(6):
            action = policy.act(decoding, uniform[:, t], table[t])
            tokens.append(action.token)
            logp.append(action.logp)
            value.append(action.value)
            decoding = policy.advance(decoding, action.token)
        s = sequences()
        s = Sequences(s.prompt_ids, s.prompt_mask, torch.stack(tokens, 1), s.is_action, table)
        evaluation = policy.evaluate(s)
        torch.testing.assert_close(torch.stack(logp, 1), evaluation.logp, atol=1e-5, rtol=0)
        # Observed with 160 random heads: 2e-5.
        torch.testing.assert_close(torch.stack(value, 1), evaluation.value, atol=1e-4, rtol=0)
        with lm.adapters.using("policy"):
            for row, prompt in enumerate(PROMPTS):
                chosen = s.tokens[row].tolist()
                logits = plain_logits(lm.model, prompt + chosen)[len(prompt) - 1 : -1] / temperature
                logits[:, PAD] = -torch.inf
                expected = torch.distributions.Categorical(logits=logits).log_prob(s.tokens[row])
                torch.testing.assert_close(evaluation.logp[row], expected, atol=1e-5, rtol=0)


def test_rows_that_restart_equal_a_fresh_prefill(lm: LanguageModel) -> None:
    lm.adapters.add("value")
    perturb(lm, "value")
    decoding = lm.start(*left_padded(PROMPTS, 5))
    decoding.critic = lm.start(*left_padded(PROMPTS, 5), "value")
    for t in range(4):
        decoding.advance(TOKENS[:, t])
    fresh_rows, new = torch.tensor([0, 2]), [[D, C], [B, B, A, C]]
    fresh = lm.start(*left_padded(new, 5))
    fresh.critic = lm.start(*left_padded(new, 5), "value")
    assert decoding.replace_rows(fresh_rows, fresh, max_length=8)
    texts = [new[0], PROMPTS[1] + TOKENS[1, :4].tolist(), new[1], PROMPTS[3] + TOKENS[3, :4].tolist()]
    for t in range(3):
        for adapter, part in ((None, decoding), ("value", decoding.critic)):
            assert isinstance(part, Decoding)
            with lm.adapters.using(adapter):
                for row, text in enumerate(texts):
                    plain = plain_logits(lm.model, text + TOKENS[row, :t].tolist())[-1]
                    torch.testing.assert_close(part.logits[row], plain, atol=1e-4, rtol=0)
        decoding.advance(TOKENS[:, t])


# Adapters ----------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_the_base_exactly(lm: LanguageModel) -> None:
    before, _ = lm.evaluate(sequences())
    lm.adapters.add("policy")
    for adapter in ("policy", None):
        after, _ = lm.evaluate(sequences(), adapter)
        assert torch.equal(before, after)
    perturb(lm, "policy")
    assert (lm.evaluate(sequences(), "policy")[0] - before).abs().max() > 0.01
    assert torch.equal(lm.evaluate(sequences(), None)[0], before)


def test_using_restores_and_leaks_nothing(lm: LanguageModel) -> None:
    lm.adapters.add("policy")
    lm.adapters.add("other", seed=1)
    perturb(lm, "policy", 0)
    perturb(lm, "other", 1)
    Policy(lm)
    flags = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    alone = {adapter: lm.evaluate(sequences(), adapter)[0].detach() for adapter in (None, "policy", "other")}
    with lm.adapters.using("policy"):
        with lm.adapters.using("other"), lm.adapters.using(None):
            assert torch.equal(lm.model(input_ids=torch.tensor([[A]])).logits, plain_logits(lm.model, [A])[None])
        with pytest.raises(RuntimeError, match="inside"), lm.adapters.using(None):
            raise RuntimeError("inside")
        inner = plain_logits(lm.model, [A, B])
    with lm.adapters.using("policy"):
        assert torch.equal(inner, plain_logits(lm.model, [A, B]))
    for adapter, logits in alone.items():
        assert torch.equal(lm.evaluate(sequences(), adapter)[0], logits)
    assert {name: p.requires_grad for name, p in lm.model.named_parameters()} == flags
    assert not torch.equal(alone["policy"], alone["other"])
    with (
        pytest.raises(ValueError, match=r"no adapter 'none' \(it has policy, other\)"),
        lm.adapters.using("none"),
    ):
        pass


def test_gradients_reach_policy_and_value_adapter_in_one_graph(lm: LanguageModel) -> None:
    lm.adapters.add("policy")
    lm.adapters.add("frozen")
    policy = Policy(lm, critic="adapter")
    nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(2))
    perturb(lm, "policy")
    perturb(lm, "value")
    evaluation = policy.evaluate(sequences())
    with torch.no_grad(), lm.adapters.using(None):
        pass  # the reference is read between forward and backward
    (evaluation.logp.sum() + evaluation.value.sum()).backward()
    for name in ("policy", "value"):
        assert all(p.grad is not None and bool(p.grad.any()) for p in lm.adapters.parameters(name)), name
    trained = {id(p) for p in policy.parameters()}
    assert all(p.grad is None for p in lm.model.parameters() if id(p) not in trained)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
def test_what_is_trained_still_is_when_an_adapter_is_added(lm: LanguageModel, tmp_path: Path) -> None:
    """A copy, a new adapter, or one from a folder: the policy's gradient does not change, the others have none."""
    lm.adapters.add("policy")
    perturb(lm, "policy")
    lm.adapters.save(tmp_path)
    policy = Policy(lm, critic="none")

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(policy.evaluate(sequences()).logp.sum(), policy.parameters()))

    before = gradient()
    lm.adapters.copy("policy", "copy")
    lm.adapters.add("new", seed=1)
    lm.adapters.load(tmp_path, "loaded")
    trained = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".policy." in name for name in trained)
    assert any(bool(g.any()) for g in before)
    assert all(torch.equal(now, then) for now, then in zip(gradient(), before, strict=True))


def test_a_saved_adapter_loads_in_plain_peft(lm: LanguageModel, tmp_path: Path) -> None:
    from peft import PeftModel

    lm.save(tmp_path / "base")
    lm.adapters.add("policy", rank=4, alpha=8)
    lm.adapters.add("value", rank=2)
    perturb(lm, "policy")
    perturb(lm, "value", 1)
    lm.adapters.save(tmp_path / "policy", "policy")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "policy").iterdir()}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval()
    with lm.adapters.using("policy"):
        ours = plain_logits(lm.model, [A, B, C])
    torch.testing.assert_close(plain_logits(plain, [A, B, C]), ours, atol=1e-5, rtol=0)

    again = lmgym.load(str(tmp_path / "base"))
    again.adapters.load(tmp_path / "policy", "copied")
    with again.adapters.using("copied"):
        torch.testing.assert_close(plain_logits(again.model, [A, B, C]), ours, atol=1e-5, rtol=0)
    again.adapters.add("twin", base="copied")
    with again.adapters.using("twin"):
        torch.testing.assert_close(plain_logits(again.model, [A, B, C]), ours, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="already an adapter 'copied'"):
        again.adapters.load(tmp_path / "policy", "copied")
    with pytest.raises(ValueError, match="no adapter in"):
        again.adapters.load(tmp_path / "base", "new")


def test_a_policy_comes_back_from_its_folder(lm: LanguageModel, tmp_path: Path) -> None:
    lm.save(tmp_path / "base")
    lm.adapters.add("policy")
    policy = Policy(lm, critic="adapter")
    for name in ("policy", "value"):
        perturb(lm, name)
    nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(2))
    policy.save(tmp_path / "saved")
    again = Policy.load(lmgym.load(str(tmp_path / "base")), tmp_path / "saved")
    again.lm.fast = lm.fast
    assert again.critic == "adapter"
    for ours, theirs in zip(policy.evaluate(sequences()), again.evaluate(sequences()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert all(p.requires_grad for p in again.parameters())


def test_a_merged_adapter_is_the_model(lm: LanguageModel, tmp_path: Path) -> None:
    lm.adapters.add("sft")
    perturb(lm, "sft")
    with lm.adapters.using("sft"):
        before = plain_logits(lm.model, [A, B, C])
    with pytest.raises(ValueError, match="without adapters"):
        lm.save(tmp_path)
    lm.adapters.merge()
    assert not lm.adapters
    lm.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain_logits(plain, [A, B, C]), before, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == [A, B]
    lm.adapters.add("policy")
    torch.testing.assert_close(lm.evaluate(sequences(), "policy")[0], lm.evaluate(sequences())[0], atol=0, rtol=0)


def test_adapter_seeds_and_global_random_state(lm: LanguageModel) -> None:
    state = torch.get_rng_state()
    lm.adapters.add("one", seed=3)
    lm.adapters.add("two", seed=3)
    lm.adapters.add("three", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    one, two, three = (torch.cat([p.flatten() for p in lm.adapters.parameters(n)]) for n in ("one", "two", "three"))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    with pytest.raises(ValueError, match="already an adapter 'one'"):
        lm.adapters.add("one")


# Dropout, padding, ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dropout"),
    [
        ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.3}),
        ("LlamaConfig", {"attention_dropout": 0.3}),
    ],
)
def test_dropout_that_is_no_module_is_off_for_good(config: str, dropout: dict[str, Any]) -> None:
    lm = random_model(config, **dropout)
    before = plain_logits(lm.model, [A, B, C, D])
    lm.model.train()
    assert lm.model.training
    assert torch.equal(plain_logits(lm.model, [A, B, C, D]), before)


def test_noise_of_routers_is_off_whatever_the_mode() -> None:
    lm = random_model("MixtralConfig", router_jitter_noise=0.3, num_local_experts=2, num_key_value_heads=1)
    before = lm.evaluate(sequences())[0]
    lm.model.train()
    assert torch.equal(lm.evaluate(sequences())[0], before)


def test_dropout_is_off_for_good() -> None:
    lm = random_gpt2()
    lm.adapters.add("policy")
    lm.model.train()
    first, second = (lm.evaluate(sequences(), "policy")[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not [m.p for m in lm.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]


@pytest.mark.parametrize("own", ["<eos>", None, "<far>"])
def test_any_id_fills_rows_up(own: str | None) -> None:
    """A tokenizer without a padding token, or whose padding is its end, or is beyond the model's vocabulary."""
    lm, expected = lmgym.load("probe"), {}
    for ids in ([A], [C, D, A]):
        expected[len(ids)] = plain_logits(lm.model, ids)[-1]
    if own == "<far>":
        lm.tokenizer.add_special_tokens({"pad_token": "<far>"})
    lm.tokenizer.pad_token = own
    lm.model.config.pad_token_id = None
    new = LanguageModel(lm.model, lm.tokenizer)
    assert (new.pad_id, new.vocabulary) == (EOS, 6)
    assert EOS not in new.banned_ids, "an end that is also the padding stays allowed"
    assert new.model.config.pad_token_id is None, "an end in the config would be taken for padding by others"
    assert new.text.padding_note is not None
    assert "'<eos>'" in new.text.padding_note
    for fast in (True, False):
        new.fast = fast
        decoding = new.start(torch.tensor([[EOS, EOS, A], [C, D, A]]), torch.tensor([[0, 0, 1], [1, 1, 1]]))
        torch.testing.assert_close(decoding.logits, torch.stack([expected[1], expected[3]]), atol=1e-5, rtol=0)


def test_the_padding_is_a_special_token_if_there_is_one() -> None:
    lm = lmgym.load("probe")
    lm.tokenizer.unk_token = "<pad>"
    lm.tokenizer.pad_token = "<eos>"
    new = LanguageModel(lm.model, lm.tokenizer)
    assert new.pad_id == PAD
    assert new.banned_ids == (PAD,)
    assert "also ends texts ('<eos>'): rows are filled up with '<pad>'" in str(new.text.padding_note)
    assert lmgym.load("probe").text.padding_note is None


def test_which_special_token_becomes_the_padding() -> None:
    """One that is meant for it, else that of unknown words, else that of the beginning, else any but an image's."""
    tokenizer = lmgym.load("probe").tokenizer
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|spare|>", "<|right_pad|>"]})
    tokenizer.bos_token, tokenizer.unk_token = "a", "b"
    order: list[int | None] = []
    for _ in range(5):
        taken = {EOS, *(i for i in order if i is not None)}
        order.append(choose_padding(tokenizer, taken, vocabulary=9))
    assert order == [8, B, A, 7, None]
    assert choose_padding(tokenizer, {EOS}, vocabulary=8) == B, "a token that the model does not have"


def test_a_padding_token_can_be_added(tmp_path: Path) -> None:
    lm = lmgym.load("probe")
    lm.tokenizer.pad_token = None
    before = plain_logits(lm.model, [A, B])
    known = LanguageModel(lm.model, lm.tokenizer, pad_token="<pad>")
    assert (known.pad_id, known.vocabulary) == (PAD, 6)
    grown = LanguageModel(lm.model, lm.tokenizer, pad_token="<|new|>")
    assert (grown.pad_id, grown.vocabulary) == (6, 7)
    assert grown.model.get_input_embeddings().weight.shape[0] == 7
    assert 6 in grown.banned_ids
    torch.testing.assert_close(plain_logits(grown.model, [A, B])[:, :6], before, atol=0, rtol=0)
    decoding = grown.start(torch.tensor([[6, 6, A, B]]), torch.tensor([[0, 0, 1, 1]]))
    torch.testing.assert_close(decoding.logits[0, :6], before[-1], atol=1e-5, rtol=0)
    grown.save(tmp_path)
    again = lmgym.load(str(tmp_path))
    assert (again.pad_id, again.vocabulary) == (6, 7)


def test_a_tokenizer_longer_than_the_model(probe: LanguageModel) -> None:
    probe.tokenizer.add_tokens(["e"])
    lm = LanguageModel(probe.model, probe.tokenizer)
    assert lm.text.encode("ab") == [A, B]
    with pytest.raises(ValueError, match=r"'abe' has the token 6 \('e'\), but the model 'custom' has only 6"):
        lm.text.encode("abe")
    probe.model.generation_config.eos_token_id = 6
    assert LanguageModel(probe.model, probe.tokenizer).eos_ids == (EOS,)
    with pytest.raises(ValueError, match="the model 'mine' ends a text with token 6, but has only 6"):
        TextCodec(probe.tokenizer, (6,), 6, "mine")


def test_ids_that_the_tokenizer_leaves_out_are_banned(probe: LanguageModel) -> None:
    """A vocabulary may have gaps: its length is then not its largest id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    gaps = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "d": 5}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gaps, pad_token="<pad>", eos_token="<eos>")
    assert LanguageModel(probe.model, tokenizer).banned_ids == (PAD, 3, 4)


def test_ids_beyond_the_tokenizer_are_banned() -> None:
    lm = lmgym.load("probe")
    lm.model.resize_token_embeddings(9, mean_resizing=False)
    lm = LanguageModel(lm.model, lm.tokenizer)
    assert lm.vocabulary == 9
    assert lm.banned_ids == (PAD, 6, 7, 8)


def test_a_beginning_token_is_kept_and_an_end_is_not() -> None:
    from tokenizers.processors import TemplateProcessing

    lm = lmgym.load("probe")
    backend = lm.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="a $A <eos>", special_tokens=[("a", A), ("<eos>", EOS)])
    assert lm.text.encode("bc") == [A, B, C]
    assert lm.text.encode("") == [A]


def test_several_ends_come_from_the_generation_config(probe: LanguageModel) -> None:
    probe.model.generation_config.eos_token_id = [1, 4]
    assert LanguageModel(probe.model, probe.tokenizer).eos_ids == (1, 4)


@pytest.mark.parametrize(
    ("family", "limit"),
    [("gpt2", 64), ("mpt", 64), ("roberta (decoder)", 63), ("gemma3", 64), ("mamba", None), ("bloom", None)],
)
def test_how_many_positions_a_model_has(family: str, limit: int | None) -> None:
    model = make_model(family)
    assert position_limit(model) == limit
    if limit is not None and family in ("gpt2", "roberta (decoder)"):  # those that cannot read more at all
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


def test_a_prompt_that_is_cut_keeps_its_beginning_token(probe: LanguageModel) -> None:
    from tokenizers.processors import TemplateProcessing

    probe.tokenizer.bos_token = "d"
    backend = probe.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="d $A", special_tokens=[("d", D)])
    lm = LanguageModel(probe.model, probe.tokenizer)
    env = TokenVectorEnv(1, task=Tree(), model=lm, max_prompt_tokens=3, max_new_tokens=2, long_prompts="truncate")
    observation, _ = env.reset(options={"prompt": "abcab"})
    assert observation["input_ids"][0, -3:].tolist() == [D, A, B]
    assert lm.text.last_tokens([A, B, C, A], 2) == [C, A], "only special tokens are kept"
    assert lm.text.last_tokens([D, A, B], 1) == [B]


# Loading -----------------------------------------------------------------------------------------------------------


def test_a_folder_loads_and_an_unknown_name_says_what_there_is(lm: LanguageModel, tmp_path: Path) -> None:
    lm.save(tmp_path)
    again = lmgym.load(str(tmp_path))
    again.fast = lm.fast
    torch.testing.assert_close(again.evaluate(sequences())[0], lm.evaluate(sequences())[0], atol=1e-6, rtol=0)
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="no model 'no-such-model': built-in models are tiny and probe"):
        lmgym.load("no-such-model")
    with pytest.raises(ValueError, match="dtype='float8' is unknown"):
        lmgym.load("probe", dtype="float8")


def test_the_probe_is_the_same_every_time() -> None:
    state = torch.get_rng_state()
    one, two = lmgym.load("probe"), lmgym.load("probe")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.evaluate(sequences())[0], two.evaluate(sequences())[0])


def test_log_probabilities_are_float32_whatever_the_weights() -> None:
    lm = lmgym.load("probe", dtype="bfloat16")
    lm.adapters.add("policy")
    evaluation = Policy(lm).evaluate(sequences())
    assert {x.dtype for x in evaluation} == {torch.float32}
    assert lm.model.dtype == torch.bfloat16
    assert log_probs(torch.zeros(6).bfloat16(), 1.0, torch.ones(6, dtype=torch.bool)).dtype == torch.float32


def test_a_real_model(shared_data: Path) -> None:
    """stories260K: `<s>` begins and also ends a story, there are two end ids, and `<unk>` is the padding token."""
    lm = lmgym.load(str(shared_data / "stories260K"))
    assert set(lm.eos_ids) == {1, 2}
    assert lm.pad_id == 0
    ids = lm.text.encode("Once upon a time")
    assert ids[0] == 1
    assert ids[-1] not in lm.eos_ids
    plain: Any = AutoModelForCausalLM.from_pretrained(shared_data / "stories260K").eval()
    expected = plain.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0]
    decoding = lm.start(*left_padded([ids, ids[:3]], len(ids) + 3))
    chosen = []
    for _ in range(12):
        chosen.append(int(decoding.logits[0].argmax()))
        decoding = decoding.advance(decoding.logits.argmax(1))
    assert chosen == expected[len(ids) :].tolist()
    text = lm.text.decode_completion(ids, chosen)
    assert lm.text.decode(ids) + text == lm.text.decode([*ids, *chosen])
    assert text.startswith(",")


def test_a_saved_adapter_is_the_same_file_in_every_process(probe: LanguageModel, tmp_path: Path) -> None:
    """The order of a set of names depends on the process's hash seed; the file must not."""
    probe.adapters.add("policy")
    probe.adapters.save(tmp_path, "policy")
    modules = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 1
    assert modules == sorted(modules)


def test_threads_that_load_models_do_not_disturb_one_another() -> None:
    """Loading changes functions of torch and the global generator for a moment, in one thread at a time."""
    expected = lmgym.load("tiny")
    expected.adapters.add("policy", seed=7)
    filters = list(warnings.filters)
    torch.manual_seed(0)

    def load(number: int) -> LanguageModel:
        lm = lmgym.load("tiny" if number % 2 else "probe")
        lm.adapters.add("policy", seed=7)
        return lm

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(load, range(8)))
    for lm in found[1::2]:
        for mine, theirs in zip(lm.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    drawn = torch.rand(4)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(4)), "the global generator is as it was"
    assert warnings.filters == filters
