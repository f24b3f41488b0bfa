"""Tables as trees: how what `_saved` wrote comes back, out of a file that may be hostile.

a) All that a file says is checked, and all that is missing or different is named, before an array
   is read: `Archive` on opening, then `build` or `fill`.
b) `build` makes trees of built-in nodes. `fill` follows given trees, with their classes and array
   libraries.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, NoReturn, Self, cast

import numpy as np

from .._arrays import isnumeric, library_of
from .._jax import attributes
from .._nodes import children, is_node, listed, rebuild
from .._path import KeyPath
from .._pytree import Tie
from .._rule import Rule
from .._ties import carry, owners
from .._tree import fold, walk
from ..state import Leaf
from . import _safetensors as form
from ._entries import (
    ABSENT,
    LEFT_OUT,
    ArrayNode,
    LeafNode,
    Node,
    StoredTensor,
    ValueNode,
    are_slow,
    checked_tensor,
    checked_view,
    damaged,
    index_of,
    plain,
    usual_tensor,
)
from ._revive import (
    as_like,
    c_order,
    made_rule,
    named_class,
    newer_fields,
    rule_class,
    supplied,
    typed,
)
from ._safetensors import FileFormatError, Source
from ._saved import (
    BY_POSITION,
    CONTAINERS,
    DEEPEST,
    NAMESPACES,
    VERSION,
    WITH_CLASS,
    at,
    is_protocol,
    kind_of,
    most_places,
)
from ._tables import (
    KEYED,
    Said,
    children_at,
    children_of,
    keys_at,
    keys_of,
    packed,
    pairs_of,
    places,
)

Array = Any
Tree = Any

_USUAL = ("name", "dtype", "shape")
_CLASSES = {kind: cls for cls, kind in CONTAINERS.items()}
_MOST_PARTS = 1000
"""Rules that one rule may be made of."""
_MOST_TEXT = 10_000_000
"""Letters in the addresses of tied leaves, which a small file can make long and many."""
_SMALL, _BLOCK = 1 << 16, 1 << 20
"""Bytes of arrays that are read together, and of what is then read at a time."""
_MOST_STEPS = 1_000_000
"""Steps of the paths to such nodes, all together."""
_MOST_LINES = 100
"""Nodes that an error names if no tree was given that has them."""

# --- a file ----------------------------------------------------------------------------------


class Archive:
    """A file whose header has been read and checked; its arrays are read when asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        header = form.read_header(source)
        said = header.metadata
        self.is_plain = form.KEY not in said and form.CHECKSUMS not in said
        self.strings = said if self.is_plain else {}
        self.tensors: list[StoredTensor] = []
        self.roots: dict[str, int] = {}
        self._nodes: list[Any] = []
        self._rules: list[tuple[str, dict[str, Any]]] = []
        self._parts: list[list[int]] = []
        self._is_open: list[bool] = []
        self._fields: dict[Said, list[str] | None] = {}
        self._examples: dict[int, Any] = {}
        self._fitting: set[tuple[int, int]] = set()
        self._rule_classes: dict[str, Any] = {}
        self._rules_made: dict[int, Rule] = {}
        self._bases: dict[tuple[int, str], Any] = {}
        self._arrays: dict[tuple[int, str], tuple[Any, ArrayNode]] = {}
        if self.is_plain:
            self._read_plain(header)
            return
        if form.KEY not in said or form.CHECKSUMS not in said:
            damaged(f"of {form.KEY!r} and {form.CHECKSUMS!r} in its metadata, one is missing")
        text = said.pop(form.KEY)
        checks = form.checksums(said, len(header.entries))
        if checks[0] != zlib.crc32(text.encode("utf-8", "surrogatepass")):
            damaged("the text in its header has another checksum than when it was written")
        told = pairs_of(form.parse(text, "the text in the header", packed))
        del text
        self._read(told or {}, header.entries, checks[1:])

    def _read_plain(self, header: form.Header) -> None:
        for name, entry in header.entries.items():
            self.tensors.append(
                StoredTensor(name, entry.dtype(), entry.shape, c_order(entry.shape), entry, None)
            )
        count = len(self.tensors)
        names = [tensor.name for tensor in self.tensors]
        self._nodes = [*(("array", k) for k in range(count)), ("dict", *names, *range(count))]
        self.roots["state"] = count

    # The text is checked whole ---------------------------------------------------------------

    def _read(
        self, told: dict[str, Any], entries: dict[str, form.Entry], checks: list[int]
    ) -> None:
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
            if type(said) is tuple and said[1::2] == _USUAL:
                tensor = usual_tensor(said[2], said[4], said[6], entries, check)
            self.tensors.append(tensor or checked_tensor(pairs_of(said), entries, check))
        if len({tensor.name for tensor in self.tensors}) != len(entries):
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
            is_open = ":" in said["rule"] or any(self._is_open[k] for k in parts)
            self._rules.append((said["rule"], fields))
            self._parts.append(parts)
            self._is_open.append(is_open)

    def _check_values(self, fields: dict[str, Any], parts: list[int]) -> None:
        """Check the fields of a rule, and note the rules that they hold."""
        stack = [(value, 0) for value in fields.values()]
        while stack:
            value, depth = stack.pop()
            kind: Any = value[0] if type(value) is tuple and value else ""
            if kind == "rule" and len(value) == 2:
                parts.append(index_of(value[1], self._rules))
            elif kind == "array":
                self._checked_array(value)
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
                stack += [(v, depth + 1) for v in x]
            else:
                plain(value)

    def _read_nodes(self, nodes: list[Any], roots: dict[str, Any]) -> None:
        self._nodes = nodes
        names: dict[str, str] = {}
        tensors, small = len(self.tensors), (str, bool, type(None))
        sizes: list[int] = []
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
                index_of(said[1], self._rules)
                skipped = said[4] if len(said) == 5 else 0
                if type(said[3]) is not bool or type(skipped) is not int or skipped < 0:
                    damaged(f"a node is {said!r:.60}")
            else:
                said = nodes[number] = self._checked_inner(said, kind, number, names)
            size = 1
            for child in children_of(said):
                if child is not ABSENT:
                    if type(child) is not int or not 0 <= child < number:
                        damaged(f"{child!r:.40} is no number of an entry")
                    size += sizes[child]
            sizes.append(size)
        most = most_places(len(nodes))
        for name, k in roots.items():
            self.roots[name] = index_of(k, nodes)
            if sizes[k] > most:
                damaged(f"its {name} has more than {most:,} places, made of {len(nodes)} nodes")
        if "state" not in roots or not roots.keys() <= {"state", "model", "metadata"}:
            damaged(f"it holds {listed(roots)}")

    def _checked_inner(self, said: Said, kind: str, number: int, names: dict[str, str]) -> Said:
        if kind in BY_POSITION:
            return said
        if kind in WITH_CLASS:
            if len(said) % 2 or type(said[1]) is not str:
                damaged(f"a node is {said!r:.60}")
            said = (kind, names.setdefault(said[1], said[1]), *said[2:])
        elif kind not in KEYED or not len(said) % 2:
            damaged(f"a node is {said!r:.60}")
        begin, end = keys_at(said), children_at(said)
        keys = said[begin:end]
        if not {*map(type, keys)} <= {str}:
            keys = tuple(key if isinstance(key, str) else plain(key) for key in keys)
            only_texts = kind in (*NAMESPACES, "named")
            if only_texts or not {*map(type, keys)} <= {str, int, bool, type(None)}:
                damaged(f"a node is {said!r:.60}")
            if are_slow(keys):
                damaged(f"the keys of a node are made to be slow: {said!r:.60}")
            said = (*said[:begin], *keys, *said[end:])
        if kind in (*NAMESPACES, "named") and any(map(is_protocol, keys)):
            damaged(f"a node has attributes that no file may give it: {said!r:.60}")
        if len(keys) > 1 and len(dict.fromkeys(keys)) < len(keys):
            damaged(f"a node has a key twice: {said!r:.60}")
        if kind == "named" and ":" not in said[1]:
            said = self._completed(said, keys)
        return said

    def _completed(self, said: Said, keys: Said) -> Said:
        """Return a state with those fields too that the version which wrote it did not have."""
        mark = (said[1], *keys)
        if mark not in self._fields:
            self._fields[mark] = newer_fields(said[1], [*keys])
        fields = self._fields[mark]
        if fields is None:
            return said
        found = dict(zip(keys, children_of(said), strict=True))
        return (*said[:2], *fields, *(found.get(field, ABSENT) for field in fields))

    def _array_said(self, said: Said) -> Said:
        array = self._checked_array(said)
        return (
            ("array", array.tensor) if array.view is None else ("array", array.tensor, array.view)
        )

    def _checked_array(self, said: Said) -> ArrayNode:
        k = index_of(said[1] if len(said) > 1 else None, self.tensors)
        if len(said) == 2:
            return ArrayNode(k, None)
        view = said[2]
        if not isinstance(view, list) or len(view) != 3:
            damaged(f"a view is {view!r:.60}")
        shape, order, flips = view
        size = math.prod(self.tensors[k].shape)
        return ArrayNode(k, checked_view(shape, order, flips, size))

    # Rules -----------------------------------------------------------------------------------

    def rule(self, k: int) -> Rule:
        """Return a rule of the file."""
        needed, stack = {k}, [k]
        while stack:
            parts = self._parts[stack.pop()]
            stack += [part for part in parts if part not in needed]
            needed.update(parts)
        # What a rule is made of stands above it.
        for part in sorted(part for part in needed if part not in self._rules_made):
            name, said = self._rules[part]
            fields = {field: self._value(value) for field, value in said.items()}
            if name not in self._rule_classes:
                self._rule_classes[name] = rule_class(name)
            self._rules_made[part] = made_rule(self._rule_classes[name], name, fields)
        return self._rules_made[k]

    def _rule_of(self, leaf: Said) -> Rule:
        """Return the rule of a leaf; if the library knows it, the state must be one it makes."""
        k, state = leaf[1], leaf[2]
        rule = self.rule(k)
        if self._is_open[k]:
            return rule
        if k not in self._examples:
            self._examples[k] = rule.init(np.zeros(()))
        if not self._is_state(self._examples[k], state):
            damaged(f"it has a state that is none of {rule!r:.80}")
        return rule

    def _is_state(self, example: Any, k: Any) -> bool:
        """Tell whether a node is made of tuples and arrays as a state that a rule makes.

        Pairs that were found to be are noted, by the id of the example, and not looked at again.
        """
        if k is ABSENT:
            return not isinstance(example, tuple)
        said = self._nodes[k]
        if not isinstance(example, tuple):
            return said[0] in ("array", "value")
        if kind_of(example) != said[0]:
            return False
        pair = id(example), k
        if pair not in self._fitting:
            if (*children(example),) != keys_of(said):
                return False
            if not all(map(self._is_state, example, children_of(said))):
                return False
            self._fitting.add(pair)
        return True

    def _value(self, value: Any) -> Any:
        if type(value) is not tuple:
            return plain(value)
        kind = value[0]
        if kind == "rule":
            return self._rules_made[value[1]]
        if kind == "array":
            return self._array(self._checked_array(value), None)
        if kind == "dict":
            names, values = value[1]
            return dict(zip(names, map(self._value, values), strict=True))
        if kind in BY_POSITION:
            return (list if kind == "list" else tuple)(map(self._value, value[1:]))
        return plain(value)

    # Arrays ----------------------------------------------------------------------------------

    def raw(self, k: int, verify: bool = True) -> np.ndarray:
        """Read the bytes of an array, and check them."""
        raw, check = form.read_raw(self.source, self.tensors[k].entry)
        self.check(k, raw, check if verify else None)
        return raw

    def verify(self, k: int) -> None:
        """Check the bytes of an array against their checksum, without holding all of them."""
        tensor, check = self.tensors[k], 0
        for chunk in form.read_through(self.source, tensor.entry):
            check = zlib.crc32(chunk.data, check)
            form.check_content(tensor.name, tensor.entry.tag, chunk)
        self.check(k, np.empty(0, np.uint8), check)

    def check(self, k: int, raw: np.ndarray, check: int | None) -> None:
        """Refuse bytes that are not those that were written."""
        tensor = self.tensors[k]
        if check is not None and tensor.check not in (None, check):
            damaged(f"the array {tensor.name!r} has another checksum than when it was written")
        form.check_content(tensor.name, tensor.entry.tag, raw)

    def _array(self, said: ArrayNode, like: Array) -> Array:
        """Return an array of the library of `like`; where `said` is shared, so is the array."""
        library = (library_of(type(like)) if like is not None else None) or "numpy"
        own = "torch" if library == "torch" else "numpy"
        tensor = self.tensors[said.tensor]
        mark = id(said), library
        if mark not in self._arrays:
            base = self._bases.get((said.tensor, own))
            if base is None:
                raw = self.raw(said.tensor)
                base = typed(raw, tensor.dtype, tensor.layout, own, like)
                self._bases[said.tensor, own] = base
            if said.view is not None:
                base = carry(base, tensor.layout, said.view)
            self._arrays[mark] = as_like(base, library, like), said  # an id is good while it lives
        return self._arrays[mark][0]

    # Trees -----------------------------------------------------------------------------------

    def is_tuple(self, root: str) -> bool:
        """Tell whether a root is a tuple."""
        return self._nodes[self.roots[root]][0] in ("tuple", "named")

    def anew(self) -> Self:
        """Return this archive with no array read yet, so that what it makes is no one else's."""
        new = copy.copy(self)
        new._nodes = [*self._nodes]
        new._rules_made, new._bases, new._arrays = {}, {}, {}
        new._examples, new._fitting = {}, set()
        return new

    def build(self, *roots: str) -> dict[str, Tree]:
        """Make trees of what the file says alone, in the place of the tables: this is done once.

        Raises
        ------
        ValueError
            If there are nodes that only `fill` can make; the message names each.
        """
        made = self._nodes
        needed = self._below([self.roots[root] for root in roots])
        classes: dict[int, Any] = {}
        named: dict[Said, Any] = {}
        unknown: set[int] = set()
        rules: dict[int, Rule] = {}
        wanted: list[int] = []
        for k in needed:
            said = made[k]
            kind = said[0]
            if kind == "leaf":
                rules[k] = self._rule_of(said)
            elif kind == "array":
                wanted.append(said[1])
            elif kind == "named":
                mark = (said[1], *keys_of(said))
                if mark not in named:
                    named[mark] = named_class(said[1], [*mark[1:]])
                classes[k] = named[mark]
                if named[mark] is None:
                    unknown.add(k)
            elif kind in ("object", "left_out"):
                unknown.add(k)
        if unknown:
            self._refuse_unknown(roots, unknown)
        ties = {root: self._ties(self.roots[root], rules) for root in roots}
        self._read_small(wanted)
        for k in needed:
            said = made[k]
            kind = said[0]
            if kind == "array":
                made[k] = self._plain_array(said)
            elif kind == "leaf":
                made[k] = Leaf(rules[k], made[said[2]], said[3], said[4] if len(said) == 5 else 0)
            elif kind == "value":
                made[k] = said[1]
            elif kind == "list":
                made[k] = [made[child] for child in said[1:]]
            elif kind == "tuple":
                made[k] = tuple([made[child] for child in said[1:]])
            elif kind == "named":
                values = [ABSENT if c is ABSENT else made[c] for c in children_of(said)]
                made[k] = tuple.__new__(classes[k], supplied(classes[k], values))
            else:
                pairs = zip(
                    keys_of(said), [made[child] for child in children_of(said)], strict=True
                )
                cls: Any = _CLASSES[kind]
                made[k] = cls(pairs) if issubclass(cls, dict) else cls(**dict(pairs))
        for root in roots:
            for k, texts in ties[root].items():
                made[k].tie = Tie(tuple(texts))
        return {root: made[self.roots[root]] for root in roots}

    def _plain_array(self, said: Said) -> Array:
        base = self._bases.get((said[1], "numpy"))
        if len(said) == 2 and base is not None:
            return base
        return self._array(ArrayNode(said[1], said[2] if len(said) == 3 else None), None)

    def _read_small(self, wanted: list[int]) -> None:
        """Read the small arrays among these, many at a time."""
        small = sorted(
            (tensor.entry.start, tensor.entry.stop, k)
            for k in {*wanted}
            if (tensor := self.tensors[k]).entry.stop - tensor.entry.start <= _SMALL
        )
        dtypes: dict[str, Any] = {}
        is_little = sys.byteorder == "little"
        at = 0
        while at < len(small):
            begin = small[at][0]
            end = at
            while end < len(small) and small[end][1] - begin <= _BLOCK:
                end += 1
            block = np.empty(small[end - 1][1] - begin, np.uint8)
            data = block.data
            self.source.fill(data, begin)
            for start, stop, k in small[at:end]:
                tensor = self.tensors[k]
                start, stop = start - begin, stop - begin
                if tensor.check is not None and tensor.check != zlib.crc32(data[start:stop]):
                    self.check(k, block[:0], tensor.check ^ 1)
                if tensor.entry.tag == "BOOL":
                    form.check_content(tensor.name, "BOOL", block[start:stop])
                dtype = dtypes.get(tensor.dtype)
                if dtype is None:
                    dtype = dtypes[tensor.dtype] = form.numpy_dtype(tensor.dtype)
                if tensor.layout.flips or tensor.layout.order != (*range(len(tensor.shape)),):
                    raw = block[start:stop].copy()
                    base = typed(raw, tensor.dtype, tensor.layout, "numpy", None)
                elif is_little:
                    base = np.array(np.ndarray(tensor.shape, dtype, block, start))
                else:
                    base = form.typed(block[start:stop].copy(), tensor.dtype, tensor.shape)
                self._bases[k, "numpy"] = base
            at = end

    def _below(self, roots: list[int]) -> list[int]:
        """Return the numbers of the nodes of some trees, children before their parents."""
        needed = bytearray(max(roots) + 1)
        for k in roots:
            needed[k] = 1
        for k in range(len(needed) - 1, -1, -1):
            if needed[k] and (said := self._nodes[k])[0] not in _CHILDLESS:
                for child in children_of(said):
                    if child is not ABSENT:
                        needed[child] = 1
        return [k for k, is_needed in enumerate(needed) if is_needed]

    def _ties(self, root: int, leaves: Iterable[int]) -> dict[int, list[str]]:
        """Return the addresses of those leaves of a tree that are at several places."""
        times = bytearray(root + 1)
        times[root] = 1
        for k in range(root, -1, -1):
            if (n := times[k]) and (said := self._nodes[k])[0] not in _CHILDLESS:
                for child in children_of(said):
                    if child is not ABSENT:
                        times[child] = min(2, times[child] + n)
        tied = {k for k in leaves if k <= root and times[k] > 1}
        found: dict[int, list[str]] = {}
        length = 0
        for k, way in places(self._nodes, root, tied):
            text = str(_path(way))
            length += len(text)
            if length > _MOST_TEXT:
                damaged(f"the addresses of tied leaves have more than {_MOST_TEXT:,} letters")
            found.setdefault(k, []).append(text)
        return found

    def _refuse_unknown(self, roots: Iterable[str], unknown: set[int]) -> NoReturn:
        lines: list[str] = []
        left = set(unknown)
        length = 0
        for root in roots:
            for k, way in places(self._nodes, self.roots[root], left, once=True):
                left.discard(k)
                address, said = at(root, _path(way)), self._nodes[k]
                lines.append(f"  {form.shown(address)}: {form.shown(said[1][:200])}")
                length += len(way)
                if len(lines) >= _MOST_LINES or length > _MOST_STEPS:
                    break
            else:
                continue
            break
        if left:
            lines.append("  and others")
        raise ValueError(
            "a file does not say how these are made:\n"
            + "\n".join(lines)
            + "\nGive load trees that have them, load(path, like=(state, model)); of named tuples "
            "it is enough to import the module that defines them"
        )

    def fill(self, wanted: dict[str, Tree]) -> dict[str, Tree]:
        """Make trees like those given, by the name of their root; these are not changed.

        Raises
        ------
        ValueError
            If they differ; the message names every difference.
        """
        lines: list[str] = []
        more = 0
        for root, tree in wanted.items():
            for line in self._differences(root, tree):
                if len(lines) < _MOST_LINES:
                    lines.append(f"  {form.shown(line())}")
                else:
                    more += 1
        if lines:
            if more:
                lines.append(f"  and {more:,} others")
            raise ValueError("the file does not fit what was given as `like`:\n" + "\n".join(lines))
        made: dict[int, Leaf] = {}

        def leaf(path: Any, x: Any, y: Any) -> Any:
            if isinstance(y, LeafNode):
                if id(y) not in made:
                    state = filled(x.state, y.state)
                    made[id(y)] = Leaf(self.rule(y.rule), state, y.frozen, y.skipped)
                return made[id(y)]
            if isinstance(y, ArrayNode):
                return self._array(y, x)
            if y is ABSENT:
                return y
            return x if y is LEFT_OUT else y.value

        def filled(tree: Tree, said: Any) -> Tree:
            def node(path: Any, x: Any, values: list[Any]) -> Any:
                return rebuild(x, supplied(type(x), values))

            return fold(tree, leaf, node, rest=(said,))

        said = self._objects([self.roots[root] for root in wanted])
        return {
            root: _with_ties(filled(tree, said[self.roots[root]])) for root, tree in wanted.items()
        }

    def _objects(self, roots: list[int]) -> dict[int, Any]:
        """Return the nodes of some trees, by their numbers, as objects that hold their children."""
        found: dict[Any, Any] = {ABSENT: ABSENT}
        for k in self._below(roots):
            said = self._nodes[k]
            kind = said[0]
            if kind == "array":
                found[k] = ArrayNode(said[1], said[2] if len(said) == 3 else None)
            elif kind == "leaf":
                skipped = said[4] if len(said) == 5 else 0
                found[k] = LeafNode(said[1], found[said[2]], said[3], skipped)
            elif kind == "value":
                found[k] = ValueNode(said[1])
            elif kind == "left_out":
                found[k] = LEFT_OUT
            else:
                below = map(found.__getitem__, children_of(said))
                found[k] = Node(zip(keys_of(said), below, strict=True))
        return found

    def _differences(self, root: str, tree: Tree) -> Iterator[Text]:
        """Yield how a tree differs from the file; texts are only made where they are shown."""

        def differ(path: KeyPath, of_file: Text, of_like: Text) -> Text:
            return lambda: f"{at(root, path)}: the file has {of_file()}, `like` {of_like()}"

        ties: list[tuple[KeyPath, Any, Any]] = []
        arrays: list[tuple[KeyPath, Any, int]] = []
        stack: list[tuple[KeyPath, Any, Any, bool]]
        stack = [(KeyPath(), tree, self.roots[root], False)]
        seen: set[tuple[int, int]] = set()
        signatures: dict[int, Any] = {}

        def signature(rule: Rule) -> Any:
            if id(rule) not in signatures:
                signatures[id(rule)] = _signature(rule), rule  # kept, so that its id is its own
            return signatures[id(rule)][0]

        while stack:
            path, x, k, is_state = stack.pop()
            if k is ABSENT:
                continue
            said = self._nodes[k]
            kind = said[0]
            if isinstance(x, Leaf) and kind == "leaf":
                ties.append((path, id(x if x.tie is None else x.tie), k))
                rule = self._rule_of(said)
                if rule is not x.rule and signature(rule) != signature(x.rule):
                    yield differ(path, partial(_told_rule, rule), partial(_has_rule, x.rule))
                stack.append((path.step("state"), x.state, said[2], True))
            elif kind == "array" and library_of(type(x)) is not None:
                mine = self.tensors[said[1]]
                shape = said[2].shape if len(said) == 3 else mine.shape
                if shape != tuple(x.shape):
                    told = partial(str, f"shape {shape}"), partial(str, tuple(x.shape))
                    yield differ(path, *told)
                if mine.dtype != form.dtype_name(x.dtype):
                    told = partial(str, f"dtype {mine.dtype}"), partial(str, x.dtype)
                    yield differ(path, *told)
                if not is_state and isnumeric(x):
                    arrays.append((path, x, said[1]))
            elif kind in _INNER and is_node(x) and kind_of(x) == kind:
                if (id(x), k) in seen:
                    continue
                seen.add((id(x), k))
                below, theirs = (
                    children(x),
                    dict(zip(keys_of(said), children_of(said), strict=True)),
                )
                if below.keys() != theirs.keys():
                    for key in [*theirs, *(key for key in below if key not in theirs)]:
                        there = path.step(key, kind not in _BY_NAME)
                        if key not in below:
                            yield differ(there, partial(self._shown, theirs[key]), _has_nothing)
                        elif key not in theirs:
                            yield differ(there, _nothing, partial(_has, below[key]))
                is_item = kind not in _BY_NAME
                for key in reversed(below):
                    if key in theirs:
                        stack.append((path.step(key, is_item), below[key], theirs[key], is_state))
            elif not _may_replace(x, kind):
                yield differ(path, partial(self._shown, k), partial(_has, x))
        owner = owners(cast(Any, [(_Place(root, path), x) for path, x, _ in arrays]))
        ties += [(path, owner[k], t) for k, (path, _, t) in enumerate(arrays)]
        yield from _tie_differences(root, ties)

    def _shown(self, k: Any) -> str:
        if k is ABSENT:
            return "nothing"
        said = self._nodes[k]
        kind = said[0]
        if kind == "array":
            shape = said[2].shape if len(said) == 3 else self.tensors[said[1]].shape
            return f"an array of shape {shape}"
        if kind == "leaf":
            return f"a Leaf with {self.rule(said[1])!r:.60}"
        if kind in WITH_CLASS:
            return f"a {said[1].rpartition(':')[2]}"
        return f"a {_CLASSES[kind].__name__}" if kind in _INNER else _shown(said[1])


