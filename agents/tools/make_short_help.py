"""Writes `agents/cli/short_help.py` anew from the options of every command: `python -m agents.tools.make_short_help`.

The table exists because reading the options themselves imports torch, which takes seconds. A test compares the two.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents.cli import (
    benchmark,
    chat,
    check,
    compare,
    evaluate,
    exercise,
    folder,
    label,
    loop,
    merge,
    plan,
    play,
    preferences,
    push,
    relocate,
    repeat,
    report,
    reward,
    sample,
    sft,
    short_help,
    step,
    study,
    sweep,
    train,
)

KINDS: dict[str, Callable[[], type]] = {
    "train": lambda: train.options_type("ppo")[0],
    "plan": lambda: plan.options_type("ppo")[0],
    "sft": lambda: folder.recorded(sft.SFT),
    "preferences": lambda: folder.recorded(preferences.Preferences),
    "label": lambda: label.Label,
    "loop": lambda: loop.Loop,
    "reward": lambda: folder.recorded(reward.Reward),
    "evaluate": lambda: evaluate.Evaluate,
    "sample": lambda: sample.Sample,
    "chat": lambda: chat.Chat,
    "benchmark": lambda: benchmark.Benchmark,
    "study": lambda: study.Study,
    "play": lambda: play.Play,
    "step": lambda: step.Step,
    "exercise": lambda: exercise.ExerciseCommand,
    "report": lambda: report.Report,
    "compare": lambda: compare.Compare,
    "sweep": lambda: sweep.options_type("ppo")[0],
    "check": lambda: check.Check,
    "repeat": lambda: repeat.Repeat,
    "merge": lambda: merge.Merge,
    "push": lambda: push.Push,
    "relocate": lambda: relocate.Relocate,
}
"""The dataclass of each command that has options."""

SHOWN = {
    "train": (
        "TASK", "--model", "--prompts", "--field", "--gold", "--reward", "--preferences", "--algorithm",
        "--ppo.updates", "--ppo.rows", "--ppo.lr", "--ppo.beta", "--max-new-tokens", "--test-prompts",
        "--from-adapter", "--chat", "--seed", "--seeds", "--jobs", "--procs", "--device", "--out", "--resume",
    ),
    "plan": (
        "TASK", "--model", "--prompts", "--gold", "--reward", "--preferences", "--algorithm", "--ppo.updates",
        "--ppo.rows", "--max-new-tokens", "--share", "--alternatives", "--models", "--plan", "--device",
    ),
    "sft": (
        "TASK", "--model", "--prompts", "--field", "--opening-words", "--examples", "--epochs", "--lr", "--lora-rank",
        "--seed", "--device", "--out", "--resume",
    ),
    "preferences": (
        "TASK", "--model", "--prompts", "--gold", "--max-new-tokens", "--preferences.prompts",
        "--preferences.completions", "--preferences.error-rate", "--seed", "--device", "--out", "--resume",
    ),
    "label": (
        "RUN|TASK", "--pairs", "--write", "--db", "--guidelines", "--known", "--count", "--texts", "--until",
        "--labellers", "--overlap", "--ask", "--retrain-every", "--host", "--port", "--simulate.labellers",
    ),
    "loop": (
        "TASK", "--out", "--rounds", "--labels", "--texts", "--label", "--reward", "--train", "--simulate.labellers",
        "--seed",
    ),
    "reward": (
        "--preferences", "--labels", "--test-preferences", "--field", "--model", "--epochs", "--lr", "--lora-rank",
        "--seed", "--device", "--out", "--resume",
    ),
    "evaluate": (
        "RUN|TASK", "--policy", "--model", "--reward", "--prompts", "--gold", "--temperature", "--max-new-tokens",
        "--count", "--seed", "--device",
    ),
    "sample": (
        "RUN|TASK", "--policy", "--model", "--prompts", "--prompt", "--temperature", "--max-new-tokens", "--count",
        "--seed", "--device",
    ),
    "chat": (
        "RUN", "--model", "--policy", "--system", "--temperature", "--max-new-tokens", "--seed", "--device",
    ),
    "play": ("TASK", "--model", "--beta", "--count", "--seed"),
    "step": ("RUN", "--update", "--rows", "--html"),
    "exercise": ("ACTION", "NUMBER", "FILE", "--to", "--step"),
    "envs": (),
    "algorithms": (),
    "benchmark": (
        "SUITE", "--agents", "--seeds", "--tasks", "--jobs", "--shard", "--time-limit", "--retry-failed", "--out",
        "--cells",
    ),
    "study": ("NAME", "--quick", "--out", "--jobs", "--retry-failed"),
    "studies": (),
    "report": ("RUN...",),
    "compare": ("RUN...", "--out"),
    "sweep": (
        "TASK", "--over", "--seeds", "--jobs", "--trials", "--metric", "--algorithm", "--model", "--prompts", "--gold",
        "--reward", "--test-prompts", "--device", "--out",
    ),
    "check": ("FILE", "--skip", "--kl", "--rows", "--lr", "--updates", "--draws", "--allow-shared-prompts"),
    "repeat": ("RUN", "--out"),
    "merge": ("RUN", "OUT", "--policy", "--dtype"),
    "push": ("RUN", "--to", "--policy", "--merged", "--base", "--private"),
    "relocate": ("RUN",),
}  # fmt: skip
"""The options of each command that most users need, in the order in which they are shown; first the positional one."""

HEAD = '''"""Generated by `python -m agents.tools.make_short_help`: the most used options of each command.

