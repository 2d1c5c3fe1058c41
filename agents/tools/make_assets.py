"""Makes the models that ship with lmgym, "tiny" and "tiny-reward": python -m agents.tools.make_assets OUT_DIR

Trains a byte-level BPE tokenizer and a Llama of 0.56M parameters on texts that the tasks generate: reviews of
`lmgym.tasks.grammar`, and the rule tasks' prompts with demonstrations, half of which are wrong. Only training prompts
are used, one document per row, each followed by the end-of-sequence token. One CPU core is enough.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents import reward_modelling
from agents.learner import Learner, LearnerConfig
from lmgym.io import printable
from lmgym.models import LanguageModel
from lmgym.preferences import Comparison, SimulatedAnnotator, collect_comparisons
from lmgym.reward import RewardModel
from lmgym.tasks import Arithmetic, Completion, Prompt, Reverse, RuleTask, Sentiment, Sort, Split, Task
from lmgym.tasks.grammar import continuation, labelled_continuation

SEED = 0
VOCABULARY = 512
POSITIONS = 512
PAD, EOS = "<pad>", "<eos>"

TASKS: tuple[Task, ...] = (Sentiment(), Sort(), Reverse(), Arithmetic())
# Shares of documents. Reviews are longer, so they make up three quarters of the tokens.
SHARES = (0.5, 0.14, 0.14, 0.22)

Document = tuple[Task, Prompt, str]
Row = tuple[list[int], int]
"""Tokens, and how many of the first ones are context only, without a loss."""


def draw_document(task: Task, rng: np.random.Generator, split: Split = "train") -> Document:
    """A prompt and its completion.

    Reviews are mostly positive or mostly negative, and half of them end with a mark out of five. So a model benefits
    from tracking the sentiment while it reads, as models of real text do, and a reward model can use that.
    """
    prompt = task.sample(rng, split)
    if isinstance(task, Sentiment):
        sentences = labelled_continuation(rng, prompt.text, rng.beta(0.4, 0.5))
        text = "".join(f" {sentence}" for sentence, _ in sentences)
        if rng.random() < 0.5:
            text += f" I give it {3 + round(2 * np.mean([sign for _, sign in sentences]))} of 5."
        return task, prompt, text
    return task, prompt, task.demonstrate(prompt, rng)


def draw_corpus(size: int, rng: np.random.Generator) -> list[Document]:
    """Training documents of all tasks, by `SHARES`."""
    return [draw_document(TASKS[kind], rng) for kind in rng.choice(len(TASKS), size=size, p=SHARES)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `<pad>` 0 and `<eos>` 1. Digits stay single; so do the rule tasks' letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """A Llama with random weights from torch's global generator."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.04,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[Row]:
    """Rows of tokens, each ended by `<eos>`. The prompts of rule tasks are random, so they have no loss."""
    prompts = tokenizer([prompt.text for _, prompt, _ in documents])["input_ids"]
    wholes = tokenizer([prompt.text + text for _, prompt, text in documents])["input_ids"]
    rows = []
    for (task, _, _), prompt, whole in zip(documents, prompts, wholes, strict=True):
        assert whole[: len(prompt)] == prompt, "a token spans prompt and completion"
        rows.append(([*whole, 1], len(prompt) if isinstance(task, RuleTask) else 0))
    return rows


