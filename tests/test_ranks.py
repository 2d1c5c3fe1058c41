"""A run of several ranks is the run of one: the same tokens, parameters and metrics; and errors name the rank."""

import json
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import worlds
from conftest import full, slow
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from worlds import Trained, run_world

from agents.distributed import TorchRanks
from agents.runs.ranks import check_same_on_all_ranks
from lmgym.ranks import balanced, in_shares, one, same, shares, tell, using

UPDATES = 3


@pytest.mark.parametrize(("count", "world", "unit"), [(12, 2, 4), (12, 4, 4), (7, 3, 1), (2, 4, 2), (0, 2, 1)])
def test_shares_are_all_rows_in_order_and_keep_groups_together(count: int, world: int, unit: int) -> None:
    found = shares(count, world, unit)
    assert [row for rows in found for row in range(count)[rows]] == list(range(count))
    sizes = [len(range(count)[rows]) for rows in found]
    together = unit if count // unit >= world else 1
    assert max(sizes) - min(sizes) <= together
    assert all(rows.start % together == 0 for rows in found)


def test_balanced_items_have_about_the_same_size_on_each_rank() -> None:
    sizes = [9, 1, 8, 2, 7, 3, 6, 4, 5]
    dealt = balanced(sizes, 2)
    assert sorted(item for items in dealt for item in items) == list(range(9))
    totals = [sum(sizes[item] for item in items) for items in dealt]
    assert max(totals) - min(totals) <= max(sizes)
    assert balanced([3], 2) == [[0], []]


def test_one_rank_exchanges_nothing() -> None:
    with using(one()):
        assert tell("x") == "x"
        assert same(1)
        assert in_shares(lambda texts: [len(text) for text in texts], ["a", "bc"]) == [1, 2]


class Pair:
    """Rank 0 of two; what rank 1 gives is known beforehand."""

    rank, world = 0, 2

    def __init__(self, other: object):
        self.other = torch.frombuffer(bytearray(json.dumps(other).encode() + b"\n"), dtype=torch.uint8)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, rows: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
        return torch.cat([rows, self.other])

    def barrier(self) -> None:
        pass


@pytest.mark.parametrize("name", ["options", "inputs", "versions", "revision", "hardware", "threads"])
def test_whatever_differs_between_ranks_is_named(name: str) -> None:
    """Options, data, versions, code, device."""
    config = {
        "options": {"lr": 0.1}, "inputs": {"data.jsonl": "ab"}, "versions": {"torch": "2.13"}, "revision": "c0ffee",
        "hardware": "a CPU", "threads": 1,
    }  # fmt: skip
    with using(Pair(config)):
        check_same_on_all_ranks(config)
    value = config[name]
    other = config | {name: dict.fromkeys(value, "other") if isinstance(value, dict) else "other"}
    with (
        using(Pair(other)),
        pytest.raises(ValueError, match=rf"here: rank 1\): {name}.* is .* there, and 'other' here"),
    ):
        check_same_on_all_ranks(config)


