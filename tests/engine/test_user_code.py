"""Code of users that runs in the middle of an update, and what may be wrong around one.

Whatever a gradient, a rule or a key does while it is asked, the process lives on, and a step is
taken or refused. What could end the process is tried in one of its own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from util import BOTH, assert_same_bits, parametrize

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    adjust,
    adjust_,
    destructure,
    fmap,
    freeze_,
    functor,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)
from optimisers.io import save

REFUSALS = ValueError, TypeError, RuntimeError, KeyError, IndexError


def survives(code):
    """Run code, which has the names of this file, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from test_user_code import *\n" + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


# --- memory that is given back in the middle of a step ----------------------------------------


class Meddling:
    """A gradient that runs code when its attributes, or its numbers, are asked for."""

    def __init__(self, when, code):
        self.when, self.code, self.shape = when, code, (3,)

    @property
    def dtype(self):
        if self.when == "dtype":
            self.code()
        return np.dtype(float)

    def __array__(self, dtype=None, copy=None):
        if self.when == "__array__":
            self.code()
        return np.ones(3)


def meddling_rule(when, code):
    """Return a rule that runs code when asked for its coefs, also after a measure, or its step."""

    @dataclass(frozen=True)
    class Asked(Momentum):
        def coefs(self):
            if when == "coefs":
                code()
            return super().coefs()

        if when == "apply":

            def apply(self, state, x, dx):
                code()
                return super().apply(state, x, dx)

    @dataclass(frozen=True)
    class Clip(ClipNorm):
        def coefs(self, sums):
            code()
            return (1.0,)

        def accept(self, sums):
            code()

    return OptimiserChain(Clip()) if when == "sums" else Asked()


FORMS = ["__array__", "dtype", "coefs", "sums", "apply"]


def meddled(when, call, n, rule, code):
    """Take a step of a large leaf, beside a small one whose gradient or rule runs code."""
    model = {"a": np.ones(n), "b": np.ones(3)}
    state = setup(rule, model)
    grad = {"a": np.ones(n), "b": np.ones(3)}

    def run():
        code(state, model, grad)

    if when in ("__array__", "dtype"):
        grad["b"] = Meddling(when, run)
    else:
        other = meddling_rule(when, run)
        state["b"] = Leaf(other, other.init(model["b"]))
    return call(state, model, grad)


@parametrize("when", FORMS)
@parametrize("rule", [Momentum(), Adam(), AccumGrad(2), MixedPrecision("float64", Momentum())])
def test_no_array_of_a_state_can_be_resized_while_a_step_is_under_way(when, rule):
    """NumPy's own check refuses, since the library holds each array."""
    seen = []

    def shrink(state, model, grad):
        arrays = [a for a in _flat(state["a"].state) if a.size > 1]
        for array in [*arrays, model["a"], grad["a"]]:
            try:
                array.resize(1)
            except ValueError:
                seen.append(array)

    arrays = len([a for a in _flat(rule.init(np.ones(9))) if a.size > 1])
    meddled(when, update_, 1000, rule, shrink)
    assert len({*map(id, seen)}) == arrays + 2


def _flat(state):
    return [a for part in state for a in _flat(part)] if isinstance(state, tuple) else [state]


@parametrize("when", FORMS)
def test_memory_changed_behind_the_back_of_numpy_is_noticed(when):
    survives(
        f"""
        for size in (1, 1_000_000):
            def state(state, model, grad):
                state["a"].state[0].resize(size, refcheck=False)

            def model(state, model, grad):
                model["a"].resize(size, refcheck=False)

            def gradient(state, model, grad):
                grad["a"].resize(size, refcheck=False)

            for call in (update_, update):
                for n in (10, 200_000):
                    for change in (state, model, gradient):
                        with contextlib.suppress(*REFUSALS):
                            meddled({when!r}, call, n, Momentum(), change)
        """
    )


def test_a_step_that_is_refused_for_changed_memory_changes_nothing():
    def change(state, model, grad):
        grad["a"].__setstate__((1, (2,), np.dtype(float), False, bytes(16)))

    model = {}

    def call(state, given, grad):
        model.update(given)
        return update_(state, given, grad)

    with pytest.raises(RuntimeError, match=r"given other memory .* nothing was updated"):
        meddled("coefs", call, 100_000, Momentum(), change)
    assert_same_bits(model, {"a": np.ones(100_000), "b": np.ones(3)})


