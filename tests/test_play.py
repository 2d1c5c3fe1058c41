"""`lmgym play`: what a person is shown is what the environment pays and what the exact optimum says."""

import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from agents import cli
from agents.lessons.play import Game, play
from lmgym import LanguageModel, TokenVectorEnv
from lmgym.exact import enumerate_tree
from lmgym.tasks import Tree


def game(lm: LanguageModel, **arguments: Any) -> Game:
    settings: dict[str, Any] = {"max_prompt_tokens": 4, "max_new_tokens": 3, "beta": 0.1} | arguments
    return Game(TokenVectorEnv(1, task=Tree(), model=lm, kl="sampled", **settings), seed=1)


def shown(one: Game, answers: Iterable[str]) -> list[str]:
    return list(play(one, answers, count=5))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "min_new_tokens": 1, "beta": 0.3}])
def test_values_and_probabilities_are_those_of_the_exact_optimum(
    probe: LanguageModel, settings: dict[str, Any]
) -> None:
    one = game(probe, **settings)
    tree = enumerate_tree(one.env, one.prompt)
    optimal = dict(zip(tree.paths, tree.soft_optimal().tolist(), strict=True))
    while not one.over:
        choices = one.choices(10)
        assert sum(c.probability for c in choices) == pytest.approx(1.0, abs=1e-5)
        inside = sum(p for path, p in optimal.items() if path[: len(one.path)] == one.path)
        for choice in choices:
            path = (*one.path, choice.token)
            after = sum(p for other, p in optimal.items() if other[: len(path)] == path)
            assert choice.optimal == pytest.approx(after / inside, abs=1e-5)
        one.take(choices[-1].token)


def test_the_price_is_what_the_environment_pays(probe: LanguageModel) -> None:
    one = game(probe)
    paid = []
    while not one.over:
        best = one.choices(1)[0]
        one.take(best.token)
        paid.append(float(one.env.rewards.token_rewards[0, len(one.path) - 1]))
    assert one.total == pytest.approx(sum(paid), abs=1e-6)
    assert one.total == pytest.approx(one.score - 0.1 * one.kl_nats, abs=1e-5)
    tree = enumerate_tree(one.env, one.prompt)
    place = tree.paths.index(one.path)
    assert one.kl_nats == pytest.approx(-float(tree.reference_logp[place]), abs=1e-5)
    assert one.score == pytest.approx(float(tree.scores[place]))


def test_answers_are_read_until_one_is_a_choice(probe: LanguageModel) -> None:
    lines = shown(game(probe), ["0", "six", "1", "", "2"])
    assert [line for line in lines if "is no choice: a number from 1 to 5" in line] == lines[1:3]
    assert "  *" in lines[0]
    assert "The best score is 1.000" in lines[-1]
    assert shown(game(probe), [])[-1] == "stopped before the end"


def test_a_large_world_shows_no_values(probe: LanguageModel) -> None:
    one = game(probe, max_new_tokens=12)
    assert one.tree is None
    assert all(choice.value is None for choice in one.choices())
    assert "Q " not in shown(one, ["1"])[0]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n1\n1\n"))
    torch.manual_seed(0)
    assert cli.main(["play", "Tree", "--beta", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "− β 0.2 ·" in printed
    assert cli.main(["play", "Tree", "--count", "0"]) == 2
