"""Nodes: what a class is, how to take its objects apart, and how to put them together again.

This file has more than 600 lines, since each way to be a node is said here, and nowhere else.
A *node* has children, each under a key; everything else is a *leaf*. What a class is, is decided
by the first of these that knows it:

a) built-in containers: ``dict``, ``list``, ``tuple``, named tuples, ``types.SimpleNamespace``;
b) arrays, numbers and strings, which are always leaves;
c) `functor` and `register_node`, for the nearest class in the method resolution order;
d) a JAX or optree (global namespace) registration, where that library is loaded;
e) dataclasses, each field a child.

All here looks one level down and no further. Which children train, `trainable` says.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeVar, cast, overload

import numpy as np

from .._arrays.library import library_of_class
from .._messages.text import short

__all__ = [
    "Kind",
    "Namespace",
    "carries",
    "children",
    "functor",
    "is_node",
    "kind_of",
    "listed",
    "mirror",
    "rebuild",
    "register_leaf",
    "register_node",
    "trainable",
    "trainable_keys",
]

Class = TypeVar("Class", bound=type)


# What a class is ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """The functions that take nodes of one class apart and put them together again."""

    children: Callable[[Any], dict[Any, Any]]
    rebuild: Callable[[Any, Sequence[Any]], Any]
    by_item: bool = False
    """Whether children are reached as ``node[key]`` under any key: shapes the text of paths."""
    is_object: bool = True
    """Whether the state of such a node is a namespace rather than a node of the same class."""
    is_tuple: bool = False
    """A tuple has no identity of its own, so the same one at two places is not shared."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Registration:
    kind: Kind | None
    trainable: frozenset[str] | None = None


_LEAVES = (
    np.generic, bool, int, float, complex, str, bytes, type(None), type(Ellipsis),
    type, FunctionType, BuiltinFunctionType, ModuleType,
)  # fmt: skip
_registered: dict[type, _Registration] = {}
# Node types that stay for good, and those that hold until JAX or optree register the class.
_known: dict[type, Kind | None] = {}
_presumed: dict[type, Kind | None] = {}


def kind_of(x: object) -> Kind | None:
    """Return the node type of the class of `x`; None for a leaf."""
    try:
        return _known[type(x)]
    except KeyError:
        return _find_kind(type(x), x)


def are_leaves(xs: Iterable[object]) -> bool:
    """Tell whether all are leaves, of classes that can never be nodes."""
    return all(_known.get(cls, cls) is None for cls in {*map(type, xs)})


def _find_kind(cls: type, x: object) -> Kind | None:
    if cls not in _presumed:
        if _decide(cls):
            return _known[cls]
        is_dataclass = hasattr(cls, "__dataclass_fields__")
        _presumed[cls] = _dataclass_kind(cls) if is_dataclass else None
    # One can register with JAX and optree at any time, but take back only from optree.
    if _is_jax_node(x):
        _known[cls] = kind = _jax_kind(cls)
        return kind
    return _optree_kind(cls) if _is_optree_node(x) else _presumed[cls]


def _decide(cls: type) -> bool:
    """Note the node type of `cls` if no foreign registry can change it."""
    if issubclass(cls, (dict, list, tuple, SimpleNamespace)):
        _known[cls] = _container_kind(cls)
    elif issubclass(cls, _LEAVES) or library_of_class(cls) is not None:
        _known[cls] = None
    elif (registration := _registration(cls)) is not None:
        _known[cls] = registration.kind
    elif (kind := _autograd_kind(cls)) is not None:
        _known[cls] = kind
    else:
        return False
    return True


def _registration(cls: type) -> _Registration | None:
    return next((_registered[base] for base in cls.__mro__ if base in _registered), None)


class Namespace(SimpleNamespace):
    """The node of a state tree that belongs to an object.

    A class of its own since JAX and optree are told that it is a node, which is not for us to say
    of `SimpleNamespace`.
    """

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, "namespace", 1)


