"""PyTorch: models of tensors, their graphs, ties and state trees, and the flat vector."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from tensors import _strided, backends, loss_of, network, same, tensor, to_numpy
from util import BOTH

from optimisers import (
    AccumGrad,
    Adam,
    AdamW,
    ClipNorm,
    Descent,
    Leaf,
    Momentum,
    OptimiserChain,
    Rule,
    adjust,
    adjust_,
    destructure,
    freeze_,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)

torch: Any = pytest.importorskip("torch")


# --- autograd --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.Tensor.clone, _strided])
def test_a_stale_graph_is_noticed(layout):
    w = layout(tensor(3)).requires_grad_()
    state = setup(Descent(0.1), {"w": w})
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    version = w._version
    update_(state, {"w": w}, {"w": w.grad})
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tensor_that_was_not_updated_keeps_its_graph():
    w, b = tensor(3, grad=True), tensor(3, grad=True)
    state = setup(Descent(0.1), {"w": w, "b": b})
    freeze_(state["b"])
    loss = (b * b).sum()
    update_(state, {"w": w, "b": b}, {"w": torch.ones(3), "b": torch.ones(3)})
    loss.backward()
    assert b.grad is not None


def test_a_refused_update_leaves_graphs_alone():
    w = tensor(3, grad=True)
    state = setup(OptimiserChain(ClipNorm(1.0), Descent(0.1)), w)
    loss = (w * w).sum()
    with pytest.raises(FloatingPointError):
        update_(state, w, torch.full((3,), torch.inf))
    loss.backward()
    np.testing.assert_array_equal(to_numpy(w.grad), 2 * to_numpy(w))


@pytest.mark.parametrize("layout", [torch.Tensor.clone, _strided])
def test_update_keeps_what_a_tensor_is(layout):
    model = {
        "parameter": torch.nn.Parameter(layout(tensor(3))),
        "constant": torch.nn.Parameter(layout(tensor(3)), requires_grad=False),
        "leaf": layout(tensor(3)).requires_grad_(),
        "plain": layout(tensor(3)),
        "untouched": torch.nn.Parameter(layout(tensor(3))),
    }
    state = setup(Momentum(), model)
    grad = {name: torch.ones(3) for name in model if name != "untouched"}
    new_state, new = update(state, model, grad)
    for name, x in new.items():
        assert type(x) is type(model[name])
        assert x.requires_grad is model[name].requires_grad
        assert x.is_leaf
        assert not np.shares_memory(x.detach().numpy(), model[name].detach().numpy())
        assert same(x, model[name]) is (name == "untouched")
        assert not new_state[name].state.v.requires_grad
        assert new_state[name].state.v.data_ptr() != state[name].state.v.data_ptr()


def test_no_gradient_flows_through_a_step():
    w = tensor(3, grad=True)
    g = torch.autograd.grad((w**3).sum(), w, create_graph=True)[0]
    assert g.requires_grad
    state, new = update(setup(Adam(), _strided(w.detach())), _strided(w.detach()), g)
    assert not new.requires_grad
    state, new = update(setup(Adam(), w), w, g)
    assert new.is_leaf
    assert new.requires_grad
    assert not state.state.m.requires_grad


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        w = torch.zeros(3)
        update_(setup(Adam(0.5), w), w, torch.ones(3))
    assert w[0] == pytest.approx(-0.5)
    update_(setup(Adam(0.5), w), w, torch.ones(3))
    assert w[0] == pytest.approx(-1.0)


def test_a_state_of_tensors_that_require_gradients_is_not_made():
    class Lazy(Rule):
        def init(self, x):
            return x * 0

        def apply(self, state, x, dx):
            return state + dx, state + dx

    w = torch.nn.Parameter(torch.zeros(3))
    state, _ = update_(setup(Lazy(), w), w, torch.ones(3))
    assert not state.state.requires_grad
    assert same(w.detach(), -torch.ones(3))


# --- whole modules, trees, gradients ---------------------------------------------------------


def test_a_module_trains_as_with_torch():
    net, twin = network(), network()
    judge = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    params = dict(net.named_parameters())
    state = setup(AdamW(0.01, lambda_=0.1), params)
    for step in range(20):
        for n in (net, twin):
            n.zero_grad()
            loss_of(n, step).backward()
        judge.step()
        grads = {name: p.grad for name, p in params.items()}
        state, same_params, used = backends(update_, state, params, grads)
        assert same_params is params
        assert set(used.values()) == {"kernels"}
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@BOTH
@pytest.mark.parametrize(
    "g",
    [
        np.array([1.0, 2.0, 3.0]),
        np.array([1, 2, 3]),
        np.array([3.0, 2.0, 1.0])[::-1],
        np.array([1, 2, 3], ">f4"),
        np.array([1, 2, 3], np.longdouble),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])),
    ],
    ids=str,
)
def test_gradients_of_other_kinds_are_cast(g, call):
    x = torch.zeros(3)
    _, new = call(setup(Descent(1.0), x), x, g)
    assert same(new, -torch.tensor([1.0, 2.0, 3.0]))


def test_a_number_is_a_gradient_for_a_0d_tensor():
    x = torch.tensor(1.0, dtype=torch.float64)
    update_(setup(Descent(0.5), x), x, 3.0)
    assert x == -0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_gradients_for_numpy_arrays(dtype):
    x = np.zeros(3)
    g = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    update_(setup(Descent(1.0), x), x, g)
    np.testing.assert_array_equal(x, [-1, -2, -3])


@pytest.mark.parametrize(
    ("g", "kind", "text"),
    [
        (torch.zeros(3, device="meta"), ValueError, "on cpu, got one on meta"),
        (torch.zeros(4), ValueError, r"got shape \(4,\)"),
        (np.zeros(4), ValueError, r"got shape \(4,\)"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "complex numbers"),
        (np.zeros(3, complex), TypeError, "complex numbers"),
        (torch.eye(3)[0].to_sparse(), TypeError, r"sparse_coo; make it dense with .to_dense"),
        (np.array(["a", "b", "c"]), TypeError, "got dtype <U1"),
        ("gradient", TypeError, "got 'gradient'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@BOTH
def test_what_is_no_gradient_is_refused_with_its_path(g, kind, text, call):
    model = {"a": torch.zeros(2), "b": [torch.zeros(3)]}
    state = setup(Momentum(), model)
    with pytest.raises(kind, match=rf"\['b'\]\[0\]: .*shape \(3,\).*{text}"):
        call(state, model, {"a": torch.ones(2), "b": [g]})
    assert not model["a"].any()
    assert not state["a"].state.v.any()


def test_tensors_that_numpy_cannot_read_are_refused_for_numpy_arrays():
    x = {"w": np.zeros(3)}
    with pytest.raises(ValueError, match=r"\['w'\]: .*got a tensor on meta; write .cpu\(\)"):
        update_(setup(Descent(), x), x, {"w": torch.zeros(3, device="meta")})


@BOTH
def test_gradients_may_be_the_parameters(call):
    a, b = tensor(3), tensor(3, seed=1)
    model = {"a": a.clone(), "b": b.clone()}
    _, new = call(setup(Descent(1.0), model), model, {"a": model["b"], "b": model["a"]})
    assert same(new["a"], a - b)
    assert same(new["b"], b - a)


def test_tensors_and_arrays_in_one_model():
    model = {"t": tensor(3), "n": np.zeros(3), "k": torch.arange(3)}
    state = setup(Adam(0.5), model)
    assert state["k"] == ()
    state, model, used = backends(update_, state, model, {"t": np.ones(3), "n": torch.ones(3)})
    assert used == {"['t']": "kernels", "['n']": "kernels"}
    np.testing.assert_allclose(to_numpy(tensor(3)) + model["n"], to_numpy(model["t"]))


def test_all_or_nothing_with_tensors_on_both_paths():
    model = {"strided": _strided(tensor(3)), "dense": tensor(3), "bad": tensor(3)}
    state = setup(OptimiserChain(Momentum(), ClipNorm(1.0)), model)
    before, kept = copy.deepcopy(model), copy.deepcopy(state)
    grad = {"strided": torch.ones(3), "dense": torch.ones(3), "bad": torch.full((3,), torch.nan)}
    with pytest.raises(FloatingPointError, match=r"\['bad'\]"):
        update_(state, model, grad)
    for name in model:
        assert same(model[name], before[name])
        assert same(state[name].state, kept[name].state)


def test_an_expanded_tensor_is_replaced():
    x = torch.zeros(1).expand(3)
    model = {"w": x}
    _, new = update_(setup(Momentum(1.0), model), model, {"w": torch.tensor([1.0, 2.0, 3.0])})
    assert new["w"] is not x
    assert same(new["w"], -torch.tensor([1.0, 2.0, 3.0]))
    assert not x.any()


def test_empty_and_0d_tensors():
    model = {"empty": torch.zeros(0, 3), "number": torch.tensor(1.0)}
    state = setup(Adam(0.5), model)
    _, _, used = backends(update_, state, model, {k: torch.ones_like(x) for k, x in model.items()})
    assert set(used.values()) == {"kernels"}
    assert model["number"] == pytest.approx(0.5)


class Watched(torch.Tensor):
    pass


def test_a_subclass_of_tensor_takes_the_array_path():
    x = torch.zeros(3).as_subclass(Watched)
    _, _, used = backends(update_, setup(Adam(0.5), x), x, torch.ones(3))
    assert set(used.values()) == {"arrays"}
    assert x[0] == pytest.approx(-0.5)


def test_tensors_with_new_memory_are_seen():
    """No view is kept from one step to the next."""
    x = torch.zeros(3)
    state = setup(Momentum(1.0), x)
    update_(state, x, torch.ones(3))
    x.data, old = torch.full((3,), 5.0), x.data
    state.state.v.data = torch.zeros(3)
    update_(state, x, torch.ones(3))
    assert same(x, torch.full((3,), 4.0))
    assert same(old, -torch.ones(3))


# --- ties ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("grad", [False, True])
def test_the_same_tensor_twice_is_one_parameter(call, grad):
    w = tensor(2, 3, grad=grad)
    before = to_numpy(w)
    model = {"a": w, "b": [w]}
    state = setup(Momentum(1.0), model)
    assert state["a"] is state["b"][0]
    g, h = torch.ones(2, 3), 2 * torch.ones(2, 3)
    _, new = call(state, model, {"a": g, "b": [h]})
    assert new["a"] is new["b"][0]
    assert new["a"].requires_grad is grad
    np.testing.assert_array_equal(to_numpy(new["a"]), before - 3)


@BOTH
@pytest.mark.parametrize("kind", ["plain", "parameters", "view of a parameter"])
def test_views_of_the_same_elements_are_one_parameter(call, kind):
    w = tensor(2, 3)
    other = w.T
    if kind == "parameters":
        w, other = torch.nn.Parameter(w), torch.nn.Parameter(other)
    elif kind == "view of a parameter":
        w = torch.nn.Parameter(w)
        other = w.T
    before = to_numpy(w)
    model = {"encoder": w, "decoder": other, "flat": w.detach().reshape(-1)}
    state = setup(Adam(0.5), model)
    assert state["encoder"] is state["decoder"] is state["flat"]
    g, h = tensor(2, 3, seed=1), tensor(3, 2, seed=2)
    _, expected = update(setup(Adam(0.5), before), before, to_numpy(g + h.T))
    _, new = call(state, model, {"encoder": g, "decoder": h})
    np.testing.assert_array_equal(to_numpy(new["encoder"]), expected)
    np.testing.assert_array_equal(to_numpy(new["decoder"]), expected.T)
    assert new["decoder"].data_ptr() == new["encoder"].data_ptr() == new["flat"].data_ptr()
    for name in model:
        assert type(new[name]) is type(model[name])
        assert new[name].requires_grad is model[name].requires_grad
        assert new[name].is_leaf is model[name].is_leaf
    if call is update:
        np.testing.assert_array_equal(to_numpy(w), before)


def test_tensors_that_overlap_in_part_are_refused():
    x = tensor(5)
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] overlap"):
        setup(Adam(), {"a": x[:3], "b": x[2:]})


@BOTH
def test_a_leaf_shared_by_hand_ties_tensors(call):
    model = {"a": tensor(3, grad=True), "b": tensor(3, grad=True)}
    before = to_numpy(model["a"])
    leaf = Leaf(Descent(1.0), ())
    _, new = call({"a": leaf, "b": leaf}, model, {"a": torch.ones(3), "b": torch.ones(3)})
    for x in new.values():
        assert x.requires_grad
        np.testing.assert_array_equal(to_numpy(x), before - 2)


def test_a_write_behind_the_back_is_noticed():
    """An array over the memory of a tensor is no tie, but two steps in one place are refused."""
    x = torch.zeros(3)
    model = {"t": x, "n": x.numpy()}
    state = setup(Descent(), model)
    with pytest.raises(ValueError, match="overlap in memory"):
        update_(state, model, {"t": torch.ones(3), "n": np.ones(3)})
    assert not x.any()


# --- state trees -----------------------------------------------------------------------------


def test_adjust_freeze_copy_and_pickle():
    model = {"a": tensor(3), "b": tensor(3, seed=1)}
    grad = {"a": torch.ones(3), "b": torch.ones(3)}
    state = setup(Adam(0.1), model)
    update_(state, model, grad)
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state)), adjust(state, 0.1)]
    for other in copies:
        assert same(other["a"].state, state["a"].state)
        assert other["a"].state.m.data_ptr() != state["a"].state.m.data_ptr()
    adjusted = adjust(state, 0.0, epsilon=0.5)
    assert adjusted["a"].rule == Adam(0.0, epsilon=0.5)
    adjust_(state, 0.2)
    freeze_(state["b"])
    before = copy.deepcopy(model)
    update_(state, model, grad)
    assert state["a"].state.t == 2
    assert state["b"].state.t == 1
    assert same(model["b"], before["b"])
    assert not same(model["a"], before["a"])
    thaw_(state)
    update_(state, model, grad)
    assert state["b"].state.t == 2
    assert copies[0]["a"].state.t == 1


def test_state_tensors_are_like_their_parameters():
    model = {"w": torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float32))}
    for call in (update, update_):
        state, _ = call(setup(Adam(), model), model, {"w": torch.ones(2, 3)})
        m, v, t = state["w"].state
        for a in (m, v):
            assert type(a) is torch.Tensor
            assert (a.dtype, a.shape, a.requires_grad) == (torch.float32, (2, 3), False)
        assert (t.dtype, t.shape, t.item()) == (torch.int64, (), 1)


def test_accumulated_gradients_and_higher_derivatives():
    class Newton(Rule):
        def apply(self, state, x, dx, *higher):
            return state, dx / higher[0]

    x = tensor(3, grad=True)
    before = to_numpy(x)
    update_(setup(Newton(), x), x, 2 * torch.ones(3), 4 * torch.ones(3))
    np.testing.assert_array_equal(to_numpy(x), before - 0.5)
    for w in (tensor(3), _strided(tensor(3))):
        before = to_numpy(w)
        state = setup(OptimiserChain(AccumGrad(2), Descent(1.0)), w)
        for g in (torch.ones(3), 3 * torch.ones(3)):
            np.testing.assert_array_equal(to_numpy(w), before)
            update_(state, w, g)
        np.testing.assert_array_equal(to_numpy(w), before - 2)


# --- the flat vector -------------------------------------------------------------------------


def test_the_vector_of_a_model_of_tensors_gives_views():
    model = {"w": tensor(2, 3), "b": tensor(2), "n": 3}
    flat, re = destructure(model)
    assert isinstance(flat, torch.Tensor)
    assert (flat.shape, flat.dtype, flat.is_contiguous()) == ((8,), torch.float64, True)
    new = re(flat)
    assert new["n"] == 3
    assert same(new["w"], model["w"])
    assert new["w"].data_ptr() != model["w"].data_ptr()
    state = setup(Adam(0.1), flat)
    _, _, used = backends(update_, state, flat, torch.ones(8))
    assert used == {"(root)": "kernels"}
    torch.testing.assert_close(new["w"], model["w"] - 0.1)
    new["b"].zero_()
    assert not flat[6:].any()
    apart = re(flat, copy=True)
    apart["w"].zero_()
    assert flat[:6].any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_gradients_flow_through_the_vector():
    model = {"w": tensor(2, 3), "b": tensor(2)}
    flat, re = destructure(model)
    x = tensor(3, seed=3)

    def loss(v: Any) -> Any:
        m = re(v)
        return ((m["w"] @ x + m["b"]) ** 2).sum()

    v = flat.detach().clone().requires_grad_()
    loss(v).backward()
    w, b = (p.clone().requires_grad_() for p in model.values())
    ((w @ x + b) ** 2).sum().backward()
    torch.testing.assert_close(v.grad, torch.cat([w.grad.reshape(-1), b.grad]))
    torch.testing.assert_close(re.flatten_gradient({"w": w.grad, "b": b.grad}), v.grad)
    hessian = torch.autograd.functional.hessian(loss, flat.detach())
    assert hessian.shape == (8, 8)
    torch.testing.assert_close(torch.func.hessian(loss)(flat.detach()), hessian)
    torch.testing.assert_close(torch.func.grad(loss)(flat.detach()), v.grad)
    both = torch.func.vmap(loss)(torch.stack([flat.detach(), 2 * flat.detach()]))
    torch.testing.assert_close(both, torch.stack([loss(flat), loss(2 * flat)]).detach())


def test_gradients_flow_into_the_vector():
    model = {"w": tensor(2, 3, grad=True), "b": tensor(2, grad=True)}
    flat, _ = destructure(model)
    (flat * torch.arange(8)).sum().backward()
    numbers = torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(model["w"].grad, numbers[:6].reshape(2, 3))
    torch.testing.assert_close(model["b"].grad, numbers[6:])
    total = sum((x**2).sum() for x in trainables(model))
    assert total.requires_grad


def test_the_vector_of_tied_and_mixed_tensors():
    w = tensor(2, 3, dtype=torch.float32)
    model = {"encoder": w, "decoder": w.T, "b": tensor(2)}
    flat, re = destructure(model)
    assert (flat.dtype, flat.shape) == (torch.float64, (8,))
    new = re(flat)
    assert new["encoder"].dtype is torch.float32
    assert new["decoder"].data_ptr() == new["encoder"].data_ptr()
    g = re.flatten_gradient({"encoder": torch.ones(2, 3), "decoder": torch.ones(3, 2)})
    torch.testing.assert_close(g, torch.tensor([2.0] * 6 + [0.0] * 2, dtype=torch.float64))


def test_a_vector_is_written_into_a_module():
    net = network()
    params = dict(net.named_parameters())
    flat, re = destructure(params)
    re.copy_into_(params, 2 * flat.detach())
    torch.testing.assert_close(destructure(params)[0], 2 * flat)
    assert net[0].weight.requires_grad


def test_the_vector_of_different_half_precisions_is_wider():
    flat, re = destructure([tensor(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)])
    assert flat.dtype is torch.float32
    assert [x.dtype for x in re(flat)] == [torch.float16, torch.bfloat16]
