"""The engine: same bits however it runs, one call for the whole tree, and threads."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from long_runs import BLOCK, NORMS, RULES
from util import (
    BOTH,
    LEADS,
    arrays_in,
    assert_same_bits,
    beginning_at,
    bits,
    normal,
    parametrize,
    step,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    Nesterov,
    OptimiserChain,
    Rule,
    WeightDecay,
    set_num_threads,
    setup,
    update,
    update_,
)
from optimisers._engine import advance as engine
from optimisers._engine import cpu

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("kept_settings")]

SIZES = [(), (0,), 1, 8, BLOCK - 1, BLOCK + 1, 9 * BLOCK + 5, (3, BLOCK)]


def model_of_sizes(dtype, seed):
    return {str(k): normal(size, dtype, seed) for k, size in enumerate(SIZES)}


def trained(call=update_, rules=RULES, steps=2):
    """Return state and model after some steps of many rules on many sizes, all by the kernels."""
    model, state = {}, {}
    for k, rule in enumerate(rules):
        cases = [("f4", rule), ("f8", rule)]
        if k % 3 == 0:
            cases += ("f2", MixedPrecision(rule)), ("f4", MixedPrecision("f8", rule))
        if k % 3 == 1:
            cases += (("f2", rule),)
        for dtype, one in cases:
            key = f"{k} {one is rule} {dtype}"
            model[key] = model_of_sizes(dtype, k)
            state[key] = setup(one, model[key])
    for seed in range(1, steps + 1):
        grad = {key: model_of_sizes(key[-2:], seed) for key in model}
        with engine.watching() as seen:
            state, model = call(state, model, grad)
        assert {backend for _, backend in seen} == {"kernels"}
        assert len(seen) == len(model) * len(SIZES)
    return {"state": state, "model": model}


@pytest.fixture(scope="module")
def expected():
    """Return what a run with the first settings gives."""
    return trained()


# --- same bits -------------------------------------------------------------------------------


@parametrize("blocks", [(32, 32), (96, 64), (BLOCK, BLOCK), (4096, 32), (4096, 4096)])
def test_block_size_changes_no_bit(blocks, expected):
    cpu.kernels.set_block(*blocks)
    assert_same_bits(trained(), expected)


@parametrize("rule", [Adam(), MixedPrecision("f4", Adam()), OptimiserChain(Momentum(), Adam())])
def test_large_new_arrays_have_the_bits_of_those_written_in_place(rule):
    """Blocks are shorter then."""
    x, g = normal(800_003, "f4", 1), normal(800_003, "f4", 2)
    new = update(setup(rule, x), x, g)
    assert_same_bits(new, update_(setup(rule, x), x.copy(), g))


@BOTH
@parametrize("dtype", ["f2", "f4", "f8"])
@parametrize("n", [4 * BLOCK - 1, 4 * BLOCK, 6 * BLOCK - 3])
def test_where_an_array_begins_changes_no_bit(n, dtype, call):
    """Blocks begin at cache lines, but for the first."""
    rule = OptimiserChain(Momentum(), ClipNorm(1e-3, np.inf), Adam())
    results = []
    for byte in range(0, 64, np.dtype(dtype).itemsize):
        x = beginning_at(byte, normal(n, dtype, 1))
        results.append(step(call, setup(rule, x), x, normal(n, dtype, 2)))
        around = x.base.copy()
        around[x.ctypes.data - x.base.ctypes.data :][: x.nbytes] = 0
        assert not around.any()
    for result in results:
        assert_same_bits(result[:2], results[0][:2])


CLIP, NORM, DECAY = ClipGrad(1.0), ClipNorm(1.0), WeightDecay(0.1)


@parametrize(
    "rule",
    [
        (1, OptimiserChain(CLIP, DECAY, Adam())),
        (1, OptimiserChain(NORM, DECAY, Momentum())),
        (1, OptimiserChain(NORM, Adam())),
        (1, OptimiserChain(NORM, OptimiserChain(DECAY, OptimiserChain(Adam())))),
        (2, OptimiserChain(CLIP, NORM, DECAY, Adam())),
        (3, OptimiserChain(CLIP, DECAY, CLIP, Adam())),
        (2, OptimiserChain(Momentum(), CLIP, Adam())),
        (2, OptimiserChain(DECAY, NORM, Adam())),
        (2, OptimiserChain(DECAY, CLIP)),
        (4, OptimiserChain(CLIP, DECAY, Adam(), DECAY)),
        (4, OptimiserChain(CLIP, NORM, NORM, NORM, Adam())),
        (1, OptimiserChain(DECAY, AccumGrad(1))),
    ],
)
def test_one_loop_does_a_rule_and_what_leads_it(rule):
    """A barrier needs what comes before it: it may begin such a loop, nothing else of it."""
    loops, chain = rule
    batch = cpu.kernels.Batch()
    x = np.ones(3)
    assert batch.gather([setup(chain, x)], [x], [x], cpu.lower) == []
    assert batch.loops() == {0: loops}


@BOTH
def test_leaves_side_by_side_are_led_as_each_alone(call):
    """What was found for one leaf serves the next, if that has the same rule and dtype."""
    rules = [
        OptimiserChain(*before, *lead, rule)
        for lead in LEADS
        for rule in (Adam(0.1), Adam(0.2), Momentum())
        for before in ((), (Nesterov(),))
    ]
    state, model, grad = {}, {}, {}
    for k, rule in enumerate(rules):
        for dtype in ("f4", "f8"):
            x = {name: normal(5, dtype, name) for name in range(2)}
            state[k, dtype], model[k, dtype] = setup(rule, x), x
            grad[k, dtype] = {name: normal(5, dtype, 9) for name in x}
    alone = {key: step(call, *deepcopy((state[key], model[key])), grad[key])[:2] for key in model}
    state, model, used = step(call, state, model, grad)
    assert {*used.values()} == {"kernels"}
    for key in model:
        assert_same_bits((state[key], model[key]), alone[key])


@pytest.mark.races
@BOTH
@parametrize("threads", [1, 2, 5])
def test_number_of_threads_changes_no_bit(threads, call, expected):
    set_num_threads(threads)
    cpu.kernels.set_work_per_thread(1)
    assert_same_bits(trained(call), expected)


@pytest.mark.races
@parametrize("threads", [1, 2, 5])
def test_threads_on_a_long_norm(threads):
    """More numbers than a partial sum holds: which thread adds what must not matter."""
    g = normal(100_003, np.float32)
    rule = OptimiserChain(Momentum(), *NORMS)
    results = []
    for n in (1, threads):
        set_num_threads(n)
        cpu.kernels.set_work_per_thread(1)
        results.append(step(update_, setup(rule, g), g.copy(), g)[1])
    assert_same_bits(*results)


def test_block_must_fit_and_fill_vectors():
    for wrong in (0, 7, 48, 4128):
        with pytest.raises(ValueError, match="multiple of 32 numbers, at most 4096"):
            cpu.kernels.set_block(wrong)


@parametrize("name", cpu.available)
def test_each_instruction_set_gives_the_same_bits(name, monkeypatch, expected):
    monkeypatch.setattr(cpu, "kernels", cpu.available[name])
    assert cpu.available[name].step_index == cpu.baseline.step_index
    assert_same_bits(trained(), expected)


# --- one call for the whole tree -------------------------------------------------------------


def many(n, dtype=np.float32):
    return {str(k): normal((3, 2), dtype, k) for k in range(n)}


def test_one_batch_per_update(monkeypatch):
    made = []

    class Spy(cpu.kernels.Batch):
        def __init__(self, *args, **kwargs):
            made.append(self)

    monkeypatch.setattr(cpu.kernels, "Batch", Spy)
    rule = OptimiserChain(
        ClipNorm(), OptimiserChain(WeightDecay(), Adam()), ClipNorm(), AccumGrad(2)
    )
    model = {"single": many(20), "double": many(20, np.float64)}
    for call in (update_, update):
        made.clear()
        call(setup(rule, model), model, model)
        assert len(made) == 1
        assert len(made[0].places()) == 40


def calls_per_update(n):
    """Return how many Python functions one update of n leaves enters."""
    rule = OptimiserChain(WeightDecay(0.1), Adam())
    model, grad = many(n), many(n)
    state = setup(rule, model)
    update_(state, model, grad)
    calls = Counter()

    def note(frame, event, arg):
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(note)
    try:
        update_(state, model, grad)
    finally:
        sys.setprofile(None)
    return calls


def test_no_python_call_per_leaf():
    assert calls_per_update(1000) == calls_per_update(10)


class CountingAdam(Adam):
    calls: ClassVar[list[int]] = []

    def coefs(self, t):
        self.calls.append(t)
        return super().coefs(t)


@BOTH
def test_leaves_with_the_same_rule_and_count_share_coefficients(call):
    CountingAdam.calls.clear()
    model = many(1000)
    state = setup(CountingAdam(), model)
    state, model, used = step(call, state, model, many(1000))
    assert set(used.values()) == {"kernels"}
    assert CountingAdam.calls == [1]
    step(call, state, model, many(1000))
    assert CountingAdam.calls == [1, 2]


def test_coefficients_belong_to_count_and_dtype():
    CountingAdam.calls.clear()
    model = {"single": many(3), "double": many(3, np.float64)}
    state = setup(CountingAdam(), model)
    update_(state, model, model)
    assert CountingAdam.calls == [1, 1]
    update_(state, model, {"single": many(2)})
    CountingAdam.calls.clear()
    update_(state, model, model)
    assert sorted(CountingAdam.calls) == [2, 2, 3]


def test_counts_of_their_own_give_each_leaf_its_coefficients():
    """Leaves of one rule that have taken different numbers of steps, side by side."""
    model = {"old": np.ones(3), "new": np.ones(3)}
    state = setup(Adam(), model)
    for _ in range(3):
        update_(state, model, {"old": np.ones(3)})
    update_(state, model, {"old": np.ones(3), "new": np.full(3, 2.0)})
    assert (int(state["old"].state.t), int(state["new"].state.t)) == (4, 1)
    apart = {"old": np.ones(3)}, {"new": np.ones(3)}
    states = [setup(Adam(), m) for m in apart]
    for _ in range(4):
        update_(states[0], apart[0], {"old": np.ones(3)})
    update_(states[1], apart[1], {"new": np.full(3, 2.0)})
    assert_same_bits(model, {**apart[0], **apart[1]})


# --- memory ----------------------------------------------------------------------------------


def peak_of(f):
    f()
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_update_in_place_allocates_nothing_of_the_models_size():
    rule = OptimiserChain(ClipNorm(), WeightDecay(0.1), Adam(), AccumGrad(2))
    for n in (1000, 1_000_000):
        x, g = np.ones(n, np.float32), np.ones(n, np.float32)
        state = setup(rule, x)
        assert peak_of(lambda state=state, x=x, g=g: update_(state, x, g)) < 30_000


def test_pure_update_allocates_parameter_and_state_once():
    n = 1_000_000
    x, g = np.ones(n, np.float32), np.ones(n, np.float32)
    state = setup(Adam(), x)
    size = 3 * x.nbytes
    assert size <= peak_of(lambda: update(state, x, g)) < size + 30_000


@parametrize("dtype", ["float64", "float16"])
@BOTH
def test_memory_does_not_pile_up(call, dtype):
    """Python and NumPy keep small objects for later, but no array may stay behind."""
    model, grad = {"w": np.ones(10_000, dtype)}, {"w": np.ones(10_000)}
    state = setup(OptimiserChain(ClipNorm(), Adam()), model)

    def held(times):
        for _ in range(times):
            call(state, model, grad)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = held(10)
        assert held(100) - before < 10 * model["w"].nbytes
    finally:
        tracemalloc.stop()


# --- what the watcher sees, which other tests rely on ----------------------------------------


def test_watching_sees_each_leaf_and_backend():
    model = {"k": np.ones(3), "a": np.ones(3, complex), "none": np.ones(3), "frozen": np.ones(3)}
    state = setup(Descent(), model)
    state["frozen"].frozen = True
    grad = {"k": np.ones(3), "a": np.ones(3), "frozen": np.ones(3)}
    with engine.watching() as outer, engine.watching() as inner:
        update_(state, model, grad)
    assert inner == outer == [(0, "kernels"), (1, "arrays")]
    with engine.watching() as seen:
        update_(state, model, None)
    assert seen == []


# --- what one update leaves for the next -----------------------------------------------------


class Flaky(Adam):
    fails: ClassVar[bool] = False

    def coefs(self, t):
        if self.fails:
            raise RuntimeError("not now")
        return super().coefs(t)


def test_a_refused_update_leaves_no_trace():
    rule = Flaky()
    model = {"a": normal(5), "b": normal(3000), "c": normal(7)}
    state = setup(rule, model)
    grad = {k: normal(x.shape, seed=1) for k, x in model.items()}
    for _ in range(3):
        expected = update(state, model, grad)
        Flaky.fails = True
        try:
            with pytest.raises(RuntimeError, match="not now"):
                update_(state, model, grad)
        finally:
            Flaky.fails = False
        with pytest.raises(ValueError, match="shape"):
            update_(state, model, {**grad, "c": np.ones(1)})
        with pytest.raises(TypeError, match="complex"):
            update(state, model, {**grad, "b": 1j * np.ones(3000)})
        update_(state, model, grad)
        assert_same_bits([state, model], list(expected))


@dataclass(frozen=True)
class Inner(Rule):
    """A rule that itself trains a model, in the middle of an update."""

    rule: Rule

    def init(self, x):
        inner = {"w": np.zeros_like(x)}
        return {"model": inner, "state": setup(self.rule, inner)}

    def apply(self, state, x, dx):
        update_(state["state"], state["model"], {"w": dx})
        return state, -state["model"]["w"]


@BOTH
def test_an_update_inside_an_update(call):
    """With the very rule, and so the plan, that the outer one is using."""
    rule = OptimiserChain(ClipNorm(1.0), Adam())
    x = {"a": normal(9), "b": normal(9), "c": normal(9)}
    state = {"a": setup(rule, x["a"]), "b": setup(Inner(rule), x["b"]), "c": setup(rule, x["c"])}
    grad = {k: normal(9, seed=5) for k in x}
    alone = update(setup(rule, np.zeros(9)), np.zeros(9), grad["b"])[1]
    expected = {k: update(setup(rule, x[k]), x[k], grad[k])[1] for k in "ac"}
    _, new = call(state, x, grad)
    assert_same_bits(new, {"a": expected["a"], "b": normal(9) + alone, "c": expected["c"]})


def test_rules_by_turns():
    """Leaves whose rules alternate, on both paths, keep their own coefficients."""
    rules = [Adam(0.1), Descent(0.1), Inner(Adam()), Adam(0.2)]
    model = {k: normal(4, seed=k) for k in range(12)}
    state = {k: setup(rules[k % 4], x) for k, x in model.items()}
    grad = {k: normal(4, seed=50 + k) for k in model}
    for _ in range(3):
        expected = {k: update(state[k], x, grad[k]) for k, x in model.items()}
        state, model = update(state, model, grad)
        assert_same_bits(model, {k: e[1] for k, e in expected.items()})


@dataclass(frozen=True)
class Programmed(CountingAdam):
    """A rule that counts how often its program is asked for."""

    programs: ClassVar[list[float]] = []

    def program(self):
        self.programs.append(self.eta)
        return super().program()


@BOTH
def test_rules_by_turns_are_made_ready_once_each(call):
    Programmed.programs.clear()
    rules = [Programmed(eta=0.1), Programmed(eta=0.2), Programmed(eta=0.3)]
    models = [{k: normal(4, seed=k) for k in range(6)} for _ in range(2)]
    states = [{k: setup(rules[k % 3], x) for k, x in model.items()} for model in models]
    Programmed.calls.clear()
    for t in range(1, 4):
        for k in range(2):
            states[k], models[k] = call(states[k], models[k], models[k])
            assert Programmed.calls == [t] * 3, "each rule once a step, for both of its leaves"
            Programmed.calls.clear()
    assert sorted(Programmed.programs) == [0.1, 0.2, 0.3]


def test_more_rules_than_are_kept():
    rules = [Adam(0.01 * k) for k in range(1, 20)]
    model = {k: normal(4, seed=k) for k in range(2 * len(rules))}
    state = {k: setup(rules[k % len(rules)], x) for k, x in model.items()}
    for _ in range(3):
        expected = {k: update(state[k], x, x)[1] for k, x in model.items()}
        state, model = update(state, model, model)
        assert_same_bits(model, expected)


@dataclass(frozen=True)
class Loud(Adam):
    """A rule whose coefficients cannot be had."""

    def coefs(self, t):
        raise RuntimeError("no coefficients today")


@BOTH
def test_coefficients_that_raise_leave_everything_as_it_was(call):
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = {"a": setup(Adam(), model["a"]), "b": setup(Loud(), model["b"])}
    before = [(p, bits(a)) for p, a in arrays_in([state, model])]
    with pytest.raises(RuntimeError, match="no coefficients today"):
        call(state, model, model)
    assert [(p, bits(a)) for p, a in arrays_in([state, model])] == before


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 8, 9, 1000])
def test_an_object_that_stands_twice_is_found(n):
    objects = [object() for _ in range(n)]
    assert cpu.kernels.are_distinct(objects)
    for k in {0, n // 2, n - 1} if n else ():
        for at in (0, k, n):
            twice = objects.copy()
            twice.insert(at, objects[k])
            assert not cpu.kernels.are_distinct(twice)


def test_objects_of_another_class_are_found():
    class Other(Descent):
        pass

    all_are = cpu.kernels.all_are
    assert all_are(Descent, [])
    assert all_are(Descent, [Descent()] * 9)
    for other in (Other(), None, Descent):
        assert not all_are(Descent, [*[Descent()] * 9, other])


def test_keys_in_another_order_are_found():
    same = cpu.kernels.same_keys
    names = [f"layer {k}" for k in range(9)]
    one = dict.fromkeys(names)
    equal = dict.fromkeys("".join(name) for name in map(list, names))  # not the same objects
    other = dict.fromkeys(names[::-1])
    fewer, another = dict.fromkeys(names[1:]), dict.fromkeys([*names[1:], "head"])
    assert same({}, {}, {})
    assert same(one, dict(one), equal)
    assert same(equal, one, dict(one))
    for wrong in (other, fewer, another, {}):
        assert not same(one, one, wrong)
        assert not same(one, wrong, one)
        assert not same(wrong, one, one)
    longer = dict(one)
    del longer["layer 3"]  # leaves a gap in the table
    assert same(longer, dict(longer), dict.fromkeys(n for n in names if n != "layer 3"))
