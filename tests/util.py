"""What the tests share: rules from the registry, arrays in every layout, comparison of bits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import emit_steps
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    ElementwiseRule,
    Leaf,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    setup,
    trainables,
    update,
    update_,
)
from optimisers._arrays.dtypes import is_narrow, is_narrow_dtype
from optimisers._arrays.library import isnumeric
from optimisers._engine import advance as engine
from optimisers._trees.walks import fmap, walk
from optimisers.rules import _base, _fields, _numbers
from optimisers.rules._measure import needs_value

Tree = Any
Array = Any

# --- rules -----------------------------------------------------------------------------------

REGISTERED: list[Any] = _base.registry()
NEEDING_VALUE: list[Any] = [
    cls for cls in REGISTERED if issubclass(cls, ElementwiseRule) and needs_value(cls)
]
PUBLIC: list[Any] = [cls for cls in REGISTERED if cls not in NEEDING_VALUE]
"""Public rules, but for those that no update steps without the value of the loss."""
UNMEASURED: list[Any] = [
    cls for cls in PUBLIC if cls is ClipNorm or getattr(cls, "measure", None) is None
]
"""Those of them whose bits do not depend on the order in which a library sums, if none is clipped
by `ClipNorm`."""
ALONE: list[Any] = [cls for cls in PUBLIC if getattr(cls, "over", "") != "tree"]
"""Those of them whose step of an array does not depend on other arrays."""
# The registry hides what begins with an underscore, but the kernels run it all the same.
ELEMENTWISE: list[Any] = [
    cls
    for cls in _base._registry
    if issubclass(cls, ElementwiseRule) and not inspect.isabstract(cls) and cls.measure is None
]
MEASURING: list[Any] = [cls for cls in REGISTERED if getattr(cls, "measure", None) is not None]
"""Rules whose step needs numbers that are found over an array, axes of it, or the tree."""

REQUIRED: dict[str, Any] = {
    "n": 3,
    "factor": 0.4,
    "dtype": np.float32,
    "rule": Momentum(),
    "rules": (WeightDecay(0.1), Adam()),
}
"""A value for each argument that needs one, by name, over all rules."""


def example(cls: Any, **fields: Any) -> Any:
    """Return a rule of this class: its defaults, and `REQUIRED` where there is none."""
    args: list[Any] = []
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += REQUIRED[name]
        elif parameter.default is parameter.empty or name in REQUIRED:
            fields = {name: REQUIRED[name], **fields}
    return cls(*args, **fields)


def without_decay(rule: Any) -> Any:
    """Return a rule like this one, but for what draws a parameter to zero by itself."""
    fields = dict(rule.fields())
    switched = {"lambda_": 0.0, "constrained": False}
    return rule.adjust(**{name: off for name, off in switched.items() if name in fields})


def decomposes(rule: Any) -> bool:
    """Tell whether a rule decomposes matrices; the last places are then those of one LAPACK."""
    return type(rule).__module__ == "optimisers.rules.preconditioners"


def may_be_none(cls: Any, field: str) -> bool:
    """Tell whether a field of numbers of this class may be None."""
    limits = _fields._limits(cls).get(field)
    return limits is not None and limits.may_be_none


def moved(value: Any) -> Any:
    """Return a number near a default, so that no field hides behind a default of 0 or 1."""
    if isinstance(value, tuple):
        return tuple(map(moved, value))
    return (1.25 if value > 1 else 0.8) * value if value else 0.1


def variants(cls: Any) -> list[Any]:
    """Return rules of this class: its defaults, other numbers, and each switch the other way."""
    default = example(cls)
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    numbers = {n: moved(v) for n, v in fields.items() if isinstance(v, float | tuple)}
    switches = [{n: not v} for n, v in fields.items() if isinstance(v, bool)]
    if not numbers:
        return [default]
    return [default, *(example(cls, **numbers, **switch) for switch in [{}, *switches])]


EVERY_ELEMENTWISE: list[Any] = [rule for cls in ELEMENTWISE for rule in variants(cls)]

# What one loop does together with the rule that follows.
_LEADING: dict[str, Any] = {
    "ClipGrad": ClipGrad(0.7),
    "Scaling": ClipNorm(1.0, np.inf),
    "WeightDecay": WeightDecay(0.1),
}
_WORDS, *_RULES = [file.read_text() for file in emit_steps.FORMULAS]
STEPS: list[Any] = [
    step
    for text in _RULES
    for step in emit_steps.read_steps(text, emit_steps.language.read_words(_WORDS))
]
"""The steps of the library's rules, as the generator reads them."""

