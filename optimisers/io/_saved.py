"""Trees as tables: how state trees and models become text and arrays.

A tree is written as a table of nodes, children before their parents, so that

a) the text is flat however deep the tree is, and a loop reads it, without recursion;
b) a child can only be something that stands above: a file cannot hold a tree that contains itself;
c) what is shared stays shared: one `Leaf`, one array, one list at several places is one entry.

    {"dict": [0, 1], "keys": ["w", "b"]}     a node and its children; with a "class" if it has one
    {"array": 3}                             an array; {"array": 3, "view": ...} another view of it
    {"leaf": 0, "state": 7, "frozen": false} a `Leaf` with the rule of that number; with "skipped"
                                             if updates passed it by
    {"value": 1.5}                           what JSON has; else {"float": "inf"} and such

`_archive` reads what is written here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import MemberDescriptorType, SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np

from .._arrays import is_immutable, library_of
from .._jax import Number, attributes, is_tracer
from .._nodes import Namespace, children, is_node
from .._path import KeyPath
from .._rule import Rule
from .._ties import View, owners
from .._tree import fold
from ..state import Leaf
from . import _safetensors as form
from ._safetensors import Tensor, shortened

Array = Any
Tree = Any

VERSION = 1
"""Of the text in the metadata. A reader takes this version and those before it."""
DEEPEST = 100
"""How deep tuples and dictionaries in a field of a rule may stand in each other."""

# --- what both directions share --------------------------------------------------------------

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

    An object with an `__array_interface__` is an array to NumPy, wherever in memory that says.
    """
    return name.startswith("__")


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


# --- trees to tables -------------------------------------------------------------------------


class Where(NamedTuple):
    """The address of a place, which is only made where it is shown."""

    root: object
    path: KeyPath
    tail: str = ""

    def __str__(self) -> str:
        return f"{at(str(self.root), self.path)}{self.tail}"


