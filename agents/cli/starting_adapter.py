"""`lmgym train --from-adapter`: RL that continues from an adapter that exists already."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.cli.names import model_named
from agents.cli.options import option_value
from lmgym.models import check_base, load_base, read_adapter


def adapter_folder(name: str) -> Path:
    """The folder of an adapter; for the folder of a run, that of its policy.

    Raises:
        ValueError: there is no adapter.
    """
    for folder in (Path(name), Path(name) / "policy"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ValueError(
        f"no adapter in {name!r}: give the folder of a LoRA adapter, with adapter_config.json, or of a finished run"
    )


def start_from_adapter(wanted: Any, argv: Sequence[str], stage: str) -> Any:
    """The options of a training run that starts from an adapter: on the adapter's base, which is not fine-tuned.

    Args:
        wanted: its options, with `from_adapter`.
        argv: its command line.
        stage: the name of the algorithm, under which its options are.

    Raises:
        ValueError: there is no such adapter, its base is not there, or an option contradicts it.
    """
    folder = adapter_folder(wanted.from_adapter)
    config, _ = read_adapter(folder, base_changes=False)
    if option_value(argv, "--sft.examples") not in (None, "0"):
        raise ValueError(
            "--sft.examples would change the base that the adapter of --from-adapter belongs to: leave it out. To "
            f"fine-tune further, give --model {folder} instead, which merges the adapter into its base first"
        )
    rank = option_value(argv, f"--{stage}.lora-rank")
    if rank not in (None, str(config.r)):
        raise ValueError(f"--{stage}.lora-rank {rank}: the adapter of --from-adapter keeps its rank, {config.r}")

    def named(base: str) -> str:
        check_base(folder, model_named(base, wanted).model, base)
        return base

    return replace(
        wanted,
        model=wanted.model or load_base(folder, named),
        options=replace(wanted.options, sft=replace(wanted.options.sft, examples=0)),
    )
