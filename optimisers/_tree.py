"""Trees of parameters: what is a node, what is a leaf, and how to walk from one to the other.

A *node* has children, each under a key; everything else is a *leaf*. What a class is, is decided
by the first of these that knows it:

a) built-in containers: ``dict``, ``list``, ``tuple``, named tuples, ``types.SimpleNamespace``;
b) arrays, numbers and strings, which are always leaves;
c) `functor` and `register_node`, for the nearest class in the method resolution order;
d) a JAX or optree (global namespace) registration, where that library is loaded;
e) dataclasses, each field a child.

Nothing here recurses: trees may be deeper than Python's stack. `walk` yields every leaf with its
path; `fold` is the one post-order pass from which `fmap`, ``setup`` and ``destructure`` are made:

    fold(tree, leaf, node, is_leaf=None, keys=None, skipped=identity, rest=())

    leaf(path, x, *others) -> result       of a leaf, beside those of the trees in ``rest``
    node(path, x, results) -> result       of a node; ``results`` in the order of ``children(x)``
    keys(x) -> the keys to enter or None   a child under another key gives ``skipped(child)``

The only questions about arrays asked here are `isnumeric` and `maywrite`. No array library but
NumPy is imported: a foreign array can only be met once its library is loaded.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeVar, cast, final, overload

import numpy as np

__all__ = [
    "KeyPath",
    "children",
    "fmap",
    "fold",
    "functor",
    "getkeypath",
    "haskeypath",
    "is_node",
    "isnumeric",
    "maywrite",
    "mirror",
    "rebuild",
    "register_leaf",
    "register_node",
    "setkeypath_",
    "trainable",
    "trainable_keys",
    "walk",
]

Class = TypeVar("Class", bound=type)


# Arrays ---------------------------------------------------------------------------------------


def isnumeric(x: object) -> bool:
    """Whether `x` is an array of real or complex floating numbers, of any dimension, 0 included.

    These arrays are the parameters of a model: NumPy arrays (also of ``ml_dtypes`` floats such as
    ``bfloat16``), PyTorch tensors, JAX arrays and tracers, CuPy and Numba device arrays, boxes of
    HIPS autograd. Python and NumPy scalars, and arrays of integers or booleans, are not.

    Examples
    --------
    >>> isnumeric(np.ones(3)), isnumeric(np.array(1j)), isnumeric(np.arange(3)), isnumeric(1.0)
    (True, True, False, False)
    """
    dtype: Any
    if type(x) is np.ndarray:  # quick, since asked of every leaf
        dtype = x.dtype
    elif (library := _library(type(x))) is None:
        return False
    else:
        if library == "autograd":  # a box is what it holds, which may be a plain number
            return isnumeric(cast(Any, x)._value)
        dtype = getattr(x, "dtype", None)
        if library == "torch":
            return bool(dtype.is_floating_point or dtype.is_complex)
    kind = getattr(dtype, "kind", "")
    return kind in _FLOATING or (kind == "V" and _is_named_float(dtype))


def maywrite(x: object) -> bool:
    """Whether the elements of the array `x` may be written in place, each on its own.

    False for what is no array, for read-only and immutable arrays (JAX, traced ones), and for
    arrays that store one element at several places, as a broadcast view does.

    Examples
    --------
    >>> maywrite(np.ones(3)), maywrite(np.broadcast_to(1.0, 3)), maywrite(1.0)
    (True, False, False)
    """
    library = "numpy" if type(x) is np.ndarray else _library(type(x))
    array = cast(Any, x)
    if library == "numpy":
        flags = array.flags
        if flags.c_contiguous or not flags.writeable:
            return bool(flags.writeable)
        return not _overlaps(array.shape, array.strides, array.itemsize)
    if library == "torch":
        is_strided = array.layout is sys.modules["torch"].strided
        return not (is_strided and _overlaps(array.shape, array.stride(), 1))
    if library in ("cupy", "numba"):
        return not _overlaps(array.shape, array.strides, array.dtype.itemsize)
    return False


_FLOATING = frozenset("fc")


@functools.lru_cache(maxsize=256)
def _is_named_float(dtype: object) -> bool:
    """Whether an extension dtype is a float: those of ``ml_dtypes`` are of NumPy's kind "V"."""
    return getattr(dtype, "name", "").startswith(("float", "bfloat"))


