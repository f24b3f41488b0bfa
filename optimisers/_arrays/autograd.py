"""Boxes of HIPS autograd: each holds an array of NumPy, or a number, and records operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import autograd.numpy
import numpy as np
from autograd.numpy.numpy_boxes import ArrayBox

from . import dtypes, traced
from .library import Library, for_step, isnumeric, wanted_of

Array = Any


class Autograd(Library):
    """A box answers as the array that it holds, which nothing else refers to."""

    key = "autograd"
    name = "autograd"
    sums_truth = True
    mixes_with_numpy = True
    differentiates_numpy = True

    def owns(self, cls: type) -> bool:
        return issubclass(cls, ArrayBox)

    def namespace(self, x: Array) -> Any:
        return autograd.numpy

    def is_numeric(self, x: Array) -> bool:
        return isnumeric(x._value)  # it may be a plain number

    def is_traced(self, x: Array) -> bool:
        return True

    # --- layout ------------------------------------------------------------------------------

    def transposed(self, x: Array, order: Sequence[int]) -> Array:
        return x.transpose(tuple(order))

    def reshaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    # --- new arrays --------------------------------------------------------------------------

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        return x

    def fresh(self, x: Array) -> Array:
        return x

    def copied(self, x: Array) -> Array:
        return x * 1

    def constant(self, x: Array) -> Array:
        while isinstance(x, ArrayBox):
            x = x._value
        return x

    def count_like(self, x: Array) -> np.ndarray:
        return np.zeros((), np.int64)

    def number_of(self, t: Array) -> Any:
        return t

    def own_dtype(self, x: Array, dtype: Any) -> Any:
        return dtypes.numpy_dtype(dtype)

    def astype(self, x: Array, dtype: Any) -> Array:
        return x.astype(dtypes.numpy_dtype(dtype))

    def cast(self, x: Array, dtype: Any) -> Array:
        if x.shape == ():
            x = autograd.numpy.array(x)
        return super().cast(x, dtype)

    def number(self, traced: Any, real: Any) -> Any:
        traced = traced * real.type(1)
        if traced.dtype == real:
            return traced
        # NumPy 2.0 casts no scalars, neither here nor on the way back.
        reshape = autograd.numpy.reshape
        return reshape(reshape(traced, (1,)).astype(real), ())

    # --- measured numbers --------------------------------------------------------------------

    def vector_like(self, x: Array, values: Sequence[float]) -> np.ndarray:
        return np.array([*values], np.float64)

    def stacked(self, values: Sequence[Any], like: Array) -> Array:
        return autograd.numpy.stack([*values])

    # --- words of steps ----------------------------------------------------------------------

    def sqrt(self, x: Array) -> Array:
        return traced.differentiable_sqrt(autograd.numpy, x)

    # --- gradients ---------------------------------------------------------------------------

    def gradient(self, g: Any, x: Array, where: Callable[[], str]) -> Array:
        has_both = hasattr(g, "shape") and hasattr(g, "dtype")
        a = g if has_both else autograd.numpy.asarray(g, dtype=x.dtype)
        if tuple(a.shape) != tuple(x.shape):
            raise ValueError(f"gradient at {where()}: {wanted_of(x)}, got shape {tuple(a.shape)}")
        return for_step(x, a)

    def for_numpy(self, g: Array, x: np.ndarray, where: Callable[[], str]) -> Array:
        return g

    def is_nonzero(self, g: Array) -> bool:
        return bool(np.any(np.asarray(g._value) != 0))

    # --- between libraries -------------------------------------------------------------------

    def adopted(self, values: Array, like: Array) -> Array:
        return values

    def converted(self, x: Array, dtype: Any, copy: bool) -> Array:
        wanted = dtypes.numpy_dtype(dtype)
        if dtypes.is_complex_dtype(x.dtype) and not dtypes.is_complex_dtype(wanted):
            x = autograd.numpy.real(x)
        return x if x.dtype == wanted else x.astype(wanted)

    def _concat(self, xp: Any, parts: list[Array]) -> Array:
        return xp.concatenate(parts)

    # --- files -------------------------------------------------------------------------------

    def why_unsavable(self, x: Array) -> str:
        return traced.WHY_UNSAVABLE

    def loaded(self, a: np.ndarray, like: Array) -> np.ndarray:
        return a


LIBRARY = Autograd()
