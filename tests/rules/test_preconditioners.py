"""Rules that keep a matrix for each axis, beside their formulas in two dimensions."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from optimisers import (
    SOAP,
    Adam,
    Descent,
    Muon,
    OptimiserChain,
    Scion,
    Shampoo,
    WeightDecay,
    io,
    setup,
    update,
    update_,
)

# Statistics of full rank from the first step on, so that no basis is arbitrary.
SHAPES = [(4, 4), (2, 3, 4), (5,), ()]


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def gradients(*shape: int, count: int = 14) -> list[np.ndarray]:
    return [drawn(*shape, seed=k) for k in range(1, count)]


def trained(rule: Any, x: np.ndarray, gs: Any) -> np.ndarray:
    model = {"w": x.copy()}
    state = setup(rule, model)
    for g in gs:
        state, model = update_(state, model, {"w": g})
    return model["w"]


# --- SOAP ------------------------------------------------------------------------------------


def soap_by_hand(x: np.ndarray, gs: Any, rule: SOAP) -> np.ndarray:
    """Return where SOAP leads a square matrix, by its formula for rows and columns."""
    b1, b2 = rule.beta
    m = v = np.zeros_like(x)
    first, *later = gs
    left, right = (1 - b2) * first @ first.T, (1 - b2) * first.T @ first
    p, q = (np.linalg.eigh(a)[1][:, ::-1] for a in (left, right))
    for s, g in enumerate(later, start=1):
        turned = p.T @ g @ q
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * turned**2
        u = p.T @ m @ q / (1 - b1**s) / (np.sqrt(v / (1 - b2**s)) + rule.epsilon)
        x = (x - rule.eta * (p @ u @ q.T)) * (1 - rule.eta * rule.lambda_)
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if s % rule.every == 0:
            up, across = (np.argsort(-np.diag(b.T @ a @ b)) for a, b in ((left, p), (right, q)))
            v = v[up][:, across]
            p, q = np.linalg.qr(left @ p[:, up])[0], np.linalg.qr(right @ q[:, across])[0]
    return x


@pytest.mark.parametrize("rule", [SOAP(0.01), SOAP(0.1, (0.8, 0.9), 1e-3, 0.3, every=3)], ids=repr)
def test_soap_by_its_formula(rule: SOAP) -> None:
    x, gs = drawn(4, 4), gradients(4, 4)
    assert np.allclose(trained(rule, x, gs), soap_by_hand(x, gs, rule), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), ()])
def test_soap_below_two_dimensions_is_adam_one_step_late(shape: Any) -> None:
    x, gs = drawn(*shape), gradients(*shape)
    adam = trained(OptimiserChain(Adam(0.1, (0.95, 0.9)), Descent(1.0)), x, gs[1:])
    assert np.allclose(trained(SOAP(0.1, (0.95, 0.9), lambda_=0.0), x, gs), adam, atol=1e-12)


def test_long_axes_of_soap_keep_no_matrix() -> None:
    x, gs = drawn(4, 3), gradients(4, 3)
    state = setup(SOAP(max_dim=3), x)
    assert [a.shape for a in state.state.L] == [(0,), (3, 3)]
    assert [a.shape for a in setup(SOAP(max_dim=2), x).state.L] == [(0,), (0,)]
    adam = trained(Adam(0.1, (0.95, 0.95)), x, gs[1:])
    assert np.allclose(trained(SOAP(0.1, lambda_=0.0, max_dim=2), x, gs), adam, atol=1e-12)


# --- Shampoo ---------------------------------------------------------------------------------


def root(a: np.ndarray, order: int, epsilon: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(a)
    return vectors * (values - min(values.min(), 0) + epsilon) ** (-1 / order) @ vectors.T


def shampoo_by_hand(x: np.ndarray, gs: Any, rule: Shampoo) -> np.ndarray:
    """Return where Shampoo leads a matrix, by its formula for rows and columns."""
    b1, b2 = rule.beta
    m = np.zeros_like(x)
    left, right = np.zeros((len(x), len(x))), np.zeros((len(x.T), len(x.T)))
    adam_m = adam_v = m
    for t, g in enumerate(gs, start=1):
        m = b1 * m + (1 - b1) * g
        share, seen = (1, 1) if b2 == 1 else (1 - b2, 1 - b2**t)
        left, right = b2 * left + share * g @ g.T, b2 * right + share * g.T @ g
        if t == 1 or t % rule.every == 0:
            p, q = root(left / seen, 4, rule.epsilon), root(right / seen, 4, rule.epsilon)
        u = p @ (m / (1 - b1**t)) @ q
        if rule.graft is not None:
            adam_m, adam_v = 0.9 * adam_m + 0.1 * g, 0.999 * adam_v + 0.001 * g**2
            a = adam_m / (1 - 0.9**t) / (np.sqrt(adam_v / (1 - 0.999**t)) + 1e-8)
            u = u * np.linalg.norm(a) / np.linalg.norm(u)
        x = x - rule.eta * (u + rule.lambda_ * x)
    return x


@pytest.mark.parametrize(
    "rule",
    [
        Shampoo(0.1),
        Shampoo(0.1, graft=None, every=1),
        Shampoo(0.1, (0.8, 0.9), 1e-4, every=3, lambda_=0.2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_shampoo_by_its_formula(rule: Shampoo, shape: tuple[int, int]) -> None:
    x, gs = drawn(*shape), gradients(*shape)
    expected = shampoo_by_hand(x, gs, rule)
    assert np.allclose(trained(rule, x, gs), expected, rtol=1e-9, atol=1e-9)


def test_vectors_and_arrays_of_three_axes_of_shampoo() -> None:
    """Along each of k axes the power is -1/2k; a vector has one matrix."""
    g = drawn(5)
    expected = -0.1 * root(np.outer(g, g), 2, 1e-6) @ g
    assert np.allclose(trained(Shampoo(0.1, graft=None), np.zeros(5), [g]), expected, rtol=1e-9)
    g = drawn(2, 3, 4)
    u = g
    for k in range(3):
        unfolded = np.moveaxis(g, k, 0).reshape(g.shape[k], -1)
        p = root(unfolded @ unfolded.T, 6, 1e-6)
        u = np.moveaxis(np.tensordot(p, u, axes=(1, k)), 0, k)
    found = trained(Shampoo(0.1, graft=None), np.zeros((2, 3, 4)), [g])
    assert np.allclose(found, -0.1 * u, rtol=1e-9)


def test_blocks_of_long_axes() -> None:
    """Each block is preconditioned for itself; the length of the graft is that of the whole."""
    x, gs = np.zeros((4, 3)), gradients(4, 3)
    rule = Shampoo(0.1, graft=None, max_dim=2)
    found = trained(rule, x, gs)
    for rows in (slice(0, 2), slice(2, 4)):
        for columns in (slice(0, 2), slice(2, 3)):
            part = trained(rule, x[rows, columns], [g[rows, columns] for g in gs])
            assert np.allclose(found[rows, columns], part, atol=1e-12)
    first = trained(Shampoo(1.0, max_dim=2), x, gs[:1])
    assert np.isclose(np.linalg.norm(first), np.sqrt(12), rtol=1e-6)  # Adam's first step is signs


def test_adjusting_reaches_the_graft_by_what_is_its_own_alone() -> None:
    rule = Shampoo().adjust(eta=0.5, beta=(0.8, 1.0))
    assert (rule.eta, rule.beta, rule.graft) == (0.5, (0.8, 1.0), Adam(1.0))
    assert Shampoo(graft=WeightDecay()).adjust(lambda_=0.1).lambda_ == 0.1
    assert dict(Shampoo(graft=Adam()).fields()).keys() >= {"eta", "every", "max_dim"}
    with pytest.raises(TypeError, match="graft shapes the state"):
        Shampoo().adjust(graft=None)
    with pytest.raises(TypeError, match=r"Shampoo: graft must be a rule, or None.*got 1"):
        Shampoo(graft=1)


# --- both ------------------------------------------------------------------------------------

RULES = [SOAP(0.1, every=2), Shampoo(0.1, every=2), Shampoo(0.1, (0.9, 0.99), graft=None)]
BOTH = pytest.mark.parametrize("rule", RULES, ids=repr)


@BOTH
@pytest.mark.parametrize("shape", [*SHAPES, (0, 2), (3, 0), (0,)])
def test_zero_gradients_move_nothing_but_what_decays(rule: Any, shape: Any) -> None:
    x = np.zeros(shape)
    state = setup(rule, x)
    for _ in range(4):
        state, x = update(state, x, np.zeros(shape))
        assert np.all(x == 0)


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "float32", "longdouble"])
def test_every_dtype(rule: Any, dtype: str) -> None:
    x, gs = drawn(4, 4), gradients(4, 4, count=4)
    expected = trained(rule, x, gs)
    model = x.astype(dtype)
    state = setup(rule, model)
    for g in gs:
        state, model = update(state, model, g.astype(dtype))
    assert model.dtype == dtype
    assert np.allclose(model.astype(float), expected, atol=max(300 * np.finfo(dtype).eps, 1e-10))


@BOTH
def test_complex_parameters_are_refused(rule: Any) -> None:
    with pytest.raises(TypeError, match="takes real parameters only; got complex128"):
        setup(rule, {"w": np.ones((2, 2), complex)})


@BOTH
def test_tensors_and_arrays_of_jax(rule: Any) -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    model = {str(shape): drawn(*shape) for shape in SHAPES}
    gs = [{str(s): drawn(*s, seed=k) for s in SHAPES} for k in range(1, 7)]
    expected, state = dict(model), setup(rule, model)
    for g in gs:
        state, expected = update(state, expected, g)
    tensors = {k: torch.tensor(v) for k, v in model.items()}
    state = setup(rule, tensors)
    for g in gs:
        state, tensors = update_(state, tensors, {k: torch.tensor(v) for k, v in g.items()})
    for name, x in expected.items():
        assert np.allclose(tensors[name].numpy(), x, atol=1e-9)
    with jax.enable_x64(True):
        arrays = jax.tree.map(jax.numpy.asarray, model)
        state, step = setup(rule, arrays), jax.jit(update)
        for g in gs:
            state, arrays = step(state, arrays, jax.tree.map(jax.numpy.asarray, g))
        for name, x in expected.items():
            assert np.allclose(arrays[name], x, atol=1e-9)


def primitives(jaxpr: Any, in_branch: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the names of all operations of a traced function, and whether each is in a branch."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, in_branch
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from primitives(part, in_branch or name == "cond")


def test_a_traced_step_decomposes_in_a_branch() -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((4, 3))
    for rule, names in ((SOAP(), {"qr", "eigh"}), (Shampoo(), {"eigh"})):
        state = setup(rule, x)
        traced = jax.make_jaxpr(lambda s: update(s, x, x))(state)
        found = {pair for pair in primitives(traced.jaxpr) if pair[0] in names}
        assert found == {(name, True) for name in names}


@BOTH
def test_states_go_through_pickles_and_files(rule: Any, tmp_path: Any) -> None:
    model = {"w": drawn(4, 4), "k": drawn(2, 3, 4), "b": drawn(3)}
    rule = OptimiserChain(Adam(1.0), rule)
    state, model = update_(setup(rule, model), model, model)
    io.save(tmp_path / "state", state, model)
    for again, same in (pickle.loads(pickle.dumps((state, model))), io.load(tmp_path / "state")):
        new = update(again, same, same)[1]
        for name, x in update(state, model, model)[1].items():
            assert np.array_equal(new[name], x)


@BOTH
def test_narrow_parameters_keep_their_means_in_float32(rule: Any) -> None:
    """Rounded to float16, a mean has parts along all eigenvectors; small ones are magnified."""
    state = setup(rule, drawn(4, 4).astype(np.float16)).state
    assert {a.dtype for a in (state.m, *state.L[0])} == {np.dtype(np.float32)}


@pytest.mark.parametrize("rule", [*RULES, Muon(0.1), Muon(0.1, rows=0.9), Scion(0.1)], ids=repr)
def test_derivatives_through_steps_of_a_dead_matrix_are_finite(rule: Any) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((3, 3))

    def outcome(theta: Any) -> Any:
        state, y = setup(rule, x), x
        for _ in range(3):
            state, y = update(state, y, theta * 0 * y)
        return (y**2).sum()

    assert np.isfinite(jax.jit(jax.grad(outcome))(1.3))


@pytest.mark.parametrize("library", ["jax", "torch"])
def test_derivatives_through_the_roots_of_shampoo(library: str) -> None:
    """Eigenvectors have no derivative where two eigenvalues are equal; the root of a matrix has."""
    rule = Shampoo(0.1, every=1, epsilon=0.1, graft=None)
    gs = [np.diag([1.0, 1.0, 2.0]), np.diag([1.0, 1.0, 3.0])]
    change = drawn(3, 3)

    def outcome(theta: Any, xs: Any) -> Any:
        x, change, *gs = xs
        state = rule.init(x)
        for g in gs:
            state, dx = rule.apply(state, x, g + theta * change)
            x = x - dx
        return (x**2).sum()

    arrays = drawn(3, 3, seed=3), change, *gs
    near = (outcome(1e-5, arrays) - outcome(-1e-5, arrays)) / 2e-5
    if library == "jax":
        jax = pytest.importorskip("jax")
        with jax.enable_x64(True):
            slope = jax.grad(outcome)(0.0, [*map(jax.numpy.asarray, arrays)])
    else:
        torch = pytest.importorskip("torch")
        theta = torch.zeros((), dtype=torch.float64)
        slope = torch.func.grad(outcome)(theta, [*map(torch.tensor, arrays)])
    assert np.isclose(float(slope), near, rtol=1e-6)
