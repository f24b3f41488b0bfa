"""The work for which there are goals, row by row, ours and that of each peer.

Ratios are computed by `make bench`, with both sides in turn; here each side has a history of its
own. asv leaves out what a library that is not installed would have to do.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import optimisers as opt
from optimisers import io

from .models import RULES, gradient_of, many_arrays, mlp, normal, resnet18
from .peers import Step, numpy_adam, optax_step, torch_step, torch_twins

Tree = Any
OURS = "optimisers"


def wanted(make: Callable[[], Step | None]) -> Step:
    """Return a step; leave the benchmark out where a peer is missing, or has no such thing."""
    try:
        step = make()
    except ImportError:
        step = None
    if step is None:
        raise NotImplementedError  # asv's word for "leave this out"
    return step


def update_of(rule: opt.Rule, model: Tree, grad: Tree, **options: Any) -> Step:
    state = opt.setup(rule, model)
    return lambda: opt.update_(state, model, grad, **options)


class _Work:
    """One step of each side, warmed up; a subclass says how it is made."""

    step: Step
    timeout = 300

    def make(self, side: str, work: Any) -> Step | None:
        raise NotImplementedError

    def setup(self, side: str, work: Any) -> None:
        self.step = wanted(lambda: self.make(side, work))
        self.step()

    def time_step(self, side: str, work: Any) -> None:
        self.step()


# --- one step of Adam ---------------------------------------------------------------------------

MODELS: dict[str, Callable[[], Tree]] = {
    "one array of 10": lambda: normal(10),
    "one array of 1,000": lambda: normal(1_000),
    "one array of 100,000": lambda: normal(100_000),
    "MLP, 4 arrays": mlp,
    "1,000 arrays of 64": many_arrays,
    "1,000 arrays of 64, one flat vector": many_arrays,
    "ResNet-18 shapes, 62 arrays": resnet18,
    "one array of 10 M": lambda: normal(10_000_000),
}


class Adam(_Work):
    params = (
        [OURS, "NumPy, in place", "PyTorch, fused", "PyTorch, default", "optax, donated"],
        list(MODELS),
    )
    param_names = ("side", "model")

    def make(self, side: str, work: str) -> Step:
        model = MODELS[work]()
        grad = gradient_of(model)
        if side == OURS and "flat" in work:
            flat, re = opt.destructure(model)
            return update_of(opt.Adam(), flat, re.flatten_gradient(grad))
        if side == OURS:
            return update_of(opt.Adam(), model, grad)
        xs, gs = opt.trainables(model), opt.trainables(grad)
        if side.startswith("PyTorch"):
            return torch_step("Adam", xs, gs, **({"fused": True} if "fused" in side else {}))
        return numpy_adam(xs, gs) if side.startswith("NumPy") else optax_step(xs, gs)


class Chain(_Work):
    params = ([OURS, "PyTorch, clip_grad_norm_, fused"], [10_000, 10_000_000])
    param_names = ("side", "size")

    def make(self, side: str, work: int) -> Step:
        x, g = normal(work), normal(work)
        if side == OURS:
            chain = opt.OptimiserChain(opt.ClipNorm(1.0), opt.WeightDecay(1e-4), opt.Adam())
            return update_of(chain, x, g)
        return torch_step("Adam", [x], [g], 1.0, weight_decay=1e-4, fused=True)


class ClippedChain(_Work):
    params = (["ClipGrad, WeightDecay, Adam", "Adam"], [10_000, 10_000_000])
    param_names = ("rule", "size")

    def make(self, side: str, work: int) -> Step:
        ahead = (opt.ClipGrad(), opt.WeightDecay(1e-4)) if "," in side else ()
        return update_of(opt.OptimiserChain(*ahead, opt.Adam()), normal(work), normal(work))


class LargeRule(_Work):
    """Every elementwise rule at 10 M, and PyTorch's twin in each of its modes."""

    params = (
        [OURS, "PyTorch, fused", "PyTorch, foreach", "PyTorch, for-loop"],
        [name for name, rule in RULES.items() if isinstance(rule, opt.ElementwiseRule)],
    )
    param_names = ("side", "rule")
    size = 10_000_000

    def make(self, side: str, work: str) -> Step | None:
        x, g = normal(self.size), normal(self.size)
        if side == OURS:
            return update_of(RULES[work], x, g)
        mode = side.removeprefix("PyTorch, ")
        return next((s for name, s in torch_twins(work, [x], [g]).items() if mode in name), None)


