"""The page of a run: complete, deterministic, alone in the world, and safe to open whatever the model has said."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agents import evaluate, ppo
from agents.report import write_report

HOSTILE = (
    "<script>alert(1)</script> & \"quoted\" 'x' </style><img src=http://evil.example/a onerror=alert(1)> "
    "\x00\x1b\u202e\ud800"
)
QUANTITIES = ("reward", "kl", "value", "advantage")


class Page(HTMLParser):
    """Elements, attributes and text as a browser would see them."""

    VOID = {"meta", "input"}

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_bytes().decode("utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.unclosed: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, class_: str | None = None) -> list[dict[str, str]]:
        return [a for name, a in self.elements if name == tag and class_ in (None, a.get("class"))]

    def sections(self) -> set[str]:
        return {attributes["id"] for attributes in self.all("section")}


def token(text: str, **values: float | None) -> dict[str, Any]:
    return {"text": text, **dict.fromkeys(QUANTITIES, 0.5), **values}


def sample(when: str, prompt: str, *tokens: dict[str, Any]) -> dict[str, Any]:
    completion = "".join(t["text"] for t in tokens)
    return {
        "when": when,
        "prompt": prompt,
        "completion": completion,
        "finish_reason": "stop",
        "score": 1.0,
        "gold": 2.0,
        "tokens": list(tokens),
    }


def ppo_rows(count: int = 3) -> list[dict[str, Any]]:
    return [
        {"stage": "ppo", "step": i, "seconds": 10.0 * i, "score/mean": 0.1 * i, "kl/sequence_nats": 0.5 * i}
        for i in range(count)
    ]


def estimates(**means: float) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "stderr": 0.1} for name, mean in means.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small run with all its files."""
    write(
        tmp_path,
        "config.json",
        {
            "command": "lmgym run",
            "task": "sentiment",
            "model": "tiny",
            "seed": 7,
            "options": {"ppo": {"config": {"lam": 0.95}}},
        },
    )
    # One row a stage: numbers, no charts. Tests of charts write rows of their own; charts take most of the time.
    sft = {"stage": "sft", "step": 0, "seconds": 2.0, "loss/train": 3.0}
    write(tmp_path, "metrics.jsonl", sft, {"stage": "ppo", "step": 0, "seconds": 20.0, "score/mean": 0.5})
    before, after = estimates(gold=1.0, kl_nats_per_sequence=0.0), estimates(gold=3.0, kl_nats_per_sequence=4.5)
    write(tmp_path, "evaluation.json", {"before": before, "after": after, "best_gold": 5.0})
    rows = sample("before", "Once", token(" upon"), token(" a")), sample("after", "Once", token(" more", reward=-2.0))
    write(tmp_path, "samples.jsonl", *rows)
    return tmp_path


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def report(folder: Path) -> Page:
    page = Page(write_report(folder))
    assert page.unclosed == []
    return page


def test_the_page_says_what_the_run_reached(folder: Path):
    page = report(folder)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert write_report(folder) == folder / "report.html"
    assert page.sections() == {"summary", "evaluation", "stage-1", "stage-2", "generations", "settings"}
    assert "raised the gold score from 1.00 ± 0.10 to 3.00 ± 0.10, 50 % of the way to the best possible (5)" in text
    assert "4.50 ± 0.10 nats of KL per sequence" in text
    assert "Training took 20 s" in text
    assert "options.ppo.config.lam" in text
    assert ppo.METRICS["score/mean"] in text
    assert evaluate.METRICS["gold"] in text
    assert dict(page.elements)["html"]["lang"] == "en"


def test_a_change_within_the_noise_is_not_called_one(folder: Path):
    write(folder, "evaluation.json", {"before": estimates(gold=1.0), "after": estimates(gold=1.2), "best_gold": None})
    text = report(folder).text
    assert "moved the gold score by less than two standard errors" in text
    assert "best possible" not in text


