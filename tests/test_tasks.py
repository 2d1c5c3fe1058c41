"""The tasks: what is drawn, how it is scored, and what is refused."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from lmgym.io import read_jsonl
from lmgym.tasks import (
    Arithmetic,
    Bandit,
    Completion,
    Prompt,
    PromptList,
    Reverse,
    RuleTask,
    Sentiment,
    Sort,
    Task,
    Tree,
    split_of,
)
from lmgym.tasks.grammar import (
    continuation,
    document,
    labelled_continuation,
    opening,
    polarity,
    unfinished_sentence,
)
from lmgym.tasks.probe import BANDIT_SCORES, TREE_BEST, TREE_SCORES
from lmgym.tasks.sentiment import gold_sentiment

ROOT = Path(__file__).resolve().parents[1]
RULES = (Sort, Reverse, Arithmetic)


def score(task: Task, prompt: Prompt, text: str) -> float:
    return task.score([prompt], [Completion(text)])[0]


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def length_score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [float(len(completion.text)) for completion in completions]


def test_tasks_import_no_torch():
    code = "import sys, lmgym.tasks, lmgym.io; assert 'torch' not in sys.modules"
    package_only = (
        "import sys, types; p = types.ModuleType('lmgym'); p.__path__ = ['lmgym']; sys.modules['lmgym'] = p; "
    )
    subprocess.run([sys.executable, "-c", package_only + code], check=True, cwd=ROOT)


@pytest.mark.parametrize("task", [Sentiment(), Sort(), Reverse(), Arithmetic(), Bandit(), Tree()], ids=lambda t: t.name)
def test_draws_depend_on_the_generator_alone(task: Task):
    first, second, other = rng_of(1), rng_of(1), rng_of(2)
    prompts = [task.sample(first) for _ in range(30)]
    assert prompts == [task.sample(second) for _ in range(30)]
    assert [task.demonstrate(p, first) for p in prompts] == [task.demonstrate(p, second) for p in prompts]
    assert prompts != [task.sample(other) for _ in range(30)]


@pytest.mark.parametrize("task", [Sentiment(), Sort(), Reverse(), Arithmetic()], ids=lambda t: t.name)
def test_splits_are_disjoint_and_rich(task: Task):
    rng = rng_of(0)
    train = {task.sample(rng, "train").text for _ in range(700)}
    test = {task.sample(rng, "test").text for _ in range(150)}
    assert not train & test
    assert {split_of(text) for text in train} == {"train"}
    assert len(train) + len(test) >= 400


def test_openings_are_many():
    rng = rng_of(0)
    # 800 draws of N equally likely texts repeat about 800^2 / 2N times: this is N of 60 000 or more.
    assert len({opening(rng) for _ in range(800)}) >= 795


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The acting was good.", 1),
        ("The food was awful!", -1),
        ("It was two hours long.", 0),
        ("It was not good.", -1),
        ("It was not bad at all.", 1),
        ("It wasn't very good.", -1),
        ("It was never boring.", 1),
        ("It was neither good nor bad.", 0),
        ("It was good but slow.", 0),
        ("It was not good but clever.", 0),
        ("It was long but good.", 1),
        ("I did not enjoy the food.", -1),
        ("We would not recommend it.", -1),
        ("What a GREAT film!", 1),
        ("It was not in the end a very good film.", 1),  # the negation reaches three words, no further
        ("", 0),
    ],
)
def test_polarity(sentence: str, expected: int):
    assert polarity(sentence) == expected


def test_polarity_reads_back_how_sentences_were_made():
    rng = rng_of(0)
    seen = set()
    for _ in range(400):
        start = opening(rng)
        assert polarity(start) == 0
        lead = unfinished_sentence(start)
        for sentence, sign in labelled_continuation(rng, start, 0.4):
            assert polarity(f"{lead} {sentence}") == sign, sentence
            seen.add(sign)
            lead = ""
    assert seen == {-1, 0, 1}


def test_continuations_fit_their_opening():
    rng = rng_of(0)
    for _ in range(100):
        start = opening(rng)
        text = continuation(rng, start, 0.4)
        assert text.startswith(" ")
        assert not text.startswith("  ")
        assert text.endswith((".", "!"))
        if unfinished_sentence(start):
            assert text.startswith((" was ", " were "))
    assert "Anna" not in continuation(rng, "an opening of another kind", 1.0)
    assert document(rng_of(3)) == document(rng_of(3))


def test_positivity_is_the_probability_of_a_positive_sentence():
    rng = rng_of(0)
    for positivity in (0.0, 0.3, 1.0):
        signs = [s for _ in range(200) for _, s in labelled_continuation(rng, opening(rng), positivity)]
        assert np.mean([sign == 1 for sign in signs]) == pytest.approx(positivity, abs=0.08)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("I saw it.", " It was good.", 1 / 3),
        ("I saw it.", " It was good. It was great. It was nice.", 1.0),
        ("I saw it.", " It was good. It was bad.", 0.0),
        ("I saw it.", " It was bad. It was poor. It was ugly.", -1.0),
        ("I saw it.", " It was good. It was good. it was  good!", 1 / 3),  # said before
        ("I saw it.", " It was bad. It was bad. It was bad.", -1 / 3),
        ("I saw it.", " It was good. It was great. It was nice. It was clever", 3 / 4),  # unfinished
        ("I saw it.", " It was good. It was great. It was nice. It was new. It was old.", 3 / 5),
        ("I saw it. The room", " was good. It was great. It was nice.", 1.0),
        ("I saw it. It was not", " good. It was great.", 0.0),  # read together with the prompt
        ("I saw it. It was not", "", 0.0),
        ("A good film.", " It was new.", 0.0),  # finished sentences of the prompt do not count
        ("I saw it.", "", 0.0),
        ("I saw it.", " ... !!!", 0.0),
    ],
)
def test_gold_sentiment(prompt: str, completion: str, expected: float):
    assert gold_sentiment(prompt, completion) == pytest.approx(expected)


def test_gold_of_demonstrations_leaves_room():
    task, rng = Sentiment(), rng_of(0)
    prompts = [task.sample(rng) for _ in range(300)]
    gold = task.gold(prompts, [Completion(task.demonstrate(prompt, rng)) for prompt in prompts])
    assert 0.08 < np.mean(gold) < 0.2
    assert min(gold) >= -1
    assert max(gold) == task.best


def test_sentiment_is_scored_by_its_scorer():
    prompts, completions = [Prompt("I saw it.")], [Completion(" It was good.")]
    with pytest.raises(ValueError, match="reward model"):
        Sentiment().score(prompts, completions)
    assert Sentiment(length_score).score(prompts, completions) == [13.0]
    assert Sentiment(length_score).gold(prompts, completions) == pytest.approx([1 / 3])


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        (Sort(), Prompt("sort: d b a c =", {"answer": "a b c d"}), " a b c d"),
        (Reverse(), Prompt("reverse: d b a c =", {"answer": "c a b d"}), " c a b d"),
        (Arithmetic(), Prompt("add: 37 + 5 =", {"answer": "42"}), " 42"),
    ],
    ids=["sort", "reverse", "arithmetic"],
)
def test_rule_scores_are_strict(task: RuleTask, prompt: Prompt, answer: str):
    assert score(task, prompt, answer) == score(task, prompt, answer.strip()) == 1.0
    for wrong in (answer + " a", answer + " 1", answer + answer, "x" + answer, answer + ".", answer[:-1], "", " "):
        assert score(task, prompt, wrong) < 1.0
    assert score(task, prompt, answer + " a b c d") == 0.0


def test_partial_credit():
    prompt = Prompt("sort: d b a c =", {"answer": "a b c d"})
    assert score(Sort(), prompt, " a b d c") == 0.25
    assert score(Sort(), prompt, " d c b a") == 0.0
    assert score(Sort(), prompt, " abcd") == 0.0
    prompt = Prompt("add: 37 + 5 =", {"answer": "42"})
    assert score(Arithmetic(), prompt, " 41") == 0.25
    assert score(Arithmetic(), prompt, " 4 2") == 0.0


@pytest.mark.parametrize("make", RULES, ids=lambda t: t.name)
def test_rule_prompts_hold_their_answer(make: type[RuleTask]):
    rng = rng_of(0)
    for _ in range(50):
        prompt = make().sample(rng)
        parts = prompt.text.split()[1:-1]
        if make is Sort:
            expected = sorted(parts)
        elif make is Reverse:
            expected = parts[::-1]
        else:
            expected = [str(int(parts[0]) + int(parts[2]))]
        assert prompt.data["answer"].split() == expected


@pytest.mark.parametrize("make", RULES, ids=lambda t: t.name)
def test_rule_demonstrations_are_right_as_often_as_told(make: type[RuleTask]):
    for accuracy in (0.0, 0.5, 1.0):
        task, rng = make(accuracy), rng_of(1)
        prompts = [task.sample(rng) for _ in range(300)]
        scores = np.array(task.score(prompts, [Completion(task.demonstrate(prompt, rng)) for prompt in prompts]))
        assert np.mean(scores == 1) == pytest.approx(accuracy, abs=0.1)
        assert scores.min() >= 0
        assert scores.max() <= 1


def test_bandit():
    prompt = Bandit().sample(rng_of(0))
    assert {arm: score(Bandit(), prompt, arm) for arm in "abcd"} == dict(BANDIT_SCORES)
    assert score(Bandit(), prompt, " d ") == 1.0
    assert score(Bandit(), prompt, "dd") == score(Bandit(), prompt, "") == 0.0


def test_the_tree_has_a_decoy():
    assert len(TREE_SCORES) == 4 + 16 + 64
    assert min(TREE_SCORES.values()) >= 0
    assert [text for text, value in TREE_SCORES.items() if value == max(TREE_SCORES.values())] == [TREE_BEST]
    mean = {a: np.mean([value for text, value in TREE_SCORES.items() if text[0] == a]) for a in "abcd"}
    assert max(mean, key=lambda letter: mean[letter]) != TREE_BEST[0]
    prompt = Tree().sample(rng_of(0))
    assert score(Tree(), prompt, "cdb") == score(Tree(), prompt, " c d b") == 1.0
    assert score(Tree(), prompt, "cdba") == score(Tree(), prompt, "") == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        (b'{"prompt": "a"}\n\n[1]\n', "line 3: not an object"),
        (b'{"prompt": "a"}\n{"text": "a"}\n', "line 2: lacks the field 'prompt'"),
        (b'{"prompt": "a", "x": NaN}\n', "line 1: not JSON"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8"),
        (b"\n \n", "no rows"),
    ],
)
def test_jsonl_complaints_name_the_line(tmp_path, content: bytes, message: str):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(file, required=("prompt",))
    assert str(file) in str(error.value)


def test_jsonl_reads(tmp_path):
    file = tmp_path / "rows.jsonl"
    # A line separator within a string is no line end; a byte order mark is no part of the first row.
    file.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "é", "n": 1}'.encode())
    assert read_jsonl(file) == [{"prompt": "a\u2028b"}, {"prompt": "é", "n": 1}]
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_prompt_list_from_a_file(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"prompt": "{i} + 1 =", "answer": {i + 1}}}\n' for i in range(60)))
    task = PromptList.from_rows(file, length_score, best=9.0)
    assert task.best == 9.0
    assert task.name == str(file)
    rng = rng_of(0)
    train, test = ([task.sample(rng, split) for _ in range(400)] for split in ("train", "test"))
    assert not {p.text for p in train} & {p.text for p in test}
    assert len({p.text for p in train + test}) == 60
    assert all(p.data == {"answer": int(p.text.split()[0]) + 1} for p in train + test)
    assert score(task, train[0], "abc") == 3.0
    with pytest.raises(NotImplementedError):
        task.demonstrate(train[0], rng)


def test_prompt_list_needs_both_splits():
    with pytest.raises(ValueError, match="'test' split"):
        PromptList(["only one that is for training"], length_score, test_share=0.0)


@pytest.mark.parametrize("task", [Sentiment(), Sort(), Reverse(), Arithmetic()], ids=lambda t: t.name)
def test_the_tiny_tokenizer_fits(task: Task):
    tokenizer = Tokenizer.from_file(str(ROOT / "lmgym" / "assets" / "tiny" / "tokenizer.json"))
    assert (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("<eos>")) == (0, 1)
    rng = rng_of(0)
    for _ in range(50):
        prompt = task.sample(rng)
        text = task.demonstrate(prompt, rng)
        whole, first, rest = (tokenizer.encode(t).ids for t in (prompt.text + text, prompt.text, text))
        assert whole == first + rest  # no token spans prompt and completion
        assert tokenizer.decode(whole) == prompt.text + text
        if isinstance(task, Arithmetic):
            assert len(rest) == len(text)  # the space, and each digit
        elif isinstance(task, RuleTask):
            assert len(rest) == len(text.split())
        else:
            assert len(first) <= 40
