"""Faults in the middle of a call: model and state are as before, or the call has done all it does.

An interrupt (Ctrl-C) can come between any two instructions of Python, and an allocation can fail
wherever there is one. So the tests do not try their luck: they have the n-th of them fail, for
each n that there is.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
from util import arrays_in, bits, parametrize

import optimisers
from optimisers import (
    Adam,
    ClipNorm,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    adjust_,
    destructure,
    freeze_,
    setup,
    thaw_,
    update,
    update_,
)
from optimisers._tree import walk

LIBRARY = str(Path(optimisers.__file__).parent)


def content(tree):
    """Return all that a call may change: arrays bit by bit, rules, what is frozen."""
    leaves = [(repr(x.rule), x.frozen) for _, x in walk(tree) if hasattr(x, "frozen")]
    return [(place, bits(a)) for place, a in arrays_in(tree)], leaves


# --- interrupts ------------------------------------------------------------------------------


def interrupted(call, n):
    """Make a call, with Ctrl-C before its n-th instruction within the library; tell if it came."""
    left = n

    def trace(frame, event, arg):
        nonlocal left
        if event == "call":
            if not frame.f_code.co_filename.startswith(LIBRARY):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            left -= 1
            if left == 0:
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


def sweep(make, call, stride=1):
    """Interrupt a call at each of its instructions; count what it was found to have left.

    `make` gives what it changes, anew each time.
    """
    objects = make()
    before = content(objects)
    call(*objects)
    after = content(objects)
    assert before != after
    found = {"before": 0, "after": 0}
    n = 1
    while interrupted(lambda: call(*objects), n) if (objects := make()) else None:
        now = content(objects)
        assert now in (before, after), f"half done, interrupted at instruction {n}"
        found["before" if now == before else "after"] += 1
        n += stride
    assert content(objects) == after
    return found


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


def test_an_interrupted_update_is_whole_or_not_begun():
    found = sweep(trainable, update_, stride=13)
    assert min(found.values()) > 10
    assert found["before"] > found["after"]


def test_an_interrupted_pure_update_touches_nothing():
    objects = trainable()
    before = content(objects)
    n = 1
    while interrupted(lambda: update(*objects), n):
        assert content(objects) == before
        n += 97
    assert n > 1000
    assert content(objects) == before


@parametrize("call", [freeze_, lambda state: adjust_(state, 0.5)])
def test_an_interrupted_change_of_many_leaves(call):
    model = {k: np.ones(1) for k in "abcdefgh"}
    found = sweep(lambda: (setup(Momentum(), model),), call)
    assert found["before"] > found["after"] > 0


def test_an_interrupted_thaw():
    def make():
        state = setup(Momentum(), {k: np.ones(1) for k in "abc"})
        freeze_(state)
        return (state,)

    assert min(sweep(make, thaw_).values()) > 0


def test_an_interrupted_copy_of_a_vector_into_a_model():
    model = {"a": np.zeros(3), "b": [np.zeros(2, np.float32), np.zeros((2, 2), np.complex64)]}
    flat, re = destructure(model)
    found = sweep(lambda: (copy.deepcopy(model),), lambda m: re.copy_into_(m, flat + 1 + 2j))
    assert found["before"] > found["after"] > 0
