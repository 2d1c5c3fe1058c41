"""A saved adapter says which base it belongs to: by its folder for plain peft, and by a checksum for lmgym."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_gpt2, random_model
from peft import AutoPeftModelForCausalLM, IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig
from peft import get_peft_model as wrap
from test_models import A, B, C, perturb, plain_logits, sequences
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lmgym
from lmgym import LanguageModel, Policy, RewardModel
from lmgym.models import BaseMismatch, read_checksum, weights_checksum

IDS = [A, B, C, A]
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)


def named_base(folder: Path) -> str | None:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def change_settings(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(params=["llama", "gpt2"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What a run leaves: sft, and a policy on it whose critic has an adapter too; no weight is zero."""
    lm: LanguageModel = request.getfixturevalue(request.param)
    folder = tmp_path / "run"
    lm.save(folder / "sft")
    lm.adapters.add("policy", rank=4)
    policy = Policy(lm, critic="adapter")
    for i, name in enumerate(("policy", "value")):
        perturb(lm, name, i)
    policy.save(folder / "policy")
    return folder


def policy_logits(run: Path, adapter: str = "policy") -> Tensor:
    """By peft alone, on the base in `sft`."""
    base = AutoModelForCausalLM.from_pretrained(run / "sft")
    return plain_logits(PeftModel.from_pretrained(base, str(run / adapter)).eval(), IDS)


def write_adapter(model_folder: Path, folder: Path, config: LoraConfig, seed: int = 1) -> tuple[Any, Tensor]:
    """An adapter that plain peft makes and saves; its model, and its logits."""
    model = wrap(AutoModelForCausalLM.from_pretrained(model_folder), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3, generator=generator)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model, plain_logits(model, IDS)


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["policy", "policy/value"])
def test_plain_peft_finds_the_base_by_itself(run: Path, adapter: str) -> None:
    assert named_base(run / adapter) == str((run / "sft").absolute())
    alone = AutoPeftModelForCausalLM.from_pretrained(run / adapter).eval()
    torch.testing.assert_close(plain_logits(alone, IDS), policy_logits(run, adapter), atol=1e-5, rtol=0)
    plain = plain_logits(AutoModelForCausalLM.from_pretrained(run / "sft"), IDS)
    assert float((plain - policy_logits(run, adapter)).abs().max()) > 0.1, "the adapter must matter"
    assert read_checksum(run / adapter) == weights_checksum(lmgym.load(str(run / "sft")).model)


