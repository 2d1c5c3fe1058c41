"""Which tokens are allowed next: a table for every step, and a function of the text so far if there is one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lmgym.io import quoted
from lmgym.models import LanguageModel
from lmgym.tasks.base import Prompt

ActionMaskFunction = Callable[[Sequence[Prompt], Sequence[Sequence[int]]], Any]
"""Gives the tokens that are allowed next after some texts: the argument `action_mask` of an environment.

It gets N prompts and, for each, the token ids chosen so far; it returns [N, V] booleans (a tensor, an array or lists),
True where a token is allowed. A row may depend on its own prompt and tokens alone, and equal arguments must give equal
masks: it is called once for each state that is visited, with those rows that are still running.
"""


class ActionMasks:
    """The action masks of an environment.

    Args:
        model: gives the vocabulary, the texts for error messages, and the tokens that are never text.
        max_new_tokens: T.
        min_new_tokens: ends are forbidden before this many tokens.
        banned_tokens: ids that are always forbidden.
        function: forbids more, by the text so far; None if the step alone decides.

    Attributes:
        table: [T, V] True where a token is allowed at a step, whatever the text.
        function: see the argument.

    Raises:
        ValueError: a banned token is outside the vocabulary, or a step allows no token.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        banned_tokens: Sequence[int] = (),
        function: ActionMaskFunction | None = None,
    ):
        self.model, self.function = model, function
        wrong = [token for token in banned_tokens if not 0 <= token < model.vocabulary]
        if wrong:
            raise ValueError(f"banned_tokens {wrong} are outside the vocabulary of {model.vocabulary}")
        self.table: Bool[Tensor, "T V"]
        self.table = torch.ones(max_new_tokens, model.vocabulary, dtype=torch.bool, device=model.device)
        self.table[:, list({*model.banned_ids, *banned_tokens})] = False
        self.table[:min_new_tokens, list(model.eos_ids)] = False
        if not bool(self.table.any(1).all()):
            raise ValueError("banned_tokens leave a step at which no token is allowed")

    def after(
        self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], rows: Sequence[int] | None = None
    ) -> Bool[Tensor, "N V"]:
        """The tokens that are allowed after N texts that have not ended.

        Args:
            prompts: one for each text.
            tokens: the token ids chosen after it, fewer than T.
            rows: the numbers of the texts, for error messages; by default 0 to N − 1.

        Raises:
            ValueError: the function returns another shape or type, or leaves no token for a text.
        """
        allowed = self.table[torch.tensor([len(chosen) for chosen in tokens], device=self.table.device)]
        if self.function is None:
            return allowed
        given = self.function(prompts, tokens)
        try:
            mask = torch.as_tensor(given, device=self.table.device)
        except (TypeError, ValueError, RuntimeError):
            mask = torch.zeros(0)  # fails the check below
        if mask.dtype != torch.bool or mask.shape != allowed.shape:
            found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(given, Tensor) else quoted(given)
            raise ValueError(
                f"action_mask returned {found} for {len(tokens)} texts: it must return booleans of shape "
                f"{tuple(allowed.shape)}, one for each text and each token of the vocabulary"
            )
        allowed = allowed & mask
        empty = (~allowed.any(1)).nonzero()[:, 0].tolist()
        if empty:
            i = empty[0]
            text = self.model.text.decode_completion(self.model.text.encode_prompts([prompts[i]])[0], tokens[i])
            raise ValueError(
                f"action_mask leaves no token for row {i if rows is None else rows[i]}, after the prompt "
                f"{prompts[i].text[:80]!r} and the {len(tokens[i])} tokens {text[:200]!r}: allow at least one, for "
                f"example the end of sequence ({', '.join(map(str, self.model.eos_ids))}). Padding and special tokens, "
                "banned_tokens, and ends before min_new_tokens are forbidden whatever it returns"
            )
        return allowed
