"""The kernels of each instruction set, and on how many threads they run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from util import FORKS_WITH_THREADS, assert_same_bits, normal, parametrize

from optimisers import (
    Adam,
    ClipNorm,
    Descent,
    MixedPrecision,
    OptimiserChain,
    WeightDecay,
    get_num_threads,
    set_num_threads,
    setup,
    update_,
)
from optimisers._engine import cpu

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("kept_settings")]


# --- choosing kernels ------------------------------------------------------------------------


def run(code, **environment):
    """Run code in a new interpreter, as strict about warnings as this one."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


SHORT_RUN = """
    import hashlib, numpy as np, optimisers
    from optimisers._engine import advance as engine, cpu
    x = np.linspace(-1, 1, 5001)
    rule = optimisers.OptimiserChain(optimisers.ClipNorm(0.1), optimisers.Adam())
    state = optimisers.setup(rule, x)
    with engine.watching() as seen:
        for k in range(5):
            optimisers.update_(state, x, x**k)
    assert {backend for _, backend in seen} == {"kernels"}
    print(cpu.isa, hashlib.sha256(x.tobytes()).hexdigest())
"""


@parametrize("name", cpu.available)
def test_each_instruction_set_converts_float16_alike(name, monkeypatch):
    """Some have instructions for it: every float16 and 100,000 floats of any kind, NaN too."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    floats = np.random.default_rng(0).integers(0, 2**32, 100_003, np.uint32).view(np.float32)

    def converted(kernels):
        monkeypatch.setattr(cpu, "kernels", kernels)
        widened, rounded = (
            setup(MixedPrecision(Descent(eta)), np.zeros(a.shape, np.float16))
            for eta, a in ((1.0, halves), (0.0, floats))
        )
        update_(widened, np.zeros_like(halves), halves)
        rounded.state.master[...] = floats
        x = np.zeros(floats.shape, np.float16)
        update_(rounded, x, x.copy())
        return widened.state.master, x

    assert_same_bits(converted(cpu.available[name]), converted(cpu.baseline))


def test_an_instruction_set_can_be_asked_for():
    hashes = set()
    for name in cpu.available:
        done = run(SHORT_RUN, OPTIMISERS_ISA=name)
        assert done.returncode == 0, done.stderr
        isa, result = done.stdout.split()
        assert isa == name
        hashes.add(result)
    assert len(hashes) == 1


def test_the_widest_instruction_set_is_the_default():
    assert run(SHORT_RUN, OPTIMISERS_ISA="").stdout.split()[0] == next(iter(cpu.available))


def test_an_instruction_set_that_is_not_there():
    done = run("import optimisers", OPTIMISERS_ISA="mmx")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "OPTIMISERS_ISA='mmx'" in last
    assert all(name in last for name in cpu.available)


# --- threads ---------------------------------------------------------------------------------


def test_number_of_threads_follows_the_environment():
    code = "import optimisers; print(optimisers.get_num_threads())"
    assert run(code, OMP_NUM_THREADS="3").stdout.strip() == "3"


def test_number_of_threads_follows_threadpoolctl():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = get_num_threads()
    with threadpoolctl.threadpool_limits(limits=1, user_api="openmp"):
        assert get_num_threads() == 1
    with threadpoolctl.threadpool_limits(limits=4, user_api="openmp"):
        assert get_num_threads() == 4
    assert get_num_threads() == before


@pytest.mark.races
def test_set_num_threads():
    before = get_num_threads()
    set_num_threads(7)
    assert get_num_threads() == 7
    set_num_threads(0)
    assert get_num_threads() == before
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match=f"0 or more; got {wrong}"):
            set_num_threads(wrong)
    assert get_num_threads() == before


@pytest.mark.races
@FORKS_WITH_THREADS
def test_a_forked_process_can_update_with_threads():
    done = run(
        """
        import os, signal, numpy as np, optimisers
        from optimisers._engine import cpu
        cpu.kernels.set_work_per_thread(1)
        optimisers.set_num_threads(4)
        x, g = np.ones(100_000), np.ones(100_000)
        rule = optimisers.OptimiserChain(optimisers.ClipNorm(), optimisers.Adam())
        state = optimisers.setup(rule, x)
        optimisers.update_(state, x, g)          # starts threads
        child = os.fork()
        optimisers.update_(state, x, g)
        if child == 0:
            signal.alarm(20)
            threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 4
            os._exit(int(len(set(x)) != 1 or threads != 4))
        _, status = os.waitpid(child, 0)
        signal.alarm(20)
        optimisers.update_(state, x, g)          # the parent goes on as before
        print(os.waitstatus_to_exitcode(status), optimisers.get_num_threads(), len(set(x)))
        """
    )
    assert done.stdout.split() == ["0", "4", "1"], done.stderr


def test_a_busy_processor_holds_nothing_up():
    """Threads that get no time, here many on one processor, are not waited for."""
    done = run(
        """
        import os, numpy as np, optimisers
        from optimisers._engine import cpu
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        cpu.kernels.set_work_per_thread(1)
        x, g = np.ones((2, 50_000))
        state = optimisers.setup(optimisers.Adam(), x)
        for threads in (1, 16, 2, 300, 5) * 40:
            optimisers.set_num_threads(threads)
            optimisers.update_(state, x, g)
        print(int(state.state.t), len(set(x)))
        """,
        OPENBLAS_NUM_THREADS="1",
    )
    assert done.stdout.split() == ["200", "1"], done.stderr


@pytest.mark.races
@parametrize("threads", [1, 3])
def test_updates_from_several_python_threads(threads):
    set_num_threads(threads)
    cpu.kernels.set_work_per_thread(1)
    rule = OptimiserChain(WeightDecay(0.1), ClipNorm(1.0), Adam())
    models = [{"w": normal(5000, np.float32, k), "b": normal(7, np.float64, k)} for k in range(8)]
    gradients = [
        {"w": normal(5000, np.float32, k), "b": normal(7, np.float64, k)} for k in range(20)
    ]

    def train(model):
        state = setup(rule, model)
        for grad in gradients:
            update_(state, model, grad)
        return model

    alone = [train({k: x.copy() for k, x in model.items()}) for model in models]
    workers = [threading.Thread(target=train, args=(model,)) for model in models]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for model, other in zip(models, alone, strict=True):
        assert_same_bits(model, other)
