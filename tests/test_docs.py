"""The pages in docs/algorithms say what the code says: quoted lines, options, settings, metrics and links.

A page that quotes a line, a default or a metric goes out of date silently; here it does so loudly.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agents import cli, pipeline
from agents.pipeline import load_algorithm as catalog
from agents.tools import make_pipeline_page as pipeline_page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "algorithms"
NAMES = (*catalog.BUILT_IN, "sft", "reward_modelling")
PAGES = {name: (FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in NAMES}
INDEX = (FOLDER / "README.md").read_text(encoding="utf-8")
OPTIONS = {"sft": pipeline.SFTOptions, "reward_modelling": pipeline.RewardOptions}
"""The options of the stages that are no RL algorithms."""
LOGGED = {"gold/mean"}
"""Metrics that a run logs beside the algorithm's own."""


def section(page: str, title: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found, f"no section {title!r}"
    return found[1]


def quotes(page: str) -> list[tuple[str, str]]:
    """Each quoted block, and the file named last before it."""
    found, file = [], ""
    pattern = r"^`(agents/\w+\.py)`|^```python no-run\n(.*?)^```$"
    for match in re.finditer(pattern, section(page, "The lines that are the equation"), re.M | re.S):
        if match[1]:
            file = match[1]
        else:
            found.append((file, match[2]))
    return found


def stands_in(block: str, source: str) -> bool:
    """Whether the block's lines stand one below the other in the source, at any depth."""
    lines, wanted = source.splitlines(), block.splitlines()
    starts = (i for i, line in enumerate(lines) if line.strip() == wanted[0].strip())
    return any(textwrap.dedent("\n".join(lines[i : i + len(wanted)])) == block.rstrip("\n") for i in starts)


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"agents.{name}")


def test_every_algorithm_has_a_page_and_a_row_in_the_index() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {*NAMES, "README"}
    for name in NAMES:
        rows = re.findall(rf"^\| \[[^]]+\]\({name}\.md\) .*\| `agents/{name}\.py` \|$", INDEX, re.M)
        assert len(rows) == 1, f"{name} has {len(rows)} rows in the index"
    assert re.search(r"<!-- table:begin -->\n(.*\n)*<!-- table:end -->", INDEX)


def test_the_comparison_sees_a_line_that_was_changed() -> None:
    source = (ROOT / "agents" / "functional.py").read_text(encoding="utf-8")
    _, block = quotes(PAGES["a2c"])[0]
    assert stands_in(block, source)
    assert not stands_in(block.replace("gamma * lam", "gamma"), source)
    assert not stands_in(block.replace("    running", "running"), source), "depth counts"
    assert not stands_in(block + "\n" + block, source), "one below the other"


@pytest.mark.parametrize("name", NAMES)
def test_quoted_lines_stand_in_the_source(name: str) -> None:
    found = quotes(PAGES[name])
    assert any(file == f"agents/{name}.py" for file, _ in found), "a page quotes its algorithm's own file"
    for file, block in found:
        assert stands_in(block, (ROOT / file).read_text(encoding="utf-8")), f"not in {file}:\n{block}"


def function_around(block: str, source: str) -> list[str]:
    """The functions, the outermost first, in which the lines of a block are."""
    lines, wanted = source.splitlines(), block.splitlines()
    (start, *_) = [
        i + 1
        for i, line in enumerate(lines)
        if line.strip() == wanted[0].strip()
        and textwrap.dedent("\n".join(lines[i : i + len(wanted)])) == block.rstrip("\n")
    ]
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [node.name for node in found if node.lineno <= start <= (node.end_lineno or 0)]


