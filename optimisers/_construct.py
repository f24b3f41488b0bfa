"""Making a rule: the arguments that its class takes, and what is said of others.

A rule is a dataclass, whose constructor Python writes. So that a call which does not fit is
answered with the names of the fields here, `Rule.__new__` asks `takes` before that runs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from typing import Any


@functools.cache
def takes(cls: type) -> frozenset[str]:
    """Return the names of the arguments that `cls` takes; of each class this is found once."""
    _explain_freezing(cls)
    return frozenset(p.name for p in _parameters(cls))


def _parameters(cls: type) -> list[inspect.Parameter]:
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return []
    return [*inspect.signature(cls.__init__).parameters.values()][1:]  # type: ignore[misc]


def refuse(cls: type, shown: str, names: Iterable[str]) -> None:
    """Raise if `cls` takes no arguments at all, or none of these names.

    Raises
    ------
    TypeError
        Which says what to write instead.
    """
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        raise TypeError(f"{shown} takes no arguments; {_DECORATE}")
    parameters = _parameters(cls)
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in names if name not in known]
    if not unknown or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return  # Python says the rest
    if undecorated := [name for name in unknown if name in inspect.get_annotations(cls)]:
        raise TypeError(f"{shown} has no field {undecorated[0]!r} yet; {_DECORATE}")
    from . import _names

    told = f"{shown} has no {', '.join(map(repr, unknown))}"
    if "rule" in known or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        hints = [f"for {name}, {_names.of_inner(name)} in a rule inside it" for name in unknown]
        raise TypeError("; ".join([told, *hints]))
    raise TypeError(_names.unknown(told, unknown, known, [c.__name__ for c in cls.__mro__]))


_DECORATE = "write @dataclass(frozen=True) above the class, which makes its annotations fields"


def _explain_freezing(cls: type) -> None:
    """Let the error for a field that is assigned say what to do instead."""
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
