"""The start of an episode: reset options, seeding, and drawing and tokenizing prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from torch import Tensor

from lmgym.io import quoted
from lmgym.models import LanguageModel
from lmgym.tasks.base import Prompt, Split, Task


def check_options(options: Any) -> Mapping[str, Any]:
    """The options of a reset as a mapping.

    Raises:
        ValueError: they are neither a mapping nor None.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options={quoted(options)} must be a dict, with 'prompt' or 'reset_mask', or None")
    return options or {}


def parse_reset_mask(mask: Any, rows: int, first_reset: bool, device: torch.device) -> Tensor:
    """[B] `options["reset_mask"]` as a tensor.

    Raises:
        ValueError: it is not one boolean for each row, or all of them are False.
        ResetNeeded: the first reset leaves out a row.
    """
    try:
        tensor = torch.as_tensor(mask, device=device)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.zeros(0)  # fails the check of the dtype below
    if tensor.dtype != torch.bool or tensor.shape != (rows,) or not bool(tensor.any()):
        raise ValueError(f"options['reset_mask'] must be {rows} booleans with at least one True, not {quoted(mask)}")
    if first_reset and not bool(tensor.all()):
        raise ResetNeeded("the first reset() must reset every row")
    return tensor


def make_generators(seed: Any, rows: int, current: Sequence[np.random.Generator]) -> list[np.random.Generator]:
    """One random generator for each row.

    Args:
        seed: row i is seeded with seed + i, as Gymnasium's SyncVectorEnv does, or with the i-th of a list. None keeps
            the current generator, or makes one from the system's entropy.
        rows: B.
        current: the generators so far; empty before the first reset.

    Raises:
        ValueError: the seed is neither None, nor an int of 0 or more, nor a list of B of these.
    """
    if seed is None and current:
        return list(current)
    seeds: Sequence[int | None]
    if seed is None:
        seeds = [None] * rows
    elif isinstance(seed, int | np.integer):
        seeds = [int(seed) + row for row in range(rows)]
    else:
        if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str):
            raise ValueError(f"seed={quoted(seed)} must be an int, or a list of {rows} of them")
        seeds = list(seed)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows: give one for each, or a single int")
    for number in seeds:
        if number is not None and (not isinstance(number, int | np.integer) or number < 0):
            raise ValueError(f"the seed {number!r} must be an int of 0 or more, or None")
    old = current or [None] * rows
    return [
        rng if rng is not None and s is None else seeding.np_random(None if s is None else int(s))[0]
        for rng, s in zip(old, seeds, strict=True)
    ]


def make_prompts(
    task: Task, split: Split, generators: Sequence[np.random.Generator], rows: Sequence[int], given: Any = None
) -> list[Prompt]:
    """A prompt for each of these rows, drawn from the task.

    Args:
        task: draws the prompts.
        split: which prompts.
        generators: one for each of the B rows.
        rows: the rows that get a prompt.
        given: `options["prompt"]`, used instead of drawing.

    Raises:
        ValueError: the task returns anything but a Prompt with a text, or `given` is neither a text, nor a Prompt, nor
            a list with one of these for each of the B rows.
    """
    count = len(generators)
    if isinstance(given, (list, tuple)) and len(given) != count:
        raise ValueError(f"{len(given)} prompts for {count} rows: give one for each, or a single one")
    prompts = []
    for row in rows:
        prompt: Any = task.sample(generators[row], split) if given is None else given
        if isinstance(given, (list, tuple)):
            prompt = given[row]
        if given is not None and isinstance(prompt, str):
            prompt = task.prompt_from(prompt)
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ValueError(
                f"the task {task.name!r} returned {quoted(prompt)}: sample() must return a Prompt with a text"
                if given is None
                else f"options['prompt'] is {quoted(prompt)}: give a text, a Prompt, or a list with one for each row"
            )
        prompts.append(prompt)
    return prompts


def encode_prompts(
    model: LanguageModel, prompts: Sequence[Prompt], max_prompt_tokens: int, long_prompts: str
) -> list[list[int]]:
    """The token ids of each prompt, at most `max_prompt_tokens`: of a longer prompt the last ones.

    The special tokens with which a prompt begins are kept.

    Raises:
        ValueError: a prompt is longer and `long_prompts` is "error", or a prompt has no tokens.
    """
    encoded = model.text.encode_prompts(prompts)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > max_prompt_tokens and long_prompts == "error":
            raise ValueError(
                f"the prompt {prompt.quoted()} has {len(ids)} tokens and the budget is {max_prompt_tokens}: raise "
                "max_prompt_tokens, or pass long_prompts='truncate' to keep the last tokens"
            )
    return [model.text.last_tokens(ids, max_prompt_tokens) for ids in encoded]


def with_texts(model: LanguageModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts; those that are token ids get their decoded text, for score functions and for people."""
    return [
        replace(prompt, text=model.text.decode(prompt.token_ids)) if prompt.token_ids and not prompt.text else prompt
        for prompt in prompts
    ]
