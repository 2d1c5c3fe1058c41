"""Which algorithms there are, and how one of your own is found: any module with `Config` and `train`.

A package offers algorithms by entry points of the group "lmgym.algorithms": the name is the command line's, the value
the module.
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

BUILT_IN = (
    "reinforce", "rloo", "a2c", "ppo", "grpo", "nlpo", "expert_iteration", "online_dpo", "dpo", "distill", "best_of_n",
)  # fmt: skip
GROUP = "lmgym.algorithms"
GIVEN = ("policy", "env", "learner", "config")
"""What every `train` takes, by position."""


def available() -> dict[str, str]:
    """Each algorithm's name and module: those of this package, and those of installed packages."""
    found = {name: f"agents.{name}" for name in BUILT_IN}
    return found | {point.name: point.value for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}


def summary(module: str) -> str:
    """The first sentence of a module's docstring, read without importing the module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return "(not found)"
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or "(no docstring)"
    return docstring.splitlines()[0]


def find(name: str) -> ModuleType:
    """The module of an algorithm: a name of `available`, a dotted module path, or a file.

    Raises:
        ValueError: there is none, or it has no `Config` and `train` as they are wanted.
    """
    known = available()
    path = known.get(name, name)
    try:
        if path.endswith(".py"):
            module = load_file(path)
        elif "." in path or name in known:
            module = importlib.import_module(path)
        else:
            raise ModuleNotFoundError(f"No module named {name!r}")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no algorithm {name!r} ({error}).{hint} There are {', '.join(known)}; one of your own is given as "
            "package.module or FILE.py, and must be importable from here"
        ) from error
    check(module, name)
    return module


def load_file(path: str | Path) -> ModuleType:
    """Imports a Python file by its path.

    Raises:
        FileNotFoundError: there is no such file.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules[spec.name]
        else:
            sys.modules[spec.name] = before
    return module


def check(module: ModuleType, name: str) -> None:
    """Refuses a module that is no algorithm.

    Raises:
        ValueError: it says what is missing.
    """
    config, train = getattr(module, "Config", None), getattr(module, "train", None)
    remedy = "an algorithm is a module with a dataclass `Config` and a generator `train(policy, env, learner, config)`"
    if not (inspect.isclass(config) and dataclasses.is_dataclass(config)):
        raise ValueError(f"the algorithm {name!r} has no dataclass `Config`: {remedy}")
    none = dataclasses.MISSING
    bare = [f.name for f in dataclasses.fields(config) if f.init and f.default is none and f.default_factory is none]
    if bare:
        raise ValueError(f"`Config` of the algorithm {name!r} has no default for {bare[0]!r}: give every setting one")
    if not callable(train):
        raise ValueError(f"the algorithm {name!r} has no function `train`: {remedy}")
    if tuple(inspect.signature(train).parameters)[:4] != GIVEN:
        given = ", ".join(inspect.signature(train).parameters)
        raise ValueError(f"`train` of the algorithm {name!r} takes ({given}): {remedy}")


def extras(module: ModuleType) -> dict[str, bool]:
    """What `train` takes beyond those four ("examples", "comparisons", "teacher"), and whether it can do without."""
    parameters = list(inspect.signature(module.train).parameters.values())[len(GIVEN) :]
    return {p.name: p.default is not inspect.Parameter.empty for p in parameters}
