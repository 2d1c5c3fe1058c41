"""`lmgym preferences`: comparisons by simulated annotators."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from agents.cli.folder import open_run, recorded, with_recorded_options
from agents.cli.names import setting_of
from agents.cli.options import Common, parse
from agents.pipeline import Options, PreferenceOptions, gather_preferences


@dataclass(frozen=True)
class Preferences(Common):
    """Comparisons by simulated annotators, who judge by the task's gold score."""

    out: str = "runs/preferences"
    """Folder of the run, as in `lmgym train`."""
    preferences: PreferenceOptions = field(default_factory=PreferenceOptions)


def run(argv: Sequence[str]) -> int:
    """Samples completions and writes the comparisons."""
    argv = with_recorded_options("preferences", Preferences.out, argv)
    wanted = parse("preferences", recorded(Preferences), argv)
    setting = setting_of(wanted, "default")
    with open_run("preferences", wanted, argv) as run:
        gather_preferences(setting, Options(preferences=wanted.preferences), run)
        run.complete()
        run.say(f"comparisons: {run.path('preferences.jsonl')}, held out: {run.path('preferences_test.jsonl')}")
    return 0
