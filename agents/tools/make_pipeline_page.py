"""Writes docs/pipeline.md and its picture from a run: `python -m agents.tools.make_pipeline_page RUN`.

RUN is the folder of `lmgym train Sentiment`. What the page needs of it is kept in docs/pipeline.json; without RUN, the
page is written anew from there.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.pipeline.build import demonstrations
from agents.report.html import Html, escape, tag
from lmgym.io import atomic, read_jsonl
from lmgym.tasks import Sentiment

FOLDER = Path(__file__).resolve().parents[2] / "docs"

STAGES = {
    "sft": ("sft",),
    "preferences": ("sample train", "sample test"),
    "reward model": ("reward_model", "sample to normalise"),
    "RL": ("ppo",),
}
"""The stages of the picture, and their names in metrics.jsonl, in the order of the run."""


def facts_of(run: Path) -> dict[str, Any]:
    """What the page needs of a run, as JSON data.

    Raises:
        ValueError: the run is not a finished one of all stages.
    """
    rows = list(read_jsonl(run / "metrics.jsonl"))
    found = {str(row["stage"]) for row in rows}
    missing = [name for names in STAGES.values() for name in names if name not in found]
    if missing or not (run / "evaluation.json").is_file():
        raise ValueError(
            f"{run} has no stage {missing[0]!r}: give the folder of a finished `lmgym train Sentiment`"
            if missing
            else f"{run} has no evaluation.json: let the run finish"
        )
    config, evaluation = (json.loads((run / f"{name}.json").read_text("utf-8")) for name in ("config", "evaluation"))
    columns = ("loss/test", "accuracy/test", "accuracy/noise_free", "score/mean", "kl/sequence_nats", "gold/mean")
    curves = {name: [row[name] for row in rows if name in row] for name in columns}
    options = config["options"]["options"]
    return {
        "about": {"command": _command(config["arguments"])}
        | {key: config[key] for key in ("seed", "revision", "hardware", "versions")},
        "seconds": stage_seconds(rows),
        "sizes": {path: _bytes(run / path) for path in ("sft", "preferences.jsonl", "reward_model", "policy")},
        "counts": {
            "demonstrations": options["sft"]["examples"],
            "comparisons": len(list(read_jsonl(run / "preferences.jsonl"))),
            "completions": options["preferences"]["completions"], "error_rate": options["preferences"]["error_rate"],
            "updates": options["ppo"]["updates"], "rows": options["ppo"]["rows"], "beta": options["ppo"]["beta"],
            "tested": options["test_prompts"],
        },
        "first": {name: values[0] for name, values in curves.items()},
        "last": {name: values[-1] for name, values in curves.items()},
        "evaluation": {when: evaluation[when] for when in ("before", "after")},
        "demonstration": _demonstration(int(config["seed"])),
        "comparison": next(iter(read_jsonl(run / "preferences.jsonl"))),
        "samples": _samples(run),
    }  # fmt: skip


def _command(arguments: Sequence[str]) -> str:
    """The command without the folder of the run, which does not change what it does."""
    kept = list(arguments)
    if "--out" in kept:
        del kept[kept.index("--out") : kept.index("--out") + 2]
    return f"lmgym {shlex.join(kept)}"


def stage_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each stage: between the last row of the stage before and its own last row."""
    ends = [max(float(row["seconds"]) for row in rows if row["stage"] in names) for names in STAGES.values()]
    return dict(zip(STAGES, np.diff([0.0, *ends]).round(1).tolist(), strict=True))


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _demonstration(seed: int) -> dict[str, str]:
    example = demonstrations(Sentiment(), "train", 1, seed)[0]
    return {"prompt": example.prompt, "completion": example.completion}


def _samples(run: Path) -> dict[str, dict[str, Any]]:
    """The first held-out prompt, before and after."""
    rows = list(read_jsonl(run / "samples.jsonl"))
    kept = ("prompt", "completion", "score", "gold")
    return {
        when: {key: next(r for r in rows if r["when"] == when)[key] for key in kept} for when in ("before", "after")
    }


# The picture -------------------------------------------------------------------------------------------------------

