"""Trees of built-in nodes, made of what a file says alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from .._leaf import Leaf
from .._pytree import Tie
from ..rules._base import Rule
from ._array_reader import ArrayReader
from ._contents import Contents
from ._entries import ABSENT, damaged
from ._json import shown
from ._revive import supplied
from ._rule_reader import RuleReader
from ._saved import CLASSES, at
from ._tables import CHILDLESS, MOST_TEXT, Said, children_of, keys_of, needed_nodes, path_of, places

Tree = Any

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
    needed = needed_nodes(made, [contents.roots[root] for root in roots])
    leaves: dict[int, Rule] = {}
    classes: dict[int, Any] = {}
    wanted = _looked_up(contents, rules, roots, needed, leaves, classes)
    ties: list[tuple[int, list[str]]] = []
    if contents.is_shared:
        for root in roots:
            ties += _ties(made, contents.roots[root], leaves).items()
    arrays.read_small(wanted)
    bases = arrays.bases
    for k in needed:
        said = made[k]
        kind = said[0]
        if kind == "array":
            if len(said) == 2 and said[1] in bases:
                made[k] = bases[said[1]]
            else:
                made[k] = arrays.of_numpy(said[1], said[2] if len(said) == 3 else None)
        elif kind == "leaf":
            made[k] = Leaf(leaves[k], made[said[2]], said[3], said[4] if len(said) == 5 else 0)
        elif kind == "value":
            made[k] = said[1]
        elif kind == "named":
            made[k] = _named(made, said, classes[k])
        elif kind == "list":
            made[k] = [made[child] for child in said[1:]]
        elif kind == "tuple":
            made[k] = tuple([made[child] for child in said[1:]])
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


def _looked_up(
    contents: Contents,
    rules: RuleReader,
    roots: Iterable[str],
    needed: list[int],
    leaves: dict[int, Rule],
    classes: dict[int, Any],
) -> list[int]:
    """Note the rules of leaves and the classes of named tuples; return the numbers of the arrays.

    Refuse nodes that cannot be made of what the file says alone.
    """
    named: dict[Said, Any] = {}
    unknown: set[int] = set()
    wanted: list[int] = []
    nodes = contents.nodes
    for k in needed:
        said = nodes[k]
        kind = said[0]
        if kind == "array":
            wanted.append(said[1])
        elif kind == "leaf":
            leaves[k] = rules.rule_of(said)
        elif kind == "named":
            mark = said[1 : len(said) // 2 + 1]
            if mark not in named:
                named[mark] = contents.classes.find(said[1], [*mark[1:]])
            classes[k] = named[mark]
            if named[mark] is None:
                unknown.add(k)
        elif kind in ("object", "left_out"):
            unknown.add(k)
    if unknown:
        _refuse_unknown(contents, roots, unknown)
    return wanted


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
