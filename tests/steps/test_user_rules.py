"""Users' elementwise rules: compiled by Numba, or as array code, or refused as no steps."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from util import (
    BOTH,
    ELEMENTWISE,
    assert_same_bits,
    checked_steps,
    example,
    normal,
    parametrize,
    special_pairs,
    step,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    ElementwiseRule,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    WeightDecay,
    setup,
    update,
    update_,
    words,
)
from optimisers._engine import cpu
from optimisers._steps import compiled as _compiled
from optimisers._steps import grammar
from optimisers.words import abs2, sign, sqrt

FLOATS = ["float32", "float64"]


@dataclass(frozen=True)
class SignMomentum(ElementwiseRule):
    """A user's rule, with slots, a count, words and an unused name."""

    eta: float = 0.01
    rho: float = 0.9

    slots = ("v", "last")

    def coefs(self, t):
        return self.rho, self.eta / t

    @staticmethod
    def step(x, dx, state, coefs):
        v, _ = state
        rho, eta = coefs
        v = rho * v + dx
        return eta * sign(v), (v, dx)


class OwnAdam(Adam):
    """A built-in rule with another step."""

    @staticmethod
    def step(x, dx, state, coefs):
        m, v = state
        b1, rest1, b2, rest2, rate, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx - x)
        return rate * m / (scale * sqrt(v) + epsilon), (m, v)


class Bare(ElementwiseRule):
    """Neither slots nor numbers."""

    @staticmethod
    def step(x, dx, state, coefs):
        return dx - x, ()


MINE = [SignMomentum(), OwnAdam(), Bare()]


def copied(cls: Any) -> Any:
    """Return a user's rule with the fields and the formula of a built-in one."""
    f = cls.step
    copy = FunctionType(f.__code__, f.__globals__, f.__name__)
    return type(cls.__name__, (cls,), {"step": staticmethod(copy)})


# --- the same numbers, by the kernels --------------------------------------------------------


@parametrize("dtype", FLOATS)
@parametrize("cls", ELEMENTWISE)
def test_a_copy_of_each_rule_has_the_bits_of_the_array_code(cls, dtype, numba):
    """That is what the built-in one is tested to have; special numbers included."""
    x, g = special_pairs(dtype)
    model = {"special": x, "normal": normal(2053, dtype), "empty": x[:0], "0-d": np.ones((), dtype)}
    gradients = [
        {"special": g, "normal": normal(2053, dtype, k), "empty": g[:0], "0-d": np.array(0.1 * k)}
        for k in (1, 2, 3)
    ]
    used = checked_steps(update_, example(copied(cls)), model, gradients, assert_same_bits)
    assert used == dict.fromkeys(map("['{}']".format, model), "kernels")


@BOTH
@parametrize("dtype", FLOATS)
@parametrize(
    "rule",
    [
        *MINE,
        OptimiserChain(WeightDecay(0.1), SignMomentum(), OwnAdam()),
        OptimiserChain(ClipNorm(1.0, np.inf), OwnAdam(), ClipNorm(1e-3, np.inf), SignMomentum()),
        OptimiserChain(AccumGrad(2), SignMomentum(), Momentum()),
        OptimiserChain(SignMomentum(), AccumGrad(2), OptimiserChain(Bare())),
    ],
)
def test_users_rules_run_in_the_kernels_alone_and_in_chains(rule, dtype, call, numba):
    model = {"long": normal(5000, dtype), "F": np.asfortranarray(normal((3, 4), dtype))}
    gradients = [{k: normal(x.shape, dtype, s) for k, x in model.items()} for s in (1, 2, 3, 4)]
    used = checked_steps(call, rule, model, gradients, assert_same_bits)
    assert used == {"['long']": "kernels", "['F']": "kernels"}


def test_users_rules_update_a_master_copy(numba):
    x = normal(3000, np.float16)
    state = setup(MixedPrecision(OptimiserChain(WeightDecay(0.1), SignMomentum())), {"w": x})
    by_hand = setup(OptimiserChain(WeightDecay(0.1), SignMomentum()), x.astype(np.float32))
    master, model = x.astype(np.float32), {"w": x}
    for seed in (1, 2, 3):
        g = normal(3000, np.float16, seed)
        state, model, used = step(update_, state, model, {"w": g})
        assert used == {"['w']": "kernels"}
        by_hand, master = update(by_hand, master, g.astype(np.float32))
    assert_same_bits(model["w"], master.astype(np.float16))


def test_numbers_do_not_depend_on_threads_and_blocks(numba):
    x, g = normal(50_001, np.float32), normal(50_001, np.float32, 1)
    rule = OptimiserChain(SignMomentum(), OwnAdam())
    kernels = cpu.kernels
    *blocks, work = kernels.settings()
    expected = update(setup(rule, x), x, g)
    try:
        kernels.set_block(32)
        kernels.set_work_per_thread(1)
        kernels.set_num_threads(3)
        assert_same_bits(update(setup(rule, x), x, g), expected)
    finally:
        kernels.set_block(*blocks)
        kernels.set_work_per_thread(work)
        kernels.set_num_threads(0)


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("known", ["WORDS", "DEVICE_WORDS"])
def test_scalar_words_have_the_values_of_the_words(known, dtype):
    scalar = _compiled.scalar_words(getattr(_compiled, known), getattr(np, dtype), np)
    x, y = special_pairs(dtype)
    with np.errstate(all="ignore"):
        for name, word in _compiled.WORDS.items():
            args = (x, y, y[::-1])[: len(word.arguments)]
            if word.comparisons:
                args = (x > y, x, y)
            got = np.array([scalar[name](*each) for each in zip(*args, strict=True)], dtype)
            assert_same_bits({name: got}, {name: getattr(words, name)(*args)})


