"""A causal language model with its tokenizer and LoRA adapters.

One base model serves everybody: the policy is the base with an adapter, the reference is the same base without it. So a
`LanguageModel` is a shared handle, and every call names the adapter that it uses.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmgym.fused import (
    FusedModel,
    Head,
    PackedLinear,
    TokenMask,
    body_of,
    pack_linear,
    unsupported_adapter_reason,
    unsupported_reason,
    weight_version,
)
from lmgym.models.adapters import Adapters
from lmgym.models.decoding import Decoding
from lmgym.models.fused_decoding import FusedDecoding
from lmgym.models.large_packages import peft
from lmgym.models.model_files import read_model
from lmgym.models.passes import TokenPasses
from lmgym.models.positions import position_limit
from lmgym.models.probe import probe_architecture
from lmgym.models.sequences import Mask, Sequences, left_align
from lmgym.models.tokenising import TextCodec, eos_ids_of
from lmgym.models.transformers_decoding import TransformersPass
from lmgym.models.transformers_quirks import seeded, silence_libraries


class LanguageModel:
    """A causal language model, its tokenizer and its adapters, on one device.

    Args:
        model: a causal language model of transformers. It is put into evaluation mode, without dropout.
        tokenizer: its tokenizer.
        name: the name that it was loaded by.
        pad_token: replaces the tokenizer's padding token; added to the vocabulary if it is new.

    Attributes:
        text: encodes prompts and decodes completions.
        adapters: the LoRA adapters, by name.
        tokenizer: the tokenizer.
        name: the name that it was loaded by.
        vocabulary: V, the width of the logits, which may exceed the tokenizer's length.
        pad_id: fills rows up; masks tell it from text.
        eos_ids: the tokens that end a completion.
        banned_ids: tokens that are not text, see `TextCodec`.
        positions: the largest number of tokens that the model can read; None without a limit.
        fast: whether passes use `lmgym.fused` if it supports the architecture; `path` says which way they take.
        capture: whether a rollout's decoding step may be captured in a CUDA graph (`lmgym.rollout.cuda_graph`).
        passes: counts the tokens that were read.

    Raises:
        ValueError: there is no end-of-sequence token, or the model is not a causal language model.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "custom", pad_token: str | None = None):
        self.tokenizer = tokenizer
        self.name = name
        if pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
            if len(tokenizer) > model.get_output_embeddings().weight.shape[0]:
                with seeded(0):  # the new rows are random, but the same each time that a model is loaded
                    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self.text = TextCodec(tokenizer, eos_ids_of(model, tokenizer), self.vocabulary, name)
        self.pad_id, self.eos_ids, self.banned_ids = self.text.pad_id, self.text.eos_ids, self.text.banned_ids
        if self.text.padding_note is None:
            model.config.pad_token_id = self.pad_id
        # transformers leaves out the gradient of the padding's embedding, which may be an end.
        model.get_input_embeddings().padding_idx = None
        self.adapters = Adapters(model, name)
        self.positions = position_limit(model)
        self.fast = True
        self.capture = True
        self.passes = TokenPasses()
        self._transformers = TransformersPass(self.adapters)
        self._fused: tuple[int, FusedModel] | None = None
        self._paths: dict[tuple[int, str | None], tuple[str | None, list[Mapping[int, Any]]]] = {}
        self._token_masks: dict[Any, tuple[Tensor, TokenMask]] = {}
        self._packed_head: tuple[Any, PackedLinear | None] | None = None
        # The fused pass is tested for each architecture that it supports.
        if unsupported_reason(model) is not None:
            self._transformers.cached = probe_architecture(self._transformers, self.text.text_tokens())

    def __deepcopy__(self, memo: dict[int, Any]) -> "LanguageModel":
        # gymnasium's env.spec deep-copies every argument of make(): a handle is shared, not copied.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What was derived from the weights is derived again, in the process that reads the pickle.
        return self.__dict__ | {"_fused": None, "_paths": {}, "_token_masks": {}, "_packed_head": None}

    @property
    def model(self) -> Any:
        """The transformers model, wrapped by peft while it has adapters. Always in evaluation mode, without dropout."""
        return self.adapters.model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """D, the width of the hidden states that the output head reads."""
        return self.model.get_output_embeddings().weight.shape[1]

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "LanguageModel":
        """Moves the model to a device or dtype, in place."""
        self.model.to(device=device, dtype=dtype)
        return self

    # Base weights --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Saves base model and tokenizer as an ordinary transformers folder; `adapters.save` saves adapters.

        Adapters that are saved from now on name this folder as their base.

        Raises:
            ValueError: the model has adapters.
        """
        self.write(folder)
        self.adapters.stored_in(folder)

    def write(self, folder: str | Path) -> None:
        """As `save`, but for a folder that is moved or removed later: adapters do not name it."""
        if self.adapters:
            raise ValueError(
                "save() writes a base model without adapters: merge the adapter with adapters.merge(), or save it with "
                "adapters.save()"
            )
        with silence_libraries():
            self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Loads the weights that `save` wrote for this same model, which must have no adapters.

        Raises:
            ValueError: the model has adapters, or the folder holds no weights, or those of another model.
        """
        if self.adapters:
            raise ValueError(f"load_weights() needs a model without adapters; this one has {', '.join(self.adapters)}")
        saved, _ = read_model(str(folder), str(folder), self.model.dtype)
        try:
            self.model.load_state_dict(saved.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{str(folder)!r} holds the weights of another model ({reason})") from error
        self.adapters.stored_in(folder)

    def copy_of_base(self) -> "LanguageModel":
        """A copy of the base model in float32, without adapters, to be trained on its own."""
        model: Any = copy.deepcopy(self.model)
        model = model.unload() if isinstance(model, peft.PeftModel) else model
        other = LanguageModel(model.float(), self.tokenizer, self.name)
        other.fast, other.capture, other.passes = self.fast, self.capture, self.passes
        return other

    def trunk_parameters(self) -> list[nn.Parameter]:
        """All weights except those of the output head, unless the head is also the embedding."""
        return list(body_of(self.model).parameters())

    # Output head ---------------------------------------------------------------------------------------------------

    def output_head(self, temperature: float) -> Head:
        """The output projection, with a temperature that divides the logits."""
        head = self.model.get_output_embeddings()
        return Head(head.weight, head.bias, temperature, self._pack_head(head.weight))

    def _pack_head(self, weight: Tensor) -> PackedLinear | None:
        """The frozen head packed once, and again when torch counts a change in it."""
        # torch does not count the changes that the fused optimizer makes.
        if self.head_is_trained:
            self._packed_head = None
            return None
        version = (self.adapters.merges, weight_version(weight))
        if self._packed_head is None or self._packed_head[0] != version:
            self._packed_head = (version, pack_linear(weight, None))
        return self._packed_head[1]

    @property
    def head_is_trained(self) -> bool:
        """Whether the output head's weight requires a gradient."""
        return self.model.get_output_embeddings().weight.requires_grad

    def token_mask(self, allowed: Bool[Tensor, "T V"]) -> TokenMask:
        """Allowed tokens in the form that `Head` uses; the results are cached."""
        key = (allowed.data_ptr(), allowed.shape, allowed.device, 0 if allowed.is_inference() else allowed._version)
        if key not in self._token_masks:
            if len(self._token_masks) > 64:
                self._token_masks.clear()
            # The mask itself is cached too: once it is freed, another tensor may have its address.
            with torch.inference_mode(False):
                self._token_masks[key] = (allowed, TokenMask.of(allowed, self.model.dtype))
        return self._token_masks[key][1]

    # Passes --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Mask,
        adapter: str | None = None,
        reserve_tokens: int = 64,
        store_frozen_prefix: bool = False,
    ) -> Decoding:
        """Reads left-padded prompts, to decode from them without gradients.

        Args:
            input_ids: the prompts.
            attention_mask: True on their tokens.
            adapter: the adapter that is switched on; None for the base alone.
            reserve_tokens: the number of new tokens that the cache can hold before it must grow.
            store_frozen_prefix: whether to store the output of the layers below the adapter's lowest layer.
        """
        self.passes.add(input_ids.numel())
        fused = self.fused(adapter)
        if fused is None:
            decoding = self._transformers.start(input_ids, attention_mask.long(), adapter)
            decoding.passes = self.passes
            return decoding
        ids, length, longest, equal = left_align(input_ids, attention_mask)
        layers = fused.weights.layers(adapter, decode=True)
        frozen_layers = fused.weights.frozen_layers(adapter) if store_frozen_prefix else 0
        like = layers[0].first_norm[0]
        cache = fused.empty_cache(len(ids), longest + reserve_tokens, like, length, equal, store_frozen_prefix)
        last = slice(longest - 1, longest) if equal else (length - 1)[:, None]
        hidden = fused.forward(layers, ids[:, :longest], last, cache=cache, frozen_layers=frozen_layers)[:, 0]
        cache.longest = longest
        return FusedDecoding(hidden, self.output_head, fused, layers, cache, frozen_layers, passes=self.passes)

    def hidden(self, sequences: Sequences, adapter: str | None = None) -> Float[Tensor, "B T D"]:
        """One pass over whole sequences: the hidden states from which each token was chosen, after the final norm."""
        fused = self.fused(adapter)
        if fused is None:
            return self.evaluate(sequences, adapter)[1]
        whole, positions = sequences.left_aligned()
        layers, prefix = fused.weights.layers(adapter), sequences.frozen_prefix
        if prefix is not None and prefix.owner is fused and prefix.layers <= fused.weights.frozen_layers(adapter):
            hidden = fused.forward(layers, whole, positions, prefix.hidden[:, : whole.shape[1]], prefix.layers)
        else:
            hidden = fused.forward(layers, whole, positions)
        self.passes.add(whole.numel(), hidden.requires_grad)
        return hidden

    def evaluate(
        self, sequences: Sequences, adapter: str | None = None
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T D"]]:
        """One pass over whole sequences: the logits and hidden states from which each token was chosen."""
        if self.fused(adapter) is None:
            logits, hidden = self._transformers.evaluate(sequences, adapter)
            self.passes.add(sequences.left_aligned()[0].numel(), hidden.requires_grad)
            return logits, hidden
        hidden, head = self.hidden(sequences, adapter), self.output_head(1.0)
        return nn.functional.linear(hidden, head.weight, head.bias), hidden

    # Choice of the fused pass --------------------------------------------------------------------------------------

    def fused(self, adapter: str | None = None) -> FusedModel | None:
        """The fused forward pass of this model with an adapter; None if passes go through transformers."""
        if self._unsupported_reason(adapter) is not None:
            return None
        # Merging changes the base weights without torch counting it, so that everything is fused anew.
        merges = self.adapters.merges
        if self._fused is None or self._fused[0] != merges or self._fused[1].body is not body_of(self.model):
            self._fused = (merges, FusedModel(self.model))
        return self._fused[1]

    def path(self, adapter: str | None = None) -> str:
        """Which way the model's passes take, and why, in words."""
        reason = self._unsupported_reason(adapter)
        if reason is None:
            return "fused"
        how = "" if self._transformers.cached else ", without a cache (each step reads the whole text again)"
        return f"through transformers{how}: {reason}"

    def _unsupported_reason(self, adapter: str | None) -> str | None:
        if not self.fast:
            return "fast is off"
        if adapter is not None:
            self.adapters.require(adapter)
        # The reason is cached until the adapters change. Hooks may be added at any time, so they are checked each time.
        key = (self.adapters.changes, adapter)
        if key not in self._paths:
            self._paths = {old: path for old, path in self._paths.items() if old[0] == key[0]}
            inner = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
            reason = unsupported_reason(inner)
            if reason is None and adapter is not None:
                reason = unsupported_adapter_reason(inner, adapter)
            hooks: list[Mapping[int, Any]] = [
                kind for m in inner.modules() for kind in (m._forward_hooks, m._forward_pre_hooks)
            ]
            self._paths[key] = (reason, hooks)
        reason, hooks = self._paths[key]
        # transformers leaves its own hooks in place after it returned hidden states; they do nothing by themselves.
        own = "transformers.utils.output_capturing"
        if reason is None and any(getattr(h, "__module__", "") != own for kind in hooks for h in kind.values()):
            return "the model has forward hooks, which only the model's own forward pass runs"
        return reason
