"""What is saved comes back: every dtype, rule, tie and class, and other programs can read it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from util import EVERY_ELEMENTWISE, LAYOUTS, PUBLIC, arrays_in, bits, name_of, normal, variants

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    ElementwiseRule,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rule,
    WeightDecay,
    destructure,
    fmap,
    freeze_,
    functor,
    setup,
    update,
    update_,
)
from optimisers.io import File, FileFormatError, load, save
from optimisers.io._encoder import Encoder, raw
from optimisers.io._pairs import Pairs
from optimisers.io._safetensors import write

pytestmark = pytest.mark.elsewhere


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file.safetensors")


def assert_equal(got: Any, expected: Any) -> None:
    """Compare trees: classes, keys in order, rules, bits."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert [*got] == [*expected]
        for key, value in expected.items():
            assert_equal(got[key], value)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(expected, SimpleNamespace) or hasattr(expected, "__dataclass_fields__"):
        if isinstance(expected, Rule):
            assert repr(got) == repr(expected)
        assert_equal(vars(got), vars(expected))
    elif isinstance(expected, Leaf):
        assert_equal(got.rule, expected.rule)
        assert_equal(got.state, expected.state)
        assert got.frozen == expected.frozen
    elif isinstance(expected, np.ndarray | np.generic):
        if expected.dtype.kind == "V":
            assert got.dtype == expected.dtype
            assert got.tobytes() == expected.tobytes()
        else:
            assert got.dtype == expected.dtype.newbyteorder("=")
            assert bits(got)[2:] == bits(expected)[2:]
            assert got.shape == expected.shape
    elif isinstance(expected, float):
        assert got.hex() == expected.hex()
    elif isinstance(expected, complex):
        assert_equal([got.real, got.imag], [expected.real, expected.imag])
    else:
        assert got == expected


def there_and_back(path: str, *trees: Any, **more: Any) -> Any:
    save(path, *trees, **more)
    return load(path)


# --- numbers ---------------------------------------------------------------------------------

DTYPES = [
    *["float16", "float32", "float64", "longdouble", "complex64", "complex128", "clongdouble"],
    *["bool", *(f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64))],
]
ML_DTYPES = [
    *["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz"],
    *["float8_e5m2fnuz", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float6_e2m3fn"],
    *["float6_e3m2fn", "float4_e2m1fn", "int4", "uint4", "int2", "uint2"],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3, 5), (3, 0, 2)])
def test_every_dtype_comes_back(dtype: str, shape: Any, path: str) -> None:
    values = normal(shape, np.complex128 if "c" in dtype else np.float64)
    with np.errstate(all="ignore"):
        x = np.asarray(values if "c" in dtype else values * 3 % 100).astype(dtype)
    if x.dtype.kind in "fc" and x.size > 3:
        x.reshape(-1)[:4] = [np.nan, np.inf, -0.0, np.finfo(x.dtype).smallest_subnormal]
    model = {"x": x, "scalar": x.reshape(-1)[0] if x.size else None, "last": np.ones(2)}
    assert_equal(there_and_back(path, model), model)
    with File(path) as file:
        assert_equal(np.array(file["state.x"]), x)
        assert file.dtype("state.x") == x.dtype
        assert file.shape("state.x") == shape


