"""Files that break the format, or whose text makes no sense: one clear error each."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged import assert_refused, changed, header_of, read, trees, with_header
from saved import assert_equal

from optimisers import (
    AccumGrad,
    Adam,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    setup,
    update_,
)
from optimisers.io import File, FileFormatError, load, save

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
