"""Arrays of other libraries in files, and files that other programs read and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved import assert_equal, there_and_back
from util import normal

from optimisers import Adam, Momentum, setup, update
from optimisers.io import File, load, save

pytestmark = pytest.mark.elsewhere


# --- other array libraries -------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
)
def test_tensors_of_torch_come_back(dtype: str, path: Path) -> None:
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


def test_arrays_of_jax_come_back(path: Path) -> None:
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


def test_leaves_that_jax_took_apart_are_one_again(path: Path) -> None:
    jax: Any = pytest.importorskip("jax")
    w = np.ones(2)
    model = {"a": w, "b": w}
    state = setup(Momentum(), model)
    state, model = jax.jit(update)(state, model, {"a": w, "b": w})
    got, _ = there_and_back(path, state, model)
    assert got["a"] is got["b"]
    assert type(got["a"].rule.eta) is float
    assert got["a"].rule == Momentum()


def test_an_equinox_module_is_filled(path: Path) -> None:
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


def test_the_package_reads_our_files(path: Path) -> None:
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


def test_we_read_files_of_the_package(path: Path) -> None:
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


def test_files_of_the_package_with_the_floats_of_torch(path: Path) -> None:
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


def test_a_file_that_the_package_wrote_again_is_still_ours(path: Path) -> None:
    numpy: Any = pytest.importorskip("safetensors.numpy")
    package: Any = pytest.importorskip("safetensors")
    model = {"b": normal(3), "a": np.arange(3, dtype=np.int8)}
    state = setup(Adam(), model)
    save(path, state, model)
    with package.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    numpy.save_file(numpy.load_file(path), path, metadata=metadata)
    assert_equal(load(path), (state, model))
