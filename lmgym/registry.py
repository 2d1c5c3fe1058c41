"""The registry of environments: id, task, model, budgets. Importing it does not import torch.

An environment whose results could change gets a new version suffix.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from lmgym.reasoning_names import READ_NAMES, RUN_CODE

if TYPE_CHECKING:
    from lmgym.env import TokenEnv, TokenVectorEnv
    from lmgym.models import LanguageModel
    from lmgym.tasks.base import Task


@dataclass(frozen=True)
class TaskSpec:
    """A registered environment.

    Attributes:
        id: the Gymnasium id, "namespace/Name-v0".
        task: makes the task; a callable, or "module:name".
        summary: one line for `lmgym envs`.
        model: the default model.
        reward_model: the default reward model, for a task that has no score of its own.
        arguments: budgets and other default arguments of `TokenVectorEnv`.
    """

    id: str
    task: "Callable[[], Task] | str"
    summary: str
    model: str = "tiny"
    reward_model: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


TASK_SPECS: dict[str, TaskSpec] = {}
REASONING = "reasoning/"
"""Namespace of the data sets of reasoning-gym."""
ENTRY_POINT_GROUP = "lmgym.tasks"
"""The group of entry points with which other packages register tasks."""
PROBE_TASKS = (
    ("Bandit", "one token, known optimum", 1),
    ("Tree", "up to three tokens, known optimum, with a decoy", 3),
)
"""The tasks of `lmgym.tasks.probe`: class, summary, token budget."""
LETTER_TASKS = (
    ("ScaledBandit", "one letter, scores up to 100", 1),
    ("SmallBandit", "one letter, scores up to 0.01", 1),
    ("NoisyTree", "up to three letters, with noise on the score", 3),
    ("FirstLetter", "many letters, of which only the first one counts", 16),
    ("Password", "exactly one text scores, and a decoy pays a little", 3),
    ("Goodhart", "a score that comes apart from the gold score", 4),
    ("Count", "write as many letters as the prompt says, and stop", 5),
    ("FewPrompts", "letters in order, after 16 training prompts", 3),
    ("Both", "two objectives, of which the lower one counts", 5),
    ("Alternate", "letters of two kinds must alternate for long", 16),
)
"""The tasks of `lmgym.tasks.letters`, likewise."""
TUNING_TASKS = (
    ("Pairs", "adjacent letters pay or cost something", 4),
    ("NoisyPairs", "the same with noise on the score", 4),
    ("LargePairs", "the same with ten times the score", 4),
    ("Successors", "continue the alphabet from the prompt's letter", 4),
    ("LastLetter", "only the last letter counts, and the length", 5),
    ("Palindrome", "read the same in both directions", 5),
    ("Twice", "write one letter twice: most texts score nothing", 4),
    ("Balance", "write a long text with given shares of the letters", 16),
)
"""The tasks of `lmgym.tasks.tuning`, likewise."""


def register_task(
    id: str,
    task: "Callable[[], Task] | str",
    *,
    summary: str = "",
    model: str = "tiny",
    reward_model: str | None = None,
    **arguments: Any,
) -> None:
    """Registers an environment for a task, so that `gymnasium.make(id)` and `lmgym train id` find it.

    Args:
        id: a Gymnasium id such as "me/Haiku-v0".
        task: a class or function that makes the task, or "module:name", which is imported when it is needed.
        summary: one line for `lmgym envs`.
        model: the default model.
        reward_model: the default reward model, for a task that has no score of its own.
        **arguments: defaults of `lmgym.TokenVectorEnv`'s arguments, such as max_new_tokens.

    Raises:
        ValueError: the id is taken.
    """
    if id in TASK_SPECS:
        raise ValueError(f"the environment {id!r} is already registered: choose another name or version")
    TASK_SPECS[id] = TaskSpec(id, task, summary, model, reward_model, arguments)
    gym.register(
        id,
        entry_point="lmgym.registry:make",
        vector_entry_point="lmgym.registry:make_vec",
        kwargs={"entry": id},  # not "id", which is an argument of gymnasium.make itself
    )


def find_spec(name: str) -> TaskSpec:
    """Finds a registered environment by its id, or one of lmgym's own by its bare name ("Sentiment").

    Raises:
        ValueError: there is none. The message suggests similar names and lists all ids.
    """
    for id in (name, f"lmgym/{name}", f"lmgym/{name}-v0"):
        if id in TASK_SPECS:
            return TASK_SPECS[id]
    listed = [id for id in TASK_SPECS if not id.startswith(REASONING)]
    raise ValueError(
        f"no task {name!r}.{_did_you_mean(name)} Registered are: {', '.join(sorted(listed))}, and {REASONING}NAME for "
        "each data set of reasoning-gym (`lmgym envs`). To register your own, call lmgym.register_task(id, TaskClass) "
        "in a module that is imported first"
    )


def _did_you_mean(name: str) -> str:
    """A sentence with the ids that are most similar to a misspelt name; empty if none is similar."""
    bare = {_bare_name(id): id for id in TASK_SPECS}
    similar = difflib.get_close_matches(_bare_name(name), bare, n=3)
    return f" Did you mean {' or '.join(bare[match] for match in similar)}?" if similar else ""


def _bare_name(id: str) -> str:
    """An id without namespace and version, in lower case."""
    return id.rpartition("/")[2].partition("-v")[0].lower()


def make_task(spec: TaskSpec) -> "Task":
    """Makes the task of a registered environment.

    Raises:
        ValueError: the module or name does not exist, or does not make a Task.
    """
    from lmgym.tasks.base import Task

    make = spec.task
    if isinstance(make, str):
        module, _, name = make.partition(":")
        try:
            make = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the environment {spec.id!r} is registered with the task {spec.task!r}, which cannot be imported "
                f"({error}): write it as module:name"
            ) from error
    task = make() if callable(make) else make
    if not isinstance(task, Task):
        raise ValueError(
            f"the environment {spec.id!r} is registered with {spec.task!r}, which makes {task!r}, not an lmgym.Task: "
            "register a subclass of lmgym.Task"
        )
    return task


def default_arguments(spec: TaskSpec, task: "Task") -> dict[str, Any]:
    """The default arguments of an environment: those of its task, overridden by those that it was registered with."""
    return {**task.budgets, **spec.arguments}


def make(entry: str, **arguments: Any) -> "TokenEnv":
    """The entry point of `gymnasium.make`. Takes the arguments of `TokenEnv`; models may be given by name."""
    from lmgym.env import TokenEnv

    return TokenEnv(**env_arguments(entry, arguments))


def make_vec(entry: str, num_envs: int = 1, **arguments: Any) -> "TokenVectorEnv":
    """The entry point of `gymnasium.make_vec`. Takes the arguments of `TokenVectorEnv`; models may be given by name."""
    from lmgym.env import TokenVectorEnv

    return TokenVectorEnv(num_envs, **env_arguments(entry, arguments))


def env_arguments(id: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a registered environment, models loaded.

    Args:
        id: of the environment.
        given: arguments that override its defaults. Models may be given by name, with "device" and "dtype".

    Returns:
        Arguments of `TokenVectorEnv`: task, model, score and others.

    Raises:
        ValueError: there is no such environment, task or model.
    """
    from lmgym.models import load

    spec = find_spec(id)
    task = given.get("task") or make_task(spec)
    arguments = {**default_arguments(spec, task), **given, "task": task}
    device, dtype = arguments.pop("device", "cpu"), arguments.pop("dtype", "float32")
    model: str | LanguageModel = arguments.pop("model", spec.model)
    arguments["model"] = load(model, device=device, dtype=dtype) if isinstance(model, str) else model
    score = arguments.pop("score", None) or spec.reward_model
    if isinstance(score, str):
        from lmgym.reward import Score, load_reward_model

        score = Score({"reward_model": load_reward_model(score, device)})
    arguments["score"] = score
    return arguments