BOXES = (
    ("1 Fine-tuning (SFT)", "demonstrations", "sft/"),
    ("2 Preferences and reward model", "rankings of sampled completions", "reward_model/"),
    ("3 RL with a KL penalty", "prompts; score − β · KL", "policy/"),
)


def picture(facts: Mapping[str, Any]) -> str:
    """The three stages as SVG: what goes into each from outside, what it takes from the one before, what comes out."""
    seconds = facts["seconds"]
    times = (seconds["sft"], seconds["preferences"] + seconds["reward model"], seconds["RL"])
    parts = [tag("style", Html("text{font:13px sans-serif;fill:#1f2328}.s{font-size:11px;fill:#59636e}"))]
    parts.append(tag("rect", width=780, height=220, fill="#ffffff"))
    for i, ((title, given, made), time) in enumerate(zip(BOXES, times, strict=True)):
        x = 20 + 255 * i
        parts += [
            _text(x + 110, 28, given, "s"), _arrow(x + 110, 36, x + 110, 66),
            tag("rect", x=x, y=70, width=220, height=56, rx=6, fill="#eaf2fd", stroke="#1f6feb"),
            _text(x + 110, 94, title), _text(x + 110, 114, f"{time:.0f} s", "s"),
            _arrow(x + 110, 130, x + 110, 158), _text(x + 110, 176, made),
        ]  # fmt: skip
        if i < 2:
            parts.append(_arrow(x + 222, 98, x + 251, 98))
    parts.append(_text(390, 206, "sft/ is the reference of stage 3, and the base of reward model and policy", "s"))
    names = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": "0 0 780 220", "role": "img"}
    return str(tag("svg", tag("title", "The three stages of RLHF"), *parts, **names)) + "\n"


def _text(x: int, y: int, text: str, class_: str | None = None) -> Html:
    return tag("text", escape(text), x=x, y=y, text_anchor="middle", class_=class_)