@pytest.mark.parametrize("dtype", ML_DTYPES)
def test_every_dtype_of_ml_dtypes_comes_back(dtype: str, path: str) -> None:
    kind = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype))
    x = np.array([[1, 0, 1], [0, 1, 1]], np.float32).astype(kind)
    assert_equal(there_and_back(path, {"x": x, "scalar": x[0, 0]}), {"x": x, "scalar": x[0, 0]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_writable_and_native(layout: str, path: str) -> None:
    x = LAYOUTS[layout](normal((3, 4, 2)))
    got = there_and_back(path, {"x": x})["x"]
    assert_equal(got, x)
    assert got.flags.writeable
    assert got.flags.owndata or got.base.flags.owndata
    got += 1


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_in_memory_is_kept(axes: Any, path: str) -> None:
    """Because products of matrices may have other bits in another order."""
    x = normal((3, 4, 2)).transpose(axes)
    got = there_and_back(path, {"x": x})["x"]
    assert got.strides == x.strides
    assert_equal(got, x)


def test_what_is_no_array_comes_back(path: str) -> None:
    model = {
        "numbers": [0, -7, 2**62, -(2**63), 10**40, -(10**5000), True, False, None],
        "floats": [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, 1e300],
        "complex": [1 + 2j, complex(math.inf, math.nan), complex(-0.0, 1e-320)],
        "texts": ["", "läsbar", "\ud800 alone", '"\\\n', b"bytes\xff", "x" * 10_000],
        "scalars": [np.float64(0.1), np.float32("nan"), np.int8(-3), np.True_, np.longdouble(3)],
        "dtype": np.dtype("float16"),
        7: "number", "7": "text", None: "none", True: "yes", "": "empty",
    }  # fmt: skip
    got = there_and_back(path, model)
    assert_equal(got, model)
    assert [type(key) for key in got] == [type(key) for key in model]


Point = NamedTuple("Point", [("x", object), ("y", object)])  # noqa: UP014


def test_every_built_in_container_comes_back(path: str) -> None:
    x = np.ones(2)
    tree = {
        "empty": [{}, [], (), SimpleNamespace()],
        "list": [x, [x * 2]],
        "tuple": (x * 3, ()),
        "ordered": OrderedDict(b=x, a=x * 4),
        "namespace": SimpleNamespace(weight=x, name="n"),
        "point": Point(x * 5, [1]),
    }
    assert_equal(there_and_back(path, tree), tree)


def test_a_root_may_be_anything(path: str) -> None:
    for tree in (np.ones(3), 7, None, [], (), setup(Adam(), np.ones(2))):
        assert_equal(there_and_back(path, tree), tree)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    st.sampled_from([np.float32, np.float64, np.int16, np.complex128]).flatmap(
        lambda dtype: st.lists(st.integers(0, 5), max_size=3).map(lambda s: normal(tuple(s), dtype))
    ),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda below: st.one_of(
        st.lists(below, max_size=4),
        st.lists(below, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), below, max_size=4),
        st.dictionaries(st.sampled_from("abc"), below).map(lambda d: SimpleNamespace(**d)),
    ),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore:nothing to train")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_any_tree_comes_back(tree: Any, path: str) -> None:
    assert_equal(there_and_back(path, tree), tree)
    assert_equal(load(path, like=tree), tree)
    tree = [tree]  # since a model of None is none
    state = setup(Adam(), tree)
    got, model = there_and_back(path, state, tree)
    assert_equal(got, state)
    assert_equal(model, tree)
    got, model = load(path, like=(state, tree))
    assert_equal(got, state)
    assert_equal(model, tree)


def filled(path: str, like: Any) -> Any:
    """Return what `load` fills, or what it says of differences."""
    try:
        return load(path, like=like)
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:nothing to train")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees, other=trees, is_other=st.booleans(), is_tied=st.booleans())
def test_the_quick_way_to_fill_trees_gives_what_the_other_does(
    tree: Any, other: Any, is_other: bool, is_tied: bool, path: str
) -> None:
    model = [tree, tree] if is_tied else [tree]
    expected = [other] if is_other else model
    save(path, setup(Adam(), model), model)
    like = setup(Momentum() if is_other else Adam(), expected), expected
    got = filled(path, like)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pairs, "fit", lambda *args: False)
        assert_equal(got, filled(path, like))


def test_an_array_that_grows_while_it_is_saved_is_refused(path: str) -> None:
    save(path, {"a": np.ones(2)})
    x = np.ones(3)
    encoder = Encoder()
    tensors, text = encoder.finish({"state": encoder.add("state", {"a": x})})
    x.resize(5, refcheck=False)
    with pytest.raises(ValueError, match="do not resize arrays while they are saved"):
        write(path, tensors, text, raw)
    assert_equal(load(path), {"a": np.ones(2)})


def test_a_deep_tree_comes_back(path: str) -> None:
    tree: Any = [np.arange(3.0), np.arange(2.0)]
    for k in range(10_000):
        tree = [tree] if k % 2 else {"below": tree}
    like = tree
    for got in (there_and_back(path, tree), load(path, like)):
        x = got
        for _ in range(10_000):
            (x,) = x if type(x) is list else x.values()
        assert_equal(x, [np.arange(3.0), np.arange(2.0)])


def test_a_shared_list_stays_shared(path: str) -> None:
    layer = [np.ones(2)]
    tree = {"a": layer, "b": {"c": layer}}
    for got in (there_and_back(path, tree), load(path, tree)):
        assert got["a"] is got["b"]["c"]


# --- rules -----------------------------------------------------------------------------------

