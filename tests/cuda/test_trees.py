"""Trees with device arrays: ties, freezing, mixed devices, what is refused, the flat vector.

Runs on a GPU and in Numba's simulator.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda")

from device import SIMULATED, device, host, host_state, needs_a_device
from util import BOTH, assert_near, assert_same_bits, normal, step

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    ElementwiseRule,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    adjust,
    adjust_,
    destructure,
    freeze_,
    isnumeric,
    maywrite,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)
from optimisers._cuda import launch as _launch
from optimisers._steps.grammar import StepError
from optimisers.words import sqrt

pytestmark = [
    pytest.mark.simulated,
    needs_a_device,
    pytest.mark.usefixtures("small_grid"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def a_model(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {"w": normal((4, 3), dtype, seed), "b": normal((3,), dtype, seed + 50)}


def run_on_both(rule: Any, call: Any, change: Any = lambda state: state) -> tuple[Any, Any]:
    """Return models of host and device after four steps, with a change in between."""
    here = a_model(0)
    there = device(here)
    state_here, state_there = setup(rule, here), setup(rule, there)
    for seed in range(1, 5):
        if seed == 3:
            state_here = change(state_here) or state_here
            state_there = change(state_there) or state_there
        grad = a_model(seed)
        state_here, here = call(state_here, here, grad)
        state_there, there = call(state_there, there, device(grad))
    return here, host(there)


# --- a device array is a parameter like any other ----------------------------------------------


def test_they_are_parameters() -> None:
    x = device(np.ones(3))
    assert isnumeric(x)
    assert maywrite(x)
    assert not isnumeric(device(np.arange(3)))
    assert [a is x for a in trainables({"x": x, "n": device(np.arange(3))})] == [True]


def test_state_lives_where_the_parameter_does_but_for_counts() -> None:
    x = device(normal((2, 3), np.float32))
    m, v, t = setup(Adam(), x).state
    for slot in (m, v):
        assert type(slot) is type(x)
        assert (tuple(slot.shape), slot.dtype) == ((2, 3), np.dtype("float32"))
        assert not host(slot).any()
    assert type(t) is np.ndarray


@BOTH
def test_freezing_and_adjusting(call: Any) -> None:
    assert_near(*run_on_both(Adam(), call, lambda state: freeze_(state["w"])))
    assert_near(*run_on_both(Adam(), call, lambda state: adjust_(state["b"], 0.5)))
    assert_near(*run_on_both(Adam(), call, lambda state: adjust(state, 0.5)))


def test_thawing() -> None:
    x = device(np.ones(3))
    state = setup(Descent(1.0), {"x": x})
    freeze_(state)
    update_(state, {"x": x}, {"x": device(np.ones(3))})
    np.testing.assert_array_equal(host(x), 1)
    thaw_(state)
    update_(state, {"x": x}, {"x": device(np.ones(3))})
    np.testing.assert_array_equal(host(x), 0)


@BOTH
def test_a_missing_gradient_is_no_step(call: Any) -> None:
    model = device(a_model(0))
    state = setup(Adam(), model)
    state, new = call(state, model, {"w": device(a_model(1)["w"])})
    np.testing.assert_array_equal(host(new["b"]), a_model(0)["b"])
    assert int(state["b"].state.t) == 0
    assert int(state["w"].state.t) == 1


def test_update_shares_nothing_with_what_it_was_given() -> None:
    model = device(a_model(0))
    state = setup(OptimiserChain(AccumGrad(2), Adam()), model)
    before = host_state(state["w"].state)
    new_state, new = update(state, model, {"w": device(a_model(1)["w"])})
    for k in model:
        new[k][...] = 7.0
        np.testing.assert_array_equal(host(model[k]), a_model(0)[k])
    new_state["w"].state[0].sum[...] = 7.0
    new_state["b"].state[1].m[...] = 7.0
    assert_same_bits(host_state(state["w"].state), before)
    assert not host(state["b"].state[1].m).any()


@BOTH
@pytest.mark.parametrize("shape", [(4, 6), (6,), (1, 5), ()])
def test_layouts(shape: tuple[int, ...], call: Any) -> None:
    """C and Fortran order are taken as they lie; gradients in another order are copied first."""
    for order in "CF":
        for order_of_g in "CF":
            x, g = normal(shape, np.float32, 1), normal(shape, np.float32, 2)
            there = device(np.array(x, order=order))
            state = setup(Adam(), there)
            state, there, used = step(call, state, there, device(np.array(g, order=order_of_g)))
            _, here = update(setup(Adam(), x), x, g)
            assert used == {"(root)": "cuda"}
            assert_near({"x": host(there)}, {"x": here})


@BOTH
def test_parameters_with_gaps_between_their_elements(call: Any) -> None:
    room = device(normal((8, 6), np.float32))
    before = host(room)
    x = room[::2]
    g = normal((4, 6), np.float32, 1)
    state = setup(Descent(1.0), x)
    state, new, used = step(call, state, x, device(g))
    assert used == {"(root)": "cuda"}
    np.testing.assert_allclose(host_of_view(new), before[::2] - g)
    after = host(room)
    np.testing.assert_array_equal(after[1::2], before[1::2])
    np.testing.assert_allclose(after[::2], before[::2] - g if call is update_ else before[::2])


def host_of_view(x: Any) -> np.ndarray:
    whole = device(np.zeros(tuple(x.shape), x.dtype))
    whole[...] = x
    return np.asarray(host(whole))


# --- ties ------------------------------------------------------------------------------------


@BOTH
def test_one_array_at_two_places(call: Any) -> None:
    w = device(np.ones((2, 3)))
    model = {"encoder": w, "decoder": w}
    state = setup(Momentum(1.0), model)
    assert state["encoder"] is state["decoder"]
    grad = {"encoder": device(np.ones((2, 3))), "decoder": device(np.full((2, 3), 2.0))}
    state, model = call(state, model, grad)
    assert model["encoder"] is model["decoder"]
    np.testing.assert_array_equal(host(model["encoder"]), -2)
    assert state["encoder"] is state["decoder"]


@BOTH
def test_two_views_of_one_array(call: Any) -> None:
    w = device(np.zeros((2, 3)))
    model = {"matrix": w, "vector": w.reshape(6)}
    state = setup(Descent(1.0), model)
    assert state["matrix"] is state["vector"]
    grad = {"matrix": device(np.ones((2, 3))), "vector": device(np.arange(6.0))}
    _, model = call(state, model, grad)
    expected = -(1 + np.arange(6.0))
    np.testing.assert_array_equal(host(model["vector"]), expected)
    np.testing.assert_array_equal(host(model["matrix"]), expected.reshape(2, 3))
    assert len(trainables(model)) == 1


def test_views_that_overlap_in_part_are_refused() -> None:
    v = device(np.zeros(6))
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] overlap in memory"):
        setup(Descent(), {"a": v[:4], "b": v[2:]})


def test_parameters_that_came_to_overlap_are_refused() -> None:
    v = device(np.zeros(6))
    state = setup(Descent(), {"a": v[:3], "b": v[3:]})
    grad = {"a": device(np.ones(3)), "b": device(np.ones(3))}
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] overlap in memory"):
        update_(state, {"a": v[:3], "b": v[2:5]}, grad)
    np.testing.assert_array_equal(host(v), 0)


def test_a_count_of_two_leaves_is_refused() -> None:
    model = {"a": device(np.ones(3)), "b": device(np.ones(3))}
    state = setup(Adam(), model)
    state["b"].state = state["b"].state._replace(t=state["a"].state.t)
    grad = {"a": device(np.ones(3)), "b": device(np.ones(3))}
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] overlap in memory"):
        update_(state, model, grad)
    np.testing.assert_array_equal(host(model["a"]), 1)


def test_a_gradient_in_memory_that_is_written_is_read_before() -> None:
    x, y = device(np.arange(4.0)), device(np.arange(4.0) + 10)
    model = {"x": x, "y": y}
    update_(setup(Descent(1.0), model), model, {"x": y, "y": x})
    np.testing.assert_array_equal(host(x), -10)
    np.testing.assert_array_equal(host(y), 10)
    update_(setup(Descent(1.0), x), x, x)
    np.testing.assert_array_equal(host(x), 0)


# --- host and device -------------------------------------------------------------------------


@BOTH
def test_each_is_updated_where_it_lives(call: Any) -> None:
    model = {"host": np.ones(3), "device": device(np.ones(3)), "complex": np.ones(3, complex)}
    state = setup(Adam(1.0), model)
    grad = {"host": np.ones(3), "device": device(np.ones(3)), "complex": np.ones(3, complex)}
    state, model, used = step(call, state, model, grad)
    assert used == {"['host']": "kernels", "['device']": "cuda", "['complex']": "arrays"}
    assert type(model["host"]) is np.ndarray
    np.testing.assert_array_equal(host(model["device"]), model["host"])


@pytest.mark.parametrize(
    ("x", "g", "error", "message"),
    [
        (
            "device",
            "host",
            ValueError,
            r"gradient at \['w'\].*on GPU 0, got one on the host \(numpy",
        ),
        (
            "host",
            "device",
            ValueError,
            r"gradient at \['w'\].*on the host, got one of Numba on GPU",
        ),
        ("device", "short", ValueError, r"gradient at \['w'\].*\(3,\).*got shape \(2,\)"),
        ("device", "complex", TypeError, r"gradient at \['w'\].*got complex numbers"),
        ("device", "text", TypeError, r"gradient at \['w'\].*got 'one'"),
    ],
)
def test_gradients_that_do_not_fit(x: str, g: str, error: type[Exception], message: str) -> None:
    ones = np.ones(3, np.float32)
    here = {"device": device(ones), "host": ones, "short": device(np.ones(2)), "text": "one"}
    here["complex"] = device(np.ones(3, complex))
    model = {"v": device(np.ones(2)), "w": here[x]}
    state = setup(Momentum(1.0), model)
    with pytest.raises(error, match=message):
        update_(state, model, {"v": device(np.ones(2)), "w": here[g]})
    np.testing.assert_array_equal(host(model["v"]), 1)


# --- rules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halved(ElementwiseRule):
    """A user's rule."""

    eta: float = 0.5

    slots = ("v",)

    def coefs(self, t):
        return self.eta / t, 0.5

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        eta, half = coefs
        v = half * v + dx
        return eta * v / (sqrt(v * v) + half), (v,)


