"""The numbers of a step: computed in double and cast once, also while JAX traces them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arrays.library import is_abstract, library_for, namespace
from .._arrays.states import map_state, parts_of_state
from .._arrays.traced import (
    Packed,
    at,
    attaching,
    attributes,
    common_vector,
    detached,
    differentiated_in_double,
    double,
    holds_traced,
    is_tracer,
    lifted_count,
    lifting,
    needs_double,
    of_jax,
    settled,
    with_attributes,
)
from ..words import is_complex
from ._numbers import cast_like
from ._program import numbers, told_numbers

if TYPE_CHECKING:
    from ._base import ElementwiseRule


def coefs_for(rule: ElementwiseRule, x: Any, t: Any) -> tuple[Any, ...]:
    """Return the numbers that a step needs at count `t`, computed in double, cast once."""
    if needs_double(rule, t):
        if (packed := common_vector(rule, x)) is not None:
            return _in_double(rule, x, packed, t, (), lambda rule, t, rest: numbers(rule, t))
        with double():
            rule, t = with_attributes(rule, lifting()), lifted_count(t)
            return cast_like(x, numbers(rule, t))
    rule = with_attributes(rule, settled)
    t = None if t is None else library_for(t).number_of(t)
    return cast_like(x, numbers(rule, t))


def told_coefs(
    rule: ElementwiseRule, x: Any, method: str, told: Mapping[str, Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the numbers that a method makes of what it is told, cast once, and those kept.

    Parameters
    ----------
    rule : ElementwiseRule
        The rule.
    x : array
        The parameter, whose dtype the numbers get.
    method : {"coefs", "measure_coefs"}
        The method.
    told : mapping
        What it may ask for, by the names of `_program.TOLD`.

    Returns
    -------
    (coefs, kept)
        Those kept are in double where the library has it.
    """
    t = told["t"]
    asked = [name for name in ("kept", "value", "sums") if name in told]
    given = [part for name in asked for part in parts_of_state(told[name], tuple)]
    if not (needs_double(rule, t) or any(map(is_tracer, given))):
        rule = with_attributes(rule, settled)
        t = None if t is None else library_for(t).number_of(t)
        coefs, kept = told_numbers(rule, method, {**told, "t": t})
        return _cast(x, coefs), kept
    if any(getattr(part, "ndim", 0) for part in given):  # over axes, where coefs are arrays
        rule = with_attributes(rule, lambda part: getattr(part, "value", lambda: part)())
        coefs, kept = told_numbers(rule, method, told)
        return _cast(x, coefs), kept
    lengths: list[int] = []
    arrays = tuple(of_jax(given))
    ids = {*map(id, arrays)}
    size = told.get("size")
    holes = {  # without the arrays, since JAX may keep the function below
        name: map_state(lambda part: _HOLE if id(part) in ids else part, told[name])
        for name in asked
    }

    def made(rule: ElementwiseRule, t: Any, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        values = iter(rest)  # in the order of `given`
        filled = {
            name: map_state(lambda part: next(values) if part is _HOLE else part, holes[name])
            for name in asked
        }
        coefs, kept = told_numbers(rule, method, {**filled, "t": t, "size": size})
        lengths[:] = [len(coefs)]
        return (*coefs, *kept)

    found = _in_double(rule, x, common_vector(rule, x), t, arrays, made)
    n = lengths[0]
    return cast_like(x, found[:n]), found[n:]


_HOLE = object()
"""Stands for an array that a function is given anew."""


def _cast(x: Any, coefs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast coefs once to the dtype of `x`, those over axes too."""
    if not any(getattr(n, "ndim", 0) for n in coefs):
        return cast_like(x, coefs)
    real = namespace(x).real(x).dtype if is_complex(x) else x.dtype
    return tuple(
        library_for(n).astype(n, x.dtype if is_complex(n) else real)
        if getattr(n, "ndim", 0)
        else cast_like(x, (n,))[0]
        for n in coefs
    )


def _in_double(
    rule: ElementwiseRule,
    x: Any,
    packed: Packed | None,
    t: Any,
    rest: tuple[Any, ...],
    made: Callable[[Any, Any, tuple[Any, ...]], tuple[Any, ...]],
) -> tuple[Any, ...]:
    """Return numbers that JAX traces, computed in double from a rule, its count, and the rest."""
    # What JAX keeps of this function must not hold a tracer.
    real, xp = np.empty(0, x.dtype).real.dtype, namespace(x)
    is_packed, length = packed is not None, 0 if packed is None else packed.length
    places = rule if packed is None else with_attributes(rule, detached)
    known: list[Any] = []

    def traced(*args: Any) -> Any:
        arguments = iter(args)
        with double():
            if is_packed:
                rule = with_attributes(places, attaching(next(arguments), length))
            else:
                rule = with_attributes(places, lifting())
            t = next(arguments).astype(np.int64) if counts else None
            found = made(rule, t, tuple(each.astype(np.float64) for each in arguments))
            known[:] = [None if is_abstract(n) else float(n) for n in found]
            # In one vector they are one function of what XLA compiles, and not one each.
            numbers = [n.astype(np.float64) for n in found if is_abstract(n)]
            return (xp.stack(numbers) if numbers else xp.zeros(0)).astype(real)

    args: list[Any] = [] if packed is None else [packed.vector]
    counts = t is not None
    if counts:
        with double():  # a count of floats, since whole numbers have no derivatives
            args.append(xp.asarray(t).astype(np.float64))
    # A function whose derivative is given must not look at tracers beside its arguments.
    is_closed = packed is not None or not any(map(holds_traced, attributes(rule).values()))
    found = (differentiated_in_double(traced) if is_closed else traced)(*args, *rest)
    order = itertools.count()
    return tuple(at(found, next(order)) if n is None else n for n in known)
