"""The folder in which compiled steps are kept; only its owner may write to it.

Its files are unpickled and run. So a missing folder is made for its owner alone, whatever the umask
is; and a folder that others may write to, rename or replace is not used.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path

_told: set[str] = set()
"""Folders for which a warning has said that they are not used."""


def cache_folder() -> Path:
    """Return the folder in which compiled steps are kept: that of Numba, if the user set one."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen, "optimisers")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "optimisers")


def written(text: str, name: str) -> str | None:
    """Write the loop of a step to its file, unless it is there; None if that is not allowed.

    Warns
    -----
    RuntimeWarning
        Once, if others may write to the folder.
    """
    try:
        folder = cache_folder()
        _make(folder)
        if (why := _danger(folder)) is not None:
            _tell(folder, why)
            return None
        file = folder / f"step_{name}.py"
        if not file.exists():
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as writing:
                writing.write(text)
            os.replace(writing.name, file)  # the file appears whole, also if others write it
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return str(file)


def is_safe(folder: str) -> bool:
    """Tell whether a folder in which Numba keeps code may be used; a new one is made private."""
    if os.name == "nt":
        return True
    there = Path(folder)
    if there.stat().st_mode & 0o022 and not any(there.iterdir()):
        there.chmod(0o700)
        if any(there.iterdir()):  # another process was first
            return False
    return _danger(there) is None


def close_to_others(folder: str) -> None:
    """Take from others the right to write to the files in a folder, which Numba has made."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
            if mode & 0o022 and entry.is_file(follow_symlinks=False):
                os.chmod(entry.path, mode & ~0o022)


def _make(folder: Path) -> None:
    """Make a folder and those above it; each that is new, for its owner alone."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    for above in reversed(missing):
        above.mkdir(0o700, exist_ok=True)


def _danger(folder: Path) -> str | None:
    """Return why others may change files in a folder; None if only its owner and root may."""
    if os.name == "nt":  # folders of users are private there
        return None
    folder = folder.absolute()
    # A link is safe if the folder that holds it is, and so is where it leads to.
    for at in dict.fromkeys((folder, *folder.parents, *folder.resolve().parents)):
        info = at.stat()
        if info.st_uid not in (os.geteuid(), 0):
            return f"{at} belongs to another user"
        if info.st_mode & 0o022 and (at == folder or _may_be_changed(info)):
            return f"others may write to {at}"
    return None


def _may_be_changed(info: os.stat_result) -> bool:
    """Tell whether others can replace a folder below this one, which they may write to."""
    if info.st_mode & stat.S_ISVTX:
        return False
    return bool(info.st_mode & 0o002) or not _is_private(info)


def _is_private(info: os.stat_result) -> bool:
    """Tell whether a folder's group has one member: its owner, as many systems set up users."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(info.st_gid), pwd.getpwuid(info.st_uid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and not {*group.gr_mem} - {user.pw_name}


def _tell(folder: Path, why: str) -> None:
    if str(folder) in _told:
        return
    _told.add(str(folder))
    warnings.warn(
        f"compiled steps are not kept in {folder}: {why}, and what lies there is run. Let only "
        "its owner write there (chmod go-w), or name another folder in NUMBA_CACHE_DIR",
        RuntimeWarning,
        stacklevel=8,  # the caller of `update`
    )
