"""Paths: how they read, and what is got and set along them."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from types import SimpleNamespace

import pytest
from node_classes import Frozen, FrozenDictionary, Point, Slotted

from optimisers._trees.nodes import children
from optimisers._trees.paths import KeyPath
from optimisers._trees.walks import child_path, getkeypath, haskeypath, setkeypath_, walk


def test_a_path_reads_like_an_attribute_path():
    assert str(KeyPath("layers", 0, "weight")) == "layers[0].weight"
    assert repr(KeyPath("layers", 0, "weight")) == "KeyPath('layers', 0, 'weight')"
    assert str(KeyPath(0, "a", ("x", 1), "not a name")) == "[0].a[('x', 1)]['not a name']"
    assert str(KeyPath()) == "(root)"
    assert repr(KeyPath()) == "KeyPath()"


def test_a_path_from_a_walk_knows_dictionaries_from_attributes():
    tree = {"layers": [SimpleNamespace(weight=1.0), Point(2.0, {"a": 3.0})]}
    assert [str(path) for path, _ in walk(tree)] == [
        "['layers'][0].weight",
        "['layers'][1].x",
        "['layers'][1].y['a']",
    ]
    path = child_path(child_path(KeyPath(), tree, "layers"), tree["layers"], 0)
    assert str(path) == "['layers'][0]"
    assert path == KeyPath("layers", 0)
    assert hash(path) == hash(KeyPath("layers", 0))


def test_a_path_is_a_sequence_of_its_keys():
    path = KeyPath("a", 0, "b", 0)
    assert tuple(path) == ("a", 0, "b", 0)
    assert (len(path), path[0], path[-1]) == (4, "a", 0)
    assert path[1:3] == KeyPath(0, "b")
    assert (path.index("b"), path.count(0), "b" in path, "c" in path) == (2, 2, True, False)
    assert list(reversed(path)) == [0, "b", 0, "a"]
    with pytest.raises(IndexError):
        path[4]
    assert path
    assert not KeyPath()


def test_paths_add_and_compare_by_keys():
    assert KeyPath("a") + KeyPath(0, "b") == KeyPath("a", 0, "b")
    for first, last in ((["a"], [0]), (("a",), (0,))):
        assert KeyPath("a") + last == KeyPath("a", 0) == first + KeyPath(0)
        assert KeyPath("a") != first
    assert KeyPath("a") != KeyPath("b")
    assert len({KeyPath("a", 0), KeyPath("a", 0), KeyPath("a", 1)}) == 2
    ((path, _),) = walk({"a": {"b": 1}})
    assert str(path + path[1:]) == "['a']['b']['b']"
    with pytest.raises(TypeError):
        KeyPath("a") + 1
    with pytest.raises(TypeError):
        KeyPath("a") + "bc"


def test_a_path_is_immutable_and_can_be_copied():
    path = KeyPath("a", 0)
    with pytest.raises(AttributeError):
        path.name = 1
    with pytest.raises(TypeError):
        path[0] = 1
    ((walked, _),) = walk({"a": [1]})
    for one in (path, walked, KeyPath()):
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), copy.copy(one)):
            assert other == one
            assert str(other) == str(one)


def test_get_has_and_set():
    tree = {"layers": [SimpleNamespace(weight=1.0), Slotted(2.0)], 3: {"x": None}}
    for path, leaf in walk(tree):
        assert getkeypath(tree, path) is leaf
        assert getkeypath(tree, tuple(path)) is leaf
        assert haskeypath(tree, path)
    assert getkeypath(tree, ()) is tree
    assert haskeypath(tree, KeyPath())
    setkeypath_(tree, KeyPath("layers", 0, "weight"), 10)
    setkeypath_(tree, ("layers", 1, "b"), 20)
    setkeypath_(tree, (3, "x"), 30)
    assert [leaf for _, leaf in walk(tree)] == [10, 20, 2, 30]
    setkeypath_(tree, ("layers", 1), None)
    assert tree["layers"][1] is None


def test_a_default_dictionary_does_not_grow_by_asking():
    tree = defaultdict(list, a=1)
    assert not haskeypath(tree, ("b",))
    with pytest.raises(KeyError):
        getkeypath(tree, ("b",))
    with pytest.raises(KeyError):
        setkeypath_(tree, ("b", 0), 1)
    assert dict(tree) == {"a": 1}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("layers", 5), ["no 5", "['layers']", "list", "0, 1"]),
        (("layer",), ["no 'layer'", "(root)", "dict", "'layers'"]),
        (("layers", 0, "w", "x"), ["no 'x'", "['layers'][0].w", "float", "no children"]),
        (("layers", 1, -1), ["no -1", "['layers'][1]", "tuple"]),
    ],
)
def test_a_missing_path_says_how_far_it_led(path, words):
    tree = {"layers": [SimpleNamespace(w=1.0), (1, 2)]}
    assert not haskeypath(tree, path)
    for act in (getkeypath, lambda *a: setkeypath_(*a, 0)):
        with pytest.raises(KeyError) as caught:
            act(tree, path)
        for word in words:
            assert word in caught.value.args[0]


def test_a_missing_path_shows_some_of_many_keys():
    with pytest.raises(KeyError) as caught:
        getkeypath(dict.fromkeys(range(1000)), ("x",))
    assert "..." in caught.value.args[0]
    assert len(caught.value.args[0]) < 200


@pytest.mark.parametrize(
    ("node", "key", "name"),
    [
        ((1, 2), 0, "tuple"),
        (Point(1, 2), "x", "Point"),
        (Frozen(1, 2), "a", "Frozen"),
        (FrozenDictionary(a=1), "a", "FrozenDictionary"),
    ],
)
def test_setting_inside_an_immutable_node_is_refused(node, key, name):
    tree = {"top": node}
    with pytest.raises(TypeError) as caught:
        setkeypath_(tree, ("top", key), 3)
    for word in ("['top']", name, "immutable", "fmap"):
        assert word in str(caught.value)
    assert children(node)[key] == (2 if key == "a" and name == "Frozen" else 1)


def test_the_root_cannot_be_set():
    with pytest.raises(TypeError, match="empty path"):
        setkeypath_([1], (), 2)
