"""Rules of matrices: the iteration, beside PyTorch and the formulas, for every kind of array."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from optimisers import Adam, AdamW, Descent, Muon, OptimiserChain, Scion, io, setup, update, update_
from optimisers.rules.matrices import COEFFICIENTS, as_matrix, from_matrix, orthogonal, triples_of

SHAPES = [(4, 3), (3, 5), (4, 4), (2, 3, 4)]
RANGES = {"jordan": (0.2, 1.21), "quintic": (0.2, 1.16), "polar": (0.4, 1.15)}
"""Between which numbers each iteration brings singular values of 1e-3 to 1."""


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_values_come_near_to_one(name: str) -> None:
    u, _, v = np.linalg.svd(drawn(64, 64))
    matrix = u * np.logspace(-3, 0, 64) @ v
    found = orthogonal(matrix * 3, triples_of(Muon(), name, 5), 1.02 if name == "polar" else 1.0)
    values = np.linalg.svd(found)[1]
    low, high = RANGES[name]
    assert low * 0.05 < values.min()
    assert values.max() < high
    assert np.median(values) > low


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 3)])
def test_many_steps_of_a_convergent_iteration_give_the_orthogonal_factor(shape: Any) -> None:
    matrix = drawn(*shape)
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix, ((1.875, -1.25, 0.375),) * 40)
    assert np.allclose(found, u @ v, atol=1e-12)
    both = matrix + 1j * drawn(*shape, seed=1)
    u, _, v = np.linalg.svd(both, full_matrices=False)
    assert np.allclose(orthogonal(both, ((1.875, -1.25, 0.375),) * 40), u @ v, atol=1e-12)


@pytest.mark.parametrize("outputs", [0, 1, -1])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 0), (0, 3)])
def test_the_way_to_a_matrix_and_back(shape: Any, outputs: int) -> None:
    x = drawn(*shape)
    matrix = as_matrix(x, outputs)
    assert matrix.shape[0] == shape[outputs]
    assert np.array_equal(from_matrix(matrix, x, outputs), x)
    for row, expected in zip(matrix, np.moveaxis(x, outputs, 0), strict=True):
        assert np.array_equal(row, expected.ravel())


def by_hand(x: np.ndarray, gs: Any, rule: Muon) -> np.ndarray:
    """Return where the rule leads, as its formula says it, for matrices in PyTorch's layout."""
    m, v = np.zeros_like(x), np.zeros(len(x))
    rows, columns = x.shape
    factor = {
        "original": np.sqrt(max(1, rows / columns)),
        "rms": 0.2 * np.sqrt(max(rows, columns)),
        "spectral": np.sqrt(rows / columns),
    }[rule.scale]
    for g in gs:
        m = rule.rho * m + (1 - rule.rho) * g
        u = (1 - rule.rho) * g + rule.rho * m if rule.nesterov else m
        o = u / (np.linalg.norm(u) + 1e-7)
        for _ in range(rule.steps):
            a, b, c = COEFFICIENTS["jordan"][0]
            gram = o @ o.T
            o = a * o + b * gram @ o + c * gram @ gram @ o
        if rule.rows is not None:
            length = np.linalg.norm(o)
            v = rule.rows * v + (1 - rule.rows) * np.mean(o**2, axis=1)
            o = o / (np.sqrt(v) + 1e-10)[:, None]
            o = o * length / (np.linalg.norm(o) + 1e-10)
        x = x - rule.eta * (factor * o + rule.lambda_ * x)
    return x


