"""What metrics and stages are called on the page, and where a metric's definition is found."""

import re
from collections.abc import Mapping

# The metrics shown first, in this order. The page folds all others away.
METRIC_TITLES = {
    "score/mean": "Score",
    "gold/mean": "Gold score",
    "kl/sequence_nats": "KL (k1), nats per sequence",
    "kl/beta": "β, score per nat",
    "policy/entropy_nats": "Entropy, nats per token",
    "tokens/mean": "Tokens per completion",
    "value/explained_variance": "Explained variance of the value",
    "loss": "Loss, nats",
    "accuracy": "Accuracy",
    "margin": "Margin, score",
    "calibration/ece": "Calibration error (ECE)",
    "gold": "Gold score",
    "score": "Score",
    "kl_exact_nats_per_sequence": "KL (exact), nats per sequence",
    "kl_nats_per_sequence": "KL (k1), nats per sequence",
    "entropy_nats_per_token": "Entropy, nats per token",
    "tokens": "Tokens",
    "finished_share": "Finished",
    "distinct_2": "Distinct pairs",
}

STAGE_TITLES = {
    "sft": "Supervised fine-tuning",
    "reinforce": "REINFORCE",
    "online_dpo": "Online DPO",
    "before": "Evaluation before",
    "after": "Evaluation after, saving",
}


def stage_title(stage: str) -> str:
    """A stage's title; a short name such as "ppo" is an abbreviation."""
    return STAGE_TITLES.get(stage, stage.upper() if len(stage) <= 5 else stage.replace("_", " ").capitalize())


def match_pattern(pattern: str, name: str) -> re.Match[str] | None:
    """Matches the name of a definition with that of a metric: {n} in the pattern is any digits, group 1."""
    # A possessive quantifier: a hostile pattern cannot cause catastrophic backtracking.
    return re.fullmatch(re.escape(pattern).replace(r"\{n\}", r"(\d++)"), name)


def definition_of(name: str, definitions: Mapping[str, str]) -> str | None:
    """The definition of a metric, by its name or by a pattern."""
    return definitions.get(name) or next(
        (text for pattern, text in definitions.items() if match_pattern(pattern, name)), None
    )
