"""A causal language model with its tokenizer: by name, by path, "tiny" or "probe"; LoRA adapters on and off.

One base model serves everybody: the policy is the base with an adapter, the reference the same base without it. So a
`LanguageModel` is a shared handle, and every call says which adapter it means.
"""

import copy
import inspect
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int, UInt8
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lmgym.decoding import Bottom, Decoding, FusedDecoding
from lmgym.devices import free_to_look
from lmgym.head import Head, TokenMask, chosen_log_probs_of
from lmgym.packed import Packed, pack
from lmgym.sampling import unpack_bits
from lmgym.trunk import Trunk, body_of, state_of
from lmgym.weights import check_folder, check_names, check_shapes, first_line, read_settings, read_weights

BUILT_IN = ("tiny", "probe")
Mask = Bool[Tensor, "B P"] | Int[Tensor, "B P"]
ONE_MASK = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Architectures in which one mask serves all layers, and nothing but attention reads it; see test_models.py."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Sequences:
    """Prompts and the tokens chosen after them.

    Attributes:
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] True on the prompt's tokens.
        tokens: [B, T] chosen tokens, pad behind the end.
        is_action: [B, T] True where a token was chosen.
        action_mask: [T, V] True where the environment allowed a token at that step.
        kept: [B, T, W] the tokens that truncated sampling (top-k, top-p) kept, as bits; None where all were.
        bottom: what the layers below the adapters made of them, where that was kept.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    tokens: Int[Tensor, "B T"]
    is_action: Bool[Tensor, "B T"]
    action_mask: Bool[Tensor, "T V"]
    kept: UInt8[Tensor, "B T W"] | None = None
    bottom: Bottom | None = None

    def __getitem__(self, rows: Any) -> "Sequences":
        kept = None if self.kept is None else self.kept[rows]
        bottom = None if self.bottom is None else self.bottom._replace(hidden=self.bottom.hidden[rows])
        parts = (self.prompt_ids[rows], self.prompt_mask[rows], self.tokens[rows], self.is_action[rows])
        return Sequences(*parts, self.action_mask, kept, bottom)

    def buckets(self, most_tokens: int = 0, by_length: bool = True) -> "list[tuple[Int[Tensor, ' R'], int]]":
        """Rows that are worth a pass of their own, and how many steps the longest of them takes; see `buckets`."""
        width = self.prompt_ids.shape[1]
        lengths = self.is_action.sum(1).tolist() if by_length else [self.tokens.shape[1]] * len(self.tokens)
        most_tokens = most_tokens or default_pass_tokens(self.tokens.device)
        return [
            (torch.tensor(rows, device=self.tokens.device), steps)
            for rows, steps in buckets(lengths, width, most_tokens)
        ]

    def first_steps(self, steps: int) -> "Sequences":
        """Without the steps that follow the first `steps`."""
        kept = None if self.kept is None else self.kept[:, :steps]
        parts = (self.tokens[:, :steps], self.is_action[:, :steps], self.action_mask[:steps])
        return Sequences(self.prompt_ids, self.prompt_mask, *parts, kept, self.bottom)

    def behaviour_mask(self) -> Bool[Tensor, "*rows T V"]:
        """[T, V] or [B, T, V] True where the policy that acted could have chosen a token."""
        if self.kept is None:
            return self.action_mask
        return self.action_mask & unpack_bits(self.kept, self.action_mask.shape[1])


@dataclass
class CachedDecoding(Decoding):
    """Decoding through the model's own cache, for the architectures that `lmgym.trunk` does not know.

    Attributes:
        lm: the model.
        adapter: the adapter that is on.
        at_newest: [B, V] what the model says at the newest token.
        attention_mask: [B, S] over the cached positions.
        position: [B] the position id of the newest token.
        cache: keys and values of the S cached positions, or whatever else the model keeps.
    """

    lm: "LanguageModel"
    adapter: str | None
    at_newest: Float[Tensor, "B V"]
    attention_mask: Int[Tensor, "B S"]
    position: Int[Tensor, " B"]
    cache: Any

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token."""
        return self.at_newest

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        self.attention_mask = nn.functional.pad(self.attention_mask, (0, 1), value=1)
        self.position = self.position + 1
        out = self.lm.forward_cached(token[:, None], self.attention_mask, self.position, self.cache, self.adapter)
        self.at_newest, self.hidden, self.cache = out.logits[:, -1], out.hidden_states[-1][:, -1], out.past_key_values

    def _park(self, live: Tensor) -> None:
        self.position = self.position * live

    def _select(self, rows: Tensor) -> "CachedDecoding | None":
        if not self._replaceable:
            return None
        cache = _growing_cache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], i)
        parts = (self.at_newest[rows], self.attention_mask[rows], self.position[rows])
        return CachedDecoding(self.hidden[rows], self.lm, self.adapter, *parts, cache)

    @property
    def _replaceable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(isinstance(layer, _GrowingLayer) for layer in self.cache.layers)

    def _replace_rows(self, rows: Tensor, fresh: Decoding, keep: int | None) -> None:
        assert isinstance(fresh, CachedDecoding)
        keep = self.attention_mask.shape[1] if keep is None else keep
        keep = max(keep, fresh.attention_mask.shape[1])
        missing = fresh.attention_mask.shape[1] - self.attention_mask.shape[1]
        for layer, fresh_layer in zip(self.cache.layers, fresh.cache.layers, strict=True):
            layer.replace_rows(rows, fresh_layer, keep)
        self.attention_mask = nn.functional.pad(self.attention_mask, (max(0, missing), 0))[:, -keep:].clone()
        self.attention_mask[rows] = 0
        self.attention_mask[rows, -fresh.attention_mask.shape[1] :] = fresh.attention_mask
        for name in ("at_newest", "hidden", "position"):
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(fresh, name)))