RULES = [
    Muon(),
    Muon(0.1, 0.8, 0.3, "rms"),
    Muon(0.1, 0.8, 0.3, "spectral", nesterov=False),
    Muon(0.1, rows=0.95),
    Muon(0.1, steps=2),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
def test_the_formula(rule: Muon, shape: tuple[int, int]) -> None:
    model = {"w": drawn(*shape)}
    gs = [drawn(*shape, seed=k) * (0.01 if k % 3 else 1.0) for k in range(1, 9)]
    expected = by_hand(model["w"].copy(), gs, rule)
    state = setup(rule, model)
    for g in gs:
        state, model = update_(state, model, {"w": g})
    assert np.allclose(model["w"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "name"), [("original", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_same_numbers_as_torch(
    scale: str, name: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its guard: it divides by the larger of the norm and 1e-7, and not by their sum."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    for shape in [(4, 3), (3, 5), (4, 4)]:
        model = {"w": drawn(*shape)}
        p = torch.tensor(model["w"].copy(), requires_grad=True)
        theirs = torch.optim.Muon(
            [p], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=name
        )
        state = setup(Muon(0.02, 0.95, 0.1, scale, nesterov=nesterov), model)
        for k in range(1, 20):
            g = 1e3 * drawn(*shape, seed=k)
            p.grad = torch.tensor(g)
            theirs.step()
            state, model = update_(state, model, {"w": g})
        assert np.allclose(model["w"], p.detach().numpy(), rtol=0, atol=1e-9)


def test_other_arrays_go_to_the_other_rule() -> None:
    model = {"w": drawn(3, 2), "b": drawn(3), "c": np.array(1.0)}
    rule = Muon(0.1, other=Descent(0.5))
    new = update(setup(rule, model), model, model)[1]
    assert np.allclose(new["b"], 0.5 * model["b"])
    assert np.allclose(new["c"], 0.5)
    assert not np.allclose(new["w"], 0.5 * model["w"])


def test_adjusting_reaches_the_other_rule_by_what_is_its_own_alone() -> None:
    rule = Muon(other=AdamW(0.1)).adjust(eta=0.5, epsilon=1e-3)
    assert (rule.eta, rule.other) == (0.5, AdamW(0.1, epsilon=1e-3))
    with pytest.raises(TypeError, match="rows shapes the state"):
        Muon().adjust(rows=0.9)
    with pytest.raises(TypeError, match="no rule here has the field 'etta'"):
        Muon().adjust(etta=1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_axis_of_outputs(shape: tuple[int, ...]) -> None:
    """A layout with outputs last gives the step of the one with outputs first, turned."""
    x, g = drawn(*shape), drawn(*shape, seed=1)
    for rule in (Muon(0.1, scale="spectral", rows=0.9), Muon(0.1)):
        first = update(setup(rule, x), x, g)[1]
        turned = [np.moveaxis(a, 0, -1) for a in (x, g)]
        last = type(rule)(**{**vars(rule), "outputs": -1})
        assert np.allclose(
            update(setup(last, turned[0]), *turned)[1], np.moveaxis(first, 0, -1), atol=1e-12
        )


def test_scion_by_its_formula() -> None:
    x, g = drawn(4, 3), drawn(4, 3, seed=1)
    m = 0.1 * g
    o = orthogonal(m, triples_of(Scion(), "jordan", 5))
    expected = x - 0.01 * (50 * np.sqrt(4 / 3) * o + x)
    assert np.allclose(update(setup(Scion(0.01), x), x, g)[1], expected, rtol=1e-12)
    free = update(setup(Scion(0.01, constrained=False), x), x, g)[1]
    assert np.allclose(free, expected + 0.01 * x, rtol=1e-12)
    kernel, g = drawn(4, 3, 2, 2), drawn(4, 3, 2, 2, seed=1)
    o = orthogonal(0.1 * g.reshape(4, -1), triples_of(Scion(), "jordan", 5)).reshape(g.shape)
    expected = kernel - 0.01 * (50 * np.sqrt(4 / 3) / 4 * o + kernel)
    assert np.allclose(update(setup(Scion(0.01), kernel), kernel, g)[1], expected, rtol=1e-12)
    bias, g = drawn(5), drawn(5, seed=1)
    m = 0.1 * g
    expected = bias - 0.01 * (50 * m / (np.sqrt(np.mean(m**2)) + 1e-8) + bias)
    assert np.allclose(update(setup(Scion(0.01), bias), bias, g)[1], expected, rtol=1e-12)


EVERY = [Muon(0.1), Muon(0.1, coefficients="polar", rows=0.9), Scion(0.01)]


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_zeros_and_nothing_move_nothing(rule: Any) -> None:
    for shape in [(3, 2), (0, 2), (2, 0), (2, 0, 3)]:
        x = np.zeros(shape)
        state = setup(rule, x)
        for _ in range(2):
            state, x = update(state, x, np.zeros(shape))
            assert np.all(x == 0)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "longdouble", "complex128"])
def test_every_dtype(rule: Any, dtype: str) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x, g = drawn(3, 2), drawn(3, 2, seed=1)
    expected = update(setup(rule, x), x, g)[1]
    narrow = x.astype(dtype)
    new = update(setup(rule, narrow), narrow, g.astype(dtype))[1]
    assert new.dtype == dtype
    eps = 2.0**-7 if np.dtype(dtype).kind == "V" else np.finfo(dtype).eps
    assert np.allclose(new.astype("complex128"), expected, atol=float(max(64 * eps, 1e-12)))
    kept = narrow.copy()
    update_(setup(rule, kept), kept, g.astype(dtype))
    assert np.array_equal(kept, new)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_tensors_and_arrays_of_jax(rule: Any) -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    model = {"w": drawn(3, 2), "c": drawn(2, 3, 2), "b": drawn(3)}
    grads = {name: drawn(*x.shape, seed=1) for name, x in model.items()}
    expected = update(setup(rule, model), model, grads)[1]
    tensors, theirs = ({k: torch.tensor(v) for k, v in tree.items()} for tree in (model, grads))
    found = update(setup(rule, tensors), tensors, theirs)[1]
    update_(setup(rule, tensors), tensors, theirs)
    for name, x in expected.items():
        assert np.allclose(found[name].numpy(), x, atol=1e-12)
        assert np.allclose(tensors[name].numpy(), x, atol=1e-12)
    with jax.enable_x64(True):
        arrays, theirs = (jax.tree.map(jax.numpy.asarray, tree) for tree in (model, grads))
        found = jax.jit(update)(setup(rule, arrays), arrays, theirs)[1]
        for name, x in expected.items():
            assert np.allclose(found[name], x, atol=1e-12)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_states_go_through_pickles_and_files(rule: Any, tmp_path: Any) -> None:
    model = {"w": drawn(3, 2), "b": drawn(3)}
    rule = OptimiserChain(Adam(1.0), rule)
    state, model = update_(setup(rule, model), model, model)
    io.save(tmp_path / "state", state, model)
    for again, same in (pickle.loads(pickle.dumps((state, model))), io.load(tmp_path / "state")):
        new = update(again, same, same)[1]
        for name, x in update(state, model, model)[1].items():
            assert np.array_equal(new[name], x)


def test_numbers_of_the_iteration_are_checked() -> None:
    assert Muon(coefficients=[[1.5, -0.5, 0]]).coefficients == ((1.5, -0.5, 0.0),)
    for wrong in ("quartic", [], [(1, 2)], [(1, 2, np.nan)], 3):
        with pytest.raises(ValueError, match=r"Muon: coefficients must be one of 'jordan'"):
            Muon(coefficients=wrong)
    with pytest.raises(ValueError, match=r"Muon: scale must be one of 'original', 'rms'"):
        Muon(scale="norm")
    with pytest.raises(TypeError, match=r"Muon: other must be a rule.*got 0.1"):
        Muon(other=0.1)