EVERY_RULE = [
    *EVERY_ELEMENTWISE,
    *(rule for cls in PUBLIC for rule in variants(cls)),
    ClipNorm(1.5, math.inf, throw=False),
    ClipNorm(p=-math.inf),
    OptimiserChain(),
    OptimiserChain(ClipNorm(), OptimiserChain(AccumGrad(2), WeightDecay()), RMSProp(centred=True)),
    MixedPrecision("float64", OptimiserChain(WeightDecay(), Adam(eta=1 / 3))),
    MixedPrecision(Momentum()),
]


@pytest.mark.parametrize("rule", EVERY_RULE, ids=name_of)
def test_every_rule_comes_back_and_goes_on(rule: Any, path: str) -> None:
    model = {"w": normal((3, 2)), "b": normal(4).astype(np.float16)}
    grad = {"w": normal((3, 2), seed=1), "b": normal(4, seed=1)}
    with np.errstate(all="ignore"):
        state, model = update(setup(rule, model), model, grad)
        expected = update(state, model, grad)
        got = load_pair(path, state, model)
        assert_equal(got, (state, model))
        assert_equal(update(*got, grad), expected)


def load_pair(path: str, state: Any, model: Any) -> Any:
    return there_and_back(path, state, model)


def test_hyperparameters_are_kept_to_the_last_bit(path: str) -> None:
    for eta in (0.1, 1 / 3, 5e-324, 1e308, np.nextafter(0.001, 1), 7, True):
        rule = Adam(eta=eta, beta=(0.9, np.nextafter(0.999, 0)))
        got = there_and_back(path, setup(rule, np.ones(1))).rule
        assert (got.eta, type(got.eta), got.beta) == (rule.eta, type(rule.eta), rule.beta)


def test_a_shared_rule_stays_shared(path: str) -> None:
    got = there_and_back(path, setup(Adam(), [np.ones(2), np.ones(3)]))
    assert got[0].rule is got[1].rule


def test_what_is_frozen_stays_frozen(path: str) -> None:
    state = setup(Descent(), {"a": np.ones(2), "b": np.ones(2)})
    freeze_(state["a"])
    got = there_and_back(path, state)
    assert got["a"].frozen
    assert not got["b"].frozen


@dataclass(frozen=True)
class Decayed(Rule):
    """A user's rule, with a state that is a number, and all that a field can be."""

    eta: float = 0.1
    weights: Any = None
    names: Any = ("a", [1, {"b": (None, math.inf)}])
    inner: Rule = Momentum()  # noqa: RUF009
    dtype: Any = np.dtype("float32")  # noqa: RUF009

    def init(self, x):
        return 1

    def apply(self, state, x, dx, *higher):
        return state + 1, dx * (self.eta / state**0.5)


@dataclass(frozen=True)
class Signs(ElementwiseRule):
    eta: float = 0.1
    slots = ("v",)

    def coefs(self):
        return (self.eta,)

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        (eta,) = coefs
        return eta * dx + v, (v,)


def test_rules_of_users_come_back(path: str) -> None:
    @dataclass(frozen=True)
    class Local(Signs):
        pass

    weights = np.arange(3.0)
    chain = OptimiserChain(Decayed(weights=weights, inner=Adam(0.5)), Signs(), Local())
    state = setup(chain, {"x": np.ones(3), "y": np.ones(3)})
    got = there_and_back(path, state)
    assert_equal(got, state)
    assert type(got["x"].state[2]) is Local.State
    assert got["x"].rule.rules[0].weights is not weights
    with File(path) as file:
        assert "state.x.rule.rules.0.weights" in file


def test_arrays_in_rules_come_back_each_as_itself(path: str) -> None:
    fields = [{"weights": [np.full(3, float(k)), np.full(3, -float(k))]} for k in range(20)]
    state = [setup(Decayed(**more), np.ones(3)) for more in fields]
    assert_equal(there_and_back(path, state), state)
    assert_equal(load(path, like=state), state)


def test_a_rule_defined_twice_is_the_latest(path: str) -> None:
    def define() -> Any:
        @dataclass(frozen=True)
        class Again(Signs):
            pass

        return Again

    first, second = define(), define()
    got = there_and_back(path, setup(first(), np.ones(1)))
    assert type(got.rule) is second
    assert type(got.state) is second.State


def test_a_rule_saved_by_a_script_is_found_in_the_module_of_that_script(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Signs, "__module__", "__main__")
    save(path, Leaf(Signs(), ()))
    monkeypatch.undo()
    assert type(load(path).rule) is Signs


