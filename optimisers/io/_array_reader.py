"""The arrays of a file: read when asked for, checked, each made once for each array library."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from .._arrays.layout import View
from .._arrays.library import Library, library_of
from .._arrays.numpy import LIBRARY as NUMPY
from .._arrays.sharing import carry
from . import _safetensors as form
from ._entries import ArrayNode, StoredTensor, c_order, damaged
from ._json import FileFormatError
from ._revive import typed
from ._safetensors import Source

Array = Any

_SMALL, _BLOCK = 1 << 16, 1 << 20
"""Bytes of arrays that are read together, and of what is then read at a time."""
_DTYPE_AND_LAYOUT = attrgetter("dtype", "layout")


class ArrayReader:
    """Reads the arrays of a file; one that is at several places is one array at all of them."""

    def __init__(self, source: Source, tensors: list[StoredTensor]) -> None:
        self.source = source
        self.tensors = tensors
        self.bases: dict[int, np.ndarray] = {}
        """The arrays of NumPy that were read, each in the layout in which it was saved."""
        self._others: dict[int, Any] = {}
        """Those of the library that makes its own of bytes (PyTorch)."""
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
        library = NUMPY if like is None else library_of(like) or NUMPY
        mark = id(said), library.key
        if mark not in self._arrays:
            tensor = self.tensors[said.tensor]
            base = self._base(said.tensor, library, like)
            if said.view is not None:
                base = carry(base, tensor.layout, said.view)
            self._arrays[mark] = library.loaded(base, like), said  # an id is good while it lives
        return self._arrays[mark][0]

    def of_numpy(self, k: int, view: View | None) -> np.ndarray:
        """Return an array of NumPy, or another view of one."""
        base: np.ndarray = self._base(k, NUMPY, None)
        return base if view is None else carry(base, self.tensors[k].layout, view)

    def _base(self, k: int, library: Library, like: Array) -> Array:
        bases: dict[int, Any] = self._others if library.reads_bytes else self.bases
        if k not in bases:
            tensor = self.tensors[k]
            with _naming(tensor.name):
                bases[k] = typed(self.raw(k), tensor.dtype, tensor.layout, library, like)
        return bases[k]

    def read_small(self, wanted: Iterable[int]) -> None:
        """Read the small arrays among these as arrays of NumPy, many at a time."""
        bases, tensors = self.bases, self.tensors
        entries = [(*tensors[k].entry[2:], k) for k in {*wanted} if k not in bases]
        small = sorted([entry for entry in entries if entry[1] - entry[0] <= _SMALL])
        at = 0
        while at < len(small):
            begin, end = small[at][0], at
            while end < len(small) and small[end][1] - begin <= _BLOCK:
                end += 1
            self._read_block([k for _, _, k in small[at:end]], begin)
            at = end

    def _read_block(self, numbers: list[int], begin: int) -> None:
        """Read arrays that lie one after another, and make each of its own bytes."""
        tensors = self.tensors
        data = memoryview(bytearray(tensors[numbers[-1]].entry.stop - begin))
        self.source.fill(data, begin)
        dtypes: dict[str, Any] = {}
        at = 0
        for (name, layout), group in groupby([tensors[k] for k in numbers], _DTYPE_AND_LAYOUT):
            row = numbers[at : at + len([*group])]
            at += len(row)
            first, last = tensors[row[0]].entry, tensors[row[-1]].entry
            piece = data[first.start - begin : last.stop - begin]
            if name not in dtypes:
                is_usual = sys.byteorder == "little" and name != "bool"
                with _naming(tensors[row[0]].name):
                    dtypes[name] = form.numpy_dtype(name) if is_usual else None
            dtype = dtypes[name]
            is_plain = dtype is not None and layout is c_order(layout.shape)
            is_dense = 0 < len(row) * (first.stop - first.start) == len(piece)
            if is_plain and is_dense and len(row) > 1:
                self._read_row(row, piece, dtype, layout.shape)
            else:
                for k in row:
                    entry = tensors[k].entry
                    piece = data[entry.start - begin : entry.stop - begin]
                    self._read_one(k, piece, dtype if is_plain else None)

    def _read_row(
        self, row: list[int], data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        """Make arrays of one dtype and shape of the bytes that they have, one after another."""
        raw: Any = np.frombuffer(data, np.uint8).reshape(len(row), -1)
        for k, said, found in zip(
            row, [self.tensors[k].check for k in row], map(zlib.crc32, raw), strict=True
        ):
            if said != found:
                self.check(k, raw[:0], found)
        xs = raw.view(dtype)
        made = map(np.ndarray.copy, xs.reshape(-1, *shape)) if shape else map(np.array, xs[:, 0])
        self.bases.update(zip(row, made, strict=True))

    def _read_one(self, k: int, data: memoryview, dtype: np.dtype[Any] | None) -> None:
        """Make an array of its bytes; with a dtype, if they are those of one in C order."""
        tensor, raw = self.tensors[k], np.array(data)
        self.check(k, raw, zlib.crc32(data))
        if dtype is not None:
            self.bases[k] = np.ndarray(tensor.shape, dtype, data).copy()
            return
        with _naming(tensor.name):
            self.bases[k] = typed(raw, tensor.dtype, tensor.layout, NUMPY, None)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of an array before what is wrong with it."""
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"the array {name!r:.60}: {error}") from None
