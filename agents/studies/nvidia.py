"""A narrow small model against a larger one: severity of code reviews (NVIDIA 2024).

NVIDIA's article "Fine-Tuning Small Language Models to Optimize Code Review Accuracy" fine-tunes a model of 8 billion
parameters with LoRA to rate the severity of faults. The labels come from a larger teacher, and examples come in an
order of growing difficulty (a curriculum). The tuned model is 18 % more accurate than before, and more accurate than
models of 70 and 340 billion parameters. It costs less and answers faster. The article says nothing about other tasks.

What differs here: a "report" is the letter a and six more letters. Its severity, from a to d, depends on the sum of
their ranks, and the model writes it as text. Three other tasks, marked by the letters b to d, are outside: write the
next three letters, the same backwards, or the same in alphabetical order. Two models of 17,000 and 68,000 random
parameters learn from the same demonstrations of all four tasks. A tenth of these are reports, of whose labels a fifth
is wrong. Then the small model alone gets a LoRA adapter for reports, from the labels of a teacher. The teacher is
simulated: it is wrong in 5 % of the reports. So the small model sees more and better labels of the narrow task, as in
the article. RL afterwards is GRPO, and pays right severities; the article has none. All tests are on texts that no
model was trained on. Time is processor time for 512 answers in one batch: latency on a large machine is different.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import lmgym
from agents import grpo, sft
from agents.learner import Learner, LearnerConfig
from agents.pipeline import RLOptions, Setting, build_training
from agents.studies.form import Claim, Panel
from agents.studies.token_world import points
from lmgym.models import Example, seeded
from lmgym.policy import Policy
from lmgym.tasks.base import Completion, Prompt, Split, Task, sample_in_split

TITLE = "NVIDIA 2024: a narrow small model against one four times larger"
PAPER = "https://developer.nvidia.com/blog/fine-tuning-small-language-models-to-optimize-code-review-accuracy/"

CLAIMS = (
    Claim("size", "the larger model has about four times the parameters: ratio", 3.5, 4.5, "identity"),
    Claim("narrow", "the small model with teacher labels is more accurate on reports than the larger one: difference",
          low=0.0),
    Claim("outside", "and less accurate outside: difference", high=0.0),
    Claim("gain", "teacher labels make the small model 18 points more accurate on reports", low=0.18),
    Claim("forgotten", "they make it less accurate outside: difference", high=0.0),
    Claim("adapter_off", "without its adapter it is outside as before: difference", 0.0, 0.0, "identity"),
    Claim("curriculum", "easy reports first are better than a random order, at equal steps: difference", low=0.0),
    Claim("rl", "RL makes it still more accurate on reports: difference", low=0.0),
    Claim("time", "the larger model needs more time for an answer: ratio", low=1.0),
    Claim("memory", "and at least three times the memory for its weights, those of the adapter included: ratio",
          low=3.0, kind="identity"),
)  # fmt: skip
PANELS = (
    Panel("labels", "Teacher labels, with LoRA", "optimizer step", "accuracy on reports"),
    Panel("rl", "RL after them", "update", "accuracy on reports"),
    Panel("tasks", "All tasks", "0: reports; 1: copy, 2: backwards, 3: in order", "accuracy"),
)
REPORT, OUTSIDE = "a", "bcd"
BUDGETS: dict[str, Any] = {"max_prompt_tokens": 7, "max_new_tokens": 4}
SMALL, LARGE = 32, 64
"""Hidden sizes of the two models."""
COLD = 0.01
"""Temperature of the tests: nearly always the most probable token."""


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 20
    """Independent models."""
    demonstrations: int = 6400
    """Demonstrations of all tasks."""
    epochs: int = 8
    """Passes over them."""
    labels: int = 3200
    """Reports with a teacher's label."""
    passes: int = 4
    """Passes over these: half of them over the first half of the order, and then over all."""
    updates: int = 30
    """Updates of RL."""
    rows: int = 128
    """Reports per update."""
    tested: int = 512
    """Texts of each test."""


QUICK = Config(seeds=5)
SMOKE = Config(seeds=3, demonstrations=128, epochs=1, labels=128, passes=2, updates=2, rows=32, tested=32)


