"""The data-set card of exported labels: who, when, by which guidelines, and how far they can be trusted."""

import math
from datetime import UTC, datetime

from lmgym.preferences.label_stats import label_stats
from lmgym.preferences.store import LabelStore


def label_card(store: LabelStore, file: str, form: str, rows: int) -> str:
    """The card as Markdown, with figures of the whole store.

    Args:
        store: the file of labels.
        file: the name of the exported file.
        form: its format.
        rows: its number of rows.
    """
    found, labels = label_stats(store), store.labels()
    times = [label.answered_at for label in labels]
    when = f"{_day(min(times))} to {_day(max(times))} (UTC)" if times else "never"
    guidelines = store.rows("SELECT version, text FROM guidelines ORDER BY version")
    withdrawn = store.rows("SELECT COUNT(*) AS n FROM withdrawals")[0]["n"]
    strategies = store.rows("SELECT strategy, COUNT(*) AS n FROM items WHERE strategy IS NOT NULL GROUP BY strategy")
    models = {label.model for label in labels if label.model}
    answers = ", ".join(f"{count} {name}" for name, count in sorted(found.answers.items())) or "none"
    ceiling = "unknown" if math.isnan(found.ceiling) else f"{found.ceiling:.2f}"
    kappa = "no data" if math.isnan(found.kappa) else f"{found.kappa:.2f}"
    lines = [
        f"# Labels: {file}",
        "",
        f"{rows} rows in the format “{form}”, written by `lmgym label export`. The figures are those of all labels.",
        "",
        "## Who and when",
        "",
        f"- {len(found.labellers)} labellers under pseudonyms. {withdrawn} have withdrawn: their answers are deleted.",
        f"- Answered {when}: {answers}.",
        "- Questions chosen: "
        + (", ".join(f"{row['strategy']} ({row['n']})" for row in strategies) or "by hand")
        + ".",
        "- Held-out prompts are asked at random, and are never trained on.",
        f"- Texts by {len(models)} models (digests {', '.join(sorted(models)) or 'unknown'}).",
        "",
        "## How far they can be trusted (95 % intervals)",
        "",
        f"- Krippendorff's α {found.alpha}; Cohen's κ {kappa}; same answer of two labellers {found.agreement}.",
        f"- A perfect reward model would have an accuracy of about {ceiling} on these labels.",
        f"- Same answer to the same question with the sides reversed: {found.consistency}.",
        f"- Right on questions with a known answer: {found.gold}; error rate {found.error}.",
        "",
        "## Known biases",
        "",
        f"- Share of “left”: {found.left}; sides are drawn at random."
        + (" Its interval does not hold one half: somebody answers by the side." if found.side_alarm else ""),
        "- Who the labellers are, and what they share, is not recorded: their taste is not everybody's.",
        "",
        "## Privacy",
        "",
        "- Nothing about the labellers is stored but a pseudonym, their answers and the times of these.",
        "- Prompts and texts are as they were given: check them for personal data before you publish them.",
        "- A labeller can withdraw (`lmgym label withdraw`). Then delete this file, and export again.",
        "",
        "## Guidelines",
        "",
    ]
    for row in guidelines:
        lines += [f"Version {row['version']}:", "", *(f"> {line}" for line in row["text"].splitlines()), ""]
    return "\n".join(lines if guidelines else [*lines, "None were shown.", ""])


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
