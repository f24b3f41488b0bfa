"""Vectors of the model's own array library: `out=`, `copy_into_`; tied tensors count once."""

from __future__ import annotations

import numpy as np
import pytest
from util import parametrize

from optimisers import destructure, fmap

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")  # which gives NumPy the name bfloat16


def model_of(dtype):
    return {"w": torch.ones(2, 2, dtype=dtype), "b": torch.zeros(3, dtype=dtype)[::2]}


@parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
def test_out_takes_a_tensor_for_a_model_of_tensors(dtype):
    dtype = getattr(torch, dtype)
    model = model_of(dtype)
    flat, re = destructure(model)
    for out in (torch.full((6,), 9, dtype=dtype), torch.full((12,), 9, dtype=dtype)[::2]):
        assert re.flatten(model, out=out) is out
        assert torch.equal(out, flat)
        assert re.flatten_gradient({"w": 2 * model["w"]}, out=out) is out
        assert out.tolist() == [2, 2, 2, 2, 0, 0]
        assert re.flatten_gradient(None, out=out) is out
        assert out.tolist() == [0] * 6
    held = torch.nn.Parameter(torch.ones(6, dtype=dtype))
    re.flatten({"w": torch.nn.Parameter(model["w"]), "b": model["b"]}, out=held)
    assert torch.equal(held.detach(), flat)
    assert not held.is_leaf or held.grad_fn is None


def test_out_may_be_the_memory_of_the_model():
    _flat, re = destructure({"a": torch.zeros(2), "b": torch.zeros(3)})
    memory = torch.arange(6.0)
    model = {"a": memory[4:6], "b": memory[0:3]}
    re.flatten(model, out=memory[1:6])
    assert memory.tolist() == [0, 4, 5, 0, 1, 2]


def test_an_out_that_does_not_fit_is_refused():
    jnp = pytest.importorskip("jax.numpy")
    _, of_tensors = destructure(model_of(torch.float32))
    _, of_arrays = destructure([np.ones(6)])
    _, of_jax = destructure([jnp.ones(6)])
    model = model_of(torch.float32)
    for error, re, given, out in (
        (TypeError, of_arrays, [np.ones(6)], torch.ones(6)),
        (TypeError, of_arrays, [np.ones(6)], [0.0] * 6),
        (TypeError, of_jax, [jnp.ones(6)], jnp.ones(6)),
        (ValueError, of_tensors, model, torch.ones(5)),
        (TypeError, of_tensors, model, torch.ones(6, dtype=torch.int64)),
        (ValueError, of_tensors, model, torch.ones(1).expand(6)),
    ):
        with pytest.raises(error, match="out: expected a writable vector of length 6"):
            re.flatten(given, out=out)
    with pytest.raises(TypeError, match="leave it out"):
        of_jax.flatten([jnp.ones(6)], out=jnp.ones(6))


@parametrize("dtype", ["float32", "bfloat16"])
def test_copy_into_takes_vectors_of_every_library(dtype):
    jnp = pytest.importorskip("jax.numpy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors = model_of(getattr(torch, dtype))
    arrays = {k: np.ones(x.shape, getattr(ml_dtypes, dtype, dtype)) for k, x in tensors.items()}
    for model in (tensors, arrays):
        _, re = destructure(model)
        for k, v in enumerate(
            (
                torch.arange(6, dtype=getattr(torch, dtype)),
                torch.arange(6.0, requires_grad=True),
                jnp.arange(6, dtype=dtype),
                np.arange(6.0),
            )
        ):
            re.copy_into_(model, v + k)
            assert model["w"].reshape(-1).tolist() == [k, k + 1, k + 2, k + 3]
            assert model["b"].tolist() == [k + 4, k + 5]


@parametrize("kind", [lambda a: a, torch.from_numpy])
def test_copy_into_from_memory_that_it_writes(kind):
    memory = np.arange(6.0)
    tensor = torch.from_numpy(memory)
    model = {"a": tensor[1:3], "b": tensor[3:6]}
    _, re = destructure({"a": torch.zeros(2), "b": torch.zeros(3)})
    re.copy_into_(model, kind(memory[:5]))
    assert memory.tolist() == [0, 0, 1, 2, 3, 4]


def test_one_gradient_of_a_tied_tensor_counts_once():
    w = torch.nn.Parameter(torch.ones(2))
    model = {"encoder": w, "layers": [w, torch.nn.Parameter(torch.ones(1))], "decoder": w}
    (3 * w.sum() + w[0] + model["layers"][1].sum()).backward()
    grad = fmap(lambda p: p.grad, model)
    _, re = destructure(model)
    assert re.flatten_gradient(grad).tolist() == [4, 3, 1]
    grad["decoder"] = w.grad.clone()
    assert re.flatten_gradient(grad).tolist() == [12, 9, 1]
    grad["decoder"] = None
    assert re.flatten_gradient(grad).tolist() == [8, 6, 1]
    x = np.ones(2)
    _, re = destructure([x, x])
    g = np.ones(2)
    assert re.flatten_gradient([g, g]).tolist() == [2, 2]