locked = pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has no GIL"
)


def taken_away_meanwhile(call, take, which=slice(None), **options):
    """Step until a thread has tried to take the memory of arrays away while the kernels ran.

    That is when an array does not own its memory. Returns the arrays. Python does not switch to the
    main thread between this question and `take`, nor to this one but where the kernels let it.
    """
    n = 300_000
    whole = np.ones(2 * n)
    model = {"a": np.ones(n), "b": whole[n:]}
    state = setup(OptimiserChain(ClipNorm(1e9), Adam()), model)
    grad = {"a": np.ones(n), "b": np.ones(n)}
    arrays = [model["a"], whole, grad["a"], *state["a"].state[1][:2]][which]
    tried = [False] * len(arrays)
    stop = threading.Event()

    def meddle():
        while not stop.is_set():
            for k, array in enumerate(arrays):
                if not array.flags.owndata:
                    take(array)
                    tried[k] = True
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(10_000):
            call(state, model, grad, **options)
            if all(tried):
                break
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(tried)
    return arrays


@locked
@BOTH
@parametrize("on_nonfinite", ["ignore", "skip"])
def test_no_thread_resizes_an_array_while_the_kernels_run_without_the_gil(call, on_nonfinite):
    """Not even with ``refcheck=False``: the memory is not the array's own meanwhile."""
    said = set()

    def resize(array):
        try:
            array.resize(3, refcheck=False)
        except ValueError as error:
            said.add(str(error))

    for array in taken_away_meanwhile(call, resize, on_nonfinite=on_nonfinite):
        assert array.size >= 300_000
        assert array.base is None
        assert array.flags.owndata
    assert said == {"cannot resize this array: it does not own its data"}


@locked
def test_memory_that_a_thread_takes_away_while_the_kernels_run_is_not_freed():
    """An array that gets a long text for its memory has that from an object of bytes."""
    survives(
        """
        def step(state, model, grad):
            with contextlib.suppress(*REFUSALS):
                update_(state, model, grad)

        for k in range(5):
            for size in (2, 2000):
                def take(array):
                    array.__setstate__((1, (size,), array.dtype, False, bytes(8 * size)))

                [array] = taken_away_meanwhile(step, take, slice(k, k + 1))
                assert array.shape == (size,)
        """
    )


@parametrize("size", [2, 2000])
def test_an_array_whose_view_is_updated_and_that_gets_other_memory(size):
    """It no longer has what the view shows, be the new memory its own or that of bytes."""
    whole = np.ones(100_000)

    def change(state, model, grad):
        whole.__setstate__((1, (size,), np.dtype(float), False, bytes(8 * size)))

    def call(state, model, grad):
        return update_(state, {**model, "a": whole[:50_000]}, {**grad, "a": np.ones(50_000)})

    with pytest.raises(RuntimeError, match="given other memory"):
        meddled("coefs", call, 50_000, Momentum(), change)


# --- what is shorter, or another thing, when it is read ---------------------------------------


class Clearing(str):
    """A key that empties a dictionary when it is compared."""

    victim: dict

    def __eq__(self, other):
        self.victim.clear()
        return str(self) == str(other)

    def __hash__(self):
        return hash(str(self))


@BOTH
@parametrize("which", ["state", "model", "grad"])
def test_keys_whose_comparison_empties_a_tree(call, which):
    names = [f"k{k}" for k in range(40)]
    model = {name: np.ones(5) for name in names}
    state = setup(Momentum(), model)
    grad = {Clearing(name): np.ones(5) for name in names}
    for key in grad:
        key.victim = {"state": state, "model": model, "grad": grad}[which]
    with contextlib.suppress(*REFUSALS):
        call(state, model, grad)


def test_gradients_cleared_by_another_thread(seconds):
    end = time.monotonic() + seconds
    model = {f"k{k}": np.ones(5) for k in range(40)}
    state = setup(Momentum(), model)
    full = {name: np.ones(5) for name in model}
    grad = dict(full)

    def clear():
        while time.monotonic() < end:
            grad.clear()
            grad.update(full)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=clear)
    thread.start()
    try:
        while time.monotonic() < end:
            with contextlib.suppress(*REFUSALS):
                update_(state, model, grad)
    finally:
        thread.join()
        sys.setswitchinterval(interval)


