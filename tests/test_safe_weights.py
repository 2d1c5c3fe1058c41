"""Untrusted files: no pickle is opened, no code in them runs, and damaged or missing parts are refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmgym
from lmgym import LanguageModel, Policy, RewardModel
from lmgym.models import check_shapes, read_settings, read_weights


class Bomb:
    """The content of a malicious pickle: loading it creates a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved policy with an adapter, and a critic that has an adapter too."""
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=4)
    policy = Policy(lm, critic="adapter")
    for parameter in policy.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    policy.save(tmp_path / "policy")
    return tmp_path / "policy"


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-7])
    elif how == "cut in its header":
        path.write_bytes(data[:40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(bytes(range(256)) * 8)
    elif how == "a long header":
        path.write_bytes(b"\xff" * 7 + b"\x7f" + data[8:])
    elif how == "a bit of its header":
        path.write_bytes(data[:12] + bytes([data[12] ^ 0x80]) + data[13:])
    elif how == "not finite":
        save_file({name: torch.full_like(w, float("nan")) for name, w in load_file(path).items()}, path)


HOWS = ("truncated", "cut in its header", "empty", "garbage", "a long header", "a bit of its header", "not finite")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "value_head.safetensors", "value/adapter_model.safetensors"]
)
def test_damaged_weights_are_named_in_one_line(saved: Path, name: str, how: str) -> None:
    damage(saved / name, how)
    lm = lmgym.load("probe")
    with pytest.raises(ValueError, match=name) as caught:
        Policy.load(lm, saved)
    assert "\n" not in str(caught.value)
    assert not lm.adapters, "a failed load changed the model"


@pytest.mark.parametrize("how", HOWS[:-1])
def test_damaged_models_are_named_in_one_line(tmp_path: Path, how: str) -> None:
    lmgym.load("probe").save(tmp_path)
    damage(tmp_path / "model.safetensors", how)
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        lmgym.load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_other_damaged_files_of_a_model(tmp_path: Path, file: str) -> None:
    lmgym.load("tiny").save(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:90])
    with pytest.raises(ValueError, match="no model") as caught:
        lmgym.load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "value_head.safetensors"])
def test_a_pickle_under_another_name_is_not_opened(saved: Path, tmp_path: Path, name: str, protocol: int) -> None:
    marker = tmp_path / "executed"
    (saved / name).write_bytes(pickle.dumps(Bomb(marker), protocol))
    with pytest.raises(ValueError, match=name):
        Policy.load(lmgym.load("probe"), saved)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_an_archive_of_torch_under_another_name_is_not_opened(saved: Path, tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    file = saved / "adapter_model.safetensors"
    torch.save({"w": Bomb(marker)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="a pickle under another name"):
        Policy.load(lmgym.load("probe"), saved)
    assert not marker.exists()


def test_pickled_weights_are_refused_by_name_with_the_remedy(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (saved / "adapter_model.safetensors").unlink()
    torch.save({"w": Bomb(marker)}, saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: pickled weights can run any code.*save_pretrained"):
        lmgym.load("probe").adapters.load(saved)
    model = tmp_path / "model"
    lmgym.load("probe").save(model)
    (model / "model.safetensors").unlink()
    torch.save({"w": Bomb(marker)}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickled weights"):
        lmgym.load(str(model))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickled weights"):
        RewardModel.load(model)
    assert not marker.exists()


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    """The length of the header can be any bytes: 0x0280 begins like a pickle of protocol 2."""
    file = tmp_path / "w.safetensors"
    for padding in range(700):
        save_file({"w": torch.ones(2)}, file, {"note": "x" * padding})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert read_weights(file)["w"].tolist() == [1, 1]


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def without_the_first(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weights[name] for name in sorted(weights)[1:]}


def with_one_more(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"base_model.model.transformer.wte.weight": torch.zeros(6, 32)}


def of_another_shape(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {sorted(weights)[0]: torch.zeros(3, 5)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_the_first, "lacks"),
        (with_one_more, "has the unexpected weight"),
        (of_another_shape, r"shape \(3, 5\)"),
    ],
)
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "value_head.safetensors", "value/adapter_model.safetensors"]
)
def test_weights_that_lack_or_exceed_are_refused(saved: Path, name: str, change: Change, said: str) -> None:
    save_file(change(load_file(saved / name)), saved / name)
    lm = lmgym.load("probe")
    before = {key: weight.clone() for key, weight in lm.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name}.*{said}"):
        Policy.load(lm, saved)
    assert not lm.adapters
    after = lm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], weight) for key, weight in before.items()), "the base is as it was"


def test_what_fails_leaves_the_other_adapters_alone(saved: Path) -> None:
    lm = lmgym.load("probe")
    lm.adapters.add("mine")
    (parameter, *_) = lm.adapters.parameters("mine")
    parameter.requires_grad_(True)
    save_file(without_the_first(load_file(saved / "value_head.safetensors")), saved / "value_head.safetensors")
    with pytest.raises(ValueError, match="value_head"):
        Policy.load(lm, saved)
    assert list(lm.adapters) == ["mine"]
    assert parameter.requires_grad
    assert lm.adapters.parameters("mine")[0] is parameter


def test_a_sound_policy_loads_and_decides_as_before(saved: Path) -> None:
    ids = torch.tensor([[2, 3, 4]])
    lm = lmgym.load("probe")
    policy = Policy.load(lm, saved)
    assert set(lm.adapters) == {"policy", "value"}
    assert all(float(p.detach().mean()) == pytest.approx(0.01) for p in policy.parameters())
    assert policy.start(ids, torch.ones_like(ids)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"peft_type": None}, "only LoRA"),
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"bias": "all"}, "changes the base"),
        ({"layer_replication": [[0, 1]]}, "changes the base"),
        ({"modules_to_save": ["lm_head"]}, "cannot be switched off"),
        ({"init_lora_weights": "pissa"}, "may rewrite the base"),
        ({"r": "many"}, "not the settings of a LoRA adapter|does not fit this model"),
        ({"r": -1}, "not the settings of a LoRA adapter|does not fit this model"),
        ({"target_modules": ["nowhere"]}, "does not fit this model"),
    ],
)
def test_settings_of_an_adapter_that_cannot_be(saved: Path, settings: dict[str, Any], said: str) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    lm = lmgym.load("probe")
    with pytest.raises(ValueError, match=said) as caught:
        Policy.load(lm, saved)
    assert "\n" not in str(caught.value)
    assert not lm.adapters


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\ud800"])
def test_settings_that_are_no_json(saved: Path, text: str) -> None:
    (saved / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"adapter_config\.json: not"):
        Policy.load(lmgym.load("probe"), saved)


def test_code_that_comes_with_a_model_does_not_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from the config of a model, a tokenizer or an adapter; and the user is not prompted to allow it."""
    marker, model = tmp_path / "executed", tmp_path / "model"
    lmgym.load("tiny").save(model)
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Mine:\n    pass\n"
    remote = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"), "mine.Mine")
    for folder in (model, saved):
        (folder / "mine.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": remote, "model_type": "mine", "architectures": ["Mine"]}
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.chdir(saved)
    monkeypatch.syspath_prepend(str(saved))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is to be asked"))
    for load in (lmgym.load, RewardModel.load):
        with pytest.raises(ValueError, match=r"trust_remote_code|custom code|does not recognize"):
            load(str(model))
    file = saved / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings |= {"auto_map": remote, "auto_mapping": {"parent_library": "mine", "base_model_class": "Mine"}}
    file.write_text(json.dumps(settings))
    lmgym.load("probe").adapters.load(saved)
    assert not marker.exists()


