"""Untrusted names as paths that stay inside a folder."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath


def confined(folder: Path, name: str) -> Path:
    """The path of a name inside a folder; a name that leads out of it ("..", a root, a symbolic link) is refused.

    Neither the folder nor the path has to exist. Later changes of the folder are not noticed: this protects against
    names, not against another process that writes to the folder.

    Args:
        folder: the path stays inside it.
        name: the name of a file, or several names with "/" between them.

    Raises:
        ValueError: the name is empty or leads outside; the message says how.
    """
    problem = _problem(name)
    if problem:
        raise ValueError(
            f"the name {name!r} {problem}: give one that stays inside {str(folder)!r}, such as 'samples.jsonl'"
        )
    path = folder / name
    try:
        # Parts that do not exist yet are joined as they are.
        outside = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # circular links, names that are too long for the system
        raise ValueError(f"the name {name!r} is not a path inside {str(folder)!r} ({error}): give another") from error
    if outside:
        raise ValueError(
            f"the name {name!r} leads out of {str(folder)!r}, by a symbolic link to {str(path.resolve())!r}: remove "
            "the link, or give another name"
        )
    return path


def _problem(name: str) -> str | None:
    """Why a name is refused whatever the folder holds, by the rules of POSIX and Windows; None: it is not."""
    if not name or not name.strip():
        return "is empty"
    if "\0" in name:
        return "holds a NUL character"
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).root or PureWindowsPath(name).drive:
        return "is absolute"
    if ".." in parts:
        return "goes up with '..'"
    if os.path.normpath(name) == ".":
        return "is the folder itself"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate (half a character)"
    return None