def test_an_unknown_rule_says_to_import_its_module_and_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "their_rules.py").write_text(
        "from dataclasses import dataclass\nfrom optimisers import Rule\n"
        "@dataclass(frozen=True)\nclass Theirs(Rule):\n    eta: float = 0.1\n"
        "    def apply(self, state, x, dx, *higher): return state, self.eta * dx\n"
    )
    path = str(tmp_path / "x.safetensors")
    code = (
        "import sys, numpy as np, their_rules; from optimisers import setup\n"
        "from optimisers.io import save\n"
        f"save({path!r}, setup(their_rules.Theirs(), np.ones(2)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(FileFormatError, match=r"'Theirs'.*import the module.*'their_rules'"):
            load(path)
        assert "their_rules" not in sys.modules
        import their_rules  # type: ignore[import-not-found]

        assert type(load(path).rule) is their_rules.Theirs
    finally:
        sys.path.remove(str(tmp_path))


# --- ties ------------------------------------------------------------------------------------


def tied_model() -> dict[str, Any]:
    w = normal((4, 3))
    back = w.copy()[::-1]
    return {
        "w": w, "same": w, "transposed": w.T, "flat": w.reshape(-1), "deep": [w[::-1, ::-1]],
        "first": back, "second": back[::-1].reshape(2, 6), "free": w.copy(),
    }  # fmt: skip


def test_ties_come_back_views_included(path: str) -> None:
    model = tied_model()
    state = setup(Adam(), model)
    grad = fmap(lambda x: normal(x.shape, seed=5), model)
    got_state, got = there_and_back(path, state, model)
    for filled in ((got_state, got), load(path, like=(state, model))):
        assert_equal(filled, (state, model))
        got_state, got = filled
        assert got["w"] is got["same"]
        for name in ("transposed", "flat"):
            assert np.shares_memory(got["w"], got[name])
        assert np.shares_memory(got["w"], got["deep"][0])
        assert np.shares_memory(got["first"], got["second"])
        assert not np.shares_memory(got["w"], got["free"])
        assert got_state["w"] is got_state["transposed"] is got_state["deep"][0]
        assert got_state["w"].tie == state["w"].tie
        assert got_state["free"].tie is None
    update_(got_state, got, grad)
    update_(state, model, grad)
    assert_equal(got, model)
    with File(path) as file:
        assert [name for name in file if name.startswith("model")] == [
            "model.w", "model.first", "model.free",
        ]  # fmt: skip


def test_a_model_of_views_into_one_vector_comes_back(path: str) -> None:
    flat, re = destructure({"a": normal((3, 2)), "b": normal(5)})
    state = setup(Adam(), flat)
    got_state, got = there_and_back(path, state, flat)
    update_(got_state, got, np.ones(11))
    update_(state, flat, np.ones(11))
    assert_equal(re(got), re(flat))


def test_arrays_that_overlap_in_part_are_refused(path: str) -> None:
    x = np.arange(6.0)
    with pytest.raises(ValueError, match=r"state\['a'\] and state\['b'\] overlap"):
        save(path, {"a": x[:4], "b": x[2:]})
    assert not Path(path).exists()


# --- like ------------------------------------------------------------------------------------


@functor
class Layer:
    def __init__(self, n, m, act=None):
        self.weight, self.bias = normal((n, m)).astype(np.float32), np.zeros(m)
        self.act = act


@dataclass
class Net:
    layers: list
    scale: Any
    steps: int = 0


def net(n: int = 2) -> Net:
    return Net([Layer(n, 3), Layer(3, 2)], normal(()), steps=3)


def test_objects_are_filled_and_those_given_stay(path: str) -> None:
    model = net()
    state = setup(Adam(), model)
    save(path, state, model)
    like_model = fmap(lambda x: np.zeros_like(x) if isinstance(x, np.ndarray) else x, model)
    like_model.steps = 0
    like_state = setup(Adam(eta=7), like_model)
    got_state, got = load(path, like=(like_state, like_model))
    assert type(got) is Net
    assert type(got.layers[0]) is Layer
    assert got.steps == 3
    assert_equal([*arrays_in(got)], [*arrays_in(model)])
    assert_equal(got_state, state)
    assert not like_model.layers[0].weight.any()
    assert like_state.layers[0].weight.rule.eta == 7
    assert_equal(load(path, like=like_state), state)


def test_objects_need_like_and_the_error_names_them(path: str) -> None:
    model = net()
    save(path, setup(Adam(), model), model)
    with pytest.raises(ValueError, match=r"(?s)  model: test_io:Net\n.*like=\(state, model\)"):
        load(path)
    save(path, None, {"a": [net().layers[0]], "d": defaultdict(list, x=1)})
    with pytest.raises(ValueError, match=r"model\['a'\]\[0\]: test_io:Layer\n.*model\['d'\]: coll"):
        load(path)


def test_every_difference_is_named(path: str) -> None:
    w = np.ones((2, 2))
    model = {
        "shape": np.ones((2, 3)), "dtype": np.ones(2), "gone": np.ones(1), "kind": [1.0],
        "array": np.ones(1), "tied": w, "to": w, "apart": np.ones(2), "from": np.ones(2),
        "list": [np.ones(1), np.ones(2)], "text": "a",
    }  # fmt: skip
    save(path, setup(Adam(), model), model)
    v = np.ones(2)
    like = {
        "shape": np.ones((3, 2)), "dtype": np.ones(2, np.float32), "new": {"x": 1}, "kind": (1.0,),
        "array": None, "tied": w, "to": w.copy(), "apart": v, "from": v,
        "list": [np.ones(1)], "text": print,
    }  # fmt: skip
    like_state = setup(Adam(), like)
    like_state["list"][0] = Leaf(Momentum(), ())
    before = repr(like)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load(path, like=(like_state, like))
    text = str(caught.value)
    for line in (
        "model['shape']: the file has shape (2, 3), `like` (3, 2)",
        "model['dtype']: the file has dtype float64, `like` float32",
        "model['gone']: the file has an array of shape (1,), `like` has nothing",
        "model['new']: the file has nothing, `like` has a dict",
        "model['kind']: the file has a list, `like` has a tuple",
        "model['array']: the file has an array of shape (1,), `like` has None",
        "model['list'][1]: the file has an array of shape (2,), `like` has nothing",
        "model['text']: the file has 'a', `like` has <built-in function print>",
        "model['tied'] and model['to'] are tied in the file and separate in `like`",
        "model['apart'] and model['from'] are tied in `like` and separate in the file",
        "state['shape'].state.m: the file has shape (2, 3), `like` (3, 2)",
        "state['dtype'].state.v: the file has dtype float64, `like` float32",
        "state['tied'] and state['to'] are tied in the file and separate in `like`",
        "state['apart'] and state['from'] are tied in `like` and separate in the file",
    ):
        assert f"  {line}\n" in f"{text}\n", line
    assert "state['list'][0]: the file has the rule Adam(" in text
    assert "`like` has Momentum(" in text
    assert repr(like) == before


def test_numbers_of_a_rule_are_those_of_the_file_and_its_class_must_fit(path: str) -> None:
    x = np.ones(2)
    chain = OptimiserChain(ClipNorm(), Adam(eta=0.5))
    save(path, setup(chain, x))
    assert load(path, like=setup(OptimiserChain(ClipNorm(2.0), Adam()), x)).rule == chain
    with pytest.raises(ValueError, match="rule"):
        load(path, like=setup(OptimiserChain(Adam(), ClipNorm()), x))
    with pytest.raises(ValueError, match="rule"):
        load(path, like=setup(Adam(), x))


def test_what_like_is_for_state_alone_or_for_a_pair(path: str) -> None:
    model = (np.ones(2), "text")  # its state is a pair too
    state = setup(Descent(), model)
    save(path, state, model)
    assert_equal(load(path, like=state), state)
    assert_equal(load(path, like=(state, model)), (state, model))
    model = (np.ones(2), np.ones(3))
    state = setup(Descent(), model)
    save(path, state, model)
    assert_equal(load(path, like=state), state)
    save(path, state)
    assert_equal(load(path, like=state), state)
    save(path, setup(Descent(), [np.ones(2)]))
    with pytest.raises(ValueError, match="holds no model"):
        load(path, like=(state, model))


def test_functions_are_refused_or_left_out(path: str) -> None:
    model = {"w": np.ones(2), "act": np.tanh, "cls": Layer}
    with pytest.raises(TypeError, match=r"ufunc at model\['act'\].*leave_out=True"):
        save(path, None, model)
    assert not Path(path).exists()
    save(path, None, model, leave_out=True)
    with pytest.raises(ValueError, match=r"model\['act'\]: ufunc <ufunc 'tanh'>"):
        load(path)
    _, got = load(path, like=(None, {"w": np.zeros(2), "act": np.sin, "cls": int}))
    assert got["act"] is np.sin
    assert_equal(got["w"], model["w"])


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (np.array(["a"]), "dtype <U1"),
        (np.array([None]), "dtype object"),
        (np.zeros(2, [("a", "f4")]), "dtype"),
        (np.array(["2020-01-01"], "M8[D]"), "dtype datetime64"),
        (np.ma.masked_array([1.0], [True]), "np.asarray"),
        ({(1, 2): 3}, "key"),
        ({1.5: 3}, "key"),
        (object(), "object"),
        (slice(None), "slice"),
    ],
)
def test_what_cannot_be_saved_is_named(thing: Any, said: str, path: str) -> None:
    save(path, {"old": 1})
    with pytest.raises(TypeError, match=rf"state\['a'\]\[1\].*{said}"):
        save(path, {"a": [0, thing]})
    assert load(path) == {"old": 1}