@BOTH
def test_rules_of_users(call: Any) -> None:
    assert_near(*run_on_both(Halved(), call))
    assert_near(*run_on_both(OptimiserChain(ClipNorm(1.0), Halved(), Momentum()), call))


@dataclass(frozen=True)
class Wrong(ElementwiseRule):
    @staticmethod
    def step(x, dx, state, coefs):
        return 0.5 * dx, ()


def test_a_step_that_is_not_in_the_language_is_refused() -> None:
    x = device(np.ones(3))
    with pytest.raises(StepError, match=r"the number 0\.5 belongs into coefs"):
        update_(setup(Wrong(), x), x, device(np.ones(3)))
    np.testing.assert_array_equal(host(x), 1)


class Plain(Rule):
    def apply(self, state: Any, x: Any, dx: Any, *higher: Any) -> Any:
        return state, dx


@pytest.mark.parametrize(
    ("rule", "dtype"), [(Plain(), "float32"), (Descent(), "float16"), (Descent(), "complex64")]
)
def test_what_no_kernel_takes_is_refused_with_the_way_out(rule: Any, dtype: str) -> None:
    model = {"v": device(np.ones(2, np.float32)), "w": device(np.ones(3, dtype))}
    state = setup(rule, model)
    freeze_(state["v"])
    with pytest.raises(TypeError, match=r"at \['w'\].*cannot update an array of Numba.*CuPy or"):
        update_(state, model, {"w": device(np.ones(3, dtype))})


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "is_installed", lambda: False)
    model = {"w": device(np.ones(3))}
    state = setup(Descent(), model)
    with pytest.raises(
        ImportError, match=r"at \['w'\].*pip install 'optimisers\[cuda13\]'.*cuda12"
    ):
        update_(state, model, {"w": device(np.ones(3))})
    np.testing.assert_array_equal(host(model["w"]), 1)


