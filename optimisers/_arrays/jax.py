"""Arrays of JAX, traced or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import dtypes, traced
from .library import Library, check_fit, for_step, library_for, library_of

Array = Any


class Jax(Library):
    """They are immutable: one array at two places is two parameters with the same values."""

    key = "jax"
    name = "JAX"
    sums_truth = True
    is_immutable = True
    mixes_with_numpy = True
    has_conjugates = True

    def owns(self, cls: type) -> bool:
        return issubclass(cls, (jax.Array, jax.core.Tracer))

    def enters_jax(self, x: Array) -> bool:
        return True

    def is_traced(self, x: Array) -> bool:
        return isinstance(x, jax.core.Tracer)

    def is_abstract(self, x: Array) -> bool:
        return isinstance(x, jax.core.Tracer)

    # --- layout ------------------------------------------------------------------------------

    def transposed(self, x: Array, order: Sequence[int]) -> Array:
        return x.transpose(tuple(order))

    def reshaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    # --- new arrays --------------------------------------------------------------------------

    def constant(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def count_like(self, x: Array) -> Array:
        return self.namespace(x).zeros((), int)

    def counted(self, t: Array, largest: int) -> Array:
        if isinstance(t, jax.core.Tracer):
            return self.namespace(t).minimum(t, largest - 1) + 1
        return super().counted(t, largest)

    def own_dtype(self, x: Array, dtype: Any) -> Any:
        # Without jax_enable_x64, float64 is not, and JAX warns of it.
        return jax.dtypes.canonicalize_dtype(dtypes.numpy_dtype(dtype))

    def cast(self, x: Array, dtype: Any) -> Array:
        if x.dtype == dtype:
            return x
        return x.astype(jax.dtypes.canonicalize_dtype(dtype))

    def widened(self, x: Array) -> Array:
        return traced.widened(x) if isinstance(x, jax.core.Tracer) else x.astype(np.float32)

    def number(self, traced: Any, real: Any) -> Any:
        return traced.astype(real)

    # --- measured numbers --------------------------------------------------------------------

    def vector_like(self, x: Array, values: Sequence[float]) -> Array:
        return self.namespace(x).asarray([*values], dtype=float)

    # --- words of steps ----------------------------------------------------------------------

    def sqrt(self, x: Array) -> Array:
        xp = self.namespace(x)
        return _traced_sqrt(xp)(x) if isinstance(x, jax.core.Tracer) else xp.sqrt(x)

    # --- gradients ---------------------------------------------------------------------------

    def gradient(self, g: Any, x: Array, where: Callable[[], str]) -> Array:
        """Return `g` as an array of JAX like `x`, which may be NumPy's if `g` is traced."""
        xp = self.namespace(g if library_of(g) is self else x)
        a = g if hasattr(g, "dtype") else np.asarray(g)
        check_fit(a, x, where)
        if library_of(a) is self:
            return for_step(x, a)
        a = library_for(a).for_numpy(a, x, where)
        return xp.asarray(for_step(x, a))

    def for_numpy(self, g: Array, x: np.ndarray, where: Callable[[], str]) -> Any:
        return g if isinstance(g, jax.core.Tracer) else np.asarray(g)

    def is_nonzero(self, g: Array) -> bool:
        return not isinstance(g, jax.core.Tracer) and bool((g != 0).any())

    # --- between libraries -------------------------------------------------------------------

    def from_numpy(self, a: np.ndarray, like: Array) -> Array:
        return jax.numpy.asarray(a)

    def adopted(self, values: Array, like: Array) -> Array:
        return jax.numpy.asarray(values) if isinstance(values, np.ndarray) else values

    # --- files -------------------------------------------------------------------------------

    def why_unsavable(self, x: Array) -> str:
        return traced.WHY_UNSAVABLE if isinstance(x, jax.core.Tracer) else ""

    def loaded(self, a: np.ndarray, like: Array) -> Array:
        new = jax.numpy.array(a)
        return jax.device_put(new, like.sharding) if getattr(like, "committed", False) else new


@functools.cache
def _traced_sqrt(xp: Any) -> Any:
    """Return the root as one operation of JAX, traced once for all arrays of a shape."""
    root = jax.custom_jvp(xp.sqrt)

    def derivative(given: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        (x,), (dx,) = given, tangents
        zero = x == 0
        slope = 0.5 / root(xp.where(zero, xp.ones_like(x), x))
        return root(x), dx * xp.where(zero, xp.zeros_like(x), slope)

    root.defjvp(derivative)
    return jax.jit(root)


LIBRARY = Jax()
