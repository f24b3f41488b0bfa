"""Files while they are written and read: by threads, children, handlers, and with interrupts."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from saved import assert_equal

from optimisers import Adam, setup, update_
from optimisers.io import Checkpointer, File, _checkpoints, load, save
from optimisers.io import _atomic as atomic
from optimisers.io import _safetensors as form

POSIX = pytest.mark.skipif(os.name != "posix", reason="a matter of POSIX systems")


# --- arrays that change while they are saved -------------------------------------------------


@pytest.mark.parametrize("size", [3, 70_000])
def test_what_changes_while_it_is_saved_can_be_loaded(
    size: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The array moves whenever a checksum was taken."""
    x = np.zeros(size)

    class Moving:
        @staticmethod
        def crc32(data: Any, start: int = 0) -> int:
            check = zlib.crc32(data, start)
            np.add(x, 1, out=x)
            return check

    with monkeypatch.context() as patch:
        patch.setattr(form, "zlib", Moving)
        save(path, {"x": x})
    assert x[0] > 0
    assert load(path)["x"].shape == x.shape


def test_a_run_can_be_saved_while_it_trains(path: Path) -> None:
    x, g = np.zeros(300_000), np.ones(300_000)
    state = setup(Adam(), x)
    done = threading.Event()

    def train() -> None:
        while not done.is_set():
            update_(state, x, g)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(5):
            save(path, state, x)
            load(path)
    finally:
        done.set()
        thread.join()


# --- one file, read by many ------------------------------------------------------------------


def arrays(path: Path) -> File:
    """Return a file of arrays without checksums, each full of its number."""
    xs = [np.full(20_000, float(k)) for k in range(8)]
    save(path, xs)
    return File(path, verify=False)


def are_right(file: File, seed: int, turns: int) -> bool:
    order = [(7 * turn + 3 * seed) % 8 for turn in range(turns)]
    return all((file[f"state.{k}"] == k).all() for k in order)


FORKS = """
import os, sys
from optimisers.io import File
file = File(sys.argv[1], verify=False)

def are_right(seed):
    order = [(7 * turn + 3 * seed) % 8 for turn in range(200)]
    return all((file[f"state.{k}"] == k).all() for k in order)

children = []
for seed in range(4):
    child = os.fork()
    if not child:
        os._exit(not are_right(seed))
    children.append(child)
assert are_right(5)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_read_what_they_ask_for(path: Path) -> None:
    arrays(path).close()
    subprocess.run([sys.executable, "-c", FORKS, path], check=True, timeout=300)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread")], ids=len)
def test_a_handler_reads_the_file_that_is_being_read(
    missing: tuple[str, ...], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    wrong: list[int] = []
    reads = 0
    with arrays(path) as file:

        def show(number: int, frame: FrameType | None) -> None:
            nonlocal reads
            reads += 1
            if not are_right(file, reads, 1):
                wrong.append(reads)

        before = signal.signal(signal.SIGALRM, show)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            while reads < 30:
                assert are_right(file, 0, 20)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert not wrong


# --- who may read ----------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444, 0o666])
def test_nobody_reads_a_file_that_is_written_who_may_not_read_it_then(
    mode: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, {"w": np.zeros(3)})
    path.chmod(mode)
    seen = []
    copied = form._copied

    def looked(*args: Any) -> Any:
        seen.extend(stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(path.parent))
        return copied(*args)

    monkeypatch.setattr(form, "_copied", looked)
    opened_as = []
    opened = atomic.opened

    def watched(*args: Any) -> Any:
        file = opened(*args)
        opened_as.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        return file

    monkeypatch.setattr(atomic, "opened", watched)
    save(path, {"w": np.ones(300_000)})
    assert len(seen) == 2
    assert all(m & ~mode == 0 for m in (*seen, *opened_as))
    assert stat.S_IMODE(path.stat().st_mode) == mode


@POSIX
def test_a_group_of_its_own_is_kept_or_may_do_less(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, {"w": 1})
    path.chmod(0o664)
    fstat = os.fstat

    class Foreign:
        def __init__(self, number: int) -> None:
            self.st_gid = fstat(number).st_gid + 1

    def refuse(*args: Any) -> None:
        raise PermissionError

    with path.with_name("other").open("wb") as file:
        monkeypatch.setattr(os, "fstat", Foreign)
        monkeypatch.setattr(os, "fchown", refuse)
        atomic._keep_mode(str(path), file.fileno())
    monkeypatch.undo()
    assert stat.S_IMODE(path.with_name("other").stat().st_mode) == 0o644


# --- interrupts ------------------------------------------------------------------------------


def interrupted(call: Callable[[], Any], after: int, where: str) -> bool:
    """Call, and raise `KeyboardInterrupt` at an instruction; tell whether it came to that."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and where in frame.f_code.co_filename:
            count += 1
            if count == after:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


