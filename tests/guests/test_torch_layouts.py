"""Tensors of every layout and of half precision: views of their memory, and the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensors import _strided, backends, same, tensor, to_numpy
from util import BOTH, EXACT_CHAINS, UNMEASURED, example, parametrize

from optimisers import (
    Adam,
    Descent,
    MixedPrecision,
    OptimiserChain,
    WeightDecay,
    setup,
    update,
    update_,
)
from optimisers._arrays import torch as _torch
from optimisers._engine import cpu
from optimisers.rules._program import program_of

torch: Any = pytest.importorskip("torch")


# --- layouts: how the same numbers may lie in a tensor ---------------------------------------


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
@parametrize("rule", [*map(example, UNMEASURED), *EXACT_CHAINS])
def test_every_rule_gives_the_numbers_of_numpy(rule, call):
    x, gs = tensor(17), [tensor(17, seed=s) for s in range(1, 6)]
    model, plain = {"w": x.clone()}, {"w": to_numpy(x)}
    state, expected = setup(rule, model), setup(rule, plain)
    for g in gs:
        state, model, used = backends(call, state, model, {"w": g})
        expected, plain, wanted = backends(call, expected, plain, {"w": to_numpy(g)})
        assert used == wanted
        if program_of(rule) is None:  # each library sums and decomposes in an order of its own
            np.testing.assert_allclose(to_numpy(model["w"]), plain["w"], rtol=1e-9)
        else:
            np.testing.assert_array_equal(to_numpy(model["w"]), plain["w"])


@parametrize("rule", [*map(example, UNMEASURED), *EXACT_CHAINS])
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
    monkeypatch.setattr(cpu.KernelBatch, "_take", None)
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


# --- half precision --------------------------------------------------------------------------


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
