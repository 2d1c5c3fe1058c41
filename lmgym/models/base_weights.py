"""Which base model an adapter belongs to: the folder with its weights, and a checksum of them beside the adapter."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmgym.io import atomic
from lmgym.models.large_packages import peft
from lmgym.models.safe_weights import read_settings

SETTINGS_FILE = "lmgym.json"
"""The file beside an adapter that holds the checksum."""
CHECKSUM = "base_sha256"

Model = TypeVar("Model")


class BaseMismatch(ValueError):
    """An adapter was trained on other base weights."""


def weights_checksum(model: Any, per_weight: int | None = None) -> str:
    """SHA-256 of the names, shapes and values of a model's base weights, without its adapters.

    The values are rounded to bfloat16, so that a model has the same checksum whether its weights are stored and loaded
    in float32 or in bfloat16, in one file or in several, and with or without peft around it. A change that no weight
    shows in bfloat16 is not seen.

    Args:
        model: of transformers, or wrapped by peft.
        per_weight: reads only the first few numbers of each weight; None reads all.
    """
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    digest, seen = hashlib.sha256(), set()
    for name, weight in inner.state_dict().items():
        place = (weight.data_ptr(), weight.shape, weight.stride())
        if ".lora_" in f".{name}" or place in seen:  # tied weights count once
            continue
        seen.add(place)
        values = weight.detach().reshape(-1)[:per_weight]
        values = values.to(torch.bfloat16) if values.is_floating_point() else values
        digest.update(f"{name.replace('.base_layer.', '.')} {tuple(weight.shape)}\n".encode())
        digest.update(values.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def read_checksum(folder: str | Path) -> str | None:
    """The checksum of the base weights that an adapter was trained on; None if it was not recorded.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    file = Path(folder) / SETTINGS_FILE
    found = read_settings(file).get(CHECKSUM) if file.is_file() else None
    if found is not None and (not isinstance(found, str) or not re.fullmatch("[0-9a-f]{64}", found)):
        raise ValueError(f"{file}: {CHECKSUM} is {str(found)[:80]!r}; expected are 64 hexadecimal digits")
    return found


def check_base(folder: str | Path, model: Any, name: str) -> None:
    """Refuses an adapter that was trained on other base weights than these, as far as that is recorded.

    Args:
        folder: of the adapter.
        model: holds the base weights.
        name: of the model, for the error message.

    Raises:
        BaseMismatch: the checksums differ.
        ValueError: `lmgym.json` is damaged.
    """
    recorded = read_checksum(folder)
    # float16 holds fewer numbers than bfloat16: what was rounded to it cannot be compared.
    if recorded is None or model.dtype == torch.float16 or recorded == weights_checksum(model):
        return
    named = read_settings(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    raise BaseMismatch(
        f"the adapter in {str(folder)!r} does not fit {name!r}: it was trained on a base model with other weights. "
        f"Load it onto that one ({named or 'which was not saved'})"
    )


def record_base(folder: str | Path, base: str | None, checksum: str, **settings: Any) -> None:
    """Writes the base of a saved adapter: its folder (or name) into peft's settings, its checksum beside them.

    Args:
        folder: of the adapter.
        base: where plain peft finds the base; None if it is stored nowhere.
        checksum: of its weights.
        **settings: more contents of lmgym.json.
    """
    file = Path(folder) / "adapter_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    # peft keeps the names of the adapted modules in a set, whose order differs between processes.
    if isinstance(found.get("target_modules"), list):
        found["target_modules"] = sorted(found["target_modules"])
    atomic.write(file, json.dumps(found, indent=2, sort_keys=True))
    atomic.write(file.with_name(SETTINGS_FILE), json.dumps(settings | {CHECKSUM: checksum}, indent=2) + "\n")


def name_base(folder: str | Path, base: str | Path, model: Any = None) -> None:
    """Changes which base a saved adapter names.

    Args:
        folder: of the adapter.
        base: the new folder or name.
        model: the base itself, for an adapter that has no checksum yet.
    """
    file = Path(folder) / "adapter_config.json"
    atomic.write(
        file, json.dumps(read_settings(file) | {"base_model_name_or_path": str(base)}, indent=2, sort_keys=True)
    )
    if model is not None and read_checksum(folder) is None:
        file = file.with_name(SETTINGS_FILE)
        settings = read_settings(file) if file.is_file() else {}
        atomic.write(file, json.dumps(settings | {CHECKSUM: weights_checksum(model)}, indent=2) + "\n")


def load_base(folder: str | Path, load: Callable[[str], Model]) -> Model:
    """Loads an adapter with its base model: the one that it names, or the folder `sft` beside it after a move.

    Args:
        folder: of the adapter.
        load: loads base and adapter by the folder or name of the base; raises `BaseMismatch` if it is another one.

    Raises:
        ValueError: the adapter names no base, or the base is not there.
        BaseMismatch: the weights of the base are others.
    """
    folder, file = Path(folder), Path(folder) / "adapter_config.json"
    settings = read_settings(file)
    named = settings.get("base_model_name_or_path")
    above = folder.absolute().parent
    beside = [str(above / "sft"), str(above.parent / "sft")]
    if read_checksum(folder) is None:
        # Older runs named the model that their own "sft" began from.
        old = (above / "config.json").is_file() and (above / "sft").is_dir()
        named, beside = (None, beside[:1]) if old else (named, [])
    if not isinstance(named, str | None) or not (named or beside):
        raise ValueError(f"{file}: base_model_name_or_path is {named!r}; it must name the base model")
    if settings.get("revision"):
        raise ValueError(
            f"{file}: the base is the revision {str(settings['revision'])[:80]!r} of {named!r}: download that "
            "revision, and load the adapter onto it"
        )
    folders = [base for base in (named, *beside) if base and Path(base).is_dir()]
    on_hub = [named] if named and named not in folders and not os.path.isabs(named) else []
    mismatch = None
    for base in (*folders, *on_hub):
        try:
            return load(base)
        except BaseMismatch as error:
            mismatch = mismatch or error
    if mismatch is not None:
        raise mismatch
    raise ValueError(
        f"{str(folder)!r} is an adapter of the base model {named!r}, which is not there: load the base from where it "
        "is now, and the adapter onto it"
    )


def absolute(source: str | Path) -> str:
    """The absolute path of a folder; the name of a model on the hub stays as it is."""
    return os.path.abspath(source) if Path(source).is_dir() else str(source)
