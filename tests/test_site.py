"""The site builds without a network, without a warning, and asks no other server for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import logging, socket, sys
from mkdocs.commands.build import build
from mkdocs.config import load_config


def refuse(*_):
    raise SystemExit("the build asks the network for something")


socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s")
config = load_config("mkdocs.yml", site_dir=sys.argv[1])


def break_a_link(markdown, page, **_):
    return markdown + "\\n[nowhere](lessons/lesson_99.md)\\n" if page.file.src_uri == "glossary.md" else markdown


config.plugins.events["page_markdown"].append(break_a_link)
config.plugins.on_startup(command="build", dirty=False)
build(config)
"""
"""Builds the site as `mkdocs build` does, with one broken link more."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of the site, and how its build ended: a broken link lets it fail when all pages are written."""
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    return folder, run


@pytest.mark.slow
def test_a_broken_link_fails_the_build_and_is_the_only_warning(
    built: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """So there is no broken link, no other warning, and no request to the network without it."""
    _, run = built
    warnings = [line for line in run.stdout.splitlines() if line.startswith(("WARNING", "ERROR"))]
    assert len(warnings) == 1, run.stdout + run.stderr
    assert "lessons/lesson_99.md" in warnings[0]
    assert (run.returncode, run.stderr) == (1, "")


@pytest.fixture(scope="module")
def site(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The folder of the site."""
    return built[0]


@pytest.mark.slow
def test_pages_ask_no_other_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source|video)[^>]*\ssrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preload|icon|preconnect)\"[^>]*href=\"?([^\"\s>]+)", text)
        assert not [target for target in loaded if re.match(r"(?:https?:)?//", target)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?https?:", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_equations_are_mathml_and_every_lesson_is_there(site: Path) -> None:
    for lesson in range(13):
        page = (site / "lessons" / f"lesson_{lesson:02}.html").read_text(encoding="utf-8")
        assert f"figures/lesson_{lesson:02}.svg" in page
        assert "xMATHx" not in page
        if 1 <= lesson <= 8:
            assert "<math" in page
            assert "$$" not in page
    assert "enumerate_tree" in (site / "reference" / "lmgym_exact.html").read_text(encoding="utf-8")
