"""Headers that are as `save` writes them are compared, and others are parsed, to the same end."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.io import FileFormatError, _safetensors, load, save

MODEL = {
    "layers": [{"w": np.full((2, 3), k, np.float32), "b": np.arange(3.0)} for k in range(4)],
    "wide": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "whole": np.arange(5),
    "complex": np.array([1 + 2j, 3]),
    "mask": np.array([True, False]),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 3)),
    "name": "tiny",
    "rest": (1, None, [2.5], SimpleNamespace(x=np.ones(2)), OrderedDict(y=np.ones(3))),
}


def trees() -> tuple[Any, Any]:
    """Return a state and its model."""
    return opt.setup(opt.Adam(), MODEL), MODEL


def header_of(raw: bytes) -> dict[str, Any]:
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def with_header(raw: bytes, encoded: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    return len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :]


def flat(tree: Any) -> list[str]:
    """Return all that a tree holds, as texts that tell bits, dtypes and classes apart."""
    found: list[str] = []

    def note(x: Any) -> Any:
        if isinstance(x, opt.Leaf):
            found.append(f"{x.rule!r} {x.frozen} {x.skipped} {x.state!r}")
        elif isinstance(x, np.ndarray):
            found.append(f"{x.dtype} {x.shape} {x.strides} {x.tolist()}")
        else:
            found.append(repr(x))
        return x

    opt.fmap(note, tree)
    return found


def test_a_header_as_written_is_not_parsed(tmp_path: Path, monkeypatch: Any) -> None:
    save(tmp_path / "a", *trees())

    def parsed(*args: Any) -> Any:
        raise AssertionError("the header was parsed")

    monkeypatch.setattr(_safetensors, "read_header", parsed)
    assert flat(load(tmp_path / "a")) == flat(trees())


@pytest.mark.parametrize("way", ["spaces", "other order", "other names of keys first"])
def test_a_header_written_by_another_program_says_the_same(tmp_path: Path, way: str) -> None:
    save(tmp_path / "a", *trees())
    raw = (tmp_path / "a").read_bytes()
    header = header_of(raw)
    if way == "spaces":
        encoded = json.dumps(header).encode()
    elif way == "other order":
        metadata = header.pop("__metadata__")
        encoded = json.dumps(
            {**dict(reversed(header.items())), "__metadata__": metadata}, separators=(",", ":")
        ).encode()
    else:
        encoded = json.dumps(
            {k: dict(reversed(v.items())) for k, v in header.items()}, separators=(",", ":")
        ).encode()
    (tmp_path / "b").write_bytes(with_header(raw, encoded))
    assert flat(load(tmp_path / "b")) == flat(load(tmp_path / "a")) == flat(trees())
    assert flat(load(tmp_path / "b", like=trees())) == flat(trees())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype":"F32"', b'"dtype":"I32"'),
        (b'"dtype":"F32"', b'"dtype":"F64"'),
        (b'"shape":[2,3]', b'"shape":[3,2]'),
        (b'"shape":[2,3]', b'"shape":[6]'),
        (b'"data_offsets":[0,', b'"data_offsets":[8,'),
        (b'"model.whole"', b'"model.whale"'),
        (b'{"__metadata__"', b'{"a":0,"__metadata__"'),
        (b"}}", b'},"a":0}'),
    ],
)
def test_a_header_that_differs_from_the_text_is_refused(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    save(tmp_path / "a", *trees())
    raw = (tmp_path / "a").read_bytes()
    encoded = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    at = encoded.rfind(old)
    assert at >= 0
    changed = encoded[:at] + new + encoded[at + len(old) :]
    (tmp_path / "b").write_bytes(with_header(raw, changed))
    with pytest.raises(FileFormatError):
        load(tmp_path / "b")


def test_appended_and_missing_bytes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", *trees())
    raw = (tmp_path / "a").read_bytes()
    for damaged in (raw + b"\0", raw[:-1]):
        (tmp_path / "b").write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"cut short|appended"):
            load(tmp_path / "b")


def test_rows_of_mixed_states_fill_given_trees(tmp_path: Path) -> None:
    model = [{"w": np.full(2, k, np.float32), "b": np.ones(3)} for k in range(5)]
    states = [opt.setup(opt.Adam() if k % 2 else opt.Descent(), x) for k, x in enumerate(model)]
    states[3]["w"].frozen = True
    states[4]["b"].skipped = 2
    save(tmp_path / "a", states, model)
    like = states, model
    assert flat(load(tmp_path / "a", like=like)) == flat(load(tmp_path / "a")) == flat(like)
    states[2] = opt.setup(opt.Adam(), model[2])
    with pytest.raises(ValueError, match=r"state\[2\]\['w'\]: the file has the rule Descent"):
        load(tmp_path / "a", like=like)


@pytest.mark.parametrize("count", [1, 3])
def test_small_arrays_own_their_memory(tmp_path: Path, count: int) -> None:
    model = [np.full(shape, k, np.float32) for k in range(count) for shape in ((2, 3), (), (0, 4))]
    save(tmp_path / "a", model)
    for loaded in (load(tmp_path / "a"), load(tmp_path / "a", like=model)):
        assert flat(loaded) == flat(model)
        assert all(x.base is None and x.flags.owndata and x.flags.writeable for x in loaded)
