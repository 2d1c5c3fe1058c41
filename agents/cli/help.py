"""Help without importing torch: the list of commands, and the most used options of each command."""

import shutil
import textwrap
from collections.abc import Sequence

from agents.cli.commands import COMMANDS
from agents.cli.short_help import OPTIONS

NAMES = 26
"""Width of the column with the options' names."""


def overview() -> str:
    """What `lmgym --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    first = "lmgym COMMAND ...: reinforcement learning on small language models"
    return "\n".join([first, "", *lines, "", "lmgym COMMAND --help lists the options of a command."])


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for the short help."""
    return any(argument in ("-h", "--help") for argument in argv)


def short_help_text(command: str, argv: Sequence[str] = ()) -> str:
    """The most used options of a command, each with the first sentence of its help and its default.

    Args:
        command: a command of the table.
        argv: the rest of the command line; `--algorithm` decides which algorithm's options apply.
    """
    rows = list(OPTIONS[command])
    another = command == "train" and _another_algorithm(argv)
    if another:
        rows = [row for row in rows if not row[0].startswith("--ppo.")]
    usage = ["usage: lmgym", command]
    usage += [f"[{name}]" if default else name for name, default, _ in rows if not name.startswith("-")]
    lines = [" ".join([*usage, "[OPTIONS]"]), "", COMMANDS[command], ""]
    for name, default, sentence in rows:
        lines += _row(name, f"{sentence} (default: {default})" if default else sentence)
    lines += _row("--help-all", "Show all options.")
    if another:
        lines += ["", "The options of this algorithm are listed by --help-all, under its name."]
    return "\n".join(lines)


def _another_algorithm(argv: Sequence[str]) -> bool:
    """Whether the command line names an algorithm other than PPO."""
    following = [*argv[1:], ""]
    names = [value for option, value in zip(argv, following, strict=True) if option == "--algorithm"]
    names += [option.partition("=")[2] for option in argv if option.startswith("--algorithm=")]
    return bool(names) and names[0] != "ppo"


def _row(name: str, text: str) -> list[str]:
    width = min(110, max(60, shutil.get_terminal_size().columns))
    wrapped = textwrap.wrap(text, width - NAMES - 2) or [""]
    indented = [" " * (NAMES + 2) + line for line in wrapped]
    if len(name) >= NAMES:
        return [f"  {name}", *indented]
    return [f"  {name:{NAMES}}{wrapped[0]}", *indented[1:]]
