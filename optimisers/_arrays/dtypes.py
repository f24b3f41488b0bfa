"""Dtypes of all array libraries, by their names. No library but NumPy is imported."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

FLOAT32: np.dtype[Any] = np.dtype(np.float32)

FLOATING = frozenset("fc")
"""The kinds of NumPy's own dtypes of real and complex floating numbers."""


# Caches of dtypes are typed: some libraries warn where theirs are compared with NumPy's.


@functools.lru_cache(maxsize=256, typed=True)
def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of any library and byte order, like ``float32``."""
    name = getattr(dtype, "name", None)
    return str(dtype).rpartition(".")[2] if name is None else str(name)


@functools.lru_cache(maxsize=256, typed=True)
def is_floating(dtype: Any) -> bool:
    """Tell whether a dtype is one of real or complex floating numbers.

    Those of ``ml_dtypes`` are of NumPy's kind "V".
    """
    kind = getattr(dtype, "kind", None)
    if kind is None:
        return dtype_name(dtype).startswith(("float", "bfloat", "complex"))
    named = kind == "V" and dtype_name(dtype).startswith(("float", "bfloat"))
    return kind in FLOATING or named


@functools.lru_cache(maxsize=256, typed=True)
def is_number(dtype: Any) -> bool:
    """Tell whether a dtype is one of numbers or truth values, which a gradient may have."""
    if getattr(dtype, "kind", "") in "biufc" and hasattr(dtype, "kind"):
        return True
    return dtype_name(dtype).startswith(("bool", "int", "uint", "float", "bfloat", "complex"))


def is_narrow(x: Any) -> bool:
    """Tell whether an array has floating numbers of fewer bits than float32.

    A step on these is computed in float32, and its results are rounded once: see `rules._numbers`.
    """
    return is_narrow_dtype(x.dtype)


@functools.lru_cache(maxsize=256, typed=True)
def is_narrow_dtype(dtype: Any) -> bool:
    """Tell whether floating numbers of a dtype have fewer bits than those of float32."""
    found = re.match(r"b?float(\d+)", dtype_name(dtype))
    return found is not None and int(found[1]) < 32


@functools.lru_cache(maxsize=64, typed=True)
def largest(dtype: Any) -> float:
    """Return the largest finite number of a narrow dtype of any library."""
    if not isinstance(dtype, np.dtype):
        return float(sys.modules["torch"].finfo(dtype).max)
    if dtype == np.float16:
        return 65504.0
    return float(sys.modules["ml_dtypes"].finfo(dtype).max)


def is_complex_dtype(dtype: Any) -> bool:
    """Tell whether a dtype of any library is one of complex numbers."""
    return dtype_name(dtype).startswith("complex")


def native(dtype: Any) -> Any:
    """Return a dtype in the byte order of this machine."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """Return NumPy's dtype for one of any library, or for a name; bfloat16 is of ``ml_dtypes``."""
    if isinstance(dtype, np.dtype):
        return dtype
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    if name != "bfloat16":
        return np.dtype(name)
    found: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return found


def itemsize(name: str) -> int:
    """Return how many bytes a number has; those of bfloat16 without asking ``ml_dtypes``."""
    return 2 if name == "bfloat16" else np.dtype(name).itemsize


def promoted(dtypes: Sequence[Any]) -> Any:
    """Return the dtype of a vector that holds numbers of all these dtypes."""
    distinct = list(dict.fromkeys(dtypes))
    if len(distinct) < 2:
        return distinct[0] if distinct else np.dtype(np.float64)
    if not any(isinstance(dtype, np.dtype) for dtype in distinct):
        return functools.reduce(sys.modules["torch"].promote_types, distinct)
    # NumPy promotes no two extension dtypes, such as bfloat16, and none of them with float16.
    plain = [numpy_dtype(dtype) for dtype in distinct]
    return np.result_type(*(_wide(dtype) if dtype.kind == "V" else dtype for dtype in plain))


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.complex64 if is_complex_dtype(dtype) else np.float32)
