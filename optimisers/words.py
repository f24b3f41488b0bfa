"""The vocabulary of a step: the only functions that a rule's formula may call.

Each word works elementwise on any array that knows its namespace: NumPy arrays of every dtype,
JAX arrays and tracers, PyTorch tensors, CuPy arrays, HIPS-autograd boxes. Compiled code has the
words for one number, with the same values, special values included: ``sign(nan)`` is nan,
``maximum`` and ``minimum`` pass nan on, ``sign(0)`` is 0.

A step is written with these words and the operators ``+ - * /`` and ``< <= > >=``:

>>> from optimisers.words import sqrt, abs2
>>> import numpy as np
>>> abs2(np.array([3 + 4j, 1j])), sqrt(np.array([4.0, 9.0]))
(array([25.,  1.]), array([2., 3.]))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ._arrays.library import beside, common_namespace, library_for, namespace

__all__ = [
    "abs2",
    "absolute",
    "clip",
    "ema_weight",
    "largest",
    "maximum",
    "minimum",
    "norm",
    "sign",
    "sqrt",
    "where",
    "zeros_like",
]

# Named here since `X | Y` is made anew each time it is evaluated.
_WHOLE = (int, np.integer)
_REAL = (float, int, np.floating, np.integer)

TEXTS: dict[Callable[..., Any], str] = {}
"""The words of a step, each with its text for one number."""

DEVICE_TEXTS: dict[Callable[..., Any], str] = {}
"""The texts of words that have another one on CUDA devices."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _step_word(text: str, on_device: str = "") -> Callable[[_Function], _Function]:
    """Make a function a word of steps, which compiled code computes for one number by `text`.

    Where CUDA devices need another form, with the same values, `on_device` is their text.

    A text is an expression of the arguments, or lines of which the last returns one. Its numbers
    have the type of the arguments. It may call a function of C by a name that Python's `math` and
    NumPy have for it, too. An argument that stands alone behind `if` is a comparison. There is
    neither `or` nor `and`, so that compilers make it vector instructions.

    The values are NumPy's, bit for bit. A function that C and NumPy round differently, as `exp`,
    would give rules other last bits on other engines.

    tools/emit_steps.py reads the texts here, from the syntax tree, and writes them as Cython;
    `_steps.compiled` makes functions of them, for Numba on the CPU and for CUDA.
    """

    def register(function: _Function) -> _Function:
        TEXTS[function] = text
        if on_device:
            DEVICE_TEXTS[function] = on_device
        return function

    return register


def is_complex(x: Any) -> bool:
    """Tell whether `x` holds complex numbers."""
    if isinstance(x.dtype, np.dtype):  # so are those of JAX, CuPy and autograd
        return x.dtype.kind == "c"
    return bool(namespace(x).isdtype(x.dtype, "complex floating"))


def _real(x: Any) -> Any:
    return namespace(x).real(x) if hasattr(x, "dtype") and is_complex(x) else x


@_step_word("sqrt(x)")
def sqrt(x: Any) -> Any:
    """Square root; its derivative at 0 is 0, so that one through a rule is finite there.

    A second moment of 0 means that no gradient has come yet, and then the parameter stays where it
    is; the slope of the root alone is infinite, and times 0 not a number.
    """
    return library_for(x).sqrt(x)


@_step_word("fabs(x)")
def absolute(x: Any) -> Any:
    """Absolute value, ``|x|``; real for complex `x`."""
    return namespace(x).abs(x)


@_step_word("x * x")
def abs2(x: Any) -> Any:
    """Squared absolute value, ``|x|²``; real for complex `x`."""
    if is_complex(x):
        xp = namespace(x)
        re, im = xp.real(x), xp.imag(x)
        return re * re + im * im
    return x * x


@_step_word("1 if x > 0 else -1 if x < 0 else x + 0")  # nan stays nan, -0 becomes 0
def sign(x: Any) -> Any:
    """Sign: -1, 0 or 1, nan for nan, and ``z/|z|`` for complex z."""
    return library_for(x).sign(x)


@_step_word("x if (x > y) | (x != x) else y")
def maximum(x: Any, y: Any) -> Any:
    """Larger of two numbers, nan if either is.

    Complex numbers are compared, and returned, by their real parts: where a rule of this library
    compares, the numbers are second moments, real numbers in complex dress.
    """
    x, y = _real(x), _real(y)
    return common_namespace(x, y).maximum(x, beside(x, y))


@_step_word("x if (x < y) | (x != x) else y")
def minimum(x: Any, y: Any) -> Any:
    """Smaller of two numbers, nan if either is; complex numbers as in `maximum`."""
    x, y = _real(x), _real(y)
    return common_namespace(x, y).minimum(x, beside(x, y))


@_step_word(
    """
    if (low < 0) & (high > 0):      # asked before a loop: then no limit ties with another zero,
        x = low if low > x else x   # and each line is one instruction, which keeps nan
        return high if high < x else x
    x = low if (x <= low) | (low != low) else x
    return high if (x >= high) | (high != high) else x
    """,
    on_device="""
    x = x if (x > low) | (x != x) else low      # without the branch, which would take registers
    return x if (x < high) | (x != x) else high
    """,
)
def clip(x: Any, low: Any, high: Any) -> Any:
    """Number nearest to `x` in ``[low, high]``, nan for nan."""
    return minimum(maximum(x, low), high)


@_step_word("x if condition else y")
def where(condition: Any, x: Any, y: Any) -> Any:
    """Return `x` where `condition` holds, else `y`."""
    if isinstance(condition, np.bool) or not hasattr(condition, "dtype"):
        return x if condition else y
    return common_namespace(condition, x, y).where(condition, x, y)


@_step_word("0")
def zeros_like(x: Any) -> Any:
    """Zeros in the shape of `x`."""
    return namespace(x).zeros_like(x)


class Reduced(NamedTuple):
    """What a measure says of one of its terms, unless that is to be summed."""

    kind: str
    values: Any


def largest(x: Any) -> Reduced:
    """Of a term of `measure`, the largest number: ``return largest(absolute(dx)),``."""
    return Reduced("largest", x)


def norm(x: Any) -> Reduced:
    """Of a term of `measure`, the norm, which neither overflows nor underflows on the way.

    It is the 2-norm, or that of the rule's `order`.
    """
    return Reduced("norm", x)


def ema_weight(beta: Any, t: Any) -> Any:
    """Return ``1 - beta**t``, the weight that an exponential moving average has seen in t steps.

    A word for `coefs`, not for `step`. Numbers are taken in double; a traced `t` or `beta` goes
    through ``expm1``, which keeps in float32 the digits that ``1 - beta**t`` would cancel.

    >>> ema_weight(0.9, 2)
    0.18999999999999995
    """
    if type(beta) is float and type(t) is int:  # nearly always, and asked at each step
        return 1.0 - beta**t
    number = isinstance(beta, _REAL)
    if number and isinstance(t, _WHOLE):
        return 1.0 - math.pow(beta, t)
    if number:
        return -namespace(t).expm1(t * (math.log(beta) if beta > 0 else -math.inf))
    xp = namespace(beta)
    return -xp.expm1(t * xp.log(beta + _NEXT_TO_0))


_NEXT_TO_0 = 1e-30
"""Beside any beta but 0 it is nothing; there the logarithm has a derivative by it."""