class Odd(tuple):
    """A tuple with items of its own."""

    __slots__ = ()

    def __getitem__(self, k):
        return 5

    def __len__(self):
        return 10**9

    def __iter__(self):
        return iter([7] * 100)


def odd(state):
    return Odd(map(odd, state)) if isinstance(state, tuple) else state


@BOTH
@parametrize(
    "rule",
    [
        AccumGrad(2), Adam(), OptimiserChain(AccumGrad(2), Adam()),
        MixedPrecision("float64", Momentum()), OptimiserChain(ClipNorm(), Momentum()),
    ],
)  # fmt: skip
def test_states_of_tuples_with_items_of_their_own(call, rule):
    x = np.ones(3)
    leaf = setup(rule, x)
    for _ in range(3):
        leaf.state = odd(leaf.state)
        try:
            leaf, x = call(leaf, x, np.ones(3))
        except (*REFUSALS, AttributeError):
            break


class Emptying:
    """A number that empties the list that it is in."""

    def __init__(self, items):
        self.items = items

    def __float__(self):
        self.items.clear()
        return 1.0


@BOTH
@parametrize("more", [[object()], [1.0], [0.5, 0.5]])
def test_coefs_in_a_list_that_shrinks(call, more):
    @dataclass(frozen=True)
    class Shrinking(Momentum):
        def coefs(self):
            items = []
            items += [Emptying(items), *more]
            return items

    with contextlib.suppress(*REFUSALS):
        call(setup(Shrinking(), np.ones(3)), np.ones(3), np.ones(3))


@BOTH
def test_states_too_deep_to_copy(call):
    deep = ()
    for _ in range(200_000):
        deep = (deep,)
    leaf = setup(Momentum(), np.ones(3))
    leaf.state = (*leaf.state, deep)
    with pytest.raises((RecursionError, *REFUSALS)):
        update(leaf, np.ones(3), np.ones(3))


@BOTH
def test_a_class_that_borrows_the_slots_of_leaves(call):
    """They lie elsewhere in its objects, or nowhere."""

    class Borrowed:
        __class__ = Leaf
        frozen, rule, state = Leaf.frozen, Leaf.rule, Leaf.state

    with pytest.raises((*REFUSALS, AttributeError)):
        call({"a": Borrowed()}, {"a": np.ones(3)}, {"a": np.ones(3)})


# --- trees that contain themselves ------------------------------------------------------------


@functor
class Node:
    """A node with attributes."""


def tied(model, grad):
    """Tie a model, its state and a gradient into themselves, as they are made here."""
    state = setup(Descent(), model)
    for tree in (model, state, grad):
        below = tree["more"]
        if isinstance(below, dict):
            below["back"] = tree
        else:
            below.back = tree
    return state, model, grad


BELOW = {
    "dict": dict,
    "namespace": SimpleNamespace,
    "object": Node,
}


@BOTH
@parametrize("below", BELOW)
@parametrize("wide", [1, 5000])
@parametrize("lead", [0, 30])
def test_updates_of_trees_that_contain_themselves(call, below, wide, lead):
    def made():
        tree = {"w": [np.ones(2)] * wide, "more": BELOW[below]()}
        if below != "dict":
            tree["more"].back = ()
        return tree

    trees = tied(made(), made())
    for _ in range(lead):
        trees = [[tree] for tree in trees]
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"contains itself: .* at .*back"):
        call(*trees)
    assert time.monotonic() - start < 2


def test_every_other_call_refuses_a_tree_that_contains_itself(tmp_path):
    made = lambda: {"w": np.ones(2), "more": {}}  # noqa: E731
    flat, re = destructure(made())
    state, model, _ = tied(made(), made())
    calls = [
        lambda: setup(Descent(), model),
        lambda: destructure(model),
        lambda: trainables(model),
        lambda: fmap(lambda x: x, model),
        lambda: adjust(state, 0.1),
        lambda: adjust_(state, 0.1),
        lambda: freeze_(state),
        lambda: thaw_(state),
        lambda: save(tmp_path / "model", model),
        lambda: save(tmp_path / "state", state),
        lambda: re.flatten(model),
        lambda: re.copy_into_(model, flat),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"itself|the model has|does not have|destructured"):
            call()


