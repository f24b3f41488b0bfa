"""Users' elementwise rules: compiled by Numba, or as array code, or refused as no steps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import warnings
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
    snapshot,
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
from optimisers._steps import cache as step_cache
from optimisers._steps import compiled as _compiled
from optimisers._steps import grammar
from optimisers._steps.grammar import StepError
from optimisers.words import abs2, sign, sqrt, zeros_like

FLOATS = ["float32", "float64"]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path_factory.mktemp("numba")))
        yield


@pytest.fixture
def numba():
    return pytest.importorskip("numba")


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
    elementwise = {name for name in words.__all__ if name != "ema_weight"}  # a word of coefs
    assert {*_compiled.WORDS} == elementwise
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


# --- in other processes: without Numba, and the cache ----------------------------------------

SCRIPT = """
    import sys, hashlib, warnings
    from pathlib import Path
    import numpy as np, optimisers
    from optimisers._engine import advance as engine
    from optimisers._steps import compiled
    from optimisers.words import sqrt, abs2

    class Mine(optimisers.Adam):
        @staticmethod
        def step(x, dx, state, coefs):
            m, v = state
            b1, rest1, b2, rest2, rate, scale, epsilon = coefs
            m = b1 * m + rest1 * dx
            v = b2 * v + rest2 * abs2(dx)
            return rate * m / (scale * sqrt(v) + epsilon) + m, (m, v)

    def run(dtype, steps=3):
        x = np.linspace(-1, 1, 3001).astype(dtype)
        state, backends = optimisers.setup(Mine(), x), set()
        with engine.watching() as seen:
            for _ in range(steps):
                state, x = optimisers.update(state, x, x * x)
        return {backend for _, backend in seen}, hashlib.sha256(x.tobytes()).hexdigest()
"""


def run_script(tmp_path, code, **environment):
    """Run SCRIPT and more in a new interpreter; return what it prints, evaluated."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(code))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def result():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return eval(out)

    return result


def test_without_numba_the_numbers_are_the_same(numba, tmp_path):
    code = 'print([run("f4"), run("f8")])'
    block = 'sys.modules["numba"] = None\n'
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    compiled, arrays, switched_off = (
        run_script(tmp_path, c, **cache, **env)()
        for c, env in ((code, {}), (block + code, {}), (code, {"NUMBA_DISABLE_JIT": "1"}))
    )
    assert [backends for backends, _ in compiled] == [{"kernels"}] * 2
    assert [backends for backends, _ in arrays] == [{"arrays"}] * 2
    assert [backends for backends, _ in switched_off] == [{"arrays"}] * 2
    assert [h for _, h in compiled] == [h for _, h in arrays] == [h for _, h in switched_off]


def test_numba_is_imported_by_the_first_array_that_is_compiled_for(numba, tmp_path):
    code = """
        found = []
        for dtype in "c8", "g", ">f4", "f4":
            run(dtype)
            found.append("numba" in sys.modules)
        print(found)
    """
    assert run_script(tmp_path, code)() == [False, False, False, True]


HITS = 'done = run("f4")\nprint((done, [f.cache_hits for f in compiled._made.values()]))'


