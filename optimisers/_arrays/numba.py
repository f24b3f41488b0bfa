"""Device arrays of Numba, and those of its simulator."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import dtypes, numba_private
from .devices import DeviceLibrary, axes
from .layout import packed_strides
from .library import Call, library_for

Array = Any


class Numba(DeviceLibrary):
    """They are memory on a device without arithmetic; only kernels compute with them."""

    key = "numba"
    name = "Numba"
    to_host = ".copy_to_host()"
    to_device = "numba.cuda.to_device(...)"
    stays = True
    computes = False

    def owns(self, cls: type) -> bool:
        # By name, since numba and numba-cuda keep these classes in different modules.
        return any(
            base.__name__ in ("DeviceNDArrayBase", "FakeCUDAArray") and "numba" in base.__module__
            for base in cls.__mro__
        )

    def is_c_contiguous(self, x: Array) -> bool:
        return bool(x.is_c_contiguous())

    def address(self, x: Array) -> int:
        return numba_private.address(x)

    def device(self, x: Array) -> int:
        return numba_private.device(x)

    def stream(self, x: Array) -> int:
        return 0 if not x.stream or numba_private.is_simulated(x) else int(x.stream.handle)

    def transposed(self, x: Array, order: Sequence[int]) -> Array:
        if numba_private.is_simulated(x):
            return x.transpose(tuple(order))
        shape, strides = tuple(x.shape), tuple(x.strides)
        return numba_private.view(
            x, tuple(shape[k] for k in order), tuple(strides[k] for k in order)
        )

    def reshaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    # --- new arrays --------------------------------------------------------------------------

    def full_like(self, x: Array, value: Any) -> Array:
        return self._filled(x, None, float(value))

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        kind = x.dtype if dtype is None else dtypes.numpy_dtype(dtype)
        order = axes(self, x)
        strides = packed_strides(tuple(x.shape), order, kind.itemsize) if order else None
        return _cuda().device_array(tuple(x.shape), kind, strides=strides, stream=x.stream)

    def assign(self, x: Array, values: Any) -> None:
        if 0 in x.shape:
            return
        if numba_private.is_simulated(x):
            numba_private.assign_simulated(x, values)
            return
        if isinstance(values, float):
            values = _cuda().to_device(np.full((1,) * len(x.shape), values, x.dtype))
        # With a stream, and so without waiting for it.
        stream = x.stream or _cuda().default_stream()
        if x.ndim == 0:
            x, values = x.reshape(1), values.reshape(1)
        x.setitem(slice(None), values, stream=stream)

    def own_dtype(self, x: Array, dtype: Any) -> Any:
        return dtypes.numpy_dtype(dtype)

    def astype(self, x: Array, dtype: Any) -> Array:
        return self.copy(x, np.dtype(dtype).name)

    def write_call(self, x: Array, new: Any) -> Call:
        return self.assign, x, new

    def is_finite(self, g: Array) -> bool:
        host = g.copy_to_host()
        return library_for(host).is_finite(host)

    def is_nonzero(self, g: Array) -> bool:
        return bool(np.count_nonzero(np.asarray(g.copy_to_host())))

    # --- between libraries -------------------------------------------------------------------

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def taken(self, values: Array, x: Array) -> Array:
        return values

    def converted(self, x: Array, dtype: Any, copy: bool) -> Array:
        wanted = dtypes.numpy_dtype(dtype)
        return self.astype(x, wanted) if copy or x.dtype != wanted else x

    def adopted(self, values: Array, like: Array) -> Array:
        return values

    def piece(self, v: Array, start: int, shape: tuple[int, ...]) -> Array:
        size = math.prod(shape)
        if not size:
            return _cuda().device_array(tuple(shape), v.dtype, stream=v.stream)
        part = v[start : start + size]
        if numba_private.is_simulated(v):
            return part.reshape(tuple(shape))
        reach, strides = v.strides[0], []
        for n in reversed(shape):
            strides.append(reach)
            reach *= n
        return numba_private.view(part, tuple(shape), tuple(reversed(strides)))

    def concatenated(
        self, pieces: Sequence[Any], shapes: Sequence[tuple[int, ...]], like: Array, dtype: Any
    ) -> Array:
        size = sum(map(math.prod, shapes))
        out = _cuda().device_array((size,), np.dtype(dtype), stream=like.stream)
        start = 0
        for x, shape in zip(pieces, shapes, strict=True):
            self.assign(self.piece(out, start, shape), 0.0 if x is None else x)
            start += math.prod(shape)
        return out

    # --- files -------------------------------------------------------------------------------

    def on_host(self, x: Array) -> np.ndarray:
        return np.asarray(x.copy_to_host())

    def loaded(self, a: np.ndarray, like: Array) -> Array:
        return _cuda().to_device(a)


def _cuda() -> Any:
    return sys.modules["numba.cuda"]


LIBRARY = Numba()
