"""Resuming an interrupted run: whether its folder holds the same run, and putting back what its checkpoint holds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agents.runs.files import read_config
from agents.runs.randomness import GlobalGenerators, generators_name
from agents.training import State, Stateful

OPTIONS_THAT_MAY_CHANGE = ("out", "resume", "threads", "track", "limits", "processes", "plan")
"""Options that a resumed run may have otherwise: they change nothing but rounding."""
ENVIRONMENT = {
    "revision": "the revision",
    "versions": "the versions",
    "hardware": "the hardware",
    "threads": "the threads",
    "ranks": "the number of ranks",
}
"""Entries of config.json that may change while a run is interrupted, but may change its bits; and their names."""
REMEDY = "nothing was changed. Choose another --out, or remove it first"


@dataclass
class RunState:
    """What a checkpoint holds about the run as a whole.

    Attributes:
        stage: the stage that it is in the middle of; "" between two stages.
        step: steps of that stage that are done.
        row: the metrics of the last of them.
        complete: whether the run is finished.
        metrics_bytes: length of metrics.jsonl.
        seconds: time that the run took until then.
        finished: for each finished stage, its "result" and the SHA-256 of its "outputs", by name.
        last_rows: the last metrics of each stage that was tracked to its end.
        warnings: what the user was warned of.
    """

    stage: str = ""
    step: int = 0
    row: Mapping[str, float] = field(default_factory=dict)
    complete: bool = False
    metrics_bytes: int = 0
    seconds: float = 0.0
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    last_rows: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def state(self) -> State:
        return State(asdict(self))

    @classmethod
    def of(cls, state: State) -> "RunState":
        """The inverse of `state`; a checkpoint may hold anything, so the caller must expect any error of a wrong type.

        Raises:
            ValueError: a number is missing or is not one.
        """
        data = state.data
        return cls(
            stage=str(data["stage"]),
            step=state.count("step"),
            row=data["row"],
            complete=bool(data["complete"]),
            metrics_bytes=state.count("metrics_bytes"),
            seconds=float(state.number("seconds", 0.0)),
            finished={
                stage: {"result": done["result"], "outputs": {**done["outputs"]}}
                for stage, done in data["finished"].items()
            },
            last_rows={stage: {**row} for stage, row in data["last_rows"].items()},
            warnings=list(data["warnings"]),
        )


class Resumption:
    """The checkpoint that an interrupted run continues from. Each stage takes its parts from it, in the run's order.

    Args:
        state: the whole checkpoint.
    """

    def __init__(self, state: State):
        self.run = RunState.of(state.part("run"))
        self.reached = False
        self._state = state
        self._restored: set[str] = set()

    def restore(self, stage: str, parts: Mapping[str, Stateful]) -> tuple[int, Mapping[str, float]]:
        """Puts a stage's parts back, each once.

        Returns:
            Steps of the stage that are done, and the last metrics of it; 0 and nothing if it begins again.
        """
        if self.reached:
            return 0, {}
        interrupted_here = self.run.stage == stage
        for name, part in parts.items():
            known = name in self._state.data and name not in self._restored
            if known and (interrupted_here or stage in self.run.last_rows):
                part.restore(self._state.part(name))
                self._restored.add(name)
        if not interrupted_here:
            return 0, {}
        self.reach()
        return self.run.step, self.run.row

    def passes(self, stage: str) -> None:
        """A finished stage is skipped; if the run was interrupted right after it, the run continues from here."""
        if not self.reached and not self.run.stage and stage == list(self.run.finished)[-1]:
            self.reach()

    def reach(self) -> None:
        """The run is where it was interrupted: from here on it does what it would have done."""
        GlobalGenerators().restore(self._state.part(generators_name(self._state.data)))
        self.reached = True


def check_same_run(
    folder: Path, config: Mapping[str, Any], resume_command: str, defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Checks that a folder holds a run with this configuration; nothing in it is changed.

    Args:
        folder: not empty.
        config: what config.json would be if the run began now.
        resume_command: the command that resumes the run in the folder.
        defaults: the values of options that the run does not record, because it was made before they existed.

    Returns:
        What has changed that may change the run's bits: versions, hardware, code.

    Raises:
        ValueError: it holds no run, or another one, or the files that it reads have changed.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is not an empty folder: {REMEDY}")
    old = read_config(folder)
    found = differences(_with_defaults(old.get("options"), defaults or {}), config["options"])
    if found:
        raise ValueError(
            f"{str(folder)!r} holds another run ({'; '.join(found[:3])}): {REMEDY}; or resume that one: "
            f"{resume_command}"
        )
    inputs = old.get("inputs")
    inputs = inputs if isinstance(inputs, dict) else {}
    changed = [name for name, digest in config["inputs"].items() if inputs.get(name) != digest]
    data = [name for name in changed if not name.endswith(".py")]
    if data:
        raise ValueError(
            f"{data[0]} has changed since the run in {str(folder)!r} began, so the run cannot be resumed: restore the "
            "file, or start again with another --out"
        )
    was = {"ranks": 1} | old  # a run that was made before there were ranks
    return [ENVIRONMENT[name] for name in ENVIRONMENT if was.get(name) != config[name]] + changed


def _with_defaults(options: Any, defaults: Mapping[str, Any]) -> Any:
    """Recorded options, with the defaults of those that are missing."""
    if not isinstance(options, dict):
        return options
    nested = {name: value for name, value in defaults.items() if isinstance(value, Mapping)}
    return {**defaults, **options, **{name: _with_defaults(options.get(name, {}), nested[name]) for name in nested}}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """In words, the options in which two runs differ, without `OPTIONS_THAT_MAY_CHANGE`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in sorted({*old, *new}) if name or key not in OPTIONS_THAT_MAY_CHANGE]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    return [] if old == new else [f"{name} is {old!r} there, and {new!r} here"]


@contextmanager
def foreign_checkpoint(folder: Path) -> Iterator[None]:
    """Turns the errors that reading a checkpoint raises when its checksum is right, but its contents are not a run's.

    Raises:
        ValueError: one sentence that names the folder.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise ValueError(
            f"the checkpoint in {str(folder)!r} is intact, but it is not of this run ({reason})"
        ) from error