LEADS: list[list[Any]] = [
    [_LEADING[step.rule] for step in lead] for lead in emit_steps.find_leads(STEPS)
]

# Norms of order inf are the same bits in every order of evaluation, so whole chains are, too.
EXACT_CHAINS: list[Any] = [
    *(OptimiserChain(*lead, example(c)) for c in ELEMENTWISE for lead in LEADS[:2]),
    *(
        OptimiserChain(example(c), ClipNorm(1e-3, -np.inf), WeightDecay(0.1))
        for c in ELEMENTWISE
        if not c._owns_parameter
    ),
    OptimiserChain(),
    OptimiserChain(OptimiserChain(), OptimiserChain(Adam(), OptimiserChain(Momentum()))),
    AccumGrad(1),
    AccumGrad(3),
    OptimiserChain(AccumGrad(2), Adam()),
    OptimiserChain(Momentum(), OptimiserChain(AccumGrad(2), ClipNorm(0.1, 0)), Adam()),
    OptimiserChain(AccumGrad(2), AccumGrad(2), WeightDecay(0.1)),
    OptimiserChain(ClipNorm(1.0, np.inf), Adam(), ClipNorm(1e-4, np.inf), Momentum()),
]


def name_of(x: Any) -> str:
    """Return a readable name for a parameter of a test, the same in every process."""
    text = repr(x) if isinstance(x, Rule) else getattr(x, "__name__", str(x))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def parametrize(name: str, values: Iterable[Any]) -> pytest.MarkDecorator:
    """Do what `pytest.mark.parametrize` does, with readable names."""
    return pytest.mark.parametrize(name, list(values), ids=name_of)


# --- attacks ---------------------------------------------------------------------------------


def many(test: Callable[..., None]) -> Callable[..., None]:
    """Make some hundred examples for a test of Hypothesis, and 20,000 in `make attack`."""
    count = max(300, settings.default.max_examples)
    checks = list(HealthCheck)
    setting = settings(
        max_examples=count, deadline=None, suppress_health_check=checks, print_blob=True
    )
    return pytest.mark.attack(setting(test))


# --- numbers ---------------------------------------------------------------------------------