Text = Callable[[], str]


class _Place(NamedTuple):
    """Where an array is; its address is only made where it is shown."""

    root: str
    path: KeyPath

    def __str__(self) -> str:
        return at(self.root, self.path)


def _told_rule(rule: Rule) -> str:
    return f"the rule {rule!r}"


def _has_rule(rule: Rule) -> str:
    return f"has {rule!r}"


def _nothing() -> str:
    return "nothing"


def _has_nothing() -> str:
    return "has nothing"


def _has(x: Any) -> str:
    return f"has {_shown(x)}"


def _shown(x: Any) -> str:
    if library_of(type(x)) is not None:
        return f"an array of shape {tuple(x.shape)}"
    if isinstance(x, Leaf):
        return f"a Leaf with {x.rule!r:.60}"
    with contextlib.suppress(Exception):  # whole numbers can be too long for a text
        return f"a {type(x).__name__}" if is_node(x) else f"{x!r:.40}"
    return f"a {type(x).__name__}"


_REPLACEABLE = (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype)


_CHILDLESS = frozenset(("array", "value", "left_out"))
_INNER = frozenset((*BY_POSITION, *KEYED, *WITH_CLASS))
_BY_NAME = frozenset((*WITH_CLASS, *NAMESPACES, "leaf"))
"""Nodes whose children are attributes: shapes the text of paths."""


