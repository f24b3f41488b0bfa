"""The tables of a file while they are read: small, whatever the file says.

Python's parser of JSON makes a dictionary of each object, 20 times the size of its text, all of
which is there before anything can be checked. Here an object becomes a tuple as soon as it is
parsed, a node one that is laid out like this, with the numbers of its children at the end:

    (kind, *children)                     list, tuple
    (kind, *keys, *children)              dict, ordered, namespace, state
    (kind, name, *keys, *children)        named, object
    ("leaf", rule, state, frozen)         with `skipped` behind it, if updates passed it by
    ("array", number)                     with its view behind it, if it is one
    (key, value)                          any other object of one pair: ("value", 1.5)
    (ARRAY, name, dtype, shape)           an array, if that is all that is said of it
    (PAIRS, key, value, key, value, ...)  any other
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from .._trees.paths import KeyPath
from ._entries import ABSENT, damaged
from ._saved import BY_POSITION, CONTAINERS, NAMESPACES, WITH_CLASS, crowd


class Mark:
    """What begins the tuple of an object that is no node; no text of a file is equal to it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


PAIRS, ARRAY = Mark("object"), Mark("array")
_EMPTY = (PAIRS,)
KEYED = frozenset({*CONTAINERS.values()} - {*BY_POSITION})
Said = tuple[Any, ...]
Rows = dict[str, list[int]]
CHILDLESS = frozenset(("array", "value", "left_out"))
INNER = frozenset((*BY_POSITION, *KEYED, *WITH_CLASS))
BY_NAME = frozenset((*WITH_CLASS, *NAMESPACES, "leaf"))
"""Nodes whose children are attributes: shapes the text of paths."""
MOST_TEXT = 10_000_000
"""Letters in the addresses of tied leaves, which a small file can make long and many."""

_NOT_ALONE = frozenset((*BY_POSITION, *WITH_CLASS))
"""Keys whose value alone, without a second key, is not kept beside them."""
_LEAF = ("leaf", "state", "frozen")


def refuse_crowd(text: str) -> None:
    """Refuse a text of a file that `crowd` has something to say of."""
    if what := crowd(text):
        damaged(f"it has {what}")


def packed(pairs: list[tuple[str, Any]]) -> Said:
    """Return an object of a text as a tuple."""
    count = len(pairs)
    if count == 1:
        pair = pairs[0]
        key, x = pair
        if key not in _NOT_ALONE:
            return pair
        return (key, *x) if key in BY_POSITION and type(x) is list else (PAIRS, key, x)
    if count == 3:
        (a, x), (b, y), (c, z) = pairs
        if a == "name" and b == "dtype" and c == "shape":
            return (ARRAY, x, y, z)
        if a == "leaf" and b == "state" and c == "frozen":
            return (a, x, y, z)
        if a in WITH_CLASS and {b, c} == {"class", "keys"}:
            name, keys = (y, z) if b == "class" else (z, y)
            if type(x) is list and type(keys) is list and len(x) == len(keys):
                return (a, name, *keys, *x)
    elif count == 2:
        (a, x), (b, y) = pairs
        if b == "keys" and a in KEYED:
            if type(x) is list and type(y) is list and len(x) == len(y):
                return (a, *y, *x)
        elif a == "array" and b == "view":
            return (a, x, y)
        if a == b:
            damaged("it has a key twice")
        return (PAIRS, a, x, b, y)
    elif count == 4 and pairs[0][0] == "leaf":
        (a, x), (b, y), (c, z), (d, skipped) = pairs
        if (a, b, c) == _LEAF and d == "skipped":
            return (a, x, y, z, skipped)
    if not pairs:
        return _EMPTY
    if len(dict(pairs)) < count:
        damaged("it has a key twice")
    return (PAIRS, *(part for pair in pairs for part in pair))


