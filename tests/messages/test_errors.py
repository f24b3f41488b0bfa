"""What is refused says where, what was expected, what came, and the way out."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from util import PUBLIC, example, may_be_none, parametrize, snapshot

from optimisers import (
    ADOPT,
    COCOB,
    SOAP,
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Prodigy,
    Rprop,
    Rule,
    ScheduleFreeAdamW,
    ScheduleFreeDescent,
    Shampoo,
    Sophia,
    functor,
    setup,
    update,
    update_,
)


class Point(NamedTuple):
    x: object
    y: object


@functor
class Layer:
    def __init__(self, weight, bias, name="layer"):
        self.weight, self.bias, self.name = weight, bias, name


def model():
    return {
        "layers": [
            Layer(np.ones((2, 3), np.float32), np.ones(2)),
            Layer(np.ones((2, 2)), np.ones(2)),
        ],
        "point": Point(np.ones(2, np.float16), np.array(1.0)),
        "name": "net",
    }


def says(error, *texts, grad, higher=(), of=None):
    """Check that both updates raise, name all this, and change nothing."""
    m = model() if of is None else of
    state = setup(Adam(), m)
    before = snapshot([state, m])
    for call in (update, update_):
        with pytest.raises(error) as caught:
            call(state, m, grad, *higher)
        message = str(caught.value)
        for text in texts:
            assert text in message, message
        assert snapshot([state, m]) == before


# --- structure -------------------------------------------------------------------------------


def test_a_key_that_the_model_does_not_have():
    says(
        ValueError,
        "at (root)",
        "'lairs'",
        "'layers', 'point', 'name'",
        "dict",
        grad={"lairs": None},
    )
    says(
        ValueError,
        "layers",
        "[0]",
        "'wait'",
        "Layer with 'weight', 'bias', 'name'",
        grad={"layers": [{"wait": 1}, None]},
    )
    says(ValueError, "'z'", "Layer with", grad={"layers": [SimpleNamespace(z=1), None]})


def test_a_wrong_length():
    says(
        ValueError,
        "at ['layers']",
        "list of 2",
        "list of 1",
        "None means no gradient",
        grad={"layers": [None]},
    )
    says(
        ValueError, "at ['layers']", "list of 2", "tuple of 3", grad={"layers": (None, None, None)}
    )
    says(ValueError, "at ['point']", "Point with 'x', 'y'", "tuple of 1", grad={"point": (1.0,)})


def test_a_node_of_another_kind():
    says(TypeError, "at (root)", "dict with 'layers', 'point', 'name'", "list of 3", grad=[1, 2, 3])
    says(
        TypeError,
        "at ['layers']",
        "list of 2",
        "dict with 0, 1",
        grad={"layers": {0: None, 1: None}},
    )
    says(TypeError, "at ['layers']", "list of 2", "ndarray", grad={"layers": np.ones(2)})
    says(
        TypeError,
        "at ['layers'][1]",
        "Layer with",
        "list of 2",
        grad={"layers": [None, [np.ones(2), None]]},
    )
    says(TypeError, "at ['layers'][1]", "Layer with", "float (1.5)", grad={"layers": [None, 1.5]})
    says(TypeError, "at (root)", "'layers'", "str ('gradient')", grad="gradient")


def test_a_node_where_the_model_has_an_array():
    says(
        TypeError,
        "['layers'][0].weight",
        "shape (2, 3)",
        "float32",
        "list",
        grad={"layers": [{"weight": [1, 2]}, None]},
    )
    says(
        TypeError,
        "['point'].x",
        "shape (2,)",
        "float16",
        "dict",
        grad={"point": Point({"a": 1}, None)},
    )


def test_many_unknown_keys_are_not_all_listed():
    grad = {f"key{k}": None for k in range(1000)}
    with pytest.raises(ValueError, match="key0") as caught:
        update(setup(Adam(), model()), model(), grad)
    assert len(str(caught.value)) < 400
    wide = {f"key{k}": np.ones(1) for k in range(1000)}
    with pytest.raises(TypeError, match="key0") as caught:
        update(setup(Adam(), wide), wide, 3.0)
    assert len(str(caught.value)) < 400


@parametrize("dtype", ["float32", "float64", "float16", "longdouble", "complex64"])
def test_a_wrong_shape(dtype):
    for shape in [(3, 2), (3,), (), (1, 3), (2, 3, 1), (0,), (6,)]:
        says(
            ValueError,
            "gradient at ['w']",
            "expected an array of shape (2, 3)",
            f"dtype {np.dtype(dtype)}",
            f"got shape {shape}",
            grad={"w": np.ones(shape)},
            of={"w": np.ones((2, 3), dtype)},
        )


@parametrize("dtype", ["float32", "float64", "float16"])
def test_a_complex_gradient_of_a_real_parameter(dtype):
    for kind in ("complex64", "complex128"):
        says(
            TypeError,
            "gradient at ['w']",
            f"dtype {dtype}",
            "complex",
            kind,
            "real part",
            grad={"w": np.ones(2, kind)},
            of={"w": np.ones(2, dtype)},
        )
    says(TypeError, "gradient at ['w']", "complex", grad={"w": 1j}, of={"w": np.array(1.0, dtype)})


@parametrize("dtype", ["float32", "float16", "complex64"])
def test_a_gradient_that_is_no_number(dtype):
    of = {"w": np.ones(2, dtype), "last": np.ones(1)}
    expected = "gradient at ['w']", "expected an array of shape (2,)"
    says(TypeError, *expected, "'text' (str)", grad={"w": "text"}, of=of)
    says(TypeError, *expected, "[1.0, 2.0] (list)", grad={"w": [1.0, 2.0]}, of=of)
    says(TypeError, *expected, "1.5 (float)", grad={"w": 1.5}, of=of)
    says(TypeError, *expected, "(object)", grad={"w": object()}, of=of)
    says(TypeError, *expected, "dtype <U1", grad={"w": np.array(["a", "b"])}, of=of)
    says(TypeError, *expected, "dtype object", grad={"w": np.array([None, 1])}, of=of)
    says(TypeError, *expected, "datetime64", grad={"w": np.zeros(2, "M8[s]")}, of=of)
    says(TypeError, *expected, "V8", grad={"w": np.zeros(2, "V8")}, of=of)


def test_higher_derivatives_are_checked_like_gradients():
    @dataclasses.dataclass(frozen=True)
    class Second(Rule):
        def apply(self, state, x, g, h):
            return state, g / h

    w = {"w": np.ones(2)}
    state = setup(Second(), w)
    for wrong, error, text in [
        ({"w": np.ones(3)}, ValueError, r"at \['w'\] \(derivative 2\): .*shape \(3,\)"),
        ({"w": 1j * np.ones(2)}, TypeError, r"at \['w'\] \(derivative 2\): .*complex"),
        ({"v": np.ones(2)}, ValueError, "'v'"),
    ]:
        for call in (update, update_):
            with pytest.raises(error, match=text):
                call(state, w, {"w": np.ones(2)}, wrong)
    np.testing.assert_array_equal(update(state, w, w, {"w": np.full(2, 2.0)})[1]["w"], 0.5)


def test_a_message_about_a_huge_value_is_short():
    with pytest.raises(TypeError) as caught:
        update(setup(Adam(), np.ones(2)), np.ones(2), ["x"] * 100_000)
    assert len(str(caught.value)) < 300


# --- model and state that do not belong together ----------------------------------------------


def test_a_model_that_has_changed_since_setup():
    state = setup(Adam(), {"a": np.ones(2), "b": [np.ones(1)]})
    for other, text in [
        (
            {"a": np.ones(2)},
            "at (root): the state tree has dict with 'a', 'b', the model has dict with 'a'",
        ),
        (
            {"a": np.ones(2), "b": [np.ones(1)] * 2},
            "at ['b']: the state tree has list of 1, the model has list of 2",
        ),
        (
            {"a": np.ones(2), "b": np.ones(1)},
            "at ['b']: the state tree has list of 1, the model has ndarray",
        ),
        ({"a": np.ones(2), "c": [np.ones(1)]}, "'c'"),
    ]:
        for call in (update, update_):
            with pytest.raises(
                ValueError, match=f"{re.escape(text)}.*call setup anew|call setup anew"
            ):
                call(state, other, {"a": np.ones(2)})


@pytest.mark.parametrize("call", [update, update_])
@pytest.mark.parametrize("other", ["text", None, 3, np.arange(2)])
def test_a_parameter_that_is_none_any_more(call, other):
    state = setup(Adam(), {"a": np.ones(2), "b": np.ones(2)})
    before = snapshot(state)
    with pytest.raises((TypeError, ValueError), match=r"\['b'\]"):
        call(state, {"a": np.ones(2), "b": other}, {"a": np.ones(2), "b": np.ones(2)})
    assert snapshot(state) == before


@pytest.mark.parametrize("call", [update, update_])
@pytest.mark.parametrize("rule", [Adam(), ClipNorm(), OptimiserChain(Momentum(), AccumGrad(2))])
def test_a_parameter_of_another_shape_than_the_state(call, rule):
    """NumPy would broadcast some of these."""
    if not tuple(setup(rule, np.ones(1)).state):
        return
    for old, new in [((1,), (3,)), ((3,), (2, 3)), ((3,), (4,)), ((2, 3), (3,))]:
        model = {"a": np.ones(2), "b": np.ones(old)}
        state = setup(rule, model)
        other = {"a": np.ones(2), "b": np.ones(new)}
        before = snapshot([state, other])
        with pytest.raises(ValueError):  # noqa: PT011 (the words are NumPy's, or ours)
            call(state, other, {"a": np.ones(2), "b": np.ones(new)})
        assert snapshot([state, other]) == before


@pytest.mark.parametrize("call", [update, update_])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("rule", [Adam(), MixedPrecision(Adam()), OptimiserChain(Adam())])
def test_a_state_of_another_rule(call, dtype, rule):
    """Whoever makes a leaf by hand gets an error, not a crash."""
    x = np.ones(2, dtype)
    master = np.ones(2, np.float32)
    for wrong in [(), (master,), (master, None), (1, 2), (master, (1,)), ((),), None, 3]:
        with pytest.raises((AttributeError, IndexError, TypeError, ValueError)):
            call(Leaf(rule, wrong), x, np.ones(2, dtype))
        np.testing.assert_array_equal(x, 1)


@pytest.mark.parametrize("call", [update, update_])
def test_a_model_for_a_state_tree(call):
    model = {"w": np.ones(2)}
    for wrong in (model, np.ones(2), [np.ones(1)]):
        with pytest.raises((TypeError, ValueError), match="state"):
            call(wrong, wrong, wrong)


# --- setup -----------------------------------------------------------------------------------


def test_setup_wants_a_rule_first():
    for wrong, text in [
        (Adam, r"setup takes a rule first.*write Adam\(\)"),
        (np.ones(2), "setup takes a rule first, then the model"),
        (0.1, "got 0.1"),
        ({"w": np.ones(2)}, "then the model"),
    ]:
        with pytest.raises(TypeError, match=text):
            setup(wrong, {"w": np.ones(2)})


REAL_ONLY = [c for c in PUBLIC if c.real_only]


def test_which_rules_compare_numbers():
    assert set(REAL_ONLY) == {ADOPT, COCOB, ClipGrad, Prodigy, Rprop, Shampoo, SOAP, Sophia}


@parametrize("cls", REAL_ONLY)
def test_rules_for_real_numbers_refuse_complex_parameters(cls):
    for rule in (
        example(cls),
        OptimiserChain(Momentum(), example(cls)),
        MixedPrecision(example(cls)),
    ):
        for dtype in ("complex64", "complex128"):
            with pytest.raises(
                TypeError, match=rf"at \['b'\]\[0\]: {cls.__name__} .*real.*complex"
            ):
                setup(rule, {"a": np.ones(2), "b": [np.ones(2, dtype)]})


def test_setup_of_a_model_that_contains_itself():
    model = {"w": np.ones(2)}
    model["self"] = [model]
    with pytest.raises(ValueError, match=r"\['self'\]\[0\].*cycle"):
        setup(Adam(), model)


def test_setup_of_parameters_that_overlap_in_part():
    room = np.ones(6)
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\]\[0\] overlap"):
        setup(Adam(), {"a": room[:4], "b": [room[2:]]})


# --- norms -----------------------------------------------------------------------------------


@parametrize("dtype", ["float32", "float64", "float16", "longdouble", "complex64"])
@parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_that_is_not_finite(dtype, bad):
    m = {"a": np.ones(2, dtype), "b": [np.ones(2, dtype)]}
    g = {"a": np.ones(2), "b": [np.array([1, bad])]}
    value = "nan" if np.isnan(bad) else "inf"
    for p, name in [(2, "2"), (np.inf, "inf"), (1.5, "1.5")]:
        state = setup(OptimiserChain(Momentum(), ClipNorm(1.0, p)), m)
        before = snapshot([state, m])
        for call in (update, update_):
            text = rf"at \['b'\]\[0\]: ClipNorm: .*{name}-norm {value}; .*throw=False"
            with pytest.raises(FloatingPointError, match=text):
                call(state, m, g)
            assert snapshot([state, m]) == before
        update(setup(ClipNorm(1.0, p, throw=False), m), m, g)


def test_a_norm_too_large_for_any_number_is_not_finite():
    g = np.full(10, 1.7e308)
    with pytest.raises(FloatingPointError, match="1-norm inf"):
        update(setup(ClipNorm(1.0, 1), g), g, g)


# --- making rules ----------------------------------------------------------------------------


def numbers_of(rule):
    """Yield the name of each number among the fields, and a function that sets it."""
    for f in dataclasses.fields(rule):
        value = getattr(rule, f.name)
        if isinstance(value, float) and not isinstance(value, bool):
            yield f.name, lambda v, n=f.name: {n: v}
        elif isinstance(value, tuple):
            for k, number in enumerate(value):
                if isinstance(number, float):
                    yield (
                        f"{f.name}[{k}]",
                        lambda v, n=f.name, t=value, k=k: {n: (*t[:k], v, *t[k + 1 :])},
                    )


@parametrize("cls", PUBLIC)
def test_numbers_are_checked_at_construction(cls):
    for name, fields in numbers_of(example(cls)):
        none = () if may_be_none(cls, name) else (None,)
        for wrong in (np.nan, "0.1", *none, 1j, np.ones(2), [0.1]):
            with pytest.raises((TypeError, ValueError)) as caught:
                example(cls, **fields(wrong))
            message = str(caught.value)
            assert message.startswith(f"{cls.__name__}: {name} must be"), message
            assert repr(wrong) in message
        if name != "p":
            for wrong in (-np.inf,) if name in UPPER_LIMITS else (np.inf, -np.inf):
                with pytest.raises(ValueError, match=rf"{re.escape(name)} must be .*got {wrong}"):
                    example(cls, **fields(wrong))


UPPER_LIMITS = ("delta", "gamma[1]", "growth", "limit", "omega")

LIMITS = {
    "eta": (-1e-9, "at least 0"),
    "epsilon": (-1e-9, "at least 0"),
    "omega": (-1.0, "at least 0"),
    "delta": (-1.0, "at least 0"),
    "rho": (1.0, "[0, 1)"),
    "beta[0]": (1.0, "[0, 1)"),
    "beta[1]": (-0.1, "[0, 1)"),
}


DIVIDING = {(ScheduleFreeDescent, "rho"), (ScheduleFreeAdamW, "beta[0]")}
"""Decay rates that divide, so that they are above 0."""


@parametrize("cls", PUBLIC)
def test_limits_are_named(cls):
    for name, fields in numbers_of(example(cls)):
        if name in LIMITS:
            wrong, text = LIMITS[name]
            if (cls, name) == (Shampoo, "beta[1]"):  # where 1 is a sum
                text = "[0, 1]"
            elif (cls, name) in DIVIDING:
                text = "(0, 1)"
            elif (cls, name) == (Sophia, "rho"):  # no decay rate, but a factor
                wrong, text = LIMITS["epsilon"]
            with pytest.raises(ValueError, match=rf"{re.escape(text)}; got {wrong}") as caught:
                example(cls, **fields(wrong))
            assert f"{cls.__name__}: {name}" in str(caught.value)


def test_pairs_must_be_pairs():
    for wrong in (0.9, (0.9,), (0.9, 0.99, 0.999), "ab"):
        with pytest.raises(TypeError, match=r"Adam: beta must hold 2 numbers|Adam: beta"):
            Adam(beta=wrong)


def test_counts_must_be_whole():
    for wrong in (0, -1, 2.5, np.inf):
        with pytest.raises(
            ValueError, match="AccumGrad: n must be a whole number, at least 1; got"
        ):
            AccumGrad(wrong)
    with pytest.raises(TypeError, match="AccumGrad: n must be"):
        AccumGrad("3")


def test_chains_take_rules():
    with pytest.raises(TypeError, match=r"OptimiserChain takes rules.*0.1"):
        OptimiserChain(Adam(), 0.1)
    with pytest.raises(TypeError, match="OptimiserChain takes rules"):
        OptimiserChain([Adam(), Descent()])
    with pytest.raises(TypeError, match="OptimiserChain takes rules"):
        OptimiserChain(Adam)
    with pytest.raises(TypeError, match="put the chain inside"):
        OptimiserChain(Adam(), MixedPrecision(Adam()))
    with pytest.raises(TypeError, match="MixedPrecision"):
        OptimiserChain(OptimiserChain(MixedPrecision(Adam())))


def test_mixed_precision_takes_a_rule():
    for wrong in (0.1, Adam, "float32"):
        with pytest.raises(TypeError, match="MixedPrecision takes a rule"):
            MixedPrecision(wrong)
    with pytest.raises(TypeError, match="MixedPrecision takes a rule"):
        MixedPrecision("float32", MixedPrecision(Adam()))
    with pytest.raises(TypeError):
        MixedPrecision("no such dtype", Adam())


def test_rules_are_frozen():
    for cls in PUBLIC:
        rule = example(cls)
        for f in dataclasses.fields(rule):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(rule, f.name, 1)


# --- rules of users ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", [update, update_])
def test_a_step_of_another_shape(call):
    @dataclasses.dataclass(frozen=True)
    class Wide(Rule):
        def apply(self, state, x, dx):
            return state, np.ones((4, *x.shape))

    @dataclasses.dataclass(frozen=True)
    class Narrow(Rule):
        def apply(self, state, x, dx):
            return state, dx[:1]

    model = {"w": np.ones(3)}
    with pytest.raises(ValueError, match=r"Wide.*\(4, 3\).*\(3,\)"):
        call(setup(Wide(), model), model, model)
    _, new = call(setup(Narrow(), model), model, {"w": np.full(3, 2.0)})  # numbers broadcast
    np.testing.assert_array_equal(new["w"], -1)


@pytest.mark.parametrize("call", [update, update_])
def test_a_complex_step_of_a_real_parameter(call):
    @dataclasses.dataclass(frozen=True)
    class Turning(Rule):
        def apply(self, state, x, dx):
            return state, 1j * dx

    model = {"w": np.ones(3)}
    state = setup(Turning(), model)
    with pytest.raises((TypeError, ValueError), match="complex"):
        call(state, model, model)
    np.testing.assert_array_equal(model["w"], 1)


@pytest.mark.parametrize("call", [update, update_])
def test_whatever_a_rule_raises_says_where(call):
    @dataclasses.dataclass(frozen=True)
    class Broken(Rule):
        def apply(self, state, x, dx):
            raise RuntimeError("out of order")

    model = {"a": [np.ones(3), np.ones(2)]}
    state = {"a": [setup(Adam(), model["a"][0]), setup(Broken(), model["a"][1])]}
    with pytest.raises(RuntimeError, match="out of order") as caught:
        call(state, model, model)
    (note,) = caught.value.__notes__
    assert "Broken()" in note
    assert "['a'][1]" in note
    assert "nothing was updated" in note
