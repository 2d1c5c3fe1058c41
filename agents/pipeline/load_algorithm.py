"""Which algorithms there are, and how an algorithm of your own is found: any module with `Config` and `train`.

A package offers algorithms by entry points of the group "lmgym.algorithms": the name is the one on the command line,
the value is the module.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

BUILT_IN = (
    "reinforce", "rloo", "a2c", "ppo", "grpo", "nlpo", "expert_iteration", "online_dpo", "dpo", "distill", "best_of_n",
)  # fmt: skip
GROUP = "lmgym.algorithms"
TRAIN_ARGUMENTS = ("policy", "env", "learner", "config")
"""What every `train` takes, by position."""


def available() -> dict[str, str]:
    """Each algorithm's name and module: those of this package, and those of installed packages."""
    found = {name: f"agents.{name}" for name in BUILT_IN}
    return found | {point.name: point.value for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}


def summary(module: str) -> str:
    """The first line of a module's docstring, read without importing the module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return "(not found)"
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or "(no docstring)"
    return docstring.splitlines()[0]


def find(name: str) -> ModuleType:
    """The module of an algorithm: a name of `available`, a dotted module path, or a file.

    Raises:
        ValueError: it does not exist, fails while it is imported, or is not an algorithm.
    """
    module = find_module(name)
    check(module, name)
    return module


def find_module(name: str) -> ModuleType:
    """The same of any module, which may be no algorithm.

    Raises:
        ValueError: it does not exist, or fails while it is imported.
    """
    known = available()
    path = known.get(name, name)
    try:
        if path.endswith(".py"):
            return load_file(path)
        if "." in path or name in known:
            return load_module(path)
        raise ModuleNotFoundError(f"No module named {name!r}")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no algorithm {name!r} ({error}).{hint} Choose from {', '.join(known)}; an algorithm of your own is "
            "package.module or FILE.py, and must be importable from the current directory"
        ) from error


def preset(module: ModuleType, name: str, wanted: str) -> dict[str, Any]:
    """Settings that an algorithm has under a name in its `PRESETS`: those of its `Config`, or of every algorithm.

    A built-in algorithm without `PRESETS` has "tuned" too: nothing did better than its defaults (docs/tuning.md).

    Raises:
        ValueError: it has no such preset.
    """
    presets = getattr(module, "PRESETS", {"tuned": {}} if name in BUILT_IN else {})
    if wanted not in presets:
        raise ValueError(f"the algorithm {name!r} has no preset {wanted!r}; it has {', '.join(presets) or 'none'}")
    return dict(presets[wanted])


def load_module(path: str) -> ModuleType:
    """Imports a module by its dotted path, as `python -m` does: modules in the current directory are found too.

    Raises:
        ModuleNotFoundError: there is no such module.
        ValueError: it raises while it is imported.
    """
    try:
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            here = os.getcwd()
            if not _is_missing(path, error) or here in sys.path or "" in sys.path:
                raise
        # A console script does not look for modules in the current folder.
        sys.path.append(here)  # last, so that no file here hides an installed package
        importlib.invalidate_caches()
        try:
            return importlib.import_module(path)
        except BaseException:
            sys.path.remove(here)
            raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and _is_missing(path, error):
            raise
        raise ValueError(_import_failure(path, error)) from error


def _is_missing(path: str, error: ModuleNotFoundError) -> bool:
    """Whether the module itself, or a package that it is in, is what was not found."""
    return f"{path}.".startswith(f"{error.name}.")


def load_file(path: str | Path) -> ModuleType:
    """Imports a Python file by its path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it raises while it is imported.
    """
    file = Path(path)
    # Of its own for each file; behind the last dot as the file is called, for options and metrics have that name.
    name = f"lmgym_file_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look up a class's module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise ValueError(_import_failure(str(path), error, str(file))) from error
    return module


def _import_failure(name: str, error: Exception, own_file: str = "") -> str:
    """One sentence with the line at which an import failed: the innermost one of the file itself, if it is known."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, f"{type(error).__name__}: {error.msg}"
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        frame = ([f for f in frames if f.filename == own_file] or frames)[-1]
        file, line = frame.filename, frame.lineno
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{name!r} cannot be imported: {reason} ({file}, line {line}). Correct it, or give another one"


def check(module: ModuleType, name: str) -> None:
    """Refuses a module that is not an algorithm.

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
    if tuple(inspect.signature(train).parameters)[:4] != TRAIN_ARGUMENTS:
        signature = ", ".join(inspect.signature(train).parameters)
        raise ValueError(f"`train` of the algorithm {name!r} takes ({signature}): {remedy}")


def extra_arguments(module: ModuleType) -> dict[str, bool]:
    """What `train` takes beyond `TRAIN_ARGUMENTS`, such as "examples" or "teacher", and whether it is optional."""
    parameters = list(inspect.signature(module.train).parameters.values())[len(TRAIN_ARGUMENTS) :]
    return {p.name: p.default is not inspect.Parameter.empty for p in parameters}
