"""The tables of a file, checked whole before anything is made of them.

All numbers, names and keys come out of a file that may be hostile. When `Contents` is there, each
node is laid out as `_tables` says, has children that stand above it, and names arrays and rules
that there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from .._arrays.layout import View
from .._trees.nodes import listed
from . import _safetensors as form
from ._entries import (
    ABSENT,
    ArrayNode,
    StoredTensor,
    are_slow,
    c_order,
    checked_tensor,
    checked_view,
    damaged,
    index_of,
    plain,
)
from ._json import FileFormatError
from ._revive import NamedTuples
from ._saved import BY_POSITION, DEEPEST, NAMESPACES, VERSION, WITH_CLASS, is_protocol, most_places
from ._tables import (
    CHILDLESS,
    INNER,
    Rows,
    Said,
    children_at,
    children_of,
    keys_at,
    pairs_of,
    rows_of,
)

_MOST_HEADS = 1000
"""Classes of nodes, with their keys, that are kept in mind: most states are of one."""
_MOST_PARTS = 1000
"""Rules that one rule may be made of."""
_AT_ONCE = 1 << 16
"""Children that are looked at together."""
_KINDS = {*CHILDLESS, *INNER, "leaf"}
_SECOND = itemgetter(1)


class Contents:
    """What a file holds: arrays, rules, nodes, and the numbers of the nodes that are roots."""

    def __init__(self) -> None:
        self.tensors: list[StoredTensor] = []
        self.roots: dict[str, int] = {}
        self.nodes: list[Any] = []
        self.rules: list[tuple[str, Said]] = []
        """The name of each rule, and its fields as they were parsed."""
        self.parts: list[list[int]] = []
        """Of which rules each rule is made."""
        self.is_open: list[bool] = []
        """Whether a rule may keep any state: one of a user's, or one that is made of such."""
        self.classes = NamedTuples()
        self.is_shared = False
        """Whether a node has more than one parent."""
        self.is_whole = False
        """Whether each node is the root of a tree or has one parent."""
        self.rows: Rows = {}
        """The numbers of the nodes of each kind."""
        self._heads: dict[Said, tuple[Said, list[str] | None]] = {}
        """How nodes begin, beside what is made of that, and the fields that newer states have."""
        self._views: dict[View, View] = {}

    def read_plain(self, header: form.Header) -> None:
        """Take the arrays of a file that `save` did not write: a dictionary of them by name."""
        for name, entry in header.entries.items():
            self.tensors.append(
                StoredTensor(name, entry.dtype(), entry.shape, c_order(entry.shape), entry, None)
            )
        count = len(self.tensors)
        names = [tensor.name for tensor in self.tensors]
        self.rows = {"array": [*range(count)], "dict": [count]}
        self.is_whole = True
        self.nodes = [*(("array", k) for k in range(count)), ("dict", *names, *range(count))]
        self.roots["state"] = count

    def read(self, told: dict[str, Any], tensors: list[StoredTensor]) -> None:
        """Take the tables of a text whose arrays were checked."""
        roots = pairs_of(told.get("roots"))
        for name, is_there in (
            ("roots", roots is not None),
            *((name, isinstance(told.get(name), list)) for name in ("nodes", "rules")),
        ):
            if not is_there:
                damaged(f"its {name} are missing")
        self.tensors = tensors
        if len({tensor[0] for tensor in tensors}) != len(tensors):
            damaged("an array is named twice")
        self._read_rules(told["rules"])
        self._read_nodes(told["nodes"], roots or {})

    def _read_rules(self, rules: list[Any]) -> None:
        sizes: list[int] = []
        depths: list[int] = []
        for packed_rule in rules:
            said = pairs_of(packed_rule)
            if said is None or said.keys() != {"rule", "fields"} or type(said["rule"]) is not str:
                damaged(f"a rule is {said!r:.60}")
            fields = pairs_of(said["fields"])
            if fields is None:
                damaged(f"the fields of a rule are {said['fields']!r:.60}")
            parts: list[int] = []
            self._check_values(fields, parts)
            sizes.append(1 + sum(sizes[k] for k in parts))
            depths.append(1 + max((depths[k] for k in parts), default=0))
            if sizes[-1] > _MOST_PARTS or depths[-1] > DEEPEST:
                damaged("a rule is made of too many rules")
            # A user's rule, and one made of such, may keep anything.
            is_open = ":" in said["rule"] or any(self.is_open[k] for k in parts)
            self.rules.append((said["rule"], said["fields"]))
            self.parts.append(parts)
            self.is_open.append(is_open)

    def _check_values(self, fields: dict[str, Any], parts: list[int]) -> None:
        """Check the fields of a rule, and note the rules that they hold."""
        stack: list[tuple[Any, int]] = []
        self._check_row(fields.values(), 0, stack)
        while stack:
            value, depth = stack.pop()
            kind: Any = value[0] if value else ""
            if kind == "rule" and len(value) == 2:
                parts.append(index_of(value[1], self.rules))
            elif kind == "array":
                self.checked_array(value)
            elif kind == "dict" or kind in BY_POSITION:
                x: Any = value[1:]
                if kind == "dict":
                    pair: Any = value[1] if len(value) == 2 else None
                    are_pairs = isinstance(pair, list) and [*map(type, pair)] == [list, list]
                    if not are_pairs or [*map(type, pair[0])] != [str] * len(pair[1]):
                        damaged(f"a value is {value!r:.60}")
                    x = pair[1]
                if depth > DEEPEST:
                    damaged(f"a value is {value!r:.60}")
                self._check_row(x, depth + 1, stack)
            else:
                plain(value)

    def _check_row(self, values: Iterable[Any], depth: int, stack: list[tuple[Any, int]]) -> None:
        """Check values that are nothing but numbers and texts, of which there may be very many."""
        for value in values:
            if type(value) is tuple:
                stack.append((value, depth))
            else:
                plain(value)

    def _read_nodes(self, nodes: list[Any], roots: dict[str, Any]) -> None:
        """Check the nodes kind by kind: those of a kind are alike, and are looked at in columns."""
        self.nodes = nodes
        if {*map(type, nodes)} - {tuple} or {said[0] for said in nodes} - _KINDS:
            wrong = next(x for x in nodes if type(x) is not tuple or x[0] not in _KINDS)
            damaged(f"a node is {wrong!r:.60}")
        self.rows = rows = rows_of(nodes, range(len(nodes)))
        families = _Families(len(nodes))
        for kind, row in rows.items():
            if kind == "array":
                self._check_arrays(row)
            elif kind == "leaf":
                self._check_leaves(row)
                families.add_one_each(row, [nodes[k][2] for k in row])
            elif kind in CHILDLESS:
                for k in row:
                    nodes[k] = _checked_value(nodes[k])
            elif kind in BY_POSITION:
                for k in row:
                    if len(said := nodes[k]) > 1:
                        families.add(k, said[1:])
            else:
                for k in row:
                    said = nodes[k]
                    nodes[k] = self._checked_inner(said, kind)
                    families.add(k, said[children_at(said) :])
        self._read_roots(roots, families)

    def _check_arrays(self, row: list[int]) -> None:
        nodes = self.nodes
        if {*map(len, said := [nodes[k] for k in row])} == {2}:
            numbers = [*map(_SECOND, said)]
            if {*map(type, numbers)} == {int} and 0 <= min(numbers) <= max(numbers) < len(
                self.tensors
            ):
                return
        for k in row:
            nodes[k] = self._array_said(nodes[k])

    def _check_leaves(self, row: list[int]) -> None:
        rules = len(self.rules)
        for said in [self.nodes[k] for k in row]:
            if len(said) != 4 and (len(said) != 5 or type(said[4]) is not int or said[4] < 0):
                damaged(f"a node is {said!r:.60}")
            if type(said[1]) is not int or not 0 <= said[1] < rules:
                damaged(f"{said[1]!r:.40} is no number of an entry")
            if type(said[3]) is not bool:
                damaged(f"a node is {said!r:.60}")

    def _read_roots(self, roots: dict[str, Any], families: _Families) -> None:
        """Check the roots, and how many places their trees have; a shared node counts at each."""
        if "state" not in roots or not roots.keys() <= {"state", "model", "metadata"}:
            damaged(f"it holds {listed(roots)}")
        for name, k in roots.items():
            self.roots[name] = index_of(k, self.nodes)
        self.is_shared = families.are_shared()
        self.is_whole = not self.is_shared and families.are_alone({*self.roots.values()})
        if self.is_shared:
            sizes, most = self._sizes(), most_places(len(self.nodes))
            for name, k in self.roots.items():
                if sizes[k] > most:
                    damaged(f"its {name} has more than {most:,} places, made of {len(sizes)} nodes")

    def _sizes(self) -> list[int]:
        """Return how many places the tree below each node has."""
        sizes: list[int] = []
        for said in self.nodes:
            below = () if said[0] in CHILDLESS else children_of(said)
            sizes.append(1 + sum([sizes[child] for child in below if child is not ABSENT]))
        return sizes

    def _checked_inner(self, said: Said, kind: str) -> Said:
        if kind in WITH_CLASS:
            if len(said) % 2 or type(said[1]) is not str:
                damaged(f"a node is {said!r:.60}")
        elif not len(said) % 2:
            damaged(f"a node is {said!r:.60}")
        begin, end = keys_at(said), children_at(said)
        if kind not in WITH_CLASS:
            keys = said[begin:end]
            checked = self._checked_keys(said, kind, keys)
            return said if checked is keys else (*said[:begin], *checked, *said[end:])
        head = said[:end]
        try:
            known = self._heads.get(head)
        except TypeError:  # a key of several parts
            known = None
        if known is None:
            checked = (*head[:begin], *self._checked_keys(said, kind, head[begin:]))
            fields = None
            if kind == "named" and ":" not in said[1]:
                fields = self.classes.newer_fields(said[1], [*checked[begin:]])
            known = checked, fields
            if {*map(type, head)} == {str} and len(self._heads) < _MOST_HEADS:
                self._heads[head] = known
        checked, fields = known
        if checked is not head:
            said = (*checked, *said[end:])
        return said if fields is None else _completed(said, checked[begin:], fields)

    def _checked_keys(self, said: Said, kind: str, keys: Said) -> Said:
        """Return the keys of a node as they are, made of what stands for them."""
        if not {*map(type, keys)} <= {str}:
            keys = tuple(key if isinstance(key, str) else plain(key) for key in keys)
            only_texts = kind in (*NAMESPACES, "named")
            if only_texts or not {*map(type, keys)} <= {str, int, bool, type(None)}:
                damaged(f"a node is {said!r:.60}")
            if are_slow(keys):
                damaged(f"the keys of a node are made to be slow: {said!r:.60}")
        if kind in (*NAMESPACES, "named") and any(map(is_protocol, keys)):
            damaged(f"a node has attributes that no file may give it: {said!r:.60}")
        if len(keys) > 1 and len(dict.fromkeys(keys)) < len(keys):
            damaged(f"a node has a key twice: {said!r:.60}")
        return keys

    def _array_said(self, said: Said) -> Said:
        array = self.checked_array(said)
        return (
            ("array", array.tensor) if array.view is None else ("array", array.tensor, array.view)
        )

    def checked_array(self, said: Said) -> ArrayNode:
        """Return an array, or a view of one, that a node or a field of a rule names."""
        k = index_of(said[1] if len(said) > 1 else None, self.tensors)
        if len(said) == 2:
            return ArrayNode(k, None)
        view = said[2]
        if not isinstance(view, list) or len(view) != 3:
            damaged(f"a view is {view!r:.60}")
        shape, order, flips = view
        size = math.prod(self.tensors[k].shape)
        checked = checked_view(shape, order, flips, size)
        return ArrayNode(k, self._views.setdefault(checked, checked))


