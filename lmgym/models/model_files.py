"""Reading a transformers model and its tokenizer from a folder or the hub."""

from pathlib import Path
from typing import Any

import torch
import transformers

from lmgym.models.safe_weights import check_folder, check_names, first_line
from lmgym.models.transformers_quirks import silence_libraries

BUILT_IN = ("tiny", "probe")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_model(source: str, name: str, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Reads a causal language model, on the CPU, and its tokenizer.

    Args:
        source: a folder, or a name on the hub.
        name: the name that the user gave, for the error message.
        dtype: of the weights.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        ValueError: there is no such model, or its weights are pickled, damaged or incomplete.
    """
    try:
        check_folder(source)
        if (Path(source) / "adapter_config.json").is_file():
            raise ValueError("it is an adapter, not a whole model")
        with silence_libraries():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
            )
            model, found = loaded
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers resolves an adapter on the hub by itself
            raise ValueError("it is an adapter: download it, and give its folder")
        # transformers initialises missing weights at random.
        check_names(source, (), found["missing_keys"])
    except Exception as error:  # the libraries that read these files raise many types of errors
        raise ValueError(
            f"no model {name!r}: built-in models are {' and '.join(BUILT_IN)}; anything else must be a folder with a "
            "transformers causal LM in safetensors, or a name on the Hugging Face hub that can be reached "
            f"({first_line(error)})"
        ) from error
    return model, tokenizer
