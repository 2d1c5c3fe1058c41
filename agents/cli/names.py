"""Names into objects: environments, prompts, models, scores, functions and policies."""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch

from agents.cli.commands import did_you_mean
from agents.cli.folder import MOST_THREADS, TRL
from agents.cli.options import Common, check_numbers, field_names, note
from agents.pipeline import Setting
from agents.pipeline.load_algorithm import load_file
from lmgym.io import printable
from lmgym.models import BUILT_IN as BUILT_IN_MODELS
from lmgym.models import LanguageModel, load, set_template
from lmgym.policy import Policy
from lmgym.preferences import Comparison, leave_out, read_comparisons
from lmgym.ranks import tell
from lmgym.registry import TaskSpec, default_arguments, find_spec, make_task
from lmgym.reward import BUILT_IN as BUILT_IN_REWARD_MODELS
from lmgym.reward import Score, load_reward_model, trl_reward
from lmgym.tasks import Conversational, Prompt, PromptList, as_conversation, prompts_of
from lmgym.tasks.base import ScoreFunction, Task

SMALL = 5_000_000
"""Models of fewer parameters are fastest on one thread."""
TYPO = 0.75
"""Similarity (`difflib`) from which a name counts as a misspelt built-in name: "tinny" does, "tiny-gpt2" does not."""
CHAT_TOKENS = 64
"""Token budget of an answer in a conversation, where the options give none."""
REWARD_WORDS = ("default", "learned", "task")
"""Values of --reward that do not name a reward model."""


def setting_of(
    wanted: Common,
    reward: str,
    preferences: str | None = None,
    scored: bool = True,
    test_preferences: str | None = None,
) -> Setting:
    """The task, model, budgets and score that a command works on.

    Args:
        wanted: the options.
        reward: the value of --reward.
        preferences: a file of comparisons.
        scored: whether the command needs a score.
        test_preferences: a file of held-out comparisons.

    Raises:
        ValueError: a name is unknown, a number is invalid, or prompts have no score; it says what to do.
    """
    check_numbers(wanted)
    entry = find_spec(wanted.task)
    gold = function_named(wanted.gold) if wanted.gold else None
    if wanted.gold and not wanted.prompts:
        raise ValueError("--gold scores prompts of your own: give them with --prompts FILE")
    if wanted.test_prompts_file and not wanted.prompts:
        raise ValueError(
            "--test-prompts-file holds out prompts of your own: give those to train on with --prompts FILE"
        )
    named = None if reward in REWARD_WORDS else score_named(reward, device_of(wanted))
    if wanted.prompts is None:
        task = make_task(entry)
    elif scored and gold is None and named is None and not preferences:
        raise ValueError(
            "prompts of your own need a score: --gold module:function, --preferences FILE or --reward MODEL"
        )
    else:
        task = _prompt_list(wanted, gold or named)
    if test_preferences and not preferences:
        raise ValueError("--test-preferences tests what is learned from --preferences FILE: give both")
    comparisons, held_out = (
        comparisons_in(preferences, test_preferences, wanted.fields) if preferences else (None, None)
    )
    score = named or (None if reward == "learned" else _own_score(task, entry, reward == "task", wanted))
    lm = model_named(wanted.model or entry.model, wanted)
    if wanted.chat or wanted.system is not None:
        task = Conversational(task, wanted.system)
        require_template(lm)
        comparisons, held_out = (
            None if found is None else as_conversations(found, wanted.system) for found in (comparisons, held_out)
        )
    return Setting(task, lm, _budgets(wanted, entry, task, lm), score, comparisons, wanted.seed, held_out=held_out)


def comparisons_in(
    preferences: str, test_preferences: str | None, fields: Sequence[str], ties: Literal["drop", "half"] = "drop"
) -> tuple[list[Comparison], list[Comparison] | None]:
    """The comparisons of one or two files, to train on and held out; those that are in both are held out only.

    Raises:
        ValueError: a row is malformed, or nothing is left to train on.
    """
    names = field_names(fields)
    comparisons = read_comparisons(preferences, names, ties=ties, say=note)
    if not test_preferences:
        return comparisons, None
    held_out = read_comparisons(test_preferences, names, ties=ties, say=note)
    own = leave_out(comparisons, held_out)
    if len(own) < len(comparisons):
        both = len(comparisons) - len(own)
        note(f"{preferences}: {both} comparisons are in {test_preferences} too: not trained on")
    return own, held_out


