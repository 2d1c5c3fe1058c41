"""Nothing in the packages can run what a file holds: no pickles, no eval, no shell; read from the syntax tree."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in ("lmgym", "agents") for path in (ROOT / package).rglob("*.py"))

MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "pdb", "xmlrpc"}
CALLS = {
    "eval", "exec", "compile", "__import__", "breakpoint", "input",
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnl", "os.spawnv", "os.posix_spawn",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.save", "torch.hub.load", "torch.jit.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.save", "numpy.savez", "pandas.read_pickle",
    "tempfile.mktemp",
}  # fmt: skip
# Whatever else they are called on: methods of a module that came under another name.
METHODS = {"read_pickle", "to_pickle", "unsafe_load", "weights_only_unpickler"}
# The flags that make a safe call unsafe, and the only value that they may have.
FLAGS = {"shell": False, "allow_pickle": False, "weights_only": True, "trust_remote_code": False}
# A flag may be passed on from a caller, whose own default is checked.
PASSED_ON = {"trust_remote_code"}


def names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, in full."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def full_name(node: ast.AST, known: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def faults(source: str) -> Iterator[str]:
    """What in a source could run data, each with its line."""
    tree = ast.parse(source)
    known = names(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            modules += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            yield from (f"{line}: import {m}" for m in modules if m.split(".")[0] in MODULES or m in CALLS)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full_name(node, known)
            if name.removeprefix("builtins.") in CALLS or name.rpartition(".")[2] in METHODS:
                yield f"{line}: {name}"
            if name.split(".")[0] in MODULES and isinstance(node, ast.Attribute):
                yield f"{line}: {name}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES - {"code"}:
            yield f"{line}: the name {node.value!r}, by which a module could be imported"
        if isinstance(node, ast.Call):
            flags = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            for flag, only in FLAGS.items():
                value = flags.get(flag)
                passed_on = flag in PASSED_ON and isinstance(value, ast.Name) and value.id == flag
                if (
                    value is not None
                    and not passed_on
                    and not (isinstance(value, ast.Constant) and value.value is only)
                ):
                    yield f"{line}: {flag} is not {only}"
            name = full_name(node.func, known)
            if name in ("torch.load", "numpy.load", "np.load") and "weights_only" not in flags and "torch" in name:
                yield f"{line}: {name} without weights_only=True"
            if name.endswith(".from_pretrained") and "Auto" in name and "trust_remote_code" not in flags:
                yield f"{line}: {name} without trust_remote_code, so that a user may be asked"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args][-len(node.args.defaults) or None :]
            pairs = [
                *zip(arguments, node.args.defaults, strict=False),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            for argument, default in pairs:
                wanted = FLAGS.get(argument.arg)
                if wanted is not None and not (isinstance(default, ast.Constant) and default.value is wanted):
                    yield f"{line}: the default of {argument.arg} is not {wanted}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_data(path: Path) -> None:
    found = list(faults(path.read_text(encoding="utf-8")))
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import marshal as m", "from dill import loads", "import joblib.numpy_pickle", "import shelve",
        "def f():\n    from pickle import load", "import importlib\nimportlib.import_module('pickle')",
        "eval('1')", "exec(x)", "x = eval", "import builtins\nbuiltins.exec('')", "__import__('x')",
        "import os\nos.system('x')", "from os import system", "import os as o\no.popen('x')",
        "import subprocess\nsubprocess.run('x', shell=True)", "import subprocess as s\ns.Popen(x, shell=flag)",
        "import torch\ntorch.load(f)", "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load as l\nl(f)",
        "import torch\ntorch.save(x, f)", "from torch import save", "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f)", "import pandas as pd\npd.read_pickle(f)",
        "A.from_pretrained(x, trust_remote_code=True)",
        "def f(trust_remote_code=True): pass", "def f(*, trust_remote_code=None): pass",
        "from transformers import AutoModel\nAutoModel.from_pretrained(x)", "import numpy\nnumpy.save(f, x)",
    ],
)  # fmt: skip
def test_each_fault_is_seen(source: str) -> None:
    assert list(faults(source)), source


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()", "import re\nre.compile('x')", "import subprocess\nsubprocess.run(['x'], shell=False)",
        "import torch\ntorch.load(f, weights_only=True)", "class C:\n    compile: bool = False",
        "def f(trust_remote_code=False):\n    g(trust_remote_code=trust_remote_code)",
        "self.save(f)", "code = 3", "import numpy as np\nnp.load(f)", "policy.load(x)",
    ],
)  # fmt: skip
def test_what_is_harmless_passes(source: str) -> None:
    assert not list(faults(source))


@pytest.mark.slow
def test_nothing_is_unpickled_by_importing_loading_and_saving(tmp_path: Path) -> None:
    """In a process in which reading a pickle is an error: all modules, both models, a policy there and back."""
    program = f"""
import importlib, pickle, pkgutil, sys
from pathlib import Path

def refuse(*arguments, **options):
    raise AssertionError("a pickle was read")

class Refuses:
    __init__ = load = refuse

pickle.load = pickle.loads = refuse
pickle.Unpickler = pickle._Unpickler = Refuses
import _pickle
_pickle.load = _pickle.loads = refuse
_pickle.Unpickler = Refuses

import agents, lmgym
modules = [m.name for p in (lmgym, agents) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in modules:
    importlib.import_module(name)
lm = lmgym.load("tiny")
lm.adapters.add("policy")
folder = Path({str(tmp_path)!r})
lmgym.Policy(lm, critic="adapter").save(folder / "policy")
again = lmgym.load("tiny")
lmgym.Policy.load(again, folder / "policy")
again.adapters.load(folder / "policy", "other")
reward = lmgym.RewardModel.load("tiny-reward")
reward.save(folder / "reward")
lmgym.RewardModel.load(folder / "reward")
lmgym.load("tiny").save(folder / "model")
lmgym.load(str(folder / "model"))
assert len(modules) > 40, modules
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.stdout.strip().endswith("done"), done.stderr[-2000:]
