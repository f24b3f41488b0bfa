"""Trees into tables: nodes as texts, rules, and the arrays to write.

Most of what is saved are arrays of NumPy in dictionaries and in states of one level. These take a
short way each: a few steps in which nothing is made that only messages need.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple, cast

import numpy as np

from .._arrays.library import is_array, is_immutable, is_traced, library_for
from .._arrays.sharing import view_of
from .._arrays.traced import Number, attributes
from .._leaf import Leaf
from .._messages.text import plain
from .._trees.nodes import children, is_node
from .._trees.parameters import owners
from .._trees.paths import KeyPath
from .._trees.walks import fold
from ..rules._base import Rule
from ..rules._fields import unsaid
from . import _safetensors as form
from ._json import shortened
from ._safetensors import Tensor
from ._saved import (
    BY_POSITION,
    DEEPEST,
    NAMESPACES,
    VERSION,
    WITH_CLASS,
    at,
    class_name,
    crowd,
    is_protocol,
    kind_of,
    may_have,
    most_places,
)

Array = Any
Tree = Any

dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Where(NamedTuple):
    """The address of a place, which is only made where it is shown."""

    root: object
    path: KeyPath
    tail: str = ""

    def __str__(self) -> str:
        return f"{at(str(self.root), self.path)}{self.tail}"


class _Names:
    """The names of arrays: the keys on the way to them, those of the last parent kept in mind."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._parent: KeyPath | None = None
        self._above = root

    def of(self, path: KeyPath) -> str:
        parent = path._parent
        if parent is None:
            return self._root
        if parent is not self._parent:
            self._parent = parent
            self._above = ".".join([self._root, *map(str, parent)])
        return f"{self._above}.{path._key}"


