"""Peak memory and time of every stage of the pipeline, at its defaults, each stage in a process of its own.

    python -m benchmarks.memory                            # a Llama of 135 M parameters, float32
    python -m benchmarks.memory --dtype bfloat16 --stages ppo dpo
    python -m benchmarks.memory --checkpointing            # with gradient checkpointing

Prompts have 16 tokens and completions 48, as in the other benchmarks. A stage takes two steps (`ppo` and `grpo`: one
update of 64 completions with one epoch). The peak is that of the whole process, libraries included. The time is the
processor's, of the last step.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import torch

import lmgym
from agents import dpo, grpo, ppo, reward_modelling, sft
from agents.learner import Learner
from agents.pipeline import RLOptions, Setting, build_training
from agents.pipeline.options import RewardOptions, SFTOptions, rank_for
from agents.runs.machine import hardware, revision
from benchmarks import environments
from benchmarks.ours import Prompts
from benchmarks.shapes import make
from benchmarks.worker import peak_resident, resident
from lmgym.models import Example
from lmgym.preferences import Comparison
from lmgym.reward import RewardModel, Score

STAGES = ("sft", "reward", "ppo", "grpo", "dpo")
NEW_TOKENS = 48


class World:
    """The model of a shape, and texts for every stage.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = make(options.shape, environments.HOME / "models")
        self.lm = lmgym.load(str(self.folder / "policy"), dtype=options.dtype)
        ids = json.loads((self.folder / "prompts.json").read_text())
        self.prompts = [self.lm.text.decode(row) for row in ids]
        words = [" ".join(self.prompts[i : i + NEW_TOKENS // 16]) for i in range(len(self.prompts))]
        self.completions = [" " + text for text in words]

    def more(self) -> dict[str, Any]:
        """The options of a learner that the command line sets."""
        return {"gradient_checkpointing": True} if self.options.checkpointing else {}

    def sft(self) -> Iterator[Any]:
        config = SFTOptions(**self.more())
        rank = rank_for(self.lm, config.lora_rank)
        if rank:
            self.lm.adapters.add("sft", rank, 2 * rank)
        adapter = "sft" if rank else None
        parameters = self.lm.adapters.parameters("sft") if rank else list(self.lm.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        examples = [Example(p, c) for p, c in zip(self.prompts, self.completions, strict=True)][:64]
        yield from sft.train(self.lm, examples, [], Learner(parameters, config), config, adapter)

    def comparisons(self, count: int, each: int) -> list[Comparison]:
        """Rankings of random completions."""
        texts = self.completions
        return [Comparison(self.prompts[i], tuple(texts[each * i : each * (i + 1)])) for i in range(count)]

    def reward(self) -> Iterator[Any]:
        config = RewardOptions(**self.more())
        rank = rank_for(self.lm, config.lora_rank)
        model = RewardModel.from_language_model(self.lm, rank, 2 * rank)
        learner = Learner(model.parameters(), config)
        yield from reward_modelling.train(model, self.comparisons(16, 4), [], learner, config)

    def rl(self, module: Any, config: Any, defaults: Any, score: Any = None, **extra: Any) -> Iterator[Any]:
        setting = Setting(Prompts(self.prompts), self.lm, {"max_prompt_tokens": 16, "max_new_tokens": NEW_TOKENS})
        rl = RLOptions(**{"rows": self.options.rows, **defaults, **self.more()})
        setup = build_training(setting, rl, config, score)
        yield from setup.train(module, config, **extra)

    def score(self) -> Score:
        """A reward model of the same size."""
        reward = RewardModel.load(self.folder / "reward")
        reward.model.to(dtype=self.lm.model.dtype)
        return Score({"reward_model": reward})

    def ppo(self) -> Iterator[Any]:
        yield from self.rl(ppo, ppo.Config(1, epochs=1), ppo.DEFAULTS, self.score())

    def grpo(self) -> Iterator[Any]:
        yield from self.rl(grpo, grpo.Config(1), {}, self.score())

    def dpo(self) -> Iterator[Any]:
        yield from self.rl(dpo, dpo.Config(), {}, comparisons=self.comparisons(32, 2))


def run(options: argparse.Namespace) -> dict[str, float]:
    """One stage, in this process."""
    imported = resident()
    world = World(options)
    loaded, seconds = resident(), []
    began = time.process_time()
    for _ in islice(getattr(world, options.stage)(), 2):
        seconds.append(time.process_time() - began)
        began = time.process_time()
    return {"imports_mb": imported, "loaded_mb": loaded, "peak_mb": peak_resident(), "processor_seconds": seconds[-1]}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Peak memory and time of the stages.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--shape", default="L")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=64, help="completions of a rollout")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # in the process of one stage
    return parser.parse_args()


def main() -> None:
    """Measures the stages, and prints a line for each."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.stage:
        print(json.dumps(run(options)))
        return
    print(f"{hardware()}; revision {revision()}; {datetime.now(UTC):%Y-%m-%d}; {options.dtype}")
    for stage in options.stages:
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--stage", stage]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ, cwd=environments.ROOT
        )
        if done.returncode:
            print(f"{stage:8} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{stage:8} " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
