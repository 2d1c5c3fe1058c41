"""Warnings about suspicious metrics of an update, each with its usual causes."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import mean, stdev

import torch

from agents.training import State

WINDOW = 8
"""The number of updates in a test for a trend, which compares the second half with the first."""


class Alarms:
    """Checks the metrics of each update, and gives each warning once. The metrics are on the host already.

    Args:
        max_kl: the KL to the reference, in nats per sequence, above which it warns.
        dtype: the dtype of the weights.
    """

    def __init__(self, max_kl: float = 50.0, dtype: torch.dtype = torch.float32):
        self.max_kl = max_kl
        # Rounding alone may cause this deviation of the probability ratio from 1.
        self.ratio = 1e-3 if dtype == torch.float32 else 0.05
        self._given: set[str] = set()
        self._first_entropy: float | None = None
        self._rows: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def check(self, row: Mapping[str, float]) -> list[str]:
        """The warnings for an update's metrics, without those that were given before."""
        known = {name: float(value) for name, value in row.items() if value is not None and math.isfinite(value)}
        self._rows.append(known)
        if self._first_entropy is None:
            self._first_entropy = known.get("policy/entropy_nats")
        found = dict(self._warnings(known))
        new = [text for name, text in found.items() if name not in self._given]
        self._given |= set(found)
        return new

    def _warnings(self, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        if (deviation := row.get("policy/ratio_deviation", 0.0)) > self.ratio:
            yield (
                "ratio",
                f"before the first step of an update, the probability ratio was {deviation:.2g} away from 1 on "
                "average: tokens are not scored with the distribution from which they were sampled. Usual causes: "
                "different temperatures or masks in evaluate() and act(), dropout, attention to padding, low-precision "
                "log-probabilities",
            )
        if (k3 := row.get("kl/token_k3_nats", 0.0)) < -1e-6:
            yield (
                "k3",
                f"the k3 estimate of KL is {k3:.2g}, but a correct estimate is never negative: the log-probabilities "
                "of policy and reference belong to different tokens. Usual causes: different masks or shifts",
            )
        if (kl := row.get("kl/sequence_nats", 0.0)) > self.max_kl:
            yield (
                "kl",
                f"KL to the reference is {kl:.1f} nats per sequence, above {self.max_kl:g}: the policy is far from the "
                "texts on which a reward model was trained, and its scores are unreliable there. Usual causes: β too "
                "small, learning rate too high. Raise beta, or adapt it with kl_target_nats",
            )
        entropy, first = row.get("policy/entropy_nats"), self._first_entropy
        if entropy is not None and first is not None and entropy < 0.05 * first:
            yield (
                "entropy",
                f"entropy fell from {first:.2f} to {entropy:.3f} nats per token: the policy repeats the "
                "same text and no longer explores. Usual causes: learning rate too high, β too small, a score that one "
                "text maximises",
            )
        last = list(self._rows)[-3:]
        if len(last) == 3 and all(r.get("tokens/unfinished_share", 0.0) == 1 for r in last):
            yield (
                "endless",
                "no completion of the last three rollouts ended before the token budget. Usual causes: max_new_tokens "
                "too small, a model that was never trained to end, no missing_eos_score to penalise it, a masked "
                "end-of-sequence token",
            )
        for judge in ("gold/mean", "watch/mean"):
            if trend := self._divergence("score/mean", judge):
                yield (
                    judge,
                    f"{trend}: the policy exploits errors of its score (over-optimisation). Raise beta, stop earlier, "
                    "or train the reward model again on completions of the current policy",
                )
        if bad := row.get("optimizer/bad_steps", 0.0):
            yield (
                "bad_steps",
                f"{bad:.0f} optimizer steps of an update were skipped, because their gradient was not finite "
                "(optimizer/bad_steps counts them). Without --on-bad-step skip, the run stops and shows the rows",
            )

    def _divergence(self, up: str, down: str) -> str:
        """A text if one metric rose and the other fell, each by more than two standard errors; otherwise ""."""
        rows = [row for row in self._rows if up in row and down in row]
        if len(rows) < WINDOW:
            return ""
        moves = []
        for name in (up, down):
            first, last = ([row[name] for row in part] for part in (rows[: WINDOW // 2], rows[WINDOW // 2 :]))
            error = math.sqrt((stdev(first) ** 2 + stdev(last) ** 2) / (WINDOW // 2))
            moves.append((mean(first), mean(last), 2 * error))
        (up_from, up_to, rise), (down_from, down_to, fall) = moves
        if up_to - up_from <= rise or down_from - down_to <= fall:
            return ""
        return f"{up} rose from {up_from:.3g} to {up_to:.3g} while {down} fell from {down_from:.3g} to {down_to:.3g}"

    def state(self) -> State:
        return State({"given": sorted(self._given), "entropy": self._first_entropy, "rows": list(self._rows)})

    def restore(self, state: State) -> None:
        self._given = set(map(str, state.data["given"]))
        self._first_entropy = None if state.data["entropy"] is None else state.number("entropy")
        self._rows = deque(({k: float(v) for k, v in row.items()} for row in state.data["rows"]), WINDOW)