def _find_library(cls: type) -> str | None:
    """Name the library whose arrays `cls` belongs to; an instance proves that it is loaded."""
    if issubclass(cls, np.ndarray):
        return "numpy"
    for library, module, name in (
        ("torch", "torch", "Tensor"),
        ("jax", "jax", "Array"),
        ("jax", "jax.core", "Tracer"),
        ("cupy", "cupy", "ndarray"),
        ("autograd", "autograd.numpy.numpy_boxes", "ArrayBox"),
    ):
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type) and issubclass(cls, base):
            return library
    # By name, since numba and numba-cuda keep these classes in different modules.
    for base in cls.__mro__:
        if base.__name__ in ("DeviceNDArrayBase", "FakeCUDAArray") and "numba" in base.__module__:
            return "numba"
    return None


_library: Callable[[type], str | None] = functools.lru_cache(maxsize=4096)(_find_library)


def _overlaps(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether two elements may share memory: each stride must pass all that lies below it."""
    if 0 in shape:
        return False
    reach = itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


# Paths ----------------------------------------------------------------------------------------


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

    >>> [str(path) for path, leaf in walk({"layers": [1.0, 2.0]})]
    ["['layers'][0]", "['layers'][1]"]
    """

    # A path is its parent and one key more, so that the paths of a whole tree cost little.
    __slots__ = ("_is_item", "_key", "_parent")

    _parent: KeyPath | None
    _key: Any
    _is_item: bool

    def __new__(cls, *keys: Hashable) -> KeyPath:
        return _extend(_ROOT, ((key, False) for key in keys))

    def child(self, node: object, key: Hashable) -> KeyPath:
        """Return the path of the child of `node` under `key`, where `node` lies at this path."""
        kind = _kind(node)
        return _step(self, key, kind is not None and kind.by_item)

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
                text += f"[{key!r}]"
            else:
                text += f".{key}" if text else key
        return text or "(root)"


_new_object = object.__new__


def _step(parent: KeyPath | None, key: Any, is_item: bool) -> KeyPath:
    path = _new_object(KeyPath)
    path._parent = parent
    path._key = key
    path._is_item = is_item
    return path


def _extend(path: KeyPath, steps: Iterable[tuple[Any, bool]]) -> KeyPath:
    for key, is_item in steps:
        path = _step(path, key, is_item)
    return path


def _from_steps(steps: list[tuple[Any, bool]]) -> KeyPath:
    return _extend(_ROOT, steps)


_ROOT = _step(None, None, False)


# What a class is ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """How to take the nodes of one class apart and to put them together again."""

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
    kind: _Kind | None
    trainable: frozenset[str] | None = None


_LEAVES = (
    np.generic, bool, int, float, complex, str, bytes, type(None), type(Ellipsis),
    type, FunctionType, BuiltinFunctionType, ModuleType,
)  # fmt: skip
_registered: dict[type, _Registration] = {}
# What a class is for good, and what it is until JAX or optree are told otherwise.
_known: dict[type, _Kind | None] = {}
_presumed: dict[type, _Kind | None] = {}


def _kind(x: object) -> _Kind | None:
    try:
        return _known[type(x)]
    except KeyError:
        return _find_kind(type(x), x)


def _find_kind(cls: type, x: object) -> _Kind | None:
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
    """Note what `cls` is if no foreign registry can change it."""
    if issubclass(cls, (dict, list, tuple, SimpleNamespace)):
        _known[cls] = _container_kind(cls)
    elif issubclass(cls, _LEAVES) or _library(cls) is not None:
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


def _container_kind(cls: type) -> _Kind:
    if issubclass(cls, dict):
        return _Kind(dict, _rebuild_dict, by_item=True, is_object=False)
    if issubclass(cls, list):
        return _Kind(_enumerated, _rebuild_list, is_object=False)
    if cls is SimpleNamespace or cls is Namespace:
        return _Kind(lambda node: dict(vars(node)), _rebuild_namespace, is_object=False)
    if issubclass(cls, SimpleNamespace):
        return _Kind(_attributes, _rebuild_object(_attributes, SimpleNamespace.__new__))
    if hasattr(cls, "_fields"):
        return _Kind(_named, _rebuild_tuple, is_object=False, is_tuple=True)
    return _Kind(_enumerated, _rebuild_tuple, is_object=False, is_tuple=True)


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
    """Copy what a subclass of a built-in container holds beside its items."""
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


def _dataclass_kind(cls: Any) -> _Kind:
    names = [field.name for field in dataclasses.fields(cls)]

    # A field without a default that `__init__` does not set may be missing.
    def fields(node: Any) -> dict[str, Any]:
        return {name: getattr(node, name) for name in names if hasattr(node, name)}

    return _Kind(fields, _rebuild_object(fields))


def _is_jax_node(x: object) -> bool:
    tree_util = sys.modules.get("jax.tree_util")
    return tree_util is not None and not tree_util.all_leaves((x,))


def _jax_kind(cls: type) -> _Kind:
    tree_util: Any = sys.modules["jax.tree_util"]

    def flatten(node: object) -> tuple[list[tuple[Any, Any]], Any]:
        is_child = iter((False,))  # asked first for the node; all below it, None too, are leaves
        pairs, treedef = tree_util.tree_flatten_with_path(
            node, is_leaf=lambda _: next(is_child, True)
        )
        return pairs, treedef

    def children_of(node: object) -> dict[Any, Any]:
        pairs, _ = flatten(node)
        return _keyed([path[0] for path, _ in pairs], [child for _, child in pairs])

    def rebuild_as(node: object, values: Sequence[Any]) -> Any:
        return tree_util.tree_unflatten(flatten(node)[1], values)

    return _Kind(children_of, rebuild_as, by_item=issubclass(cls, Mapping))


def _is_optree_node(x: object) -> bool:
    optree = sys.modules.get("optree")
    return optree is not None and not optree.tree_is_leaf(x, none_is_leaf=True)


def _optree_kind(cls: type) -> _Kind:
    optree: Any = sys.modules["optree"]

    def children_of(node: object) -> dict[Any, Any]:
        flat = optree.tree_flatten_one_level(node, none_is_leaf=True)
        return _keyed(flat.entries, flat.children)

    def rebuild_as(node: object, values: Sequence[Any]) -> Any:
        flat = optree.tree_flatten_one_level(node, none_is_leaf=True)
        return flat.unflatten_func(flat.metadata, values)

    return _Kind(children_of, rebuild_as, by_item=issubclass(cls, Mapping))


def _keyed(entries: Sequence[Any], values: Sequence[Any]) -> dict[Any, Any]:
    """Put children under the keys of a registry, or under positions where those do not differ."""
    keys = [
        next((getattr(e, a) for a in ("name", "key", "idx") if hasattr(e, a)), e) for e in entries
    ]
    found = dict(zip(keys, values, strict=True))
    return found if len(found) == len(values) else _enumerated(values)


def _autograd_kind(cls: type) -> _Kind | None:
    """HIPS autograd hands over a box for a dictionary, list or tuple, whose items are boxes."""
    builtins = sys.modules.get("autograd.builtins")
    if builtins is None or not issubclass(cls, (builtins.DictBox, builtins.SequenceBox)):
        return None
    return _Kind(
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
    """Make a class that one cannot decorate a node of trees, with its subclasses.

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
    kind: _Kind | None = None,
) -> Any:
    if not isinstance(cls, type):
        raise TypeError(f"expected a class, got {cls!r}; use @functor(children=..., trainable=...)")
    if issubclass(cls, (dict, list, tuple, SimpleNamespace, *_LEAVES)) or _library(cls):
        raise TypeError(
            f"{cls.__name__} is a built-in container, an array or a number: what those are "
            "cannot be changed; wrap it in a class of your own"
        )
    names = _names(children, "children")
    trained = _names(trainable, "trainable")
    if names is not None and trained is not None and not set(trained) <= set(names):
        raise ValueError(
            f"{cls.__name__}: trainable names {_listed(set(trained) - set(names))}, which "
            f"`children` does not: {_listed(names)}"
        )
    if kind is None:
        kind = _attribute_kind(names)
    _register_kind(cls, _Registration(kind, None if trained is None else frozenset(trained)))
    return cls


def _register_kind(cls: type, registration: _Registration) -> None:
    _registered[cls] = registration
    _known.clear()  # of subclasses, too
    _presumed.clear()


def _attribute_kind(names: tuple[str, ...] | None) -> _Kind:
    if names is None:
        return _Kind(_attributes, _rebuild_object(_attributes))
    return _Kind(
        lambda node: {name: getattr(node, name) for name in names},
        _rebuild_object(lambda node: names),
    )


def _callable_kind(
    flatten: Callable[[Any], Mapping[str, Any]], unflatten: Callable[[Any, dict[str, Any]], Any]
) -> _Kind:
    return _Kind(
        lambda node: dict(flatten(node)),
        lambda node, values: unflatten(node, dict(zip(flatten(node), values, strict=True))),
    )


def _names(names: Iterable[str] | None, what: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"{what} is an iterable of names: write ({names!r},), not {names!r}")
    return tuple(names)


def _listed(keys: Iterable[Any]) -> str:
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
            f"trainable({type(x).__name__}) names {_listed(unknown)}, which is no child; "
            f"the children are {_listed(found)}"
        )
    return names


# One level ------------------------------------------------------------------------------------


def is_node(x: object) -> bool:
    """Whether `x` is a node of a tree; everything else is a leaf."""
    return _kind(x) is not None


def children(node: Any) -> dict[Any, Any]:
    """Return the children of `node` by key, in order of insertion or declaration.

    Keys are those of a dictionary, positions in a list or tuple, and names of attributes. A leaf
    has no children: ``{}``.

    Examples
    --------
    >>> children([1.0, {"a": 2.0}])
    {0: 1.0, 1: {'a': 2.0}}
    """
    kind = _kind(node)
    return {} if kind is None else kind.children(node)


def rebuild(node: Any, values: Sequence[Any]) -> Any:
    """Make a node like `node` with other children, in the order of ``children(node)``.

    Neither ``__init__`` nor ``__post_init__`` runs.
    """
    kind = _kind(node)
    if kind is None:
        raise TypeError(f"{type(node).__name__} is no node; `functor` makes a class one")
    return kind.rebuild(node, values)


def mirror(node: Any, values: Sequence[Any]) -> Any:
    """Make the node of a state tree that belongs to `node`, with `values` as its children.

    A built-in container gives the same class; an object gives a namespace with the names of its
    children, or a tuple where they have no names.
    """
    kind = _kind(node)
    if kind is None or not kind.is_object:
        return rebuild(node, values)
    names = list(kind.children(node))
    if all(isinstance(name, str) for name in names):
        return Namespace(**dict(zip(names, values, strict=True)))
    return tuple(values)


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
    kind = _kind(tree)
    if kind is None or (is_leaf is not None and is_leaf(tree)):
        yield _ROOT, tree
        return
    open_nodes = {id(tree): (_ROOT, tree)}
    stack = [(_ROOT, tree, kind.by_item, iter(kind.children(tree).items()))]
    while stack:
        path, node, by_item, items = stack[-1]
        for key, x in items:
            here = _step(path, key, by_item)
            kind = _kind(x)
            if kind is None or (is_leaf is not None and is_leaf(x)):
                yield here, x
                continue
            _refuse_cycle(open_nodes, here, x)
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

    Returns
    -------
    any
        The result of the root. A node other than a tuple that is reached twice (beside the same
        nodes of `rest`) is folded once, with the path where it was met first, and its result
        stands at both places.

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
    kind = _kind(tree)
    if kind is None or (is_leaf is not None and is_leaf(tree)):
        return leaf(_ROOT, tree, *rest)
    done: dict[tuple[int, ...], tuple[Any, _Frame]] = {}
    open_nodes = {id(tree): (_ROOT, tree)}
    stack = [_Frame(_ROOT, tree, kind, keys, rest)]
    while True:
        frame = stack[-1]
        path, by_item, entered, others, results = (
            frame.path, frame.kind.by_item, frame.entered, frame.others, frame.results,
        )  # fmt: skip
        for key, x in frame.items:
            if entered is not None and key not in entered:
                results.append(skipped(x))
                continue
            here = _step(path, key, by_item)
            beside = [other[key] for other in others] if others else ()
            kind = _kind(x)
            if kind is None or (is_leaf is not None and is_leaf(x)):
                results.append(leaf(here, x, *beside))
                continue
            marks = (id(x), *map(id, beside))
            if marks in done:
                results.append(done[marks][0])
                continue
            _refuse_cycle(open_nodes, here, x)
            open_nodes[id(x)] = here, x
            stack.append(_Frame(here, x, kind, keys, beside))
            break
        else:
            result = node(path, frame.x, results)
            del open_nodes[id(frame.x)]
            stack.pop()
            if not stack:
                return result
            if not frame.kind.is_tuple:
                # The frame keeps its nodes alive: an id is only good so long.
                done[(id(frame.x), *map(id, frame.beside))] = result, frame
            stack[-1].results.append(result)


class _Frame:
    """A node under way in `fold`."""

    __slots__ = ("beside", "entered", "items", "kind", "others", "path", "results", "x")

    def __init__(
        self,
        path: KeyPath,
        x: Any,
        kind: _Kind,
        keys: Callable[[Any], Container[Any] | None] | None,
        beside: Sequence[Any],
    ) -> None:
        found = kind.children(x)
        self.path, self.x, self.kind, self.beside = path, x, kind, beside
        self.others = [_matching(path, x, found, other) for other in beside]
        self.entered = None if keys is None else _entered(path, x, keys)
        self.items = iter(found.items())
        self.results: list[Any] = []


def _refuse_cycle(open_nodes: dict[int, tuple[KeyPath, Any]], path: KeyPath, x: Any) -> None:
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
            f"{_listed(found)}, got {type(other).__name__} with the keys {_listed(beside)}"
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
    places is mapped once, and so is a list, dictionary or object: it stays shared.

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
        if _library(type(x)) is None:
            return f(x, *others)
        marks = (id(x), *map(id, others)) if others else id(x)
        if marks not in done:
            # The arrays are kept too: an id is only good while its object lives.
            done[marks] = f(x, *others), (x, others)
        return done[marks][0]

    return fold(tree, leaf, _rebuild_at, is_leaf=is_leaf, rest=rest)


def _rebuild_at(path: KeyPath, x: Any, results: list[Any]) -> Any:
    return rebuild(x, results)


# Addresses ------------------------------------------------------------------------------------


def getkeypath(tree: Any, kp: Iterable[Any]) -> Any:
    """Return what lies at a path of a tree.

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
        path, x = path.child(x, key), _get(path, x, key)
    return x


def _get(path: KeyPath, x: Any, key: Any) -> Any:
    found = x if type(x) is dict else children(x)
    if key in found:
        return found[key]
    there = f"the keys there are {_listed(found)}" if is_node(x) else "which has no children"
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
    """Replace what lies at a path of a tree, in place.

    Parameters
    ----------
    tree : any
        A model or a state tree.
    kp : KeyPath or iterable of keys
        The path, at which there must be something already.
    value : any
        What shall lie there.

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
        path, x = path.child(x, key), _get(path, x, key)
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
