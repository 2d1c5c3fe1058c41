"""The options of every stage of the pipeline, and the task, model and algorithm that a run is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, get_args

from agents import reward_modelling, sft
from agents.functional import Schedule
from agents.learner import LearnerConfig
from agents.pipeline import load_algorithm as catalog
from agents.pipeline.queries import Queries
from agents.training import OnBadStep, require
from lmgym.env import TokenVectorEnv
from lmgym.models import LanguageModel
from lmgym.policy import Critic, Policy
from lmgym.preferences import Comparison
from lmgym.reward import AdaptiveKL, FixedKL, KLController, Score
from lmgym.tasks.base import Split, Task


def _check_as(kind: type, options: Any) -> None:
    """Has a dataclass check those of the options that are its own."""
    kind(**{f.name: getattr(options, f.name) for f in fields(kind)})


WHOLE, LARGE_RANK = 30_000_000, 16
"""Models of at most so many parameters are fine-tuned whole; the rank of the adapter of larger ones."""


def rank_for(model: LanguageModel, rank: int | None) -> int:
    """The rank of the adapter that fine-tuning trains; 0 for all weights.

    All weights in float32 need 16 bytes each for training, and smaller learning rates than these defaults.

    Args:
        model: what is fine-tuned.
        rank: the user's choice; None chooses by the model's size.
    """
    if rank is not None:
        return rank
    return LARGE_RANK if sum(p.numel() for p in model.model.parameters()) > WHOLE else 0


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
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank and merge it; 0 trains all weights. By default, all weights of a model of at
    most 30 million parameters, and an adapter of rank 16 of a larger one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_as(sft.Config, self)
        for name in ("examples", "test_examples", "lora_rank"):
            require.in_range(self, name, least=0)


@dataclass(frozen=True)
class PreferenceOptions:
    """What simulated annotators compare."""

    prompts: int = 1400
    """Prompts to sample completions for."""
    test_prompts: int = 192
    """Held-out prompts for the accuracy of the reward model."""
    completions: int = 4
    """Completions per prompt, ranked together: K completions give K (K − 1) / 2 pairs."""
    error_rate: float = 0.168
    """Probability that the annotator is wrong, at least 0 and below 0.5."""
    queries: Queries = "random"
    """Which prompts are compared: "random"; or half of them at random, and the rest, of twice as many candidates, where
    reward models that were trained on the first half differ most ("disagreement") or see no difference ("margin")."""

    def __post_init__(self) -> None:
        require.in_range(self, "prompts", least=1)
        require.in_range(self, "test_prompts", least=1)
        require.in_range(self, "completions", least=2)
        require.in_range(self, "error_rate", least=0.0, below=0.5)
        require.one_of("queries", self.queries, get_args(Queries))
        if self.queries != "random":
            require.in_range(self, "prompts", least=2)

    @property
    def random_prompts(self) -> int:
        """Prompts that are compared whatever reward models say: all, or half of them."""
        return self.prompts if self.queries == "random" else self.prompts // 2

    @property
    def candidates(self) -> int:
        """Prompts that completions are sampled for: the others are chosen of twice as many."""
        return self.random_prompts + 2 * (self.prompts - self.random_prompts)


@dataclass(frozen=True)
class RewardOptions(LearnerConfig, reward_modelling.Config):
    """Reward modelling."""

    lr: float = 1e-3
    """Peak learning rate."""
    epochs: int = 2
    """Passes over the comparisons. The papers make one pass over a hundred times as many."""
    minibatch_prompts: int = 8
    """Comparisons (prompts) per optimizer step."""
    lora_rank: int | None = None
    """Rank of the LoRA adapter that is trained with the head; 0 trains all weights. By default, all weights of a model
    of at most 30 million parameters, and an adapter of rank 16 of a larger one."""
    ensemble: int = 1
    """Reward models that are trained side by side; the score is the mean of theirs. 1: a single one."""
    normalise_on: int = 256
    """Completions of the fine-tuned model whose scores are normalised to mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_as(reward_modelling.Config, self)
        require.in_range(self, "lora_rank", least=0)
        require.in_range(self, "ensemble", least=1)
        require.in_range(self, "normalise_on", least=2)


