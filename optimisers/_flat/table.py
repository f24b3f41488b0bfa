"""The table of a flat vector: what is kept of a model, and how it is rebuilt from this.

a) A `Table` has an entry for each parameter, then for each other view of one, then for what is kept
   and for the nodes, each after its children. To rebuild is to fill in the parameters, to make the
   nodes in order, and to return the entry of the root.
b) Consecutive parameters of one shape are a `Run`: one slice, cut into its rows by NumPy in C.
c) A `Slot` stands at each place of a parameter in a tree, and a `Blank`, which has shape and dtype
   but no memory, in place of an array. The arrays of the model itself are not kept alive.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from .._arrays.layout import View
from .._arrays.library import of_class, plain
from .._arrays.sharing import carry
from .._trees.nodes import rebuild, register_leaf
from .._trees.paths import KeyPath
from .._trees.walks import fold

Array = Any


class Parameter(NamedTuple):
    """A parameter, and the stretch of the vector that holds it."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: Any
    """A dtype of its library, in native byte order."""
    is_complex: bool
    is_summed: bool
    """Whether one gradient object at several places is one gradient, summed already."""


class Run(NamedTuple):
    """Consecutive parameters of one shape, or one parameter alone."""

    stretch: slice
    shape: tuple[int, ...] | None
    """The shape that the stretch takes; None if it stays a vector."""
    several: bool
    """Whether each of its rows is a parameter; else it is one itself."""


class Node(NamedTuple):
    """A node, and the functions that rebuild it."""

    entry: int
    """Its position in the table."""
    keys: tuple[Any, ...] | None
    """The keys of a plain dictionary, which is made of keys and children alone; else None."""
    make: Callable[[Any], Any]
    get: Callable[[list[Any]], Any]
    """Gets its children from the table."""


@register_leaf
class Slot:
    """The mark of a place in the template: the parameter, and the view of it that is there."""

    frozen = False

    def __init__(
        self, k: int, x: Array, source: View | None = None, view: View | None = None
    ) -> None:
        self.k = k
        self.like = None if plain(x) is x or isinstance(x, np.memmap) else Like.of(x)
        self.source = source
        self.view = view

    def seen(self, values: Array) -> Array:
        """Return the values of the parameter as this place shows them."""
        if self.source is None or self.view is None:
            return values
        return carry(values, self.source, self.view)

    def unseen(self, values: Array) -> Array:
        """Return values as this place shows them in the layout of the parameter."""
        if self.source is None or self.view is None:
            return values
        return carry(values, self.view, self.source)


class Blank(np.ndarray):
    """Has the shape and dtype of an array, and one element of memory."""

    def __reduce__(self) -> Any:
        return blank_of, (self.shape, self.dtype)

    def __deepcopy__(self, memo: Any) -> Blank:
        return self


def blank_of(shape: tuple[int, ...], dtype: Any) -> Blank:
    """Return a blank of this shape and dtype."""
    blank = Blank(shape, dtype, np.zeros((), dtype), strides=(0,) * len(shape))
    blank.flags.writeable = False
    return blank


class Like:
    """An array of a subclass of NumPy's without its memory: its class and its attributes."""

    def __init__(self, blank: np.ndarray) -> None:
        self.blank = blank

    @classmethod
    def of(cls, x: np.ndarray) -> Like:
        return cls(of_class(x, blank_of(x.shape, x.dtype)))

    def __reduce__(self) -> Any:
        carried = getattr(self.blank, "__dict__", {})
        return _like, (type(self.blank), self.blank.shape, self.blank.dtype, carried)


def _like(cls: type, shape: tuple[int, ...], dtype: Any, carried: dict[str, Any]) -> Like:
    blank: Any = np.ndarray.view(blank_of(shape, dtype), cls)
    if carried:
        vars(blank).update(carried)
    return Like(blank)


class Kept(NamedTuple):
    """A part without parameters, which each rebuilt model shares."""

    x: Any


class Table:
    """The entries of which a model is rebuilt, and the nodes that are made of them.

    Parameters
    ----------
    model : tree
        The model.
    slot : callable
        Returns the slot of an array at a path, or None for what is no parameter.
    slots : list of Slot
        A slot for each entry that shows a parameter.
    bare : list of array
        What stands at these entries in the outline.
    """

    def __init__(
        self,
        model: Any,
        slot: Callable[[KeyPath, Any], Slot | None],
        slots: Sequence[Slot],
        bare: Sequence[Any],
    ) -> None:
        self.entries: list[Any] = [None] * len(slots)
        self.nodes: list[Node] = []
        outline: list[Any] = [*bare]
        at = {id(s): i for i, s in enumerate(slots)}

        def leaf(path: KeyPath, x: Any) -> int | Kept:
            found = slot(path, x)
            return Kept(x) if found is None else at[id(found)]

        def node(path: KeyPath, x: Any, results: list[int | Kept]) -> int | Kept:
            if all(isinstance(result, Kept) for result in results):
                return Kept(x)
            where = [enter(r.x, r.x) if isinstance(r, Kept) else r for r in results]
            get = _getter(where)
            made = rebuild(x, get(outline))
            entry = enter(None, made)
            keys = tuple(made) if type(made) is dict else None
            self.nodes.append(Node(entry, keys, _maker(made), get))
            return entry

        def enter(kept: Any, shown: Any) -> int:
            self.entries.append(kept)
            outline.append(shown)
            return len(outline) - 1

        root = fold(model, leaf, node)
        self.root: int = enter(root.x, root.x) if isinstance(root, Kept) else root
        self.outline: Any = outline[self.root]
        """The model with blanks in place of its parameters."""

    def rebuilt(self, entries: list[Any]) -> Any:
        """Return the model of which these are the entries; the nodes among them are made here."""
        for entry, keys, make, get in self.nodes:
            if keys is None:
                entries[entry] = make(get(entries))
            else:
                entries[entry] = dict(zip(keys, get(entries), strict=False))
        return entries[self.root]


# --- making the nodes --------------------------------------------------------------------------


def _maker(bare: Any) -> Callable[[Any], Any]:
    """Return a function that makes a node like `bare` from its children, and can be pickled."""
    cls = type(bare)
    if cls is list or cls is tuple:
        return cls
    if cls is SimpleNamespace:
        return functools.partial(_make_namespace, tuple(vars(bare)))
    return functools.partial(rebuild, bare)


def _make_namespace(keys: tuple[str, ...], values: Iterable[Any]) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(keys, values, strict=True)))


def _getter(where: list[int]) -> Callable[[list[Any]], Any]:
    """Return a function that gets these entries of the table, as a sequence."""
    if where == list(range(where[0], where[0] + len(where))):
        return itemgetter(slice(where[0], where[0] + len(where)))
    return itemgetter(*where)


def runs_of(found: Sequence[Parameter]) -> list[Run]:
    """Return the runs into which a vector of these parameters is cut."""
    runs: list[Run] = []
    for shape, same in itertools.groupby(found, key=lambda p: p.shape):
        run = list(same)
        if len(run) > 1 and shape:  # rows of a vector would be scalars, not 0-d arrays
            runs.append(Run(slice(run[0].start, run[-1].stop), (len(run), *shape), True))
        else:
            reshape = None if len(shape) == 1 else shape
            runs.extend(Run(slice(p.start, p.stop), reshape, False) for p in run)
    return runs
