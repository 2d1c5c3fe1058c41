"""The model cards of a run: a README.md in each folder with a model, in the form of the Hugging Face hub."""

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.runs.files import read_config, read_rows
from lmgym.io import atomic, printable

CARD = "README.md"
MEASURES = {
    "gold": "gold score, which no learner sees",
    "score": "score that the policy is paid",
    "kl_nats_per_sequence": "KL to the reference, nats per sequence",
    "kl_exact_nats_per_sequence": "the same, exact at each token",
    "entropy_nats_per_token": "entropy, nats per token",
    "tokens": "tokens per completion",
}
"""The figures of evaluation.json that a card shows, and what they are."""
REWARD_MEASURES = {
    "accuracy/test": "accuracy on held-out comparisons",
    "accuracy/noise_free": "accuracy on held-out comparisons without label errors",
    "calibration/ece": "expected calibration error on held-out comparisons",
}
"""The metrics of a reward model that its card shows."""

PEFT = """
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")  # the folder of this card, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
"""
TRANSFORMERS = """
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")  # the folder of this card, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
ENSEMBLE = """
from lmgym.reward import load_reward_model

model = load_reward_model("{name}")  # the folder of this card: an ensemble, called with prompts and completions
"""
LICENCE = (
    "Fill in, here and in the head of this file (`license`). The licences of the base model and of the data apply too."
)


def write_cards(run: Path) -> list[Path]:
    """Writes a card into each model folder of a run that has none; the cards that are there stay as they are.

    Returns:
        The paths of the new cards.
    """
    models = [name for name in ("sft", "reward_model", "policy", "policy_best") if (run / name).is_dir()]
    written = [run / name / CARD for name in models if not (run / name / CARD).exists()]
    for path in written:
        atomic.write(path, model_card(run, path.parent.name))
    return written


def model_card(run: Path, model: str) -> str:
    """The text of the card of one model.

    Args:
        run: the run's folder.
        model: "sft", "policy", "policy_best", "reward_model", or "merged": the fine-tuned model with a policy merged.

    Raises:
        ValueError: config.json is missing or damaged.
    """
    config = read_config(run)
    options = _mapping(config.get("options"))
    algorithm = _algorithm(options)
    is_adapter = model in ("policy", "policy_best")
    trained = is_adapter or model == "merged"
    lines = _front_matter(config, model, algorithm)
    lines += [f"# {_title(model, algorithm, config)}", "", _about(model, algorithm), ""]
    facts = {**_data(run, config, options), **(_learning(run, options, algorithm) if trained else {})}
    if is_adapter:
        facts["Base of the adapter"] = (
            "`sft` of the same run; `adapter_config.json` names it, `lmgym.json` holds its checksum"
        )
    lines += [f"- **{name}**: {_one_line(value)}" for name, value in facts.items()]
    lines += ["", *_figures(run, model, options), "## How to load it", ""]
    auto = "AutoModelForSequenceClassification" if model == "reward_model" else "AutoModelForCausalLM"
    example = PEFT.format(name=model) if is_adapter else TRANSFORMERS.format(auto=auto, name=model)
    if model == "reward_model" and (run / model / "ensemble.json").is_file():
        example = ENSEMBLE.format(name=model)
    lines += ["```python", example.strip(), "```", "", "## Command", "", _indented(str(config.get("command"))), ""]
    lines += [
        f"Revision of lmgym: {config.get('revision')}. Seed: {config.get('seed')}.",
        "",
        "## Licence",
        "",
        LICENCE,
    ]
    return "\n".join(lines) + "\n"


def _front_matter(config: Mapping[str, Any], model: str, algorithm: str) -> list[str]:
    """The metadata that the hub reads, as YAML. JSON strings are YAML strings, whatever they hold."""
    name = str(config.get("model"))
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    base = name if on_hub else re.sub(r"[^\w.-]", "-", Path(name).name).strip("-.") or "model"
    note = "" if on_hub and "/" in name else "  # not on the hub under this name: fill in"
    adapter = model in ("policy", "policy_best")
    learner = {"sft": "sft", "reward_model": "reward-model"}.get(model, algorithm)
    tags = [
        "lmgym",
        *(["reinforcement-learning"] if learner == algorithm else []),
        learner,
        *(["lora"] if adapter else []),
    ]
    return [
        "---",
        f"base_model: {json.dumps(base)}{note}",
        f"base_model_relation: {'adapter' if adapter else 'finetune'}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {'text-classification' if model == 'reward_model' else 'text-generation'}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "# license: fill in, for example apache-2.0",
        "---",
        "",
    ]


def _algorithm(options: Mapping[str, Any]) -> str:
    """The stage of the algorithm: the name of its module; "" for a run that trains no policy."""
    name = str(options.get("algorithm") or "")
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


def _title(model: str, algorithm: str, config: Mapping[str, Any]) -> str:
    what = {"sft": "Fine-tuned model", "reward_model": "Reward model"}.get(model, f"Policy trained by {algorithm}")
    return f"{what}: {_one_line(config.get('task') or 'comparisons')}"


def _about(model: str, algorithm: str) -> str:
    best = (
        " It is that of the update with the best rollouts (`--best`); the figures below are those of the last update."
    )
    return {
        "sft": "The base model of a run of lmgym after supervised fine-tuning: what its policy starts from.",
        "reward_model": "A reward model: it gives a text one number. Trained by the Bradley-Terry loss on comparisons.",
        "policy": f"A LoRA adapter, trained by {algorithm} with lmgym.",
        "policy_best": f"A LoRA adapter, trained by {algorithm} with lmgym.{best}",
        "merged": f"A whole model: the fine-tuned model of a run of lmgym with the adapter that {algorithm} trained.",
    }[model]


def _data(run: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, object]:
    """What a run's models were made from."""
    stages = _mapping(options.get("options"))
    sft, preferences = (_mapping(stages.get(name) or options.get(name)) for name in ("sft", "preferences"))
    found: dict[str, object] = {"Model that the run began with": config.get("model")}
    if "examples" in sft:
        count = sft["examples"] if _was_tracked(run, "sft") else 0
        found["Fine-tuning"] = f"on up to {count} demonstrations" if count else "none: `sft` is the model as it was"
    found["Task"] = config.get("task") or "comparisons"
    if isinstance(options.get("prompts"), str):
        found["Prompts"] = options["prompts"]
    comparisons = options.get("preferences_file") or options.get("preferences")
    if isinstance(comparisons, str):
        found["Comparisons"] = comparisons
    elif (run / "preferences.jsonl").is_file():
        found["Comparisons"] = (
            f"simulated: {preferences.get('completions')} completions of each of {preferences.get('prompts')} prompts, "
            f"error rate {preferences.get('error_rate')}"
        )
    return found


