"""The command line: `lmgym COMMAND ...`. The only room that turns names into objects.

Importing it is light, so that help answers without importing torch: each command's module imports what it needs, and is
itself imported when its command is known.
"""

import sys
from collections.abc import Sequence

from agents.cli.commands import COMMANDS, USER_ERRORS, did_you_mean, run_command
from agents.cli.help import all_help_text, asks_for_help, overview, short_help_text
from agents.cli.ranks import run_on_ranks
from lmgym import __version__
from lmgym.io import first_line, printable, tolerate_characters

__all__ = ["COMMANDS", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0 for success; 2 for an error that the user can correct, after one line on stderr that says
        how; 3, 130 or 143 for a run that stopped early.
    """
    tolerate_characters()
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help", "--help-all", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        return _fail(
            f"unknown command {command!r}.{did_you_mean(command, COMMANDS)} `lmgym --help` lists the commands."
        )
    if asks_for_help(rest):
        print(short_help_text(command, rest))
        return 0
    if "--help-all" in rest and (text := all_help_text(command, rest)) is not None:
        print(text)
        return 0
    try:
        status = run_on_ranks(command, rest, _describe)
        return run_command(command, rest) if status is None else status
    except (Exception, KeyboardInterrupt) as error:
        return _fail(*_describe(error))


def _fail(message: str, status: int = 2) -> int:
    print(f"lmgym: {printable(message)}", file=sys.stderr)
    return status


def _describe(error: BaseException) -> tuple[str, int]:
    """The message and the exit status of an error that a user may meet; raises any other error again."""
    if isinstance(error, USER_ERRORS):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        # A run puts the status of the signal there.
        return "stopped without saving", error.args[0] if error.args else 130
    # These import torch, which has already been imported wherever these errors come from.
    from agents.runs import Stopped
    from agents.training.nonfinite import out_of_memory
    from lmgym.ranks import RankFailed

    said = first_line(error)
    if isinstance(error, Stopped):
        return said, error.status
    if isinstance(error, RankFailed):
        return said, 2
    if not out_of_memory(error):
        raise error
    if not said.startswith("memory ran out"):
        said = f"memory ran out ({said}): take fewer or shorter completions, or a smaller model"
    return said, 2
