"""`lmgym sft`: supervised fine-tuning only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from agents.cli.folder import open_run, recorded, with_recorded_options
from agents.cli.names import setting_of
from agents.cli.options import Common, parse
from agents.pipeline import Options, SFTOptions, fine_tune


@dataclass(frozen=True)
class SFT(Common):
    """Supervised fine-tuning."""

    out: str = "runs/sft"
    """Folder of the run, as in `lmgym train`. The model is saved in its folder `sft`."""
    sft: Annotated[SFTOptions, tyro.conf.arg(name="")] = field(default_factory=SFTOptions)


def run(argv: Sequence[str]) -> int:
    """Fine-tunes a model and saves it."""
    argv = with_recorded_options("sft", SFT.out, argv)
    wanted = parse_options(argv)
    setting = setting_of(wanted, "default", scored=False)
    with open_run("sft", wanted, argv) as run:
        fine_tune(setting, Options(sft=wanted.sft), run)
        run.complete()
        run.say(f"model: {run.path('sft')}")
    return 0


def parse_options(argv: Sequence[str]) -> Any:
    """The options of a fine-tuning run."""
    return parse("sft", recorded(SFT), argv)
