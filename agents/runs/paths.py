"""Names that come from elsewhere, as paths that stay inside a folder."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath


def confined(folder: Path, name: str) -> Path:
    """The path of a name below a folder, which nothing can lead out of it: no "..", no root, no symbolic link.

    Neither has to be there yet. What somebody changes in the folder afterwards is not seen: it keeps out names that
    lead elsewhere, not a second writer.

    Args:
        folder: where the name has to stay.
        name: a file's name, or several with "/" between.

    Raises:
        ValueError: the name is empty or leads outside; it says how.
    """
    wrong = _wrong(name)
    if wrong:
        raise ValueError(
            f"the name {name!r} {wrong}: give one that stays inside {str(folder)!r}, such as 'samples.jsonl'"
        )
    path = folder / name
    try:
        # strict=False: what is not there yet is joined as it is.
        outside = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # links that lead round in a circle, names longer than the system's
        raise ValueError(f"the name {name!r} leads nowhere below {str(folder)!r} ({error}): give another") from error
    if outside:
        raise ValueError(
            f"the name {name!r} leads out of {str(folder)!r}, by a symbolic link to {str(path.resolve())!r}: remove "
            "the link, or give another name"
        )
    return path


def _wrong(name: str) -> str | None:
    """What is wrong with a name whatever the folder holds, by the rules of every system."""
    if not name or not name.strip():
        return "is empty"
    if "\0" in name:
        return "holds a NUL"
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).root or PureWindowsPath(name).drive:
        return "is absolute"
    if ".." in parts:
        return "goes up by '..'"
    if os.path.normpath(name) == ".":
        return "is the folder itself"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    return None
