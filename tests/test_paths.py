"""A name stays inside its folder, whatever it is."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.runs.paths import confined


@pytest.mark.parametrize(
    "name", ["a", "a.jsonl", "a/b/c", "..a", "a..", "a/..b", ".hidden", "é 漢", "a b", "-rf", "~", "$HOME"]
)
def test_names_inside(tmp_path: Path, name: str) -> None:
    assert confined(tmp_path, name) == tmp_path / name
    assert not list(tmp_path.iterdir()), "nothing is made"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is empty"), (" ", "is empty"), ("\n", "is empty"), ("a\0b", "NUL"), ("/etc/passwd", "is absolute"),
        ("//host/share", "is absolute"), ("C:\\x", "is absolute"), ("C:x", "is absolute"), ("\\x", "is absolute"),
        ("..", "goes up"), ("../x", "goes up"), ("a/../../x", "goes up"), ("a/..", "goes up"), ("a\\..\\x", "goes up"),
        (".", "the folder itself"), ("./", "the folder itself"), ("./.", "the folder itself"),
        ("\ud800", "half a character"),
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}.*stays inside"):
        confined(tmp_path, name)


def test_symbolic_links(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "inner").mkdir()
    (folder / "out").symlink_to(outside)
    (folder / "file").symlink_to(outside / "not there yet")
    (folder / "inside").symlink_to(folder / "inner")
    (folder / "circle").symlink_to(folder / "circle")
    for name in ("out", "out/x", "out/x/y", "file", "out/deep/er"):
        with pytest.raises(ValueError, match="symbolic link"):
            confined(folder, name)
    assert confined(folder, "inside/x") == folder / "inside" / "x"
    with pytest.raises(ValueError, match="is not a path inside"):
        confined(folder, "circle/x")
    link = tmp_path / "link to the folder"
    link.symlink_to(folder)
    assert confined(link, "x") == link / "x", "the folder itself may be reached by a link"


PARTS = st.sampled_from(["..", ".", "/", "\\", "a", "", " ", "\0", "C:", "~", "out", "\ud800", "é"]) | st.text(
    max_size=3
)


@given(st.lists(PARTS, max_size=6).flatmap(lambda parts: st.sampled_from(["/", "", "\\"]).map(lambda s: s.join(parts))))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_stays_inside_or_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    if not (folder / "out").is_symlink():
        (folder / "out").symlink_to(tmp_path)
    try:
        path = confined(folder, name)
    except ValueError:
        return
    assert path.resolve().is_relative_to(folder.resolve())
    assert path.resolve() != folder.resolve()
