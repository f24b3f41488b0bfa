"""The generator of the compiled steps: its text, and what it refuses.

After a wanted change of what it writes, renew the golden text and look at the difference:

    python tools/emit_steps.py optimisers/words.py tests/steps/golden/steps.{py,pxi}
    git diff tests/steps/golden
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import emit_steps
import pytest
from util import ELEMENTWISE, MEASURING, STEPS

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
WORDS, *RULES = [file.read_text() for file in emit_steps.FORMULAS]
SOURCE, TEXT = GOLDEN / "steps.py", GOLDEN / "steps.pxi"


def test_golden_text():
    assert emit_steps.generate(WORDS, SOURCE.read_text()) == TEXT.read_text(), __doc__


def test_the_built_steps_are_those_of_the_rules():
    built = ROOT / "optimisers" / "_steps.pxi"
    assert emit_steps.generate(WORDS, *RULES) == built.read_text(), (
        "build anew: make test, or setup.py"
    )


def test_every_class_with_a_step_is_found():
    expected = [
        cls.name
        for text in RULES
        for cls in ast.parse(text).body
        if isinstance(cls, ast.ClassDef)
        and any(isinstance(node, ast.FunctionDef) and node.name == "step" for node in cls.body)
    ]
    assert [step.rule for step in STEPS] == expected
    assert len(expected) > 15


def test_each_lead_is_fused_with_every_step_that_follows_it():
    text = (ROOT / "optimisers" / "_steps.pxi").read_text()
    leading = {step.rule for step in STEPS if step.leads}
    assert leading
    for lead in emit_steps.find_leads(STEPS):
        name = "_".join(step.rule for step in lead)
        fused = {s.rule for s in STEPS if f" {name}_{s.rule}_float_finish_loop(" in text}
        assert fused == {step.rule for step in STEPS if step.follows} - leading


def test_leads_are_the_rules_that_say_so_and_keep_nothing():
    """The generator reads the text of a class, where a rule would inherit the attribute."""
    leading = {c.step for c in [*ELEMENTWISE, *MEASURING] if c._leads}
    assert {s.rule for s in STEPS if s.leads} == {
        step.__qualname__[: -len(".step")] for step in leading
    }
    assert not any(step.slots for step in STEPS if step.leads)
    apart = {c.__name__ for c in [*ELEMENTWISE, *MEASURING] if not c._follows}
    assert {s.rule for s in STEPS if not s.follows} == apart != set()


def test_clips_lead_decays_and_longer_leads_come_first():
    """The first that fits is taken."""
    leads = [tuple(step.rule for step in lead) for lead in emit_steps.find_leads(STEPS)]
    assert {*leads} >= {("ClipGrad", "WeightDecay"), ("Scaling", "WeightDecay"), ("WeightDecay",)}
    assert ("WeightDecay", "ClipGrad") not in leads
    lengths = [*map(len, leads)]
    assert lengths == sorted(lengths, reverse=True)


def test_command_line(tmp_path):
    target = tmp_path / "steps.pxi"
    command = [sys.executable, ROOT / "tools" / "emit_steps.py"]
    files = [ROOT / "optimisers" / "words.py", SOURCE, target]
    subprocess.run([*command, *files], check=True, timeout=30)
    assert target.read_text() == TEXT.read_text()


def test_other_text_than_steps_changes_nothing():
    """Docstrings and fields leave the loops, and so the compiled kernels, alone."""
    source = (
        SOURCE.read_text().replace("No slots.", "None whatever.").replace("self.eta", "self.rate")
    )
    assert emit_steps.generate(WORDS, source) == TEXT.read_text()


def test_a_word_stands_in_one_place():
    words = (
        WORDS
        + """
@_step_word("low - exp(x)")
def beyond(x, low): ...
"""
    )
    rule = HEAD.replace("Bad", "Good") + "        return beyond(dx, x), ()\n"
    text = emit_steps.generate(words, rule)
    assert '    float c_expf "expf"(float)\n    double c_exp "exp"(double)\n' in text
    function = """
cdef inline real beyond(real x, real low) noexcept nogil:
    if real is float:
        return low - c_expf(x)
    else:
        return low - c_exp(x)
"""
    assert function in text


# --- the language of steps -------------------------------------------------------------------

HEAD = """from .words import abs2, absolute, clip, maximum, minimum, sign, sqrt, where, zeros_like
class Bad:
    @staticmethod
    def step(x, dx, state, coefs):