def default_pass_tokens(device: torch.device) -> int:
    """Tokens that a pass takes at a time: on a CPU as many as the caches hold, on a GPU enough to fill it."""
    return 4096 if device.type == "cpu" else 65536


def buckets(lengths: Sequence[int], width: int, most_tokens: int) -> list[tuple[list[int], int]]:
    """Rows of similar length together, so that little of a pass is padding.

    Args:
        lengths: how many steps each row takes.
        width: what each row holds beside these, such as its prompt.
        most_tokens: that a bucket may hold, padding included; a single row may hold more.

    Returns:
        Rows, and the length of the longest of them, for each bucket; a row stands in one.
    """
    found: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if found:
            rows, longest = found[-1]
            full = (len(rows) + 1) * (width + longest) > most_tokens
            # Padding of a fifth costs more than the overhead of another pass over rows that fill one.
            shorter = (width + lengths[row]) < 0.8 * (width + longest) and len(rows) * (width + longest) > 512
            if not full and not shorter:
                rows.append(row)
                continue
        found.append(([row], max(1, lengths[row])))
    return found


class _GrowingLayer(DynamicLayer):
    """Keys and values with room to grow: a step writes one position, where transformers' own layer copies them all."""

    ROOM = 64

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        used = self.get_seq_length() if self.is_initialized else 0
        end = used + key_states.shape[-2]
        if not self.is_initialized or end > self._store[0].shape[-2]:
            self._reserve(key_states, value_states, end + self.ROOM, used)
        for store, new in zip(self._store, (key_states, value_states), strict=True):
            store[:, :, used:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._store)
        return self.keys, self.values

    def _reserve(self, keys: Tensor, values: Tensor, room: int, used: int) -> None:
        old = cast(tuple[Tensor, Tensor], (self.keys, self.values))
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._store = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (keys, values))
        if used:
            for store, x in zip(self._store, old, strict=True):
                store[:, :, :used] = x

    def replace_rows(self, rows: Tensor, fresh: DynamicLayer, keep: int) -> None:
        """Puts the rows of `fresh` at the right end of these rows, and drops all but the newest `keep` positions."""
        assert self.keys is not None
        assert self.values is not None
        assert fresh.keys is not None
        assert fresh.values is not None
        width, used = fresh.keys.shape[-2], min(keep, self.keys.shape[-2])
        if width > used:
            room = (width - used, 0)  # on the left, where the attention mask hides it
            self.keys, self.values = (nn.functional.pad(x, (0, 0, *room)) for x in (self.keys, self.values))
            self._reserve(self.keys, self.values, width + self.ROOM, width)
            self.keys, self.values = (store[:, :, :width] for store in self._store)
        elif used < self.keys.shape[-2]:
            self.keys, self.values = self.keys[:, :, -used:], self.values[:, :, -used:]
            self._reserve(self.keys, self.values, used + self.ROOM, used)
            self.keys, self.values = (store[:, :, :used] for store in self._store)
        self.keys[rows, :, -width:] = fresh.keys
        self.values[rows, :, -width:] = fresh.values


def _growing_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = _GrowingLayer
    return cache


def log_probs(
    logits: Float[Tensor, "*shape V"], temperature: float, action_mask: Bool[Tensor, "*mask V"]
) -> Float[Tensor, "*shape V"]:
    """Log-probabilities in float32 at a temperature, −∞ for banned tokens.

    Everyone who samples or scores calls this one function: what was sampled is what is scored.
    """
    return (logits.float() / temperature).masked_fill(~action_mask, -torch.inf).log_softmax(-1)


def chosen_log_probs(
    logits: Float[Tensor, "*shape V"],
    chosen: Int[Tensor, "*shape"],
    temperature: float,
    action_mask: Bool[Tensor, "*mask V"],
) -> Float[Tensor, "*shape"]:
    """The log-probability of chosen tokens, finite for banned ones too.

    Agents that ignore action masks do choose banned tokens; these get their log-probability without the mask, which
    is finite, and as low as the model finds them.
    """
    scaled = logits.float() / temperature
    index = chosen[..., None]
    allowed = action_mask.expand(scaled.shape).gather(-1, index)
    masked = scaled.masked_fill(~action_mask, -torch.inf).logsumexp(-1, keepdim=True)
    return (scaled.gather(-1, index) - torch.where(allowed, masked, scaled.logsumexp(-1, keepdim=True)))[..., 0]


