"""Runs that are cut off: a whole file is there at any moment, and training goes on from it."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved import assert_equal

import optimisers.io._atomic as atomic
from optimisers import Adam, Descent, setup, update_
from optimisers.io import Checkpoint, Checkpointer, File, FileFormatError, load, save

EXAMPLES = Path(__file__).parents[2] / "examples"
POSIX = pytest.mark.skipif(os.name != "posix", reason="a matter of POSIX systems")


def run(code: str, *args: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def trees() -> tuple[Any, Any]:
    model = {"w": np.arange(6.0).reshape(2, 3), "b": np.zeros(3, np.float32)}
    return setup(Adam(), model), model


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- killed while saving -----------------------------------------------------------------------

KILLS = """
    import os, random, signal, sys, time
    import numpy as np
    from optimisers import Adam, setup
    from optimisers.io import load, save

    folder, kills = sys.argv[1], int(sys.argv[2])
    path = os.path.join(folder, "model.safetensors")
    draw = random.Random(0)
    version = left = 0
    for kill in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            while True:
                version += 1
                n = version % 7 * 20_000 + 10
                tree = [np.full(n, float(version)), np.full(3, version), {"n": np.ones(n)}]
                save(path, setup(Adam(), tree[0]), tree, metadata=version)
                os.write(writer, version.to_bytes(8, "little"))
        os.close(writer)
        said = os.read(reader, 8 * draw.randrange(1, 3))  # one version or two are safe
        time.sleep(draw.random() * 0.006)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 8000):
            said += more
        os.close(reader)
        known = int.from_bytes(said[-8:], "little")
        parts = [name for name in os.listdir(folder) if name.endswith(".part")]
        assert len(parts) <= 1, parts  # each writer swept what the one before it left
        left += len(parts)
        state, tree = load(path)
        found = int(tree[1][0])
        assert found in (known, known + 1), (found, known)
        n = found % 7 * 20_000 + 10
        assert tree[0].size == tree[2]["n"].size == state.state.m.size == n
        assert (tree[0] == found).all() and (tree[1] == found).all()
        version = found
    save(path, None)
    assert os.listdir(folder) == ["model.safetensors"]
    print(kills, left)
"""


@POSIX
def test_kills_leave_a_whole_file_each(tmp_path: Path, kills: int) -> None:
    """What was reported saved is never lost, and some kills do hit a writer in the middle."""
    made, left = map(int, run(KILLS, tmp_path, kills).stdout.split())
    assert made == kills
    assert left >= kills // 10


@POSIX
def test_only_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "model"
    alive = atomic.replacing(str(path))
    alive.__enter__()
    dead = tmp_path / ".model.0123456789abcdef.part"
    others = [
        tmp_path / ".other.0123456789abcdef.part",
        tmp_path / "model.0123456789abcdef.part",
        tmp_path / ".model.part",
    ]
    for file in (dead, *others):
        file.write_bytes(b"left")
    (tmp_path / ".model.fedcba9876543210.part").mkdir()
    before = names(tmp_path)
    save(path, {"a": 1})
    assert not dead.exists()
    assert names(tmp_path) == sorted({*before, "model"} - {dead.name})
    alive.__exit__(None, None, None)
    assert path.read_bytes() == b""
    assert len(names(tmp_path)) == len(before) - 1


@POSIX
def test_a_link_stays_and_modes_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    old = os.umask(0o022)
    try:
        save(link, {"a": 1})
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    target.chmod(0o600)
    save(link, {"a": 2})
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert load(target) == {"a": 2}


def test_what_is_written_reaches_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watch(name: str) -> None:
        call = getattr(os, name)

        def watched(*args: Any) -> Any:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            seen.append(f"{name} folder" if is_folder else name)
            return call(*args)

        monkeypatch.setattr(os, name, watched)

    watch("fsync")
    watch("replace")
    save(tmp_path / "model", *trees())
    assert seen == ["fsync", "replace", "fsync folder"][: 3 if os.name == "posix" else 2]


@POSIX
def test_a_folder_that_cannot_be_forced_to_the_disk_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is there by then; that the old one were as before would be wrong."""
    save(tmp_path / "model", {"a": 1})
    force = os.fsync

    def fail(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        force(number)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="saved, but not forced to the disk") as caught:
        save(tmp_path / "model", {"a": 2})
    assert caught.value.errno == errno.EIO
    assert load(tmp_path / "model") == {"a": 2}
    assert names(tmp_path) == ["model"]


