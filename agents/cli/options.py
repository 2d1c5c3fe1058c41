"""Options: what the commands share, and how a command line becomes a dataclass. Imports no torch."""

import dataclasses
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from agents.cli.commands import COMMANDS
from lmgym.io import printable


@dataclass(frozen=True)
class Common:
    """Options of every command that loads a language model."""

    task: tyro.conf.Positional[str] = "Sentiment"
    """A registered environment, such as "Sentiment" or "lmgym/Sort-v0"; `lmgym envs` lists them."""
    model: str = ""
    """Language model: "tiny", "probe", a folder, or a name on the Hugging Face hub. By default, the model of the
    environment."""
    pad_token: str | None = None
    """Replaces the padding token of the tokenizer. A new token is added to the vocabulary. It is never necessary: any
    token fills rows up."""
    prompts: str | None = None
    """Your own prompts instead of the task's: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt; also .gz), a saved
    data set, or OWNER/NAME[:CONFIG[:SPLIT]] on the hub. Rows have "prompt" or "messages" (docs/data.md)."""
    test_prompts_file: str | None = None
    """Held-out prompts of your own, in the same forms, such as the test split of a benchmark: none of them is trained
    on. By default, a fifth of --prompts, chosen by a hash of the text."""
    fields: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="field")] = ()
    """OLD=NEW reads the field OLD of your data as NEW: --field question=prompt. "instruction+input=prompt" joins two.
    May be repeated."""
    opening_words: int | None = None
    """Rows of --prompts hold whole texts in the field "text": the first N words are the prompt, the rest is a
    demonstration. Shorter texts are left out."""
    chat: bool = False
    """Give each text prompt to the model as a user's message, by its chat template. Prompts that are conversations
    always use it."""
    system: str | None = None
    """Instruction that comes first in every conversation; implies --chat."""
    chat_template: str | None = None
    """Jinja file with a chat template, instead of the tokenizer's own."""
    template_options: str = ""
    """Values of the chat template's variables, as JSON, such as '{"enable_thinking": false}'."""
    gold: str | None = None
    """Gold score of your own prompts: "package.module:function" or "FILE.py:function", such as
    lmgym.tasks.answers:last_number; "trl:FILE.py:function" is a reward function in TRL's form."""
    max_prompt_tokens: int | None = None
    """Longest prompt, in tokens. A longer prompt is an error (see --long-prompts)."""
    max_new_tokens: int | None = None
    """Token budget: the most tokens in a completion. By default, the budget of the environment."""
    long_prompts: Literal["error", "truncate"] = "error"
    """What to do with a prompt that is too long: "error" stops, "truncate" keeps its last tokens."""
    missing_eos_score: float | Literal["task", "none"] = "task"
    """Score of a completion that reaches the token budget: a number, "task" for the rule of the task, or "none" to
    score its text."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """"cpu", "cuda", or "auto", which uses CUDA if there is a GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Log-probabilities are always float32."""
    threads: int = 0
    """CPU threads of torch; 0 chooses. It takes one thread for a model of fewer than five million parameters, and
    otherwise one for each idle core. On an idle machine, more threads can be faster for small models too; but where
    another process uses a core, two threads on two cores are many times slower than one."""


def parse(command: str, kind: Any, argv: Sequence[str], default: Any = None) -> Any:
    """Makes an instance of a dataclass from the options of a command.

    Args:
        command: the name of the command.
        kind: the dataclass.
        argv: the command line after the name of the command.
        default: an instance of `kind` whose values hold where `argv` gives none.

    Raises:
        ValueError: a dataclass refused its values (in `__post_init__`).
        SystemExit: status 2 after a message about unknown options or malformed values; status 0 after --help-all.
    """
    more = {} if default is None else {"default": default}

    def parsed(line: Sequence[str]) -> Any:
        line = ["--help" if argument == "--help-all" else argument for argument in line]
        said = StringIO()
        try:
            with redirect_stderr(said):
                return tyro.cli(
                    kind, prog=f"lmgym {command}", description=_description(command, kind), args=line, **more
                )
        except SystemExit as stopped:
            refused = _refusal(stopped)
            if refused is not None:
                raise refused from None
            sys.stderr.write(said.getvalue())
            raise

    shown = [printable(argument) for argument in argv]
    if shown != list(argv):
        parsed(shown)  # tyro's messages quote the command line: parse it first without terminal control characters
    return parsed(argv)


def _description(command: str, kind: Any) -> str:
    """What a command does; a further word, as in `lmgym label stats`, has its own docstring."""
    return COMMANDS.get(command) or str(kind.__doc__).partition("\n")[0]


def _refusal(stopped: SystemExit) -> ValueError | None:
    """The error of a dataclass's own check, which tyro turned into a message and an exit."""
    error = stopped.__context__
    while error is not None:
        checks = (frame.name == "__post_init__" for frame in traceback.extract_tb(error.__traceback__))
        if isinstance(error, ValueError) and any(checks):
            return error
        error = error.__context__
    return None


@contextmanager
def importable(module: ModuleType) -> Iterator[None]:
    """Lets tyro find a module that was loaded from a file: it reads its annotations through `sys.modules`."""
    name = module.__name__
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def option_value(argv: Sequence[str], name: str) -> str | None:
    """The value of an option that must be known before the whole command line can be parsed."""
    for i, argument in enumerate(argv):
        if argument == name and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def last_value(argv: Sequence[str], name: str) -> str | None:
    """The value of an option that holds if it is given several times."""
    values = [option_value(argv[i : i + 2], name) for i in range(len(argv))]
    return next((value for value in reversed(values) if value is not None), None)


def without_options(argv: Sequence[str], values: Mapping[str, int]) -> list[str]:
    """A command line without some options.

    Args:
        argv: the command line.
        values: the options to leave out, such as "--jobs", and how many values each has.
    """
    kept, skip = [], 0
    for argument in argv:
        name, has_value, _ = argument.partition("=")
        if skip:
            skip -= 1
        elif name in values:
            skip = values[name] - bool(has_value)
        else:
            kept.append(argument)
    return kept


def field_names(fields: Sequence[str]) -> dict[str, str]:
    """New names of fields by old ones, from the values of --field.

    Raises:
        ValueError: a value has another form, or two have the same name.
    """
    found: dict[str, str] = {}
    for given in fields:
        old, _, new = given.partition("=")
        if not old or not new:
            raise ValueError(
                f"--field {given} is not OLD=NEW: give the name in your data first, such as question=prompt"
            )
        if old in found or new in found.values():
            raise ValueError(f"--field {given}: the name {old if old in found else new!r} is given twice")
        found[old] = new
    return found


def note(message: str) -> None:
    """Tells the user something that is no error, on stderr."""
    print(f"lmgym: {printable(message)}", file=sys.stderr)


def check_numbers(options: Any) -> None:
    """Refuses negative counts and floats that are not finite. The settings of a user's own algorithm are not checked.

    Raises:
        ValueError: it names the option.
    """
    for f in dataclasses.fields(options):
        value, option = getattr(options, f.name), f"--{f.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value) and type(value).__module__.startswith(("agents.", "types")):
            check_numbers(value)
        elif isinstance(value, int) and value < 0:
            raise ValueError(f"{option} {value} is negative: give 0 or more")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} {value} is not finite: give a finite number")
