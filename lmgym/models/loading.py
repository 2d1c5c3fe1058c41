"""Loading a language model: by name, by path, or one of the built-in models."""

from importlib.resources import as_file, files
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from lmgym.models.base_weights import load_base
from lmgym.models.language_model import LanguageModel
from lmgym.models.model_files import BUILT_IN, DTYPES, read_model
from lmgym.models.transformers_quirks import seeded


def load(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a causal language model and its tokenizer.

    The folder of a LoRA adapter gives the base that it was trained on, with the adapter merged into it (in float32).

    Args:
        name: "tiny" (ships with the package), "probe" (a random 6-token model for exact tests), a local folder, or a
            name on the Hugging Face hub.
        device: where the weights are stored.
        dtype: of the weights. Log-probabilities are always float32.
        pad_token: replaces the tokenizer's padding token; added to the vocabulary if it is new.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        ValueError: there is no such model, it is not a causal language model, or the base of an adapter is not there or
            is another one.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown: choose from {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if name == "probe":
        return _probe().to(device, dtype)
    if name == "tiny":
        with as_file(files("lmgym") / "assets" / "tiny") as folder:
            return load_folder(str(folder), name, device, dtype, pad_token)
    if (Path(name) / "adapter_config.json").is_file():

        def load_merged(base: str) -> LanguageModel:
            on_cpu = ("cpu", torch.float32, pad_token, trust_remote_code)
            lm = load(base, pad_token=pad_token) if base in BUILT_IN else load_folder(base, base, *on_cpu)
            lm.adapters.load(name)
            lm.adapters.merge()
            lm.name = name
            return lm.to(device, dtype)

        return load_base(name, load_merged)
    return load_folder(name, name, device, dtype, pad_token, trust_remote_code)


def load_folder(
    source: str,
    name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a model from a folder or by a hub name; see `load`.

    Args:
        source: the folder or hub name.
        name: the name that the model gets.
        device: where the weights are stored.
        dtype: of the weights.
        pad_token: replaces the tokenizer's padding token.
        trust_remote_code: whether to run code that comes with the model.
    """
    model, tokenizer = read_model(source, name, dtype, trust_remote_code)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    lm = LanguageModel(model.to(device), tokenizer, name, pad_token)
    if lm.vocabulary == vocabulary:  # otherwise its weights are not those in the folder
        lm.adapters.stored_in(source)
    return lm


def _probe() -> LanguageModel:
    """A random, untrained model over the letters a to d, small enough to enumerate."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    letters.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")
    # Absolute positions: without a beginning-of-sequence token, a rotary model cannot tell "a" from "aa" (it averages
    # equal values), and then no policy on it reaches the optimum of a tree.
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_embd=32,
        n_inner=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
    )
    with seeded(0):
        model = transformers.GPT2LMHeadModel(config)
    return LanguageModel(model, tokenizer, "probe")
