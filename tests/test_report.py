"""The page of a run: complete, deterministic, alone in the world, and safe to open whatever the model has said."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agents import evaluate, learner
from agents.report import write_report

HOSTILE = (
    "<script>alert(1)</script> & \"quoted\" 'x' </style><img src=http://evil.example/a onerror=alert(1)> "
    "</title></svg></pre><!-- ]]> {{7*7}} &lt;b&gt; javascript:alert(1) ' onload='alert(1) \u2028\u2029 "
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
    assert "4.50 ± 0.10 nats of KL per sequence (k1)" in text
    assert "Training took 20 s, from the start of the run to its last step" in text
    assert "options.ppo.config.lam" in text
    assert learner.METRICS["score/mean"] in text
    assert evaluate.METRICS["gold"] in text
    assert dict(page.elements)["html"]["lang"] == "en"


def test_a_change_within_the_noise_is_not_called_one(folder: Path):
    write(folder, "evaluation.json", {"before": estimates(gold=1.0), "after": estimates(gold=1.2), "best_gold": None})
    text = report(folder).text
    assert "moved the gold score by less than two standard errors" in text
    assert "best possible" not in text


def test_the_headline_says_which_kl(folder: Path):
    after = estimates(kl_nats_per_sequence=4.5, kl_exact_nats_per_sequence=4.25)
    write(folder, "evaluation.json", {"after": after})
    text = report(folder).text.replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "The policy ended 4.25 ± 0.10 nats of KL per sequence (exact; by k1, the estimate from samples: 4.50 ±" in text
    )


def test_no_gold_score_and_no_kl(folder: Path):
    write(folder, "evaluation.json", {"before": estimates(score=1.0), "after": estimates(score=3.0), "best_gold": None})
    rows = [sample("before", "A", token("x")), sample("after", "A", token("y"))]
    del rows[0]["gold"]
    rows[1]["gold"] = None
    write(folder, "samples.jsonl", *rows)
    text = report(folder).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Training raised the score from 1.00 ± 0.10 to 3.00 ± 0.10. Training took" in text
    assert not re.search("gold|KL to|of KL", text.split("What each metric means")[0], re.IGNORECASE)


@pytest.mark.parametrize("gold_is_the_score", [True, False])
def test_a_score_that_is_the_gold_score_is_shown_once(folder: Path, gold_is_the_score: bool):
    other = 0.0 if gold_is_the_score else 0.5
    rows = [row | {"gold/mean": row["score/mean"] * (1 + 1e-7) + other} for row in ppo_rows()]
    write(folder, "metrics.jsonl", *rows)
    sides = {"before": estimates(gold=1.0, score=1.0 + other), "after": estimates(gold=2.0, score=2.0)}
    write(folder, "evaluation.json", sides | {"best_gold": 5.0})
    write(folder, "samples.jsonl", sample("after", "A", token("x")) | {"gold": 1.0 + other})
    page = report(folder)
    rows = re.findall(r'<th scope="row"[^>]*>(.*?)</th>', page.source.partition('id="stage-1"')[0])
    assert rows == (["Gold score"] if gold_is_the_score else ["Gold score", "Score"])
    assert ("The score is the gold score itself." in page.text) == gold_is_the_score
    assert ("the score is gamed" in page.text) == (not gold_is_the_score)
    facts = "gold 1 · 1 tokens" if gold_is_the_score else "gold 1.50 · score 1 · 1 tokens"
    assert facts in page.text
    # The scatter's, and those of score, gold score and KL.
    assert len(page.all("svg")) == (3 if gold_is_the_score else 5)
    assert "best possible 5" in page.text


def test_panels_against_kl_are_apart_so_that_they_can_stack(folder: Path):
    write(folder, "metrics.jsonl", *(row | {"gold/mean": 0.5} for row in ppo_rows()))
    page = report(folder)
    assert page.all("div", "panels large")
    assert [a["aria-label"].partition(" against")[0] for a in page.all("svg")][:2] == ["score", "gold score"]
    assert "○ first, update 0" in page.text
    assert "first" not in "".join(re.findall(r"<text.*?</text>", page.source, re.DOTALL))


def test_a_policy_that_stays_has_no_panel_against_kl(folder: Path):
    write(folder, "metrics.jsonl", *(row | {"kl/sequence_nats": 1e-7} for row in ppo_rows()))
    assert "Score against KL" not in report(folder).text


def test_metrics_of_minibatches_end_in_a_mean(folder: Path):
    rows: list[dict[str, Any]] = [{"stage": "sft", "step": i, "loss/train": float(i % 2)} for i in range(40)]
    rows[-1]["loss/test"] = 0.25
    write(folder, "metrics.jsonl", *rows, *ppo_rows(40))
    page = report(folder)
    assert "train 0.500 (mean of the last 10 %)" in page.text
    assert "test 0.250" in page.text
    assert "Score3.90" in page.text.replace(" ", "")  # an update is a whole rollout: its last one stands
    assert page.text.count("mean of the last") == 1


def test_numbers_have_the_same_digits(folder: Path):
    tiny = {"mean": 3.4e-7, "stderr": 2e-7}
    before = {"kl_nats_per_sequence": tiny, "score": tiny, "distinct_2": {"mean": 0.32352, "stderr": 0.0}}
    write(folder, "evaluation.json", {"before": before})
    write(folder, "metrics.jsonl", {"stage": "sft", "step": 0, "a": 0.05806, "b": 1234.5, "c": 0.5, "d": 2.0})
    text = report(folder).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "KL (k1), nats per sequence0–" in text
    assert "Score3.4e−07 ± 2e−07–" in text
    assert "Distinct pairs0.324–" in text
    assert "a0.0581b1234c0.500d2" in text


@pytest.mark.parametrize(
    ("task", "model", "title"),
    [
        ("../shared/data/x.jsonl", "../shared/data/model/", "x.jsonl · model"),
        (None, "C:\\models\\tiny", "tiny"),
        (None, None, "unknown task"),
    ],
)
def test_the_title_has_base_names(folder: Path, task: str | None, model: str | None, title: str):
    write(folder, "config.json", {"task": task, "model": model})
    page = report(folder)
    assert f"<h1>{title}</h1>" in page.source
    assert f"<code>{task or 'null'}</code>" in page.source  # the whole of it among the settings


def test_any_algorithm_with_its_own_definitions(folder: Path):
    rows = [row | {"stage": "grpo", "best_of/4/score": 0.1, "best_of/16/score": 0.2} for row in ppo_rows()]
    write(folder, "metrics.jsonl", *rows)
    own = {"score/mean": "MY SCORE", "best_of/{n}/score": "BEST OF N", "never": "NOT LOGGED", "kl/beta": 3}
    write(folder, "metrics.json", {"grpo": own, "evaluation": ["no", "object"], "x": {"y": None}})
    page = report(folder)
    assert "GRPO" in page.text
    assert "MY SCORE" in page.text
    assert learner.METRICS["score/mean"] not in page.text
    assert learner.METRICS["kl/sequence_nats"] in page.text
    assert evaluate.METRICS["gold"] in page.text
    assert "best_of/{n}/scoreBEST OF N" in page.text
    assert "NOT LOGGED" not in page.text
    titles = [a["title"] for a in page.all("figure") if "title" in a]
    assert "best_of/4/score: BEST OF N\nbest_of/16/score: BEST OF N" in titles
    assert "n = 4: 0.100" in page.text


@pytest.mark.parametrize("content", ["", "[1]", '{"ppo": 1}', '{"ppo": {"score/mean": [1]}}', "\udcff"])
def test_malformed_definitions_are_ignored(folder: Path, content: str):
    (folder / "metrics.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    assert learner.METRICS["score/mean"] in report(folder).text


def test_components_are_drawn_with_their_score(folder: Path):
    parts = {f"score/part_{i}": 0.5 * i for i in range(7)}
    write(folder, "metrics.jsonl", *(row | parts for row in ppo_rows()))
    page = report(folder)
    assert [a["aria-label"].partition(".")[0] for a in page.all("svg")].count("Score") == 1
    assert "mean 0.200" in page.text
    assert all(f"part {i} " in page.text for i in range(7))
    assert "components are shown before their weights" in page.text


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


@pytest.mark.parametrize("where", ["prompt", "token", "config", "stage", "metric", "definition"])
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
    elif where == "definition":
        write(folder, "metrics.json", {"ppo": {"score/mean": HOSTILE, HOSTILE: HOSTILE}})
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
    (folder / name).write_text(json.dumps(first) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_line_that_a_killed_run_left_unfinished_is_left_out(folder: Path):
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "ppo", "step": 1, "sco')
    assert report(folder).sections() >= {"stage-1", "stage-2"}


def test_warnings_are_shown_as_text(folder: Path):
    (folder / "warnings.json").write_text(json.dumps(["KL is <b>high</b>", 3]), encoding="utf-8")
    page = report(folder)
    assert "warnings" in page.sections()
    assert "KL is <b>high</b>" in page.text
    (folder / "warnings.json").write_text("{", encoding="utf-8")
    assert "warnings" not in report(folder).sections()
