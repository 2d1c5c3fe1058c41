"""Agents by name: how each turns the world of a run into a policy.

An agent is a function `make(world)` that returns the trained policy. `World` says what it has to work with.

- `ppo`, `grpo`, … the built-in algorithms; `package.module` or `FILE.py` with `Config` and `train`, likewise.
- `package.module` or `FILE.py` with `make(world)`, or an entry point of the group "lmgym.agents".
- `dpo` and `sft` buy completions and learn from them afterwards; `best_of_n` trains nothing and answers with the best
  of `BEST_OF` completions; `sb3_ppo` and `sb3_a2c` are Stable-Baselines3's.
- `reference` (the model before training) and `random` (uniform tokens) are in every table.

Settings follow a colon: `ppo:lr=0.003:epochs=4`. `lr_factor=2` doubles the learning rate of each row instead, and
`preset=tuned` loads what an algorithm has under this name in its `PRESETS`.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from agents.benchmark.measure import BestOf, UniformPolicy
from agents.benchmark.meter import MeteredLearner
from agents.benchmark.offline import buy_comparisons, sft
from agents.benchmark.world import World
from agents.integrations.sb3.training import train_with_sb3
from agents.pipeline import RLOptions, build_training
from agents.pipeline import load_algorithm as catalog
from lmgym.policy import Policy, TokenPolicy

GROUP = "lmgym.agents"
"""The group of entry points with which packages offer agents."""
BASELINES = ("reference", "random")
"""Agents that are in every table."""
BEST_OF = 8
FACTOR = "lr_factor"
"""The setting that multiplies the learning rate of a row."""
OWN = ("sft", "best_of_n", "sb3_ppo", "sb3_a2c")
SB3: Mapping[str, Mapping[str, Any]] = {"ppo": {"n_epochs": 4}, "a2c": {}}
"""Settings that differ from Stable-Baselines3's defaults; PPO's minibatches are a quarter of a rollout."""
Make = Callable[[World], "TokenPolicy | BestOf"]


@dataclass(frozen=True)
class Agent:
    """An agent, ready to run.

    Attributes:
        name: in tables.
        spec: what `find_agent` found it by.
        make: trains a policy in a world.
        config: all that decides how it learns, as JSON data.
    """

    name: str
    spec: str
    make: Make
    config: Mapping[str, Any] = field(default_factory=dict)


def find_agent(spec: str) -> Agent:
    """The agent of a specification, such as "ppo", "ppo:lr=0.003" or "mine.py".

    Raises:
        ValueError: there is no such agent, or a setting is unknown or wrong.
    """
    source, given = _split(spec)
    name = Path(source).stem if source.endswith(".py") else source
    shown = ":".join([name, *(f"{key}={value}" for key, value in given.items())])
    if source.endswith(".py") and name in known_agents():
        raise ValueError(f"the agent {source!r} has the name of another one, {name!r}: rename the file")
    if source in BASELINES or source in OWN:
        return _own(source, spec, shown, given)
    module: Any = _entry_point(source) or catalog.find_module(source)
    hashed = {"file": hashlib.sha256(Path(source).read_bytes()).hexdigest()} if source.endswith(".py") else {}
    make: Any = module if not isinstance(module, ModuleType) else getattr(module, "make", None)
    if make is not None:
        if given:
            raise ValueError(f"the agent {source!r} takes no settings: it is a function make(world)")
        if not callable(make):
            raise ValueError(
                f"`make` of the agent {source!r} is {type(make).__name__}, and must be a function of a world"
            )
        made: Any = make  # whether it takes a world, only a call tells
        return Agent(shown, spec, made, {"spec": spec, **hashed})
    catalog.check(module, source)
    rl, config = _settings(source, module, given)
    stated = {"rl": rl, "config": asdict(config)}
    return Agent(shown, spec, partial(_train, module, config, rl), {"spec": spec, **hashed, **stated})


def find_agents(specs: Sequence[str]) -> list[Agent]:
    """The agents of several specifications, and the baselines.

    Raises:
        ValueError: as `find_agent`; or two have the same name.
    """
    found = [find_agent(spec) for spec in dict.fromkeys([*specs, *BASELINES])]
    names = [agent.name for agent in found]
    twice = next((agent for agent in found if names.count(agent.name) > 1), None)
    if twice:
        raise ValueError(f"two agents are called {twice.name!r}: rename the file of one")
    return found


def known_agents() -> list[str]:
    """The names of all agents that are installed."""
    points = sorted(point.name for point in entry_points(group=GROUP))
    algorithms = [name for name in catalog.available() if name != "best_of_n"]
    return [*dict.fromkeys([*algorithms, *OWN, *BASELINES, *points])]


def _split(spec: str) -> tuple[str, dict[str, str]]:
    """A name or file, and its settings."""
    source, *rest = spec.strip().split(":")
    while rest and "=" not in rest[0]:  # a drive letter, or the function of an entry point
        source = f"{source}:{rest.pop(0)}"
    parts = [part.partition("=") for part in rest]
    given = {key: value for key, _, value in parts}
    if not source or not all(key and equals for key, equals, _ in parts):
        raise ValueError(f"the agent {spec!r} must be NAME or NAME:SETTING=VALUE, such as ppo:lr=0.003")
    return source, given


def _entry_point(name: str) -> Any:
    found = next((point for point in entry_points(group=GROUP) if point.name == name), None)
    if found is None:
        return None
    try:
        return found.load()
    except Exception as error:
        raise ValueError(f"the agent {name!r} ({found.value}) cannot be imported: {error}") from error


def _own(source: str, spec: str, shown: str, given: Mapping[str, str]) -> Agent:
    if source in BASELINES and given:
        raise ValueError(f"the agent {source!r} has no settings")
    if source == "reference":
        return Agent(source, spec, lambda world: Policy(world.model, None, critic="none"), {"spec": spec})
    if source == "random":
        return Agent(source, spec, lambda world: UniformPolicy(world.model.device), {"spec": spec})
    if source == "best_of_n":
        n = _value("n", given.get("n", str(BEST_OF)), BEST_OF)
        if set(given) - {"n"} or n < 2:
            raise ValueError("best_of_n has one setting, n of at least 2, such as best_of_n:n=8")
        return Agent(
            shown, spec, lambda world: BestOf(Policy(world.model, None, critic="none"), n), {"spec": spec, "n": n}
        )
    rl = _options(source, {}, given)
    if source == "sft":
        return Agent(shown, spec, lambda world: sft(world, _of_world(rl, world)), {"spec": spec, "rl": rl})
    algorithm: Any = source.removeprefix("sb3_")
    rl = {"critic": "head", **rl}
    return Agent(shown, spec, partial(_train_sb3, algorithm, rl), {"spec": spec, "rl": rl, **SB3[algorithm]})


def _settings(source: str, module: ModuleType, given: Mapping[str, str]) -> tuple[dict[str, Any], Any]:
    """The options of policy and learner that differ from the defaults, and the algorithm's `Config`."""
    for name, optional in catalog.extra_arguments(module).items():
        if not optional and name != "comparisons":
            raise ValueError(
                f"`train` of the agent {source!r} requires {name!r}, and a benchmark has only comparisons, which the "
                "budget buys: give the argument a default"
            )
    own = {f.name for f in fields(module.Config)}
    preset = catalog.preset(module, source, given["preset"]) if "preset" in given else {}
    config = {key: value for key, value in preset.items() if key in own}
    config |= {key: _value(key, value, getattr(module.Config(), key)) for key, value in given.items() if key in own}
    defaults = dict(getattr(module, "DEFAULTS", {})) | {key: value for key, value in preset.items() if key not in own}
    rest = {key: value for key, value in given.items() if key not in own and key != "preset"}
    return _options(source, defaults, rest, own), module.Config(**config)


