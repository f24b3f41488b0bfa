"""Trees of built-in nodes, made of what a file says alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, NoReturn

from .._leaf import Leaf
from .._pytree import Tie
from ._array_reader import ArrayReader
from ._contents import Contents
from ._entries import ABSENT, damaged
from ._json import shown
from ._revive import supplied
from ._rule_reader import RuleReader
from ._saved import CLASSES, at
from ._tables import (
    CHILDLESS,
    INNER,
    MOST_TEXT,
    Rows,
    Said,
    children_of,
    keys_of,
    needed_nodes,
    path_of,
    places,
    rows_of,
)

Tree = Any

_PARENTS = {*INNER, "leaf"}
_MOST_STEPS = 1_000_000
"""Steps of the paths to such nodes, all together."""
_MOST_LINES = 100
"""Nodes that an error names if no tree was given that has them."""


def build(
    contents: Contents, arrays: ArrayReader, rules: RuleReader, *roots: str
) -> dict[str, Tree]:
    """Make trees of what the file says alone, in the place of the tables: this is done once.

    Raises
    ------
    ValueError
        If there are nodes that only `fill` can make; the message names each.
    """
    made = contents.nodes
    if contents.is_whole and {*roots} == contents.roots.keys():
        rows = contents.rows
    else:
        rows = rows_of(made, needed_nodes(made, [contents.roots[root] for root in roots]))
    row_of_leaves = rows.get("leaf", [])
    leaves = dict(zip(row_of_leaves, rules.rules_of(row_of_leaves), strict=True))
    classes = _classes(contents, roots, rows)
    ties: list[tuple[int, list[str]]] = []
    if contents.is_shared:
        for root in roots:
            ties += _ties(made, contents.roots[root], leaves).items()
    _make_childless(contents, arrays, rows)
    # Children stand above their parents: these are made in the order of their numbers.
    for k in sorted(chain.from_iterable(row for kind, row in rows.items() if kind in _PARENTS)):
        said = made[k]
        kind = said[0]
        if kind == "leaf":
            made[k] = Leaf(leaves[k], made[said[2]], said[3], said[4] if len(said) == 5 else 0)
        elif kind == "tuple":
            made[k] = tuple([made[child] for child in said[1:]])
        elif kind == "named":
            made[k] = _named(made, said, classes[k])
        elif kind == "list":
            made[k] = [made[child] for child in said[1:]]
        else:
            pairs = zip(keys_of(said), [made[child] for child in children_of(said)], strict=True)
            cls: Any = CLASSES[kind]
            made[k] = cls(pairs) if issubclass(cls, dict) else cls(**dict(pairs))
    for k, texts in ties:
        made[k].tie = Tie(tuple(texts))
    return {root: made[contents.roots[root]] for root in roots}


def _named(made: list[Any], said: Said, cls: Any) -> Any:
    """Return a named tuple of nodes that are made."""
    below = said[len(said) // 2 + 1 :]
    if ABSENT not in below:
        return tuple.__new__(cls, [made[child] for child in below])
    values = [ABSENT if child is ABSENT else made[child] for child in below]
    return tuple.__new__(cls, supplied(cls, values))


def _make_childless(contents: Contents, arrays: ArrayReader, rows: Rows) -> None:
    """Put arrays and values in the place of their nodes."""
    made, row = contents.nodes, rows.get("array", [])
    numbers = [made[k][1] for k in row]
    arrays.read_small(numbers)
    bases = arrays.bases
    for k, number in zip(row, numbers, strict=True):
        if len(made[k]) == 2 and number in bases:
            made[k] = bases[number]
        else:
            made[k] = arrays.of_numpy(number, made[k][2] if len(made[k]) == 3 else None)
    for k in rows.get("value", ()):
        made[k] = made[k][1]


def _classes(contents: Contents, roots: Iterable[str], rows: Rows) -> dict[int, Any]:
    """Return the classes of named tuples; refuse nodes that only given trees can have."""
    nodes, named = contents.nodes, dict[Said, Any]()
    classes: dict[int, Any] = {}
    unknown = {*rows.get("object", ()), *rows.get("left_out", ())}
    for k in rows.get("named", ()):
        said = nodes[k]
        mark = said[1 : len(said) // 2 + 1]
        if mark not in named:
            named[mark] = contents.classes.find(said[1], [*mark[1:]])
        classes[k] = named[mark]
        if named[mark] is None:
            unknown.add(k)
    if unknown:
        _refuse_unknown(contents, roots, unknown)
    return classes


def _ties(nodes: list[Any], root: int, leaves: Iterable[int]) -> dict[int, list[str]]:
    """Return the addresses of those leaves of a tree that are at several places."""
    times = bytearray(root + 1)
    times[root] = 1
    for k in range(root, -1, -1):
        if (n := times[k]) and (said := nodes[k])[0] not in CHILDLESS:
            for child in children_of(said):
                if child is not ABSENT:
                    times[child] = min(2, times[child] + n)
    tied = {k for k in leaves if k <= root and times[k] > 1}
    found: dict[int, list[str]] = {}
    length = 0
    for k, way in places(nodes, root, tied):
        text = str(path_of(way))
        length += len(text)
        if length > MOST_TEXT:
            damaged(f"the addresses of tied leaves have more than {MOST_TEXT:,} letters")
        found.setdefault(k, []).append(text)
    return found


def _refuse_unknown(contents: Contents, roots: Iterable[str], unknown: set[int]) -> NoReturn:
    lines: list[str] = []
    left = set(unknown)
    length = 0
    for root in roots:
        for k, way in places(contents.nodes, contents.roots[root], left, once=True):
            left.discard(k)
            address, said = at(root, path_of(way)), contents.nodes[k]
            lines.append(f"  {shown(address)}: {shown(said[1][:200])}")
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
