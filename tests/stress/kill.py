"""Kills runs and lets them go on: each must end with the same bits as one that nobody killed.

    python tests/stress/kill.py boundaries FOLDER              # at every boundary between two updates
    python tests/stress/kill.py moments FOLDER SEED COUNT      # at random moments of a whole pipeline

Everything is imported once, and each run is a fork, so that a run costs what it does and not what importing costs.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from agents import cli
from agents.runs import Run, read_state
from agents.runs.compare import results

PIPELINE = [
    "train", "Sentiment", "--max-new-tokens=32", "--test-prompts=4", "--samples=1", "--checkpoint-seconds=0",
    "--sft.examples=16", "--sft.test-examples=4", "--sft.minibatch-rows=4", "--preferences.prompts=12",
    "--preferences.test-prompts=6", "--preferences.completions=2", "--reward.normalise-on=8", "--reward.epochs=1",
    "--ppo.updates=3", "--ppo.rows=4", "--ppo.minibatch-rows=2", "--ppo.kl-target-nats=6", "--ppo.scale-score",
]  # fmt: skip
"""All stages, as short as they can be; β is steered, scores are scaled, so that both are part of what must be kept."""
PPO = [*PIPELINE, "--ppo.updates=12", "--reward=tiny-reward", "--sft.examples=0", "--ppo.reference-refresh=5"]
"""Twelve updates and nothing before them."""


def final(run: Run) -> None:
    """Writes down a digest of all that the last checkpoint before the end holds, but for times."""
    state = read_state(run._checkpoints.all()[-1])
    run_state = {k: v for k, v in state.data["run"].items() if k not in ("seconds", "metrics_bytes")}
    whole = hashlib.sha256(json.dumps(state.data | {"run": run_state}, sort_keys=True).encode())
    for name, tensor in sorted(state.tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    (run.folder / "final.txt").write_text(whole.hexdigest())


def complete(run: Run, kept: Callable[[Run], None] = Run.complete) -> None:
    final(run)
    kept(run)


def start(arguments: list[str], die_at: int = 0) -> int:
    """Forks a run; `die_at` kills it at that boundary of the stage ppo. Returns the process id."""
    child = os.fork()
    if child:
        return child
    log = os.open(os.devnull if not os.environ.get("SHOW") else "/dev/stderr", os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    Run.complete = complete  # pyright: ignore[reportAttributeAccessIssue]
    boundary = Run._after_step

    def fatal(run: Run, stage: str, step: int, *rest: object) -> None:
        if stage == "ppo" and step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        boundary(run, stage, step, *rest)  # pyright: ignore[reportArgumentType]

    Run._after_step = fatal  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = cli.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    os._exit(status)


def ended(child: int) -> int:
    """Waits for a run; its exit status, −9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> dict[str, str]:
    """Digests of everything that a run left."""
    return results(folder) | {"final": (folder / "final.txt").read_text()}


def differing(folder: Path, wanted: dict[str, str]) -> list[str]:
    """What a run that went on left otherwise."""
    found = outcome(folder)
    return [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]


def boundaries(root: Path) -> list[list[str]]:
    """Kills a run of twelve updates at each boundary; what differed, for each."""
    whole = [*PPO, "--out", str(root / "whole")]
    assert ended(start(whole)) == 0
    wanted, found = outcome(root / "whole"), []
    for at in range(1, 13):
        arguments = [*PPO, "--out", str(root / f"killed-{at}")]
        assert ended(start(arguments, die_at=at)) == -signal.SIGKILL
        assert ended(start(arguments)) == 0
        found.append(differing(root / f"killed-{at}", wanted))
        shutil.rmtree(root / f"killed-{at}")
    return found


def moments(root: Path, seed: int, count: int) -> list[list[str]]:
    """Kills a whole pipeline at random moments; what differed, for each."""
    rng, began = random.Random(seed), time.perf_counter()
    assert ended(start([*PIPELINE, "--out", str(root / "whole")])) == 0
    seconds = time.perf_counter() - began
    wanted, found = outcome(root / "whole"), []
    while len(found) < count:
        folder = root / f"killed-{len(found)}"
        arguments = [*PIPELINE, "--out", str(folder)]
        child = start(arguments)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if ended(child) == 0:
            shutil.rmtree(folder)
            continue  # it had ended: not a kill
        if ended(start(arguments)) not in (0, 2) or not (folder / "final.txt").exists():
            found.append(["it did not go on"])
            continue
        found.append(differing(folder, wanted))
        shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    job, folder, *numbers = sys.argv[1:]
    began = time.perf_counter()
    found = boundaries(Path(folder)) if job == "boundaries" else moments(Path(folder), *map(int, numbers))
    print(json.dumps({"found": found, "seconds": time.perf_counter() - began}))