def require_template(lm: LanguageModel) -> None:
    """Refuses a model without a usable chat template.

    Raises:
        ValueError: it has none, or the template refuses a plain question.
    """
    lm.text.chat.encode([{"role": "user", "content": "Hello"}])


def as_conversations(comparisons: Sequence[Comparison], system: str | None) -> list[Comparison]:
    """The comparisons with prompts as --chat and --system give them to the model."""
    prompts = [as_conversation(comparison.as_prompt, system) for comparison in comparisons]
    return [Comparison(p.text, c.ranked, p.messages, c.is_tie) for p, c in zip(prompts, comparisons, strict=True)]


def _own_score(task: Task, entry: TaskSpec, wanted_by_name: bool, wanted: Common) -> Score | None:
    """The score that the task itself pays; None if a reward model must be trained.

    Raises:
        ValueError: `--reward task` is given, and the user's prompts have no score.
    """
    own_prompts = wanted.prompts is not None
    if not wanted_by_name:
        return None if own_prompts or entry.reward_model is not None else Score({task.name: task.score})
    if own_prompts and not task.has_gold:
        raise ValueError("--reward task pays the gold score of your own prompts: give it with --gold module:function")
    if own_prompts:
        return Score({task.name: task.score})
    # Without a reward model, a task that is scored by one has its gold score alone.
    return Score({task.name: task.score if entry.reward_model is None else task.gold})


def _budgets(wanted: Common, entry: TaskSpec, task: Task, lm: LanguageModel) -> dict[str, Any]:
    given = {
        "max_prompt_tokens": wanted.max_prompt_tokens,
        "max_new_tokens": wanted.max_new_tokens,
        "long_prompts": wanted.long_prompts,
    }
    missing_eos_score = None if wanted.missing_eos_score == "none" else wanted.missing_eos_score
    chosen = {name: value for name, value in given.items() if value is not None}
    defaults = default_arguments(entry, task)
    prompts = prompts_of(task)
    if prompts is not None:
        if any(prompt.messages for prompt in prompts):
            defaults["max_new_tokens"] = CHAT_TOKENS
        if wanted.max_prompt_tokens is None and wanted.long_prompts == "error":
            longest = max(map(len, lm.text.encode_prompts(prompts)))
            defaults["max_prompt_tokens"] = max(longest, defaults["max_prompt_tokens"])
    elif isinstance(task, Conversational):
        around = len(lm.text.chat.encode(task.wrap(Prompt("Hello")).messages))
        if wanted.max_prompt_tokens is not None and wanted.max_prompt_tokens < around:
            raise ValueError(
                f"--max-prompt-tokens is {wanted.max_prompt_tokens}, but the chat template makes {around} tokens of "
                'the message "Hello" alone: raise it, or leave it out'
            )
        defaults["max_prompt_tokens"] += around
    return {**defaults, **chosen, "missing_eos_score": missing_eos_score}


def is_environment(name: str) -> bool:
    """Whether a name is that of a registered environment."""
    try:
        find_spec(name)
    except ValueError:
        return False
    return True


def _prompt_list(wanted: Common, score: ScoreFunction | None) -> Task:
    return PromptList.from_rows(
        wanted.prompts or "",
        score,
        fields=field_names(wanted.fields),
        opening_words=wanted.opening_words,
        test_source=wanted.test_prompts_file,
        say=note,
    )


def default_score(wanted: Common, setting: Setting) -> Score:
    """The score to evaluate with if none is named: that of the user's prompts, or the environment's reward model.

    Raises:
        ValueError: there is neither.
    """
    name = find_spec(wanted.task).reward_model
    if wanted.prompts is not None or name is None:
        if not setting.task.has_gold:
            raise ValueError("there is no score to evaluate with: give --gold module:function or --reward MODEL")
        return Score({"gold": setting.task.gold})
    return Score({"reward_model": load_reward_model(name, setting.lm.device)})


def score_named(name: str, device: str) -> Score:
    """The score of "package.module:function", "FILE.py:function", or a reward model.

    Raises:
        ValueError: there is no such function or reward model.
    """
    source, colon, function = name.rpartition(":")
    # A path may hold colons too: "run_10:30", or "C:\\runs\\reward_model".
    if colon and (function.isidentifier() or source.endswith(".py")) and not Path(name).is_dir():
        return Score({function: function_named(name)})
    _refuse_typos("reward", name, (*REWARD_WORDS, *BUILT_IN_REWARD_MODELS))
    return Score({"reward_model": load_reward_model(name, device)})


