"""Rules that measure, in JAX, PyTorch and optax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from util import parametrize

import optimisers as opt
from optimisers import (
    LAMB,
    AccumGrad,
    Adam,
    Centralise,
    ClipAdaptive,
    ClipGlobalNorm,
    Descent,
    OptimiserChain,
    Polyak,
    Prodigy,
    TrustRatio,
    all_finite,
    norm,
    norms,
    setup,
    update,
    update_,
)

RULES = [
    OptimiserChain(ClipGlobalNorm(0.5), Adam(0.1)),
    OptimiserChain(AccumGrad(2), ClipGlobalNorm(0.5, 3.0), Descent(0.1)),
    LAMB(0.1, lambda_=0.1),
    OptimiserChain(TrustRatio(0.1), Descent(0.5)),
    OptimiserChain(Centralise(), ClipAdaptive(0.1), Descent(0.1)),
    Prodigy(d0=1e-2),
    Prodigy(d0=1e-2, corrected=True, growth=1.5),
    Polyak(),
]
SHAPES = {"w": (4, 3), "b": (5,), "c": ()}


def model_of(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()
    }


def loss(model: Any) -> Any:
    return sum((k + 1) * ((x - 0.3) ** 2).sum() for k, (_, x) in enumerate(sorted(model.items())))


def gradient(model: Any) -> Any:
    return {name: 2 * (k + 1) * (x - 0.3) for k, (name, x) in enumerate(sorted(model.items()))}


def trained(rule: Any, model: Any, call: Any = update_, steps: int = 6) -> Any:
    state = setup(rule, model)
    for _ in range(steps):
        state, model = call(state, model, gradient(model), value=loss(model))
    return state, model


def assert_close(got: Any, right: Any) -> None:
    for name, x in right.items():
        np.testing.assert_allclose(np.asarray(got[name]), x, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
@parametrize("rule", RULES)
def test_jax_has_the_numbers_of_numpy(rule: Any, compiled: bool) -> None:
    jax = pytest.importorskip("jax")
    state, right = trained(rule, model_of(np.float64))
    model = {name: jax.numpy.asarray(x) for name, x in model_of().items()}
    call = jax.jit(update) if compiled else update
    found, got = trained(rule, model, call)
    assert_close(got, right)
    np.testing.assert_allclose(norms(found), norms(state), rtol=1e-4)


@parametrize("rule", RULES)
def test_jax_scans_over_steps(rule: Any) -> None:
    jax = pytest.importorskip("jax")
    _, right = trained(rule, model_of(np.float64))

    def step(carried: Any, _: Any) -> Any:
        state, model = carried
        return update(state, model, gradient(model), value=loss(model)), None

    model = {name: jax.numpy.asarray(x) for name, x in model_of().items()}
    (_, got), _ = jax.lax.scan(step, (setup(rule, model), model), None, length=6)
    assert_close(got, right)


@parametrize("rule", [LAMB(0.1), Prodigy(d0=1e-2), OptimiserChain(ClipGlobalNorm(0.5), Adam(0.1))])
def test_jax_maps_over_models(rule: Any) -> None:
    jax = pytest.importorskip("jax")
    xs = jax.numpy.asarray(np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32))

    def run(x: Any) -> Any:
        state = setup(rule, x)
        for _ in range(3):
            state, x = update(state, x, 2 * x)
        return x

    got = jax.vmap(run)(xs)
    for x, one in zip(xs, got, strict=True):
        np.testing.assert_allclose(one, run(x), rtol=1e-5)


def test_jax_differentiates_through_a_norm_of_the_tree() -> None:
    jax = pytest.importorskip("jax")
    start = {name: jax.numpy.asarray(x) for name, x in model_of().items()}

    def end(omega: Any) -> Any:
        state, model = setup(OptimiserChain(ClipGlobalNorm(omega), LAMB(0.1)), start), start
        for _ in range(3):
            state, model = update(state, model, gradient(model))
        return loss(model)

    slope = (end(0.505) - end(0.495)) / 0.01
    for differentiate in jax.grad, lambda f: jax.jit(jax.grad(f)):
        np.testing.assert_allclose(differentiate(end)(0.5), slope, rtol=0.05, atol=2e-3)


@parametrize("rule", RULES)
def test_tensors_have_the_numbers_of_numpy(rule: Any) -> None:
    torch = pytest.importorskip("torch")
    for dtype in np.float32, np.float64:
        _, right = trained(rule, model_of(dtype))
        _, got = trained(rule, {name: torch.tensor(x) for name, x in model_of(dtype).items()})
        assert_close(got, right)


def test_the_optimizer_of_pytorch_hands_the_loss_on_and_clips_over_its_groups() -> None:
    torch = pytest.importorskip("torch")
    x, y = torch.nn.Parameter(torch.tensor([3.0])), torch.nn.Parameter(torch.tensor([4.0]))
    rule = OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0))
    optimizer = opt.torch.Optimizer([{"params": [x]}, {"params": [y]}], rule)
    x.grad, y.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert [x.item(), y.item()] == pytest.approx([2.4, 3.2])

    z = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = opt.torch.Optimizer([z], Polyak())

    def closure() -> Any:
        optimizer.zero_grad()
        value = (z**2).sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert z.tolist() == [0.5, 1.0]
    with pytest.raises(TypeError, match="needs the value of the loss"):
        optimizer.step()


def test_optax_hands_the_value_on_and_clips_over_the_tree() -> None:
    pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    tx = opt.optax.to_optax(OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0)))
    params = {"a": jax.numpy.asarray([3.0]), "b": jax.numpy.asarray([4.0])}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)
    tx = opt.optax.to_optax(Polyak())
    updates, _ = tx.update(params, tx.init(params), params, value=5.0)
    np.testing.assert_allclose(updates["a"], [-0.6], rtol=1e-6)


def test_norms_of_trees_of_other_libraries() -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    x = np.array([3.0, 4.0], np.float32)
    for tree in [jax.numpy.asarray(x)], [torch.tensor(x)]:
        assert norm(tree) == pytest.approx(5.0)
        assert all_finite(tree) is True
    assert float(jax.jit(norm)([jax.numpy.asarray(x)])) == pytest.approx(5.0)
    assert bool(jax.jit(all_finite)([jax.numpy.asarray(x) / 0])) is False