Each is a name, a default (empty if there is none), and the first sentence of its help.
"""

# ruff: noqa: E501
# fmt: off
OPTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
'''


def all_options(kind: Any, prefix: str = "--") -> dict[str, tuple[str, str]]:
    """Each option of a dataclass with its default and the first sentence of its help.

    The positional one is ""; a second one has its name in capitals.

    Args:
        kind: a dataclass, or an instance whose values are the defaults.
        prefix: of the options' names.
    """
    found: dict[str, tuple[str, str]] = {}
    hints = typing.get_type_hints(kind if isinstance(kind, type) else type(kind), include_extras=True)
    for field in dataclasses.fields(kind):
        marks = getattr(hints[field.name], "__metadata__", ())
        named = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
        name = (named[0] if named else field.name).replace("_", "-")
        value = getattr(kind, field.name) if not isinstance(kind, type) else _default(field)
        if dataclasses.is_dataclass(value):
            found |= all_options(value, f"{prefix}{name}." if name else prefix)
            continue
        helps = [mark.help for mark in marks if getattr(mark, "help", None)] or [_help(kind, field.name)]
        shown = "" if value in (None, "", (), dataclasses.MISSING) else str(value)
        positional = any("Positional" in str(mark) or "POSITIONAL" in str(mark) for mark in marks)
        key = prefix + name if not positional else name.upper() if "" in found else ""
        found[key] = (shown, first_sentence(helps[0]))
    return found


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _help(kind: Any, name: str) -> str:
    """The docstring below a field, in the class that declares it last."""
    classes = (kind if isinstance(kind, type) else type(kind)).__mro__
    owner = next(c for c in classes if name in inspect.get_annotations(c))
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    body = typing.cast("ast.ClassDef", tree).body
    at = next(i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name)
    return ast.literal_eval(typing.cast("ast.Expr", body[at + 1]).value)


def first_sentence(text: str) -> str:
    """The first sentence of a help text, without line breaks."""
    return re.split(r'(?<=[.])\s+(?=["`A-Z\d])', re.sub(r"\s+", " ", text).strip())[0]


def table() -> dict[str, tuple[tuple[str, str, str], ...]]:
    """What `OPTIONS` must be."""
    made = {}
    for command, shown in SHOWN.items():
        known = all_options(KINDS[command]()) if shown else {}
        made[command] = tuple((name, *known[name if name in known else ""]) for name in shown)
    return made


def main() -> None:
    """Writes the module."""
    lines = []
    for command, rows in table().items():
        lines += [f"    {command!r}: (", *(f"        {row!r}," for row in rows), "    ),"]
    Path(short_help.__file__).write_text(HEAD + "\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
