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
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Self, cast

import numpy as np

from .._arrays import isnumeric, library_of
from .._jax import attributes
from .._nodes import children, is_node, rebuild
from .._path import KeyPath
from .._pytree import Tie
from .._rule import Rule
from .._ties import carry, owners
from .._tree import fold, walk
from ..state import Leaf
from . import _safetensors as form
from ._entries import (
    ABSENT,
    Absent,
    ArrayNode,
    LeafNode,
    LeftOut,
    Node,
    StoredTensor,
    ValueNode,
    are_slow,
    checked_tensor,
    checked_view,
    damaged,
    index_of,
    only,
    plain,
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

Array = Any
Tree = Any

_CLASSES = {kind: cls for cls, kind in CONTAINERS.items()}
_MOST_PARTS = 1000
"""Rules that one rule may be made of."""
_MOST_TEXT = 10_000_000
"""Letters in the addresses of tied leaves, which a small file can make long and many."""
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
        self.strings = said
        self.tensors: list[StoredTensor] = []
        self.roots: dict[str, Any] = {}
        self._nodes: list[Any] = []
        self._rules: list[dict[str, Any]] = []
        self._parts: list[list[int]] = []
        self._is_open: list[bool] = []
        self._fields: dict[tuple[str, ...], list[str] | None] = {}
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
        text = said[form.KEY]
        checks = form.checksums(said, len(header.entries))
        if checks[0] != zlib.crc32(text.encode("utf-8", "surrogatepass")):
            damaged("the text in its header has another checksum than when it was written")
        self._read(form.parse(text, "the text in the header"), header.entries, checks[1:])

    def _read_plain(self, header: form.Header) -> None:
        for name, entry in header.entries.items():
            layout = c_order(entry.shape)
            self.tensors.append(StoredTensor(name, entry.dtype(), entry.shape, layout, entry, None))
        self._nodes = [ArrayNode(k, None) for k in range(len(self.tensors))]
        names = [tensor.name for tensor in self.tensors]
        self.roots["state"] = Node.of("dict", zip(names, self._nodes, strict=True))
        self._nodes.append(self.roots["state"])

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
        for name, cls in (("roots", dict), ("nodes", list), ("rules", list), ("tensors", list)):
            if not isinstance(told.get(name), cls):
                damaged(f"its {name} are missing")
        if len(told["tensors"]) != len(entries):
            damaged(f"it has {len(entries)} arrays and should have {len(told['tensors'])}")
        for said, check in zip(told["tensors"], checks, strict=True):
            self.tensors.append(checked_tensor(said, entries, check))
        if len({tensor.name for tensor in self.tensors}) != len(entries):
            damaged("an array is named twice")
        self._read_rules(told["rules"])
        self._read_nodes(told["nodes"], told["roots"])

    def _read_rules(self, rules: list[Any]) -> None:
        sizes: list[int] = []
        depths: list[int] = []
        for said in rules:
            is_rule = isinstance(said, dict) and said.keys() == {"rule", "fields"}
            if not is_rule or not isinstance(said["rule"], str):
                damaged(f"a rule is {said!r:.60}")
            parts: list[int] = []
            self._check_values(said["fields"], parts)
            sizes.append(1 + sum(sizes[k] for k in parts))
            depths.append(1 + max((depths[k] for k in parts), default=0))
            if sizes[-1] > _MOST_PARTS or depths[-1] > DEEPEST:
                damaged("a rule is made of too many rules")
            # A user's rule, and one made of such, may keep anything.
            is_open = ":" in said["rule"] or any(self._is_open[k] for k in parts)
            self._rules.append(said)
            self._parts.append(parts)
            self._is_open.append(is_open)

    def _check_values(self, fields: Any, parts: list[int]) -> None:
        """Check the fields of a rule, and note the rules that they hold."""
        if not isinstance(fields, dict):
            damaged(f"the fields of a rule are {fields!r:.60}")
        stack = [(value, 0) for value in fields.values()]
        while stack:
            value, depth = stack.pop()
            kind, x = only(value)
            if kind == "rule":
                parts.append(index_of(x, self._rules))
            elif kind == "array":
                self._checked_array(value)
            elif kind in ("tuple", "list", "dict"):
                if kind == "dict":
                    are_pairs = isinstance(x, list) and [*map(type, x)] == [list, list]
                    if not are_pairs or [*map(type, x[0])] != [str] * len(x[1]):
                        damaged(f"a value is {value!r:.60}")
                    x = x[1]
                if not isinstance(x, list) or depth > DEEPEST:
                    damaged(f"a value is {value!r:.60}")
                stack += [(v, depth + 1) for v in x]
            else:
                plain(value)

    def _read_nodes(self, nodes: list[Any], roots: dict[str, Any]) -> None:
        sizes: list[int] = []
        for said in nodes:
            node, below = self._checked_node(said)
            sizes.append(1 + sum(sizes[k] for k in below))
            self._nodes.append(node)
        most = most_places(len(nodes))
        for name, k in roots.items():
            self.roots[name] = self._nodes[index_of(k, self._nodes)]
            if sizes[k] > most:
                damaged(f"its {name} has more than {most:,} places, made of {len(nodes)} nodes")
        if "state" not in roots or not roots.keys() <= {"state", "model", "metadata"}:
            damaged(f"it holds {', '.join(map(repr, roots))}")

    def _checked_node(self, said: Any) -> tuple[Any, list[int]]:
        """Return a node, and the numbers of its children."""
        if not isinstance(said, dict) or not said:
            damaged(f"a node is {said!r:.60}")
        kind, x = next(iter(said.items()))
        others = said.keys() - {kind}
        if kind == "value" and not others:
            return ValueNode(plain(x)), []
        if kind == "array" and others <= {"view"}:
            return self._checked_array(said), []
        if kind == "left_out" and not others and isinstance(x, str):
            return LeftOut(x), []
        if kind == "leaf" and others - {"skipped"} == {"state", "frozen"}:
            k, frozen, skipped = said["state"], said["frozen"], said.get("skipped", 0)
            if type(frozen) is not bool or type(skipped) is not int or skipped < 0:
                damaged(f"a node is {said!r:.60}")
            state = self._nodes[index_of(k, self._nodes)]
            return LeafNode(index_of(x, self._rules), state, frozen, skipped), [k]
        return self._checked_inner(said, kind, x)

    def _checked_inner(self, said: dict[str, Any], kind: str, below: Any) -> tuple[Node, list[int]]:
        expected = {kind}
        if kind not in BY_POSITION:
            expected.add("keys")
        if kind in WITH_CLASS:
            expected.add("class")
        is_known = kind in _CLASSES or kind in WITH_CLASS
        if not is_known or said.keys() != expected or not isinstance(below, list):
            damaged(f"a node is {said!r:.60}")
        numbers = [index_of(k, self._nodes) for k in below]
        keys = said.get("keys", [*range(len(numbers))])
        name = said.get("class", "")
        if not isinstance(keys, list) or len(keys) != len(numbers) or not isinstance(name, str):
            damaged(f"a node is {said!r:.60}")
        keys = [key if isinstance(key, str) else plain(key) for key in keys]
        only_texts = kind in (*NAMESPACES, "named")
        allowed = (str,) if only_texts else (str, int, bool, type(None))
        if not {*map(type, keys)} <= {*allowed}:
            damaged(f"a node is {said!r:.60}")
        if kind in (*NAMESPACES, "named") and any(map(is_protocol, keys)):
            damaged(f"a node has attributes that no file may give it: {said!r:.60}")
        if not {*map(type, keys)} <= {str} and are_slow(keys):
            damaged(f"the keys of a node are made to be slow: {said!r:.60}")
        node = Node.of(kind, zip(keys, (self._nodes[k] for k in numbers), strict=True), name)
        if kind == "named" and ":" not in name:
            node = self._completed(node)
        if len(keys) != len(dict.fromkeys(keys)):
            damaged(f"a node has a key twice: {said!r:.60}")
        return node, numbers

    def _completed(self, node: Node) -> Node:
        """Return a state with those fields too that the version which wrote it did not have."""
        mark = (node.name, *node)
        if mark not in self._fields:
            self._fields[mark] = newer_fields(node.name, [*node])
        fields = self._fields[mark]
        if fields is None:
            return node
        return Node.of(node.kind, ((f, node.get(f, ABSENT)) for f in fields), node.name)

    def _checked_array(self, said: dict[str, Any]) -> ArrayNode:
        k = index_of(said["array"], self.tensors)
        if "view" not in said:
            return ArrayNode(k, None)
        view = said["view"]
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
            said = self._rules[part]
            fields = {name: self._value(value) for name, value in said["fields"].items()}
            name = said["rule"]
            if name not in self._rule_classes:
                self._rule_classes[name] = rule_class(name)
            self._rules_made[part] = made_rule(self._rule_classes[name], name, fields)
        return self._rules_made[k]

    def _rule_of(self, leaf: LeafNode) -> Rule:
        """Return the rule of a leaf; if the library knows it, the state must be one it makes."""
        rule = self.rule(leaf.rule)
        if leaf.rule not in self._examples:
            example = _ANY if self._is_open[leaf.rule] else rule.init(np.zeros(()))
            self._examples[leaf.rule] = example
        if not _is_state(self._examples[leaf.rule], leaf.state, self._fitting):
            damaged(f"it has a state that is none of {rule!r:.80}")
        return rule

    def _value(self, value: Any) -> Any:
        kind, x = only(value)
        if kind == "rule":
            return self._rules_made[x]
        if kind == "array":
            return self._array(self._checked_array(value), None)
        if kind == "dict":
            return dict(zip(x[0], map(self._value, x[1]), strict=True))
        if kind in BY_POSITION:
            return (list if kind == "list" else tuple)(map(self._value, x))
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
        node = self.roots[root]
        return isinstance(node, Node) and node.kind in ("tuple", "named")

    def anew(self) -> Self:
        """Return this archive with no array read yet, so that what it makes is no one else's."""
        new = copy.copy(self)
        new._rules_made, new._bases, new._arrays = {}, {}, {}
        new._examples, new._fitting = {}, set()
        return new

    def build(self, *roots: str) -> dict[str, Tree]:
        """Make trees of what the file says alone.

        Raises
        ------
        ValueError
            If there are nodes that only `fill` can make; the message names each.
        """
        nodes = self._below([self.roots[root] for root in roots])
        classes: dict[int, Any] = {}
        named: dict[tuple[str, ...], Any] = {}
        unknown: set[int] = set()
        for node in nodes:
            if isinstance(node, Node) and node.kind != "object":
                cls = _CLASSES.get(node.kind)
                if node.kind == "named":
                    mark = (node.name, *node)
                    if mark not in named:
                        named[mark] = named_class(node.name, [*node])
                    cls = named[mark]
                if cls is not None:
                    classes[id(node)] = cls
                    continue
            if isinstance(node, Node | LeftOut):
                unknown.add(id(node))
                if len(unknown) > _MOST_LINES:
                    break
        if unknown:
            self._refuse_unknown(roots, unknown)
        rules = {id(node): self._rule_of(node) for node in nodes if isinstance(node, LeafNode)}
        made: dict[int, Any] = {id(ABSENT): ABSENT}
        for node in nodes:
            if isinstance(node, Node):
                values = [made[id(child)] for child in node.values()]
                made[id(node)] = _built(classes[id(node)], node, values)
            elif isinstance(node, LeafNode):
                made[id(node)] = Leaf(
                    rules[id(node)], made[id(node.state)], node.frozen, node.skipped
                )
            elif isinstance(node, ArrayNode):
                made[id(node)] = self._array(node, None)
            elif isinstance(node, ValueNode):
                made[id(node)] = node.value
        return {root: _with_ties(made[id(self.roots[root])]) for root in roots}

    def _below(self, roots: list[Any]) -> list[Any]:
        """Return the nodes of some trees, children before their parents."""
        found, stack = {*map(id, roots)}, list(roots)
        while stack:
            node = stack.pop()
            for _, child in _children(node):
                if id(child) not in found:
                    found.add(id(child))
                    stack.append(child)
        return [node for node in self._nodes if id(node) in found]

    def _refuse_unknown(self, roots: Iterable[str], unknown: set[int]) -> NoReturn:
        lines: list[str] = []
        stack = [(root, KeyPath(), self.roots[root]) for root in roots][::-1]
        seen: set[int] = set()
        while stack and len(lines) < _MOST_LINES:
            root, path, node = stack.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if id(node) in unknown:
                what = node.text if isinstance(node, LeftOut) else node.name
                lines.append(f"  {form.shown(at(root, path))}: {form.shown(what[:200])}")
            below = ((_step(path, node, key), child) for key, child in _children(node))
            stack += reversed([(root, there, child) for there, child in below])
        if len(unknown) > len(lines):
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
        differences = [
            line for root, tree in wanted.items() for line in self._differences(root, tree)
        ]
        if differences:
            lines = [f"  {form.shown(line)}" for line in differences[:_MOST_LINES]]
            if len(differences) > _MOST_LINES:
                lines.append(f"  and {len(differences) - _MOST_LINES:,} others")
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
            return x if isinstance(y, LeftOut) else y.value

        def filled(tree: Tree, said: Any) -> Tree:
            def node(path: Any, x: Any, values: list[Any]) -> Any:
                return rebuild(x, supplied(type(x), values))

            return fold(tree, leaf, node, rest=(said,))

        return {root: _with_ties(filled(tree, self.roots[root])) for root, tree in wanted.items()}

    def _differences(self, root: str, tree: Tree) -> list[str]:
        found: list[str] = []
        ties: list[tuple[KeyPath, Any, Any]] = []
        arrays: list[tuple[KeyPath, Any, int]] = []
        stack: list[tuple[KeyPath, Any, Any, bool]] = [(KeyPath(), tree, self.roots[root], False)]
        seen: set[tuple[int, int]] = set()

        def differ(path: KeyPath, of_file: str, of_like: str) -> None:
            found.append(f"{at(root, path)}: the file has {of_file}, `like` {of_like}")

        while stack:
            path, x, y, is_state = stack.pop()
            if isinstance(x, Leaf) and isinstance(y, LeafNode):
                ties.append((path, id(x if x.tie is None else x.tie), id(y)))
                rule = self._rule_of(y)
                if _signature(rule) != _signature(x.rule):
                    differ(path, f"the rule {rule!r}", f"has {x.rule!r}")
                stack.append((path.step("state"), x.state, y.state, True))
            elif y is ABSENT:
                continue
            elif isinstance(y, ArrayNode) and library_of(type(x)) is not None:
                mine = self.tensors[y.tensor]
                shape = mine.shape if y.view is None else y.view.shape
                if shape != tuple(x.shape):
                    differ(path, f"shape {shape}", f"{tuple(x.shape)}")
                if mine.dtype != form.dtype_name(x.dtype):
                    differ(path, f"dtype {mine.dtype}", f"{x.dtype}")
                if not is_state and isnumeric(x):
                    arrays.append((path, x, y.tensor))
            elif isinstance(y, Node) and is_node(x) and kind_of(x) == y.kind:
                if (id(x), id(y)) in seen:
                    continue
                seen.add((id(x), id(y)))
                below = children(x)
                for key in [*y, *(key for key in below if key not in y)]:
                    if key not in below:
                        differ(_step(path, y, key), self._shown(y[key]), "has nothing")
                    elif key not in y:
                        differ(_step(path, y, key), "nothing", f"has {_shown(below[key])}")
                for key in reversed(below):
                    if key in y:
                        stack.append((_step(path, y, key), below[key], y[key], is_state))
            elif not _may_replace(x, y):
                differ(path, self._shown(y), f"has {_shown(x)}")
        owner = owners(cast(Any, [(at(root, path), x) for path, x, _ in arrays]))
        ties += [(path, owner[k], t) for k, (path, _, t) in enumerate(arrays)]
        return [*found, *_tie_differences(root, ties)]

    def _shown(self, node: Any) -> str:
        if isinstance(node, ArrayNode):
            shape = self.tensors[node.tensor].shape if node.view is None else node.view.shape
            return f"an array of shape {shape}"
        if isinstance(node, LeafNode):
            return f"a Leaf with {self.rule(node.rule)!r:.60}"
        if isinstance(node, Node):
            return f"a {node.name.rpartition(':')[2] or _CLASSES[node.kind].__name__}"
        return node.text if isinstance(node, LeftOut) else _shown(node.value)


def _shown(x: Any) -> str:
    if library_of(type(x)) is not None:
        return f"an array of shape {tuple(x.shape)}"
    if isinstance(x, Leaf):
        return f"a Leaf with {x.rule!r:.60}"
    with contextlib.suppress(Exception):  # whole numbers can be too long for a text
        return f"a {type(x).__name__}" if is_node(x) else f"{x!r:.40}"
    return f"a {type(x).__name__}"


_REPLACEABLE = (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype)


def _may_replace(x: Any, y: Any) -> bool:
    """Tell whether `y` of a file may stand where the structure given has `x`."""
    if isinstance(y, LeftOut):
        return not is_node(x) and not isinstance(x, Leaf) and library_of(type(x)) is None
    return isinstance(y, ValueNode) and isinstance(x, _REPLACEABLE)


def _step(path: KeyPath, node: Any, key: Any) -> KeyPath:
    """Return how a path goes on from a node to a child."""
    is_item = isinstance(node, Node) and node.kind not in (*WITH_CLASS, "namespace", "state")
    return path.step(key, is_item)


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, LeafNode):
        return (("state", node.state),)
    return node.items() if isinstance(node, Node) else ()


