"""Classes that are nodes, one for each way to be one."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from optimisers._trees.nodes import children, functor, rebuild


class Point(NamedTuple):
    x: object
    y: object


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


class FrozenDictionary(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")


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


class Array(np.ndarray):
    pass
