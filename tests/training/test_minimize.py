"""`minimize`: the training loop over trees."""

from __future__ import annotations

import io
import math
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from util import assert_same_bits, snapshot

import optimisers as opt
from optimisers._training import History

Tree = Any


def start() -> Tree:
    return {"a": np.array([1.0, -2.0]), "b": [np.array(0.5)], "name": "tiny"}


def loss(model: Tree) -> Any:
    return ((model["a"] - 3) ** 2).sum() + (model["b"][0] + 1) ** 2


def gradient(model: Tree) -> Tree:
    return {"a": 2 * (model["a"] - 3), "b": [2 * (model["b"][0] + 1)]}


def both(model: Tree) -> Any:
    return loss(model), gradient(model)


def test_steps_are_those_of_update() -> None:
    rule = opt.OptimiserChain(opt.WeightDecay(0.1), opt.Adam(0.1))
    model, state, history = opt.minimize(both, start(), rule, 10)
    expected = start()
    expected_state = opt.setup(rule, expected)
    losses = []
    for _ in range(10):
        losses.append(float(loss(expected)))
        expected_state, expected = opt.update(expected_state, expected, gradient(expected))
    assert_same_bits(model, expected)
    assert_same_bits(state, expected_state)
    assert history.loss.tolist() == losses
    assert model["name"] == "tiny"


def test_what_is_given_stays_as_it_is() -> None:
    model = start()
    model["tied"] = model["a"][::-1]
    state = opt.setup(opt.Adam(0.1), model)
    before = snapshot(model), snapshot(state)

    def tied(m: Tree) -> Any:
        return both(m)

    new, new_state, _ = opt.minimize(tied, model, None, 5, state=state)
    assert (snapshot(model), snapshot(state)) == before
    assert np.shares_memory(new["a"], new["tied"])
    assert new_state["a"] is new_state["tied"]
    assert new_state["a"].state.t == 5


def test_it_goes_on_from_a_state() -> None:
    whole = opt.minimize(both, start(), opt.Adam(0.1), 9)
    first = opt.minimize(both, start(), opt.Adam(0.1), 4)
    second = opt.minimize(both, first.model, None, 5, state=first.state)
    assert_same_bits(second.model, whole.model)
    assert [*first.history.loss, *second.history.loss] == whole.history.loss.tolist()


def test_no_steps() -> None:
    model, _, history = opt.minimize(both, start(), opt.Adam(), 0)
    assert_same_bits(model, start())
    assert history.loss.shape == history.time.shape == (0,)
    assert repr(history) == "History(took all 0 steps)"


def test_history() -> None:
    result = opt.minimize(both, start(), opt.Adam(0.1), 30)
    assert result.history is result[2]
    assert result.history.loss.dtype == result.history.time.dtype == np.float64
    assert (np.diff(result.history.time) >= 0).all()
    assert (
        repr(result.history)
        == f"History(took all 30 steps; loss 31.25 to {result.history.loss[-1]:.4g})"
    )


# --- who differentiates ----------------------------------------------------------------------


def test_a_transformation_is_applied_to_the_loss() -> None:
    def transformation(f: Any) -> Any:
        assert f is loss
        return lambda model: (f(model), gradient(model))

    def picky(f: Any) -> Any:
        if not callable(f):
            raise TypeError("expected a function")
        return transformation(f)

    expected = opt.minimize(both, start(), opt.Adam(0.1), 5)
    got = opt.minimize(loss, start(), opt.Adam(0.1), 5, value_and_grad=picky)
    assert_same_bits(got.model, expected.model)
    lazy = {"asked": 0}

    def late(f: Any) -> Any:  # asks nothing before it is called, as autograd's
        def value_and_gradient(model: Any) -> Any:
            lazy["asked"] += 1
            return f(model), gradient(model)

        return value_and_gradient

    got = opt.minimize(loss, start(), opt.Adam(0.1), 5, value_and_grad=late)
    assert_same_bits(got.model, expected.model)
    assert lazy["asked"] == 5


def test_what_is_applied_already_is_called_once_a_step() -> None:
    batches = iter(range(100))

    def ready(model: Any) -> Any:
        next(batches)
        return both(model)

    expected = opt.minimize(both, start(), opt.Adam(0.1), 5)
    got = opt.minimize(loss, start(), opt.Adam(0.1), 5, value_and_grad=ready)
    assert_same_bits(got.model, expected.model)
    assert next(batches) == 5


def test_an_error_of_the_users_own_comes_through() -> None:
    def broken(model: Any) -> Any:
        return model["no such key"]

    with pytest.raises(KeyError, match="no such key"):
        opt.minimize(loss, start(), opt.Adam(0.1), 5, value_and_grad=broken)
    with pytest.raises(KeyError, match="no such key"):
        opt.minimize(broken, start(), opt.Adam(0.1), 5)


