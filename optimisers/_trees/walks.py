"""Trees of parameters: how to walk from the root to the leaves and back, and to an address.

`nodes` decides which objects are nodes and which are leaves. Nothing here recurses: trees may be
deeper than Python's stack. `walk` yields every leaf with its path; `fold` is the one post-order
pass from which `fmap`, ``setup`` and ``destructure`` are made:

    fold(tree, leaf, node, is_leaf=None, keys=None, skipped=identity, rest=(), row=None)

    leaf(path, x, *others) -> result       of a leaf, beside those of the trees in ``rest``
    node(path, x, results) -> result       of a node; ``results`` in the order of ``children(x)``
    keys(x) -> the keys to enter or None   a child under another key gives ``skipped(child)``
    row(xs) -> results                     of all children of a node, if they are leaves
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from typing import Any, cast

from .._arrays.library import is_immutable, isnumeric, library_of, library_of_class
from .nodes import Kind, are_leaves, children, is_node, kind_of, listed, rebuild
from .paths import KeyPath

__all__ = ["child_path", "fmap", "fold", "getkeypath", "haskeypath", "setkeypath_", "walk"]

_ROOT = KeyPath()


# Whole trees ----------------------------------------------------------------------------------


def walk(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each leaf with its path, depth first, in order of insertion.

    What is reached twice is yielded twice.

    Parameters
    ----------
    tree : any
        The tree; a leaf yields itself, with the empty path.
    is_leaf : callable, optional
        Asked of each node, the root first: true for one that shall be taken as a leaf.

    Raises
    ------
    ValueError
        If the tree contains itself; the message names both paths.

    Examples
    --------
    >>> [(str(path), leaf) for path, leaf in walk({"a": [1, 2], "b": None})]
    [("['a'][0]", 1), ("['a'][1]", 2), ("['b']", None)]
    """
    kind = kind_of(tree)
    if kind is None or (is_leaf is not None and is_leaf(tree)):
        yield _ROOT, tree
        return
    open_nodes = {id(tree): (_ROOT, tree)}
    stack = [(_ROOT, tree, kind.by_item, iter(kind.children(tree).items()))]
    while stack:
        path, node, by_item, items = stack[-1]
        for key, x in items:
            here = path.step(key, by_item)
            kind = kind_of(x)
            if kind is None or (is_leaf is not None and is_leaf(x)):
                yield here, x
                continue
            refuse_cycle(open_nodes, here, x)
            open_nodes[id(x)] = here, x
            stack.append((here, x, kind.by_item, iter(kind.children(x).items())))
            break
        else:
            del open_nodes[id(node)]
            stack.pop()