def test_a_model_that_lacks_weights_is_no_model(tmp_path: Path) -> None:
    """transformers would initialise them at random, with a warning that is not shown."""
    lmgym.load("tiny").save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(without_the_first(weights), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks"):
        lmgym.load(str(tmp_path))


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    """Its head would be initialised at random."""
    lmgym.load("tiny").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": 1, "id2label": {"0": "score"}}))
    with pytest.raises(ValueError, match=r"lacks 'score\.weight'"):
        RewardModel.load(tmp_path)


@pytest.mark.parametrize("change", [without_the_first, with_one_more, of_another_shape])
def test_a_reward_adapter_that_is_not_whole(tmp_path: Path, change: Change) -> None:
    source = Path(lmgym.__file__).parent / "assets" / "tiny-reward"
    shutil.copytree(source, tmp_path / "reward")
    file = tmp_path / "reward" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        RewardModel.load(tmp_path / "reward")


@pytest.mark.parametrize(
    "settings",
    [
        '{"shift": "1"}',
        '{"shift": NaN}',
        '{"gain": 0}',
        '{"gain": true}',
        '{"colour": 1}',
        '{"ends_with_eos": 1}',
        "[]",
    ],
)
def test_settings_of_a_reward_model_that_cannot_be(tmp_path: Path, settings: str) -> None:
    source = Path(lmgym.__file__).parent / "assets" / "tiny-reward"
    shutil.copytree(source, tmp_path / "reward")
    (tmp_path / "reward" / "lmgym.json").write_text(settings)
    with pytest.raises(ValueError, match=r"lmgym\.json"):
        RewardModel.load(tmp_path / "reward")


def test_a_reward_adapter_names_its_base(tmp_path: Path) -> None:
    source = Path(lmgym.__file__).parent / "assets" / "tiny-reward"
    shutil.copytree(source, tmp_path / "reward")
    file = tmp_path / "reward" / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if "base_model" not in k}))
    with pytest.raises(ValueError, match="base_model_name_or_path is None"):
        RewardModel.load(tmp_path / "reward")


def test_read_settings_and_check_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON"):
        read_settings(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="no such file; weights are read from safetensors files only"):
        read_weights(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="file: lacks 'b' and 1 more"):
        check_shapes("file", {"a": torch.ones(1)}, {name: torch.ones(1) for name in "abc"})


def test_dropping_an_adapter(probe: LanguageModel) -> None:
    plain = probe.model
    probe.adapters.add("one")
    probe.adapters.add("two")
    probe.adapters.drop("one")
    assert list(probe.adapters) == ["two"]
    probe.adapters.drop("two")
    assert not probe.adapters
    assert probe.model is plain
    with pytest.raises(ValueError, match="no adapter 'two'"):
        probe.adapters.drop("two")


def test_loading_an_adapter_draws_nothing_and_keeps_the_name_of_its_base(saved: Path, tmp_path: Path) -> None:
    lm, state = lmgym.load("probe"), torch.get_rng_state()
    lm.adapters.load(saved)
    assert torch.equal(state, torch.get_rng_state())
    lm.adapters.save(tmp_path / "again")
    first, second = (json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, tmp_path / "again"))
    assert first["base_model_name_or_path"] == second["base_model_name_or_path"]