def refuse_version(told: dict[str, Any]) -> None:
    """Refuse a text of a later version than this library knows."""
    version = told.get("version")
    if type(version) is not int or version < 1:
        damaged(f"its version is {version!r:.40}")
    if version > VERSION:
        raise FileFormatError(
            f"the file has version {version} of the format, and this library reads versions "
            f"up to {VERSION}: install a newer one"
        )


def tensors_of(told: Any, entries: dict[str, form.Entry], checks: list[int]) -> list[StoredTensor]:
    """Return the arrays of a text, which are to lie in the file as it says."""
    if type(told) is not list:
        damaged("its tensors are missing")
    if len(told) != len(entries):
        damaged(f"it has {len(entries)} arrays and should have {len(told)}")
    pairs = map(pairs_of, told)
    return [checked_tensor(said, entries, check) for said, check in zip(pairs, checks, strict=True)]


def _checked_value(said: Said) -> Said:
    """Return a node that is a number, a text, ..., None, or something that was left out."""
    kind, x = said if len(said) == 2 else ("", None)
    if kind != "value" and (kind != "left_out" or not isinstance(x, str)):
        damaged(f"a node is {said!r:.60}")
    known = plain(x)
    return said if known is x else (kind, known)


def _completed(said: Said, keys: Said, fields: list[str]) -> Said:
    """Return a state with those fields too that the version which wrote it did not have."""
    found = dict(zip(keys, children_of(said), strict=True))
    return (*said[:2], *fields, *(found.get(field, ABSENT) for field in fields))


