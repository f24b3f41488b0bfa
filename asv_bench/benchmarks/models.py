"""What is timed: models of well-known shapes filled with random numbers, and every rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

import optimisers as opt

Array = np.ndarray
Tree = Any

_random = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> Array:
    """Return random numbers in a dtype of any precision."""
    drawn = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    return _random.standard_normal(shape, drawn).astype(dtype, copy=False)


def gradient_of(model: Tree) -> Tree:
    """Return random numbers in the shape of a model."""
    return opt.fmap(lambda x: normal(*x.shape, dtype=x.dtype), model)


# --- models ----------------------------------------------------------------------------------


def many_arrays(count: int = 1_000, size: int = 64) -> Tree:
    """Return a dict of equal arrays, where all the time goes into the walk."""
    return {f"p{k}": normal(size) for k in range(count)}


def mlp(n: int = 784, hidden: int = 128, m: int = 10) -> Tree:
    """Return two dense layers: 4 arrays, 101,770 numbers."""
    return [
        {"weight": normal(n, hidden), "bias": normal(hidden)},
        {"weight": normal(hidden, m), "bias": normal(m)},
    ]


def resnet18(width: int = 64) -> Tree:
    """Return the shapes of ResNet-18: at its width of 64, 62 arrays and 11.7 million numbers."""

    def conv(n: int, m: int, side: int) -> Tree:
        norm = {"weight": normal(m), "bias": normal(m)}
        return {"weight": normal(m, n, side, side), "norm": norm}

    blocks = []
    n = width
    for m in (width, 2 * width, 4 * width, 8 * width):
        shortcut = {"shortcut": conv(n, m, 1)} if m != n else {}
        blocks.append({"one": conv(n, m, 3), "two": conv(m, m, 3), **shortcut})
        blocks.append({"one": conv(m, m, 3), "two": conv(m, m, 3)})
        n = m
    head = {"weight": normal(1000, n), "bias": normal(1000)}
    return {"stem": conv(3, width, 7), "blocks": blocks, "head": head}


def transformer(layers: int = 100, width: int = 64) -> Tree:
    """Return a deep, narrow transformer: 12 arrays in each layer, 5 million numbers."""

    def dense(n: int, m: int) -> Tree:
        return {"weight": normal(m, n), "bias": normal(m)}

    def norm() -> Tree:
        return {"weight": normal(width), "bias": normal(width)}

    def layer() -> Tree:
        attention = {"norm": norm(), "qkv": dense(width, 3 * width), "out": dense(width, width)}
        mixer = {"norm": norm(), "up": dense(width, 4 * width), "down": dense(4 * width, width)}
        return {"attention": attention, "mixer": mixer}

    return {"layers": [layer() for _ in range(layers)]}


MODELS: dict[str, Callable[[], Tree]] = {
    "one array of 1,000,000": lambda: normal(1_000_000),
    "1,000 arrays of 64": many_arrays,
    "MLP": mlp,
    "ResNet-18": resnet18,
    "transformer of 1,200 arrays": transformer,
}

# --- rules -----------------------------------------------------------------------------------


def example(rule: type[opt.Rule]) -> opt.Rule:
    """Return a rule of this class: its defaults, or what a number or a rule makes of it."""
    for args in ((), (4,), (opt.Adam(),)):
        try:
            return rule(*args)
        except TypeError:
            continue
    raise TypeError(f"{rule.__name__} takes neither nothing, nor a number, nor a rule")


RULES: dict[str, opt.Rule] = {
    name: example(rule)
    for name, rule in vars(opt.rules).items()
    if name[0] != "_"
    and isinstance(rule, type)
    and issubclass(rule, opt.Rule)
    and not inspect.isabstract(rule)
    and not any("value" in asked for asked in getattr(rule, "asks", {}).values())
}
"""An example of every rule there is, by its name, but for those that need the value of the loss."""
