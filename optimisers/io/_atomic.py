"""Files that are there whole or not at all, whatever happens to who writes them.

A file is written under another name beside its target, forced to the disk, and then given the
name of the target in one step. A writer that is killed leaves its temporary file behind; the next
one sweeps it. Whether a writer lives is told by a lock that the system drops with the process.

An interrupt can come between any two steps of Python, so files are held by objects that close
themselves, from the call on that opens them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that someone writes cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.part", re.DOTALL)
_LONGEST = 255 - len("..0123456789abcdef.part")
"""Bytes of its target's name that the name of a temporary file has room for."""
_BUFFER = 1 << 18
_BINARY = getattr(os, "O_BINARY", 0)


def opened(path: str, flags: int, mode: int = 0o666) -> io.FileIO:
    """Open a file, as `os.open` does, in one step that no interrupt can divide."""
    way = "rb" if flags & (os.O_WRONLY | os.O_RDWR) == os.O_RDONLY else "rb+"
    return next(map(io.FileIO, map(os.open, [path], [flags | _BINARY], [mode]), [way]))


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Give a file to write into, which takes the place of `path` when all is written.

    Raises
    ------
    OSError
        If it cannot be written, of the class that says why. What was at `path` is as it was.
    """
    given, path = path, os.path.realpath(path)  # a link stays, and what it leads to is replaced
    folder, name = os.path.split(path)
    try:
        _refuse_special(given)
        sweep(folder, name)
        mode = _mode_of(path)
        file, temporary = _created(folder, name, 0o666 if mode is None else mode & 0o666)
        try:
            _keep_mode(path, file.fileno())
            writer = io.BufferedWriter(file, _BUFFER)
            yield writer
            writer.flush()
            _keep_mode(path, file.fileno())
            os.fsync(file.fileno())
            if fcntl is None:  # where a file must be closed to be renamed
                file.close()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            with contextlib.suppress(OSError):
                file.close()
            raise
    except OSError as error:
        raise _explained(error, path, folder) from error
    try:
        file.close()
    except OSError as error:
        text = f"saved, and on the disk; but as the file was closed, the system said {error}"
        raise OSError(error.errno, text, path) from error
    _sync_folder(folder, path)


def _refuse_special(path: str) -> None:
    """Refuse to put a file where a device or a pipe is, which a rename would remove.

    Links on the way are followed by the system, which refuses those that it takes for traps.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EEXIST, "what is there is no regular file")


def _explained(error: OSError, path: str, folder: str) -> OSError:
    if not os.path.isdir(folder):
        shown = folder if folder.isprintable() else repr(folder)
        why, way_out = f"there is no folder {shown}", "make it first"
    elif error.errno == errno.EEXIST:
        why, way_out = error.strerror or str(error), "choose another path"
    else:
        why = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = "make room" if full else f"see that files can be written in {folder}"
    text = f"cannot save: {why}; {way_out}. What was saved there before, if anything, is as it was"
    return OSError(error.errno, text, path)


def _created(folder: str, name: str, mode: int) -> tuple[io.FileIO, str]:
    """Make a temporary file that belongs to us, and return it and its path."""
    stem = _stem(name)
    while True:
        temporary = os.path.join(folder, f".{stem}.{secrets.token_hex(8)}.part")
        file = opened(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        if fcntl is None:
            return file, temporary
        with contextlib.suppress(OSError):  # there are file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                return file, temporary
        except FileNotFoundError:
            pass
        file.close()  # someone swept it between the two lines above


def _stem(name: str) -> str:
    """Return the name of a target as those of its temporary files have it: cut, if very long."""
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:32]
    return f"{encoded[: _LONGEST - 33].decode('utf-8', 'ignore')}~{digest}"


def _mode_of(path: str) -> int | None:
    """Return who may do what with a file, None if there is none."""
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        return None


def _keep_mode(path: str, number: int) -> None:
    """Let nobody read or write a new file who may not read or write the one at `path`."""
    if not hasattr(os, "fchmod"):
        return
    with contextlib.suppress(OSError):
        old = os.stat(path)
        mode = old.st_mode & 0o777
        if old.st_gid != os.fstat(number).st_gid:
            try:
                os.fchown(number, -1, old.st_gid)
            except OSError:  # then its group may do no more than all may
                mode &= 0o707 | (mode & 0o007) << 3
        os.fchmod(number, mode)


def _sync_folder(folder: str, path: str) -> None:
    """Force to the disk which names a folder has, where the system can do that."""
    if os.name == "nt":
        return
    errors: list[OSError] = []

    def sync() -> None:
        number = -1
        try:
            number = os.open(folder, os.O_RDONLY)
            os.fsync(number)
        except OSError as error:
            errors.append(error)
        finally:
            if number >= 0:
                os.close(number)

    # No object closes a folder by itself; but interrupts come to the main thread alone.
    thread = threading.Thread(target=sync, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there can be no more threads as the interpreter ends
        sync()
    else:
        thread.join()
    for error in errors:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            text = (
                f"saved, but not forced to the disk: {error.strerror}; if the machine stops before "
                "the system does that by itself, what was saved there before may come back"
            )
            raise OSError(error.errno, text, path) from error


def sweep(folder: str, target: str | re.Pattern[str]) -> None:
    """Remove what writers of these files left in `folder` when they died."""
    stem = _stem(target) if isinstance(target, str) else None
    for entry in os.scandir(folder):
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None:
            continue
        name = found["target"]
        if name == stem if isinstance(target, str) else target.fullmatch(name):
            with contextlib.suppress(OSError):
                _remove_if_left(entry.path)


def _remove_if_left(path: str) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    with opened(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while the writer lives
        os.unlink(path)
