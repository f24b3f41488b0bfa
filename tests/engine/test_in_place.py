"""What `update_` writes: the arrays of a state where they lie, whatever the parameter's layout."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from util import (
    LAYOUTS,
    UNMEASURED,
    arrays_in,
    assert_near,
    assert_same_bits,
    example,
    layouts_of,
    normal,
    parametrize,
    snapshot,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    ElementwiseRule,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rprop,
    Rule,
    freeze_,
    setup,
    update,
    update_,
)

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.longdouble, np.complex128]
RULES = [
    *map(example, UNMEASURED),
    OptimiserChain(ClipGrad(1.0), Momentum(), OptimiserChain(ClipNorm(1e6), Adam())),
    OptimiserChain(AccumGrad(2), Adam()),
    MixedPrecision("float64", OptimiserChain(AccumGrad(2), Momentum())),
]


def taken(rule, dtype):
    """Tell whether a rule takes parameters of this dtype."""
    try:
        rule.init(np.zeros(2, dtype))
    except TypeError:
        return False
    return True


def ids(state):
    return [(place, id(a)) for place, a in arrays_in(state)]


@parametrize("dtype", DTYPES)
@parametrize("rule", RULES)
def test_a_state_keeps_its_arrays_and_has_the_numbers_of_the_pure_update(rule, dtype):
    if not taken(rule, dtype):
        pytest.skip("the rule compares numbers")
    for layout in set(layouts_of(dtype)) - {"broadcast", "read-only"}:
        model = {"w": LAYOUTS[layout](normal((3, 4), dtype, 1))}
        state = setup(rule, model)
        expected = state, model
        leaf_state, before = state["w"].state, ids(state)
        for k in range(4):
            grad = {"w": normal((3, 4), dtype, 2 + k)}
            expected = update(*expected, grad)
            update_(state, model, grad)
            assert ids(state) == before
            assert state["w"].state is leaf_state
        same = assert_same_bits if isinstance(rule, ElementwiseRule) else assert_near
        same(state["w"].state, expected[0]["w"].state)
        np.testing.assert_array_equal(model["w"], expected[1]["w"])


WINDOWS = {"rows": np.s_[1:3], "columns": np.s_[:, 1:3], "tile": np.s_[3:1:-1, ::2]}


def window(state, where):
    """Return views of a part of a state; counts, which are of no shape, are shared."""
    if isinstance(state, tuple):
        return tuple(window(part, where) for part in state)
    return state[where] if state.ndim else state


@parametrize("dtype", [np.float64, np.float16, np.complex64])
@parametrize("rule", RULES)
def test_a_state_of_views_moves_what_it_views(rule, dtype):
    if not taken(rule, dtype):
        pytest.skip("the rule compares numbers")
    for where in WINDOWS.values():
        x = normal((5, 4), dtype, 1)
        leaf = setup(rule, x)
        if any(a.ndim and a.shape != x.shape for _, a in arrays_in(leaf.state)):
            pytest.skip("the rule keeps arrays of other shapes")
        alone, outside = x[where].copy(), np.ones(x.shape, bool)
        outside[where] = False
        before = x.copy()
        expected = setup(rule, alone)
        for k in range(4):
            g = normal(alone.shape, dtype, 2 + k)
            update_(Leaf(rule, window(leaf.state, where)), x[where], g)
            update_(expected, alone, g)
        seen = [a for _, a in arrays_in(window(leaf.state, where))]
        assert_near([x[where], *seen], [alone, *(a for _, a in arrays_in(expected.state))])
        np.testing.assert_array_equal(x[outside], before[outside])


@parametrize("layout", ["read-only", "broadcast"])
@parametrize("dtype", [np.float32, np.float16])
def test_slots_that_cannot_be_written_are_replaced(layout, dtype):
    x, g = np.ones((2, 3), dtype)[:, ::2], np.ones((2, 2), dtype)
    leaf = setup(Momentum(0.5), x)
    old = LAYOUTS[layout](leaf.state.v)
    leaf.state = leaf.state._replace(v=old)
    update_(leaf, x, g)
    assert leaf.state.v is not old
    assert not old.any()
    np.testing.assert_array_equal(leaf.state.v, 0.5)
    np.testing.assert_array_equal(x, 0.5)


def test_states_written_in_place_at_frozen_and_skipped_places_stay():
    model = {"a": np.ones((2, 4))[:, ::2], "b": np.ones(3, np.float16), "c": np.ones(2, complex)}
    state = setup(Adam(), model)
    freeze_(state["a"])
    before = snapshot([state["a"].state, state["b"].state])
    grad = {"a": np.ones((2, 2)), "b": np.full(3, np.nan, np.float16), "c": np.ones(2)}
    update_(state, model, grad, on_nonfinite="skip")
    assert snapshot([state["a"].state, state["b"].state]) == before
    assert state["c"].state.t == 1


@dataclasses.dataclass(frozen=True)
class Raising(Momentum):
    """Fails at the largest gradient, on the array path."""

    def apply(self, state, x, dx, *higher):
        if np.any(dx > 99):
            raise KeyError("stop here")
        return super().apply(state, x, dx)


def test_a_late_error_leaves_states_as_they_were():
    model = {k: np.ones((2, 4))[:, ::2] for k in "abc"}
    state = setup(Raising(), model)
    update_(state, model, {k: np.ones((2, 2)) for k in "abc"})
    before = snapshot([state, model])
    with pytest.raises(KeyError):
        update_(state, model, {"a": np.ones((2, 2)), "c": np.full((2, 2), 100.0)})
    assert snapshot([state, model]) == before


@parametrize("slot", ["the parameter", "its own slot", "a slot for the kernels"])
def test_states_that_overlap_what_is_written_elsewhere_are_refused(slot):
    memory = np.zeros((2, 4))
    model = {"a": memory[:, ::2], "b": np.ones(2)}
    state = setup(Adam(), model)
    m, v, t = state["a"].state
    if slot == "the parameter":
        m = memory[:, :2]
    elif slot == "its own slot":
        m = memory[::-1, ::2]
    else:
        state["b"].state = state["b"].state._replace(m=v[0])
    state["a"].state = state["a"].state._make((m, v, t))
    before = snapshot([state, model])
    with pytest.raises(ValueError, match="overlap in memory"):
        update_(state, model, {"a": np.ones((2, 2)), "b": np.ones(2)})
    assert snapshot([state, model]) == before


def test_slots_that_lie_between_each_other_do_not_overlap():
    memory = np.zeros((3, 8))
    model = {"a": memory[:, 0], "b": np.ones(3)}
    state = setup(Adam(), model)
    _, _, t = state["a"].state
    state["a"].state = state["a"].state._make((memory[:, 1], memory[:, 2], t))
    state["b"].state = state["b"].state._replace(m=memory[1, 3:6])
    expected = update(state, model, {"a": np.ones(3), "b": np.ones(3)})
    update_(state, model, {"a": np.ones(3), "b": np.ones(3)})
    assert_near([state, model], list(expected))
    np.testing.assert_array_equal(memory[:, 1], state["a"].state.m)
    assert not memory[:, 6:].any()


@dataclasses.dataclass
class Moments:
    v: np.ndarray
    count: int


@dataclasses.dataclass(frozen=True)
class Keeping(Rule):
    """Keeps its numbers in a container of some kind."""

    kind: str

    def init(self, x):
        v = np.zeros_like(x)
        return {
            "array": v,
            "list": [v, 0],
            "dict": {"count": 0, "v": v},
            "nested": ({"v": v}, [v.copy()]),
            "namespace": SimpleNamespace(v=v, count=0),
            "dataclass": Moments(v, 0),
            "twice": (v, v),
        }[self.kind]

    def apply(self, state, x, dx):
        if self.kind == "array":
            return 0.5 * state + dx, dx
        if self.kind == "list":
            return [0.5 * state[0] + dx, state[1] + 1], dx
        if self.kind == "dict":
            return {"v": 0.5 * state["v"] + dx, "count": state["count"] + 1}, dx
        if self.kind == "nested":
            return ({"v": 0.5 * state[0]["v"] + dx}, [state[0]["v"]]), dx
        if self.kind == "twice":
            return (0.5 * state[0] + dx, state[1] + 2), dx
        return type(state)(v=0.5 * state.v + dx, count=state.count + 1), dx


def first_slot(state):
    if isinstance(state, np.ndarray):
        return state
    if isinstance(state, tuple | list):
        return first_slot(state[0])
    return state["v"] if isinstance(state, dict) else state.v


@parametrize("kind", ["array", "list", "dict", "nested", "namespace", "dataclass", "twice"])
def test_users_states_of_every_kind_are_written_in_place(kind):
    x = np.ones(3)
    leaf = setup(Keeping(kind), x)
    expected = leaf, x.copy()
    slot = first_slot(leaf.state)
    for _ in range(3):
        expected = update(*expected, np.ones(3))
        update_(leaf, x, np.ones(3))
    assert first_slot(leaf.state) is slot
    np.testing.assert_array_equal(slot, 1.75)
    assert_same_bits(leaf.state, expected[0].state)
    if kind in ("list", "dict"):
        assert leaf.state[1 if kind == "list" else "count"] == 3
    if kind in ("namespace", "dataclass"):
        assert leaf.state.count == 3


@dataclasses.dataclass(frozen=True)
class Crossing(ElementwiseRule):
    """What one slot becomes lies in the memory of the other."""

    slots = ("a", "b")

    def start(self):
        return 1.0, 2.0

    @staticmethod
    def step(x, dx, state, coefs):
        a, b = state
        return dx, (b[:], a[:])


def test_slots_that_change_places():
    x = np.ones(4, complex)
    leaf = setup(Crossing(), x)
    update_(leaf, x, np.ones(4))
    np.testing.assert_array_equal(leaf.state.a, 2)
    np.testing.assert_array_equal(leaf.state.b, 1)


def test_tied_places_share_a_state_that_is_written_in_place():
    w = np.ones((2, 6))[:, ::2]
    model = {"encoder": w, "decoder": w.T}
    state = setup(Momentum(0.5), model)
    v = state["encoder"].state.v
    update_(state, model, {"encoder": np.ones((2, 3)), "decoder": np.ones((3, 2))})
    assert state["decoder"].state.v is v
    np.testing.assert_array_equal(v, 1.0)


def test_a_mapped_state_is_written_in_its_file(tmp_path):
    x = np.ones(3, np.float32)
    leaf = setup(Momentum(0.5), x)
    mapped = np.memmap(tmp_path / "v", np.float32, "w+", shape=3)
    leaf.state = leaf.state._replace(v=mapped)
    update_(leaf, x, np.ones(3, np.float32))
    mapped.flush()
    assert leaf.state.v is mapped
    np.testing.assert_array_equal(np.fromfile(tmp_path / "v", np.float32), 0.5)


# --- tensors ---------------------------------------------------------------------------------


def columns(torch, dtype):
    return torch.ones(3, 4, dtype=dtype)[:, 1:3]


def turned(torch, dtype):
    return torch.ones(4, 3, dtype=dtype).T


@parametrize("rule", [r for r in RULES if not isinstance(r, Rprop)])
@parametrize("dtype", ["float32", "float16", "bfloat16", "complex64"])
@parametrize("lay_out", [columns, turned])
def test_states_of_tensors_are_written_in_place(rule, dtype, lay_out):
    torch = pytest.importorskip("torch")
    model = {"w": lay_out(torch, getattr(torch, dtype))}
    try:
        state = setup(rule, model)
    except TypeError:
        pytest.skip("the rule compares numbers")
    expected = state, model
    before = [(id(a), a.data_ptr()) for a in tensors_in(state["w"].state)]
    for k in range(3):
        grad = {"w": torch.full_like(model["w"], k + 1.0)}
        expected = update(*expected, grad)
        update_(state, model, grad)
    assert [(id(a), a.data_ptr()) for a in tensors_in(state["w"].state)] == before
    for a, b in zip(tensors_in(state["w"].state), tensors_in(expected[0]["w"].state), strict=True):
        torch.testing.assert_close(a, b)


def tensors_in(state):
    if isinstance(state, tuple):
        return [a for part in state for a in tensors_in(part)]
    return [state]


def test_a_state_of_tensors_that_are_views_moves_what_they_view():
    torch = pytest.importorskip("torch")
    x, y = torch.ones(4, 4), torch.ones(4, 2)
    whole, alone = setup(Adam(0.1), x), setup(Adam(0.1), y)
    for k in range(3):
        part = tuple(s[:, 1:3] if s.ndim else s for s in whole.state)
        update_(Leaf(Adam(0.1), part), x[:, 1:3], torch.full((4, 2), k + 1.0))
        update_(alone, y, torch.full((4, 2), k + 1.0))
    torch.testing.assert_close(x[:, 1:3], y)
    torch.testing.assert_close(whole.state.v[:, 1:3], alone.state.v)
    assert whole.state.t == alone.state.t == 3


def test_the_optimiser_of_pytorch_keeps_its_tensors():
    torch = pytest.importorskip("torch")
    from optimisers.torch._optimizer import Optimizer

    w = torch.nn.Parameter(torch.ones(4, 3)[:, ::2])
    optimiser = Optimizer([w], Adam(0.1))
    w.grad = torch.ones(4, 2)
    optimiser.step()
    before = {name: id(a) for name, a in optimiser.state[w].items()}
    optimiser.step()
    assert {name: id(a) for name, a in optimiser.state[w].items()} == before
    assert optimiser.state[w]["t"] == 2
