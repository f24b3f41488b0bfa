"""One array at one stroke: the quick way, and whatever is out of the ordinary on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from long_runs import BLOCK, RULES
from util import arrays_in, assert_same_bits, normal, parametrize

from optimisers import Adam, ClipNorm, Descent, MixedPrecision, Momentum, setup, update_
from optimisers._engine import advance as engine

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("kept_settings")]


def tried(update, *args, **options):
    """Return what an update returns, or what it raises, as something that can be compared."""
    try:
        return "returned", [*arrays_in(update(*args, **options))]
    except Exception as error:
        return "raised", type(error), str(error), getattr(error, "__notes__", [])


def long_ways(monkeypatch):
    """Return a list to which each call of `advance` from now on adds an item."""
    calls = []
    advance = engine.advance

    def noted(*args, **options):
        calls.append(args)
        return advance(*args, **options)

    monkeypatch.setattr(engine, "advance", noted)
    return calls


@parametrize("rule", RULES)
@parametrize("on_nonfinite", ["ignore", "skip", "raise"])
def test_one_array_goes_at_one_stroke(rule, on_nonfinite, monkeypatch):
    x = normal(BLOCK + 1, np.float32)
    state = setup(rule, x)
    calls = long_ways(monkeypatch)
    for _ in range(3):
        update_(state, x, 0.1 * x, on_nonfinite=on_nonfinite)
    assert not calls


def read_only(x):
    x.flags.writeable = False
    return x


@dataclass(frozen=True)
class Grumpy(Descent):
    """Refuses to say its coefs."""

    def coefs(self):
        raise RuntimeError("not today")


W, NAN = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3), np.float32("nan")
ODD = {
    "read-only": (Adam(), read_only(W.copy()), W),
    "another dtype": (Adam(), W.copy(), W.astype(np.float64)),
    "another order": (Adam(), W.copy(), np.asfortranarray(W)),
    "no gradient": (Adam(), W.copy(), None),
    "a list": (Adam(), W.copy(), W.tolist()),
    "another shape": (Adam(), W.copy(), W[:1]),
    "half": (Adam(), W.astype(np.float16), W.astype(np.float16)),
    "complex": (Adam(), W.astype(complex), W.astype(complex)),
    "masters": (MixedPrecision(Adam()), W.astype(np.float16), W.astype(np.float16)),
    "its coefs raise": (Grumpy(), W.copy(), W),
    "a norm that is infinite": (ClipNorm(1.0), W.copy(), W * np.float32(np.inf)),
    "nan": (Adam(), W.copy(), W * NAN),
    "no array": (Adam(), W.copy(), "gradient"),
}


@parametrize("on_nonfinite", ["ignore", "skip", "raise", "refuse", None])
@parametrize("odd", ODD)
def test_what_is_out_of_the_ordinary_comes_out_the_same(odd, on_nonfinite, monkeypatch):
    rule, x, g = ODD[odd]
    outcomes, states = [], []
    for whole in (engine.advance_one, lambda *args: False):
        monkeypatch.setattr(engine, "advance_one", whole)
        w = x.copy()
        w.flags.writeable = x.flags.writeable
        state = setup(rule, w)
        outcome = tried(update_, state, w, g, on_nonfinite=on_nonfinite)
        outcomes.append((outcome, state.skipped))
        states.append((w, state.state))
    assert str(outcomes[0]) == str(outcomes[1])
    assert_same_bits(*states)


def test_a_frozen_or_shared_or_overlapping_array_comes_out_the_same(monkeypatch):
    memory = normal(12, np.float32)
    results = []
    for whole in (engine.advance_one, lambda *args: False):
        monkeypatch.setattr(engine, "advance_one", whole)
        frozen, x = setup(Adam(), memory[:6]), memory[:6].copy()
        frozen.frozen = True
        update_(frozen, x, x)
        results.append([x.copy(), frozen.state])
        own = memory.copy()
        state = setup(Momentum(), own[:6])
        update_(state, own[:6], own[3:9])  # a gradient where the parameter is written
        results[-1] += own, state.state
        clash = setup(Momentum(), own[:6])
        clash.state = type(clash.state)(own[3:9])
        results[-1].append(tried(update_, clash, own[:6], memory[:6]))
    assert "overlap in memory" in results[0][-1][2]
    assert results[0].pop() == results[1].pop()
    assert_same_bits(*results)