def test_a_rule_with_a_function_is_refused_by_path(path: str) -> None:
    state = setup(OptimiserChain(Decayed(weights=[np.tanh])), {"x": np.ones(2)})
    with pytest.raises(TypeError, match=r"ufunc at state\['x'\].rule.rules\[0\].weights\[0\]"):
        save(path, state)


def test_rules_in_rules_are_kept_up_to_a_depth_that_can_be_read(path: str) -> None:
    rule: Any = Adam()
    for _ in range(30):
        rule = OptimiserChain(rule)
    assert there_and_back(path, setup(rule, np.ones(1))).rule == rule
    for _ in range(100):
        rule = OptimiserChain(rule)
    with pytest.raises(TypeError, match="rules 100 deep"):
        save(path, setup(rule, np.ones(1)))


def test_a_tree_that_contains_itself_is_refused(path: str) -> None:
    tree: list[Any] = [1]
    tree.append(tree)
    with pytest.raises(ValueError, match="contains itself"):
        save(path, tree)


# --- other array libraries ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
)
def test_tensors_of_torch_come_back(dtype: str, path: str) -> None:
    torch: Any = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    w = torch.arange(6.0).reshape(2, 3).to(kind)
    model = {
        "w": torch.nn.Parameter(w), "v": w.clone().T, "plain": w[0].clone(), "zero": w[:0].clone(),
        "frozen": torch.nn.Parameter(w.clone(), requires_grad=False), "count": torch.tensor(3),
        "conj": w.clone().conj(), "point": torch.tensor(2.0, dtype=kind, requires_grad=True),
    }  # fmt: skip
    model["tied"] = model["v"].T
    state = setup(Momentum(), model)
    save(path, state, model)
    got_state, got = load(path, like=(state, model))
    for name, x in model.items():
        assert type(got[name]) is type(x)
        assert got[name].dtype == x.dtype
        assert got[name].requires_grad == x.requires_grad
        assert torch.equal(got[name], x)
        assert got[name].data_ptr() != x.data_ptr() or not x.numel()
    assert got["v"].stride() == model["v"].stride()
    assert got["tied"].data_ptr() == got["v"].data_ptr()
    assert got_state["v"] is got_state["tied"]
    assert torch.equal(got_state["w"].state.v, state["w"].state.v)
    _, numpy = load(path)
    assert numpy["w"].shape == (2, 3)
    assert numpy["w"].dtype.name == dtype


