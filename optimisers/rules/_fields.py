"""The numbers of a rule: types that say their limits, and the check of what is given for them."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from .._arrays.traced import (
    Number,
)
from .._messages.text import short
from ._numbers import is_traced


class Limit(NamedTuple):
    """What the numbers of a field must satisfy; attached to the field's type with `Annotated`.

    On the type of a number it is about this number, on that of a tuple about all in it together.
    """

    text: str
    holds: Callable[[Any], bool]


class Limits(NamedTuple):
    """What a field must satisfy: each of its numbers, and then all of them together."""

    each: list[Limit]
    together: list[Limit]
    may_be_none: bool = False


Finite = Annotated[float, Limit("finite", math.isfinite)]

NonNegative = Annotated[float, Limit("finite and at least 0", lambda v: 0 <= v < math.inf)]

Upper = Annotated[float, Limit("at least 0", lambda v: v >= 0)]
"""An upper limit, and so inf where there is none."""

Decay = Annotated[float, Limit("in [0, 1)", lambda v: 0 <= v < 1)]

Decays = tuple[Decay, Decay]

ThreeDecays = tuple[Decay, Decay, Decay]

Shrink = Annotated[float, Limit("in (0, 1)", lambda v: 0 < v < 1)]

Grow = Annotated[float, Limit("finite and above 1", lambda v: 1 < v < math.inf)]

Range = Annotated[
    tuple[NonNegative, Upper],
    Limit("(least, largest), in this order", lambda pair: pair[0] <= pair[1]),
]

Order = Annotated[float, Limit("a number, inf or -inf", lambda v: not math.isnan(v))]

Count = Annotated[int, Limit("a whole number, at least 1", lambda v: v >= 1 and v.is_integer())]

Positive = Annotated[float, Limit("finite and above 0", lambda v: 0 < v < math.inf)]

Steps = Annotated[int, Limit("a whole number, at least 0", lambda v: v >= 0 and v.is_integer())]

Axis = Annotated[int, Limit("a whole number", lambda v: v.is_integer())]

UNSAID = {"unsaid": True}
"""Metadata of a field of which neither a rule's text nor a file speaks where it is not set."""


def unsaid(rule: Any) -> set[str]:
    """Return the names of the fields of a rule of which nobody speaks."""
    if not dataclasses.is_dataclass(rule):
        return set()
    return {
        f.name
        for f in dataclasses.fields(rule)
        if "unsaid" in f.metadata and getattr(rule, f.name, f.default) == f.default
    }


@functools.cache
def _limits(cls: type) -> dict[str, Limits]:
    """Return for each field of `cls` its limits: one, or one for each entry of a tuple."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception:  # a user's annotations that cannot be read here limit nothing
        return {}
    found: dict[str, Limits] = {}
    for name, hint in hints.items():
        may_be_none = type(None) in typing.get_args(hint)
        if may_be_none:  # `X | None`
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        together = _limits_on(hint)
        bare = hint.__origin__ if together else hint
        if typing.get_origin(bare) is tuple:
            each = [limit for part in typing.get_args(bare) for limit in _limits_on(part)]
        else:
            each, together = together, []
        if each:
            found[name] = Limits(each, together, may_be_none)
    return found


def _limits_on(hint: Any) -> list[Limit]:
    return [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Limit)]


def _is_unknown(value: Any) -> bool:
    """Tell whether nobody can say yet which number `value` is."""
    return is_traced(value) or (type(value) is Number and not value.is_scalar)


def _way_out(value: Any) -> str:
    from .._messages.mixups import for_number

    return for_number(value)


def _checked_number(where: str, limit: Limit, value: Any) -> Any:
    """Return `value` as a Python number, or as it is where it is traced."""
    if _is_unknown(value):
        return value
    try:
        if isinstance(value, str | bytes) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{where} must be a real number, {limit.text}; got {short(value)}{_way_out(value)}"
        ) from None
    except OverflowError:  # a whole number beyond all floats
        number = math.inf if value > 0 else -math.inf
    if not limit.holds(number):
        uphill = number < 0 and where.endswith(": eta")
        mend = "; to go uphill, give the gradient with the other sign" if uphill else ""
        raise ValueError(f"{where} must be {limit.text}; got {value!r}{mend}")
    return value if type(value) in (bool, int, float) and math.isfinite(number) else number


def _checked(where: str, limits: Limits, value: Any) -> Any:
    """Return a field's number, or its tuple of them, as Python numbers."""
    each, together, may_be_none = limits
    if value is None and may_be_none:
        return None
    if len(each) == 1:
        return _checked_number(where, each[0], value)
    if not isinstance(value, tuple | list) or len(value) != len(each):
        raise TypeError(
            f"{where} must hold {len(each)} numbers; got {short(value)}{_way_out(value)}"
        )
    checked = tuple(
        _checked_number(f"{where}[{i}]", limit, number)
        for i, (limit, number) in enumerate(zip(each, value, strict=True))
    )
    for limit in together:
        if not any(map(_is_unknown, checked)) and not limit.holds(checked):
            raise ValueError(f"{where} must be {limit.text}; got {short(value)}")
    return checked