@pytest.mark.parametrize("name", NAMES)
def test_each_quoted_fragment_says_which_function_it_is_from(name: str) -> None:
    lines = section(PAGES[name], "The lines that are the equation")
    before = re.split(r"^```python no-run\n.*?^```$", lines, flags=re.M | re.S)[:-1]
    for text, (file, block) in zip(before, quotes(PAGES[name]), strict=True):
        said = re.findall(r"\b[Ii]n\s`(\w+)`(?: inside `(\w+)`)?", text.strip().split("\n\n")[-1])
        assert said, f"no function is named before\n{block}"
        functions = function_around(block, (ROOT / file).read_text(encoding="utf-8"))
        assert [f for f in reversed(said[-1]) if f] == functions[-2:], block


@pytest.mark.parametrize("name", NAMES)
def test_pages_and_lessons_link_to_one_another(name: str) -> None:
    (lesson,) = re.findall(r"^\[Lesson \d+, .*?\]\(\.\./lessons/(lesson_\d\d\.md)\)", PAGES[name], re.M)
    assert f"(../algorithms/{name}.md)" in (ROOT / "docs" / "lessons" / lesson).read_text(encoding="utf-8")


def test_the_map_says_what_each_algorithm_needs() -> None:
    made = runpy.run_path(str(FOLDER / "make_map.py"))
    assert (FOLDER / "map.svg").read_text(encoding="utf-8") == made["drawing"](), "python docs/algorithms/make_map.py"
    assert "](map.svg)" in INDEX
    boxes = made["BOXES"]
    assert set(boxes) == set(NAMES)
    for name, (_, _, _, needs) in boxes.items():
        module = module_of(name)
        source = inspect.getsource(module)
        extra = catalog.extra_arguments(module) if name in catalog.BUILT_IN else {}
        needed = {
            "C": "require.critic(" in source,
            "G": "group" in {f.name for f in fields(module.Config)} or "require.pairs(" in source,
            "P": extra.get("comparisons") is False or name == "reward_modelling",
            "T": extra.get("teacher") is False,
            "D": name == "sft",
            "R": bool(re.search(r"require\.kl\(|env\.reference", source)),
            "S": "collect(" in source and name != "distill",
        }
        assert set(needs) == {letter for letter, wanted in needed.items() if wanted}, name
    linked = {end for pair in made["ARROWS"] for end in pair[:2]}
    assert linked == set(NAMES), "every algorithm is linked to another one"


