"""PyTorch: models of tensors, the flat vector of tensors, and `optimisers.torch.Optimizer`."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from util import EXACT_CHAINS, PUBLIC, example, name_of, normal, parametrize

import optimisers
from optimisers import (
    AccumGrad,
    AdaDelta,
    AdaGrad,
    Adam,
    AdamW,
    ClipGrad,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    Nesterov,
    OptimiserChain,
    RMSProp,
    Rprop,
    Rule,
    WeightDecay,
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
from optimisers._arrays import torch as _torch
from optimisers._engine import advance as engine

torch: Any = pytest.importorskip("torch")
Optimizer: Any = importlib.import_module("optimisers.torch").Optimizer

BOTH = pytest.mark.parametrize("call", [update, update_])


def tensor(*shape: int, dtype: Any = None, seed: int = 0, grad: bool = False) -> Any:
    """Return a tensor of ordinary numbers."""
    values = normal(shape, seed=seed)
    if dtype is not None and dtype.is_complex:
        values = values + 1j * normal(shape, seed=seed + 1)
    return torch.tensor(values).to(dtype or torch.float64).requires_grad_(grad)


def to_numpy(x: Any) -> np.ndarray:
    """Return the numbers of a tensor, bfloat16 as float32."""
    x = x.detach().resolve_conj().resolve_neg()
    return np.array((x.float() if x.dtype is torch.bfloat16 else x).numpy())


def same(a: Any, b: Any) -> bool:
    """Tell whether two tensors, or states, agree in dtype, shape and every bit."""
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    like = a.dtype == b.dtype and a.shape == b.shape
    return like and to_numpy(a).tobytes() == to_numpy(b).tobytes()


def backends(call: Any, *args: Any) -> tuple[Any, Any, dict[str, str]]:
    """Take a step; return also the backend of each path."""
    paths = [str(path) for path, _ in trainables(args[1], path=True)]
    with engine.watching() as seen:
        state, model = call(*args)
    return state, model, {paths[k]: backend for k, backend in seen}


# --- layouts: how the same numbers may lie in a tensor -------------------------------------------


def _strided(x: Any) -> Any:
    room = torch.zeros([2 * n for n in x.shape], dtype=x.dtype)
    view = room[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "permuted": lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "rolled": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "strided": _strided,
}
DENSE = {"contiguous", "transposed", "permuted", "rolled"}


@BOTH
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_tensors_are_updated_by_the_kernels(dtype, layout, grad_layout, call):
    values, *gs = [tensor(3, 4, 5, dtype=dtype, seed=s) for s in range(3)]
    rule = OptimiserChain(WeightDecay(0.1), Adam(0.1))
    plain = {"w": to_numpy(values)}
    expected = setup(rule, plain)
    w = LAYOUTS[layout](values)
    model, state = {"w": w}, setup(rule, {"w": w})
    for g in gs:
        state, model, used = backends(call, state, model, {"w": LAYOUTS[grad_layout](g)})
        is_dense = layout in DENSE or (call is update and g is gs[1])  # where the first left it
        assert used == {"['w']": "kernels" if is_dense else "arrays"}
        expected, plain = update_(expected, plain, {"w": to_numpy(g)})
    exact = layout in DENSE
    np.testing.assert_allclose(to_numpy(model["w"]), plain["w"], rtol=0 if exact else 1e-5)
    for a, b in zip(state["w"].state[1], expected["w"].state[1], strict=True):
        assert isinstance(a, torch.Tensor)
        np.testing.assert_allclose(to_numpy(a), b, rtol=0 if exact else 1e-5)
    if call is update_:
        assert model["w"] is w
    else:
        assert same(w, LAYOUTS[layout](values))


@BOTH
@parametrize("rule", [*map(example, PUBLIC), *EXACT_CHAINS])
def test_every_rule_gives_the_numbers_of_numpy(rule, call):
    x, gs = tensor(17), [tensor(17, seed=s) for s in range(1, 6)]
    model, plain = {"w": x.clone()}, {"w": to_numpy(x)}
    state, expected = setup(rule, model), setup(rule, plain)
    for g in gs:
        state, model, used = backends(call, state, model, {"w": g})
        expected, plain, wanted = backends(call, expected, plain, {"w": to_numpy(g)})
        assert used == wanted
        np.testing.assert_array_equal(to_numpy(model["w"]), plain["w"])


@parametrize("rule", [*map(example, PUBLIC), *EXACT_CHAINS])
def test_the_array_path_gives_the_numbers_of_the_kernels(rule):
    x, gs = tensor(17), [tensor(17, seed=s) for s in range(1, 6)]
    dense, strided = {"w": x.clone()}, {"w": _strided(x)}
    one, other = setup(rule, dense), setup(rule, strided)
    for g in gs:
        update_(one, dense, {"w": g})
        _, _, used = backends(update_, other, strided, {"w": g})
        assert set(used.values()) == {"arrays"}
        torch.testing.assert_close(strided["w"], dense["w"], rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors(dtype, call):
    x, gs = tensor(5, dtype=dtype), [tensor(5, dtype=dtype, seed=s) for s in (1, 2, 3)]
    model, plain = {"w": x.clone()}, {"w": to_numpy(x)}
    state, expected = setup(Adam(0.1), model), setup(Adam(0.1), plain)
    for g in gs:
        state, model = call(state, model, {"w": g.conj()})
        expected, plain = update_(expected, plain, {"w": to_numpy(g).conj()})
    assert model["w"].dtype is state["w"].state.v.dtype is dtype
    rtol = 1e-4 if dtype is torch.complex64 else 1e-12
    np.testing.assert_allclose(to_numpy(model["w"]), plain["w"], rtol=rtol)


def test_a_real_view_that_is_negated_in_thought_only():
    """The imaginary part of a conjugate says "negative" in a flag, its memory does not."""
    z = tensor(4, dtype=torch.complex128)
    x, g = torch.zeros(4, dtype=torch.float64), z.conj().imag
    assert g.is_neg()
    update_(setup(Descent(1.0), x), x, g)
    np.testing.assert_array_equal(to_numpy(x), to_numpy(z).imag)
    x = z.clone().conj().imag
    before = to_numpy(x)
    update_(setup(Descent(1.0), x), x, torch.ones(4, dtype=torch.float64))
    np.testing.assert_array_equal(to_numpy(x), before - 1)


SEEN = [
    torch.zeros(()),
    torch.zeros(0, 3),
    tensor(3, 4),
    tensor(3, 4).T[::2, 1:],
    tensor(3, 4, grad=True),
    torch.zeros(1).expand(3),
    torch.arange(3),
    torch.zeros(3, dtype=torch.float16),
    torch.nn.Parameter(torch.zeros(3)),
]
UNSEEN = [
    torch.zeros(3, device="meta"),
    tensor(3, dtype=torch.complex128).conj().imag,
    torch.eye(3).to_sparse(),
    torch.zeros(3).as_subclass(type("Other", (torch.Tensor,), {})),
]


@pytest.mark.parametrize("x", SEEN, ids=str)
@pytest.mark.parametrize("quick", [True, False])
def test_a_view_is_the_memory_of_a_tensor(x, quick, monkeypatch):
    if not quick:  # as with an older PyTorch
        monkeypatch.setattr(_torch, "_viewer", lambda: None)
    elif _torch._viewer() is None:
        pytest.skip("this PyTorch does not describe its tensors")
    seen = _torch.view(x)
    (in_state,) = _torch._view_state((x,))
    for found in (seen, in_state):
        expected = x.detach().numpy()
        assert type(found) is np.ndarray
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.strides == expected.strides or not found.size
        assert found.ctypes.data == expected.ctypes.data or not found.size
        assert found.flags.writeable
        assert found.flags.aligned
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("quick", [True, False])
def test_some_tensors_have_no_view(quick, monkeypatch):
    if not quick:
        monkeypatch.setattr(_torch, "_viewer", lambda: None)
    for x in UNSEEN:
        assert _torch.view(x) is None
        assert _torch._view_state((x,)) == (None,)
    seen = []

    def f(x):
        seen.append(_torch.view(x))
        return (x * x).sum()

    torch.func.grad(f)(torch.ones(3))
    torch.func.vmap(f)(torch.ones(2, 3))
    assert seen == [None, None]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("has_dtype", [True, False])
def test_a_view_of_bfloat16(has_dtype, quick, monkeypatch):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    if not quick:
        monkeypatch.setattr(_torch, "_viewer", lambda: None)
    if not has_dtype:
        monkeypatch.setattr(_torch, "_bfloat16", lambda: None)
    for x in tensor(3, 4).bfloat16().T[::2, 1:], torch.zeros((), dtype=torch.bfloat16):
        seen = _torch.view(x)
        (in_state,) = _torch._view_state((x,))
        if not has_dtype:
            assert seen is in_state is None
            continue
        for found in seen, in_state:
            assert (found.dtype, found.shape) == (np.dtype(ml_dtypes.bfloat16), tuple(x.shape))
            assert found.ctypes.data == x.data_ptr()
            assert found.astype(float).tolist() == x.tolist()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tensors_are_seen_all_at_once(dtype, call, monkeypatch):
    """None goes the long way, on which each is checked on its own."""
    pytest.importorskip("ml_dtypes")
    if _torch._viewer() is None:
        pytest.skip("this PyTorch does not describe its tensors")
    monkeypatch.setattr(engine, "_take", None)
    model = {str(k): tensor(k, dtype=dtype) for k in range(4)}
    state = setup(Adam(0.01), model)
    for seed in (1, 2):
        grad = {key: tensor(len(x), dtype=dtype, seed=seed) for key, x in model.items()}
        state, model, used = backends(call, state, model, grad)
        assert set(used.values()) == {"kernels"}
    assert {x.dtype for x in model.values()} == {dtype}
    assert {leaf.state.m.dtype for leaf in state.values()} == {dtype}


def test_a_view_keeps_its_memory_alive():
    seen = _torch.view(torch.full((1000,), 7.0))
    others = [torch.zeros(1000) for _ in range(100)]
    assert (seen == 7).all()
    assert len(others) == 100


# --- half precision ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, call):
    pytest.importorskip("ml_dtypes")
    x, gs = tensor(9, dtype=dtype), [tensor(9, dtype=dtype, seed=s) for s in (1, 2, 3)]
    for rule in Adam(0.01), MixedPrecision(Adam(0.01)):
        model = {"w": x.clone().requires_grad_()}
        master = {"w": x.float()}
        state, expected = setup(rule, model), setup(Adam(0.01), master)
        for g in gs:
            state, model, used = backends(call, state, model, {"w": g})
            update_(expected, master, {"w": g.float()})
            assert used == {"['w']": "kernels"}
        w = model["w"]
        assert (w.dtype, w.requires_grad) == (dtype, True)
        if isinstance(rule, MixedPrecision):
            assert same(state["w"].state.master, master["w"])
            assert same(w, master["w"].to(dtype))
        else:
            torch.testing.assert_close(w.detach(), master["w"].to(dtype), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_where_numpy_lacks_the_dtype(dtype, monkeypatch):
    monkeypatch.setattr(_torch, "_bfloat16", lambda: None)
    for rule in Adam(0.01), MixedPrecision(Adam(0.01)):
        x, g = tensor(9, dtype=dtype), tensor(9, dtype=dtype, seed=1)
        master = x.float()
        _, _, used = backends(update_, setup(rule, x), x, g)
        assert used == {"(root)": "kernels" if dtype is torch.float16 else "arrays"}
        update_(setup(Adam(0.01), master), master, g.float())
        torch.testing.assert_close(x, master.to(dtype))


# --- autograd ------------------------------------------------------------------------------------


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


# --- whole modules, trees, gradients -------------------------------------------------------------


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def loss_of(net: Any, step: int) -> Any:
    x = torch.tensor(normal((16, 3), seed=step), dtype=torch.float32)
    x = x / x.norm()
    return ((net(x) - x[:, :2].sin()) ** 2).mean()


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


# --- ties ----------------------------------------------------------------------------------------


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


# --- state trees ---------------------------------------------------------------------------------


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


# --- the flat vector -----------------------------------------------------------------------------


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


# --- optimisers.torch.Optimizer ------------------------------------------------------------------

TWINS: list[tuple[Any, Any]] = [
    (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (
        OptimiserChain(WeightDecay(0.1), Adam(0.01, (0.8, 0.95))),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    (AdamW(0.01, lambda_=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    (Descent(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (Momentum(0.1, 0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (Nesterov(0.1, 0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    (RMSProp(0.01, 0.9), lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9)),
    (
        AdaGrad(0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8, initial_accumulator_value=1e-8),
    ),
    (AdaDelta(0.9, 1e-6), lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.9, eps=1e-6)),
    (Rprop(0.01), lambda p: torch.optim.Rprop(p, lr=0.01)),
]


def train(net: Any, optimizer: Any, steps: Any, scheduler: Any = None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if scheduler is not None:
            takes_loss = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[losses[-1]] * takes_loss)
    return losses


def assert_twins(one: Any, other: Any) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rule", "judge"), TWINS, ids=name_of)
def test_it_trains_as_torch_does(rule, judge):
    net, twin = network().double(), network().double()
    loss_of_double = [loss_in_double(n) for n in (net, twin)]
    optimizer, other = Optimizer(net.parameters(), rule), judge(twin.parameters())
    for step in range(15):
        for o, loss in zip((optimizer, other), loss_of_double, strict=True):
            o.zero_grad()
            loss(step).backward()
            o.step()
    assert_twins(net, twin)


def loss_in_double(net: Any) -> Any:
    def loss(step: int) -> Any:
        x = torch.tensor(normal((16, 3), seed=step))
        return ((net(x / x.norm()) - (x / x.norm())[:, :2].sin()) ** 2).mean()

    return loss


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=40, cycle_momentum=False
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_work(name):
    nets = network(), network()
    ours = Optimizer(nets[0].parameters(), AdamW(0.02, lambda_=0.1))
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=0.02, weight_decay=0.1)
    rates: list[Any] = [[], []]
    for o, net, rate in zip((ours, theirs), nets, rates, strict=True):
        scheduler = SCHEDULERS[name](o)
        for step in range(20):
            train(net, o, [step], scheduler)
            rate.append(o.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_groups_have_numbers_of_their_own():
    net, twin = network(), network()
    ours = Optimizer(
        [
            {"params": net[0].parameters(), "eta": 0.1, "name": "body"},
            {"params": net[2].parameters(), "beta": (0.5, 0.9)},
        ],
        Adam(0.01),
    )
    theirs = torch.optim.Adam(
        [
            {"params": twin[0].parameters(), "lr": 0.1},
            {"params": twin[2].parameters(), "betas": (0.5, 0.9)},
        ],
        lr=0.01,
    )
    assert [g["lr"] for g in ours.param_groups] == [0.1, 0.01]
    assert ours.param_groups[0]["name"] == "body"
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
    train(net, ours, range(10), schedulers[0])
    train(twin, theirs, range(10), schedulers[1])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    ours.param_groups[1]["beta"] = (0.0, 0.9)
    w = net[2].bias
    ours.step()
    assert same(ours.state[w]["m"], w.grad)


def test_add_param_group():
    body, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    optimizer = Optimizer(body.parameters(), Momentum(0.1, 0.5))
    optimizer.add_param_group({"params": head.bias, "lr": 1.0, "momentum": 0.0})
    for p in (body.bias, head.bias):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in (body.bias, head.bias)]
    optimizer.step()
    torch.testing.assert_close(body.bias.detach(), before[0] - 0.1)
    torch.testing.assert_close(head.bias.detach(), before[1] - 1)


def test_lr_stands_for_the_last_rate_of_a_chain():
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rule = OptimiserChain(Momentum(0.25), OptimiserChain(Descent(0.5), ClipGrad(9.0)))
    for made in (rule, MixedPrecision("float64", rule)):
        optimizer = Optimizer([{"params": [w], "lr": 2.0}], made)
        w.data.zero_()
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert same(w.detach(), torch.full((2,), -0.5, dtype=torch.float64))
        assert optimizer.param_groups[0]["delta"] == 9.0
        assert Optimizer([w], made).param_groups[0]["lr"] == 0.5


def test_rules_without_a_rate_are_scaled():
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = Optimizer([w], MixedPrecision(OptimiserChain(ClipGrad(1.0))))
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer.param_groups[0]["lr"] = 0.25
    w.grad = torch.full((2,), 7.0)
    optimizer.step()
    assert same(w.detach(), torch.full((2,), -0.25))


def test_fields_on_which_a_chain_differs():
    w = torch.nn.Parameter(torch.zeros(2))
    rule = OptimiserChain(Adam(0.1, epsilon=0.5), Adam(0.1, epsilon=0.25))
    group = Optimizer([w], rule).param_groups[0]
    assert "epsilon" not in group
    assert group["beta"] == (0.9, 0.999)
    optimizer = Optimizer([{"params": [w], "epsilon": 1.0}], rule)
    made = optimizer._rule_of(0, optimizer.param_groups[0])
    assert made == OptimiserChain(Adam(0.1, epsilon=1.0), Adam(0.1, epsilon=1.0))


def test_a_rate_that_is_a_tensor_changed_in_place():
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rate = torch.tensor(0.5)
    optimizer = Optimizer([{"params": [w], "lr": rate}], Descent())
    w.grad = torch.ones_like(w)
    optimizer.step()
    rate.fill_(0.25)
    optimizer.step()
    assert w.item() == -0.75


@pytest.mark.parametrize(
    "rule",
    [
        Adam(0.01),
        Descent(0.1),
        OptimiserChain(ClipNorm(1.0), AccumGrad(3), AdamW(0.01, lambda_=0.1)),
        MixedPrecision("float64", Nesterov(0.1)),
        AdaDelta(),
    ],
    ids=repr,
)
def test_resuming_gives_the_same_bits(rule):
    net = network()
    optimizer = Optimizer(net.parameters(), rule)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(net, optimizer, range(5), scheduler)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    losses = train(net, optimizer, range(5, 12), scheduler)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network()
    other = Optimizer(twin.parameters(), rule)
    again = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert other.param_groups[0]["lr"] == pytest.approx(saved[1]["param_groups"][0]["lr"])
    assert train(twin, other, range(5, 12), again) == losses
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert same(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(same(a, other.state[q][name]) for name, a in optimizer.state[p].items())


def test_a_loaded_state_is_exact_and_a_copy():
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    w.grad = torch.ones_like(w)
    one, other = (Optimizer([w], MixedPrecision(Adam())) for _ in range(2))
    one.step()
    other.load_state_dict(one.state_dict())
    kept = other.state[w]
    assert list(kept) == ["master", "state.m", "state.v", "state.t"]
    assert kept["master"].dtype is torch.float32
    assert kept["state.t"].dtype is torch.int64
    for name, a in one.state[w].items():
        assert same(a, kept[name])
        assert a.data_ptr() != kept[name].data_ptr()


def test_loading_what_does_not_fit_changes_nothing():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    saved = Optimizer([w], Momentum(0.5))
    saved.step()
    optimizer = Optimizer([("weight", w)], Adam())
    optimizer.step()
    kept = dict(optimizer.state[w])
    with pytest.raises(ValueError, match=r"weight: expected 'm', 'v', 't' for Adam.*got 'v'"):
        optimizer.load_state_dict(saved.state_dict())
    other = Optimizer([torch.nn.Parameter(torch.zeros(3))], Adam())
    with pytest.raises(ValueError, match="'m' of shape"):
        other.load_state_dict(optimizer.state_dict())
    assert optimizer.state[w] == kept
    assert optimizer.param_groups[0]["lr"] == 0.001
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_users_hooks_see_and_change_what_is_loaded():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    optimizer = Optimizer([w], Adam())
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    seen = []

    def before(_, state_dict):
        state_dict["state"] = {0: {**state_dict["state"][0], "t": torch.tensor(7)}}
        return state_dict

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[w]["t"].item()))
    optimizer.load_state_dict(saved)
    assert seen == [7]
    optimizer.step()
    assert optimizer.state[w]["t"] == 8


def test_hooks_and_closures():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([w], Descent(0.5))
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        calls.append("loss")
        return loss

    assert isinstance(optimizer, torch.optim.Optimizer)
    with torch.no_grad():
        assert optimizer.step(closure).item() == 2.0
    assert calls == ["before", "loss", "after"]
    assert not w.any()


def test_grad_scaler():
    net, twin = network(), network()
    ours = Optimizer(net.parameters(), Adam(0.01))
    theirs = torch.optim.Adam(twin.parameters(), lr=0.01)
    for n, o in ((net, ours), (twin, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(6):
            o.zero_grad()
            loss = loss_of(n, step)
            scaler.scale(loss * (torch.inf if step == 3 else 1)).backward()
            scaler.step(o)
            scaler.update()
        assert scaler.get_scale() != 2.0**10
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert ours.state[p]["t"] == 5


def test_copies_and_pickles_go_on():
    net = network()
    optimizer = Optimizer(net.parameters(), Adam(0.01))
    train(net, optimizer, range(3))
    twin, other = copy.deepcopy((net, optimizer))
    third, again = pickle.loads(pickle.dumps((net, optimizer)))
    for n, o in ((net, optimizer), (twin, other), (third, again)):
        assert o.rule == Adam(0.01)
        train(n, o, range(3, 6))
    for p, q, r in zip(net.parameters(), twin.parameters(), third.parameters(), strict=True):
        assert same(p, q)
        assert same(p, r)


def test_state_that_was_replaced_or_cleared_is_seen():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    optimizer = Optimizer([w], Momentum(1.0, 0.5))
    optimizer.step()
    for state in optimizer.state.values():  # as one does to move it to another device
        for name, a in state.items():
            state[name] = torch.zeros_like(a)
    optimizer.step()
    assert same(w.detach(), torch.full((2,), -2.0))
    optimizer.state.clear()
    optimizer.step()
    assert same(w.detach(), torch.full((2,), -3.0))


def test_parameters_without_gradients_stay():
    w, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    w.grad = torch.ones(2)
    optimizer = Optimizer([w, b], Adam(0.5))
    optimizer.step()
    assert not b.any()
    assert b not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[w]["t"] == 1


def test_a_master_copy_is_made_when_it_is_first_needed():
    """Weights that are loaded after the optimiser was made are not overwritten."""
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = Optimizer([w], MixedPrecision(Descent(1.0)))
    w.data.fill_(5.0)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert same(w.detach(), torch.full((2,), 4.0, dtype=torch.float16))


def test_a_refused_step_changes_nothing():
    w, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = Optimizer([("weight", w), ("bias", b)], OptimiserChain(ClipNorm(1.0), Momentum()))
    w.grad, b.grad = torch.ones(2), torch.full((2,), torch.inf)
    with pytest.raises(FloatingPointError, match="at bias: ClipNorm"):
        optimizer.step()
    assert not w.any()
    assert not optimizer.state
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Optimizer(embedding.parameters(), Adam())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"param_groups\[0\]\[0\]: .*sparse_coo; make it dense"):
        optimizer.step()


def test_users_rules_with_any_state():
    class Slowing(Rule):
        def init(self, x):
            return 1

        def apply(self, state, x, dx):
            return state + 1, dx / state

    w = torch.nn.Parameter(torch.zeros(1))
    w.grad = torch.ones(1)
    optimizer = Optimizer([w], Slowing())
    optimizer.step()
    optimizer.step()
    assert w.item() == -1.5
    other = Optimizer([w], Slowing())
    other.load_state_dict(optimizer.state_dict())
    assert other.state[w] == {"0": 3}


def parameter() -> Any:
    return torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Optimizer([parameter()], Adam), TypeError, r"write Adam\(\)"),
        (lambda: Optimizer([parameter()], 0.1), TypeError, "takes a rule after the parameters"),
        (lambda: Optimizer([], Adam()), ValueError, "empty parameter list"),
        (
            lambda: Optimizer([{"params": [parameter()], "weight_decay": 0.1}], Adam()),
            TypeError,
            "'weight_decay'.*there are beta, epsilon, lr.*lambda_ of AdamW",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "betas": (0.1, 0.1)}], Adam()),
            TypeError,
            "write beta",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "lr": 1, "eta": 1}], Adam()),
            TypeError,
            "lr and eta",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "lr": -1.0}], Adam()),
            ValueError,
            "eta must be .* got -1.0",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "n": 3}], AccumGrad(2)),
            TypeError,
            "n shapes the state",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "differentiable": True}], Adam()),
            TypeError,
            "not differentiable",
        ),
        (lambda: Optimizer([parameter()] * 1 + [*[parameter()] * 2], Adam()), ValueError, "twice"),
        (
            lambda: Optimizer([torch.zeros(1).expand(3).detach()], Adam()),
            ValueError,
            "cannot be written in place",
        ),
    ],
)
def test_what_an_optimizer_refuses(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_differentiable_is_said_to_be_false():
    optimizer = Optimizer([parameter()], Adam())
    assert optimizer.defaults["differentiable"] is False
    assert "lr: 0.001" in repr(optimizer)
    assert optimisers.Adam() == optimizer.rule


@pytest.mark.parametrize(
    "rule",
    [Adam(0.1), Momentum(0.1), Descent(0.1), OptimiserChain(ClipNorm(1.0), Adam(0.1))],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_others_may_read_and_keep_what_they_like_in_the_state(rule, dtype):
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    guest, plain = Optimizer([p], rule), Optimizer([q], rule)
    assert len(guest.state[p]) == 0  # which leaves an empty dictionary behind
    for _ in range(3):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        guest.step()
        plain.step()
        guest.state[p].setdefault("slow", p.detach().clone())
        assert torch.equal(p, q)
    kept = dict(guest.state[p])
    assert torch.equal(kept.pop("slow"), guest.state[p]["slow"])
    assert kept.keys() == plain.state[q].keys()
    assert all(torch.equal(kept[name], value) for name, value in plain.state[q].items())


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=0.3, weight_decay=0.1), ["weight_decay=0.1"]),
        (lambda ps: torch.optim.Adam(ps, lr=0.3, betas=(0.5, 0.6)), ["betas=(0.5, 0.6)", "eps="]),
        (lambda ps: torch.optim.SGD(ps, lr=0.3), []),
    ],
)
def test_numbers_of_another_optimiser_in_a_checkpoint_are_warned_of(make, names):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([p], Descent(0.1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.load_state_dict(make([p]).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert len(seen) == bool(names)
    for name in names:
        assert name in str(seen[0].message)
        assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", 0.5), ("betas", (0.1, 0.1)), ("eps", 10.0)]
)
def test_numbers_that_do_nothing_are_warned_of_where_they_are_set_later(name, value):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([p], AdamW(0.1))
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    with pytest.warns(UserWarning, match=name) as seen:
        optimizer.step()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    optimizer.step()  # in silence: once is enough