def fold(
    tree: Any,
    leaf: Callable[..., Any],
    node: Callable[[KeyPath, Any, list[Any]], Any],
    is_leaf: Callable[[Any], bool] | None = None,
    keys: Callable[[Any], Container[Any] | None] | None = None,
    skipped: Callable[[Any], Any] = lambda child: child,
    rest: Sequence[Any] = (),
    row: Callable[[list[Any]], list[Any]] | None = None,
) -> Any:
    """Turn a tree into one result, from its leaves up, without recursion.

    Parameters
    ----------
    tree : any
        The tree.
    leaf : callable
        ``leaf(path, x, *others)`` gives the result of a leaf.
    node : callable
        ``node(path, x, results)`` gives that of a node from those of its children, which come in
        the order of ``children(x)``. The list is the callee's to keep.
    is_leaf : callable, optional
        Asked of each node, the root first: true for one that shall be taken as a leaf.
    keys : callable, optional
        ``keys(x)`` gives the keys of a node to enter, or None for all, as `trainable_keys` does.
    skipped : callable, optional
        ``skipped(child)`` gives the result of a child that is not entered; by default itself.
    rest : sequence of trees, optional
        Trees of the same structure, whose leaves are the ``others`` of ``leaf``.
    row : callable, optional
        ``row(xs)`` gives the results of the children of a node at one stroke, where all are leaves.
        For callers who need no paths, and have neither `is_leaf`, `keys` nor `rest`.

    Returns
    -------
    any
        The result of the root. A node other than a tuple that is reached twice (beside the same
        nodes of `rest`) is folded once, with the path where it was met first, and its result
        stands at both places. One with parameters of JAX below it is folded at each place: they
        are immutable, so that each place of them is a parameter of its own (see `parameters`).

    Raises
    ------
    ValueError
        If the tree contains itself, if a tree in `rest` has other keys somewhere, or if `keys`
        raises it; the message names the path.

    Examples
    --------
    >>> tree = {"a": [1, 2], "b": (3, "x")}
    >>> fold(tree, lambda path, x: 1, lambda path, x, results: sum(results))
    4
    >>> fold(tree, lambda path, x: x, lambda path, x, results: rebuild(x, results)) == tree
    True
    """
    kind = kind_of(tree)
    if kind is None or (is_leaf is not None and is_leaf(tree)):
        return leaf(_ROOT, tree, *rest)
    with_jax = "jax" in sys.modules
    done: dict[tuple[int, ...], tuple[Any, _Frame]] = {}
    open_nodes = {id(tree): (_ROOT, tree)}
    stack = [_Frame(_ROOT, tree, kind, keys, rest, row)]
    while True:
        frame = stack[-1]
        path, by_item, entered, others, results = (
            frame.path, frame.kind.by_item, frame.entered, frame.others, frame.results,
        )  # fmt: skip
        for key, x in frame.items:
            if entered is not None and key not in entered:
                results.append(skipped(x))
                continue
            here = path.step(key, by_item)
            beside = [other[key] for other in others] if others else ()
            kind = kind_of(x)
            if kind is None or (is_leaf is not None and is_leaf(x)):
                results.append(leaf(here, x, *beside))
                if with_jax and is_immutable(x) and isnumeric(x):
                    frame.is_value = True
                continue
            marks = (id(x), *map(id, beside))
            if marks in done:
                results.append(done[marks][0])
                continue
            refuse_cycle(open_nodes, here, x)
            open_nodes[id(x)] = here, x
            stack.append(_Frame(here, x, kind, keys, beside, row))
            break
        else:
            result = node(path, frame.x, results)
            del open_nodes[id(frame.x)]
            stack.pop()
            if not stack:
                return result
            if frame.is_value:
                stack[-1].is_value = True
            elif not frame.kind.is_tuple:
                # The frame keeps its nodes alive: an id is only good so long.
                done[(id(frame.x), *map(id, frame.beside))] = result, frame
            stack[-1].results.append(result)


class _Frame:
    """A node under way in `fold`."""

    __slots__ = ("beside", "entered", "is_value", "items", "kind", "others", "path", "results", "x")

    def __init__(
        self,
        path: KeyPath,
        x: Any,
        kind: Kind,
        keys: Callable[[Any], Container[Any] | None] | None,
        beside: Sequence[Any],
        row: Callable[[list[Any]], list[Any]] | None,
    ) -> None:
        found = kind.children(x)
        self.path, self.x, self.kind, self.beside = path, x, kind, beside
        self.others = [_matching(path, x, found, other) for other in beside]
        self.entered = None if keys is None else _entered(path, x, keys)
        self.items = iter(found.items())
        self.results: list[Any] = []
        self.is_value = False  # whether it holds immutable parameters
        if row is not None and are_leaves(found.values()):
            xs = [*found.values()]
            self.items, self.results = iter(()), row(xs)
            libraries = map(library_of_class, {*map(type, xs)})
            if any(library is not None and library.is_immutable for library in libraries):
                self.is_value = any(is_immutable(x) and isnumeric(x) for x in xs)


def refuse_cycle(open_nodes: dict[int, tuple[KeyPath, Any]], path: KeyPath, x: Any) -> None:
    """Raise if a node is one of those that a walk is in, by id, with their paths."""
    if id(x) in open_nodes:
        raise ValueError(
            f"the tree contains itself: the {type(x).__name__} at {path} is the one at "
            f"{open_nodes[id(x)][0]}; break this reference cycle"
        )


def _entered(path: KeyPath, x: Any, keys: Callable[[Any], Container[Any] | None]) -> Any:
    try:
        return keys(x)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"at {path}: {error}") from error


def _matching(path: KeyPath, x: Any, found: dict[Any, Any], other: Any) -> dict[Any, Any]:
    beside = children(other)
    if beside.keys() != found.keys():
        raise ValueError(
            f"the trees differ at {path}: expected {type(x).__name__} with the keys "
            f"{listed(found)}, got {type(other).__name__} with the keys {listed(beside)}"
        )
    return beside


