"""Writes the pages in docs/studies anew from the committed results: `python -m agents.tools.make_study_pages`.

To commit results: run `lmgym study NAME --quick` in a clean checkout, copy its results.jsonl to
docs/studies/results/NAME.jsonl, and run this.
"""

from collections import Counter
from pathlib import Path

from agents.experiments.results import read_results
from agents.studies import STUDIES, measured, study_named, write_page
from agents.studies.form import OUTCOMES
from lmgym.io import atomic

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "studies"


def index() -> str:
    """The index of the pages: every study, and how many of its claims held."""
    head, _, _ = (FOLDER / "README.md").read_text(encoding="utf-8").partition("<!-- table:begin -->")
    lines = ["<!-- table:begin -->", "", f"| study | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * len(OUTCOMES)]
    for name in recorded():
        counts = Counter(v.outcome for v in measured(study_named(name), read_results(_results(name))))
        lines.append(f"| [{study_named(name).TITLE}]({name}.md) | {' | '.join(str(counts[o]) for o in OUTCOMES)} |")
    missing = [f"`{name}`" for name in STUDIES if name not in recorded()]
    if missing:
        lines += ["", f"Of these studies no results are committed yet: {', '.join(missing)}."]
    return head + "\n".join([*lines, "", "<!-- table:end -->", ""])


def recorded() -> list[str]:
    """The studies whose results are committed."""
    return [name for name in STUDIES if _results(name).is_file()]


def _results(name: str) -> Path:
    return FOLDER / "results" / f"{name}.jsonl"


def main() -> None:
    """Writes every page, and the index."""
    for name in recorded():
        print(write_page(study_named(name), read_results(_results(name)), FOLDER))
    atomic.write(FOLDER / "README.md", index())


if __name__ == "__main__":
    main()
