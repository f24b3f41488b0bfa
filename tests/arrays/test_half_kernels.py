"""Float16 and bfloat16 by the CPU kernels: the bits of the array path on every way through."""

from __future__ import annotations

import numpy as np
import pytest
from util import (
    BOTH,
    ELEMENTWISE,
    EVERY_ELEMENTWISE,
    EXACT_CHAINS,
    LAYOUTS,
    LEADS,
    Average,
    assert_same_bits,
    assert_same_values,
    beginning_at,
    by_arrays,
    checked_steps,
    example,
    layouts_of,
    normal,
    parametrize,
    special_pairs,
    step,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    WeightDecay,
    destructure,
    set_num_threads,
    setup,
    update,
    update_,
)
from optimisers._engine import cpu

pytestmark = pytest.mark.sanitized

ml_dtypes = pytest.importorskip("ml_dtypes")

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
halves = parametrize("dtype", HALVES)
CHAIN_BLOCK = cpu.kernels.settings()[1]
BLOCK = 2 * CHAIN_BLOCK
SIZES = [(), (0,), (3, 0, 2), (1,), (7,), BLOCK - 1, BLOCK, BLOCK + 1, (5, BLOCK + 3)]
CHAINS = [
    OptimiserChain(ClipGrad(0.7), WeightDecay(0.1), Adam()),
    OptimiserChain(Momentum(), ClipNorm(1e-3, np.inf), Adam()),
    OptimiserChain(AccumGrad(2), Adam()),
]


def model_of_sizes(dtype, seed):
    return {str(size): normal(size, dtype, seed) for size in SIZES}


def all_by_kernels(names):
    return {f"[{name!r}]": "kernels" for name in names}


# --- the bits of the arrays --------------------------------------------------------------------


@BOTH
@halves
@parametrize("rule", [*EVERY_ELEMENTWISE, *EXACT_CHAINS])
def test_kernels_give_the_bits_of_the_arrays(rule, dtype, call):
    model = model_of_sizes(dtype, 0)
    gradients = [model_of_sizes(of_g, k) for k, of_g in enumerate([dtype, "f4", "f8", dtype], 1)]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used == all_by_kernels(model)


@BOTH
@halves
@parametrize("rule", EVERY_ELEMENTWISE)
def test_kernels_give_the_values_of_the_arrays_on_special_numbers(rule, dtype, call):
    x, g = special_pairs(dtype)
    gradients = [{"w": g}, {"w": np.roll(g, 5)}, {"w": g[::-1]}]
    used = checked_steps(call, rule, {"w": x}, gradients, assert_same_values)
    assert used == {"['w']": "kernels"}


@BOTH
@halves
@parametrize("rule", EVERY_ELEMENTWISE)
def test_loops_led_by_others_give_the_bits_of_the_arrays(rule, dtype, call):
    for lead in LEADS:
        model = {str(size): normal(size, dtype, 0) for size in ((), BLOCK + 1)}
        gradients = [{key: normal(x.shape, dtype, k) for key, x in model.items()} for k in (1, 2)]
        used = checked_steps(call, OptimiserChain(*lead, rule), model, gradients, assert_same_bits)
        assert used == all_by_kernels(model)


@BOTH
@halves
@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
def test_layouts_of_parameter_and_gradient(rule, dtype, call):
    names = layouts_of(dtype)
    model = {name: LAYOUTS[name](normal((6, 5), dtype, 1)) for name in names}
    gradients = [
        {name: LAYOUTS[name](normal((6, 5), dtype, s)) for name in names[s:] + names[:s]}
        for s in (2, 3, 4)
    ]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    for name in ("C", "Fortran", "read-only"):
        assert used[f"[{name!r}]"] == "kernels"
    for name in set(names) - {"C", "Fortran", "read-only"}:
        assert used[f"[{name!r}]"].startswith("arrays")


@halves
def test_a_norm_reads_the_state_as_it_will_be(dtype):
    """What precedes a norm is evaluated without being stored, then once more for good."""
    rule = OptimiserChain(Momentum(), Adam(), ClipNorm(1e-3, 2), WeightDecay(0.1))
    x = normal(50_001, dtype)
    state = setup(rule, x)
    for seed in range(4):
        g = normal(50_001, dtype, seed + 1)
        kept, new = by_arrays(rule, state.state, x, g)
        state, x, used = step(update_, state, x, g)
        assert used == {"(root)": "kernels"}
        assert_same_bits(state.state[:2], kept[:2])  # ahead of the norm nothing differs
        unit = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(x.astype(float), new.astype(float), rtol=unit, atol=1e-7)


