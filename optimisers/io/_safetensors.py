"""The safetensors file format: arrays of bytes under names, no code, nothing to run.

    8 bytes         length of the header, little-endian
    header          JSON: name -> dtype, shape, [start, stop]; "__metadata__" -> strings
    data            the arrays one after another, C order, little-endian, without gaps

a) What is read may be hostile. A header is checked whole, against the size of the file too, before
   anything is made of it: the worst that a file can do is a `FileFormatError`.
b) Data begins at a multiple of 64 bytes, and large items come before small ones, so that every
   array is aligned to its items, also in a memory map. That asks of the format only spaces.
c) The format has no complex128, no longdouble, and only some floats of 8 bits. Such arrays are
   written as *views* (`stored`), which any reader of the format can turn back.
d) Checksums stand in the metadata, at a place known before the data is written: arrays are gone
   through once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .._arrays import dtypes
from .._fork import Turn
from ._atomic import opened, replacing
from ._json import FileFormatError, decoded, parse, shown, without_strings

MAX_HEADER = 100_000_000
"""Bytes of a header, at most: what other readers of the format allow."""
MAX_AXES = 64
_ALIGNMENT = 64
CHUNK = 1 << 18
"""Bytes between two glances at memory: a chunk is in the cache when it is written."""


# --- dtypes ----------------------------------------------------------------------------------

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_TAGS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "complex64": "C64",
    "int64": "I64", "uint64": "U64", "int32": "I32", "uint32": "U32", "int16": "I16",
    "uint16": "U16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NAMES = {tag: name for name, tag in _TAGS.items()}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, **{tag: 8 * size for tag, size in _BYTES.items()}}
"""Of an item of each dtype of the format, also of those that no array library here has."""
_TAG = {tag: tag for tag in _BITS}
"""So that all entries hold one text of each."""
_ONE_BYTE = (
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float6_e2m3fn", "float6_e3m2fn",
    "float4_e2m1fn", "int4", "uint4", "int2", "uint2",
)  # fmt: skip


def _extended(kind: type) -> str:
    """Return a name for extended numbers that tells those of one machine from another's."""
    info = np.finfo(kind)
    return f"{kind.__name__}-{info.nmant}-{np.dtype(kind).itemsize}"


_EXTENDED = {"g": _extended(np.longdouble), "G": _extended(np.clongdouble)}
_FROM_ML_DTYPES = {"bfloat16", *_ONE_BYTE, *(name for name in _TAGS if name.startswith("float8"))}


def _is_extended(dtype: np.dtype[Any]) -> bool:
    """Tell whether these are longdoubles; `ml_dtypes` gives the same letters to other dtypes."""
    return dtype.kind in "fc" and dtype.char in _EXTENDED


@functools.lru_cache(maxsize=256, typed=True)
def dtype_name(dtype: Any) -> str | None:
    """Return the name under which a dtype of any library is saved, None if it cannot be."""
    if isinstance(dtype, np.dtype):
        if _is_extended(dtype):
            return _EXTENDED[dtype.char]
        name = dtype.name
    else:
        name = dtypes.dtype_name(dtype)
    return name if name in _TAGS or name in _ONE_BYTE or name == "complex128" else None


