"""Comparisons that the annotators made, and which of their pairs are wrong."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from agents.report.html import Html, join, small_print, tag
from agents.report.read import RunData
from lmgym.preferences import Comparison

SHOWN = 12


def preferences(run: RunData) -> Html:
    """The section with the first comparisons; nothing if the run asked for none."""
    if not run.comparisons:
        return Html("")
    truths = noise_free_of(run.comparisons, run.noise_free)
    known = [(asked, truth) for asked, truth in zip(run.comparisons, truths, strict=True) if truth is not None]
    parts = []
    if known:
        wrong = sum(len(wrong_pairs(asked, truth)) for asked, truth in known)
        pairs = sum(truth.pairs for _, truth in known)
        parts.append(
            tag(
                "p",
                "The annotators ordered ",
                tag("b", f"{wrong} of {pairs} pairs"),
                f" of held-out completions wrongly ({100 * wrong / pairs:.1f} %). The noise-free order is that of the "
                "gold score; completions of equal gold score are not counted.",
            )
        )
    shown = min(SHOWN, len(run.comparisons))
    blocks = [
        _comparison(count, asked, truth)
        for count, (asked, truth) in enumerate(zip(run.comparisons[:shown], truths[:shown], strict=True), start=1)
    ]
    held_out = "held-out " if run.noise_free else ""
    title = f"{shown} of {len(run.comparisons)} {held_out}comparisons"
    explanation = small_print(
        "Of each pair, the completion that the annotator ranked higher is the chosen one, the other the rejected one. ",
        "Bold: in a wrong pair. Tie: another completion has the same gold score." if known else "",
    )
    return join(*parts, tag("details", tag("summary", title), explanation, *blocks))


def noise_free_of(asked: Sequence[Comparison], noise_free: Sequence[Comparison]) -> list[Comparison | None]:
    """For each comparison that of the same completions without errors.

    The noise-free one may hold fewer completions, because it leaves out ties; None if it holds fewer than two.
    """
    by_prompt: dict[str, list[Comparison]] = {}
    for truth in noise_free:
        by_prompt.setdefault(truth.prompt, []).append(truth)
    found: list[Comparison | None] = []
    for comparison in asked:
        candidates = by_prompt.get(comparison.prompt, [])
        match = next((truth for truth in candidates if set(truth.ranked) <= set(comparison.ranked)), None)
        if match is not None:
            candidates.remove(match)
        found.append(match)
    return found


def wrong_pairs(asked: Comparison, truth: Comparison) -> list[tuple[str, str]]:
    """The pairs (chosen, rejected) that the noise-free order reverses."""
    rank = {text: place for place, text in enumerate(truth.ranked)}
    return [(a, b) for a, b in combinations(asked.ranked, 2) if a in rank and b in rank and rank[a] > rank[b]]


def _comparison(count: int, asked: Comparison, truth: Comparison | None) -> Html:
    wrong = [] if truth is None else wrong_pairs(asked, truth)
    verdict = "" if truth is None else f"{len(wrong)} of {truth.pairs} pairs wrong" if wrong else "no pair wrong"
    ranks = {} if truth is None else {text: f"{place}" for place, text in enumerate(truth.ranked, start=1)}
    in_wrong_pair = {text for pair in wrong for text in pair}
    names = ("Annotator", *(("Noise-free",) if truth else ()), "Completion")
    rows = [
        tag(
            "tr",
            tag("td", label),
            *((tag("td", tag("b", rank) if text in in_wrong_pair else rank),) if truth else ()),
            tag("td", text, class_="text", dir="auto"),
        )
        for label, text in _labelled(asked)
        for rank in (ranks.get(text, "tie"),)
    ]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    return tag(
        "article",
        tag("h4", f"Comparison {count} ", tag("span", verdict, class_="latest")),
        tag("div", asked.prompt, class_="text prompt", dir="auto"),
        tag("table", head, tag("tbody", *rows), class_="ranking"),
    )


def _labelled(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Each completion with its place: a pair has a chosen and a rejected one, a longer ranking has numbers."""
    labels = ("chosen", "rejected") if len(comparison.ranked) == 2 else map(str, range(1, len(comparison.ranked) + 1))
    return zip(labels, comparison.ranked, strict=True)
