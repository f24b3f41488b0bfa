"""Every rule of the registry, by every backend, against the array evaluation of the same step."""

from __future__ import annotations

import numpy as np
import pytest
from util import (
    ALONE,
    BOTH,
    ELEMENTWISE,
    EVERY_ELEMENTWISE,
    EXACT_CHAINS,
    KERNEL_LAYOUTS,
    LAYOUTS,
    LEADS,
    PUBLIC,
    assert_near,
    assert_same_bits,
    assert_same_values,
    by_arrays,
    checked_steps,
    example,
    layouts_of,
    normal,
    parametrize,
    special,
    special_pairs,
    step,
    variants,
)

from optimisers import (
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    ElementwiseRule,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    WeightDecay,
    setup,
    update_,
)
from optimisers import update as pure_update
from optimisers._engine import cpu
from optimisers.rules._program import program_of

pytestmark = [pytest.mark.elsewhere, pytest.mark.portable, pytest.mark.sanitized]

BLOCK = cpu.kernels.settings()[0]
SIZES = [(), (0,), (3, 0, 2), (1,), (7,), BLOCK - 1, BLOCK, BLOCK + 1, (5, BLOCK + 3)]

kernel_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
array_dtypes = pytest.mark.parametrize(
    "dtype", ["float16", "longdouble", "complex64", "complex128", "bfloat16"]
)


