"""Trees like those that were given, with the arrays and leaves of a file."""

from __future__ import annotations

from typing import Any

from .._leaf import Leaf
from .._pytree import Tie
from .._trees.nodes import rebuild
from .._trees.paths import KeyPath
from .._trees.walks import fold, walk
from ._array_reader import ArrayReader
from ._contents import Contents
from ._differences import Differences
from ._entries import ABSENT, LEFT_OUT, ArrayNode, LeafNode, Node, ValueNode, damaged
from ._json import shown
from ._pairs import Pairs
from ._revive import supplied
from ._rule_reader import RuleReader
from ._tables import MOST_TEXT, children_of, keys_of, needed_nodes

Array = Any
Tree = Any

_MOST_LINES = 100
"""Differences that an error names."""


def fill(
    contents: Contents, arrays: ArrayReader, rules: RuleReader, wanted: dict[str, Tree]
) -> dict[str, Tree]:
    """Make trees like those given, by the name of their root; these are not changed.

    Raises
    ------
    ValueError
        If they differ; the message names every difference.
    """
    if not contents.is_shared:
        pairs = Pairs(contents, rules)
        if all(pairs.fit(root, tree) for root, tree in wanted.items()) and pairs.are_apart():
            return pairs.filled(arrays, wanted)
    _refuse_differences(contents, rules, wanted)
    made: dict[int, Leaf] = {}

    def leaf(path: Any, x: Any, y: Any) -> Any:
        if isinstance(y, LeafNode):
            if id(y) not in made:
                state = filled(x.state, y.state)
                made[id(y)] = Leaf(rules.rule(y.rule), state, y.frozen, y.skipped)
            return made[id(y)]
        if isinstance(y, ArrayNode):
            return arrays.array(y, x)
        if y is ABSENT:
            return y
        return x if y is LEFT_OUT else y.value

    def filled(tree: Tree, said: Any) -> Tree:
        def node(path: Any, x: Any, values: list[Any]) -> Any:
            return rebuild(x, supplied(type(x), values))

        return fold(tree, leaf, node, rest=(said,))

    said = _objects(contents, [contents.roots[root] for root in wanted])
    return {
        root: _with_ties(filled(tree, said[contents.roots[root]])) for root, tree in wanted.items()
    }


def _refuse_differences(contents: Contents, rules: RuleReader, wanted: dict[str, Tree]) -> None:
    differences = Differences(contents, rules)
    lines: list[str] = []
    more = 0
    for root, tree in wanted.items():
        for line in differences.of(root, tree):
            if len(lines) < _MOST_LINES:
                lines.append(f"  {shown(line())}")
            else:
                more += 1
    if lines:
        if more:
            lines.append(f"  and {more:,} others")
        raise ValueError("the file does not fit what was given as `like`:\n" + "\n".join(lines))


def _objects(contents: Contents, roots: list[int]) -> dict[int, Any]:
    """Return the nodes of some trees, by their numbers, as objects that hold their children."""
    found: dict[Any, Any] = {ABSENT: ABSENT}
    for k in needed_nodes(contents.nodes, roots):
        said = contents.nodes[k]
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
                if length > MOST_TEXT:
                    damaged(f"the addresses of tied leaves have more than {MOST_TEXT:,} letters")
            leaf.tie = Tie(tuple(texts))
    return tree