def fmap(
    f: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Apply a function to every leaf of a tree, and rebuild its nodes around the results.

    Every leaf is handed to `f`, also strings, functions and None. An array that is at several
    places is mapped once, and so is a list, dictionary or object: it stays shared. An array of JAX
    is mapped at each place, where it is a parameter of its own, and so is a node that holds one.

    Parameters
    ----------
    f : callable
        ``f(leaf, *others)``.
    tree : any
        The tree.
    *rest : any
        Trees of the same structure, whose leaves are the ``others`` of `f`.
    is_leaf : callable, optional
        Asked of each node, the root first: true for one that shall be taken as a leaf.

    Returns
    -------
    any
        A new tree of the same classes.

    Raises
    ------
    ValueError
        If the tree contains itself, or if a tree in `rest` has other keys somewhere.

    Examples
    --------
    >>> fmap(lambda x, y: x + y, {"a": [1, 2]}, {"a": [10, 20]})
    {'a': [11, 22]}
    """
    done: dict[Hashable, tuple[Any, Any]] = {}

    def leaf(path: KeyPath, x: Any, *others: Any) -> Any:
        library = library_of(x)
        if library is None or library.is_immutable:
            return f(x, *others)
        marks = (id(x), *map(id, others)) if others else id(x)
        if marks not in done:
            # The arrays are kept too: an id is only good while its object lives.
            done[marks] = f(x, *others), (x, others)
        return done[marks][0]

    def row(xs: list[Any]) -> list[Any]:
        return [leaf(_ROOT, x) for x in xs]

    alone = is_leaf is None and not rest
    return fold(tree, leaf, _rebuild_at, is_leaf=is_leaf, rest=rest, row=row if alone else None)


def _rebuild_at(path: KeyPath, x: Any, results: list[Any]) -> Any:
    return rebuild(x, results)


# Addresses ------------------------------------------------------------------------------------


def child_path(path: KeyPath, node: object, key: Hashable) -> KeyPath:
    """Return the path of the child of `node` under `key`, where `node` lies at `path`."""
    kind = kind_of(node)
    return path.step(key, kind is not None and kind.by_item)


def getkeypath(tree: Any, kp: Iterable[Any]) -> Any:
    """Return the node or leaf at a path of a tree.

    Parameters
    ----------
    tree : any
        A model or a state tree.
    kp : KeyPath or iterable of keys
        The path; the empty one is that of the tree itself.

    Raises
    ------
    KeyError
        If there is no such path; the message says how far it led and what keys are there.

    Examples
    --------
    >>> getkeypath({"layers": [1.0, 2.0]}, KeyPath("layers", 1))
    2.0
    """
    path, x = _ROOT, tree
    for key in kp:
        path, x = child_path(path, x, key), _get(path, x, key)
    return x


def _get(path: KeyPath, x: Any, key: Any) -> Any:
    found = x if type(x) is dict else children(x)
    if key in found:
        return found[key]
    there = f"the keys there are {listed(found)}" if is_node(x) else "which has no children"
    raise KeyError(f"no {key!r} at {path}: found {type(x).__name__}, {there}")


def haskeypath(tree: Any, kp: Iterable[Any]) -> bool:
    """Whether a tree has something at a path.

    Examples
    --------
    >>> haskeypath({"a": [1.0]}, ("a", 0)), haskeypath({"a": [1.0]}, ("a", 1))
    (True, False)
    """
    try:
        getkeypath(tree, kp)
    except KeyError:
        return False
    return True


def setkeypath_(tree: Any, kp: Iterable[Any], value: Any) -> None:
    """Replace the node or leaf at a path of a tree, in place.

    Parameters
    ----------
    tree : any
        A model or a state tree.
    kp : KeyPath or iterable of keys
        The path, at which there must be something already.
    value : any
        The new node or leaf.

    Raises
    ------
    KeyError
        If there is no such path; the message says how far it led and what keys are there.
    TypeError
        If the path is empty, or what holds its end is immutable.

    Examples
    --------
    >>> tree = {"a": [1.0]}
    >>> setkeypath_(tree, ("a", 0), 2.0)
    >>> tree
    {'a': [2.0]}
    """
    keys = list(kp)
    if not keys:
        raise TypeError("the empty path is the tree itself, which cannot be replaced in place")
    *way, last = keys
    path, x = _ROOT, tree
    for key in way:
        path, x = child_path(path, x, key), _get(path, x, key)
    _get(path, x, last)
    try:
        if isinstance(x, (dict, list)):
            cast(Any, x)[last] = value
            return
        if isinstance(last, str) and hasattr(x, last) and not isinstance(x, tuple):
            setattr(x, last, value)
            return
    except (AttributeError, TypeError) as error:
        raise TypeError(_IMMUTABLE.format(at=path, what=type(x).__name__, key=last)) from error
    raise TypeError(_IMMUTABLE.format(at=path, what=type(x).__name__, key=last))


_IMMUTABLE = (
    "cannot set {key!r} at {at}: {what} is immutable; set a new {what} one level up "
    "(`setkeypath_` with the path but its last key), or make a new tree with `fmap`"
)
