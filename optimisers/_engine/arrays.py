"""The array path: an update by the array library of the parameter, and what it asks of gradients.

What the kernels do not take is evaluated here, with the same steps: NumPy arrays of other dtypes
and layouts, JAX arrays and tracers, tensors without a view, users' rules. Nothing that is given is
written into; the engine stores the results when all leaves have theirs.
"""

from __future__ import annotations

import collections
import copy
import itertools
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .._arrays import devices
from .._arrays import torch as _torch
from .._arrays.jax import Number, is_jax, is_tracer, with_attributes
from .._arrays.library import is_narrow, isnumeric, library_of, maywrite, refuse_masked
from .._arrays.states import map_state, parts_of_state
from .._messages.text import short
from .._trees.nodes import children, rebuild
from .._trees.parameters import carry, overlap
from ..rules._base import ElementwiseRule, Rule
from ..rules._numbers import for_step, is_traced, moved, read_only
from ..words import is_complex, namespace

Array = Any

# --- gradients -------------------------------------------------------------------------------


def checked_gradient(g: Any, x: Array, where: Callable[[], str]) -> Array | None:
    """Return `g` as an array like `x`, or None where it says that there is no gradient.

    Its dtype is the one in which a step on `x` is computed.

    Raises
    ------
    TypeError, ValueError
        If `g` is no gradient for `x`; the message names the place, from `where()`.
    """
    if g is None or (type(g) is tuple and not g) or _is_symbolic_zero(g):
        return None
    refuse_masked(
        g,
        lambda: f"gradient at {where()}",
        ".filled(0) takes it for zeros, and None says that there is no gradient",
    )
    on_device = devices.library(x) is not None
    if on_device and devices.library(g) is not None and not _torch.is_tensor(g):
        return devices.gradient(g, x, where)
    wanted = f"expected an array of shape {tuple(x.shape)} and dtype {x.dtype}"
    if not hasattr(g, "dtype") and (not isinstance(g, numbers.Number) or x.shape != ()):
        from .._messages.mixups import for_gradient

        raise TypeError(f"gradient at {where()}: {wanted}, got {short(g)}{for_gradient(g, x)}")
    if _torch.is_tensor(x) and (_torch.is_tensor(g) or not on_device):
        return _torch.gradient(g, x, where)
    if on_device:
        return devices.gradient(g, x, where)
    if isinstance(x, np.ndarray) and not _torch.is_tensor(g):
        devices.refuse_for_host(g, x, where)
    if is_jax(x) or is_tracer(g):
        return _jax_gradient(g, x, wanted, where)
    is_boxed = library_of(type(g)) == "autograd"  # which records what is done to it
    if isinstance(x, np.ndarray):
        a = _torch.as_numpy(g, where) if _torch.is_tensor(g) else g if is_boxed else _as_numpy(g)
        if a.dtype.kind not in "biufc" and not isnumeric(a):
            raise TypeError(f"gradient at {where()}: {wanted}, got dtype {a.dtype}")
        if a.dtype.kind == "c" and x.dtype.kind != "c":
            raise TypeError(
                f"gradient at {where()}: {wanted}, got complex numbers ({a.dtype}); "
                "take the real part if that is what is meant"
            )
    else:
        xp = namespace(x)
        a = g if hasattr(g, "shape") and hasattr(g, "dtype") else xp.asarray(g, dtype=x.dtype)
    if tuple(a.shape) != tuple(x.shape):
        raise ValueError(f"gradient at {where()}: {wanted}, got shape {tuple(a.shape)}")
    if isinstance(x, np.ndarray) and not is_boxed:
        return _plain(a, np.dtype(np.float32) if is_narrow(x) else x.dtype.newbyteorder("="))
    return for_step(x, a)


def is_finite(g: Array) -> bool:
    """Tell whether all numbers of a checked gradient are finite; waits for its device."""
    if devices.is_numba(g):
        g = g.copy_to_host()
    return bool(namespace(g).all(namespace(g).isfinite(g)))


