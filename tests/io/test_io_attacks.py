"""Files made to harm, whose checksums are right: nothing that they name comes to life."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from saved import EVERY_RULE
from util import name_of

from optimisers import Descent, Leaf, MixedPrecision, Rule, rules
from optimisers._trees.paths import KeyPath
from optimisers.io import Checkpointer, File, FileFormatError, load, save
from optimisers.io._entries import are_slow


def crafted(nodes: Sequence[Any], rules: Sequence[Any] = (), **more: Any) -> bytes:
    """Return a file of these nodes, of which the last is the root, and rules."""
    told = {"version": 1, "roots": {"state": len(nodes) - 1}, "nodes": nodes, "rules": rules}
    text = json.dumps({**told, "tensors": [], **more}, separators=(",", ":"))
    metadata = {"optimisers.crc32": f"{zlib.crc32(text.encode()):08x}", "optimisers": text}
    header = json.dumps({"__metadata__": metadata}, separators=(",", ":")).encode()
    return len(header).to_bytes(8, "little") + header


LEAF = {"leaf": 0, "state": 0, "frozen": False}


def leaf_of(*rules: Any) -> bytes:
    """Return a file of one leaf that has the last of some rules."""
    return crafted([{"tuple": []}, {**LEAF, "leaf": len(rules) - 1}], rules)


DESCENT = {"rule": "Descent", "fields": {"eta": 0.1}}

# --- names -----------------------------------------------------------------------------------

PROTOCOLS = ["__array_interface__", "__array_struct__", "__array__", "__dlpack__", "__class__"]


@pytest.mark.parametrize("kind", ["namespace", "state"])
@pytest.mark.parametrize(
    "name", [*PROTOCOLS, "__cuda_array_interface__", "__array_priority__", "_as_parameter_"]
)
def test_no_object_of_a_file_has_the_name_of_a_protocol(kind: str, name: str, path: Path) -> None:
    path.write_bytes(crafted([{"value": 3}, {kind: [0], "keys": [name]}]))
    with pytest.raises(FileFormatError, match="no file may give"):
        load(path)
    with pytest.raises(FileFormatError, match="no file may give"):
        load(path, like=SimpleNamespace(**{name: 3}))


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot save state\['a'\]: its attribute '__array__'"):
        save(path, {"a": SimpleNamespace(__array__=np.ones(2))})
    assert not path.exists()


class Sleeping(ModuleType):
    """A module that runs when it is asked for anything."""

    asked: ClassVar[list[str]] = []

    def __getattribute__(self, name: str) -> Any:
        Sleeping.asked.append(name)
        return object.__getattribute__(self, name)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        Sleeping.asked.append("__dict__")
        return {}


class Sly(type):
    """A class of classes that run code when they are asked for anything."""

    @property
    def __dict__(cls) -> Any:  # type: ignore[override]
        raise AssertionError

    def __getattr__(cls, name: str) -> Any:
        raise AssertionError


class Trap(metaclass=Sly):
    pass


class Tuples(tuple, metaclass=Sly):
    __slots__ = ()


@pytest.mark.parametrize("name", ["sleeping:Any", "sleeping:Any.Other", "sleeping:__class__"])
def test_a_file_makes_no_module_run(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sleeping", Sleeping("sleeping"))
    Sleeping.asked.clear()
    path.write_bytes(crafted([{"named": [], "keys": [], "class": name}]))
    with pytest.raises(ValueError, match="how these are made"):
        load(path)
    assert not Sleeping.asked


def test_a_file_makes_no_lazy_module_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_one.py").write_text("raise AssertionError('it runs')")
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.find_spec("lazy_one")
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)  # type: ignore[arg-type]
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazy_one", module)
    spec.loader.exec_module(module)
    path.write_bytes(crafted([{"named": [], "keys": [], "class": "lazy_one:Any"}]))
    with pytest.raises(ValueError, match="how these are made"):
        load(path)


@pytest.mark.parametrize("name", ["Trap", "Trap.Inner", "Tuples", "path", "KeyPath", "crafted.x"])
def test_a_file_asks_no_class_anything(name: str, path: Path) -> None:
    path.write_bytes(crafted([{"named": [], "keys": [], "class": f"{__name__}:{name}"}]))
    with pytest.raises(ValueError, match="how these are made"):
        load(path)


@pytest.mark.parametrize(
    "name", ["time:struct_time", "os:terminal_size", "os:stat_result", "sys:flags", "builtins:int"]
)
def test_a_struct_sequence_is_no_named_tuple(name: str, path: Path) -> None:
    for fields in ([], ["tm_year"]):
        nodes = [{"value": 1}, {"named": [0] * len(fields), "keys": fields, "class": name}]
        path.write_bytes(crafted(nodes))
        with pytest.raises(ValueError, match="how these are made"):
            load(path)


@pytest.mark.parametrize("child", [None, True, -1, 1.0, "0", [0], {}, {"value": 1}, {"int": "0"}])
@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "namespace", "named", "leaf"])
def test_a_child_is_a_number_of_a_node_above(kind: str, child: Any, path: Path) -> None:
    node: dict[str, Any] = {kind: [child]}
    if kind == "leaf":
        node = {**LEAF, "state": child}
    elif kind not in ("list", "tuple"):
        node["keys"] = ["sum"]
    if kind == "named":
        node["class"] = "AccumGradState"
    path.write_bytes(crafted([{"value": 1}, node], [DESCENT]))
    for like in (None, {"sum": 1}, [1]):
        with pytest.raises(FileFormatError, match="number of an entry"):
            load(path, like=like)


# --- rules -----------------------------------------------------------------------------------

TEXTS = ["(1000,1000,150)f8", "V2000000000", "float32", "f8,f8", "S9", ">f4"]


class Half(MixedPrecision):
    """A user's own, which inherits what a field may be."""