def _arrow(x1: int, y1: int, x2: int, y2: int) -> Html:
    """A line with a head at its end, to the right or down."""
    dx, dy = (5, 0) if x2 > x1 else (0, 5)
    head = f"{x2},{y2} {x2 - dx - dy},{y2 - dy - dx} {x2 - dx + dy},{y2 - dy + dx}"
    return Html(tag("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke="#59636e") + tag("polygon", points=head, fill="#59636e"))


# The page ----------------------------------------------------------------------------------------------------------


TEMPLATE = """\
# The three stages of RLHF, each with its files

The articles of [Hugging Face](https://huggingface.co/blog/rlhf) and [AssemblyAI]({assembly}) explain RLHF with a
picture of three stages. Here is that picture with the files of one run of this package: what goes in, what comes out,
and how long it took. [Lesson 10](lessons/lesson_10.md) does the same from Python.

![Three boxes: fine-tuning, preferences and reward model, RL](pipeline.svg)

```sh
{about[command]}
```

Seed {about[seed]}, {about[hardware]}, revision {about[revision]}, Python {versions[python]}, torch {versions[torch]},
transformers {versions[transformers]}. Seconds are wall time. This is one seed; the
[README](../README.md#measured) has three.

| stage | in | out | seconds |
|---|---|---|---:|
| 1 fine-tuning | {counts[demonstrations]} demonstrations | `sft/`, {megabytes[sft]} | {seconds[sft]:.0f} |
| 2a preferences | `sft/`, prompts | `preferences.jsonl`, {megabytes[preferences.jsonl]} | {seconds[preferences]:.0f} |
| 2b reward model | `sft/`, rankings | `reward_model/`, {megabytes[reward_model]} | {seconds[reward model]:.0f} |
| 3 RL | `sft/`, `reward_model/`, prompts | `policy/`, {megabytes[policy]} | {seconds[RL]:.0f} |

## 1 Fine-tuning

**In:** the built-in model of 0.56 million parameters, and demonstrations, such as:

{demonstration}

**Out:** `sft/`, a whole model. The loss on held-out demonstrations went from {first[loss/test]:.3f} to
{last[loss/test]:.3f} nats per token. Alone: `lmgym sft Sentiment`.

## 2 Preferences and the reward model

**In:** prompts. `sft/` writes {counts[completions]} completions of each, and an annotator ranks them. Here annotators
are simulated, and wrong in {counts[error_rate]:.1%} of the pairs; with people it is [a page](labelling.md). The first
of {counts[comparisons]} rankings, best first:

{ranking}

**Out:** `reward_model/`: `sft/` with a head that writes one number. It agrees with {last[accuracy/test]:.1%} of the
held-out pairs, and with {last[accuracy/noise_free]:.1%} of pairs without wrong labels. Alone: `lmgym preferences` and
`lmgym reward`.

## 3 RL

**In:** prompts; `sft/` as the reference and under the policy's adapter; the reward model. In each of {counts[updates]}
updates of PPO the policy writes {counts[rows]} completions. Each is paid the reward model's score, minus
β = {counts[beta]:g} for each nat by which it is more probable than under the reference.

**Out:** `policy/`, an adapter. From the first update to the last, the mean score went from {first[score/mean]:.2f} to
{last[score/mean]:.2f}, and KL from {first[kl/sequence_nats]:.2f} to {last[kl/sequence_nats]:.2f} nats per completion.

## What came of it

On {counts[tested]} prompts that no stage has seen, mean ± standard error. *Gold* is the task's true score, which no
learner saw; *score* is the reward model's.

{evaluation}

The first of these prompts; in brackets, gold:

{samples}

A reward model is an approximation, and RL finds its errors; the KL penalty limits how far.
[Lesson 9](lessons/lesson_09.md) removes the penalty. What the articles warn of is measured in the studies of
[over-optimisation](studies/gao.md) and of [bias, diversity and minorities](studies/limits.md).

This page is written by `python -m agents.tools.make_pipeline_page RUN`.
"""
ASSEMBLY = "https://www.assemblyai.com/blog/how-rlhf-preference-model-tuning-works-and-how-things-may-go-wrong/"


def page_text(facts: Mapping[str, Any]) -> str:
    """The page, in Markdown: every figure in it is from the facts of the run."""
    shown, compared = facts["demonstration"], facts["comparison"]
    samples = facts["samples"]
    return TEMPLATE.format(
        **{key: facts[key] for key in ("about", "seconds", "counts", "first", "last")},
        assembly=ASSEMBLY,
        versions=facts["about"]["versions"],
        megabytes={name: f"{size / 1e6:.1f} MB" for name, size in facts["sizes"].items()},
        demonstration=_quoted(f"{shown['prompt']} … {shown['completion']}"),
        ranking=_quoted(compared["prompt"], *(f"{i}. {text}" for i, text in enumerate(compared["ranking"], 1))),
        evaluation=_evaluation(**facts["evaluation"]),
        samples=_quoted(
            samples["before"]["prompt"], *(f"{w} ({s['gold']:+.2f}): {s['completion']}" for w, s in samples.items())
        ),
    )


def _evaluation(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    def shown(figure: Mapping[str, float]) -> str:
        return f"{figure['mean']:.3f} ± {figure['stderr']:.3f}"

    names = ("gold", "score", "kl_nats_per_sequence", "tokens", "distinct_2")
    lines = [f"| {name} | {shown(before[name])} | {shown(after[name])} |" for name in names]
    return "\n".join(["| | before RL | after |", "|---|---:|---:|", *lines])


def _quoted(*lines: str) -> str:
    """Lines of the models, as they are."""
    return "\n".join(["```text", *(" ".join(line.split()) for line in lines), "```"])


def main() -> None:
    """Reads the run, if there is one, and writes picture and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished `lmgym train Sentiment`")
    run = parser.parse_args().run
    if run is not None:
        atomic.write(FOLDER / "pipeline.json", json.dumps(facts_of(run), indent=1, ensure_ascii=False) + "\n")
    facts = json.loads((FOLDER / "pipeline.json").read_text(encoding="utf-8"))
    atomic.write(FOLDER / "pipeline.svg", picture(facts))
    atomic.write(FOLDER / "pipeline.md", page_text(facts))


if __name__ == "__main__":
    main()