def normal(shape: Any, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    """Return finite numbers of many magnitudes, with some zeros among them."""
    return _drawn(shape, np.dtype(dtype), seed).copy()


def beginning_at(byte: int, array: np.ndarray) -> np.ndarray:
    """Return a copy that begins so many bytes after a cache line, with zeros around it."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    first = (byte - memory.ctypes.data) % 64
    copied = memory[first : first + array.nbytes].view(array.dtype)
    copied[:] = array
    return copied


@functools.lru_cache(maxsize=1000)
def _drawn(shape: Any, dtype: np.dtype, seed: int) -> np.ndarray:
    draw = np.random.default_rng([seed, *np.atleast_1d(shape)])

    def real() -> np.ndarray:
        size = 10.0 ** draw.uniform(-2, 2, shape)
        return np.asarray(draw.standard_normal(shape) * size * (draw.random(shape) > 0.05))

    values = real() + 1j * real() if dtype.kind == "c" else real()
    return np.asarray(values, dtype)


def special(dtype: Any) -> np.ndarray:
    """Return the numbers that formulas stumble over."""
    info = np.finfo(dtype)
    tiny, small, huge = info.smallest_subnormal, info.tiny, info.max
    positive = [0.0, tiny, 7 * tiny, small, info.eps, 1.0, 1.5, huge / 2, huge, np.inf]
    return np.array([s * v for v in positive for s in (1, -1)] + [np.nan], dtype)


def special_pairs(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return every special number beside every other; narrow dtypes have those of float16, too."""
    if is_narrow_dtype(np.dtype(dtype)):
        info = pytest.importorskip("ml_dtypes").finfo(dtype)
        extreme = [info.smallest_subnormal, info.smallest_normal, info.max, -info.max]
        values = np.concatenate([special(np.float16).astype(dtype), np.array(extreme, dtype)])
    else:
        values = special(dtype)
    x, g = np.meshgrid(values, values)
    return x.ravel(), g.ravel()


@dataclasses.dataclass(frozen=True)
class Average(ElementwiseRule):
    """A user's rule: the step is an average of gradients."""

    slots = ("m",)

    def coefs(self) -> tuple[float, float]:
        return 0.75, 0.25

    @staticmethod
    def step(x: Any, dx: Any, state: Any, coefs: Any) -> Any:
        (m,) = state
        keep, rest = coefs
        m = keep * m + rest * dx
        return m, (m,)


# --- layouts ---------------------------------------------------------------------------------


def _strided(a: np.ndarray) -> np.ndarray:
    room = np.empty([2 * n + 1 for n in a.shape], a.dtype)
    view = room[tuple(slice(0, 2 * n, 2) for n in a.shape)]
    view[...] = a
    return view


def _reversed(a: np.ndarray) -> np.ndarray:
    return a[(slice(None, None, -1),) * a.ndim].copy()[(slice(None, None, -1),) * a.ndim]


def _broadcast(a: np.ndarray) -> np.ndarray:
    return np.broadcast_to(a[:1].copy(), a.shape)


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def _unaligned(a: np.ndarray) -> np.ndarray:
    room = np.empty(a.nbytes + 1, np.uint8)
    view = room[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: np.array(a, order="C"),
    "Fortran": lambda a: np.array(a, order="F"),
    "strided": _strided,
    "reversed": _reversed,
    "broadcast": _broadcast,
    "read-only": _read_only,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": _unaligned,
}
KERNEL_LAYOUTS = {"C", "Fortran", "read-only"}
"""Layouts in which the kernels take a parameter; they take gradients in any."""


def layouts_of(dtype: Any) -> list[str]:
    """Return the layouts that this dtype can have."""
    swaps = np.dtype(dtype).newbyteorder() != np.dtype(dtype)
    return [name for name in LAYOUTS if swaps or name != "byte-swapped"]


# --- comparing -------------------------------------------------------------------------------


def arrays_in(tree: Any) -> Iterator[tuple[str, Array]]:
    """Yield every array of a tree, those in states of leaves included, with its place."""
    for path, x in walk(tree):
        if isinstance(x, Leaf):
            yield from ((f"{path} state{below}", a) for below, a in arrays_in(x.state))
        elif isinstance(x, np.ndarray | np.generic):
            yield str(path), x


def bits(a: Any) -> tuple[Any, ...]:
    """Return what must agree for two arrays to be the same, all NaNs being alike."""
    a = np.asarray(a)
    content: list[Any] = [a.shape, a.dtype]
    for part in (a.real, a.imag) if a.dtype.kind == "c" else (a,):
        flat = part.astype(part.dtype.newbyteorder("=")).reshape(-1)
        flat[flat != flat] = 0
        content += [_digits(flat), (part != part).tobytes()]
    return tuple(content)


def _digits(a: np.ndarray) -> bytes:
    """Return bytes in which no two different numbers agree."""
    if a.dtype != np.longdouble:
        return a.tobytes()
    found = b""  # a wider number has bytes that mean nothing, but its parts in double are unique
    with np.errstate(invalid="ignore"):
        part, exponent = np.frexp(a)
        for _ in range(3):
            double = part.astype(np.float64)
            found += double.tobytes()
            part = part - double
    return found + exponent.tobytes()


def arrays_alone(tree: Tree) -> Tree:
    """Return a tree with None for all but arrays of floating numbers, as a gradient has it."""
    return fmap(lambda x: x if isnumeric(x) else None, tree)


def assert_same_bits(got: Tree, expected: Tree) -> None:
    """Compare two trees of arrays (or states): same places, shapes, dtypes and bits."""
    _compare(got, expected, lambda a, b: bits(a) == bits(b))


def assert_same_values(got: Tree, expected: Tree) -> None:
    """Compare two trees of arrays (or states): same places, shapes, dtypes; NaN equals NaN."""

    def same(a: Array, b: Array) -> bool:
        a, b = np.asarray(a), np.asarray(b)
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and bool(np.all((a == b) | ((a != a) & (b != b))))
        )

    _compare(got, expected, same)


