"""LoRA adapters on disk: read and checked before they are attached to a model."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lmgym.models.large_packages import peft
from lmgym.models.safe_weights import check_shapes, first_line, read_settings, read_weights
from lmgym.models.transformers_quirks import seeded, silence_libraries

UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "lora_bias", "monteclora_config",
    "target_parameters", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of peft's LoRA that change what is computed or trained in ways that passes and copies here do not follow."""


def read_adapter(folder: str | Path, base_changes: bool) -> "tuple[peft.LoraConfig, dict[str, Tensor]]":
    """Reads the settings and weights of a LoRA adapter that peft has saved. No code in the folder is run.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base_changes: whether the adapter may contain modules that replace those of the base, such as a trained head.

    Raises:
        ValueError: a file is missing, pickled or damaged, or has a setting that is not supported; the error names the
                file.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"no adapter in {str(folder)!r}: it has no adapter_config.json")
    settings = read_settings(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LoRA adapters (LORA) can be loaded")
    if settings.get("megatron_config") is not None:
        raise ValueError(f"{file}: sets megatron_config, which makes peft import a module named in the file; remove it")
    for key, wanted in (("bias", "none"), ("layer_replication", None), ("trainable_token_indices", None)):
        if settings.get(key, wanted) not in (wanted, [], {}):
            raise ValueError(
                f"{file}: {key} is {settings[key]!r}, which changes the base; only {wanted!r} can be loaded"
            )
    known = {field.name for field in fields(peft.LoraConfig)}
    # Settings of newer versions of peft are dropped, but not a variant that is switched on. "auto_map" names code, and
    # code is not run.
    dropped = {key: value for key, value in settings.items() if key not in known and key != "auto_map"}
    unknown = [key for key, value in dropped.items() if value is True or isinstance(value, dict)]
    for key in (*UNSUPPORTED, *unknown):
        if settings.get(key) not in (None, False, [], {}):
            raise ValueError(
                f"{file}: {key} is {str(settings[key])[:80]!r}, a variant of LoRA that is not supported: plain LoRA, "
                "DoRA and rsLoRA are. Merge it into its base with peft (merge_and_unload), and train a new adapter"
            )
    if not base_changes and settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{file}: task_type is {settings['task_type']!r}; the adapter of a language model has 'CAUSAL_LM'"
        )
    if settings.get("modules_to_save") and not base_changes:
        raise ValueError(
            f"{file}: modules_to_save is {settings['modules_to_save']!r}: unlike LoRA, they cannot be switched off "
            "for the reference. Merge them into the base, and train LoRA alone"
        )
    if not isinstance(settings.get("init_lora_weights", True), bool) and settings["init_lora_weights"] != "gaussian":
        raise ValueError(
            f"{file}: init_lora_weights is {settings['init_lora_weights']!r}, which may rewrite the base's weights; "
            "convert the adapter to plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    try:
        config = peft.LoraConfig(
            **{key: value for key, value in settings.items() if key in known and key != "auto_mapping"}
        )
    except Exception as error:  # peft raises many types of errors on a value of a wrong type
        raise ValueError(f"{file}: not the settings of a LoRA adapter ({first_line(error)})") from error
    return config, read_weights(Path(folder) / "adapter_model.safetensors")


def attach_adapter(
    model: Any, config: "peft.LoraConfig", weights: Mapping[str, Tensor], name: str, folder: str | Path
) -> Any:
    """Adds an adapter with these weights to a model, and returns the model (a new wrapper for the first adapter).

    Raises:
        ValueError: the weights' names or shapes do not fit this model. The model is left without the adapter.
    """
    file = Path(folder) / "adapter_model.safetensors"
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None  # peft warns where they differ
    try:
        with seeded(0), silence_libraries():
            if isinstance(model, peft.PeftModel):
                model.add_adapter(name, config)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name)
            check_shapes(
                file, weights, peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            )
            peft.set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    except Exception as error:
        if isinstance(model, peft.PeftModel) and name in model.peft_config:
            detach_adapter(model, name)
        if isinstance(error, ValueError) and str(error).startswith(str(file)):
            raise
        raise ValueError(
            f"the adapter in {str(folder)!r} does not fit this model ({first_line(error)}): load it onto the base "
            "model that it was trained on"
        ) from error
    config.base_model_name_or_path = trained_on
    return model


def detach_adapter(model: "peft.PeftModel", name: str) -> Any:
    """Removes an adapter from a model, and returns the model: the base itself, if no adapter is left."""
    if len(model.peft_config) == 1:
        return model.unload()
    with silence_libraries():
        model.delete_adapter(name)
    return model