class Letters(Task):
    """One of some tasks on six letters, marked by the letter before them; 1 for the right answer.

    Args:
        marks: the letters of the tasks that prompts are drawn from.
    """

    name = "reports"
    best = 1.0

    def __init__(self, marks: str):
        self.marks = marks

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return sample_in_split(lambda: Prompt(str(rng.choice(list(self.marks))) + draw_letters(rng)), split)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [float(is_right(p, c)) for p, c in zip(prompts, completions, strict=True)]


def draw_letters(rng: np.random.Generator) -> str:
    """Six letters."""
    return "".join("abcd"[i] for i in rng.integers(4, size=6))


def rank_sum(letters: str) -> int:
    """The sum of the letters' ranks, from 0 for a to 3 for d."""
    return sum("abcd".index(letter) for letter in letters)


LIMITS = (6.5, 8.5, 10.5)
"""Of the sum: above one of these, severity is a step higher."""


def answer(text: str) -> str:
    """The right answer of a task."""
    mark, letters = text[0], text[1:]
    if mark == REPORT:
        return "abcd"[sum(rank_sum(letters) > limit for limit in LIMITS)]
    return {"b": letters[:3], "c": letters[2::-1], "d": "".join(sorted(letters[:3]))}[mark]


def difficulty(text: str) -> float:
    """How near a report is to another severity: the negative distance to the nearest limit."""
    return -min(abs(rank_sum(text[1:]) - limit) for limit in LIMITS)


def is_right(prompt: Prompt, completion: Completion) -> bool:
    """Whether the answer is right and ends."""
    return completion.finish_reason == "stop" and completion.text == answer(prompt.text)


