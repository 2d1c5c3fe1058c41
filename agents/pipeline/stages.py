"""The main job: supervised fine-tuning -> preferences -> reward model -> RL -> evaluation on held-out prompts."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from agents import reward_modelling, sft
from agents.evaluate import EvaluationReport, evaluate
from agents.learner import Learner
from agents.pipeline.alarms import Alarms
from agents.pipeline.best import Best, ControllerState
from agents.pipeline.build import demonstrations, extra_argument, rehearse
from agents.pipeline.options import Algorithm, Options, RewardOptions, Setting, SFTOptions
from agents.pipeline.samples import Samples, unscored
from agents.runs import Run
from agents.runs.machine import peak_memory
from agents.runs.profiling import profiled
from agents.runs.randomness import seed_everything
from agents.training import OnBadStep
from lmgym.env import TokenVectorEnv
from lmgym.models import Example, LanguageModel
from lmgym.policy import Policy
from lmgym.preferences import Comparison, SimulatedAnnotator, collect_comparisons, read_comparisons, write_comparisons
from lmgym.reward import RewardModel, Score

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


def run_all(
    setting: Setting, options: Options, algorithm: Algorithm, run: Run
) -> tuple[EvaluationReport, EvaluationReport]:
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
            score = Score({"gold": setting.task.gold} if setting.task.has_gold else {"none": unscored})
        elif score is None:
            model = learn_reward(setting, options, run, comparisons, held_out, noise_free, temperature)
            score = Score({"reward_model": model})
    before, after = train_policy(setting, options, algorithm, run, score, comparisons)
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
            lm.adapters.add(adapter, wanted.lora_rank, 2 * wanted.lora_rank, setting.seed)
        parameters = lm.adapters.parameters(adapter) if adapter else list(lm.model.parameters())
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
            lm.adapters.merge()
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
    comparisons = collect_comparisons(setting.task, train.prompts, train.groups, annotator, rng, include_unfinished=cut)
    held_out = collect_comparisons(setting.task, test.prompts, test.groups, annotator, rng, include_unfinished=cut)
    exact = SimulatedAnnotator(0.0, 1e6)
    noise_free = collect_comparisons(
        setting.task, test.prompts, test.groups, exact, rng, skip_ties=True, include_unfinished=cut
    )
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
    reward_modelling.normalise(
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
        for metrics in reward_modelling.train(model, comparisons, held_out, learner, wanted):
            if noise_free and learner.position == total:
                metrics["accuracy/noise_free"] = reward_modelling.evaluate(model, noise_free)["accuracy/test"]
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


def train_policy(
    setting: Setting,
    options: Options,
    algorithm: Algorithm,
    run: Run,
    score: Score,
    comparisons: Sequence[Comparison] | None = None,
) -> tuple[EvaluationReport, EvaluationReport]:
    """Trains a LoRA adapter with an RL algorithm, and saves it as `policy`."""
    rl, config, name = algorithm.rl, algorithm.config, algorithm.name
    extras = {
        extra: extra_argument(extra, optional, setting, options, algorithm, comparisons)
        for extra, optional in algorithm.extras.items()
    }
    setting.lm.adapters.add("policy", rl.lora_rank, 2 * rl.lora_rank, setting.seed)
    policy = Policy(setting.lm, "policy", rl.temperature, rl.critic, setting.seed, rl.top_k, rl.top_p)
    settings: dict[str, Any] = {"temperature": rl.temperature, "score": score}
    env = setting.env(rl.rows, kl=getattr(config, "env_kl", "sampled"), beta=rl.controller(), **settings)
    # The policy itself is measured, without truncation, and pays for KL, whatever the training does.
    test = setting.env(options.test_prompts, "test", kl="sampled", beta=env.kl_controller, **settings)
    learner = Learner(policy.parameters(), rl, setting.seed, on_bad_step=options.on_bad_step, say=run.say)
    score.finite = options.on_bad_step == "stop"
    best, alarms = Best(options.best, learner.parameters), Alarms(options.max_kl, setting.lm.model.dtype)

    def examine() -> EvaluationReport:
        return evaluate(policy.truncated(), test, setting.seed, options.samples)

    if run.result("before"):
        before = EvaluationReport.from_data(json.loads(run.path("before.json").read_bytes()))
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
    keep = {"learner": learner, "kl": ControllerState(env.kl_controller), "best": best, "alarms": alarms}
    # An algorithm of one's own that does not count with `learner.updates` begins again.
    for _ in run.follow(name, rows, getattr(config, "updates", None), LIVE, keep, lambda: learner.position > 0):
        pass
    learner.use_average()
    run.write_folder("policy", policy.save)
    after = examine()
    run.say(f"after: {_summary(after)}, KL {after.figures['kl_nats_per_sequence'].mean:.2f} nats per sequence")
    if best.kept:
        with best.instead():
            run.write_folder("policy_best", policy.save)
        run.say(f"best: {options.best} {best.value:.3f} after update {best.update}: {run.path('policy_best')}")
    run.say(peak_memory())
    return before, after


def _summary(report: EvaluationReport) -> str:
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
