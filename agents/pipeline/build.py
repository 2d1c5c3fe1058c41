"""Building an algorithm's arguments from a setting, and one rehearsal update before anything is trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.learner import Learner
from agents.pipeline.options import Algorithm, Options, Setting, SFTOptions
from lmgym.models import Example, load
from lmgym.policy import Policy
from lmgym.preferences import Comparison
from lmgym.tasks.base import Split, Task
from lmgym.tasks.probe import Tree


def demonstrations(task: Task, split: Split, count: int, seed: int) -> list[Example]:
    """Draws prompts and has the task demonstrate them."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, 1, split == "test")))
    prompts = [task.sample(rng, split) for _ in range(count)]
    return [Example(prompt.text, task.demonstrate(prompt, rng)) for prompt in prompts]


def rehearse(algorithm: Algorithm) -> None:
    """Runs one update in a world of six tokens, so that settings that cannot be are refused before anything is trained.

    Raises:
        ValueError: what the algorithm says.
    """
    rl, config, lm = algorithm.rl, algorithm.config, load("probe")
    lm.adapters.add("policy", rl.lora_rank, 2 * rl.lora_rank)
    policy = Policy(lm, "policy", rl.temperature, rl.critic, top_k=rl.top_k, top_p=rl.top_p)
    arguments: dict[str, Any] = {"max_prompt_tokens": 4, "max_new_tokens": 3, "temperature": rl.temperature}
    setting = Setting(Tree(), lm, arguments, teacher=Policy(lm, None, rl.temperature))
    env = setting.env(rl.rows, kl=getattr(config, "env_kl", "sampled"), beta=rl.controller())
    comparisons = [Comparison("a", ("b", "c")), Comparison("b", ("d", "a"))]
    options = Options(sft=SFTOptions(examples=2))
    extras = {
        extra: extra_argument(extra, optional, setting, options, algorithm, comparisons)
        for extra, optional in algorithm.extras.items()
    }
    next(iter(algorithm.module.train(policy, env, Learner(policy.parameters(), rl), config, **extras)), None)


def extra_argument(
    extra: str,
    optional: bool,
    setting: Setting,
    options: Options,
    algorithm: Algorithm,
    comparisons: Sequence[Comparison] | None,
) -> Any:
    """What an algorithm wants beyond the four arguments of all; None where there is none and it can do without."""
    match extra:
        case "comparisons":
            return comparisons
        case "teacher":
            return setting.teacher
        case "examples":
            try:
                return demonstrations(setting.task, "train", options.sft.examples or 1000, setting.seed)
            except NotImplementedError:
                if optional:
                    return None
                raise
    if optional:
        return None
    raise ValueError(
        f"`train` of the algorithm {algorithm.name!r} wants {extra!r}, which lmgym train cannot give: it has "
        "comparisons, examples and a teacher. Give the argument a default, or call train() yourself"
    )
