"""The flat vector: its layout, ties, the tree's numbers, and derivatives by other libraries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util import arrays_alone
from vectors import Layer, count, refuses

import optimisers
from optimisers import (
    Adam,
    ElementwiseRule,
    OptimiserChain,
    WeightDecay,
    destructure,
    setup,
    trainables,
    update_,
)
from optimisers._arrays.sharing import same_elements
from optimisers.rules import _base

pytestmark = pytest.mark.elsewhere


# --- the vector ------------------------------------------------------------------------------


def test_flat_is_a_contiguous_copy():
    model = {"w": count(2, 3), "b": np.array(9.0)}
    flat, _ = destructure(model)
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 5, 9])
    assert type(flat) is np.ndarray
    assert flat.flags.c_contiguous
    assert flat.flags.owndata
    assert flat.flags.writeable
    flat[:] = 0
    np.testing.assert_array_equal(model["w"], count(2, 3))


def test_one_array_is_copied_too():
    x = count(3)
    flat, re = destructure(x)
    assert not np.shares_memory(flat, x)
    assert np.shares_memory(re(flat), flat)
    np.testing.assert_array_equal(re(flat), x)


@pytest.mark.parametrize(
    "x",
    [
        np.asfortranarray(count(2, 3)),
        count(3, 2).T.copy().T.T,
        count(4, 6)[::2, ::2],
        count(2, 3)[::-1, ::-1][::-1, ::-1],
        np.broadcast_to(count(3), (2, 3)),
        count(2, 3).astype(">f8"),
    ],
)
def test_arrays_are_laid_out_in_c_order(x):
    flat, re = destructure([x])
    np.testing.assert_array_equal(flat, list(x.flat))
    np.testing.assert_array_equal(re(flat)[0], x)
    assert flat.dtype.isnative
    assert re(flat)[0].dtype.isnative


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("f2", "f2"),
        (">f4", "f4"),
        ("f2 f4", "f4"),
        ("f4 f8", "f8"),
        ("f4 c8", "c8"),
        ("f8 c8", "c16"),
        ("f8 g", "g"),
        ("bfloat16", "bfloat16"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("f2 bfloat16", "f4"),
        ("bfloat16 f2 f8", "f8"),
        ("bfloat16 f2 c8", "c8"),
        ("bfloat16 float8_e4m3fn", "f4"),
        ("float8_e4m3fn float8_e5m2", "f4"),
        ("float8_e4m3fn float8_e4m3fnuz", "f4"),
        ("float8_e4m3fn f2", "f4"),
    ],
)
def test_dtype_of_the_vector(dtypes, expected):
    def dtype(name):
        return np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if "fl" in name else name)

    found = [dtype(name) for name in dtypes.split()]
    for order in (found, found[::-1]):
        model = [np.array([0.5, -2.0]).astype(d) for d in order]
        flat, re = destructure(model)
        assert flat.dtype == dtype(expected)
        for x, y in zip(re(flat), model, strict=True):
            assert x.dtype == y.dtype.newbyteorder("=")
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(re.flatten(re(flat)), flat)


@pytest.mark.filterwarnings("ignore:nothing to train")
@pytest.mark.parametrize("model", [{}, [1, "a"], None, (), {"n": np.arange(3)}, [np.zeros((0, 3))]])
def test_nothing_to_train(model):
    flat, re = destructure(model)
    assert flat.shape == (0,)
    assert flat.dtype == np.float64
    assert len(re) == 0
    new = re(np.zeros(0))
    assert type(new) is type(model)
    assert repr(new) == repr(model)
    assert type(re([])) is type(model)
    assert re.flatten(model).shape == re.flatten_gradient(None).shape == (0,)
    re.copy_into_(model, flat)
    state = setup(Adam(), flat)
    update_(state, flat, re.flatten_gradient(()))
    with refuses(ValueError, "length 0", "length 1"):
        re([1.0])


def test_overlaps_are_refused():
    x = count(5)
    with refuses(ValueError, "['a']", "['b'][0]", "overlap"):
        destructure({"a": x, "b": [x[1:]]})


def test_deep_models():
    model = [count(2), "end"]
    for _ in range(10_000):
        model = {"next": model}
    flat, re = destructure(model)
    new = re(flat + 1)
    for _ in range(10_000):
        new = new["next"]
    np.testing.assert_array_equal(new[0], [1, 2])
    assert new[1] == "end"
    while type(model) is dict:  # let go level by level
        model = model["next"]


# --- ties ------------------------------------------------------------------------------------


def test_ties_by_identity():
    w = count(2)
    flat, re = destructure({"a": w, "b": [w], "c": count(1)})
    assert len(re) == 3
    model = re(flat)
    assert model["a"] is model["b"][0]
    model = re(flat, copy=True)
    assert model["a"] is model["b"][0]
    model = re(flat.astype("f4"))
    assert model["a"] is model["b"][0]


@pytest.mark.parametrize("copy", [False, True])
def test_ties_by_view(copy):
    w = count(2, 3, 4)
    model = {"a": w.T, "b": w, "c": w.reshape(-1)[::-1], "d": w[:, ::-1].transpose(1, 0, 2)}
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, w.ravel())
    new = re(flat, copy=copy)
    for key, x in model.items():
        np.testing.assert_array_equal(new[key], x)
        assert same_elements(new[key], new["b"])
    assert np.shares_memory(new["b"], flat) is not copy
    flat += 1
    for key, x in model.items():
        np.testing.assert_array_equal(new[key], x if copy else x + 1)


def test_without_a_c_contiguous_place_the_first_counts():
    w = count(2, 3)
    flat, re = destructure([w.T, w[:, ::-1]])
    np.testing.assert_array_equal(flat, w.T.ravel())
    first, second = re(flat)
    np.testing.assert_array_equal(second, w[:, ::-1])
    assert same_elements(first, second)


def test_a_place_that_strides_cannot_reach_is_a_copy():
    w = count(2, 3)
    rest = w.reshape(-1)[::-1].reshape(3, 2)
    model = [w.T, rest]
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, w.T.ravel())
    first, second = re(flat)
    assert np.shares_memory(first, flat)
    assert not np.shares_memory(second, flat)
    np.testing.assert_array_equal(second, rest)
    np.testing.assert_array_equal(re.flatten([first, second]), flat)
    gradient = re.flatten_gradient([None, count(3, 2)])
    np.testing.assert_array_equal(re(gradient)[1], count(3, 2))


def test_shared_containers_stay_shared():
    layer = {"w": count(2)}
    model = {"a": layer, "b": [layer, layer], "t": (layer,)}
    flat, re = destructure(model)
    assert len(re) == 2
    new = re(flat)
    assert new["a"] is new["b"][0] is new["b"][1] is new["t"][0]
    assert new["a"] is not layer
    gradient = {"a": {"w": [1, 1] * count(2)}, "b": [None, {"w": np.ones(2)}]}
    np.testing.assert_array_equal(re.flatten_gradient(gradient), [1, 2])


def test_one_step_over_the_vector_moves_every_place():
    w = count(2, 3)
    flat, re = destructure({"a": w, "b": w.T})
    model = re(flat)
    grad = {"a": np.ones((2, 3)), "b": 10 * np.ones((3, 2))}
    update_(setup(optimisers.Descent(1.0), flat), flat, re.flatten_gradient(grad))
    np.testing.assert_array_equal(model["a"], w - 11)
    np.testing.assert_array_equal(model["b"], w.T - 11)


# --- flat equals tree ------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
trees = st.recursive(
    shapes.map(lambda shape: np.ones(shape)) | st.sampled_from([None, 3, "a"]),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=2), below, max_size=4)
        | st.tuples(below, below)
        | st.builds(Layer, below, below)
    ),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore:nothing to train")
@settings(deadline=None)
@given(trees)
def test_there_and_back(model):
    flat, re = destructure(model)
    assert flat.size == sum(x.size for x in trainables(model))
    v = np.random.default_rng(0).standard_normal(len(re))
    new = re(v)
    assert [str(p) for p, _ in trainables(new, path=True)] == [
        str(p) for p, _ in trainables(model, path=True)
    ]
    np.testing.assert_array_equal(re.flatten(new), v)
    np.testing.assert_array_equal(re.flatten_gradient(arrays_alone(new)), v)
    np.testing.assert_array_equal(destructure(new)[0], v)
    re.copy_into_(model, v)
    np.testing.assert_array_equal(re.flatten(model), v)


@pytest.mark.filterwarnings("ignore:nothing to train")
@settings(deadline=None)
@given(trees, st.sampled_from([np.float32, np.float64]))
def test_flat_equals_tree_on_random_models(model, dtype):
    _, re = destructure(model)
    random = np.random.default_rng(0)
    flat = random.standard_normal(len(re)).astype(dtype)
    model, flat_model = re(flat, copy=True), re(flat.copy())
    flat, re = destructure(re(flat.copy()) if flat.dtype == np.float64 else model)
    flat_model = re(flat)
    rule = OptimiserChain(WeightDecay(0.1), Adam(0.1))
    state, flat_state = setup(rule, model), setup(rule, flat)
    for _ in range(3):
        v = random.standard_normal(len(re)).astype(flat.dtype)
        grad = arrays_alone(re(v))
        update_(state, model, grad)
        update_(flat_state, flat, re.flatten_gradient(grad))
    assert re.flatten(model).tobytes() == flat.tobytes()
    assert re.flatten(flat_model).tobytes() == flat.tobytes()


RULES = [
    cls
    for cls in _base.registry()
    if issubclass(cls, ElementwiseRule) and not cls.__abstractmethods__ and cls.measure is None
]


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "c16"])
@pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
def test_flat_equals_tree_for_every_elementwise_rule(cls, dtype):
    if dtype == "c16" and cls.real_only:
        pytest.skip("real parameters only")
    random = np.random.default_rng(0)

    def numbers(shape):
        x = random.standard_normal(shape)
        return np.asarray(x + 1j * random.standard_normal(shape) if dtype == "c16" else x, dtype)

    w = numbers((5, 7))
    model = {"w": w, "b": [numbers(3), numbers(()), numbers((2, 0))], "long": numbers(3000)}
    flat, re = destructure(model)
    flat_model = re(flat)
    state, flat_state = setup(cls(), model), setup(cls(), flat)
    for _ in range(5):
        grad = {"w": numbers((5, 7)), "b": [numbers(3), numbers(()), None], "long": numbers(3000)}
        state, model = update_(state, model, grad)
        update_(flat_state, flat, re.flatten_gradient(grad))
    assert model["w"] is w
    assert re.flatten(model).tobytes() == flat.tobytes() == re.flatten(flat_model).tobytes()


# --- other libraries -------------------------------------------------------------------------


def test_jax_differentiates_both_ways():
    jax = pytest.importorskip("jax")
    w = count(2, 3, dtype="f4")
    flat, re = destructure({"w": w, "t": w.T, "b": [count(2, dtype="f4")]})

    def loss(v):
        model = re(v)
        return (model["w"] * model["t"].T).sum() + (model["b"][0] ** 3).sum()

    v = flat + 1
    expected = np.concatenate([2 * v[:6], 3 * v[6:] ** 2])
    for function in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(function(v), expected)
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(np.stack([v, v]))[1], expected)
    np.testing.assert_allclose(np.diag(jax.hessian(loss)(v))[6:], 6 * v[6:])
    grad = jax.grad(lambda m: (destructure(m)[0] ** 2).sum())(re(v, copy=True))
    np.testing.assert_allclose(grad["b"][0], 2 * v[6:])
    np.testing.assert_allclose(jax.jit(re.flatten)(re(v)), v)  # not in the order of sorted keys
    np.testing.assert_allclose(jax.jit(re.flatten_gradient)({"b": [v[:2]]})[6:], v[:2])


def test_torch_differentiates_both_ways():
    torch = pytest.importorskip("torch")
    model = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
    flat, re = destructure(model)
    assert re(flat)["w"].data_ptr() == flat.data_ptr()
    assert re(flat, copy=True)["w"].data_ptr() != flat.data_ptr()
    v = torch.arange(8.0, requires_grad=True)
    (re(v)["w"] ** 2).sum().backward()
    assert v.grad.tolist() == [0, 2, 4, 6, 8, 10, 0, 0]
    for x in model.values():
        x.requires_grad_()
    (destructure(model)[0] ** 2).sum().backward()
    assert model["w"].grad.tolist() == [[2, 2, 2], [2, 2, 2]]
    re.copy_into_(model, np.arange(8.0))
    assert model["b"].tolist() == [6, 7]
    mixed = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2, dtype=torch.bfloat16)}
    flat, re = destructure(mixed)
    assert flat.dtype == torch.float32
    assert re(flat)["b"].dtype == torch.bfloat16


def test_autograd_differentiates_both_ways():
    autograd = pytest.importorskip("autograd")
    w = count(2, 3)
    flat, re = destructure({"w": w, "t": w.T, "b": [count(2), (count(),)]})

    def loss(v):
        model = re(v)
        return (model["w"] * model["t"].T).sum() + (model["b"][0] ** 3).sum()

    v = flat + 1
    np.testing.assert_allclose(
        autograd.grad(loss)(v), np.concatenate([2 * v[:6], 3 * v[6:8] ** 2, [0]])
    )
    model = {"w": w, "b": [count(2), (count(),)]}
    grad = autograd.grad(lambda m: (destructure(m)[0] ** 2).sum())(model)
    np.testing.assert_allclose(grad["w"], 2 * w)
    np.testing.assert_allclose(grad["b"][0], [0, 2])