@dataclass(frozen=True)
class _ReasoningTask:
    """Makes the task of a data set of reasoning-gym, whose package is imported only then."""

    name: str

    def __call__(self) -> "Task":
        from lmgym.tasks.reasoning_gym import ReasoningGym

        return ReasoningGym(self.name)


def register_all() -> None:
    """Registers lmgym's own environments, and those of installed packages."""
    register_task(
        "lmgym/Sentiment-v0",
        "lmgym.tasks.sentiment:Sentiment",
        summary="continue an opening so that it reads positive; scored by a learned reward model",
        reward_model="tiny-reward",
        max_prompt_tokens=40,
        max_new_tokens=48,
    )
    for name, summary in (
        ("Sort", "put letters in order"),
        ("Reverse", "write letters backwards"),
        ("Arithmetic", "add two numbers"),
    ):
        register_task(
            f"lmgym/{name}-v0",
            f"lmgym.tasks.{name.lower()}:{name}",
            summary=f"{summary}; scored by a rule",
            max_prompt_tokens=12,
            max_new_tokens=8,
        )
    for module, purpose, tasks in (
        ("probe", "a probe for algorithms", PROBE_TASKS),
        ("letters", "for benchmarks", LETTER_TASKS),
        ("tuning", "for tuning", TUNING_TASKS),
    ):
        for name, summary, steps in tasks:
            register_task(
                f"lmgym/{name}-v0",
                f"lmgym.tasks.{module}:{name}",
                summary=f"{summary}: {purpose}",
                model="probe",
                max_prompt_tokens=4,
                max_new_tokens=steps,
            )
    for name in (*READ_NAMES, *RUN_CODE):
        register_task(
            f"{REASONING}{name}",
            _ReasoningTask(name),
            summary=f"{name.replace('_', ' ')}, of reasoning-gym (the extra [reasoning])",
            max_prompt_tokens=1024,
            max_new_tokens=64,
        )
    # A package registers tasks with entry points: the name is the environment's id, the value "module:TaskClass". Only
    # the names are read here; the module is imported when the environment is made.
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in TASK_SPECS:
            register_task(point.name, point.value, summary=f"from {point.value.partition(':')[0]}")