def test_the_spelling_is_checked_and_right(tmp_path: Path) -> None:
    if importlib.util.find_spec("codespell_lib") is None:
        pytest.skip("the spelling is checked with codespell: pip install codespell")
    command = [sys.executable, "-m", "codespell_lib"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    page = tmp_path / "page.md"
    page.write_text("The behavior is teh same.\n")
    run = subprocess.run(
        [*command, "--toml", str(ROOT / "pyproject.toml"), str(page)], cwd=ROOT, capture_output=True, text=True
    )
    assert [line.split(": ")[1] for line in run.stdout.splitlines()] == ["behavior ==> behaviour", "teh ==> the"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_exist_and_have_these_defaults(name: str) -> None:
    module = module_of(name)
    kinds: list[Any] = [OPTIONS[name]] if name in OPTIONS else [module.Config, pipeline.RLOptions]
    known = {f.name: f for kind in reversed(kinds) for f in fields(kind)}
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section(PAGES[name], "Settings that matter"), re.M)
    assert len(rows) >= 3
    for field, default in rows:
        assert field in known, f"{name} has no setting {field!r}"
        value = getattr(module, "DEFAULTS", {}).get(field, known[field].default)
        assert value is not MISSING
        assert ast.literal_eval(default) == value, field


@pytest.mark.parametrize("name", NAMES)
def test_metrics_to_watch_are_measured(name: str) -> None:
    watched = re.findall(r"`([a-z_]+(?:/[a-z_\d{}]+)+)`", section(PAGES[name], "What to watch"))
    assert len(watched) >= 2
    for metric in watched:
        assert metric in module_of(name).METRICS or metric in LOGGED, f"{name} does not measure {metric!r}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's own parser reads them; what comes after it is cut off."""

    class Understood(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Understood

    for seam in ("train.setting_of", "sft.setting_of", "reward.comparisons_in"):
        monkeypatch.setattr(f"agents.cli.{seam}", stop)
    (block,) = re.findall(r"^```sh\n(.*?)^```$", section(PAGES[name], "How to run it"), re.M | re.S)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert name in OPTIONS or any(f"--algorithm {name}" in " ".join(command) for command in commands)
    for program, *arguments in commands:
        assert program == "lmgym"
        with pytest.raises(Understood):
            cli.main(arguments)


@pytest.mark.parametrize("name", [*NAMES, "README"])
def test_links_and_pictures(name: str) -> None:
    page = INDEX if name == "README" else PAGES[name]
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
        if not target.startswith("curves/"):  # the benchmark draws those
            assert (FOLDER / target).is_file(), target
    if name not in ("README", "reward_modelling"):
        pictures = re.findall(r"!\[[^]]{20,}\]\((.+)\)\n\n(<!-- measured:begin -->)$", page, re.M)
        assert [picture for picture, _ in pictures] == [f"curves/{name}.svg"]


@pytest.mark.parametrize("name", [*NAMES, "README"])
def test_github_renders_the_mathematics(name: str) -> None:
    """Markdown eats a backslash before punctuation, and takes a leading sign for a list."""
    page = INDEX if name == "README" else PAGES[name]
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page, flags=re.M | re.S)
    equations = re.findall(r"\$\$(.*?)\$\$", prose, re.S)
    assert equations or name == "README"
    for formula in [*equations, *re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", prose)]:
        assert not re.search(r"\\[^a-zA-Z]|<|^[-+*=] ", formula, re.M), formula
        assert formula.count("{") == formula.count("}"), formula


def test_the_script_of_grpo_compiles() -> None:
    (script,) = re.findall(r"<details>.*?```python no-run\n(.*?)^```$", PAGES["grpo"], re.M | re.S)
    compile(script, "docs/algorithms/grpo.md", "exec")


def test_the_example_of_an_algorithm_of_your_own_is_short_and_needs_lmgym_alone() -> None:
    tree = ast.parse((ROOT / "examples" / "02_your_own_algorithm.py").read_text(encoding="utf-8"))
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert (main.end_lineno or 0) - main.lineno < 40
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("agents" in line for line in imports)
    assert "lmgym" in inspect.cleandoc(ast.get_docstring(tree) or "")


# The page of the pipeline ------------------------------------------------------------------------------------------


def test_the_page_of_the_pipeline_is_written_from_its_run() -> None:
    facts = json.loads((ROOT / "docs" / "pipeline.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert page == pipeline_page.page_text(facts)
    assert (ROOT / "docs" / "pipeline.svg").read_text(encoding="utf-8") == pipeline_page.picture(facts)
    assert "dirty" not in facts["about"]["revision"]
    assert facts["about"]["command"] in page
    longer = {**facts, "seconds": {**facts["seconds"], "RL": 4321.0}}
    assert "4321" in pipeline_page.page_text(longer)
    assert "4321 s" in pipeline_page.picture(longer)


def test_the_page_of_the_pipeline_needs_a_finished_run_of_all_stages(tmp_path: Path) -> None:
    """Times are those between the ends of stages."""
    names = [name for names in pipeline_page.STAGES.values() for name in names]
    rows = [{"stage": name, "step": 0, "seconds": float(second**2)} for second, name in enumerate(names, 1)]
    assert pipeline_page.stage_seconds(rows) == {"sft": 1.0, "preferences": 8.0, "reward model": 16.0, "RL": 11.0}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"has no evaluation.json: let the run finish"):
        pipeline_page.facts_of(tmp_path)
    metrics.write_text("\n".join(map(json.dumps, rows[1:])))
    with pytest.raises(ValueError, match=r"has no stage 'sft': give the folder of a finished `lmgym train Sentiment`"):
        pipeline_page.facts_of(tmp_path)
