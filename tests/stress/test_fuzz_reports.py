"""Run folders with random contents: a page in which all of them are text, or an error that names the folder."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.report import write_report

pytestmark = [pytest.mark.stress, pytest.mark.timeout(300)]

TEXTS = (
    "</script><script>alert(1)</script>", "</style><script>alert(1)", "\"' onload='alert(1)' x=\"",
    "</title><svg/onload=alert(1)>", "<!--", "-->", "]]>", "&lt;script&gt;", "\u2028alert(1)\u2029", "{{7*7}}",
    "${x}", "$\\frac{1}{2}$", "javascript:alert(1)", "expression(alert(1))", "url(http://evil.example)", "}</style>",
    "\x00\x1b[31m\x9b", "\ud800", "\u202e", "é漢🙂", "", " ", "a" * 3000, "../../x", "<a href=//evil.example>",
    "<img src=x onerror=alert(1)>", "\\", "\n\r\n", "%s{0}", "<base href=//evil.example>",
)  # fmt: skip
WHOLE_TEXTS = tuple(t for t in TEXTS if t != "\ud800")
"""Texts that a file of comparisons may hold: its reader refuses half a character."""
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "p", "h1", "h2", "h3", "h4", "span", "b", "nav", "a",
    "main", "section", "dl", "dt", "dd", "div", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
    "figure", "figcaption", "small", "i", "svg", "g", "path", "defs", "clippath", "rect", "use", "text", "tspan",
    "fieldset", "legend", "label", "input", "article", "code", "pre",
}  # fmt: skip


class Page(HTMLParser):
    def __init__(self, source: str):
        super().__init__()
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED, tag
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "action", "formaction", "srcset"), (tag, name)
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#"), value
            if name == "style":
                assert not {"url(", "expression"} & {
                    part for part in ("url(http", "expression") if part in (value or "")
                }

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")


def anything(rng: np.random.Generator, depth: int = 2) -> Any:
    match rng.integers(9 if depth else 6):
        case 0 | 1:
            return TEXTS[rng.integers(len(TEXTS))]
        case 2:
            return [0, 1, -1, 10**30, 10**400, 0.5, 1e308, float("nan"), -float("inf"), 5e-324][rng.integers(10)]
        case 3:
            return [None, True, False][rng.integers(3)]
        case 4 | 5:
            return float(rng.normal())
        case 6:
            return [anything(rng, depth - 1) for _ in range(rng.integers(4))]
        case _:
            return {text(rng): anything(rng, depth - 1) for _ in range(rng.integers(4))}


def text(rng: np.random.Generator) -> str:
    return TEXTS[rng.integers(len(TEXTS))]


def number(rng: np.random.Generator) -> Any:
    return [None, 0, 1.5, -3, float("nan"), 1e300, float(rng.normal())][rng.integers(7)]


def write_folder(folder: Path, rng: np.random.Generator) -> None:
    """A run folder whose files mostly have the right shape; the rest of their contents is random."""
    wild = rng.integers(4) == 0
    stages = ["ppo", "sft", text(rng)]
    names = ["score/mean", "kl/sequence_nats", "gold/mean", "loss/train", text(rng), text(rng)]
    metrics = [
        {"stage": stages[rng.integers(3)], "step": step, "seconds": step, **{name: number(rng) for name in names}}
        for step in range(rng.integers(1, 6))
    ]
    token = lambda: {"text": text(rng), **{q: number(rng) for q in ("reward", "kl", "value", "advantage", text(rng))}}  # noqa: E731
    samples = [
        {
            "when": ["before", "after"][rng.integers(2)], "prompt": text(rng), "completion": text(rng),
            "score": number(rng), "gold": number(rng), "finish_reason": text(rng),
            "tokens": [token() for _ in range(rng.integers(4))],
        }
        for _ in range(rng.integers(3))
    ]  # fmt: skip
    estimate = lambda: {"mean": number(rng), "stderr": number(rng)}  # noqa: E731
    evaluation = {w: {name: estimate() for name in ("gold", "score", text(rng))} for w in ("before", "after")}
    files: dict[str, Any] = {
        "config.json": {name: text(rng) for name in ("task", "model", "seed", "command")}
        | {"format": 2, text(rng): anything(rng)},
        "evaluation.json": anything(rng) if wild else evaluation | {"best_gold": number(rng)},
        "metrics.json": anything(rng) if wild else {"ppo": {text(rng): text(rng), "score/mean": text(rng)}},
    }  # fmt: skip
    if wild and rng.integers(2):
        metrics.append(anything(rng))
    if wild and rng.integers(2):
        samples.append(anything(rng))
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    rankings = [[str(t) for t in rng.permutation(WHOLE_TEXTS)[: rng.integers(2, 5)]] for _ in range(rng.integers(1, 4))]
    comparisons: list[Any] = [{"prompt": ranking[0], "ranking": ranking} for ranking in rankings]
    truths: list[Any] = [{"prompt": r[0], "ranking": list(rng.permutation(r))} for r in rankings]
    if wild and rng.integers(2):
        comparisons.append(anything(rng))
    rows_of = {
        "metrics.jsonl": metrics, "samples.jsonl": samples,
        "preferences_test.jsonl": comparisons, "preferences_noise_free.jsonl": truths,
    }  # fmt: skip
    for name, rows in rows_of.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_run_folders_of_anything(tmp_path: Path) -> None:
    pages = 0
    for attempt in range(40):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        write_folder(folder, np.random.default_rng([attempt, 4]))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        try:
            page = write_report(folder)
        except ValueError as error:
            said = str(error)
        else:
            said = str(folder)
            source = page.read_text(encoding="utf-8")
            Page(source)
            assert source.count("<style>") == source.count("</style>") == 1
            assert "<script" not in source
            assert not {"\x00", "\x1b", "\x9b", "\u202e", "\u2028", "\u2029"} & set(source)
            pages += 1
            page.unlink()
        assert said.startswith(str(folder))
        assert "\n" not in said
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "nothing else was touched"
    assert pages > 20
    print(f"\n{pages} pages of 40 folders")
