"""The numbers and decisions of a rule while JAX traces; nothing of JAX is imported.

a) A hyperparameter that crosses into a traced function becomes an array, in float32 unless JAX is
   set to 64 bits. In float32 the 0.999 of Adam is off by 1e-8, which is harmless, but so is its
   ``1 - 0.999``, and that is a relative error of 1e-5. So a number crosses as two: its value in
   float32 (``high``), and the rest (``low``). Inside, the two are a `Number`.
b) The coefs of a step are computed from both parts, in double (`double`, `lifted`), and then cast
   once, as on the host: they are a few scalars for each array. In a step they meet arrays of other
   dtypes, which JAX may be set to refuse; `promoting` allows it.
c) Whether a rule makes a step may be traced (`AccumGrad`), or mapped by ``torch.vmap``. Then the
   step is a `Maybe`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import importlib
import math
import numbers
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np

from .library import is_abstract, isnumeric
from .states import map_state, parts_of_state

Array = Any
T = TypeVar("T")


def is_jax(x: object) -> bool:
    """Tell whether `x` is an array of JAX, traced or not."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, (jax.Array, jax.core.Tracer))


def is_tracer(x: object) -> bool:
    """Tell whether `x` stands for an array that JAX computes only later."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


# --- numbers in two parts --------------------------------------------------------------------


class Number:
    """A hyperparameter that JAX holds, in two parts; it calculates like the number it stands for.

    It is traced, or one for each of many models (`jax.vmap`); from known parts, `number_of` makes
    a float. The parts may be any objects, since JAX builds trees of any objects. Parts in the
    vector of a leaf are taken out of it at each access, not before: code inside a branch of
    `jax.lax.cond` may be the first to access one, and the part must not outlive the branch.
    """

    __slots__ = ("_high", "_low", "packed")

    def __init__(self, high: Any, low: Any, packed: Packed | None = None) -> None:
        self._high = high
        self._low = low
        self.packed = packed

    @property
    def high(self) -> Any:
        return self._high if self.packed is None else self.packed.part(self._high)

    @property
    def low(self) -> Any:
        return self._low if self.packed is None else self.packed.part(self._low)

    @property
    def is_traced(self) -> bool:
        if self.packed is not None:
            return is_tracer(self.packed.vector)
        return is_tracer(self.high) or is_tracer(self.low)

    @property
    def is_scalar(self) -> bool:
        return getattr(self.high, "ndim", 0) == 0

    def value(self) -> Any:
        """Return an ordinary number, or an array of JAX where it is traced or not a scalar."""
        if self.is_traced or not self.is_scalar:
            return self.high + self.low
        return _whole(self.high, self.low)

    def __jax_array__(self) -> Array:
        return sys.modules["jax"].numpy.asarray(self.value())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Calculate for NumPy, by its function of that name or, while JAX traces, by JAX's."""
        values = [x.value() if isinstance(x, Number) else x for x in inputs]
        if any(map(is_tracer, values)):
            own = getattr(sys.modules["jax"].numpy, ufunc.__name__, None)
            return NotImplemented if own is None or method != "__call__" else own(*values)
        return getattr(ufunc, method)(*values, **options)

    def __float__(self) -> float:
        return float(self.value())

    def __int__(self) -> int:
        return int(self.value())

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(self.value(), ndigits)

    def __format__(self, spec: str) -> str:
        return format(self.value(), spec)

    def __bool__(self) -> bool:
        return bool(self.value())

    def __hash__(self) -> int:
        return hash(self.value())

    def __repr__(self) -> str:
        known = is_jax(self.high) and is_jax(self.low) and not self.is_traced
        return repr(self.value()) if known else f"Number({self.high!r}, {self.low!r})"


def _forward(name: str) -> Callable[..., Any]:
    calculate = getattr(operator, name)

    def method(self: Number, other: Any) -> Any:
        return calculate(self.value(), other.value() if isinstance(other, Number) else other)

    return method


def _backward(name: str) -> Callable[..., Any]:
    calculate = getattr(operator, name)
    return lambda self, other: calculate(other, self.value())


