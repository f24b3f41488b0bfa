"""Trees as tables: the names and limits that writing and reading share.

A tree is written as a table of nodes, children before their parents, so that

a) the text is flat however deep the tree is, and a loop reads it, without recursion;
b) a child can only be something that stands above: a file cannot hold a tree that contains itself;
c) what is shared stays shared: one `Leaf`, one array, one list at several places is one entry.

    {"dict": [0, 1], "keys": ["w", "b"]}     a node and its children; with a "class" if it has one
    {"array": 3}                             an array; {"array": 3, "view": ...} another view of it
    {"leaf": 0, "state": 7, "frozen": false} a `Leaf` with the rule of that number; with "skipped"
                                             if updates passed it by
    {"value": 1.5}                           what JSON has; else {"float": "inf"} and such

`_encoder` writes this, `_archive` reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import OrderedDict
from types import MemberDescriptorType, SimpleNamespace
from typing import Any

from .._trees.nodes import Namespace
from .._trees.paths import KeyPath
from ._json import shortened, without_strings

VERSION = 1
"""Of the text in the metadata. A reader takes this version and those before it."""
DEEPEST = 100
"""How deep tuples and dictionaries in a field of a rule may stand in each other."""

OURS = f"{__name__.partition('.')[0]}."
"""How the names of the library's own modules begin."""

CONTAINERS: dict[type, str] = {
    dict: "dict",
    OrderedDict: "ordered",
    list: "list",
    tuple: "tuple",
    SimpleNamespace: "namespace",
    Namespace: "state",
}
CLASSES = {kind: cls for cls, kind in CONTAINERS.items()}
BY_POSITION = ("list", "tuple")
WITH_CLASS = ("named", "object")
NAMESPACES = ("namespace", "state")
"""Whose keys become attributes."""


def most_places(count: int) -> int:
    """Return how many places a tree of `count` nodes may have; a shared node counts at each."""
    return max(100_000, 10 * count)


def crowd(text: str) -> str:
    """Return what a text of tables has too much of, if it has more than its nodes account for.

    All numbers, texts and keys are there, at up to 20 times their size, before a reader can look at
    the first. A node has few of its own, beside its children and their keys, which are limited.
    """
    objects = text.count("{")
    most = 5 * objects + 2 * most_places(objects)
    commas = text.count(",")
    if commas > most and (commas := without_strings(text).count(",")) > most:
        return f"{commas:,} commas and {objects:,} objects"
    if commas <= 4 * objects + _MOST_KEYS:  # there are no more keys than commas and objects
        return ""
    keys = text.count('":') - text.count('\\":')
    return f"{keys:,} keys and {objects:,} objects" if keys > 5 * objects + _MOST_KEYS else ""


_MOST_KEYS = 20_000
"""Keys beyond those that all objects have: those of the fields of rules."""


def kind_of(node: Any) -> str:
    cls = type(node)
    if cls in CONTAINERS:
        return CONTAINERS[cls]
    is_named = issubclass(cls, tuple) and hasattr(cls, "_fields")
    return "named" if is_named and not hasattr(cls, "n_sequence_fields") else "object"


def class_name(cls: type) -> str:
    """Return the name of a class: of ours without its module, which may change."""
    if cls.__module__.startswith(OURS):
        return cls.__qualname__
    return f"{cls.__module__}:{cls.__qualname__}"


def is_protocol(name: str) -> bool:
    """Tell whether an attribute of this name could mean something to Python, NumPy and others.

    An object with an `__array_interface__` is an array to NumPy, wherever in memory that says; one
    with `_as_parameter_` is the address that a function of `ctypes` is called with.
    """
    return name.startswith("__") or name == "_as_parameter_"


def may_have(cls: type, name: str) -> bool:
    """Tell whether a rule of this class can have a field of this name, out of a file.

    It can if the class declares it, as a field of a dataclass, in a slot, in an annotation or as a
    parameter of its `__init__`, or if the class has nothing of that name: no method, no constant.
    """
    if not name.isidentifier() or is_protocol(name):
        return False
    found = inspect.getattr_static(cls, name, None)
    if found is None or isinstance(found, MemberDescriptorType):
        return True
    return name in _declared(cls)


@functools.cache
def _declared(cls: type) -> frozenset[str]:
    """Return the fields that a class of rules declares."""
    if dataclasses.is_dataclass(cls):
        return frozenset(field.name for field in dataclasses.fields(cls))
    theirs = (base for base in cls.__mro__ if not base.__module__.startswith(OURS))
    annotated = (name for base in theirs for name in vars(base).get("__annotations__", ()))
    return frozenset((*annotated, *inspect.signature(cls).parameters))


def at(root: str, path: KeyPath) -> str:
    """Return the address of a place, for people to read."""
    text = str(path) if path else ""
    return shortened(f"{root}{'.' if text and text[0] != '[' else ''}{text}")
