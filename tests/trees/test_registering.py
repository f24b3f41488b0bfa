"""Classes that are registered as nodes or leaves, and what of them trains."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from node_classes import Array, Everything, Point, Some, doubled

from optimisers._trees.nodes import (
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
from optimisers._trees.walks import fold, setkeypath_


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
