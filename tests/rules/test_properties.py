"""What holds for every tree: random nests of containers, dtypes, ties and missing gradients."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from util import UNMEASURED, arrays_in, assert_same_bits, bits, example, share_memory, snapshot

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    WeightDecay,
    adjust,
    children,
    fmap,
    freeze_,
    isnumeric,
    maywrite,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)
from optimisers._trees.nodes import is_node, rebuild
from optimisers._trees.walks import walk

pytestmark = pytest.mark.filterwarnings("ignore:nothing to train")

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Pair(NamedTuple):
    first: object
    second: object


# --- strategies ------------------------------------------------------------------------------

DTYPES = ["float32", "float64", "float16", "longdouble", "complex64", "complex128"]
SHAPES = [(), (0,), (1,), (3,), (2, 2), (2, 1, 3)]
RULES = [
    *(example(cls) for cls in UNMEASURED if not getattr(cls, "real_only", False)),
    OptimiserChain(ClipNorm(1.0), WeightDecay(0.1), Momentum()),
    OptimiserChain(AccumGrad(2), Adam()),
    MixedPrecision("float64", OptimiserChain(AccumGrad(2), Adam())),
]

rules = st.sampled_from(RULES)
leaves_that_do_not_train = st.sampled_from([None, 7, "text", 1.5, len, b"", True])


@st.composite
def arrays(draw):
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(SHAPES))
    number = st.integers(-64, 64).map(lambda k: k / 8)
    n = int(np.prod(shape))
    values = np.array(draw(st.lists(number, min_size=n, max_size=n)), dtype).reshape(shape)
    if draw(st.integers(0, 5)) == 0:
        values.flags.writeable = False
    return values if draw(st.booleans()) else np.asfortranarray(values).reshape(shape, order="A")


@st.composite
def models(draw):
    """Return a tree; some of its arrays, and views of them, stand at several places."""
    pool = draw(st.lists(arrays(), min_size=1, max_size=4))
    pool += [x.T for x in pool if x.ndim == 2]
    leaf = st.one_of(st.sampled_from(pool), arrays(), arrays(), leaves_that_do_not_train)

    def nodes(below):
        return st.one_of(
            st.lists(below, max_size=3),
            st.lists(below, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), below, max_size=3),
            st.dictionaries(st.sampled_from("abc"), below, max_size=3).map(OrderedDict),
            st.tuples(below, below).map(lambda pair: Pair(*pair)),
            st.dictionaries(st.sampled_from("abc"), below, max_size=3).map(
                lambda found: SimpleNamespace(**found)
            ),
        )

    return draw(st.recursive(leaf, nodes, max_leaves=8))


def gradient(draw, model, missing=True):
    """Return a gradient for a model; here and there it is missing, at any level."""
    if missing and draw(st.integers(0, 6)) == 0:
        return draw(st.sampled_from([None, ()]))
    if isnumeric(model):
        kind = draw(st.sampled_from([model.dtype, np.float64, np.int8]))
        number = draw(st.integers(-32, 32))
        return np.full(model.shape, number, kind)
    if not is_node(model):
        return None
    below = [gradient(draw, child, missing) for child in children(model).values()]
    if isinstance(model, dict) and missing:
        return {k: g for k, g in zip(model, below, strict=True) if draw(st.integers(0, 6))}
    return rebuild(model, below)


def values(tree):
    """Return all arrays of a tree with their places, bit by bit."""
    return [(place, bits(a)) for place, a in arrays_in(tree)]


def copied(state, model):
    """Return copies that keep ties, through views too: all arrays over new memory."""
    bases = {}

    def base(x):
        while isinstance(x.base, np.ndarray):
            x = x.base
        return x

    def twin(x):
        if not isnumeric(x):
            return x
        root = base(x)
        new = bases.setdefault(id(root), root.copy(order="K"))
        view = (
            np.ndarray(x.shape, x.dtype, new, offset=address(x) - address(root), strides=x.strides)
            if x.size
            else new.reshape(x.shape)
        )
        view.flags.writeable = x.flags.writeable
        return view

    return copy.deepcopy(state), fmap(twin, model)


def address(x):
    return x.__array_interface__["data"][0]


# --- properties ------------------------------------------------------------------------------


@quick
@given(models(), rules, st.data())
def test_update_in_place_equals_update(model, rule, data):
    state = setup(rule, model)
    for _ in range(2):
        grad = gradient(data.draw, model)
        other_state, other = copied(state, model)
        given_arrays = [x for _, x in walk(other) if isnumeric(x) and maywrite(x)]
        before = values([state, model, grad])
        new_state, new_model = update(state, model, grad)
        assert values([state, model, grad]) == before
        assert share_memory([new_state, new_model], [state, model, grad]) == []
        returned_state, returned = update_(other_state, other, grad)
        assert returned_state is other_state
        assert_same_bits([returned_state, returned], [new_state, new_model])
        kept = {id(x) for _, x in walk(returned) if isnumeric(x)}
        assert returned is not other or {id(x) for x in given_arrays} <= kept
        state, model = new_state, new_model


@quick
@given(models(), rules, st.data())
def test_structure_is_kept(model, rule, data):
    state = setup(rule, model)
    new_state, new = update(state, model, gradient(data.draw, model))

    def kinds(tree):
        found = []
        fmap(
            lambda x: found.append((type(x), getattr(x, "dtype", None), getattr(x, "shape", None))),
            tree,
        )
        return found

    assert kinds(new) == kinds(model)
    assert [str(p) for p, _ in walk(new)] == [str(p) for p, _ in walk(model)]
    assert [str(p) for p, _ in walk(new_state)] == [str(p) for p, _ in walk(state)]
    assert [str(p) for p, _ in trainables(new, path=True)] == [
        str(p) for p, _ in trainables(model, path=True)
    ]


@quick
@given(models(), rules, st.data())
def test_leaves_stand_where_arrays_are(model, rule, data):
    state = setup(rule, model)
    at = {str(path): x for path, x in walk(model)}
    for path, leaf in walk(state):
        if isinstance(leaf, Leaf):
            assert isnumeric(at[str(path)])
            assert leaf.rule is rule
    assert sum(isinstance(leaf, Leaf) for _, leaf in walk(state)) == sum(
        map(isnumeric, at.values())
    )
    distinct = {id(leaf) for _, leaf in walk(state) if isinstance(leaf, Leaf)}
    assert len(distinct) == len(trainables(model))


@quick
@given(models(), rules, st.data())
def test_ties_are_kept(model, rule, data):
    state = setup(rule, model)
    ties = [id(leaf) for _, leaf in walk(state) if isinstance(leaf, Leaf)]
    pattern = [ties.index(t) for t in ties]
    for call in (update, update_):
        state, model = call(state, model, gradient(data.draw, model))
        ties = [id(leaf) for _, leaf in walk(state) if isinstance(leaf, Leaf)]
        assert [ties.index(t) for t in ties] == pattern
        again = [id(leaf) for _, leaf in walk(setup(rule, model)) if isinstance(leaf, Leaf)]
        xs = [x for _, x in walk(model) if isnumeric(x)]
        assert all(
            again.index(t) == k for t, k, x in zip(again, pattern, xs, strict=True) if x.size
        )


@quick
@given(models(), rules, st.data())
def test_a_refused_call_changes_nothing(model, rule, data):
    arrays_of_model = trainables(model)
    if not arrays_of_model:
        return
    state = setup(rule, model)
    state, model = update(state, model, gradient(data.draw, model, missing=False))
    paths = [path for path, x in trainables(model, path=True)]
    wrong_at = data.draw(st.sampled_from(paths))
    wrong = data.draw(
        st.sampled_from([np.ones((7, 7)), "text", object(), np.ones(1, "U1"), [1, 2]])
    )
    grad = gradient(data.draw, model, missing=False)
    grad = with_leaf(grad, list(wrong_at), wrong)
    before = snapshot([state, model])
    for call in (update, update_):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(state, model, grad)
        assert str(wrong_at) in str(caught.value)
        assert snapshot([state, model]) == before


def with_leaf(tree, path, new):
    """Return a tree with another leaf at this path."""
    if not path:
        return new
    below = children(tree)
    below[path[0]] = with_leaf(below[path[0]], path[1:], new)
    return rebuild(tree, list(below.values()))


@quick
@given(models(), rules, st.data(), st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_pickled_states_go_on_alike(model, rule, data, protocol):
    state = setup(rule, model)
    state, model = update(state, model, gradient(data.draw, model))
    grad = gradient(data.draw, model)
    expected = update(state, model, grad)
    for twin in (pickle.loads(pickle.dumps(state, protocol)), copy.deepcopy(state)):
        assert_same_bits(twin, state)
        assert share_memory(twin, state) == []
        assert_same_bits(update(twin, model, grad), expected)


@quick
@given(models(), rules, st.data())
def test_frozen_models_stand_still(model, rule, data):
    state = setup(rule, model)
    expected = update(state, model, None)
    freeze_(state)
    got = update(state, model, gradient(data.draw, model))
    assert values(got) == values(expected) == values([state, model])
    _, same = update_(state, model, gradient(data.draw, model))
    assert same is model
    thaw_(state)
    assert not any(leaf.frozen for _, leaf in walk(state) if isinstance(leaf, Leaf))


@quick
@given(models(), st.data())
def test_a_rate_of_zero_stands_still(model, data):
    state = adjust(setup(OptimiserChain(Momentum(), Adam()), model), 0) if trainables(model) else ()
    if state == ():
        return
    grad = gradient(data.draw, model)
    _, new = update(state, model, grad)
    for (_, a), (_, b) in zip(arrays_in(new), arrays_in(model), strict=True):
        np.testing.assert_array_equal(a, b)
