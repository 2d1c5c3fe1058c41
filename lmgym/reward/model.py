"""A reward model: a language model with a scalar head at the last token. It scores text with its own tokenizer.

It is an ordinary `AutoModelForSequenceClassification` with one label: plain transformers loads what is saved here, and
reward models trained elsewhere can be loaded here.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmgym.fused import FusedModel, body_of, unsupported_reason
from lmgym.models import (
    ChatTemplate,
    Example,
    LanguageModel,
    attach_adapter,
    check_folder,
    check_names,
    checkpointed_layers,
    disable_dropout,
    eos_ids_of,
    first_line,
    read_adapter,
    read_settings,
    silence_libraries,
    token_ids,
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
        tokenizer: its own tokenizer, with a padding token that does not end a text.
        shift: is subtracted from every score, so that some reference texts have mean 0 (Stiennon et al. 2020, section
            3.4).
        gain: the factor by which the scores were multiplied after training: σ((r_a − r_b) / gain) is the probability
            that a is preferred to b.
        ends_with_eos: whether finished texts are given with their end-of-sequence token. Reward models trained here
            expect it; others rarely do.

    Raises:
        ValueError: more than one label, or no usable padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, shift: float = 0.0, ends_with_eos: bool = False, gain: float = 1.0):
        if model.config.num_labels != 1:
            raise ValueError(
                f"a reward model returns one number, but this one has {model.config.num_labels} labels: load a model "
                "with num_labels=1, or wrap a classifier in a function that returns one score per completion"
            )
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise ValueError(
                "the reward model's tokenizer needs a padding token other than its end-of-sequence token: the score is "
                "read at the last token that is not padding. Set tokenizer.pad_token and model.config.pad_token_id"
            )
        model.config.pad_token_id = tokenizer.pad_token_id
        disable_dropout(model)
        self.model = model
        self.tokenizer = tokenizer
        self.shift = shift
        self.ends_with_eos = ends_with_eos
        self.gain = gain
        self.chat = ChatTemplate(tokenizer, eos_ids_of(model, tokenizer), model.config.name_or_path)
        self._fused: FusedModel | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewardModel":
        # gymnasium's env.spec deep-copies every argument of make(): a handle is shared, not copied.
        return self

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
        return sum(map(len, self._encode_all(texts, [True] * len(texts))))

    def encode(
        self, texts: Sequence[str | Example], finished: Sequence[bool]
    ) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
        """Right-padded token ids and attention mask; a text longer than the model allows loses its beginning."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        rows = [ids[-longest if longest else 0 :] for ids in self._encode_all(texts, finished)]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return ids.to(self.device), mask.to(self.device)

    def _encode_all(self, texts: Sequence[str | Example], finished: Sequence[bool]) -> list[list[int]]:
        """The token ids of each text, with its end where the model reads one."""
        end = [self.tokenizer.eos_token_id] if self.ends_with_eos else []
        if not self.chat.available:
            texts = [text if isinstance(text, str) else text.prompt + text.completion for text in texts]
        plain = iter(token_ids(self.tokenizer, [text for text in texts if isinstance(text, str)]))
        return [
            [*next(plain), *(end if done else [])] if isinstance(text, str) else self._encode_answer(text, done)
            for text, done in zip(texts, finished, strict=True)
        ]

    def _encode_answer(self, text: Example, finished: bool) -> list[int]:
        """The token ids of a conversation with its answer, by the model's own chat template.

        A reward model that was trained elsewhere reads a finished conversation as its template writes it. One without a
        chat template reads the prompt's `text` with the answer, like any other text.
        """
        if finished and not self.ends_with_eos:
            return self.chat.encode_whole([*text.messages, {"role": "assistant", "content": text.completion}])
        return [*chain(*self.chat.encode_answer(text.messages, text.completion, finished))]

    def forward(self, input_ids: Int[Tensor, "N L"], attention_mask: Int[Tensor, "N L"]) -> Float[Tensor, " N"]:
        """The scores of encoded texts before `shift`, differentiable."""
        fused = None if torch.is_grad_enabled() else self._fused_model()
        if fused is None:
            with checkpointed_layers(self.model):
                return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
        # As in transformers, the score is computed at the last token that is not padding.
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (column * (input_ids != self.tokenizer.pad_token_id)).argmax(1, keepdim=True)
        hidden = fused.forward(fused.weights.layers(), input_ids, last)[:, 0]
        return nn.functional.linear(hidden, self._head().weight)[:, 0]

    def _fused_model(self) -> FusedModel | None:
        """The fused forward pass of the model, if it is supported."""
        if isinstance(self.model, PeftModel) or unsupported_reason(self.model) is not None:
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
            self._head().weight.mul_(gain)
        self.shift *= gain
        self.gain *= gain

    def _head(self) -> nn.Linear:
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        head: Any = model.score
        # peft stores the trained copy of a module beside the original.
        return head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head

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
        """
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), silence_libraries():
            torch.manual_seed(seed)
            lm.save(folder)
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=lm.model.dtype, use_safetensors=True, trust_remote_code=False
            ).to(lm.device)
            nn.init.normal_(model.score.weight, std=(lm.hidden_size + 1) ** -0.5)
            if rank:
                config = LoraConfig(
                    r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="SEQ_CLS",
                    modules_to_save=["score"],
                )  # fmt: skip
                model = get_peft_model(model, config)
                model.peft_config["default"].base_model_name_or_path = lm.name
        return cls(model, lm.tokenizer, ends_with_eos=ends_with_eos)

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> "RewardModel":
        """Loads a reward model: a full model, or an adapter with a head.

        Args:
            name: "tiny-reward" (ships with the package), a folder, or a name on the Hugging Face hub.
            device: where the weights are stored.

        Raises:
            ValueError: there is no such model, it has several labels, or its tokenizer has no usable padding token.
        """
        if name in BUILT_IN:
            root = files("lmgym") / "assets"
            with as_file(root / str(name)) as folder, as_file(root / BUILT_IN[str(name)]) as base:
                return cls._load(folder, base, device)
        folder = Path(name)
        adapter = folder / "adapter_config.json"
        base = read_settings(adapter).get("base_model_name_or_path") if adapter.is_file() else str(name)
        if not isinstance(base, str):
            raise ValueError(f"{adapter}: base_model_name_or_path is {base!r}; it must name the base model")
        if base == "tiny":
            with as_file(files("lmgym") / "assets" / "tiny") as tiny:
                return cls._load(folder, tiny, device)
        return cls._load(folder, base, device)

    @classmethod
    def _load(cls, folder: Path, base: str | Path, device: str | torch.device) -> "RewardModel":
        try:
            is_adapter = (folder / "adapter_config.json").is_file()
            config, weights = read_adapter(folder, base_changes=True) if is_adapter else (None, {})
            more: dict[str, Any] = {"num_labels": 1} if config else {}
            check_folder(base)
            with silence_libraries():
                tokenizer = AutoTokenizer.from_pretrained(str(base), trust_remote_code=False)
                model, found = AutoModelForSequenceClassification.from_pretrained(
                    str(base), use_safetensors=True, trust_remote_code=False, output_loading_info=True, **more
                )
            if config:
                model.config.pad_token_id = tokenizer.pad_token_id
                model = attach_adapter(model, config, weights, "default", folder).merge_and_unload()
            # transformers initialises missing weights at random, such as the head of a base model. The adapter may have
            # brought them.
            brought = set(config.modules_to_save or ()) if config else set()
            check_names(base, (), [key for key in found["missing_keys"] if not brought & set(key.split("."))])
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

        Plain transformers loads it and computes the scores before `shift`. `lmgym.json` stores `shift`, `gain` and
        `ends_with_eos`.
        """
        folder = Path(folder)
        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()
        with silence_libraries():
            self.model.save_pretrained(folder)
        self._save_settings(folder)

    def save_adapter(self, folder: str | Path) -> None:
        """Saves adapter and head without the base model, whose name the adapter stores."""
        folder = Path(folder)
        with silence_libraries():
            self.model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        self._save_settings(folder, tokenizer=False)

    def _save_settings(self, folder: Path, tokenizer: bool = True) -> None:
        if tokenizer:
            self.tokenizer.save_pretrained(folder)
        settings = {"shift": self.shift, "ends_with_eos": self.ends_with_eos, "gain": self.gain}
        (folder / "lmgym.json").write_text(json.dumps(settings, indent=2) + "\n")


def read_text(prompt: Prompt, completion: str) -> str | Example:
    """What a reward model reads: prompt and completion as one text; or a conversation with its answer."""
    return Example.of(prompt, completion) if prompt.messages else prompt.text + completion


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
    for key, value in settings.items():
        wrong = key not in known or type(value) not in known[key] or not math.isfinite(value)
        if wrong or (key == "gain" and not value > 0):
            raise ValueError(
                f"{path}: {key} is {value!r}; expected are the numbers shift and gain (positive), and ends_with_eos "
                "(true or false)"
            )
    return settings