class LanguageModel:
    """A causal language model, its tokenizer, and its adapters, on one device.

    Attributes:
        model: the transformers model, wrapped by peft once it has an adapter. Always in evaluation mode, no dropout.
        tokenizer: its tokenizer.
        name: what it was loaded by.
        pad_id: fills rows up; never an end-of-sequence id.
        eos_ids: the tokens that end a completion.
        vocabulary: V, the width of the logits, which may exceed the tokenizer's length.
        banned_ids: tokens that are no text: padding, other special tokens, and ids the tokenizer does not know.
        fast: whether passes take the fused path (`lmgym.trunk`) where it knows the architecture; `path` says which.
        capture: whether a rollout's decoding step is captured in a CUDA graph, where there is one (`lmgym.static`).
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "custom", pad_token: str | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        if pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
            if len(tokenizer) > model.get_output_embeddings().weight.shape[0]:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)  # new rows are drawn: the same ones each time that a model is loaded
                    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.eos_ids = _eos_ids(model, tokenizer)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id in self.eos_ids:
            problem = "no padding token" if tokenizer.pad_token_id is None else "a padding token that also ends texts"
            raise ValueError(
                f"the tokenizer of {name!r} has {problem}: an end of sequence could not be told from padding. Give "
                "another with pad_token (--pad-token '<|pad|>'); one that is not in the vocabulary is added to it"
            )
        self.pad_id: int = tokenizer.pad_token_id
        model.config.pad_token_id = self.pad_id
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        special = {i for i in tokenizer.all_special_ids if i not in self.eos_ids}
        self.banned_ids = tuple(sorted(special | {self.pad_id} | set(range(len(tokenizer), self.vocabulary))))
        # How many tokens stand before every text, and what no token of a text may be: an unknown word may be unknown,
        # and an end that is an ordinary token, such as a line feed, may be written.
        self._before = _tokens_before(tokenizer)
        self._never_text = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self.fast = True
        self.capture = True
        self._trunk: Trunk | None = None
        self._paths: dict[Any, tuple[str | None, list[Any]]] = {}
        self._encoded: dict[str, tuple[int, ...]] = {}
        self._masks: dict[Any, tuple[Tensor, TokenMask]] = {}
        self._packed_head: tuple[Any, Packed | None] | None = None
        self._active: str | None = None
        without_dropout(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LanguageModel":
        # gymnasium's env.spec deep-copies every argument of make(): a handle is shared, not copied.
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "LanguageModel":
        self.model.to(device=device, dtype=dtype)
        return self

    # Text ----------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the beginning-of-sequence token where this model has one, never an end.

        Text stays text: "<eos>" in a prompt is five letters, and not the end of a sequence.

        Raises:
            ValueError: the text has no tokens, is no Unicode, or its tokenizer knows a special token by its text alone.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts; those that were seen before are remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        if len(self._encoded) > 1 << 16:
            self._encoded.clear()
            new = list(dict.fromkeys(texts))
        for text, ids in zip(new, token_ids(self.tokenizer, new), strict=True):
            while len(ids) > 1 and ids[-1] in self.eos_ids:
                ids = ids[:-1]
            if misread := self._never_text.intersection(ids[self._before :]):
                special = self.tokenizer.decode([min(misread)])
                raise ValueError(
                    f"the prompt {text[:80]!r} holds what this tokenizer reads as its special token {special!r}, the "
                    "token's name or a character that it does not know: take it out of the text"
                )
            if not ids:
                raise ValueError(f"the prompt {text!r} has no tokens; a prompt needs at least one")
            self._encoded[text] = tuple(ids)
        return [list(self._encoded[text]) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_completion(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to the prompt. Some tokenizers drop the first space of a text that stands alone."""
        return self.decode_completions([prompt_ids], [ids])[0]

    def decode_completions(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[str]:
        """The same for many, decoded together."""
        before = self._decode_all(prompts)
        whole = self._decode_all([[*p, *c] for p, c in zip(prompts, completions, strict=True)])
        return [
            w[len(b) :] if w.startswith(b) else self.decode(c)
            for b, w, c in zip(before, whole, completions, strict=True)
        ]

    def _decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        if not rows:
            return []
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # Adapters ------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.model.peft_config) if isinstance(self.model, PeftModel) else ()

    def add_adapter(
        self,
        name: str,
        rank: int = 8,
        alpha: int = 16,
        seed: int = 0,
        base: str | None = None,
        targets: Literal["all-linear", "attention"] = "all-linear",
        layers: int = 0,
    ) -> None:
        """Adds a LoRA adapter (Hu et al. 2021): `W + alpha/rank · B A`, B = 0, so the identity.

        Args:
            name: a new name.
            rank: r.
            alpha: the scale is alpha / r.
            seed: draws A.
            base: start from a copy of this adapter instead.
            targets: "all-linear", or the projections of "attention" alone.
            layers: adapt this many of the top layers alone; what the layers below make of a rollout is then computed
                once, and serves the reference and all epochs. It trains less; 0 adapts all layers.

        Raises:
            ValueError: the name is taken, the model has fewer layers, or its attention is not known by name.
        """
        if name in self.adapters:
            raise ValueError(f"there is already an adapter {name!r}; this model has {', '.join(self.adapters)}")
        if base is not None:
            self._require(base)
            config = copy.deepcopy(self.model.peft_config[base])
        else:
            config = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=self._targets(targets, layers), task_type="CAUSAL_LM"
            )
        trained = self._trained()
        with torch.random.fork_rng(devices=[]), quietly():
            torch.manual_seed(seed)
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(name, config)
            else:
                self.model = get_peft_model(cast(PreTrainedModel, self.model), config, adapter_name=name)
        if base is not None:
            self.copy_adapter(base, name)
        self._settle(trained)

    def _targets(self, targets: str, layers: int) -> str | list[str]:
        """Names of the modules to adapt, as peft takes them."""
        if targets not in ("all-linear", "attention"):
            raise ValueError(f"targets={targets!r} is unknown: choose 'all-linear' or 'attention'")
        if targets == "all-linear" and not layers:
            return targets
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        depth = model.config.get_text_config().num_hidden_layers
        if not 0 <= layers <= depth:
            raise ValueError(f"layers={layers}: the model has {depth} layers to adapt the top of")
        found = []
        for name, module in model.named_modules():
            at = re.search(r"\.(?:layers|h|blocks|block)\.(\d+)\.(.*)", f".{name}")
            linear = isinstance(getattr(module, "base_layer", module), (nn.Linear, Conv1D))
            if at is None or not linear or "lora_" in name or name.endswith("base_layer"):
                continue
            inside = re.search("attn|attention", at[2]) is not None
            if int(at[1]) >= depth - (layers or depth) and (targets == "all-linear" or inside):
                found.append(name)
        if not found:
            raise ValueError(f"the modules of {self.name!r} have names that are not known: use targets='all-linear'")
        return found

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Copies the weights of one adapter into another, which is added, frozen, if it is not there.

        Raises:
            ValueError: there is no such source, or the two differ in shape.
        """
        if target not in self.adapters:
            self.add_adapter(target, base=source)
            return
        sources, targets = self.adapter_parameters(source), self.adapter_parameters(target)
        if [p.shape for p in sources] != [p.shape for p in targets]:
            raise ValueError(f"the adapters {source!r} and {target!r} differ in rank or layers, and cannot be copied")
        for own, other in zip(targets, sources, strict=True):
            own.copy_(other)

    def load_adapter(self, folder: str | Path, name: str = "policy") -> None:
        """Loads a LoRA adapter that peft has saved, from a folder. Where that fails, the model is as it was.

        Raises:
            ValueError: no adapter there, the name is taken, or its files are pickled, damaged, not those of an adapter
                of this model, or of a kind that would change the base, which the reference shares.
        """
        if name in self.adapters:
            raise ValueError(f"there is already an adapter {name!r}")
        config, weights = read_adapter(folder, base_changes=False)
        trained = self._trained()
        self.model = load_onto(self.model, config, weights, name, folder)
        self._settle(trained)

    def drop_adapter(self, name: str) -> None:
        """Takes an adapter off the model, as if it had never been there."""
        self._require(name)
        trained = self._trained()
        self.model = _without(self.model, name)
        self._settle(trained)

    def save_adapter(self, folder: str | Path, name: str = "policy") -> None:
        """Saves an adapter so that `PeftModel.from_pretrained(base, folder)` loads it."""
        self._require(name)
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside, quietly():
            self.model.save_pretrained(aside, selected_adapters=[name], save_embedding_layers=False)
            # peft saves an adapter under its name, except "default".
            for file in (Path(aside) / name if name != "default" else Path(aside)).iterdir():
                if file.name != "README.md":
                    shutil.copy(file, target / file.name)

    def save(self, folder: str | Path) -> None:
        """Saves base model and tokenizer as an ordinary transformers folder. Adapters are saved on their own.

        Raises:
            ValueError: the model has adapters; merge or save them on their own.
        """
        if self.adapters:
            raise ValueError("save() writes a base model without adapters; use merge_adapter() or save_adapter()")
        with quietly():
            self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Takes over the weights that `save` wrote for this same model, which must have no adapters.

        Raises:
            ValueError: the folder holds another model's, or none.
        """
        if self.adapters:
            raise ValueError("load_weights() wants a model without adapters")
        saved = load_folder(str(folder), str(folder), self.device, self.model.dtype)
        try:
            self.model.load_state_dict(saved.model.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{str(folder)!r} holds the weights of another model ({reason})") from error

    def merge_adapter(self) -> None:
        """Folds the only adapter into the base weights and leaves a model without adapters."""
        if len(self.adapters) != 1:
            raise ValueError(f"merge_adapter() wants exactly one adapter, this model has {len(self.adapters)}")
        self._switch(self.adapters[0])
        self.model = self.model.merge_and_unload()
        self._trunk = None  # peft adds to the weights without torch counting a change in them
        self._settle(())

    def copy_of_base(self) -> "LanguageModel":
        """A copy of the base model in float32, without adapters, to be trained on its own."""
        model: Any = copy.deepcopy(self.model)
        model = model.unload() if isinstance(model, PeftModel) else model
        other = LanguageModel(model.float(), self.tokenizer, self.name)
        other.fast, other.capture = self.fast, self.capture
        return other

    def trunk_parameters(self) -> list[nn.Parameter]:
        """All weights but those of the head, unless the head is also the embedding."""
        body = body_of(self.model)
        return list(body.parameters())

    def adapter_rank(self, name: str) -> int:
        """The rank r of an adapter."""
        self._require(name)
        config: Any = self.model.peft_config[name]
        return config.r

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's weights, in a fixed order."""
        self._require(name)
        return [p for key, p in self.model.named_parameters() if f".{name}." in key and "lora_" in key]

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Runs the body with one adapter on, or with all of them off (None)."""
        before = self._active
        self._switch(adapter)
        try:
            yield
        finally:
            self._switch(before)

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise ValueError(f"the model has no adapter {name!r} (it has {have}): add it with add_adapter({name!r})")

    def _switch(self, adapter: str | None) -> None:
        if adapter is not None:
            self._require(adapter)
        # peft's own switches also flip requires_grad, and a parameter that is flipped off between forward and backward
        # silently gets no gradient. So only the two flags are set that a layer's forward reads.
        for layer in self._adapter_layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self._active = adapter

    def _trained(self) -> list[nn.Parameter]:
        """The weights of adapters that somebody trains now."""
        return [p for p in self.model.parameters() if p.requires_grad] if self.adapters else []

    def _settle(self, trained: Sequence[nn.Parameter]) -> None:
        """After peft changed the model: what was trained still is, and nothing else; all adapters off; no dropout."""
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        without_dropout(self.model)
        self.__dict__.pop("_layers", None)
        self._paths.clear()
        self._switch(None)

    @property
    def _adapter_layers(self) -> list[BaseTunerLayer]:
        if "_layers" not in self.__dict__:
            self._layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        return self._layers

    # Passes --------------------------------------------------------------------------------------------------------

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **more: Any) -> Any:
        if self._takes_position_ids:
            more["position_ids"] = position_ids
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True, **more
        )

    def _step_mask(self, mask: Tensor) -> Tensor:
        """The mask for one more token: [B, 1, 1, S], which transformers takes as it is, where the model allows it.

        A [B, S] mask it reads on the host at every pass, to see whether it is all ones.
        """
        config = self.model.config.get_text_config()
        plain = config.model_type in ONE_MASK and not getattr(config, "sliding_window", None)
        return mask[:, None, None].bool() if plain and config._attn_implementation == "sdpa" else mask

    @torch.no_grad()
    def start(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Mask,
        adapter: str | None = None,
        room: int = 64,
        keep_bottom: bool = False,
    ) -> Decoding:
        """Reads left-padded prompts; decoding keeps no gradients.

        Args:
            input_ids: the prompts.
            attention_mask: True on their tokens.
            adapter: the adapter that is on, or None.
            room: tokens for which the cache has room before it must grow.
            keep_bottom: whether to keep what goes into the lowest layer that the adapter changes.
        """
        trunk = self.trunk(adapter)
        if trunk is None:
            return self._start_cached(input_ids, attention_mask.long(), adapter)
        ids, length, longest, equal = _aligned(input_ids, attention_mask)
        layers = trunk.layers(adapter, decode=True)
        keep = trunk.lowest(adapter) if keep_bottom else 0
        cache = trunk.cache(len(ids), longest + room, layers[0].first_norm[0], length, equal, keep_bottom)
        last = slice(longest - 1, longest) if equal else (length - 1)[:, None]
        hidden = trunk.read(layers, ids[:, :longest], last, cache=cache, keep=keep)[:, 0]
        cache.longest = longest
        return FusedDecoding(hidden, self, trunk, layers, cache, keep)

    def _start_cached(self, input_ids: Tensor, mask: Tensor, adapter: str | None) -> Decoding:
        # Under left padding a model would otherwise count the padding: 3.7 to 5 nats on absolute positions.
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        with self.using(adapter):
            out = self._forward(
                input_ids.long(), mask, position_ids, past_key_values=_growing_cache(), use_cache=True, logits_to_keep=1
            )
        newest = (out.logits[:, -1], mask, position_ids[:, -1], out.past_key_values)
        return CachedDecoding(out.hidden_states[-1][:, -1], self, adapter, *newest)

    def forward_cached(self, token: Tensor, mask: Tensor, position: Tensor, cache: Any, adapter: str | None) -> Any:
        """One more token through the model's own cache, which is extended in place."""
        with self.using(adapter):
            return self._forward(
                token,
                self._step_mask(mask),
                position[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )

    def head(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits of the trunk's last hidden states, for the models that `lmgym.trunk` knows."""
        head = self.output_head(1.0)
        return nn.functional.linear(hidden, head.weight, head.bias)

    def output_head(self, temperature: float) -> Head:
        """The last projection, with a temperature."""
        head = self.model.get_output_embeddings()
        return Head(head.weight, head.bias, temperature, self._packed(head.weight))

    def _packed(self, weight: Tensor) -> Packed | None:
        """A frozen head packed, once, and again when torch counts a change in it."""
        if self.head_is_trained:  # torch counts none of the fused optimizer's
            self._packed_head = None
            return None
        state = state_of(weight)
        if self._packed_head is None or self._packed_head[0] != state:
            self._packed_head = (state, pack(weight, None))
        return self._packed_head[1]

    @property
    def head_is_trained(self) -> bool:
        return self.model.get_output_embeddings().weight.requires_grad

    def mask(self, allowed: Bool[Tensor, "T V"]) -> TokenMask:
        """Allowed tokens as `lmgym.head` wants them; tables that were asked for before are remembered."""
        key = (allowed.data_ptr(), allowed.shape, allowed.device, 0 if allowed.is_inference() else allowed._version)
        if key not in self._masks:
            if len(self._masks) > 64:
                self._masks.clear()
            # The table is kept too: its address means nothing once it is gone.
            with torch.inference_mode(False):
                self._masks[key] = (allowed, TokenMask.of(allowed, self.model.dtype))
        return self._masks[key][1]

    def hidden(self, sequences: Sequences, adapter: str | None = None) -> Float[Tensor, "B T D"]:
        """One pass over whole sequences: the hidden states from which each token was chosen, after the last norm."""
        trunk = self.trunk(adapter)
        if trunk is None:
            return self._evaluate_whole(sequences, adapter).hidden_states[-1][:, -sequences.tokens.shape[1] :]
        steps = sequences.tokens.shape[1]
        ids, length, longest, equal = _aligned(sequences.prompt_ids, sequences.prompt_mask)
        whole = torch.cat([sequences.prompt_ids, sequences.tokens[:, :-1]], 1)
        width = sequences.prompt_ids.shape[1]
        if equal:
            whole = whole[:, width - longest :]
        else:
            column = torch.arange(longest + steps - 1, device=ids.device) + (width - length)[:, None]
            whole = whole.gather(1, column.clamp(max=whole.shape[1] - 1))
        first = torch.arange(steps, device=ids.device)
        at = slice(longest - 1, longest - 1 + steps) if equal else (length - 1)[:, None] + first
        bottom = sequences.bottom
        if bottom is not None and bottom.owner is trunk and bottom.layer <= trunk.lowest(adapter):
            hidden = bottom.hidden[:, : whole.shape[1]]
            return trunk.read(trunk.layers(adapter), whole, at, bottom=hidden, first=bottom.layer)
        return trunk.read(trunk.layers(adapter), whole, at)

    def evaluate(
        self, sequences: Sequences, adapter: str | None = None
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T D"]]:
        """One pass over whole sequences: the logits and hidden states from which each token was chosen."""
        if self.trunk(adapter) is not None:
            hidden = self.hidden(sequences, adapter)
            return self.head(hidden), hidden
        steps = sequences.tokens.shape[1]
        out = self._evaluate_whole(sequences, adapter)
        return out.logits[:, -steps:], out.hidden_states[-1][:, -steps:]

    def _evaluate_whole(self, sequences: Sequences, adapter: str | None) -> Any:
        input_ids = torch.cat([sequences.prompt_ids, sequences.tokens[:, :-1]], 1)
        mask = torch.cat([sequences.prompt_mask, sequences.is_action[:, :-1]], 1).long()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        with self.using(adapter):
            steps = sequences.tokens.shape[1]
            return self._forward(input_ids, mask, position_ids, use_cache=False, logits_to_keep=steps)

    # Which path ----------------------------------------------------------------------------------------------------

    def trunk(self, adapter: str | None = None) -> Trunk | None:
        """The functions that stand for this model with this adapter on; None where it goes through transformers."""
        if self._refusal(adapter) is not None:
            return None
        if self._trunk is None or self._trunk.body is not body_of(self.model):
            self._trunk = Trunk(self.model)
        return self._trunk

    def path(self, adapter: str | None = None) -> str:
        """In words, which way the model's passes take, and why."""
        refusal = self._refusal(adapter)
        return "fused" if refusal is None else f"through transformers: {refusal}"

    def _refusal(self, adapter: str | None) -> str | None:
        if not self.fast:
            return "fast is off"
        if adapter is not None:
            self._require(adapter)
        # Looked at once for each set of adapters; hooks may come at any time.
        known = self._paths.get((id(self.model), self.adapters, adapter))
        if known is None:
            inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            refusal = Trunk.refusal(inner)
            if refusal is None and adapter is not None:
                refusal = Trunk.adapter_refusal(inner, adapter)
            hooks: list[Any] = [kind for m in inner.modules() for kind in (m._forward_hooks, m._forward_pre_hooks)]
            known = self._paths[id(self.model), self.adapters, adapter] = (refusal, hooks)
        refusal, hooks = known
        # transformers leaves hooks of its own behind where it once gave hidden states; they do nothing unless asked.
        own = "transformers.utils.output_capturing"
        if refusal is None and any(getattr(h, "__module__", "") != own for kind in hooks for h in kind.values()):
            return "the model has forward hooks, which a pass beside its own would not run"
        return refusal


def _aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int, bool]:
    """Left-padded texts moved to the left edge, their lengths, the longest, and whether all are known to be equal.

    Only on a CPU are the lengths looked at; elsewhere that would wait for the device.
    """
    width, length = ids.shape[1], mask.sum(1)
    longest, equal = width, False
    if free_to_look(ids.device):
        longest = int(length.max())
        equal = longest == int(length.min())
    if equal:
        return ids[:, width - longest :].long(), length, longest, True
    column = torch.arange(width, device=ids.device) + (width - length)[:, None]
    return ids.gather(1, column.clamp(max=width - 1)).long(), length, longest, False


@dataclass(frozen=True)
class Reference:
    """The frozen policy that KL is measured from: the base with adapters off, or with a frozen adapter.

    Attributes:
        lm: the model, shared with the policy.
        adapter: a frozen adapter, or None for the base alone.
        temperature: the policy's; KL compares the distributions that are sampled from.
    """

    lm: LanguageModel
    adapter: str | None = None
    temperature: float = 1.0

    @torch.no_grad()
    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Decoding:
        return self.lm.start(input_ids, attention_mask, self.adapter)

    @torch.no_grad()
    def advance(self, decoding: Decoding, token: Int[Tensor, " B"]) -> Decoding:
        return decoding.advance(token)

    def logp(
        self, decoding: Decoding, token: Int[Tensor, " B"], action_mask: Bool[Tensor, "B V"]
    ) -> Float[Tensor, " B"]:
        """log π_ref of a token that may come next, in nats."""
        return chosen_log_probs(decoding.logits, token, self.temperature, action_mask)

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, most_logits: int = 2**25) -> Float[Tensor, "B T"]:
        """log π_ref of every chosen token in full-sequence passes, in nats, 0 where no token was chosen.

        Args:
            sequences: prompts and chosen tokens.
            most_logits: bounds memory: a pass takes as many rows as give at most this many logits.
        """
        vocabulary = sequences.action_mask.shape[1]
        found = torch.zeros(sequences.tokens.shape, device=sequences.tokens.device)
        for rows, steps in sequences.buckets(most_logits // vocabulary):
            found[rows, :steps] = self._evaluate(sequences[rows].first_steps(steps))
        return found.masked_fill_(~sequences.is_action, 0.0)

    def _evaluate(self, part: Sequences) -> Tensor:
        steps = torch.arange(part.tokens.shape[1], device=part.tokens.device)
        allowed = part.action_mask[steps, part.tokens] | ~part.is_action
        if self.lm.trunk(self.adapter) is None or not bool(allowed.all()):
            logits, _ = self.lm.evaluate(part, self.adapter)
            return chosen_log_probs(logits, part.tokens, self.temperature, part.action_mask)
        hidden, head = self.lm.hidden(part, self.adapter), self.lm.output_head(self.temperature)
        mask = self.lm.mask(part.action_mask)
        return chosen_log_probs_of(hidden, part.tokens, head, mask, entropies=False)[0]


def token_ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of texts. The names of special tokens inside a text are read as text, for anybody may write them.

    Args:
        tokenizer: of transformers.
        texts: any; none is cut.
        add_special_tokens: whether to put the special tokens around a text that its model wants there.

    Raises:
        ValueError: a text is no Unicode.
    """
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text {text[:80]!r} holds half a character (a lone surrogate), which no UTF-8 file can: take "
                    "it out"
                ) from error
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]


def load(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a causal language model and its tokenizer.

    Args:
        name: "tiny" (ships with the package), "probe" (a random 6-token model for exact tests), a local folder, or a
            name on the Hugging Face hub.
        device: where it lives.
        dtype: of the weights. Log-probabilities are float32 in any case.
        pad_token: overrides the tokenizer's padding token, and is added to the vocabulary if it is new.
        trust_remote_code: runs code that comes with the model.

    Raises:
        ValueError: there is no such model, or its tokenizer has no usable padding token.
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
    return load_folder(name, name, device, dtype, pad_token, trust_remote_code)


def load_folder(
    source: str,
    name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads what transformers can load from a folder or a hub name; see `load`."""
    try:
        check_folder(source)
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
            )
            model, found = loaded
        # transformers draws weights that it does not find at random.
        check_names(source, (), found["missing_keys"])
    except Exception as error:  # each of the libraries that read these files has errors of its own
        raise ValueError(
            f"no model {name!r}: built-in models are {' and '.join(BUILT_IN)}; anything else must be a folder with a "
            "transformers causal LM in safetensors, or a name on the Hugging Face hub that can be reached "
            f"({first_line(error)})"
        ) from error
    return LanguageModel(model.to(device), tokenizer, name, pad_token)


def read_adapter(folder: str | Path, base_changes: bool) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The settings and weights of a LoRA adapter that peft has saved. Nothing in the folder is run.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base_changes: whether the adapter may bring modules that replace the base's own, such as a trained head.

    Raises:
        ValueError: a file is missing, pickled or damaged, or its settings ask for what cannot be; it names the file.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"no adapter in {str(folder)!r}: it has no adapter_config.json")
    settings = read_settings(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LoRA adapters (LORA) can be loaded")
    if settings.get("megatron_config") is not None:
        raise ValueError(
            f"{file}: sets megatron_config, with which peft imports a module that the file names; remove it"
        )
    for key, wanted in (("bias", "none"), ("layer_replication", None), ("trainable_token_indices", None)):
        if settings.get(key, wanted) not in (wanted, [], {}):
            raise ValueError(
                f"{file}: {key} is {settings[key]!r}, which changes the base; only {wanted!r} can be loaded"
            )
    if settings.get("modules_to_save") and not base_changes:
        raise ValueError(
            f"{file}: modules_to_save is {settings['modules_to_save']!r}: whole modules beside LoRA cannot be switched "
            "off for the reference. Merge them into the base, and train LoRA alone"
        )
    if not isinstance(settings.get("init_lora_weights", True), bool) and settings["init_lora_weights"] != "gaussian":
        raise ValueError(
            f"{file}: init_lora_weights is {settings['init_lora_weights']!r}, which may rewrite the base's weights; "
            "convert the adapter to plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    known = {field.name for field in fields(LoraConfig)}
    try:
        # Settings of newer versions of peft that this one does not know are for what is refused above or for training.
        config = LoraConfig(**{key: value for key, value in settings.items() if key in known and key != "auto_mapping"})
    except Exception as error:  # whatever peft raises on a value of a wrong type
        raise ValueError(f"{file}: no settings of a LoRA adapter ({first_line(error)})") from error
    return config, read_weights(Path(folder) / "adapter_model.safetensors")


def load_onto(model: Any, config: LoraConfig, weights: Mapping[str, Tensor], name: str, folder: str | Path) -> Any:
    """The model with one more adapter, whose weights these are: all of them, and no others.

    Raises:
        ValueError: names or shapes are not those of an adapter of this model. The model is left without the adapter.
    """
    file = Path(folder) / "adapter_model.safetensors"
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None  # peft warns where they differ
    try:
        with torch.random.fork_rng(devices=[]), quietly():
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
            check_shapes(
                file, weights, get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            )
            set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    except Exception as error:
        if isinstance(model, PeftModel) and name in model.peft_config:
            _without(model, name)
        if isinstance(error, ValueError) and str(error).startswith(str(file)):
            raise
        raise ValueError(
            f"{str(folder)!r} is no adapter for this model ({first_line(error)}): give the base that it was trained on"
        ) from error
    config.base_model_name_or_path = trained_on
    return model


def _without(model: PeftModel, name: str) -> Any:
    """The model without an adapter: the base itself, if it was the only one."""
    if len(model.peft_config) == 1:
        return model.unload()
    with quietly():
        model.delete_adapter(name)
    return model


@contextmanager
def quietly() -> Iterator[None]:
    """Loads and wraps models without progress bars, and without what peft and transformers warn each other about."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
            warnings.filterwarnings(
                "ignore", message="Adapter .* was active which is now deleted", category=UserWarning
            )
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def without_dropout(model: nn.Module) -> None:
    """Puts a model into evaluation mode and sets every dropout to zero, for good.

    Dropout that stays on makes the ratio of the first PPO step 0.77 to 1.26 instead of 1.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    for key in vars(config) if config is not None else ():
        if key.endswith(("dropout", "pdrop")) and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)


def _tokens_before(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts before a text."""
    (plain,), (whole,) = (token_ids(tokenizer, ["a"], add_special_tokens=special) for special in (False, True))
    starts = (at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain)
    return next(starts, 0)


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None) if source is not None else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    raise ValueError("the model has no end-of-sequence token: set tokenizer.eos_token, or eos_token_id in its config")


def _probe() -> LanguageModel:
    """A random, untrained model over the letters a to d, small enough to enumerate."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    letters.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")
    # Absolute positions: without a beginning-of-sequence token, a rotary model cannot tell "a" from "aa" (it averages
    # equal values), and then no policy on it reaches the optimum of a tree.
    config = GPT2Config(
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    return LanguageModel(model, tokenizer, "probe")
