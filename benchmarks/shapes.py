"""The models that all contenders load: random weights in ordinary transformers folders. They are made once.

A shape's folder holds `policy` (a causal model), `adapter` (LoRA of rank 8 on the attention projections, drawn at
random, so that policy and reference differ), `reward` (a sequence classifier with one label), and `prompts.json`. Each
token is a separate word, so that text and tokens map one to one.

The weights make padding and the end of sequence so improbable that they are never sampled: every contender writes
completions of equal length without special options. In the shapes that end with "-eos" a completion ends at each token
with probability `EOS_HAZARD`: 24 tokens of 48 on average.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.worker import EOS, PAD
from lmgym.models import silence_libraries

PROMPTS, PROMPT_TOKENS = 1024, 16
NEVER = -30.0
"""Added to a logit, in nats: a probability of 10^-13."""
EOS_HAZARD = 0.0328
"""(1 − (1 − p)^48) / p = 24 tokens on average."""
POSITIONS = 576
"""A prompt, and the longest completion of the sweeps, 512."""


@dataclass(frozen=True)
class Shape:
    """A model's size.

    Attributes:
        family: "gpt2" or "llama".
        vocabulary: V, tokens.
        width: D, the hidden size.
        layers: number of layers.
        heads: number of attention heads.
        kv_heads: number of heads of keys and values.
        inner: width of the MLP.
    """

    family: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int

    @property
    def matrix_weights(self) -> int:
        """Number of weights that are multiplied with every token: attention, MLP and head."""
        attention = self.width**2 * (2 + 2 * self.kv_heads / self.heads)
        mlp = self.width * self.inner * (2 if self.family == "gpt2" else 3)
        return int(self.layers * (attention + mlp) + self.vocabulary * self.width)

    @property
    def cache_numbers(self) -> int:
        """Numbers in the keys and values of one position, over all layers."""
        return 2 * self.layers * self.width * self.kv_heads // self.heads

    def config(self) -> PreTrainedConfig:
        """The configuration for transformers."""
        common: dict[str, Any] = {"vocab_size": self.vocabulary, "pad_token_id": PAD, "eos_token_id": EOS}
        common |= {"bos_token_id": None, "tie_word_embeddings": True}
        if self.family == "gpt2":
            return GPT2Config(
                n_embd=self.width, n_layer=self.layers, n_head=self.heads, n_inner=self.inner, n_positions=POSITIONS,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
            )  # fmt: skip
        return LlamaConfig(
            hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, intermediate_size=self.inner, max_position_embeddings=POSITIONS,
            **common,
        )  # fmt: skip

    @property
    def lora_targets(self) -> str:
        """The attention projections; GPT-2's MLP has a `c_proj` too."""
        return r".*\.attn\.c_(attn|proj)" if self.family == "gpt2" else r".*\.self_attn\.[qkvo]_proj"


SHAPES = {
    "tiny": Shape("gpt2", 64, 32, 2, 2, 2, 64),  # to test a benchmark itself
    "tiny-grouped": Shape("llama", 64, 32, 2, 4, 2, 64),
    "T": Shape("gpt2", 512, 128, 4, 4, 4, 512),
    "S": Shape("llama", 4096, 288, 6, 6, 6, 768),
    "M": Shape("llama", 32_000, 288, 6, 6, 6, 768),
    "L": Shape("llama", 49_152, 576, 30, 9, 3, 1536),  # SmolLM2 135M
    "GPT-2": Shape("gpt2", 50_257, 768, 12, 12, 12, 3072),
    "Qwen": Shape("llama", 151_936, 896, 24, 14, 2, 4864),  # a real Qwen2 would need its own tokenizer
}
SHAPES |= {f"{name}-eos": SHAPES[name] for name in ("tiny", "T", "S")}


def make(name: str, root: Path) -> Path:
    """Returns the folder of a shape; makes it if it does not exist."""
    folder = root / name
    if not folder.is_dir():
        with silence_libraries():
            _make(name, root).rename(folder)
    return folder


def _make(name: str, root: Path) -> Path:
    shape, draft = SHAPES[name], root / f"{name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    generator = np.random.default_rng(0)
    prompts = generator.integers(EOS + 1, shape.vocabulary, (PROMPTS, PROMPT_TOKENS)).tolist()
    (draft / "prompts.json").write_text(json.dumps(prompts))
    tokenizer = _tokenizer(shape.vocabulary)
    config = shape.config()
    torch.manual_seed(0)
    policy: Any = AutoModelForCausalLM.from_config(config).eval()
    steer(policy, torch.tensor(prompts[:64]), EOS_HAZARD if name.endswith("-eos") else None)
    policy.save_pretrained(draft / "policy")
    config.num_labels = 1
    reward: Any = AutoModelForSequenceClassification.from_config(config)
    reward.save_pretrained(draft / "reward")
    adapted = get_peft_model(
        policy, LoraConfig(r=8, lora_alpha=16, target_modules=shape.lora_targets, task_type="CAUSAL_LM")
    )
    for key, weights in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weights, std=0.01)
    adapted.save_pretrained(str(draft / "adapter"), save_embedding_layers=False)
    for part in ("policy", "reward"):
        tokenizer.save_pretrained(draft / part)
    return draft


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(EOS + 1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@torch.no_grad()
def steer(model: Any, ids: Tensor, hazard: float | None) -> None:
    """Makes padding improbable, and gives the end of sequence the probability `hazard`, or makes it improbable too.

    Heads have no bias. So the first coordinate of the hidden state is made constant, and in the tied embedding only the
    rows of these two tokens use it.
    """
    embedding = model.get_input_embeddings().weight
    if model.config.model_type == "gpt2":
        embedding[:, 0] = 0
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, 10
    else:
        embedding[:, 0] = 0.2
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
    out = model(ids, output_hidden_states=True)
    logits, constant = out.logits.flatten(0, 1), out.hidden_states[-1][..., 0].flatten()
    embedding[PAD, 0] += NEVER / constant.mean()
    offset = NEVER
    if hazard is not None:
        rest = logits[:, EOS + 1 :].logsumexp(-1)
        low, high = NEVER, -NEVER
        while high - low > 1e-3:
            offset = (low + high) / 2
            mean = torch.sigmoid(logits[:, EOS] + offset / constant.mean() * constant - rest).mean()
            low, high = (low, offset) if mean > hazard else (offset, high)
    embedding[EOS, 0] += offset / constant.mean()


def bound_seconds(
    shape: Shape, rows: int, prompt: int, new: int, bytes_per_number: int, flops: float, bandwidth: float
) -> float:
    """A lower bound of a rollout's seconds at given rates of multiplication and of reading.

    For each step: the larger of the times for the matrix products and for reading the matrices, plus the time for
    reading the KV cache. A machine whose CPU caches hold the model or the keys and values may be faster.
    """
    multiply = 2 * shape.matrix_weights * rows / flops
    read = shape.matrix_weights * bytes_per_number / bandwidth
    positions = sum(prompt + step for step in range(new))
    cache = rows * positions * shape.cache_numbers * bytes_per_number / bandwidth
    return max(prompt * multiply, read) + new * max(multiply, read) + cache