@BOTH
def test_nodes_that_are_shared_are_no_circle(call):
    shared = {"w": np.ones(2)}
    for _ in range(12):
        shared = {"below": shared}
    model = {"a": shared, "b": shared}
    state = setup(Descent(0.5), model)
    _, model = call(state, model, model)
    for _ in range(13):
        model = next(iter(model.values()))
    np.testing.assert_array_equal(model["w"], 0)


# --- tensors without memory -------------------------------------------------------------------

RULES = [Momentum(), Adam(), AccumGrad(2), MixedPrecision(Momentum())]


@parametrize("rule", RULES)
@parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@parametrize("which", ["gradient", "parameter", "state"])
@BOTH
def test_tensors_whose_memory_was_given_back(call, rule, dtype, which):
    torch = pytest.importorskip("torch")
    x, g = (torch.ones(1000, dtype=getattr(torch, dtype)) for _ in range(2))
    state = setup(rule, {"w": x})
    slots = [a for a in _flat(state["w"].state) if a.numel() > 1]
    gone = {"gradient": g, "parameter": x, "state": slots[0]}[which]
    others = [a for a in (x, *slots) if a is not gone]
    before = [a.clone() for a in others]
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"{which} at \['w'\].* was given back"):
        call(state, {"w": x}, {"w": g})
    assert all(map(torch.equal, others, before))


def test_a_gradient_without_memory_for_an_array_of_numpy():
    torch = pytest.importorskip("torch")
    g = torch.ones(1000)
    g.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="given back"):
        update_(setup(Momentum(), np.ones(1000)), np.ones(1000), g)


def test_flat_vectors_of_tensors_without_memory():
    torch = pytest.importorskip("torch")
    model = {"w": torch.ones(1000)}
    flat, re = destructure(model)
    gone = torch.ones(1000)
    gone.untyped_storage().resize_(0)
    for call in (
        lambda: re.flatten({"w": gone}),
        lambda: re.copy_into_({"w": gone}, flat),
        lambda: re.copy_into_(model, gone),
        lambda: re(gone),
        lambda: re.flatten_gradient({"w": gone}),
        lambda: setup(Momentum(), {"w": gone}),
        lambda: destructure({"w": gone}),
    ):
        with pytest.raises(ValueError, match=r"given back|storage is gone"):
            call()


def shell_of(inner):
    """Return a tensor whose numbers are in another one, as those of DTensor: its address is 0."""
    torch = sys.modules["torch"]

    class Shell(torch.Tensor):
        def __tensor_flatten__(self):
            return ["inner"], None

        @classmethod
        def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
            opened = torch.utils._pytree.tree_map_only(Shell, lambda shell: shell.inner, args)
            out = op(*opened, **(kwargs or {}))
            if op is torch.ops.aten.detach.default:
                return enclose(out)
            return args[0] if op._schema.is_mutable else out

    def enclose(tensor):
        shell = torch.Tensor._make_wrapper_subclass(Shell, tensor.shape, dtype=tensor.dtype)
        shell.inner = tensor
        return shell

    return enclose(inner)


def test_tensors_whose_numbers_are_in_another_tensor():
    torch = pytest.importorskip("torch")
    inner = torch.ones(3)
    x = shell_of(inner)
    assert x.data_ptr() == 0
    state = setup(Momentum(0.5), {"w": x})
    update_(state, {"w": x}, {"w": torch.ones(3)})
    assert torch.equal(inner, torch.full((3,), 0.5))
    inner.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"parameter at \['w'\].* was given back"):
        update_(state, {"w": x}, {"w": torch.ones(3)})


def test_gradients_that_are_zero_without_memory():
    torch = pytest.importorskip("torch")
    x, zero = torch.ones(3), torch._efficientzerotensor((3,))
    assert zero.data_ptr() == 0
    state = setup(Momentum(0.5), {"w": x})
    update_(state, {"w": x}, {"w": torch.ones(3)})
    update_(state, {"w": x}, {"w": zero})
    assert torch.allclose(x, torch.full((3,), 0.5 - 0.45))


@parametrize("shape", [(), (0,), (2, 0)])
@BOTH
def test_tensors_without_axes_or_without_numbers(call, shape):
    torch = pytest.importorskip("torch")
    x = torch.ones(shape)
    _, new = call(setup(Descent(0.5), x), x, torch.ones(shape))
    assert torch.equal(new, torch.full(shape, 0.5))
