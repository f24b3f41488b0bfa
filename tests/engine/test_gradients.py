"""Gradients that update takes: structure, shared memory, dtypes, attributes, derivatives."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from updates import DTYPES, Data, Layer, Point
from util import (
    BOTH,
    PUBLIC,
    arrays_in,
    assert_near,
    assert_same_bits,
    example,
    normal,
    parametrize,
    snapshot,
    step,
)

from optimisers import (
    Adam,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    destructure,
    functor,
    setup,
    update,
    update_,
)

# --- structure of gradients ------------------------------------------------------------------

GRADIENTS_OF_OBJECTS = [
    {"weight": np.full(2, 2.0), "bias": np.ones(1)},
    SimpleNamespace(weight=np.full(2, 2.0), bias=np.ones(1)),
    OrderedDict(bias=np.ones(1), weight=np.full(2, 2.0)),
    defaultdict(dict, weight=np.full(2, 2.0), bias=np.ones(1)),
]


@BOTH
@pytest.mark.parametrize("kind", [Layer, Data])
@pytest.mark.parametrize("grad", GRADIENTS_OF_OBJECTS, ids=lambda g: type(g).__name__)
def test_an_object_takes_its_gradient_as_dict_namespace_or_its_like(call, kind, grad):
    for g in (grad, kind(np.full(2, 2.0), np.ones(1))):
        model = kind(np.ones(2), np.ones(1))
        state, new = call(setup(Descent(0.5), model), model, g)
        np.testing.assert_array_equal(new.weight, 0)
        np.testing.assert_array_equal(new.bias, 0.5)
        assert type(new) is kind
        assert isinstance(state, SimpleNamespace)


@BOTH
def test_a_gradient_with_attributes_missing(call):
    model = Layer(np.ones(2), np.ones(1))
    state, new = call(setup(Momentum(0.5), model), model, {"bias": np.ones(1)})
    np.testing.assert_array_equal(new.weight, 1)
    np.testing.assert_array_equal(new.bias, 0.5)
    np.testing.assert_array_equal(state.weight.state.v, 0)


@BOTH
def test_dictionaries_may_be_in_another_order(call):
    model = {"a": np.array([1.0]), "b": np.array([2.0])}
    grad = {"b": np.array([2.0]), "a": np.array([1.0])}
    state = dict(reversed(setup(Descent(1.0), model).items()))
    _, new = call(state, model, grad)
    assert list(new) == ["a", "b"]
    assert_same_bits(new, {"a": np.zeros(1), "b": np.zeros(1)})


@BOTH
@pytest.mark.parametrize(("model", "grad"), [([1], (1,)), ((1,), [1]), (Point(1, 1), (1, 1))])
def test_lists_and_tuples_stand_in_for_each_other(model, grad, call):
    make = model._make if hasattr(model, "_make") else type(model)
    x = make([np.full(2, 1.0 + k) for k in range(len(model))])
    g = type(grad)([np.ones(2)] * len(grad))
    _, new = call(setup(Descent(1.0), x), x, g)
    assert type(new) is type(model)
    np.testing.assert_array_equal(new[0], 0)


NODES = {
    "dict": lambda a, b: {"a": a, "b": b},
    "OrderedDict": lambda a, b: OrderedDict(a=a, b=b),
    "defaultdict": lambda a, b: defaultdict(list, a=a, b=b),
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "namedtuple": Point,
    "SimpleNamespace": lambda a, b: SimpleNamespace(a=a, b=b),
    "dataclass": Data,
    "functor": Layer,
    "keys that are no names": lambda a, b: {0: a, ("x", 1): b},
    "nested": lambda a, b: {"outer": [Data((a,), {"k": b})]},
}


@BOTH
@parametrize("kind", NODES)
def test_every_kind_of_node(kind, call):
    make = NODES[kind]
    model = make(np.array([1.0, 2.0]), np.array([3.0], np.float16))
    state = setup(Momentum(0.5), model)
    grad = make(np.array([1.0, 1.0]), np.array([1.0]))
    for _ in range(2):
        state, model = call(state, model, grad)
    expected = make(np.array([1 - 1.45, 2 - 1.45]), np.array([3 - 1.45]))
    assert type(model) is type(expected)
    got = [a for _, a in arrays_in(model)]
    wanted = [a for _, a in arrays_in(expected)]
    assert len(got) == len(wanted) == 2
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
    if kind == "defaultdict":
        assert model.default_factory is list


def test_states_of_objects_have_the_names_of_their_attributes():
    model = SimpleNamespace(layers=[Layer(np.ones(2), np.ones(1)), Data(np.ones(2), np.ones(1))])
    state = setup(Momentum(), model)
    assert isinstance(state.layers[0].bias, Leaf)
    assert isinstance(state.layers[1].weight, Leaf)
    assert (state.layers[0].name, state.layers[1].size) == ((), ())


@BOTH
def test_shared_containers_stay_shared(call):
    inner = {"w": np.ones(2)}
    model = {"one": inner, "two": inner, "list": [inner]}
    state = setup(Descent(0.5), model)
    assert state["one"] is state["two"]
    state, new = call(state, model, {"one": {"w": np.ones(2)}, "list": [{"w": np.ones(2)}]})
    assert new["one"] is new["two"] is new["list"][0]
    assert state["one"] is state["two"] is state["list"][0]
    np.testing.assert_array_equal(new["one"]["w"], 0)  # one parameter, gradients summed


@BOTH
def test_non_trainable_parts_are_not_looked_at(call):
    @functor(children=("a", "c"), trainable=("a",))
    class Affine:
        def __init__(self, a, c):
            self.a, self.c = a, c

    model = {"affine": Affine(np.ones(2), np.ones(2)), "text": {"name": "x"}}
    state = setup(Descent(0.5), model)
    assert state["affine"].c == ()
    grad = {"affine": {"a": np.ones(2), "c": "rubbish"}, "text": 17}
    _, new = call(state, model, grad)
    np.testing.assert_array_equal(new["affine"].a, 0.5)
    np.testing.assert_array_equal(new["affine"].c, 1)


# --- gradients that alias --------------------------------------------------------------------

ALIASED = [Descent(0.5), Adam(), OptimiserChain(ClipNorm(1.0), Momentum()), MixedPrecision(Adam())]


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("rule", ALIASED)
def test_gradients_that_are_parameters(call, dtype, rule):
    a, b = normal(3000, dtype, 1), normal(3000, dtype, 2)
    model = {"a": a.copy(), "b": b.copy()}
    expected = update(setup(rule, model), model, {"a": b, "b": a})
    got = call(setup(rule, model), model, {"a": model["b"], "b": model["a"]})
    assert_same_bits(got, expected)


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("rule", ALIASED)
def test_the_gradient_is_the_parameter(call, dtype, rule):
    model = {"a": normal(3000, dtype)}
    state = setup(rule, model)
    for _ in range(3):
        expected = update(copy.deepcopy(state), model, {"a": model["a"].copy()})
        state, model = call(state, model, model)
        assert_same_bits([state, model], expected)


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("rule", ALIASED)
def test_gradients_that_overlap_parameters_in_part(call, dtype, rule):
    room = normal(9000, dtype)
    views = {"a": slice(0, 3000), "b": slice(3000, 6000)}
    others = {"a": slice(1500, 4500), "b": slice(5999, 2999, -1)}
    plain = {k: room[s].copy() for k, s in views.items()}
    grad = {k: room[s].copy() for k, s in others.items()}
    expected = update(setup(rule, plain), plain, grad)
    model = {k: room[s] for k, s in views.items()}
    got = call(setup(rule, model), model, {k: room[s] for k, s in others.items()})
    assert_near(got, expected)  # NumPy may add up the norm of a reversed array in another order


@BOTH
@parametrize("dtype", DTYPES)
def test_gradients_that_alias_state(call, dtype):
    x = normal(3000, dtype)
    model = {"a": x.copy(), "b": x.copy()}
    state = setup(Momentum(), model)
    update_(state, model, {"a": x, "b": x})
    v = state["a"].state.v
    expected = update(copy.deepcopy(state), model, {"a": v.copy(), "b": v.copy()})
    got = call(state, model, {"a": v, "b": v})
    assert_same_bits(got, expected)


@BOTH
def test_gradients_that_alias_across_both_paths(call):
    """A gradient of the kernels lies in a parameter of the array path, and the other way round."""
    room = np.ones(8, np.float64)
    half = np.full(8, 2.0)
    model = {"kernels": half, "arrays": room[::2]}
    plain = {k: x.copy() for k, x in model.items()}
    grad = {"kernels": room, "arrays": half[::2]}
    expected = update(setup(Descent(0.5), plain), plain, {k: g.copy() for k, g in grad.items()})[1]
    assert_same_bits(call(setup(Descent(0.5), model), model, grad)[1], expected)


@BOTH
@parametrize("dtype", ["float64", "float16"])
def test_one_gradient_array_for_many_parameters(call, dtype):
    model = {k: normal(5, dtype, k) for k in range(4)}
    g = normal(5, dtype, 9)
    expected = {k: update(setup(Adam(), x), x, g.copy())[1] for k, x in model.items()}
    assert_same_bits(call(setup(Adam(), model), model, dict.fromkeys(model, g))[1], expected)


# --- gradients of other kinds ----------------------------------------------------------------


@BOTH
@parametrize("dtype", DTYPES)
@parametrize(
    "given", ["int8", "uint16", "int64", "bool", "float16", "float32", "float64", "longdouble"]
)
def test_gradients_of_another_dtype_are_cast(given, dtype, call):
    g = np.array([1, 0, 3, 1], given)
    x = np.ones(4, dtype)
    _, new, used = step(call, setup(Descent(0.5), x), x, g)
    assert new.dtype == dtype
    np.testing.assert_array_equal(new, 1 - 0.5 * g.astype(dtype))
    by_kernels = dtype in ("float16", "float32", "float64")
    assert used == {"(root)": "kernels" if by_kernels else "arrays"}


@BOTH
def test_casts_that_overflow_do_so_quietly(call):
    x = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float16)}
    _, new = call(setup(Descent(1.0), x), x, {"a": np.full(2, 1e300), "b": np.full(2, 1e300)})
    np.testing.assert_array_equal(new["a"], -np.inf)
    np.testing.assert_array_equal(new["b"], -np.inf)


@BOTH
def test_real_gradients_of_complex_parameters(call):
    x = np.array([1 + 1j, 2])
    _, new = call(setup(Descent(0.5), x), x, np.array([1.0, 2.0]))
    np.testing.assert_array_equal(new, [0.5 + 1j, 1])


@BOTH
def test_numbers_are_gradients_of_arrays_without_dimensions(call):
    model = [np.array(3.0), np.array(3.0), np.array(3.0, np.float32), np.array(3.0, np.float16)]
    _, new = call(setup(Descent(0.5), model), model, [2, np.float32(2), np.array(2), 2.0])
    assert all(isinstance(x, np.ndarray) and x.shape == () for x in new)
    assert [float(x) for x in new] == [2.0] * 4
    assert [x.dtype for x in new] == ["f8", "f8", "f4", "f2"]


@BOTH
@parametrize("dtype", ["float32", "float64", "float16", "complex64"])
def test_gradients_from_jax(dtype, call):
    jnp = pytest.importorskip("jax.numpy")
    x = np.ones(3, dtype)
    g = jnp.array([1.0, 2.0, 3.0], "float32")
    _, new, _ = step(call, setup(Descent(0.5), x), x, g)
    assert type(new) is np.ndarray
    np.testing.assert_array_equal(new, np.array([0.5, 0, -0.5], dtype))
    _, new = call(setup(Descent(0.5), np.ones(3, dtype)), np.ones(3, dtype), g.astype("bfloat16"))
    np.testing.assert_array_equal(new, np.array([0.5, 0, -0.5], dtype))


@BOTH
@parametrize("dtype", ["float32", "float64", "float16", "complex64"])
def test_gradients_from_torch(dtype, call):
    torch = pytest.importorskip("torch")
    x = np.ones(3, dtype)
    for g in (
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0])[::2],
    ):
        _, new = call(setup(Descent(0.5), x.copy()), x.copy(), g)
        np.testing.assert_array_equal(new, np.array([0.5, 0, -0.5], dtype))


def test_gradients_from_torch_that_numpy_does_not_know():
    torch = pytest.importorskip("torch")
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    _, new = update(setup(Descent(0.5), np.ones(3)), np.ones(3), g)
    np.testing.assert_array_equal(new, [0.5, 0, -0.5])


@BOTH
def test_symbolic_zeros_of_jax_are_no_gradients(call):
    jax = pytest.importorskip("jax")
    float0 = np.zeros(3, jax.dtypes.float0)
    zero = jax.custom_derivatives.SymbolicZero(jax.core.ShapedArray((3,), np.float32))
    model = {"a": np.ones(3), "b": np.ones(3, np.float16), "c": np.ones(3, np.float32)}
    state = setup(Adam(), model)
    state, new = call(state, model, {"a": float0, "b": float0, "c": zero})
    assert [int(state[k].state.t) for k in "abc"] == [0, 0, 0]
    assert_same_bits(
        new, {"a": np.ones(3), "b": np.ones(3, np.float16), "c": np.ones(3, np.float32)}
    )


# --- gradients of objects, and higher derivatives --------------------------------------------


@functor(children=("w",))
class Named:
    scale = 2.0

    def __init__(self):
        self.w, self.name, self.count = np.ones(2), "encoder", 3

    @property
    def size(self):
        return 2

    def forward(self):
        return self.w


@dataclasses.dataclass
class Initialised:
    w: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(2))

    def __post_init__(self):
        self.count = 3


class Attributed(dict):
    count = 3

    def __init__(self):
        super().__init__(w=np.ones(2))
        self.name = "encoder"


OBJECTS = {
    Named: ["name", "count", "scale", "size"],
    Initialised: ["count"],
    Attributed: ["name"],
}


@BOTH
@parametrize("kind", OBJECTS)
@parametrize("like", [dict, SimpleNamespace])
def test_gradients_may_name_attributes_that_are_no_children(call, kind, like):
    more = dict.fromkeys(OBJECTS[kind], np.ones(7))
    model = {"layers": [kind()]}
    grad = {"layers": [like(w=np.ones(2), **more)]}
    _, new = call(setup(Descent(0.5), model), model, grad)
    node = new["layers"][0]
    np.testing.assert_array_equal(node["w"] if kind is Attributed else node.w, 0.5)
    _flat, re = destructure(model)
    assert re.flatten_gradient(grad).tolist() == [1, 1]
    for name in ("weight", "forward", "keys", "__doc__"):
        grad = {"layers": [like(w=np.ones(2), **{name: np.ones(2)})]}
        with pytest.raises(ValueError, match=rf"\['layers'\]\[0\].*'{name}'"):
            call(setup(Descent(0.5), model), model, grad)


def test_keys_that_name_methods_of_containers_are_unknown():
    model = {"w": np.ones(2)}
    with pytest.raises(ValueError, match="'items'"):
        update(setup(Descent(), model), model, {"w": np.ones(2), "items": np.ones(2)})


@dataclasses.dataclass(frozen=True)
class FirstOrder(Rule):
    def apply(self, state, x, dx):
        return state, 0.5 * dx


@dataclasses.dataclass(frozen=True)
class FirstOrderByName(Rule):
    def apply(self, state, x, dx, *, value=None):
        assert value is None
        return state, 0.5 * dx


@dataclasses.dataclass(frozen=True)
class FirstOrderMove(Descent):
    def move(self, state, x, dx):
        return state, x - 0.5 * dx


@dataclasses.dataclass(frozen=True)
class SecondOrder(Rule):
    def apply(self, state, x, dx, ddx=None):
        return state, 0.5 * dx if ddx is None else dx / ddx


@dataclasses.dataclass(frozen=True)
class Wrapping(Rule):
    rule: Rule

    def init(self, x):
        return self.rule.init(x)

    def apply(self, state, x, dx, *higher):
        return self.rule.apply(state, x, dx, *higher)


@BOTH
@parametrize("rule", [FirstOrder(), FirstOrderByName(), SecondOrder(), FirstOrderMove()])
@parametrize(
    "wrap",
    [
        lambda rule: rule,
        lambda rule: OptimiserChain(WeightDecay(0.0), OptimiserChain(rule)),
        lambda rule: MixedPrecision("float64", rule),
        Wrapping,
    ],
)
def test_rules_are_handed_the_derivatives_that_they_take(call, rule, wrap):
    if isinstance(rule, FirstOrderMove):
        rule, wrap = rule, (lambda rule: rule)
    x, second, third = np.full(2, 4.0), np.full(2, 2.0), np.full(2, 9.0)
    for higher in ((), (second,), (second, third), (None, None)):
        _, new = call(setup(wrap(rule), x), x.copy(), np.full(2, 4.0), *higher)
        np.testing.assert_array_equal(new, 2.0)


@BOTH
@parametrize("rule", [*(example(cls) for cls in PUBLIC), FirstOrder()])
@parametrize(
    "wrong",
    [
        (ValueError, {"b": [np.ones(3)]}),
        (TypeError, {"b": [np.ones(2, complex)]}),
        (TypeError, {"b": ["text"]}),
        (ValueError, {"c": np.ones(2)}),
        (TypeError, {"b": 3.0}),
    ],
)
def test_higher_derivatives_must_fit_whatever_the_rule(call, rule, wrong):
    error, higher = wrong
    model = {"a": np.ones(2), "b": [np.ones(2)]}
    state = setup(rule, model)
    grad = {"a": np.ones(2), "b": [np.ones(2)]}
    before = snapshot([state, model])
    place = "'c'" if "c" in higher else r"\['b'\]"
    for given in ((higher,), (None, higher)):
        with pytest.raises(error, match=place):
            call(state, model, grad, *given)
    assert snapshot([state, model]) == before
