"""The quick way to fill trees: nodes of a file, each beside the one object that it goes with.

It takes files and trees in which nothing is at two places and that plainly fit, which is nearly
all. Of any other it makes nothing and says nothing: `_fill` looks again, with paths.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from .._arrays.library import isnumeric, library_of
from .._leaf import Leaf
from .._trees.nodes import children, is_node, rebuild
from .._trees.parameters import owners
from .._trees.paths import KeyPath
from ..rules._base import Rule
from . import _safetensors as form
from ._array_reader import ArrayReader
from ._contents import Contents
from ._differences import may_replace, signature
from ._entries import ABSENT, ArrayNode
from ._revive import supplied
from ._rule_reader import RuleReader
from ._saved import BY_POSITION, kind_of
from ._tables import INNER, Said, children_of, keys_of

Tree = Any


class Pairs:
    """The nodes of a file beside the objects of trees."""

    def __init__(self, contents: Contents, rules: RuleReader) -> None:
        self._contents = contents
        self._rules = rules
        self._beside: dict[int, Any] = {}
        """By the number of its node, children behind their parents: what stands there."""
        self._below: dict[int, Said] = {}
        """The children of a node, in the order of the object beside it."""
        self._arrays: list[Any] = []
        """The parameters, outside of states."""
        self._leaves: set[int] = set()
        self._dtypes: dict[str, Any] = {}
        self._is_taken = bytearray(len(contents.tensors))
        self._alike: set[tuple[int, int]] = set()

    def fit(self, root: str, tree: Tree) -> bool:
        """Put a tree beside the nodes of a root; False if they do not plainly fit."""
        nodes, beside = self._contents.nodes, self._beside
        stack: list[tuple[int, Any, bool]] = [(self._contents.roots[root], tree, False)]
        while stack:
            k, x, is_state = stack.pop()
            if k in beside:  # the root of one tree, and a part of another
                return False
            said = nodes[k]
            kind = said[0]
            beside[k] = x
            if kind == "leaf":
                if not isinstance(x, Leaf) or said[2] in beside or not self._fits_leaf(said, x):
                    return False
                k, x, is_state = said[2], x.state, True
                said = nodes[k]
                kind = said[0]
                beside[k] = x
            if kind == "array":
                if not self._fits_array(said, x, is_state):
                    return False
            elif kind in INNER:
                found = _values(said, x)
                if found is None:
                    return False
                self._below[k] = below = found[0]
                for child, value in zip(below, found[1], strict=True):
                    if child is ABSENT:
                        continue
                    if nodes[child][0] == "array" and child not in beside:
                        if not self._fits_array(nodes[child], value, is_state):
                            return False
                        beside[child] = value
                    else:
                        stack.append((child, value, is_state))
            elif not may_replace(x, kind):
                return False
        return True

    def _fits_array(self, said: Any, x: Any, is_state: bool) -> bool:
        if len(said) != 2 or self._is_taken[said[1]]:
            return False
        self._is_taken[said[1]] = 1
        _, dtype, shape, _, _, _ = self._contents.tensors[said[1]]
        if type(x) is np.ndarray:
            if shape != x.shape:
                return False
            if x.dtype is not self._dtypes.get(dtype):
                if dtype != form.dtype_name(x.dtype):
                    return False
                self._dtypes[dtype] = x.dtype
        elif (
            library_of(type(x)) is None
            or shape != tuple(x.shape)
            or dtype != form.dtype_name(x.dtype)
        ):
            return False
        if not is_state and isnumeric(x):
            self._arrays.append(x)
        return True

    def _fits_leaf(self, said: Any, leaf: Leaf) -> bool:
        tie = id(leaf if leaf.tie is None else leaf.tie)
        if tie in self._leaves:
            return False
        self._leaves.add(tie)
        rule = self._rules.rule_of(said)
        mark = said[1], id(leaf.rule)
        if mark not in self._alike:
            if rule is not leaf.rule and signature(rule) != signature(leaf.rule):
                return False
            self._alike.add(mark)
        return True

    def are_apart(self) -> bool:
        """Tell whether no two of the parameters given are one."""
        root = KeyPath()
        return owners([(root, x) for x in self._arrays]) == [*range(len(self._arrays))]

    def filled(self, arrays: ArrayReader, wanted: dict[str, Tree]) -> dict[str, Tree]:
        """Return the trees, made of the objects and the numbers of the file."""
        nodes, made = self._contents.nodes, dict[Any, Any]()
        of_numpy = [k for k, x in self._beside.items() if type(x) is np.ndarray]
        arrays.read_small([nodes[k][1] for k in of_numpy])
        bases, rules = arrays.bases, dict[int, Rule]()
        made[ABSENT] = ABSENT
        for k, x in reversed(self._beside.items()):
            said = nodes[k]
            kind = said[0]
            if kind == "array":
                if type(x) is np.ndarray and said[1] in bases:
                    made[k] = bases[said[1]]
                else:
                    made[k] = arrays.array(ArrayNode(said[1], None), x)
            elif kind == "leaf":
                if said[1] not in rules:
                    rules[said[1]] = self._rules.rule(said[1])
                skipped = said[4] if len(said) == 5 else 0
                made[k] = Leaf(rules[said[1]], made[said[2]], said[3], skipped)
            elif kind == "value":
                made[k] = said[1]
            elif kind == "left_out":
                made[k] = x
            else:
                below = self._below[k]
                values = [made[child] for child in below]
                if kind == "tuple" and type(x) is tuple:
                    made[k] = tuple(values)
                else:
                    is_whole = kind != "named" or ABSENT not in below
                    made[k] = rebuild(x, values if is_whole else supplied(type(x), values))
        return {root: made[self._contents.roots[root]] for root in wanted}


def _values(said: Said, x: Any) -> tuple[Said, Collection[Any]] | None:
    """Return the children of a node, and beside them those of an object; None if these differ."""
    kind, cls = said[0], type(x)
    if kind in BY_POSITION and (cls is tuple or cls is list):
        return (said[1:], x) if cls.__name__ == kind and len(x) == len(said) - 1 else None
    if not is_node(x) or kind_of(x) != kind:
        return None
    if kind == "named":
        end = len(said) // 2 + 1
        return (said[end:], x) if cls._fields == said[2:end] else None
    found = x if cls is dict else children(x)
    keys, below = keys_of(said), children_of(said)
    if (*found,) != keys:
        theirs = dict(zip(keys, below, strict=True))
        if found.keys() != theirs.keys():
            return None
        below = tuple([theirs[key] for key in found])
    return below, found.values()
