"""The questions of `lmgym label`: from a file, from what a policy writes, or prompts to write a text for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agents.cli.options import field_names, note
from lmgym.preferences import Item, LabelStore, read_items


@dataclass(frozen=True)
class Filled:
    """What simulated labellers and the training in the background need.

    Attributes:
        model: the language model from which reward models are trained.
        golds: the gold score of each text by (prompt, text) as the page shows them.
    """

    model: str
    golds: Mapping[tuple[str, str], float] = field(default_factory=dict)


def fill(store: LabelStore, wanted: Any, argv: Sequence[str]) -> Filled:
    """Adds the questions that a command line asks for, unless the store has them.

    Args:
        store: the file of labels.
        wanted: the options of `lmgym label`.
        argv: its command line.

    Raises:
        ValueError: a file is malformed, or the policy writes too few different texts.
    """
    names = field_names(wanted.fields)
    if wanted.known and wanted.known != "task":
        known = read_items(wanted.known, names, "gold", note)
        store.add_items([*(replace(item, purpose="calibration") for item in known[: wanted.calibration])])
        store.add_items(known[wanted.calibration :])
    if wanted.pairs:
        store.add_items(read_items(wanted.pairs, names, "ask", note)[: wanted.count])
        return Filled(wanted.model or "tiny", _by_order(store) if wanted.simulate.labellers else {})
    has_questions = bool(store.items("ask") or store.items("write"))
    if has_questions and not (wanted.task or wanted.prompts or wanted.simulate.labellers):
        return Filled(wanted.model or "tiny")
    return _sampled(store, wanted, argv)


def _by_order(store: LabelStore) -> dict[tuple[str, str], float]:
    """Scores that agree with the order of the texts in the file."""
    from agents.labelling.app import shown
    from agents.labelling.sampling import shown_prompt

    return {
        (shown_prompt(item), shown(text)): float(-place)
        for item in store.items()
        for place, text in enumerate(item.texts)
    }


def _sampled(store: LabelStore, wanted: Any, argv: Sequence[str]) -> Filled:
    """Samples questions from a policy, or draws prompts to write texts for. Only this needs torch."""
    from agents.cli.finished import parse_with_run
    from agents.cli.names import policy_in, setting_of
    from agents.labelling.sampling import digest_of, page_scores, sample_items, with_known_answers

    if wanted.task:
        wanted, _ = parse_with_run("label", type(wanted), argv, ("policy", "temperature"))
    else:
        wanted = replace(wanted, task="Sentiment")
    setting = setting_of(wanted, "default", scored=False)
    if wanted.write:
        store.add_items(_to_write(setting.task, wanted.count, wanted.seed))
        return Filled(setting.lm.name)
    policy = policy_in(wanted.policy, setting.lm, wanted.temperature)
    hidden = math.ceil(wanted.gold_share * wanted.count) if wanted.known == "task" else 0
    practice = wanted.calibration if wanted.known == "task" else 0
    if wanted.known == "task" and not setting.task.has_gold:
        raise ValueError("--known task needs the task's gold score: give --gold module:function, or a file")
    count = wanted.count + hidden + practice
    sampled = sample_items(setting, policy, count, wanted.texts, source_of(wanted), digest_of(policy))
    if sampled.left_out:
        note(
            f"{sampled.left_out} of {count} prompts are left out: the policy wrote fewer than {wanted.texts} different "
            "texts that are finished"
        )
    if not sampled.items:
        raise ValueError(
            "no prompt has enough different, finished texts to compare: raise --max-new-tokens or --temperature"
        )
    items = with_known_answers(sampled, hidden, practice) if wanted.known == "task" else sampled.items
    store.add_items(items)
    golds: Mapping[tuple[str, str], float] = {}
    if wanted.simulate.labellers:
        if not setting.task.has_gold:
            raise ValueError("simulated labellers judge by the task's gold score: give --gold module:function")
        golds = page_scores(sampled, setting.task, [item for item in store.items() if item.texts])
    return Filled(wanted.model or setting.lm.name, golds)


def source_of(wanted: Any) -> str:
    """Where the texts come from, for the record; labellers do not see it."""
    return wanted.policy or wanted.model or wanted.task


def _to_write(task: Any, count: int, seed: int) -> list[Item]:
    rng = np.random.default_rng(np.random.SeedSequence((seed, 4)))
    prompts = [task.sample(rng) for _ in range(count)]
    unique = {prompt.text: prompt for prompt in prompts}
    return [Item(prompt.text, messages=prompt.messages, purpose="write") for prompt in unique.values()]