def as_dtype(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def model_of_sizes(dtype, seed):
    return {str(size): normal(size, dtype, seed) for size in SIZES}


def keyed(backend, names):
    return {f"[{name!r}]": backend for name in names}


# --- the kernels -----------------------------------------------------------------------------


@BOTH
@kernel_dtypes
@parametrize("rule", [*EVERY_ELEMENTWISE, *EXACT_CHAINS])
def test_kernels_give_the_bits_of_the_arrays(rule, dtype, call):
    model = model_of_sizes(dtype, 0)
    gradients = [model_of_sizes(dtype, seed) for seed in range(1, 6)]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used == keyed("kernels", model)


@BOTH
@kernel_dtypes
@parametrize("rule", EVERY_ELEMENTWISE)
def test_kernels_give_the_values_of_the_arrays_on_special_numbers(rule, dtype, call):
    x, g = special_pairs(dtype)
    gradients = [{"w": g}, {"w": np.roll(g, 5)}, {"w": g[::-1]}]
    used = checked_steps(call, rule, {"w": x}, gradients, assert_same_values)
    assert used == {"['w']": "kernels"}


@BOTH
@kernel_dtypes
@parametrize("rule", EVERY_ELEMENTWISE)
def test_loops_led_by_others_give_the_bits_of_the_arrays(rule, dtype, call):
    for lead in LEADS:
        chain = OptimiserChain(*lead, rule)
        model = {str(size): normal(size, dtype, 0) for size in ((), BLOCK + 1)}
        gradients = [{key: normal(x.shape, dtype, k) for key, x in model.items()} for k in (1, 2)]
        used = checked_steps(call, chain, model, gradients, assert_same_bits)
        assert used == keyed("kernels", model)


@BOTH
@kernel_dtypes
@parametrize("delta", [0.0, 1.0, 1e30])
def test_led_loops_give_the_values_of_the_arrays_on_special_numbers(delta, dtype, call):
    x, g = special_pairs(dtype)
    gradients = [{"w": g}, {"w": np.roll(g, 5)}, {"w": g[::-1]}]
    for lead in ([ClipGrad(delta)], [ClipGrad(delta), WeightDecay(0.1)], [WeightDecay(0.1)]):
        for rule in map(example, ELEMENTWISE):
            chain = OptimiserChain(*lead, rule)
            used = checked_steps(call, chain, {"w": x}, gradients, assert_same_values)
            assert used == {"['w']": "kernels"}


def backends_of_layouts(call, names):
    """Return what takes a parameter of each layout; the pure update makes plain arrays of them."""
    other = "arrays" if call is update_ else "arrays, kernels"
    return {f"[{n!r}]": "kernels" if n in KERNEL_LAYOUTS else other for n in names}


@BOTH
@kernel_dtypes
@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
def test_layouts_of_the_parameter(rule, dtype, call):
    names = [name for name in layouts_of(dtype) if name != "byte-swapped"]
    model = {name: LAYOUTS[name](normal((6, 5), dtype, 1)) for name in names}
    gradients = [{name: normal((6, 5), dtype, s) for name in names} for s in (2, 3)]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used.pop("['broadcast']").startswith("arrays")  # and then what replaces it
    assert used == backends_of_layouts(call, set(names) - {"broadcast"})


@BOTH
@kernel_dtypes
@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
def test_byte_swapped_parameters(rule, dtype, call):
    model = {"w": normal((6, 5), dtype).astype(np.dtype(dtype).newbyteorder())}
    gradients = [{"w": normal((6, 5), dtype, s)} for s in (2, 3)]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used["['w']"].startswith("arrays")


@BOTH
@kernel_dtypes
@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
@parametrize("order", ["C", "F"])
def test_layouts_of_the_gradient(rule, dtype, call, order):
    names = layouts_of(dtype)
    model = {name: np.array(normal((6, 5), dtype, 1), order=order) for name in names}
    gradients = [
        {name: LAYOUTS[name](normal((6, 5), dtype, s)) for name in names} for s in (2, 3, 4)
    ]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used == keyed("kernels", names)


# --- norms -----------------------------------------------------------------------------------

ORDERS = [2, 1, 3, 0.5, 1.7, 0, -1, -2.5, np.inf, -np.inf]


@kernel_dtypes
@parametrize("p", ORDERS)
@parametrize("shape", SIZES)
def test_norms_agree(p, dtype, shape):
    """Sums are in double: float32 is right but for its last place, double for some."""
    g = normal(shape, dtype, 3)
    g[g == 0] = 0.25
    rule = ClipNorm(1e-3, p)
    x = np.zeros_like(g)
    _, by_kernels, used = step(pure_update, setup(rule, x), x, g)
    assert used == {"(root)": "kernels"}
    by_numpy = by_arrays(rule, (), x, g)[1]
    size = np.abs(g.astype(np.longdouble)).ravel()
    exact = np.linalg.norm(size, p) if size.size else 0
    expected = (-g * min(1e-3 / exact, 1) if exact else -g).astype(dtype)
    places = 1 if dtype == "float32" else 8
    for found in (by_kernels, by_numpy):
        np.testing.assert_array_max_ulp(found, expected, maxulp=places)
    # They may be off to different sides; in float32 both are rounded from nearly the same double.
    np.testing.assert_array_max_ulp(
        by_kernels, by_numpy, maxulp=1 if dtype == "float32" else 2 * places
    )


@kernel_dtypes
@parametrize("p", [2, 1, 3, 0.5, -1])
@parametrize("exponent", [-1, -0.98, -0.6, 0.6, 0.98])
def test_norms_of_representable_size_stay_so_on_the_way(p, dtype, exponent):
    """The factor is right where squares of the numbers overflow or vanish."""
    info = np.finfo(dtype)
    unit = dtype_power_of_two(info, exponent)
    g = np.array([3.0, -4.0, 12.0], dtype) * unit
    sizes = [3.0, 4.0, 12.0]
    norm = sum(s**p for s in sizes) ** (1 / p)  # of g / unit
    rule = ClipNorm(float(unit), p)
    expected = (g.astype(np.longdouble) / norm).astype(dtype)
    for got in (
        -step(pure_update, setup(rule, 0 * g), 0 * g, g)[1],
        -by_arrays(rule, (), 0 * g, g)[1],
    ):
        np.testing.assert_allclose(got, expected, rtol=4 * info.eps, atol=info.smallest_subnormal)


@pytest.mark.parametrize(("size", "p"), [(1e-300, 0.005), (1e300, -0.005)])
def test_norms_of_tiny_order_stay_representable(size, p):
    """A norm of 1000 numbers is 1000**(1/p) times their size, which alone would overflow."""
    g = np.full(1000, size)
    half = 1000 ** (0.5 / p)
    rule = ClipNorm(1e-5 * (size * half * half), p)
    for got in (
        step(pure_update, setup(rule, 0 * g), 0 * g, g)[1],
        by_arrays(rule, (), 0 * g, g)[1],
    ):
        np.testing.assert_allclose(got, -1e-5 * size, rtol=1e-9)


def dtype_power_of_two(info, exponent):
    return info.dtype.type(2.0) ** int(exponent * (info.maxexp - 8))


@kernel_dtypes
@parametrize("p", ORDERS)
def test_norms_that_let_nan_through(p, dtype):
    rule = OptimiserChain(ClipNorm(0.5, p, throw=False), ClipNorm(1.0, np.inf, throw=False))
    for bad in (np.nan, np.inf, -np.inf):
        x = {"w": np.ones(5, dtype)}
        g = {"w": np.array([1, bad, 0, -2, 3], dtype)}
        used = checked_steps(pure_update, rule, x, [g], assert_same_values)
        assert used == {"['w']": "kernels"}


@kernel_dtypes
def test_norm_of_nothing(dtype):
    for p in ORDERS:
        x = np.zeros((0, 3), dtype)
        _, new = pure_update(setup(ClipNorm(1.0, p), x), x, x)
        assert new.shape == (0, 3)


@kernel_dtypes
def test_norm_in_a_chain_reads_the_state_as_it_will_be(dtype):
    """What precedes a norm is evaluated without being stored, then once more for good."""
    rule = OptimiserChain(
        *(example(cls) for cls in ELEMENTWISE[:4]), ClipNorm(1e-3, 2), example(PUBLIC[1])
    )
    model = {"w": normal(3 * BLOCK, dtype)}
    state = setup(rule, model)
    for seed in range(4):
        grad = {"w": normal(3 * BLOCK, dtype, seed + 1)}
        inner, new = by_arrays(rule, state["w"].state, model["w"], grad["w"])
        state, model, used = step(update_, state, model, grad)
        assert used == {"['w']": "kernels"}
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(model["w"], new, rtol=8 * eps, atol=8 * eps)
        assert_same_bits(state["w"].state[:4], inner[:4])  # ahead of the norm nothing differs


# --- float32 masters of narrower parameters --------------------------------------------------

narrow_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@BOTH
@narrow_dtypes
@parametrize("rule", [*map(example, ELEMENTWISE), *EXACT_CHAINS])
def test_fused_masters_give_the_bits_of_the_arrays(rule, dtype, call):
    dtype = as_dtype(dtype)
    model = model_of_sizes(dtype, 0)
    gradients = [model_of_sizes(dtype, seed) for seed in range(1, 6)]
    used = checked_steps(call, MixedPrecision(rule), model, gradients, assert_same_bits)
    assert used == keyed("kernels", model)


@BOTH
@narrow_dtypes
def test_layouts_of_parameters_with_a_master(dtype, call):
    dtype = as_dtype(dtype)
    names = [name for name in layouts_of(dtype) if name != "byte-swapped"]
    model = {name: LAYOUTS[name](normal((6, 5), dtype, 1)) for name in names}
    gradients = [{n: LAYOUTS[n](normal((6, 5), dtype, s)) for n in names} for s in (2, 3, 4)]
    rule = MixedPrecision(OptimiserChain(ClipNorm(1.0, np.inf), example(PUBLIC[7])))
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used.pop("['broadcast']").startswith("arrays")
    assert used == backends_of_layouts(call, set(names) - {"broadcast"})


def every_pattern(dtype):
    return np.arange(2**16, dtype=np.uint16).view(dtype)


@narrow_dtypes
def test_every_narrow_number_is_widened_right(dtype):
    g = every_pattern(as_dtype(dtype))
    rule = MixedPrecision(Descent(1.0))
    state, _, used = step(pure_update, setup(rule, np.zeros_like(g)), np.zeros_like(g), g)
    assert used == {"(root)": "kernels"}
    with np.errstate(all="ignore"):
        assert_same_values(state.state.master, 0 - g.astype(np.float32))


@narrow_dtypes
def test_masters_are_rounded_right(dtype):
    """Numbers that are representable, next to it, half-way between, beyond, and at random."""
    dtype = as_dtype(dtype)
    with np.errstate(all="ignore"):
        exact = every_pattern(dtype).astype(np.float32)
        near = [exact, (exact[:-1] + exact[1:]) / 2]
        near += [np.nextafter(a, np.float32(to)) for a in near for to in (np.inf, -np.inf)]
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    master = np.concatenate([*near, random, special(np.float32)])
    x = np.zeros(master.shape, dtype)
    rule = MixedPrecision(Descent(0.0))
    state = setup(rule, x)
    state.state.master[...] = master
    _, new, used = step(pure_update, state, x, x)
    assert used == {"(root)": "kernels"}
    with np.errstate(all="ignore"):
        assert_same_values(new, master.astype(dtype))
        assert_same_bits(np.signbit(new), np.signbit(master))


# --- everything else -------------------------------------------------------------------------


@BOTH
@array_dtypes
@parametrize("rule", [rule for cls in ALONE for rule in variants(cls)])
def test_other_dtypes_equal_the_arrays_on_plain_copies(rule, dtype, call):
    dtype = as_dtype(dtype)
    names = layouts_of(dtype)
    model = {name: LAYOUTS[name](normal((4, 3), dtype, 1)) for name in names}
    if dtype.kind == "c" and is_real_only(rule):
        with pytest.raises(TypeError, match="real parameters only"):
            setup(rule, model)
        return
    gradients = [
        {
            name: LAYOUTS[other](normal((4, 3), dtype, seed))
            for name, other in zip(names, names[seed:] + names[:seed], strict=True)
        }
        for seed in range(1, 5)
    ]
    # NumPy itself takes |z|, and sums, in another order where memory lies otherwise.
    exact = dtype.kind != "c" and isinstance(rule, ElementwiseRule)
    same = assert_same_bits if exact else assert_near
    used = checked_steps(call, rule, model, gradients, same)
    if not has_kernels(rule, dtype):
        assert used == keyed("arrays", names)


def has_kernels(rule, dtype):
    """Tell whether the kernels take a rule for other dtypes than those of this section."""
    if program_of(rule) is None or getattr(rule, "over", "") == "axes":
        return False
    is_plain = not isinstance(rule, MixedPrecision) or rule.dtype == np.float32
    return dtype.name in ("float16", "bfloat16") and is_plain


def is_real_only(rule):
    return rule.real_only


@BOTH
@parametrize("dtype", ["float16", "longdouble", "complex128"])
@parametrize("rule", [example(cls) for cls in ALONE])
def test_other_dtypes_in_no_and_one_element(rule, dtype, call):
    if np.dtype(dtype).kind == "c" and is_real_only(rule):
        return
    model = {str(size): normal(size, dtype) for size in [(), (0,), (1,), (2, 0)]}
    gradients = [
        {str(s): normal(s, dtype, k) for s in [(), (0,), (1,), (2, 0)]} for k in (1, 2, 3, 4)
    ]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used == keyed("kernels" if has_kernels(rule, np.dtype(dtype)) else "arrays", model)


@parametrize("dtype", ["float16", "longdouble"])
@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
def test_other_dtypes_on_special_numbers_do_not_warn(rule, dtype):
    x, g = special_pairs(dtype)
    checked_steps(update_, rule, {"w": x}, [{"w": g}] * 2, assert_same_values)


@BOTH
@kernel_dtypes
@pytest.mark.parametrize("master", ["float32", "float64", "longdouble"])
@parametrize("rule", [OptimiserChain(), *map(example, ELEMENTWISE)])
def test_masters_of_parameters_that_are_not_half(rule, master, dtype, call):
    model = model_of_sizes(dtype, 0)
    gradients = [model_of_sizes(dtype, seed) for seed in (1, 2)]
    used = checked_steps(call, MixedPrecision(master, rule), model, gradients, assert_same_bits)
    fused = (dtype, master) in [("float32", "float32"), ("float32", "float64"), ("float64",) * 2]
    assert used == keyed("kernels" if fused else "arrays", model)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "of_g"),
    [("float32", "float16"), ("float32", "bfloat16"), ("float64", "float32")],
)
@parametrize("rule", [Adam(), ClipNorm(0.5), *EXACT_CHAINS])
def test_narrower_gradients_are_read_by_kernels(rule, dtype, of_g, call):
    model = model_of_sizes(dtype, 0)
    gradients = [
        {name: g.astype(as_dtype(of_g)) for name, g in model_of_sizes(dtype, seed).items()}
        for seed in (1, 2)
    ]
    used = checked_steps(call, rule, model, gradients, assert_near)
    assert used == keyed("kernels", model)


