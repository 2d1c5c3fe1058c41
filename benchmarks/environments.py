"""The peers' virtual environments, made from exact pins in a folder that git ignores."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".bench"
PINS = ROOT / "benchmarks" / "peers"


def python(name: str) -> str:
    """The interpreter of an environment, which is set up if needed; "" means the project's own.

    torch is installed first, at the project's own pin: a peer's requirements would install the newest build, with
    gigabytes of CUDA libraries. `TORCH_FLAGS` is passed to its installation, as in the Makefile.
    """
    if not name:
        return sys.executable
    folder, pins = HOME / name, PINS / f"{name}.txt"
    interpreter, stamp = folder / "bin" / "python", folder / ".installed"
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    digest = hashlib.sha256(torch.encode() + pins.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return str(interpreter)
    print(f"setting up {name} in {folder.relative_to(ROOT)}: takes minutes, only once", flush=True)
    if not interpreter.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(interpreter), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *os.environ.get("TORCH_FLAGS", "").split(), torch], check=True)
    subprocess.run([*install, "--no-deps", "-r", str(pins)], check=True)
    stamp.write_text(digest)
    return str(interpreter)


def variables(threads: int) -> dict[str, str]:
    """The environment variables of a contender: threads pinned to cores, no downloads, no telemetry."""
    pinned = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return os.environ | pinned | quiet | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