def test_compiled_steps_are_kept_on_disk(numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = run_script(tmp_path, HITS, **environment)()
    assert first[1] == [0]
    assert run_script(tmp_path, HITS, **environment)() == (first[0], [1])
    elsewhere = tmp_path / "elsewhere"  # the same step in another file
    elsewhere.mkdir()
    assert run_script(elsewhere, HITS, **environment)() == (first[0], [1])


def test_another_step_is_not_found_in_the_cache(numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = run_script(tmp_path, HITS, **environment)()
    changed = """
        class Mine(Mine):
            @staticmethod
            def step(x, dx, state, coefs):
                m, v = state
                b1, rest1, b2, rest2, rate, scale, epsilon = coefs
                m = b1 * m + rest1 * dx
                v = b2 * v + rest2 * abs2(dx)
                return rate * m / (scale * sqrt(v) + epsilon) - m, (m, v)
    """
    second = run_script(tmp_path, textwrap.dedent(changed) + HITS, **environment)()
    assert second[1] == [0]
    assert second[0][1] != first[0][1]


def test_several_processes_share_the_cache(numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    waiting = [run_script(tmp_path, HITS, **environment) for _ in range(3)]
    assert len({repr(result()[0]) for result in waiting}) == 1
    assert run_script(tmp_path, HITS, **environment)()[1] == [1]


def test_a_cache_that_is_forbidden_or_broken_is_done_without(numba, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    done, hits = run_script(tmp_path, HITS, NUMBA_CACHE_DIR=str(file))()
    assert (done[0], hits) == ({"kernels"}, [0])
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    run_script(tmp_path, HITS, **environment)()
    for path in (tmp_path / "cache").rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:50])
    assert run_script(tmp_path, HITS, **environment)()[0] == done


posix = pytest.mark.skipif(os.name == "nt", reason="folders of users are theirs on Windows")


@posix
@parametrize("mask", [0o000, 0o002, 0o022])
@parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_a_new_cache_is_its_owners_alone(variable, mask, numba, tmp_path):
    environment = {"NUMBA_CACHE_DIR": "", variable: str(tmp_path / "new" / "cache")}
    code = f"import os\nos.umask({mask})\n" + HITS
    tmp_path.chmod(0o700)
    first = run_script(tmp_path, code, **environment)()
    for at in (tmp_path / "new").rglob("*"):
        assert not at.stat().st_mode & 0o022, at
    assert (tmp_path / "new" / "cache" / "optimisers").stat().st_mode & 0o777 == 0o700
    assert run_script(tmp_path, code, **environment)() == (first[0], [1])


@posix
@parametrize("which", ["optimisers", "", ".."])
def test_a_cache_that_others_may_write_to_is_not_used(which, numba, tmp_path):
    folder = tmp_path / "cache" / "optimisers"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "cache" / which).chmod(0o777)
    code = """
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True) as seen:
            done = run("f4")
            run("f8")
        print((done[0], [str(one.message) for one in seen]))
    """
    used, messages = run_script(tmp_path, code, NUMBA_CACHE_DIR=str(tmp_path / "cache"))()
    assert used == {"kernels"}
    assert [*folder.iterdir()] == []
    (message,) = messages
    assert "others may write to" in message
    assert "NUMBA_CACHE_DIR" in message


@posix
def test_a_cache_of_another_user_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert step_cache.written("text", "one")
    me = os.stat(tmp_path).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    monkeypatch.setattr(step_cache, "_told", set())
    real = os.stat_result

    def others(path):
        info = list(real_stat(path))
        return real([*info[:4], me + 2, *info[5:]])

    real_stat = step_cache.Path.stat
    monkeypatch.setattr(step_cache.Path, "stat", others)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert step_cache.written("text", "one") is None


@posix
@parametrize("filled", [False, True])
def test_a_folder_of_numba_is_made_private_if_it_is_new(filled, tmp_path):
    folder = tmp_path / "made_by_numba"
    folder.mkdir()
    folder.chmod(0o777)
    if filled:
        (folder / "step.nbi").write_bytes(b"")
    assert step_cache.is_safe(str(folder)) is not filled


@parametrize(
    ("system", "variable", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/optimisers"),
        ("linux", {}, "~/.cache/optimisers"),
        ("darwin", {}, "~/Library/Caches/optimisers"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/optimisers"),
        ("win32", {}, "~/AppData/Local/optimisers"),
        ("linux", {"NUMBA_CACHE_DIR": "/n"}, "/n/optimisers"),
    ],
)
def test_where_the_cache_is(system, variable, expected, monkeypatch):
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert step_cache.cache_folder() == step_cache.Path(os.path.expanduser(expected))


# --- what is no step -------------------------------------------------------------------------

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