def test_a_relative_folder_is_named_by_its_absolute_path(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llama.save("sft")
    again = lmgym.load("sft")
    again.adapters.add("policy")
    again.adapters.save("policy")
    assert named_base(tmp_path / "policy") == str(tmp_path / "sft")


def test_the_checksum_is_that_of_the_weights_however_they_are_stored(tmp_path: Path) -> None:
    lm = random_model("LlamaConfig", tie_word_embeddings=True)
    wanted = weights_checksum(lm.model)
    lm.save(tmp_path / "one")
    lm.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    lm.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_checksum(lmgym.load(str(tmp_path / "shards")).model) == wanted
    half = lmgym.load(str(tmp_path / "one"), dtype="bfloat16")
    assert weights_checksum(half.model) == wanted
    half.save(tmp_path / "half")
    assert weights_checksum(lmgym.load(str(tmp_path / "half")).model) == wanted
    # peft around it, and adapters on layers and on the tied embedding, change nothing.
    lm.adapters.add("policy")
    perturb(lm, "policy")
    assert weights_checksum(lm.model) == wanted
    write_adapter(tmp_path / "one", tmp_path / "embedding", LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    lm.adapters.load(tmp_path / "embedding", "embedding")
    assert weights_checksum(lm.model) == wanted
    # Every weight counts, to its last number.
    for name, parameter in lmgym.load(str(tmp_path / "one")).model.named_parameters():
        other = lmgym.load(str(tmp_path / "one"))
        with torch.no_grad():
            dict(other.model.named_parameters())[name].view(-1)[-1] += 0.01
        assert weights_checksum(other.model) != wanted, name
        assert parameter.numel()


def test_a_base_that_changed_is_not_named_before_it_is_saved(llama: LanguageModel, tmp_path: Path) -> None:
    """Naming what it was loaded from would give other logits without a word."""

    def saved_base(lm: LanguageModel) -> str | None:
        lm.adapters.add("policy")
        lm.adapters.save(tmp_path / "adapter")
        lm.adapters.drop("policy")
        return named_base(tmp_path / "adapter")

    assert saved_base(llama) is None, "it was stored nowhere"
    llama.save(tmp_path / "first")
    lm = lmgym.load(str(tmp_path / "first"))
    assert saved_base(lm) == str(tmp_path / "first")
    before = [p.clone() for p in lm.model.parameters()]
    optimizer = torch.optim.Adam(lm.model.requires_grad_(True).parameters(), lr=1e-3, fused=True)
    lm.evaluate(sequences())[0].sum().backward()
    optimizer.step()
    lm.model.requires_grad_(False)
    assert saved_base(lm) is None
    lm.save(tmp_path / "second")
    assert saved_base(lm) == str(tmp_path / "second")
    lm.load_weights(tmp_path / "first")
    assert all(torch.equal(p, q) for p, q in zip(lm.model.parameters(), before, strict=True))
    assert saved_base(lm) == str(tmp_path / "first")
    lm.adapters.add("merged")
    perturb(lm, "merged")
    lm.adapters.merge()
    assert saved_base(lm) is None
    with pytest.raises(ValueError, match="which is not there"):
        lmgym.load(str(tmp_path / "adapter"))


def test_a_model_with_a_new_padding_token_is_not_what_it_was_loaded_from(llama: LanguageModel, tmp_path: Path) -> None:
    llama.save(tmp_path / "base")
    lm = lmgym.load(str(tmp_path / "base"), pad_token="<new>")
    assert lm.vocabulary == 7
    assert lm.adapters.base() is None


# What is read ---------------------------------------------------------------------------------------------------------


def changed_base(folder: Path) -> None:
    """Other weights of the same shapes."""
    lm = lmgym.load(str(folder))
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.add_(0.1)
    shutil.rmtree(folder)
    lm.save(folder)


def test_an_adapter_on_other_weights_is_refused(run: Path) -> None:
    other = lmgym.load(str(run / "sft"))
    with torch.no_grad():
        next(iter(other.model.parameters())).view(-1)[-1] += 0.05
    with pytest.raises(BaseMismatch, match=f"does not fit .*other weights.*{run / 'sft'}"):
        Policy.load(other, run / "policy")
    assert not other.adapters
    half = lmgym.load(str(run / "sft"), dtype="bfloat16")
    assert Policy.load(half, run / "policy").critic == "adapter", "the same weights, rounded"
    lowest = lmgym.load(str(run / "sft"), dtype="float16")
    lowest.adapters.load(run / "policy")


@pytest.mark.parametrize("text", ["[]", "{", '{"base_sha256": 1}', '{"base_sha256": "abc"}'])
def test_a_damaged_checksum_is_named(run: Path, text: str) -> None:
    (run / "policy" / "lmgym.json").write_text(text)
    with pytest.raises(ValueError, match=r"policy/lmgym\.json: "):
        Policy.load(lmgym.load(str(run / "sft")), run / "policy")


def test_an_adapter_without_a_checksum_loads_as_before(run: Path) -> None:
    (run / "policy" / "lmgym.json").unlink()
    lm = lmgym.load(str(run / "sft"))
    lm.adapters.load(run / "policy")
    assert "policy" in lm.adapters


@pytest.mark.parametrize("adapter", ["policy", "policy/value"])
def test_the_folder_of_an_adapter_is_a_model(run: Path, adapter: str) -> None:
    """transformers alone would give the bare base, or the adapter on top without its switch."""
    wanted = policy_logits(run, adapter)
    lm = lmgym.load(str(run / adapter))
    assert not lm.adapters
    assert lm.name == str(run / adapter)
    torch.testing.assert_close(plain_logits(lm.model, IDS), wanted, atol=1e-5, rtol=0)
    assert lm.adapters.base() is None, "the merged weights are stored nowhere"
    half = lmgym.load(str(run / adapter), dtype="bfloat16")
    for (name, p), q in zip(half.model.named_parameters(), lm.model.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16()), f"{name}: merged in float32, rounded once"


def test_the_adapter_of_plain_peft_is_a_model_too(llama: LanguageModel, tmp_path: Path) -> None:
    llama.save(tmp_path / "base")
    _, wanted = write_adapter(
        tmp_path / "base", tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    assert read_checksum(tmp_path / "adapter") is None
    lm = lmgym.load(str(tmp_path / "adapter"))
    torch.testing.assert_close(plain_logits(lm.model, IDS), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ["policy", "policy/value"])
def test_the_base_is_found_after_a_move(run: Path, adapter: str) -> None:
    wanted = policy_logits(run, adapter)
    moved = run.rename(run.with_name("moved"))
    torch.testing.assert_close(plain_logits(lmgym.load(str(moved / adapter)).model, IDS), wanted, atol=1e-5, rtol=0)
    # Another run has taken the old place.
    shutil.copytree(moved / "sft", run / "sft")
    changed_base(run / "sft")
    torch.testing.assert_close(plain_logits(lmgym.load(str(moved / adapter)).model, IDS), wanted, atol=1e-5, rtol=0)


def test_a_base_that_is_another_or_not_there_is_refused(run: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    changed_base(moved / "sft")
    with pytest.raises(BaseMismatch, match=r"does not fit .*moved/sft.*other weights"):
        lmgym.load(str(moved / "policy"))
    shutil.rmtree(moved / "sft")
    with pytest.raises(ValueError, match=f"adapter of the base model '{run / 'sft'}', which is not there"):
        lmgym.load(str(moved / "policy"))
    change_settings(moved / "policy", base_model_name_or_path=7)
    with pytest.raises(ValueError, match="base_model_name_or_path is 7"):
        lmgym.load(str(moved / "policy"))
    change_settings(moved / "policy", base_model_name_or_path="someone/model", revision="v2")
    with pytest.raises(ValueError, match="revision 'v2' of 'someone/model'"):
        lmgym.load(str(moved / "policy"))
    change_settings(moved / "policy", base_model_name_or_path=str(moved / "policy"), revision=None)
    with pytest.raises(ValueError, match="an adapter, not a whole model"):
        lmgym.load(str(moved / "policy"))


def test_older_runs_named_the_model_before_fine_tuning(run: Path, tmp_path: Path) -> None:
    """They have no checksum. The base is the folder `sft` beside the policy, whatever the adapter names."""
    wanted = policy_logits(run)
    shutil.copytree(run / "sft", tmp_path / "untouched")
    changed_base(tmp_path / "untouched")
    change_settings(run / "policy", base_model_name_or_path=str(tmp_path / "untouched"))
    (run / "policy" / "lmgym.json").unlink()
    (run / "config.json").write_text("{}")
    torch.testing.assert_close(plain_logits(lmgym.load(str(run / "policy")).model, IDS), wanted, atol=1e-5, rtol=0)


def test_a_reward_adapter_finds_its_base(llama: LanguageModel, tmp_path: Path) -> None:
    llama.save(tmp_path / "run" / "sft")
    model = RewardModel.from_language_model(llama, rank=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    model.shift = 0.5
    model.save_adapter(tmp_path / "run" / "reward")
    assert named_base(tmp_path / "run" / "reward") == str(tmp_path / "run" / "sft")
    wanted = model.score_texts(["abc"])
    assert "modules_to_save" in json.loads((tmp_path / "run" / "reward" / "adapter_config.json").read_text())
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    again = RewardModel.load(moved / "reward")
    torch.testing.assert_close(again.score_texts(["abc"]), wanted, atol=1e-5, rtol=0)
    assert again.shift == 0.5
    with pytest.raises(ValueError, match="use save"):
        again.save_adapter(tmp_path / "x")
    changed_base(moved / "sft")
    with pytest.raises(BaseMismatch, match="other weights"):
        RewardModel.load(moved / "reward")


# Which adapters there are ---------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "ranks by pattern": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_an_adapter_is_trained_copied_saved_and_merged(kind: str, tied: bool, tmp_path: Path) -> None:
    lm = random_model("LlamaConfig", tie_word_embeddings=tied)
    lm.save(tmp_path / "base")
    plain, wanted = write_adapter(
        tmp_path / "base", tmp_path / "adapter", LoraConfig(r=4, task_type="CAUSAL_LM", **KINDS[kind])
    )
    lm.adapters.load(tmp_path / "adapter", "policy")
    lm.adapters.add("other", rank=2)  # whose weights are not the policy's
    policy = Policy(lm, critic="none")
    theirs = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    ours = {name.replace(".policy", ".default"): p for name, p in lm.model.named_parameters() if p.requires_grad}
    assert theirs.keys() == ours.keys()
    assert {id(p) for p in policy.parameters()} == {id(p) for p in ours.values()}
    text = sequences(3)
    policy.evaluate(text).logp.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())

    def logits(adapter: str) -> Tensor:
        with lm.adapters.using(adapter):
            return plain_logits(lm.model, IDS)

    torch.testing.assert_close(logits("policy"), wanted, atol=1e-5, rtol=0)
    lm.adapters.add("twin", base="policy")
    assert torch.equal(logits("twin"), logits("policy"))
    bare = plain_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), IDS)
    with lm.adapters.using(None):
        torch.testing.assert_close(plain_logits(lm.model, IDS), bare, atol=1e-5, rtol=0)
    lm.adapters.save(tmp_path / "again", "policy")
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(plain_logits(alone, IDS), wanted, atol=1e-5, rtol=0)
    merged = lmgym.load(str(tmp_path / "again"))
    torch.testing.assert_close(plain_logits(merged.model, IDS), wanted, atol=2e-5, rtol=0)
    merged.save(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_logits(whole, IDS), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["weight", "q_proj", "default", "lora_A", "layers"])
def test_an_adapters_name_may_be_that_of_a_module(llama: LanguageModel, name: str) -> None:
    llama.adapters.add("policy")
    llama.adapters.add(name, rank=2)
    own, others = llama.adapters.parameters(name), llama.adapters.parameters("policy")
    assert len(own) == len(others) == 2 * 2 * 7
    assert not {id(p) for p in own} & {id(p) for p in others}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"trainable_token_indices": [1]}, "changes the base"),
        ({"use_something_new": True}, "use_something_new"),
        ({"something_new_config": {"a": 1}}, "something_new_config"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'"),
    ],
)
def test_variants_that_would_be_computed_otherwise_are_refused(run: Path, settings: dict[str, Any], said: str) -> None:
    change_settings(run / "policy", **settings)
    lm = lmgym.load(str(run / "sft"))
    with pytest.raises(ValueError, match=said) as caught:
        Policy.load(lm, run / "policy")
    assert str(caught.value).startswith(str(run / "policy" / "adapter_config.json"))
    assert not lm.adapters
    with pytest.raises(ValueError, match=said):
        lmgym.load(str(run / "policy"))


