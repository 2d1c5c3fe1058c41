"""Token generation as a Markov decision process: the state is the text so far, the action is the next token.

`TokenVectorEnv` is the implementation: batched, in torch, on a device. `TokenEnv` is its one-row NumPy view.

The same MDP can be driven in two ways. `step` pays each reward at its step, and resets finished rows as Gymnasium
specifies. For throughput, `append` only moves the state, on the device, and `pay_rewards` then pays the rewards of the
whole finished batch with one pass of the reference and one call of the score. Both give the same rewards.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.profiler import record_function

from lmgym.env.actions import make_action_mask_table, parse_actions
from lmgym.env.arguments import RENDER_MODES, LongPrompts, OnLimit, Output, RenderMode, check_arguments
from lmgym.env.batch_outcome import Outcome
from lmgym.env.infos import convert, make_final_infos, make_infos
from lmgym.env.prompts import check_options, encode_prompts, make_generators, make_prompts, parse_reset_mask, with_texts
from lmgym.env.rendering import render_rows
from lmgym.env.rewards import RowRewards
from lmgym.env.row_state import Finish, RowState
from lmgym.env.scorer_cache import ScorerCache, TokenScorer
from lmgym.env.spaces import make_spaces
from lmgym.fused import FrozenPrefix
from lmgym.models import LanguageModel, Reference, Sequences
from lmgym.reward import FixedKL, KLController, KLForm, Score, kl_reward
from lmgym.tasks.base import Completion, Prompt, ScoreFunction, Split, Task


class TokenVectorEnv(VectorEnv):
    """Rows of token generation, batched on a device.

    Observation: `Dict(input_ids int64[L], attention_mask int8[L])`, left-padded, L = P + T. Action: `Discrete(V)`, the
    next token's id. A row ends at an end-of-sequence token or stop string (`terminated`, finish reason "stop"), or
    at the token budget ("length"), which is part of the task and so `terminated` too, unless `on_limit="truncate"`.
    Reward: `score · [token is last] − β · KL`, in the form that `kl` says.

    `info` holds, for every row: `action_mask` int8[V], `reference_logp` (nats, of the action just taken),
    `finish_reason`, `score` and `scores` (its breakdown; both 0 until the end).

    Args:
        num_envs: B, the number of rows.
        task: gives prompts and scores.
        model: gives the tokenizer, V, and the reference.
        score: pays instead of `task.score`: any callable over completions, or a composed `Score`.
        split: "train" or "test" prompts.
        max_prompt_tokens: P. A longer prompt raises, or loses its first tokens with `long_prompts="truncate"`.
        max_new_tokens: T, the token budget.
        min_new_tokens: end-of-sequence tokens are masked before this many tokens, and stop strings do not stop.
        on_limit: what the budget means: "terminate" ends and scores the row, "truncate" gives `truncated`, no score.
        long_prompts: "error" or "truncate".
        kl: "reference" pays `β log π_ref` (any algorithm can use it); "sampled" pays `−β (log π − log π_ref)` and needs
            `TokenAction(token, logp)` or `bind(policy)`; "none" pays nothing.
        kl_estimator: only "k1" is right in the reward; the others are refused with the reason.
        beta: β in score per nat, or a controller such as `AdaptiveKL`.
        temperature: the policy's temperature, at which the reference is measured too.
        reference_adapter: a frozen adapter of the model that is the reference; None is the model with adapters off.
        banned_tokens: ids that the action mask forbids, beyond the model's own (padding, special tokens).
        stop: strings that end a completion, beyond the task's.
        missing_eos_score: the score of rows that reach the budget; "task" takes the task's rule, None scores the text.
        autoreset_mode: when finished rows restart, see `gymnasium.vector.AutoresetMode`.
        output: "torch" or "numpy".
        render_mode: "ansi" renders texts, "rgb_array" images; "human" prints coloured texts at every reset and step.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: Task,
        model: LanguageModel,
        score: Score | ScoreFunction | None = None,
        split: Split = "train",
        max_prompt_tokens: int = 32,
        max_new_tokens: int = 48,
        min_new_tokens: int = 0,
        on_limit: OnLimit = "terminate",
        long_prompts: LongPrompts = "error",
        kl: KLForm = "reference",
        kl_estimator: str = "k1",
        beta: float | KLController = 0.05,
        temperature: float = 1.0,
        reference_adapter: str | None = None,
        banned_tokens: Sequence[int] = (),
        stop: Sequence[str] = (),
        missing_eos_score: float | Literal["task"] | None = "task",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        output: Output = "torch",
        render_mode: RenderMode | None = None,
    ):
        check_arguments(
            num_envs=num_envs, task=task, model=model, stop=stop, missing_eos_score=missing_eos_score,
            max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens,
            kl_estimator=kl_estimator, kl=kl, on_limit=on_limit, long_prompts=long_prompts, output=output, split=split,
            render_mode=render_mode,
        )  # fmt: skip
        self.num_envs, self.task, self.model = num_envs, task, model
        self.score = score if isinstance(score, Score) else Score({task.name: score or task.score})
        self.split: Split = split
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self.min_new_tokens, self.on_limit, self.long_prompts = min_new_tokens, on_limit, long_prompts
        self.kl: KLForm = kl
        self.kl_controller = FixedKL(float(beta)) if isinstance(beta, (int, float)) else beta
        self.reference = Reference(model, reference_adapter, temperature)
        self.stop = (*task.stop, *stop)
        self.missing_eos_score = task.missing_eos_score if missing_eos_score == "task" else missing_eos_score
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.output, self.render_mode = output, render_mode
        # An instance of the enum, per environment: gymnasium's wrappers compare it by identity.
        self.metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = make_spaces(
            model.vocabulary, max_prompt_tokens + max_new_tokens
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._make_state(banned_tokens)

    def _make_state(self, banned_tokens: Sequence[int]) -> None:
        model, shortest = self.model, self.min_new_tokens
        self.action_mask_table = table = make_action_mask_table(model, self.max_new_tokens, shortest, banned_tokens)
        self.state = RowState(model, self.num_envs, self.max_prompt_tokens, table, shortest, self.stop)
        # The same tensors: they are written in place.
        self.prompt_ids, self.prompt_mask = self.state.prompt_ids, self.state.prompt_mask
        self.tokens, self.length, self.finish = self.state.tokens, self.state.length, self.state.finish
        self.rewards = RowRewards(self.score.names, self.num_envs, self.max_new_tokens, model.device)
        self._scorers = {"reference": ScorerCache(self.reference, self.state)}
        self._rngs: list[np.random.Generator] = []

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each row; empty before the first reset."""
        return self.state.prompts

    # Gymnasium -----------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws new prompts.

        Args:
            seed: row i draws its prompts from a generator seeded with `seed + i`, or with the i-th of a list.
            options: "reset_mask" (bool[B]) resets only these rows; "prompt" (text, `Prompt`, or a list of them, one
                a row) is used instead of drawing.

        Raises:
            ValueError: seed or options are malformed, or a prompt does not fit its budget. No row is changed.
            ResetNeeded: the first reset leaves out a row.
        """
        given, mask = check_options(options), None
        self._rngs = make_generators(seed, self.num_envs, self._rngs)
        if given.get("reset_mask") is not None:  # read, not popped: RecordEpisodeStatistics reads it afterwards
            mask = parse_reset_mask(given["reset_mask"], self.num_envs, not self.prompts, self.model.device)
        self._reset_rows(mask, given.get("prompt"))
        if self.render_mode == "human":
            self.render()
        return convert(self.observation(), self.output), make_infos(self.state, self.rewards, self.output, mask)

    @torch.no_grad()
    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Takes one action in each row and pays its reward.

        Args:
            actions: [B] token ids, or a `TokenAction` with their log-probabilities.

        Raises:
            ResetNeeded: before the first reset, or with `AutoresetMode.DISABLED` when a row has ended.
            InvalidAction: a token is outside the vocabulary.
            ValueError: `kl="sampled"` and no log-probability, or a score is not a finite number.
        """
        self.state.check_started("step()")
        token, logp = parse_actions(actions, self.num_envs, self.model.vocabulary, self.model.device)
        ended = self.finish != Finish.RUNNING
        live = ~ended
        if self.autoreset_mode is AutoresetMode.DISABLED and bool(ended.any()):
            raise ResetNeeded(
                f"rows {ended.nonzero()[:, 0].tolist()} have ended: reset them before the next step, with "
                "reset(options={'reset_mask': mask})"
            )
        rewards = self._pay_kl(token, logp, live)
        at = self.length.clamp(max=self.max_new_tokens - 1)
        self.state.append(token)
        self.state.end_at_stop_strings(live)
        # Before scoring: if a score raises, the caches still agree with the state.
        for scorer in self._scorers.values():
            scorer.advance(token, live)
        terminated, truncated = (flags & live for flags in self.state.ends(self.on_limit))
        self.rewards.score_rows(terminated, self.state, self.score, self.missing_eos_score)
        rewards = rewards + self.rewards.score * terminated
        self.rewards.token_rewards[live, at[live]] = rewards[live]
        infos = self._autoreset(terminated | truncated, ended)
        if self.render_mode == "human":
            self.render()
        infos |= make_infos(self.state, self.rewards, self.output)
        rewards = rewards.double() if self.output == "numpy" else rewards
        return *convert((self.observation(), rewards, terminated, truncated), self.output), infos

    def render(self) -> Any:
        """The texts so far, one for each row.

        Returns:
            A tuple of strings ("ansi") or of images uint8[H, W, 3] ("rgb_array"); None otherwise. "human" prints the
            texts, coloured by token reward: green tokens gained reward, red ones lost reward.
        """
        return render_rows(self.state, self.rewards.token_rewards, self.render_mode)

    # The bulk path -------------------------------------------------------------------------------------------------

    def append(self, token: Int[Tensor, " K"], rows: Int[Tensor, " K"] | None = None) -> None:
        """Appends a token to every running row; ended rows stay as they are. Never synchronises with the device.

        Stop strings are found by `pay_rewards`, or by `running_rows`.

        Args:
            token: one for each row, or for each of `rows`.
            rows: these rows only.
        """
        self.state.append(token, rows)
        for scorer in self._scorers.values():
            scorer.decoding = None  # it has not read the token

    def make_append_static(self) -> None:
        """Makes every `append` until the next reset run the same operations, so that a CUDA graph can replay it."""
        self.state.make_append_static()
        for scorer in self._scorers.values():
            scorer.decoding = None

    def running_rows(self) -> list[int]:
        """The rows that have not ended. Synchronises with the device, so call it only every few steps."""
        return self.state.running_rows()

    def any_running(self) -> bool:
        """Whether any row has not ended. Synchronises with the device, so call it only every few steps."""
        return bool(self.running_rows())

    def pay_rewards(
        self, logp: Float[Tensor, "B T"] | None = None, frozen_prefix: FrozenPrefix | None = None
    ) -> Outcome:
        """Pays the rewards of the whole batch, with one pass of the reference and one call of the score.

        Args:
            logp: log π of the tokens in nats, for `kl="sampled"`.
            frozen_prefix: the activations below the adapters for these sequences, if they were stored.

        Raises:
            ResetNeeded: a row has not ended.
            ValueError: `kl="sampled"` without `logp`, or a score is not a finite number.
        """
        if self.any_running():
            raise ResetNeeded("pay_rewards() needs a finished batch: append() tokens until every row has ended")
        # A row may have run past a stop string and then ended otherwise: it ended at the stop string.
        self.state.end_at_stop_strings(torch.ones_like(self.prompt_mask[:, 0]))
        terminated, truncated = self.state.ends(self.on_limit)
        sequences = replace(self.sequences(), frozen_prefix=frozen_prefix)
        is_action, paid = sequences.is_action, self.rewards
        paid.score.zero_()
        with record_function("lmgym/score"):
            paid.score_rows(terminated, self.state, self.score, self.missing_eos_score)
        with record_function("lmgym/reference"):
            reference_logp = self.reference.evaluate(sequences)
        rewards = kl_reward(self.kl, self.kl_controller.beta, logp, reference_logp).masked_fill(~is_action, 0.0)
        rewards.scatter_add_(1, self.length[:, None] - 1, (paid.score * terminated)[:, None])
        paid.token_rewards.copy_(rewards)
        breakdown = {name: column.clone() for name, column in paid.breakdown.items()}
        score, finish = paid.score.clone(), self.finish.clone()
        return Outcome(rewards, reference_logp, is_action, score, breakdown, finish, truncated)

    def prompt_block(self) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """Ids and mask of the prompts, left-padded to the longest of them, which may be less than P columns."""
        return self.state.prompt_block()

    def sequences(self) -> Sequences:
        """The prompts and the tokens chosen so far."""
        return self.state.sequences(*self.prompt_block())

    def observation(self) -> dict[str, Tensor]:
        """The observation of the current state, on the device."""
        return self.state.observation()

    def completions(self, rows: Sequence[int] | None = None) -> list[Completion]:
        """The texts written so far, without stop string."""
        return self.state.completions(rows)

    def action_masks(self) -> Any:
        """[B, V] True where a token is allowed next; the name that sb3-contrib's MaskablePPO requires."""
        return convert(self.state.action_mask(), self.output)

    def bind(self, policy: TokenScorer) -> None:
        """Lets `step` compute log π with the policy that chooses the actions, for `kl="sampled"`."""
        self._scorers["policy"] = ScorerCache(policy, self.state)

    def set_reference(self, adapter: str | None) -> None:
        """From now on measures KL from another frozen adapter, or from the model with adapters off (None)."""
        self.reference = replace(self.reference, adapter=adapter)
        self._scorers["reference"] = ScorerCache(self.reference, self.state)

    def _pay_kl(self, token: Tensor, logp: Tensor | None, live: Tensor) -> Tensor:
        """The KL part of the rewards; 0 for rows that have ended."""
        action_mask = self.state.action_mask()
        self.rewards.reference_logp = self._scorers["reference"].logp(token, action_mask) * live
        if "policy" in self._scorers and logp is None:
            logp = self._scorers["policy"].logp(token, action_mask)
        return kl_reward(self.kl, self.kl_controller.beta, logp, self.rewards.reference_logp).masked_fill(~live, 0.0)

    def _autoreset(self, done: Tensor, ended: Tensor) -> dict[str, Any]:
        """Resets rows as `autoreset_mode` specifies: those that end in this step, or those that had ended before it."""
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and bool(done.any()):
            if self.render_mode == "human":
                self.render()  # the last token, which the reset removes
            observation = convert(self.observation(), self.output)
            infos = make_final_infos(observation, make_infos(self.state, self.rewards, self.output, done), done)
            self._reset_rows(done)
        elif bool(ended.any()):
            self._reset_rows(ended)
        return infos

    def _reset_rows(self, mask: Tensor | None, given: Any = None) -> None:
        """New prompts for the rows that are True in `mask` [B], or for all rows."""
        index = slice(None) if mask is None else mask.nonzero()[:, 0]
        rows = list(range(self.num_envs)) if isinstance(index, slice) else index.tolist()
        new = make_prompts(self.task, self.split, self._rngs, rows, given)
        encoded = encode_prompts(self.model, new, self.max_prompt_tokens, self.long_prompts)
        # Nothing is changed before every prompt is known to be valid.
        self.state.set_prompts(rows, with_texts(self.model, new), encoded)
        self.rewards.clear(index)
        for scorer in self._scorers.values():
            scorer.stale[index] = True