def function_named(name: str) -> ScoreFunction:
    """Imports "package.module:function" or "FILE.py:function"; after "trl:" it is a reward function in TRL's form.

    Raises:
        ValueError: there is no such module or function.
    """
    if name.startswith(TRL) and name.count(":") > 1:
        return trl_reward(function_named(name.removeprefix(TRL)))
    source, _, attribute = name.rpartition(":")
    try:
        module = load_file(source) if source.endswith(".py") else importlib.import_module(source)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"no function {name!r} ({error}): write it as package.module:function or path/to/file.py:function; it "
            "takes lists of prompts and completions and returns one number for each completion"
        ) from error
    if not callable(function):
        raise ValueError(f"{name!r} is not a function")
    return cast("ScoreFunction", function)


def model_named(name: str, wanted: Any) -> LanguageModel:
    """Loads a language model onto the device that the options name, and sets the number of CPU threads.

    Raises:
        ValueError: there is no such model, or the device or the number of threads cannot be used.
    """
    if not 0 <= wanted.threads <= MOST_THREADS:
        raise ValueError(f"--threads {wanted.threads} is out of range: give 0 to {MOST_THREADS}")
    device = device_of(wanted)
    _refuse_typos("model", name, BUILT_IN_MODELS)
    lm = load(name, device=device, dtype=wanted.dtype, pad_token=wanted.pad_token)
    if lm.text.padding_note:
        print(f"lmgym: {printable(lm.text.padding_note)}", file=sys.stderr)
    set_template(lm.tokenizer, *chat_options(wanted))
    torch.set_num_threads(wanted.threads or tell(_default_threads(lm.model.num_parameters())))
    return lm


def chat_options(wanted: Any) -> tuple[str | None, dict[str, Any]]:
    """The chat template that the options give, and the values of its variables.

    Raises:
        ValueError: the file cannot be read, or the values are not a JSON object.
    """
    template, options = None, {}
    if wanted.chat_template:
        try:
            template = Path(wanted.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template {wanted.chat_template}: {error}; give a Jinja file in UTF-8") from error
    if wanted.template_options:
        try:
            options = json.loads(wanted.template_options)
        except ValueError as error:
            raise ValueError(f"--template-options {wanted.template_options!r} is not JSON: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(
                f"--template-options {wanted.template_options!r} must be a JSON object, such as "
                "'{\"enable_thinking\": false}'"
            )
    return template, options


def _refuse_typos(kind: str, name: str, known: tuple[str, ...]) -> None:
    """Refuses a misspelt built-in name before the hub is asked for it, which can take a minute without a network."""
    if name in known or "/" in name or Path(name).exists():
        return
    hint = did_you_mean(name, known, TYPO)
    if hint:
        raise ValueError(f"no {kind} {name!r}.{hint} A model of this name on the hub is given as OWNER/{name}")


def device_of(wanted: Any) -> str:
    """The device that --device names.

    Raises:
        ValueError: this machine does not have it.
    """
    device = wanted.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {device} cannot be used here: give 'cpu', 'auto', or 'cuda' if there is a GPU")
    return device


def _default_threads(parameters: int) -> int:
    """One thread for a small model, otherwise one for each idle core, up to torch's own default."""
    if parameters < SMALL:
        return 1
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - busy))


def policy_in(folder: str | None, lm: LanguageModel, temperature: float) -> Policy:
    """The policy saved in a folder; without a folder, the language model itself."""
    return Policy.load(lm, folder, temperature) if folder else Policy(lm, None, temperature, "none")


def teacher_in(folder: str, wanted: Any, temperature: float) -> Policy:
    """The trained policy of a finished run, on the fine-tuned model of that run.

    Raises:
        ValueError: the folder is not that of a finished run.
    """
    run = Path(folder)
    if not (run / "policy" / "adapter_config.json").is_file():
        raise ValueError(f"no teacher in {folder!r}: give the folder of a finished run, with `sft` and `policy`")
    return Policy.load(model_named(str(run / "sft"), wanted), run / "policy", temperature)
