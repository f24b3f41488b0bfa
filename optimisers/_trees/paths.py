"""Paths: where something lies in a tree.

A `KeyPath` is a value that knows nothing of trees: the keys passed on the way from the root, and
for each whether it was the key of an item, as in ``node[key]``, which is how it is written.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, final, overload

__all__ = ["KeyPath"]


@final
class KeyPath(Sequence[Any]):
    """An address in a tree: the keys that lead from its root to a node or leaf.

    Immutable and hashable; reads like a tuple of its keys, and paths add. Two paths are equal if
    their keys are.

    Parameters
    ----------
    *keys : hashable
        Dictionary keys, positions, and names of attributes, from the root on.

    Examples
    --------
    >>> path = KeyPath("layers", 0, "weight")
    >>> str(path)
    'layers[0].weight'
    >>> path[-1], len(path), path == KeyPath("layers") + (0, "weight")
    ('weight', 3, True)

    A path found in a tree knows which of its keys were keys of a dictionary.

    >>> str(KeyPath().step("layers", is_item=True).step(0))
    "['layers'][0]"
    """

    # A path is its parent and one key more, so that the paths of a whole tree cost little.
    __slots__ = ("_is_item", "_key", "_parent")

    _parent: KeyPath | None
    _key: Any
    _is_item: bool

    def __new__(cls, *keys: Hashable) -> KeyPath:
        return _extend(_ROOT, ((key, False) for key in keys))

    def step(self, key: Hashable, is_item: bool = False) -> KeyPath:
        """Return the path one key further down; `is_item` says that ``node[key]`` lies there."""
        path = _new_object(KeyPath)
        path._parent = self
        path._key = key
        path._is_item = is_item
        return path

    def _steps(self) -> list[tuple[Any, bool]]:
        steps = []
        path = self
        while path._parent is not None:
            steps.append((path._key, path._is_item))
            path = path._parent
        steps.reverse()
        return steps

    def __iter__(self) -> Iterator[Any]:
        return iter([key for key, _ in self._steps()])

    def __len__(self) -> int:
        return len(self._steps())

    def __bool__(self) -> bool:
        return self._parent is not None

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> KeyPath: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _extend(_ROOT, self._steps()[index])
        return self._steps()[index][0]

    def __add__(self, other: Iterable[Hashable]) -> KeyPath:
        if isinstance(other, KeyPath):
            return _extend(self, other._steps())
        if isinstance(other, (tuple, list)):
            return _extend(self, ((key, False) for key in other))
        return NotImplemented

    def __radd__(self, other: Iterable[Hashable]) -> KeyPath:
        return KeyPath(*other) + self if isinstance(other, (tuple, list)) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyPath):
            return NotImplemented
        return self is other or list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_steps, (self._steps(),)

    def __repr__(self) -> str:
        return f"KeyPath({', '.join(map(repr, self))})"

    def __str__(self) -> str:
        text = ""
        for key, is_item in self._steps():
            if is_item or not isinstance(key, str) or not key.isidentifier():
                text += f"[{_shown(key)}]"
            else:
                text += f".{key}" if text else key
        return text or "(root)"


def _shown(key: Any) -> str:
    try:
        return repr(key)
    except ValueError:  # a whole number with more digits than Python writes
        return hex(key) if isinstance(key, int) else f"<{type(key).__name__}>"


_new_object = object.__new__


def _extend(path: KeyPath, steps: Iterable[tuple[Any, bool]]) -> KeyPath:
    for key, is_item in steps:
        path = path.step(key, is_item)
    return path


def _from_steps(steps: list[tuple[Any, bool]]) -> KeyPath:
    return _extend(_ROOT, steps)


_ROOT = _new_object(KeyPath)
_ROOT._parent = None