class Encoder:
    """Trees on their way into a file."""

    def __init__(self, leave_out: bool = False) -> None:
        self.leave_out = leave_out
        self.nodes: list[dict[str, Any]] = []
        self._places: list[int] = []
        self.rules: list[dict[str, Any]] = []
        self.arrays: list[tuple[object, Array]] = []
        self.names: list[str] = []
        self._array_nodes: list[dict[str, Any]] = []
        self._numbers: dict[tuple[str, int], tuple[int, Any]] = {}

    def add(self, root: str, tree: Tree) -> int:
        """Write a tree into the tables and return the number of its node."""
        return self._add(root, root, tree)

    def _add(self, root: object, name: str, tree: Tree) -> int:
        return cast(
            int,
            fold(
                tree,
                lambda path, x: self._leaf(Where(root, path), ".".join([name, *map(str, path)]), x),
                lambda path, x, results: self._node(Where(root, path), x, results),
            ),
        )

    def finish(self, roots: dict[str, int]) -> tuple[list[Tensor], str]:
        """Return the arrays to write, each once, and the text."""
        most = most_places(len(self.nodes))
        for root, k in roots.items():
            if self._places[k] > most:
                raise ValueError(
                    f"cannot save the {root}: it has {self._places[k]:,} places, made of "
                    f"{len(self.nodes):,} nodes that are shared; at most {most:,} can be loaded"
                )
        owner = owners(cast(Any, self.arrays))
        number: dict[int, int] = {}
        tensors: list[Tensor] = []
        said: list[str] = []
        tied = {k for k, first in enumerate(owner) if first != k}
        with_views = {owner[k] for k in tied}
        names: set[str] = set()
        for k, (place, x) in enumerate(self.arrays):
            if owner[k] != k:
                continue
            dtype = form.dtype_name(x.dtype)
            assert dtype is not None, place
            name = _unlike(self.names[k], names)
            number[k] = len(tensors)
            tensors.append(Tensor(name, dtype, tuple(x.shape), x, _raw))
            shape = form.listed_shape(tensors[-1].shape)
            more = "".join(f',"{key}":{v}' for key, v in _layout(x, k in with_views).items())
            said.append(f'{{"name":{form.quoted(name)},"dtype":"{dtype}","shape":{shape}{more}}}')
        for node in self._array_nodes:
            k = node["array"]
            node["array"] = number[owner[k]]
            if k in tied:
                view = View.of(self.arrays[k][1])
                node["view"] = [list(view.shape), list(view.order), list(view.flips)]
        tables = {
            "version": VERSION,
            "roots": roots,
            "nodes": self.nodes,
            "rules": self.rules,
            "tensors": [],
        }
        text = json.dumps(tables, separators=(",", ":"), allow_nan=False)
        return tensors, f"{text.removesuffix(']}')}{','.join(said)}]}}"

    def _number(self, kind: str, x: Any, make: Callable[[], int]) -> int:
        """Return the number of what was met before, or make one; `x` is kept alive meanwhile."""
        mark = kind, id(x)
        if mark not in self._numbers:
            self._numbers[mark] = make(), x
        return self._numbers[mark][0]

    def _new(self, node: dict[str, Any], below: Iterable[int] = ()) -> int:
        self.nodes.append(node)
        places = 1
        for k in below:
            places += self._places[k]
        self._places.append(places)
        return len(self.nodes) - 1

    def _leaf(self, place: Where, name: str, x: Any) -> int:
        if isinstance(x, Leaf):
            one = x if x.tie is None else x.tie  # JAX makes several leaves of one that is tied
            return self._number("leaf", one, lambda: self._state_leaf(place, name, x))
        if is_immutable(x):  # a parameter at each place, not a tie
            return self._array_node(place, name, x)
        if library_of(type(x)) is not None:
            return self._number("array", x, lambda: self._array_node(place, name, x))
        try:
            return self._new({"value": self._value(place, name, x)})
        except TypeError as error:
            if not self.leave_out or is_node(x):
                raise TypeError(
                    f"{error}; keep such things out of the tree (as static fields, say), or save "
                    "with leave_out=True and load with like="
                ) from None
            return self._new({"left_out": f"{type(x).__name__} {x!r:.80}"})

    def _state_leaf(self, place: Where, name: str, leaf: Leaf) -> int:
        rule = self._rule(place._replace(tail=".rule"), f"{name}.rule", leaf.rule)
        state = self._state(place._replace(tail=".state"), name, leaf.state)
        skipped = {"skipped": int(leaf.skipped)} if leaf.skipped else {}
        frozen = bool(leaf.frozen)
        return self._new({"leaf": rule, "state": state, "frozen": frozen, **skipped}, [state])

    def _state(self, place: Where, name: str, state: Any) -> int:
        """Write what a rule remembers: mostly a tuple of arrays, which is a tree of one level."""
        cls = type(state)
        if is_node(state) and issubclass(cls, tuple) and not any(map(is_node, state)):
            keys = [*children(state)]
            path = KeyPath()
            below = [
                self._leaf(Where(place, path.step(key)), f"{name}.{key}", x)
                for key, x in zip(keys, state, strict=True)
            ]
            return self._node(place, state, below)
        return self._add(place, name, state)

    def _node(self, place: Where, x: Any, results: list[int]) -> int:
        kind = kind_of(x)
        node: dict[str, Any] = {kind: results}
        if kind in WITH_CLASS:
            node["class"] = class_name(type(x))
        if kind not in BY_POSITION:
            node["keys"] = [_key(place, key) for key in children(x)]
        if kind in NAMESPACES and any(map(is_protocol, node["keys"])):
            name = next(filter(is_protocol, node["keys"]))
            raise TypeError(
                f"cannot save {place}: its attribute {name!r:.60} has a name like those by which "
                "Python and NumPy ask what an object is; choose one without two underscores ahead"
            )
        return self._new(node, results)

    def _array_node(self, place: Where, name: str, x: Array) -> int:
        node = {"array": self._array(place, name, x)}
        self._array_nodes.append(node)
        return self._new(node)

    def _array(self, place: object, name: str, x: Array) -> int:
        _refuse_unsavable(place, x)
        self.arrays.append((place, x))
        self.names.append(name)
        return len(self.arrays) - 1

    def _rule(self, place: object, name: str, rule: Any, depth: int = 0) -> int:
        def make() -> int:
            for key in attributes(rule):
                if ":" in class_name(type(rule)) and not may_have(type(rule), key):
                    raise TypeError(
                        f"cannot save {place}: its attribute {key!r:.60} takes the place of "
                        f"something that the class {type(rule).__name__} has; declare it as a field"
                    )
            fields = {
                key: self._value(f"{place}.{key}", f"{name}.{key}", value, depth)
                for key, value in attributes(rule).items()
            }
            self.rules.append({"rule": class_name(type(rule)), "fields": fields})
            return len(self.rules) - 1

        if not isinstance(rule, Rule):
            raise TypeError(f"{place} is no rule: {rule!r:.60}")
        return self._number("rule", rule, make)

    def _value(self, place: object, name: str, x: Any, depth: int = 0) -> Any:
        """Return what JSON has for `x`, or an object with one key that says what `x` is."""
        if depth > DEEPEST:
            raise TypeError(
                f"cannot save {place!s:.80}...: there are tuples or rules {DEEPEST} deep"
            )
        deeper = depth + 1
        cls = type(x)
        if x is None or cls is bool or cls is str:
            return x
        if cls is int:
            return x if abs(x) < 2**63 else {"int": hex(x)}
        if cls is float:
            return x if math.isfinite(x) else {"float": repr(x)}
        if cls is complex:
            return {"complex": [x.real.hex(), x.imag.hex()]}
        if cls is bytes:
            return {"bytes": x.hex()}
        if cls is np.str_:
            return str(x)
        if isinstance(x, np.generic) and form.dtype_name(x.dtype) is not None:
            raw = form.untyped(np.asarray(x))
            return {"scalar": [form.dtype_name(x.dtype), raw.tobytes().hex()]}
        if cls is Number and not x.is_traced and x.is_scalar:
            return self._value(place, name, float(x))
        if isinstance(x, Rule):
            return {"rule": self._rule(place, name, x, deeper)}
        if isinstance(x, np.dtype) and form.dtype_name(x) is not None:
            return {"dtype": form.dtype_name(x)}
        if cls is tuple or cls is list:
            found = [
                self._value(f"{place}[{i}]", f"{name}.{i}", v, deeper) for i, v in enumerate(x)
            ]
            return {cls.__name__: found}
        if cls is dict and all(type(key) is str for key in x):
            found = [self._value(f"{place}[{k!r}]", f"{name}.{k}", v, deeper) for k, v in x.items()]
            return {"dict": [list(x), found]}
        if library_of(cls) is not None:
            node = {"array": self._number("field", x, lambda: self._array(place, name, x))}
            self._array_nodes.append(node)
            return node
        raise TypeError(
            f"cannot save the {cls.__name__} at {place}: {x!r:.60}. Arrays, numbers, strings, "
            "truth values and None can be saved"
        )