def test_a_state_of_another_shape_is_refused() -> None:
    state = setup(Momentum(), device(np.ones(3)))
    with pytest.raises(TypeError, match="call setup anew"):
        update_(state, device(np.ones(4)), device(np.ones(4)))


# --- from step to step -------------------------------------------------------------------------


def test_what_a_leaf_keeps_is_not_used_for_other_arrays_rules_or_states() -> None:
    x, g = device(np.zeros(3)), device(np.ones(3))
    leaf = setup(Momentum(1.0, 0.5), x)
    update_(leaf, x, g)
    update_(leaf, x, g)
    np.testing.assert_array_equal(host(x), -2.5)
    y = device(np.zeros(3))
    update_(leaf, y, g)  # another parameter
    np.testing.assert_array_equal(host(y), -1.75)
    np.testing.assert_array_equal(host(x), -2.5)
    adjust_(leaf, 2.0)  # another rule
    update_(leaf, y, g)
    np.testing.assert_array_equal(host(y), -1.75 - 0.875 - 2)
    leaf.state = setup(Momentum(), y).state  # another state
    update_(leaf, y, g)
    np.testing.assert_array_equal(host(y), -1.75 - 0.875 - 2 - 2)
    update_(leaf, y, device(np.full(3, 4.0)))  # another gradient
    np.testing.assert_array_equal(host(y), -1.75 - 0.875 - 2 - 2 - 1 - 8)