class Encoder:
    """Trees on their way into a file."""

    def __init__(self, leave_out: bool = False) -> None:
        self.leave_out = leave_out
        self.nodes: list[str | int] = []
        """The text of each node; of one that is an array, its number among these."""
        self.rules: list[dict[str, Any]] = []
        self.arrays: list[tuple[object, Array]] = []
        self.names: list[str] = []
        self._places: list[int] = []
        self._in_fields: list[dict[str, Any]] = []
        """The arrays in fields of rules."""
        self._numbers: dict[tuple[str, int], tuple[int, Any]] = {}
        """Numbers of what was met before, by kind and id; each kept alive meanwhile."""
        self._array_nodes: dict[int, int] = {}
        self._flat: dict[Any, tuple[list[tuple[Any, KeyPath]], str, str]] = {}

    def add(self, root: str, tree: Tree) -> int:
        """Write a tree into the tables and return the number of its node."""
        return self._add(root, root, tree)

    def _add(self, root: object, name: str, tree: Tree) -> int:
        name_of = _Names(name).of
        known = self._array_nodes

        def leaf(path: KeyPath, x: Any) -> int:
            if type(x) is np.ndarray:
                return (
                    known[id(x)]
                    if id(x) in known
                    else self._array_node(root, path, name_of(path), x)
                )
            return self._leaf(Where(root, path), name_of(path), x)

        return cast(
            int, fold(tree, leaf, lambda path, x, below: self._node(Where(root, path), x, below))
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
        tensors, said, number = self._tensors(owner)

        def views(k: int) -> list[Any]:
            if owner[k] == k:
                return []
            view = view_of(self.arrays[k][1])
            return [[*view.shape], [*view.order], [*view.flips]]

        for field in self._in_fields:
            k = field["array"]
            field["array"] = number[owner[k]]
            if view := views(k):
                field["view"] = view
        texts = []
        for node in self.nodes:
            if isinstance(node, str):
                texts.append(node)
            elif view := views(node):
                texts.append(f'{{"array":{number[owner[node]]},"view":{dumps(view)}}}')
            else:
                texts.append(f'{{"array":{number[node]}}}')
        text = (
            f'{{"version":{VERSION},"roots":{dumps(roots)},"nodes":[{",".join(texts)}],'
            f'"rules":{dumps(self.rules)},"tensors":[{",".join(said)}]}}'
        )
        if what := crowd(text):
            raise ValueError(
                f"cannot save this: its text has {what}, more than is read again; keep long tuples "
                "in the fields of rules as arrays"
            )
        return tensors, text

    def _tensors(self, owner: list[int]) -> tuple[list[Tensor], list[str], dict[int, int]]:
        """Return the arrays that are written, what the text says of each, and their numbers."""
        number: dict[int, int] = {}
        tensors: list[Tensor] = []
        said: list[str] = []
        with_views = {first for k, first in enumerate(owner) if first != k}
        names: set[str] = set()
        for k, (place, x) in enumerate(self.arrays):
            if owner[k] != k:
                continue
            name = self.names[k]
            if name in names or len(name) > 500 or not name.isascii():
                name = _unlike(name, names)
            names.add(name)
            number[k] = len(tensors)
            dtype = form.dtype_name(x.dtype)
            if dtype is None:
                _refuse_unsavable(place, x)
            kind = form.form_of(dtype, tuple(x.shape))
            quoted = form.quoted(name)
            tensors.append(Tensor(quoted, kind, x))
            if type(x) is np.ndarray and x.flags.c_contiguous:
                said.append(f'{{"name":{quoted},{kind.said}}}')
            else:
                said.append(f'{{"name":{quoted},{kind.said}{_layout(x, k in with_views)}}}')
        return tensors, said, number

    def _number(self, kind: str, x: Any, number: int) -> int:
        """Note the number of something, so that it is met again, and return it."""
        self._numbers[kind, id(x)] = number, x
        return number

    def _new(self, text: str, below: list[int]) -> int:
        self.nodes.append(text)
        places = self._places
        places.append(1 + sum([places[k] for k in below]))
        return len(self.nodes) - 1

    def _leaf(self, place: Where, name: str, x: Any) -> int:
        if isinstance(x, Leaf):
            one = x if x.tie is None else x.tie  # JAX makes several leaves of one that is tied
            known = self._numbers.get(("leaf", id(one)))
            return (
                known[0] if known else self._number("leaf", one, self._state_leaf(place, name, x))
            )
        if is_immutable(x):  # a parameter at each place, not a tie
            return self._array_node(place.root, place.path, name, x)
        if is_array(x):
            if id(x) not in self._array_nodes:
                self._array_node(place.root, place.path, name, x)
            return self._array_nodes[id(x)]
        try:
            value = self._value(place, name, x)
        except TypeError as error:
            if not self.leave_out or is_node(x):
                raise TypeError(
                    f"{error}; keep such things out of the tree (as static fields, say), or save "
                    "with leave_out=True and load with like="
                ) from None
            return self._new(dumps({"left_out": f"{type(x).__name__} {x!r:.80}"}), [])
        return self._new(dumps({"value": value}), [])

    def _array_node(self, root: object, path: KeyPath, name: str, x: Array) -> int:
        k = len(self.nodes)
        self.nodes.append(self._array(tuple.__new__(Where, (root, path, "")), name, x))
        self._places.append(1)
        if not is_immutable(x):
            self._array_nodes[id(x)] = k
        return k

    def _array(self, place: object, name: str, x: Array) -> int:
        if type(x) is not np.ndarray or form.dtype_name(x.dtype) is None:
            _refuse_unsavable(place, x)
        self.arrays.append((place, x))
        self.names.append(name)
        return len(self.arrays) - 1

    def _state_leaf(self, place: Where, name: str, leaf: Leaf) -> int:
        known = self._numbers.get(("rule", id(leaf.rule)))
        if known:
            rule = known[0]
        else:
            rule = self._rule(place._replace(tail=".rule"), f"{name}.rule", leaf.rule)
        state = self._state(tuple.__new__(Where, (*place[:2], ".state")), name, leaf.state)
        skipped = f',"skipped":{int(leaf.skipped)}' if leaf.skipped else ""
        frozen = "true" if leaf.frozen else "false"
        return self._new(f'{{"leaf":{rule},"state":{state},"frozen":{frozen}{skipped}}}', [state])

    def _state(self, place: Where, name: str, state: Any) -> int:
        """Write what a rule remembers: mostly a tuple of arrays, which is a tree of one level."""
        cls = type(state)
        if not issubclass(cls, tuple) or kind_of(state) == "object" or any(map(is_node, state)):
            return self._add(place, name, state)
        mark = (cls, len(state))
        if mark not in self._flat:
            keys = [(key, KeyPath().step(key)) for key in children(state)]
            before, after = f'{{"{kind_of(state)}":[', "]}"
            if cls is not tuple:
                keys_text = dumps([key for key, _ in keys])
                after = f'],"class":{dumps(class_name(cls))},"keys":{keys_text}}}'
            self._flat[mark] = keys, before, after
        keys, before, after = self._flat[mark]
        known, below = self._array_nodes, []
        for (key, path), x in zip(keys, state, strict=True):
            if type(x) is np.ndarray:
                mine = known.get(id(x))
                below.append(
                    self._array_node(place, path, f"{name}.{key}", x) if mine is None else mine
                )
            else:
                below.append(self._leaf(Where(place, path), f"{name}.{key}", x))
        return self._new(f"{before}{','.join(map(str, below))}{after}", below)

    def _node(self, place: Where, x: Any, below: list[int]) -> int:
        kind = kind_of(x)
        text = f'{{"{kind}":{dumps(below)}'
        if kind in WITH_CLASS:
            text += f',"class":{dumps(class_name(type(x)))}'
        if kind not in BY_POSITION:
            keys = [key if type(key) is str else _key(place, key) for key in children(x)]
            if kind in NAMESPACES and any(map(is_protocol, keys)):
                name = next(filter(is_protocol, keys))
                raise TypeError(
                    f"cannot save {place}: its attribute {name!r:.60} has a name like those by "
                    "which Python and NumPy ask what an object is; choose another, which does not "
                    "begin with underscores"
                )
            text += f',"keys":{dumps(keys)}'
        return self._new(f"{text}}}", below)

    def _rule(self, place: object, name: str, rule: Any, depth: int = 0) -> int:
        if not isinstance(rule, Rule):
            raise TypeError(f"{place} is no rule: {plain(rule)}")
        if ("rule", id(rule)) in self._numbers:
            return self._numbers["rule", id(rule)][0]
        for key in attributes(rule):
            if ":" in class_name(type(rule)) and not may_have(type(rule), key):
                raise TypeError(
                    f"cannot save {place}: its attribute {key!r:.60} takes the place of "
                    f"something that the class {type(rule).__name__} has; declare it as a field"
                )
        hidden = unsaid(rule)
        fields = {
            key: self._value(f"{place}.{key}", f"{name}.{key}", value, depth)
            for key, value in attributes(rule).items()
            if key not in hidden
        }
        self.rules.append({"rule": class_name(type(rule)), "fields": fields})
        return self._number("rule", rule, len(self.rules) - 1)

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
        if is_array(x):
            known = self._numbers.get(("field", id(x)))
            k = known[0] if known else self._number("field", x, self._array(place, name, x))
            self._in_fields.append({"array": k})
            return self._in_fields[-1]
        raise TypeError(
            f"cannot save the {cls.__name__} at {place}: {plain(x)}. Arrays, numbers, strings, "
            "truth values and None can be saved"
        )


def _key(place: object, key: Any) -> Any:
    if type(key) is str or type(key) is bool or key is None:
        return key
    if type(key) is int:
        return key if abs(key) < 2**63 else {"int": hex(key)}
    raise TypeError(
        f"cannot save {place}: its key {plain(key)} is of class {type(key).__name__}; "
        "strings and whole numbers can be saved as keys"
    )


def _refuse_unsavable(place: object, x: Array) -> None:
    why = library_for(x).why_unsavable(x)
    if not is_traced(x) and form.dtype_name(x.dtype) is None:
        why = f"arrays of dtype {x.dtype} have no place in a file"
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
    return found


def _layout(x: Array, with_flips: bool) -> str:
    """Return what the text says of how elements follow each other in memory, if not in C order."""
    if not library_for(x).keeps_order or 0 in x.shape:
        return ""
    view = view_of(x)
    text = ""
    if view.order != tuple(range(len(view.shape))):
        text += f',"order":{form.listed_shape(view.order)}'
    if with_flips and view.flips:
        text += f',"flips":{form.listed_shape(view.flips)}'
    return text


def raw(x: Array) -> np.ndarray:
    """Return the bytes of an array of any library, in C order."""
    return form.untyped(library_for(x).on_host(x))
