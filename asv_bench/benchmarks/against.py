"""The rows in which `make bench-against` compares two revisions, by public names alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optimisers as opt

from .files import Run
from .goals import update_of
from .models import gradient_of, many_arrays, normal


def rows(quick: bool = False) -> dict[str, Callable[[], Any]]:
    """Return a step for each row, of the library that is imported here."""

    class Own(opt.Rule):
        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, 0.1 * dx

    chain = opt.OptimiserChain
    rules = {
        "Descent": (opt.Descent(), "f4"),
        "Momentum": (opt.Momentum(), "f4"),
        "Adam": (opt.Adam(), "f4"),
        "ClipGrad, Adam": (chain(opt.ClipGrad(), opt.Adam()), "f4"),
        "ClipNorm, Adam": (chain(opt.ClipNorm(), opt.Adam()), "f4"),
        "AccumGrad, Adam": (chain(opt.AccumGrad(2), opt.Adam()), "f4"),
        "MixedPrecision": (opt.MixedPrecision("f4", opt.Adam()), "f2"),
        "a user's rule": (Own(), "f4"),
    }
    pairs = {f"p{k}": {"w": normal(4, 4), "b": normal(4)} for k in range(500)}
    models = {
        "10": lambda: normal(10),
        "1,000": lambda: normal(1_000),
        "1 M": lambda: normal(1_000 if quick else 1_000_000),
        "1,000 arrays of 16": lambda: many_arrays(10 if quick else 1_000, 16),
        "500 {w, b}": lambda: pairs,
        "flat vector": lambda: opt.destructure(many_arrays(10 if quick else 1_000, 16))[0],
    }
    steps: dict[str, Callable[[], Any]] = {}
    for rule_name, (rule, dtype) in rules.items():
        for model_name, make in models.items():
            model = opt.fmap(lambda x, dtype=dtype: x.astype(dtype), make())
            steps[f"{rule_name}: {model_name}"] = update_of(rule, model, gradient_of(model))
    model = many_arrays(10 if quick else 1_000)
    state, grad = opt.setup(opt.Adam(), model), gradient_of(model)
    run = Run(model, opt.Adam())
    run.save()
    return steps | {
        "setup": lambda: opt.setup(opt.Adam(), model),
        "update": lambda: opt.update(state, model, grad),
        "destructure": lambda: opt.destructure(model),
        "save": run.save,
        "load": run.load,
    }
