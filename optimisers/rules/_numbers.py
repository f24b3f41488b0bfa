"""Arrays of a step: wider numbers and the way back, counts, new arrays like given ones."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arrays import devices
from .._arrays import jax as _jax
from .._arrays import torch as _torch
from .._arrays.jax import (
    Number,
    is_jax,
    is_tracer,
)
from .._arrays.library import dtype_name, is_narrow, isnumeric, library_of
from .._arrays.states import map_state
from .._arrays.torch import is_mapped, is_tensor
from ..words import is_complex, maximum, minimum, namespace

if TYPE_CHECKING:
    from ._base import Rule

_PLAIN = (bool, int, float, np.ndarray, np.generic)


def is_traced(value: Any) -> bool:
    """Tell whether JAX or HIPS autograd stands behind `value`, and records what is done to it.

    Or ``torch.vmap``, which does it for many values at once.
    """
    if isinstance(value, _PLAIN):
        return False
    if type(value) is Number:
        return value.is_traced
    tracer = sys.modules.get("autograd.tracer")
    is_boxed = tracer is not None and isinstance(value, tracer.Box)
    return is_boxed or is_tracer(value) or is_mapped(value)


def moved(rule: Rule, state: Any, x: Any, *gs: Any) -> tuple[Any, Any]:
    """Return what ``rule.move(state, x, *gs)`` does, computed in float32 if `x` is narrower.

    Then each result is rounded once: the parameter, and what the rule keeps in such arrays. On the
    way nothing is, from the gradient through a whole chain to the subtraction.
    """
    if not (rule._widens and is_narrow(x)):
        return rule.move(state, x, *gs)
    wide = (read_only(widened(a)) for a in (x, *gs))
    made, new = rule.move(map_state(widened, state, wide=False), *wide)
    return map_state(_narrowed, state, made, wide=False), None if new is None else as_like(x, new)


def applied(rule: Rule, state: Any, x: Any, *gs: Any) -> tuple[Any, Any]:
    """Return what ``rule.apply(state, x, *gs)`` does, as `moved`; the step stays in float32."""
    if not (rule._widens and is_narrow(x)):
        return rule.apply(state, x, *gs)
    wide = (read_only(widened(a)) for a in (x, *gs))
    made, dx = rule.apply(map_state(widened, state, wide=False), *wide)
    return map_state(_narrowed, state, made, wide=False), dx


def widened(x: Any) -> Any:
    """Return an array in the dtype in which steps on it are computed; anything else as it is."""
    if not hasattr(x, "dtype") or not is_narrow(x):
        return x
    if devices.is_numba(x):
        return devices.astype(x, np.float32)
    if is_tracer(x):
        return _jax.widened(x)
    if _torch.is_tensor(x):
        return _torch.widened(x)
    cast = getattr(x, "astype", None)
    return cast(np.float32) if cast else namespace(x).astype(x, namespace(x).float32)


def for_step(x: Any, g: Any) -> Any:
    """Return a gradient of `x` in the dtype in which a step on `x` is computed."""
    if not is_narrow(x):
        return as_like(x, g)
    if is_narrow(g):
        return widened(g)
    cast = getattr(g, "astype", None)
    return cast(np.float32) if cast else namespace(g).astype(g, namespace(g).float32)


def _narrowed(old: Any, new: Any) -> Any:
    if not (hasattr(old, "dtype") and hasattr(new, "dtype") and is_narrow(old)):
        return new
    # NumPy makes scalars of what is calculated with 0-d arrays.
    return kept_as(old, new) if isinstance(new, np.inexact) or isnumeric(new) else new


def kept_as(old: Any, new: Any) -> Any:
    """Return `new` in the dtype of `old`, the slot whose place it takes; narrow numbers move on.

    They are rounded to nearest, with two exceptions. A change is not lost: where the nearest number
    is the old one, a change of more than a sixteenth of a unit counts twice, four or eight times,
    so that it comes to one unit. An average would else stand still far from what it averages: in
    bfloat16 that of ones, with a decay rate of 0.99, at 0.8. And what is finite stays so: a square
    beyond float16 would else make infinite for ever what divides.
    """
    if not is_narrow(old) or is_narrow(new) or tuple(old.shape) != tuple(new.shape):
        return as_like(old, new)
    most = largest(old.dtype)
    before = widened(old)

    def bounded(value: Any) -> Any:
        return minimum(maximum(value, -most), most)

    found = as_like(old, namespace(new).where(namespace(new).isfinite(new), bounded(new), new))
    is_lost = (widened(found) == before) & (new != before)
    for factor in LOST:
        tried = as_like(old, bounded(before + factor * (new - before)))
        is_same = widened(tried) == before
        found = as_like(old, namespace(tried).where(is_lost & ~is_same, tried, found))
        is_lost = is_lost & is_same
    return found


@functools.lru_cache(maxsize=64)
def largest(dtype: Any) -> float:
    """Return the largest finite number of a narrow dtype of any library."""
    if type(dtype).__module__ == "torch":
        return float(sys.modules["torch"].finfo(dtype).max)
    if dtype == np.float16:
        return 65504.0
    return float(sys.modules["ml_dtypes"].finfo(dtype).max)


LOST = 2.0, 4.0, 8.0
"""How often a change counts, one after the other, that rounding would lose."""


def _copy(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x.copy()
    return x * 1 if library_of(type(x)) == "autograd" else namespace(x).asarray(x, copy=True)


def read_only(x: Any) -> Any:
    """Return `x`, or a view of it where NumPy would let a rule write into it."""
    if isinstance(x, np.ndarray):
        x = x.view()
        x.flags.writeable = False
    return x


def full_like(x: Any, value: float) -> Any:
    """Return an array of the shape, dtype and device of `x`, in native byte order."""
    if dtype_name(x.dtype) == "float8_e8m0fnu":
        raise TypeError(
            "float8_e8m0fnu has no zero, from which what a rule keeps could start; "
            "MixedPrecision(rule) keeps it in float32"
        )
    if isinstance(x, np.ndarray):
        if not is_tracer(value):
            return np.full_like(x, value, dtype=x.dtype.newbyteorder("="), subok=False)
        return namespace(value).full_like(x, value)
    if devices.is_numba(x):
        return devices.full_like(x, value)
    return namespace(x).full_like(x, value)


def count_like(x: Any) -> Any:
    """Return a 0-d count of zero, made by the library of `x`; on the host for one on a GPU."""
    if devices.counts_in_numpy(x):
        return np.zeros((), np.int64)
    xp = namespace(x)
    if xp is np or xp.__name__ == "autograd.numpy":
        return np.zeros((), np.int64)
    if xp.__name__.startswith("jax"):
        return xp.zeros((), int)
    if "torch" in xp.__name__:  # on the host, wherever new tensors would go by default
        return xp.asarray(0, dtype=xp.int64, device="cpu")
    return xp.asarray(0, dtype=xp.int64)


def as_count(t: Any, x: Any) -> Any:
    """Return a count of the library of `x`, where it is a plain number, as a file may have it."""
    is_foreign = isinstance(t, np.ndarray) and is_tensor(x)
    if not is_foreign and not isinstance(t, int | float | np.number):
        return t
    zero = count_like(x)
    return as_like(zero, zero + min(int(t), largest_count(zero)))


def largest_count(t: Any) -> int:
    """Return the largest number that a count like `t` can be."""
    return int(namespace(t).iinfo(t.dtype).max)


def counted(t: Any) -> Any:
    """Return a count that is one higher, or the same if it is the largest that its dtype holds.

    Counts of JAX arrays are of 32 bits unless it is set to 64. The formulas do not change any more
    where a count stops; one that went over to negative numbers would stop the parameter.
    """
    largest = largest_count(t)
    if is_tracer(t):
        return namespace(t).minimum(t, largest - 1) + 1
    if hasattr(t, "clamp"):  # of PyTorch, which may be mapped, so that nobody knows it
        return t.clamp(max=largest - 1) + 1
    return t + 1 if int(t) < largest else t


def cast_like(x: Any, numbers: Iterable[Any]) -> tuple[Any, ...]:
    """Cast numbers once to the real dtype of `x`, which computes with them."""
    if isinstance(x, np.ndarray):
        real = x.real.dtype if x.dtype.kind == "c" else x.dtype
        return tuple(_cast(n, real) if is_traced(n) else real.type(n) for n in numbers)
    if not any(map(is_traced, numbers := tuple(numbers))):
        return tuple(map(float, numbers))
    real = namespace(x).real(x).dtype if is_complex(x) else x.dtype
    return tuple(_cast(n, real) if is_traced(n) else float(n) for n in numbers)


def _cast(traced: Any, real: Any) -> Any:
    if is_tensor(traced):
        return traced.to(real)
    if not is_tracer(traced):  # then a box, and perhaps of a Python number, which has no dtype
        traced = traced * real.type(1)
        if traced.dtype == real:  # under NumPy 2.0 the way back through a cast is an error
            return traced
    return traced.astype(real)


def as_like(old: Any, value: Any) -> Any:
    """Return `value` as an array of the dtype of `old` (0-d arithmetic makes scalars in NumPy)."""
    if isinstance(old, np.ndarray) and not is_traced(value):
        native = old.dtype.newbyteorder("=")
        return np.array(value, dtype=native, copy=True if value is old else None)
    if type(value).__module__ == "autograd.numpy.numpy_boxes" and value.shape == ():
        value = namespace(value).array(value)
    if value.dtype == old.dtype:
        return value
    if is_jax(value):  # which warns of a dtype that it is not set to
        return value.astype(sys.modules["jax"].dtypes.canonicalize_dtype(old.dtype))
    cast = getattr(value, "astype", None)
    return cast(old.dtype) if cast else namespace(value).astype(value, old.dtype)