def _container_kind(cls: type) -> Kind:
    if issubclass(cls, dict):
        return Kind(dict, _rebuild_dict, by_item=True, is_object=False)
    if issubclass(cls, list):
        return Kind(_enumerated, _rebuild_list, is_object=False)
    if cls is SimpleNamespace or cls is Namespace:
        return Kind(lambda node: dict(vars(node)), _rebuild_namespace, is_object=False)
    if issubclass(cls, SimpleNamespace):
        return Kind(_attributes, _rebuild_object(_attributes, SimpleNamespace.__new__))
    if hasattr(cls, "_fields"):
        return Kind(_named, _rebuild_tuple, is_object=False, is_tuple=True)
    return Kind(_enumerated, _rebuild_tuple, is_object=False, is_tuple=True)


def _enumerated(node: Iterable[Any]) -> dict[Any, Any]:
    return dict(enumerate(node))


def _named(node: Any) -> dict[Any, Any]:
    return dict(zip(node._fields, node, strict=True))


def _attributes(node: object) -> dict[str, Any]:
    """Instance attributes, those in slots last; a ``cached_property`` is no attribute."""
    state: Any = object.__getstate__(node)
    found: dict[str, Any] = {}
    for part in state if type(state) is tuple else (state,):
        found.update(part or ())
    for name in _recomputed(type(node)):
        found.pop(name, None)
    return found


def _find_recomputed(cls: type) -> list[str]:
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        members.update(vars(base))
    return [n for n, member in members.items() if isinstance(member, functools.cached_property)]


_recomputed: Callable[[type], list[str]] = functools.lru_cache(maxsize=4096)(_find_recomputed)


def _copy_attributes(node: Any, new: Any) -> None:
    """Copy the attributes of a subclass of a built-in container."""
    own = getattr(node, "__dict__", None)
    if own is node:  # dictionaries whose items are their attributes do ``self.__dict__ = self``
        new.__dict__ = new
    elif own is not None or getattr(type(node), "__slots__", None):
        for name, value in _attributes(node).items():
            object.__setattr__(new, name, value)


def _rebuild_dict(node: dict[Any, Any], values: Sequence[Any]) -> dict[Any, Any]:
    cls = type(node)
    if cls is dict:
        return dict(zip(node, values, strict=True))
    # A subclass may forbid or reinterpret writing; an OrderedDict has to note its order.
    base: Any = collections.OrderedDict if issubclass(cls, collections.OrderedDict) else dict
    new = dict.__new__(cls)
    if isinstance(node, collections.defaultdict):
        cast(Any, new).default_factory = node.default_factory
    for key, value in zip(dict(node), values, strict=True):
        base.__setitem__(new, key, value)
    _copy_attributes(node, new)
    return new


def _expect(n: int, values: Sequence[Any]) -> None:
    if len(values) != n:
        raise ValueError(f"expected {n} children, got {len(values)}")


def _rebuild_list(node: list[Any], values: Sequence[Any]) -> list[Any]:
    _expect(len(node), values)
    if type(node) is list:
        return list(values)
    new = list.__new__(type(node))
    list.extend(new, values)
    _copy_attributes(node, new)
    return new


def _rebuild_tuple(node: tuple[Any, ...], values: Sequence[Any]) -> tuple[Any, ...]:
    _expect(len(node), values)
    cls = type(node)
    if cls is tuple:
        return tuple(values)
    if hasattr(cls, "n_sequence_fields"):  # struct sequences, such as ``torch.return_types.max``
        unnamed = cast(Any, node.__reduce__()[1])[1:]
        return cast("tuple[Any, ...]", cast(Any, cls)(values, *unnamed))
    new = tuple.__new__(cls, values)
    _copy_attributes(node, new)
    return new


def _rebuild_namespace(node: SimpleNamespace, values: Sequence[Any]) -> SimpleNamespace:
    return type(node)(**dict(zip(vars(node), values, strict=True)))


def _rebuild_object(
    names: Callable[[Any], Iterable[str]], make: Callable[[type], Any] = object.__new__
) -> Callable[[Any, Sequence[Any]], Any]:
    def rebuild_object(node: Any, values: Sequence[Any]) -> Any:
        new = make(type(node))
        attributes = _attributes(node)
        attributes.update(zip(names(node), values, strict=True))
        for name, value in attributes.items():
            object.__setattr__(new, name, value)
        return new

    return rebuild_object