def _signature(rule: Any) -> tuple[Any, ...]:
    """Return the class of a rule, and those of the rules that it is made of."""
    parts = [v for x in attributes(rule).values() for v in (x if isinstance(x, tuple) else (x,))]
    return type(rule), *(_signature(part) for part in parts if isinstance(part, Rule))


def _tie_differences(root: str, ties: list[tuple[KeyPath, Any, Any]]) -> Iterator[str]:
    """Say where one side has one parameter and the other has several."""
    for here, there, where in (
        (2, 1, "tied in the file and separate in `like`"),
        (1, 2, "tied in `like` and separate in the file"),
    ):
        groups: dict[Any, dict[Any, KeyPath]] = {}
        for tie in ties:
            groups.setdefault(tie[here], {}).setdefault(tie[there], tie[0])
        for group in groups.values():
            if len(group) > 1:
                yield f"{' and '.join(at(root, path) for path in group.values())} are {where}"


_ANY = object()


def _is_state(example: Any, node: Any, fitting: set[tuple[int, int]]) -> bool:
    """Tell whether a node is made of tuples and arrays as a state that a rule makes.

    Pairs that were found to be are noted in `fitting`, by their ids, and not looked at again.
    """
    if example is _ANY:
        return True
    if not isinstance(example, tuple):
        return isinstance(node, ArrayNode | ValueNode | Absent)
    if not isinstance(node, Node) or kind_of(example) != node.kind:
        return False
    pair = id(example), id(node)
    if pair in fitting:
        return True
    same = [*children(example)] == [*node]
    if not same or not all(
        _is_state(e, n, fitting) for e, n in zip(example, node.values(), strict=True)
    ):
        return False
    fitting.add(pair)
    return True


def _built(cls: Any, node: Node, values: list[Any]) -> Any:
    if cls is list:
        return values
    if issubclass(cls, tuple):
        return tuple.__new__(cls, supplied(cls, values))
    pairs = zip(node, values, strict=True)
    return cls(pairs) if issubclass(cls, dict) else cls(**dict(pairs))


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