class _Families:
    """Children and their parents, checked some thousands at a time."""

    def __init__(self, count: int) -> None:
        self._has_parent = np.zeros(count, np.bool_)
        self._children: list[Any] = []
        self._parents: list[int] = []
        self._total = 0

    def add(self, parent: int, children: Said) -> None:
        """Add the children of a node."""
        if len(children) > _AT_ONCE:
            for at in range(0, len(children), _AT_ONCE):
                self._check(children[at : at + _AT_ONCE], parent)
            return
        self._children += children
        self._parents += [parent] * len(children)
        if len(self._children) > _AT_ONCE:
            self._check_added()

    def add_one_each(self, parents: list[int], children: list[Any]) -> None:
        """Add nodes that have one child each."""
        for at in range(0, len(children), _AT_ONCE):
            self._check(children[at : at + _AT_ONCE], parents[at : at + _AT_ONCE])

    def _check_added(self) -> None:
        self._check(self._children, self._parents)
        self._children, self._parents = [], []

    def _check(self, children: Sequence[Any], parents: Any) -> None:
        """Refuse children that do not stand above their parents."""
        if {*map(type, children)} - {int}:
            wrong = next(child for child in children if type(child) is not int)
            damaged(f"{wrong!r:.40} is no number of an entry")
        try:
            numbers = np.array(children, np.intp)
        except OverflowError:
            damaged(f"{max(children, key=abs)!r:.40} is no number of an entry")
        are_wrong = (numbers < 0) | (numbers >= parents)
        if are_wrong.any():
            damaged(f"{numbers[are_wrong][0]} is no number of an entry")
        self._has_parent[numbers] = True
        self._total += len(numbers)

    def are_shared(self) -> bool:
        """Tell whether a node has several parents."""
        self._check_added()
        return self._total > int(np.count_nonzero(self._has_parent))

    def are_alone(self, tops: set[int]) -> bool:
        """Tell whether these nodes have no parent, and all others have."""
        lonely = np.flatnonzero(~self._has_parent)
        return len(lonely) == len(tops) and {*lonely.tolist()} == tops