def _dataclass_kind(cls: Any) -> Kind:
    names = [field.name for field in dataclasses.fields(cls)]

    # A field without a default that `__init__` does not set may be missing.
    def fields(node: Any) -> dict[str, Any]:
        return {name: getattr(node, name) for name in names if hasattr(node, name)}

    return Kind(fields, _rebuild_object(fields))


def _is_jax_node(x: object) -> bool:
    tree_util = sys.modules.get("jax.tree_util")
    return tree_util is not None and not tree_util.all_leaves((x,))


def _jax_kind(cls: type) -> Kind:
    tree_util: Any = sys.modules["jax.tree_util"]

    def flatten(node: object) -> tuple[list[tuple[Any, Any]], Any]:
        is_child = iter((False,))  # called first for the node; all below it, None too, are leaves
        pairs, treedef = tree_util.tree_flatten_with_path(
            node, is_leaf=lambda _: next(is_child, True)
        )
        return pairs, treedef

    def children_of(node: object) -> dict[Any, Any]:
        pairs, _ = flatten(node)
        return _keyed([path[0] for path, _ in pairs], [child for _, child in pairs])

    def rebuild_as(node: object, values: Sequence[Any]) -> Any:
        return tree_util.tree_unflatten(flatten(node)[1], values)

    return Kind(children_of, rebuild_as, by_item=issubclass(cls, Mapping))


def _is_optree_node(x: object) -> bool:
    optree = sys.modules.get("optree")
    return optree is not None and not optree.tree_is_leaf(x, none_is_leaf=True)


def _optree_kind(cls: type) -> Kind:
    optree: Any = sys.modules["optree"]

    def children_of(node: object) -> dict[Any, Any]:
        flat = optree.tree_flatten_one_level(node, none_is_leaf=True)
        return _keyed(flat.entries, flat.children)

    def rebuild_as(node: object, values: Sequence[Any]) -> Any:
        flat = optree.tree_flatten_one_level(node, none_is_leaf=True)
        return flat.unflatten_func(flat.metadata, values)

    return Kind(children_of, rebuild_as, by_item=issubclass(cls, Mapping))


def _keyed(entries: Sequence[Any], values: Sequence[Any]) -> dict[Any, Any]:
    """Put children under the keys of a registry, or under positions where those do not differ."""
    keys = [
        next((getattr(e, a) for a in ("name", "key", "idx") if hasattr(e, a)), e) for e in entries
    ]
    found = dict(zip(keys, values, strict=True))
    return found if len(found) == len(values) else _enumerated(values)


def _autograd_kind(cls: type) -> Kind | None:
    """HIPS autograd hands over a box for a dictionary, list or tuple, whose items are boxes."""
    builtins = sys.modules.get("autograd.builtins")
    if builtins is None or not issubclass(cls, (builtins.DictBox, builtins.SequenceBox)):
        return None
    return Kind(
        lambda box: {key: box[key] for key in children(box._value)},
        lambda box, values: rebuild(box._value, values),
        by_item=issubclass(cls, builtins.DictBox),
        is_object=False,
    )


# Registering classes --------------------------------------------------------------------------


@overload
def functor(cls: Class, /) -> Class: ...
@overload
def functor(
    *, children: Iterable[str] | None = None, trainable: Iterable[str] | None = None
) -> Callable[[Class], Class]: ...
def functor(
    cls: Any = None,
    /,
    *,
    children: Iterable[str] | None = None,
    trainable: Iterable[str] | None = None,
) -> Any:
    """Make a class a node of trees; used as ``@functor`` or ``@functor(children=..., ...)``.

    Subclasses are nodes in the same way, unless they are decorated themselves. A new object is
    made without running ``__init__``: what is no child is carried over as it is.

    Parameters
    ----------
    children : iterable of str, optional
        The attributes that are children; by default all an instance has, in order of assignment.
    trainable : iterable of str, optional
        The children whose arrays train; by default all. See also `trainable`.

    Examples
    --------
    >>> from optimisers import fmap
    >>> @functor(children=("a", "c"), trainable=("a",))
    ... class Affine:
    ...     def __init__(self, a, c, name):
    ...         self.a, self.c, self.name = a, c, name
    >>> doubled = fmap(lambda x: 2 * x, Affine(1.0, 2.0, "double"))
    >>> doubled.a, doubled.c, doubled.name
    (2.0, 4.0, 'double')
    """
    if cls is None:
        return functools.partial(_register, children=children, trainable=trainable)
    return _register(cls)


