"""Completions of the fine-tuned model, sampled in batches that a checkpoint can hold."""

from collections.abc import Iterator, Mapping, Sequence

from agents.pipeline.options import Options, Setting
from agents.runs import Run
from agents.training import State, Stateful
from lmgym.policy import Policy
from lmgym.rollout import RolloutBuffer, Stream, decode
from lmgym.tasks.base import Completion, Prompt, Split

ROWS_AT_ONCE = 256
"""Completions sampled together where nothing is trained."""


class Samples:
    """Several completions of each of some prompts, by the model without adapters; a run that goes on keeps them.

    Args:
        setting: task, model and seed.
        options: how many completions a prompt has.
        split: which prompts.
        count: how many.
        temperature: of sampling.
    """

    def __init__(self, setting: Setting, options: Options, split: Split, count: int, temperature: float):
        self.each = options.preferences.completions
        self.at_once = max(1, min(count, ROWS_AT_ONCE // self.each))
        self.batches = -(-count // self.at_once)
        self.count = count
        # Not the numbers that the training's rollouts draw: those start from the seed itself.
        self.seed = setting.seed + (1 << 20) + (split == "test")
        self.policy = Policy(setting.lm, adapter=None, temperature=temperature, critic="none")
        rows = self.at_once * self.each
        self.env = setting.env(rows, split, kl="none", score=unscored, temperature=temperature)
        self._prompts: list[Prompt] = []
        self._groups: list[list[Completion]] = []

    @property
    def prompts(self) -> list[Prompt]:
        return self._prompts[: self.count]

    @property
    def groups(self) -> list[list[Completion]]:
        return self._groups[: self.count]

    def gather(self, run: Run, stage: str, keep: Mapping[str, Stateful]) -> None:
        """Draws them, as a stage of a run."""
        for _ in run.follow(stage, self._draw(), self.batches, {"tokens": "tokens/mean"}, keep):
            pass

    def _draw(self) -> Iterator[dict[str, float]]:
        env, buffer = self.env, RolloutBuffer.like(self.env)
        for batch in range(len(self._groups) // self.at_once, self.batches):
            decode(self.policy, env, buffer, self._stream(batch))
            completions = env.completions()
            self._prompts.extend(env.prompts[:: self.each])
            self._groups.extend(completions[i : i + self.each] for i in range(0, len(completions), self.each))
            yield {"tokens/mean": float(env.length.float().mean())}

    def _stream(self, batch: int) -> Stream:
        return Stream(self.seed, batch, self.each)

    def state(self) -> State:
        texts = [[[c.text, c.finish_reason, c.tokens] for c in group] for group in self._groups]
        return State({"groups": texts})

    def restore(self, state: State) -> None:
        self._groups = [[Completion(*completion) for completion in group] for group in state.data["groups"]]
        self._prompts = []
        for batch in range(len(self._groups) // self.at_once):  # what prompts hold need not be plain data: draw again
            self.env.reset(seed=self._stream(batch).prompt_seeds(self.env.num_envs))
            self._prompts.extend(self.env.prompts[:: self.each])


def unscored(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """A score for rollouts whose score nobody reads: 0."""
    return [0.0] * len(completions)