@BOTH
@kernel_dtypes
def test_masters_of_special_numbers(dtype, call):
    x, g = special_pairs(dtype)
    checked_steps(call, MixedPrecision("float64", Adam()), {"w": x}, [{"w": g}], assert_same_values)


def test_state_is_like_the_parameter_in_native_byte_order():
    for layout in LAYOUTS:
        for cls in ELEMENTWISE:
            rule = example(cls)
            x = LAYOUTS[layout](normal((4, 3), np.float32))
            state = rule.init(x)
            for slot in state[: len(rule.slots)]:
                assert (slot.shape, slot.dtype) == ((4, 3), np.dtype(np.float32))
                assert slot.dtype.isnative
                assert slot.flags.writeable
            if rule.counts:
                assert (state.t.shape, state.t.dtype, int(state.t)) == ((), np.int64, 0)


def test_every_elementwise_rule_of_the_library_has_kernels():
    for cls in ELEMENTWISE:
        assert cls.__name__ in cpu.kernels.step_index
        assert cpu.lower(example(cls)) is not None


def test_a_subclass_with_an_apply_of_its_own_has_no_kernel():
    for cls in ELEMENTWISE:

        class Own(cls):
            def apply(self, state, x, dx, *higher):
                return super().apply(state, x, dx, *higher)

        twin = object.__new__(Own)
        for name, value in vars(example(cls)).items():
            object.__setattr__(twin, name, value)
        assert cpu.lower(twin) is None
        model = {"w": normal((6,), np.float32)}
        gradients = [{"w": normal((6,), np.float32, s)} for s in (1, 2)]
        used = checked_steps(update_, twin, model, gradients, assert_same_bits)
        assert used == {"['w']": "arrays"}


class Backwards(Momentum):
    """Momentum with a formula of its own: it climbs."""

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        rho, eta = coefs
        v = rho * v - eta * dx
        return v, (v,)


@BOTH
@kernel_dtypes
def test_a_subclass_with_a_formula_of_its_own(dtype, call):
    """Whoever runs it, it is that formula and not the one it replaced."""
    model = model_of_sizes(dtype, 0)
    gradients = [model_of_sizes(dtype, seed) for seed in (1, 2)]
    checked_steps(call, Backwards(0.5), model, gradients, assert_same_bits)
    _, new = call(setup(Backwards(0.5), np.ones(2, dtype)), np.ones(2, dtype), np.ones(2))
    np.testing.assert_array_equal(new, 1.5)