def _may_replace(x: Any, kind: str) -> bool:
    """Tell whether a node of a file may stand where the structure given has `x`."""
    if kind == "left_out":
        return not is_node(x) and not isinstance(x, Leaf) and library_of(type(x)) is None
    return kind == "value" and isinstance(x, _REPLACEABLE)


def _path(way: Iterable[tuple[Said, Any]]) -> KeyPath:
    """Return the path that leads through some nodes, each by a key."""
    path = KeyPath()
    for said, key in way:
        path = path.step(key, said[0] not in _BY_NAME)
    return path


def _signature(rule: Any) -> tuple[Any, ...]:
    """Return the class of a rule, and those of the rules that it is made of."""
    parts = [v for x in attributes(rule).values() for v in (x if isinstance(x, tuple) else (x,))]
    return type(rule), *(_signature(part) for part in parts if isinstance(part, Rule))


def _tie_differences(root: str, ties: list[tuple[KeyPath, Any, Any]]) -> Iterator[Text]:
    """Say where one side has one parameter and the other has several."""
    for here, there, told in (
        (2, 1, "tied in the file and separate in `like`"),
        (1, 2, "tied in `like` and separate in the file"),
    ):
        groups: dict[Any, dict[Any, KeyPath]] = {}
        for tie in ties:
            groups.setdefault(tie[here], {}).setdefault(tie[there], tie[0])
        for group in groups.values():
            if len(group) > 1:
                yield partial(_all_of, root, [*group.values()], told)


def _all_of(root: str, paths: list[KeyPath], told: str) -> str:
    return f"{' and '.join(at(root, path) for path in paths[:10])} are {told}"


def _with_ties(tree: Tree) -> Tree:
    """Return a tree whose leaves know their places where these are several, as after `setup`."""
    places: dict[int, tuple[Leaf, list[KeyPath]]] = {}
    for path, x in walk(tree):
        if isinstance(x, Leaf):
            places.setdefault(id(x), (x, []))[1].append(path)
    length = 0
    for leaf, paths in places.values():
        if len(paths) > 1:
            texts: list[str] = []
            for path in paths:
                texts.append(str(path))
                length += len(texts[-1])
                if length > _MOST_TEXT:
                    damaged(f"the addresses of tied leaves have more than {_MOST_TEXT:,} letters")
            leaf.tie = Tie(tuple(texts))
    return tree
