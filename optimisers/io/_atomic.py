"""Files that are there whole or not at all, whatever happens to who writes them.

A file is written under another name beside its target, forced to the disk, and then given the
name of the target in one step. A writer that is killed leaves its temporary file behind; the next
one sweeps it. Whether a writer lives is told by a lock that the system drops with the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that someone writes cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.part", re.DOTALL)
_BINARY = getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Give a file to write into, which takes the place of `path` when all is written.

    Raises
    ------
    OSError
        If it cannot be written, of the class that says why. What was at `path` is as it was.
    """
    path = os.path.realpath(path)  # a link stays, and what it leads to is replaced
    folder, name = os.path.split(path)
    try:
        _refuse_special(path)
        sweep(folder, name)
        temporary, number = _created(folder, name)
        try:
            with os.fdopen(number, "wb") as file:
                yield file
                file.flush()
                _keep_mode(path, number)
                os.fsync(number)
                if fcntl is None:  # where a file must be closed to be renamed
                    file.close()
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise _explained(error, path, folder) from error
    _sync_folder(folder, path)


def _refuse_special(path: str) -> None:
    """Refuse to put a file where a device or a pipe is, which a rename would remove."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EEXIST, "what is there is no regular file")


def _explained(error: OSError, path: str, folder: str) -> OSError:
    if not os.path.isdir(folder):
        why, way_out = f"there is no folder {folder}", "make it first"
    elif error.errno == errno.EEXIST:
        why, way_out = error.strerror or str(error), "choose another path"
    else:
        why = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = "make room" if full else f"see that files can be written in {folder}"
    text = f"cannot save: {why}; {way_out}. What was saved there before, if anything, is as it was"
    return OSError(error.errno, text, path)


def _created(folder: str, name: str) -> tuple[str, int]:
    """Make a temporary file that belongs to us, and return its name and number."""
    while True:
        temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.part")
        number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        if fcntl is None:
            return temporary, number
        with contextlib.suppress(OSError):  # there are file systems without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(number), os.stat(temporary)):
                return temporary, number
        except FileNotFoundError:
            pass
        os.close(number)  # someone swept it between the two lines above


def _keep_mode(path: str, number: int) -> None:
    if hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):
            os.fchmod(number, os.stat(path).st_mode & 0o777)


def _sync_folder(folder: str, path: str) -> None:
    """Force to the disk which names a folder has, where the system can do that."""
    if os.name == "nt":
        return
    try:
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            text = (
                f"saved, but not forced to the disk: {error.strerror}; if the machine stops before "
                "the system does that by itself, what was saved there before may come back"
            )
            raise OSError(error.errno, text, path) from error


def sweep(folder: str, target: str | re.Pattern[str]) -> None:
    """Remove what writers of these files left in `folder` when they died."""
    for entry in os.scandir(folder):
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None:
            continue
        name = found["target"]
        if name == target if isinstance(target, str) else target.fullmatch(name):
            with contextlib.suppress(OSError):
                _remove_if_left(entry.path)


def _remove_if_left(path: str) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    number = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while the writer lives
        os.unlink(path)
    finally:
        os.close(number)