def labelled(rng: np.random.Generator, text: str, error_rate: float) -> Example:
    """A text with its answer; a report with this share of wrong severities."""
    right = answer(text)
    if text[0] == REPORT and rng.random() < error_rate:
        right = str(rng.choice([letter for letter in "abcd" if letter != right]))
    return Example(text, right)


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of one small and one large model."""
    rng, seed = np.random.default_rng(seed), seed % 2**31
    mixture = [
        labelled(rng, Letters(REPORT if i % 10 == 0 else OUTSIDE).sample(rng).text, 0.2)
        for i in range(config.demonstrations)
    ]
    small, large = (pretrained(config, width, mixture, seed) for width in (SMALL, LARGE))
    start = {mark: accuracy(config, small, None, mark) for mark in REPORT + OUTSIDE}
    big = {mark: accuracy(config, large, None, mark) for mark in REPORT + OUTSIDE}

    labels = [labelled(rng, Letters(REPORT).sample(rng).text, 0.05) for _ in range(config.labels)]
    easy_first = sorted(labels, key=lambda example: difficulty(example.prompt))
    shuffled = tuned(config, small, "shuffled", labels, seed)
    curriculum = tuned(config, small, "curriculum", easy_first, seed)
    tasks = {mark: accuracy(config, small, "curriculum", mark) for mark in REPORT + OUTSIDE}
    off = {mark: accuracy(config, small, None, mark) for mark in OUTSIDE}
    size, memory, seconds = measured_sizes(config, small, large)
    rewarded = reinforced(config, small, "curriculum", seed)

    def outside(found: dict[str, float]) -> float:
        return float(np.mean([found[mark] for mark in OUTSIDE]))

    measures = {
        "size": size,
        "narrow": tasks[REPORT] - big[REPORT],
        "outside": outside(tasks) - outside(big),
        "gain": tasks[REPORT] - start[REPORT],
        "forgotten": outside(tasks) - outside(start),
        "adapter_off": outside(off) - outside(start),
        "curriculum": curriculum[-1][1] - shuffled[-1][1],
        "rl": rewarded[-1][1] - rewarded[0][1],
        "time": seconds,
        "memory": memory,
    }
    ends = [curriculum[0][0], curriculum[-1][0]]
    each = {"small": start, "small, teacher labels": tasks, "large": big}
    return {
        "measures": measures,
        "curves": {
            "labels": {"easy first": curriculum, "random order": shuffled, "large": points(ends, [big[REPORT]] * 2)},
            "rl": {"GRPO": rewarded},
            "tasks": {name: points(range(4), list(found.values())) for name, found in each.items()},
        },
    }


def new_model(width: int, seed: int) -> lmgym.LanguageModel:
    """The architecture of the probe model with another width, and random weights."""
    probe = lmgym.load("probe")
    config = copy.deepcopy(probe.model.config)
    config.n_embd, config.n_inner, config.n_positions, config.initializer_range = width, 2 * width, 16, 0.1
    with seeded(seed):
        model = type(probe.model)(config)
    return lmgym.LanguageModel(model, probe.tokenizer, f"letters of width {width}")


def fit(
    lm: lmgym.LanguageModel, examples: Sequence[Example], epochs: int, lr: float, seed: int, adapter: str | None
) -> int:
    """Maximum likelihood of an adapter, or of all weights; returns the number of steps."""
    parameters = lm.adapters.parameters(adapter) if adapter else list(lm.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    learner = Learner(parameters, LearnerConfig(lr=lr), seed)
    steps = list(sft.train(lm, examples, [], learner, sft.Config(epochs, minibatch_rows=64), adapter))
    if adapter is None:
        lm.model.requires_grad_(False)
    return len(steps)


def pretrained(config: Config, width: int, mixture: Sequence[Example], seed: int) -> lmgym.LanguageModel:
    """A new model that has learned from the demonstrations of all tasks."""
    lm = new_model(width, seed)
    fit(lm, mixture, config.epochs, 4e-3, seed, None)
    return lm


def tuned(
    config: Config, lm: lmgym.LanguageModel, adapter: str, labels: Sequence[Example], seed: int
) -> list[list[float]]:
    """A new adapter, trained on the first half of the labels, then on all in as many steps; its accuracy after each."""
    lm.adapters.add(adapter, rank=4, alpha=8, seed=seed)
    curve, steps = [[0.0, accuracy(config, lm, adapter, REPORT)]], 0
    for phase, part in enumerate((labels[: len(labels) // 2], labels)):
        steps += fit(lm, part, config.passes // 2 * (2 - phase), 1e-2, seed + phase, adapter)
        curve.append([float(steps), accuracy(config, lm, adapter, REPORT)])
    return curve


def reinforced(config: Config, lm: lmgym.LanguageModel, adapter: str, seed: int) -> list[list[float]]:
    """GRPO on right severities, from an adapter, which it changes; accuracy every fifth update."""
    rl = RLOptions(lr=1e-3, rows=config.rows, beta=0.0)
    settings = grpo.Config(config.updates, group=8)
    setup = build_training(
        Setting(Letters(REPORT), lm, BUDGETS, seed=seed), rl, settings, policy=Policy(lm, adapter, temperature=1.0)
    )
    curve = [[0.0, accuracy(config, lm, adapter, REPORT)]]
    for number, _ in enumerate(setup.train(grpo, settings), start=1):
        if number % 5 == 0 or number == config.updates:
            curve.append([float(number), accuracy(config, lm, adapter, REPORT)])
    return curve


def accuracy(config: Config, lm: lmgym.LanguageModel, adapter: str | None, marks: str) -> float:
    """Share of right answers to texts that were not trained on, at a temperature near 0."""
    env = answered(config, lm, adapter, marks)
    return float(np.mean([is_right(p, c) for p, c in zip(env.prompts, env.completions(), strict=True)]))


def answered(config: Config, lm: lmgym.LanguageModel, adapter: str | None, marks: str) -> lmgym.TokenVectorEnv:
    """The environment after answers to all tested texts."""
    env = lmgym.TokenVectorEnv(
        config.tested, task=Letters(marks), model=lm, split="test", kl="none", temperature=COLD, **BUDGETS
    )
    policy = Policy(lm, adapter, temperature=COLD)
    lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    return env


def measured_sizes(
    config: Config, small: lmgym.LanguageModel, large: lmgym.LanguageModel
) -> tuple[float, float, float]:
    """Large over small: parameters; bytes of the weights, one adapter included; processor time of the same answers."""

    def seconds(lm: lmgym.LanguageModel, adapter: str | None) -> float:
        taken = []
        for _ in range(3):
            begun = time.process_time()
            answered(config, lm, adapter, REPORT)
            taken.append(time.process_time() - begun)
        return min(taken)

    def size(parameters: Any) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    weights = size(new_model(SMALL, 0).model.parameters())
    extra = size(small.adapters.parameters("curriculum"))
    bytes_of_large = size(large.model.parameters())
    return (
        bytes_of_large / weights,
        bytes_of_large / (weights + extra),
        seconds(large, None) / seconds(small, "curriculum"),
    )
