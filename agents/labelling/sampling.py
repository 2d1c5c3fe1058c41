"""Questions for people, from what a policy writes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agents.labelling.app import shown
from agents.pipeline import Setting
from agents.pipeline.samples import sample_groups
from lmgym.policy import Policy
from lmgym.preferences import LONGEST, Item
from lmgym.tasks.base import Completion, Prompt, Task


@dataclass(frozen=True)
class Sampled:
    """What was sampled.

    Attributes:
        items: one question per prompt that has enough different texts.
        golds: the task's gold score of each text by (prompt, text); empty without one.
        left_out: prompts without enough different, finished texts.
    """

    items: list[Item]
    golds: Mapping[tuple[str, str], float]
    left_out: int


def sample_items(
    setting: Setting, policy: Policy, count: int, texts: int, source: str, model: str, update: int = 0
) -> Sampled:
    """Samples questions: each has so many different completions of one prompt.

    Twice as many completions as needed are sampled, because some are equal, empty or unfinished. Unfinished ones count
    where the task scores them like others.

    Args:
        setting: task, model and seed.
        policy: writes the completions.
        count: prompts.
        texts: completions to compare.
        source: where they come from, for the record.
        model: digest of the model, for the record.
        update: another number gives other prompts.
    """
    prompts, groups = sample_groups(setting, policy, count, 2 * texts, update=update)
    items, golds = [], {}
    for prompt, group in zip(prompts, groups, strict=True):
        fit = [
            c for c in group if (setting.scores_unfinished or c.finish_reason == "stop") and 0 < len(c.text) <= LONGEST
        ]
        different = tuple(dict.fromkeys(c.text for c in fit if c.text.strip()))[:texts]
        if len(different) < texts:
            continue
        items.append(Item(prompt.text, different, prompt.messages, source=source, model=model))
        if setting.task.has_gold:
            scores = gold_scores(setting.task, prompt, different)
            golds |= {(prompt.text, text): score for text, score in zip(different, scores, strict=True)}
    return Sampled(items, golds, len(prompts) - len(items))


def gold_scores(task: Task, prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """The gold scores of texts for one prompt."""
    return list(task.gold([prompt] * len(texts), [Completion(text) for text in texts]))


def with_known_answers(sampled: Sampled, gold: int, calibration: int) -> list[Item]:
    """The items, of which those whose best text is clearest by the gold score become items with a known answer.

    Args:
        sampled: with gold scores.
        gold: hidden ones.
        calibration: ones with feedback.
    """

    def gap(item: Item) -> float:
        scores = sorted((sampled.golds[item.prompt, text] for text in item.texts), reverse=True)
        return scores[0] - scores[1]

    clearest = sorted(range(len(sampled.items)), key=lambda i: -gap(sampled.items[i]))
    chosen = [i for i in clearest if gap(sampled.items[i]) > 0][: gold + calibration]
    items = list(sampled.items)
    for place, i in enumerate(chosen):
        scores = [sampled.golds[items[i].prompt, text] for text in items[i].texts]
        purpose = "calibration" if place < calibration else "gold"
        items[i] = replace(items[i], purpose=purpose, best=int(np.argmax(scores)))
    return items


def page_scores(sampled: Sampled, task: Task, items: Sequence[Item]) -> dict[tuple[str, str], float]:
    """The gold scores of all texts of items, by prompt and text as the page shows them, for simulated labellers.

    Raises:
        ValueError: the task cannot score a text of an item that was not sampled now.
    """
    found = {}
    for item in items:
        known = [sampled.golds.get((item.prompt, text)) for text in item.texts]
        if item.best is not None:
            known = [float(index == item.best) for index in range(len(item.texts))]
        elif None in known:
            try:
                known = gold_scores(task, Prompt(item.prompt, messages=item.messages), item.texts)
            except (KeyError, NotImplementedError) as error:
                raise ValueError(
                    f"the task {task.name!r} cannot score the texts of an older item ({error!r}), so no simulated "
                    "labeller can answer it: give a new --db"
                ) from error
        found |= {
            (shown_prompt(item), shown(text)): float(score or 0) for text, score in zip(item.texts, known, strict=True)
        }
    return found


def shown_prompt(item: Item) -> str:
    """The prompt as a simulated labeller reads it off the page."""
    return "\n".join(f"{m['role']}: {shown(m['content'])}" for m in item.messages) or shown(item.prompt)


def digest_of(policy: Policy) -> str:
    """A digest of the weights that write the texts: 16 hexadecimal digits."""
    whole = hashlib.sha256()
    names = [policy.adapter] if policy.adapter else []
    parameters = policy.lm.adapters.parameters(names[0]) if names else policy.lm.model.parameters()
    for parameter in parameters:
        whole.update(parameter.detach().float().cpu().numpy().tobytes())
    return whole.hexdigest()[:16]