class Pure(_Work):
    params = (["update", "update_", "optax, not donated"], [10_000, 10_000_000])
    param_names = ("side", "size")

    def make(self, side: str, work: int) -> Step:
        x, g = normal(work), normal(work)
        if "optax" in side:
            return optax_step([x], [g], donate=False)
        return partial(getattr(opt, side), opt.setup(opt.Adam(), x), x, g)


class Watched(_Work):
    params = (["ignore", "raise"], ["1,000", "1,000 arrays of 64", "100,000", "10 M"])
    param_names = ("on_nonfinite", "model")

    def make(self, side: str, work: str) -> Step:
        sizes = {"1,000": 1_000, "100,000": 100_000, "10 M": 10_000_000}
        model = normal(sizes[work]) if work in sizes else many_arrays()
        return update_of(opt.Adam(), model, gradient_of(model), on_nonfinite=side)


class Team(_Work):
    params = ([1, 0], [100_000, 10_000_000])
    param_names = ("threads", "size")

    def make(self, side: int, work: int) -> Step:  # type: ignore[override]
        opt.set_num_threads(side)
        return update_of(opt.Adam(), normal(work), normal(work))

    def teardown(self, threads: int, size: int) -> None:
        opt.set_num_threads(0)


# --- what grows with the number of leaves ---------------------------------------------------------

LEAVES = [1_000, 20_000]


class Leaves(_Work):
    """Calls of ours, and jobs of its peers for such a tree that are of the same kind."""

    params = (
        [
            "setup",
            "destructure",
            "rebuild",
            "trainables",
            "update",
            "update_",
            "adjust_",
            "save",
            "load",
            "optree: two zeros and a count",
            "optree: ravel",
            "optree: unravel",
            "optree: leaves",
            "optree: three empties and a count",
            "safetensors: save, fsync",
            "safetensors: load",
        ],
        LEAVES,
    )
    param_names = ("job", "leaves")

    def make(self, side: str, work: int) -> Step:
        model = many_arrays(work)
        if side.startswith(("optree", "safetensors")):
            return self.peer(side, model)
        grad = gradient_of(model)
        state = opt.setup(opt.Adam(), model)
        flat, re = opt.destructure(model)
        path = self.path()
        io.save(path, state, model)
        return {
            "setup": lambda: opt.setup(opt.Adam(), model),
            "destructure": lambda: opt.destructure(model),
            "rebuild": lambda: re(flat),
            "trainables": lambda: opt.trainables(model),
            "update": lambda: opt.update(state, model, grad),
            "update_": lambda: opt.update_(state, model, grad),
            "adjust_": lambda: opt.adjust_(state, 0.001),
            "save": lambda: io.save(path, state, model),
            "load": lambda: io.load(path),
        }[side]

    def path(self) -> Path:
        self.folder = tempfile.TemporaryDirectory()
        return Path(self.folder.name, "state.safetensors")

    def teardown(self, side: str, work: int) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def peer(self, side: str, model: Tree) -> Step:
        if side.startswith("safetensors"):
            from safetensors.numpy import load_file, save_file

            path = self.path()
            arrays = {f"{name}.{k}": x for name, x in model.items() for k in range(3)}

            def save() -> None:
                save_file(arrays, path)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

            save()
            return save if "save" in side else lambda: load_file(path)
        import optree
        from optree.integrations.numpy import tree_ravel

        def like(make: Callable[[Any], Any], count: int) -> Step:
            return lambda: optree.tree_map(
                lambda x: (*[make(x) for _ in range(count)], np.zeros((), np.int64)), model
            )

        flat, unravel = tree_ravel(model)
        return {
            "optree: two zeros and a count": like(np.zeros_like, 2),
            "optree: ravel": lambda: tree_ravel(model),
            "optree: unravel": lambda: unravel(flat),
            "optree: leaves": lambda: optree.tree_leaves(model),
            "optree: three empties and a count": like(np.empty_like, 3),
        }[side]


