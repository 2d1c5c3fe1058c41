"""The stages of the pipeline: supervised fine-tuning -> preferences -> reward model -> RL -> evaluation."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np

from agents import reward_modelling, sft
from agents.evaluate import EvaluationReport, evaluate
from agents.learner import Learner
from agents.pipeline.alarms import Alarms
from agents.pipeline.best import BestParameters, ControllerState
from agents.pipeline.build import TrainingSetup, build_training, demonstrations, extra_values, rehearse
from agents.pipeline.options import Algorithm, Options, RewardOptions, Setting, SFTOptions, rank_for
from agents.pipeline.queries import MEMBERS, most_informative
from agents.pipeline.samples import Samples, unscored
from agents.runs import Run
from agents.runs.machine import peak_memory
from agents.runs.profiling import profiled
from agents.runs.randomness import seed_everything
from agents.training import OnBadStep, Stateful
from lmgym.env import TokenVectorEnv
from lmgym.models import Example, LanguageModel
from lmgym.preferences import Comparison, SimulatedAnnotator, collect_comparisons, read_comparisons, write_comparisons
from lmgym.ranks import in_shares
from lmgym.reward import RewardEnsemble, RewardModel, Score, load_reward_model, read_text
from lmgym.tasks import prompts_of

UNSEEN_METRICS = {
    "gold/mean": "gold score of the rollout's completions, which no learner sees, mean over rows",
    "watch/mean": "score by the second reward model, which is never trained on, mean over rows",
}
"""What the RL stage measures besides the algorithm's own metrics."""

LIVE_METRICS = {
    "score": "score/mean",
    "KL": "kl/sequence_nats",
    "gold": "gold/mean",
    "loss": "loss/train",
    "margin": "margin/train",
}
"""Metrics that the progress of the RL stage shows, if the algorithm measures them, by label."""


def run_all(
    setting: Setting, options: Options, algorithm: Algorithm, run: Run
) -> tuple[EvaluationReport, EvaluationReport]:
    """Runs all stages and writes their results to the run's folder.

    For an algorithm that learns from comparisons, no reward model is trained; the score that is reported is then the
    gold score, which the algorithm does not see.

    Returns:
        The evaluations of the fine-tuned policy and of the trained one.
    """
    if algorithm.extra_arguments.get("teacher") is False and setting.teacher is None:
        raise ValueError(
            f"{algorithm.name} learns from a teacher: give the folder of a finished run with --teacher RUN"
        )
    rehearse(algorithm)
    seed_everything(setting.seed)
    definitions = getattr(algorithm.module, "METRICS", {})
    run.write("metrics.json", {algorithm.name: definitions | UNSEEN_METRICS})
    score, comparisons = before_training(setting, options, algorithm, run)
    before, after = train_policy(setting, options, algorithm, run, score, comparisons)
    run.write(
        "evaluation.json",
        {"before": before.figures_to_dict(), "after": after.figures_to_dict(), "best_gold": setting.task.best},
    )
    reports = (("before", before), ("after", after))
    run.write_rows("samples.jsonl", [{"when": when, **sample} for when, report in reports for sample in report.samples])
    run.write_rows("scores.jsonl", [{"when": when, **row} for when, report in reports for row in report.rows])
    return before, after


def before_training(
    setting: Setting, options: Options, algorithm: Algorithm, run: Run
) -> tuple[Score, Sequence[Comparison] | None]:
    """The stages before RL.

    Returns:
        What the policy is paid, and the comparisons that were made for it; None if nothing was compared.
    """
    fine_tune(setting, options, run)
    score, comparisons, temperature = setting.score, None, algorithm.rl.temperature
    if score is None or "comparisons" in algorithm.extra_arguments:
        comparisons, held_out, noise_free = gather_preferences(setting, options, run, temperature)
        if score is None and algorithm.learns_from_comparisons:
            score = Score({"gold": setting.task.gold} if setting.task.has_gold else {"none": unscored})
        elif score is None:
            model = learn_reward(setting, options, run, comparisons, held_out, noise_free, temperature)
            score = Score({"reward_model": model})
    return score, comparisons