def pairs_of(said: Any) -> dict[str, Any] | None:
    """Return an object as a dictionary; None if it is none, or can only be a node."""
    if type(said) is not tuple:
        return None
    if not said:
        return {}
    if said[0] is PAIRS:
        return dict(zip(said[1::2], said[2::2], strict=True))
    if said[0] is ARRAY:
        return dict(zip(("name", "dtype", "shape"), said[1:], strict=True))
    if len(said) == 2 and said[0] not in BY_POSITION:
        return {said[0]: said[1]}
    if said[0] == "leaf" and len(said) in (4, 5):
        return dict(zip((*_LEAF, "skipped"), said[1:], strict=False))
    return None


def keys_at(said: Said) -> int:
    """Return where in a node its keys begin."""
    return 2 if said[0] in WITH_CLASS else 1


def children_at(said: Said) -> int:
    """Return where in a node its children begin; behind its end if it has none."""
    kind = said[0]
    if kind in BY_POSITION:
        return 1
    if kind in KEYED:
        return (len(said) + 1) // 2
    if kind in WITH_CLASS:
        return len(said) // 2 + 1
    return 2 if kind == "leaf" else len(said)


def children_of(said: Said) -> Said:
    """Return the numbers of the children of a node, ABSENT for one that the file does not have."""
    return said[2:3] if said[0] == "leaf" else said[children_at(said) :]


def keys_of(said: Said) -> Said:
    """Return the keys of a node, in the order of its children."""
    kind = said[0]
    if kind in BY_POSITION:
        return (*range(len(said) - 1),)
    if kind in KEYED or kind in WITH_CLASS:
        return said[keys_at(said) : children_at(said)]
    return ("state",) if kind == "leaf" else ()


def key_of(said: Said, k: int) -> Any:
    """Return the key of the `k`-th child of a node."""
    kind = said[0]
    if kind in BY_POSITION:
        return k
    return "state" if kind == "leaf" else said[keys_at(said) + k]


def rows_of(nodes: list[Any], numbers: Iterable[int]) -> Rows:
    """Return the numbers of the nodes of each kind."""
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for k in numbers:
        rows[nodes[k][0]].append(k)
    return {**rows}


def needed_nodes(nodes: list[Any], roots: list[int]) -> list[int]:
    """Return the numbers of the nodes of some trees, children before their parents."""
    needed = bytearray(max(roots) + 1)
    for k in roots:
        needed[k] = 1
    for k in range(len(needed) - 1, -1, -1):
        if needed[k] and (said := nodes[k])[0] not in CHILDLESS:
            if said[0] == "leaf":
                needed[said[2]] = 1
                continue
            for child in said[children_at(said) :]:
                if child is not ABSENT:
                    needed[child] = 1
    return [k for k, is_needed in enumerate(needed) if is_needed]


def path_of(way: Iterable[tuple[Said, Any]]) -> KeyPath:
    """Return the path that leads through some nodes, each by a key."""
    path = KeyPath()
    for said, key in way:
        path = path.step(key, said[0] not in BY_NAME)
    return path


def places(
    nodes: list[Said], root: int, wanted: set[int], once: bool = False
) -> Iterator[tuple[int, list[tuple[Said, Any]]]]:
    """Yield where in the tree of a root the wanted nodes are: the number, the nodes and keys there.

    Nothing is kept for nodes that lie on no way to these; with `once`, each is come upon once.
    """
    if not wanted:
        return
    leads = bytearray(root + 1)
    for k in wanted:
        if k <= root:
            leads[k] = 1
    for k in range(root + 1):
        if not leads[k]:
            leads[k] = any(leads[child] for child in children_of(nodes[k]) if child is not ABSENT)
    if not leads[root]:
        return
    if root in wanted:
        yield root, []
    way, turns = [root], [0]
    while way:
        said, turn = nodes[way[-1]], turns[-1]
        first = children_at(said)
        if turn == (1 if said[0] == "leaf" else len(said) - first):
            way.pop()
            turns.pop()
            continue
        turns[-1] += 1
        child = said[first + turn]
        if child is ABSENT or not leads[child]:
            continue
        way.append(child)
        turns.append(0)
        if child in wanted:
            above = zip(way[:-1], turns[:-1], strict=True)
            here = [(nodes[k], key_of(nodes[k], turn - 1)) for k, turn in above]
            yield child, here
        if once:
            leads[child] = 0
