"""Trees as tables: how state trees and models become text and arrays, and come back.

A tree is written as a table of nodes, children before their parents, so that

a) the text is flat however deep the tree is, and a loop reads it, without recursion;
b) a child can only be something that stands above: a file cannot hold a tree that contains itself;
c) what is shared stays shared: one `Leaf`, one array, one list at several places is one entry.

Nothing in a file names code that is run. A rule is looked up by name among the subclasses of `Rule`
that exist, a named tuple among the classes that exist; no module is ever imported for a file.

    Encoder   trees -> nodes, rules, tensors
    Archive   a file, checked -> trees: by `build` where all nodes are built-in ones, and by `fill`
              into the structure of given trees, whose differences it names all at once
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np

from . import _safetensors as form
from ._jax import Number, attributes, is_tracer
from ._pytree import Tie
from ._rule import Rule
from ._safetensors import FileFormatError, Tensor
from ._ties import View, carry, owners
from ._tree import KeyPath, Namespace, _library, children, fold, is_node, rebuild, walk
from .state import Leaf

Array = Any
Tree = Any

VERSION = 1
"""Of the text in the metadata. A reader takes this version and those before it."""

# --- what both directions share --------------------------------------------------------------

_CONTAINERS: dict[type, str] = {
    dict: "dict",
    OrderedDict: "ordered",
    list: "list",
    tuple: "tuple",
    SimpleNamespace: "namespace",
    Namespace: "state",
}
_CLASSES = {kind: cls for cls, kind in _CONTAINERS.items()}
_BY_POSITION = ("list", "tuple")
_WITH_CLASS = ("named", "object")
_BY_NAME = ("namespace", "state", "named")


def _kind(node: Any) -> str:
    cls = type(node)
    if cls in _CONTAINERS:
        return _CONTAINERS[cls]
    is_named = issubclass(cls, tuple) and hasattr(cls, "_fields")
    return "named" if is_named and not hasattr(cls, "n_sequence_fields") else "object"


def _class_name(cls: type) -> str:
    """Return the name of a class: of ours without its module, which may change."""
    package = __package__ or ""
    if cls.__module__.startswith(f"{package}."):
        return cls.__qualname__
    return f"{cls.__module__}:{cls.__qualname__}"


def _at(root: str, path: KeyPath) -> str:
    text = str(path) if path else ""
    return f"{root}{'.' if text and text[0] != '[' else ''}{text}"


def _shown(x: Any) -> str:
    """Say what something is, for an error."""
    if _library(type(x)) is not None:
        return f"array of shape {tuple(x.shape)}"
    if isinstance(x, Leaf):
        return f"Leaf with {x.rule!r:.60}"
    return f"{type(x).__name__} {x!r:.40}" if not is_node(x) else type(x).__name__


# --- trees to tables -------------------------------------------------------------------------


class Encoder:
    """Trees on their way into a file."""

    def __init__(self, leave_out: bool = False) -> None:
        self.leave_out = leave_out
        self.nodes: list[dict[str, Any]] = []
        self.rules: list[dict[str, Any]] = []
        self.arrays: list[tuple[str, Array]] = []
        self.names: list[str] = []
        self._array_nodes: list[tuple[dict[str, Any], str]] = []
        self._numbers: dict[tuple[str, int], tuple[int, Any]] = {}

    def add(self, root: str, tree: Tree) -> int:
        """Write a tree into the tables and return the number of its node."""
        return self._add(root, root, tree)

    def _add(self, root: str, name: str, tree: Tree) -> int:
        return cast(
            int,
            fold(
                tree,
                lambda path, x: self._leaf(_at(root, path), ".".join([name, *map(str, path)]), x),
                lambda path, x, results: self._node(_at(root, path), x, results),
            ),
        )

    def finish(self, roots: dict[str, int]) -> tuple[list[Tensor], str]:
        """Return the arrays to write, each once, and the text."""
        owner = owners(cast(Any, self.arrays))
        number: dict[int, int] = {}
        tensors: list[Tensor] = []
        said: list[dict[str, Any]] = []
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
            tensors.append(Tensor(name, dtype, tuple(x.shape), lambda x=x: _raw(x)))
            said.append({"name": name, "dtype": dtype, "shape": list(x.shape)})
            said[-1].update(_layout(x, k in with_views))
        for node, key in self._array_nodes:
            k = node[key]
            node[key] = number[owner[k]]
            if k in tied:
                view = View.of(self.arrays[k][1])
                node["view"] = [list(view.shape), list(view.order), list(view.flips)]
        text = {
            "version": VERSION,
            "roots": roots,
            "nodes": self.nodes,
            "rules": self.rules,
            "tensors": said,
        }
        return tensors, json.dumps(text, separators=(",", ":"), allow_nan=False)

    def _number(self, kind: str, x: Any, make: Callable[[], int]) -> int:
        """Return the number of what was met before, or make one; `x` is kept alive meanwhile."""
        mark = kind, id(x)
        if mark not in self._numbers:
            self._numbers[mark] = make(), x
        return self._numbers[mark][0]

    def _new(self, node: dict[str, Any]) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _leaf(self, place: str, name: str, x: Any) -> int:
        if isinstance(x, Leaf):
            one = x if x.tie is None else x.tie  # JAX makes several leaves of one that is tied
            return self._number("leaf", one, lambda: self._state_leaf(place, name, x))
        if _library(type(x)) is not None:
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

    def _state_leaf(self, place: str, name: str, leaf: Leaf) -> int:
        rule = self._rule(f"{place}.rule", f"{name}.rule", leaf.rule)
        state = self._add(f"{place}.state", name, leaf.state)
        return self._new({"leaf": rule, "state": state, "frozen": bool(leaf.frozen)})

    def _node(self, place: str, x: Any, results: list[int]) -> int:
        kind = _kind(x)
        node: dict[str, Any] = {kind: results}
        if kind in _WITH_CLASS:
            node["class"] = _class_name(type(x))
        if kind not in _BY_POSITION:
            node["keys"] = [_key(place, key) for key in children(x)]
        return self._new(node)

    def _array_node(self, place: str, name: str, x: Array) -> int:
        node = {"array": self._array(place, name, x)}
        self._array_nodes.append((node, "array"))
        return self._new(node)

    def _array(self, place: str, name: str, x: Array) -> int:
        _refuse_unsavable(place, x)
        self.arrays.append((place, x))
        self.names.append(name)
        return len(self.arrays) - 1

    def _rule(self, place: str, name: str, rule: Any) -> int:
        def make() -> int:
            fields = {
                key: self._value(f"{place}.{key}", f"{name}.{key}", value)
                for key, value in attributes(rule).items()
            }
            self.rules.append({"rule": _class_name(type(rule)), "fields": fields})
            return len(self.rules) - 1

        if not isinstance(rule, Rule):
            raise TypeError(f"{place} is no rule: {rule!r:.60}")
        return self._number("rule", rule, make)

    def _value(self, place: str, name: str, x: Any) -> Any:
        """Return what JSON has for `x`, or an object with one key that says what `x` is."""
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
            return {"rule": self._rule(place, name, x)}
        if isinstance(x, np.dtype) and form.dtype_name(x) is not None:
            return {"dtype": form.dtype_name(x)}
        if cls is tuple or cls is list:
            found = [self._value(f"{place}[{i}]", f"{name}.{i}", v) for i, v in enumerate(x)]
            return {cls.__name__: found}
        if cls is dict and all(type(key) is str for key in x):
            found = [self._value(f"{place}[{k!r}]", f"{name}.{k}", v) for k, v in x.items()]
            return {"dict": [list(x), found]}
        if _library(cls) is not None:
            node = {"array": self._number("field", x, lambda: self._array(place, name, x))}
            self._array_nodes.append((node, "array"))
            return node
        raise TypeError(
            f"cannot save the {cls.__name__} at {place}: {x!r:.60}. Arrays, numbers, strings, "
            "truth values and None can be saved"
        )


def _key(place: str, key: Any) -> Any:
    if type(key) is str or type(key) is bool or key is None:
        return key
    if type(key) is int and abs(key) < 2**63:
        return key
    raise TypeError(
        f"cannot save {place}: its key {key!r:.60} is of class {type(key).__name__}; "
        "strings and whole numbers can be saved as keys"
    )


def _refuse_unsavable(place: str, x: Array) -> None:
    library = _library(type(x))
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
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(name) > 500:
        name = f"{name[:240]}...{name[-240:]}"
    found, n = name, 1
    while found in names:
        n += 1
        found = f"{name}#{n}"
    names.add(found)
    return found


def _layout(x: Array, with_flips: bool) -> dict[str, list[int]]:
    """Return how the elements follow each other in memory, if not in C order."""
    if _library(type(x)) not in ("numpy", "torch", "cupy") or 0 in x.shape:
        return {}
    view = View.of(x)
    found = {}
    if view.order != tuple(range(len(view.shape))):
        found["order"] = list(view.order)
    if with_flips and view.flips:
        found["flips"] = list(view.flips)
    return found


def _raw(x: Array) -> np.ndarray:
    """Return the bytes of an array of any library, in C order."""
    library = _library(type(x))
    if library == "torch":
        torch: Any = sys.modules["torch"]
        flat = x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    if library == "cupy":
        x = x.get()
    elif library == "numba":
        x = x.copy_to_host()
    return form.untyped(np.asarray(x))


# --- tables to trees -------------------------------------------------------------------------


class _Node(dict[Any, Any]):
    """A node of a file: children by key, and what it was."""

    kind: str
    name: str


@dataclasses.dataclass(eq=False)
class _Leaf:
    rule: int
    state: Any
    frozen: bool


@dataclasses.dataclass(eq=False)
class _Array:
    tensor: int
    view: View | None


@dataclasses.dataclass(eq=False)
class _Value:
    value: Any


@dataclasses.dataclass(eq=False)
class _LeftOut:
    text: str


@dataclasses.dataclass(eq=False)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: View
    entry: form.Entry
    check: int | None


def _damaged(what: str) -> NoReturn:
    raise FileFormatError(f"the file is damaged: {what}")


class Archive:
    """A file whose header has been read and checked; its arrays are read when asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        header = form.read_header(file)
        said = header.metadata
        self.is_plain = form.KEY not in said and form.CHECKSUMS not in said
        self.roots: dict[str, Any] = {}
        self._rules: list[Any] = []
        self._made: dict[int, Rule] = {}
        if self.is_plain:
            self.strings = said
            self.tensors = [
                _Tensor(name, e.dtype(), e.shape, _c_order(e.shape), e, None)
                for name, e in header.entries.items()
            ]
            root = _Node((t.name, _Array(k, None)) for k, t in enumerate(self.tensors))
            root.kind, root.name = "dict", ""
            self.roots["state"] = root
            return
        if form.KEY not in said or form.CHECKSUMS not in said:
            _damaged(f"of {form.KEY!r} and {form.CHECKSUMS!r} in the metadata, one is missing")
        text = said[form.KEY]
        checks = form.checksums(said, len(header.entries))
        if next(checks) != zlib.crc32(text.encode("utf-8", "surrogatepass")):
            _damaged("the text in its header has another checksum")
        told = form.parse(text, "the text in the header")
        self._read(told, header.entries, list(checks))

    # The text, checked ---------------------------------------------------------------------

    def _read(self, told: dict[str, Any], entries: dict[str, form.Entry], checks: Any) -> None:
        version = told.get("version")
        if type(version) is not int or version < 1:
            _damaged(f"its version is {version!r:.40}")
        if version > VERSION:
            raise FileFormatError(
                f"the file has version {version} of the format, and this library reads versions "
                f"up to {VERSION}: install a newer one"
            )
        for name, cls in (("roots", dict), ("nodes", list), ("rules", list), ("tensors", list)):
            if not isinstance(told.get(name), cls):
                _damaged(f"its {name} are missing")
        if len(told["tensors"]) != len(entries):
            _damaged(f"it has {len(entries)} arrays and should have {len(told['tensors'])}")
        pairs = zip(told["tensors"], checks, strict=True)
        self.tensors = [_tensor(said, entries, check) for said, check in pairs]
        if len({t.name for t in self.tensors}) != len(entries):
            _damaged("an array is named twice")
        self._rules = [self._checked_rule(said, k) for k, said in enumerate(told["rules"])]
        nodes: list[Any] = []
        places: list[int] = []
        for said in told["nodes"]:
            node, below = self._checked_node(said, nodes)
            nodes.append(node)
            places.append(1 + sum(places[k] for k in below))
        most = max(1_000_000, 100 * len(nodes))
        for name, k in told["roots"].items():
            self.roots[name] = nodes[_number(k, nodes)]
            if places[k] > most:
                _damaged(f"its {name} has {places[k]:.3g} places made of {len(nodes)} nodes")
        if "state" not in self.roots or not self.roots.keys() <= {"state", "model", "metadata"}:
            _damaged("it has no state, or something unknown beside it")

    def _checked_rule(self, said: Any, k: int) -> Any:
        if not isinstance(said, dict) or said.keys() != {"rule", "fields"}:
            _damaged(f"rule {k} is {said!r:.60}")
        if not isinstance(said["rule"], str) or not isinstance(said["fields"], dict):
            _damaged(f"rule {k} is {said!r:.60}")
        for value in said["fields"].values():
            self._check_value(value, k)
        return said

    def _check_value(self, value: Any, rules: int) -> None:
        """Check a value; it may be made of the first so many rules."""
        if not isinstance(value, dict):
            if isinstance(value, list):
                _damaged(f"a value is {value!r:.60}")
            return
        if len(value) != 1 + ("view" in value):
            _damaged(f"a value is {value!r:.60}")
        kind, x = next(iter(value.items()))
        if kind == "rule":
            _number(x, range(rules))
        elif kind == "array":
            self._checked_array(value)
        elif kind in ("tuple", "list") and isinstance(x, list):
            for v in x:
                self._check_value(v, rules)
        elif kind == "dict":
            if not isinstance(x, list) or [type(v) for v in x] != [list, list]:
                _damaged(f"a value is {value!r:.60}")
            keys, found = x
            if len(keys) != len(found) or not all(isinstance(key, str) for key in keys):
                _damaged(f"a value is {value!r:.60}")
            for v in found:
                self._check_value(v, rules)
        else:
            _plain(value)

    def _checked_array(self, said: dict[str, Any]) -> _Array:
        k = _number(said["array"], self.tensors)
        if "view" not in said:
            return _Array(k, None)
        view = said["view"]
        if not isinstance(view, list) or len(view) != 3 or not form.is_shape(view[0]):
            _damaged(f"a view is {view!r:.60}")
        shape, order, flips = view
        return _Array(k, _checked_view(shape, order, flips, math.prod(self.tensors[k].shape)))

    def _checked_node(self, said: Any, above: list[Any]) -> tuple[Any, list[int]]:
        if not isinstance(said, dict) or not said:
            _damaged(f"a node is {said!r:.60}")
        kind = next(iter(said))
        keys = set(said)
        if kind == "value" and keys == {"value"}:
            value = said["value"]
            self._check_value(value, len(self._rules))
            return _Value(_plain(value)), []
        if kind == "array" and keys <= {"array", "view"}:
            return self._checked_array(said), []
        if kind == "left_out" and keys == {"left_out"}:
            return _LeftOut(str(said["left_out"])), []
        if kind == "leaf" and keys == {"leaf", "state", "frozen"}:
            k = _number(said["state"], above)
            if type(said["frozen"]) is not bool:
                _damaged(f"a leaf is {said!r:.60}")
            return _Leaf(_number(said["leaf"], self._rules), above[k], said["frozen"]), [k]
        return _checked_inner(said, kind, above)

    # Rules ---------------------------------------------------------------------------------

    def rule(self, k: int) -> Rule:
        """Return a rule of the file."""
        if k not in self._made:
            for number in range(k + 1):  # those it is made of stand above it
                if number in self._made or not (number == k or self._is_part(number, k)):
                    continue
                said = self._rules[number]
                fields = {name: self._value(v) for name, v in said["fields"].items()}
                self._made[number] = _made_rule(said["rule"], fields)
        return self._made[k]

    def _is_part(self, part: int, whole: int) -> bool:
        return True

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            kind, x = next(iter(value.items()))
            if kind == "rule":
                return self._made[x]
            if kind == "array":
                return self._whole_array(self._checked_array(value))
            if kind in ("tuple", "list"):
                found = [self._value(v) for v in x]
                return tuple(found) if kind == "tuple" else found
            if kind == "dict":
                return dict(zip(x[0], map(self._value, x[1]), strict=True))
        return _plain(value)

    # Arrays --------------------------------------------------------------------------------

    def raw(self, k: int) -> np.ndarray:
        """Read the bytes of an array, and check them."""
        tensor = self.tensors[k]
        raw, check = form.read_raw(self.file, tensor.entry)
        self.check(k, raw, check)
        return raw

    def check(self, k: int, raw: np.ndarray, check: int) -> None:
        """Refuse bytes that are not those that were written."""
        tensor = self.tensors[k]
        if tensor.check is not None and tensor.check != check:
            _damaged(f"the array {tensor.name!r} has another checksum than when it was written")
        form.check_content(tensor.name, tensor.entry.tag, raw)