def register_node(
    cls: type,
    children: Iterable[str] | None = None,
    trainable: Iterable[str] | None = None,
    *,
    flatten: Callable[[Any], Mapping[str, Any]] | None = None,
    unflatten: Callable[[Any, dict[str, Any]], Any] | None = None,
) -> None:
    """Make a class of another library a node of trees, with its subclasses.

    Parameters
    ----------
    cls : type
        The class. Built-in containers and arrays are what they are: a `TypeError`.
    children, trainable : iterable of str, optional
        As in `functor`.
    flatten : callable, optional
        ``flatten(node)`` gives the children by name, for a class whose children are not
        attributes; together with `unflatten`, in place of `children`.
    unflatten : callable, optional
        ``unflatten(node, children)`` makes a node like ``node`` with new children.

    Examples
    --------
    >>> from optimisers import fmap
    >>> class Pair:
    ...     def __init__(self, both):
    ...         self.both = both
    >>> register_node(
    ...     Pair,
    ...     flatten=lambda pair: {"left": pair.both[0], "right": pair.both[1]},
    ...     unflatten=lambda pair, new: Pair((new["left"], new["right"])),
    ... )
    >>> fmap(lambda x: 2 * x, Pair((1.0, 2.0))).both
    (2.0, 4.0)
    """
    if (flatten is None) != (unflatten is None) or (flatten is not None and children is not None):
        raise TypeError(
            "register_node takes either `children`, the names of attributes, "
            "or both of `flatten` and `unflatten`"
        )
    kind = None
    if flatten is not None and unflatten is not None:
        kind = _callable_kind(flatten, unflatten)
    _register(cls, children=children, trainable=trainable, kind=kind)


def register_leaf(cls: Class) -> Class:
    """Make a class a leaf even where it is a dataclass, or a node for JAX or optree."""
    _register_kind(cls, _Registration(None))
    return cls


def _register(
    cls: Any,
    children: Iterable[str] | None = None,
    trainable: Iterable[str] | None = None,
    kind: Kind | None = None,
) -> Any:
    if not isinstance(cls, type):
        raise TypeError(
            f"expected a class, got {short(cls)}; use @functor(children=..., trainable=...)"
        )
    if issubclass(cls, (dict, list, tuple, SimpleNamespace, *_LEAVES)) or library_of_class(cls):
        raise TypeError(
            f"{cls.__name__} is a built-in container, an array or a number: what those are "
            "cannot be changed; wrap it in a class of your own"
        )
    names = _names(children, "children")
    trained = _names(trainable, "trainable")
    if names is not None and trained is not None and not set(trained) <= set(names):
        raise ValueError(
            f"{cls.__name__}: trainable names {listed(set(trained) - set(names))}, which "
            f"`children` does not: {listed(names)}"
        )
    if kind is None:
        kind = _attribute_kind(names)
    _register_kind(cls, _Registration(kind, None if trained is None else frozenset(trained)))
    return cls


def _register_kind(cls: type, registration: _Registration) -> None:
    _registered[cls] = registration
    _known.clear()  # of subclasses, too
    _presumed.clear()


def _attribute_kind(names: tuple[str, ...] | None) -> Kind:
    if names is None:
        return Kind(_attributes, _rebuild_object(_attributes))
    return Kind(
        lambda node: {name: getattr(node, name) for name in names},
        _rebuild_object(lambda node: names),
    )


def _callable_kind(
    flatten: Callable[[Any], Mapping[str, Any]], unflatten: Callable[[Any, dict[str, Any]], Any]
) -> Kind:
    return Kind(
        lambda node: dict(flatten(node)),
        lambda node, values: unflatten(node, dict(zip(flatten(node), values, strict=True))),
    )


def _names(names: Iterable[str] | None, what: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"{what} is an iterable of names: write ({names!r},), not {names!r}")
    return tuple(names)


