"""The page of a run: complete, deterministic, self-contained, and safe to open whatever the model has written."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import evaluate, learner
from agents.report import charts, read, write_report
from agents.report.document import style_sheet
from agents.report.series import REACH, SMOOTH_FROM, running_mean

HOSTILE = (
    "<script>alert(1)</script> & \"quoted\" 'x' </style><img src=http://evil.example/a onerror=alert(1)> "
    "</title></svg></pre><!-- ]]> {{7*7}} &lt;b&gt; javascript:alert(1) ' onload='alert(1) \u2028\u2029 "
    "\x00\x1b\u202e\ud800"
)
CONFIG = {
    "format": read.OLDEST_FORMAT,
    "command": "lmgym run",
    "task": "sentiment",
    "model": "tiny",
    "seed": 7,
    "options": {"ppo": {"config": {"lam": 0.95}}},
}
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
    write(tmp_path, "config.json", CONFIG)
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
        ("../shared/data/x.jsonl", "../shared/data/model/", "x.jsonl · model · PPO"),
        (None, "C:\\models\\tiny", "tiny · PPO"),
        (None, None, "unknown task · PPO"),
    ],
)
def test_the_title_has_base_names(folder: Path, task: str | None, model: str | None, title: str):
    write(folder, "config.json", {"format": 2, "task": task, "model": model})
    page = report(folder)
    assert f"<h1>{title}</h1>" in page.source
    assert f"<code>{task or 'null'}</code>" in page.source  # the whole of it among the settings


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("grpo", "GRPO"),
        ("online_dpo", "Online DPO"),
        ("mine/best_ever.py", "Best ever"),
        ("my.package.quick", "QUICK"),
        (None, "PPO"),
        ({"no": "text"}, "PPO"),
    ],
)
def test_the_title_and_the_header_name_the_algorithm(folder: Path, algorithm: Any, name: str):
    about = {"task": "sort", "model": "tiny", "seed": 3}
    write(folder, "config.json", {"format": 2, **about, "options": {"algorithm": algorithm}})
    source = report(folder).source
    assert f"<title>sort · tiny · {name} · seed 3</title>" in source
    assert f"<h1>sort · tiny · {name}</h1>" in source
    assert f"<b>algorithm</b> {name}</span>" in source


def test_without_a_training_stage_no_algorithm_is_named(folder: Path):
    write(folder, "metrics.jsonl", {"stage": "sample train", "step": 0, "tokens/mean": 12.5})
    assert "<h1>sentiment · tiny</h1>" in report(folder).source
    assert "<b>algorithm</b>" not in report(folder).source


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


@pytest.mark.parametrize("value", [0.0, None])
def test_values_are_not_offered_without_a_critic(folder: Path, value: float | None):
    tokens = [token("a", value=value), token("b", value=value)]
    write(folder, "samples.jsonl", sample("before", "Once", *tokens), sample("after", "Once", *tokens))
    page = report(folder)
    assert [a["id"] for a in page.all("input")] == ["by-reward", "by-kl", "by-advantage"]
    assert all("value" not in a["title"] for a in page.all("span", "t") if "title" in a)
    assert "GAE without a critic" in page.text
    assert "the critic's estimate" not in page.text


@pytest.mark.parametrize("why", ["no variance explained", "critic none", "critic", "critic head"])
def test_curves_of_a_critic_are_hidden_without_one(folder: Path, why: str):
    explained = 0.5 if why == "critic" else 0.0 if why == "no variance explained" else None
    values = {"value/loss": 0.25} | ({} if explained is None else {"value/explained_variance": explained})
    write(folder, "metrics.jsonl", *(row | values for row in ppo_rows()))
    critic = {"critic": why.partition(" ")[2]} if why in ("critic none", "critic head") else {}
    write(folder, "config.json", CONFIG | {"options": {"algorithm": "ppo", "options": {"ppo": critic}}})
    panels = [a["aria-label"].partition(".")[0] for a in report(folder).all("svg")]
    assert ("value/loss" in panels) == (why in ("critic", "critic head"))
    assert ("Explained variance of the value" in panels) == (why == "critic")
    assert "Score" in panels


def test_each_colour_mode_is_explained_in_a_sentence(folder: Path):
    page = report(folder)
    for name, sentence in {
        "reward": "what the environment pays for this token",
        "kl": "A token that costs KL is not a bad token",
        "value": "It judges the state, not the token",
        "advantage": "how much better the rewards from this token on were than the critic expected",
    }.items():
        assert page.all("p", f"about about-{name}")
        assert sentence in page.text
        assert f".about-{name}{{display:block}}" in page.source
    assert ":has(#by-kl:checked) .about-reward{display:none}" in page.source


def test_token_details_need_neither_a_pointer_nor_a_script(folder: Path):
    page = report(folder)
    tokens = [a for a in page.all("span", "t") if "title" in a]
    assert len(tokens) == 3
    # A tap or a click gives the focus, which shows the title; Tab goes to the tables, not through all tokens.
    assert {a["tabindex"] for a in tokens} == {"-1"}
    assert re.search(r"\.completion \.t:focus::after \{ content: attr\(title\); position: fixed", page.source)
    completions = page.source.split('class="completion"')[1:]
    assert ["Numbers of each token</summary>" in text for text in completions] == [True, True]
    assert re.search(r'<th scope="row" class="text"> more</th><td>−2</td><td>\+0.5</td>', completions[1])


def test_rounding_of_a_quantity_is_shown_as_0(folder: Path):
    write(folder, "samples.jsonl", sample("after", "p", token("x", reward=-2.4e-8, kl=1e-9, value=1e-4)))
    title = next(a["title"] for a in report(folder).all("span", "t") if "title" in a)
    assert title.splitlines()[1:4] == ["reward 0", "kl 0", "value +0.0001"]


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


@pytest.mark.parametrize("where", ["prompt", "token", "config", "stage", "metric", "definition", "comparison"])
def test_hostile_text_stays_text(folder: Path, where: str):
    if where == "config":
        write(
            folder,
            "config.json",
            {
                "format": 2,
                "task": HOSTILE,
                "model": HOSTILE,
                "seed": HOSTILE,
                "command": HOSTILE,
                HOSTILE: HOSTILE,
                "hardware": HOSTILE,
                "revision": HOSTILE,
            },
        )
    elif where == "comparison":
        text = HOSTILE.replace("\ud800", "")  # the reader of comparisons refuses half a character
        row = {"prompt": text, "chosen": text, "rejected": "x"}
        for name in ("preferences_test.jsonl", "preferences_noise_free.jsonl"):
            write(folder, name, row)
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
    assert "⟨U+0000⟩⟨U+001B⟩⟨U+202E⟩" + ("" if where == "comparison" else "⟨U+D800⟩") in page.text


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


def test_the_style_sheet_is_a_file_of_the_package(folder: Path):
    sheet = (Path(charts.__file__).parent / "style.css").read_text(encoding="utf-8")
    assert style_sheet() == sheet
    assert sheet in report(folder).source
    assert "</" not in sheet
    assert sheet.count("{") == sheet.count("}")


def test_charts_and_page_follow_the_readers_light_or_dark_mode(folder: Path):
    rows = [row | {"gold/mean": 0.3, "score/a": 1, "score/b": 2, "score/c": 3, "score/d": 4} for row in ppo_rows(9)]
    write(folder, "metrics.jsonl", *rows)
    source = report(folder).source
    assert '<meta name="color-scheme" content="light dark">' in source
    light, dark = style_sheet().split("@media screen and (prefers-color-scheme: dark)")
    for name, value in charts.COLOURS.items():
        assert f"{name}: {value};" in light
        assert re.search(rf"{name}: #[0-9a-f]{{6}};", dark)
    assert len(set(charts.COLOURS.values())) == len(charts.COLOURS)
    body = source.partition("<body>")[2]
    assert not re.search(r"(fill|stroke|color|background|solid|dashed|dotted): ?#", body)  # no colour of one mode alone
    used = set(re.findall(r"var\((--[a-z]+-?\d?)\)", body))
    assert used == set(charts.COLOURS)


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


@pytest.mark.parametrize("lead", [0, 3])
def test_the_smooth_line_starts_where_the_data_start(lead: int):
    """Also where the first values are not finite: it must not reach back to where nothing was measured."""
    steps = np.arange(60.0) + 5
    values = np.random.default_rng(0).normal(size=60) + 10 / (1 + np.arange(60))
    values[:lead] = np.nan
    mean = running_mean(np.column_stack([steps, values]))
    assert mean[0].tolist() == [steps[lead], values[lead]]
    assert mean[1].tolist() == pytest.approx([steps[lead + 1], values[lead : lead + 3].mean()])
    assert len(mean) == 60 - lead
    whole = values[lead:]
    for at in range(REACH, len(whole)):  # centred, and cut off at the end
        assert mean[at, 1] == pytest.approx(whole[at - REACH : at + REACH + 1].mean())


def test_the_smooth_line_passes_over_gaps_and_ends_with_the_data():
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0, np.nan, np.nan])
    mean = running_mean(np.column_stack([np.arange(7.0), values]))
    assert mean[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert mean[:, 1].tolist() == pytest.approx([1, 1.5, 3, 11 / 3, 4.5])
    nothing = np.full((3, 2), np.nan)
    assert running_mean(nothing) is nothing


def test_both_lines_of_a_chart_start_at_one_point(folder: Path):
    rows = [{"stage": "sft", "step": i, "loss/train": 5.0 - i % 7 - 0.01 * i} for i in range(SMOOTH_FROM)]
    write(folder, "metrics.jsonl", *rows)
    svg = report(folder).source.partition("<svg")[2].partition("</svg>")[0]
    starts = re.findall(r'<path d="M (\S+) (\S+)[^"]*"[^>]*style="[^"]*var\(--series-1\)', svg)
    assert len(starts) == 2
    assert starts[0] == starts[1]


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


@pytest.mark.parametrize("found", [None, 1, "2", True])
def test_the_run_of_an_older_version_is_refused_in_one_sentence(folder: Path, found: Any):
    config: dict[str, Any] = {name: value for name, value in CONFIG.items() if name != "format"}
    write(folder, "config.json", config | ({} if found is None else {"format": found}))
    with pytest.raises(
        ValueError, match=r"an older version of lmgym wrote this run; make its report with that version$"
    ):
        write_report(folder)
    write(folder, "config.json", config | {"revision": "abc\n"})
    with pytest.raises(ValueError, match=r"with that version \(revision 'abc\\n'\)$"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_run_of_a_newer_version_is_shown(folder: Path):
    write(folder, "config.json", CONFIG | {"format": 3})
    assert "stage-1" in report(folder).sections()


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


def test_comparisons_show_who_was_wrong(folder: Path):
    asked = {"prompt": "Once", "ranking": [" a", " b", " c", " d"]}  # b ties with another; c is better than a
    pair = {"prompt": "Then", "chosen": " good", "rejected": " bad"}
    unknown = {"prompt": "Once", "chosen": " e", "rejected": " f"}  # a tie: nobody knows
    write(folder, "preferences_test.jsonl", asked, pair, unknown)
    write(folder, "preferences_noise_free.jsonl", {"prompt": "Once", "ranking": [" c", " a", " d"]}, pair)
    write(folder, "preferences.jsonl", {"prompt": "of the training", "chosen": " x", "rejected": " y"})
    page = report(folder)
    assert "preferences" in page.sections()
    assert "The annotators ordered 1 of 4 pairs of held-out completions wrongly (25.0 %)" in page.text
    assert "3 of 3 held-out comparisons" in page.text
    assert "of the training" not in page.text
    section = page.source.partition('id="preferences"')[2].partition("</section>")[0]
    assert section.count("<details>") == 1  # folded
    cells = re.findall(r"<tr><td>(.*?)</td>(?:<td>(.*?)</td>)?<td [^>]*>(.*?)</td></tr>", section)
    assert cells[:4] == [("1", "<b>2</b>", " a"), ("2", "tie", " b"), ("3", "<b>1</b>", " c"), ("4", "3", " d")]
    assert cells[4:6] == [("chosen", "1", " good"), ("rejected", "2", " bad")]
    assert cells[6:] == [("chosen", "", " e"), ("rejected", "", " f")]
    assert "1 of 3 pairs wrong" in section
    assert "no pair wrong" in section


def test_at_most_a_dozen_comparisons_are_shown(folder: Path):
    rows = [{"prompt": f"prompt {i}", "chosen": " good", "rejected": " bad"} for i in range(15)]
    write(folder, "preferences.jsonl", *rows)
    (folder / "preferences_test.jsonl").touch()
    page = report(folder)
    assert "12 of 15 comparisons" in page.text
    assert page.text.count("Comparison ") == 12
    assert "wrong" not in page.text.partition("12 of 15 comparisons")[2].partition("Settings")[0]


def test_malformed_comparisons_are_named_with_their_line(folder: Path):
    write(folder, "preferences.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"})
    with pytest.raises(ValueError, match=r"preferences\.jsonl, line 2: a comparison needs"):
        write_report(folder)


def test_warnings_are_shown_as_text(folder: Path):
    (folder / "warnings.json").write_text(json.dumps(["KL is <b>high</b>", 3]), encoding="utf-8")
    page = report(folder)
    assert "warnings" in page.sections()
    assert "KL is <b>high</b>" in page.text
    (folder / "warnings.json").write_text("{", encoding="utf-8")
    assert "warnings" not in report(folder).sections()