class Compiled(_Work):
    """A step inside `jax.jit`, donated and called from Python."""

    params = ([OURS, "to_optax", "optax, inject_hyperparams"], [1, 62, 1_000])
    param_names = ("side", "leaves")

    def make(self, side: str, work: int) -> Step:
        import jax

        params = jax.device_put(many_arrays(work))
        grads = jax.device_put(many_arrays(work))
        move, state = self.moving(side, params)
        compiled = jax.jit(move, donate_argnums=(0, 1))
        now = [params, state]

        def step() -> None:
            now[:] = compiled(*now, grads)
            jax.block_until_ready(now[0])

        return step

    def moving(self, side: str, params: Tree) -> tuple[Callable[..., Any], Any]:
        """Return what is to be compiled, and its first state."""
        import optax

        if side == OURS:

            def ours(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
                state, params = opt.update(state, params, grads)
                return params, state

            return ours, opt.setup(opt.Adam(), params)
        ours_there = side == "to_optax"
        tx = opt.optax.to_optax(opt.Adam()) if ours_there else None
        tx = tx or optax.inject_hyperparams(optax.adam)(learning_rate=0.001)

        def theirs(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return theirs, tx.init(params)


class Compilation(Compiled):
    """Tracing and compiling it."""

    params = ([OURS, "optax, inject_hyperparams"], [62, 1_000])
    number = 1
    repeat = (1, 3, 30.0)

    def make(self, side: str, work: int) -> Step:
        import jax

        params = jax.device_put(many_arrays(work))
        move, state = self.moving(side, params)

        def compile_anew() -> None:
            jax.clear_caches()
            jax.jit(lambda *args: move(*args)).lower(params, state, params).compile()

        return compile_anew

    def setup(self, side: str, work: int) -> None:
        self.step = wanted(lambda: self.make(side, work))


class Adapter(_Work):
    """`optimisers.torch.Optimizer`, and PyTorch's own."""

    params = ([OURS, "PyTorch, fused"], [(1, 10), (62, 1_000), (1_000, 64)])
    param_names = ("side", "arrays")

    def make(self, side: str, work: tuple[int, int]) -> Step:
        count, size = work
        xs = [normal(size) for _ in range(count)]
        if side != OURS:
            return torch_step("Adam", xs, xs, fused=True)
        import torch

        params = [torch.nn.Parameter(torch.tensor(x)) for x in xs]
        for p in params:
            p.grad = torch.ones_like(p)
        step: Step = opt.torch.Optimizer(params, opt.Adam()).step
        return step


class AfterGradient:
    """A step right after three products of matrices, whose threads still look out for more."""

    params = ([OURS, "PyTorch, fused"], ["BLAS", "PyTorch"], [100_000, 1_000_000, 10_000_000])
    param_names = ("side", "products", "size")
    unit = "seconds"
    timeout = 300

    def setup(self, side: str, products: str, size: int) -> None:
        x, g, a = normal(size), normal(size), normal(400, 400)
        if side == OURS:
            self.step = update_of(opt.Adam(), x, g)
        else:
            self.step = wanted(lambda: torch_step("Adam", [x], [g], fused=True))
        if products == "PyTorch":
            torch = wanted(lambda: __import__("torch"))
            a = torch.from_numpy(a)
        self.multiply = lambda: a @ a @ a @ a

    def track_step(self, side: str, products: str, size: int, runs: int = 64) -> float:
        times = []
        for _ in range(runs + 5):
            self.multiply()
            begin = perf_counter()
            self.step()
            times.append(perf_counter() - begin)
        return median(times[5:])
