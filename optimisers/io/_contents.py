"""The tables of a file, checked whole before anything is made of them.

All numbers, names and keys come out of a file that may be hostile. When `Contents` is there, each
node is laid out as `_tables` says, has children that stand above it, and names arrays and rules
that there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .._trees.nodes import listed
from .._trees.parameters import View
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
    usual_tensor,
)
from ._json import FileFormatError
from ._revive import NamedTuples
from ._saved import BY_POSITION, DEEPEST, NAMESPACES, VERSION, WITH_CLASS, is_protocol, most_places
from ._tables import ARRAY, KEYED, Said, children_at, children_of, keys_at, pairs_of

_MOST_HEADS = 1000
"""Classes of nodes, with their keys, that are kept in mind: most states are of one."""
_MOST_PARTS = 1000
"""Rules that one rule may be made of."""


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
        self._fields: dict[Said, list[str] | None] = {}
        self._heads: dict[Said, Said] = {}
        self._views: dict[View, View] = {}

    def read_plain(self, header: form.Header) -> None:
        """Take the arrays of a file that `save` did not write: a dictionary of them by name."""
        for name, entry in header.entries.items():
            self.tensors.append(
                StoredTensor(name, entry.dtype(), entry.shape, c_order(entry.shape), entry, None)
            )
        count = len(self.tensors)
        names = [tensor.name for tensor in self.tensors]
        self.nodes = [*(("array", k) for k in range(count)), ("dict", *names, *range(count))]
        self.roots["state"] = count

    def read(self, told: dict[str, Any], entries: dict[str, form.Entry], checks: list[int]) -> None:
        """Take the tables of a text; the arrays are to lie in the file as it says."""
        version = told.get("version")
        if type(version) is not int or version < 1:
            damaged(f"its version is {version!r:.40}")
        if version > VERSION:
            raise FileFormatError(
                f"the file has version {version} of the format, and this library reads versions "
                f"up to {VERSION}: install a newer one"
            )
        roots = pairs_of(told.get("roots"))
        for name, is_there in (
            ("roots", roots is not None),
            *((name, isinstance(told.get(name), list)) for name in ("nodes", "rules", "tensors")),
        ):
            if not is_there:
                damaged(f"its {name} are missing")
        if len(told["tensors"]) != len(entries):
            damaged(f"it has {len(entries)} arrays and should have {len(told['tensors'])}")
        for said, check in zip(told["tensors"], checks, strict=True):
            tensor = None
            if type(said) is tuple and said and said[0] is ARRAY:
                tensor = usual_tensor(said[1], said[2], said[3], entries, check)
            self.tensors.append(tensor or checked_tensor(pairs_of(said), entries, check))
        if len({tensor[0] for tensor in self.tensors}) != len(entries):
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
        self.nodes = nodes
        tensors, rules = len(self.tensors), len(self.rules)
        small = (str, bool, type(None))
        sizes: list[int] = []
        has_parent, is_shared = bytearray(len(nodes)), 0
        for number, said in enumerate(nodes):
            kind: Any = said[0] if type(said) is tuple and said else None
            if kind == "array":
                if len(said) != 2 or type(said[1]) is not int or not 0 <= said[1] < tensors:
                    nodes[number] = self._array_said(said)
                sizes.append(1)
                continue
            if kind == "value" and len(said) == 2:
                if type(said[1]) not in small:
                    nodes[number] = ("value", plain(said[1]))
                sizes.append(1)
                continue
            if kind == "left_out" and len(said) == 2 and isinstance(said[1], str):
                sizes.append(1)
                continue
            if type(kind) is not str:
                damaged(f"a node is {said!r:.60}")
            if kind == "leaf" and len(said) in (4, 5):
                if type(said[1]) is not int or not 0 <= said[1] < rules:
                    damaged(f"{said[1]!r:.40} is no number of an entry")
                skipped = said[4] if len(said) == 5 else 0
                if type(said[3]) is not bool or type(skipped) is not int or skipped < 0:
                    damaged(f"a node is {said!r:.60}")
                below = said[2:3]
            else:
                said = nodes[number] = self._checked_inner(said, kind)
                below = said[children_at(said) :]
            size = 1
            for child in below:
                if child is not ABSENT:
                    if type(child) is not int or not 0 <= child < number:
                        damaged(f"{child!r:.40} is no number of an entry")
                    size += sizes[child]
                    is_shared |= has_parent[child]
                    has_parent[child] = 1
            sizes.append(size)
        self.is_shared = bool(is_shared)
        self._read_roots(roots, sizes)

    def _read_roots(self, roots: dict[str, Any], sizes: list[int]) -> None:
        most = most_places(len(self.nodes))
        for name, k in roots.items():
            self.roots[name] = index_of(k, self.nodes)
            if sizes[k] > most:
                damaged(f"its {name} has more than {most:,} places, made of {len(sizes)} nodes")
        if "state" not in roots or not roots.keys() <= {"state", "model", "metadata"}:
            damaged(f"it holds {listed(roots)}")

    def _checked_inner(self, said: Said, kind: str) -> Said:
        if kind in BY_POSITION:
            return said
        if kind in WITH_CLASS:
            if len(said) % 2 or type(said[1]) is not str:
                damaged(f"a node is {said!r:.60}")
        elif kind not in KEYED or not len(said) % 2:
            damaged(f"a node is {said!r:.60}")
        begin, end = keys_at(said), children_at(said)
        if kind not in WITH_CLASS:
            keys = said[begin:end]
            checked = self._checked_keys(said, kind, keys)
            return said if checked is keys else (*said[:begin], *checked, *said[end:])
        head = said[:end]
        are_texts = {*map(type, head)} == {str}
        known = self._heads.get(head) if are_texts else None
        if known is None:
            known = (*head[:begin], *self._checked_keys(said, kind, head[begin:]))
            if are_texts and len(self._heads) < _MOST_HEADS:
                self._heads[head] = known
        said = (*known, *said[end:])
        return said if kind == "object" or ":" in said[1] else self._completed(said, known[2:])

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

    def _completed(self, said: Said, keys: Said) -> Said:
        """Return a state with those fields too that the version which wrote it did not have."""
        mark = (said[1], *keys)
        if mark not in self._fields:
            self._fields[mark] = self.classes.newer_fields(said[1], [*keys])
        fields = self._fields[mark]
        if fields is None:
            return said
        found = dict(zip(keys, children_of(said), strict=True))
        return (*said[:2], *fields, *(found.get(field, ABSENT) for field in fields))

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
