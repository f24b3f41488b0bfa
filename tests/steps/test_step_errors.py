"""Steps that are refused, and steps without text."""

from __future__ import annotations

import importlib.util
import textwrap
import warnings
from typing import Any

import numpy as np
import pytest
from util import assert_same_bits, checked_steps, normal, parametrize, snapshot, step

from optimisers import Adam, ElementwiseRule, setup, update, update_
from optimisers._steps.grammar import StepError
from optimisers.words import abs2, zeros_like

HEAD = """\
from dataclasses import dataclass
import numpy as np
from optimisers import ElementwiseRule
from optimisers.words import abs2, clip, maximum, sqrt, where

@dataclass(frozen=True)
class Bad(ElementwiseRule):
    eta: float = 0.1
    slots = ("v",)

    def coefs(self):
        return self.eta, 0.0

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        eta, zero = coefs
"""
FIRST = HEAD.count("\n") + 1


def load(tmp_path, text):
    """Return the rule that the text of a module defines."""
    path = tmp_path / "rules_of_mine.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("rules_of_mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Bad()


def refusal(rule, x=None):
    """Return the message with which a rule is refused; check that nothing was changed."""
    model = {"first": np.ones(2), "w": np.ones(3, np.float32) if x is None else x}
    state = {"first": setup(Adam(), model["first"]), "w": setup(rule, model["w"])}
    before = snapshot([state, model])
    for call in (update, update_):
        with pytest.raises(StepError) as caught:
            call(state, model, {"first": np.ones(2), "w": np.ones(3)})
    assert snapshot([state, model]) == before
    return str(caught.value)


BODIES = {
    "a branch": ("if v > zero:\n    v = dx\nreturn v, (v,)", 0, "where(condition, v, w)"),
    "a choice": ("return dx if v > zero else v, (v,)", 0, "where(condition, v, w)"),
    "a loop": ("for i in range(3):\n    v = v + dx\nreturn v, (v,)", 0, "runs on every element"),
    "a number": ("v = v + dx\nreturn 0.5 * v, (v,)", 1, "0.5 belongs into coefs"),
    "a power": ("return eta * v**2, (v,)", 0, "abs2(v)"),
    "an attribute": ("return np.sqrt(dx), (v,)", 0, "from optimisers.words import sqrt"),
    "another function": ("return np.exp(dx), (v,)", 0, "there are abs2, absolute, clip"),
    "a built-in function": ("return max(dx, v), (v,)", 0, "maximum(v, w)"),
    "an unknown name": ("return lr * dx, (v,)", 0, "`lr`"),
    "an item": ("return coefs[0] * dx, (v,)", 0, "(a, b) = coefs"),
    "two at once": ("v, w = dx, v\nreturn v, (w,)", 0, "one name at a time"),
    "in place": ("v += dx\nreturn v, (v,)", 0, "name = formula"),
    "the wrong end": ("return v", 0, "return dx, (slots...)"),
    "too many slots": ("return v, (v, dx)", 0, "as many slots as it unpacks"),
    "a bare number": ("return dx, (zero,)", 0, "zeros_like(x) + zero"),
    "a bare number, named": ("w = zero - eta\nreturn w, (v,)", 1, "zeros_like(x) + w"),
    "a wrong word": ("return maximum(dx), (v,)", 0, "takes 2 arguments"),
    "a word as a name": ("return sqrt * dx, (v,)", 0, "call it"),
    "a word assigned to": ("sqrt = dx\nreturn sqrt, (v,)", 0, "another name"),
    "a comparison as a number": ("return (v > zero) * dx, (v,)", 0, "where(condition, v, w)"),
    "no comparison": ("return where(v, dx, v), (v,)", 0, "where(v > w, a, b)"),
    "a word not imported": ("v = dx\nreturn minimum(v, dx), (v,)", 1, "words import minimum"),
}


@parametrize("case", BODIES)
def test_what_is_no_step_is_refused_with_its_line_and_advice(case, tmp_path):
    body, line, advice = BODIES[case]
    message = refusal(load(tmp_path, HEAD + textwrap.indent(body, " " * 8)))
    assert message.startswith(f"Bad.step, line {FIRST + line}: ")
    assert f'File "{tmp_path / "rules_of_mine.py"}", line {FIRST + line}' in message
    assert f"\n    {body.splitlines()[line].strip()}" in message
    assert advice in message


