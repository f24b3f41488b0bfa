"""The arrays of a file: read when asked for, checked, each made once for each array library."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import numpy as np

from .._arrays import library_of
from .._ties import carry
from . import _safetensors as form
from ._entries import ArrayNode, StoredTensor, damaged
from ._revive import as_like, typed
from ._safetensors import Source
from ._tables import Said

Array = Any

_SMALL, _BLOCK = 1 << 16, 1 << 20
"""Bytes of arrays that are read together, and of what is then read at a time."""


class ArrayReader:
    """Reads the arrays of a file; one that is at several places is one array at all of them."""

    def __init__(self, source: Source, tensors: list[StoredTensor]) -> None:
        self.source = source
        self.tensors = tensors
        self._bases: dict[tuple[int, str], Any] = {}
        self._arrays: dict[tuple[int, str], tuple[Any, ArrayNode]] = {}

    def raw(self, k: int, verify: bool = True) -> np.ndarray:
        """Read the bytes of an array, and check them."""
        raw, check = form.read_raw(self.source, self.tensors[k].entry)
        self.check(k, raw, check if verify else None)
        return raw

    def verify(self, k: int) -> None:
        """Check the bytes of an array against their checksum, without holding all of them."""
        tensor, check = self.tensors[k], 0
        for chunk in form.read_through(self.source, tensor.entry):
            check = zlib.crc32(chunk.data, check)
            form.check_content(tensor.name, tensor.entry.tag, chunk)
        self.check(k, np.empty(0, np.uint8), check)

    def check(self, k: int, raw: np.ndarray, check: int | None) -> None:
        """Refuse bytes that are not those that were written."""
        tensor = self.tensors[k]
        if check is not None and tensor.check not in (None, check):
            damaged(f"the array {tensor.name!r} has another checksum than when it was written")
        form.check_content(tensor.name, tensor.entry.tag, raw)

    def array(self, said: ArrayNode, like: Array) -> Array:
        """Return an array of the library of `like`; where `said` is shared, so is the array."""
        library = (library_of(type(like)) if like is not None else None) or "numpy"
        own = "torch" if library == "torch" else "numpy"
        tensor = self.tensors[said.tensor]
        mark = id(said), library
        if mark not in self._arrays:
            base = self._bases.get((said.tensor, own))
            if base is None:
                raw = self.raw(said.tensor)
                base = typed(raw, tensor.dtype, tensor.layout, own, like)
                self._bases[said.tensor, own] = base
            if said.view is not None:
                base = carry(base, tensor.layout, said.view)
            self._arrays[mark] = as_like(base, library, like), said  # an id is good while it lives
        return self._arrays[mark][0]

    def plain_array(self, said: Said) -> Array:
        """Return the array of NumPy that a node stands for."""
        base = self._bases.get((said[1], "numpy"))
        if len(said) == 2 and base is not None:
            return base
        return self.array(ArrayNode(said[1], said[2] if len(said) == 3 else None), None)

    def read_small(self, wanted: list[int]) -> None:
        """Read the small arrays among these, many at a time."""
        small = sorted(
            (tensor.entry.start, tensor.entry.stop, k)
            for k in {*wanted}
            if (tensor := self.tensors[k]).entry.stop - tensor.entry.start <= _SMALL
        )
        dtypes: dict[str, Any] = {}
        is_little = sys.byteorder == "little"
        at = 0
        while at < len(small):
            begin = small[at][0]
            end = at
            while end < len(small) and small[end][1] - begin <= _BLOCK:
                end += 1
            block = np.empty(small[end - 1][1] - begin, np.uint8)
            data = block.data
            self.source.fill(data, begin)
            for start, stop, k in small[at:end]:
                tensor = self.tensors[k]
                start, stop = start - begin, stop - begin
                if tensor.check is not None and tensor.check != zlib.crc32(data[start:stop]):
                    self.check(k, block[:0], tensor.check ^ 1)
                if tensor.entry.tag == "BOOL":
                    form.check_content(tensor.name, "BOOL", block[start:stop])
                dtype = dtypes.get(tensor.dtype)
                if dtype is None:
                    dtype = dtypes[tensor.dtype] = form.numpy_dtype(tensor.dtype)
                if tensor.layout.flips or tensor.layout.order != (*range(len(tensor.shape)),):
                    raw = block[start:stop].copy()
                    base = typed(raw, tensor.dtype, tensor.layout, "numpy", None)
                elif is_little:
                    base = np.array(np.ndarray(tensor.shape, dtype, block, start))
                else:
                    base = form.typed(block[start:stop].copy(), tensor.dtype, tensor.shape)
                self._bases[k, "numpy"] = base
            at = end
