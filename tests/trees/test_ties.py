"""Ties: which arrays are one parameter, how values go from view to view, and what updates do."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimisers import (
    Adam,
    ClipGrad,
    Descent,
    KeyPath,
    Leaf,
    Momentum,
    freeze_,
    setup,
    update,
    update_,
)
from optimisers._arrays.sharing import carry, laid_out, same_elements, view_of
from optimisers._trees.parameters import owners

pytestmark = pytest.mark.elsewhere

BOTH = pytest.mark.parametrize("call", [update, update_])


def tied(*arrays):
    """Return what `owners` says of arrays at the places a, b, c, ..."""
    return owners([(KeyPath(name), x) for name, x in zip("abcdefghijkl", arrays, strict=False)])


def addresses(x):
    """Return the address of each element of `x`, in an array of its shape."""
    found = np.full(x.shape, x.__array_interface__["data"][0])
    for index, stride in zip(np.indices(x.shape), x.strides, strict=True):
        found += index * stride
    return found


def refused(*arrays):
    with pytest.raises(ValueError, match="overlap in memory") as caught:
        tied(*arrays)
    return str(caught.value)


# --- random views ----------------------------------------------------------------------------


OPERATIONS = ["transpose", "flip", "reshape", "ravel", "longer", "squeeze"]


@st.composite
def bases(draw, dtype=np.float64):
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def same_view(draw, x):
    """Return a view of exactly the elements of `x`."""
    for _ in range(draw(st.integers(0, 4))):
        match draw(st.sampled_from(OPERATIONS)):
            case "ravel" if np.shares_memory(x, x.reshape(-1)):
                x = x.reshape(-1)
            case "transpose":
                x = x.transpose(draw(st.permutations(range(x.ndim))))
            case "flip" if x.ndim:
                x = np.flip(x, draw(st.integers(0, x.ndim - 1)))
            case "longer" if x.ndim < 6:
                x = np.expand_dims(x, draw(st.integers(0, x.ndim)))
            case "squeeze":
                x = x.squeeze()
            case "reshape":
                x = regrouped(draw, x)
    return x


def regrouped(draw, x):
    """Return `x` in another shape, or as it is where that would be a copy."""
    shape = list(x.shape)
    if len(shape) > 1 and draw(st.booleans()):
        k = draw(st.integers(0, len(shape) - 2))
        shape[k : k + 2] = [shape[k] * shape[k + 1]]
    elif shape:
        k = draw(st.integers(0, len(shape) - 1))
        divisors = [d for d in range(1, shape[k] + 1) if shape[k] % d == 0]
        d = draw(st.sampled_from(divisors))
        shape[k : k + 1] = [d, shape[k] // d]
    y = x.reshape(shape)
    return y if np.shares_memory(x, y) else x


def part_of(draw, x):
    """Return a view of some of the elements of `x`, at least one."""
    index = []
    for n in x.shape:
        start = draw(st.integers(0, n - 1))
        stop = draw(st.integers(start + 1, n))
        index.append(slice(start, stop, draw(st.integers(1, 3))))
    return x[(*index, ...)]  # the ellipsis makes it an array even without axes


@st.composite
def views_of_one(draw, least=2, most=3):
    """Return several views of exactly the same elements, which are part of a larger array."""
    x = draw(bases())
    if draw(st.booleans()):
        x = part_of(draw, x)
    return [same_view(draw, x) for _ in range(draw(st.integers(least, most)))]


@settings(deadline=None)
@given(views_of_one(2, 2))
def test_carry_goes_by_the_addresses(views):
    source, target = views
    values = np.random.default_rng(0).standard_normal(source.shape)
    at = dict(zip(addresses(source).flat, values.flat, strict=True))
    expected = np.array([at[a] for a in addresses(target).flat]).reshape(target.shape)
    np.testing.assert_array_equal(carry(values, source, target), expected)
    np.testing.assert_array_equal(carry(values, view_of(source), view_of(target)), expected)


@settings(deadline=None)
@given(views_of_one(2, 2))
def test_carried_from_an_array_laid_out_alike_is_a_view(views):
    source, target = views
    values = np.random.default_rng(0).standard_normal(source.shape)
    new = laid_out(values, source)
    np.testing.assert_array_equal(new, values)
    assert not np.shares_memory(new, values)
    other = carry(new, source, target)
    assert same_elements(new, other)
    new[...] = 7
    assert (other == 7).all()


@settings(deadline=None)
@given(views_of_one())
def test_views_of_the_same_elements_are_one(views):
    assert all(same_elements(a, b) for a in views for b in views)
    assert tied(*views) == [0] * len(views)


@settings(deadline=None)
@given(st.data())
def test_owners_by_sets_of_addresses(data):
    """Compare with the definition: which addresses each array has."""
    base = data.draw(bases(data.draw(st.sampled_from([np.float64, np.complex128]))))
    arrays = []
    for _ in range(data.draw(st.integers(2, 4))):
        x = same_view(data.draw, part_of(data.draw, base))
        if x.dtype.kind == "c":
            x = data.draw(st.sampled_from([x, x.real, x.imag]))
        arrays.append(x)

    def cells(x):
        return {int(a) + k for a in addresses(x).flat for k in range(0, x.itemsize, 8)}

    expected = []
    for k, x in enumerate(arrays):
        same = [j for j in range(k) if cells(arrays[j]) == cells(x) and arrays[j].dtype == x.dtype]
        expected.append(min(same, default=k))
        if any(cells(arrays[j]) & cells(x) for j in range(k) if j not in same):
            refused(*arrays)
            return
    assert tied(*arrays) == expected


# --- which arrays are one --------------------------------------------------------------------


def cube():
    return np.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:],
        lambda x: x.T,
        lambda x: x.reshape(-1),
        lambda x: x.reshape(-1)[::-1],
        lambda x: x.reshape(4, 6),
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: x[::-1, ::-1, ::-1],
        lambda x: x.transpose(1, 2, 0),
        lambda x: x.transpose(2, 0, 1)[::-1],
        lambda x: x[None, :, None],
        lambda x: np.asfortranarray(x.T),
        lambda x: x.view(np.recarray),
    ],
)
def test_whole_views(view):
    x = cube()
    assert same_elements(x, view(x))
    assert tied(x, view(x)) == [0, 0]
    assert tied(np.zeros(2), view(x), x, np.zeros(2), x.T) == [0, 1, 1, 3, 1]


def test_strided_arrays_and_their_views():
    x = np.zeros((4, 5))[:, ::2]
    assert tied(x, x.T, x[::-1]) == [0, 0, 0]
    x = np.zeros((6, 7, 8))[::2, 1:6:3, ::-3]
    assert tied(x, x.transpose(1, 2, 0), x[:, ::-1]) == [0, 0, 0]
    x = np.zeros((3, 4), order="F")
    assert tied(x, x.T, x.reshape(-1, order="F")) == [0, 0, 0]
    x = np.zeros((9, 1, 4))[:, ::-1]
    assert tied(x, x[:, 0], x.reshape(36)) == [0, 0, 0]


def test_what_lies_beside_each_other_is_not_one():
    x = np.zeros(10)
    assert tied(x[:5], x[5:]) == [0, 1]
    assert tied(x[::2], x[1::2]) == [0, 1]
    assert tied(x[::3], x[1::3], x[2::3], x[::3][::-1]) == [0, 1, 2, 0]
    w = np.zeros((6, 9))
    assert tied(w[:, :3], w[:, 3:6], w[:, 6:]) == [0, 1, 2]
    assert tied(w[::2, ::2], w[1::2, 1::2], w[::2, 1::2], w[1::2, ::2]) == [0, 1, 2, 3]


def test_empty_arrays_are_one_only_if_the_same():
    x = np.zeros((0, 3))
    assert tied(x, x.T, x, np.zeros(0)) == [0, 1, 0, 3]
    w = np.zeros(4)
    assert tied(w, w[2:2]) == [0, 1]


def test_arrays_without_axes():
    x = np.zeros(())
    assert tied(x, x, x[None], x.reshape(1, 1), np.zeros(())) == [0, 0, 0, 0, 4]
    w = np.zeros(3)
    assert tied(w[0:1], w[1, ...], w[0, ...]) == [0, 1, 0]


def test_parts_of_complex_numbers():
    z = np.zeros(4, complex)
    assert tied(z.real, z.imag) == [0, 1]
    assert tied(z, z[::-1]) == [0, 0]
    assert "dtypes complex128 and float64" in refused(z, z.imag)


def test_fields_of_records():
    table = np.zeros(4, [("a", "f8"), ("b", "f4"), ("c", "f4"), ("both", "f4", 2)])
    assert tied(table["a"], table["b"], table["c"], table["a"][::-1]) == [0, 1, 2, 0]
    both = table["both"]
    assert tied(both[:, 0], table["a"], both[:, 1]) == [0, 1, 2]
    assert "a and c" in refused(both, table["a"], both[:, 1])


@pytest.mark.parametrize("dtype", ["f4", "f2", "c16", ">f8"])
def test_bytes_that_mean_something_else_overlap(dtype):
    x = np.zeros(4)
    assert "a and b" in refused(x, x.view(dtype))


def test_mapped_files(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(4, 6))
    assert tied(x, x.T, np.asarray(x)) == [0, 0, 0]
    assert tied(x[:2], x[2:]) == [0, 1]
    refused(x[:3], x[2:])


def test_an_overlap_in_part_names_both_places():
    x = np.zeros(10)
    text = refused(np.zeros(3), x[:6], x[5:])
    assert "at b and c" in text
    assert "shapes (6,) and (5,)" in text
    assert "copy one of them" in text


@pytest.mark.parametrize(
    "pair",
    [
        lambda x: (x, x[:1]),
        lambda x: (x[0], x.T),
        lambda x: (x, np.broadcast_to(x, (5, *x.shape))),
        lambda x: (np.broadcast_to(x[0], x.shape), x[0]),
        lambda x: (x[:, ::2], x[:, ::3]),
        lambda x: (x, np.diagonal(x)),
        lambda x: (np.lib.stride_tricks.sliding_window_view(x[0], 2), x[1:], x[0]),
    ],
)
def test_overlaps_in_part(pair):
    refused(*pair(np.zeros((4, 7))))


def test_an_array_that_overlaps_itself():
    x = np.broadcast_to(np.zeros(3), (4, 3))
    assert tied(x, x) == [0, 0]
    refused(x, x[:])


def test_parts_far_apart():
    """Two columns of a huge matrix, of which no memory is taken."""
    column = np.lib.stride_tricks.as_strided(np.zeros(2), (2**10, 2), (2**31, 8))
    left, right = column[:, 0], column[:, 1]
    assert tied(left, right, left[::-1]) == [0, 1, 0]
    assert "b and c" in refused(left, right, column[5:, 1])


@pytest.mark.parametrize(
    "arrays",
    [
        lambda n: [np.zeros(3) for _ in range(n)],
        lambda n: list(np.zeros((n, 3))),
        lambda n: list(np.zeros((3, n)).T),
        lambda n: [x for w in [np.zeros(3) for _ in range(n // 2)] for x in (w, w[::-1])],
    ],
    ids=["separate", "rows", "columns", "tied"],
)
def test_work_grows_with_the_number_of_arrays(arrays):
    def calls(n):
        places = [(KeyPath(k), x) for k, x in enumerate(arrays(n))]
        count = 0

        def tick(frame, event, arg):
            nonlocal count
            count += event.endswith("call")

        before = sys.getprofile()
        sys.setprofile(tick)
        try:
            owners(places)
        finally:
            sys.setprofile(before)
        return count

    assert calls(2000) < 11 * calls(200)


def test_torch_views():
    torch = pytest.importorskip("torch")
    w = torch.zeros(3, 4)
    assert tied(w, w.T, w.view(-1), w[:], torch.zeros(2)) == [0, 0, 0, 0, 4]
    assert tied(w[:, :2], w[:, 2:]) == [0, 1]
    refused(w, w[1:])
    refused(w, w.expand(2, 3, 4))
    z = torch.zeros(3, dtype=torch.complex64)
    refused(z, z.conj())
    assert tied(w.to("meta"), w.to("meta"), w.to_sparse()) == [0, 1, 2]
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(carry(x, x, x.T), x.T)


def test_arrays_of_jax_are_no_tie():
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.zeros(3)
    assert tied(x, x, jnp.zeros(3)) == [0, 1, 2]
    assert not same_elements(x, jnp.zeros(3))


# --- setup -----------------------------------------------------------------------------------


def test_tied_places_share_a_leaf():
    w = np.zeros((2, 3))
    model = {"a": w, "b": [np.zeros(3), w], "c": SimpleNamespace(t=w.T, n=3)}
    state = setup(Adam(), model)
    assert state["a"] is state["b"][1] is state["c"].t
    assert state["b"][0] is not state["a"]


def test_setup_refuses_partial_overlaps():
    x = np.zeros(10)
    with pytest.raises(ValueError, match=re.escape("['a'][0] and ['b']")):
        setup(Adam(), {"a": [x], "b": x[1:]})


def test_setup_shape_of_state_is_that_of_the_first_place():
    w = np.zeros((2, 3))
    state = setup(Momentum(), {"a": w.T, "b": w})
    assert state["a"].state.v.shape == (3, 2)


# --- updates ---------------------------------------------------------------------------------


def as_one(views, grads):
    """Return the sum of gradients of views, as the first view sees it."""
    total = np.zeros(views[0].shape)
    for view, grad in zip(views, grads, strict=True):
        at = dict(zip(addresses(view).flat, grad.flat, strict=True))
        total += np.array([at[a] for a in addresses(views[0]).flat]).reshape(total.shape)
    return total


@BOTH
@settings(max_examples=200, deadline=None)
@given(views_of_one(2, 4), st.data())
def test_ties_equal_one_parameter_with_the_gradients_summed(call, views, data):
    repeated = [*views, views[data.draw(st.integers(0, len(views) - 1))]]
    views = data.draw(st.permutations(repeated))
    random = np.random.default_rng(0)
    model = dict(enumerate(views))
    alone = views[0].copy()
    state, state_alone = setup(Adam(0.1), model), setup(Adam(0.1), alone)
    before = [x.copy() for x in views]
    for _ in range(3):
        grads = [random.standard_normal(x.shape) for x in views]
        if call is update:
            before = [x.copy() for x in model.values()]
        old = model
        state, model = call(state, old, dict(enumerate(grads)))
        state_alone, alone = call(state_alone, alone, as_one(views, grads))
        np.testing.assert_array_equal(model[0], alone)
        expected = [carry(alone, views[0], x) for x in views]
        for x, y in zip(model.values(), expected, strict=True):
            np.testing.assert_array_equal(x, y)
        if call is update:
            assert all(map(np.array_equal, old.values(), before))
            assert not any(np.shares_memory(old[k], model[k]) for k in model)
        assert tied(*model.values()) == [0] * len(model)
    assert len({id(leaf) for leaf in state.values()}) == 1


@pytest.mark.parametrize("grad", [None, {"view": np.ones((3, 2))}])
def test_an_array_at_two_places_stays_one_beside_its_view(grad):
    w = np.zeros((2, 3))
    model = {"view": w.T, "there": w, "again": w}
    _, new = update(setup(Descent(), model), model, grad)
    assert new["there"] is new["again"]
    assert tied(*new.values()) == [0, 0, 0]


@BOTH
def test_a_gradient_at_one_place_moves_all(call):
    w = np.zeros((2, 3))
    model = {"a": w, "b": w.T, "c": np.zeros(2)}
    state = setup(Descent(1.0), model)
    state, model = call(state, model, {"b": np.arange(6.0).reshape(3, 2)})
    np.testing.assert_array_equal(model["b"], -np.arange(6.0).reshape(3, 2))
    assert same_elements(model["a"], model["b"])


@BOTH
def test_ties_without_gradient_stay_ties(call):
    w = np.ones((2, 3))
    model = {"a": w[::-1], "b": w.reshape(-1), "c": np.zeros(2), "d": w}
    _, model = call(setup(Descent(1.0), model), model, {"c": np.ones(2)})
    assert tied(*model.values()) == [0, 0, 2, 0]
    np.testing.assert_array_equal(model["a"], np.ones((2, 3)))


@BOTH
def test_frozen_ties_stay(call):
    w = np.ones((2, 3))
    model = {"a": w, "b": w.T}
    state = setup(Descent(1.0), model)
    freeze_(state["b"])
    state, model = call(state, model, {"a": np.ones((2, 3)), "b": np.ones((3, 2))})
    np.testing.assert_array_equal(model["a"], np.ones((2, 3)))
    assert tied(*model.values()) == [0, 0]


@BOTH
def test_gradients_are_cast_before_they_are_summed(call):
    w = np.zeros(3, np.float32)
    model = [w, w[::-1]]
    _, model = call(setup(Descent(1.0), model), model, [[1, 2, 3] * np.ones(3), np.arange(3)])
    np.testing.assert_array_equal(model[0], np.float32([-3, -3, -3]))
    assert model[0].dtype == np.float32


@BOTH
def test_a_gradient_that_does_not_fit_names_its_own_place(call):
    w = np.zeros((2, 3))
    model = {"a": w, "b": w.T}
    state = setup(Descent(1.0), model)
    with pytest.raises(ValueError, match=re.escape("['b']: expected an array of shape (3, 2)")):
        call(state, model, {"a": np.ones((2, 3)), "b": np.ones((2, 3))})
    np.testing.assert_array_equal(w, np.zeros((2, 3)))


@BOTH
def test_sums_that_overflow_do_so_quietly(call):
    w = np.zeros(2)
    model = [w, w]
    _, model = call(setup(ClipGrad(1.0), model), model, [np.full(2, 1e308), np.full(2, 1e308)])
    np.testing.assert_array_equal(model[0], [-1, -1])


@pytest.mark.parametrize("locked", ["a", "b"])
def test_one_read_only_place_makes_the_parameter_read_only(locked):
    w = np.ones((2, 3))
    model = {"a": w, "b": w.T, "c": np.ones(2)}
    model[locked].flags.writeable = False
    state = setup(Momentum(1.0), model)
    same, new = update_(state, model, {"a": np.ones((2, 3)), "b": np.ones((3, 2)), "c": np.ones(2)})
    assert same is state
    np.testing.assert_array_equal(w, np.ones((2, 3)))
    np.testing.assert_array_equal(new["a"], np.full((2, 3), -1.0))
    np.testing.assert_array_equal(new["b"], np.full((3, 2), -1.0))
    assert tied(*new.values()) == [0, 0, 2]
    assert new["c"] is model["c"]
    np.testing.assert_array_equal(new["c"], [0, 0])
    np.testing.assert_array_equal(state["a"].state.v, np.full((2, 3), 2.0))
    assert state["a"] is state["b"]


# --- after copying ---------------------------------------------------------------------------


@BOTH
def test_deep_copies_of_a_tied_model(call):
    """Identity survives `deepcopy`, views do not: where shapes agree the gradients are summed."""
    w = np.zeros((2, 2))
    model = {"a": w, "b": w, "c": w.T}
    state = setup(Descent(1.0), model)
    state, model = copy.deepcopy((state, model))
    assert state["a"] is state["c"]
    assert not np.shares_memory(model["a"], model["c"])
    grad = {"a": np.full((2, 2), 1.0), "b": np.full((2, 2), 2.0), "c": np.full((2, 2), 4.0)}
    state, model = call(state, model, grad)
    for x in model.values():
        np.testing.assert_array_equal(x, np.full((2, 2), -7.0))
    assert model["a"] is model["b"]


@BOTH
def test_deep_copies_whose_shapes_differ(call):
    w = np.zeros((2, 3))
    model = {"a": w, "b": w.T}
    state, model = copy.deepcopy((setup(Descent(1.0), model), model))
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\].*call setup anew"):
        call(state, model, {"a": np.ones((2, 3)), "b": np.ones((3, 2))})
    np.testing.assert_array_equal(model["a"], np.zeros((2, 3)))
    state = setup(Descent(1.0), model)
    assert state["a"] is not state["b"]


def test_copies_of_a_state_keep_its_ties():
    w = np.zeros((2, 3))
    state = setup(Adam(), {"a": w, "b": [w.T]})
    for other in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert other["a"] is other["b"][0]
        assert isinstance(other["a"], Leaf)


# --- ties by hand, and shared containers -------------------------------------------------------


@BOTH
def test_a_leaf_shared_by_hand_ties(call):
    model = {"a": np.zeros(2), "b": np.zeros(2)}
    state = setup(Momentum(1.0), model)
    state["b"] = state["a"]
    state, model = call(state, model, {"a": np.array([1.0, 2.0]), "b": np.array([10.0, 20.0])})
    np.testing.assert_array_equal(model["a"], [-11, -22])
    np.testing.assert_array_equal(model["b"], [-11, -22])
    assert state["a"] is state["b"]


@BOTH
def test_a_leaf_shared_by_hand_where_one_place_is_read_only(call):
    model = {"a": np.zeros(2), "b": np.zeros(2)}
    model["b"].flags.writeable = False
    state = setup(Momentum(1.0), model)
    state["b"] = state["a"]
    state, model = call(state, model, {"a": np.ones(2)})
    np.testing.assert_array_equal(model["a"], [-1, -1])
    np.testing.assert_array_equal(model["b"], [-1, -1])


@BOTH
def test_a_shared_container_stays_shared(call):
    layer = {"w": np.zeros(2)}
    model = {"a": layer, "b": [layer], "t": (layer,)}
    state = setup(Descent(1.0), model)
    assert state["a"] is state["b"][0]
    grad = {"w": np.ones(2)}
    state, model = call(state, model, {"a": grad, "b": [grad], "t": ({"w": None},)})
    np.testing.assert_array_equal(model["a"]["w"], [-2, -2])
    assert model["a"] is model["b"][0] is model["t"][0]


@BOTH
def test_places_made_anew_at_each_visit(call):
    """A node may hand out its children as new views each time; their place says who they are."""
    from optimisers import register_node

    class Pair:
        def __init__(self, both):
            self.both = both

    register_node(
        Pair,
        flatten=lambda pair: {"left": pair.both[0], "right": pair.both[1]},
        unflatten=lambda pair, new: Pair(np.stack([new["left"], new["right"]])),
    )
    model = Pair(np.zeros((2, 3)))
    state = setup(Descent(1.0), model)
    state, model = call(state, model, {"left": np.ones(3), "right": np.full(3, 2.0)})
    np.testing.assert_array_equal(model.both, [[-1, -1, -1], [-2, -2, -2]])
