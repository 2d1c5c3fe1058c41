"""Help without importing torch: the list of commands, and the options of each, from a table in a file."""

import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from agents.cli.commands import COMMANDS
from agents.cli.options import option_value

TABLE = Path(__file__).with_name("options.json")
NAMES = 26
"""Width of the column with the options' names."""
WITH_ALGORITHM = ("train", "plan", "sweep")
"""Commands that take the options of an algorithm."""


def overview() -> str:
    """What `lmgym --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    first = "lmgym COMMAND ...: reinforcement learning on small language models"
    return "\n".join([first, "", *lines, "", "lmgym COMMAND --help lists the options of a command."])


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for the short help."""
    return any(argument in ("-h", "--help") for argument in argv)


@cache
def options_table() -> dict[str, Any]:
    """The options of all commands and built-in algorithms, which `agents.tools.make_option_table` writes.

    "commands" has, for each command, "shown", the names of the options of the short help, and "options": name, default,
    values and help of every option but those of algorithms, which are in "algorithms".
    """
    return json.loads(TABLE.read_text(encoding="utf-8"))


def first_sentence(text: str) -> str:
    """The first sentence of a help text."""
    return re.split(r'(?<=[.])\s+(?=["`A-Z\d])', text)[0]


def short_help_text(command: str, argv: Sequence[str] = ()) -> str:
    """The most used options of a command, each with the first sentence of its help and its default.

    Args:
        command: a command of the table.
        argv: the rest of the command line; `--algorithm` decides which algorithm's options apply.
    """
    table = options_table()["commands"][command]
    known = {row[0]: row for row in [*table["options"], *options_table()["algorithms"]["ppo"]]}
    shown = [known[name] for name in table["shown"]]
    another = command == "train" and named_algorithm(argv) != "ppo"
    if another:
        shown = [row for row in shown if not row[0].startswith("--ppo.")]
    lines = _head(command, shown)
    for name, default, _, text in shown:
        lines += _row(name, f"{first_sentence(text)} (default: {default})" if default else first_sentence(text))
    lines += _row("--help-all", "Show all options.")
    if another:
        lines += ["", "The options of this algorithm are listed by --help-all, under its name."]
    return "\n".join(lines)


def all_help_text(command: str, argv: Sequence[str]) -> str | None:
    """Every option of a command with its whole help; None if the table does not have them.

    Args:
        command: a command.
        argv: the rest of the command line. The table has the options of built-in algorithms only.
    """
    found, algorithm = options_table(), named_algorithm(argv)
    if command not in found["commands"] or algorithm not in found["algorithms"]:
        return None
    rows = found["commands"][command]["options"]
    if command in WITH_ALGORITHM:
        rows = [*rows, *found["algorithms"][algorithm]]
    lines, group = _head(command, rows), ""
    for name, default, values, text in rows:
        prefix, dot, _ = name.removeprefix("--").partition(".")
        if dot and prefix != group:
            lines += ["", f"{prefix}:"]
        group = prefix if dot else group
        note = "; ".join(note for note in (values, f"default: {default}" if default else "") if note)
        lines += _row(name, f"{text} ({note})" if note else text)
    return "\n".join(lines)


def named_algorithm(argv: Sequence[str]) -> str:
    """The algorithm that a command line names; "ppo" by default."""
    return option_value(argv, "--algorithm") or "ppo"


def _head(command: str, rows: Sequence[Sequence[str]]) -> list[str]:
    usage = ["usage: lmgym", command]
    usage += [f"[{row[0]}]" if row[1] else row[0] for row in rows if not row[0].startswith("-")]
    return [" ".join([*usage, "[OPTIONS]"]), "", COMMANDS[command], ""]


def _row(name: str, text: str) -> list[str]:
    width = min(110, max(60, shutil.get_terminal_size().columns))
    wrapped = textwrap.wrap(text, width - NAMES - 2) or [""]
    indented = [" " * (NAMES + 2) + line for line in wrapped]
    if len(name) >= NAMES:
        return [f"  {name}", *indented]
    return [f"  {name:{NAMES}}{wrapped[0]}", *indented[1:]]
