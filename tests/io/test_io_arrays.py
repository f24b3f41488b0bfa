"""Single arrays of a file: windows into it, threads, the same bytes for equal trees."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved import assert_equal
from util import normal

from optimisers import Adam, setup
from optimisers.io import File, FileFormatError, load, save

pytestmark = pytest.mark.elsewhere


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_is_a_mapping(mapped: bool, path: Path) -> None:
    tree = {"a": normal((50, 3)), "b": {"c.d": normal(2), 1: normal(3), "1": normal(4)}}
    save(path, tree, metadata={"epoch": 3, "rng": np.random.default_rng(0).bit_generator.state})
    with File(path, mapped=mapped) as file:
        assert [*file] == ["state.a", "state.b.c.d", "state.b.1", "state.b.1#2"]
        assert len(file) == 4
        assert "4 arrays" in repr(file)
        x, again = file["state.a"], file["state.a"]
        with pytest.raises(KeyError):
            file["a"]
        assert file.metadata["rng"] == np.random.default_rng(0).bit_generator.state
        assert_equal(file.load(), tree)
        assert not np.shares_memory(file.load()["a"], file.load()["a"])
        file.verify()
    assert np.shares_memory(x, again) == mapped
    assert x.flags.writeable != mapped
    assert_equal(np.array(x), tree["a"])
    save(path, {"a": normal(1)})
    assert_equal(np.array(x), tree["a"])
    with File(path, mapped=mapped) as file:
        assert file.metadata is None
    with pytest.raises(ValueError, match="closed file"):
        file["state.a"]


@pytest.mark.parametrize("kind", ["float64", "float32", "complex128", "longdouble", "float16"])
def test_windows_are_aligned(kind: str, path: Path) -> None:
    save(path, {"a": np.ones(3, np.int8), "b": np.ones(3, kind), "c": np.ones(1, np.int16)})
    with File(path, mapped=True) as file:
        assert all(x.flags.aligned for x in file.values())
        assert file["state.b"].ctypes.data % np.dtype(kind).itemsize == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_only_what_is_asked_for_is_read(mapped: bool, path: Path) -> None:
    save(path, {"good": np.arange(100.0), "bad": np.arange(50, dtype=np.int32)})
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)
    with File(path, mapped=mapped) as file:
        assert_equal(np.array(file["state.good"]), np.arange(100.0))
        with pytest.raises(FileFormatError, match=r"state\.bad"):
            file["state.bad"]
        with pytest.raises(FileFormatError, match=r"state\.bad"):
            file.verify()
    with File(path, verify=False, mapped=mapped) as file:
        assert file["state.bad"].shape == (50,)
    with pytest.raises(FileFormatError, match=r"file.safetensors.*state\.bad"):
        load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that Linux has")
def test_a_window_into_more_than_the_memory_reads_what_is_looked_at(path: Path) -> None:
    count = 2**30
    header = json.dumps({"x": {"dtype": "F64", "shape": [count], "data_offsets": [0, 8 * count]}})
    with open(path, "wb") as file:
        file.write((120).to_bytes(8, "little") + header.encode().ljust(120))
        file.seek(128 + 8 * (count - 1))  # a hole of 8 GiB
        file.write(np.float64(7.5).tobytes())
    code = """
        import resource, sys
        from optimisers.io import File
        resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
        with File(sys.argv[1], mapped=True) as file:
            print(file["x"][-2:].tolist())
        with File(sys.argv[1]) as file:
            try:
                file["x"]
            except MemoryError:
                print("too large")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path], capture_output=True, text=True
    )
    assert run.stdout == "[0.0, 7.5]\ntoo large\n", run.stderr


def test_threads_read_one_file_each_its_own_arrays(path: Path) -> None:
    arrays = {f"x{k}": np.full(70_000 + k, k, np.float32) for k in range(8)}
    package: Any = pytest.importorskip("safetensors.numpy")
    package.save_file(arrays, path)  # without checksums, which would find out
    with File(path) as file, ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            for name, x in zip(arrays, threads.map(file.__getitem__, arrays), strict=True):
                assert_equal(x, arrays[name])


def test_equal_trees_make_equal_files(path: Path, tmp_path: Path) -> None:
    def write(to: str) -> bytes:
        room = np.frombuffer(np.random.default_rng().bytes(48), np.longdouble).copy()
        room[:] = [1, 2, 3]  # the bytes between extended numbers stay as they were
        save(to, setup(Adam(), {"x": np.ones(3)}), {"x": room})
        return Path(to).read_bytes()

    assert write(path) == write(str(tmp_path / "other"))


def test_import_is_lazy() -> None:
    code = "import optimisers, sys; print('mmap' in sys.modules, 'optimisers.io' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[1] == "False"
