"""Writes `agents/cli/options.json` anew from the options of every command: `python -m agents.tools.make_option_table`.

The table exists because reading the options themselves imports torch, which takes seconds. A test compares the two.
"""

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable
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
    step,
    study,
    sweep,
    train,
)
from agents.cli.help import TABLE
from agents.pipeline import load_algorithm as catalog

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

Option = tuple[str, str, str]
"""Of an option: its default (empty if there is none), the values that it takes, and its help."""


def all_options(kind: Any, prefix: str = "--") -> dict[str, Option]:
    """Each option of a dataclass. The positional one is ""; a second one has its name in capitals.

    Args:
        kind: a dataclass, or an instance whose values are the defaults.
        prefix: of the options' names.
    """
    found: dict[str, Option] = {}
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
        values = f"one of: {', '.join(named)}" if (named := _values(hints[field.name])) else ""
        values = f"off: {prefix}no-{name}" if value is True else values
        found[key] = (shown, values, re.sub(r"\s+", " ", helps[0]).strip())
    return found


def _values(hint: Any) -> list[str]:
    """The values that a type names: those of a `Literal` in it."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [value for part in typing.get_args(hint) if not isinstance(part, str) for value in _values(part)]


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


def table() -> dict[str, Any]:
    """What `options.json` must hold: for each command the options of the short help, and all; those of algorithms."""
    commands, algorithms = {}, {}
    for command, shown in SHOWN.items():
        known = all_options(KINDS[command]()) if shown else {}
        first = next((name for name in shown if not name.startswith("--")), "")
        rows = [[name or first, *option] for name, option in known.items()]
        commands[command] = {"shown": list(shown), "options": [row for row in rows if not row[0].startswith("--ppo.")]}
    for name in catalog.available():
        if name in catalog.BUILT_IN:
            known = all_options(train.options_type(name)[0])
            algorithms[name] = [[key, *option] for key, option in known.items() if key.startswith(f"--{name}.")]
    return {"commands": commands, "algorithms": algorithms}


def as_text(made: Any) -> str:
    """JSON with one option in a line."""
    if isinstance(made, dict):
        inner = ",\n".join(f"{json.dumps(key)}: {as_text(value)}" for key, value in made.items())
        return "{\n" + inner + "\n}"
    if made and isinstance(made[0], list):
        return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in made) + "\n]"
    return json.dumps(made, ensure_ascii=False)


if __name__ == "__main__":
    TABLE.write_text(as_text(table()) + "\n", encoding="utf-8")
