"""Batches: one protocol for each backend, asked in turn, and one stroke for all of them."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from util import assert_same_bits, parametrize, step

from optimisers import Adam, ClipNorm, OptimiserChain, Rule, setup, update, update_
from optimisers._engine import advance as engine
from optimisers._engine.arrays import ArrayBatch
from optimisers._engine.batch import Batch
from optimisers._engine.cpu import KernelBatch

ASKED = sorted(name for name in vars(Batch) if name[0] != "_")


@parametrize("cls", [KernelBatch, ArrayBatch])
def test_a_batch_answers_all_that_is_asked(cls):
    assert {*ASKED} <= {*dir(cls), "name"}
    assert cls.name in ("kernels", "arrays")


def test_so_does_that_of_devices():
    pytest.importorskip("numba_cuda")
    cls = importlib.import_module("optimisers._cuda.batch").CudaBatch
    assert {*ASKED} <= {*dir(cls)}
    assert cls.name == "cuda"


def test_the_cuda_batch_is_not_loaded_for_arrays_of_the_host(monkeypatch):
    monkeypatch.setattr(engine, "cuda", None)
    model = {"a": np.ones(3), "b": np.ones(3, complex)}
    *_, used = step(update_, setup(Adam(), model), model, {"a": np.ones(3), "b": np.ones(3)})
    assert used == {"['a']": "kernels", "['b']": "arrays"}


def mixed():
    """Return a model for the kernels and for array code by turns."""
    dtypes = [np.float32, complex, np.float64, complex]
    return {name: np.arange(1, 4).astype(dtype) for name, dtype in zip("abcd", dtypes, strict=True)}


@parametrize("call", [update, update_])
@parametrize("bad", ["a", "b", "ab", "bc", "abcd"])
def test_bad_gradients_are_skipped_in_all_batches(call, bad):
    state, model, grad = setup(Adam(), mixed()), mixed(), mixed()
    for name in bad:
        grad[name][1] = np.nan
    state, model = call(state, model, grad, on_nonfinite="skip")
    others = {name: grad[name] for name in "abcd" if name not in bad}
    expected = update(setup(Adam(), mixed()), mixed(), others)
    assert_same_bits((state, model), expected)
    assert [state[name].skipped for name in "abcd"] == [name in bad for name in "abcd"]


@parametrize(("bad", "told"), [("bc", "'b'"), ("da", "'a'"), ("d", "'d'")])
def test_the_first_bad_gradient_of_all_batches_is_named(bad, told):
    grad = mixed()
    for name in bad:
        grad[name][1] = np.inf
    state, model = setup(Adam(), mixed()), mixed()
    with pytest.raises(FloatingPointError, match=rf"gradient at \[{told}\]"):
        update_(state, model, grad, on_nonfinite="raise")
    assert_same_bits((state, model), (setup(Adam(), mixed()), mixed()))


class Refuses(Rule):
    """A rule that raises once it is evaluated."""

    def apply(self, state, x, dx):
        raise ArithmeticError("not today")


@parametrize("first", ["kernels", "arrays"])
def test_a_batch_that_raises_leaves_the_others_unwritten(first):
    norm = OptimiserChain(ClipNorm(), Adam())
    rules = {"kernels": (Adam(), Refuses()), "arrays": (Refuses(), norm)}[first]
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = {name: setup(rule, model[name]) for name, rule in zip("ab", rules, strict=True)}
    with pytest.raises(ArithmeticError, match="not today") as raised:
        update_(state, model, {"a": np.ones(3), "b": np.full(3, np.inf)})
    assert "raised by" in raised.value.__notes__[0]
    for name, rule in zip("ab", rules, strict=True):
        assert_same_bits(model[name], np.ones(3))
        assert_same_bits(state[name].state, rule.init(np.ones(3)))


@parametrize("names", ["ab", "ba"])
def test_memory_that_two_batches_write_is_refused(names):
    memory = np.zeros(12, np.float32)
    both = {"a": memory[:4], "b": memory[2:6].view(np.complex64)}
    model = {name: both[name] for name in names}
    state = {name: setup(Adam(), x.copy()) for name, x in model.items()}
    grad = {name: np.ones(x.shape, x.dtype) for name, x in model.items()}
    with pytest.raises(ValueError, match=rf"'{names[0]}'\] and \['{names[1]}'\] overlap in memory"):
        update_(state, model, grad)
    assert not memory.any()
