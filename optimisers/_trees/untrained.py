"""Parts of a model that are not trained: found, named to the user, refused where it matters.

Parameters are arrays of floating numbers of libraries that are known (`isnumeric`), reached through
nodes. Everything else is carried along, and often enough was meant to train. So

a) `setup`, `minimize` and `destructure` refuse what plainly is no tree (`refuse_no_tree`), and warn
   where nothing trains, or where an array of another library does not (`tell`);
b) an update refuses a gradient, other than zero, for something that is no parameter (`is_lost`,
   `lost`): whoever has a gradient of it thinks that it trains.
"""

from __future__ import annotations

import numbers
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import numpy as np

from .._arrays.dtypes import dtype_name
from .._arrays.library import (
    is_array,
    isnumeric,
    library_for,
    library_of,
    library_of_class,
    package_of,
)
from .._messages.text import short, warn_caller
from .nodes import is_node, kind_of, trainable_keys
from .paths import KeyPath
from .walks import fold, walk

__all__ = [
    "holds_lost",
    "is_configuration",
    "is_lost",
    "lost",
    "refuse_no_tree",
    "refuse_ours",
    "seems_to_train",
    "tell",
]

Tree = Any
Place = tuple[KeyPath, Any]

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
_SHOWN = 3  # places that a message names


# --- a model in which nothing trains -----------------------------------------------------------


def refuse_no_tree(model: Tree, taker: str) -> None:
    """Raise for an object that plainly is no tree, though it may hold parameters.

    Raises
    ------
    TypeError
        For a module of PyTorch, an iterator, a class: the message says what to write.
    """
    if is_node(model):
        return
    if _is_torch_module(model) or isinstance(model, type | Iterator):
        raise TypeError(
            f"{taker} takes a model, a tree of arrays; got {_seen(model)}, which is no tree: "
            f"{_way_out(model)}"
        )


def tell(model: Tree, trains: bool, unknown: Sequence[Place]) -> None:
    """Warn if nothing in a model trains, or if arrays in it do not.

    Parameters
    ----------
    model : tree
        The model.
    trains : bool
        Whether it has a parameter.
    unknown : sequence of (KeyPath, array)
        The arrays in it for which `seems_to_train` is true.

    Warns
    -----
    UserWarning
        Once, at the line outside of this library, with paths, what is there, and what to write.
    """
    if not trains:
        refuse_ours(model)
        warn_caller(f"nothing to train: {_why_nothing(model)}")
    elif unknown:
        warn_caller(f"not trained: {_places_text(unknown)}")


def refuse_ours(model: Tree) -> None:
    """Raise for a rule or a state tree in the place of a model.

    Raises
    ------
    TypeError
        Which says what the model is.
    """
    from .._messages.mixups import holds_leaf
    from ..rules._base import Rule

    if isinstance(model, Rule):
        raise TypeError(f"nothing to train: {short(model)} is a rule, in the place of the model")
    if holds_leaf(model):
        raise TypeError(
            f"nothing to train: {short(model)} is a state tree, in the place of the model"
        )


def seems_to_train(x: Any) -> bool:
    """Tell whether a user may think that `x`, which is no parameter, trains in a model.

    An array of floating numbers, or a module of PyTorch with parameters.
    """
    return is_unknown_array(x) or (_is_torch_module(x) and any(True for _ in x.parameters()))


def is_unknown_array(x: Any) -> bool:
    """Tell whether `x` is an array of floating numbers, and yet no parameter.

    One of a library that is not known, or an array of NumPy whose elements are objects or records.
    """
    cls = type(x)
    if cls in _PLAIN or issubclass(cls, np.generic | type):
        return False
    if (library := library_of_class(cls)) is not None:
        return library.seems_to_train(x)
    try:  # attributes of other people's objects may do anything
        tuple(x.shape)
        dtypes = [x.dtype] if hasattr(x, "dtype") else [*x.dtypes]  # a table has one a column
        return any(_is_floating(dtype) for dtype in dtypes)
    except Exception:
        return False


def _is_floating(dtype: Any) -> bool:
    name = dtype_name(dtype).lower()
    return any(word in name for word in ("float", "complex", "double"))


def _why_nothing(model: Tree) -> str:
    places = _entered(model)
    if places:
        return _places_text(sorted(places, key=lambda place: not seems_to_train(place[1])))
    if _is_left_out(model):
        return f"`trainable` leaves out all that the {type(model).__name__} has"
    return f"the {type(model).__name__} has nothing in it"


def _is_left_out(node: Tree) -> bool:
    """Tell whether `trainable` leaves out all that there is in a node."""
    return not _entered(node) and next(walk(node), None) is not None


def _entered(model: Tree) -> list[Place]:
    """Return the leaves that `trainable` does not leave out."""
    places: list[Place] = []

    def leaf(path: KeyPath, x: Any) -> None:
        places.append((path, x))

    fold(model, leaf, lambda path, x, results: None, keys=trainable_keys)
    return places


