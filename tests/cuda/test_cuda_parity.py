"""Device arrays of Numba against NumPy's: the same updates, from the registry.

Runs on a GPU, where results may differ in the last places since multiplications are fused with
additions, and in Numba's simulator, where they are the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda")

from device import SIMULATED, device, host, host_state, needs_a_device
from util import (
    BOTH,
    ELEMENTWISE,
    EVERY_ELEMENTWISE,
    EXACT_CHAINS,
    assert_near,
    assert_same_bits,
    assert_same_values,
    by_arrays,
    example,
    normal,
    parametrize,
    special_pairs,
    step,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    WeightDecay,
    adjust_,
    setup,
    update,
    update_,
    words,
)
from optimisers._cuda import launch as _launch
from optimisers._cuda.words import vocabulary

pytestmark = [
    pytest.mark.simulated,
    needs_a_device,
    pytest.mark.usefixtures("small_grid"),
    # Simulated numbers are NumPy's, which warn of what hardware does not mind.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

KERNEL_DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
SHAPES: list[Any] = [(), (0,), (1,), (3,), (7,), (8,), (9,), (2, 0), (3, 5)]

same_numbers = assert_same_bits if SIMULATED else assert_near


def numbers(dtype: Any, seed: int) -> dict[str, np.ndarray]:
    return {str(shape): normal(shape, dtype, seed) for shape in SHAPES}


def check_steps(call: Any, rule: Any, model: Any, gradients: Any, same: Any) -> None:
    """Take steps over a dictionary of device arrays, each compared with the array evaluation."""
    there = device(model)
    state = setup(rule, there)
    for grad in gradients:
        here = host(there)
        expected = {
            k: by_arrays(rule, host_state(state[k].state), x, grad[k]) for k, x in here.items()
        }
        state, there, used = step(call, state, there, device(grad))
        assert used == {f"[{k!r}]": "cuda" for k in model}
        same(
            {k: host_state(leaf.state) for k, leaf in state.items()},
            {k: e[0] for k, e in expected.items()},
        )
        same(host(there), {k: e[1] for k, e in expected.items()})


EACH = pytest.mark.parametrize(("dtype", "call"), [("float32", update_), ("float64", update)])


@pytest.mark.slow
@EACH
@parametrize("rule", EVERY_ELEMENTWISE)
def test_every_rule(rule: Any, dtype: str, call: Any) -> None:
    gradients = [numbers(dtype, seed) for seed in (1, 2, 3)]
    check_steps(call, rule, numbers(dtype, 0), gradients, same_numbers)


@pytest.mark.slow
@EACH
@parametrize("rule", EXACT_CHAINS)
def test_chains(rule: Any, dtype: str, call: Any) -> None:
    model = {"w": normal((13,), dtype), "b": normal((3,), dtype, 9)}
    gradients = [
        {"w": normal((13,), dtype, s), "b": normal((3,), dtype, -s % 7)} for s in (1, 2, 3)
    ]
    check_steps(call, rule, model, gradients, same_numbers)


@pytest.mark.slow
@KERNEL_DTYPES
@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
def test_special_numbers(rule: Any, dtype: str) -> None:
    x, g = special_pairs(dtype)
    same = assert_same_values
    if SIMULATED:
        x, g = x[::5], g[::5]
    else:  # what overflows on the way need not do so where operations are fused
        large = np.finfo(dtype).max / 8
        calm = ~np.isfinite(x + g) | (abs(x) < large) & (abs(g) < large)
        x, g, same = x[calm], g[calm], assert_nearly_same_values
    check_steps(update_, rule, {"w": x}, [{"w": g}, {"w": np.roll(g, 5)}], same)


def assert_nearly_same_values(got: Any, expected: Any) -> None:
    """Compare dictionaries of arrays or states: NaN and infinities as such, numbers nearly."""
    for key in expected:
        for a, b in zip(arrays_of(got[key]), arrays_of(expected[key]), strict=True):
            room = 8 * np.finfo(b.dtype).eps if b.dtype.kind == "f" else 0
            np.testing.assert_allclose(a, b, rtol=room, atol=room)


def arrays_of(state: Any) -> list[np.ndarray]:
    """Return the arrays of a state."""
    if isinstance(state, tuple):
        return [a for part in state for a in arrays_of(part)]
    return [np.asarray(state)]


# --- words -----------------------------------------------------------------------------------


@pytest.mark.skipif(not SIMULATED, reason="words are called by kernels alone on hardware")
@KERNEL_DTYPES
def test_words_have_the_values_that_they_have_on_arrays(dtype: str) -> None:
    known = vocabulary(dtype, dtype, dtype)
    x, y = special_pairs(dtype)
    kind = np.dtype(dtype).type
    low, high = kind(-1.5), kind(1)
    with np.errstate(all="ignore"):
        for name, args in {
            "sqrt": (x,), "absolute": (x,), "abs2": (x,), "sign": (x,), "zeros_like": (x,),
            "maximum": (x, y), "minimum": (x, y), "clip": (x, low, high),
            "where": (x > y, x, y),
        }.items():  # fmt: skip
            expected = np.broadcast_to(getattr(words, name)(*args), x.shape)
            rows = np.broadcast_arrays(*args)
            found = np.array([known[name](*row) for row in zip(*rows, strict=True)], dtype)
            assert_same_values({name: found}, {name: expected})


# --- norms -----------------------------------------------------------------------------------

ORDERS = [2, 1, 3, 0.5, 0, -1, np.inf, -np.inf]


@KERNEL_DTYPES
@pytest.mark.parametrize("p", ORDERS)
def test_norms(p: float, dtype: str) -> None:
    rule = OptimiserChain(ClipNorm(1e-2, p), WeightDecay(0.5), ClipNorm(0.3, p, throw=False))
    model, grad = numbers(dtype, 0), numbers(dtype, 1)
    for g in grad.values():
        g[g == 0] = 0.25
    check_steps(update, rule, model, [grad], assert_near)


@KERNEL_DTYPES
@pytest.mark.parametrize("p", [2, 1, 3, 0.5, -1])
@pytest.mark.parametrize("exponent", [-0.98, 0.6, 0.98])
def test_norms_of_representable_size_stay_so_on_the_way(
    p: float, dtype: str, exponent: float
) -> None:
    info = np.finfo(dtype)
    unit = info.dtype.type(2.0) ** int(exponent * (info.maxexp - 8))
    g = np.array([3.0, -4.0, 12.0], dtype) * unit
    rule = ClipNorm(float(unit), p)
    _, expected = by_arrays(rule, (), 0 * g, g)
    x = device(0 * g)
    _, new = update(setup(rule, x), x, device(g))
    np.testing.assert_allclose(host(new), expected, rtol=8 * info.eps, atol=info.smallest_subnormal)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("omega", [0.5, np.inf])
def test_norms_that_are_let_through(omega: float, p: float, bad: float) -> None:
    rule = ClipNorm(omega, p, throw=False)
    g = np.array([1, bad, 0, -2, 3], np.float32)
    check_steps(update, rule, {"w": np.ones(5, np.float32)}, [{"w": g}], assert_same_values)


def test_a_norm_that_throws_does_so_before_anything_is_written() -> None:
    rule = OptimiserChain(ClipNorm(1.0), Adam())
    here = {"host": np.ones(3), "good": np.ones(4), "bad": np.ones(5)}
    model = {"host": here["host"].copy(), "good": device(here["good"]), "bad": device(here["bad"])}
    state = setup(rule, model)
    grad = {"host": np.ones(3), "good": device(np.ones(4)), "bad": device(np.full(5, np.inf))}
    with pytest.raises(
        FloatingPointError, match=r"at \['bad'\]: ClipNorm: the gradient has 2-norm"
    ):
        update_(state, model, grad)
    for key, x in here.items():
        np.testing.assert_array_equal(host(model[key]), x)
        m, v, t = host_state(state[key].state[1])
        assert not m.any()
        assert not v.any()
        assert t == 0
    grad = {"host": np.full(3, np.nan), "good": device(np.ones(4)), "bad": device(np.ones(5))}
    with pytest.raises(FloatingPointError, match=r"at \['host'\]"):
        update_(state, model, grad)
    np.testing.assert_array_equal(host(model["good"]), here["good"])


# --- masters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        ("float16", "float32"),
        ("float16", "float64"),
        ("float32", "float32"),
        ("float32", "float64"),
        ("float64", "float32"),
        pytest.param(
            "bfloat16",
            "float32",
            marks=pytest.mark.skipif(not SIMULATED, reason="Numba has no arrays of bfloat16"),
        ),
    ],
)
@parametrize("rule", [Adam(), OptimiserChain(AccumGrad(2), ClipNorm(0.5, np.inf), Momentum())])
@BOTH
def test_masters(rule: Any, dtype: str, master: str, call: Any) -> None:
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    model = {"w": normal((11,), np.float32).astype(kind), "b": np.zeros((), kind)}
    gradients = [
        {"w": normal((11,), np.float32, s).astype(kind), "b": np.asarray(0.5, kind)} for s in (1, 2)
    ]
    check_steps(call, MixedPrecision(master, rule), model, gradients, same_numbers)


def test_gradients_of_other_dtypes() -> None:
    x = device(np.ones(9, np.float32))
    state = setup(Descent(1.0), x)
    for kind in ("float16", "float64", "int32", "bool"):
        g = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], kind)
        before = host(x)
        update_(state, x, device(g))
        np.testing.assert_array_equal(host(x), before - g.astype(np.float32))


# --- one launch ------------------------------------------------------------------------------


def test_leaves_with_numbers_of_their_own_are_one_launch(monkeypatch: Any) -> None:
    """Another rate, another count: still the same kernel, and once."""
    model = {k: normal((5,), np.float32, k) for k in range(4)}
    state = setup(OptimiserChain(ClipNorm(1.0), Adam()), device(model))
    launched: list[Any] = []
    plain = _launch.Launch.run

    def run(launch: Any) -> Any:
        launched.append(launch.spec)
        return plain(launch)

    monkeypatch.setattr(_launch.Launch, "run", run)
    there = device(model)
    for s, keys in enumerate([[0, 1, 2, 3], [1, 3], [0, 1, 2, 3]]):
        if s == 1:
            adjust_(state[3], 0.5, omega=0.1)
        grad = {k: normal((5,), np.float32, 10 * s + k) for k in keys}
        expected = {
            k: by_arrays(state[k].rule, host_state(state[k].state), host(there[k]), grad[k])[1]
            for k in keys
        }
        update_(state, there, device(grad))
        assert_near({k: host(there[k]) for k in keys}, expected)
    assert len(launched) == 3
    assert [int(state[k].state[1].t) for k in range(4)] == [2, 3, 2, 3]


def test_tables_are_sent_only_when_they_change(monkeypatch: Any) -> None:
    sent: list[int] = []
    plain = _launch._Staging.send

    def send(self: Any, values: Any, target: Any, stream: Any) -> None:
        sent.append(values.size)
        plain(self, values, target, stream)

    monkeypatch.setattr(_launch._Staging, "send", send)
    x = {k: device(normal((5,), np.float32, k)) for k in range(3)}
    g = {k: device(normal((5,), np.float32, k + 5)) for k in range(3)}
    state = setup(Adam(), x)
    update_(state, x, g)
    assert len(sent) == 2  # addresses, and who takes what
    update_(state, x, g)
    assert len(sent) == 2
    g[1] = device(normal((5,), np.float32, 20))
    update_(state, x, g)
    assert len(sent) == 3


def test_kernels_are_compiled_once() -> None:
    x = device(normal((5,), np.float32))
    update_(setup(Momentum(), x), x, device(np.ones(5, np.float32)))
    before = _launch._compiled.cache_info().misses
    for n in (3, 50):
        x = device(normal((n,), np.float32))
        update_(setup(Momentum(0.5), x), x, device(np.ones(n, np.float32)))
    assert _launch._compiled.cache_info().misses == before
