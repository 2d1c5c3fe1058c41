"""The import rules that import-linter cannot say: what a module may import, as a list of the allowed.

The other rules are contracts in pyproject.toml; `test_contracts_bite` shows that each of them fails when broken.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# file -> the packages outside the standard library that it may import
MAY_IMPORT = {
    "agents/functional.py": {"torch", "jaxtyping"},
}

# name of the contract -> a file of the repository and the line that breaks it
VIOLATIONS = {
    "lmgym never imports agents": ("lmgym/env/vector.py", "import agents.functional"),
    "Layers of lmgym": ("lmgym/policy.py", "import lmgym.env"),
    "The fused pass knows no model library": ("lmgym/fused/head.py", "import transformers"),
    "Tasks, files and preferences are plain Python": ("lmgym/tasks/base.py", "import lmgym.models"),
    "Layers of agents": ("agents/sft.py", "import agents.ppo"),
    "Only cli imports tyro": ("agents/ppo.py", "import tyro"),
    "Only integrations import other RL libraries": ("agents/ppo.py", "import stable_baselines3"),
    "Only labelling imports a web server": ("agents/ppo.py", "import starlette"),
    "Only report imports matplotlib": ("agents/ppo.py", "import matplotlib.pyplot"),
    "Only models, reward and tools import transformers": ("lmgym/env/vector.py", "import peft"),
    "No import circle": ("lmgym/rollout/buffer.py", "import lmgym.rollout.cuda_graph"),
}


def imported_packages(source: str) -> set[str]:
    """The top-level packages imported anywhere in a source, the standard library left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("a relative import" if node.level else (node.module or "").split(".")[0])
    return names - sys.stdlib_module_names


def imported_modules(source: str) -> set[str]:
    """The full names of the modules, or of what is taken from them, that are imported anywhere in a source."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    taken = {f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    return names | taken


def test_only_distributed_imports_torch_distributed() -> None:
    assert "torch.distributed" in imported_modules("from torch import distributed")
    users = {
        path.parent.relative_to(ROOT).as_posix()
        for room in ("lmgym", "agents")
        for path in (ROOT / room).rglob("*.py")
        if any(name.startswith(("torch.distributed", "accelerate")) for name in imported_modules(path.read_text()))
    }
    assert users == {"agents/distributed"}


@pytest.mark.parametrize("path", MAY_IMPORT)
def test_imports_only_what_is_allowed(path: str) -> None:
    assert imported_packages((ROOT / path).read_text()) <= MAY_IMPORT[path]


def test_imported_packages_sees_every_form() -> None:
    source = "import math, numpy.linalg as la\nfrom . import x\ndef f():\n    from lmgym.env import TokenEnv"
    assert imported_packages(source) == {"numpy", "a relative import", "lmgym"}


def lint_imports(root: Path) -> str:
    """The report of import-linter on the tree at `root`."""
    run = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"],
        cwd=root,
        env={"PYTHONPATH": str(root), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    return run.stdout + run.stderr


def test_contracts_bite(tmp_path: Path) -> None:
    """Break every contract at once in a copy of the tree, and see each of them reported."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("lmgym", "agents"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    for path, line in VIOLATIONS.values():
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{line}\n")

    report = lint_imports(tmp_path)

    for name in VIOLATIONS:
        lines = [line for line in report.splitlines() if line.startswith(name)]
        assert any(line.rstrip().endswith("BROKEN") for line in lines), report
    assert f"0 kept, {len(VIOLATIONS)} broken" in report


REPLACED = {
    "Bottom", "Captured", "Keeps", "Packed", "StaticLoop", "clip_share", "descend", "keeps", "kept_bytes",
    "old_kl_nats", "refusal", "settle",
}  # fmt: skip
"""Names that said nothing, and that standard terms replaced; see CHANGELOG.md."""
LIMITS = {"class": 300, "methods": 24, "function": 60, "file": 500}


def definitions(path: Path) -> list[ast.ClassDef | ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))]


@pytest.mark.parametrize("room", ["lmgym", "agents"])
def test_sizes_and_names(room: str) -> None:
    """No file, class or function grows beyond what a reader holds, and no replaced name comes back."""
    for path in (ROOT / room).rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LIMITS["file"], path
        for node in definitions(path):
            lines, kind = (node.end_lineno or 0) - node.lineno + 1, type(node).__name__
            assert lines <= LIMITS["class" if kind == "ClassDef" else "function"], (
                f"{path}: {node.name} has {lines} lines"
            )
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            assert kind != "ClassDef" or len(methods) <= LIMITS["methods"], f"{path}: {node.name}"
            assert node.name not in REPLACED, f"{path}: {node.name}"


def test_the_limits_bite(tmp_path: Path) -> None:
    long = tmp_path / "long.py"
    long.write_text("def settle():\n" + "    pass\n" * 60)
    (node,) = definitions(long)
    assert (node.end_lineno or 0) - node.lineno + 1 > LIMITS["function"]
    assert node.name in REPLACED