def test_arrays_of_jax_come_back(path: str) -> None:
    jax: Any = pytest.importorskip("jax")
    jnp = jax.numpy
    w = jnp.arange(6.0).reshape(2, 3)
    model = {"w": w, "same": w, "b": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(3)}
    state = setup(Adam(), model)
    state, model = update(state, model, jax.tree.map(jnp.ones_like, model | {"n": None}))
    save(path, state, model)
    got_state, got = load(path, like=(state, model))
    for name, x in model.items():
        assert isinstance(got[name], jax.Array)
        assert got[name].dtype == x.dtype
        assert bool((got[name] == x).all())
    assert got_state["w"] is not got_state["same"]
    assert isinstance(got_state["w"].state.m, jax.Array)
    _, numpy = load(path)
    assert_equal(numpy["w"], np.asarray(model["w"]))
    with pytest.raises(TypeError, match=r"state\['key'\].*dtype key"):
        save(path, {"key": jax.random.key(0)})
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda x: save(path, {"x": x}))(w)


def test_leaves_that_jax_took_apart_are_one_again(path: str) -> None:
    jax: Any = pytest.importorskip("jax")
    w = np.ones(2)
    model = {"a": w, "b": w}
    state = setup(Momentum(), model)
    state, model = jax.jit(update)(state, model, {"a": w, "b": w})
    got, _ = there_and_back(path, state, model)
    assert got["a"] is got["b"]
    assert type(got["a"].rule.eta) is float
    assert got["a"].rule == Momentum()


