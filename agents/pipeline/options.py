"""The options of every stage of the pipeline, and what a run is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from agents import reward_modelling, sft
from agents.functional import Schedule
from agents.learner import LearnerConfig
from agents.pipeline import catalog
from agents.training import OnBadStep
from lmgym.env import TokenVectorEnv
from lmgym.models import LanguageModel
from lmgym.policy import Critic, Policy
from lmgym.preferences import Comparison
from lmgym.reward import AdaptiveKL, FixedKL, KLController, Score
from lmgym.tasks.base import Split, Task


@dataclass(frozen=True)
class SFTOptions(LearnerConfig, sft.Config):
    """Supervised fine-tuning."""

    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """What follows the warm-up."""
    examples: int = 1000
    """Demonstrations to train on; 0 leaves the model as it is."""
    test_examples: int = 200
    """Held-out demonstrations for the test loss."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank and merge it; 0 trains all weights."""


@dataclass(frozen=True)
class PreferenceOptions:
    """What simulated annotators are asked."""

    prompts: int = 1400
    """Prompts to sample completions for."""
    test_prompts: int = 192
    """Held-out prompts for the accuracy of the reward model."""
    completions: int = 4
    """Completions per prompt, ranked together: K completions are K readings and K (K − 1) / 2 pairs."""
    error_rate: float = 0.168
    """How often the annotator is wrong."""


@dataclass(frozen=True)
class RewardOptions(LearnerConfig, reward_modelling.Config):
    """Reward modelling."""

    lr: float = 1e-3
    """Peak learning rate."""
    epochs: int = 2
    """Passes over the comparisons. The papers make one, over a hundred times as many."""
    minibatch_prompts: int = 8
    """Comparisons (prompts) per optimizer step."""
    lora_rank: int = 0
    """Rank of the adapter trained beside the head; 0 trains all weights."""
    normalise_on: int = 256
    """Completions of the fine-tuned model that get mean 0 and standard deviation 1."""


@dataclass(frozen=True)
class RLOptions(LearnerConfig):
    """What every RL algorithm runs with; its own settings are in its `Config`."""

    lr: float = 2e-3
    """Peak learning rate."""
    rows: int = 64
    """Completions per rollout."""
    lora_rank: int = 8
    """Rank of the policy's adapter."""
    critic: Critic = "none"
    """Where values come from: a head on the policy's trunk, an adapter of their own, or nowhere."""
    temperature: float = 1.0
    """Of sampling, scoring and reference alike."""
    top_k: int = 0
    """Train on samples from this many most probable tokens alone; 0 takes all."""
    top_p: float = 1.0
    """Train on samples from the fewest most probable tokens that hold this much probability; 1 takes all."""
    beta: float = 0.08
    """β, in score per nat; where KL is steered to a target, only its start."""
    kl_target_nats: float = 0.0
    """Steer β so that KL per sequence reaches this; 0 keeps β fixed."""
    kl_horizon: float = 1000.0
    """Sequences in which β moves by the clipped error once; smaller reacts faster."""

    def controller(self) -> KLController:
        if self.kl_target_nats:
            return AdaptiveKL(self.beta, self.kl_target_nats, self.kl_horizon)
        return FixedKL(self.beta)


@dataclass(frozen=True)
class Algorithm:
    """An RL algorithm, ready to run.

    Attributes:
        name: of the stage, in logs and in the report.
        module: has `train`, and `METRICS` where they are documented.
        config: the module's `Config`.
        rl: what every algorithm runs with.
    """

    name: str
    module: ModuleType
    config: Any
    rl: RLOptions = field(default_factory=RLOptions)

    @property
    def extras(self) -> Mapping[str, bool]:
        """What `train` wants beyond policy, environment, learner and config, and whether it can do without."""
        return catalog.extras(self.module)

    @property
    def learns_from_comparisons(self) -> bool:
        """Whether it takes comparisons in the place of a score."""
        return self.extras.get("comparisons") is False


@dataclass(frozen=True)
class Options:
    """Every stage's options."""

    test_prompts: int = 256
    """Held-out prompts for evaluation."""
    profile: bool = False
    """Profile the second update: where its time went, as a table and as a trace."""
    samples: int = 12
    """Completions kept from before and after, with the figures of every token."""
    on_bad_step: OnBadStep = "stop"
    """What a step whose gradient is not finite does: "stop" the run, or "skip" itself and count. It is never taken."""
    best: str = "score/mean"
    """Also keeps the policy of the update with the most of this metric, as `policy_best`; "" keeps none."""
    max_kl: float = 50.0
    """Warn when KL to the reference exceeds this, in nats per sequence."""
    sft: SFTOptions = field(default_factory=SFTOptions)
    preferences: PreferenceOptions = field(default_factory=PreferenceOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)


@dataclass(frozen=True)
class Setting:
    """What a run is about.

    Attributes:
        task: prompts and gold score.
        lm: the base model.
        budgets: `TokenVectorEnv`'s arguments.
        score: what the policy is paid; None learns a reward model from preferences.
        comparisons: given preferences; None asks simulated annotators.
        seed: of everything that is random.
        teacher: the policy to learn from, for distillation.
        watch: a second opinion of the rollout's completions, which no learner is paid by.
    """

    task: Task
    lm: LanguageModel
    budgets: Mapping[str, Any]
    score: Score | None = None
    comparisons: Sequence[Comparison] | None = None
    seed: int = 0
    teacher: Policy | None = None
    watch: Score | None = None

    @property
    def scores_unfinished(self) -> bool:
        """Whether completions that reach the budget are scored by their text."""
        rule = self.budgets.get("missing_eos_score", "task")
        return (self.task.missing_eos_score if rule == "task" else rule) is None

    def env(self, rows: int, split: Split = "train", **more: Any) -> TokenVectorEnv:
        return TokenVectorEnv(rows, task=self.task, model=self.lm, split=split, **{**self.budgets, **more})
