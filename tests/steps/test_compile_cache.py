"""Steps of users in other processes: without Numba, and from the cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from util import parametrize

from optimisers._steps import cache as step_cache

SCRIPT = """
    import sys, hashlib, warnings
    from pathlib import Path
    import numpy as np, optimisers
    from optimisers._engine import advance as engine
    from optimisers._steps import compiled
    from optimisers.words import sqrt, abs2

    class Mine(optimisers.Adam):
        @staticmethod
        def step(x, dx, state, coefs):
            m, v = state
            b1, rest1, b2, rest2, rate, scale, epsilon = coefs
            m = b1 * m + rest1 * dx
            v = b2 * v + rest2 * abs2(dx)
            return rate * m / (scale * sqrt(v) + epsilon) + m, (m, v)

    def run(dtype, steps=3):
        x = np.linspace(-1, 1, 3001).astype(dtype)
        state, backends = optimisers.setup(Mine(), x), set()
        with engine.watching() as seen:
            for _ in range(steps):
                state, x = optimisers.update(state, x, x * x)
        return {backend for _, backend in seen}, hashlib.sha256(x.tobytes()).hexdigest()
"""


def run_script(tmp_path, code, **environment):
    """Run SCRIPT and more in a new interpreter; return what it prints, evaluated."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(code))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def result():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return eval(out)

    return result


def test_without_numba_the_numbers_are_the_same(numba, tmp_path):
    code = 'print([run("f4"), run("f8")])'
    block = 'sys.modules["numba"] = None\n'
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    compiled, arrays, switched_off = (
        run_script(tmp_path, c, **cache, **env)()
        for c, env in ((code, {}), (block + code, {}), (code, {"NUMBA_DISABLE_JIT": "1"}))
    )
    assert [backends for backends, _ in compiled] == [{"kernels"}] * 2
    assert [backends for backends, _ in arrays] == [{"arrays"}] * 2
    assert [backends for backends, _ in switched_off] == [{"arrays"}] * 2
    assert [h for _, h in compiled] == [h for _, h in arrays] == [h for _, h in switched_off]


def test_numba_is_imported_by_the_first_array_that_is_compiled_for(numba, tmp_path):
    code = """
        found = []
        for dtype in "c8", "g", ">f4", "f4":
            run(dtype)
            found.append("numba" in sys.modules)
        print(found)
    """
    assert run_script(tmp_path, code)() == [False, False, False, True]


HITS = 'done = run("f4")\nprint((done, [f.cache_hits for f in compiled._made.values()]))'


def test_compiled_steps_are_kept_on_disk(numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = run_script(tmp_path, HITS, **environment)()
    assert first[1] == [0]
    assert run_script(tmp_path, HITS, **environment)() == (first[0], [1])
    elsewhere = tmp_path / "elsewhere"  # the same step in another file
    elsewhere.mkdir()
    assert run_script(elsewhere, HITS, **environment)() == (first[0], [1])


def test_another_step_is_not_found_in_the_cache(numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = run_script(tmp_path, HITS, **environment)()
    changed = """
        class Mine(Mine):
            @staticmethod
            def step(x, dx, state, coefs):
                m, v = state
                b1, rest1, b2, rest2, rate, scale, epsilon = coefs
                m = b1 * m + rest1 * dx
                v = b2 * v + rest2 * abs2(dx)
                return rate * m / (scale * sqrt(v) + epsilon) - m, (m, v)
    """
    second = run_script(tmp_path, textwrap.dedent(changed) + HITS, **environment)()
    assert second[1] == [0]
    assert second[0][1] != first[0][1]


def test_several_processes_share_the_cache(numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    waiting = [run_script(tmp_path, HITS, **environment) for _ in range(3)]
    assert len({repr(result()[0]) for result in waiting}) == 1
    assert run_script(tmp_path, HITS, **environment)()[1] == [1]


def test_a_cache_that_is_forbidden_or_broken_is_done_without(numba, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    done, hits = run_script(tmp_path, HITS, NUMBA_CACHE_DIR=str(file))()
    assert (done[0], hits) == ({"kernels"}, [0])
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    run_script(tmp_path, HITS, **environment)()
    for path in (tmp_path / "cache").rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:50])
    assert run_script(tmp_path, HITS, **environment)()[0] == done


posix = pytest.mark.skipif(os.name == "nt", reason="folders of users are theirs on Windows")


@posix
@parametrize("mask", [0o000, 0o002, 0o022])
@parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_a_new_cache_is_its_owners_alone(variable, mask, numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": "", variable: str(tmp_path / "new" / "cache")}
    code = f"import os\nos.umask({mask})\n" + HITS
    tmp_path.chmod(0o700)
    first = run_script(tmp_path, code, **environment)()
    for at in (tmp_path / "new").rglob("*"):
        assert not at.stat().st_mode & 0o022, at
    assert (tmp_path / "new" / "cache" / "optimisers").stat().st_mode & 0o777 == 0o700
    assert run_script(tmp_path, code, **environment)() == (first[0], [1])


@posix
@parametrize("which", ["optimisers", "", ".."])
def test_a_cache_that_others_may_write_to_is_not_used(which, numba, tmp_path):
    folder = tmp_path / "cache" / "optimisers"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "cache" / which).chmod(0o777)
    code = """
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True) as seen:
            done = run("f4")
            run("f8")
        print((done[0], [str(one.message) for one in seen]))
    """
    used, messages = run_script(tmp_path, code, NUMBA_CACHE_DIR=str(tmp_path / "cache"))()
    assert used == {"kernels"}
    assert [*folder.iterdir()] == []
    (message,) = messages
    assert "others may write to" in message
    assert "NUMBA_CACHE_DIR" in message


@posix
def test_a_cache_of_another_user_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert step_cache.written("text", "one")
    me = os.stat(tmp_path).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    monkeypatch.setattr(step_cache, "_told", set())
    real = os.stat_result

    def others(path):
        info = list(real_stat(path))
        return real([*info[:4], me + 2, *info[5:]])

    real_stat = step_cache.Path.stat
    monkeypatch.setattr(step_cache.Path, "stat", others)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert step_cache.written("text", "one") is None


@posix
@parametrize("filled", [False, True])
def test_a_folder_of_numba_is_made_private_if_it_is_new(filled, tmp_path):
    folder = tmp_path / "made_by_numba"
    folder.mkdir()
    folder.chmod(0o777)
    if filled:
        (folder / "step.nbi").write_bytes(b"")
    assert step_cache.is_safe(str(folder)) is not filled


@parametrize(
    ("system", "variable", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/optimisers"),
        ("linux", {}, "~/.cache/optimisers"),
        ("darwin", {}, "~/Library/Caches/optimisers"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/optimisers"),
        ("win32", {}, "~/AppData/Local/optimisers"),
        ("linux", {"NUMBA_CACHE_DIR": "/n"}, "/n/optimisers"),
    ],
)
def test_where_the_cache_is(system, variable, expected, monkeypatch):
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert step_cache.cache_folder() == step_cache.Path(os.path.expanduser(expected))
