"""`lmgym merge`: the policy of a run as one plain model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from agents.cli.finished import FinishedRun
from agents.cli.options import parse
from agents.runs import model_card
from lmgym.io import atomic, printable
from lmgym.models import DTYPES, LanguageModel, load

PolicyFolder = Literal["policy", "policy_best"]


@dataclass(frozen=True)
class Merge:
    """Merge the policy of a run into its fine-tuned model."""

    run: tyro.conf.Positional[str]
    """Folder of a finished run."""
    out: tyro.conf.Positional[str]
    """Folder of the model: new or empty. Plain transformers loads it."""
    policy: PolicyFolder = "policy"
    """Which policy: the last, or that of the best update."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; by default, that of the run. In bfloat16, merging rounds: the logits differ a little."""


def run(argv: Sequence[str]) -> int:
    """Writes the folder and prints its path."""
    wanted = parse("merge", Merge, argv)
    out = Path(wanted.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{wanted.out!r} is not an empty folder: nothing was changed. Choose another, or remove it first"
        )
    source = trained_run(wanted.run)
    lm = merged_model(source, wanted.policy, wanted.dtype)
    atomic.make_folder(out.parent, parents=True)
    atomic.write_folder(out, lambda aside: write_merged(lm, source.folder, aside))
    print(printable(str(out)))
    return 0


def trained_run(folder: str) -> FinishedRun:
    """A finished run that trained a policy.

    Raises:
        ValueError: the folder holds no run, the run is not finished, or it is one of `lmgym sft`.
    """
    found = FinishedRun.read(Path(folder))
    if found.algorithm is None:
        raise ValueError(f"{folder!r} is a run of `lmgym sft`: its folder `sft` is a whole model already")
    return found


def merged_model(run: FinishedRun, policy: PolicyFolder, dtype: str | None = None) -> LanguageModel:
    """The fine-tuned model of a run with one of its policies merged, in float32, then rounded to `dtype`.

    Raises:
        ValueError: there is no such policy, or the fine-tuned model is not the one that it was trained on.
    """
    if not (run.folder / policy).is_dir():
        raise ValueError(f"the run in {str(run.folder)!r} has no folder {policy!r}")
    lm = load(str(run.folder / "sft"))
    lm.adapters.load(run.folder / policy)
    lm.adapters.merge()
    return lm.to(dtype=DTYPES[dtype or run.wanted.dtype])


def write_merged(lm: LanguageModel, run: Path, folder: Path) -> None:
    """Writes a merged model and its card into a folder."""
    lm.write(folder)
    atomic.write(folder / "README.md", model_card(run, "merged"))