"""
FIRST = 5  # the line of the first statement after HEAD

REFUSED = {
    "a number": ("return 2 * dx, ()", FIRST, "the number 2 belongs into coefs"),
    "a float": ("(a,) = coefs\nreturn (a - 1.5) * dx, ()", FIRST + 1, "1.5 belongs into coefs"),
    "a text": ("return sqrt('abc'), ()", FIRST, "'abc'"),
    "an attribute": ("return np.sqrt(dx), ()", FIRST, "np.sqrt"),
    "an attribute of an array": ("return dx.real, ()", FIRST, "dx.real"),
    "an index": ("return dx[x], ()", FIRST, "dx[x]"),
    "a function that is no word": ("return exp(dx), ()", FIRST, "exp"),
    "a name out of nowhere": ("return eta * dx, ()", FIRST, "eta"),
    "a name used before it is there": ("a = b\nb = dx\nreturn a, ()", FIRST, "b"),
    "a power": ("a = dx\nreturn a**x, ()", FIRST + 1, "a ** x"),
    "a remainder": ("return dx % x, ()", FIRST, "dx % x"),
    "a whole division": ("return dx // x, ()", FIRST, "dx // x"),
    "a choice": ("return dx if x > dx else x, ()", FIRST, "dx if x > dx else x"),
    "a logical or": ("return where(x > dx or dx > x, x, dx), ()", FIRST, "x > dx or dx > x"),
    "a logical not": ("return where(not x > dx, x, dx), ()", FIRST, "not x > dx"),
    "a chained comparison": ("return where(x < dx < x, x, dx), ()", FIRST, "x < dx < x"),
    "an equality": ("return where(x == dx, x, dx), ()", FIRST, "x == dx"),
    "a lambda": ("return (lambda: dx)(), ()", FIRST, "lambda"),
    "a keyword": ("return clip(dx, low=x, high=x), ()", FIRST, "clip(dx, low=x, high=x)"),
    "an assignment in place": ("dx += x\nreturn dx, ()", FIRST, "name = formula"),
    "two targets": ("a = b = dx\nreturn a, ()", FIRST, "name = formula"),
    "a pair": ("a, b = dx, x\nreturn a, ()", FIRST, "one name"),
    "an item": ("x[dx] = dx\nreturn x, ()", FIRST, "one name"),
    "an annotation": ("a: float = dx\nreturn a, ()", FIRST, "name = formula"),
    "an if": ("if x:\n    dx = x\nreturn dx, ()", FIRST, "name = formula"),
    "a loop": ("for i in x:\n    dx = i\nreturn dx, ()", FIRST, "name = formula"),
    "a call alone": ("print(x)\nreturn dx, ()", FIRST, "name = formula"),
    "a docstring": ("'''Text.'''\nreturn dx, ()", FIRST, "name = formula"),
    "state not unpacked": ("v = state\nreturn dx, (v,)", FIRST, "(v,) = state"),
    "coefs not unpacked": ("c = coefs\nreturn dx, ()", FIRST, "(c,) = coefs"),
    "part of state": ("v, *rest = state\nreturn dx, (v,)", FIRST, "rest"),
    "a name for two things": ("(v,) = state\n(v,) = coefs\nreturn v, (v,)", FIRST + 1, "v"),
    "a coefficient assigned to": ("(a,) = coefs\na = a * dx\nreturn a, ()", FIRST + 1, "a"),
    "no return": ("(v,) = state\nv = dx", FIRST + 1, "return dx, (slots...)"),
    "a return of dx alone": ("return dx", FIRST, "return dx, (slots...)"),
    "a return of nothing": ("return", FIRST, "return dx, (slots...)"),
    "a return of three": ("return dx, (), ()", FIRST, "return dx, (slots...)"),
    "slots that are no tuple": ("(v,) = state\nreturn dx, v", FIRST + 1, "return dx, (slots...)"),
    "too few slots": ("m, v = state\nreturn dx, (m,)", FIRST + 1, "as many slots as it unpacks"),
    "too many slots": ("(v,) = state\nreturn dx, (v, dx)", FIRST + 1, "as many slots"),
    "only a pass": ("pass", FIRST, "return dx, (slots...)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_step_is_refused_with_its_line(case):
    body, line, text = REFUSED[case]
    source = HEAD + textwrap.indent(body, "        ")
    with pytest.raises(emit_steps.StepError) as caught:
        emit_steps.generate(WORDS, source)
    message = str(caught.value)
    assert "Bad.step" in message
    assert f"line {line}" in message
    assert text in message


@pytest.mark.parametrize(
    "signature", ["x, g, state, coefs", "x, dx, state", "self, x, dx, state, coefs"]
)
def test_the_arguments_of_a_step_have_their_names(signature):
    source = f"class Bad:\n    @staticmethod\n    def step({signature}):\n        return x, ()\n"
    with pytest.raises(
        emit_steps.StepError, match=r"Bad\.step, line 3.*step\(x, dx, state, coefs\)"
    ):
        emit_steps.generate(WORDS, source)


def test_what_a_step_may_say():
    """Everything in the vocabulary, so that a refusal too many shows."""
    body = """
    a, b = state
    low, high, one, zero = coefs
    a = -a + dx * x - b / low
    b = maximum(minimum(a, high), low)
    c = sign(b) * absolute(a) + sqrt(abs2(x))
    c = where(c > zero, clip(c, low, high), where(c <= zero, one, zeros_like(c)))
    d = (where(c < one, a, +a) + where(c >= one, b, b))
    return d, (a, b)
    """
    source = HEAD.replace("Bad", "Good") + textwrap.indent(textwrap.dedent(body), "        ")
    text = emit_steps.generate(WORDS, source)
    assert "cdef void Good_float_loop" in text
    assert "d = where(c < one, a, +a) + where(c >= one, b, b)" in text
    assert "add_step('Good', 2, 4,\n             Good_float, Good_double," in text
