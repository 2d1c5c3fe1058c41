"""The machine and the software of a run: versions, revision, hardware, memory."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("lmgym", "torch", "transformers", "peft", "gymnasium", "stable-baselines3", "numpy")


def versions() -> dict[str, str]:
    """The installed versions of the packages that results depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def revision() -> str:
    """The git revision of the code, marked "-dirty" if the code differs from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def hardware(threads: int | None = None) -> str:
    """A description of the machine: GPU if there is one, processor, threads (None: those of this process)."""
    cores = f"{_processor()}, torch threads: {threads or torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


def peak_memory(known: float = 0.0) -> str:
    """The peak memory of this process, in words.

    Args:
        known: bytes of a peak that was measured, after which the system's own figure began anew.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"peak memory on the GPU: {max(known, torch.cuda.max_memory_allocated()) / 2**20:.0f} MB"
    try:
        import resource
    except ImportError:  # not on Windows
        return "peak memory: unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory: {max(known, peak) / 2**20:.0f} MB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()} ({platform.machine()}, {os.cpu_count()} cores)"
