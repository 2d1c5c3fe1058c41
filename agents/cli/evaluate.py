"""`lmgym evaluate`: the figures of a policy on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from agents.cli.finished import FinishedRun, parse_with_run
from agents.cli.names import default_score, policy_in, setting_of
from agents.cli.options import Common
from agents.evaluate import METRICS, EvaluationReport, evaluate
from agents.pipeline import Setting
from agents.pipeline.samples import unscored
from lmgym.reward import Score


@dataclass(frozen=True)
class Evaluate(Common):
    """Measure a policy on held-out prompts."""

    task: tyro.conf.Positional[str] = "Sentiment"
    """Folder of a finished run, whose options and models then apply; or a registered environment, such as "Sort"."""
    policy: str | None = None
    """Folder of an adapter, trained on --model; or the folder of a run. "None", the default without a run, measures
    the model itself."""
    reward: str = "default"
    """Reward model or function that gives the score, as in `lmgym train`."""
    temperature: float = 1.0
    """Sampling temperature of the policy."""
    count: int = 256
    """Number of held-out prompts."""


def run(argv: Sequence[str]) -> int:
    """Measures a policy and prints a table."""
    report, finished = measure(argv)
    before = {} if finished is None else finished.figures()
    table = Table("measure", "mean", "± s.e.", *(["in the run"] if before else []), "what it is")
    for name, figure in report.figures.items():
        then = before.get(name)
        cells = [("" if then is None else f"{then:.4f}")] if before else []
        table.add_row(name, f"{figure.mean:.4f}", f"{figure.stderr:.4f}", *cells, METRICS[name])
    Console().print(table)
    return 0


def measure(argv: Sequence[str]) -> tuple[EvaluationReport, FinishedRun | None]:
    """Measures the policy that a command line names; also returns the run that it belongs to, if a run was named.

    Raises:
        ValueError: a name is unknown, or there is no score.
    """
    wanted, finished = parse_with_run("evaluate", Evaluate, argv, ("policy", "reward", "temperature", "count"))
    if wanted.reward == "learned":
        raise ValueError("evaluate trains no reward model: give --reward the folder of one, such as RUN/reward_model")
    setting = setting_of(wanted, wanted.reward, scored=finished is None)
    policy = policy_in(wanted.policy, setting.lm, wanted.temperature)
    score = setting.score or _default_score(wanted, setting, finished)
    if finished is not None and finished.algorithm is not None:
        score.finite = finished.wanted.options.on_bad_step == "stop"
    kl = "sampled" if wanted.policy else "none"  # without an adapter, the model is its own reference
    env = setting.env(wanted.count, "test", kl=kl, temperature=wanted.temperature, score=score)
    return evaluate(policy, env, wanted.seed), finished


def _default_score(wanted: Evaluate, setting: Setting, finished: FinishedRun | None) -> Score:
    """The score where --reward names none."""
    if finished is None or finished.algorithm is None:
        return default_score(wanted, setting)
    # A run without a reward model learned from comparisons: it was evaluated by the gold score, if there is one.
    return Score({"gold": setting.task.gold} if setting.task.has_gold else {"none": unscored})
