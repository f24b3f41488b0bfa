"""The quick way to fill trees: nodes of a file, each beside the one object that it goes with.

It takes files and trees in which nothing is at two places and that plainly fit, which is nearly
all. Of any other it makes nothing and says nothing: `_fill` looks again, with paths.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from .._arrays import isnumeric, library_of
from .._nodes import children, is_node, rebuild
from .._path import KeyPath
from .._ties import owners
from ..state import Leaf
from . import _safetensors as form
from ._array_reader import ArrayReader
from ._contents import Contents
from ._differences import may_replace, signature
from ._entries import ABSENT, ArrayNode
from ._revive import supplied
from ._rule_reader import RuleReader
from ._saved import kind_of
from ._tables import INNER, children_of, keys_of

Tree = Any


class Pairs:
    """The nodes of a file beside the objects of trees."""

    def __init__(self, contents: Contents, rules: RuleReader) -> None:
        self._contents = contents
        self._rules = rules
        self._beside: dict[int, Any] = {}
        """By the number of its node, children behind their parents: what stands there."""
        self._arrays: list[Any] = []
        """The parameters, outside of states."""
        self._leaves: set[int] = set()
        self._tensors: set[int] = set()
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
            if kind == "array":
                if not self._fits_array(said, x, is_state):
                    return False
            elif kind == "leaf":
                if not isinstance(x, Leaf) or not self._fits_leaf(said, x):
                    return False
                stack.append((said[2], x.state, True))
            elif kind in INNER and is_node(x) and kind_of(x) == kind:
                found = children(x)
                below = children_of(said)
                if (*found,) != keys_of(said):
                    theirs = dict(zip(keys_of(said), below, strict=True))
                    if found.keys() != theirs.keys():
                        return False
                    below = tuple([theirs[key] for key in found])
                for child, value in zip(below, found.values(), strict=True):
                    if child is not ABSENT:
                        stack.append((child, value, is_state))
            elif not may_replace(x, kind):
                return False
        return True

    def _fits_array(self, said: Any, x: Any, is_state: bool) -> bool:
        if len(said) != 2 or library_of(type(x)) is None:
            return False
        k = said[1]
        tensor = self._contents.tensors[k]
        if tensor[2] != tuple(x.shape) or tensor[1] != form.dtype_name(x.dtype):
            return False
        if k in self._tensors:
            return False
        self._tensors.add(k)
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
        places = [(KeyPath(), x) for x in self._arrays]
        return owners(cast(Any, places)) == [*range(len(places))]

    def filled(self, arrays: ArrayReader, wanted: dict[str, Tree]) -> dict[str, Tree]:
        """Return the trees, made of the objects and the numbers of the file."""
        nodes, made = self._contents.nodes, dict[Any, Any]()
        of_numpy = [k for k, x in self._beside.items() if type(x) is np.ndarray]
        arrays.read_small([nodes[k][1] for k in of_numpy])
        bases = arrays.bases
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
                rule, skipped = self._rules.rule(said[1]), said[4] if len(said) == 5 else 0
                made[k] = Leaf(rule, made[said[2]], said[3], skipped)
            elif kind == "value":
                made[k] = said[1]
            elif kind == "left_out":
                made[k] = x
            else:
                found, keys = children(x), keys_of(said)
                below = children_of(said)
                if (*found,) != keys:
                    theirs = dict(zip(keys, below, strict=True))
                    below = tuple([theirs[key] for key in found])
                values = [made[child] for child in below]
                made[k] = rebuild(x, values if ABSENT not in below else supplied(type(x), values))
        return {root: made[self._contents.roots[root]] for root in wanted}
