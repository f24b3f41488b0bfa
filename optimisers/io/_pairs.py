"""The quick way to fill trees: nodes of a file, each beside the one object that it goes with.

It takes files and trees in which nothing is at two places and that plainly fit, which is nearly
all. Of any other it makes nothing and says nothing: `_fill` looks again, with paths.

A tree is gone through in rows, the root first: all that lies one level below the nodes of a row is
the next, parted by kind. So the leaves of a model are one row, their states another, and what holds
for a row is asked once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from .._arrays.library import isnumeric, library_for, library_of_class
from .._leaf import Leaf
from .._trees.nodes import children, is_node, rebuild
from .._trees.parameters import owners
from .._trees.paths import KeyPath
from . import _safetensors as form
from ._array_reader import ArrayReader
from ._contents import Contents
from ._differences import may_replace, signature
from ._entries import ABSENT, ArrayNode
from ._revive import supplied
from ._rule_reader import RuleReader
from ._saved import BY_POSITION, CLASSES, kind_of
from ._tables import INNER, Said, children_at, children_of, keys_of, rows_of

Tree = Any


@dataclasses.dataclass(slots=True)
class _Row:
    """Nodes of one kind, by their numbers, and the objects beside them."""

    kind: str
    numbers: list[int]
    xs: list[Any]
    below: list[Any]
    """Of nodes: the children of each, in the order of the object beside it; of arrays: which."""


class Pairs:
    """The nodes of a file beside the objects of trees."""

    def __init__(self, contents: Contents, rules: RuleReader) -> None:
        self._contents = contents
        self._rules = rules
        self._rows: list[_Row] = []
        """Those of the parents before those of their children."""
        self._is_taken = bytearray(len(contents.nodes))
        self._is_read = bytearray(len(contents.tensors))
        self._parameters: list[Any] = []
        """The arrays outside of states."""
        self._leaves: set[int] = set()

    def fit(self, root: str, tree: Tree) -> bool:
        """Put a tree beside the nodes of a root; False if they do not plainly fit."""
        nodes = self._contents.nodes
        stack: list[tuple[list[int], list[Any], bool]]
        stack = [([self._contents.roots[root]], [tree], False)]
        while stack:
            numbers, xs, is_state = stack.pop()
            if _are_taken(self._is_taken, numbers):  # the root of one tree, and a part of another
                return False
            kinds = {*map(_FIRST, map(nodes.__getitem__, numbers))}
            if len(kinds) == 1:
                parted = [_Row(kinds.pop(), numbers, xs, [])]
            else:
                beside = dict(zip(numbers, xs, strict=True))
                rows = rows_of(nodes, numbers).items()
                parted = [_Row(kind, row, [beside[k] for k in row], []) for kind, row in rows]
            for row in parted:
                found = self._children(row, is_state)
                if found is None:
                    return False
                self._rows.append(row)
                if found[0]:
                    stack.append((*found, is_state or row.kind == "leaf"))
        return True

    def _children(self, row: _Row, is_state: bool) -> tuple[list[int], list[Any]] | None:
        """Return what lies below a row: nodes, and what is beside them; None if it does not fit."""
        nodes, kind = self._contents.nodes, row.kind
        if kind == "array":
            return ([], []) if self._fit_arrays(row, is_state) else None
        if kind == "leaf":
            if not self._fit_leaves(row):
                return None
            return [nodes[k][2] for k in row.numbers], [leaf.state for leaf in row.xs]
        if kind not in INNER:
            return ([], []) if all(may_replace(x, kind) for x in row.xs) else None
        if (found := self._alike_children(row)) is not None:
            return found
        numbers: list[Any] = []
        beside: list[Any] = []
        for k, x in zip(row.numbers, row.xs, strict=True):
            values_of = self._values(nodes[k], x)
            if values_of is None:
                return None
            below, values = values_of
            row.below.append(below)
            numbers += below
            beside += values
        return _present(numbers, beside)

    def _alike_children(self, row: _Row) -> tuple[list[int], list[Any]] | None:
        """Do what `_children` does for tuples or lists of one class; None if not alike."""
        said = [self._contents.nodes[k] for k in row.numbers]
        cls, end = type(row.xs[0]), children_at(said[0])
        if {*map(type, row.xs)} != {cls}:
            return None
        if row.kind == "named":
            head = said[0][:end]
            is_named = is_node(row.xs[0]) and kind_of(row.xs[0]) == "named"
            if not is_named or cls._fields != head[2:] or any(x[:end] != head for x in said):
                return None
        elif row.kind not in BY_POSITION or cls is not CLASSES[row.kind]:
            return None
        row.below += [x[end:] for x in said]
        if [*map(len, row.below)] != [*map(len, row.xs)]:
            row.below.clear()
            return None
        return _present([*chain.from_iterable(row.below)], [*chain.from_iterable(row.xs)])

    def _fit_arrays(self, row: _Row, is_state: bool) -> bool:
        said = [self._contents.nodes[k] for k in row.numbers]
        read = [*map(_SECOND, said)]
        if {*map(len, said)} != {2} or _are_taken(self._is_read, read):
            return False
        row.below += read
        xs, tensors = row.xs, [self._contents.tensors[k] for k in read]
        if {*map(type, xs)} == {np.ndarray}:
            shapes: list[Any] = [x.shape for x in xs]
        elif None in map(library_of_class, {*map(type, xs)}):
            return False
        else:
            shapes = [tuple(x.shape) for x in xs]
        dtypes = [x.dtype for x in xs]
        names = [tensor.dtype for tensor in tensors]
        for dtype, name in {*zip(dtypes, names, strict=True)}:
            if form.dtype_name(dtype) != name:
                return False
        if not is_state:
            self._parameters += filter(isnumeric, xs)
        return shapes == [tensor.shape for tensor in tensors]

    def _fit_leaves(self, row: _Row) -> bool:
        if not all(issubclass(cls, Leaf) for cls in {*map(type, row.xs)}):
            return False
        self._leaves.update([id(x if x.tie is None else x.tie) for x in row.xs])
        rules = self._rules.rules_of(row.numbers)
        theirs = [x.rule for x in row.xs]
        marks = zip(map(id, rules), map(id, theirs), strict=True)
        pairs = dict(zip(marks, zip(rules, theirs, strict=True), strict=True))
        return all(
            one is other or signature(one) == signature(other) for one, other in pairs.values()
        )

    @staticmethod
    def _values(said: Said, x: Any) -> tuple[Said, Sequence[Any]] | None:
        """Return the children of a node, and beside them those of an object; None if not alike."""
        kind, cls = said[0], type(x)
        if kind in BY_POSITION and (cls is tuple or cls is list):
            return (said[1:], x) if cls.__name__ == kind and len(x) == len(said) - 1 else None
        if not is_node(x) or kind_of(x) != kind:
            return None
        if kind == "named":
            end = children_at(said)
            return (said[end:], x) if cls._fields == said[2:end] else None
        found = x if cls is dict else children(x)
        keys, below = keys_of(said), children_of(said)
        if (*found,) != keys:
            theirs = dict(zip(keys, below, strict=True))
            if found.keys() != theirs.keys():
                return None
            below = tuple([theirs[key] for key in found])
        return below, [*found.values()]

    def are_apart(self) -> bool:
        """Tell whether no two leaves and no two of the parameters given are one."""
        leaves = sum(len(row.numbers) for row in self._rows if row.kind == "leaf")
        root, xs = KeyPath(), self._parameters
        return len(self._leaves) == leaves and owners([(root, x) for x in xs]) == [*range(len(xs))]

    def filled(self, arrays: ArrayReader, wanted: dict[str, Tree]) -> dict[str, Tree]:
        """Return the trees, made of the objects and the numbers of the file."""
        nodes = self._contents.nodes
        made: list[Any] = [None] * len(nodes)
        arrays.read_small(
            k
            for row in self._rows
            if row.kind == "array"
            for k, x in zip(row.below, row.xs, strict=True)
            if not library_for(x).reads_bytes
        )
        for row in reversed(self._rows):
            values: Iterable[Any]
            if row.kind == "array":
                values = _arrays(arrays, row.below, row.xs)
            elif row.kind == "leaf":
                values = self._new_leaves([nodes[k] for k in row.numbers], made)
            elif row.kind == "value":
                values = [nodes[k][1] for k in row.numbers]
            elif row.kind == "left_out" or ({*map(type, row.xs)} == {tuple} and not any(row.below)):
                values = row.xs
            else:
                values = map(partial(_node, made), row.xs, row.below)
            for k, value in zip(row.numbers, values, strict=True):
                made[k] = value
        return {root: made[self._contents.roots[root]] for root in wanted}

    def _new_leaves(self, said: list[Said], made: list[Any]) -> list[Leaf]:
        rules = {k: self._rules.rule(k) for k in {x[1] for x in said}}
        return [Leaf(rules[x[1]], made[x[2]], x[3], x[4] if len(x) == 5 else 0) for x in said]


_FIRST, _SECOND = itemgetter(0), itemgetter(1)


def _are_taken(taken: bytearray, numbers: list[int]) -> bool:
    """Take some numbers, and tell whether one was taken before."""
    for k in numbers:
        if taken[k]:
            return True
        taken[k] = 1
    return False


def _arrays(arrays: ArrayReader, numbers: list[int], xs: list[Any]) -> list[Any]:
    """Return arrays of the file, by their numbers, of the libraries of those given."""
    bases = arrays.bases
    return [
        bases[k] if type(x) is np.ndarray and k in bases else arrays.array(ArrayNode(k, None), x)
        for k, x in zip(numbers, xs, strict=True)
    ]


def _node(made: list[Any], x: Any, below: Said) -> Any:
    """Return a node like one that was given, with the children that were made."""
    if ABSENT in below:
        values = [ABSENT if child is ABSENT else made[child] for child in below]
        return rebuild(x, supplied(type(x), values))
    values = [made[child] for child in below]
    return tuple(values) if type(x) is tuple else rebuild(x, values)


def _present(numbers: list[Any], xs: list[Any]) -> tuple[list[int], list[Any]]:
    """Return children that the file has, and the objects beside these."""
    if ABSENT not in numbers:
        return numbers, xs
    known = [k for k, child in enumerate(numbers) if child is not ABSENT]
    return [numbers[k] for k in known], [xs[k] for k in known]