def assert_near(got: Tree, expected: Tree) -> None:
    """Compare two trees of arrays (or states) but for the last places of the largest numbers."""

    def near(a: Array, b: Array) -> bool:
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype.kind not in "fc":
            return bits(a) == bits(b)
        room = 8 * np.finfo(a.dtype).eps * np.max(np.abs(b), initial=0)
        return bool(np.all((abs(a - b) <= room) | ((a != a) & (b != b))))

    _compare(got, expected, near)


def _compare(got: Tree, expected: Tree, same: Callable[[Array, Array], bool]) -> None:
    got_arrays, expected_arrays = list(arrays_in(got)), list(arrays_in(expected))
    assert [p for p, _ in got_arrays] == [p for p, _ in expected_arrays]
    for (place, a), (_, b) in zip(got_arrays, expected_arrays, strict=True):
        if not same(a, b):
            raise AssertionError(
                f"at {place}:\ngot      {a!r}\nexpected {b!r}{_first_difference(a, b)}"
            )


def _first_difference(a: Array, b: Array) -> str:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"\nshapes {a.shape} and {b.shape}, dtypes {a.dtype} and {b.dtype}"
    for at in np.ndindex(a.shape):
        if bits(a[at]) != bits(b[at]):
            return f"\nfirst at {at}: {a[at]!r} and {b[at]!r}"
    return ""


def snapshot(tree: Tree) -> list[Any]:
    """Return all that can change in a tree: arrays bit by bit, rules, counts, what is frozen."""
    found: list[Any] = []
    for path, x in walk(tree):
        if isinstance(x, Leaf):
            found.append((str(path), id(x), repr(x.rule), x.frozen, snapshot(x.state)))
        elif isinstance(x, np.ndarray):
            found.append((str(path), id(x), x.strides, x.flags.writeable, bits(x)))
        else:
            found.append((str(path), repr(x)))
    return found


def share_memory(one: Tree, other: Tree) -> list[tuple[str, str]]:
    """Return the places of arrays in two trees that have memory in common."""
    return [
        (p, q)
        for p, a in arrays_in(one)
        for q, b in arrays_in(other)
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.shares_memory(a, b)
    ]


# --- steps -----------------------------------------------------------------------------------


def by_arrays(rule: Any, state: Any, x: Array, g: Array) -> tuple[Any, Array]:
    """Return state and parameter after one array evaluation, which every backend must equal."""
    x = np.array(x, x.dtype.newbyteorder("="))
    with np.errstate(all="ignore"):
        g = np.array(g).astype(np.float32 if is_narrow(x) else x.dtype)
        state, new = _numbers.moved(rule, copy.deepcopy(state), x, g)
        new = x if new is None else np.asarray(new)
    return state, new


def step(call: Any, state: Tree, model: Tree, *grads: Tree) -> tuple[Tree, Tree, dict[str, str]]:
    """Return what `update` or `update_` gives, and the backend for each place by its path."""
    paths = [str(path) for path, _ in trainables(model, path=True)]
    with engine.watching() as seen:
        state, model = call(state, model, *grads)
    assert len({k for k, _ in seen}) == len(seen), "a leaf was updated twice"
    return state, model, {paths[k]: backend for k, backend in seen}


def checked_steps(call: Any, rule: Any, model: Tree, gradients: Iterable[Tree], same: Any) -> Any:
    """Take steps over a dictionary of arrays and compare each with the array evaluation.

    Returns the backends that each path saw, such as "kernels", or "arrays, kernels".
    """
    state = setup(rule, model)
    used: dict[str, set[str]] = {}
    for grad in gradients:
        expected = {k: by_arrays(rule, state[k].state, x, grad[k]) for k, x in model.items()}
        state, model, backends = step(call, state, model, grad)
        for path, backend in backends.items():
            used.setdefault(path, set()).add(backend)
        same({k: leaf.state for k, leaf in state.items()}, {k: e[0] for k, e in expected.items()})
        same({k: native(x) for k, x in model.items()}, {k: e[1] for k, e in expected.items()})
    return {path: ", ".join(sorted(backends)) for path, backends in used.items()}


def native(x: Array) -> Array:
    """Return an array in native byte order."""
    return x.astype(x.dtype.newbyteorder("="))


BOTH = pytest.mark.parametrize("call", [update, update_])
FORKS_WITH_THREADS = pytest.mark.skipif(
    not hasattr(os, "fork") or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="needs fork, and an allocator that no thread holds at a fork, as GCC's checked one may",
)