# What an interrupt left to the collector closes itself, and says so.
UNCLOSED = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux shows them")
@UNCLOSED
@pytest.mark.slow
@pytest.mark.parametrize("what", ["save", "load"])
def test_an_interrupt_leaves_nothing_open(what: str, tmp_path: Path) -> None:
    path, tree = tmp_path / "run", {"w": np.ones(3)}
    save(path, tree)
    before, after = open_files(), 1
    call, where = (
        (lambda: save(path, tree), "_atomic")
        if what == "save"
        else (lambda: load(path), "_safetensors")
    )
    while interrupted(call, after, where):
        gc.collect()
        assert open_files() == before, after
        assert_equal(load(path), tree)
        after += 7
    assert after > 50
    save(path, tree)
    assert os.listdir(tmp_path) == ["run"]


@POSIX
@UNCLOSED
def test_a_timer_that_interrupts_saves_leaves_whole_files(tmp_path: Path, kills: int) -> None:
    path = tmp_path / "run"
    save(path, {"n": 0})

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    draw = np.random.default_rng(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    last = stopped = 0
    try:
        for n in range(1, kills + 1):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 5e-3))
                save(path, {"n": n, "x": np.full(30_000, float(n))})
                signal.setitimer(signal.ITIMER_REAL, 0)
                last = n
            except KeyboardInterrupt:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert last <= load(path)["n"] <= n
            last = load(path)["n"]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stopped
    save(path, {"n": 0})
    assert os.listdir(tmp_path) == ["run"]


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n" * 232, "n" * 233, "n" * 255, "ü" * 127, "名" * 85])
def test_names_may_be_as_long_as_the_system_lets_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save(path, {"x": 1})
    assert load(path) == {"x": 1}
    left = tmp_path / f".{atomic._stem(name)}.0123456789abcdef.part"
    left.write_bytes(b"")
    save(path, {"x": 2})
    assert os.listdir(tmp_path) == [name]


# --- checkpoints that come and go ------------------------------------------------------------


def test_a_folder_with_the_name_of_a_step_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1)
    (tmp_path / "step-000000000002.safetensors").mkdir()
    for step in (3, 4):
        checkpoints.save(step, {"w": step})
    assert checkpoints.steps() == [4]
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == 4


def test_an_old_file_that_cannot_be_removed_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(1, {"w": 1})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "not yours", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(UserWarning, match=r"saved step 2, but could not remove.*not yours"):
        checkpoints.save(2, {"w": 2})
    assert checkpoints.steps() == [1, 2]


def test_the_newest_is_found_while_older_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(1, {"w": 1})

    def rotating(path: Path) -> File:
        if (step := checkpoints.steps()[-1]) < 5:
            checkpoints.save(step + 1, {"w": 1})
        return File(path)

    monkeypatch.setattr(_checkpoints, "File", rotating)
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == 5


@POSIX
def test_a_link_to_nowhere_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"w": 1})
    (tmp_path / "step-000000000002.safetensors").symlink_to("nowhere")
    with pytest.warns(UserWarning, match="passed over a checkpoint"):
        newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == 1


def test_checking_a_file_does_not_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint can be larger than the memory."""
    save(tmp_path / "step-000000000001.safetensors", {"w": np.ones(300_000)})

    def refuse(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(form, "read_raw", refuse)
    newest = Checkpointer(tmp_path).latest()
    assert newest is not None
    content = bytearray(newest.path.read_bytes())
    content[-5] ^= 1
    newest.path.write_bytes(content)
    with pytest.warns(UserWarning, match="checksum"):
        assert Checkpointer(tmp_path).latest() is None


@POSIX
def test_an_error_after_the_rename_says_that_the_new_file_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, {"x": 1})
    opened = atomic.opened

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def close(self) -> None:
            self.file.close()
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic, "opened", lambda *args: Failing(opened(*args)))
    with pytest.raises(OSError, match="saved, and on the disk"):
        save(path, {"x": 2})
    monkeypatch.undo()
    assert load(path) == {"x": 2}
