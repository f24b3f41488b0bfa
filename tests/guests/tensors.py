"""Tensors for the tests, and comparisons of trees of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from util import normal

from optimisers import trainables
from optimisers._engine import advance as engine

torch: Any = pytest.importorskip("torch")


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


def _strided(x: Any) -> Any:
    room = torch.zeros([2 * n for n in x.shape], dtype=x.dtype)
    view = room[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def loss_of(net: Any, step: int) -> Any:
    x = torch.tensor(normal((16, 3), seed=step), dtype=torch.float32)
    x = x / x.norm()
    return ((net(x) - x[:, :2].sin()) ** 2).mean()
