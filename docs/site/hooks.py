"""What the site adds to the pages: equations as MathML, source files as pages, the README as the home page, the menu.

mkdocs calls the functions by their names.
"""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"^(```|~~~).*?^\1\s*$|`[^`\n]*`", re.M | re.S)
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\w$\\])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])", re.S)
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".txt": "text", ".jsonl": "json"}

_equations: list[str] = []


def on_config(config: Any) -> Any:
    """Writes the menu: every page is in one of its parts, so that a new page needs no line here."""
    docs = Path(config["docs_dir"])

    def pages(folder: str, first: str = "") -> list[str]:
        found = sorted(str(p.relative_to(docs)) for p in (docs / folder).glob("*.md"))
        return sorted(found, key=lambda page: page != first)

    parts = {
        "algorithms": pages("algorithms", "algorithms/README.md"),
        "how-tos": [p for p in pages(".") if p not in ("glossary.md", "decisions.md", "index.md")],
        "reference": pages("reference"),
    }
    folders = {f.name for f in docs.iterdir() if f.is_dir() and any(f.glob("*.md"))}
    config["nav"] = [
        {name: parts.get(part, part) if isinstance(part, str) else part}
        for entry in config["nav"]
        for name, part in entry.items()
    ] + [{f.capitalize(): pages(f)} for f in sorted(folders - {"lessons", "algorithms", "reference", "site"})]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the README as the home page, and a page for each source file that a page links to."""
    docs = Path(config["docs_dir"])
    _add(files, config, "index.md", (ROOT / "README.md").read_text(encoding="utf-8"))
    waiting = [(f.src_uri, f.content_string) for f in files.documentation_pages()]
    while waiting:
        uri, text = waiting.pop()
        for _, target, *_ in LINK.findall(CODE.sub("", text)):
            path = _outside(_origin(uri, docs / Path(uri).parent), target)
            if path is None or files.get_file_from_path(_uri(path)):
                continue
            source = path.read_text(encoding="utf-8")
            if path.suffix == ".md":
                _add(files, config, _uri(path), source)
                waiting.append((_uri(path), source))
            else:
                fence = f"# {path.relative_to(ROOT)}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{source}\n````\n"
                _add(files, config, _uri(path), fence)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns equations into MathML, and links to source files into links to their pages."""
    folder = Path(config["docs_dir"]) / Path(page.file.src_uri).parent
    depth = "../" * page.file.src_uri.count("/")
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        # Markdown knows one word after the fence: "```python no-run" says more, to the tests.
        kept.append(re.sub(r"^(```\w+) .*", r"\1", match[0]))
        return f"\0{len(kept) - 1}\0"

    def link(match: re.Match[str]) -> str:
        origin = _origin(page.file.src_uri, folder)
        path = _outside(origin, match[2])
        if path is not None:
            return f"{match[1]}{depth}{_uri(path)}{match[4]}"
        inside = (origin / match[2]).resolve()
        if origin != folder and inside.is_file() and ROOT / "docs" in inside.parents:
            return f"{match[1]}{depth}{inside.relative_to(ROOT / 'docs').as_posix()}{match[3] or ''}{match[4]}"
        # A folder is a page on GitHub only.
        return match[1] + "#" + match[4] if inside.is_dir() else match[0]

    def math(match: re.Match[str]) -> str:
        _equations.append(convert(match[1] or match[2], display="block" if match[1] else "inline"))
        return f"xMATHx{len(_equations) - 1}x"

    text = CODE.sub(keep, markdown)
    text = LINK.sub(link, MATH.sub(math, text))
    while "\0" in text:
        text = re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], text)
    return text


def on_page_content(html: str, **_: Any) -> str:
    """Puts the equations where Markdown could not touch them."""
    return re.sub(r"xMATHx(\d+)x", lambda match: _equations[int(match[1])], html)


def _origin(uri: str, folder: Path) -> Path:
    """The folder of the repository from which a page's links lead."""
    if uri == "index.md":
        return ROOT
    return (ROOT / uri.removeprefix("source/")).parent if uri.startswith("source/") else folder


def _outside(folder: Path, target: str) -> Path | None:
    """The file of the repository that a link names, if it is not a page or a picture of the site."""
    if re.match(r"[a-z]+:", target):
        return None
    path = (folder / target).resolve()
    return path if path.is_file() and ROOT in path.parents and ROOT / "docs" not in path.parents else None


def _uri(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name if path.suffix == '.md' else name + '.md'}"


def _add(files: Files, config: Any, uri: str, content: str) -> None:
    files.append(File.generated(config, uri, content=content))