def test_what_a_leaf_keeps_keeps_no_parameter_and_no_gradient_alive() -> None:
    x, g = device(np.zeros(3)), device(np.ones(3))
    leaf = setup(Adam(), x)
    update_(leaf, x, g)
    gone = weakref.ref(x), weakref.ref(g)
    del x, g
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_models_by_turns() -> None:
    """Each finds its tables on the device, and none the other's."""
    models = [device(np.full(5, float(k))) for k in range(6)]
    leaves = [setup(Descent(1.0), x) for x in models]
    g = device(np.ones(5))
    for _ in range(3):
        for leaf, x in zip(leaves, models, strict=True):
            update_(leaf, x, g)
    for k, x in enumerate(models):
        np.testing.assert_array_equal(host(x), k - 3)


# --- the flat vector -------------------------------------------------------------------------


def test_the_flat_vector_is_seen_by_the_model() -> None:
    here = {
        "w": normal((4, 3)),
        "b": normal((3,), seed=1),
        "s": np.asarray(2.0),
        "e": np.ones((0, 2)),
    }
    flat, re = destructure(device(here))
    expected, _ = destructure(here)
    assert type(flat) is type(device(expected))
    np.testing.assert_array_equal(host(flat), expected)
    model = re(flat)
    for k, x in here.items():
        assert tuple(model[k].shape) == x.shape
        np.testing.assert_array_equal(host(model[k]), x)
    state = setup(Adam(0.1), flat)
    gradient = re.flatten_gradient({"w": device(np.ones((4, 3))), "b": None})
    np.testing.assert_array_equal(host(gradient), [1.0] * 12 + [0.0] * 4)
    update_(state, flat, gradient)
    np.testing.assert_allclose(host(model["w"]), here["w"] - 0.1)
    np.testing.assert_array_equal(host(model["b"]), here["b"])


def test_copies_of_the_flat_vector_are_apart() -> None:
    flat, re = destructure(device({"a": np.ones(2), "b": np.zeros(3)}))
    model = re(flat, copy=True)
    flat[...] = 7.0
    np.testing.assert_array_equal(host(model["a"]), 1)


def test_models_of_mixed_dtypes_are_cast() -> None:
    here = {"a": np.arange(3, dtype=np.float32), "b": np.arange(2.0)}
    flat, re = destructure(device(here))
    assert flat.dtype == np.float64
    assert_same_bits(host(re(flat)), here)


def test_ties_in_the_flat_vector() -> None:
    w = device(np.arange(4.0))
    flat, re = destructure({"a": w, "b": w.reshape(2, 2)})
    assert tuple(flat.shape) == (4,)
    model = re(flat)
    update_(setup(Descent(1.0), flat), flat, device(np.ones(4)))
    np.testing.assert_array_equal(host(model["b"]), [[-1, 0], [1, 2]])
    gradient = {"a": device(np.ones(4)), "b": device(np.ones((2, 2)))}
    np.testing.assert_array_equal(host(re.flatten_gradient(gradient)), 2)


def test_writing_a_vector_into_a_model() -> None:
    model = device({"a": np.zeros(2), "b": np.zeros((2, 2))})
    flat, re = destructure(model)
    re.copy_into_(model, device(np.arange(6.0)))
    np.testing.assert_array_equal(host(model["b"]), [[2, 3], [4, 5]])
    alike = re(flat)
    re.copy_into_(alike, flat)
    np.testing.assert_array_equal(host(alike["a"]), 0)


def test_a_master_is_made_on_the_device() -> None:
    x = device(np.ones(3, np.float16))
    master = setup(MixedPrecision(Adam()), x).state.master
    assert type(master) is type(x)
    assert master.dtype == np.float32
    np.testing.assert_array_equal(host(master), 1)


def test_the_simulator_is_what_it_says() -> None:
    from optimisers._cuda.words import is_simulated

    assert is_simulated() is SIMULATED
