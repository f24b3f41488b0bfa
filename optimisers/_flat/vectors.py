"""The arrays that become a flat vector: their dtypes, their memory, gradients, `out`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._arrays.dtypes import is_complex_dtype, numpy_dtype
from .._arrays.library import (
    is_array,
    is_foreign,
    is_immutable,
    isnumeric,
    library_for,
    maywrite,
    refuse_masked,
)
from .._engine.gradients import checked_gradient
from .._engine.tied import sum_of_two

Array = Any


def is_c_contiguous(x: Array) -> bool:
    return library_for(x).is_c_contiguous(x)


def gradient_dtype(dtype: Any, flat: Any) -> np.dtype:
    """Return the dtype in which gradients for a parameter go into the vector."""
    wanted = numpy_dtype(flat)
    if is_complex_dtype(wanted) and not is_complex_dtype(dtype):
        return np.zeros((), wanted).real.dtype
    return wanted


def may_overlap(parts: list[np.ndarray], out: np.ndarray) -> bool:
    """Tell whether one of the arrays may share memory with `out`."""
    if out.flags.owndata:  # then only views can, and itself
        parts = [part for part in parts if part.base is not None or part is out]
    return any(np.may_share_memory(part, out) for part in parts)


def gradient_for(g: Any, blank: np.ndarray, where: Callable[[], str], traced: bool) -> Any:
    """Return a gradient, checked; where `traced`, one of another library stays there."""
    if not (traced and is_foreign(g)):
        return checked_gradient(g, blank, where)
    if library_for(g).has_lost(g):
        raise ValueError(
            f"gradient at {where()}: expected a tensor with memory, its was given back"
        )
    if tuple(g.shape) != blank.shape or (
        is_complex_dtype(g.dtype) and not is_complex_dtype(blank.dtype)
    ):
        raise (ValueError if tuple(g.shape) != blank.shape else TypeError)(
            f"gradient at {where()}: expected an array of shape {blank.shape} and dtype "
            f"{blank.dtype}, got shape {tuple(g.shape)} and dtype {g.dtype}"
        )
    return g


def summed(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return sum_of_two(a, b)


def check_out(out: Any, size: int, dtype: Any, libraries: frozenset[str]) -> None:
    """Raise if `out` cannot take the vector of a model that holds arrays of these libraries."""
    wanted = f"out: expected a writable vector of length {size} and dtype {dtype}"
    refuse_masked(out, lambda: "out", "give a plain array")
    known = {"numpy", *libraries}
    if not is_array(out) or library_for(out).key not in known or is_immutable(out):
        raise TypeError(
            f"{wanted}, of {' or '.join(sorted(known))}, got "
            f"{type(out).__name__}; leave it out, and a new vector is returned"
        )
    if tuple(out.shape) != (size,):
        raise ValueError(f"{wanted}, got shape {tuple(out.shape)}")
    if not isnumeric(out) or (is_complex_dtype(dtype) and not is_complex_dtype(out.dtype)):
        raise TypeError(f"{wanted}, got dtype {out.dtype}")
    if not maywrite(out):
        raise ValueError(f"{wanted}, got one that is read-only or broadcast")
