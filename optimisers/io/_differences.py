"""How a tree that was given as `like` differs from the file: one line for each difference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from .._arrays.dtypes import is_narrow_dtype
from .._arrays.library import is_array, isnumeric
from .._arrays.traced import attributes
from .._leaf import Leaf
from .._messages.text import plain
from .._trees.nodes import children, is_node
from .._trees.parameters import owners
from .._trees.paths import KeyPath
from ..rules._base import Rule
from . import _safetensors as form
from ._contents import Contents
from ._entries import ABSENT
from ._rule_reader import RuleReader
from ._saved import CLASSES, WITH_CLASS, at, kind_of
from ._tables import BY_NAME, INNER, children_of, keys_of

Tree = Any
Text = Callable[[], str]


class Differences:
    """Tells how trees differ from those of a file."""

    def __init__(self, contents: Contents, rules: RuleReader) -> None:
        self._contents = contents
        self._rules = rules

    def of(self, root: str, tree: Tree) -> Iterator[Text]:
        """Yield how a tree differs from the file; texts are only made where they are shown."""

        def differ(path: KeyPath, of_file: Text, of_like: Text) -> Text:
            return lambda: f"{at(root, path)}: the file has {of_file()}, `like` {of_like()}"

        ties: list[tuple[KeyPath, Any, Any]] = []
        arrays: list[tuple[KeyPath, Any, int]] = []
        stack: list[tuple[KeyPath, Any, Any, bool, Any]]
        stack = [(KeyPath(), tree, self._contents.roots[root], False, None)]
        seen: set[tuple[int, int]] = set()
        signatures: dict[int, Any] = {}

        def signature_of(rule: Rule) -> Any:
            if id(rule) not in signatures:
                signatures[id(rule)] = signature(rule), rule  # kept, so that its id is its own
            return signatures[id(rule)][0]

        while stack:
            path, x, k, is_state, above = stack.pop()
            if k is ABSENT:
                continue
            said = self._contents.nodes[k]
            kind = said[0]
            if isinstance(x, Leaf) and kind == "leaf":
                ties.append((path, id(x if x.tie is None else x.tie), k))
                rule = self._rules.rule_of(k)
                if rule is not x.rule and signature_of(rule) != signature_of(x.rule):
                    yield differ(path, partial(_told_rule, rule), partial(_has_rule, x.rule))
                stack.append((path.step("state"), x.state, said[2], True, None))
            elif kind == "array" and is_array(x):
                mine = self._contents.tensors[said[1]]
                shape = said[2].shape if len(said) == 3 else mine.shape
                if shape != tuple(x.shape):
                    told = partial(str, f"shape {shape}"), partial(str, tuple(x.shape))
                    yield differ(path, *told)
                if mine.dtype != form.dtype_name(x.dtype) and not _was_narrow(above, x, mine.dtype):
                    told = partial(str, f"dtype {mine.dtype}"), partial(str, x.dtype)
                    yield differ(path, *told)
                if not is_state and isnumeric(x):
                    arrays.append((path, x, said[1]))
            elif kind in INNER and is_node(x) and kind_of(x) == kind:
                if (id(x), k) in seen:
                    continue
                seen.add((id(x), k))
                below, theirs = (
                    children(x),
                    dict(zip(keys_of(said), children_of(said), strict=True)),
                )
                if below.keys() != theirs.keys():
                    for key in [*theirs, *(key for key in below if key not in theirs)]:
                        there = path.step(key, kind not in BY_NAME)
                        if key not in below:
                            yield differ(there, partial(self._shown, theirs[key]), _has_nothing)
                        elif key not in theirs:
                            yield differ(there, _nothing, partial(_has, below[key]))
                is_item = kind not in BY_NAME
                for key in reversed(below):
                    if key in theirs:
                        there = path.step(key, is_item)
                        stack.append((there, below[key], theirs[key], is_state, type(x)))
            elif not may_replace(x, kind):
                yield differ(path, partial(self._shown, k), partial(_has, x))
        owner = owners(cast(Any, [(_Place(root, path), x) for path, x, _ in arrays]))
        ties += [(path, owner[k], t) for k, (path, _, t) in enumerate(arrays)]
        yield from _tie_differences(root, ties)

    def _shown(self, k: Any) -> str:
        if k is ABSENT:
            return "nothing"
        said = self._contents.nodes[k]
        kind = said[0]
        if kind == "array":
            shape = said[2].shape if len(said) == 3 else self._contents.tensors[said[1]].shape
            return f"an array of shape {shape}"
        if kind == "leaf":
            return f"a Leaf with {self._rules.rule(said[1])!r:.60}"
        if kind in WITH_CLASS:
            return f"a {said[1].rpartition(':')[2]}"
        return f"a {CLASSES[kind].__name__}" if kind in INNER else _shown(said[1])


def _was_narrow(above: Any, x: Any, dtype: str) -> bool:
    """Tell whether a file has in a narrow dtype what a rule keeps in float32, as earlier versions.

    The rule goes on from it in float32.
    """
    is_wide = hasattr(above, "is_wide") and form.dtype_name(x.dtype) == "float32"
    return is_wide and is_narrow_dtype(dtype)


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
    if is_array(x):
        return f"an array of shape {tuple(x.shape)}"
    if isinstance(x, Leaf):
        return f"a Leaf with {x.rule!r:.60}"
    with contextlib.suppress(Exception):  # whole numbers can be too long for a text
        return f"a {type(x).__name__}" if is_node(x) else plain(x)
    return f"a {type(x).__name__}"


_REPLACEABLE = (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype)


def may_replace(x: Any, kind: str) -> bool:
    """Tell whether a node of a file may stand where the structure given has `x`."""
    if kind == "left_out":
        return not is_node(x) and not isinstance(x, Leaf) and not is_array(x)
    return kind == "value" and isinstance(x, _REPLACEABLE)


def signature(rule: Any) -> tuple[Any, ...]:
    """Return the class of a rule, and those of the rules that it is made of."""
    parts = [v for x in attributes(rule).values() for v in (x if isinstance(x, tuple) else (x,))]
    return type(rule), *(signature(part) for part in parts if isinstance(part, Rule))


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