GOOD = HEAD + "        return dx, (v,)\n"
CHANGED = {
    "too few slots": ('("v",)', '("v", "w")', "(v,) = state", "`slots` names 2"),
    "too many slots": ('("v",)', "()", "(v,) = state", "`slots` names 0"),
    "too few numbers": ("self.eta, 0.0", "(self.eta,)", "eta, zero = coefs", "`coefs` returns 1"),
    "too many numbers": ("0.0", "0.0, 0.0", "eta, zero = coefs", "`coefs` returns 3"),
    "state not unpacked": ("        (v,) = state\n", "", "return dx, (v,)", "`v`"),
    "other arguments": ("x, dx, state", "x, g, state", "def step", "step(x, dx, state, coefs)"),
    "no static method": ("    @staticmethod\n", "", "def step", "@staticmethod"),
    "a word of NumPy's": (
        "from optimisers.words import abs2, clip, maximum, sqrt, where",
        "from numpy import sqrt",
        "return sqrt(dx)",
        "from optimisers.words import sqrt",
    ),
}


@parametrize("case", CHANGED)
def test_what_does_not_fit_its_class_is_refused(case, tmp_path):
    old, new, line, advice = CHANGED[case]
    text = GOOD.replace("return dx", "return sqrt(dx)") if "word" in case else GOOD
    assert old in text
    message = refusal(load(tmp_path, text.replace(old, new)))
    assert line in message
    assert advice in message
    assert "rules_of_mine.py" in message


def test_the_caret_stands_below_what_is_wrong(tmp_path):
    text = HEAD + "        größe = dx  # wide signs before the fault\n"
    message = refusal(load(tmp_path, text + "        return größe * größe + 2 * v, (v,)"))
    *_, line, caret = message.splitlines()
    assert line.index("2") == caret.index("^")


def test_other_arrays_take_any_step(tmp_path):
    """The language is asked for where it matters: for arrays that the kernels could take."""
    rule = load(tmp_path, HEAD + "        return 2 * np.exp(dx), (v,)")
    model = np.ones(3, np.longdouble)
    _, model, used = step(update, setup(rule, model), model, np.zeros(3))
    assert set(used.values()) == {"arrays"}
    assert model.tolist() == [-1.0] * 3


def from_nowhere(body, **given):
    """Return a rule whose step has no text anywhere."""
    scope: dict[str, Any] = {"abs2": abs2, "zeros_like": zeros_like, **given}
    text = "def step(x, dx, state, coefs):\n    eta, = coefs\n    " + body
    exec(compile(text, "<nowhere>", "exec"), scope)

    class Bad(ElementwiseRule):
        def coefs(self):
            return (0.5,)

        step = staticmethod(scope["step"])

    return Bad()


def test_steps_without_text_are_compiled(numba):
    rules = [from_nowhere("return eta * abs2(dx), ()")]

    class Short(ElementwiseRule):
        step = staticmethod(lambda x, dx, state, coefs: (dx - x, ()))

    for rule in (*rules, Short()):
        x = normal(2000, np.float32)
        used = checked_steps(update_, rule, {"x": x}, [{"x": 0.5 * x}] * 2, assert_same_bits)
        assert used == {"['x']": "kernels"}


def test_words_may_come_from_around_a_class(numba):
    from optimisers.words import maximum

    class Closure(ElementwiseRule):
        @staticmethod
        def step(x, dx, state, coefs):
            return maximum(dx, x), ()

    used = checked_steps(
        update, Closure(), {"x": normal(9)}, [{"x": normal(9, seed=1)}], assert_same_bits
    )
    assert used == {"['x']": "kernels"}


@parametrize(
    ("body", "advice"),
    [
        ("return eta * dx * 2.5, ()", "2.5 belongs into coefs"),
        ("return (dx if eta > x else x), ()", "where(condition, v, w)"),
        ("return np.exp(dx), ()", "np is no word"),
        ("return abs(dx), ()", "abs is no word"),
        ("return sqrt(dx), ()", "words import sqrt"),
    ],
)
def test_steps_without_text_are_checked_as_far_as_code_shows(body, advice):
    message = refusal(from_nowhere(body, np=np))
    assert message.startswith("Bad.step, line ")
    assert advice in message


def test_a_file_that_changed_meanwhile_is_not_believed(tmp_path, numba):
    rule = load(tmp_path, GOOD)
    path = tmp_path / "rules_of_mine.py"
    path.write_text(GOOD.replace("return dx", "return 5 * dx"))
    used = checked_steps(update, rule, {"x": np.ones(3)}, [{"x": np.ones(3)}], assert_same_bits)
    assert used == {"['x']": "kernels"}


class Short(Adam):
    """A built-in step that gets too few numbers."""

    def coefs(self, t):
        return super().coefs(t)[:3]


def test_a_built_in_step_with_too_few_numbers_reads_nothing_beyond_them():
    with pytest.raises(ValueError, match="not enough values to unpack"):
        update(setup(Short(), np.ones(3)), np.ones(3), np.ones(3))


def test_compiling_warns_of_nothing(numba):
    class Quiet(ElementwiseRule):
        @staticmethod
        def step(x, dx, state, coefs):
            return dx / x, ()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = update(setup(Quiet(), np.zeros(2)), np.zeros(2), np.array([1.0, 0.0]))[1]
    assert new[0] == -np.inf
    assert np.isnan(new[1])
