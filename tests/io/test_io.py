"""What is saved comes back: every dtype, rule, tie and class, and other programs can read it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved import EVERY_RULE, Decayed, assert_equal, there_and_back, tied_model
from util import LAYOUTS, name_of, normal

from optimisers import (
    Adam,
    Descent,
    ElementwiseRule,
    Leaf,
    Momentum,
    OptimiserChain,
    destructure,
    fmap,
    freeze_,
    setup,
    update,
    update_,
)
from optimisers.io import File, FileFormatError, load, save
from optimisers.io._encoder import Encoder, raw
from optimisers.io._pairs import Pairs
from optimisers.io._safetensors import write

pytestmark = pytest.mark.elsewhere


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
def test_every_dtype_comes_back(dtype: str, shape: Any, path: Path) -> None:
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
def test_every_dtype_of_ml_dtypes_comes_back(dtype: str, path: Path) -> None:
    kind = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype))
    x = np.array([[1, 0, 1], [0, 1, 1]], np.float32).astype(kind)
    assert_equal(there_and_back(path, {"x": x, "scalar": x[0, 0]}), {"x": x, "scalar": x[0, 0]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_writable_and_native(layout: str, path: Path) -> None:
    x = LAYOUTS[layout](normal((3, 4, 2)))
    got = there_and_back(path, {"x": x})["x"]
    assert_equal(got, x)
    assert got.flags.writeable
    assert got.flags.owndata or got.base.flags.owndata
    got += 1


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_in_memory_is_kept(axes: Any, path: Path) -> None:
    """Because products of matrices may have other bits in another order."""
    x = normal((3, 4, 2)).transpose(axes)
    got = there_and_back(path, {"x": x})["x"]
    assert got.strides == x.strides
    assert_equal(got, x)


def test_what_is_no_array_comes_back(path: Path) -> None:
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


def test_every_built_in_container_comes_back(path: Path) -> None:
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


def test_a_root_may_be_anything(path: Path) -> None:
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
def test_any_tree_comes_back(tree: Any, path: Path) -> None:
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


def filled(path: Path, like: Any) -> Any:
    """Return what `load` fills, or what it says of differences."""
    try:
        return load(path, like=like)
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:nothing to train")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees, other=trees, is_other=st.booleans(), is_tied=st.booleans())
def test_the_quick_way_to_fill_trees_gives_what_the_other_does(
    tree: Any, other: Any, is_other: bool, is_tied: bool, path: Path
) -> None:
    model = [tree, tree] if is_tied else [tree]
    expected = [other] if is_other else model
    save(path, setup(Adam(), model), model)
    like = setup(Momentum() if is_other else Adam(), expected), expected
    got = filled(path, like)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pairs, "fit", lambda *args: False)
        assert_equal(got, filled(path, like))


def test_an_array_that_grows_while_it_is_saved_is_refused(path: Path) -> None:
    save(path, {"a": np.ones(2)})
    x = np.ones(3)
    encoder = Encoder()
    tensors, text = encoder.finish({"state": encoder.add("state", {"a": x})})
    x.resize(5, refcheck=False)
    with pytest.raises(ValueError, match="do not resize arrays while they are saved"):
        write(path, tensors, text, raw)
    assert_equal(load(path), {"a": np.ones(2)})


def test_a_deep_tree_comes_back(path: Path) -> None:
    tree: Any = [np.arange(3.0), np.arange(2.0)]
    for k in range(10_000):
        tree = [tree] if k % 2 else {"below": tree}
    like = tree
    for got in (there_and_back(path, tree), load(path, like)):
        x = got
        for _ in range(10_000):
            (x,) = x if type(x) is list else x.values()
        assert_equal(x, [np.arange(3.0), np.arange(2.0)])


def test_a_shared_list_stays_shared(path: Path) -> None:
    layer = [np.ones(2)]
    tree = {"a": layer, "b": {"c": layer}}
    for got in (there_and_back(path, tree), load(path, tree)):
        assert got["a"] is got["b"]["c"]


# --- rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY_RULE, ids=name_of)
def test_every_rule_comes_back_and_goes_on(rule: Any, path: Path) -> None:
    model = {"w": normal((3, 2)), "b": normal(4).astype(np.float16)}
    grad = {"w": normal((3, 2), seed=1), "b": normal(4, seed=1)}
    with np.errstate(all="ignore"):
        state, model = update(setup(rule, model), model, grad)
        expected = update(state, model, grad)
        got = load_pair(path, state, model)
        assert_equal(got, (state, model))
        assert_equal(update(*got, grad), expected)


def load_pair(path: Path, state: Any, model: Any) -> Any:
    return there_and_back(path, state, model)


def test_hyperparameters_are_kept_to_the_last_bit(path: Path) -> None:
    for eta in (0.1, 1 / 3, 5e-324, 1e308, np.nextafter(0.001, 1), 7, True):
        rule = Adam(eta=eta, beta=(0.9, np.nextafter(0.999, 0)))
        got = there_and_back(path, setup(rule, np.ones(1))).rule
        assert (got.eta, type(got.eta), got.beta) == (rule.eta, type(rule.eta), rule.beta)


def test_a_shared_rule_stays_shared(path: Path) -> None:
    got = there_and_back(path, setup(Adam(), [np.ones(2), np.ones(3)]))
    assert got[0].rule is got[1].rule


def test_what_is_frozen_stays_frozen(path: Path) -> None:
    state = setup(Descent(), {"a": np.ones(2), "b": np.ones(2)})
    freeze_(state["a"])
    got = there_and_back(path, state)
    assert got["a"].frozen
    assert not got["b"].frozen


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


def test_rules_of_users_come_back(path: Path) -> None:
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


def test_arrays_in_rules_come_back_each_as_itself(path: Path) -> None:
    fields = [{"weights": [np.full(3, float(k)), np.full(3, -float(k))]} for k in range(20)]
    state = [setup(Decayed(**more), np.ones(3)) for more in fields]
    assert_equal(there_and_back(path, state), state)
    assert_equal(load(path, like=state), state)


def test_a_rule_defined_twice_is_the_latest(path: Path) -> None:
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
    path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_ties_come_back_views_included(path: Path) -> None:
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


def test_a_model_of_views_into_one_vector_comes_back(path: Path) -> None:
    flat, re = destructure({"a": normal((3, 2)), "b": normal(5)})
    state = setup(Adam(), flat)
    got_state, got = there_and_back(path, state, flat)
    update_(got_state, got, np.ones(11))
    update_(state, flat, np.ones(11))
    assert_equal(re(got), re(flat))


def test_arrays_that_overlap_in_part_are_refused(path: Path) -> None:
    x = np.arange(6.0)
    with pytest.raises(ValueError, match=r"state\['a'\] and state\['b'\] overlap"):
        save(path, {"a": x[:4], "b": x[2:]})
    assert not Path(path).exists()
