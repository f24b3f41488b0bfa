"""Tensors as values: devices, counts, graphs, ties and transformations of PyTorch."""

import copy

import numpy as np
import pytest
from util import PUBLIC, example

from optimisers import (
    AccumGrad,
    Adam,
    Adan,
    Descent,
    Lion,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rprop,
    fmap,
    setup,
    update,
    update_,
)

torch = pytest.importorskip("torch")

from optimisers.torch._optimizer import Optimizer  # noqa: E402


def parameter(values=(1.0, 1.0, 1.0), dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values).to(dtype))


# --- what a state is made of ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", PUBLIC)
def test_a_default_device_leaves_states_where_the_parameters_are(cls):
    rule = example(cls)
    p, model, g = parameter(), {"w": torch.ones(3)}, torch.ones(3)
    p.grad = g
    if not isinstance(rule, MixedPrecision):
        rule = OptimiserChain(AccumGrad(2), rule)
    optimizer = Optimizer([p], rule)
    with torch.device("meta"):
        optimizer.step()
        state = setup(rule, model)
    optimizer.step()
    update_(state, model, {"w": g})
    assert {str(v.device) for v in optimizer.state[p].values()} <= {"cpu"}
    expected = update(setup(rule, torch.ones(3)), torch.ones(3), g)[1]
    assert torch.equal(model["w"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_state_hangs_in_no_graph(dtype):
    module = torch.nn.Linear(2, 1).to(dtype)
    params = dict(module.named_parameters())
    made_on_the_way = {"w": params["weight"] * 2}
    for model in params, made_on_the_way:
        state = setup(MixedPrecision(Adam(0.1)), model)
        copy.deepcopy(state)
        for leaf in state.values():
            assert not leaf.state.master.requires_grad


def test_a_slot_that_is_the_gradient_itself_hangs_on_it():
    x, g = torch.ones(2), torch.full((2,), 3.0, requires_grad=True)
    state, _ = Adan().apply(Adan().init(x), x, g)
    assert state.gold is not g
    state.gold.sum().backward()
    assert g.grad.tolist() == [1, 1]


def test_counts_may_be_plain_numbers():
    """As JSON, a database or another tool gives them back."""
    p = parameter()
    optimizer = Optimizer([p], Adam(0.1))
    p.grad = torch.tensor([1.0, 2.0, -1.0])
    optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    optimizer.step()
    expected = p.detach().clone()
    for loaded in True, False:
        with torch.no_grad():
            p.copy_(weights)
        given = copy.deepcopy(saved)
        if loaded:
            given["state"][0]["t"] = int(given["state"][0]["t"])
        optimizer.load_state_dict(given)
        if not loaded:
            optimizer.state[p]["t"] = int(optimizer.state[p]["t"])
        optimizer.step()
        assert torch.equal(p, expected)
        assert int(optimizer.state[p]["t"]) == 2


def test_a_count_that_is_a_plain_number_goes_on_in_a_state_tree():
    for x in torch.ones(2), np.ones(2), np.ones(2, np.float16):
        state, model = update(setup(Adam(0.1), x), x, x)
        expected = update(state, model, x)
        state.state = state.state._replace(t=1)
        found = update(state, model, x)
        assert int(found[0].state.t) == 2
        np.testing.assert_array_equal(found[1], expected[1])


def test_a_rate_for_each_model_of_many_is_refused_by_name():
    with pytest.raises(TypeError, match=r"shape \(2,\) as lr, which must be one number; give each"):
        Optimizer([{"params": [parameter()], "lr": torch.tensor([0.1, 0.2])}], Adam())


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [update, update_])
def test_the_one_gradient_of_a_tied_tensor_counts_once(call):
    weight = parameter((1.0, 1.0))
    model = {"encoder": weight, "decoder": [weight, weight]}
    (weight * torch.tensor([11.0, 22.0])).sum().backward()
    expected = (1 - 0.1 * weight.grad).detach()
    gradient = fmap(lambda p: p.grad, model)
    _, new = call(setup(Descent(0.1), model), model, gradient)
    assert torch.allclose(new["encoder"].detach(), expected)
    assert new["encoder"] is new["decoder"][0]


def test_parts_of_the_gradient_of_a_tied_tensor_are_added_up():
    weight = torch.ones(2)
    model, g = [weight, weight], torch.tensor([1.0, 2.0])
    _, new = update(setup(Descent(0.1), model), model, [g, g.clone()])
    assert torch.allclose(new[0], 1 - 0.2 * g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_a_master_copy_gets_the_gradient_unrounded(dtype, of):
    exact = -(2.0**-12)
    for values in torch.ones(4, dtype=dtype), torch.ones(4, 2, dtype=dtype)[:, 0]:
        p = torch.nn.Parameter(values)
        p.grad_dtype = of
        p.grad = torch.full((4,), 1 - exact, dtype=of)
        optimizer = Optimizer([p], MixedPrecision(Descent(1.0)))
        optimizer.step()
        assert optimizer.state[p]["master"].tolist() == [exact] * 4


# --- transformations -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "rule", [Descent(0.1), Momentum(0.1), Adam(0.1), Lion(0.1), Rprop(0.1)], ids=repr
)
def test_an_ensemble_by_vmap_goes_where_its_members_go(rule):
    w, g = torch.ones(3, 2), torch.arange(6.0).reshape(3, 2) + 1

    def step(w, g):
        return update(setup(rule, {"w": w}), {"w": w}, {"w": g})[1]["w"]

    expected = torch.stack([step(*pair) for pair in zip(w, g, strict=True)])
    torch.testing.assert_close(torch.func.vmap(step)(w, g), expected)
