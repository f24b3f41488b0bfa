"""Gradients with NaN or infinity in them: let through, passed by, or raised."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from util import BOTH, arrays_in, assert_same_bits, beginning_at, bits, normal, parametrize

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    MixedPrecision,
    OptimiserChain,
    Rule,
    adjust,
    freeze_,
    get_num_threads,
    set_num_threads,
    setup,
    update,
    update_,
)
from optimisers._engine import cpu
from optimisers.io import load, save

pytestmark = pytest.mark.sanitized

BAD = np.nan, np.inf, -np.inf
DTYPES = "f4", "f8", "f2", "c8", "g", ">f4", "bfloat16"
SIZES = (), 1, 31, 33, 16384, 16385, 100_001


def dtype_of(name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return np.dtype(name)


class Halving(Rule):
    """A rule that no kernel knows."""

    def init(self, x):
        return 0

    def apply(self, state, x, dx):
        return state + 1, dx / 2


def snapshot(*trees):
    return [(place, bits(a)) for tree in trees for place, a in arrays_in(tree)]


def spoiled(g, value, at):
    g = g.copy()
    g.reshape(-1)[at] = value
    return g


@pytest.fixture(params=[1, 3])
def _threads(request):
    traffic = cpu.kernels.settings()[-1]
    set_num_threads(request.param)
    cpu.kernels.set_work_per_thread(1)
    yield
    set_num_threads(0)
    cpu.kernels.set_work_per_thread(traffic)
    assert get_num_threads() >= 1


def nonfinite(g, master, x=None):
    """Return what the kernels say about a gradient, for a rule with a master or without."""
    rule = MixedPrecision(master, Descent()) if master else Descent()
    x = np.zeros_like(g) if x is None else x
    batch = cpu.kernels.Batch()
    assert batch.gather([setup(rule, x)], [x], [g], cpu.lower) == []
    return batch.nonfinite()


# --- what is found ---------------------------------------------------------------------------


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("name", "master"),
    [
        ("f4", None), ("f8", None), ("f2", "f4"), ("bfloat16", "f4"),
        ("f4", "f4"), ("f4", "f8"), ("f8", "f8"),
    ],
)  # fmt: skip
@parametrize("size", SIZES)
def test_one_number_anywhere_is_found(name, size, master):
    """The kernels look at every number: first, last, either side of a block."""
    dtype = dtype_of(name)
    g = normal(size, np.float32).astype(dtype)
    assert nonfinite(g, master) == []
    for at in {0, g.size // 2, g.size - 1, min(16383, g.size - 1), min(16384, g.size - 1)}:
        for value in BAD:
            bad = spoiled(g, value, at)
            assert nonfinite(bad, master) == [0]


@pytest.mark.usefixtures("_threads")
@parametrize("byte", [0, 4, 16, 60])
def test_one_number_is_found_wherever_blocks_begin(byte):
    x = beginning_at(byte, np.zeros(4 * cpu.kernels.settings()[0] + 5, "f4"))
    g = np.zeros_like(x)
    assert nonfinite(g, None, x) == []
    for at in range(x.size):
        g[at] = np.nan
        assert nonfinite(g, None, x) == [0]
        g[at] = 0


@parametrize("name", DTYPES)
def test_large_numbers_are_not_taken_for_infinity(name):
    dtype = dtype_of(name)
    kind = np.float32 if name == "bfloat16" else dtype.newbyteorder("=").type(0).real.dtype
    top = 3e38 if name == "bfloat16" else np.finfo(kind).max
    x = np.zeros(40, dtype)
    g = np.full(40, top).astype(dtype)
    state = setup(Descent(), x)
    update_(state, x, g, on_nonfinite="raise")
    assert state.skipped == 0


@BOTH
@parametrize("name", DTYPES)
@parametrize("value", BAD)
def test_a_gradient_is_passed_by(call, name, value):
    dtype = dtype_of(name)
    rule = Adam()
    model = {"good": normal(70, np.float32).astype(dtype), "bad": np.ones(70, dtype)}
    grad = {"good": np.ones(70, dtype), "bad": spoiled(np.ones(70, dtype), value, 60)}
    state = setup(rule, model)
    state, model = call(state, model, {"good": grad["good"], "bad": np.ones(70, dtype)})
    expected = copy.deepcopy((state, model))
    expected = call(*expected, {"good": grad["good"], "bad": None})
    state, model = call(state, model, grad, on_nonfinite="skip")
    assert snapshot(state, model) == snapshot(*expected)
    assert (state["good"].skipped, state["bad"].skipped) == (0, 1)


@BOTH
@parametrize(
    "rule",
    [
        Descent(),
        OptimiserChain(ClipNorm(), Adam()),
        OptimiserChain(AccumGrad(2), Adam()),
        MixedPrecision(Adam()),
        Halving(),
    ],
)
def test_every_kind_of_rule(call, rule):
    dtype = np.float16 if isinstance(rule, MixedPrecision) else np.float32
    model = {"a": np.ones(50, dtype), "b": np.ones((2, 3), dtype)}
    bad = {"a": spoiled(np.ones(50, dtype), np.nan, 49), "b": np.ones((2, 3), dtype)}
    state = setup(rule, model)
    expected = call(copy.deepcopy(state), copy.deepcopy(model), {"b": bad["b"]})
    state, model = call(state, model, bad, on_nonfinite="skip")
    assert snapshot(state, model) == snapshot(*expected)
    assert state["a"].skipped == 1


@parametrize("grad", [[1, 2], np.array([1.0, np.inf])])
def test_gradients_that_are_cast(grad):
    """What counts is the number that the rule would see."""
    x = np.zeros(2, np.float32)
    state = setup(Descent(), x)
    g = np.array(grad)
    update_(state, x, g, on_nonfinite="skip")
    assert state.skipped == int(g.dtype == float)
    update_(state, x, np.array([1.0, 1e300]), on_nonfinite="skip")  # too large for float32
    assert state.skipped == 1 + int(g.dtype == float)


# --- raising ---------------------------------------------------------------------------------


@BOTH
def test_raising_names_the_path_and_changes_nothing(call):
    model = {"layers": [np.ones(5), np.ones((3, 3), np.float32), np.ones(4, np.float16)]}
    state = setup(Adam(), model)
    good = {"layers": [np.ones(5), np.ones((3, 3)), np.ones(4)]}
    before = snapshot(state, model)
    for k, x in enumerate(good["layers"]):
        bad = copy.deepcopy(good)
        bad["layers"][k] = spoiled(x, np.nan, -1)
        with pytest.raises(FloatingPointError, match=rf"gradient at \['layers'\]\[{k}\]: expected"):
            call(state, model, bad, on_nonfinite="raise")
        assert snapshot(state, model) == before
    two = {"layers": [np.full(5, np.inf), None, np.full(4, np.nan)]}
    with pytest.raises(FloatingPointError, match=r"\[0\] and 1 other places"):
        call(state, model, two, on_nonfinite="raise")
    assert snapshot(state, model) == before


def test_what_nobody_looks_at():
    model = {"a": np.ones(2), "frozen": np.ones(2), "none": np.ones(2)}
    state = setup(Descent(), model)
    freeze_(state["frozen"])
    grad = {"a": np.ones(2), "frozen": np.full(2, np.nan), "none": None}
    update_(state, model, grad, on_nonfinite="raise")
    assert state["frozen"].skipped == 0


def test_the_other_errors_come_as_before():
    x = np.ones(3, np.float32)
    state = setup(Descent(), x)
    for g, error in [(np.full(2, np.nan), ValueError), ("nan", TypeError), (1j * x, TypeError)]:
        with pytest.raises(error, match="expected an array of shape"):
            update_(state, x, g, on_nonfinite="skip")
    assert state.skipped == 0


def test_an_unknown_way():
    with pytest.raises(ValueError, match="one of 'ignore', 'skip', 'raise'; got 'warn'"):
        update_(setup(Descent(), np.ones(1)), np.ones(1), np.ones(1), on_nonfinite="warn")


def test_ignoring_lets_it_through():
    x = np.ones(2)
    update_(setup(Descent(), x), x, np.array([1.0, np.nan]))
    assert np.isnan(x[1])
    assert x[0] == 0.9


# --- higher derivatives, ties ----------------------------------------------------------------


def test_higher_derivatives_count_too():
    x = np.ones(2)
    state = setup(Halving(), x)
    update_(state, x, np.ones(2), np.array([1.0, np.nan]), on_nonfinite="skip")
    assert (state.skipped, state.state) == (1, 0)


@BOTH
def test_a_tied_parameter_is_passed_by_at_all_its_places(call):
    w = normal((3, 2), np.float32)
    model = {"a": w, "b": w.T, "c": np.ones(2)}
    state = setup(Adam(), model)
    old = w.copy()
    grad = {"a": np.ones((3, 2)), "b": spoiled(np.ones((2, 3)), np.inf, 1), "c": np.ones(2)}
    state, model = call(state, model, grad, on_nonfinite="skip")
    assert state["a"] is state["b"]
    assert state["a"].skipped == 1
    assert_same_bits(model["a"], old)
    assert np.shares_memory(model["a"], model["b"])
    assert model["c"][0] < 1


@BOTH
def test_separate_arrays_of_one_leaf_stay(call):
    model = {"a": np.ones(3), "b": np.zeros(3)}
    leaf = setup(Descent(), model["a"])
    state, grad = {"a": leaf, "b": leaf}, {"a": np.full(3, np.nan)}
    state, model = call(state, model, grad, on_nonfinite="skip")
    assert (model["a"][0], model["b"][0], state["b"].skipped) == (1, 0, 1)


# --- the count -------------------------------------------------------------------------------


def test_the_count_goes_wherever_a_leaf_goes(tmp_path):
    x = np.ones(2)
    state = setup(Adam(), x)
    for n in range(1, 4):
        state, x = update(state, x, np.full(2, np.nan), on_nonfinite="skip")
        assert state.skipped == n
    assert repr(state).endswith("t=array(0)), skipped=3)")
    save(tmp_path / "run.safetensors", state)
    for other in (
        copy.copy(state),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        adjust(state, 0.1),
        load(tmp_path / "run.safetensors"),
        load(tmp_path / "run.safetensors", like=setup(Adam(), x)),
    ):
        assert other.skipped == 3


# --- other libraries -------------------------------------------------------------------------


@BOTH
def test_tensors(call):
    torch = pytest.importorskip("torch")
    model = {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.bfloat16)}
    state = setup(Adam(0.1), model)
    bad = {"a": torch.tensor([1, torch.nan, 1]), "b": torch.tensor([1, torch.inf, 1])}
    state, model = call(state, model, bad, on_nonfinite="skip")
    assert (state["a"].skipped, state["b"].skipped) == (1, 1)
    assert all(bool((x == 1).all()) for x in model.values())
    with pytest.raises(FloatingPointError, match=r"\['a'\] and 1 other"):
        call(state, model, bad, on_nonfinite="raise")
    good = {"a": torch.ones(3), "b": torch.ones(3)}
    state, model = call(state, model, good, on_nonfinite="raise")
    assert all(bool((x < 1).all()) for x in model.values())


def test_jax():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones(3)
    state = setup(Adam(), x)
    state, y = update(state, x, jax.numpy.array([1, jax.numpy.nan, 1]), on_nonfinite="skip")
    assert state.skipped == 1
    assert bool((y == 1).all())

    @jax.jit
    def step(state, x, g):
        return update(state, x, g, on_nonfinite="skip")

    with pytest.raises(TypeError, match="cannot look at numbers while JAX traces"):
        step(state, x, x)
