"""A reward model: a language model with a scalar head at the last token. It scores text with its own tokenizer.

It is an ordinary `AutoModelForSequenceClassification` with one label: plain transformers loads what is saved here, and
reward models trained elsewhere can be loaded here.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from lmgym.fused import FusedModel, body_of, gather_positions, unsupported_reason
from lmgym.models import (
    CHECKSUM,
    BaseMismatch,
    ChatTemplate,
    Example,
    LanguageModel,
    attach_adapter,
    check_base,
    check_folder,
    check_names,
    checkpointed_layers,
    choose_padding,
    count_prefix_tokens,
    disable_dropout,
    eos_ids_of,
    first_line,
    keep_evaluating,
    last_tokens,
    load_base,
    position_limit,
    read_adapter,
    read_settings,
    record_base,
    silence_libraries,
    weights_checksum,
)
from lmgym.models.large_packages import peft
from lmgym.reward.reading import (
    check_reading,
    encode_texts,
    last_linear,
    new_classifier,
    pad_for_reading,
    read_text,
    set_padding,
)
from lmgym.tasks.base import Completion, Prompt

BUILT_IN = {"tiny-reward": "tiny"}
"""The reward models that ship with the package, and the base model of each."""

PASS_TOKENS = 8192
"""The maximum tokens of a pass, padding included; a single text may have more."""


class RewardModel:
    """Scores texts: a score function for environments, trained by the Bradley-Terry loss.

    Args:
        model: a sequence-classification model with one label.
        tokenizer: its own tokenizer.
        shift: is subtracted from every score, so that some reference texts have mean 0 (Stiennon et al. 2020, section
            3.4).
        gain: the factor by which the scores were multiplied after training: σ((r_a − r_b) / gain) is the probability
            that a is preferred to b.
        ends_with_eos: whether finished texts are given with their end-of-sequence token. Reward models trained here
            expect it; others rarely do.

    Attributes:
        pad_id: fills rows up; masks tell it from text.
        base: the folder or name of the language model that its adapter was made for, and the checksum of the trunk;
            None without an adapter.

    Raises:
        ValueError: more than one label.
    """

    def __init__(self, model: Any, tokenizer: Any, shift: float = 0.0, ends_with_eos: bool = False, gain: float = 1.0):
        if model.config.num_labels != 1:
            raise ValueError(
                f"a reward model returns one number, but this one has {model.config.num_labels} labels: load a model "
                "with num_labels=1, or wrap a classifier in a function that returns one score per completion"
            )
        config, own = model.config.get_text_config(), tokenizer.pad_token_id
        embeddings = model.get_input_embeddings()
        self.vocabulary: int = embeddings.weight.shape[0]
        ends = eos_ids_of(model, tokenizer)
        proper = own is not None and own not in ends and own < self.vocabulary
        # transformers reads the score at the last token that is not this one; None if it counts every token.
        self._skipped_id: int | None = own if proper else config.pad_token_id
        chosen = own if proper else choose_padding(tokenizer, ends, self.vocabulary)
        self.pad_id: int = chosen or 0  # any id fills rows up
        set_padding(model, self.pad_id)
        embeddings.padding_idx = None  # transformers leaves out the gradient of the padding, which may be an end
        disable_dropout(model)
        self.model = model
        self.tokenizer = tokenizer
        self.shift = shift
        self.ends_with_eos = ends_with_eos
        self.gain = gain
        self.base: tuple[str | None, str] | None = None
        self._prefix_length = count_prefix_tokens(tokenizer)
        self._longest = position_limit(model)
        self.chat = ChatTemplate(tokenizer, ends, model.config.name_or_path)
        self._fused: FusedModel | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewardModel":
        # gymnasium's env.spec deep-copies every argument of make(): a handle is shared, not copied.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fused": None}

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """The score of each completion, minus `shift`: a `ScoreFunction`."""
        texts = [read_text(prompt, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]
        finished = [completion.finish_reason == "stop" for completion in completions]
        return (self.score_texts(texts, finished) - self.shift).tolist()

    @torch.inference_mode()
    def score_texts(
        self, texts: Sequence[str | Example], finished: Sequence[bool] | None = None, rows: int = 64
    ) -> Float[Tensor, " N"]:
        """The scores of texts before `shift`, as transformers computes them, on the CPU.

        Args:
            texts: prompts with their completions; an answer to a conversation is an `Example` (see `read_text`).
            finished: whether each text has ended; all have by default.
            rows: how many texts a pass takes.
        """
        return self.raw_scores(texts, [True] * len(texts) if finished is None else finished, rows).cpu()

    def raw_scores(self, texts: Sequence[str | Example], finished: Sequence[bool], rows: int) -> Float[Tensor, " N"]:
        """The scores before `shift`, differentiable; a pass takes up to `rows` texts of similar length."""
        order = sorted(range(len(texts)), key=lambda i: _length(texts[i]))
        parts = []
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            encoded = self.encode([texts[i] for i in part], [finished[i] for i in part])
            few = max(1, PASS_TOKENS // encoded[0].shape[1])
            parts += [self.forward(*some).float() for some in zip(*(x.split(few) for x in encoded), strict=True)]
        # In the order of the texts again.
        return torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]

    def count_tokens(self, texts: Sequence[str | Example]) -> int:
        """The number of tokens of some finished texts together, without padding."""
        return sum(map(len, self._token_rows(texts, [True] * len(texts))))

    def encode(
        self, texts: Sequence[str | Example], finished: Sequence[bool]
    ) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
        """Right-padded token ids and attention mask.

        A text longer than the model allows loses its beginning, but for the special tokens before it.

        Raises:
            ValueError: a text has a token that the model does not have.
        """
        rows = self._token_rows(texts, finished)
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows])
        if int(ids.max()) >= self.vocabulary:
            raise ValueError(
                f"the reward model's tokenizer gives the token {int(ids.max())}, but its model has only "
                f"{self.vocabulary}: the tokenizer is of another model, or tokens were added to it alone"
            )
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return ids.to(self.device), mask.to(self.device)

    def _token_rows(self, texts: Sequence[str | Example], finished: Sequence[bool]) -> list[list[int]]:
        """The token ids of each text, as long as the model allows."""
        rows = encode_texts(self.tokenizer, self.chat, texts, finished, self.ends_with_eos)
        return rows if self._longest is None else [last_tokens(r, self._longest, self._prefix_length) for r in rows]

    def forward(self, input_ids: Int[Tensor, "N L"], attention_mask: Int[Tensor, "N L"]) -> Float[Tensor, " N"]:
        """The scores of encoded texts before `shift`, differentiable."""
        counted = attention_mask.bool()
        if self._skipped_id is not None:
            counted = counted & (input_ids != self._skipped_id)
        last = (torch.arange(input_ids.shape[1], device=input_ids.device) * counted).argmax(1, keepdim=True)
        fused = None if torch.is_grad_enabled() else self._fused_model()
        if fused is not None:
            hidden = fused.forward(fused.weights.layers(), input_ids, last)[:, 0]
            return nn.functional.linear(hidden, self._head().weight)[:, 0]

        def at_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # transformers looks for the last token by the padding id, which may also be text: at every position it
            # finds the last token's state. An encoder's head gets one pooled state instead.
            if args[0].ndim < 3:
                return None
            return (gather_positions(args[0], last).expand_as(args[0]), *args[1:])

        keep_evaluating(self.model)
        hook = self._head().register_forward_pre_hook(at_last)
        try:
            with checkpointed_layers(self.model):
                return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
        finally:
            hook.remove()

    def _fused_model(self) -> FusedModel | None:
        """The fused forward pass of the model, if it is supported."""
        if isinstance(self.model, peft.PeftModel) or unsupported_reason(self.model) is not None:
            return None
        if self._fused is None or self._fused.body is not body_of(self.model):
            self._fused = FusedModel(self.model)
        return self._fused

    def parameters(self) -> list[nn.Parameter]:
        """The weights to train: all that require a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def scale(self, gain: float) -> None:
        """Multiplies all scores by a positive number, by scaling the head's weights."""
        if not gain > 0:
            raise ValueError(f"gain={gain} must be positive")
        with torch.no_grad():
            for parameter in self._head().parameters():
                parameter.mul_(gain)
        self.shift *= gain
        self.gain *= gain

    def _head(self) -> nn.Linear:
        return last_linear(self.model)

    # Creating, loading and saving ----------------------------------------------------------------------------------

    @classmethod
    def from_language_model(
        cls, lm: LanguageModel, rank: int = 8, alpha: int = 16, seed: int = 0, ends_with_eos: bool = True
    ) -> "RewardModel":
        """A new reward model on a copy of a language model's trunk, for example of the fine-tuned model.

        The head is initialised from N(0, 1/(d + 1)) (Stiennon et al. 2020, appendix B.1).

        Args:
            lm: a model without adapters.
            rank: of the LoRA adapter that is trained together with the head; 0 trains all weights.
            alpha: LoRA's scale is alpha / rank.
            seed: of the random weights of adapter and head.
            ends_with_eos: whether it reads the end-of-sequence token of finished texts. Use False if the texts to score
                are cut off at a token budget, and train it on such texts.

        Raises:
            ValueError: transformers has no sequence-classification model of this architecture that reads a whole text.
        """
        model = new_classifier(lm, rank, alpha, seed)
        made = cls(model, pad_for_reading(model, lm.tokenizer), ends_with_eos=ends_with_eos)
        made.base = (lm.adapters.base(lm.name), weights_checksum(body_of(model))) if rank else None
        check_reading(made.forward, lm)
        return made

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu", merged: bool = True) -> "RewardModel":
        """Loads a reward model: a full model, or an adapter with a head.

        Args:
            name: "tiny-reward" (ships with the package), a folder, or a name on the Hugging Face hub.
            device: where the weights are stored.
            merged: merges an adapter into its base, which is faster; otherwise the base's weights stay as they are.

        Raises:
            ValueError: there is no such model, or it has several labels; or the base of an adapter is not there or is
                another one.
        """
        if name in BUILT_IN:
            root = files("lmgym") / "assets"
            with as_file(root / str(name)) as folder, as_file(root / BUILT_IN[str(name)]) as base:
                return cls._load(folder, base, device, merged)
        folder = Path(name)
        if not (folder / "adapter_config.json").is_file():
            return cls._load(folder, str(name), device, merged)
        tiny = files("lmgym") / "assets" / "tiny"

        def load_with(base: str) -> "RewardModel":
            with as_file(tiny) if base == "tiny" else nullcontext(base) as source:
                return cls._load(folder, source, device, merged)

        return load_base(folder, load_with)

    @classmethod
    def _load(cls, folder: Path, base: str | Path, device: str | torch.device, merged: bool) -> "RewardModel":
        try:
            is_adapter = (folder / "adapter_config.json").is_file()
            config, weights = read_adapter(folder, base_changes=True) if is_adapter else (None, {})
            more: dict[str, Any] = {"num_labels": 1} if config else {}
            check_folder(base)
            with silence_libraries():
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(base), trust_remote_code=False)
                model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
                    str(base), use_safetensors=True, trust_remote_code=False, output_loading_info=True, **more
                )
            if config:
                tokenizer = pad_for_reading(model, tokenizer)
                check_base(folder, body_of(model), str(base))
                model = attach_adapter(model, config, weights, "default", folder)
                model = model.merge_and_unload() if merged else model
            # transformers initialises missing weights at random, such as the head of a base model. The adapter may have
            # brought them.
            brought = set(config.modules_to_save or ()) if config else set()
            check_names(base, (), [key for key in found["missing_keys"] if not brought & set(key.split("."))])
        except BaseMismatch:
            raise
        except Exception as error:  # the libraries that read these files raise many types of errors
            raise ValueError(
                f"no reward model {str(folder)!r}: built in is {', '.join(BUILT_IN)}; anything else must be a "
                "folder with a sequence-classification model in safetensors (or a peft adapter for one), or a name on "
                f"the Hugging Face hub that can be reached ({first_line(error)})"
            ) from error
        settings = _read_own_settings(folder / "lmgym.json")
        model.requires_grad_(False)
        return cls(model.to(device), tokenizer, **settings)

    def save(self, folder: str | Path) -> None:
        """Saves an ordinary sequence-classification folder; adapters are merged.

        Plain transformers loads it and computes the scores before `shift`. Where the tokenizer has no token that could
        be padding alone, it is saved without one: transformers then scores one text at a time, and refuses more.
        `lmgym.json` stores `shift`, `gain` and `ends_with_eos`.
        """
        folder = Path(folder)
        if isinstance(self.model, peft.PeftModel):
            self.model = self.model.merge_and_unload()
        with silence_libraries(), self._config_for_reading():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "lmgym.json").write_text(json.dumps(_own_settings(self), indent=2) + "\n")

    def save_adapter(self, folder: str | Path) -> None:
        """Saves adapter and head without the base model, which the adapter names; `lmgym.json` has its checksum.

        Raises:
            ValueError: the model has no adapter, or it was not made by `from_language_model`.
        """
        if not isinstance(self.model, peft.PeftModel) or self.base is None:
            raise ValueError("only a model that from_language_model() made with rank > 0 has an adapter: use save()")
        folder = Path(folder)
        with silence_libraries(), self._config_for_reading():
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        record_base(folder, *self.base, **_own_settings(self))

    @contextmanager
    def _config_for_reading(self) -> Iterator[None]:
        """Gives the config the padding id by which transformers finds the last token."""
        set_padding(self.model, self._skipped_id)
        try:
            yield
        finally:
            set_padding(self.model, self.pad_id)


def _own_settings(model: RewardModel) -> dict[str, Any]:
    return {"shift": model.shift, "ends_with_eos": model.ends_with_eos, "gain": model.gain}


def _length(text: str | Example) -> int:
    """A number that grows with the tokens of a text."""
    if isinstance(text, str):
        return len(text)
    return len(text.completion) + sum(len(message["content"]) for message in text.messages)


def _read_own_settings(path: Path) -> dict[str, Any]:
    """The settings that `save` wrote beside a reward model; empty for a model that was trained elsewhere."""
    if not path.is_file():
        return {}
    settings, known = read_settings(path), {"shift": (int, float), "gain": (int, float), "ends_with_eos": (bool,)}
    settings.pop(CHECKSUM, None)
    for key, value in settings.items():
        wrong = key not in known or type(value) not in known[key] or not math.isfinite(value)
        if wrong or (key == "gain" and not value > 0):
            raise ValueError(
                f"{path}: {key} is {value!r}; expected are the numbers shift and gain (positive), and ends_with_eos "
                "(true or false)"
            )
    return settings
