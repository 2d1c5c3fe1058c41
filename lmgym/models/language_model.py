"""A causal language model with its tokenizer: by name, by path, "tiny" or "probe"; LoRA adapters on and off.

One base model serves everybody: the policy is the base with an adapter, the reference the same base without it. So a
`LanguageModel` is a shared handle, and every call says which adapter it means.
"""

import copy
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lmgym.devices import free_to_look
from lmgym.fused import (
    Head,
    PackedLinear,
    TokenMask,
    Trunk,
    body_of,
    pack_linear,
    state_of,
)
from lmgym.models.adapters import load_onto, read_adapter, without_adapter
from lmgym.models.decoding import Decoding
from lmgym.models.fused_decoding import FusedDecoding
from lmgym.models.model_files import read_model
from lmgym.models.sequences import Mask, Sequences
from lmgym.models.text import eos_ids_of, token_ids, tokens_before
from lmgym.models.transformers_decoding import ONE_MASK, CachedDecoding, growing_cache
from lmgym.models.transformers_quirks import quietly, without_dropout


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
        fast: whether passes take the fused path (`lmgym.fused`) where it knows the architecture; `path` says which.
        capture: whether a rollout's decoding step is captured in a CUDA graph (`lmgym.rollout.cuda_graph`).
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
        self.eos_ids = eos_ids_of(model, tokenizer)
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
        self._before = tokens_before(tokenizer)
        self._never_text = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self.fast = True
        self.capture = True
        self._trunk: Trunk | None = None
        self._paths: dict[Any, tuple[str | None, list[Any]]] = {}
        self._encoded: dict[str, tuple[int, ...]] = {}
        self._masks: dict[Any, tuple[Tensor, TokenMask]] = {}
        self._packed_head: tuple[Any, PackedLinear | None] | None = None
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
        self._after_adapters_changed(trained)

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
        self._after_adapters_changed(trained)

    def drop_adapter(self, name: str) -> None:
        """Takes an adapter off the model, as if it had never been there."""
        self._require(name)
        trained = self._trained()
        self.model = without_adapter(self.model, name)
        self._after_adapters_changed(trained)

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
        saved, _ = read_model(str(folder), str(folder), self.model.dtype)
        try:
            self.model.load_state_dict(saved.state_dict())
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
        self._after_adapters_changed(())

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

    def _after_adapters_changed(self, trained: Sequence[nn.Parameter]) -> None:
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
        keep_prefix: bool = False,
    ) -> Decoding:
        """Reads left-padded prompts; decoding keeps no gradients.

        Args:
            input_ids: the prompts.
            attention_mask: True on their tokens.
            adapter: the adapter that is on, or None.
            room: tokens for which the cache has room before it must grow.
            keep_prefix: whether to keep what goes into the lowest layer that the adapter changes.
        """
        trunk = self.trunk(adapter)
        if trunk is None:
            return self._start_cached(input_ids, attention_mask.long(), adapter)
        ids, length, longest, equal = _aligned(input_ids, attention_mask)
        layers = trunk.layers(adapter, decode=True)
        keep = trunk.lowest(adapter) if keep_prefix else 0
        cache = trunk.cache(len(ids), longest + room, layers[0].first_norm[0], length, equal, keep_prefix)
        last = slice(longest - 1, longest) if equal else (length - 1)[:, None]
        hidden = trunk.read(layers, ids[:, :longest], last, cache=cache, keep=keep)[:, 0]
        cache.longest = longest
        return FusedDecoding(hidden, self.output_head, trunk, layers, cache, keep)

    def _start_cached(self, input_ids: Tensor, mask: Tensor, adapter: str | None) -> Decoding:
        # Under left padding a model would otherwise count the padding: 3.7 to 5 nats on absolute positions.
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        with self.using(adapter):
            out = self._forward(
                input_ids.long(), mask, position_ids, past_key_values=growing_cache(), use_cache=True, logits_to_keep=1
            )
        newest = (out.logits[:, -1], mask, position_ids[:, -1], out.past_key_values)
        forward_one = partial(self.forward_cached, adapter=adapter)
        return CachedDecoding(out.hidden_states[-1][:, -1], forward_one, *newest)

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
        """Logits of the trunk's last hidden states, for the models that `lmgym.fused` knows."""
        head = self.output_head(1.0)
        return nn.functional.linear(hidden, head.weight, head.bias)

    def output_head(self, temperature: float) -> Head:
        """The last projection, with a temperature."""
        head = self.model.get_output_embeddings()
        return Head(head.weight, head.bias, temperature, self._packed(head.weight))

    def _packed(self, weight: Tensor) -> PackedLinear | None:
        """A frozen head packed, once, and again when torch counts a change in it."""
        if self.head_is_trained:  # torch counts none of the fused optimizer's
            self._packed_head = None
            return None
        state = state_of(weight)
        if self._packed_head is None or self._packed_head[0] != state:
            self._packed_head = (state, pack_linear(weight, None))
        return self._packed_head[1]

    @property
    def head_is_trained(self) -> bool:
        return self.model.get_output_embeddings().weight.requires_grad

    def mask(self, allowed: Bool[Tensor, "T V"]) -> TokenMask:
        """Allowed tokens as `lmgym.fused.head` wants them; tables that were asked for before are remembered."""
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
        frozen_prefix = sequences.frozen_prefix
        if frozen_prefix is not None and frozen_prefix.owner is trunk and frozen_prefix.layer <= trunk.lowest(adapter):
            hidden = frozen_prefix.hidden[:, : whole.shape[1]]
            return trunk.read(trunk.layers(adapter), whole, at, frozen_prefix=hidden, first=frozen_prefix.layer)
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
        if self._unsupported_reason(adapter) is not None:
            return None
        if self._trunk is None or self._trunk.body is not body_of(self.model):
            self._trunk = Trunk(self.model)
        return self._trunk

    def path(self, adapter: str | None = None) -> str:
        """In words, which way the model's passes take, and why."""
        reason = self._unsupported_reason(adapter)
        return "fused" if reason is None else f"through transformers: {reason}"

    def _unsupported_reason(self, adapter: str | None) -> str | None:
        if not self.fast:
            return "fast is off"
        if adapter is not None:
            self._require(adapter)
        # Looked at once for each set of adapters; hooks may come at any time.
        known = self._paths.get((id(self.model), self.adapters, adapter))
        if known is None:
            inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            reason = Trunk.unsupported_reason(inner)
            if reason is None and adapter is not None:
                reason = Trunk.unsupported_adapter_reason(inner, adapter)
            hooks: list[Any] = [kind for m in inner.modules() for kind in (m._forward_hooks, m._forward_pre_hooks)]
            known = self._paths[id(self.model), self.adapters, adapter] = (reason, hooks)
        reason, hooks = known
        # transformers leaves hooks of its own behind where it once gave hidden states; they do nothing unless asked.
        own = "transformers.utils.output_capturing"
        if reason is None and any(getattr(h, "__module__", "") != own for kind in hooks for h in kind.values()):
            return "the model has forward hooks, which a pass beside its own would not run"
        return reason


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
