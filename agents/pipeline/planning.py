"""Planning a run from small ones: their sizes, and what their times and peak memory say about the whole run.

The time of a stage is t = a + b·steps + c·tokens. Its steps are measured one by one, so that b and c need few of them.
What remains of each trial (drawing data, held-out figures, saving) grows with the share of the data that it works on: a
is the value of a straight line at the whole data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agents.pipeline.options import Algorithm, Options, RewardOptions
from agents.pipeline.samples import BATCH_ROWS, batch_prompts, batches
from agents.pipeline.stages import train_reward_model
from agents.runs import Run
from agents.runs.costs import CLOCKS, StepFit, fit_line, fit_steps
from agents.runs.meter import StageCost
from lmgym.models import LanguageModel
from lmgym.preferences import Comparison

PARTS = (0.25, 0.5, 1.0)
"""The sizes of the trials, as parts of the share of the updates and steps that the largest one has."""
LEAST_STEPS = (3, 4, 5)
"""Steps of every loop in each trial, at least: the first one is always slower."""
EVALUATED = (0.125, 0.25, 0.5)
"""Shares of the held-out prompts that the trials evaluate on: the cost of an evaluation depends on their number."""
LEAST_BAND = 0.15
"""The band around each prediction is at least this share of it: machines are faster and slower from hour to hour."""
NORMAL_90 = 1.645
"""Standard deviations on each side of the mean that hold 90 % of a normal distribution."""
ACCURACY_SHARES = (0.01, 0.01, 0.01, 0.02, 0.02, 0.05, 0.1)
"""Shares of the given comparisons on which reward models are trained, to extrapolate their accuracy."""
LEAST_COMPARISONS = 8
"""Comparisons of the smallest of these reward models, at least."""
WIDER = ("before", "after")
"""Stages that work on more rows at a time in a larger trial, so that their peak memory grows."""


@dataclass(frozen=True)
class Small:
    """The options of a trial.

    Attributes:
        options, algorithm: as of the whole run, with fewer examples, prompts and updates.
        shares: for each stage, which share of its data it works on.
        comparisons, held_out: how many of the given comparisons it uses.
    """

    options: Options
    algorithm: Algorithm
    shares: Mapping[str, float]
    comparisons: int = 0
    held_out: int = 0


def small_run(
    options: Options, algorithm: Algorithm, index: int, share: float, comparisons: int = 0, held_out: int = 0
) -> Small:
    """The options of a trial.

    Args:
        options, algorithm: of the whole run.
        index: which trial: 0, the smallest, to 2.
        share: of the updates and steps of the whole run in the largest trial.
        comparisons, held_out: number of given comparisons; 0 if annotators are simulated.
    """
    part, least = share * PARTS[index], LEAST_STEPS[index]
    sft, preferences, reward = options.sft, options.preferences, options.reward

    def some(count: int, of: float, at_least: int = 1) -> int:
        return min(count, max(at_least, math.ceil(of * count)))

    steps = max(least, math.ceil(part * sft.epochs * sft.examples / sft.minibatch_rows))
    examples = min(sft.examples, math.ceil(steps / sft.epochs) * sft.minibatch_rows)
    of_sft = examples / sft.examples if sft.examples else 1.0
    batch = max(1, BATCH_ROWS // preferences.completions)
    width = max(2, math.ceil(batch * PARTS[index]))
    prompts, test_prompts = some(preferences.prompts, part, width), some(preferences.test_prompts, part, width)
    of_test = test_prompts / preferences.test_prompts
    of_prompts = prompts / preferences.prompts
    if comparisons:
        least_comparisons = math.ceil(least * reward.minibatch_prompts / reward.epochs)
        used, tested = some(comparisons, part, least_comparisons), some(held_out, EVALUATED[index], 2)
        of_prompts, of_test = used / comparisons, tested / held_out
    else:
        used = tested = 0
    evaluated = some(options.test_prompts, EVALUATED[index], 2)
    scaled = replace(
        options,
        test_prompts=evaluated,
        sft=replace(sft, examples=examples, test_examples=math.ceil(of_sft * sft.test_examples)),
        preferences=replace(preferences, prompts=prompts, test_prompts=test_prompts),
        reward=replace(reward, normalise_on=some(reward.normalise_on, of_test, 8)),
    )
    updates, config = getattr(algorithm.config, "updates", None), algorithm.config
    if updates is not None:
        config = replace(config, updates=some(updates, part, least))
    of_evaluation = evaluated / options.test_prompts
    shares = {"sft": of_sft, "preferences": of_prompts, "reward_model": of_test, algorithm.name: 1.0}
    shares |= {"before": of_evaluation, "after": of_evaluation}
    return Small(scaled, replace(algorithm, config=config), shares, used, tested)


@dataclass(frozen=True)
class Trial:
    """A small run, and what it cost.

    Attributes:
        small: its options.
        stages: what they cost.
        comparisons: how many comparisons it made or used; 0 if none.
        disk_mb: size of its folder, without checkpoints.
        checkpoint_mb: size of its largest checkpoint.
    """

    small: Small
    stages: Mapping[str, StageCost]
    comparisons: int = 0
    disk_mb: float = 0.0
    checkpoint_mb: float = 0.0


def rows_of(loop: str, options: Options, algorithm: Algorithm) -> int:
    """Completions of a step of a loop, whose metrics have the mean number of tokens of a completion."""
    if loop == algorithm.name:
        return algorithm.rl.rows
    preferences = options.preferences
    prompts = {
        "sample train": preferences.candidates,
        "sample test": preferences.test_prompts,
        "sample to normalise": -(-options.reward.normalise_on // preferences.completions),
    }.get(loop, 0)
    return batch_prompts(prompts, preferences.completions) * preferences.completions if prompts else 0


def steps_of(loop: str, options: Options, algorithm: Algorithm, trial: Trial, given: int) -> int:
    """Steps of a loop in the whole run.

    Args:
        loop: its name.
        options, algorithm: of the whole run.
        trial: the largest one.
        given: number of given comparisons; 0 if annotators are simulated.
    """
    preferences, reward, small = options.preferences, options.reward, trial.small
    in_trial = sum(len(stage.loops[loop].seconds) for stage in trial.stages.values() if loop in stage.loops)
    of_prompts = small.shares["preferences"]
    comparisons = given or trial.comparisons / of_prompts
    match loop:
        case "sample train":
            return batches(preferences.candidates, preferences.completions)
        case "sample test":
            return batches(preferences.test_prompts, preferences.completions)
        case "sample to normalise":
            return batches(-(-reward.normalise_on // preferences.completions), preferences.completions)
        case "reward_model" if comparisons:
            return reward.epochs * math.ceil(round(comparisons, 6) / reward.minibatch_prompts)
    updates = getattr(algorithm.config, "updates", None)
    if loop == algorithm.name and updates is not None:
        return updates
    if loop == "sft":
        return options.sft.epochs * math.ceil(in_trial / options.sft.epochs / small.shares["sft"] - 1e-6)
    return max(in_trial, round(in_trial / of_prompts))


@dataclass(frozen=True)
class Band:
    """A prediction, and where the truth lies in 90 of 100 cases."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float | int, deviation: float | int) -> "Band":
        """The band of a normal distribution; at least `LEAST_BAND` wide on either side."""
        half = max(NORMAL_90 * deviation, LEAST_BAND * value)
        return cls(value, max(0.0, value - half), value + half)

    def as_data(self) -> dict[str, float]:
        """Plain data."""
        return {"value": self.value, "low": self.low, "high": self.high}