def _was_tracked(run: Path, stage: str) -> bool:
    """Whether a stage took any step; fine-tuning is skipped where the data have nothing to learn from."""
    path = run / "metrics.jsonl"
    return path.is_file() and any(row.get("stage") == stage for row in read_rows(path))


def _learning(run: Path, options: Mapping[str, Any], algorithm: str) -> dict[str, object]:
    """How a run's policy was trained."""
    rl, reward = _mapping(_mapping(options.get("options")).get(algorithm)), options.get("reward")
    if (run / "reward_model").is_dir():
        reward = "`reward_model` of the same run, which was learned from the comparisons"
    target = f", adapted to {rl['kl_target_nats']} nats of KL per sequence" if rl.get("kl_target_nats") else ""
    found: dict[str, object] = {"Algorithm": algorithm, "Reward": reward, "β": f"{rl.get('beta')}{target}"}
    found["Temperature"] = rl.get("temperature")
    if options.get("from_adapter"):
        found["Started from the adapter"] = options["from_adapter"]
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _figures(run: Path, model: str, options: Mapping[str, Any]) -> list[str]:
    """A table of what was measured, with intervals of 95 %."""
    if model == "reward_model":
        last = [row for row in read_rows(run / "metrics.jsonl") if row.get("stage") == "reward_model"][-1:]
        rows = [(text, [f"{row[name]:.3f}"]) for row in last for name, text in REWARD_MEASURES.items() if row.get(name)]
        return _table(["measure", "value"], rows)
    path = run / "evaluation.json"
    if not path.is_file() or (model == "sft" and options.get("from_adapter")):
        return []
    evaluation = _mapping(json.loads(path.read_bytes()))
    when = ["before"] if model == "sft" else ["before", "after"]
    names = [
        n
        for n in MEASURES
        if all(n in _mapping(evaluation.get(w)) for w in when) and not (model == "sft" and n.startswith("kl"))
    ]
    rows = [(MEASURES[name], [_interval(evaluation[w][name]) for w in when]) for name in names]
    count = _mapping(options.get("options")).get("test_prompts")
    head = [f"mean over {count} held-out prompts [95 % interval]", *(["value"] if model == "sft" else when)]
    return _table(head, rows)


def _table(head: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join([n, *c])} |" for n, c in rows)]
    return ["## Figures", "", *lines, ""]


def _interval(figure: Mapping[str, Any]) -> str:
    mean, error = figure["mean"], figure["stderr"]
    if mean is None or error is None:  # not finite
        return "–"
    return f"{mean:z.3f} [{mean - 1.96 * error:z.3f}, {mean + 1.96 * error:z.3f}]"


def _one_line(value: object) -> str:
    return " ".join(printable(str(value)).split())


def _indented(text: str) -> str:
    """A block of code, whatever the text holds."""
    return textwrap.indent(printable(text), "    ")