def _alone(name: str) -> Callable[..., Any]:
    calculate = getattr(operator, name)
    return lambda self: calculate(self.value())


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Number, f"__{_name}__", _forward(f"__{_name}__"))
    setattr(Number, f"__r{_name}__", _backward(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", _forward(f"__{_name}__"))
for _name in ("neg", "pos", "abs"):
    setattr(Number, f"__{_name}__", _alone(f"__{_name}__"))
for _name, _calculate in (("trunc", math.trunc), ("floor", math.floor), ("ceil", math.ceil)):
    setattr(Number, f"__{_name}__", lambda self, calculate=_calculate: calculate(self.value()))


def _divmod(self: Number, other: Any) -> Any:
    return divmod(self.value(), other.value() if isinstance(other, Number) else other)


cast(Any, Number).__divmod__ = _divmod
cast(Any, Number).__rdivmod__ = lambda self, other: divmod(other, self.value())
numbers.Real.register(Number)


def parts_of(value: Any) -> tuple[Any, Any]:
    """Return the two parts of a number, in which it crosses into JAX."""
    if type(value) is Number:
        return value.high, value.low
    if not isinstance(value, (float, int)):
        return value, 0.0
    high = ctypes.c_float(value).value
    return high, value - high if math.isfinite(high) else 0.0


def at(vector: Any, k: int) -> Any:
    """Return an element of a vector, or of each of many; without the checks of indexing."""
    if isinstance(vector, np.ndarray):
        return vector[..., k]
    lax = cast(Any, sys.modules["jax"]).lax
    return lax.index_in_dim(vector, k, vector.ndim - 1, keepdims=False)


class Packed(ABC):
    """The numbers and the counts of a leaf in one vector, since JAX takes time for each array.

    First the high parts of the numbers, then the low parts, then each count as two whole numbers,
    of which the second is below 2**16: floats, so that derivatives by the numbers go through.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def vector(self) -> Any:
        """Return the vector."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Return how many numbers there are."""

    @property
    def is_traced(self) -> bool:
        """Tell whether JAX computes the numbers and counts only later."""
        return is_tracer(self.vector)

    def holds_arrays(self) -> bool:
        """Tell whether the vector is an array; JAX builds trees of any objects."""
        vector = self.vector
        return (isinstance(vector, np.ndarray) or is_jax(vector)) and vector.ndim > 0

    def part(self, k: int) -> Any:
        return at(self.vector, k) if self.holds_arrays() else self.vector

    def numbers(self) -> list[Any]:
        """Return the numbers: as numbers of Python if they are known."""
        n = self.length
        if n and self.holds_arrays() and not is_tracer(self.vector) and self.vector.ndim == 1:
            vector = np.asarray(self.vector)
            return [number_of(vector[k], vector[n + k]) for k in range(n)]
        return [Number(k, n + k, self) for k in range(n)]

    def count(self, k: int, like: Any) -> Any:
        """Return a count, by the library of `like`, an array of the state."""
        if not self.holds_arrays():
            return self.vector
        vector, high = self.vector, 2 * (self.length + k)
        if isinstance(vector, np.ndarray):
            count = vector[..., high].astype(np.int64) * _BASE + vector[..., high + 1].astype(int)
            jax = cast(Any, sys.modules.get("jax"))
            return jax.numpy.asarray(count) if is_jax(like) else np.asarray(count)
        whole = np.int32 if vector.dtype == np.float32 else np.int64
        return at(vector, high).astype(whole) * _BASE + at(vector, high + 1).astype(whole)

    def counts(self) -> Any:
        """Return the end of the vector, where the counts are."""
        vector = self.vector
        if isinstance(vector, np.ndarray):
            return vector[..., 2 * self.length :]
        lax = cast(Any, sys.modules["jax"]).lax
        axis = vector.ndim - 1
        return lax.slice_in_dim(vector, 2 * self.length, vector.shape[axis], axis=axis)

    def counting(self, counts: Sequence[Any]) -> Any:
        """Return the vector with other counts, which are known or have its leading axes."""
        if not counts:
            return self.vector
        end = parts_of_counts(counts, self.vector.dtype)
        if isinstance(end, np.ndarray) and not is_tracer(self.vector):
            return np.concatenate([np.asarray(self.vector)[..., : 2 * self.length], end], axis=-1)
        jax = cast(Any, sys.modules["jax"])
        vector = jax.numpy.asarray(self.vector)
        numbers = jax.lax.slice_in_dim(vector, 0, 2 * self.length, axis=vector.ndim - 1)
        return jax.numpy.concatenate([numbers, end], axis=-1)


_BASE = 2**16


def is_one_float(value: Any) -> bool:
    """Tell whether a value is one float, of Python, NumPy or JAX, which a vector can hold."""
    if isinstance(value, (float, np.floating)):
        return True
    parts = (value.high, value.low) if type(value) is Number else (value,)
    return all(
        isinstance(part, (float, np.floating))
        or (is_jax(part) and part.ndim == 0 and isnumeric(part) and part.dtype.kind != "c")
        for part in parts
    )


def is_count(t: Any) -> bool:
    """Tell whether an object in the position of a count is one that a vector can hold."""
    if isinstance(t, (np.ndarray, np.generic)) or is_jax(t):
        return t.ndim == 0 and t.dtype.kind in "iu"
    return type(t) is int


def of_jax(values: Iterable[Any]) -> list[Any]:
    """Return those values that are arrays of JAX."""
    return [value for value in values if is_jax(value)]


def root(x: Any) -> Any:
    """Return the square root of a number of `coefs`.

    While JAX traces, by its own function: the derivative of its power in double is refused where
    JAX takes it later, as of a loop.
    """
    return cast(Any, sys.modules["jax"]).lax.sqrt(x) if is_tracer(x) else x**0.5


def inverse_root(x: Any) -> Any:
    """Return one over the square root of a number of `coefs`, like `root`."""
    return cast(Any, sys.modules["jax"]).lax.rsqrt(x) if is_tracer(x) else x**-0.5


def doubles_of(vector: Any, n: int) -> Any:
    """Return the `n` numbers of a vector in double; to be called within `double`."""
    lax, wide = cast(Any, sys.modules["jax"]).lax, vector.astype(np.float64)
    axis = wide.ndim - 1
    return lax.slice_in_dim(wide, 0, n, axis=axis) + lax.slice_in_dim(wide, n, 2 * n, axis=axis)


def packed(numbers: Sequence[Any], counts: Sequence[Any], end: Any = None) -> Any:
    """Return the vector of numbers and counts, or of numbers and the end of another vector.

    It is NumPy's where all are known, in double, so that nothing is lost before JAX takes it.
    """
    parts = [*zip(*map(parts_of, numbers), strict=True)] or [(), ()]
    flat = [*parts[0], *parts[1]]
    if not any(map(is_tracer, (*flat, *counts, end))):
        if end is None:
            end = parts_of_counts(counts, np.float64)
        return np.concatenate([np.array([*map(float, flat)], np.float64), np.asarray(end)])
    jnp = cast(Any, sys.modules["jax"]).numpy
    real = jnp.result_type(float)
    if end is None:
        end = parts_of_counts(counts, real)
    firsts = [jnp.asarray(part, real).reshape(1) for part in flat]
    return jnp.concatenate([*firsts, jnp.asarray(end, real)])


def parts_of_counts(counts: Sequence[Any], dtype: Any) -> Any:
    """Return the two parts of each count, one after the other, along the last axis."""
    if not any(map(is_jax, counts)):
        whole = np.stack([*map(np.asarray, counts)], axis=-1) if counts else np.zeros(0, np.int64)
        parts = np.stack([whole >> 16, whole & (_BASE - 1)], axis=-1)
        return parts.reshape(*whole.shape[:-1], 2 * len(counts)).astype(dtype)
    jnp = cast(Any, sys.modules["jax"]).numpy
    if not any(map(is_tracer, counts)) and all(np.ndim(count) == 0 for count in counts):
        return parts_of_counts([np.asarray(count) for count in counts], dtype)
    halves = [half for t in map(jnp.asarray, counts) for half in (t >> 16, t & (_BASE - 1))]
    return jnp.stack([half.astype(dtype) for half in halves], axis=-1)


def number_of(high: Any, low: Any) -> Any:
    """Return the number that has these parts: one of Python if both are known."""
    if type(low) is float and not isinstance(high, (float, np.generic)):
        if low == 0.0 and hasattr(high, "dtype"):
            return high
    elif _is_known(high) and _is_known(low):
        whole = not isinstance(high, float) and high.dtype.kind in "biuc"
        return high.item() if whole else _whole(high, low)
    return Number(high, low)


def _is_known(x: object) -> bool:
    if isinstance(x, (np.ndarray, np.generic)):
        return x.ndim == 0 and x.dtype.kind in "biufcV" and x.dtype.names is None
    return isinstance(x, float) or (is_jax(x) and not is_tracer(x) and cast(Any, x).ndim == 0)


def _whole(high: Any, low: Any) -> float:
    """Return the sum of two parts; where `low` was rounded, a near decimal number with few digits.

    So a number comes back from JAX as it was written, 0.001 and not 0.0010000000000000009.
    """
    value = float(high) + float(low)
    if not isinstance(low, float) and low.dtype != np.float64:
        short = float(f"{value:.13g}")
        if abs(short - value) <= abs(value) * 2.0**-48:
            return short
    return value


def is_boxed_container(x: object) -> bool:
    """Tell whether `x` is the box of a container in HIPS autograd."""
    return type(x).__module__ == "autograd.builtins"


WHY_UNSAVABLE = "it is being traced: save outside the function that is differentiated or compiled"
"""Why a file cannot hold an array that stands for another."""


def is_symbolic_zero(g: Any) -> bool:
    """Tell whether `g` is JAX's mark for no gradient."""
    if type(g).__name__ in ("SymbolicZero", "Zero") and type(g).__module__.startswith("jax"):
        return True
    return getattr(getattr(g, "dtype", None), "names", None) == ("float0",)


def differentiable_sqrt(xp: Any, x: Array) -> Array:
    """Return the square root by the functions of `xp`; its derivative at 0 is 0."""
    zero = x == 0
    return xp.where(zero, x * 0, xp.sqrt(xp.where(zero, xp.ones_like(x), x)))


# --- in double -------------------------------------------------------------------------------


def double() -> AbstractContextManager[None]:
    """Return a context in which JAX computes in double, also where it is not set to 64 bits."""
    jax = cast(Any, sys.modules["jax"])
    context = getattr(jax, "enable_x64", None)
    if context is None:  # in older versions
        context = importlib.import_module("jax.experimental").enable_x64
    return cast("AbstractContextManager[None]", context(True))


def promoting() -> AbstractContextManager[Any]:
    """Return a context in which dtypes may mix, also under JAX's strict promotion."""
    jax = cast(Any, sys.modules.get("jax"))
    if jax is None or jax.config.jax_numpy_dtype_promotion == "standard":
        return contextlib.nullcontext()
    return cast("AbstractContextManager[None]", jax.numpy_dtype_promotion("standard"))


def attributes(rule: Any) -> dict[str, Any]:
    """Return the attributes of a rule by name: its fields, and others that it was given."""
    state = cast(Any, object.__getstate__(rule))
    if type(state) is not tuple:
        return state or {}
    own, slots = state
    return {**(own or {}), **slots}


def with_attributes(rule: T, change: Callable[[Any], Any]) -> T:
    """Return a copy of a rule with other attributes; itself if `change` gives back each."""
    own = attributes(rule)
    new = {name: change(value) for name, value in own.items()}
    if all(new[name] is value for name, value in own.items()):
        return rule
    rule = copy.copy(rule)
    for name, value in new.items():
        object.__setattr__(rule, name, value)
    return rule


def holds_traced(value: Any) -> bool:
    """Tell whether JAX traces a number in `value`."""
    return any(map(_is_traced, parts_of_state(value, (tuple, list))))


def _is_traced(value: Any) -> bool:
    return value.is_traced or not value.is_scalar if type(value) is Number else is_tracer(value)


def needs_double(rule: Any, t: Any) -> bool:
    """Tell whether JAX traces a number of a rule, or the count `t` of its steps."""
    return is_tracer(t) or any(map(holds_traced, attributes(rule).values()))


def lifted_count(t: Any) -> Any:
    """Return a count in 64 bits, so that t + 1 is more, and 2 t too; to be called in `double`."""
    return t.astype(np.int64) if is_jax(t) else t


def holds_abstract(value: Any) -> bool:
    """Tell whether JAX traces, or ``torch.vmap`` maps, a number in `value`."""
    return any(map(is_abstract, parts_of_state(value, tuple)))


def settled(value: Any) -> Any:
    """Return an ordinary number for a `Number` that is known; other values as they are."""
    return map_state(_settled, value, into=(tuple, list))


def _settled(value: Any) -> Any:
    return value if type(value) is not Number or holds_traced(value) else value.value()


def common_vector(rule: Any, x: Array) -> Packed | None:
    """Return the vector with all traced numbers of the rule of a JAX array, or None."""
    if not is_jax(x):
        return None
    found: Packed | None = None
    for part in parts_of_state(tuple(attributes(rule).values()), (tuple, list)):
        if type(part) is Number:
            if part.packed is None or (found is not None and part.packed is not found):
                return None
            found = part.packed
        elif is_jax(part):
            return None
    return found if found is not None and is_tracer(found.vector) else None


def differentiated_in_double(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return a function that may compute in double, and whose derivatives then do, too.

    JAX may differentiate what it has traced later, when it is not set to 64 bits any more. Its own
    derivatives of doubles are then rounded on the way.
    """
    jax = cast(Any, sys.modules["jax"])
    made: Any = jax.custom_jvp(function)

    def derivative(given: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        n = len(given)
        both = differentiated_in_double(lambda *args: jax.jvp(function, args[:n], args[n:]))
        return both(*given, *tangents)

    made.defjvp(derivative)
    return cast("Callable[..., Array]", made)


def lifting() -> Callable[[Any], Any]:
    """Return a function that makes doubles of traced numbers; call and use it within `double`."""
    known: dict[int, Any] = {}  # the numbers of a vector in double, so that each is cast once
    return lambda value: map_state(partial(_lifted, known), value, into=(tuple, list))


class _Place(int):
    """The position of a number in the vector of a leaf, in place of the number."""


def detached(value: Any) -> Any:
    """Return a value with positions in place of the numbers of a vector."""

    def place(part: Any) -> Any:
        return _Place(part._high) if type(part) is Number else part

    return map_state(place, value, into=(tuple, list))


def attaching(vector: Any, length: int) -> Callable[[Any], Any]:
    """Return a function that puts doubles from a vector in these positions, within `double`."""
    doubles = doubles_of(vector, length)

    def number(part: Any) -> Any:
        return at(doubles, part) if type(part) is _Place else part

    return lambda value: map_state(number, value, into=(tuple, list))


def _lifted(known: dict[int, Any], value: Any) -> Any:
    if type(value) is Number:
        if (packed := value.packed) is not None and is_jax(packed.vector):
            if id(packed) not in known:
                known[id(packed)] = doubles_of(packed.vector, packed.length)
            return at(known[id(packed)], value._high)
        jnp = sys.modules["jax"].numpy
        return sum(jnp.asarray(part).astype(jnp.float64) for part in (value.high, value.low))
    if is_tracer(value) and value.dtype.kind == "f":
        return value.astype(sys.modules["jax"].numpy.float64)
    return value


# --- narrow numbers --------------------------------------------------------------------------


def widened(x: Array) -> Array:
    """Return float32 of narrower numbers that are traced; derivatives back stay finite.

    The derivative of a step by its gradient may be large, as 1e5 for Adam where the gradient was
    zero. Beyond the largest number of float16 it would be infinite, and NaN times that zero.
    """
    return _widening().bind(x)


@functools.cache
def _widening() -> Any:
    """Return the primitive: a cast whose transpose is clipped to the range of the narrow dtype."""
    jax = cast(Any, sys.modules["jax"])
    ad, batching, mlir = (
        importlib.import_module(f"jax.interpreters.{name}") for name in ("ad", "batching", "mlir")
    )
    primitive: Any = importlib.import_module("jax.extend.core").Primitive("optimisers_widened")

    def wide(x: Array) -> Array:
        return jax.lax.convert_element_type(x, np.float32)

    def transposed(derivative: Array, x: Any) -> list[Array]:
        dtype = x.aval.dtype
        most = float(jax.numpy.finfo(dtype).max)
        bounded = jax.numpy.clip(derivative, -most, most)
        return [jax.lax.convert_element_type(bounded, dtype)]

    primitive.def_impl(wide)
    primitive.def_abstract_eval(lambda x: x.update(dtype=np.dtype(np.float32), weak_type=False))
    ad.deflinear2(primitive, transposed)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(wide, multiple_results=False))
    return primitive


# --- perhaps a step --------------------------------------------------------------------------


class Maybe(SimpleNamespace):
    """A step, and whether it is made; `apply` returns it where JAX computes that only later."""

    step: Array
    made: Array


def chosen(made: Array, new: T, old: T) -> T:
    """Return `new` where `made` says so, else `old`, in each array of a tree of JAX or PyTorch."""
    if not is_jax(made):
        where = sys.modules["torch"].where
        return cast(T, map_state(lambda a, b: where(made, b, a), old, new, into=tuple))
    jax = cast(Any, sys.modules["jax"])
    return cast(T, jax.tree_util.tree_map(lambda a, b: jax.numpy.where(made, a, b), new, old))