def batches(rows: list[Row], tokens: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An infinite sequence of batches (`collate`) of about `tokens` tokens, rows of similar length together."""
    lengths = np.array([len(ids) for ids, _ in rows])
    while True:
        # Noise in the sort key gives other neighbours in each epoch.
        order = np.argsort(lengths + rng.uniform(0, 4, len(rows)))
        groups, group, longest = [], [], 0
        for index in order:
            if group and max(longest, lengths[index]) * (len(group) + 1) > tokens:
                groups.append(group)
                group, longest = [], 0
            group.append(index)
            longest = max(longest, lengths[index])
        groups.append(group)
        for i in rng.permutation(len(groups)):
            yield collate([rows[index] for index in groups[i]])


def collate(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """One right-padded batch: input_ids, attention_mask and labels, each [B, L]; labels are -100 without a loss."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    is_token = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    is_read_only = torch.tensor([[1] * skip + [0] * (width - skip) for _, skip in rows])
    return input_ids, is_token, input_ids.masked_fill((is_token == 0) | (is_read_only == 1), -100)


def pretrain(
    model: LlamaForCausalLM,
    rows: list[Row],
    rng: np.random.Generator,
    steps: int,
    batch_tokens: int = 1536,
    learning_rate: float = 3e-3,
) -> None:
    """AdamW with a short warm-up and a cosine decay to zero; prints the progress."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    model.train()
    start, total = time.monotonic(), 0.0
    for step, (input_ids, is_token, labels) in zip(range(1, steps + 1), batches(rows, batch_tokens, rng), strict=False):
        loss = model(input_ids=input_ids, attention_mask=is_token, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 200 == 0:
            print(f"step {step}/{steps}  loss {total / 200:.3f}  {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
    model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: list[Row]) -> float:
    """Mean loss per learned token, in nats."""
    input_ids, is_token, labels = collate(rows)
    return model(input_ids=input_ids, attention_mask=is_token, labels=labels).loss.item()


@torch.no_grad()
def sample_completions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], max_tokens: int
) -> list[Completion]:
    """Samples at temperature 1."""
    batch = tokenizer([prompt.text for prompt in prompts], return_tensors="pt", padding=True)
    out = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
    )
    completions = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        tokens = row.index(1) + 1 if 1 in row else len(row)
        text = str(tokenizer.decode(row[:tokens], skip_special_tokens=True))
        completions.append(Completion(text, "stop" if 1 in row else "length", tokens))
    return completions


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, size: int = 400
) -> dict[str, dict[str, float]]:
    """Measures quality on test prompts for each task; prints it and some samples."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(2,)))
    results: dict[str, dict[str, float]] = {}
    for task in TASKS:
        documents = [draw_document(task, rng, "test") for _ in range(size)]
        prompts = [prompt for _, prompt, _ in documents]
        wanted = [task.demonstrate(prompt, rng) for prompt in prompts]
        prompt_lengths = [len(ids) for ids in tokenizer([prompt.text for prompt in prompts])["input_ids"]]
        completion_lengths = [len(ids) + 1 for ids in tokenizer(wanted)["input_ids"]]
        samples = sample_completions(model, tokenizer, prompts, 96 if isinstance(task, Sentiment) else 12)
        gold = np.array(task.gold(prompts, samples))
        results[task.name] = {
            "held-out loss": held_out_loss(model, encode(tokenizer, documents)),
            "mean gold": gold.mean().item(),
            "mean gold of demonstrations": np.mean(task.gold(prompts, [Completion(text) for text in wanted])).item(),
            "exact": (gold == 1).mean().item(),
            "ended": np.mean([sample.finish_reason == "stop" for sample in samples]).item(),
            "prompt tokens, most": max(prompt_lengths),
            "completion tokens, mean": np.mean(completion_lengths).item(),
            "completion tokens, 99%": np.percentile(completion_lengths, 99).item(),
            "sampled tokens, 99%": np.percentile([sample.tokens for sample in samples], 99).item(),
        }
        print(task.name, {name: round(value, 3) for name, value in results[task.name].items()})
        for prompt, sample in zip(prompts[:5], samples[:5], strict=True):
            print(printable(f"    {prompt.text} |{sample.text}"))
    return results


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights, configuration and tokenizer, without paths of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Whoever samples chooses the sampling parameters.
    (folder / "generation_config.json").unlink(missing_ok=True)
    _edit_json(folder / "config.json", drop=("_name_or_path",))
    # The class that every version of transformers knows.
    _edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, drop=("backend",))
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes files readable by their owner only; these are installed for all users


def _edit_json(file: Path, changes: Mapping[str, Any] | None = None, drop: Sequence[str] = ()) -> None:
    content = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(content | dict(changes or {}), indent=2, sort_keys=True) + "\n")


def train_reward_model(lm: LanguageModel, folder: Path, comparisons: int = 6000, test: int = 500) -> None:
    """Trains the reward model of the Sentiment task from simulated comparisons of generated reviews, and saves it."""
    task, rng = Sentiment(), np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(3,)))

    def compare(count: int, split: Split, annotator: SimulatedAnnotator, skip_ties: bool) -> list[Comparison]:
        prompts = [task.sample(rng, split) for _ in range(count)]
        groups = [[Completion(continuation(rng, p.text, rng.uniform(0.1, 0.8))) for _ in range(2)] for p in prompts]
        return collect_comparisons(task, prompts, groups, annotator, rng, skip_ties)

    model = RewardModel.from_language_model(lm, rank=16, alpha=32, seed=SEED)
    learner = Learner(model.parameters(), LearnerConfig(lr=3e-3), SEED)
    train = compare(comparisons, "train", SimulatedAnnotator(), False)
    held_out = compare(test, "test", SimulatedAnnotator(0.0, 1e6), True)
    for step, metrics in enumerate(reward_modelling.train(model, train, held_out, learner, reward_modelling.Config())):
        if step % 20 == 0 or "accuracy/test" in metrics:
            print(f"reward model, step {step}", {name: round(value, 3) for name, value in metrics.items()}, flush=True)
    samples = [task.sample(rng) for _ in range(400)]
    reward_modelling.normalise(model, [p.text + continuation(rng, p.text, 0.4) for p in samples])
    model.save_adapter(folder)


def main() -> None:
    """Makes everything, in order, and prints how good it is."""
    parser = argparse.ArgumentParser(description="Makes the models that ship with lmgym.")
    parser.add_argument("out_dir", type=Path, help="the folder to put tiny/ and tiny-reward/ into")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of pretraining")
    parser.add_argument("--documents", type=int, default=100_000, help="documents in the corpus")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    corpus_rng, order_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(SEED).spawn(2))
    documents = draw_corpus(arguments.documents, corpus_rng)
    tokenizer = train_tokenizer([prompt.text + text for _, prompt, text in documents])
    rows = encode(tokenizer, documents)
    model = new_model()
    print(
        f"{len(rows)} documents, {sum(len(ids) for ids, _ in rows)} tokens; {model.num_parameters()} parameters",
        flush=True,
    )
    pretrain(model, rows, order_rng, arguments.steps)
    save(model, tokenizer, arguments.out_dir / "tiny")
    measure(model, tokenizer)
    train_reward_model(LanguageModel(model, tokenizer, "tiny"), arguments.out_dir / "tiny-reward")


if __name__ == "__main__":
    main()
