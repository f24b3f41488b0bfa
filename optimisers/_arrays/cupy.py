"""Arrays of CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from . import dtypes
from .devices import DeviceLibrary

Array = Any


class Cupy(DeviceLibrary):
    """They compute like arrays of NumPy, on their device."""

    key = "cupy"
    name = "CuPy"
    sums_truth = True
    to_host = ".get()"
    to_device = "cupy.asarray(...)"
    keeps_order = True
    mixes_with_numpy = True

    def owns(self, cls: type) -> bool:
        return issubclass(cls, cupy.ndarray)

    def address(self, x: Array) -> int:
        return int(x.data.ptr)

    def device(self, x: Array) -> int:
        return int(x.device.id)

    def stream(self, x: Array) -> int:
        return int(cupy.cuda.get_current_stream(self.device(x)).ptr)

    def transposed(self, x: Array, order: Sequence[int]) -> Array:
        return x.transpose(tuple(order))

    def reshaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        return cupy.empty_like(x, dtype=dtype)

    def assign(self, x: Array, values: Any) -> None:
        x[...] = values if isinstance(values, float) else self.adopt(values)

    def adopt(self, g: Array) -> Array:
        return cupy.asarray(g)

    def own_dtype(self, x: Array, dtype: Any) -> Any:
        return dtypes.numpy_dtype(dtype)

    def is_nonzero(self, g: Array) -> bool:
        return bool((g != 0).any())

    def from_numpy(self, a: np.ndarray, like: Array) -> Array:
        return cupy.asarray(a)

    def taken(self, values: Any, x: Array) -> Array:
        return self.adopt(values)

    def on_host(self, x: Array) -> np.ndarray:
        return np.asarray(x.get())


LIBRARY = Cupy()