def _jax_gradient(g: Any, x: Array, wanted: str, where: Callable[[], str]) -> Array:
    """Return `g` as an array of JAX like `x`, which may be NumPy's if `g` is traced."""
    xp = namespace(g if is_jax(g) else x)
    a = g if hasattr(g, "dtype") else np.asarray(g)
    if tuple(a.shape) != tuple(x.shape):
        raise ValueError(f"gradient at {where()}: {wanted}, got shape {tuple(a.shape)}")
    kind = str(a.dtype).removeprefix("torch.")
    if kind.startswith("complex") and not is_complex(x):
        raise TypeError(
            f"gradient at {where()}: {wanted}, got complex numbers ({a.dtype}); "
            "take the real part if that is what is meant"
        )
    if not kind.startswith(("bool", "int", "uint", "float", "bfloat", "complex")):
        raise TypeError(f"gradient at {where()}: {wanted}, got dtype {a.dtype}")
    if is_jax(a):
        return for_step(x, a)
    a = _torch.as_numpy(a, where) if _torch.is_tensor(a) else _as_numpy(a)
    return xp.asarray(for_step(x, a))


def _is_symbolic_zero(g: Any) -> bool:
    """Tell whether `g` is JAX's way to say that there is no gradient."""
    if type(g).__name__ in ("SymbolicZero", "Zero") and type(g).__module__.startswith("jax"):
        return True
    return getattr(getattr(g, "dtype", None), "names", None) == ("float0",)


def _as_numpy(g: Any) -> np.ndarray:
    if isinstance(g, np.ndarray):
        return g
    return np.asarray(g.detach() if hasattr(g, "detach") else g)