@dataclass(frozen=True)
class RLOptions(LearnerConfig):
    """Options that every RL algorithm has; its own are in its `Config`."""

    lr: float = 2e-3
    """Peak learning rate."""
    rows: int = 64
    """Completions per rollout."""
    lora_rank: int = 8
    """Rank of the policy's adapter."""
    critic: Critic = "none"
    """The value function: "head" on the policy's trunk, "adapter" of its own, "network" of its own, or "none"."""
    critic_lr_factor: float = 1.0
    """Learning rate of the critic's own parameters, as a multiple of `lr`."""
    temperature: float = 1.0
    """Of sampling, of scoring and of the reference."""
    top_k: int = 0
    """Sample only from this many most probable tokens during training; 0 samples from all."""
    top_p: float = 1.0
    """Sample only from the smallest set of most probable tokens with this total probability; 1 samples from all."""
    beta: float = 0.08
    """β, in score per nat of KL; with `kl_target_nats`, its initial value."""
    kl_target_nats: float = 0.0
    """Adapt β so that KL per sequence, in nats, reaches this target; 0 keeps β fixed."""
    kl_horizon: float = 1000.0
    """Sequences over which β changes by the clipped relative error once; smaller reacts faster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require.in_range(self, "rows", least=1)
        require.in_range(self, "lora_rank", least=1)
        require.one_of("critic", self.critic, get_args(Critic))
        require.in_range(self, "temperature", "critic_lr_factor", above=0.0)
        require.in_range(self, "top_k", least=0)
        require.in_range(self, "top_p", above=0.0, most=1.0)
        require.in_range(self, "beta", least=0.0)
        require.in_range(self, "kl_target_nats", least=0.0)
        require.in_range(self, "kl_horizon", above=0.0)

    def controller(self) -> KLController:
        """A new KL controller."""
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
        rl: the options that every algorithm has.
    """

    name: str
    module: ModuleType
    config: Any
    rl: RLOptions = field(default_factory=RLOptions)

    @property
    def extra_arguments(self) -> Mapping[str, bool]:
        """What `train` takes beyond policy, environment, learner and config, and whether it is optional."""
        return catalog.extra_arguments(self.module)

    @property
    def learns_from_comparisons(self) -> bool:
        """Whether it requires comparisons, and so needs no reward model."""
        return self.extra_arguments.get("comparisons") is False


@dataclass(frozen=True)
class Options:
    """The options of all stages."""

    test_prompts: int = 256
    """Held-out prompts for evaluation."""
    profile: bool = False
    """Profile the second update: write a table and a trace of where its time went."""
    samples: int = 12
    """Completions to save from before and after training, with the figures of every token."""
    on_bad_step: OnBadStep = "stop"
    """If a gradient is not finite: "stop" the run, or "skip" the step and count it. Such a step is never taken."""
    best: str = "score/mean"
    """Also save, as `policy_best`, the policy after the update with the highest value of this metric; "": do not."""
    max_kl: float = 50.0
    """Warn if KL to the reference exceeds this, in nats per sequence."""
    sft: SFTOptions = field(default_factory=SFTOptions)
    preferences: PreferenceOptions = field(default_factory=PreferenceOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)

    def __post_init__(self) -> None:
        require.in_range(self, "test_prompts", least=1)
        require.in_range(self, "samples", least=0)
        require.one_of("on_bad_step", self.on_bad_step, get_args(OnBadStep))
        require.in_range(self, "max_kl", least=0.0)


@dataclass(frozen=True)
class Setting:
    """The task and the model of a run.

    Attributes:
        task: prompts and gold score.
        lm: the base model.
        budgets: `TokenVectorEnv`'s arguments.
        score: what the policy is trained on; None: a reward model that is learned from preferences.
        comparisons: preferences; None: those of simulated annotators.
        seed: of all random numbers.
        teacher: the policy to learn from, for distillation.
        watch: a second score of the rollouts, which is only measured and never trained on.
        held_out: preferences that are not trained on; None: a tenth of `comparisons`.
        from_adapter: the folder of an adapter of `lm`, which the policy starts as a copy of; None: a new adapter.
    """

    task: Task
    lm: LanguageModel
    budgets: Mapping[str, Any]
    score: Score | None = None
    comparisons: Sequence[Comparison] | None = None
    seed: int = 0
    teacher: Policy | None = None
    watch: Score | None = None
    held_out: Sequence[Comparison] | None = None
    from_adapter: str | None = None

    @property
    def scores_unfinished(self) -> bool:
        """Whether completions that reach the budget are scored by their text."""
        rule = self.budgets.get("missing_eos_score", "task")
        return (self.task.missing_eos_score if rule == "task" else rule) is None

    def env(self, rows: int, split: Split = "train", **more: Any) -> TokenVectorEnv:
        """An environment on the task; `more` goes before `budgets`."""
        return TokenVectorEnv(rows, task=self.task, model=self.lm, split=split, **{**self.budgets, **more})