def predict_stage(
    name: str, trials: Sequence[Trial], options: Options, algorithm: Algorithm, given: int = 0
) -> dict[str, Any]:
    """What a stage of the whole run will cost.

    Args:
        name: of the stage.
        trials: the small runs, the largest one last.
        options, algorithm: of the whole run.
        given: number of given comparisons; 0 if annotators are simulated.

    Returns:
        Bands of seconds, processor_seconds and peak_mb (None: unknown); a; for each loop its steps, tokens, b and c.
    """
    largest = trials[-1]
    found: dict[str, Any] = {"loops": {}}
    shares = [trial.small.shares.get(name, 1.0) for trial in trials]
    for clock in CLOCKS:
        rests = [getattr(trial.stages[name], clock) for trial in trials]
        total, variance = 0.0, 0.0
        for loop in largest.stages[name].loops:
            fit, used = _fit_loop(loop, name, trials, clock)
            rests = [rest - spent for rest, spent in zip(rests, used, strict=True)]
            steps = steps_of(loop, options, algorithm, largest, given)
            means = largest.stages[name].loops[loop].tokens
            tokens = steps * rows_of(loop, options, algorithm) * sum(means) / len(means)
            total += fit.seconds(steps, tokens)
            variance += fit.spread**2 * (steps**2 / fit.steps + steps)
            about = found["loops"].setdefault(loop, {"steps": steps, "tokens": round(tokens)})
            about |= {f"b_{clock}": fit.b, f"c_{clock}": fit.c}
        a = sum(fit_line(shares, [max(0.0, rest) for rest in rests]))
        found[f"a_{clock}"] = a
        found[clock] = Band.around(a + total, math.sqrt(variance)).as_data()
    found["peak_mb"] = _predict_peak(name, trials, shares)
    return found


