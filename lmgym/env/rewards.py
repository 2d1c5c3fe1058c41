"""What the rows of an environment have earned: scores, their breakdown, and the rewards of the tokens."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from lmgym.env.row_state import RowState
from lmgym.reward import Score
from lmgym.tasks.base import Completion


class RowRewards:
    """The scores and rewards of B rows on the device.

    Args:
        components: names of the components of the score.
        rows: B.
        steps: T.
        device: where the tensors live.

    Attributes:
        reference_logp: [B] log π_ref of the action just taken, in nats.
        score: [B] the composed score; 0 until the end.
        breakdown: [B] for each component of the score, unweighted; 0 until the end.
        token_rewards: [B, T] for rendering.
    """

    def __init__(self, components: Sequence[str], rows: int, steps: int, device: torch.device):
        self.reference_logp = torch.zeros(rows, dtype=torch.float32, device=device)
        self.score = torch.zeros(rows, dtype=torch.float32, device=device)
        self.breakdown = {name: torch.zeros(rows, dtype=torch.float32, device=device) for name in components}
        self.token_rewards = torch.zeros(rows, steps, dtype=torch.float32, device=device)

    def part(self, rows: slice) -> "RowRewards":
        """Those of some rows, in the same memory."""
        own = copy.copy(self)
        own.breakdown = {name: column[rows] for name, column in self.breakdown.items()}
        for name in ("reference_logp", "score", "token_rewards"):
            setattr(own, name, getattr(self, name)[rows])
        return own

    def clear(self, rows: slice | Tensor) -> None:
        """Sets these rows to 0."""
        for tensor in (self.reference_logp, self.score, self.token_rewards, *self.breakdown.values()):
            tensor[rows] = 0

    def score_rows(
        self, rows: Bool[Tensor, " B"], state: RowState, score: Score, missing_eos_score: float | None
    ) -> None:
        """Scores the completions of the rows that are True in `rows`.

        Args:
            rows: True for rows that have terminated.
            state: gives their prompts and completions.
            score: gives each completion its score.
            missing_eos_score: the score of completions at the token budget; None scores their text.
        """
        indices = rows.nonzero()[:, 0].tolist()
        if not indices:
            return
        chosen: list[int] = []
        completions: list[Completion] = []
        for row, completion in zip(indices, state.completions(indices), strict=True):
            if completion.finish_reason == "length" and missing_eos_score is not None:
                self.score[row] = missing_eos_score
            else:
                chosen.append(row)
                completions.append(completion)
        if not chosen:
            return
        breakdown = score.breakdown([state.prompts[row] for row in chosen], completions)
        self.score[chosen] = self.score.new_tensor(score.total(breakdown))
        for name, column in breakdown.items():
            self.breakdown[name][chosen] = self.score.new_tensor(column)
