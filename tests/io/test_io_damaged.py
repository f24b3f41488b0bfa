"""Files with bytes that changed, are missing or were added, and files that would cost much."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged import assert_refused, changed, read, trees, with_header
from hypothesis import example, given
from hypothesis import strategies as st
from saved import assert_equal
from util import many

from optimisers import Momentum, setup
from optimisers.io import Checkpointer, File, FileFormatError, load, save


def outcome(path: Path, content: bytes) -> Any:
    """Return what a file gives: None if it is refused."""
    try:
        return read(path, content)
    except FileFormatError:
        return None


def assert_detected_or_harmless(path: Path, content: bytes, good: Any) -> bool:
    got = outcome(path, content)
    if got is not None:
        assert_equal(got, good)
    return got is None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any]:
    """Return a file small enough to change each of its bytes, and what it gives."""
    path = tmp_path_factory.mktemp("io") / "small"
    w = np.arange(4.0, dtype=np.float32).reshape(2, 2)
    save(path, setup(Momentum(), {"w": w}), {"w": w, "v": w.T, "n": 1}, metadata=[2.5])
    return path.read_bytes(), read(path, path.read_bytes())


@pytest.mark.slow
def test_a_change_of_any_byte_is_found_or_changes_nothing(
    small: tuple[bytes, Any], tmp_path: Path
) -> None:
    content, good = small
    draw = random.Random(0)
    harmless = set()
    for at in range(len(content)):
        changes = {content[at] ^ (1 << bit) for bit in range(8)}
        changes |= {*b' {}[],:"0123456789', draw.randrange(256)} - {content[at]}
        for byte in changes:
            damaged = content[:at] + bytes([byte]) + content[at + 1 :]
            if not assert_detected_or_harmless(tmp_path / "file", damaged, good):
                harmless.add((content[at], byte))
    # White space for white space, in what fills up the header.
    assert {old for old, _ in harmless} <= {ord(" ")}
    assert {new for _, new in harmless} <= {*b"\t\n\r"}


def test_a_file_cut_short_anywhere_is_refused(small: tuple[bytes, Any], path: Path) -> None:
    content, _ = small
    for end in range(len(content)):
        assert outcome(path, content[:end]) is None, end


def test_a_file_with_anything_appended_is_refused(small: tuple[bytes, Any], path: Path) -> None:
    content, _ = small
    for tail in (b"\0", b" ", content):
        assert outcome(path, content + tail) is None


edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "insert", "swap", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(max_size=9), st.sampled_from([b"9" * 20, b"[", b"{", b'"', b"\\u"])),
    ),
    min_size=1,
    max_size=4,
)


@many
@given(edits=edits, in_header=st.booleans())
@example(edits=[("set", 0.0, 0.0, b"\xff" * 8)], in_header=False)
def test_mutations_are_found_or_change_nothing(
    edits: Any, in_header: bool, content: bytes, tmp_path: Path
) -> None:
    good = read(tmp_path / "file", content)
    damaged = bytearray(content)
    for kind, where, other, new in edits:
        size = 2000 if in_header else len(damaged)
        at, to = int(where * min(size, len(damaged))), int(other * len(damaged))
        if kind == "set":
            damaged[at : at + len(new)] = new
        elif kind == "insert":
            damaged[at:at] = new
        elif kind == "delete":
            del damaged[at : at + len(new)]
        elif kind == "swap":
            piece = damaged[at : at + 8]
            damaged[at : at + 8], damaged[to : to + 8] = damaged[to : to + 8], piece
        else:
            damaged[at:at] = damaged[at:to]
    assert_detected_or_harmless(tmp_path / "file", bytes(damaged), good)


def nodes_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a JSON value, as what holds it and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        yield value, key
        if isinstance(child, dict | list):
            yield from nodes_of(child)


class UnfitError(Exception):
    """What is whole and cannot be built, or is not like what was given."""


def load_or_unfit(path: Path, like: Any) -> Any:
    """Load a file; any error but the two that are documented passes through."""
    try:
        return load(path, like=like)
    except ValueError as error:
        text = str(error)
        if "does not fit" in text or "how these are made" in text or "holds no model" in text:
            raise UnfitError from error
        raise


NUMBERS = [-1, 0, 1, 2, 7, 10**6, 2**63, 10**30, 0.5, 1e308]
TEXTS = ["", "a", "F32", "float64", "optimisers:Rule", "builtins:eval", "Adam"]
LISTS = [[], [0], [0, 0], [[2], [0], []]]
OBJECTS = [
    {},
    {"": 0},
    {"rule": 0},
    {"array": 0},
    {"tuple": []},
    {"scalar": []},
    {"int": "f" * 999},
]
odd = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *LISTS, *OBJECTS])


@many
@given(data=st.data())
def test_a_text_with_right_checksums_makes_a_tree_or_one_clear_error(
    data: st.DataObject, content: bytes, tmp_path: Path
) -> None:
    """A forger can compute checksums: what is made then is a tree, no crash, no hang."""

    def change(told: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            places = list(nodes_of(told))
            holder, key = places[data.draw(st.integers(0, len(places) - 1))]
            action = data.draw(st.sampled_from(["set", "delete", "copy"]))
            if action == "set":
                holder[key] = copy.deepcopy(data.draw(odd))
            elif action == "delete":
                del holder[key]
            else:
                other, there = places[data.draw(st.integers(0, len(places) - 1))]
                if not isinstance(other[there], dict | list):
                    holder[key] = other[there]

    path = tmp_path / "file"
    path.write_bytes(changed(content, change))
    state, model = trees()
    for like in (None, (state, model)):
        with contextlib.suppress(FileFormatError, UnfitError):
            load_or_unfit(path, like)


@many
@given(text=st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=3), st.sampled_from(["F32", "I8"])),
    lambda below: st.one_of(
        st.lists(below, max_size=3),
        st.dictionaries(
            st.sampled_from(["__metadata__", "a", "dtype", "shape", "data_offsets", "optimisers"]),
            below,
        ),
    ),
), tail=st.binary(max_size=16))  # fmt: skip
def test_any_json_is_a_file_or_refused(
    text: Any, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-json"
    path.write_bytes(with_header(text, tail))
    try:
        got = load(path)
    except FileFormatError:
        return
    assert all(isinstance(x, np.ndarray) for x in got.values())


@many
@given(content=st.binary(max_size=64))
def test_any_bytes_are_a_file_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-bytes"
    path.write_bytes(content)
    with contextlib.suppress(FileFormatError):
        load(path)


def doubled(told: dict[str, Any], kind: str, times: int, depth: int) -> None:
    """Make a tree of many places, deep below its root."""
    nodes = told["nodes"]
    last = next(k for k, node in enumerate(nodes) if kind in node)
    for _ in range(times):
        nodes.append({"tuple": [last, last]})
        last = len(nodes) - 1
    for _ in range(depth):
        nodes.append({"list": [last]})
        last = len(nodes) - 1
    told["roots"] = {"state": last}


def unknown_below(told: dict[str, Any], depth: int) -> None:
    for _ in range(depth):
        last = len(told["nodes"])
        told["nodes"] += [
            {"object": [last - 1], "keys": ["a" * 50], "class": "a:B"},
            {"named": [last], "keys": ["x"], "class": f"{last}:C"},
        ]
    told["roots"] = {"state": len(told["nodes"]) - 1}


def colliding(told: dict[str, Any], count: int) -> None:
    """Make a dictionary whose keys have one hash."""
    keys = [{"int": hex((2**61 - 1) * (k + 8))} for k in range(count)]
    told["nodes"] += [{"value": 1}, {"dict": [len(told["nodes"])] * count, "keys": keys}]
    told["roots"] = {"state": len(told["nodes"]) - 1}


def much_the_same(told: dict[str, Any], count: int) -> None:
    """Make leaves that have one large rule and one large state."""
    rules, nodes = told["rules"], told["nodes"]
    rules.append({"rule": "Descent", "fields": {"eta": 0.1}})
    nodes.append({"tuple": []})
    for _ in range(8):
        part = {"rule": len(rules) - 1}
        rules.append({"rule": "OptimiserChain", "fields": {"rules": {"tuple": [part, part]}}})
        nodes.append({"tuple": [len(nodes) - 1] * 2})
    begin, state = len(nodes), len(nodes) - 1
    nodes += [{"leaf": len(rules) - 1, "state": state, "frozen": False}] * count
    nodes.append({"list": [*range(begin, begin + count)]})
    told["roots"] = {"state": len(nodes) - 1}


BOMBS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "tied leaves at long addresses": (lambda t: doubled(t, "leaf", 15, 100_000), "letters"),
    "more places than nodes": (lambda t: doubled(t, "array", 40, 10), "places"),
    "unknown classes at long addresses": (lambda t: unknown_below(t, 30_000), "and others"),
    "keys of one hash": (lambda t: colliding(t, 300_000), "made to be slow"),
    "many states that are one": (lambda t: much_the_same(t, 50_000), "places"),
}


REFUSED = """
import sys
from optimisers.io import load
try:
    load(sys.argv[1])
