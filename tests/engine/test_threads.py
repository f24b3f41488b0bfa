"""Threads of Python, threads of the kernels, forks: on models of their own, on one, in the middle.

`--seconds=60` lets the long ones go on for that long.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from util import FORKS_WITH_THREADS, assert_same_bits, normal, parametrize

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    MixedPrecision,
    OptimiserChain,
    WeightDecay,
    set_num_threads,
    setup,
    update_,
)
from optimisers._engine import cpu

pytestmark = [pytest.mark.portable, pytest.mark.sanitized]

# A fork beside other threads is a thing to be warned of, and what is tested here.
WARNINGS = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
RULE = OptimiserChain(WeightDecay(0.1), ClipNorm(1.0), Adam())


@pytest.fixture(autouse=True)
def _settings():
    """Leave the settings of the kernels as they were."""
    *_, traffic = cpu.kernels.settings()
    yield
    cpu.kernels.set_work_per_thread(traffic)
    set_num_threads(0)


def model_of(k):
    """Return a model and a state whose leaves go every way through the engine."""
    model = {
        "long": normal(20_000 + k, np.float32, k),
        "double": normal((33, 7), np.float64, k),
        "mixed": normal(300, np.float16, k),
        "arrays": normal((5, 4), np.float16, k),
    }
    state = setup(RULE, model)
    state["mixed"] = setup(MixedPrecision(OptimiserChain(AccumGrad(2), RULE)), model["mixed"])
    return state, model


GRADIENTS = [
    {name: normal(x.shape, x.dtype, 100 + k) for name, x in model_of(0)[1].items()}
    for k in range(5)
]


def gradient(model, step):
    grad = dict(GRADIENTS[step % len(GRADIENTS)])
    grad["long"] = np.resize(grad["long"], model["long"].shape)
    return grad


def train(state, model, steps):
    for step in steps:
        update_(state, model, gradient(model, step))


def together(workers):
    """Run functions in threads of their own; raise what they raise."""
    errors = []

    def caught(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(work,)) for work in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.races
@parametrize("threads", [1, 3])
def test_threads_on_models_of_their_own(threads, seconds):
    """Eight train for as long as they may; then each is trained alone for as many steps."""
    set_num_threads(threads)
    cpu.kernels.set_work_per_thread(1000)
    end = time.monotonic() + seconds
    taken = [0] * 8
    trained = [model_of(k) for k in range(8)]

    def work(k):
        while time.monotonic() < end:
            train(*trained[k], [taken[k]])
            taken[k] += 1

    together([lambda k=k: work(k) for k in range(8)])
    assert min(taken) > 0
    set_num_threads(1)
    for k in range(8):
        alone = model_of(k)
        train(*alone, range(taken[k]))
        assert_same_bits(trained[k], alone)


@pytest.mark.racy
@parametrize("threads", [1, 3])
def test_threads_on_one_model_do_no_harm_but_to_the_model(threads, seconds):
    """Without a lock the numbers may be any, but shapes and dtypes stay and nothing crashes."""
    set_num_threads(threads)
    cpu.kernels.set_work_per_thread(1000)
    state, model = model_of(0)
    end = time.monotonic() + seconds

    def work():
        step = 0
        while time.monotonic() < end:
            train(state, model, [step])
            step += 1

    together([work] * 4)
    _, fresh = model_of(0)
    assert {k: (x.shape, x.dtype) for k, x in model.items()} == {
        k: (x.shape, x.dtype) for k, x in fresh.items()
    }
    train(state, model, range(2))  # and it can still be trained


@pytest.mark.races
@parametrize("threads", [1, 3])
def test_threads_on_one_model_that_take_turns(threads):
    """With a lock around the call there is nothing to see of the threads."""
    set_num_threads(threads)
    cpu.kernels.set_work_per_thread(1000)
    state, model = model_of(0)
    lock, steps = threading.Lock(), iter(range(60))

    def work():
        while True:
            with lock:
                step = next(steps, None)
                if step is None:
                    return
                train(state, model, [step])

    together([work] * 4)
    alone = model_of(0)
    train(*alone, range(60))
    assert_same_bits([state, model], list(alone))


# --- in processes of their own ---------------------------------------------------------------


def run(code, **environment):
    """Run code, which has this file's names at hand, in a new interpreter; return its output."""
    start = "import os, sys, threading\nfrom test_threads import *\nfrom test_threads import cpu\n"
    done = subprocess.run(
        [sys.executable, *WARNINGS, "-c", start + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


@pytest.mark.races
@parametrize("kilobytes", [128, 256])
def test_threads_of_python_with_a_small_stack(kilobytes):
    said = run(
        f"""
        threading.stack_size({kilobytes} * 1024)
        set_num_threads(1)
        together([lambda: train(*model_of(0), range(3))])
        print("trained")
        """
    )
    assert said == "trained\n"


@pytest.mark.races
def test_threads_of_the_kernels_with_a_small_stack():
    said = run(
        """
        threading.stack_size(64 * 1024)
        set_num_threads(3)
        cpu.kernels.set_work_per_thread(1000)
        train(*model_of(0), range(3))
        print("trained")
        """
    )
    assert said == "trained\n"


@pytest.mark.races
@FORKS_WITH_THREADS
@parametrize("busy", [False, True])
def test_a_fork_in_the_middle_of_training(busy):
    """Parent and child go on from where they are, also while another thread is at an update."""
    said = run(
        f"""
        set_num_threads(3)
        cpu.kernels.set_work_per_thread(1000)
        alone = model_of(0)
        train(*alone, range(40))
        stop = threading.Event()

        def other():
            state, model = model_of(1)
            while not stop.is_set():
                train(state, model, range(3))

        thread = threading.Thread(target=other)
        if {busy}:
            thread.start()
        for _ in range(5):
            state, model = model_of(0)
            train(state, model, range(20))
            child = os.fork()
            train(state, model, range(20, 40))
            assert_same_bits([state, model], list(alone))
            if child == 0:
                os._exit(0)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), end=" ")
        stop.set()
        if {busy}:
            thread.join()
        """
    )
    assert said.split() == ["0"] * 5
