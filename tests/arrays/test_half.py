"""Steps on numbers of 16 and 8 bits: computed in float32, each result rounded once."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from util import (
    ALONE,
    BOTH,
    PUBLIC,
    Average,
    assert_same_bits,
    example,
    normal,
    parametrize,
    without_decay,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rule,
    WeightDecay,
    destructure,
    setup,
    update,
    update_,
)
from optimisers._engine import cpu
from optimisers.rules import _base, _numbers

ml_dtypes = pytest.importorskip("ml_dtypes")

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
EIGHTHS = [np.dtype(getattr(ml_dtypes, f"float8_{kind}")) for kind in ("e4m3fn", "e5m2", "e3m4")]
NARROW = [*HALVES, *EIGHTHS]
RULES = [example(cls) for cls in ALONE]
ADAPTIVE = [rule for rule in RULES if hasattr(rule, "epsilon") and getattr(rule, "slots", True)]
dtypes = parametrize("dtype", NARROW)
halves = parametrize("dtype", HALVES)


def run(rule, x, gradients, call=update):
    state = setup(rule, x)
    for g in gradients:
        state, x = call(state, x, g)
    return state.state, x


def wide(state):
    """Return a state whose narrow arrays are float32."""
    if isinstance(state, tuple):
        parts = [*map(wide, state)]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state.astype(np.float32) if state.dtype in NARROW else state


def near(got, exact, dtype):
    """Tell how far, in units of the dtype, an array is from what it should be rounded to."""
    unit = float(ml_dtypes.finfo(dtype).eps)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    got, exact = got.astype(np.float64), exact.astype(np.float64)
    return np.max(np.abs(got - exact) / np.maximum(unit * np.abs(exact), tiny), initial=0)


# --- one rounding ------------------------------------------------------------------------------


@BOTH
@dtypes
@parametrize("rule", [r for r in RULES if not isinstance(r, MixedPrecision)])
def test_a_step_is_that_of_float32_rounded_once(rule, dtype, call):
    x = normal(40, np.float32, 1).clip(-8, 8).astype(dtype)
    gradients = [normal(40, np.float32, k).clip(-8, 8) for k in range(2, 6)]
    state = setup(rule, x)
    for g in gradients:
        master = setup(rule, x.astype(np.float32))
        master.state = wide(copy.deepcopy(state.state))
        master, expected = update(master, x.astype(np.float32), g)
        state, x = call(state, x, g)
        assert x.dtype == dtype
        assert_same_bits(x, expected.astype(dtype))
        for got, right in zip(flat(state.state), flat(master.state), strict=True):
            if got.dtype != dtype:
                assert_same_bits(got, right)
            elif dtype in HALVES:
                assert near(got, right, dtype) <= 1


def flat(state):
    return [a for part in state for a in flat(part)] if isinstance(state, tuple) else [state]


@BOTH
@dtypes
def test_nothing_is_rounded_between_the_rules_of_a_chain(dtype, call):
    seen = []

    class Spy(Rule):
        def apply(self, state, x, dx):
            seen.append(dx.dtype)
            return state, dx

    rule = OptimiserChain(Spy(), WeightDecay(0.1), Spy(), ClipGrad(1.0), ClipNorm(9.0), Spy())
    x = np.ones(3, dtype)
    call(setup(rule, x), x, np.full(3, 1 / 3, np.float32))
    assert seen == [np.float32] * 3


@dtypes
def test_a_gradient_is_not_rounded_to_the_dtype_of_the_parameter(dtype):
    x, g = np.zeros(2, dtype), np.array([1e6, 2.0**-40])
    _, new = run(Descent(2.0**-20), x, [g])
    assert_same_bits(new, (-np.float32(g) * np.float32(2.0**-20)).astype(dtype))


@BOTH
@dtypes
def test_what_a_users_rule_keeps_has_the_dtype_that_it_had(dtype, call):
    class Plain(Rule):
        def init(self, x):
            return {"m": np.zeros_like(x)}, [np.zeros_like(x)]

        def apply(self, state, x, dx):
            assert x.dtype == dx.dtype == np.float32
            (kept, (last,)) = state
            m = 0.9 * kept["m"] + dx
            return ({"m": m}, [last + m]), m

    x = np.zeros(2, dtype)
    (kept, (last,)), x = run(Plain(), x, [np.ones(2)] * 3, call)
    assert kept["m"].dtype == last.dtype == x.dtype == dtype


@BOTH
@halves
def test_a_users_elementwise_rule(dtype, call):
    x = normal(50, np.float32, 1).astype(dtype)
    state, new = run(Average(), x.copy(), [normal(50, np.float32, 2)], call)
    m = np.float32(0) + np.float32(0.25) * normal(50, np.float32, 2)
    assert_same_bits(state.m, m.astype(dtype))
    assert_same_bits(new, (x.astype(np.float32) - m).astype(dtype))


@dtypes
def test_a_rule_asked_by_hand_answers_in_the_dtype_of_the_parameter(dtype):
    x = np.ones(3, dtype)
    for rule in RULES:
        _, dx = rule.apply(rule.init(x), x, x)
        assert dx is None or (dx.dtype, dx.shape) == (dtype, (3,))


@parametrize("rule", RULES)
@halves
def test_update_and_update_in_place_give_the_same_bits(rule, dtype):
    x = normal((7, 9), np.float32, 1).astype(dtype)
    gradients = [normal((7, 9), np.float32, k).astype(dtype) for k in range(2, 6)]
    pure = run(rule, x, gradients)
    assert_same_bits(run(rule, x.copy(), gradients, update_), pure)
    # The same by array code, which strided parameters take.
    room = np.zeros((14, 9), dtype)
    room[::2] = x
    assert_same_bits([*run(rule, room[::2], gradients)], [*pure])


# --- what narrow arithmetic would lose -----------------------------------------------------------


@BOTH
@halves
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_an_average_of_one_number_is_that_number(dtype, rho, call):
    x, one = np.ones(3, dtype), np.ones(3, dtype)
    for rule, slot in (RMSProp(0.01, rho), "q"), (Adam(0.01, (0.9, rho)), "v"):
        state, _ = run(rule, x.copy(), [one] * 1000, call)
        np.testing.assert_allclose(getattr(state, slot).astype(float), 1, atol=0.04)


@BOTH
@parametrize("rule", ADAPTIVE)
def test_a_square_beyond_float16_stops_nothing(rule, call):
    gradients = [300.0] + [1.0] * 50

    def end(dtype):
        return run(rule, np.ones(2, dtype), [np.full(2, g, dtype) for g in gradients], call)

    state, x = end(np.float16)
    _, exact = end(np.float64)
    assert all(np.all(np.isfinite(a)) for a in flat(state) if a.dtype == np.float16)
    assert np.max(np.abs(x - exact)) < 0.02


@BOTH
@dtypes
@parametrize("rule", RULES)
def test_a_gradient_of_zero_moves_nothing(rule, dtype, call):
    _, x = run(without_decay(rule), np.ones(2, dtype), [np.zeros(2, dtype)] * 3, call)
    assert x.astype(float).tolist() == [1, 1]


@BOTH
@halves
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_a_norm_that_is_far_from_the_limit(dtype, p, call):
    g = np.full(100_000, 60000, dtype)
    _, x = run(OptimiserChain(ClipNorm(1.0, p), Descent(1.0)), np.zeros_like(g), [g], call)
    expected = 1 / g.size ** (0 if math.isinf(p) else 1 / p)
    np.testing.assert_allclose(-x.astype(float), expected, rtol=0.01)


# --- slots of the kernels: `kept_as` in C ---------------------------------------------------------


def results(dtype):
    """Return slots and, beside each, a result near it or far away: every case of `kept_as`."""
    slots = np.arange(2**16, dtype=np.uint16).view(dtype)
    draw = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        wide = slots.astype(np.float32)
        unit = np.float32(ml_dtypes.finfo(dtype).eps)
        shares = [0, 1 / 17, 1 / 16, 1 / 15, 1 / 8, 1 / 4, 0.49, 0.5, 0.51, 0.75, 1, 1.5, 20]
        near = [wide + s * sign * unit * (wide + (wide == 0)) for s in shares for sign in (1, -1)]
        least = np.float32(ml_dtypes.finfo(dtype).smallest_subnormal)
        near += [wide + s * sign * least for s in shares for sign in (1, -1)]
        near += [np.nextafter(wide, np.float32(to)) for to in (np.inf, -np.inf)]
        near += [(wide * np.exp2(draw.uniform(-9, -5, wide.shape)) + wide).astype(np.float32)]
        near += [draw.integers(0, 2**32, 2**16, np.uint32).view(np.float32) for _ in range(3)]
        extreme = np.array([np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 65520, 0, -0.0, 1e-45])
        near += [np.full(2**16, number, np.float32) for number in extreme]
        patterns = np.array([0x7F800001, 0x7FFF8000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
        near += [np.full(2**16, pattern).view(np.float32) for pattern in patterns]
    return slots, near


@halves
@pytest.mark.parametrize("isa", cpu.available_isas)
def test_slots_keep_the_bits_that_the_array_path_keeps(dtype, isa):
    slots, near = results(dtype)
    for new in near:
        with np.errstate(all="ignore"):
            assert_same_bits(cpu.available[isa].kept(slots, new), _numbers.kept_as(slots, new))


@halves
def test_slots_are_rounded_alike_wherever_they_begin_and_end(dtype):
    slots, near = results(dtype)
    few = slots[15000:15041], near[6][15000:15041]
    expected = _numbers.kept_as(*few)
    for kernels in cpu.available.values():
        for start in range(20):
            for end in range(start, 41):
                got = kernels.kept(few[0][start:end], few[1][start:end])
                assert_same_bits(got, expected[start:end])


@dtypes
def test_a_slot_at_its_largest_number_stays_there(dtype):
    most = np.array([ml_dtypes.finfo(dtype).max, -ml_dtypes.finfo(dtype).max], dtype)
    for factor in (1.001, 1.25, 1e30):
        with np.errstate(all="ignore"):
            new = (most.astype(np.float32) * np.float32(factor)).clip(-3.4e38, 3.4e38)
            assert_same_bits(_numbers.kept_as(most, new), most)


# --- AccumGrad ---------------------------------------------------------------------------------


@BOTH
@dtypes
@pytest.mark.parametrize(("n", "size"), [(4, 200.0), (600, 1.0)])
def test_a_mean_of_many_gradients(dtype, n, size, call):
    g = np.full(2, size).astype(dtype)
    rule = OptimiserChain(AccumGrad(n), Descent(1.0))
    if dtype == "float8_e3m4":
        g = np.full(2, 8.0).astype(dtype)
    state, x = run(rule, np.zeros(2, dtype), [g] * n, call)
    assert x.astype(float).tolist() == (-g.astype(float)).tolist()
    assert state[0].sum.dtype == np.float32


@BOTH
def test_a_mean_is_handed_on_as_it_is(call):
    state, x = np.array([2049, 0.0]), np.zeros(2, np.float16)
    rule = OptimiserChain(AccumGrad(2), Descent(3.0))
    _, x = run(rule, x, [state, np.zeros(2)], call)
    assert x[0] == np.float16(-1024.5 * 3)


@BOTH
def test_a_sum_that_was_kept_in_float16_goes_on_in_float32(call):
    x, g = np.zeros(1, np.float16), np.full(1, 20000, np.float16)
    state = setup(OptimiserChain(AccumGrad(4), Descent(1.0)), x)
    held = state.state[0]
    state.state = (held._replace(sum=held.sum.astype(np.float16)), ())
    for _ in range(4):
        state, x = call(state, x, g)
    assert x == -20000
    assert state.state[0].sum.dtype == np.float32


# --- other libraries -----------------------------------------------------------------------------


def test_tied_gradients_are_summed_in_float32():
    w = np.zeros(2, np.float16)
    g = np.full(2, 40000, np.float16)
    update_(setup(Descent(2.0**-4), [w, w]), [w, w], [g, g])
    assert w.tolist() == [-5000, -5000]


@parametrize("rule", [r for r in RULES if not isinstance(r, MixedPrecision)])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn"])
def test_jax(rule, name):
    jax = pytest.importorskip("jax")
    dtype = jax.numpy.dtype(name)
    shape = 2, 2, 2  # along no axis of which a product of slices is singular
    x = normal(shape, np.float32, 1).clip(-4, 4).astype(dtype)
    gradients = [normal(shape, np.float32, k).clip(-4, 4).astype(dtype) for k in range(2, 6)]
    expected, right = run(rule, x, gradients)
    arrays = jax.numpy.asarray(x), [*map(jax.numpy.asarray, gradients)]
    for call in update, jax.jit(update):
        state, got = run(rule, *arrays, call)
        assert got.dtype == dtype
        assert dtype not in HALVES or near(np.asarray(got), right, dtype) <= 1
        kinds = [a.dtype for a in flat(expected) if a.dtype.kind != "i"]
        assert [a.dtype for a in flat(state) if a.dtype.kind != "i"] == kinds


PEERS = {
    "Adam": (Adam(0.01), {"lr": 0.01}),
    "RMSprop": (RMSProp(0.01, 0.99), {"lr": 0.01}),
    "SGD": (Momentum(0.01), {"lr": 0.01, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("of_x", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_not_farther_from_the_float64_run_than_pytorch(name, of_x, library):
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, of_x)
    rule, options = PEERS[name]
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=draw).to(dtype)
    gradients = [torch.randn(200, generator=draw).to(dtype) for _ in range(40)]
    p = torch.nn.Parameter(start.clone())
    peer = getattr(torch.optim, name)([p], **options)
    for g in gradients:
        p.grad = g.clone()
        peer.step()
    _, exact = run(rule, start.double().numpy(), [g.double().numpy() for g in gradients])
    if library == "torch":
        _, got = run(rule, start.clone(), gradients)
        got = got.double().numpy()
    else:
        kind = np.dtype(of_x) if of_x == "float16" else HALVES[1]
        as_numpy = [g.float().numpy().astype(kind) for g in [start, *gradients]]
        got = run(rule, as_numpy[0], as_numpy[1:])[1].astype(float)
    ours, theirs = (np.mean(np.abs(a - exact)) for a in (got, p.detach().double().numpy()))
    assert ours <= 1.1 * theirs  # where the parameter's own rounding is most of it


@pytest.mark.parametrize("of_x", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@parametrize("rule", ADAPTIVE)
def test_tensors_of_narrow_numbers(rule, of_x):
    torch = pytest.importorskip("torch")
    x = torch.ones(3).to(getattr(torch, of_x))
    _, new = run(rule, x, [torch.zeros(3)] * 2 + [torch.ones(3)])
    assert new.dtype is x.dtype
    assert bool(torch.isfinite(new.float()).all())


def test_registered_rules_are_all_widened():
    assert [cls.__name__ for cls in PUBLIC if not cls._widens] == ["MixedPrecision"]
    assert issubclass(PUBLIC[0], _base.Rule)


class Averaging(Rule):
    def init(self, x):
        return np.zeros_like(x), [np.zeros_like(x)]

    def apply(self, state, x, dx):
        mean, (largest,) = state
        mean = 0.9 * mean + 0.1 * dx  # NumPy makes a scalar of it, if it was 0-d
        return (mean, [np.maximum(largest, abs(dx))]), mean


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
@dtypes
def test_a_users_state_keeps_its_dtype_and_its_arrays(dtype, shape, call):
    x = np.ones(shape, dtype)
    state = setup(Averaging(), x)
    mean, (largest,) = state.state
    for _ in range(2):
        state, x = call(state, x, np.full(shape, 0.5, dtype))
    new_mean, (new_largest,) = state.state
    assert (type(new_mean), new_mean.dtype, new_mean.shape) == (np.ndarray, dtype, shape)
    assert (type(new_largest), new_largest.dtype, new_largest.shape) == (np.ndarray, dtype, shape)
    assert (new_mean is mean) == (new_largest is largest) == (call is update_)
    assert (new_largest.astype(float) == 0.5).all()


def made_by(library, name, values):
    """Return an array of a narrow dtype."""
    if library == "numpy":
        return np.array(values).astype(getattr(ml_dtypes, name, name))
    if library == "jax":
        jnp = pytest.importorskip("jax").numpy
        return jnp.array(values).astype(getattr(jnp, name))
    torch = pytest.importorskip("torch")
    return torch.tensor(values).to(getattr(torch, name))


def numbers_of(x):
    return (np.asarray(x.float()) if hasattr(x, "detach") else np.asarray(x)).tolist()


LIBRARIES = "numpy", "jax", "torch"
NAMES = "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", LIBRARIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_gradients_of_another_library_and_narrow_dtype(library, other, name):
    g = made_by(other, name, [2.0, 4.0])
    for own in "float32", "float16", "bfloat16":
        model = {"w": made_by(library, own, [1.0, 2.0])}
        for rule in Descent(0.25), MixedPrecision(Descent(0.25)):
            _, new = update(setup(rule, model), model, {"w": g})
            assert numbers_of(new["w"]) == [0.5, 1]
            assert (type(new["w"]), new["w"].dtype) == (type(model["w"]), model["w"].dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", LIBRARIES)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_flat_vector_and_narrow_dtypes_of_another_library(library, other, name):
    model = {"a": made_by(library, name, [1.0, 2.0]), "b": made_by(library, name, [3.0])}
    _, re = destructure(model)
    g = {"a": made_by(other, name, [2.0, 4.0]), "b": made_by(other, "float16", [1.0])}
    assert numbers_of(re.flatten_gradient(g)) == [2, 4, 1]
    v = made_by(other, name, [4.0, 5.0, 6.0])
    assert numbers_of(re(v)["a"]) == [4, 5]
    re.copy_into_(model, v)
    assert numbers_of(model["b"]) == [6]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", LIBRARIES)
def test_narrow_gradients_of_what_is_not_trained(other, name):
    model = {"w": np.ones(2), "b": 1.0}
    state = setup(Descent(), model)
    with pytest.raises(TypeError, match=r"\['b'\]"):
        update(state, model, {"b": made_by(other, name, 2.0)})
    update(state, model, {"b": made_by(other, name, 0.0)})


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_dtype_without_zero_is_refused(library):
    x = made_by(library, "float8_e8m0fnu", [1.0, 2.0])
    with pytest.raises(TypeError, match=r"\['w'\].*has no zero.*MixedPrecision"):
        setup(OptimiserChain(ClipNorm(), Adam()), {"w": x})
    state = setup(MixedPrecision(Adam()), x)
    assert numbers_of(update(state, x, made_by(library, "float16", [0.0, 0.0]))[1]) == [1, 2]
