"""Files and their headers, changed for the tests."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved import tied_model

from optimisers import AccumGrad, Adam, ClipNorm, MixedPrecision, Momentum, OptimiserChain, setup
from optimisers.io import File, FileFormatError, load


def trees() -> tuple[Any, Any]:
    """Return a state and a model with something of everything, small."""
    model = {
        **tied_model(),
        "half": np.ones(3, np.float16),
        "mask": np.array([True, False]),
        "z": np.array([1 + 2j]),
        "values": [None, True, 7, 0.5, math.inf, "text", b"b", (), np.float32(2), {3: 4}],
        "last": np.arange(5, dtype=np.int8),
    }
    chain = OptimiserChain(ClipNorm(p=math.inf), AccumGrad(2), Adam())
    state = setup(chain, model)
    state["half"] = setup(MixedPrecision(Momentum()), model["half"])
    return state, model


def read(path: Path, content: bytes) -> Any:
    """Write bytes into a file and load it in each of the ways, which must agree."""
    path.write_bytes(content)
    with File(path) as file:
        metadata = file.metadata
        file.verify()
        windows = {name: np.array(x) for name, x in file.items()}
    return load(path), metadata, windows


def read_by_window(path: Path) -> None:
    with File(path) as file:
        file.verify()
        file.load()


def assert_refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=match):
            load(path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1_000_000 + 60 * len(content)
    with pytest.raises(FileFormatError, match=match):
        read_by_window(path)


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (n,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def changed(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a file whose text says something else, with checksums that are right."""
    header, data = header_of(content)
    said = header["__metadata__"]
    told = json.loads(said["optimisers"])
    change(told)
    said["optimisers"] = json.dumps(told)
    check = zlib.crc32(said["optimisers"].encode())
    said["optimisers.crc32"] = f"{check:08x}" + said["optimisers.crc32"][8:]
    return with_header(header, data)
