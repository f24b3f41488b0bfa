"""Forks while other threads are at something of the library: children go on like any other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from util import parametrize

import optimisers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

START = """
    import os, signal, sys, threading, time, warnings
    from dataclasses import dataclass
    import numpy as np, optimisers, optimisers.io
    from optimisers import _fork
    from optimisers.io import _safetensors

    @dataclass(frozen=True)
    class Mine(optimisers.ElementwiseRule):
        eta: float = 0.1
        slots = ("v",)

        def coefs(self):
            return (self.eta,)

        @staticmethod
        def step(x, dx, state, coefs):
            (v,) = state
            (eta,) = coefs
            v = v + eta * dx
            return v, (v,)

    def train():
        x = np.ones(5)
        optimisers.update_(optimisers.setup(Mine(), x), x, np.ones(5))
        assert x[0] == 0.9

    _fork._LONGEST = 1000.0     # a fork that gave up to wait would hide who holds the lock

    def forked(call):
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            try:
                call()
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run(tmp_path: Path, code: str, seconds: float = 600) -> str:
    """Run START and more in a new interpreter; return what it prints."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(START) + textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", script],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@parametrize("turn", ["_fork.compiling", "_safetensors._reading"])
def test_a_fork_waits_for_who_holds_a_lock(turn: str, tmp_path: Path) -> None:
    said = run(
        tmp_path,
        f"""
        started, let_go = threading.Event(), []

        def hold():
            with {turn}:
                started.set()
                time.sleep(0.3)
                let_go.append(True)

        def take():
            with {turn}:
                assert let_go

        thread = threading.Thread(target=hold)
        thread.start()
        started.wait()
        print(forked(take))
        thread.join()
        take()
        """,
    )
    assert said == "0\n"


@parametrize("late", ["os", "logging", "numba"])
def test_forks_while_rules_are_compiled(late: str, tmp_path: Path, forks: int) -> None:
    """Whoever has had locks of his own taken at a fork by then, and so ahead of the library's."""
    pytest.importorskip("numba")
    said = run(
        tmp_path,
        f"""
        import {late}
        from optimisers._engine import advance as engine
        for k in range({forks}):
            Mine = type(f"Mine{{k}}", (Mine,), {{}})
            thread = threading.Thread(target=train)
            thread.start()
            time.sleep(k % 10 * 0.03)  # while the language is imported, Numba, while it compiles
            print(forked(train), end=" ")
            thread.join()
            os.environ["NUMBA_CACHE_DIR"] = f"/nowhere/{{k}}"  # so that the next compiles too
            from optimisers._steps import compiled
            compiled._made.clear()
        """,
        seconds=600 + 60 * forks,
    )
    assert said.split() == ["0"] * forks


def test_forks_while_the_file_of_an_array_library_is_imported(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        import importlib.machinery, types
        from optimisers._arrays import library

        started = threading.Event()

        class Finder:
            def find_spec(name, path, target=None):
                if name == "optimisers._arrays.slow":
                    return importlib.machinery.ModuleSpec(name, Finder)

            def create_module(spec):
                return None

            def exec_module(module):
                started.set()
                time.sleep(0.3)  # the fork comes meanwhile
                module.LIBRARY = None

        sys.meta_path.insert(0, Finder)
        sys.modules["slow"] = types.ModuleType("slow")
        names = library._names()
        library._names = lambda: [*names, "slow"]

        def ask():
            assert library.library_of_class(type("New", (), {})) is None

        thread = threading.Thread(target=ask)
        thread.start()
        started.wait()
        print(forked(ask))
        thread.join()
        """,
    )
    assert said == "0\n"


def test_a_rule_or_a_handler_may_fork_while_its_thread_compiles(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        signal.signal(signal.SIGUSR1, lambda *_: print(forked(train), end=" "))
        with _fork.compiling:
            signal.raise_signal(signal.SIGUSR1)
        train()
        print(forked(train))
        """,
    )
    assert said == "0 0\n"


def test_a_fork_whose_wait_is_interrupted_leaves_a_lock_that_works(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        started = threading.Event()

        def hold():
            with _fork.compiling:
                started.set()
                time.sleep(0.6)

        def interrupt(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        sys.unraisablehook = lambda _: None
        thread = threading.Thread(target=hold)
        thread.start()
        started.wait()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        child = os.fork()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if child == 0:
            signal.alarm(20)
            with _fork.compiling:
                os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        thread.join()
        train()
        """,
    )
    assert said == "0\n"


def test_every_lock_of_the_library_is_one_that_forks_wait_for() -> None:
    lock = re.compile(
        r"\b(R?Lock|Condition|Semaphore|BoundedSemaphore|Barrier)\(|import .*\bLock\b"
    )
    package = Path(optimisers.__file__).parent
    found = [
        file.name
        for file in package.rglob("*.p*")
        if file.suffix in (".py", ".pyx", ".pxi") and lock.search(file.read_text("utf-8"))
    ]
    assert found == ["_fork.py"]
