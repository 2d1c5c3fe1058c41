"""Speed of rollouts and of a PPO update on the built-in model, beside transformers' `generate` in the same process.

    python -m benchmarks.rollout

The two are timed in turn, so that a machine that gets slower slows both; quote the ratio.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from agents.run import hardware, revision
from lmgym.tasks import Sentiment

ROWS, STEPS, REPEATS = 64, 48, 5


def seconds(action: Callable[[], object]) -> float:
    """How long an action takes."""
    began = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Times both sides in turn and prints a table."""
    lm = lmgym.load("tiny", device="cuda" if torch.cuda.is_available() else "cpu")
    lm.add_adapter("policy", rank=8)
    policy = lmgym.Policy(lm)
    env = lmgym.TokenVectorEnv(
        ROWS,
        task=Sentiment(scorer=lambda prompts, completions: [0.0] * len(completions)),
        model=lm,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS - 1,  # equal lengths, so that both sides do the same work
        kl="sampled",
    )
    buffer = lmgym.RolloutBuffer.like(env)

    def rollout() -> None:
        lmgym.collect(policy, env, buffer, lmgym.Stream(0, 0))

    def generate() -> None:
        with torch.inference_mode(), lm.using("policy"):
            lm.model.generate(
                input_ids=env.prompt_ids,
                attention_mask=env.prompt_mask.long(),
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=True,
                top_k=0,
                output_scores=True,
                return_dict_in_generate=True,
            )

    learner = Learner(policy.parameters(), LearnerConfig())
    updates = ppo.train(policy, env, learner, ppo.Config(updates=REPEATS + 1))
    times: dict[str, list[float]] = {"rollout, reference and score": [], "transformers generate": [], "PPO update": []}
    actions = (rollout, generate, lambda: next(updates))
    for repeat in range(REPEATS + 1):
        for samples, action in zip(times.values(), actions, strict=True):
            taken = seconds(action)
            if repeat:  # the first warms up
                samples.append(taken)
    table = Table("what", "median s", "least", "most", "tokens per s", "× generate")
    base = statistics.median(times["transformers generate"])
    for name, samples in times.items():
        median = statistics.median(samples)
        row = (median, min(samples), max(samples), ROWS * STEPS / median, base / median)
        table.add_row(name, *(f"{x:.3f}" if x < 100 else f"{x:.0f}" for x in row))
    console = Console()
    console.print(f"{ROWS} rows x {STEPS} tokens, {hardware()}, revision {revision()}, torch {torch.__version__}")
    console.print(table)


if __name__ == "__main__":
    main()