def stored(name: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Return the format's dtype and the shape in which an array of dtype `name` is written.

    complex128 is written as float64 with real and imaginary part along one more axis, an extended
    number as its bytes along one more axis, a float of less than two bytes as one byte.
    """
    if not isinstance(name, str):
        raise FileFormatError(f"the file has {name!r:.40} for a dtype")
    if name in _TAGS:
        return _TAGS[name], tuple(shape)
    if name == "complex128":
        return "F64", (*shape, 2)
    if name in _ONE_BYTE:
        return "U8", tuple(shape)
    for char, known in _EXTENDED.items():
        if name == known:
            return "U8", (*shape, np.dtype(char).itemsize)
    if name.startswith(("longdouble-", "clongdouble-")):
        raise FileFormatError(
            f"the file holds numbers of the kind {name!r}, while longdouble is "
            f"{_EXTENDED['g']!r} on this machine; read it where it was written"
        )
    raise FileFormatError(f"the file holds an array of dtype {name!r}, which is not known here")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of NumPy that has this name."""
    for char, known in _EXTENDED.items():
        if name == known:
            return np.dtype(char)
    if name not in _TAGS and name not in _ONE_BYTE and name != "complex128":
        raise FileFormatError(f"the file holds an array of dtype {name!r}, which is not known here")
    if name in _FROM_ML_DTYPES:
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(
                f"the file holds an array of dtype {name}, which NumPy knows only with the "
                "package ml_dtypes: install it, or load with like= and PyTorch tensors"
            ) from None
        if not hasattr(ml_dtypes, name):
            raise FileFormatError(f"the ml_dtypes installed here has no {name}")
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def typed(raw: np.ndarray, name: str, shape: Sequence[int]) -> np.ndarray:
    """Return bytes in the order of the file as an array, a view of them where that is possible."""
    dtype = numpy_dtype(name)
    if sys.byteorder != "little" and dtype.itemsize > 1:
        raw = raw.view(dtype.newbyteorder("<")).astype(dtype).view(np.uint8)
    x: np.ndarray = raw.view(dtype).reshape(shape)
    return x


@functools.lru_cache(maxsize=256)
def lies_as_in_files(dtype: np.dtype[Any]) -> bool:
    """Tell whether the bytes of such numbers are those of the file."""
    is_native = dtype.byteorder in "|<" or (dtype.byteorder == "=" and sys.byteorder == "little")
    return is_native and not _is_extended(dtype)


def untyped(x: np.ndarray) -> np.ndarray:
    """Return the bytes of an array in the order of the file."""
    if _is_extended(x.dtype):
        x = _without_padding(x)
    elif x.dtype.byteorder == ">" or (sys.byteorder != "little" and x.dtype.byteorder == "="):
        x = x.astype(x.dtype.newbyteorder("<"))
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _without_padding(x: np.ndarray) -> np.ndarray:
    """Return extended numbers whose bytes without meaning are zero, so that files are equal."""
    part = np.dtype(np.longdouble)
    x = np.array(x, x.dtype.newbyteorder("="), order="C")
    if np.finfo(part).nmant == 63:  # ten bytes with meaning
        x.reshape(-1).view(np.uint8).reshape(-1, part.itemsize)[:, 10:] = 0
    return x


# --- writing ---------------------------------------------------------------------------------


class Form(NamedTuple):
    """How arrays of one dtype and shape are written."""

    size: int
    """Bytes of the whole array."""
    item: int
    """Bytes of one item, as those who view it will want it aligned."""
    entry: str
    """What the header says of them."""
    said: str
    """What our text says of them."""
    tag: str
    """Their dtype in the header."""
    shape: tuple[int, ...]
    """Their shape in the header."""


@functools.lru_cache(maxsize=1024)
def form_of(dtype: str, shape: tuple[int, ...]) -> Form:
    """Return how arrays of this dtype and shape are written."""
    tag, shape_there = stored(dtype, shape)
    _, one = stored(dtype, ())
    return Form(
        _BYTES[tag] * math.prod(shape_there),
        _BYTES[tag] * math.prod(one),
        f'"dtype":"{tag}","shape":{listed_shape(shape_there)}',
        f'"dtype":"{dtype}","shape":{listed_shape(shape)}',
        tag,
        shape_there,
    )


class Tensor(NamedTuple):
    """An array to be written; its name is as JSON has it."""

    name: str
    form: Form
    x: Any


KEY, CHECKSUMS = "optimisers", "optimisers.crc32"
"""Where in the metadata our own text is, and the checksums of it and of each array."""


def write(
    path: str, tensors: Sequence[Tensor], text: str, raw: Callable[[Any], np.ndarray]
) -> None:
    """Write a file in one go: afterwards there is the new file or, after an error, the old one.

    `raw` gives the bytes of an array when its turn comes.
    """
    count = len(tensors)
    order, _, said = laid_out([tensor[0] for tensor in tensors], [tensor[1] for tensor in tensors])
    blank = "0" * (8 * (count + 1))
    metadata = f'{{"{CHECKSUMS}":"{blank}","{KEY}":{quoted(text)}}}'
    encoded = f'{{"__metadata__":{metadata}{said}}}'.encode("ascii")
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    if len(encoded) > MAX_HEADER:
        raise ValueError(
            f"the header of {shown(path)} would take {len(encoded):,} bytes, more than the "
            f"{MAX_HEADER:,} that the format allows; save the model in several files"
        )
    checks = [zlib.crc32(text.encode("ascii")), *(0,) * count]
    with replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for k in order:
            checks[k + 1] = _copied(tensors[k], raw, file)
        file.seek(8 + encoded.index(blank.encode("ascii")))
        file.write("".join([f"{check:08x}" for check in checks]).encode("ascii"))


def laid_out(
    names: Sequence[str], forms: Sequence[Form]
) -> tuple[Sequence[int], Sequence[int], str]:
    """Return the order in which arrays lie, where each begins, and what the header says of all."""
    order: Sequence[int] = range(len(forms))
    if len({kind.item for kind in forms}) > 1:
        order = sorted(order, key=lambda k: -forms[k].item)
    starts = [0] * len(forms)
    start, entries = 0, []
    for k in order:
        size, _, entry, *_ = forms[k]
        starts[k] = start
        stop = start + size
        entries.append(f',{names[k]}:{{{entry},"data_offsets":[{start},{stop}]}}')
        start = stop
    return order, starts, "".join(entries)


quoted = json.encoder.encode_basestring_ascii
"""Gives a text as JSON has it."""


@functools.lru_cache(maxsize=1024)
def listed_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as JSON has it."""
    return f"[{','.join(map(str, shape))}]"


def _copied(tensor: Tensor, raw: Callable[[Any], np.ndarray], file: BinaryIO) -> int:
    """Write the bytes of an array, and return their checksum.

    Another thread may change the array meanwhile. Each chunk is copied once, and what is summed up
    is what is written.
    """
    name, (size, *_), x = tensor
    if size <= CHUNK and type(x) is np.ndarray and lies_as_in_files(x.dtype):
        chunk = x.tobytes()
        _refuse_other_size(name, len(chunk), size)
        file.write(chunk)
        return zlib.crc32(chunk)
    data = raw(x).data
    _refuse_other_size(name, data.nbytes, size)
    check = 0
    for at in range(0, size, CHUNK):
        chunk = bytes(data[at : at + CHUNK])
        check = zlib.crc32(chunk, check)
        file.write(chunk)
    return check


def _refuse_other_size(name: str, found: int, size: int) -> None:
    if found != size:
        raise ValueError(
            f"the array {shown(name)} had {size:,} bytes when the save began, and then {found:,}: "
            "do not resize arrays while they are saved"
        )


# --- reading ---------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Where an array lies in a file."""

    tag: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def dtype(self) -> str:
        """Return the name of the dtype that the format says it has; the format's own if unknown."""
        return _NAMES.get(self.tag, self.tag)


class Header(NamedTuple):
    """A header that has passed all checks."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


_reading = Turn()


class Source:
    """A file that threads, forked children and handlers of signals read, each where it wants to.

    Parameters
    ----------
    path : str or path
        The file. Only a regular one is taken: a pipe could be waited for without end.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = opened(os.fspath(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self.close()
            raise FileFormatError("no safetensors file: it is no regular file")

    def close(self) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def fill(self, data: memoryview, at: int) -> None:
        """Read as many bytes as `data` has room for, from this place on."""
        done = 0
        while done < len(data):
            got = self._read(data[done:], at + done)
            if not got:
                raise FileFormatError("the file was cut short while it was read")
            done += got

    def _read(self, data: memoryview, at: int) -> int:
        # A position in the file would be one for all: parents, children, threads, handlers.
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [data], at)
        if hasattr(os, "pread"):
            found = os.pread(self._file.fileno(), len(data), at)
            data[: len(found)] = found
            return len(found)
        with _reading:  # as on Windows; a handler that comes in between goes back to our place
            before = self._file.tell()
            try:
                self._file.seek(at)
                return self._file.readinto(data) or 0
            finally:
                self._file.seek(before)


def read_header(source: Source) -> Header:
    """Read the header of a file and check it; `Entry.start` counts from the begin of the file."""
    encoded, size = read_encoded(source)
    begin = 8 + len(encoded)
    text = decoded(encoded, "the header")
    del encoded
    return _checked(parse(text, "the header", _HeaderObjects(begin), _refuse_crowd), begin, size)


def read_encoded(source: Source) -> tuple[bytearray, int]:
    """Read the bytes of a header; return the size of the file with it."""
    size = source.size()
    if size < 8:
        raise FileFormatError(f"no safetensors file: it has {size} bytes, a header needs 8")
    first = bytearray(8)
    source.fill(memoryview(first), 0)
    length = int.from_bytes(first, "little")
    if length > min(MAX_HEADER, size - 8):
        raise FileFormatError(
            f"no safetensors file, or cut short: its first 8 bytes say that a header of {length:,} "
            f"bytes follows, and the file has {size:,} bytes (allowed: {MAX_HEADER:,})"
        )
    encoded = bytearray(length)
    source.fill(memoryview(encoded), 8)
    return encoded, size


def _refuse_crowd(text: str) -> None:
    """Refuse a header of very many texts or numbers that no arrays account for.

    All of them would be there, at up to 25 times their size, before the first is looked at. Our own
    text, in which quotes have backslashes before them, is looked at when its turn comes.
    """
    arrays = text.count('"data_offsets"')
    begin, end = text.find('\\"'), text.rfind('\\"')
    texts = (text.count('"') - (text.count('"', begin, end + 2) if end > begin else 0)) // 2
    if texts > 5 * arrays + _MOST_OTHERS:
        raise FileFormatError(_CROWDED.format(f"{texts:,} texts", f"{arrays:,}"))
    numbers = text.count(",") - (text.count(",", begin, end) if end > begin else 0)
    most = (3 + MAX_AXES) * arrays + _MOST_OTHERS
    if numbers > most:  # in a string of another program's metadata, perhaps
        numbers = without_strings(text).count(",")
    if numbers > most:
        raise FileFormatError(_CROWDED.format(f"{numbers:,} commas", f"{arrays:,}"))


_CROWDED = "the header is no JSON text of a file: it has {} and {} arrays"
_MOST_OTHERS = 20_000
"""Texts and numbers in a header that belong to no array: those of the metadata."""


class _HeaderObjects:
    """Makes of the objects of a header: entries, one dictionary of strings, and the header."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.others = 0
        self._known: dict[tuple[Any, ...], tuple[int, str, tuple[int, ...]]] = {}

    def __call__(self, pairs: list[tuple[str, Any]]) -> Any:
        if len(pairs) == 3:
            (a, tag), (b, shape), (c, offsets) = pairs
            if a != "dtype" or b != "shape" or c != "data_offsets":
                found = dict(pairs)
                if found.keys() == _ENTRY:
                    return _entry(found["dtype"], found["shape"], found["data_offsets"], self.begin)
            else:
                try:
                    start, stop = offsets
                    size, its_tag, its_shape = self._known[(tag, *shape, *map(type, shape))]
                    is_known = type(shape) is list and type(start) is int and type(stop) is int
                    if is_known and start >= 0 and stop - start == size:
                        begin = self.begin
                        return _new(Entry, (its_tag, its_shape, begin + start, begin + stop))
                except (KeyError, TypeError, ValueError):
                    pass
                return self._entry(tag, shape, offsets)
        self.others += 1
        if self.others > 3:
            raise FileFormatError("an array needs a dtype, a shape and data_offsets")
        found = dict(pairs)
        if len(found) < len(pairs):
            raise FileFormatError("it has a key twice")
        return found

    def _entry(self, tag: Any, shape: Any, offsets: Any) -> Entry:
        """Return an entry; arrays of one dtype and shape, as most are, need not be looked at twice.

        The classes of the numbers are part of what is known, since True == 1 == 1.0.
        """
        entry = _entry(tag, shape, offsets, self.begin)
        if entry.tag in _BITS and len(self._known) < _MOST_KNOWN:
            kind = (entry.tag, *entry.shape, *map(type, entry.shape))
            self._known[kind] = entry.stop - entry.start, entry.tag, entry.shape
        return entry


_new = tuple.__new__
_MOST_KNOWN = 1000
"""Pairs of a dtype and a shape that are kept in mind while a header is read."""
_ENTRY = {"dtype", "shape", "data_offsets"}


def _checked(header: dict[str, Any], begin: int, size: int) -> Header:
    if type(header) is not dict:
        raise FileFormatError("an array needs a dtype, a shape and data_offsets")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    is_dict = type(metadata) is dict
    if not is_dict or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFormatError("__metadata__ must hold strings")
    for name, entry in header.items():
        if type(entry) is not Entry:
            raise FileFormatError(f"the array {name!r} needs a dtype, a shape and data_offsets")
    starts = [entry[2] for entry in header.values()]
    stops = [begin, *(entry[3] for entry in header.values())]
    end = stops.pop()
    if starts != stops[: len(starts)]:
        end = _end_of_sorted(header, begin)
    if end != size:
        raise FileFormatError(
            f"the file should have {end:,} bytes by its header, and has {size:,}: "
            f"{'cut short' if end > size else 'something was appended'}"
        )
    return Header(header, metadata)


def _end_of_sorted(entries: dict[str, Entry], begin: int) -> int:
    """Return where the last array ends; refuse arrays that do not lie one after another."""
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            fault = "overlaps the one before it" if entry.start < end else "comes after a gap"
            raise FileFormatError(f"the array {name!r} {fault}")
        end = entry.stop
    return end


def _entry(tag: Any, shape: Any, offsets: Any, begin: int) -> Entry:
    if not isinstance(tag, str):
        raise FileFormatError(f"an array has no valid dtype: {tag!r:.40}")
    if shape != [] and not is_shape(shape):
        raise FileFormatError(f"an array has no valid shape: {shape!r:.80}")
    if type(offsets) is not list or [*map(type, offsets)] != _TWO_INTS or offsets[0] < 0:
        raise FileFormatError(f"an array has no valid data_offsets: {offsets!r:.80}")
    start, stop = offsets
    # Later versions of the format have dtypes of which one can tell only that they lie there.
    if stop < start or (tag in _BITS and 8 * (stop - start) != _BITS[tag] * math.prod(shape)):
        raise FileFormatError(
            f"an array of dtype {tag} and shape {shape!r:.80} cannot lie in {stop - start:,} bytes"
        )
    return Entry(_TAG.get(tag, tag), tuple(shape), begin + start, begin + stop)


_TWO_INTS = [int, int]


def _are_whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def is_shape(numbers: Any) -> bool:
    """Tell whether an array can have this shape, also where a 0 makes its size small."""
    if type(numbers) is list and len(numbers) == 1 and type(numbers[0]) is int:
        return 0 <= numbers[0] < 2**56
    return (
        _are_whole(numbers)
        and len(numbers) <= MAX_AXES
        and math.prod(n or 1 for n in numbers) < 2**56
    )


def read_raw(source: Source, entry: Entry) -> tuple[np.ndarray, int]:
    """Read the bytes of an array, and their checksum."""
    raw = np.empty(entry.stop - entry.start, np.uint8)
    data = raw.data
    check = 0
    for at in range(0, len(data), CHUNK):
        chunk = data[at : at + CHUNK]
        source.fill(chunk, entry.start + at)
        check = zlib.crc32(chunk, check)
    return raw, check


def read_through(source: Source, entry: Entry) -> Iterator[np.ndarray]:
    """Read the bytes of an array, a chunk at a time, which is good until the next is asked for."""
    room = np.empty(min(entry.stop - entry.start, CHUNK), np.uint8)
    for at in range(entry.start, entry.stop, CHUNK):
        chunk = room[: entry.stop - at]
        source.fill(chunk.data, at)
        yield chunk


def check_content(name: str, tag: str, raw: np.ndarray) -> None:
    """Refuse bytes that NumPy would take for truth values and that are neither 0 nor 1."""
    if tag == "BOOL" and raw.size and raw.max() > 1:
        raise FileFormatError(f"the array {name!r} of truth values has bytes beyond 0 and 1")


def checksums(said: str, count: int) -> list[int]:
    """Return the checksum of our text, then those of the `count` arrays."""
    try:
        raw = bytes.fromhex(said)
    except ValueError:
        raw = b""
    if len(raw) != 4 * (count + 1) or raw.hex() != said:
        raise FileFormatError(f"the checksums are damaged: there should be {count + 1}")
    found: list[int] = np.frombuffer(raw, ">u4").tolist()
    return found
