"""Nodes: their children, how they are rebuilt, and the node of their state."""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from node_classes import Everything, Frozen, FrozenDictionary, Point, Slotted, Some, doubled

from optimisers._trees.nodes import Namespace, children, functor, is_node, mirror, rebuild
from optimisers._trees.walks import walk


class Explodes:
    """Its subclasses fail when `__init__` runs a second time."""

    made = 0

    def __init__(self, *args, **kwargs):
        cls = type(self)
        assert cls.made == 0, "__init__ ran again"
        cls.made += 1
        super().__init__(*args, **kwargs)


class AttrDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Labelled(list):
    def __init__(self, items, label):
        super().__init__(items)
        self.label = label


class LabelledPoint(Point):
    pass


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