@halves
def test_a_norm_of_a_gradient_as_it_comes(dtype):
    """It is read in one go, not in blocks of scratch memory."""
    x, g = np.zeros(100_000, dtype), np.full(100_000, 2.0, np.float32)
    _, new, used = step(update, setup(ClipNorm(1.0, 1), x), x, g)
    assert used == {"(root)": "kernels"}
    assert_same_bits(new, np.full_like(x, -1e-5))


# --- kinds side by side ------------------------------------------------------------------------


def with_slots(state, dtype):
    """Return a state whose slots have another dtype."""
    if not isinstance(state, tuple):
        return state.astype(dtype) if state.ndim else state
    parts = [with_slots(part, dtype) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


@BOTH
@parametrize("of_x", ["float16", "bfloat16", "float32"])
@parametrize("of_slots", ["float16", "bfloat16", "float32"])
@parametrize("rule", [*map(example, ELEMENTWISE), *CHAINS[:2]])
def test_slots_of_another_dtype_than_the_parameter(rule, of_x, of_slots, call):
    of_x, of_slots = (np.dtype(getattr(ml_dtypes, name, name)) for name in (of_x, of_slots))
    model = {"w": normal((3, BLOCK), of_x, 0)}
    state = setup(rule, model)
    state["w"] = Leaf(rule, with_slots(state["w"].state, of_slots))
    for seed in range(1, 4):
        grad = {"w": normal((3, BLOCK), of_x, seed)}
        expected = by_arrays(rule, state["w"].state, model["w"], grad["w"])
        state, model, used = step(call, state, model, grad)
        assert used == {"['w']": "kernels"}
        assert_same_bits((state["w"].state, model["w"]), expected)


@BOTH
@halves
def test_narrow_slots_of_a_master(dtype, call):
    rule = MixedPrecision(Adam())
    x = normal(3 * BLOCK, dtype, 0)
    state = setup(rule, x)
    state.state = state.state._replace(state=with_slots(state.state.state, dtype))
    for seed in range(1, 4):
        g = normal(3 * BLOCK, dtype, seed)
        expected = by_arrays(rule, state.state, x, g)
        state, x, used = step(call, state, x, g)
        assert used == {"(root)": "kernels"}
        assert_same_bits((state.state, x), expected)


@halves
def test_slots_narrower_than_double_are_left_to_the_arrays(dtype):
    x = np.ones(3)
    state = setup(Momentum(), x)
    state.state = with_slots(state.state, dtype)
    state, _, used = step(update_, state, x, x.copy())
    assert used == {"(root)": "arrays"}
    assert state.state.v.dtype == dtype


@BOTH
@halves
def test_leaves_of_all_dtypes_side_by_side(dtype, call):
    kinds = [dtype, np.dtype("f4"), np.dtype("f8"), *HALVES]
    for rule in Adam(), Momentum(), *CHAINS:
        model = {str(k): normal(BLOCK + k, kind, k) for k, kind in enumerate(kinds)}
        gradients = [
            {key: normal(x.shape, x.dtype, seed) for key, x in model.items()} for seed in (11, 12)
        ]
        used = checked_steps(call, rule, model, gradients, assert_same_bits)
        assert used == all_by_kernels(model)


# --- states ------------------------------------------------------------------------------------


@halves
@parametrize("rule", [*map(example, ELEMENTWISE), *CHAINS])
def test_a_state_is_written_where_it_lies(rule, dtype):
    x = normal(3 * BLOCK, dtype, 1)
    state = setup(rule, x)
    before = [id(a) for a in flat(state.state)]
    for seed in (2, 3):
        after, new = update_(state, x, normal(3 * BLOCK, dtype, seed))
        assert after is state
        assert new is x
        assert [id(a) for a in flat(state.state)] == before


def flat(state):
    return [a for part in state for a in flat(part)] if isinstance(state, tuple) else [state]


@halves
@parametrize("rule", [*map(example, ELEMENTWISE), *CHAINS])
def test_a_pure_update_writes_into_nothing_given(rule, dtype):
    x, g = normal(3 * BLOCK, dtype, 1), normal(3 * BLOCK, dtype, 2)
    state = setup(rule, x)
    given = [a.copy() for a in (x, g, *flat(state.state))]
    after, new = update(state, x, g)
    assert_same_bits([x, g, *flat(state.state)], given)
    for a in (new, *flat(after.state)):
        assert not any(np.shares_memory(a, b) for b in (x, g, *flat(state.state)) if b.ndim)


@BOTH
@halves
def test_what_a_held_back_step_leaves_alone(dtype, call):
    rule = OptimiserChain(AccumGrad(3), Adam(), Momentum())
    x = normal(BLOCK + 1, dtype, 1)
    state = setup(rule, x)
    first = [a.copy() for a in (x, *flat(state.state[1:]))]
    for seed in (2, 3):
        state, x, used = step(call, state, x, normal(BLOCK + 1, dtype, seed))
        assert used == {"(root)": "kernels"}
        assert_same_bits([x, *flat(state.state[1:])], first)
    assert state.state[0].sum.dtype == np.float32


@BOTH
@halves
def test_a_users_rule_compiled(dtype, call):
    pytest.importorskip("numba")

    model = model_of_sizes(dtype, 0)
    gradients = [model_of_sizes(dtype, k) for k in (1, 2)]
    rule = OptimiserChain(WeightDecay(0.1), Average(), Momentum())
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used == all_by_kernels(model)


# --- circumstances change no bit ---------------------------------------------------------------


@pytest.fixture
def _settings():
    """Leave the settings of the kernels as they were."""
    before = cpu.kernels.settings()
    yield
    for kernels in cpu.available.values():
        kernels.set_block(*before[:2])
        kernels.set_work_per_thread(before[2])
        kernels.set_num_threads(0)


RULES = [
    *map(example, ELEMENTWISE),
    *CHAINS,
    OptimiserChain(AccumGrad(2), ClipNorm(0.1, 2), Adam()),
]


def trained(call=update_):
    model = {f"{k} {d}": model_of_sizes(d, k) for k in range(len(RULES)) for d in HALVES}
    state = {key: setup(RULES[int(key.split()[0])], x) for key, x in model.items()}
    for seed in range(1, 4):
        grad = {
            key: {name: normal(a.shape, a.dtype, seed) for name, a in part.items()}
            for key, part in model.items()
        }
        state, model, used = step(call, state, model, grad)
        assert {*used.values()} == {"kernels"}
    return {"state": state, "model": model}


@pytest.fixture(scope="module")
def expected():
    return trained()


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("threads", [1, 2, 5])
@BOTH
def test_threads(threads, call, expected):
    set_num_threads(threads)
    cpu.kernels.set_work_per_thread(1)
    assert_same_bits(trained(call), expected)


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("blocks", [(32, 32), (96, 64), (4096, 32), (4096, 4096)])
def test_blocks(blocks, expected):
    cpu.kernels.set_block(*blocks)
    assert_same_bits(trained(), expected)


@pytest.mark.parametrize("name", cpu.available_isas)
def test_instruction_sets(name, expected, monkeypatch):
    monkeypatch.setattr(cpu, "kernels", cpu.available[name])
    assert_same_bits(trained(), expected)


@BOTH
@halves
def test_where_an_array_begins(dtype, call):
    """Blocks begin at cache lines, but for the first."""
    rule = OptimiserChain(Momentum(), ClipNorm(1e-3, np.inf), Adam())
    n = 6 * BLOCK - 3
    results = []
    for byte in range(0, 64, 2):
        x = beginning_at(byte, normal(n, dtype, 1))
        results.append(step(call, setup(rule, x), x, normal(n, dtype, 2)))
        around = x.base.copy()
        around[x.ctypes.data - x.base.ctypes.data :][: x.nbytes] = 0
        assert not around.any()
    for other in results[1:]:
        assert_same_bits(other[:2], results[0][:2])


@halves
@parametrize("rule", [Descent(), Adam(), CHAINS[0]])
def test_large_new_arrays_have_the_bits_of_those_written_in_place(rule, dtype):
    """Blocks are shorter then."""
    x, g = normal(800_003, "f4", 1).astype(dtype), normal(800_003, "f4", 2).astype(dtype)
    new = update(setup(rule, x), x, g)
    assert_same_bits(new, update_(setup(rule, x), x.copy(), g))


# --- gradients that are not finite -------------------------------------------------------------


@BOTH
@halves
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("of_g", ["narrow", "float32"])
def test_gradients_that_are_not_finite_are_passed_by(dtype, call, bad, of_g):
    model = {"a": normal(BLOCK + 9, dtype, 1), "b": normal(BLOCK + 9, dtype, 2)}
    before = {key: x.copy() for key, x in model.items()}
    grad = {key: normal(BLOCK + 9, dtype, 3) for key in model}
    if of_g == "float32":
        grad = {key: g.astype(np.float32) for key, g in grad.items()}
    grad["b"][BLOCK + 5] = bad
    state, model = call(setup(Adam(), model), model, grad, on_nonfinite="skip")
    assert_same_bits(model["b"], before["b"])
    assert np.any(model["a"] != before["a"])
    assert (state["a"].skipped, state["b"].skipped) == (0, 1)


@BOTH
@halves
def test_a_gradient_beyond_float16_but_within_float32(dtype, call):
    """It is cast to the dtype of the step, so it is finite there."""
    x, g = np.zeros(3, dtype), np.full(3, 1e6)
    _, x = call(setup(Descent(2.0**-20), x), x, g, on_nonfinite="raise")
    assert_same_bits(x, np.full(3, -1e6 * 2.0**-20, np.float32).astype(dtype))


# --- flat vectors ------------------------------------------------------------------------------


@halves
def test_a_flat_gradient_is_not_rounded_to_the_dtype_of_the_parameters(dtype):
    model = {"a": np.zeros(3, dtype), "b": np.zeros((2, 2), dtype)}
    flat_model, re = destructure(model)
    grad = {"a": np.full(3, 1 + 2.0**-20, np.float32), "b": np.full((2, 2), 1e6)}
    g = re.flatten_gradient(grad)
    assert_same_bits(g, np.array([*[1 + 2.0**-20] * 3, *[1e6] * 4], np.float32))
    rule = OptimiserChain(WeightDecay(0.1), Descent(2.0**-20))
    _, new, used = step(update_, setup(rule, flat_model), flat_model, g)
    assert used == {"(root)": "kernels"}
    _, by_tree = update_(setup(rule, model), model, grad)
    assert_same_bits(re(new), by_tree)


@halves
def test_a_flat_gradient_of_the_dtype_of_the_parameters_stays_so(dtype):
    model = {"a": normal(3, dtype, 1), "b": normal(2, dtype, 2)}
    _, re = destructure(model)
    assert_same_bits(re.flatten_gradient(model), re.flatten(model))
    assert re.flatten_gradient({"b": model["b"]}).dtype == dtype
    assert re.flatten_gradient(None).dtype == dtype
    out = np.zeros(5, dtype)
    assert re.flatten_gradient({"a": np.full(3, 1 / 3)}, out=out) is out
    assert_same_bits(out[:3], np.full(3, np.float32(1 / 3)).astype(dtype))


@halves
def test_flat_gradients_of_tied_parameters_are_summed_in_float32(dtype):
    w = np.zeros(2, dtype)
    _, re = destructure([w, w])
    g = np.full(2, 60000).astype(dtype)
    assert_same_bits(re.flatten_gradient([g, g]), 2 * g.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_flat_gradients_of_other_libraries(library, dtype):
    xp = pytest.importorskip("jax.numpy" if library == "jax" else "torch")
    half, single = getattr(xp, dtype), xp.float32
    model = {"a": xp.zeros(3, dtype=half), "b": xp.zeros(2, dtype=half)}
    flat_model, re = destructure(model)
    assert flat_model.dtype == half
    exact = {key: xp.asarray([1 + 2.0**-20] * len(x), dtype=single) for key, x in model.items()}
    g = re.flatten_gradient(exact)
    assert g.dtype == single
    assert g.tolist() == [1 + 2.0**-20] * 5
    assert re.flatten_gradient(model).dtype == half
    _, new = update(setup(Descent(1.0), flat_model), flat_model, g)
    assert new.dtype == half