def test_the_language_knows_every_word():
    of_coefs, of_measures = {"ema_weight"}, {*grammar.REDUCTIONS}
    assert {*_compiled.WORDS} == {*words.__all__} - of_coefs - of_measures
    assert {name for name, word in _compiled.WORDS.items() if word.comparisons} == {"where"}


def halved(x):
    return x * 0.5


def test_a_word_stands_in_one_place(numba, monkeypatch):
    known = {**words.TEXTS, halved: "x * 0.5"}
    monkeypatch.setattr(_compiled, "WORDS", grammar.words_of(known))

    class Halved(ElementwiseRule):
        @staticmethod
        def step(x, dx, state, coefs):
            return halved(dx) + abs2(x), ()

    x = normal(10)
    used = checked_steps(update, Halved(), {"x": x}, [{"x": x}], assert_same_bits)
    assert used == {"['x']": "kernels"}


# --- what is compiled, and when --------------------------------------------------------------


def test_a_step_is_compiled_once_for_each_dtype(numba, monkeypatch):
    compiled, compile_ = [], _compiled._compile
    monkeypatch.setattr(_compiled, "_made", {})
    monkeypatch.setattr(_compiled, "_compile", lambda *a: compiled.append(a[3]) or compile_(*a))

    def define():
        class Again(ElementwiseRule):
            eta = 0.5

            def coefs(self):
                return (self.eta,)

            @staticmethod
            def step(x, dx, state, coefs):
                (eta,) = coefs
                return eta * (dx + x), ()

        return Again()

    rules = [define(), define()]  # as a cell of a notebook does that is run twice
    done = threading.Barrier(4)
    results = []

    def run(rule):
        model = {"a": np.ones(3, np.float32), "b": np.ones(4)}
        state = setup(rule, model)
        done.wait()
        results.append(update(state, model, model)[1])

    threads = [threading.Thread(target=run, args=(rules[k % 2],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(compiled) == FLOATS
    assert all(r["a"].tolist() == [0.0] * 3 for r in results)


def no_step(x, dx, state, coefs):
    return dx, ()


class Wrapper(ElementwiseRule):
    @staticmethod
    def step(x, dx, state, coefs):
        return dx, ()


class OwnApply(Wrapper):
    def apply(self, state, x, dx, *higher):
        return state, 2 * dx


class OwnMove(Wrapper):
    def move(self, state, x, dx, *higher):
        return state, x - 2 * dx


class ManySlots(ElementwiseRule):
    slots = tuple("abcdefghi")

    @staticmethod
    def step(x, dx, state, coefs):
        a, b, c, d, e, f, g, h, i = state
        return dx + i, (dx, a, b, c, d, e, f, g, h)


class Callable:
    def __call__(self, x, dx, state, coefs):
        return dx, ()


class NoFunction(ElementwiseRule):
    step = Callable()


@parametrize("cls", [OwnApply, OwnMove, ManySlots, NoFunction])
def test_what_stays_array_code_without_a_word(cls):
    _, model, used = step(update_, setup(cls(), np.ones(3)), np.ones(3), np.ones(3))
    assert set(used.values()) == {"arrays"}
    assert model.tolist() == [-1.0 if cls in (OwnApply, OwnMove) else 0.0] * 3


def test_a_slot_may_start_at_the_parameter(numba):
    class Anchored(ElementwiseRule):
        slots = ("anchor",)

        def init(self, x):
            return self.State(x.copy())

        @staticmethod
        def step(x, dx, state, coefs):
            (anchor,) = state
            return dx + x - anchor, (anchor,)

    x = normal(10)
    used = checked_steps(update, Anchored(), {"x": x}, [{"x": x}, {"x": x}], assert_same_bits)
    assert used == {"['x']": "kernels"}


def test_failures_of_numba_are_told_once_and_cost_no_numbers(numba, monkeypatch):
    @dataclass(frozen=True)
    class Unlucky(SignMomentum):
        @staticmethod
        def step(x, dx, state, coefs):
            v, last = state
            rho, eta = coefs
            v = rho * v + dx + last
            return eta * v, (v, dx)

    def fails(*args):
        raise RuntimeError("no such construct")

    monkeypatch.setattr(_compiled, "_compile", fails)
    model = {"a": normal(9), "b": normal(9, np.float32)}
    with pytest.warns(
        RuntimeWarning, match=r"Unlucky\.step.*array code.*no such construct"
    ) as seen:
        used = checked_steps(update, Unlucky(), model, [model, model], assert_same_bits)
    assert len(seen) == 1
    assert seen[0].filename == step.__code__.co_filename
    assert set(used.values()) == {"arrays"}