@pytest.mark.parametrize(
    "config",
    [
        lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
        lambda: LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
        lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[2]),
        lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all"),
    ],
)
def test_other_adapters_of_peft_are_refused(llama: LanguageModel, tmp_path: Path, config: Callable[[], Any]) -> None:
    llama.save(tmp_path / "base")
    wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config()).save_pretrained(str(tmp_path / "adapter"))
    for load in (lambda: lmgym.load(str(tmp_path / "adapter")), lambda: llama.adapters.load(tmp_path / "adapter")):
        with pytest.raises(ValueError, match=r"adapter_config\.json: .*(LORA|modules_to_save|changes the base)"):
            load()
    assert not llama.adapters


def test_a_tied_gpt2_merges_exactly(tmp_path: Path) -> None:
    """Its embedding is its head: only one of the two is adapted."""
    lm = random_gpt2()
    lm.save(tmp_path / "base")
    _, wanted = write_adapter(tmp_path / "base", tmp_path / "adapter", LoraConfig(r=2, target_modules=["wte"]))
    merged = lmgym.load(str(tmp_path / "adapter"))
    torch.testing.assert_close(plain_logits(merged.model, IDS), wanted, atol=2e-5, rtol=0)
    policy = Policy(merged, None, critic="none")
    torch.testing.assert_close(
        policy.start(torch.tensor([IDS]), torch.ones(1, 4, dtype=torch.long)).logits[0], wanted[-1], atol=2e-5, rtol=0
    )
