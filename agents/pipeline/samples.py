"""Completions of the fine-tuned model, sampled in batches, so that a checkpoint can hold those that are done."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from agents.pipeline.options import Options, Setting
from agents.runs import Run
from agents.training import State, Stateful
from agents.training.pass_memory import decoding_slots
from lmgym.env import TokenVectorEnv
from lmgym.policy import Policy
from lmgym.rollout import RolloutBuffer, Stream, decode
from lmgym.tasks.base import Completion, Prompt, Split

BATCH_ROWS = 256
"""Completions that are sampled together where nothing is trained."""


def batch_prompts(count: int, completions: int) -> int:
    """How many of `count` prompts are sampled together, if each has so many completions."""
    return max(1, min(count, BATCH_ROWS // completions))


def batches(count: int, completions: int) -> int:
    """In how many batches the completions of so many prompts are sampled."""
    return -(-count // batch_prompts(count, completions))


class Samples:
    """Several completions of each of some prompts, by the model without adapters; part of a run's checkpoints.

    Args:
        setting: task, model and seed.
        options: `options.preferences.completions` is the number of completions per prompt.
        split: which prompts.
        count: number of prompts.
        temperature: of sampling.
    """

    def __init__(self, setting: Setting, options: Options, split: Split, count: int, temperature: float):
        self.group = options.preferences.completions
        self.batch_prompts = batch_prompts(count, self.group)
        self.batches = batches(count, self.group)
        self.count = count
        # Not the random numbers of the training rollouts, which begin at the seed itself.
        self.seed = setting.seed + (1 << 20) + (split == "test")
        self.policy = Policy(setting.lm, adapter=None, temperature=temperature, critic="none")
        rows = self.batch_prompts * self.group
        self.env = setting.env(rows, split, kl="none", score=unscored, temperature=temperature)
        self._prompts: list[Prompt] = []
        self._groups: list[list[Completion]] = []

    @property
    def prompts(self) -> list[Prompt]:
        return self._prompts[: self.count]

    @property
    def groups(self) -> list[list[Completion]]:
        """The completions of each prompt."""
        return self._groups[: self.count]

    def gather(self, run: Run, stage: str, stateful: Mapping[str, Stateful]) -> None:
        """Samples them, as a stage of a run."""
        for _ in run.track_stage(stage, self._sample(), self.batches, {"tokens": "tokens/mean"}, stateful):
            pass

    def _sample(self) -> Iterator[dict[str, float]]:
        env, buffer = self.env, RolloutBuffer.like(self.env)
        for batch in range(len(self._groups) // self.batch_prompts, self.batches):
            prompts, groups = _decoded_groups(self.policy, env, buffer, self._stream(batch))
            self._prompts.extend(prompts)
            self._groups.extend(groups)
            yield {"tokens/mean": float(env.length.float().mean())}

    def _stream(self, batch: int) -> Stream:
        return Stream(self.seed, batch, self.group)

    def state(self) -> State:
        texts = [[[c.text, c.finish_reason, c.tokens, list(c.token_ids)] for c in group] for group in self._groups]
        return State({"groups": texts})

    def restore(self, state: State) -> None:
        self._groups = [[Completion(*completion) for completion in group] for group in state.data["groups"]]
        self._prompts = []
        # The prompts are drawn again: what they hold need not be plain data.
        for batch in range(len(self._groups) // self.batch_prompts):
            self.env.reset(seed=self._stream(batch).prompt_seeds(self.env.num_envs))
            self._prompts.extend(self.env.prompts[:: self.group])


def unscored(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """A score for rollouts whose score is not used: 0."""
    return [0.0] * len(completions)


def sample_groups(
    setting: Setting, policy: Policy, prompts: int, group: int, split: Split = "train", update: int = 0
) -> tuple[list[Prompt], list[list[Completion]]]:
    """Completions of a policy for people to compare.

    Args:
        setting: task, model and seed.
        policy: writes the completions, at its own temperature.
        prompts: number of prompts.
        group: completions of each prompt.
        split: which prompts.
        update: another number gives other prompts and completions.

    Returns:
        The prompts, and the completions of each.
    """
    size = batch_prompts(prompts, group)
    env = setting.env(size * group, split, kl="none", score=unscored, temperature=policy.temperature)
    buffer, found, groups = RolloutBuffer.like(env), [], []
    seed = int(np.random.SeedSequence((setting.seed, 3, update)).generate_state(1)[0])
    for batch in range(batches(prompts, group)):
        some, completions = _decoded_groups(policy, env, buffer, Stream(seed, batch, group))
        found.extend(some)
        groups.extend(completions)
    return found[:prompts], groups[:prompts]


def _decoded_groups(
    policy: Policy, env: TokenVectorEnv, buffer: RolloutBuffer, stream: Stream
) -> tuple[list[Prompt], list[list[Completion]]]:
    """One batch: its prompts, and the completions of each."""
    decode(policy, env, buffer, stream, slots=decoding_slots(policy, env))
    size, completions = stream.samples, env.completions()
    return list(env.prompts[::size]), [completions[i : i + size] for i in range(0, len(completions), size)]