# The same run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> list[str]:
    """The names that the selected tests compare, so that one test does not train them all."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {spec.params.get("name") for spec in specs if spec}
    return [name for name in NAMES if name in selected]


@pytest.fixture(scope="module")
def alone(wanted: list[str]) -> dict[str, Trained]:
    (ended,) = run_world(1, worlds.train_all, UPDATES, wanted)
    assert not ended.error
    return ended.result


@pytest.fixture(scope="module")
def pair(wanted: list[str]) -> list[dict[str, Trained]]:
    found = run_world(2, worlds.train_all, UPDATES, wanted)
    assert [ended.error for ended in found] == ["", ""]
    return [ended.result for ended in found]


NAMES = ("ppo", "one_row", "nlpo", "grpo", "rloo", "a2c", "online_dpo", "foreign", "sft", "dpo", "reward_modelling")


def compare(one: Trained, other: Trained, rounded: int = 0) -> None:
    """Tokens to the bit; parameters and metrics up to rounding.

    Args:
        one, other: what is compared.
        rounded: how many parameters may differ by more than 1e-6, up to 3e-6.
    """
    assert one.tokens == other.tokens
    difference = np.abs(one.parameters - other.parameters)
    assert (difference > 1e-6).sum() <= rounded
    assert difference.max() <= 3e-6
    assert len(one.rows) == len(other.rows)
    for row, counterpart in zip(one.rows, other.rows, strict=True):
        assert row.keys() == counterpart.keys()
        for name, value in row.items():
            # Over a few tokens, rounding makes the explained variance differ more than a mean.
            history = name.startswith(("score/", "kl/", "reward/"))
            near = pytest.approx(value, rel=1e-6, abs=1e-6) if history else pytest.approx(value, rel=1e-4, abs=2e-5)
            assert counterpart[name] == near, name


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_run_what_one_runs(name: str, alone: dict[str, Trained], pair: list[dict[str, Trained]]) -> None:
    compare(alone[name], pair[0][name])


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_come_to_the_same_bits(name: str, pair: list[dict[str, Trained]]) -> None:
    first, second = (ranks[name] for ranks in pair)
    assert (first.parameters == second.parameters).all()
    assert first.rows == second.rows


@pytest.mark.slow
@pytest.mark.parametrize("world", [full(2), 3, full(4)])
def test_more_ranks_and_updates_run_what_one_runs(world: int) -> None:
    """Ten updates, and numbers of ranks that divide neither rows nor minibatches.

    With four, Adam's first step makes 1.7e-6 of the rounding of one gradient that is nearly 0 (docs/scaling.md).
    """
    (alone,) = run_world(1, worlds.train_all, 10, NAMES)
    found = run_world(world, worlds.train_all, 10, NAMES)
    assert {ended.error for ended in found} == {""}
    for name in NAMES:
        compare(alone.result[name], found[-1].result[name], 1 if (name, world) == ("ppo", 4) else 0)


def test_a_parameter_that_no_rank_has_a_gradient_of_is_left_alone() -> None:
    found = run_world(2, worlds.unused)
    assert found[0].result == found[1].result == run_world(1, worlds.unused)[0].result
    assert found[0].result[2:] == [1.0, 1.0]


def test_a_refused_step_is_refused_by_all_and_counted_once() -> None:
    """The row that is at fault is one of rank 0: rank 1 refuses the step too, and names the row."""
    skipped = run_world(2, worlds.bad_step, True)
    assert [ended.result for ended in skipped] == [["1 True"], ["1 True"]]
    stopped = run_world(2, worlds.bad_step, False)
    assert stopped[0].result == stopped[1].result
    assert "row" in stopped[0].result[0]
    assert "the reward is nan" in stopped[0].result[0]


def test_a_rank_that_parts_frees_its_groups() -> None:
    """Their threads must not outlive the interpreter."""

    class Group:
        pass

    group, store = Group(), HashStore()
    freed = weakref.ref(group)
    ranks = TorchRanks(store, 0, 1, {"cpu": group}, 3.0)
    del group
    assert freed() is not None
    ranks.close()
    assert freed() is None


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", "rank 1 did not answer"),
        slow("hung", "rank 1 did not answer"),
        ("error", "rank 1 stopped: the score 'judge' raised KeyError"),
    ],
)
def test_a_rank_that_fails_is_named_within_the_timeout(how: str, said: str) -> None:
    found = run_world(3, worlds.fail, how, timeout=3.0)
    for rank in (0, 2):
        assert found[rank].error.startswith("RankFailed: ")
        assert said in found[rank].error
        assert found[rank].seconds < 20


def test_prompts_that_differ_between_ranks_are_refused() -> None:
    for ended in run_world(2, worlds.different_prompts):
        assert "drew different prompts on different ranks" in ended.error


def test_weights_that_drift_apart_are_noticed() -> None:
    for ended in run_world(2, worlds.drift):
        assert "the trained parameters of rank 1 are not those of rank 0" in ended.error