COMPLEX = 3 - 1j


def squared_distance(model: Tree) -> Any:
    return abs(model["z"] - COMPLEX) ** 2


def jax_makers() -> dict[str, Any]:
    jax = pytest.importorskip("jax")
    return {
        "transformation": jax.value_and_grad,
        "jitted": lambda f: jax.jit(jax.value_and_grad(f)),
        "function": jax.jit(jax.value_and_grad(squared_distance)),
    }


@pytest.mark.parametrize("kind", ["transformation", "jitted", "function"])
def test_complex_parameters_go_downhill_by_jax(kind: str) -> None:
    jnp = pytest.importorskip("jax.numpy")
    model = {"z": jnp.asarray(1 + 2j), "w": jnp.asarray(2.0)}
    found = opt.minimize(
        squared_distance, model, opt.Adam(0.1), 300, value_and_grad=jax_makers()[kind]
    )
    np.testing.assert_allclose(found.model["z"], COMPLEX, atol=1e-2)


def test_complex_parameters_go_downhill_where_the_loss_is_of_jax() -> None:
    jax = pytest.importorskip("jax")
    model = {"z": np.asarray(1 + 2j)}  # the gradient is JAX's all the same
    found = opt.minimize(jax.value_and_grad(squared_distance), model, opt.Adam(0.1), 300)
    np.testing.assert_allclose(found.model["z"], COMPLEX, atol=1e-2)


@pytest.mark.parametrize("kind", ["transformation", "wrapped", "function", "loss", "partial"])
def test_complex_parameters_go_downhill_by_autograd(kind: str) -> None:
    autograd = pytest.importorskip("autograd")
    anp = autograd.numpy

    def loss(model: Tree) -> Any:
        return anp.sum(anp.abs(model["z"] - COMPLEX) ** 2)

    def wrapped(f: Any) -> Any:
        return lambda model: autograd.value_and_grad(f)(model)

    arguments: dict[str, Any] = {
        "transformation": (loss, autograd.value_and_grad),
        "wrapped": (loss, wrapped),
        "function": (loss, autograd.value_and_grad(loss)),
        "loss": (autograd.value_and_grad(loss), None),
        "partial": (partial(autograd.value_and_grad(lambda scale, m: scale * loss(m), 1), 2), None),
    }
    function, vg = arguments[kind]
    model = {"z": np.array([1 + 2j, 0.5])}
    found = opt.minimize(function, model, opt.Adam(0.1), 300, value_and_grad=vg)
    np.testing.assert_allclose(found.model["z"], COMPLEX, atol=1e-2)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gradients_that_point_uphill_are_taken_as_they_are(library: str) -> None:
    xp = pytest.importorskip(library)
    model = {"z": xp.asarray([1 + 2j, 0.5])}

    def uphill(model: Tree) -> Any:
        z = model["z"] - COMPLEX
        return (abs(z) ** 2).sum(), {"z": 2 * z}

    found = opt.minimize(uphill, model, opt.Adam(0.1), 300)
    np.testing.assert_allclose(found.model["z"], COMPLEX, atol=1e-2)


def test_with_autograd() -> None:
    autograd = pytest.importorskip("autograd")
    model = {"a": np.array([1.0, -2.0]), "b": [np.array(0.5)]}
    expected = opt.minimize(both, start(), opt.Adam(0.1), 5)
    for vg in (autograd.value_and_grad, autograd.value_and_grad(loss)):
        got = opt.minimize(loss, model, opt.Adam(0.1), 5, value_and_grad=vg)
        np.testing.assert_allclose(got.model["a"], expected.model["a"], rtol=1e-12)


def test_with_jax() -> None:
    jax = pytest.importorskip("jax")
    model = {"a": jax.numpy.array([1.0, -2.0]), "b": [jax.numpy.array(0.5)]}
    expected = opt.minimize(both, start(), opt.Adam(0.1), 5)
    for vg in (
        jax.value_and_grad,
        lambda f: jax.jit(jax.value_and_grad(f)),
        jax.value_and_grad(loss),
        jax.jit(jax.value_and_grad(loss)),
    ):
        got = opt.minimize(loss, model, opt.Adam(0.1), 5, value_and_grad=vg)
        assert isinstance(got.model["a"], jax.Array)
        np.testing.assert_allclose(got.model["a"], expected.model["a"], rtol=1e-5)


def test_a_model_that_can_be_called() -> None:
    equinox = pytest.importorskip("equinox")
    jax = pytest.importorskip("jax")
    model = equinox.nn.Linear(2, 1, key=jax.random.key(0))
    x = jax.numpy.array([1.0, 2.0])

    def miss(model: Any) -> Any:
        return (model(x)[0] - 5) ** 2

    for vg in (equinox.filter_value_and_grad, jax.value_and_grad, jax.value_and_grad(miss)):
        got = opt.minimize(miss, model, opt.Descent(0.05), 50, value_and_grad=vg)
        assert abs(got.model(x)[0] - 5) < 1e-3