def test_an_equinox_module_is_filled(path: str) -> None:
    eqx: Any = pytest.importorskip("equinox")
    jax: Any = pytest.importorskip("jax")
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    state = setup(Adam(), model)
    save(path, state, model, leave_out=True)
    other = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(1))
    got_state, got = load(path, like=(setup(Adam(), other), other))
    assert bool((got.layers[0].weight == model.layers[0].weight).all())
    assert got.activation is other.activation
    assert_equal(got_state.layers[0].weight.rule, state.layers[0].weight.rule)


# --- other programs --------------------------------------------------------------------------


def test_the_package_reads_our_files(path: str) -> None:
    package: Any = pytest.importorskip("safetensors")
    numpy: Any = pytest.importorskip("safetensors.numpy")
    model = {
        "layers": [{"weight": normal((3, 2)).astype(np.float32).T, "bias": normal(3)}],
        "z": normal(4, np.complex64), "zz": normal(4, np.complex128), "n": np.arange(3), "on": True,
        "half": normal(3).astype(np.float16), "none": np.zeros((0, 2)), "point": np.array(1.5),
        "mask": np.array([True, False]), "wide": np.arange(3).astype(np.longdouble),
    }  # fmt: skip
    save(path, setup(Adam(), model), model)
    got = numpy.load_file(path)
    assert_equal(got["model.layers.0.weight"], np.ascontiguousarray(model["layers"][0]["weight"]))
    for name in ("z", "n", "half", "none", "point", "mask"):
        assert_equal(got[f"model.{name}"], model[name])
    assert_equal(got["model.zz"].view(np.complex128)[:, 0], model["zz"])
    assert_equal(got["model.wide"].view(np.longdouble)[:, 0], model["wide"])
    assert got["state.layers.0.weight.t"] == 0
    with package.safe_open(path, framework="np") as file:
        said = json.loads(file.metadata()["optimisers"])
    assert said["version"] == 1
    assert {"rule": "Adam", "fields": {"eta": 0.001, "beta": {"tuple": [0.9, 0.999]}, "epsilon": 1e-08}} in said["rules"]  # fmt: skip  # noqa: E501


def test_we_read_files_of_the_package(path: str) -> None:
    numpy: Any = pytest.importorskip("safetensors.numpy")
    arrays = {
        "a.weight": normal((3, 2)).astype(np.float32), "b": np.arange(4), "c": np.array(2.0),
        "d": np.zeros((0, 3)), "e": normal(3, np.complex64), "f": np.array([True, False]),
    }  # fmt: skip
    numpy.save_file(arrays, path, metadata={"made": "elsewhere"})
    got = load(path)
    assert got.keys() == arrays.keys()
    for name, x in arrays.items():
        assert_equal(got[name], x)
    assert load(path, like=arrays).keys() == arrays.keys()
    with pytest.raises(ValueError, match=r"state\['b'\]: the file has shape"):
        load(path, like=arrays | {"b": np.arange(5)})
    with File(path) as file:
        assert file.metadata == {"made": "elsewhere"}
        assert_equal(np.array(file["b"]), arrays["b"])


