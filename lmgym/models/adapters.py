"""The LoRA adapters of a language model: which there are, which one is switched on, and their weights."""

import copy
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lmgym.models.adaptable import all_linear, linear_layers, unadaptable
from lmgym.models.adapter_files import attach_adapter, detach_adapter, read_adapter
from lmgym.models.base_weights import absolute, check_base, record_base, weights_checksum
from lmgym.models.large_packages import peft, tuners_utils
from lmgym.models.transformers_quirks import disable_dropout, seeded, silence_libraries

SAMPLE = 64
"""Numbers of each weight that are compared to see whether the base weights are still those of a folder."""


class Adapters(Collection[str]):
    """The LoRA adapters of one model (Hu et al. 2021), by name, in the order in which they were added.

    All adapters are off except inside `using`.

    Args:
        model: a transformers model.
        name: the model's name, for error messages.

    Attributes:
        model: the model with its adapters: wrapped by peft while it has any.
        changes: how often an adapter was added or removed.
        merges: how often one was merged into the base weights.
    """

    def __init__(self, model: Any, name: str):
        self.model: Any = model
        self.name = name
        self.changes = self.merges = 0
        self._active: str | None = None
        self._base: tuple[str, str] | None = None
        self._lora_layers = _lora_layers_of(model)
        disable_dropout(model)

    def __contains__(self, name: object) -> bool:
        return name in self._configs

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __len__(self) -> int:
        return len(self._configs)

    def add(
        self,
        name: str,
        rank: int = 8,
        alpha: int = 16,
        seed: int = 0,
        base: str | None = None,
        targets: Literal["all-linear", "attention"] = "all-linear",
        layers: int = 0,
    ) -> None:
        """Adds an adapter: `W + alpha/rank · B A` with B = 0, so that it does not change the model yet.

        Args:
            name: a new name.
            rank: r.
            alpha: the scale is alpha / r.
            seed: of the random matrix A.
            base: copies this adapter instead.
            targets: "all-linear", or the projections of "attention" alone.
            layers: adapts this many of the top layers alone; 0 adapts all. The output of the layers below is then
                computed once per rollout, for the reference and all epochs. Fewer weights are trained.

        Raises:
            ValueError: the name is taken, the model has fewer layers, or the names of its modules are unknown.
        """
        if name in self:
            raise ValueError(f"there is already an adapter {name!r}; this model has {', '.join(self)}")
        if base is not None:
            self.require(base)
            config = copy.deepcopy(self._configs[base])
        else:
            config = peft.LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=self._target_modules(targets, layers), task_type="CAUSAL_LM"
            )
        trained = self._trained()
        with seeded(seed), silence_libraries():
            if isinstance(self.model, peft.PeftModel):
                self.model.add_adapter(name, config)
            else:
                self.model = peft.get_peft_model(self.model, config, adapter_name=name)
        if base is None:
            config.base_model_name_or_path = None  # peft would name what the model was once loaded from
        if base is not None:
            self.copy(base, name)
        self._after_change(trained)

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Copies the weights of one adapter into another. If there is no such target, adds it, frozen.

        Raises:
            ValueError: there is no such source, or the two differ in shape.
        """
        if target not in self:
            self.add(target, base=source)
            return
        sources, targets = self.parameters(source), self.parameters(target)
        if [p.shape for p in sources] != [p.shape for p in targets]:
            raise ValueError(f"the adapters {source!r} and {target!r} differ in rank or layers, and cannot be copied")
        for own, other in zip(targets, sources, strict=True):
            own.copy_(other)

    def load(self, folder: str | Path, name: str = "policy") -> None:
        """Loads a LoRA adapter from a folder that peft has saved. If that fails, the model stays as it was.

        Raises:
            ValueError: the name is taken, there is no adapter in the folder, its files are pickled or damaged, it does
                not fit this model, it was trained on another base (`lmgym.json` has its checksum), or it would change
                the base, which the reference shares.
        """
        if name in self:
            raise ValueError(f"there is already an adapter {name!r}")
        config, weights = read_adapter(folder, base_changes=False)
        check_base(folder, self.model, self.name)
        trained = self._trained()
        self.model = attach_adapter(self.model, config, weights, name, folder)
        self._after_change(trained)

    def save(self, folder: str | Path, name: str = "policy") -> None:
        """Saves an adapter so that `AutoPeftModelForCausalLM.from_pretrained(folder)` gives it on its base.

        `adapter_config.json` names the folder of the base (see `stored_in`), and `lmgym.json` has its checksum.

        Raises:
            ValueError: there is no such adapter.
        """
        self.require(name)
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary, silence_libraries():
            self.model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
            # peft saves an adapter in a subfolder of its name, except "default".
            for file in (Path(temporary) / name if name != "default" else Path(temporary)).iterdir():
                if file.name != "README.md":
                    shutil.copy(file, target / file.name)
        record_base(target, self.base(self._configs[name].base_model_name_or_path), weights_checksum(self.model))

    def stored_in(self, source: str | Path) -> None:
        """Records that the base weights are now those in a folder, or of a name on the hub: saved adapters name it."""
        self._base = (absolute(source), weights_checksum(self.model, SAMPLE))

    def base(self, otherwise: str | None = None) -> str | None:
        """The folder or name of the base weights; None if they have changed since they were loaded or saved.

        Args:
            otherwise: the answer for a model that was neither loaded nor saved by lmgym.
        """
        if self._base is None:
            return otherwise
        source, sample = self._base
        return source if weights_checksum(self.model, SAMPLE) == sample else None

    def drop(self, name: str) -> None:
        """Removes an adapter; the other weights stay as they are.

        Raises:
            ValueError: there is no such adapter.
        """
        self.require(name)
        trained = self._trained()
        self.model = detach_adapter(self.model, name)
        self._after_change(trained)

    def merge(self) -> None:
        """Merges the only adapter into the base weights; the model then has no adapters.

        Raises:
            ValueError: the model has no adapter, or several.
        """
        if len(self) != 1:
            raise ValueError(f"adapters.merge() needs exactly one adapter; this model has {len(self)}")
        self._switch(next(iter(self)))
        _untie_adapted(self.model)
        self.model = self.model.merge_and_unload()
        self.merges += 1
        self._after_change(())

    def rank(self, name: str) -> int:
        """The rank r of an adapter.

        Raises:
            ValueError: there is no such adapter.
        """
        self.require(name)
        return self._configs[name].r

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of an adapter, in a fixed order.

        Raises:
            ValueError: there is no such adapter.
        """
        self.require(name)
        own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")  # matrices of embeddings have no ".weight" after it
        return [p for key, p in self.model.named_parameters() if own.search(key)]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Runs the body with one adapter switched on, or with all of them off (None).

        Raises:
            ValueError: there is no such adapter.
        """
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def require(self, name: str) -> None:
        """Checks that there is such an adapter.

        Raises:
            ValueError: there is none.
        """
        if name not in self:
            have = ", ".join(self) or "none"
            raise ValueError(f"the model has no adapter {name!r} (it has {have}): add it with adapters.add({name!r})")

    @property
    def _configs(self) -> dict[str, Any]:
        return self.model.peft_config if isinstance(self.model, peft.PeftModel) else {}

    def _switch(self, name: str | None) -> None:
        if name is not None:
            self.require(name)
        # peft's own switches also change requires_grad, and a parameter for which it is switched off between the
        # forward and the backward pass silently gets no gradient. So only the two flags that a layer's forward pass
        # reads are set here.
        for layer in self._lora_layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self._active = name

    def _target_modules(self, targets: str, layers: int) -> str | list[str]:
        """The names of the modules to adapt, in peft's form."""
        if targets not in ("all-linear", "attention"):
            raise ValueError(f"targets={targets!r} is unknown: choose 'all-linear' or 'attention'")
        model: Any = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
        if targets == "all-linear" and not layers:
            return all_linear(model, model.get_output_embeddings())
        depth = model.config.get_text_config().num_hidden_layers
        if not 0 <= layers <= depth:
            raise ValueError(f"layers={layers}: the model has {depth} layers to adapt the top of")
        found, left_out = [], unadaptable(model)
        for name, _ in linear_layers(model):
            place = re.search(r"\.(?:layers|h|blocks|block)\.(\d+)\.(.*)", f".{name}")
            if place is None or name in left_out:
                continue
            in_attention = re.search("attn|attention", place[2]) is not None
            if int(place[1]) >= depth - (layers or depth) and (targets == "all-linear" or in_attention):
                found.append(name)
        if not found:
            raise ValueError(f"the modules of {self.name!r} have unknown names: use targets='all-linear'")
        return found

    def _trained(self) -> list[nn.Parameter]:
        """The adapter weights that are being trained."""
        return [p for p in self.model.parameters() if p.requires_grad] if self else []

    def _after_change(self, trained: Sequence[nn.Parameter]) -> None:
        """Undoes what peft changes besides: trains only what was trained before, all adapters off, no dropout."""
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        disable_dropout(self.model)
        self.changes += 1
        self._lora_layers = _lora_layers_of(self.model)
        self._switch(None)


def _lora_layers_of(model: nn.Module) -> "list[tuners_utils.BaseTunerLayer]":
    return [m for m in model.modules() if isinstance(m, tuners_utils.BaseTunerLayer)]


def _untie_adapted(model: Any) -> None:
    """Separates embedding and output head, if they share their weights and an adapter changes only one of them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(module, tuners_utils.BaseTunerLayer) for module in (embedding, head)):
        return
    embedding, head = (getattr(module, "base_layer", module) for module in (embedding, head))
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
