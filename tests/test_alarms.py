"""Each alarm is given for what it is about, once, and for nothing else."""

import json
from typing import Any

import pytest
import torch

from agents.pipeline.alarms import WINDOW, Alarms
from agents.training import State

SOUND = {
    "policy/ratio_deviation": 1e-6,
    "kl/token_k3_nats": 1e-4,
    "kl/sequence_nats": 3.0,
    "policy/entropy_nats": 1.0,
    "tokens/unfinished_share": 0.5,
    "score/mean": 0.5,
    "gold/mean": 0.5,
    "watch/mean": 0.5,
    "optimizer/bad_steps": 0.0,
}


def test_a_sound_run_gives_none() -> None:
    alarms = Alarms()
    wobble = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert not [w for x in wobble for w in alarms.check(SOUND | {"score/mean": x, "gold/mean": 0.3 * x + 0.1})]
    assert not Alarms().check({}), "an algorithm that measures nothing"
    assert not Alarms().check({name: float("nan") for name in SOUND})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"policy/ratio_deviation": 0.002}], "away from 1"),
        ([{"kl/token_k3_nats": -0.01}], "never negative"),
        ([{"kl/sequence_nats": 51.0}], "above 50"),
        ([{}, {"policy/entropy_nats": 0.04}], "entropy fell from 1.00 to 0.040"),
        ([{"tokens/unfinished_share": 1.0}] * 3, "no completion of the last three"),
        ([{"score/mean": i / 10, "gold/mean": 1 - i / 10} for i in range(WINDOW)], "while gold/mean fell"),
        ([{"score/mean": i / 10, "watch/mean": 1 - i / 10} for i in range(WINDOW)], "while watch/mean fell"),
        ([{"optimizer/bad_steps": 2.0}], "2 optimizer steps"),
    ],
)
def test_each_alarm_is_given_once_with_its_causes(rows: list[dict[str, float]], said: str) -> None:
    alarms, found = Alarms(), []
    for row in rows * 2:
        found += alarms.check(SOUND | row)
        again = Alarms()
        again.restore(State(json.loads(json.dumps(alarms.state().data))))
        alarms = again
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    "rows",
    [
        [{"tokens/unfinished_share": 1.0}] * 2,
        [{"score/mean": i / 10, "gold/mean": 1 - i / 10} for i in range(WINDOW - 1)],
        [{"score/mean": i / 10, "gold/mean": i / 20} for i in range(2 * WINDOW)],
        [{"score/mean": 1 - i / 10, "gold/mean": 1 - i / 10} for i in range(2 * WINDOW)],
        [{"policy/entropy_nats": 0.01}] * 3,
    ],
)
def test_what_is_no_cause_for_alarm(rows: list[dict[str, float]]) -> None:
    alarms: Any = Alarms()
    assert not [warning for row in rows for warning in alarms.check(SOUND | row)]


def test_low_precision_rounds_more() -> None:
    row = SOUND | {"policy/ratio_deviation": 0.02}
    assert Alarms().check(row)
    assert not Alarms(dtype=torch.bfloat16).check(row)