def _fit_loop(loop: str, stage: str, trials: Sequence[Trial], clock: str) -> tuple[StepFit, list[float]]:
    """The fit of a loop's steps in all trials, and the seconds that it gives to the loop in each of them."""
    seconds, tokens, work = [], [], []
    for trial in trials:
        measured = trial.stages[stage].loops.get(loop)
        times, means = (getattr(measured, clock), measured.tokens) if measured else ([], [])
        rows = rows_of(loop, trial.small.options, trial.small.algorithm)
        seconds += times
        tokens += [rows * mean for mean in means]
        work.append((len(times), rows * sum(means)))
    fit = fit_steps(seconds, tokens)
    return fit, [fit.seconds(*some) for some in work]


def _predict_peak(name: str, trials: Sequence[Trial], shares: Sequence[float]) -> dict[str, float] | None:
    peaks = [trial.stages[name].peak_mb for trial in trials]
    known = [peak for peak in peaks if peak is not None]
    if len(known) < len(peaks):
        return None
    value = max(known)
    if name in WIDER:
        value = max(value, sum(fit_line(shares, known)))
    return Band.around(value, 0.0).as_data()


def predict(trials: Sequence[Trial], options: Options, algorithm: Algorithm, given: int = 0) -> dict[str, Any]:
    """The "stages" and the "total" of a plan; arguments as in `predict_stage`."""
    stages = {name: predict_stage(name, trials, options, algorithm, given) for name in trials[-1].stages}
    total: dict[str, Any] = {}
    for clock in CLOCKS:
        parts = [stage[clock] for stage in stages.values()]
        total[clock] = {key: sum(part[key] for part in parts) for key in ("value", "low", "high")}
    peaks = [stage["peak_mb"] for stage in stages.values()]
    total["peak_mb"] = None if None in peaks else max(peaks, key=lambda peak: peak["value"])
    return {"stages": stages, "total": total}


def accuracies_of_few(
    lm: LanguageModel,
    config: RewardOptions,
    comparisons: Sequence[Comparison],
    held_out: Sequence[Comparison],
    seed: int,
    run: Run,
) -> tuple[list[int], list[float]]:
    """Trains reward models on few of the comparisons; returns how many each had, and its accuracy on those held out.

    Raises:
        ValueError: there are too few comparisons.
    """
    smallest, largest = (max(LEAST_COMPARISONS, round(share * len(comparisons))) for share in (0.01, 0.1))
    if smallest == largest:
        raise ValueError(
            f"{len(comparisons)} comparisons are too few to predict the accuracy of a reward model from a tenth of "
            f"them: give more than {10 * LEAST_COMPARISONS + 5}"
        )
    rng = np.random.default_rng(np.random.SeedSequence((seed, 5)))
    sizes, accuracies = [], []
    for i, share in enumerate(ACCURACY_SHARES):
        size, stage = max(LEAST_COMPARISONS, round(share * len(comparisons))), f"reward {i}"
        some = [comparisons[j] for j in rng.choice(len(comparisons), size, replace=False)]
        train_reward_model(lm, config, seed + i, run, "stop", some, held_out, stage=stage)
        sizes.append(size)
        accuracies.append(run.last_metrics(stage)["accuracy/test"])
    return sizes, accuracies


def predict_disk(trials: Sequence[Trial], checkpoints: int) -> float:
    """Megabytes that the run's folder takes at most, while a checkpoint is written beside those that are kept."""
    shares = [trial.small.shares["preferences"] for trial in trials]
    files = sum(fit_line(shares, [trial.disk_mb for trial in trials])) if len({*shares}) > 1 else trials[-1].disk_mb
    return files + (checkpoints + 1) * max(trial.checkpoint_mb for trial in trials)
