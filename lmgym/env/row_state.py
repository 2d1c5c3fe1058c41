"""The state of an environment's rows on the device: prompts, the tokens chosen so far, and which rows have ended."""

import copy
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal, cast

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from jaxtyping import Bool, Int
from torch import Tensor

from lmgym.devices import to_device
from lmgym.env.action_masks import ActionMasks
from lmgym.models import LanguageModel, Sequences
from lmgym.sampling import pack_bits, packed_width
from lmgym.tasks.base import Completion, Prompt


class Finish(IntEnum):
    """Why a row ended. `info["finish_reason"]` holds the name in lower case in NumPy, the number in torch."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2

    @property
    def text(self) -> Literal["running", "stop", "length"]:
        return cast(Literal["running", "stop", "length"], self.name.lower())


class RowState:
    """B rows of text. The tensors are written in place and never replaced, so that a CUDA graph can use them.

    Args:
        model: gives the tokenizer, the device, and the end-of-sequence tokens.
        rows: B.
        max_prompt_tokens: P.
        masks: the tokens that are allowed at a step, and after a text.
        min_new_tokens: stop strings do not end a row before this many tokens.
        stop: strings that end a completion.

    Attributes:
        prompts: one for each row; empty before the first reset.
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] True on the prompt's tokens.
        tokens: [B, T] the chosen tokens; the first `length` of a row are valid.
        length: [B] how many tokens were chosen.
        finish: [B] a `Finish` number.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        max_prompt_tokens: int,
        masks: ActionMasks,
        min_new_tokens: int = 0,
        stop: Sequence[str] = (),
    ):
        self.model, self.rows = model, rows
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, len(masks.table)
        self.min_new_tokens, self.stop = min_new_tokens, tuple(stop)
        self.masks = masks
        device = model.device
        self.prompts: list[Prompt] = []
        self.prompt_ids = torch.zeros(rows, max_prompt_tokens, dtype=torch.long, device=device)
        self.prompt_mask = torch.zeros(rows, max_prompt_tokens, dtype=torch.bool, device=device)
        # With a spare column: rows that have ended are written to as well, those at their budget too.
        self._tokens = torch.zeros(rows, self.max_new_tokens + 1, dtype=torch.long, device=device)
        self.tokens = self._tokens[:, : self.max_new_tokens]
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.finish = torch.zeros(rows, dtype=torch.int8, device=device)
        self._prompt_lengths = [1] * rows
        self._finish_of_token = torch.zeros(model.vocabulary, dtype=torch.int8, device=device)
        self._finish_of_token[list(model.eos_ids)] = int(Finish.STOP)
        self._length_bound = 0  # no row is longer; the host knows it without reading `length`
        # Masks that depend on the text: those of the present states, of which rows they are known, and, as bits, those
        # under which each token was chosen.
        self.reads_text = masks.function is not None
        self._allowed = torch.ones(rows if self.reads_text else 0, model.vocabulary, dtype=torch.bool, device=device)
        self._known = [False] * rows
        shape = (len(self._allowed), self.max_new_tokens, packed_width(model.vocabulary))
        self._chosen_under = torch.full(shape, 255, dtype=torch.uint8, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A pickle forgets that `tokens` is a part of `_tokens`. Other objects hold it too, so it is moved there.
        whole = self._tokens
        self.tokens.set_(whole.untyped_storage(), 0, (self.rows, self.max_new_tokens), whole.stride())

    def part(self, rows: slice) -> "RowState":
        """These rows as a state of their own, in the same memory: what is written to one is in the other."""
        own = copy.copy(self)
        own.rows = len(range(self.rows)[rows])
        own.prompts, own._known = self.prompts[rows], self._known[rows]
        own._prompt_lengths = self._prompt_lengths[rows]
        for name in ("prompt_ids", "prompt_mask", "_tokens", "tokens", "length", "finish", "_allowed", "_chosen_under"):
            setattr(own, name, getattr(self, name)[rows])
        return own

    def chosen_under(self) -> tuple[Tensor, ...]:
        """[B, T, W] the masks under which each token was chosen, as bits, if they depend on the text; else nothing."""
        return (self._chosen_under,) if self.reads_text else ()

    def set_prompts(self, rows: Sequence[int], prompts: Sequence[Prompt], encoded: Sequence[list[int]]) -> None:
        """Starts these rows anew from prompts and their token ids, at most P each."""
        ids = np.full((len(rows), self.max_prompt_tokens), self.model.pad_id, np.int64)
        mask = np.zeros((len(rows), self.max_prompt_tokens), np.bool_)
        everywhere = len(rows) == self.rows
        new, lengths = list(self.prompts) or [Prompt("")] * self.rows, list(self._prompt_lengths)
        for i, (row, prompt, chosen) in enumerate(zip(rows, prompts, encoded, strict=True)):
            new[row], lengths[row] = prompt, len(chosen)
            ids[i, -len(chosen) :] = chosen
            mask[i, -len(chosen) :] = True
        self.prompts, self._prompt_lengths = new, lengths
        index: Any = slice(None) if everywhere else torch.tensor(rows, device=self.model.device)
        self.prompt_ids[index] = to_device(torch.from_numpy(ids), self.model.device)
        self.prompt_mask[index] = to_device(torch.from_numpy(mask), self.model.device)
        for tensor in (self.tokens, self.length, self.finish):
            tensor[index] = 0
        self._length_bound = 0 if everywhere else self._length_bound
        for row in rows:
            self._known[row] = False

    # Transition ----------------------------------------------------------------------------------------------------

    def append(self, token: Int[Tensor, " K"], rows: Int[Tensor, " K"] | None = None) -> None:
        """Appends a token to all rows, or to `rows`. Rows that have ended stay as they are.

        Never synchronises, unless the action mask depends on the text.
        """
        if self.reads_text:
            self._read_texts()
            for row in range(self.rows) if rows is None else rows.tolist():
                self._known[row] = False
        if rows is None:
            running = self.finish == Finish.RUNNING
            self._tokens.scatter_(1, self.length[:, None], token[:, None])
            length = self.length.add_(running)
        else:
            running = self.finish[rows] == Finish.RUNNING
            length = self.length[rows]
            self._tokens[rows, length] = token
            length = length + running
            self.length[rows] = length
        finish = self._finish_of_token.index_select(0, token).mul_(running)
        self._length_bound += 1
        if self._length_bound >= self.max_new_tokens:  # only then can a row have reached its budget
            full = (length >= self.max_new_tokens) & running & (finish == 0)
            finish = finish + full.to(torch.int8) * int(Finish.LENGTH)
        if rows is None:
            self.finish.add_(finish)
        else:
            self.finish[rows] += finish

    def make_append_static(self) -> None:
        """Makes every `append` until the next reset run the same operations, so that a CUDA graph can replay it."""
        self._length_bound = self.max_new_tokens

    def end_at_stop_strings(self, rows: Bool[Tensor, " B"]) -> None:
        """Ends rows at the first token that completes a stop string, and drops the tokens after it."""
        if not self.stop:
            return
        tokens, lengths = self.tokens.tolist(), self.length.tolist()
        indices = rows.nonzero()[:, 0].tolist()
        texts = self.texts(indices, [tokens[row][: lengths[row]] for row in indices])
        for row, text in zip(indices, texts, strict=True):
            if not any(stop in text for stop in self.stop):
                continue
            chosen = tokens[row][: lengths[row]]
            for length in range(max(1, self.min_new_tokens), len(chosen) + 1):
                prefix = self.texts([row], [chosen[:length]])[0]
                if any(stop in prefix for stop in self.stop):
                    self.length[row], self.finish[row] = length, int(Finish.STOP)
                    break

    # Reading -------------------------------------------------------------------------------------------------------

    def running_rows(self) -> list[int]:
        """The rows that have not ended, stop strings included. Synchronises with the device."""
        if self.stop:
            self.end_at_stop_strings(self.finish == Finish.RUNNING)
        return (self.finish == Finish.RUNNING).nonzero()[:, 0].tolist()

    def check_started(self, method: str) -> None:
        """Raises ResetNeeded before the first reset."""
        if not self.prompts:
            raise ResetNeeded(f"{method} before reset(): call reset() first")

    def ends(self, on_limit: str) -> tuple[Bool[Tensor, " B"], Bool[Tensor, " B"]]:
        """Which rows have terminated, and which were truncated at their budget."""
        full = self.finish == Finish.LENGTH
        if on_limit == "terminate":
            return self.finish != Finish.RUNNING, torch.zeros_like(full)
        return self.finish == Finish.STOP, full

    def action_mask(self, rows: Int[Tensor, " K"] | None = None) -> Bool[Tensor, "K V"]:
        """True where a token is allowed next, in all rows or in `rows`; in rows that have ended by the step alone."""
        chosen: Any = slice(None) if rows is None else rows
        by_step = self.masks.table[self.length[chosen].clamp(max=self.max_new_tokens - 1)]
        if not self.reads_text:
            return by_step
        self._read_texts()
        return torch.where((self.finish[chosen] == Finish.RUNNING)[:, None], self._allowed[chosen], by_step)

    def _read_texts(self) -> None:
        """Asks for the masks of the running rows whose text has changed, and records them for scoring."""
        # A row that has written a stop string has ended: its mask is not asked for.
        new = [row for row in self.running_rows() if not self._known[row]]
        if not new:
            return
        lengths = self.length.tolist()
        tokens = [chosen[: lengths[row]] for row, chosen in zip(new, self.tokens[new].tolist(), strict=True)]
        allowed = self.masks.after([self.prompts[row] for row in new], tokens, new)
        self._allowed[new] = allowed
        self._chosen_under[new, self.length[new]] = pack_bits(allowed)
        for row in new:
            self._known[row] = True

    def prompt_block(self) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """Ids and mask of the prompts, left-padded to the longest of them, which may be less than P columns."""
        width = max(self._prompt_lengths)
        return self.prompt_ids[:, -width:], self.prompt_mask[:, -width:]

    def sequences(self, prompt_ids: Int[Tensor, "B P"], prompt_mask: Bool[Tensor, "B P"]) -> Sequences:
        """The given block of prompts, and the tokens chosen so far."""
        steps = torch.arange(self.max_new_tokens, device=self.model.device)
        is_action = steps < self.length[:, None]
        tokens = self.tokens.masked_fill(~is_action, self.model.pad_id)
        masks = None if not self.reads_text else self._chosen_under.masked_fill(~is_action[..., None], 255)
        return Sequences(prompt_ids.clone(), prompt_mask.clone(), tokens, is_action, self.masks.table, text_mask=masks)

    def observation(self) -> dict[str, Tensor]:
        """Prompt and tokens, shifted to the right edge: `input_ids` int64[B, L] and `attention_mask` int8[B, L]."""
        length = self.max_prompt_tokens + self.max_new_tokens
        whole = torch.cat([self.prompt_ids, self.tokens], 1)
        used = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(self.tokens.shape)], 1)
        shift = length - self.max_prompt_tokens - self.length[:, None]
        source = torch.arange(length, device=whole.device) - shift
        inside = source >= 0
        source = source.clamp(min=0)
        mask = used.gather(1, source) & inside
        ids = whole.gather(1, source).masked_fill(~mask, self.model.pad_id)
        return {"input_ids": ids, "attention_mask": mask.to(torch.int8)}

    def texts(self, rows: Sequence[int], chosen: Sequence[list[int]]) -> list[str]:
        """The text of these tokens, each after the prompt of its row."""
        ids, lengths = self.prompt_ids.tolist(), self._prompt_lengths
        return self.model.text.decode_completions([ids[row][-lengths[row] :] for row in rows], chosen)

    def completions(self, rows: Sequence[int] | None = None) -> list[Completion]:
        """The texts written so far, without stop string."""
        rows = range(self.rows) if rows is None else rows
        tokens, lengths, finish = self.tokens.tolist(), self.length.tolist(), self.finish.tolist()
        texts = self.texts(rows, [tokens[row][: lengths[row]] for row in rows])
        completions = []
        for row, text in zip(rows, texts, strict=True):
            if finish[row] == Finish.STOP:
                text = text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]
            completions.append(Completion(text, Finish(finish[row]).text, lengths[row], tokens[row][: lengths[row]]))
        return completions
