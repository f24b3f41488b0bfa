"""Nodes, walks, paths and registration of classes, without any optional library."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import pickle
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimisers._arrays import library
from optimisers._arrays.library import isnumeric, maywrite
from optimisers._trees import nodes, paths, walks
from optimisers._trees.nodes import (
    Namespace,
    children,
    functor,
    is_node,
    mirror,
    rebuild,
    register_leaf,
    register_node,
    trainable,
    trainable_keys,
)
from optimisers._trees.paths import KeyPath
from optimisers._trees.walks import (
    child_path,
    fmap,
    fold,
    getkeypath,
    haskeypath,
    setkeypath_,
    walk,
)


class Point(NamedTuple):
    x: object
    y: object


class Explodes:
    """Its subclasses fail when `__init__` runs a second time."""

    made = 0

    def __init__(self, *args, **kwargs):
        cls = type(self)
        assert cls.made == 0, "__init__ ran again"
        cls.made += 1
        super().__init__(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Frozen:
    b: object
    a: object

    def __post_init__(self):
        if getattr(type(self), "shut", False):
            raise AssertionError("__post_init__ ran again")


@dataclasses.dataclass(slots=True)
class Slotted:
    b: object
    a: object = 2


class AttrDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class FrozenDictionary(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")


class Labelled(list):
    def __init__(self, items, label):
        super().__init__(items)
        self.label = label


class LabelledPoint(Point):
    pass


@functor
class Everything:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@functor(children=("c", "a"), trainable=("a",))
class Some:
    def __init__(self, a, b, c):
        self.b, self.a, self.c = b, a, c


def doubled(node):
    return rebuild(node, [(value, value) for value in children(node).values()])


# One level


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"b": 1, "a": None, 3: 2}, {"b": 1, "a": None, 3: 2}),
        ([1, None], {0: 1, 1: None}),
        ((1, 2), {0: 1, 1: 2}),
        ((), {}),
        (Point(1, 2), {"x": 1, "y": 2}),
        (SimpleNamespace(b=1, a=2), {"b": 1, "a": 2}),
        (Frozen(1, 2), {"b": 1, "a": 2}),
        (Slotted(1), {"b": 1, "a": 2}),
        (Everything(b=1, a=2), {"b": 1, "a": 2}),
        (Some(1, 2, 3), {"c": 3, "a": 1}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    ],
)
def test_children_are_those_of_the_node_in_its_order(node, expected):
    assert is_node(node)
    assert list(children(node).items()) == list(expected.items())


@pytest.mark.parametrize(
    "leaf",
    [
        None, 1, 1.0, 1j, True, "text", b"bytes", ..., np.float32(1), np.arange(3), np.ones(3),
        np.array([None]), np.ma.ones(2), len, children, Frozen, Point, dict, sys, range(3), {1, 2},
        functools.partial(len), collections.UserDict(a=1), object(), np.dtype("f4"),
    ],
)  # fmt: skip
def test_everything_else_is_a_leaf(leaf):
    assert not is_node(leaf)
    assert children(leaf) == {}
    assert [x for _, x in walk(leaf)] == [leaf] or isinstance(leaf, np.ndarray)


def test_children_are_a_copy():
    node = {"a": 1}
    children(node)["b"] = 2
    assert node == {"a": 1}


def test_order_is_that_of_an_ordered_dict_after_moving():
    node = OrderedDict(a=1, b=2)
    node.move_to_end("a")
    assert list(children(node)) == ["b", "a"]
    assert list(rebuild(node, [20, 10]).items()) == [("b", 20), ("a", 10)]


@pytest.mark.parametrize(
    "node",
    [
        {"b": 1, 2: None},
        [1, 2],
        (1, 2),
        Point(1, 2),
        LabelledPoint(1, 2),
        SimpleNamespace(b=1, a=2),
        Frozen(1, 2),
        Slotted(1),
        Everything(b=1, a=2),
        Some(1, 2, 3),
        OrderedDict(b=1, a=2),
        Counter("aab"),
        defaultdict(list, a=1),
        AttrDict(a=1),
        FrozenDictionary(a=1),
        Labelled([1, 2], "name"),
    ],
    ids=lambda node: type(node).__name__,
)
def test_rebuild_gives_the_same_class_with_new_children(node):
    before = list(children(node).items())
    new = doubled(node)
    assert type(new) is type(node)
    assert list(children(new).items()) == [(key, (x, x)) for key, x in before]
    assert list(children(node).items()) == before


def test_rebuild_keeps_what_is_no_child():
    assert rebuild(defaultdict(list, a=1), [2]).default_factory is list
    assert rebuild(Labelled([1], "name"), [2]).label == "name"
    some = rebuild(Some(1, "kept", 3), [30, 10])
    assert (some.a, some.b, some.c) == (10, "kept", 30)
    point = LabelledPoint(1, 2)
    point.label = "p"
    assert rebuild(point, [3, 4]).label == "p"


def test_rebuild_keeps_a_dictionary_whose_attributes_are_its_items():
    new = rebuild(AttrDict(a=1), [2])
    assert new.a == new["a"] == 2
    new.b = 3
    assert new["b"] == 3


def test_rebuild_runs_no_init():
    class Dictionary(Explodes, dict):
        pass

    class List(Explodes, list):
        pass

    class Space(Explodes, SimpleNamespace):
        pass

    @dataclasses.dataclass
    class Data:
        a: object
        made = 0

        def __post_init__(self):
            type(self).made += 1
            assert self.made == 1

    @functor
    class Own:
        made = 0

        def __init__(self, a):
            type(self).made += 1
            assert self.made == 1
            self.a = a

    for node in (Dictionary(a=1), List([1]), Space(a=1), Data(1), Own(1)):
        new = rebuild(node, [2])
        assert type(new) is type(node)
        assert list(children(new).values()) == [2]


def test_rebuild_of_a_namespace_subclass_keeps_its_class_and_slots():
    class Space(SimpleNamespace):
        __slots__ = ("extra",)

    node = Space(a=1)
    node.extra = 2
    new = rebuild(node, [10, 20])
    assert (type(new), new.a, new.extra) == (Space, 10, 20)


def test_struct_sequences_are_tuples():
    now = time.localtime()
    new = rebuild(now, list(now))
    assert new == now
    assert (new.tm_zone, new.tm_gmtoff) == (now.tm_zone, now.tm_gmtoff)


def test_a_cached_property_is_not_carried_along():
    @dataclasses.dataclass
    class Data:
        a: int

        @functools.cached_property
        def square(self):
            return self.a**2

    @functor
    class Own:
        def __init__(self, a):
            self.a = a

        square = Data.square

    for node in (Data(2), Own(2)):
        assert node.square == 4
        assert children(node) == {"a": 2}
        assert rebuild(node, [3]).square == 9


def test_dataclass_fields_that_are_not_set_are_no_children():
    @dataclasses.dataclass
    class Late:
        a: int
        b: int = dataclasses.field(init=False)
        shared: dataclasses.InitVar[int] = 0

        def __post_init__(self, shared):
            pass

    late = Late(1)
    assert children(late) == {"a": 1}
    late.b = 2
    assert children(late)["b"] == 2
    assert rebuild(late, [10, 20]).b == 20


def test_rebuild_of_a_leaf_or_with_a_wrong_number_is_refused():
    with pytest.raises(TypeError, match="int is no node"):
        rebuild(1, [])
    for node in ({"a": 1}, SimpleNamespace(a=1), Frozen(1, 2), Point(1, 2), OrderedDict(a=1)):
        with pytest.raises((ValueError, TypeError)):
            rebuild(node, [1, 2, 3])


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"a": 1}, {"a": 0}),
        (OrderedDict(a=1), OrderedDict(a=0)),
        ([1], [0]),
        ((1,), (0,)),
        (Point(1, 2), Point(0, 0)),
        (SimpleNamespace(a=1), SimpleNamespace(a=0)),
        (Frozen(1, 2), Namespace(b=0, a=0)),
        (Some(1, 2, 3), Namespace(c=0, a=0)),
        (Everything(b=1), Namespace(b=0)),
    ],
)
def test_mirror_gives_the_state_node(node, expected):
    state = mirror(node, [0] * len(children(node)))
    assert type(state) is type(expected)
    assert state == expected
    assert list(children(state)) == list(children(node))


def test_the_state_of_an_object_reads_like_a_namespace():
    state = mirror(Frozen(1, 2), [0, 0])
    assert isinstance(state, SimpleNamespace)
    assert repr(state) == "namespace(b=0, a=0)"
    assert type(rebuild(state, [1, 2])) is type(state)


def test_mirror_of_a_leaf_is_refused():
    with pytest.raises(TypeError, match="no node"):
        mirror(1.0, [])


# Arrays


class Array(np.ndarray):
    pass


@pytest.mark.parametrize("name", ["f2", "f4", "f8", "g", "c8", "c16", "G", ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2)])
def test_arrays_of_floats_are_numeric(name, shape):
    assert isnumeric(np.zeros(shape, name))
    assert isnumeric(np.zeros(shape, name).view(Array))


@pytest.mark.parametrize(
    "x",
    [
        1.0, 1j, 1, True, None, "x", [1.0], np.float64(1), np.complex64(1), np.arange(3),
        np.zeros(3, bool), np.array([None]), np.array(["a"]), np.zeros(2, "M8[s]"),
        np.zeros(2, "V4"), np.zeros(2, [("a", "f4")]), SimpleNamespace(dtype=np.dtype("f4")),
    ],
)  # fmt: skip
def test_nothing_else_is_numeric(x):
    assert not isnumeric(x)


def test_only_arrays_whose_elements_stand_alone_may_be_written():
    base = np.zeros((4, 6))
    readonly = base.copy()
    readonly.flags.writeable = False
    windows = np.lib.stride_tricks.as_strided(np.zeros(5), (3, 3), (8, 8))
    for x in (base, base.T, base[::-1, ::2], base[:0], np.array(1.0), np.zeros((0, 3))[:, ::2]):
        assert maywrite(x)
    for view in (
        np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,)),
        np.lib.stride_tricks.as_strided(np.zeros(2), (2, 3), (8, 0)),
        windows,
    ):
        assert view.flags.writeable
        assert not maywrite(view)
    assert maywrite(np.lib.stride_tricks.as_strided(np.zeros(3), (3, 1), (8, 0)))
    assert not maywrite(np.broadcast_to(np.zeros(3), (2, 3)))
    assert not maywrite(readonly)
    assert not maywrite(1.0)
    assert not maywrite([1.0])


# Paths


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


# Registration


def test_functor_without_children_takes_all_attributes_and_slots():
    @functor
    class Base:
        __slots__ = ("__dict__", "__private", "empty", "s")

        def __init__(self):
            self.s = 1
            self.d = 2
            self.__private = 3

    node = Base()
    assert (
        children(node)
        == {"d": 2, "s": 1, "_Base__private": 3}
        == {key: children(node)[key] for key in children(node)}
    )
    assert next(iter(children(node))) == "d"
    assert sorted(children(doubled(node)).values()) == [(1, 1), (2, 2), (3, 3)]


def test_the_nearest_class_decides():
    @functor(children=("a",))
    class Base:
        def __init__(self):
            self.a, self.b = 1, 2

    class Child(Base):
        pass

    @functor(children=("b",))
    class Other(Child):
        pass

    assert children(Child()) == {"a": 1}
    assert children(Other()) == {"b": 2}


def test_functor_goes_before_dataclass_fields():
    @functor(children=("b",))
    @dataclasses.dataclass
    class Data:
        a: int
        b: int

    assert children(Data(1, 2)) == {"b": 2}
    assert rebuild(Data(1, 2), [20]) == Data(1, 20)


def test_registering_later_changes_what_a_class_and_its_subclasses_are():
    class Base:
        def __init__(self):
            self.a = 1

    class Child(Base):
        pass

    assert not is_node(Child())
    register_node(Base, children=("a",))
    assert children(Child()) == {"a": 1}
    register_leaf(Base)
    assert not is_node(Child())


def test_register_leaf_goes_before_dataclass_fields():
    @register_leaf
    @dataclasses.dataclass
    class Data:
        a: int

    assert not is_node(Data(1))


def test_built_in_containers_stay_what_they_are():
    class Dictionary(dict):
        pass

    for cls in (Dictionary, dict, list, Point, SimpleNamespace, np.ndarray, Array, float, str):
        with pytest.raises(TypeError, match="built-in container, an array or a number"):
            register_node(cls, children=())


def test_functor_is_particular_about_its_arguments():
    with pytest.raises(TypeError, match=r"\('weight',\)"):
        functor(children="weight")(type("A", (), {}))
    with pytest.raises(TypeError, match="trainable is an iterable"):
        functor(trainable="weight")(type("A", (), {}))
    with pytest.raises(ValueError, match=r"A: trainable names 'b'.*'a'"):
        functor(children=("a",), trainable=("b",))(type("A", (), {}))
    with pytest.raises(TypeError, match="expected a class"):
        functor(("a", "b"))
    with pytest.raises(TypeError, match="either"):
        register_node(type("A", (), {}), flatten=lambda x: {})
    with pytest.raises(TypeError, match="either"):
        register_node(type("A", (), {}), ("a",), flatten=lambda x: {}, unflatten=lambda x, new: x)


def test_functor_names_an_attribute_that_is_missing():
    node = Some(1, 2, 3)
    del node.c
    with pytest.raises(AttributeError, match="no attribute 'c'"):
        children(node)


def test_register_node_with_functions():
    class Pair:
        def __init__(self, both):
            self.both = both

    register_node(
        Pair,
        trainable=("left",),
        flatten=lambda pair: {"left": pair.both[0], "right": pair.both[1]},
        unflatten=lambda pair, new: Pair((new["left"], new["right"])),
    )
    assert children(Pair((1, 2))) == {"left": 1, "right": 2}
    assert rebuild(Pair((1, 2)), [10, 20]).both == (10, 20)
    assert mirror(Pair((1, 2)), [0, 0]) == SimpleNamespace(left=0, right=0)
    assert trainable(Pair((1, 2))) == {"left": 1}
    with pytest.raises(TypeError, match="immutable"):
        setkeypath_(Pair((1, 2)), ("left",), 3)


# What trains


def test_all_children_train_unless_told_otherwise():
    assert trainable({"a": 1}) == {"a": 1}
    assert trainable(1.0) == {}
    assert trainable(Some(1, 2, 3)) == {"a": 1}
    assert trainable_keys({"a": 1}) is None
    assert trainable_keys(Everything(a=1)) is None
    assert trainable_keys(Some(1, 2, 3)) == {"a"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [({"a": 1}, {"a"}), (("a", "c"), {"a", "c"}), ((), set()), ({}, set()), (["c"], {"c"})],
)
def test_trainable_is_open_to_registration(answer, expected):
    class Own(Some):
        pass

    class Child(Own):
        pass

    @trainable.register(Own)
    def _(x):
        return answer

    assert trainable_keys(Own(1, 2, 3)) == expected
    assert trainable_keys(Child(1, 2, 3)) == expected


def test_names_of_no_child_are_refused():
    @functor(trainable=("w",))
    class Late:
        def __init__(self):
            self.a = 1

    with pytest.raises(ValueError, match=r"Late.*'w'.*children are 'a'"):
        trainable_keys(Late())
    with pytest.raises(ValueError, match="Late"):
        trainable(Late())

    class Own(Some):
        pass

    @trainable.register(Own)
    def _(x):
        return x.said

    own = Own(1, 2, 3)
    for own.said in ("a", None):
        with pytest.raises(TypeError, match="return a dictionary"):
            trainable_keys(own)
    own.said = ("a", "b")
    with pytest.raises(ValueError, match="names 'b'"):
        trainable_keys(own)
    with pytest.raises(ValueError, match=r"\['top'\]\[0\].*names 'b'"):
        fold({"top": [own]}, lambda p, x: x, lambda p, x, r: r, keys=trainable_keys)


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