def test_with_pytorch() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 1)
    x = torch.tensor([[1.0, 2.0]])
    model = dict(module.named_parameters())

    def value_and_grad(model: Any) -> Any:
        value = ((torch.func.functional_call(module, model, (x,)) - 5) ** 2).sum()
        return value, dict(
            zip(model, torch.autograd.grad(value, list(model.values())), strict=True)
        )

    before = {k: v.detach().clone() for k, v in model.items()}
    got = opt.minimize(value_and_grad, model, opt.Descent(0.05), 50)
    assert got.history.loss[-1] < 1e-6
    assert all((model[k] == before[k]).all() for k in model)


# --- callbacks and ends ----------------------------------------------------------------------


def test_a_callback_sees_model_and_loss_that_belong_together() -> None:
    seen: list[Any] = []

    def callback(step: int, model: Any, value: float) -> Any:
        assert value == loss(model)
        seen.append(step)
        return value  # which is not True

    opt.minimize(both, start(), opt.Adam(0.1), 6, callback=callback)
    assert seen == list(range(6))


@pytest.mark.parametrize("answer", [True, np.True_, StopIteration])
def test_a_callback_stops(answer: Any) -> None:
    def callback(step: int, model: Any, value: float) -> Any:
        if step < 3:
            return np.False_
        if answer is StopIteration:
            raise StopIteration
        return answer

    model, state, history = opt.minimize(both, start(), opt.Adam(0.1), 100, callback=callback)
    assert history.message == "stopped by the callback after 3 steps"
    assert len(history.loss) == 4
    assert history.loss[-1] == loss(model)
    assert state["a"].state.t == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it(bad: float) -> None:
    calls = iter(range(100))

    def spoilt(model: Any) -> Any:
        return (bad if next(calls) == 2 else 1.0), gradient(model)

    with pytest.warns(RuntimeWarning, match=f"loss was {bad} after 2 steps") as caught:
        _, state, history = opt.minimize(spoilt, start(), opt.Adam(0.1), 10)
    assert caught[0].filename == __file__
    assert len(history.loss) == 3
    assert state["a"].state.t == 2
    assert str(bad) in history.message


# --- refusals --------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TypeError, match=r"value_and_grad=jax\.value_and_grad"):
        opt.minimize(loss, start(), opt.Adam(), 5)
    with pytest.raises(TypeError, match="must be one real number"):
        opt.minimize(lambda m: (m["a"], gradient(m)), start(), opt.Adam(), 5)
    with pytest.raises(TypeError, match="must be one real number"):
        opt.minimize(lambda m: ("low", gradient(m)), start(), opt.Adam(), 5)
    with pytest.raises(TypeError, match="must be one real number"):
        opt.minimize(lambda m: (1j, gradient(m)), start(), opt.Adam(), 5)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        opt.minimize(both, start(), opt.Adam(), 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be a whole number"):
        opt.minimize(both, start(), opt.Adam(), -1)
    with pytest.raises(TypeError, match="takes a rule"):
        opt.minimize(both, start(), None, 1)
    with pytest.raises(TypeError, match="takes a rule"):
        opt.minimize(both, start(), opt.Adam(), 1, state=opt.setup(opt.Adam(), start()))


# --- the bar and the picture -----------------------------------------------------------------


def test_the_bar_shows_steps_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    _, _, history = opt.minimize(both, start(), opt.Adam(0.1), 20)
    assert "20/20" in terminal.getvalue()
    assert f"loss {history.loss[-1]:.4g}" in terminal.getvalue()
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    opt.minimize(both, start(), opt.Adam(0.1), 20, progress=False)
    assert quiet.getvalue() == ""


def test_without_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert len(opt.minimize(both, start(), opt.Adam(0.1), 20).history.loss) == 20


def test_the_picture() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = opt.minimize(both, start(), opt.Adam(0.1), 20).history
    axes = history.plot(label="Adam")
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), np.c_[np.arange(20), history.loss])
    assert (axes.get_xlabel(), axes.get_yscale(), line.get_label()) == ("step", "log", "Adam")
    assert history.plot(axes, against="time") is axes
    np.testing.assert_array_equal(axes.get_lines()[1].get_xdata(), history.time)
    signed = History(np.array([1.0, -1.0]), np.array([0.0, 1.0]), "")
    _, axes = pyplot.subplots()
    assert signed.plot(axes).get_yscale() == "linear"
    with pytest.raises(ValueError, match='"step" or "time"'):
        history.plot(SimpleNamespace(), against="epoch")
    pyplot.close("all")
