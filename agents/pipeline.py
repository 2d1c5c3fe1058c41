"""The main job: supervised fine-tuning -> preferences -> reward model -> RL -> evaluation on held-out prompts."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import algorithms, reward_model, sft
from agents.alarms import Alarms
from agents.checkpoint import Keeps, State
from agents.evaluate import Report, evaluate
from agents.guards import OnBadStep
from agents.learner import Learner, LearnerConfig, Schedule
from agents.machine import peak_memory
from agents.profile import profiled
from agents.randomness import seed_everything
from agents.run import Run
from lmgym.env import TokenVectorEnv
from lmgym.models import LanguageModel, load
from lmgym.policy import Critic, Policy
from lmgym.preferences import Comparison, SimulatedAnnotator, ask, read_comparisons, write_comparisons
from lmgym.reward import AdaptiveKL, FixedKL, KLController, Score
from lmgym.reward_model import RewardModel
from lmgym.rollout import RolloutBuffer, Stream, decode
from lmgym.tasks.base import Completion, Prompt, Split, Task
from lmgym.tasks.probe import Tree
from lmgym.texts import Example

ROWS_AT_ONCE = 256
"""Completions sampled together where nothing is trained."""
GOLD_MEAN = "gold score of the rollout's completions, which no learner sees, mean over rows"
WATCH_MEAN = "score by the second reward model, which no learner is paid by, mean over rows"
LIVE = {
    "score": "score/mean",
    "KL": "kl/sequence_nats",
    "gold": "gold/mean",
    "loss": "loss/train",
    "margin": "margin/train",
}
"""What the progress of an RL algorithm shows, where it measures it."""


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
class RewardOptions(LearnerConfig, reward_model.Config):
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
        return algorithms.extras(self.module)

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


def run_all(setting: Setting, options: Options, algorithm: Algorithm, run: Run) -> tuple[Report, Report]:
    """Runs every stage and leaves its results in the run's folder.

    An algorithm that learns from comparisons needs no reward model, and none is trained for it; its score is then the
    gold score, which it does not see.

    Returns:
        The evaluations of the fine-tuned policy and of the trained one.
    """
    if algorithm.extras.get("teacher") is False and setting.teacher is None:
        raise ValueError(
            f"{algorithm.name} learns from a teacher: give the folder of a finished run with --teacher RUN"
        )
    rehearse(algorithm)
    seed_everything(setting.seed)
    definitions = getattr(algorithm.module, "METRICS", {})
    run.write("metrics.json", {algorithm.name: definitions | {"gold/mean": GOLD_MEAN, "watch/mean": WATCH_MEAN}})
    fine_tune(setting, options, run)
    score, comparisons, temperature = setting.score, None, algorithm.rl.temperature
    if score is None or "comparisons" in algorithm.extras:
        comparisons, held_out, noise_free = gather_preferences(setting, options, run, temperature)
        if score is None and algorithm.learns_from_comparisons:
            score = Score({"gold": setting.task.gold} if setting.task.has_gold else {"none": _unscored})
        elif score is None:
            model = learn_reward(setting, options, run, comparisons, held_out, noise_free, temperature)
            score = Score({"reward_model": model})
    before, after = reinforce(setting, options, algorithm, run, score, comparisons)
    run.write("evaluation.json", {"before": before.as_data(), "after": after.as_data(), "best_gold": setting.task.best})
    marked = (("before", before), ("after", after))
    run.write_rows("samples.jsonl", [{"when": when, **sample} for when, report in marked for sample in report.samples])
    return before, after


def fine_tune(setting: Setting, options: Options, run: Run) -> None:
    """Fine-tunes the base model on the task's demonstrations, in place, and saves it as `sft`."""
    wanted, lm = options.sft, setting.lm
    if run.result("sft"):
        lm.load_weights(run.path("sft"))
        return
    if wanted.examples:
        train, test = examples_of(setting, wanted, run)
        adapter = "sft" if wanted.lora_rank else None
        if adapter:
            lm.add_adapter(adapter, wanted.lora_rank, 2 * wanted.lora_rank, setting.seed)
        parameters = lm.adapter_parameters(adapter) if adapter else list(lm.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        learner = Learner(parameters, wanted, setting.seed, on_bad_step=options.on_bad_step, say=run.say)
        total = wanted.epochs * -(-len(train) // wanted.minibatch_rows)
        rows = sft.train(lm, train, test, learner, wanted, adapter)
        shown = {"loss": "loss/train", "test loss": "loss/test"}
        for metrics in run.follow("sft", rows, total, shown, {"sft": learner}):
            if "loss/test" in metrics:
                run.say(f"sft: held-out loss {metrics['loss/test']:.3f} nats per token")
        lm.model.requires_grad_(False)
        if adapter:
            lm.merge_adapter()
    run.write_folder("sft", lm.save)
    run.finish("sft", products=["sft"])


def examples_of(setting: Setting, wanted: SFTOptions, run: Run) -> tuple[list[Example], list[Example]]:
    """The task's demonstrations, to train on and held out; where it has none, given comparisons' preferred texts."""
    try:
        return (
            demonstrations(setting.task, "train", wanted.examples, setting.seed),
            demonstrations(setting.task, "test", wanted.test_examples, setting.seed),
        )
    except NotImplementedError:
        if not setting.comparisons:
            raise
    best = [Example(c.prompt, c.ranked[0], not setting.scores_unfinished) for c in setting.comparisons]
    kept = max(1, min(wanted.test_examples, len(best) // 10))
    run.say(f"sft: {setting.task.name} has no demonstrations; the preferred texts of the comparisons take their place")
    return best[kept:][: wanted.examples] or best, best[:kept]


def demonstrations(task: Task, split: Split, count: int, seed: int) -> list[Example]:
    """Draws prompts and has the task demonstrate them."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, 1, split == "test")))
    prompts = [task.sample(rng, split) for _ in range(count)]
    return [Example(prompt.text, task.demonstrate(prompt, rng)) for prompt in prompts]


def gather_preferences(
    setting: Setting, options: Options, run: Run, temperature: float = 1.0
) -> tuple[list[Comparison], list[Comparison], list[Comparison]]:
    """Samples completions, and has simulated annotators compare them, unless comparisons are given.

    Returns:
        Comparisons to train on, held-out ones, and held-out ones without errors (none where comparisons are given).
    """
    if setting.comparisons is not None:
        return *split_comparisons(setting.comparisons, setting.seed), []
    names = ("preferences.jsonl", "preferences_test.jsonl", "preferences_noise_free.jsonl")
    if run.result("preferences"):
        comparisons, held_out, noise_free = ([*_comparisons_in(run, name)] for name in names)
        return comparisons, held_out, noise_free
    wanted = options.preferences
    annotator = SimulatedAnnotator(wanted.error_rate)
    rng = np.random.default_rng(np.random.SeedSequence((setting.seed, 2)))
    train = Samples(setting, options, "train", wanted.prompts, temperature)
    test = Samples(setting, options, "test", wanted.test_prompts, temperature)
    train.gather(run, "sample train", {"train": train})
    test.gather(run, "sample test", {"train": train, "test": test})
    cut = setting.scores_unfinished
    comparisons = ask(setting.task, train.prompts, train.groups, annotator, rng, unfinished_too=cut)
    held_out = ask(setting.task, test.prompts, test.groups, annotator, rng, unfinished_too=cut)
    exact = SimulatedAnnotator(0.0, 1e6)
    noise_free = ask(setting.task, test.prompts, test.groups, exact, rng, skip_ties=True, unfinished_too=cut)
    for name, found in zip(names, (comparisons, held_out, noise_free), strict=True):
        write_comparisons(run.path(name), found)
    run.say(f"preferences: {len(comparisons)} comparisons, {len(held_out)} held out")
    if not comparisons or not held_out:
        raise ValueError(
            "no two finished, different completions of a prompt were sampled, so there is nothing to compare: raise "
            "max_new_tokens so that completions end, or sample more with --preferences.completions"
        )
    run.finish("preferences", products=names)
    return comparisons, held_out, noise_free


def _comparisons_in(run: Run, name: str) -> Sequence[Comparison]:
    return read_comparisons(run.path(name)) if run.path(name).stat().st_size else []


def split_comparisons(given: Sequence[Comparison], seed: int) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons to train on, and a tenth of them, at least one, held out at random."""
    if len(given) < 2:
        raise ValueError(f"{len(given)} comparisons are not enough: at least one is held out for testing")
    shuffled = [given[i] for i in np.random.default_rng(seed).permutation(len(given))]
    kept = max(1, len(given) // 10)
    return shuffled[kept:], shuffled[:kept]


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
        self.env = setting.env(rows, split, kl="none", score=_unscored, temperature=temperature)
        self._prompts: list[Prompt] = []
        self._groups: list[list[Completion]] = []

    @property
    def prompts(self) -> list[Prompt]:
        return self._prompts[: self.count]

    @property
    def groups(self) -> list[list[Completion]]:
        return self._groups[: self.count]

    def gather(self, run: Run, stage: str, keep: Mapping[str, Keeps]) -> None:
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


def learn_reward(
    setting: Setting,
    options: Options,
    run: Run,
    comparisons: Sequence[Comparison],
    held_out: Sequence[Comparison],
    noise_free: Sequence[Comparison],
    temperature: float,
) -> RewardModel:
    """Trains a reward model, gives the fine-tuned model's own completions mean 0 and deviation 1, and saves it."""
    folder = run.path("reward_model")
    if run.result("reward_model"):
        return RewardModel.load(folder, setting.lm.device)
    finished = not setting.scores_unfinished
    train = partial(train_reward_model, setting.lm, options.reward, setting.seed, run, options.on_bad_step)
    model, learner = train(comparisons, held_out, noise_free, finished)
    count = -(-options.reward.normalise_on // options.preferences.completions)
    samples = Samples(setting, options, "train", count, temperature)
    samples.gather(run, "sample to normalise", {"reward_model": learner, "normalise": samples})
    pairs = [(p, c) for p, group in zip(samples.prompts, samples.groups, strict=True) for c in group]
    reward_model.normalise(
        model, [p.text + c.text for p, c in pairs], [completion.finish_reason == "stop" for _, completion in pairs]
    )
    run.write_folder("reward_model", model.save)
    run.finish("reward_model", products=["reward_model"])
    return model


def train_reward_model(
    lm: LanguageModel,
    wanted: RewardOptions,
    seed: int,
    run: Run,
    on_bad_step: OnBadStep,
    comparisons: Sequence[Comparison],
    held_out: Sequence[Comparison],
    noise_free: Sequence[Comparison] = (),
    ends_with_eos: bool = True,
) -> tuple[RewardModel, Learner]:
    """Trains a reward model from a language model, and reports its accuracy and calibration."""
    model = RewardModel.from_language_model(lm, wanted.lora_rank, 2 * wanted.lora_rank, seed, ends_with_eos)
    learner = Learner(model.parameters(), wanted, seed, on_bad_step=on_bad_step, say=run.say)
    total = wanted.epochs * -(-len(comparisons) // wanted.minibatch_prompts)

    def steps() -> Iterator[dict[str, float]]:
        for metrics in reward_model.train(model, comparisons, held_out, learner, wanted):
            if noise_free and learner.position == total:
                metrics["accuracy/noise_free"] = reward_model.evaluate(model, noise_free)["accuracy/test"]
            yield metrics

    shown = {"loss": "loss/train", "accuracy": "accuracy/train"}
    for _ in run.follow("reward_model", steps(), total, shown, {"reward_model": learner}):
        pass
    last = run.last("reward_model")
    if held_out:
        accuracy, pairs = last["accuracy/test"], sum(c.pairs for c in held_out)
        error = (accuracy * (1 - accuracy) / pairs) ** 0.5
        run.say(
            f"reward model: accuracy {accuracy:.3f} ± {error:.3f}, calibration error {last['calibration/ece']:.3f} on "
            f"{pairs} held-out pairs"
        )
    if noise_free:
        pairs = sum(c.pairs for c in noise_free)
        run.say(f"reward model: accuracy {last['accuracy/noise_free']:.3f} on {pairs} pairs without label errors")
    return model, learner


def reinforce(
    setting: Setting,
    options: Options,
    algorithm: Algorithm,
    run: Run,
    score: Score,
    comparisons: Sequence[Comparison] | None = None,
) -> tuple[Report, Report]:
    """Trains a LoRA adapter with an RL algorithm, and saves it as `policy`."""
    rl, config, name = algorithm.rl, algorithm.config, algorithm.name
    extras = {
        extra: _extra(extra, optional, setting, options, algorithm, comparisons)
        for extra, optional in algorithm.extras.items()
    }
    setting.lm.add_adapter("policy", rl.lora_rank, 2 * rl.lora_rank, setting.seed)
    policy = Policy(setting.lm, "policy", rl.temperature, rl.critic, setting.seed, rl.top_k, rl.top_p)
    settings: dict[str, Any] = {"temperature": rl.temperature, "score": score}
    env = setting.env(rl.rows, kl=getattr(config, "env_kl", "sampled"), beta=rl.controller(), **settings)
    # The policy itself is measured, without truncation, and pays for KL, whatever the training does.
    test = setting.env(options.test_prompts, "test", kl="sampled", beta=env.kl_controller, **settings)
    learner = Learner(policy.parameters(), rl, setting.seed, on_bad_step=options.on_bad_step, say=run.say)
    score.finite = options.on_bad_step == "stop"
    best, alarms = Best(options.best, learner.parameters), Alarms(options.max_kl, setting.lm.model.dtype)

    def examine() -> Report:
        return evaluate(policy.truncated(), test, setting.seed, options.samples)

    if run.result("before"):
        before = Report.from_data(json.loads(run.path("before.json").read_bytes()))
    else:
        before = examine()
        run.write("before.json", before.whole())
        run.finish("before", products=["before.json"])
    run.say(f"before: {_summary(before)} on {options.test_prompts} held-out prompts")

    def updates() -> Iterator[dict[str, float]]:
        for metrics in algorithm.module.train(policy, env, learner, config, **extras):
            row = metrics | _second_opinions(setting, env)
            best.look(row)
            for warning in alarms.look(row):
                run.warn(warning)
            yield row

    rows = profiled(updates(), run) if options.profile else updates()
    keep = {"learner": learner, "kl": _Controller(env.kl_controller), "best": best, "alarms": alarms}
    # An algorithm of one's own that does not count with `learner.updates` begins again.
    for _ in run.follow(name, rows, getattr(config, "updates", None), LIVE, keep, lambda: learner.position > 0):
        pass
    learner.keep_average()
    run.write_folder("policy", policy.save)
    after = examine()
    run.say(f"after: {_summary(after)}, KL {after.figures['kl_nats_per_sequence'].mean:.2f} nats per sequence")
    if best.kept:
        with best.instead():
            run.write_folder("policy_best", policy.save)
        run.say(f"best: {options.best} {best.value:.3f} after update {best.update}: {run.path('policy_best')}")
    run.say(peak_memory())
    return before, after


class Best:
    """A copy of the parameters after the update with the most of a metric.

    Attributes:
        kept: the copies; empty before the first update.
        value: the metric's.
        update: how many updates there were.
    """

    def __init__(self, metric: str, parameters: Sequence[Tensor]):
        self.metric, self.parameters = metric, parameters
        self.kept: list[Tensor] = []
        self.value, self.update, self._seen = -math.inf, 0, 0

    def look(self, row: Mapping[str, float]) -> None:
        """Keeps the parameters if this update is the best so far."""
        self._seen += 1
        value = row.get(self.metric, -math.inf)
        if value > self.value:
            self.value, self.update = value, self._seen
            self.kept = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Runs the body with the best parameters in the place of the present ones."""
        now = [p.detach().clone() for p in self.parameters]
        self._put(self.kept)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state(self) -> State:
        value = self.value if self.kept else None
        return State(
            {"value": value, "update": self.update, "seen": self._seen, "kept": bool(self.kept)},
            {f"{i:04}": t for i, t in enumerate(self.kept)},
        )

    def restore(self, state: State) -> None:
        self._seen = state.count("seen")
        if state.data.get("kept"):
            kept = [torch.empty_like(p) for p in self.parameters]
            state.copy_to({f"{i:04}": t for i, t in enumerate(kept)})
            self.kept, self.value, self.update = kept, float(state.number("value")), state.count("update")


class _Controller:
    """The numbers of a KL controller in a checkpoint."""

    def __init__(self, controller: KLController):
        self.controller = controller

    def _numbers(self) -> dict[str, float]:
        return {
            k: v for k, v in vars(self.controller).items() if isinstance(v, (int, float)) and not isinstance(v, bool)
        }

    def state(self) -> State:
        return State(self._numbers())

    def restore(self, state: State) -> None:
        for name in self._numbers():
            setattr(self.controller, name, state.number(name))


def rehearse(algorithm: Algorithm) -> None:
    """Runs one update in a world of six tokens, so that settings that cannot be are refused before anything is trained.

    Raises:
        ValueError: what the algorithm says.
    """
    rl, config, lm = algorithm.rl, algorithm.config, load("probe")
    lm.add_adapter("policy", rl.lora_rank, 2 * rl.lora_rank)
    policy = Policy(lm, "policy", rl.temperature, rl.critic, top_k=rl.top_k, top_p=rl.top_p)
    arguments: dict[str, Any] = {"max_prompt_tokens": 4, "max_new_tokens": 3, "temperature": rl.temperature}
    setting = Setting(Tree(), lm, arguments, teacher=Policy(lm, None, rl.temperature))
    env = setting.env(rl.rows, kl=getattr(config, "env_kl", "sampled"), beta=rl.controller())
    comparisons = [Comparison("a", ("b", "c")), Comparison("b", ("d", "a"))]
    options = Options(sft=SFTOptions(examples=2))
    extras = {
        extra: _extra(extra, optional, setting, options, algorithm, comparisons)
        for extra, optional in algorithm.extras.items()
    }
    next(iter(algorithm.module.train(policy, env, Learner(policy.parameters(), rl), config, **extras)), None)


def _summary(report: Report) -> str:
    name = "gold" if "gold" in report.figures else "score"
    return f"{name} {report.figures[name].mean:.3f} ± {report.figures[name].stderr:.3f}"


def _second_opinions(setting: Setting, env: TokenVectorEnv) -> dict[str, float]:
    """What the task's gold score, and a second reward model, think of the rollout; no learner sees it."""
    judges = {"gold/mean": setting.task.gold if setting.task.has_gold else None, "watch/mean": setting.watch}
    if not env.prompts:
        return {}
    completions = env.completions()
    found = {name: judge(env.prompts, completions) for name, judge in judges.items() if judge is not None}
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def _extra(
    extra: str,
    optional: bool,
    setting: Setting,
    options: Options,
    algorithm: Algorithm,
    comparisons: Sequence[Comparison] | None,
) -> Any:
    """What an algorithm wants beyond the four arguments of all; None where there is none and it can do without."""
    match extra:
        case "comparisons":
            return comparisons
        case "teacher":
            return setting.teacher
        case "examples":
            try:
                return demonstrations(setting.task, "train", options.sft.examples or 1000, setting.seed)
            except NotImplementedError:
                if optional:
                    return None
                raise
    if optional:
        return None
    raise ValueError(
        f"`train` of the algorithm {algorithm.name!r} wants {extra!r}, which lmgym train cannot give: it has "
        "comparisons, examples and a teacher. Give the argument a default, or call train() yourself"
    )


def _unscored(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [0.0] * len(completions)
