"""The worked examples of the original documentation, in Python dress."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from optimisers import (
    Adam,
    Descent,
    KeyPath,
    Leaf,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    adjust,
    adjust_,
    fmap,
    freeze_,
    functor,
    getkeypath,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)


def dense(draw, n_in, n_out):
    weight = draw.standard_normal((n_out, n_in)) / np.sqrt(n_in)
    return SimpleNamespace(weight=weight, bias=np.zeros(n_out), activation=np.tanh)


@pytest.fixture
def model():
    draw = np.random.default_rng(1)
    return SimpleNamespace(layers=[dense(draw, 3, 5), dense(draw, 5, 4), dense(draw, 4, 2)])


def ones_like(model):
    return fmap(lambda x: np.ones_like(x) if isinstance(x, np.ndarray) else None, model)


# --- a rule of one's own ---------------------------------------------------------------------


@dataclass(frozen=True)
class DecayDescent(Rule):
    """Descent whose rate falls as one over the root of the number of steps."""

    eta: float = 0.1

    def init(self, x):
        return 1

    def apply(self, state, x, dx):
        return state + 1, dx * (self.eta / state**0.5)


def test_a_rule_of_ones_own():
    x = {"a": np.array([1.0, 2.0]), "b": np.array([3.0], np.float32)}
    state = setup(DecayDescent(0.5), x)
    assert repr(state["a"]) == "Leaf(DecayDescent(eta=0.5), 1)"
    for _ in range(4):
        state, x = update(state, x, {"a": np.ones(2), "b": np.ones(1)})
    moved = 0.5 * sum(t**-0.5 for t in (1, 2, 3, 4))
    np.testing.assert_allclose(x["a"], [1 - moved, 2 - moved])
    np.testing.assert_allclose(x["b"], 3 - moved, rtol=1e-6)
    assert state["a"].state == 5


def test_a_rule_of_ones_own_in_a_chain_and_adjusted():
    x = {"a": np.array([1.0])}
    state = setup(OptimiserChain(WeightDecay(0.5), DecayDescent()), x)
    adjust_(state, 1.0)
    update_(state, x, {"a": np.array([0.25])})
    np.testing.assert_array_equal(x["a"], 1 - (0.25 + 0.5))


# --- a model, its state, a step --------------------------------------------------------------


def test_model_setup_update(model):
    state = setup(Adam(), model)
    assert isinstance(state.layers[0].weight, Leaf)
    assert state.layers[0].activation == ()
    grad = ones_like(model)
    new_state, new = update(state, model, grad)
    assert new is not model
    assert new.layers[0].activation is np.tanh
    np.testing.assert_allclose(new.layers[1].bias, -0.001)
    np.testing.assert_allclose(model.layers[1].weight - new.layers[1].weight, 0.001)
    np.testing.assert_array_equal(model.layers[1].bias, 0)
    assert int(new_state.layers[2].bias.state.t) == 1
    assert int(state.layers[2].bias.state.t) == 0


def test_a_step_in_place(model):
    state = setup(Momentum(0.5), model)
    weight = model.layers[0].weight
    before = weight.copy()
    assert update_(state, model, ones_like(model)) == (state, model)
    assert model.layers[0].weight is weight
    np.testing.assert_allclose(before - weight, 0.5)


# --- freezing and adjusting ------------------------------------------------------------------


def test_freezing_one_layer_and_thawing(model):
    state = setup(Momentum(), model)
    freeze_(state.layers[0])
    before = model.layers[0].weight.copy(), model.layers[1].weight.copy()
    update_(state, model, ones_like(model))
    np.testing.assert_array_equal(model.layers[0].weight, before[0])
    assert np.all(model.layers[1].weight != before[1])
    assert repr(state.layers[0].bias).endswith(", frozen=True)")
    thaw_(state)
    update_(state, model, ones_like(model))
    assert np.all(model.layers[0].weight != before[0])


def test_adjusting_the_whole_and_one_layer_and_another_field(model):
    state = setup(Momentum(0.1), model)
    adjust_(state, 0.05)
    adjust_(state.layers[2], 0.5)
    adjust_(state, rho=0.95)
    assert state.layers[0].weight.rule == Momentum(0.05, 0.95)
    assert state.layers[2].bias.rule == Momentum(0.5, 0.95)
    slower = adjust(state, 0.01)
    assert slower.layers[2].bias.rule == Momentum(0.01, 0.95)
    assert state.layers[2].bias.rule == Momentum(0.5, 0.95)


# --- tied weights ----------------------------------------------------------------------------


def test_an_encoder_and_decoder_with_tied_transposed_weights():
    draw = np.random.default_rng(2)
    encoder = dense(draw, 6, 2)
    decoder = SimpleNamespace(weight=encoder.weight.T, bias=np.zeros(6), activation=np.tanh)
    model = SimpleNamespace(encoder=encoder, decoder=decoder)
    state = setup(Adam(0.01), model)
    assert state.encoder.weight is state.decoder.weight
    assert len(trainables(model)) == 3

    x = draw.standard_normal((6, 50))

    def loss_and_gradient(model):
        """Squared error of reconstruction, by linear layers, and its gradient by hand."""
        w, v, b, c = (
            model.encoder.weight,
            model.decoder.weight,
            model.encoder.bias,
            model.decoder.bias,
        )
        hidden = w @ x + b[:, None]
        error = v @ hidden + c[:, None] - x
        back = v.T @ error
        grad = {
            "encoder": {"weight": back @ x.T, "bias": back.sum(1)},
            "decoder": {"weight": error @ hidden.T, "bias": error.sum(1)},
        }
        return 0.5 * np.sum(error**2), grad

    first, _ = loss_and_gradient(model)
    for _ in range(200):
        _, grad = loss_and_gradient(model)
        state, model = update_(state, model, grad)
        assert np.shares_memory(model.encoder.weight, model.decoder.weight)
    last, _ = loss_and_gradient(model)
    assert last < 0.7 * first

    # What a single array, with the sum of both gradients, would have done.
    _, grad = loss_and_gradient(model)
    alone = SimpleNamespace(weight=model.encoder.weight.copy())
    summed = grad["encoder"]["weight"] + grad["decoder"]["weight"].T
    leaf = {"weight": state.encoder.weight}
    _, expected = update(leaf, vars(alone), {"weight": summed})
    new_state, new = update(state, model, grad)
    np.testing.assert_array_equal(new.encoder.weight, expected["weight"])
    np.testing.assert_array_equal(new.decoder.weight, new.encoder.weight.T)
    assert np.shares_memory(new.decoder.weight, new.encoder.weight)
    assert new_state.encoder.weight is new_state.decoder.weight


# --- arrays that do not train ----------------------------------------------------------------


@functor(trainable=("scale",))
class Normalise:
    """Shifts by a running mean, which is no parameter, and scales, which is one."""

    def __init__(self, n):
        self.scale, self.mean = np.ones(n), np.zeros(n)

    def __call__(self, x):
        return self.scale * (x - self.mean)


def test_a_layer_with_arrays_that_do_not_train():
    model = {"norm": Normalise(3), "bias": np.zeros(3)}
    state = setup(Descent(0.5), model)
    assert isinstance(state["norm"].scale, Leaf)
    assert state["norm"].mean == ()
    assert [str(path) for path, _ in trainables(model, path=True)] == ["['norm'].scale", "['bias']"]
    grad = {"norm": Normalise(3), "bias": np.ones(3)}  # its mean of zeros is not looked at
    _, new = update(state, model, grad)
    np.testing.assert_array_equal(new["norm"].scale, 0.5)
    assert new["norm"].mean is model["norm"].mean
    assert type(new["norm"]) is Normalise


# --- trainables ------------------------------------------------------------------------------


def test_trainables_and_a_penalty(model):
    arrays = trainables(model)
    assert [x.shape for x in arrays] == [(5, 3), (5,), (4, 5), (4,), (2, 4), (2,)]
    assert arrays[0] is model.layers[0].weight
    penalty = sum(np.sum(x**2) for x in arrays)
    weights = [layer.weight for layer in model.layers]
    np.testing.assert_allclose(penalty, sum(np.sum(w**2) for w in weights))  # biases are zero

    grad = fmap(lambda x: 2 * x if isinstance(x, np.ndarray) else None, model)
    _, new = update(setup(Descent(0.25), model), model, grad)
    np.testing.assert_allclose(sum(np.sum(x**2) for x in trainables(new)), penalty / 4)


def test_trainables_with_paths(model):
    found = trainables(model, path=True)
    assert [str(path) for path, _ in found[:3]] == [
        "layers[0].weight",
        "layers[0].bias",
        "layers[1].weight",
    ]
    assert found[3][0] == KeyPath("layers", 1, "bias")
    assert all(getkeypath(model, path) is x for path, x in found)
    only_weights = [x for path, x in found if path[-1] == "weight"]
    assert [x.shape for x in only_weights] == [(5, 3), (4, 5), (2, 4)]


def test_a_moving_average_of_a_model(model):
    average = fmap(lambda x: x.copy() if isinstance(x, np.ndarray) else x, model)
    state = setup(Descent(0.5), model)
    for _ in range(3):
        update_(state, model, ones_like(model))
        for path, x in trainables(model, path=True):
            mean = getkeypath(average, path)
            mean[...] = 0.75 * mean + 0.25 * x
    np.testing.assert_allclose(model.layers[0].bias, -1.5)
    np.testing.assert_allclose(average.layers[0].bias, -(0.125 * 0.5625 + 0.25 * 0.75 + 0.375))


# --- a zero gradient and none ----------------------------------------------------------------


def test_a_zero_gradient_and_none_for_adam():
    model = {"zero": np.ones(2), "none": np.ones(2)}
    state = setup(Adam(0.1), model)
    state, model = update(state, model, {"zero": np.ones(2), "none": np.ones(2)})
    for _ in range(3):
        state, model = update(state, model, {"zero": np.zeros(2), "none": None})
    np.testing.assert_allclose(model["none"], 0.9)
    assert np.all(model["zero"] < 0.9)  # carried on by its momentum, and counting steps
    assert (int(state["zero"].state.t), int(state["none"].state.t)) == (4, 1)
    np.testing.assert_allclose(state["none"].state.m, 0.1)
    np.testing.assert_allclose(state["zero"].state.m, 0.1 * 0.9**3)
