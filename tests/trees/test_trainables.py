"""The list of what trains: each parameter once, in the order of the flat vector."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from optimisers import KeyPath, destructure, functor, getkeypath, trainables


@dataclass
class Layer:
    bias: Any
    weight: Any
    name: str = "layer"
    extra: dict[str, Any] = field(default_factory=dict)


@functor(children=("a", "c"), trainable=("a",))
class Affine:
    def __init__(self, a, c):
        self.a, self.c, self.other = a, c, np.ones(9)


Point = namedtuple("Point", "x y")


def a(n):
    return np.full(2, float(n))


def firsts(arrays):
    return [float(x.flat[0]) for x in arrays]


@pytest.mark.parametrize(
    "model",
    [
        {"z": a(1), "a": [a(2), (a(3), {"b": a(4)})]},
        Layer(a(1), a(2), extra={"y": a(3), "x": a(4)}),
        [Point(a(1), a(2)), SimpleNamespace(y=a(3), x=a(4))],
        OrderedDict(z=a(1), a=Affine([a(2), a(3)], a(7)), c=a(4)),
        [1, "a", None, a(1), np.arange(3), np.float64(3.0), a(2), 1j, a(3), print, a(4), True],
    ],
)
def test_order_is_that_of_insertion_and_of_the_vector(model):
    assert firsts(trainables(model)) == [1, 2, 3, 4]
    flat, _ = destructure(model)
    np.testing.assert_array_equal(flat, np.repeat([1.0, 2.0, 3.0, 4.0], 2))


def test_paths_lead_to_the_arrays():
    model = {"layers": [Layer(a(1), a(2)), Layer(a(3), a(4))], "scale": np.array(5.0)}
    found = trainables(model, path=True)
    assert [str(path) for path, _ in found] == [
        "['layers'][0].bias",
        "['layers'][0].weight",
        "['layers'][1].bias",
        "['layers'][1].weight",
        "['scale']",
    ]
    for path, x in found:
        assert isinstance(path, KeyPath)
        assert getkeypath(model, path) is x


def test_the_arrays_themselves():
    model = {"w": np.zeros(2)}
    trainables(model)[0][:] = 3
    np.testing.assert_array_equal(model["w"], [3, 3])


def test_an_array_alone():
    x = np.zeros((2, 3))
    ((path, found),) = trainables(x, path=True)
    assert found is x
    assert path == KeyPath()


@pytest.mark.parametrize("model", [{}, [], (), None, "a", 1.0, {"n": np.arange(3)}, [[], {}]])
def test_nothing_to_train(model):
    assert trainables(model) == []
    assert trainables(model, path=True) == []


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "g", "c8", "c16", ">f4", "bfloat16", "float8_e4m3fn"]
)
def test_dtypes_that_train(dtype):
    if "float" in dtype:
        dtype = getattr(pytest.importorskip("ml_dtypes"), dtype)
    x = np.zeros(2, dtype)
    assert trainables([x])[0] is x


@pytest.mark.parametrize("dtype", ["i8", "?", "u1", "O", "U3", "S3", "M8[s]", [("a", "f8")]])
def test_dtypes_that_do_not(dtype):
    assert trainables([np.zeros(2, dtype)]) == []


def test_a_tied_array_comes_once_at_its_first_place():
    w = a(1)
    model = {"a": [w], "b": w, "c": a(2), "d": w}
    assert [str(path) for path, _ in trainables(model, path=True)] == ["['a'][0]", "['c']"]


def test_of_views_the_first_counts():
    w = np.zeros((2, 3))
    assert [x.shape for x in trainables([w.T, w, w.reshape(-1)])] == [(3, 2)]


def test_a_shared_container_comes_once():
    layer = {"w": a(1)}
    assert len(trainables([layer, layer, (layer,)])) == 1


def test_equal_arrays_are_two():
    assert len(trainables([np.zeros(2), np.zeros(2)])) == 2


def test_overlaps_are_refused():
    x = np.zeros(5)
    with pytest.raises(ValueError, match=r"\[0\] and \[1\] overlap"):
        trainables([x, x[1:]])


def test_a_model_that_contains_itself():
    model = [a(1)]
    model.append(model)
    with pytest.raises(ValueError, match="contains itself"):
        trainables(model)


def test_what_does_not_train_is_not_entered():
    """Not even to find that it contains itself."""
    buffers = [a(1)]
    buffers.append(buffers)
    assert firsts(trainables(Affine(a(2), buffers))) == [2]


def test_a_deep_model():
    model = a(1)
    for _ in range(10_000):
        model = [model]
    assert firsts(trainables(model)) == [1]


def test_a_traced_model():
    jax = pytest.importorskip("jax")

    def loss(model):
        return sum((x**2).sum() for x in trainables(model))

    grad = jax.grad(loss)({"w": a(1), "b": [a(2)]})
    np.testing.assert_array_equal(grad["b"][0], [4, 4])


def test_a_boxed_model():
    autograd = pytest.importorskip("autograd")
    grad = autograd.grad(lambda m: sum((x**2).sum() for x in trainables(m)))({"w": [a(1), (a(2),)]})
    np.testing.assert_array_equal(grad["w"][1][0], [4, 4])


def test_torch_parameters():
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.zeros(2, 3))
    model = {"w": w, "t": w.T, "n": torch.arange(3)}
    (found,) = trainables(model)
    assert found is w
