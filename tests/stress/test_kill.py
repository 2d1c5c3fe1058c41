"""SIGKILL at every boundary of twelve updates, and at random moments of a whole pipeline: fifty with `full`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.stress, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "job",
    [["boundaries"], ["moments", "0", "10"], pytest.param(["moments", "1", "40"], marks=pytest.mark.full)],
    ids=["boundaries", "moments-0", "moments-1"],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path, job: list[str]) -> None:
    """Adapter, head, moments, generators, β, scales, best policy, metrics, preferences, reward model and evaluation."""
    command = [sys.executable, str(ROOT / "tests" / "stress" / "kill.py"), job[0], str(tmp_path), *job[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["found"]
    print(f"{job}: {found.count([])} of {len(found)} in {json.loads(done.stdout)['seconds']:.0f} s")
    assert len(found) == (int(job[2]) if len(job) > 1 else 12)
    assert found == [[]] * len(found)