def _plain(a: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return `a` as an aligned array in native byte order, itself if it is one."""
    with np.errstate(all="ignore"):
        return np.require(np.asarray(a), dtype, "A")


# --- one leaf --------------------------------------------------------------------------------


def evaluate(
    rule: Rule, state: Any, x: Array, gs: Sequence[Array | None]
) -> tuple[Any, Array | None]:
    """Return new state and parameter by the array library of `x`; write into nothing given.

    The parameter is None where the rule makes no step.
    """
    given = x
    if isinstance(x, np.ndarray):
        x = _plain(x, x.dtype.newbyteorder("="))
    elif _torch.is_tensor(x):
        x = x.detach()
    if type(rule).apply is not ElementwiseRule.apply:
        state, rule = fresh(state), opened(rule)
    dx, *higher = map(read_only, gs)
    with np.errstate(all="ignore"), _torch.unrecorded(x):
        state, new = moved(rule, state, read_only(x), dx, *higher)
    if new is not None:
        if tuple(new.shape) != tuple(x.shape):
            raise ValueError(
                f"{type(rule).__name__}.apply returned a step that makes the parameter's shape "
                f"{tuple(new.shape)} out of {tuple(x.shape)}"
            )
        if isinstance(given, np.ndarray) and not is_traced(new):
            new = np.asarray(new, given.dtype)  # its byte order too
    return _apart(state, [given, *gs]), new


def opened(value: Any) -> Any:
    """Return a rule with ordinary numbers, as a user's `apply` expects them.

    Rules with a `step` keep the two parts of theirs: they compute with both (see `_jax`).
    """
    return map_state(_opened, value, into=(tuple, list))


def _opened(value: Any) -> Any:
    if type(value) is Number:
        return value.value()
    if isinstance(value, Rule) and type(value).apply is not ElementwiseRule.apply:
        return with_attributes(value, opened)
    return value


def _apart(state: Any, given: list[Array]) -> Any:
    """Return a state that shares no memory with arrays that were `given` to the rule."""
    arrays = [np.asarray(a) for a in given if isinstance(a, np.ndarray)]

    def unshared(part: Any) -> Any:
        if not isinstance(part, np.ndarray):
            return part
        shared = any(np.may_share_memory(np.asarray(part), a) for a in arrays)
        return fresh(part) if shared else part

    return map_state(unshared, state, into=tuple) if arrays else state


# --- copies and writing ----------------------------------------------------------------------


def fresh(state: Any) -> Any:
    """Return a copy of a state that shares no memory with it."""
    return map_state(_copied, state, into=tuple)


def _copied(part: Any) -> Any:
    """Return a copy of a part; in lists and dicts, what is there twice stays one thing."""
    if isinstance(part, np.ndarray):
        return np.array(part, order="K", subok=not isinstance(part, np.memmap))
    if _torch.is_tensor(part):
        return _torch.fresh(part)
    if devices.library(part) is not None:
        return devices.fresh(part)
    if isnumeric(part) or is_jax(part):
        return part
    return copy.deepcopy(part)


def blank(state: Any) -> Any:
    """Return a state of the same form whose arrays are still empty; the rest is copied."""
    return map_state(_blank, state, into=tuple)


def _blank(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        return np.empty_like(np.asarray(part))
    if _torch.is_tensor(part):
        return _torch.blank(part)
    lib = devices.library(part)
    return _copied(part) if lib is None else lib.blank(part)


def refuse_masked_state(state: Any, where: Callable[[], str]) -> None:
    """Raise if an array of a state has a mask."""
    for part in parts_of_state(state):
        refuse_masked(part, lambda: f"in the state at {where()}", "its .filled(0) is an array")


Call = tuple[Any, ...]
"""A function and its arguments."""


def writing(x: Array, new: Array) -> Call:
    """Return the call that writes `new` into an array; one of C, for `at_once`."""
    if _torch.is_tensor(x):
        return _torch.writing(x, new)
    if devices.is_numba(x):
        return devices.assign, x, new
    if isinstance(x, np.ndarray):
        x = np.asarray(x)  # a subclass may write in a way of its own, or refuse to
    return operator.setitem, x, ..., new


def rewritten(old: Any, new: Any) -> tuple[Any, list[tuple[Array, Array]]]:
    """Return the state that takes the place of `old`, and what is to be written into its arrays.

    Its arrays are those of `old`, wherever they can be written and hold what `new` has there; if
    nothing else differs, it is `old` itself.
    """
    writes: list[tuple[Array, Array]] = []
    state = _kept(old, new, writes)
    return state, [(a, _unwritten(b, a, writes)) for a, b in writes]


def _kept(old: Any, new: Any, writes: list[tuple[Array, Array]]) -> Any:
    if old is new:
        return old
    if _can_hold(old, new):
        if any(overlap([(0, old), (1, other)]) for other, _ in writes):
            return new  # two parts of one state were one array, which the step has set apart
        writes.append((old, new))
        return old
    before, after = children(old), children(new)
    in_rows = isinstance(old, tuple | list) and isinstance(new, tuple | list)
    fits = len(before) == len(after) if in_rows else before.keys() == after.keys()
    if not after or not fits or not (in_rows or type(old) is type(new)):
        return new
    olds = [*before.values()] if in_rows else [before[key] for key in after]
    parts = [_kept(a, b, writes) for a, b in zip(olds, after.values(), strict=True)]
    if all(map(operator.is_, parts, after.values())):
        return new
    has_items_alone = type(old) in (tuple, list, dict) or hasattr(old, "_fields")
    return old if has_items_alone and all(map(operator.is_, parts, olds)) else rebuild(new, parts)


def _can_hold(x: Any, new: Any) -> bool:
    """Tell whether `x` is an array into which the numbers of `new` can be written as they are."""
    if _torch.is_tensor(x):
        return _torch.can_hold(x, new)
    if isinstance(x, np.ndarray):
        if not isinstance(new, np.ndarray | np.generic) or x.shape != new.shape:
            return False
        return x.dtype.newbyteorder("=") == new.dtype.newbyteorder("=") and maywrite(x)
    lib = devices.library(x)
    if lib is None or lib is not devices.library(new) or x.shape != new.shape:
        return False
    return bool(x.dtype == new.dtype and lib.device(x) == lib.device(new) and maywrite(x))


def _unwritten(values: Array, x: Array, writes: list[tuple[Array, Array]]) -> Array:
    """Return `values`, or a copy where they lie in an array other than `x` that is written."""
    others = [np.asarray(a) for a, _ in writes if a is not x and isinstance(a, np.ndarray)]
    lies_there = isinstance(values, np.ndarray) and any(
        np.may_share_memory(values, a) for a in others
    )
    return fresh(values) if lies_there else values


def at_once(calls: Iterable[Call]) -> None:
    """Make calls of C functions, all of them whenever Ctrl-C is pressed.

    Python looks for signals between two instructions of its own, and here is one.
    """
    collections.deque(itertools.starmap(operator.call, calls), maxlen=0)


def shown(new: Array, x: Array, other: Array) -> Array:
    """Return `new`, which takes the place of `x`, as what takes that of its other view `other`."""
    if _torch.is_tensor(other) and other.is_leaf:
        return _torch.like(other, carry(new.detach(), x, other))
    return carry(new, x, other)
