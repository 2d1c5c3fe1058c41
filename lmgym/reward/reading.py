"""What a reward model reads; where transformers then reads the score, and the padding token that this depends on.

A decoder's score is read at the last token that is not `config.pad_token_id`. If that is also an end, the end of a text
is never read; if it is None, transformers reads the very last token, and refuses several texts at a time.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lmgym.models import (
    ChatTemplate,
    Example,
    LanguageModel,
    all_linear,
    choose_padding,
    count_added_ends,
    eos_ids_of,
    first_line,
    seeded,
    silence_libraries,
    token_ids,
)
from lmgym.models.large_packages import peft
from lmgym.tasks.base import Prompt


def read_text(prompt: Prompt, completion: str) -> str | Example:
    """What a reward model reads: prompt and completion as one text; or a conversation with its answer."""
    return Example.of(prompt, completion) if prompt.messages else prompt.text + completion


def encode_texts(
    tokenizer: Any, chat: ChatTemplate, texts: Sequence[str | Example], finished: Sequence[bool], ends_with_eos: bool
) -> list[list[int]]:
    """The token ids of each text, with its end where the model reads one.

    A conversation with its answer is encoded by the model's own chat template; without one, the prompt's `text` with
    the answer is read like any other text. A reward model that was trained elsewhere reads a finished conversation as
    its template writes it.
    """
    end = [tokenizer.eos_token_id] if ends_with_eos else []
    if not chat.available:
        texts = [text if isinstance(text, str) else text.prompt + text.completion for text in texts]
    # Whether a text has ended is said by `finished`, and not by the tokenizer.
    added = count_added_ends(tokenizer) if ends_with_eos else 0
    encoded = token_ids(tokenizer, [text for text in texts if isinstance(text, str)])
    plain = iter(ids[: len(ids) - added] for ids in encoded)
    rows = []
    for text, done in zip(texts, finished, strict=True):
        if isinstance(text, str):
            rows.append([*next(plain), *(end if done else [])])
        elif done and not ends_with_eos:
            rows.append(chat.encode_whole([*text.messages, {"role": "assistant", "content": text.completion}]))
        else:
            rows.append([*chain(*chat.encode_answer(text.messages, text.completion, done))])
    return rows


@torch.no_grad()
def check_reading(score: Callable[[Tensor, Tensor], Tensor], lm: LanguageModel) -> None:
    """Refuses an architecture whose score does not depend on the last token of a text.

    Args:
        score: scores token ids with their mask.
        lm: the language model that the reward model was made of.

    Raises:
        ValueError: texts that differ in their last token get the same score.
    """
    tokens = lm.text.text_tokens()
    last = [tokens[i * (len(tokens) - 1) // 3] for i in range(4)]
    ids = torch.tensor([[tokens[0], token] for token in last], device=lm.device)
    try:
        scores = score(ids, torch.ones_like(ids)).tolist()
    except ValueError:  # a head that reads at an end of sequence
        scores = [0.0]
    if math.isclose(min(scores), max(scores), rel_tol=1e-4, abs_tol=1e-6):
        raise ValueError(
            f"no reward model can be made of {lm.name!r}: transformers reads the score of the architecture "
            f"{lm.model.config.model_type} where the end of a text is not seen. Take another base, or a reward function"
        )


def set_padding(model: Any, pad_id: int | None) -> None:
    """Sets the padding id in the config, and in the text config inside a composite one, where the head reads it."""
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_id


def pad_for_reading(model: Any, tokenizer: Any) -> Any:
    """The tokenizer for a reward model that is trained here: with a padding token that does not end texts.

    Without any such token, the model's config gets None: every token of a text is then read. The vocabulary stays as it
    is, and so does the given tokenizer.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    pad_id = choose_padding(tokenizer, eos_ids_of(model, tokenizer), vocabulary)
    set_padding(model, pad_id)
    if pad_id in (None, tokenizer.pad_token_id):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return changed


def last_linear(model: Any) -> nn.Linear:
    """The last layer of a model with one label. peft keeps its trained copy beside the original.

    Raises:
        ValueError: the model has no linear layer with one output.
    """
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    found = [(name, m) for name, m in inner.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    heads = [m for name, m in found if "original_module" not in name]
    if not heads:
        raise ValueError("the model has no linear layer with one output")
    return heads[-1]


def new_classifier(lm: LanguageModel, rank: int, alpha: int, seed: int) -> Any:
    """A sequence-classification model with one label on a copy of a language model's trunk.

    Args:
        lm: a model without adapters.
        rank: of a LoRA adapter; 0 for none.
        alpha: LoRA's scale is alpha / rank.
        seed: of the random weights of adapter and head.

    Raises:
        ValueError: transformers has no such model of this architecture.
    """
    with tempfile.TemporaryDirectory() as folder, seeded(seed), silence_libraries():
        lm.write(folder)
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=lm.model.dtype, use_safetensors=True, trust_remote_code=False
            ).to(lm.device)
            head = last_linear(model)
        except Exception as error:  # an architecture may have no such model, or one that cannot be built like this
            raise ValueError(
                f"no reward model can be made of {lm.name!r}: transformers has no sequence-classification model for "
                f"the architecture {lm.model.config.model_type} ({first_line(error)}). Take another base, or a reward "
                "function"
            ) from error
        nn.init.normal_(head.weight, std=(lm.hidden_size + 1) ** -0.5)
        if rank:
            name = next(name for name, module in model.named_modules() if module is head)
            config = peft.LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=all_linear(model, head), task_type="SEQ_CLS",
                modules_to_save=[name],
            )  # fmt: skip
            model = peft.get_peft_model(model, config)
    return model