def fine_tune(setting: Setting, options: Options, run: Run) -> None:
    """Fine-tunes the base model on the task's demonstrations, in place, and saves it as `sft`."""
    config, lm = options.sft, setting.lm
    if run.stage_result("sft"):
        lm.load_weights(run.path("sft"))
        return
    train, test = examples_of(setting, config, run) if config.examples else ([], [])
    if train:
        rank = rank_for(lm, config.lora_rank)
        adapter = "sft" if rank else None
        if adapter:
            lm.adapters.add(adapter, rank, 2 * rank, setting.seed)
        parameters = lm.adapters.parameters(adapter) if adapter else list(lm.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        learner = Learner(parameters, config, setting.seed, on_bad_step=options.on_bad_step, say=run.say)
        total = config.epochs * -(-len(train) // config.minibatch_rows)
        rows = sft.train(lm, train, test, learner, config, adapter)
        shown = {"loss": "loss/train", "test loss": "loss/test"}
        for metrics in run.track_stage("sft", rows, total, shown, {"sft": learner}):
            if "loss/test" in metrics:
                run.say(f"sft: held-out loss {metrics['loss/test']:.3f} nats per token")
        lm.model.requires_grad_(False)
        if adapter:
            lm.adapters.merge()
    run.write_folder("sft", lm.write)
    lm.adapters.stored_in(run.path("sft"))
    run.finish_stage("sft", outputs=["sft"])


def examples_of(setting: Setting, config: SFTOptions, run: Run) -> tuple[list[Example], list[Example]]:
    """Demonstrations to train on and held-out ones; for a task without any, the preferred texts of the comparisons.

    Prompts without a demonstration are left out. For conversations without answers, both lists are empty: a chat model
    can answer without fine-tuning.
    """
    try:
        train = demonstrations(setting.task, "train", config.examples, setting.seed)
    except NotImplementedError:
        if not setting.comparisons and setting.task.sample(np.random.default_rng(setting.seed)).messages:
            run.say("sft: skipped, because the conversations have no answers of an assistant to learn from")
            return [], []
        if not setting.comparisons:
            raise
    else:
        return train, _held_out_examples(setting, config, run)
    preferred = [Example.of(c.as_prompt, c.ranked[0], not setting.scores_unfinished) for c in setting.comparisons]
    held_out = max(1, min(config.test_examples, len(preferred) // 10))
    run.say(f"sft: {setting.task.name} has no demonstrations; the preferred texts of the comparisons are used instead")
    return preferred[held_out:][: config.examples] or preferred, preferred[:held_out]


def _held_out_examples(setting: Setting, config: SFTOptions, run: Run) -> list[Example]:
    """Held-out demonstrations of a task that has some to train on; says how many of its prompts have none."""
    prompts, demonstrated = prompts_of(setting.task), prompts_of(setting.task.demonstrated())
    if prompts is not None and demonstrated is not None and len(demonstrated) < len(prompts):
        without = len(prompts) - len(demonstrated)
        run.say(f"sft: {without} of {len(prompts)} prompts have no demonstration: learning from the others")
    try:
        return demonstrations(setting.task, "test", config.test_examples, setting.seed)
    except NotImplementedError:
        run.say("sft: no held-out prompt has a demonstration, so no test loss is measured")
        return []


def gather_preferences(
    setting: Setting, options: Options, run: Run, temperature: float = 1.0
) -> tuple[list[Comparison], list[Comparison], list[Comparison]]:
    """Samples completions, and has simulated annotators compare them, unless the setting has comparisons.

    Returns:
        Comparisons to train on, held-out ones, and held-out ones without errors (none if the setting has comparisons).
    """
    config = options.preferences
    if setting.comparisons is not None and config.queries != "random":
        raise ValueError(
            f"--preferences.queries {config.queries} chooses what simulated annotators compare, but comparisons were "
            "given: leave one of the two out"
        )
    if setting.comparisons is not None and setting.held_out is not None:
        return [*setting.comparisons], [*setting.held_out], []
    if setting.comparisons is not None:
        return *split_comparisons(setting.comparisons, setting.seed), []
    names = ("preferences.jsonl", "preferences_test.jsonl", "preferences_noise_free.jsonl")
    if run.stage_result("preferences"):
        comparisons, held_out, noise_free = ([*_comparisons_in(run, name)] for name in names)
        return comparisons, held_out, noise_free
    annotator = SimulatedAnnotator(config.error_rate)
    rng = np.random.default_rng(np.random.SeedSequence((setting.seed, 2)))
    train = Samples(setting, options, "train", config.candidates, temperature)
    test = Samples(setting, options, "test", config.test_prompts, temperature)
    train.gather(run, "sample train", {"train": train})
    test.gather(run, "sample test", {"train": train, "test": test})
    unfinished_too = setting.scores_unfinished

    def compared(chosen: Sequence[int]) -> list[Comparison]:
        prompts, groups = [train.prompts[i] for i in chosen], [train.groups[i] for i in chosen]
        return collect_comparisons(setting.task, prompts, groups, annotator, rng, include_unfinished=unfinished_too)

    comparisons = compared(range(config.random_prompts))
    if config.queries != "random":
        comparisons += compared(_chosen_queries(setting, options, run, comparisons, train, test))
    held_out = collect_comparisons(
        setting.task, test.prompts, test.groups, annotator, rng, include_unfinished=unfinished_too
    )
    exact = SimulatedAnnotator(0.0, 1e6)
    noise_free = collect_comparisons(
        setting.task, test.prompts, test.groups, exact, rng, skip_ties=True, include_unfinished=unfinished_too
    )
    for name, found in zip(names, (comparisons, held_out, noise_free), strict=True):
        if run.leads:
            write_comparisons(run.path(name), found)
    run.say(f"preferences: {len(comparisons)} comparisons, {len(held_out)} held out")
    if not comparisons or not held_out:
        raise ValueError(
            "no two finished, different completions of a prompt were sampled, so there is nothing to compare: raise "
            "max_new_tokens so that completions end, or sample more with --preferences.completions"
        )
    run.finish_stage("preferences", outputs=names)
    return comparisons, held_out, noise_free


def _chosen_queries(
    setting: Setting, options: Options, run: Run, comparisons: list[Comparison], train: Samples, test: Samples
) -> list[int]:
    """The candidates to compare, by reward models that are trained on the comparisons so far."""
    queries, first = options.preferences.queries, options.preferences.random_prompts
    if not comparisons:
        raise ValueError(
            "no two finished, different completions of a prompt were sampled, so there is nothing to choose queries "
            "by: raise max_new_tokens so that completions end, or use --preferences.queries random"
        )
    members = max(MEMBERS, options.reward.ensemble) if queries == "disagreement" else options.reward.ensemble
    config = replace(options.reward, ensemble=members)
    model, _ = train_reward_model(
        setting.lm, config, setting.seed, run, options.on_bad_step, comparisons, [],
        ends_with_eos=not setting.scores_unfinished, stage="query_model", others={"train": train, "test": test},
    )  # fmt: skip
    wanted = options.preferences.prompts - first
    chosen = most_informative(model, train.prompts[first:], train.groups[first:], wanted, queries)
    run.say(f"preferences: {wanted} of {train.count - first} candidates are compared, by {queries}")
    return [first + index for index in chosen]


def _comparisons_in(run: Run, name: str) -> Sequence[Comparison]:
    return read_comparisons(run.path(name), as_written=True) if run.path(name).stat().st_size else []


def split_comparisons(comparisons: Sequence[Comparison], seed: int) -> tuple[list[Comparison], list[Comparison]]:
    """Splits comparisons at random: those to train on, and a tenth, at least one, held out."""
    if len(comparisons) < 2:
        raise ValueError(
            f"{len(comparisons)} comparisons are too few: give at least 2, one of which is held out for testing"
        )
    shuffled = [comparisons[i] for i in np.random.default_rng(seed).permutation(len(comparisons))]
    held_out = max(1, len(comparisons) // 10)
    return shuffled[held_out:], shuffled[:held_out]


def learn_reward(
    setting: Setting,
    options: Options,
    run: Run,
    comparisons: Sequence[Comparison],
    held_out: Sequence[Comparison],
    noise_free: Sequence[Comparison],
    temperature: float,
) -> RewardModel | RewardEnsemble:
    """Trains a reward model, normalises its scores of the fine-tuned model's own completions, and saves it."""
    folder = run.path("reward_model")
    if run.stage_result("reward_model"):
        return load_reward_model(folder, setting.lm.device)
    finished = not setting.scores_unfinished
    train = partial(train_reward_model, setting.lm, options.reward, setting.seed, run, options.on_bad_step)
    model, learner = train(comparisons, held_out, noise_free, finished)
    count = -(-options.reward.normalise_on // options.preferences.completions)
    samples = Samples(setting, options, "train", count, temperature)
    samples.gather(run, "sample to normalise", {"reward_model": learner, "normalise": samples})
    pairs = [(p, c) for p, group in zip(samples.prompts, samples.groups, strict=True) for c in group]
    reward_modelling.normalise(
        model, [read_text(p, c.text) for p, c in pairs], [completion.finish_reason == "stop" for _, completion in pairs]
    )
    run.write_folder("reward_model", model.save)
    run.finish_stage("reward_model", outputs=["reward_model"])
    return model


def train_reward_model(
    lm: LanguageModel,
    config: RewardOptions,
    seed: int,
    run: Run,
    on_bad_step: OnBadStep,
    comparisons: Sequence[Comparison],
    held_out: Sequence[Comparison],
    noise_free: Sequence[Comparison] = (),
    ends_with_eos: bool = True,
    stage: str = "reward_model",
    others: Mapping[str, Stateful] = MappingProxyType({}),
) -> tuple[RewardModel | RewardEnsemble, Learner]:
    """Trains a reward model from a language model, and reports its accuracy and calibration.

    Args:
        stage: the name of the stage.
        others: what else its checkpoints hold.
    """
    rank = rank_for(lm, config.lora_rank)
    held_out = [comparison for comparison in held_out if not comparison.is_tie]
    if config.ensemble > 1:
        model = RewardEnsemble.from_language_model(lm, config.ensemble, rank, 2 * rank, seed, ends_with_eos)
    else:
        model = RewardModel.from_language_model(lm, rank, 2 * rank, seed, ends_with_eos)
    learner = Learner(model.parameters(), config, seed, on_bad_step=on_bad_step, say=run.say)
    total = config.epochs * -(-len(comparisons) // config.minibatch_prompts)

    def steps() -> Iterator[dict[str, float]]:
        for metrics in reward_modelling.train(model, comparisons, held_out, learner, config):
            if noise_free and learner.position == total:
                metrics["accuracy/noise_free"] = reward_modelling.evaluate(model, noise_free)["accuracy/test"]
            yield metrics

    shown = {"loss": "loss/train", "accuracy": "accuracy/train"}
    for _ in run.track_stage(stage, steps(), total, shown, {**others, stage: learner}):
        pass
    last = run.last_metrics(stage)
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


def train_policy(
    setting: Setting,
    options: Options,
    algorithm: Algorithm,
    run: Run,
    score: Score,
    comparisons: Sequence[Comparison] | None = None,
) -> tuple[EvaluationReport, EvaluationReport]:
    """Trains a LoRA adapter with an RL algorithm, and saves it as `policy`.

    Returns:
        The evaluations before and after training.
    """
    extra = extra_values(setting, options, algorithm, comparisons)
    setup = build_training(setting, algorithm.rl, algorithm.config, score, on_bad_step=options.on_bad_step, say=run.say)
    score.finite = options.on_bad_step == "stop"
    policy, learner, test_env = setup.policy, setup.learner, setup.evaluation_env(options.test_prompts)
    best = BestParameters(options.best, learner.parameters)
    alarms = Alarms(options.max_kl, setting.lm.model.dtype)

    # The policy itself is measured, without truncation.
    def measure() -> EvaluationReport:
        return evaluate(policy.truncated(), test_env, setting.seed, options.samples)

    before = _evaluation_before(run, measure)
    run.say(f"before: {_summary(before)} on {options.test_prompts} held-out prompts")
    rows = _monitored(setup.train(algorithm.module, algorithm.config, **extra), setup, best, alarms, run)
    rows = profiled(rows, run) if options.profile and run.leads else rows
    kl = ControllerState(setup.env.kl_controller)
    stateful = {"learner": learner, "kl": kl, "best": best, "alarms": alarms}
    # An algorithm of your own that does not count with `learner.updates` begins again.
    total, resumable = getattr(algorithm.config, "updates", None), lambda: learner.position > 0
    for _ in run.track_stage(algorithm.name, rows, total, LIVE_METRICS, stateful, resumable):
        pass
    run.end_measurement(algorithm.name)
    learner.use_average()
    run.write_folder("policy", policy.save)
    after = measure()
    run.say(f"after: {_summary(after)}, KL {after.figures['kl_nats_per_sequence'].mean:.2f} nats per sequence")
    if best.copies:
        with best.swapped_in():
            run.write_folder("policy_best", policy.save)
        run.say(f"best: {options.best} {best.value:.3f} after update {best.number}: {run.path('policy_best')}")
    run.say(peak_memory(run.meter.highest_bytes if run.meter else 0.0))
    return before, after


def _evaluation_before(run: Run, measure: Callable[[], EvaluationReport]) -> EvaluationReport:
    """The evaluation before training; a resumed run reads the one that it made."""
    if run.stage_result("before"):
        return EvaluationReport.from_dict(json.loads(run.path("before.json").read_bytes()))
    before = measure()
    run.write("before.json", before.to_dict())
    run.finish_stage("before", outputs=["before.json"])
    return before


def _monitored(
    rows: Iterator[dict[str, float]], setup: TrainingSetup, best: BestParameters, alarms: Alarms, run: Run
) -> Iterator[dict[str, float]]:
    """An algorithm's metrics with those that no algorithm sees; warns of what looks wrong."""
    for metrics in rows:
        row = metrics | _unseen_scores(setup.setting, setup.env)
        best.update(row)
        for warning in alarms.check(row):
            run.warn(warning)
        yield row


def _summary(report: EvaluationReport) -> str:
    name = "gold" if "gold" in report.figures else "score"
    return f"{name} {report.figures[name].mean:.3f} ± {report.figures[name].stderr:.3f}"


def _unseen_scores(setting: Setting, env: TokenVectorEnv) -> dict[str, float]:
    """The `UNSEEN_METRICS` of the present rollout."""
    functions = {"gold/mean": setting.task.gold if setting.task.has_gold else None, "watch/mean": setting.watch}
    if not env.prompts:
        return {}
    completions = env.completions()
    found = {name: in_shares(score, env.prompts, completions) for name, score in functions.items() if score is not None}
    return {name: sum(scores) / len(scores) for name, scores in found.items()}
