"""PyTorch: tensors that get other memory, that are mapped, and states as other tools leave them."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import numpy as np
import pytest
from test_user_code import Meddling, meddling_rule, survives
from util import BOTH, parametrize

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    Leaf,
    Lion,
    MixedPrecision,
    Momentum,
    NAdam,
    OptimiserChain,
    RAdam,
    setup,
    update,
    update_,
)

torch: Any = pytest.importorskip("torch")
_torch: Any = importlib.import_module("optimisers._arrays.torch")
Optimizer: Any = importlib.import_module("optimisers.torch").Optimizer

quick = pytest.mark.skipif(_torch._viewer() is None, reason="this PyTorch describes no tensors")

# --- other memory in the middle of a step ------------------------------------------------------


def moved(how, x):
    """Give a tensor other memory, in one of the ways that PyTorch has."""
    big = x.numel() * 4
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        {
            "data": lambda: setattr(x, "data", torch.zeros_like(x)),
            "shorter data": lambda: setattr(x, "data", torch.zeros(1)),
            "set_": lambda: x.set_(torch.zeros(1)),
            "nothing": lambda: x.set_(),
            "larger": lambda: x.resize_(big),
            "no storage": lambda: x.untyped_storage().resize_(0),
            "larger storage": lambda: x.untyped_storage().resize_(8 * big),
            "smaller storage": lambda: x.untyped_storage().resize_(64),
            "shown once": lambda: x.as_strided_(x.shape, (0,)),
            "swapped": lambda: torch.utils.swap_tensors(x, torch.zeros(1)),
        }[how]()
    return [torch.zeros(x.numel()) for _ in range(3)]  # in the place of what was given back


WAYS = [
    "data", "shorter data", "set_", "nothing", "larger", "no storage", "larger storage",
    "smaller storage", "shown once", "swapped",
]  # fmt: skip


def stepped(when, call, n, rule, code, **options):
    """Take a step of two large leaves; a small one between them has a gradient that runs code."""
    model = {"a": torch.ones(n), "b": torch.ones(3), "c": torch.ones(n)}
    state = setup(rule, model)
    grad = {name: torch.ones_like(x) for name, x in model.items()}

    def run():
        for name in ("a", "c"):
            code(state[name].state, model[name], grad[name])

    if when == "__array__":
        grad["b"] = Meddling(when, run)
    else:
        other = meddling_rule(when, run)
        state["b"] = Leaf(other, other.init(model["b"]))
    return call(state, model, grad, **options)


@quick
@parametrize("when", ["__array__", "coefs", "sums", "apply"])
@parametrize("part", ["state", "parameter", "gradient"])
def test_tensors_that_get_other_memory_while_a_step_is_under_way(when, part):
    survives(
        f"""
        from test_torch_hostile import *

        def tensors(state):
            if isinstance(state, tuple):
                return [x for part in state for x in tensors(part)]
            return [state] if state.ndim else []

        for how in WAYS:
            def change(state, x, g):
                found = {{"state": tensors(state), "parameter": [x], "gradient": [g]}}[{part!r}]
                for each in found:
                    moved(how, each)

            rules = [
                Momentum(), OptimiserChain(AccumGrad(2), Adam()),
                MixedPrecision("float64", Momentum()), OptimiserChain(ClipNorm(1e9), Momentum()),
            ]
            for rule in rules:
                for call, options in (
                    (update_, {{}}), (update, {{}}), (update_, {{"on_nonfinite": "skip"}}),
                ):
                    with contextlib.suppress(*REFUSALS):
                        stepped({when!r}, call, 50_000, rule, change, **options)
        """
    )


@quick
def test_a_step_that_is_refused_for_a_moved_tensor_says_where():
    def change(state, x, g):
        g.data = torch.zeros_like(g)

    with pytest.raises(RuntimeError, match=r"at \['a'\]: .* other memory .* nothing was updated"):
        stepped("__array__", update_, 1000, Momentum(), change)


@quick
@parametrize("n", [300, 100_000])
def test_tensors_that_another_thread_gives_other_memory(n):
    survives(
        f"""
        from test_torch_hostile import *
        model = {{f"k{{k}}": torch.ones({n}) for k in range(8)}}
        state = setup(Momentum(), model)
        grad = {{name: torch.ones_like(x) for name, x in model.items()}}
        end = time.monotonic() + 1

        def change():
            while time.monotonic() < end:
                for name in model:
                    for x in (model[name], grad[name], state[name].state.v):
                        x.data = torch.ones({n})

        sys.setswitchinterval(1e-5)
        thread = threading.Thread(target=change)
        thread.start()
        while time.monotonic() < end:
            with contextlib.suppress(*REFUSALS):
                update_(state, model, grad)
        thread.join()
        """
    )


# --- memory that was given back before ---------------------------------------------------------


@BOTH
@parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@parametrize("which", ["parameter", "gradient", "state"])
@parametrize("left", [0, 64])
def test_tensors_whose_storage_has_less_than_they_show(call, dtype, which, left):
    x, g = torch.ones(1000, dtype=dtype), torch.full((1000,), 0.5, dtype=dtype)
    leaf = setup(Momentum(1.0, 0.5), {"w": x})
    gone = {"parameter": x, "gradient": g, "state": leaf["w"].state.v}[which]
    gone.untyped_storage().resize_(left)
    with pytest.raises(ValueError, match=rf"{which} at \['w'\]: .*storage was given back"):
        call(leaf, {"w": x}, {"w": g})


def test_storages_can_be_resized_after_steps():
    """As libraries do that shard parameters; a view of NumPy would forbid it for good."""
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        p = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        rule = Adam() if dtype.is_complex else MixedPrecision(Adam())
        optimizer = Optimizer([p], rule)
        p.grad = torch.ones_like(p)
        if dtype is torch.bfloat16 and _torch._viewer() is None:
            continue
        optimizer.step()
        p.untyped_storage().resize_(0)
        p.untyped_storage().resize_(8 * p.element_size())


# --- torch.vmap --------------------------------------------------------------------------------

MAPPED = [
    Descent(0.1), Adam(0.1), RAdam(0.1), NAdam(0.1), Lion(0.1),
    OptimiserChain(ClipNorm(1.0), Adam(0.1)), OptimiserChain(AccumGrad(2), Adam(0.1)),
    MixedPrecision("float64", Adam(0.1)),
]  # fmt: skip


def flat(state):
    return [x for part in state for x in flat(part)] if isinstance(state, tuple) else [state]


def filled(form, parts):
    if not isinstance(form, tuple):
        return next(parts)
    below = [filled(part, parts) for part in form]
    return form._make(below) if hasattr(form, "_make") else tuple(below)


@parametrize("rule", MAPPED)
def test_states_that_vmap_maps_have_counts_and_norms_of_their_own(rule):
    w, g = torch.linspace(-1, 1, 6).reshape(3, 2), torch.arange(6.0).reshape(3, 2) - 2.4
    leaves = [setup(rule, x) for x in w]
    expected = list(w)
    for k in range(3):  # member k has taken k steps before
        for j in range(k, 3):
            leaves[j], expected[j] = update(leaves[j], expected[j], g[j])
    states = [
        torch.stack(parts) for parts in zip(*(flat(leaf.state) for leaf in leaves), strict=True)
    ]
    form = leaves[0].state

    def step(x, g, *parts):
        leaf, x = update(Leaf(rule, filled(form, iter(parts))), x, g)
        return x, *flat(leaf.state)

    found = torch.stack(expected)
    for k in range(4):
        found, *states = torch.vmap(step)(found, g * k, *states)
        for j in range(3):
            leaves[j], expected[j] = update(leaves[j], expected[j], g[j] * k)
    torch.testing.assert_close(found, torch.stack(expected))


def test_vmap_over_numbers_of_a_rule():
    w, g = torch.ones(2), torch.tensor([3.0, -4.0])

    def trained(eta, rho, omega):
        rule = OptimiserChain(ClipNorm(omega), Adam(eta, (rho, 0.99)))
        state, model = setup(rule, {"w": w}), {"w": w}
        for _ in range(3):
            state, model = update(state, model, {"w": g})
        return model["w"]

    numbers = torch.tensor([[0.1, 0.9, 1.0], [0.2, 0.5, 10.0], [0.0, 0.0, 2.0]])
    expected = torch.stack([trained(*map(float, row)) for row in numbers])
    torch.testing.assert_close(torch.vmap(trained)(*numbers.T), expected)


def test_what_vmap_cannot_do_is_refused_with_the_way_out():
    w, g = torch.ones(2), torch.ones(3, 2)
    state = setup(Momentum(0.1), {"w": w})
    with pytest.raises(TypeError, match=r"at \['w'\]: on_nonfinite cannot look .* torch.vmap"):
        torch.vmap(lambda g: update(state, {"w": w}, {"w": g}, on_nonfinite="skip")[1])(g)
    with pytest.raises(TypeError, match=r"at \['w'\]: update_ cannot write .* use update"):
        torch.vmap(lambda g: update_(state, {"w": w}, {"w": g})[1])(g)
    assert torch.equal(w, torch.ones(2))
    assert torch.equal(state["w"].state.v, torch.zeros(2))


# --- states as other tools leave them ------------------------------------------------------------


@parametrize("rule", [RAdam(0.1), NAdam(0.1), OptimiserChain(AccumGrad(3), Adam(0.1))])
@parametrize("kind", [int, float, np.int64, np.float32])
@parametrize("way", ["load_state_dict", "state"])
def test_counts_that_are_plain_numbers(rule, kind, way):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    one, other = Optimizer([p], rule), Optimizer([q], rule)
    for k in range(8):
        p.grad, q.grad = (torch.tensor([1.0, 2.0 * k, -1.0]) for _ in range(2))
        one.step()
        if k in (1, 4):
            saved = one.state_dict() if way == "load_state_dict" else {"state": one.state}
            for kept in saved["state"].values():
                for name, value in kept.items():
                    if not value.is_floating_point():
                        kept[name] = kind(int(value))
            if way == "load_state_dict":
                one.load_state_dict(saved)
        other.step()
        assert torch.equal(p, q)
    for name, value in other.state[q].items():
        assert torch.equal(one.state[p][name], value), name


def test_what_others_keep_is_loaded_and_what_other_rules_keep_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for rule in (Adam(), Descent()):
        optimizer = Optimizer([p], rule)
        optimizer.step()
        optimizer.state[p]["slow"], optimizer.state[p]["momentum_buffer"] = p.detach().clone(), None
        other = Optimizer([p], rule)
        other.load_state_dict(optimizer.state_dict())
        assert torch.equal(other.state[p]["slow"], optimizer.state[p]["slow"])
        other.step()
    for foreign in ("v", "0.v", "master"):
        saved = optimizer.state_dict()
        saved["state"][0] = {foreign: torch.zeros(3)}
        with pytest.raises(ValueError, match="is it that of another rule"):
            other.load_state_dict(saved)


@BOTH
@parametrize("kind", [int, float, np.int64])
def test_plain_counts_in_a_state_tree(call, kind):
    rule = OptimiserChain(AccumGrad(2), RAdam(0.1))
    for lib in (np.ones, torch.ones):
        x, same = lib(3), lib(3)
        leaf, wanted = setup(rule, x), setup(rule, same)
        for k in range(6):
            g = lib(3) * k
            leaf, x = call(leaf, x, g)
            wanted, same = call(wanted, same, g)
            if k == 2:
                held, adam = leaf.state
                leaf.state = held._replace(count=kind(held.count)), adam._replace(t=kind(adam.t))
            assert bool((x == same).all())