# --- errors while saving -----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    """Give a file that shall be as it was, alone in its folder, when the test is over."""
    path = tmp_path / "folder" / "model"
    path.parent.mkdir()
    save(path, {"old": np.ones(3)})
    content = path.read_bytes()
    yield path
    assert path.read_bytes() == content
    assert names(path.parent) == ["model"]


def test_a_full_disk_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("fsync", "replace"):

        def fail(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match=r"No space.*make room.*is as it was") as caught:
                save(saved, {"new": np.ones(300_000)})
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(saved)


@POSIX
def test_a_limit_on_the_size_of_files_leaves_the_old_file(saved: Path) -> None:
    code = """
        import resource, sys, numpy as np
        from optimisers.io import save
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save(sys.argv[1], {"new": np.ones(100_000)})
        except OSError as error:
            print(error)
    """
    assert "make room" in run(code, saved).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system of Linux")
def test_a_disk_that_is_really_full_leaves_the_old_file(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        checkpoints = Checkpointer(tmp_path, keep=1)
        checkpoints.save(1, {"w": np.ones(75_000)})
        with pytest.raises(OSError, match="make room") as caught:
            checkpoints.save(2, {"w": np.ones(75_000)})
        assert caught.value.errno == errno.ENOSPC
        assert names(tmp_path) == ["step-000000000001.safetensors"]
        assert_equal(load(tmp_path / names(tmp_path)[0]), {"w": np.ones(75_000)})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@POSIX
def test_a_folder_that_cannot_be_written_leaves_the_old_file(saved: Path) -> None:
    code = """
        import os, sys, numpy as np
        from optimisers.io import save
        if os.getuid() == 0:  # who may write everywhere
            os.setgid(65534)
            os.setuid(65534)
        try:
            save(sys.argv[1], {"new": np.ones(3)})
        except PermissionError as error:
            print(error)
    """
    temporary = Path(tempfile.gettempdir())  # open to all, but not what pytest makes in it
    above = [folder for folder in saved.parents[1:] if temporary in folder.parents]
    for folder in (saved.parent, *above):
        folder.chmod(0o555 if folder == saved.parent else folder.stat().st_mode | 0o055)
    try:
        said = run(code, saved).stdout
    finally:
        saved.parent.chmod(0o755)
    assert "Permission denied; see that files can be written in" in said
    assert str(saved) in said


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing; make it first"):
        save(tmp_path / "missing" / "model", {"a": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no folder"):
        save(tmp_path / "file" / "model", {"a": 1})
    with pytest.raises(OSError, match="cannot save"):
        save(tmp_path, {"a": 1})
    assert names(tmp_path) == ["file"]


def test_an_interruption_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(saved, {"new": np.ones(3)})


@POSIX
def test_the_writer_starts_anew_if_its_file_is_swept_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[str] = []
    lock = atomic.fcntl.flock

    def sweep_first(number: int, how: int) -> None:
        if not swept:
            swept.extend(names(tmp_path))
            (tmp_path / swept[0]).unlink()
        lock(number, how)

    monkeypatch.setattr(atomic.fcntl, "flock", sweep_first)
    save(tmp_path / "model", {"a": 1})
    assert len(swept) == 1
    assert load(tmp_path / "model") == {"a": 1}


def test_without_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "fcntl", None)
    (tmp_path / ".model.0123456789abcdef.part").write_bytes(b"")
    save(tmp_path / "model", {"a": 1})
    assert names(tmp_path) == ["model"]
    assert load(tmp_path / "model") == {"a": 1}


# --- Checkpointer ------------------------------------------------------------------------------


def test_the_newest_files_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path / "new" / "folder", keep=3, every=5)
    assert checkpoints.latest() is None
    state, model = trees()
    for step in range(33):
        path = checkpoints.save(step, state, model, {"step": step})
        assert (path is not None) == (step % 5 == 0)
        state, model = update_(state, model, {"w": np.ones((2, 3)), "b": np.ones(3)})
    assert checkpoints.steps() == [20, 25, 30]
    assert checkpoints.save(33, state, model, force=True) == checkpoints.folder / (
        "step-000000000033.safetensors"
    )
    assert checkpoints.steps() == [25, 30, 33]
    latest = Checkpointer(checkpoints.folder).latest()
    assert isinstance(latest, Checkpoint)
    assert latest.step == 33
    assert latest.metadata is None
    assert_equal(latest.load(), (state, model))
    assert_equal(latest.load(like=trees()), (state, model))
    assert load(checkpoints.folder / "step-000000000030.safetensors")[0]["w"].state.t == 30


def test_damaged_files_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    paths = [checkpoints.save(step, *trees()) for step in (1, 2, 3)]
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    paths[1].write_bytes(content[:100])
    with pytest.warns(UserWarning, match="passed over a checkpoint") as caught:
        latest = checkpoints.latest()
    assert latest.step == 1
    assert [str(path) in str(w.message) for path, w in zip(paths[:0:-1], caught, strict=True)]
    assert all(w.filename == __file__ for w in caught)
    paths[0].write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.latest() is None
    assert checkpoints.steps() == [1, 2, 3]


def test_after_going_back_the_file_just_written_is_never_removed(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1)
    Path(tmp_path / "step-000000000030.safetensors").write_bytes(b"damaged")
    checkpoints.save(20, *trees())
    checkpoints.save(25, *trees())
    assert checkpoints.steps() == [25, 30]
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.latest().step == 25
    checkpoints.save(30, *trees())
    assert checkpoints.steps() == [30]


def test_old_files_are_removed_only_when_the_new_one_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(1, *trees())
    seen = []
    unlink = Path.unlink

    def watched(path: Path, *args: Any) -> None:
        with File(tmp_path / "step-000000000002.safetensors") as file:
            file.verify()
        seen.append(path.name)
        unlink(path, *args)

    monkeypatch.setattr(Path, "unlink", watched)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(5, "I/O error")))
        with pytest.raises(OSError, match="I/O"):
            checkpoints.save(2, *trees())
    assert seen == []
    checkpoints.save(2, *trees())
    assert seen == ["step-000000000001.safetensors"]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    others = ["step-1.safetensors", "step-000000000001.safetensors.bak", "notes", ".hidden.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    left = [".step-000000000007.safetensors.0123456789abcdef.part"]
    (tmp_path / left[0]).write_bytes(b"")
    checkpoints = Checkpointer(tmp_path, keep=1)
    assert not (tmp_path / left[0]).exists()
    for step in (1, 2, 10**12):
        checkpoints.save(step, *trees())
    assert names(tmp_path) == sorted([*others, "step-1000000000000.safetensors"])


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for more in ({"keep": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="at least 1; got 0"):
            Checkpointer(tmp_path, **more)
    with pytest.raises(TypeError):
        Checkpointer(tmp_path, keep=1.5)
    checkpoints = Checkpointer(tmp_path, keep=2, every=np.int64(3))
    assert repr(checkpoints) == f"Checkpointer({str(tmp_path)!r}, keep=2, every=3)"
    with pytest.raises(ValueError, match="a step is at least 0; got -3"):
        checkpoints.save(-3, *trees())
    with pytest.raises(TypeError):
        checkpoints.save(1.5, *trees())
    assert names(tmp_path) == []


# --- a run that is cut off ---------------------------------------------------------------------

TRAIN = """
    import hashlib, sys, time
    import numpy as np
    from optimisers import Adam, ClipNorm, OptimiserChain, WeightDecay, destructure, setup, update_
    from optimisers.io import Checkpointer

    folder, steps, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if kind == "digits":
        import digits

        data = digits.load()
        images, labels = data.images, data.labels
        model = digits.make_model()
        rule = digits.RULE
        gradient = lambda model, *batch: digits.loss_and_gradient(model, *batch)[1]
    else:  # a tied linear model, fitted to its own noise
        draw = np.random.default_rng(5)
        images, labels = draw.normal(size=(500, 20)), draw.normal(size=(500, 20))
        w = draw.normal(size=(20, 20))
        model = {"w": w, "wt": w.T, "b": np.zeros(20, np.float32)}
        rule = OptimiserChain(ClipNorm(50.0), WeightDecay(1e-3), Adam(eta=0.01))

        def gradient(model, x, y):
            hidden = x @ model["w"]
            error = (hidden @ model["wt"] + model["b"] - y) / len(x)
            back = error @ model["wt"].T
            return {"w": x.T @ back, "wt": hidden.T @ error, "b": error.sum(0)}

    state = setup(rule, model)
    rng = np.random.default_rng(1)
    checkpoints = Checkpointer(folder, keep=2, every=3)
    start = 0
    if (checkpoint := checkpoints.latest()) is not None:
        state, model = checkpoint.load(like=(state, model))
        rng.bit_generator.state = checkpoint.metadata["rng"]
        start = checkpoint.step
    print("from", start, flush=True)
    for step in range(start + 1, steps + 1):
        chosen = rng.integers(len(labels), size=32)
        state, model = update_(state, model, gradient(model, images[chosen], labels[chosen]))
        checkpoints.save(step, state, model, {"rng": rng.bit_generator.state})
        print(step, flush=True)
    moments = [leaf.state[-1].m for leaf in state["layers"][0].values()] if kind == "digits" else []
    flat, _ = destructure([model, moments])
    print("end", hashlib.sha256(flat.tobytes()).hexdigest(), float(np.abs(flat).sum()))
"""
STEPS = 60


def training(folder: Path, kind: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(TRAIN), str(folder), str(STEPS), kind]
    paths = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


@POSIX
@pytest.mark.parametrize("kind", ["linear", "digits"])
def test_a_run_that_is_killed_and_resumed_ends_at_the_same_bits(kind: str, tmp_path: Path) -> None:
    for name in ("autograd", "sklearn", "matplotlib", "tqdm") if kind == "digits" else ():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"could not import {name!r}")
    with training(tmp_path / "whole", kind) as whole:
        expected, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0
    assert expected.splitlines()[0] == "from 0"

    draw = random.Random(kind)
    starts = []
    for last in (draw.randrange(5, 25), draw.randrange(30, 55), STEPS):
        with training(tmp_path / "cut", kind) as process:
            assert process.stdout is not None
            starts.append(int(process.stdout.readline().split()[1]))
            if last == STEPS:
                got = process.stdout.read()
                continue
            for line in process.stdout:
                if int(line) >= last:
                    break
            time.sleep(draw.random() * 0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert 0 == starts[0] < starts[1] < starts[2] < STEPS
    assert got.splitlines()[-1] == expected.splitlines()[-1]
    assert got.splitlines()[-1].startswith("end ")
    assert names(tmp_path / "cut") == names(tmp_path / "whole")
    for name in names(tmp_path / "cut"):
        whole_file, cut_file = tmp_path / "whole" / name, tmp_path / "cut" / name
        assert whole_file.read_bytes() == cut_file.read_bytes()


def test_a_checkpoint_of_a_rule_that_is_not_imported_is_not_damaged(tmp_path: Path) -> None:
    """It is found; to load it is an error that says what to import."""

    @dataclass(frozen=True)
    class Theirs(Descent):
        pass

    Checkpointer(tmp_path).save(1, setup(Theirs(), np.ones(2)))
    Theirs.__qualname__ = "Renamed"
    latest = Checkpointer(tmp_path).latest()
    assert latest.step == 1
    with pytest.raises(FileFormatError, match="import the module"):
        latest.load()