def _places_text(places: Sequence[Place]) -> str:
    shown = [
        f"{path or 'the model'} is {_seen(x)}" + f"; {way}" * bool(way)
        for path, x in places[:_SHOWN]
        for way in [_way_out(x)]
    ]
    return ". ".join(shown) + f". There are {len(places) - _SHOWN} more" * (len(places) > _SHOWN)


# --- what is there, and what to write ----------------------------------------------------------


def _seen(x: Any) -> str:
    """Return a text that names `x`, and why it is no parameter."""
    name = type(x).__name__
    if isinstance(x, list | tuple):
        return f"{reprlib.repr(x)} ({name})"
    if is_node(x):
        return f"a {name} without parameters"
    if isinstance(x, type):
        return f"the class {x.__name__}"
    if x is None or type(x) in _PLAIN or isinstance(x, np.generic):
        return "None" if x is None else short(x)
    if _is_torch_module(x):
        return f"a torch.nn.Module ({name})"
    if isinstance(x, Iterator):
        return f"an iterator ({name})"
    if is_unknown_array(x):
        library = package_of(x)
        dtype = getattr(x, "dtype", "several dtypes")
        if library == "numpy":
            return f"an array of {dtype}"
        return f"a {name} of {dtype}, an array of {library}, which is not known here"
    if is_array(x):
        return f"an array of {dtype_name(x.dtype)}"
    if callable(x) and not hasattr(x, "__dict__"):
        return f"a {name}"
    return f"an object of class {name}, which is no node"


def _way_out(x: Any) -> str:
    """Return the code that makes it train, as text; empty if it cannot have been meant to."""
    library = library_of(x)
    if is_node(x):
        return "np.asarray of it trains" if isinstance(x, list | tuple) else ""
    if isinstance(x, type):
        return "write an instance of it"
    if isinstance(x, complex | np.complexfloating):
        return f"np.asarray({complex(x)!r}) trains"
    if isinstance(x, numbers.Real | np.bool):
        return f"np.asarray({float(x)!r}) trains"
    if x is None or isinstance(x, str | bytes | np.generic):
        return ""
    if _is_torch_module(x):
        return "write dict(module.named_parameters())"
    if isinstance(x, Iterator):
        return "write list(...) of it, or dict(...) if it yields names too"
    if is_unknown_array(x):
        if library is not None:
            return "an array of dtype float trains"
        has_to_numpy = callable(getattr(x, "to_numpy", None))
        return f"{'its .to_numpy()' if has_to_numpy else 'np.asarray of it'} trains"
    if library is not None:
        return f"its {library.as_float} trains"
    if isinstance(x, Mapping):
        return "write dict(...) of it"
    if callable(x) and not hasattr(type(x), "__dict__"):
        return ""
    return f"@functor makes {type(x).__name__} a node"


def _is_torch_module(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.nn.Module)


# --- a gradient of what is not trained ---------------------------------------------------------


def is_lost(x: Any, g: Tree) -> bool:
    """Tell whether a gradient has a value for `x`, which has no state."""
    return _could_train(x) and says_something(g)


def holds_lost(node: Tree, g: Tree) -> bool:
    """Tell whether a gradient has values for a node without parameters."""
    return says_something(g) and any(_could_train(x) for _, x in _entered(node))


def is_configuration(node: Tree, beside: Tree, x: Any, g: Any) -> bool:
    """Tell whether every object like `node` has this `g`, such as the default of a field.

    A gradient may be an object of the model's own class. What it has there is the model's.
    """
    kind = kind_of(node)
    if kind is None or not kind.is_object or type(beside) is not type(node):
        return False
    return x is g or (type(x) is type(g) and type(x) in _PLAIN and bool(x == g))


def _could_train(x: Any) -> bool:
    """Tell whether a user might take `x`, a leaf without a state, for a parameter.

    An array of floats is none of these: it is a parameter that was left out by choice.
    """
    if x is None or isinstance(x, str | bytes | type | FunctionType | BuiltinFunctionType):
        return False
    return not is_node(x) and not isnumeric(x)


def says_something(g: Tree) -> bool:
    """Tell whether there is a number other than zero in a gradient, as far as can be seen."""
    return any(_is_something(leaf) for _, leaf in walk(g))


def lost(x: Any) -> str:
    """Return the message that a gradient of `x` would be lost, without the path."""
    way = _way_out(x)
    return (
        f"there is a gradient for {_seen(x)}, which is not trained; "
        f"{way + ', and ' if way else ''}None in place of the gradient leaves it alone"
    )


def _is_something(g: Any) -> bool:
    """Tell whether a leaf of a gradient is a number or an array other than zero."""
    library = library_of(g)
    if library is None and isinstance(g, numbers.Number):
        return bool(cast(Any, g) != 0)
    if library is None and not (hasattr(g, "shape") or hasattr(g, "__array__")):
        return False
    try:
        if library is None and hasattr(g, "count_nonzero"):
            return bool(g.count_nonzero())
        g = np.asarray(g) if library is None else g
        return library_for(g).is_nonzero(g)
    except Exception:  # an array of a known library that hides its numbers is traced
        return library is None and _differs(g)


def _differs(g: Any) -> bool:
    """Ask an array of an unknown library in the array API's words."""
    try:
        return bool((g != 0).any())
    except Exception:
        return True
