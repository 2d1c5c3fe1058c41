"""The benchmark's tasks on letters: scores worked out by hand, noise, splits."""

import numpy as np
import pytest

from lmgym.tasks import Completion, Prompt, Task
from lmgym.tasks.letters import (
    Alternate,
    Both,
    Count,
    FewPrompts,
    FirstLetter,
    Goodhart,
    NoisyTree,
    Password,
    ScaledBandit,
    SmallBandit,
)
from lmgym.tasks.probe import TREE_SCORES
from lmgym.tasks.tuning import Balance, LargePairs, LastLetter, NoisyPairs, Pairs, Palindrome, Successors, Twice
from lmgym.testing import check_task

ALL = (ScaledBandit, SmallBandit, NoisyTree, FirstLetter, Password, Goodhart, Count, FewPrompts, Both, Alternate)
TUNING = (Pairs, NoisyPairs, LargePairs, Successors, LastLetter, Palindrome, Twice, Balance)
TABLE = Pairs().table


@pytest.mark.parametrize("make", ALL + TUNING, ids=lambda make: getattr(make, "__name__", str(make)))
def test_contract(make: type[Task]) -> None:
    check_task(make(), allow_shared_prompts=make is not FewPrompts)


@pytest.mark.parametrize(
    ("task", "prompt", "text", "score", "gold"),
    [
        (ScaledBandit(), "a", "c", 60.0, 60.0),
        (SmallBandit(), "a", "d", 0.01, 0.01),
        (ScaledBandit(), "a", "cd", 0.0, 0.0),
        (FirstLetter(), "a", "daaaa", 1.0, 1.0),
        (FirstLetter(), "a", "addd", 0.0, 0.0),
        (Password(), "b", "cab", 1.0, 1.0),
        (Password(), "b", "caba", 0.0, 0.0),
        (Password(), "b", "d", 0.05, 0.05),
        (Password(), "b", "dd", 0.0, 0.0),
        (Goodhart(), "b", "aa", 0.5, 1.0),
        (Goodhart(), "b", "aba", 0.5, 1.0),
        (Goodhart(), "b", "aaaa", 1.0, 0.0),
        (Goodhart(), "b", "a", 0.25, 0.5),
        (Goodhart(), "b", "bc", 0.0, 0.0),
        (Count(), "c", "dad", 1.0, 1.0),
        (Count(), "c", "d", 0.5, 0.5),
        (Count(), "a", "dadad", 0.0, 0.0),
        (FewPrompts(), "dba", "bd", 1.0, 1.0),
        (FewPrompts(), "dba", "bb", 0.5, 0.5),
        (FewPrompts(), "dba", "db", 0.0, 0.0),
        (FewPrompts(), "dba", "bda", 0.0, 0.0),
        (Both(), "a", "abac", 0.75, 0.75),
        (Both(), "a", "abcd", 0.5, 0.5),
        (Both(), "a", "aaaa", 0.25, 0.25),
        (Both(), "a", "", 0.0, 0.0),
        (Alternate(8), "a", "acbd", 0.5, 0.5),
        (Alternate(8), "a", "cacb", 0.5, 0.5),
        (Alternate(8), "a", "acab", 3 / 8, 3 / 8),
        (Alternate(8), "a", "ac" * 9, 1.0, 1.0),
        (Alternate(8), "a", "", 0.0, 0.0),
        (Pairs(), "a", "", 0.4, 0.4),
        (Pairs(), "a", "d", 0.4, 0.4),
        (Pairs(), "a", "db", 0.4 + TABLE[3, 1] / 3, 0.4 + TABLE[3, 1] / 3),
        (LargePairs(), "a", "db", 4 + TABLE[3, 1] / 0.3, 4 + TABLE[3, 1] / 0.3),
        (Successors(), "b", "cda", 1.0, 1.0),
        (Successors(), "b", "ca", 1 / 3, 1 / 3),
        (Successors(), "b", "cdab", 0.0, 0.0),
        (LastLetter(), "b", "bba", 0.6, 0.6),
        (LastLetter(), "b", "aab", 0.0, 0.0),
        (Palindrome(), "b", "abcba", 1.0, 1.0),
        (Palindrome(), "b", "abca", 0.4, 0.4),
        (Palindrome(), "b", "aaaa", 0.0, 0.0),
        (Twice(), "b", "add", 1.0, 1.0),
        (Twice(), "b", "dad", 0.0, 0.0),
        (Balance(10), "b", "aaaabbbccd", 1.0, 1.0),
        (Balance(10), "b", "", 0.5, 0.5),
    ],
)
def test_scores(task: Task, prompt: str, text: str, score: float, gold: float) -> None:
    given = [Prompt(prompt)], [Completion(text, "stop", len(text))]
    assert task.score(*given) == [pytest.approx(score)]
    assert task.gold(*given) == [pytest.approx(gold)]


def test_a_text_that_does_not_end_counts_nothing() -> None:
    assert Count().score([Prompt("c")] * 2, [Completion("dad", "stop", 4), Completion("dad", "length", 3)]) == [1, 0]
    assert LastLetter().score([Prompt("c")], [Completion("dda", "length", 3)]) == [0]


def test_noise_is_normal_new_in_every_episode_and_can_be_repeated() -> None:
    task, rng = NoisyTree(0.5), np.random.default_rng(0)
    prompts = [task.sample(rng) for _ in range(1500)]
    texts = [Completion("cdb", "stop", 4)] * len(prompts)
    noise = (np.array(task.score(prompts, texts)) - TREE_SCORES["cdb"]) / 0.5
    assert abs(noise.mean()) < 4 / 1500**0.5
    assert abs(noise.std() - 1) < 0.08
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.05, "as normal noise has it"
    assert len(set(noise)) == len(noise)
    assert task.score(prompts, texts) == task.score(prompts, texts)
    assert set(task.gold(prompts, texts)) == {TREE_SCORES["cdb"]}
    one = [prompts[0]] * 2, [Completion("a", "stop", 2), Completion("b", "stop", 2)]
    group = np.array(task.score(*one)) - np.array(task.gold(*one))
    assert group[0] != group[1], "completions of one group have different noise"


def test_few_prompts_are_split() -> None:
    task, rng = FewPrompts(), np.random.default_rng(0)
    train, test = ({task.sample(rng, split).text for _ in range(2000)} for split in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (16, 48, 0)