def _options(
    source: str, defaults: Mapping[str, Any], given: Mapping[str, str], own: set[str] | None = None
) -> dict[str, Any]:
    known = {f.name: getattr(RLOptions(), f.name) for f in fields(RLOptions)} | {FACTOR: 1.0}
    unknown = next((key for key in [*defaults, *given] if key not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, [*known, *(own or ())], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the agent {source!r} has no setting {unknown!r}.{hint}")
    options = {**defaults, **{key: _value(key, value, known[key]) for key, value in given.items()}}
    rl_options(options)  # checks the ranges
    if FACTOR in options and ("lr" in options or not options[FACTOR] > 0):
        raise ValueError(f"the agent {source!r}: {FACTOR} must be above 0, and lr is not given beside it")
    return options


def _value(name: str, text: str, default: Any) -> Any:
    """The value of a setting, of its default's type."""
    if isinstance(default, str):
        return text
    try:
        value = json.loads(text.lower())
    except ValueError:
        value = text
    match default:
        case bool():
            fits = isinstance(value, bool)
        case int():
            fits = isinstance(value, int) and not isinstance(value, bool)
        case _:  # a float, or None where a float may be given
            fits = isinstance(value, int | float) and not isinstance(value, bool)
            value = float(value) if fits else value
            fits = fits or value is default is None
    if not fits:
        raise ValueError(f"{name}={text} is not of the type of its default, {default!r}")
    return value


def rl_options(settings: Mapping[str, Any], lr: float = RLOptions.lr, beta: float = RLOptions.beta) -> RLOptions:
    """The options of policy and learner that an agent's settings make of a row's learning rate and β."""
    given = dict(settings)
    factor = given.pop(FACTOR, 1.0)
    return RLOptions(**{"lr": lr * factor, "beta": beta, **given})


def _of_world(rl: Mapping[str, Any], world: World) -> RLOptions:
    return rl_options(rl, world.lr, world.beta)


def _train(module: ModuleType, config: Any, rl: Mapping[str, Any], world: World) -> TokenPolicy:
    """Trains with an algorithm: as many updates as the budget allows."""
    options, extra = _of_world(rl, world), catalog.extra_arguments(module)
    more: dict[str, Any] = {name: None for name, optional in extra.items() if optional}
    if extra.get("comparisons") is False:
        more["comparisons"], finished = buy_comparisons(world, options.rows)
        if hasattr(config, "finished"):
            config = dataclasses.replace(config, finished=finished)
    setup = build_training(world.setting(), options, config, learner=MeteredLearner)
    learner: Any = setup.learner
    learner.meter, learner.rollout = world.meter, options.rows * setup.env.max_new_tokens
    for _ in setup.train(module, config, **more):
        world.progress(setup.policy)
    return setup.policy


def _train_sb3(algorithm: Any, rl: Mapping[str, Any], world: World) -> TokenPolicy:
    options = _of_world(rl, world)
    policy = build_training(world.setting(), options).policy
    env = world.env(options.rows, kl="none", autoreset_mode="SameStep")
    train_with_sb3(
        algorithm, policy, env, world.tokens_left, options.beta, world.seed, options.lr,
        lambda: world.progress(policy), **SB3[algorithm],
    )  # fmt: skip
    return policy
