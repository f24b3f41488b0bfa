"""Walks, folds and maps over trees: order, sharing, cycles, depth, and random trees."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_classes import Everything, Frozen, Point, Slotted, Some

from optimisers._arrays import library
from optimisers._arrays.library import maywrite
from optimisers._trees import nodes, paths, walks
from optimisers._trees.nodes import (
    Namespace,
    children,
    is_node,
    mirror,
    rebuild,
    register_node,
    trainable_keys,
)
from optimisers._trees.paths import KeyPath
from optimisers._trees.walks import fmap, fold, getkeypath, haskeypath, setkeypath_, walk


# Whole trees
def identity(tree, **options):
    return fold(tree, lambda p, x: x, lambda p, x, results: rebuild(x, results), **options)


def test_walk_is_depth_first_in_order_of_insertion():
    tree = {"z": [1, (2, 3)], "a": SimpleNamespace(y=4, b={}), "m": Frozen(5, 6)}
    assert [leaf for _, leaf in walk(tree)] == [1, 2, 3, 4, 5, 6]
    assert [tuple(path) for path, _ in walk(tree)] == [
        ("z", 0), ("z", 1, 0), ("z", 1, 1), ("a", "y"), ("m", "b"), ("m", "a"),
    ]  # fmt: skip


def test_walk_and_fold_take_for_a_leaf_what_they_are_told_to():
    tree = {"a": [1, 2], "b": (3,)}

    def pair(x):
        return isinstance(x, list)

    assert [leaf for _, leaf in walk(tree, is_leaf=pair)] == [[1, 2], 3]
    assert fold(tree, lambda p, x: x, lambda p, x, r: r, is_leaf=pair) == [[1, 2], [3]]
    assert fmap(str, tree, is_leaf=pair) == {"a": "[1, 2]", "b": ("3",)}
    assert list(walk(tree, is_leaf=lambda x: True)) == [(KeyPath(), tree)]
    assert fold(tree, lambda p, x: (p, x), None, is_leaf=lambda x: True) == (KeyPath(), tree)


def test_fold_hands_over_paths_and_results_in_order():
    tree = {"b": [1, 2], "a": Point({}, 3)}
    seen = []

    def node(path, x, results):
        seen.append(tuple(path))
        assert len(results) == len(children(x))
        return {tuple(path): results}

    result = fold(tree, lambda path, x: (str(path), x), node)
    assert seen == [("b",), ("a", "x"), ("a",), ()]
    assert result == {
        (): [
            {("b",): [("['b'][0]", 1), ("['b'][1]", 2)]},
            {("a",): [{("a", "x"): []}, ("['a'].y", 3)]},
        ]
    }


def test_fold_enters_only_the_keys_it_is_given():
    tree = [Some(1.0, 2.0, [3.0]), {"x": Some([4.0], 5.0, 6.0)}]
    seen = []

    def leaf(path, x):
        seen.append((str(path), x))
        return -x

    def node(path, x, results):
        return mirror(x, results)

    state = fold(tree, leaf, node, keys=trainable_keys, skipped=lambda child: ())
    assert seen == [("[0].a", 1.0), ("[1]['x'].a[0]", 4.0)]
    assert state == [
        SimpleNamespace(c=(), a=-1.0),
        {"x": SimpleNamespace(c=(), a=[-4.0])},
    ]
    kept = identity(tree, keys=trainable_keys)
    assert kept[0].c is tree[0].c
    assert kept[1]["x"].a == [4.0]
    assert kept[1]["x"].a is not tree[1]["x"].a


def test_fold_walks_other_trees_beside():
    a = {"x": [1, 2], "y": Frozen(3, 4)}
    b = {"y": SimpleNamespace(a=40, b=30), "x": (10, [])}
    pairs = fold(a, lambda p, x, other: (x, other), lambda p, x, r: r, rest=[b])
    assert pairs == [[(1, 10), (2, [])], [(3, 30), (4, 40)]]
    with pytest.raises(ValueError, match=r"differ at \['x'\].*list.*0, 1.*tuple.*0, 1, 2"):
        fmap(max, a, {"y": b["y"], "x": (1, 2, 3)})
    with pytest.raises(ValueError, match=r"differ at \(root\).*got int with the keys none"):
        fmap(max, a, 1)


def test_fmap_applies_to_every_leaf():
    tree = {"a": [1, None], "b": Frozen("x", np.ones(2)), "c": ()}
    result = fmap(type, tree)
    assert result == {"a": [int, type(None)], "b": Frozen(str, np.ndarray), "c": ()}
    assert fmap(lambda x: x + 1, 1) == 2
    assert fmap(lambda x, y, z: x + y * z, [1, (2,)], [3, (4,)], [5, (6,)]) == [16, (26,)]


def test_fmap_maps_a_shared_array_once():
    w, n = np.ones(2), np.arange(2)
    calls = []

    def double(x):
        calls.append(x)
        return x * 2

    new = fmap(double, {"a": w, "b": [w, (w, n)], "n": n})
    assert len(calls) == 2
    assert new["a"] is new["b"][0] is new["b"][1][0] is not w
    assert new["n"] is new["b"][1][1]


def test_fmap_calls_for_each_number_though_numbers_may_be_one_object():
    count = iter(range(10))
    assert fmap(lambda x: next(count), [7, 7, None, None]) == [0, 1, 2, 3]


def test_fmap_with_other_trees_keeps_sharing_only_where_all_are_shared():
    w, g, h = np.ones(1), np.full(1, 2.0), np.full(1, 3.0)
    same = fmap(lambda x, y: x + y, [w, w], [g, g])
    assert same[0] is same[1]
    other = fmap(lambda x, y: x + y, [w, w], [g, h])
    assert [float(x[0]) for x in other] == [3.0, 4.0]
    inner = [w]
    nested = fmap(lambda x, y: x + y, [inner, inner], [[g], [h]])
    assert [float(x[0][0]) for x in nested] == [3.0, 4.0]


@pytest.mark.parametrize(
    "make", [lambda: [1], lambda: {"a": 1}, lambda: SimpleNamespace(a=1), lambda: Everything(a=1)]
)
def test_a_shared_container_stays_shared_and_is_folded_once(make):
    shared = make()
    tree = {"x": shared, "y": (shared, [shared])}
    seen = []
    new = fold(
        tree, lambda p, x: seen.append(str(p)) or x, lambda p, x, results: rebuild(x, results)
    )
    assert len(seen) == 1
    assert seen[0].startswith("['x']")
    assert new["x"] is new["y"][0] is new["y"][1][0] is not shared
    again = fmap(lambda x: x, tree)
    assert again["x"] is again["y"][0]
    assert len(list(walk(tree))) == 3


def test_tuples_are_values_and_each_place_is_folded():
    pair = (1, 2)
    seen = []
    fold([pair, pair], lambda p, x: seen.append(tuple(p)), lambda p, x, r: None)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_fold_keeps_nodes_alive_that_are_made_while_it_runs():
    class Fresh:
        pass

    register_node(
        Fresh, flatten=lambda x: {f"p{i}": [i] for i in range(50)}, unflatten=lambda x, new: new
    )
    assert fmap(lambda x: x, Fresh()) == {f"p{i}": [i] for i in range(50)}


def cycles():
    a = []
    a.append(a)
    b = {"x": [1, ({},)]}
    b["x"][1][0]["back"] = b["x"]
    c = Everything(a=1)
    c.me = SimpleNamespace(up=[c])
    d = {"once": {"more": [1]}}
    d["once"]["more"].append({"last": d})
    return [
        (a, "[0]", "(root)"),
        (b, "['x'][1][0]['back']", "['x']"),
        (c, "me.up[0]", "(root)"),
        (d, "['once']['more'][1]['last']", "(root)"),
    ]


@pytest.mark.parametrize(("tree", "closes", "begins"), cycles())
@pytest.mark.parametrize("act", [lambda t: list(walk(t)), identity, lambda t: fmap(id, t)])
def test_a_cycle_is_refused_with_the_path_where_it_closes(tree, closes, begins, act):
    with pytest.raises(ValueError, match="contains itself") as caught:
        act(tree)
    assert f" at {closes} is the one at {begins};" in str(caught.value)


def test_the_same_node_twice_is_no_cycle():
    shared = {"w": [1]}
    tree = [shared, shared["w"], shared, (shared, (shared,))]
    assert len(list(walk(tree))) == 5
    assert fmap(lambda x: x, tree) == tree


def nest(kind, depth):
    tree = np.ones(1)
    for _ in range(depth):
        tree = kind(tree)
    return tree


KINDS = [
    lambda x: [x],
    lambda x: (x, 0),
    lambda x: {"a": x},
    lambda x: SimpleNamespace(a=x),
    lambda x: Frozen(x, 0),
    lambda x: Everything(a=x),
    lambda x: Point(0, x),
    lambda x: OrderedDict(a=x),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_levels_just_work(kind):
    limit = sys.getrecursionlimit()
    tree = nest(kind, 10_000)
    path, leaf = next((p, x) for p, x in walk(tree) if isinstance(x, np.ndarray))
    assert len(path) == 10_000
    assert getkeypath(tree, path) is leaf
    assert haskeypath(tree, path)
    assert path == KeyPath(*path)
    assert hash(path) == hash(KeyPath(*path))
    assert len(str(path)) >= 10_000
    doubled = fmap(lambda x: x * 2, tree)
    assert getkeypath(doubled, path) == 2
    deep = fold(tree, lambda p, x: 0, lambda p, x, results: 1 + max(results))
    assert deep == 10_000
    assert sys.getrecursionlimit() == limit
    assert pickle.loads(pickle.dumps(path)) == path


def test_a_cycle_ten_thousand_levels_down_is_found():
    end = []
    tree = end
    for _ in range(10_000):
        tree = [tree]
    end.append(tree)
    with pytest.raises(ValueError, match="contains itself"):
        list(walk(tree))
    end.clear()


def test_walking_may_go_on_while_the_tree_is_written():
    tree = {"a": 1, "b": [2, 3]}
    for path, leaf in walk(tree):
        setkeypath_(tree, path, -leaf)
        tree[f"new{leaf}"] = 0
    assert (tree["a"], tree["b"]) == (-1, [-2, -3])


# Properties
LEAVES = st.one_of(
    st.none(), st.integers(), st.text(max_size=3), st.floats(allow_nan=False), st.booleans()
)
NAMES = st.text("abcdef_", min_size=1, max_size=4)


def _branches(inner):
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=4),
        st.dictionaries(NAMES, inner, max_size=4).map(OrderedDict),
        st.dictionaries(NAMES, inner, max_size=4).map(lambda d: SimpleNamespace(**d)),
        st.builds(Point, inner, inner),
        st.builds(Frozen, inner, inner),
        st.builds(Slotted, inner, inner),
    )


TREES = st.recursive(LEAVES, _branches, max_leaves=20)


def nodes_of(tree):
    found = [tree]
    for child in children(tree).values():
        found += nodes_of(child)
    return found


@given(TREES)
def test_folding_with_rebuild_is_the_identity_on_structure(tree):
    for new in (identity(tree), fmap(lambda x: x, tree)):
        assert new == tree
        assert [type(x) for x in nodes_of(new)] == [type(x) for x in nodes_of(tree)]
        assert [list(children(x)) for x in nodes_of(new)] == [
            list(children(x)) for x in nodes_of(tree)
        ]
        assert not {id(x) for x in nodes_of(new) if isinstance(x, (list, dict))} & {
            id(x) for x in nodes_of(tree)
        }


@given(TREES)
def test_fold_meets_the_leaves_of_walk(tree):
    walked = [(path, x) for path, x in walk(tree)]
    folded = []
    fold(tree, lambda path, x: folded.append((path, x)), lambda path, x, results: None)
    assert folded == walked
    assert [str(path) for path, _ in folded] == [str(path) for path, _ in walked]
    for path, x in walked:
        assert getkeypath(tree, path) is x


@given(TREES)
def test_the_mirror_of_a_tree_has_the_paths_of_the_tree(tree):
    state = fold(tree, lambda path, x: x, lambda path, x, results: mirror(x, results))
    assert [path for path, _ in walk(state)] == [path for path, _ in walk(tree)]
    assert all(
        type(x) in (list, tuple, dict, OrderedDict, Point, SimpleNamespace, Namespace)
        for x in nodes_of(state)
        if is_node(x)
    )


@given(st.lists(st.one_of(st.integers(), st.text())), st.lists(st.integers()))
def test_paths_behave_like_tuples_of_keys(keys, more):
    path = KeyPath(*keys)
    assert tuple(path) == tuple(keys)
    assert tuple(path + KeyPath(*more)) == tuple(keys + more)
    assert tuple(path[1::2]) == tuple(keys[1::2])
    assert len(path) == len(keys)
    assert (path == KeyPath(*more)) == (keys == more)
    assert eval(repr(path), {"KeyPath": KeyPath}) == path


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3), st.lists(st.integers(-4, 4), min_size=3)
)
def test_maywrite_is_false_wherever_two_elements_share_memory(shape, steps):
    strides = [8 * s for s in steps[: len(shape)]]
    store = np.zeros(64)
    view = np.lib.stride_tricks.as_strided(store[32:], shape, strides)
    offsets = [
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(*shape)
    ]
    if len(set(offsets)) < len(offsets):
        assert not maywrite(view)
    elif all(n == 1 or s == 8 for n, s in zip(shape, strides, strict=True)):
        assert maywrite(view)


@pytest.mark.parametrize("module", [library, paths, nodes, walks])
def test_what_is_exported_is_documented(module):
    for name in module.__all__:
        assert getattr(module, name).__doc__, name
