"""Token generation as a Markov decision process: the state is the text so far, the action is the next token.

`TokenVectorEnv` is the implementation: batched, in torch, on a device. `TokenEnv` is its one-row NumPy view.

One MDP, two ways to drive it. `step` pays each reward at its step, and resets finished rows as Gymnasium asks.
For throughput, `append` only moves the state, on the device, and `pay_rewards` afterwards pays the rewards of the whole
finished batch with one pass of the reference and one call of the score. Both give the same rewards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.profiler import record_function

from lmgym.devices import to_device
from lmgym.env.actions import TokenAction
from lmgym.env.arguments import OnLimit, check_choice
from lmgym.env.infos import numpy_infos
from lmgym.env.outcome import Finish, Outcome
from lmgym.env.scorer_cache import ScorerCache, TokenScorer
from lmgym.fused import FrozenPrefix
from lmgym.io import printable, quoted
from lmgym.models import LanguageModel, Reference, Sequences
from lmgym.reward import FixedKL, KLController, KLForm, Score, check_reward_estimator, kl_reward
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
        render_mode: "ansi" returns texts, "human" prints them coloured by per-token reward.
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
        long_prompts: Literal["error", "truncate"] = "error",
        kl: KLForm = "reference",
        kl_estimator: str = "k1",
        beta: float | KLController = 0.05,
        temperature: float = 1.0,
        reference_adapter: str | None = None,
        banned_tokens: Sequence[int] = (),
        stop: Sequence[str] = (),
        missing_eos_score: float | Literal["task"] | None = "task",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        output: Literal["torch", "numpy"] = "torch",
        render_mode: Literal["ansi", "human"] | None = None,
    ):
        check_reward_estimator(kl_estimator)
        check_choice("kl", kl, ("reference", "sampled", "none"))
        check_choice("on_limit", on_limit, ("terminate", "truncate"))
        check_choice("long_prompts", long_prompts, ("error", "truncate"))
        check_choice("output", output, ("torch", "numpy"))
        check_choice("split", split, ("train", "test"))
        check_choice("render_mode", render_mode, (None, "ansi", "human"))
        if not isinstance(model, LanguageModel):
            raise ValueError(f"model={model!r} is no LanguageModel: load it first, lmgym.load('tiny') for example")
        if not isinstance(task, Task):
            raise ValueError(f"task={task!r} is no lmgym.Task: give an object of a subclass with sample() and score()")
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be at least 1")
        for name, strings in (("stop", stop), ("task.stop", task.stop)):
            if isinstance(strings, str) or not all(isinstance(string, str) for string in strings):
                raise ValueError(f"{name}={strings!r} must be a tuple of strings: one alone is ('END',)")
            if "" in strings:
                raise ValueError(f"{name} holds an empty string, which every text contains: give a letter or more")
        for name, number in (
            ("missing_eos_score", missing_eos_score),
            ("task.missing_eos_score", task.missing_eos_score),
        ):
            if not (number is None or number == "task" or (isinstance(number, int | float) and math.isfinite(number))):
                raise ValueError(f"{name}={number!r} must be a finite number, 'task' or None")
        if max_prompt_tokens < 1 or max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(
                f"max_prompt_tokens={max_prompt_tokens} and max_new_tokens={max_new_tokens} must be at least 1, and "
                f"min_new_tokens={min_new_tokens} between 0 and max_new_tokens"
            )
        if on_limit == "truncate" and max_new_tokens < 2:
            raise ValueError(
                "on_limit='truncate' needs max_new_tokens of at least 2: a row may not end at its first step"
            )
        longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and max_prompt_tokens + max_new_tokens > longest:
            raise ValueError(
                f"max_prompt_tokens={max_prompt_tokens} plus max_new_tokens={max_new_tokens} exceed the {longest} "
                f"positions of the model {model.name!r}: lower one of them"
            )
        self.num_envs = num_envs
        self.task = task
        self.model = model
        self.score = score if isinstance(score, Score) else Score({task.name: score or task.score})
        self.split: Split = split
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.min_new_tokens = min_new_tokens
        self.on_limit = on_limit
        self.long_prompts = long_prompts
        self.kl: KLForm = kl
        self.kl_controller = FixedKL(float(beta)) if isinstance(beta, (int, float)) else beta
        self.reference = Reference(model, reference_adapter, temperature)
        self.stop = (*task.stop, *stop)
        self.missing_eos_score = task.missing_eos_score if missing_eos_score == "task" else missing_eos_score
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.output = output
        self.render_mode = render_mode
        # An instance of the enum, per environment: gymnasium's wrappers compare it by identity.
        self.metadata = {"render_modes": ["ansi", "human"], "render_fps": 4, "autoreset_mode": self.autoreset_mode}
        vocabulary, length = model.vocabulary, max_prompt_tokens + max_new_tokens
        self.single_observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, vocabulary - 1, (length,), np.int64),
                "attention_mask": spaces.Box(0, 1, (length,), np.int8),
            }
        )
        self.single_action_space = spaces.Discrete(vocabulary)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=model.device)

        self.prompt_ids = zeros(num_envs, max_prompt_tokens, dtype=torch.long)
        self.prompt_mask = zeros(num_envs, max_prompt_tokens, dtype=torch.bool)
        self._tokens = zeros(num_envs, max_new_tokens + 1, dtype=torch.long)
        self.tokens = self._tokens[:, :max_new_tokens]
        self.length = zeros(num_envs, dtype=torch.long)
        self.finish = zeros(num_envs, dtype=torch.int8)
        self.prompts: list[Prompt] = []
        self._prompt_lengths = [1] * num_envs
        self._stops = zeros(vocabulary, dtype=torch.int8)
        self._stops[list(model.eos_ids)] = int(Finish.STOP)
        self._most = 0  # appended tokens, as far as any row can have them
        self._reference_logp = zeros(num_envs, dtype=torch.float32)
        self._score = zeros(num_envs, dtype=torch.float32)
        self._breakdown = {name: zeros(num_envs, dtype=torch.float32) for name in self.score.names}
        self._token_rewards = zeros(num_envs, max_new_tokens, dtype=torch.float32)
        self.action_mask_table = self._action_masks(banned_tokens)
        self._scorers = {"reference": ScorerCache(self.reference, self)}
        self._rngs: list[np.random.Generator] = []

    # Gymnasium -----------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws new prompts.

        Args:
            seed: row i draws its prompts from a generator seeded with `seed + i`, or with the i-th of a list.
            options: "reset_mask" (bool[B]) resets only these rows; "prompt" (text, `Prompt`, or a list of them, one
                a row) is used instead of drawing.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options={quoted(options)} must be a dict, with 'prompt' or 'reset_mask', or None")
        self._seed(seed)
        options = options or {}
        mask = None if options.get("reset_mask") is None else self._reset_mask(options["reset_mask"])
        self._reset_rows(mask, options.get("prompt"))
        return self._out(self.observation()), self._infos(mask)

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
        token, logp = self._actions(actions)
        ended = self.finish != Finish.RUNNING
        live = ~ended
        if self.autoreset_mode is AutoresetMode.DISABLED and bool(ended.any()):
            raise ResetNeeded(
                f"rows {ended.nonzero()[:, 0].tolist()} have ended: reset them before stepping on, with "
                "reset(options={'reset_mask': mask})"
            )
        action_mask = self._action_mask()
        self._reference_logp = self._scorers["reference"].logp(token, action_mask) * live
        if "policy" in self._scorers and logp is None:
            logp = self._scorers["policy"].logp(token, action_mask)
        rewards = kl_reward(self.kl, self.kl_controller.beta, logp, self._reference_logp).masked_fill(ended, 0.0)
        at = self.length.clamp(max=self.max_new_tokens - 1)
        self._append(token, live)
        self._stop_at_strings(live)
        # Before scoring: a score that raises leaves caches that agree with the state.
        for track in self._scorers.values():
            track.advance(token, live)
        terminated, truncated = self._ends()
        terminated, truncated = terminated & live, truncated & live
        self._pay_scores(terminated)
        rewards = rewards + self._score * terminated
        self._token_rewards[live, at[live]] = rewards[live]

        infos: dict[str, Any] = {}
        done = terminated | truncated
        if self.autoreset_mode is AutoresetMode.SAME_STEP and bool(done.any()):
            infos = self._final(done)
            self._reset_rows(done)
        elif bool(ended.any()):
            self._reset_rows(ended)
        infos |= self._infos()
        if self.output == "numpy":
            rewards = rewards.double()
        return self._out(self.observation()), self._out(rewards), self._out(terminated), self._out(truncated), infos

    def render(self) -> Any:
        """The texts so far: returned as one string a row ("ansi"), or printed, coloured by token reward ("human")."""
        if self.render_mode is None:
            gym.logger.warn("render() without a render_mode does nothing: make the environment with render_mode='ansi'")
            return None
        texts = tuple(self._render_row(row, self.render_mode == "human") for row in range(self.num_envs))
        if self.render_mode == "human":
            print("\n".join(texts))
            return None
        return texts

    # The bulk path -------------------------------------------------------------------------------------------------

    def append(self, token: Int[Tensor, " K"], rows: Int[Tensor, " K"] | None = None) -> None:
        """Appends a token to every row that still runs; ended rows stay as they are. Never waits for the device.

        Stop strings are found by `pay_rewards`, or by `running_rows`.

        Args:
            token: one for each row, or for each of `rows`.
            rows: these rows alone.
        """
        where = slice(None) if rows is None else rows
        self._append(token, self.finish[where] == Finish.RUNNING, where)
        for track in self._scorers.values():
            track.decoding = None  # it has not read the token

    def make_append_static(self) -> None:
        """Until the next reset, `append` is the same operations at every call: a CUDA graph repeats them unasked."""
        self._most = self.max_new_tokens
        for track in self._scorers.values():
            track.decoding = None

    def running_rows(self) -> list[int]:
        """The rows that run on. Waits for the device, so ask only now and then."""
        if self.stop:
            self._stop_at_strings(self.finish == Finish.RUNNING)
        return (self.finish == Finish.RUNNING).nonzero()[:, 0].tolist()

    def any_running(self) -> bool:
        """Whether any row runs on. Waits for the device, so ask only now and then."""
        return bool(self.running_rows())

    def pay_rewards(
        self, logp: Float[Tensor, "B T"] | None = None, frozen_prefix: FrozenPrefix | None = None
    ) -> Outcome:
        """Pays the rewards of the whole batch at once: one pass of the reference, one call of the score.

        Args:
            logp: log π of the tokens in nats, for `kl="sampled"`.
            frozen_prefix: what the layers below the adapters made of the sequences, where that was kept.

        Raises:
            ResetNeeded: a row still runs.
            ValueError: `kl="sampled"` without `logp`, or a score is not a finite number.
        """
        if self.any_running():
            raise ResetNeeded("pay_rewards() pays finished batches: append() tokens until every row has ended")
        # Rows that went on past a stop string, and then ended otherwise, ended at the stop string.
        self._stop_at_strings(torch.ones_like(self.prompt_mask[:, 0]))
        terminated, truncated = self._ends()
        sequences = replace(self.sequences(), frozen_prefix=frozen_prefix)
        is_action = sequences.is_action
        self._score.zero_()
        with record_function("lmgym/score"):
            self._pay_scores(terminated)
        with record_function("lmgym/reference"):
            reference_logp = self.reference.evaluate(sequences)
        rewards = kl_reward(self.kl, self.kl_controller.beta, logp, reference_logp).masked_fill(~is_action, 0.0)
        rewards.scatter_add_(1, self.length[:, None] - 1, (self._score * terminated)[:, None])
        self._token_rewards.copy_(rewards)
        breakdown = {name: column.clone() for name, column in self._breakdown.items()}
        return Outcome(
            rewards, reference_logp, is_action, self._score.clone(), breakdown, self.finish.clone(), truncated
        )

    def sequences(self) -> Sequences:
        """The prompts and the tokens chosen so far."""
        steps = torch.arange(self.max_new_tokens, device=self.model.device)
        is_action = steps < self.length[:, None]
        tokens = self.tokens.masked_fill(~is_action, self.model.pad_id)
        prompt_ids, prompt_mask = self.prompt_block()
        return Sequences(prompt_ids.clone(), prompt_mask.clone(), tokens, is_action, self.action_mask_table)

    def prompt_block(self) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """Ids and mask of the prompts, left-padded to the longest one that is there: less to read than P columns."""
        width = max(self._prompt_lengths)
        return self.prompt_ids[:, -width:], self.prompt_mask[:, -width:]

    # More about the state ------------------------------------------------------------------------------------------

    def observation(self) -> dict[str, Tensor]:
        """The observation: prompt and tokens, shifted to the right edge, on the device."""
        prompt_width, length = self.max_prompt_tokens, self.max_prompt_tokens + self.max_new_tokens
        whole = torch.cat([self.prompt_ids, self.tokens], 1)
        used = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(self.tokens.shape)], 1)
        source = torch.arange(length, device=whole.device) - (length - prompt_width - self.length[:, None])
        inside = source >= 0
        source = source.clamp(min=0)
        mask = used.gather(1, source) & inside
        ids = whole.gather(1, source).masked_fill(~mask, self.model.pad_id)
        return {"input_ids": ids, "attention_mask": mask.to(torch.int8)}

    def completions(self, rows: Sequence[int] | None = None) -> list[Completion]:
        """The texts written so far, without stop string."""
        rows = range(self.num_envs) if rows is None else rows
        tokens, lengths, finish = self.tokens.tolist(), self.length.tolist(), self.finish.tolist()
        texts = self._texts(rows, [tokens[row][: lengths[row]] for row in rows])
        found = []
        for row, text in zip(rows, texts, strict=True):
            if finish[row] == Finish.STOP:
                text = text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]
            found.append(Completion(text, Finish(finish[row]).text, lengths[row]))
        return found

    def action_masks(self) -> Any:
        """[B, V] True where a token is allowed next; the name that sb3-contrib's MaskablePPO asks for."""
        return self._out(self._action_mask())

    def bind(self, policy: TokenScorer) -> None:
        """Lets `step` compute log π itself, with the policy that chooses the actions, for `kl="sampled"`."""
        self._scorers["policy"] = ScorerCache(policy, self)

    def set_reference(self, adapter: str | None) -> None:
        """Measures KL from another frozen adapter from now on, or from the model with adapters off (None)."""
        self.reference = replace(self.reference, adapter=adapter)
        self._scorers["reference"] = ScorerCache(self.reference, self)

    # Transition ----------------------------------------------------------------------------------------------------

    def _append(self, token: Tensor, live: Tensor, rows: Any = slice(None)) -> None:
        # What stands behind a row's length means nothing, so ended rows are written to as well; there is a spare column
        # for those at their budget.
        if isinstance(rows, slice):
            self._tokens.scatter_(1, self.length[:, None], token[:, None])
            length = self.length.add_(live)
        else:
            length = self.length[rows]
            self._tokens[rows, length] = token
            length = length + live
            self.length[rows] = length
        stop = self._stops.index_select(0, token).mul_(live)
        self._most += 1
        if self._most >= self.max_new_tokens:  # only then can a row be full
            full = (length >= self.max_new_tokens) & live & (stop == 0)
            stop = stop + full.to(torch.int8) * int(Finish.LENGTH)
        if isinstance(rows, slice):
            self.finish.add_(stop)
        else:
            self.finish[rows] += stop

    def _stop_at_strings(self, rows: Tensor) -> None:
        """Ends rows at the first token that completes a stop string, and forgets what came after it."""
        if not self.stop:
            return
        tokens, lengths = self.tokens.tolist(), self.length.tolist()
        chosen_rows = rows.nonzero()[:, 0].tolist()
        texts = self._texts(chosen_rows, [tokens[row][: lengths[row]] for row in chosen_rows])
        for row, text in zip(chosen_rows, texts, strict=True):
            if not any(stop in text for stop in self.stop):
                continue
            chosen = tokens[row][: lengths[row]]
            for length in range(max(1, self.min_new_tokens), len(chosen) + 1):
                if self._has_stop(row, chosen[:length]):
                    self.length[row], self.finish[row] = length, int(Finish.STOP)
                    break

    def _has_stop(self, row: int, chosen: list[int]) -> bool:
        text = self._text(row, chosen)
        return len(chosen) >= self.min_new_tokens and any(stop in text for stop in self.stop)

    def _text(self, row: int, chosen: list[int]) -> str:
        return self._texts([row], [chosen])[0]

    def _texts(self, rows: Sequence[int], chosen: Sequence[list[int]]) -> list[str]:
        ids, lengths = self.prompt_ids.tolist(), self._prompt_lengths
        return self.model.text.decode_completions([ids[row][-lengths[row] :] for row in rows], chosen)

    def _ends(self) -> tuple[Tensor, Tensor]:
        full = self.finish == Finish.LENGTH
        if self.on_limit == "terminate":
            return self.finish != Finish.RUNNING, torch.zeros_like(full)
        return self.finish == Finish.STOP, full

    def _pay_scores(self, rows: Tensor) -> None:
        """Scores the texts of these rows."""
        chosen = rows.nonzero()[:, 0].tolist()
        if not chosen:
            return
        completions = self.completions(chosen)
        if self.missing_eos_score is not None:
            unfinished = [row for row, c in zip(chosen, completions, strict=True) if c.finish_reason == "length"]
            self._score[unfinished] = self.missing_eos_score
            kept = [(row, c) for row, c in zip(chosen, completions, strict=True) if c.finish_reason != "length"]
            chosen, completions = [row for row, _ in kept], [c for _, c in kept]
            if not chosen:
                return
        prompts = [self.prompts[row] for row in chosen]
        breakdown = self.score.breakdown(prompts, completions)
        self._score[chosen] = self._score.new_tensor(self.score.total(breakdown))
        for name, column in breakdown.items():
            self._breakdown[name][chosen] = self._score.new_tensor(column)

    # Resets --------------------------------------------------------------------------------------------------------

    def _seed(self, seed: Any) -> None:
        if seed is None and self._rngs:
            return
        # Row i is seeded with seed + i, as gymnasium's SyncVectorEnv does.
        seeds: Sequence[int | None]
        if seed is None:
            seeds = [None] * self.num_envs
        elif isinstance(seed, int | np.integer):
            seeds = [int(seed) + row for row in range(self.num_envs)]
        else:
            if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str):
                raise ValueError(f"seed={quoted(seed)} must be an int, or a list of {self.num_envs} of them")
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} rows: give one for each, or a single int")
        for number in seeds:
            if number is not None and (not isinstance(number, int | np.integer) or number < 0):
                raise ValueError(f"the seed {number!r} must be an int of 0 or more, or None")
        old = self._rngs or [None] * self.num_envs
        self._rngs = [
            rng if rng is not None and s is None else seeding.np_random(None if s is None else int(s))[0]
            for rng, s in zip(old, seeds, strict=True)
        ]

    def _reset_mask(self, mask: Any) -> Tensor:
        # Read, not popped: gymnasium's RecordEpisodeStatistics reads it afterwards.
        try:
            tensor = torch.as_tensor(mask, device=self.model.device)
        except (TypeError, ValueError, RuntimeError):
            tensor = torch.zeros(0)  # which has the wrong type
        if tensor.dtype != torch.bool or tensor.shape != (self.num_envs,) or not bool(tensor.any()):
            raise ValueError(
                f"options['reset_mask'] must be {self.num_envs} booleans with at least one True, not {quoted(mask)}"
            )
        if not self.prompts and not bool(tensor.all()):
            raise ResetNeeded("the first reset() must reset every row")
        return tensor

    def _reset_rows(self, mask: Tensor | None, given: Any = None) -> None:
        """Other prompts in these rows, or in all of them."""
        rows = slice(None) if mask is None else mask.nonzero()[:, 0]
        numbers = list(range(self.num_envs)) if isinstance(rows, slice) else rows.tolist()
        prompts = list(self.prompts) or [Prompt("")] * self.num_envs
        lengths = list(self._prompt_lengths)
        ids = np.full((len(numbers), self.max_prompt_tokens), self.model.pad_id, np.int64)
        used = np.zeros((len(numbers), self.max_prompt_tokens), np.bool_)
        for row in numbers:
            prompts[row] = self._prompt(row, given)
        for i, (row, chosen) in enumerate(zip(numbers, self._encode([prompts[r] for r in numbers]), strict=True)):
            lengths[row] = len(chosen)
            ids[i, -len(chosen) :] = chosen
            used[i, -len(chosen) :] = True
        # Only now, when every prompt is known to be good, is anything changed.
        self.prompts, self._prompt_lengths = prompts, lengths
        self.prompt_ids[rows] = to_device(torch.from_numpy(ids), self.model.device)
        self.prompt_mask[rows] = to_device(torch.from_numpy(used), self.model.device)
        for tensor in (self.tokens, self.length, self.finish, self._reference_logp, self._score, self._token_rewards):
            tensor[rows] = 0
        for column in self._breakdown.values():
            column[rows] = 0
        self._most = 0 if len(numbers) == self.num_envs else self._most
        for track in self._scorers.values():
            track.stale[rows] = True

    def _prompt(self, row: int, given: Any) -> Prompt:
        if given is None:
            prompt = self.task.sample(self._rngs[row], self.split)
            if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
                raise ValueError(
                    f"the task {self.task.name!r} gave {quoted(prompt)}: sample() must return a Prompt with a text"
                )
            return prompt
        if isinstance(given, (list, tuple)):
            if len(given) != self.num_envs:
                raise ValueError(f"{len(given)} prompts for {self.num_envs} rows: give one for each, or a single one")
            given = given[row]
        prompt = Prompt(given) if isinstance(given, str) else given
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ValueError(
                f"options['prompt'] is {quoted(prompt)}: give a text, a Prompt, or a list of them, one a row"
            )
        return prompt

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        found = self.model.text.encode_all([prompt.text for prompt in prompts])
        for prompt, ids in zip(prompts, found, strict=True):
            if len(ids) > self.max_prompt_tokens and self.long_prompts == "error":
                raise ValueError(
                    f"the prompt {prompt.text[:80]!r} has {len(ids)} tokens and the budget is "
                    f"{self.max_prompt_tokens}: raise max_prompt_tokens, or pass long_prompts='truncate' to keep the "
                    "last tokens"
                )
        return [ids[-self.max_prompt_tokens :] for ids in found]

    # Masks, actions, infos -----------------------------------------------------------------------------------------

    def _action_masks(self, banned: Sequence[int]) -> Bool[Tensor, "T V"]:
        wrong = [token for token in banned if not 0 <= token < self.model.vocabulary]
        if wrong:
            raise ValueError(f"banned_tokens {wrong} are outside the vocabulary of {self.model.vocabulary}")
        table = torch.ones(self.max_new_tokens, self.model.vocabulary, dtype=torch.bool, device=self.model.device)
        table[:, list({*self.model.banned_ids, *banned})] = False
        table[: self.min_new_tokens, list(self.model.eos_ids)] = False
        if not bool(table.any(1).all()):
            raise ValueError("banned_tokens leave a step at which no token is allowed")
        return table

    def _action_mask(self) -> Bool[Tensor, "B V"]:
        return self.action_mask_table[self.length.clamp(max=self.max_new_tokens - 1)]

    def _actions(self, actions: Any) -> tuple[Tensor, Tensor | None]:
        if not self.prompts:
            raise ResetNeeded("step() before reset(): call reset() first")
        logp = None
        if isinstance(actions, TokenAction):
            logp = self._numbers(actions.logp, "finite log-probabilities").float().reshape(-1)
            if logp.shape != (self.num_envs,):
                raise InvalidAction(f"expected {self.num_envs} log-probabilities, got {len(logp)}")
            if not bool(torch.isfinite(logp).all()):
                raise InvalidAction(f"expected finite log-probabilities, got {logp.tolist()}")
            actions = actions.token
        token = self._numbers(actions, f"{self.num_envs} integer token ids").reshape(-1)
        if token.shape != (self.num_envs,) or token.is_floating_point():
            raise InvalidAction(f"expected {self.num_envs} integer token ids, got {quoted(actions)}")
        token = token.long()
        wrong = token[(token < 0) | (token >= self.model.vocabulary)].tolist()
        if wrong:
            raise InvalidAction(
                f"token {wrong[0]} is outside the vocabulary: actions are ids from 0 to {self.model.vocabulary - 1}"
            )
        return token, logp

    def _numbers(self, value: Any, expected: str) -> Tensor:
        """Integers or floats as a tensor on the device, from whatever an agent gave."""
        try:
            array = value if isinstance(value, Tensor) else np.asarray(value)
            numbers = array.dtype not in (torch.bool,) if isinstance(array, Tensor) else array.dtype.kind in "iuf"
            tensor = torch.as_tensor(array if numbers else None).to(self.model.device)
            if not tensor.is_complex():
                return tensor
        except (TypeError, ValueError, RuntimeError, OverflowError):  # a ragged list, text, an object
            pass
        raise InvalidAction(f"expected {expected}, got {quoted(value)}")

    def _infos(self, valid: Tensor | None = None) -> dict[str, Any]:
        infos: dict[str, Any] = {
            "action_mask": self._action_mask().to(torch.int8),
            "reference_logp": self._reference_logp.clone(),
            "finish_reason": self.finish.clone(),
            "score": self._score.clone(),
            "scores": {name: column.clone() for name, column in self._breakdown.items()},
        }
        if self.output == "torch":
            return infos
        mask = np.ones(self.num_envs, np.bool_) if valid is None else valid.cpu().numpy()
        return numpy_infos(infos, mask)

    def _final(self, done: Tensor) -> dict[str, Any]:
        """`final_obs` and `final_info`: stacked tensors in torch, Gymnasium's object array and masks in NumPy."""
        observation, info = self._out(self.observation()), self._infos(done)
        if self.output == "torch":
            return {"final_obs": observation, "_final_obs": done, "final_info": info, "_final_info": done}
        mask = done.cpu().numpy()
        rows = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(mask):
            rows[row] = {key: value[row].copy() for key, value in observation.items()}
        return {"final_obs": rows, "_final_obs": mask, "final_info": info, "_final_info": mask.copy()}

    def _out(self, value: Any) -> Any:
        if self.output == "torch":
            return value
        if isinstance(value, dict):
            return {key: self._out(v) for key, v in value.items()}
        return value.cpu().numpy()

    def _render_row(self, row: int, colour: bool) -> str:
        if not self.prompts:
            return ""
        chosen, rewards = self.tokens[row, : int(self.length[row])].tolist(), self._token_rewards[row].tolist()
        prompt = printable(self.prompts[row].text)
        if not colour:
            return prompt + printable(self._text(row, chosen))
        scale = max((abs(r) for r in rewards), default=0.0) or 1.0
        pieces, before = [], ""
        for count, reward in zip(range(1, len(chosen) + 1), rewards, strict=False):
            text = self._text(row, chosen[:count])
            strength = int(155 * min(1.0, abs(reward) / scale)) + 100
            red, green = (100, strength) if reward >= 0 else (strength, 100)
            pieces.append(f"\x1b[38;2;{red};{green};100m{printable(text[len(before) :])}\x1b[0m")
            before = text
        return prompt + "".join(pieces)
