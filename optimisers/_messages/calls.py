"""Calls: the arguments that a rule's class or a function takes, and errors for others.

A rule is a dataclass, whose constructor Python writes. So that a call which does not fit is
answered with the names of the fields here, `Rule.__new__` asks `takes` before that runs.
A function is answered for by `explained`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def takes(cls: type) -> tuple[frozenset[str], float]:
    """Return the arguments that `cls` takes, by name, and how many of them by position.

    Of each class this is found once.
    """
    _explain_freezing(cls)
    parameters = _parameters(cls)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return frozenset(p.name for p in parameters), math.inf
    return frozenset(p.name for p in parameters), len(parameters)


def _parameters(cls: type) -> list[inspect.Parameter]:
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return []
    return [*inspect.signature(cls.__init__).parameters.values()][1:]  # type: ignore[misc]


def refuse(cls: type, shown: str, args: Sequence[Any], names: Iterable[str]) -> None:
    """Raise if `cls` takes no arguments at all, or not these; Python knows the other reasons.

    Raises
    ------
    TypeError
        Which says what to write instead.
    """
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        raise TypeError(f"{shown} takes no arguments; {_DECORATE}")
    parameters = _parameters(cls)
    if {"jac", "callback", "bounds"} <= {*names}:
        raise TypeError(
            f"{shown} is no method of scipy.optimize.minimize; write "
            f"method=optimisers.scipy.method({shown}(...))"
        )
    if len(args) > len(parameters):
        from .mixups import for_number

        for hint in filter(None, map(for_number, args)):
            raise TypeError(f"{shown} takes no rule{hint}")
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in names if name not in known]
    if not unknown or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return  # Python says the rest
    if undecorated := [name for name in unknown if name in inspect.get_annotations(cls)]:
        raise TypeError(f"{shown} has no field {undecorated[0]!r} yet; {_DECORATE}")
    from . import names as _names

    told = f"{shown} has no {', '.join(map(repr, unknown))}"
    if "rule" in known or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        hints = [f"for {name}, {_names.of_inner(name)} in a rule inside it" for name in unknown]
        raise TypeError("; ".join([told, *hints]))
    raise TypeError(_names.unknown(told, unknown, known, [c.__name__ for c in cls.__mro__]))


_DECORATE = "write @dataclass(frozen=True) above the class, which makes its annotations fields"


def explained(hint: Callable[[str], str]) -> Callable[[Function], Function]:
    """Add a hint to the error of a function that is called with unknown arguments.

    Parameters
    ----------
    hint : callable
        Returns what to write in place of an argument, "" if nothing is known; and how the function
        is called, for the name "".
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            try:
                return function(*args, **named)
            except TypeError as error:
                trace = error.__traceback__
                if trace is None or trace.tb_next is not None:  # raised inside the function
                    raise
                told = str(error)
            known = inspect.signature(function).parameters
            hints = [f"for {n}, {text}" for n in named if n not in known and (text := hint(n))]
            raise TypeError("; ".join([told, *hints] if hints else [told, hint("")]))

        return cast("Function", call)

    return decorate


def no_name(module: str, name: str) -> Exception:
    """Return the error for the `__getattr__` of a module of this package."""
    if name[0] == "_":  # asked for by Python itself
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    from . import names as _names

    return _names.missing_in(module, name, sys._getframe(2))


def _explain_freezing(cls: type) -> None:
    """Add to the error for an assigned field the code to write instead."""
    for base in cls.__mro__:
        frozen = base.__dict__.get("__setattr__")
        parameters = base.__dict__.get("__dataclass_params__")
        if getattr(parameters, "frozen", False) and getattr(frozen, "__module__", "") != __name__:
            type.__setattr__(base, "__setattr__", _explained(frozen))


def _explained(frozen: Any) -> Any:
    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        try:
            frozen(self, name, value)
        except dataclasses.FrozenInstanceError as error:
            raise dataclasses.FrozenInstanceError(
                f"{error}; rules do not change: rule.adjust({name}=...) returns another, and "
                f"adjust_(state, {name}=...) changes the rules in a state"
            ) from None

    return __setattr__
