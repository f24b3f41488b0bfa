"""Faults in the middle of a call: model and state are as before, or the call has done all it does.

An interrupt (Ctrl-C) can come between any two instructions of Python, and an allocation can fail
wherever there is one. So the tests do not try their luck: they have the n-th of them fail, for
each n that there is.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from util import arrays_in, bits, parametrize

import optimisers
from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    adjust_,
    destructure,
    freeze_,
    setup,
    thaw_,
    update,
    update_,
)
from optimisers._trees.walks import walk

LIBRARY = str(Path(optimisers.__file__).parent)


def content(tree):
    """Return all that a call may change: arrays bit by bit, rules, what is frozen or skipped."""
    found = [x for _, x in walk(tree) if hasattr(x, "frozen")]
    leaves = [(repr(x.rule), x.frozen, x.skipped) for x in found]
    return [(place, bits(a)) for place, a in arrays_in(tree)], leaves


# --- interrupts ------------------------------------------------------------------------------


def interrupted(call, n):
    """Make a call, with Ctrl-C before its n-th instruction within the library.

    Return how many instructions it came to.
    """
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if event == "call":
            if not frame.f_code.co_filename.startswith(LIBRARY):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            seen += 1
            if seen == n:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert seen == n
    finally:
        sys.settrace(before)
    return seen


def instructions(call, interrupts):
    """Return which instructions of a call to interrupt: some everywhere, and most of the last."""
    total = interrupted(call, 0)
    last = max(1, total - interrupts)
    found = {*np.linspace(1, last, interrupts, dtype=int), *range(last, total + 1, 2)}
    return sorted(map(int, found))


def sweep(make, call, interrupts, seen=content):
    """Interrupt a call at many of its instructions: it has done nothing then, or all.

    `make` gives what it changes, anew each time, and `seen` what that holds.
    """
    call(*make())  # what is done once
    objects = make()
    before = seen(objects)
    where = instructions(lambda: call(*objects), interrupts)
    after = seen(objects)
    assert before != after
    found = []
    for n in where:
        objects = make()
        interrupted(lambda made=objects: call(*made), n)
        found.append(seen(objects))
        assert found[-1] in (before, after), f"half done, interrupted at instruction {n}"
    assert found[0] == before
    assert found[-1] == after


def trainable():
    """Return state, model and gradient with something for each way that an update can take."""
    w = np.ones((2, 3))
    model = {
        "kernels": np.ones(5),
        "arrays": [np.ones(3, np.float16), np.ones((4, 4))[:, ::2]],
        "mixed": np.ones(3, np.float16),
        "tied": w,
        "view": w.T,
        "apart": np.ones((2, 3)),
    }
    rule = OptimiserChain(ClipNorm(1.0), Adam(0.1))
    state = setup(rule, model)
    state["mixed"] = setup(MixedPrecision(rule), model["mixed"])
    state["apart"] = state["tied"]
    grad = {
        "kernels": np.ones(5),
        "arrays": [np.ones(3), np.ones((4, 2))],
        "mixed": np.ones(3),
        "tied": np.ones((2, 3)),
        "view": None,
        "apart": None,
    }
    return state, model, grad


def test_an_interrupted_update_is_whole_or_not_begun(interrupts):
    sweep(trainable, update_, interrupts)


@parametrize("spoilt", ["kernels arrays tied", "apart", "arrays mixed"])
def test_an_interrupted_step_counts_all_that_it_skips_or_nothing(spoilt, interrupts):
    """Beside leaves that move; also where several leaves stand for one that is tied."""

    def make():
        state, model, grad = trainable()
        for name in spoilt.split():
            each = grad[name] if isinstance(grad[name], list) else [grad[name]]
            grad[name] = [np.full(np.shape(model[name][k]), np.nan) for k in range(len(each))]
            grad[name] = grad[name] if name == "arrays" else np.full(model[name].shape, np.nan)
        return state, model, grad

    def call(*objects):
        update_(*objects, on_nonfinite="skip")

    sweep(make, call, interrupts)


def test_an_interrupted_step_counts_in_each_leaf_that_jax_has_made_of_one(interrupts):
    jax = pytest.importorskip("jax")

    def make():
        w = np.ones(3)
        model = {"one": w, "other": np.ones(2), "again": w}
        state = jax.tree_util.tree_map(np.array, setup(Adam(0.1), model))
        for leaf in state.values():  # whose parts are put together when they are looked at
            assert leaf.rule == Adam(0.1)
            assert leaf.state.t == 0
        assert state["one"] is not state["again"]
        grad = {"one": np.full(3, np.nan), "other": np.ones(2), "again": None}
        return state, model, grad

    sweep(make, lambda *objects: update_(*objects, on_nonfinite="skip"), interrupts)


@parametrize("dtype", ["float32", "float16"])  # by the kernels, and by the array path
def test_an_interrupted_step_of_an_optimizer_is_whole_or_not_begun(dtype, interrupts):
    torch = pytest.importorskip("torch")
    from optimisers.torch._optimizer import Optimizer

    def make():
        torch.set_grad_enabled(True)  # between two instructions of `with`, nothing is undone
        ps = [torch.nn.Parameter(torch.ones(3, dtype=getattr(torch, dtype))) for _ in range(3)]
        for p in ps:
            p.grad = torch.ones_like(p)
        return ps, Optimizer(ps, Adam(0.1))

    def seen(objects):
        ps, optimizer = objects
        kept = [optimizer.state.get(p, {}) for p in ps]
        return str([p.tolist() for p in ps]), str(kept)

    sweep(make, lambda ps, optimizer: optimizer.step(), interrupts, seen)
    torch.set_grad_enabled(True)


# A callback that JAX has with Python's collector may be where the timer strikes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
@parametrize("on_nonfinite", ["ignore", "skip"])
def test_a_timer_interrupts_steps_that_are_whole_or_not_begun(on_nonfinite, kills):
    """Wherever it is: in Python, in the kernels, on the way from one to the other."""

    def make():
        state, model, grad = trainable()
        model["large"], grad["large"] = np.ones(100_000), np.ones(100_000)
        state["large"] = setup(Momentum(), model["large"])
        if on_nonfinite == "skip":
            grad["large"][-1] = grad["mixed"][-1] = np.nan
        return state, model, grad

    def interrupt(*_):
        raise KeyboardInterrupt

    whole = make()
    untouched = content(whole)
    start = time.perf_counter()
    update_(*whole, on_nonfinite=on_nonfinite)
    most = 2 * (time.perf_counter() - start)
    draw, stopped = np.random.default_rng(0), 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(kills):
            objects = make()
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, most))
                update_(*objects, on_nonfinite=on_nonfinite)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert content(objects) in (untouched, content(whole))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stopped


def test_an_interrupted_pure_update_touches_nothing(interrupts):
    objects = trainable()
    before = content(objects)
    for n in instructions(lambda: update(*objects), interrupts):
        interrupted(lambda: update(*objects), n)
        assert content(objects) == before


@parametrize("call", [freeze_, lambda state: adjust_(state, 0.5)])
def test_an_interrupted_change_of_many_leaves(call, interrupts):
    model = {k: np.ones(1) for k in "abcdefgh"}
    sweep(lambda: (setup(Momentum(), model),), call, interrupts)


def test_an_interrupted_thaw(interrupts):
    def make():
        state = setup(Momentum(), {k: np.ones(1) for k in "abc"})
        freeze_(state)
        return (state,)

    sweep(make, thaw_, interrupts)


def test_an_interrupted_copy_of_a_vector_into_a_model(interrupts):
    model = {"a": np.zeros(3), "b": [np.zeros(2, np.float32), np.zeros((2, 2), np.complex64)]}
    flat, re = destructure(model)
    sweep(lambda: (copy.deepcopy(model),), lambda m: re.copy_into_(m, flat + 1 + 2j), interrupts)


# --- a rule that raises ----------------------------------------------------------------------


@dataclass(frozen=True)
class Fuse(Rule):
    """Scribbles into its state, and raises when it has been called so often."""

    error: type[BaseException]
    left: list[int] = field(repr=False)

    def init(self, x):
        return {"seen": np.zeros_like(x)}

    def apply(self, state, x, dx):
        state["seen"] += dx
        self.left[0] -= 1
        if self.left[0] == 0:
            raise self.error("blown")
        return state, dx


@parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, SystemExit])
@parametrize("call", [update, update_])
def test_a_rule_that_raises_at_each_leaf_in_turn(error, call):
    """Among leaves of the kernels and of the array path, all of which are as they were."""
    for n in range(1, 7):
        left = [n]
        model = {k: np.ones(3, dtype) for k, dtype in enumerate(["f4", "f8", "f2"] * 4)}
        state = setup(Adam(), model)
        for k in list(model)[::2]:
            state[k] = setup(OptimiserChain(AccumGrad(1), Fuse(error, left)), model[k])
        fuses = [leaf.state[1] for leaf in list(state.values())[::2]]
        before = content([state, model, fuses])
        with pytest.raises(error, match="blown"):
            call(state, model, model)
        assert content([state, model, fuses]) == before


# --- no memory -------------------------------------------------------------------------------


def run(code, **environment):
    """Run code, which has this file's names at hand, in a new interpreter; return its output."""
    start = "import gc, resource\nfrom test_faults import *\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", start + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("_testcapi") is None, reason="this Python has no hooks for its memory"
)
@parametrize("name", ["update_", "update"])
def test_each_allocation_of_python_fails_in_turn(name):
    said = run(
        f"""
        import _testcapi
        call = {name}
        objects = trainable()
        before = content(objects)
        expected = update(*objects)
        gc.disable()
        failed = 0
        for n in range(20_000):
            _testcapi.set_nomemory(n, n + 1)
            try:
                call(*objects)
                went = True
            except (MemoryError, SystemError):  # NumPy raises the latter, of `x.strides`
                went = False
            finally:
                _testcapi.remove_mem_hooks()
            now = content(objects)
            whole = call is update_ and content([objects[0], objects[1]]) == content(list(expected))
            assert now == before or whole, n
            if went:
                break
            failed += 1
            if whole:
                objects = trainable()
        print(failed)
        """
    )
    assert int(said) > 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on memory")
def test_too_little_memory_for_large_arrays():
    """A refused call leaves all as it was, and goes well when there is memory again."""
    said = run(
        """
        def limited(call, megabytes):
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            most = used + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            try:
                return call()
            except MemoryError:
                print("refused", end=" ")
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

        optimisers.set_num_threads(1)
        n = 2 * 2**20                       # 8 MB, or 4
        model = {"a": np.ones(n, np.float32), "b": np.ones(n, np.float16)}
        grad = {"a": model["b"], "b": model["a"]}
        before = content(model)
        assert limited(lambda: setup(Adam(), model), 16) is None
        assert content(model) == before
        state = setup(Adam(), model)
        update_(state, model, grad)
        before = content([state, model])
        expected = content(list(update(state, model, grad)))
        for call in (update, update_):
            for room in range(1, 160, 4):
                gc.collect()
                done = limited(lambda: call(state, model, grad), room) is not None
                now = content([state, model])
                assert now == (expected if done and call is update_ else before), (call, room)
                if done:
                    print(call.__name__, end=" ")
                    break
        """,
        MALLOC_MMAP_THRESHOLD_="65536",  # so that memory that is freed is not kept for later
    )
    assert re.fullmatch("refused (refused )+update (refused )+update_ ", said), said