def test_files_of_the_package_with_the_floats_of_torch(path: str) -> None:
    torch: Any = pytest.importorskip("torch")
    package: Any = pytest.importorskip("safetensors.torch")
    arrays = {
        name: torch.arange(4.0).to(getattr(torch, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float16")
    }
    package.save_file(arrays, path)
    got = load(path)
    for name, x in arrays.items():
        assert got[name].dtype.name == name
        assert got[name].astype(np.float32).tolist() == x.float().tolist()
    save(path, arrays)
    theirs = package.load_file(path)
    for name, x in arrays.items():
        assert theirs[f"state.{name}"].dtype == x.dtype
        assert torch.equal(theirs[f"state.{name}"].float(), x.float())


def test_a_file_that_the_package_wrote_again_is_still_ours(path: str) -> None:
    numpy: Any = pytest.importorskip("safetensors.numpy")
    package: Any = pytest.importorskip("safetensors")
    model = {"b": normal(3), "a": np.arange(3, dtype=np.int8)}
    state = setup(Adam(), model)
    save(path, state, model)
    with package.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    numpy.save_file(numpy.load_file(path), path, metadata=metadata)
    assert_equal(load(path), (state, model))


# --- single arrays ---------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_is_a_mapping(mapped: bool, path: str) -> None:
    tree = {"a": normal((50, 3)), "b": {"c.d": normal(2), 1: normal(3), "1": normal(4)}}
    save(path, tree, metadata={"epoch": 3, "rng": np.random.default_rng(0).bit_generator.state})
    with File(path, mapped=mapped) as file:
        assert [*file] == ["state.a", "state.b.c.d", "state.b.1", "state.b.1#2"]
        assert len(file) == 4
        assert "4 arrays" in repr(file)
        x, again = file["state.a"], file["state.a"]
        with pytest.raises(KeyError):
            file["a"]
        assert file.metadata["rng"] == np.random.default_rng(0).bit_generator.state
        assert_equal(file.load(), tree)
        assert not np.shares_memory(file.load()["a"], file.load()["a"])
        file.verify()
    assert np.shares_memory(x, again) == mapped
    assert x.flags.writeable != mapped
    assert_equal(np.array(x), tree["a"])
    save(path, {"a": normal(1)})
    assert_equal(np.array(x), tree["a"])
    with File(path, mapped=mapped) as file:
        assert file.metadata is None
    with pytest.raises(ValueError, match="closed file"):
        file["state.a"]


@pytest.mark.parametrize("kind", ["float64", "float32", "complex128", "longdouble", "float16"])
def test_windows_are_aligned(kind: str, path: str) -> None:
    save(path, {"a": np.ones(3, np.int8), "b": np.ones(3, kind), "c": np.ones(1, np.int16)})
    with File(path, mapped=True) as file:
        assert all(x.flags.aligned for x in file.values())
        assert file["state.b"].ctypes.data % np.dtype(kind).itemsize == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_only_what_is_asked_for_is_read(mapped: bool, path: str) -> None:
    save(path, {"good": np.arange(100.0), "bad": np.arange(50, dtype=np.int32)})
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)
    with File(path, mapped=mapped) as file:
        assert_equal(np.array(file["state.good"]), np.arange(100.0))
        with pytest.raises(FileFormatError, match=r"state\.bad"):
            file["state.bad"]
        with pytest.raises(FileFormatError, match=r"state\.bad"):
            file.verify()
    with File(path, verify=False, mapped=mapped) as file:
        assert file["state.bad"].shape == (50,)
    with pytest.raises(FileFormatError, match=r"file.safetensors.*state\.bad"):
        load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that Linux has")
def test_a_window_into_more_than_the_memory_reads_what_is_looked_at(path: str) -> None:
    count = 2**30
    header = json.dumps({"x": {"dtype": "F64", "shape": [count], "data_offsets": [0, 8 * count]}})
    with open(path, "wb") as file:
        file.write((120).to_bytes(8, "little") + header.encode().ljust(120))
        file.seek(128 + 8 * (count - 1))  # a hole of 8 GiB
        file.write(np.float64(7.5).tobytes())
    code = """
        import resource, sys
        from optimisers.io import File
        resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
        with File(sys.argv[1], mapped=True) as file:
            print(file["x"][-2:].tolist())
        with File(sys.argv[1]) as file:
            try:
                file["x"]
            except MemoryError:
                print("too large")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path], capture_output=True, text=True
    )
    assert run.stdout == "[0.0, 7.5]\ntoo large\n", run.stderr


def test_threads_read_one_file_each_its_own_arrays(path: str) -> None:
    arrays = {f"x{k}": np.full(70_000 + k, k, np.float32) for k in range(8)}
    package: Any = pytest.importorskip("safetensors.numpy")
    package.save_file(arrays, path)  # without checksums, which would find out
    with File(path) as file, ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            for name, x in zip(arrays, threads.map(file.__getitem__, arrays), strict=True):
                assert_equal(x, arrays[name])


def test_equal_trees_make_equal_files(path: str, tmp_path: Path) -> None:
    def write(to: str) -> bytes:
        room = np.frombuffer(np.random.default_rng().bytes(48), np.longdouble).copy()
        room[:] = [1, 2, 3]  # the bytes between extended numbers stay as they were
        save(to, setup(Adam(), {"x": np.ones(3)}), {"x": room})
        return Path(to).read_bytes()

    assert write(path) == write(str(tmp_path / "other"))


def test_import_is_lazy() -> None:
    code = "import optimisers, sys; print('mmap' in sys.modules, 'optimisers.io' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[1] == "False"
