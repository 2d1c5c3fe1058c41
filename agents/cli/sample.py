"""`lmgym sample`: completions of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from agents.cli.finished import parse_with_run
from agents.cli.names import policy_in, setting_of
from agents.cli.options import Common
from agents.pipeline.samples import unscored
from lmgym.io import printable
from lmgym.rollout import RolloutBuffer, Stream, decode


@dataclass(frozen=True)
class Sample(Common):
    """Print completions of a model."""

    task: tyro.conf.Positional[str] = "Sentiment"
    """Folder of a finished run, whose options and models then apply; or a registered environment, such as "Sort"."""
    policy: str | None = None
    """Folder of an adapter, trained on --model; or the folder of a run. "None", the default without a run, samples from
    the model itself."""
    temperature: float = 1.0
    """Sampling temperature; lower values give more probable texts."""
    count: int = 5
    """Number of completions."""
    prompt: str | None = None
    """Text to continue, instead of the task's prompts."""


def run(argv: Sequence[str]) -> int:
    """Prints each prompt and its completion, with "…" where the token budget ended it."""
    wanted, _ = parse_with_run("sample", Sample, argv, ("policy", "temperature"))
    setting = setting_of(wanted, "default", scored=False)
    policy = policy_in(wanted.policy, setting.lm, wanted.temperature)
    env = setting.env(wanted.count, "test", kl="none", temperature=wanted.temperature, score=unscored)
    prompts = None if wanted.prompt is None else [setting.task.prompt_from(wanted.prompt)] * wanted.count
    decode(policy, env, RolloutBuffer.like(env), Stream(wanted.seed, 0), prompts)
    for prompt, completion in zip(env.prompts, env.completions(), strict=True):
        end = "" if completion.finish_reason == "stop" else " …"
        print(f"{printable(prompt.text)}|{printable(completion.text)}{end}")
    return 0