def listed(keys: Iterable[Any]) -> str:
    """Return keys as text for a message, the first few of very many."""
    shown = [repr(key) for key in keys]
    return ", ".join(shown[:20] + ["..."] * (len(shown) > 20)) or "none"


@functools.singledispatch
def trainable(x: Any) -> Any:
    """Return the children of `x` that train, by key: those `functor` was told, else all.

    Open to registration by class. A registered function returns a dictionary of children, or
    their names.

    Examples
    --------
    >>> class Affine(SimpleNamespace): ...
    >>> @trainable.register(Affine)
    ... def _(x):
    ...     return {"a": x.a}
    >>> trainable(Affine(a=1.0, c=2.0)), trainable([3.0])
    ({'a': 1.0}, {0: 3.0})
    """
    found = children(x)
    names = _trainable_by_default(x)
    return found if names is None else {key: found[key] for key in found if key in names}


_trainable_default = trainable.dispatch(object)


def trainable_keys(x: object) -> frozenset[Any] | None:
    """Return the keys of the children of `x` that train, as `trainable` says; None is all.

    Raises
    ------
    ValueError
        If a name is that of no child.
    """
    answer = trainable.dispatch(type(x))
    if answer is _trainable_default:
        return _trainable_by_default(x)
    said = answer(x)
    if isinstance(said, str) or not isinstance(said, Iterable):
        raise TypeError(
            f"trainable({type(x).__name__}) returned {said!r}; "
            "return a dictionary of children or a tuple of their names, () for none"
        )
    return _checked(x, frozenset(said))


def _trainable_by_default(x: object) -> frozenset[Any] | None:
    cls = type(x)
    if cls is dict or cls is list or cls is tuple:
        return None
    registration = _registration(cls)
    if registration is None or registration.trainable is None:
        return None
    return _checked(x, registration.trainable)


def _checked(x: object, names: frozenset[Any]) -> frozenset[Any]:
    found = children(x)
    if unknown := names.difference(found):
        raise ValueError(
            f"trainable({type(x).__name__}) names {listed(unknown)}, which is no child; "
            f"the children are {listed(found)}"
        )
    return names


# One level ------------------------------------------------------------------------------------


def is_node(x: object) -> bool:
    """Whether `x` is a node of a tree; everything else is a leaf."""
    return kind_of(x) is not None


def children(node: Any) -> dict[Any, Any]:
    """Return the children of `node` by key, in order of insertion or declaration.

    Keys are those of a dictionary, positions in a list or tuple, and names of attributes. A leaf
    has no children: ``{}``.

    Examples
    --------
    >>> children([1.0, {"a": 2.0}])
    {0: 1.0, 1: {'a': 2.0}}
    """
    kind = kind_of(node)
    return {} if kind is None else kind.children(node)


def carries(node: object, name: object) -> bool:
    """Tell whether `node` has an attribute of this name, not a method, that may be no child."""
    kind = kind_of(node)
    if kind is None or not isinstance(name, str):
        return False
    if name in _attributes(node):
        return True
    found = inspect.getattr_static(type(node), name, None) if kind.is_object else None
    is_method = callable(found) or isinstance(found, staticmethod | classmethod)
    return found is not None and not is_method and not name.startswith("__")


def rebuild(node: Any, values: Sequence[Any]) -> Any:
    """Make a node like `node` with other children, in the order of ``children(node)``.

    Neither ``__init__`` nor ``__post_init__`` runs.
    """
    kind = kind_of(node)
    if kind is None:
        raise TypeError(f"{type(node).__name__} is no node; `functor` makes a class one")
    return kind.rebuild(node, values)


def mirror(node: Any, values: Sequence[Any]) -> Any:
    """Make the node of a state tree that belongs to `node`, with `values` as its children.

    A built-in container gives the same class; an object gives a namespace with the names of its
    children, or a tuple where they have no names.
    """
    kind = kind_of(node)
    if kind is None or not kind.is_object:
        return rebuild(node, values)
    names = list(kind.children(node))
    if all(isinstance(name, str) for name in names):
        return Namespace(**dict(zip(names, values, strict=True)))
    return tuple(values)