def _key(place: object, key: Any) -> Any:
    if type(key) is str or type(key) is bool or key is None:
        return key
    if type(key) is int:
        return key if abs(key) < 2**63 else {"int": hex(key)}
    raise TypeError(
        f"cannot save {place}: its key {key!r:.60} is of class {type(key).__name__}; "
        "strings and whole numbers can be saved as keys"
    )


def _refuse_unsavable(place: object, x: Array) -> None:
    if type(x) is np.ndarray and form.dtype_name(x.dtype) is not None:
        return
    library = library_of(type(x))
    why = ""
    if library == "autograd" or is_tracer(x):
        why = "it is being traced: save outside the function that is differentiated or compiled"
    elif form.dtype_name(x.dtype) is None:
        why = f"arrays of dtype {x.dtype} have no place in a file"
    elif isinstance(x, np.ndarray) and type(x) not in (np.ndarray, np.memmap):
        why = "it may be more than its numbers; take np.asarray of it"
    elif library == "torch" and (x.layout is not sys.modules["torch"].strided or x.is_meta):
        why = f"its layout is {x.layout}; make it dense" if not x.is_meta else "it has no data"
    if why:
        raise TypeError(f"cannot save the {type(x).__name__} at {place}: {why}")


def _unlike(name: str, names: set[str]) -> str:
    """Return `name`, cut where very long, and with a number where another array has it."""
    if not name.isascii() or len(name) > 500:
        name = shortened(name.encode("utf-8", "backslashreplace").decode("utf-8"))
    found, n = name, 1
    while found in names:
        n += 1
        found = f"{name}#{n}"
    names.add(found)
    return found


def _layout(x: Array, with_flips: bool) -> dict[str, str]:
    """Return how the elements follow each other in memory, if not in C order."""
    if type(x) is np.ndarray and x.flags.c_contiguous:
        return {}
    if library_of(type(x)) not in ("numpy", "torch", "cupy") or 0 in x.shape:
        return {}
    view = View.of(x)
    found = {}
    if view.order != tuple(range(len(view.shape))):
        found["order"] = form.listed_shape(view.order)
    if with_flips and view.flips:
        found["flips"] = form.listed_shape(view.flips)
    return found


def _raw(x: Array) -> np.ndarray | bytes:
    """Return the bytes of an array of any library, in C order: of a small one, a copy."""
    if type(x) is np.ndarray and x.nbytes <= form.CHUNK and form.lies_as_in_files(x.dtype):
        return x.tobytes()
    library = library_of(type(x))
    if library == "torch":
        torch: Any = sys.modules["torch"]
        flat = x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    if library == "cupy":
        x = x.get()
    elif library == "numba":
        x = x.copy_to_host()
    return form.untyped(np.asarray(x))
