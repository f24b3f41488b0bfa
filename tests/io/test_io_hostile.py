"""Files that are damaged or made to harm: one clear error, before anything is made of them."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_io import assert_equal, tied_model
from util import many

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    setup,
    update_,
)
from optimisers.io import Checkpointer, File, FileFormatError, load, save


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


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("io") / "good"
    save(path, *trees(), metadata={"epoch": 3})
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


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


# --- the format ------------------------------------------------------------------------------


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DATA = bytes(8)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "8"),
    "seven bytes": (bytes(7), "8"),
    "no header": (bytes(8), "JSON"),
    "length beyond the file": (struct.pack("<Q", 3) + b"{}", "cut short"),
    "length beyond all": (struct.pack("<Q", 2**64 - 1) + b"{}", "cut short"),
    "length beyond what is allowed": (struct.pack("<Q", 100_000_001) + b"{}", "cut short"),
    "truncated header": (with_header(b'{"a":{"dtype":"F32"'), "JSON"),
    "no UTF-8": (with_header(b'{"\xff":1}'), "JSON"),
    "UTF-16": (with_header('{"a":1}'.encode("utf-16")), "JSON"),
    "a list": (with_header([]), "object"),
    "a number": (with_header(b"12"), "object"),
    "not begun with a brace": (with_header(b" {}"), "object"),
    "two objects": (with_header(b"{}{}"), "JSON"),
    "nested deep": (with_header(b'{"a":' * 50_000), "JSON"),
    "lists nested deep": (with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON"),
    "an endless number": (with_header(b'{"a":' + b"9" * 100_000 + b"}"), "JSON"),
    "NaN": (with_header(b'{"a":NaN}'), "NaN"),
    "a key twice": (with_header(b'{"a":1,"a":1}'), "twice"),
    "an inner key twice": (with_header(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "twice"),
    "metadata no object": (with_header({"__metadata__": 3}), "strings"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 3}}), "strings"),
    "an entry is null": (with_header({"a": None}), "needs"),
    "no dtype": (with_header({"a": {"shape": [], "data_offsets": [0, 0]}}), "needs"),
    "one key more": (with_header({"a": {**one(), "more": 1}}, DATA), "needs"),
    "unknown dtype": (with_header({"a": one("F33")}, DATA), "dtype"),
    "dtype of four bits": (with_header({"a": one("F4")}, DATA), "dtype"),
    "dtype null": (with_header({"a": one(None)}, DATA), "dtype"),
    "dtype a list": (with_header({"a": one([])}, DATA), "dtype"),
    "wrong dtype size": (with_header({"a": one("F64")}, DATA), "cannot lie in 8 bytes"),
    "negative shape": (with_header({"a": one(shape=[-2])}, DATA), "shape"),
    "shape of negatives": (with_header({"a": one(shape=[-1, -2])}, DATA), "shape"),
    "shape of floats": (with_header({"a": one(shape=[2.0])}, DATA), "shape"),
    "shape of truth values": (with_header({"a": one(shape=[True, 2])}, DATA), "shape"),
    "shape null": (with_header({"a": one(shape=None)}, DATA), "shape"),
    "huge shape": (with_header({"a": one(shape=[2**62])}, DATA), "shape"),
    "huge shape that wraps": (with_header({"a": one(shape=[2**62, 4, 2])}, DATA), "shape"),
    "huge shape with a zero": (with_header({"a": one(shape=[2**62, 2**62, 0])}, DATA), "shape"),
    "65 axes": (with_header({"a": one(shape=[1] * 65)}, DATA), "shape"),
    "offsets beyond the end": (with_header({"a": one(offsets=[0, 16], shape=[4])}, DATA), "bytes"),
    "offsets reversed": (with_header({"a": one(offsets=[8, 0])}, DATA), "cannot"),
    "offsets negative": (with_header({"a": one(offsets=[-8, 0])}, DATA), "offsets"),
    "three offsets": (with_header({"a": one(offsets=[0, 8, 8])}, DATA), "offsets"),
    "offsets of floats": (with_header({"a": one(offsets=[0.0, 8.0])}, DATA), "offsets"),
    "a gap at the begin": (with_header({"a": one(offsets=[4, 12])}, bytes(12)), "gap"),
    "a gap": (with_header({"a": one(), "b": one(offsets=[12, 20])}, bytes(20)), "gap"),
    "overlap": (with_header({"a": one(), "b": one(offsets=[4, 12])}, bytes(12)), "overlap"),
    "the same bytes twice": (with_header({"a": one(), "b": one()}, DATA), "overlap"),
    "something appended": (with_header({"a": one()}, DATA + b"x"), "appended"),
    "cut short by a byte": (with_header({"a": one()}, DATA[1:]), "cut short"),
    "truth beyond 0 and 1": (with_header({"a": one("BOOL", [8])}, b"\0\1\0\1\0\0\2\0"), "truth"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_safetensors_file_is_refused(name: str, path: Path) -> None:
    assert_refused(path, *BAD[name])


def test_the_error_names_the_file(path: Path) -> None:
    assert_refused(path, b"", str(path))


def test_a_file_that_is_not_there_is_an_os_error(path: Path) -> None:
    for read_it in (load, File):
        with pytest.raises(FileNotFoundError):
            read_it(path)
        with pytest.raises(IsADirectoryError):
            read_it(path.parent)


# --- the text --------------------------------------------------------------------------------


def setting(*keys: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """Return what makes a change that sets what lies under these keys."""

    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(told: dict[str, Any]) -> None:
            place: Any = told
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = value

        return change

    return to


def find(told: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in told["nodes"] if kind in node)


def in_node(kind: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda told: find(told, kind).update({key: value})


def in_rule(name: str, field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        next(r for r in told["rules"] if r["rule"] == name)["fields"][field] = value

    return change


def in_tensor(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        next(t for t in told["tensors"] if len(t["shape"]) == 2)[key] = value

    return change


def many_places(told: dict[str, Any]) -> None:
    told["nodes"].append({"list": []})
    for _ in range(60):
        last = len(told["nodes"]) - 1
        told["nodes"].append({"tuple": [last, last]})
    told["roots"]["model"] = len(told["nodes"]) - 1


def many_rules(told: dict[str, Any]) -> None:
    for _ in range(60):
        part = {"rule": len(told["rules"]) - 1}
        fields = {"rules": {"tuple": [part, part]}}
        told["rules"].append({"rule": "OptimiserChain", "fields": fields})
    find(told, "leaf")["leaf"] = len(told["rules"]) - 1


def nested_values(told: dict[str, Any]) -> None:
    value: Any = 1
    for _ in range(200):
        value = {"tuple": [value]}
    in_rule("Adam", "eta", value)(told)


def rules_in_rules(told: dict[str, Any]) -> None:
    for _ in range(200):
        fields = {"rules": {"tuple": [{"rule": len(told["rules"]) - 1}]}}
        told["rules"].append({"rule": "OptimiserChain", "fields": fields})
    find(told, "leaf")["leaf"] = len(told["rules"]) - 1


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no version": (lambda told: told.pop("version"), "version"),
    "version as text": (setting("version")("1"), "version"),
    "version true": (setting("version")(True), "version"),
    "a later version": (setting("version")(2), "newer"),
    "no nodes": (lambda told: told.pop("nodes"), "nodes"),
    "nodes as object": (setting("nodes")({}), "nodes"),
    "one array less": (lambda told: told["tensors"].pop(), "arrays"),
    "no state": (lambda told: told["roots"].pop("state"), "holds"),
    "an unknown root": (setting("roots", "code")(0), "holds"),
    "root out of range": (setting("roots", "model")(10**6), "number"),
    "root negative": (setting("roots", "model")(-1), "number"),
    "root true": (setting("roots", "model")(True), "number"),
    "a node is null": (setting("nodes", 0)(None), "node"),
    "a node is empty": (setting("nodes", 0)({}), "node"),
    "a node of unknown kind": (setting("nodes", 0)({"pickle": "..."}), "node"),
    "a node that contains itself": (in_node("dict", "dict", [10**5]), "number"),
    "a child that comes later": (in_node("list", "list", [40]), "number"),
    "a child that is a text": (in_node("list", "list", ["0"]), "number"),
    "children no list": (in_node("list", "list", 3), "node"),
    "too few keys": (in_node("dict", "keys", []), "node"),
    "keys no list": (in_node("dict", "keys", "ab"), "node"),
    "a key is a list": (lambda t: find(t, "dict")["keys"].__setitem__(0, [1]), "value"),
    "a key of no number": (in_node("dict", "keys", [{"int": 3}]), "value"),
    "a key is a float": (lambda t: find(t, "dict")["keys"].__setitem__(0, 1.5), "node"),
    "a key twice": (lambda t: find(t, "dict").update(dict=[0, 0], keys=["a", "a"]), "twice"),
    "a key more in a node": (in_node("list", "class", "builtins:eval"), "node"),
    "a leaf with no such rule": (in_node("leaf", "leaf", 10**6), "number"),
    "a leaf with a text for frozen": (in_node("leaf", "frozen", "no"), "node"),
    "a leaf skipped less than never": (in_node("leaf", "skipped", -1), "node"),
    "an array with no such number": (in_node("array", "array", 10**6), "number"),
    "a value of unknown kind": (in_node("value", "value", {"eval": "1"}), "value"),
    "a value that is a list": (in_node("value", "value", [1]), "value"),
    "a value with two kinds": (in_node("value", "value", {"int": "1", "float": "inf"}), "value"),
    "an int that is none": (in_node("value", "value", {"int": "zz"}), "value"),
    "a float that is none": (in_node("value", "value", {"float": "1.5"}), "value"),
    "a complex of one part": (in_node("value", "value", {"complex": ["0x1p0"]}), "value"),
    "a complex beyond all": (in_node("value", "value", {"complex": ["0x1p9999", "0"]}), "value"),
    "bytes that are none": (in_node("value", "value", {"bytes": "xyz"}), "value"),
    "a scalar too short": (in_node("value", "value", {"scalar": ["float32", "00"]}), "value"),
    "a scalar too long": (in_node("value", "value", {"scalar": ["float32", "00" * 8]}), "value"),
    "a scalar of objects": (in_node("value", "value", {"scalar": ["object", "00" * 8]}), "dtype"),
    "a scalar of nothing": (in_node("value", "value", {"scalar": [None, ""]}), "dtype"),
    "a dtype of nothing": (in_node("value", "value", {"dtype": None}), "dtype"),
    "a scalar of a list": (in_node("value", "value", {"scalar": [[], "00"]}), "dtype"),
    "a dtype that is none": (in_node("value", "value", {"dtype": "object"}), "dtype"),
    "a rule in a tree": (in_node("value", "value", {"rule": 0}), "value"),
    "a view too small": (in_node("view", "view", [[1], [0], []]), "view"),
    "a view too large": (in_node("view", "view", [[10**9, 10**9], [0, 1], []]), "view"),
    "a view with an axis twice": (in_node("view", "view", [[3, 4], [0, 0], []]), "view"),
    "a view with an axis missing": (in_node("view", "view", [[3, 4], [0], []]), "view"),
    "a view flipped where nothing is": (in_node("view", "view", [[3, 4], [0, 1], [2]]), "view"),
    "a view flipped twice": (in_node("view", "view", [[3, 4], [0, 1], [0, 0]]), "view"),
    "a view of texts": (in_node("view", "view", [[3, 4], ["0", "1"], []]), "layout"),
    "a view of nothing": (in_node("view", "view", None), "view"),
    "an array of another shape": (in_tensor("shape", [3, 4]), "should have"),
    "an array of another dtype": (in_tensor("dtype", "int64"), "should have"),
    "an array of unknown dtype": (in_tensor("dtype", "object"), "dtype"),
    "an array of another machine": (in_tensor("dtype", "longdouble-112-16"), "where it was"),
    "an array of another name": (in_tensor("name", "nobody"), "array"),
    "an array with two names": (lambda t: t["tensors"][1].update(t["tensors"][0]), "twice"),
    "an array with a key more": (in_tensor("more", 1), "array"),
    "an array with a strange order": (in_tensor("order", [1, 1]), "view"),
    "an array with an endless order": (in_tensor("order", [0] * 100), "view"),
    "a rule is null": (setting("rules", 0)(None), "rule"),
    "a rule without a name": (setting("rules", 0, "rule")(3), "rule"),
    "a rule without fields": (setting("rules", 0, "fields")([]), "fields"),
    "an unknown rule": (setting("rules", 0, "rule")("Sgd"), "'Sgd', which this version"),
    "a rule of an unknown module": (setting("rules", 0, "rule")("os:system"), "import the module"),
    "a class that is no rule": (setting("rules", 0, "rule")("numpy:ndarray"), "import the module"),
    "the rule of all rules": (setting("rules", 0, "rule")("Rule"), "does not have"),
    "an abstract rule": (setting("rules", 0, "rule")("ElementwiseRule"), "does not have"),
    "a field beyond its limit": (in_rule("Adam", "eta", -1.0), "at least 0"),
    "a field that is a text": (in_rule("Adam", "eta", "0.1"), "real number"),
    "a field of NaN": (in_rule("Adam", "eta", {"float": "nan"}), "at least 0"),
    "a field too much": (in_rule("Adam", "gamma", 1.0), "another version"),
    "a field too few": (setting("rules", 0, "fields")({}), "another version"),
    "a chain of numbers": (in_rule("OptimiserChain", "rules", {"tuple": [1]}), "takes rules"),
    "a chain of nothing": (in_rule("OptimiserChain", "rules", None), "cannot be"),
    "a rule made of itself": (in_rule("OptimiserChain", "rules", {"rule": 3}), "number"),
    "a master of objects": (in_rule("MixedPrecision", "dtype", {"dtype": "object"}), "dtype"),
    "a master of ints": (in_rule("MixedPrecision", "dtype", {"dtype": "int8"}), "floating"),
    "a dictionary of numbers": (in_rule("Adam", "eta", {"dict": [[1], [2]]}), "value"),
    "a dictionary of one list": (in_rule("Adam", "eta", {"dict": [["a"]]}), "value"),
    "a dictionary with keys left": (in_rule("Adam", "eta", {"dict": [["a", "b"], [2]]}), "value"),
    "values nested deep": (nested_values, "value"),
    "places without end": (many_places, "places"),
    "rules in rules in rules": (rules_in_rules, "too many rules"),
    "rules without end": (many_rules, "too many rules"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_text_that_makes_no_sense_is_refused(name: str, path: Path, content: bytes) -> None:
    change, said = CHANGES[name]
    assert_refused(path, changed(content, change), said)


def test_the_change_of_nothing_is_read(path: Path, content: bytes) -> None:
    assert_equal(read(path, changed(content, lambda told: None))[0], trees())


@pytest.mark.parametrize("key", ["optimisers", "optimisers.crc32"])
def test_a_file_of_ours_is_never_taken_for_another(key: str, path: Path, content: bytes) -> None:
    header, data = header_of(content)
    del header["__metadata__"][key]
    assert_refused(path, with_header(header, data), "missing")


def test_names_in_a_file_import_and_run_nothing(path: Path, content: bytes) -> None:
    """Neither modules that are not loaded, nor attributes that are computed."""
    for name in ("this:Theirs", "optimisers:optax.optax", "optax.Theirs", ":", "a:b:c", "..."):

        def named(told: dict[str, Any], name: str = name) -> None:
            find(told, "named")["class"] = name

        path.write_bytes(changed(content, named))
        code = (
            "import sys\nfrom optimisers.io import load\nbefore = set(sys.modules)\n"
            f"try: load({str(path)!r})\n"
            "except ValueError as error: assert 'import the module' in str(error), error\n"
            "print({*sys.modules} - before)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        new = run.stdout
        assert "this" not in new
        assert "optax" not in new


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("sizes", [(3, 5000), (5000, 3)])
@pytest.mark.parametrize("rule", [Adam(), Momentum(), OptimiserChain(Adam(), AccumGrad(2))])
def test_a_state_that_does_not_fit_its_rule_is_an_error_not_a_crash(
    rule: Any, sizes: Any, dtype: str, path: Path
) -> None:
    """A forger can write what no `setup` makes; the engine then says so."""
    model = {name: np.ones(n, dtype) for name, n in zip("ab", sizes, strict=True)}
    save(path, setup(rule, model), model)

    def mix(told: dict[str, Any]) -> None:
        first, second = (node for node in told["nodes"] if "leaf" in node)
        second["state"] = first["state"]

    path.write_bytes(changed(path.read_bytes(), mix))
    state, model = load(path)
    with pytest.raises(ValueError, match="shape"):
        update_(state, model, {name: np.ones_like(x) for name, x in model.items()})


@pytest.mark.parametrize("state", [3, None, (), (np.ones(2),), [np.ones(2)] * 3, {"m": 1}])
@pytest.mark.parametrize("rule", [Adam(), MixedPrecision(Adam()), OptimiserChain(Adam())])
def test_a_state_that_its_rule_does_not_make_is_refused(rule: Any, state: Any, path: Path) -> None:
    save(path, Leaf(rule, state))
    for like in (None, setup(rule, np.ones(2))):
        with pytest.raises(FileFormatError, match="a state that is none of"):
            load(path, like=like)


# --- bytes -----------------------------------------------------------------------------------


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
