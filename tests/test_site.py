"""The site builds without a network, without a warning, and asks no other server for anything."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    # Sockets fail: a build that asks the network for anything fails too.
    (folder / "sitecustomize.py").write_text("import socket\ndel socket.socket.connect\n")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder / "out")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "out"


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


@pytest.mark.slow
def test_a_broken_link_fails_the_build(tmp_path: Path, site: Path) -> None:
    for name in ("mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "lmgym", "agents", "examples", "tests", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "glossary.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](lessons/lesson_99.md)\n")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "lesson_99.md" in run.stdout + run.stderr