except ValueError as error:
    print(error)
else:
    sys.exit("was loaded")
"""


@pytest.mark.parametrize("name", BOMBS)
def test_work_is_bounded_by_the_size_of_a_file(name: str, path: Path, content: bytes) -> None:
    """These would take minutes to hours, and memory as much; the limit only ends such a wait."""
    change, said = BOMBS[name]
    path.write_bytes(changed(content, change))
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert len(done.stdout) < 100_000


def test_a_file_that_claims_much_allocates_nothing(path: Path) -> None:
    """Sizes are compared with that of the file before there is an array."""
    size = 2**40
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    assert_refused(path, with_header(header, bytes(100)), "cut short")
    many = {f"{k}": {"dtype": "U8", "shape": [0, 2**55], "data_offsets": [0, 0]} for k in range(99)}
    path.write_bytes(with_header(many))
    assert all(x.nbytes == 0 for x in load(path).values())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("left", [0, 50, 4096, 2**20])
def test_a_file_cut_short_while_it_is_open_is_an_error_not_a_crash(
    left: int, mapped: bool, path: Path
) -> None:
    save(path, {"first": np.ones(2**18), "last": np.ones(9)})
    with File(path, mapped=mapped) as file:
        os.truncate(path, left)
        for name in file:
            with pytest.raises(FileFormatError, match=f"{path}: the file .* cut short"):
                file[name]
        for call in (file.verify, file.load):
            with pytest.raises(FileFormatError, match="cut short"):
                call()


def test_an_array_in_memory_is_right_whatever_becomes_of_the_file(path: Path) -> None:
    save(path, {"x": np.arange(70_000.0)})
    with File(path) as file:
        x = file["state.x"]
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
        with pytest.raises(FileFormatError, match="checksum"):
            file["state.x"]
        os.truncate(path, 0)
    assert_equal(x, np.arange(70_000.0))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "step-000000000001.safetensors"
    os.mkfifo(pipe)
    for read_it in (load, File):
        with pytest.raises(FileFormatError, match="no regular file"):
            read_it(pipe)
    with pytest.warns(UserWarning, match="no regular file"):
        assert Checkpointer(tmp_path).latest() is None
    with pytest.raises(OSError, match="no regular file; choose another path"):
        save(pipe, {"a": 1})
    assert pipe.is_fifo()


def test_what_does_not_fit_like_is_named_before_arrays_are_read(path: Path) -> None:
    save(path, {"a": np.ones(100_000), "b": np.ones(2)})
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # an array that is damaged
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not fit"):
        load(path, like={"a": np.ones(100_000), "b": np.ones(3)})
