"""Building what an algorithm's `train` takes, and a rehearsal: one update before anything expensive is trained."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from agents.learner import Learner
from agents.pipeline.options import Algorithm, Options, RLOptions, Setting, SFTOptions
from agents.training import OnBadStep
from lmgym.env import TokenVectorEnv
from lmgym.models import Example, load
from lmgym.policy import Policy
from lmgym.preferences import Comparison
from lmgym.reward import Score
from lmgym.tasks.base import ScoreFunction, Split, Task
from lmgym.tasks.probe import Tree


@dataclass(frozen=True)
class TrainingSetup:
    """What `build_training` made.

    Attributes:
        policy: a language model with an adapter, and the critic that the algorithm needs.
        env: `rl.rows` rows of training prompts; it pays KL in the form that the algorithm needs.
        learner: the optimizer of the policy's parameters.
        setting: what they were made from.
        score: what the environment pays; None: the task's score.
    """

    policy: Policy
    env: TokenVectorEnv
    learner: Learner
    setting: Setting
    score: Score | ScoreFunction | None

    def evaluation_env(self, rows: int) -> TokenVectorEnv:
        """Rows of held-out prompts, which pay KL to the reference in the reward, however the algorithm is trained."""
        return _env(self.setting, rows, "test", "sampled", self.env.kl_controller, self.policy.temperature, self.score)

    def train(self, module: ModuleType, config: Any, **extra: Any) -> Iterator[dict[str, float]]:
        """An algorithm's updates; nothing of it runs before the first one is requested.

        Args:
            module: the algorithm.
            config: its `Config`.
            **extra: the values of `train`'s further arguments.

        Raises:
            ValueError: its `train` does not yield.
        """
        rows = module.train(self.policy, self.env, self.learner, config, **extra)
        if not isinstance(rows, Iterator):
            raise ValueError(
                f"`train` of the algorithm {module.__name__.rpartition('.')[2]!r} returned "
                f"{type(rows).__name__} and must be a generator: `yield` a dict of metrics after each update"
            )
        yield from rows


def build_training(
    setting: Setting,
    rl: RLOptions,
    config: Any = None,
    score: Score | ScoreFunction | None = None,
    *,
    policy: Policy | None = None,
    learner: type[Learner] = Learner,
    on_bad_step: OnBadStep = "stop",
    say: Callable[[str], object] | None = None,
) -> TrainingSetup:
    """Makes a policy, its environment and its learner.

    Args:
        setting: task, model and seed.
        rl: rows, adapter, critic, sampling, β and optimizer.
        config: the algorithm's `Config`; its `env_kl`, if there is one, is the form of KL that the environment pays.
        score: what the environment pays; None: the task's score.
        policy: an existing policy; by default an adapter "policy" is added to the setting's model: a new one, or a copy
            of `setting.from_adapter`.
        learner: its class.
        on_bad_step: as in `Learner`.
        say: as in `Learner`.
    """
    if policy is None:
        if setting.from_adapter is None:
            setting.lm.adapters.add("policy", rl.lora_rank, 2 * rl.lora_rank, setting.seed)
        else:
            setting.lm.adapters.load(setting.from_adapter, "policy")
        policy = Policy(setting.lm, "policy", rl.temperature, rl.critic, setting.seed, rl.top_k, rl.top_p)
    kl = getattr(config, "env_kl", "sampled")
    env = _env(setting, rl.rows, "train", kl, rl.controller(), policy.temperature, score)
    factors = dict.fromkeys(policy.critic_parameters(), rl.critic_lr_factor)
    made = learner(policy.parameters(), rl, setting.seed, lr_factors=factors, on_bad_step=on_bad_step, say=say)
    return TrainingSetup(policy, env, made, setting, score)


def _env(
    setting: Setting,
    rows: int,
    split: Split,
    kl: str,
    beta: Any,
    temperature: float,
    score: Score | ScoreFunction | None,
) -> TokenVectorEnv:
    return setting.env(rows, split, kl=kl, beta=beta, temperature=temperature, score=score)


def demonstrations(task: Task, split: Split, count: int, seed: int) -> list[Example]:
    """Draws prompts that the task can demonstrate, and has it demonstrate them.

    Raises:
        NotImplementedError: it can demonstrate none.
    """
    task = task.demonstrated()
    rng = np.random.default_rng(np.random.SeedSequence((seed, 1, split == "test")))
    prompts = [task.sample(rng, split) for _ in range(count)]
    return [Example.of(prompt, task.demonstrate(prompt, rng)) for prompt in prompts]


def rehearse(algorithm: Algorithm) -> None:
    """Runs one update on a model of six tokens, so that impossible settings are refused before anything is trained.

    Raises:
        ValueError: the algorithm refuses its settings, or it is not an algorithm.
    """
    rl, lm = algorithm.rl, load("probe")
    budgets = {"max_prompt_tokens": 4, "max_new_tokens": 3}
    setting = Setting(Tree(), lm, budgets, teacher=Policy(lm, None, rl.temperature))
    comparisons = [Comparison("a", ("b", "c")), Comparison("b", ("d", "a"))]
    extra = extra_values(setting, Options(sft=SFTOptions(examples=2)), algorithm, comparisons)
    setup = build_training(setting, rl, algorithm.config)
    next(setup.train(algorithm.module, algorithm.config, **extra), None)


def extra_values(
    setting: Setting, options: Options, algorithm: Algorithm, comparisons: Sequence[Comparison] | None
) -> dict[str, Any]:
    """The values of an algorithm's `extra_arguments`; None for an optional one that is not available.

    Raises:
        ValueError: `train` requires an argument that nobody here can provide.
        NotImplementedError: it requires demonstrations, and the task has none.
    """
    return {
        name: _extra_value(name, optional, setting, options, algorithm, comparisons)
        for name, optional in algorithm.extra_arguments.items()
    }


def _extra_value(
    name: str,
    optional: bool,
    setting: Setting,
    options: Options,
    algorithm: Algorithm,
    comparisons: Sequence[Comparison] | None,
) -> Any:
    match name:
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
        f"`train` of the algorithm {algorithm.name!r} requires the argument {name!r}, which lmgym train cannot "
        "provide: it has comparisons, examples and a teacher. Give the argument a default, or call train() yourself"
    )