def test_every_token_is_there_with_its_four_values(folder: Path):
    spans = [a for a in report(folder).all("span", "t") if "title" in a]
    assert [a["title"].splitlines()[0] for a in spans] == ['" upon"', '" a"', '" more"']
    assert spans[2]["title"].splitlines()[1:] == ["reward −2", "kl +0.5", "value +0.5", "advantage +0.5"]
    # Full orange for the reward that sets the scale; the root of a quarter of the scale is half of the colour.
    assert spans[2]["style"].startswith("--reward:-1.00;")
    assert spans[0]["style"].startswith("--reward:0.50;")


def test_the_selector_works_from_the_keyboard_and_starts_with_reward(folder: Path):
    page = report(folder)
    radios = page.all("input")
    assert [(a["type"], a["id"], "checked" in a) for a in radios] == [
        ("radio", f"by-{name}", name == "reward") for name in QUANTITIES
    ]
    assert ".t{--x:var(--reward,0)}" in page.source
    assert all(f":has(#by-{name}:checked)" in page.source for name in QUANTITIES[1:])


def test_quantities_that_no_token_has_are_not_offered(folder: Path):
    without = sample("after", "Once", {"text": "x", "reward": 1.0, "kl": None, "value": math.nan})
    write(folder, "samples.jsonl", without)
    assert [a["id"] for a in report(folder).all("input")] == ["by-reward"]


def test_samples_are_paired_by_prompt_and_may_lack_a_side(folder: Path):
    rows = [
        sample("before", "A", token("a1")),
        sample("before", "B", token("b1")),
        sample("after", "A", token("a2")),
        sample("after", "A", token("a3")),
    ]
    write(folder, "samples.jsonl", *rows)
    page = report(folder)
    assert len(page.all("article")) == 3
    assert page.text.count("No completion.") == 2
    order = [a["title"].splitlines()[0] for a in page.all("span", "t") if "title" in a]
    assert order == ['"a1"', '"a2"', '"a3"', '"b1"']


@pytest.mark.parametrize("where", ["prompt", "token", "config", "stage", "metric"])
def test_hostile_text_stays_text(folder: Path, where: str):
    if where == "config":
        write(
            folder,
            "config.json",
            {
                "task": HOSTILE,
                "model": HOSTILE,
                "seed": HOSTILE,
                "command": HOSTILE,
                HOSTILE: HOSTILE,
                "hardware": HOSTILE,
                "revision": HOSTILE,
            },
        )
    elif where == "stage":
        write(folder, "metrics.jsonl", *({"stage": HOSTILE, "step": i, "loss/train": 1.0} for i in range(2)))
    elif where == "metric":
        write(folder, "metrics.jsonl", *({"stage": "ppo", "step": i, HOSTILE + "$\\frac$": i} for i in range(2)))
        write(folder, "evaluation.json", {"before": estimates(**{HOSTILE: 1.0})})
    else:
        text = HOSTILE if where == "token" else "x"
        row = sample("after", HOSTILE if where == "prompt" else "x", token(text)) | {"finish_reason": text}
        write(folder, "samples.jsonl", row, row | {"tokens": []})

    page = report(folder)
    assert "alert(1)</script>" in page.text  # seen as text, and below: not as markup
    assert not {"script", "img"} & {name for name, _ in page.elements}
    assert len(page.all("style")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page.source)
    assert "⟨U+0000⟩⟨U+001B⟩⟨U+202E⟩⟨U+D800⟩" in page.text


def test_tokens_that_would_not_show_are_shown(folder: Path):
    write(folder, "samples.jsonl", sample("after", "p", token("\n"), token(""), token("\t"), token("\u200b")))
    text = report(folder).text
    assert all(shown in text for shown in ("↵\n", "∅", "⇥\t", "⟨U+200B⟩"))


def test_the_page_loads_nothing_and_runs_nothing(folder: Path):
    write(folder, "metrics.jsonl", *ppo_rows())
    page = report(folder)
    assert page.all("svg")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert not page.all("script")
    assert not re.search(r"https?://|url\((?!#)|@import", page.source)
    loading = {"src", "srcset", "href", "xlink:href", "data", "action", "poster"}
    assert all(a[name].startswith("#") for _, a in page.elements for name in loading & a.keys())


