"""The rules of a file: each made once, of its fields, when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from .._trees.nodes import children
from ..rules._base import Rule
from ._array_reader import ArrayReader
from ._contents import Contents
from ._entries import ABSENT, damaged, plain
from ._revive import made_rule, rule_class
from ._saved import BY_POSITION, class_name, kind_of
from ._tables import Said, children_of, keys_of, pairs_of

_SMALL = ("array", "value")

MOST_DIMENSIONS = 9
"""States of arrays with fewer dimensions are those that a file may have."""


class RuleReader:
    """Makes the rules of a file, and says which states are theirs."""

    def __init__(self, contents: Contents, arrays: ArrayReader) -> None:
        self._contents = contents
        self._arrays = arrays
        self._classes: dict[str, Any] = {}
        self._made: dict[int, Rule] = {}
        self._examples: dict[tuple[int, int], Any] = {}
        self._flat: dict[int, tuple[Rule, Said, int]] = {}
        self._fitting: set[tuple[int, int]] = set()

    def rule(self, k: int) -> Rule:
        """Return a rule of the file."""
        if k in self._made:
            return self._made[k]
        needed, stack = {k}, [k]
        while stack:
            parts = self._contents.parts[stack.pop()]
            stack += [part for part in parts if part not in needed]
            needed.update(parts)
        # What a rule is made of stands above it.
        for part in sorted(part for part in needed if part not in self._made):
            name, said = self._contents.rules[part]
            pairs = pairs_of(said) or {}
            fields = {field: self._value(value) for field, value in pairs.items()}
            if name not in self._classes:
                self._classes[name] = rule_class(name)
            self._made[part] = made_rule(self._classes[name], name, fields)
        return self._made[k]

    def rules_of(self, leaves: Iterable[int]) -> list[Rule]:
        """Return the rules of leaves; of a rule of the library, the state must be one it makes."""
        nodes = self._contents.nodes
        said = [nodes[k] for k in leaves]
        numbers = [leaf[1] for leaf in said]
        states: dict[int, list[int]] = {k: [] for k in numbers}
        for k, leaf in zip(numbers, said, strict=True):
            states[k].append(leaf[2])
        for k, row in states.items():
            if not self._are_flat(k, [nodes[state] for state in row]):
                for state in row:
                    self._check_state(k, state)
        return [*map(self._made.__getitem__, numbers)]

    def _are_flat(self, k: int, states: list[Said]) -> bool:
        """Tell whether nodes are states of a rule that keeps arrays and numbers alone."""
        nodes = self._contents.nodes
        if k not in self._flat:
            self._flat[k] = self._looked_at(k)
        _, head, count = self._flat[k]
        if {*map(len, states)} != {count}:
            return False
        end = len(head)
        if any(said[:end] != head for said in states):
            return False
        for child in chain.from_iterable([said[end:] for said in states] if end < count else ()):
            if child is ABSENT or nodes[child][0] not in _SMALL:
                return False
        return True

    def rule_of(self, leaf: int) -> Rule:
        """Return the rule of a leaf, as `rules_of` does."""
        return self.rules_of((leaf,))[0]

    def _looked_at(self, k: int) -> tuple[Rule, Said, int]:
        """Return a rule, how the nodes of its states begin, and their length if they are flat."""
        rule = self.rule(k)
        if self._contents.is_open[k]:
            return rule, (), -1
        example = self._example(k, 0)
        return rule, *(_head_of_flat(example) or ((), -1))

    def _example(self, k: int, dimensions: int) -> Any:
        """Return what a rule keeps of an array of so many dimensions."""
        if (k, dimensions) not in self._examples:
            self._examples[k, dimensions] = self._made[k].init(np.zeros((1,) * dimensions))
        return self._examples[k, dimensions]

    def _check_state(self, k: int, state: int) -> None:
        """Refuse a node that is no state of a rule of the library, with a look at all its parts."""
        if self._contents.is_open[k]:
            return
        # Rules of matrices keep another state of arrays with fewer than two dimensions.
        if not any(self._is_state(self._example(k, d), state) for d in range(MOST_DIMENSIONS)):
            damaged(f"it has a state that is none of {self._made[k]!r:.80}")

    def _is_state(self, example: Any, k: Any) -> bool:
        """Tell whether a node is made of tuples and arrays as a state that a rule makes.

        Pairs that were found to be are noted, by the id of the example, and not looked at again.
        """
        if k is ABSENT:
            return not isinstance(example, tuple)
        said = self._contents.nodes[k]
        if not isinstance(example, tuple):
            return said[0] in _SMALL
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
            return self._made[value[1]]
        if kind == "array":
            return self._arrays.array(self._contents.checked_array(value), None)
        if kind == "dict":
            names, values = value[1]
            return dict(zip(names, map(self._value, values), strict=True))
        if kind in BY_POSITION:
            return (list if kind == "list" else tuple)(map(self._value, value[1:]))
        return plain(value)


def _head_of_flat(example: Any) -> tuple[Said, int] | None:
    """Return how the node of a state like this begins, and how long it is, if it has one level."""
    if not isinstance(example, tuple) or any(isinstance(x, tuple) for x in example):
        return None
    if type(example) is tuple:
        return ("tuple",), 1 + len(example)
    if kind_of(example) != "named":
        return None
    head = "named", class_name(type(example)), *children(example)
    return head, len(head) + len(example)
