"""Steps of the libraries that we compare ourselves with, over copies of the same arrays.

Each function returns a step: a call without arguments that updates all arrays once. It raises
ImportError where the library is not installed.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import optimisers as opt

Array = np.ndarray
Step = Callable[[], Any]


def numpy_adam(xs: Sequence[Array], gs: Sequence[Array]) -> Step:
    """Return Adam in plain NumPy as a careful user writes it: in place, no temporary arrays."""
    eta, b1, b2, epsilon = 1e-3, 0.9, 0.999, 1e-8
    leaves = [
        (x.copy(), g, np.zeros_like(x), np.zeros_like(x), np.empty_like(x))
        for x, g in zip(xs, gs, strict=True)
    ]
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        rate, scale = eta / (1 - b1**t), (1 - b2**t) ** -0.5
        for x, g, m, v, a in leaves:
            np.multiply(g, 1 - b1, out=a)
            np.multiply(m, b1, out=m)
            np.add(m, a, out=m)
            np.multiply(g, g, out=a)
            np.multiply(a, 1 - b2, out=a)
            np.multiply(v, b2, out=v)
            np.add(v, a, out=v)
            np.sqrt(v, out=a)
            np.multiply(a, scale, out=a)
            np.add(a, epsilon, out=a)
            np.divide(m, a, out=a)
            np.multiply(a, rate, out=a)
            np.subtract(x, a, out=x)

    return step


# --- PyTorch ---------------------------------------------------------------------------------


def _torch() -> Any:
    import torch

    torch.set_num_threads(opt.get_num_threads())
    return torch


def imported_torch() -> Any:
    """Return PyTorch on as many threads as we use; None where it is not installed."""
    with contextlib.suppress(ImportError):
        return _torch()
    return None


def torch_step(
    name: str,
    xs: Sequence[Array],
    gs: Sequence[Array],
    clip_norm: float | None = None,
    **options: Any,
) -> Step:
    """Return the step of a class of `torch.optim`, after `clip_grad_norm_` if asked for."""
    torch = _torch()
    params = [torch.nn.Parameter(torch.tensor(x)) for x in xs]
    for p, g in zip(params, gs, strict=True):
        p.grad = torch.tensor(g)
    step: Step = getattr(torch.optim, name)(params, **options).step
    if clip_norm is None:
        return step

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, clip_norm)
        step()

    return clipped


TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "Descent": ("SGD", {"lr": 0.1}),
    "Momentum": ("SGD", {"lr": 0.01, "momentum": 0.9}),
    "Nesterov": ("SGD", {"lr": 0.001, "momentum": 0.9, "nesterov": True}),
    "RMSProp": ("RMSprop", {"lr": 0.001, "alpha": 0.9}),
    "Rprop": ("Rprop", {"lr": 0.001}),
    "AdaGrad": ("Adagrad", {"lr": 0.1, "eps": 1e-8, "initial_accumulator_value": 1e-8}),
    "AdaDelta": ("Adadelta", {"lr": 1.0, "eps": 1e-8}),
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {"weight_decay": 0.0}),
    "RAdam": ("RAdam", {}),
    "AdaMax": ("Adamax", {"lr": 0.001}),
    "NAdam": ("NAdam", {"lr": 0.001}),
    "AMSGrad": ("Adam", {"amsgrad": True}),
    "WeightDecay": ("SGD", {"lr": 1.0, "weight_decay": 5e-4}),
}
"""The class of `torch.optim` that does the same work as a rule, and its options."""


def torch_twins(rule: str, xs: Sequence[Array], gs: Sequence[Array]) -> dict[str, Step]:
    """Return a step for each mode that the twin of a rule has; none where there is no twin."""
    if rule not in TWINS:
        return {}
    name, options = TWINS[rule]
    accepted = inspect.signature(getattr(_torch().optim, name)).parameters
    modes = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return {
        mode: torch_step(name, xs, gs, **options, **switch)
        for mode, switch in modes.items()
        if accepted.keys() >= switch.keys()
    }


# --- optax -----------------------------------------------------------------------------------


def optax_step(
    xs: Sequence[Array],
    gs: Sequence[Array],
    make: Callable[[Any], Any] = lambda optax: optax.adam(1e-3),
    donate: bool = True,
) -> Step:
    """Return a jitted step of the rule that `make(optax)` gives; `donate` lets it work in place."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import optax

    rule = make(optax)

    def move(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        dx, state = rule.update(grads, state, params)
        return optax.apply_updates(params, dx), state

    jitted = jax.jit(move, donate_argnums=(0, 1) if donate else ())
    params, grads = ([jax.numpy.array(a) for a in arrays] for arrays in (xs, gs))
    held = [params, rule.init(params)]

    def step() -> None:
        held[:] = jitted(*held, grads)
        held[0][-1].block_until_ready()  # one output is ready when all are

    return step