@pytest.mark.parametrize("rule", ["MixedPrecision", f"{__name__}:Half"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_dtype_is_never_a_text(rule: str, text: str, path: Path) -> None:
    fields = {"dtype": text, "rule": {"rule": 0}}
    path.write_bytes(leaf_of(DESCENT, {"rule": rule, "fields": fields}))
    with pytest.raises(FileFormatError, match="with the dtype"):
        load(path)


@pytest.mark.parametrize("text", ["(1000,1000,150)f8", "V2000000000", "S9", "f8,f8", "M8"])
def test_no_array_is_made_of_a_dtype_that_is_no_number(text: str) -> None:
    with pytest.raises(TypeError, match="floating"):
        MixedPrecision(text, Descent())


@pytest.mark.parametrize("rule", EVERY_RULE, ids=name_of)
def test_no_field_is_a_container_of_rules_unless_its_class_says_so(rule: Rule, path: Path) -> None:
    save(path, Leaf(rule, ()))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    said = json.loads(header["__metadata__"]["optimisers"])["rules"]
    for field, value in said[-1]["fields"].items():
        is_made_of_rules = "rule" in json.dumps(value)
        for odd in ({"tuple": [{"rule": 0}] * 5}, {"dict": [["a"], [1]]}, {"rule": 0}):
            if is_made_of_rules and "dict" not in odd:
                continue
            changed = {**said[-1], "fields": {**said[-1]["fields"], field: odd}}
            path.write_bytes(leaf_of(DESCENT, *said[:-1], changed))
            with pytest.raises(FileFormatError):
                load(path)


@pytest.mark.parametrize("text", ["aaaa", {"bytes": "61616161"}])
def test_a_text_is_no_tuple_of_rules(text: Any, path: Path) -> None:
    path.write_bytes(leaf_of({"rule": "OptimiserChain", "fields": {"rules": text}}))
    with pytest.raises(FileFormatError, match="with the rules"):
        load(path)


@dataclass(frozen=True)
class Logged(Rule):
    eta: float = 0.1
    program = "/usr/bin/logger"

    @property
    def half(self) -> float:
        return self.eta / 2

    def apply(self, state: Any, x: Any, dx: Any, *higher: Any) -> Any:
        return state, self.eta * dx


class Plain(Rule):
    rate = 0.1
    limit = 3

    def __init__(self, rate: float = 0.2) -> None:
        self.rate = rate
        self.inverse = 1 / rate

    def apply(self, state: Any, x: Any, dx: Any, *higher: Any) -> Any:
        return state, self.rate * dx


@pytest.mark.parametrize("cls", [Logged, Plain])
@pytest.mark.parametrize(
    "name", ["apply", "init", "adjust", "program", "half", "limit", "fixed", "__class__", "a b", ""]
)
def test_a_file_replaces_nothing_that_a_rule_has(cls: type, name: str, path: Path) -> None:
    if (name in ("program", "half") and cls is Plain) or (name == "limit" and cls is Logged):
        pytest.skip("it has none")
    fields = {"eta": 0.1, name: 5}
    path.write_bytes(leaf_of({"rule": f"{__name__}:{cls.__name__}", "fields": fields}))
    with pytest.raises(FileFormatError, match="cannot have a field"):
        load(path)


def test_what_a_class_declares_comes_back(path: Path) -> None:
    save(path, Leaf(Plain(0.5), ()))
    rule = load(path).rule
    assert (rule.rate, rule.inverse) == (0.5, 2.0)


def test_a_rule_whose_method_was_replaced_is_not_saved(path: Path) -> None:
    rule = Logged()
    object.__setattr__(rule, "program", "another")
    with pytest.raises(TypeError, match=r"its attribute 'program' takes the place"):
        save(path, Leaf(rule, ()))


# --- messages --------------------------------------------------------------------------------

TOLD = [
    "\x1b[2J\x1b]0;title\x07",
    "good\n  state: all is well",
    "\ud800",
    "\x00",
    "‮abc",
    "a " * 10**6,
]


def in_every_place(text: str) -> dict[str, bytes]:
    fields = {"eta": 0.1, text: 1}
    return {
        "left out": crafted([{"left_out": text}]),
        "a class": crafted([{"object": [], "keys": [], "class": f"a:{text}"}]),
        "a key": crafted([{"left_out": "x"}, {"dict": [0], "keys": [text]}]),
        "an attribute": crafted([{"left_out": "x"}, {"namespace": [0], "keys": [text]}]),
        "a kind": crafted([{text: 1}]),
        "a rule": leaf_of({"rule": text, "fields": {}}),
        "a module": leaf_of({"rule": f"{text}:A", "fields": {}}),
        "a field": leaf_of({"rule": "Descent", "fields": fields}),
        "a field of a user": leaf_of({"rule": f"{__name__}:Plain", "fields": fields}),
        "a number": leaf_of({"rule": "Descent", "fields": {"eta": text}}),
        "a root": crafted([], roots={text: 0}),
        "a version": crafted([], version=text),
    }


@pytest.mark.parametrize("text", TOLD, ids=range(len(TOLD)))
@pytest.mark.parametrize("place", in_every_place(""))
def test_messages_are_printable_and_short(place: str, text: str, path: Path) -> None:
    path.write_bytes(in_every_place(text)[place])
    for like in (None, {"a": np.ones(2)}, {"b": [Descent()]}):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (any message)
            load(path, like=like)
        lines = str(caught.value).split("\n")
        assert len(lines) <= 4
        assert all(line.isprintable() for line in lines)
        assert len(str(caught.value)) < 2000


def test_many_differences_are_counted(path: Path) -> None:
    save(path, dict.fromkeys(range(100000), 1))
    with pytest.raises(ValueError, match="and 99,900 others") as caught:
        load(path, like={})
    assert len(str(caught.value)) < 20_000


def test_an_endless_number_is_shown_all_the_same(path: Path) -> None:
    assert str(KeyPath().step(10**5000, is_item=True))[:3] == "[0x"
    path.write_bytes(crafted([{"left_out": "x"}, {"dict": [0], "keys": [{"int": hex(10**5000)}]}]))
    with pytest.raises(ValueError, match="how these are made"):
        load(path)


# --- time ------------------------------------------------------------------------------------


def seconds(path: Path, content: bytes) -> float:
    path.write_bytes(content)
    start = time.process_time()
    with contextlib.suppress(FileFormatError):
        load(path)
    return time.process_time() - start


def assert_linear(path: Path, make: Any, n: int) -> None:
    """See that four times as much takes no more than some times as long."""
    seconds(path, make(100))
    few, many = (min(seconds(path, make(k)) for _ in range(2)) for k in (n, 4 * n))
    assert many < 9 * few + 0.1


def each_its_rule(n: int) -> bytes:
    nodes = [{"tuple": []}, *({**LEAF, "leaf": k} for k in range(n)), {"list": [*range(1, n + 1)]}]
    return crafted(nodes, [DESCENT] * n)


def one_rule_of_many(n: int) -> bytes:
    chain = {"rule": "OptimiserChain", "fields": {"rules": {"tuple": [{"rule": 0}] * 998}}}
    nodes = [{"tuple": []}, {"tuple": [0] * 998}, *([{"leaf": 1, "state": 1, "frozen": False}] * n)]
    return crafted([*nodes, {"list": [*range(2, n + 2)]}], [DESCENT, chain])


@pytest.mark.parametrize("make", [each_its_rule, one_rule_of_many])
def test_time_grows_as_the_file(make: Any, path: Path) -> None:
    assert_linear(path, make, 3000)


def on_one_way(bits: int) -> list[int]:
    """Return keys that a dictionary of 2^bits places looks for along one and the same way."""
    size = 1 << bits
    way, turn, at = np.empty(size, np.int64), np.empty(size, np.int64), 0
    for k in range(size):
        way[k], turn[at] = at, k
        at = (5 * at + 1) & (size - 1)
    filled = size * 2 // 5
    found: list[int] = []
    for high in range(1, 2000):  # keys that come, after some leaps, to the begin of that way
        keys = way[: filled // 8] + (high << bits)
        place, rest, on_the_way = keys & (size - 1), keys.copy(), np.ones(len(keys), bool)
        while (rest > 0).any():
            rest >>= 5
            place = (5 * place + rest + 1) & (size - 1)
            on_the_way &= turn[place] < filled
        found += keys[on_the_way & (turn[place] < filled // 8)].tolist()
    return [*way[:filled].tolist(), *found[: size // 4]]


@pytest.mark.parametrize("count", [3, 1000, 200_000])
def test_honest_keys_are_quick(count: int) -> None:
    draw = np.random.default_rng(0)
    for keys in (
        [*range(count)],
        [-k for k in range(count)],
        [k << 32 for k in range(count)],
        [10**9 * k for k in range(count)],
        draw.integers(-(2**62), 2**62, count).tolist(),
        draw.permutation(2 * count).tolist(),
        [None, True, *range(2, count)],
    ):
        assert not are_slow(keys)


@pytest.mark.parametrize("are_alike", [False, True], ids=["on one way", "of one hash"])
def test_keys_that_collide_are_refused(are_alike: bool, path: Path) -> None:
    keys = [(2**61 - 1) * (k + 8) for k in range(5000)] if are_alike else on_one_way(13)
    written = [k if k < 2**63 else {"int": hex(k)} for k in keys]
    path.write_bytes(crafted([{"value": 1}, {"dict": [0] * len(keys), "keys": written}]))
    with pytest.raises(FileFormatError, match="made to be slow"):
        load(path)


# --- states of earlier versions --------------------------------------------------------------


class HeldState(NamedTuple):
    sum: Any
    count: Any
    weight: Any

    @staticmethod
    def absent(found: dict[str, Any]) -> dict[str, Any]:
        return {"weight": found["count"] * 2.0}


class OldState(NamedTuple):
    sum: Any
    count: Any


HeldState.__module__ = OldState.__module__ = rules.__name__
OldState.__qualname__ = "HeldState"


def test_a_state_says_what_a_file_of_before_lacks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without `like`; the class of the state is looked up as those of the library are."""
    monkeypatch.setattr(rules, "HeldState", HeldState, raising=False)
    old = OldState(np.ones(3), np.array(2))
    new = HeldState(np.ones(3), np.array(2), np.array(4.0))
    save(path, {"a": [old]})
    for got in (load(path), load(path, like={"a": [new]})):
        held = got["a"][0]
        assert type(held) is HeldState
        assert held.weight == 4.0
        assert (held.sum == 1).all()
    save(path, {"a": [new]})
    assert load(path)["a"][0].weight == 4.0


def test_a_state_without_a_say_must_be_whole(path: Path) -> None:
    node = {"named": [0], "keys": ["m"], "class": "Adam.State"}
    path.write_bytes(crafted([{"value": 1}, node]))
    with pytest.raises(ValueError, match="how these are made"):
        load(path)


# --- files of other programs -----------------------------------------------------------------


def plain(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("tag", ["F4", "F6_E2M3", "I128"])
def test_an_array_of_unknown_dtype_hides_no_other(tag: str, path: Path) -> None:
    size = {"F4": 2, "F6_E2M3": 3}.get(tag, 7)
    entries = {
        "odd": {"dtype": tag, "shape": [4], "data_offsets": [0, size]},
        "bias": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]},
    }
    path.write_bytes(plain(entries, bytes(size) + np.float32(1.5).tobytes()))
    for mapped in (False, True):
        with File(path, mapped=mapped, verify=False) as file:
            assert [*file] == ["odd", "bias"]
            assert file.shape("odd") == (4,)
            if size % 4 == 0 or not mapped:
                assert file["bias"] == 1.5
            for ask in (file.__getitem__, file.dtype):
                with pytest.raises(FileFormatError, match="not known here"):
                    ask("odd")
            file.verify()
    with pytest.raises(FileFormatError, match=r"array 'odd'.*not known here"):
        load(path)


def test_metadata_of_nothing_is_none(path: Path) -> None:
    path.write_bytes(plain({"__metadata__": None}, b""))
    assert load(path) == {}
    with File(path) as file:
        assert file.metadata == {}


def test_no_number_is_a_path(path: Path) -> None:
    for call in (load, File):
        with pytest.raises(TypeError):
            call(0)  # type: ignore[arg-type]
    save(bytes(path), {"a": 1})  # type: ignore[arg-type]
    assert load(bytes(path)) == {"a": 1}  # type: ignore[arg-type]


# --- crowds ----------------------------------------------------------------------------------

MANY = 300_000
CROWDS = ["1", "-6", "300", "1.5", '"ab"', "null"]


@pytest.mark.parametrize("item", CROWDS)
def test_crowds_that_no_node_accounts_for_are_not_parsed(item: str, path: Path) -> None:
    crowd = ",".join([item] * MANY * 2)
    named = json.dumps({f"{k}": 1 for k in range(MANY)})
    more = f'"roots":{{"state":0}},"rules":[],"tensors":[],"junk":[{crowd}]'
    for nodes in (f'[{{"value":1}}],"more":{named}', f'[{{"value":1}},{{"list":[{crowd}]}}]'):
        text = f'{{"version":1,"nodes":{nodes},{more}}}'
        metadata = {"optimisers.crc32": f"{zlib.crc32(text.encode()):08x}", "optimisers": text}
        path.write_bytes(plain({"__metadata__": metadata}, b""))
        with pytest.raises(FileFormatError, match=r"it has [\d,]+ commas and [\d,]+ objects"):
            load(path)


@pytest.mark.parametrize("item", CROWDS)
def test_crowds_that_no_array_accounts_for_are_not_parsed(item: str, path: Path) -> None:
    pair = f'"a":{item}'
    for text in (f'{{"a":[{",".join([item] * MANY)}]}}', f"{{{','.join([pair] * MANY)}}}"):
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        with pytest.raises(FileFormatError, match=r"has [\d,]+ (texts|commas) and 0 arrays"):
            load(path)


def test_texts_of_many_commas_and_quotes_are_no_crowd(path: Path) -> None:
    text = '",[{' * MANY
    save(path, {"a": np.ones(2), text[:100]: 1}, metadata={"table": text})
    with File(path) as file:
        assert file.metadata == {"table": text}
    assert load(path)[text[:100]] == 1
    table = {f"key {k}": "1,2,3" * 50 for k in range(5_000)} | {"long": "1," * MANY}
    path.write_bytes(plain({"__metadata__": table}, b""))
    with File(path) as file:
        assert file.metadata == table


@dataclass(frozen=True)
class Table(Descent):
    """A rule with very many numbers."""

    steps: tuple[int, ...] = ()


def test_what_would_be_taken_for_a_crowd_is_not_saved(path: Path) -> None:
    state = {"a": Leaf(Table(0.1, (1,) * 100_000), ())}
    save(path, state)
    assert load(path)["a"].rule == state["a"].rule
    with pytest.raises(ValueError, match="keep long tuples in the fields of rules as arrays"):
        save(path, {"a": Leaf(Table(0.1, (1,) * MANY), ())})
    assert load(path)["a"].rule == state["a"].rule


def test_names_of_classes_are_looked_up_in_time(path: Path) -> None:
    begin = time.process_time()
    for name in ("a." * MANY, "os:" + "a." * MANY):
        path.write_bytes(crafted([{"value": 1}, {"named": [0], "class": name, "keys": ["m"]}]))
        with pytest.raises(ValueError, match="does not say how these are made"):
            load(path)
    assert time.process_time() - begin < 30


def test_no_name_of_a_file_speaks_to_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[2J\nforged"
    folder.mkdir()
    path = folder / "step-000000000001.safetensors"
    path.write_bytes(b"no such file")
    for call in (load, File):
        with pytest.raises(FileFormatError) as caught:
            call(path)
        assert str(caught.value).isprintable()
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert Checkpointer(folder).latest() is None
    assert str(warned[0].message).isprintable()
    with pytest.raises(OSError, match="there is no folder") as failed:
        save(folder / "a" / "b", {})
    assert str(failed.value).isprintable()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_no_number_of_a_file_is_beyond_all_numbers(number: str, path: Path) -> None:
    descent = f'{{"rule":"Descent","fields":{{"eta":{number}}}}}'
    leaf = '{"tuple":[]},{"leaf":0,"state":0,"frozen":false}'
    for root, nodes, said in ((0, f'{{"value":{number}}}', ""), (1, leaf, descent)):
        tables = f'"nodes":[{nodes}],"rules":[{said}],"tensors":[]'
        text = f'{{"version":1,"roots":{{"state":{root}}},{tables}}}'
        metadata = {"optimisers.crc32": f"{zlib.crc32(text.encode()):08x}", "optimisers": text}
        path.write_bytes(plain({"__metadata__": metadata}, b""))
        with pytest.raises(FileFormatError, match="damaged"):
            load(path)


def test_a_node_that_is_a_root_and_a_part_is_filled_at_both(path: Path) -> None:
    nodes = [{"value": 1}, {"dict": [0], "keys": ["a"]}, {"list": [1]}]
    path.write_bytes(crafted(nodes, roots={"state": 2, "model": 1}))
    made = load(path)
    assert made == ([{"a": 1}], {"a": 1})
    like = [{"a": 0}], {"a": 0}
    assert load(path, like=like) == made