def test_the_same_folder_gives_the_same_bytes(folder: Path):
    write(folder, "metrics.jsonl", *ppo_rows())
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


@pytest.mark.parametrize(("missing", "section"), [("evaluation.json", "evaluation"), ("samples.jsonl", "generations")])
def test_a_section_without_its_file_is_left_out(folder: Path, missing: str, section: str):
    (folder / missing).unlink()
    page = report(folder)
    assert section not in page.sections()
    assert f'href="#{section}"' not in page.source
    assert "Training took 20 s" in page.text


def test_values_that_are_not_finite_are_gaps(folder: Path):
    rows = ppo_rows(60)
    for row, value in zip(rows, (math.nan, math.inf, None, -math.inf), strict=False):
        row["score/mean"] = value
    rows[5]["value/loss"] = math.nan
    write(folder, "metrics.jsonl", *rows, {"stage": "ppo", "step": 60, "score/mean": 1e300, "kl/sequence_nats": -1e300})
    write(folder, "evaluation.json", {"before": {"gold": {"mean": None, "stderr": math.nan}}, "best_gold": math.nan})
    page = report(folder)
    assert "4 of 61 values are not finite" in page.text
    assert not re.search(r"\bnan\b|\binf\b", page.source)


def test_metrics_logged_once_are_numbers_and_splits_share_a_panel(folder: Path):
    rows: list[dict[str, Any]] = [
        {"stage": "reward_model", "step": i, "accuracy/train": 0.5 + 0.1 * i} for i in range(3)
    ]
    rows[-1] |= {"accuracy/test": 0.625, "calibration/ece": 0.0425}
    write(folder, "metrics.jsonl", *rows, {"stage": "sample train", "step": 0, "tokens/mean": 12.5})
    page = report(folder)
    assert len(page.all("figure")) == 1
    assert "test 0.625" in page.text
    assert "Calibration error (ECE)0.0425" in page.text
    assert "Other stages" in page.text


def test_long_runs_stay_small(folder: Path):
    write(folder, "metrics.jsonl", *ppo_rows(4000))
    assert write_report(folder).stat().st_size < 250_000


def test_a_clock_that_starts_anew_adds_up(folder: Path):
    write(
        folder,
        "metrics.jsonl",
        *({"stage": "ppo", "step": i, "seconds": s} for i, s in enumerate((50.0, 70.0, 5.0, 30.0))),
    )
    assert "Training took 1 min 40 s" in report(folder).text


def test_a_folder_that_is_none_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no rows"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("metrics.jsonl", '{"stage": "ppo", "st', r"metrics\.jsonl, line 2: not JSON .* cut short"),
        ("metrics.jsonl", "[1]", r"metrics\.jsonl, line 2: not an object but list"),
        ("metrics.jsonl", '{"step": 1}', r"metrics\.jsonl, line 2: lacks 'stage'"),
        ("metrics.jsonl", '{"stage": "ppo", "step": null}', r"metrics\.jsonl, line 2: lacks 'step'"),
        ("metrics.jsonl", '{"stage": "ppo", "step": 1, "x": "1"}', r"metrics\.jsonl, line 2: 'x' is '1', not a number"),
        ("samples.jsonl", '{"when": "now"}', r"samples\.jsonl, line 2: 'when'"),
        ("samples.jsonl", '{"when": "after", "prompt": "", "completion": "", "tokens": [1]}', r"line 2: 'tokens'"),
        ("config.json", "{}", r"config\.json: not JSON"),
        ("evaluation.json", "", r"evaluation\.json: .* must be like"),
    ],
)
def test_malformed_files_are_named_with_their_line(folder: Path, name: str, line: str, complaint: str):
    first = {
        "metrics.jsonl": ppo_rows(1)[0],
        "samples.jsonl": sample("after", "p"),
        "config.json": {},
        "evaluation.json": {"before": {"gold": 1.0}},
    }[name]
    (folder / name).write_text(json.dumps(first) + "\n" + line, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        write_report(folder)
    assert not (folder / "report.html").exists()
