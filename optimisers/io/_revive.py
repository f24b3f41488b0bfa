"""What a file only names comes to life: rules, named tuples, arrays of each library.

Nothing in a file is code that is run. A rule is looked up among the subclasses of `Rule` that
exist, a named tuple among the classes that exist, in what modules and classes hold as they stand:
no module is imported for a file, no attribute is asked for that could run code, and what is found
is taken for what it is, not for what it says that it is.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from .._arrays.layout import View
from .._arrays.library import Library
from .._arrays.sharing import seen, unseen
from .._trees.nodes import listed
from ..rules._base import Rule
from . import _safetensors as form
from ._entries import ABSENT, c_order
from ._json import FileFormatError
from ._saved import OURS, class_name, may_have

Array = Any

# --- rules and classes, by name --------------------------------------------------------------


def _rule_classes() -> Iterator[Any]:
    """Yield every rule there is, of those with one name the latest last."""
    stack: list[Any] = [Rule]
    while stack:
        cls = stack.pop()
        yield cls
        stack += reversed(cls.__subclasses__())


def rule_class(name: str) -> Any:
    """Return the class of rules of this name."""
    found = [cls for cls in _rule_classes() if not inspect.isabstract(cls)]
    exact = [cls for cls in found if class_name(cls) == name]
    if exact:
        return exact[-1]
    # A script is `__main__` when it is run, and has a name when it is imported.
    module, _, qualname = name.rpartition(":")
    near = {
        class_name(cls): cls
        for cls in found
        if ":" in class_name(cls) and cls.__qualname__ == qualname
        if "__main__" in (module, cls.__module__)
    }
    if len(near) == 1:
        return near.popitem()[1]
    if not module:
        raise FileFormatError(
            f"the file has the rule {name!r}, which this version of the library does not have"
        )
    raise FileFormatError(
        f"the file has the rule {qualname!r}, which is not known here: import the module that "
        f"defines it, {module!r}, before you load"
    )


def made_rule(cls: Any, name: str, fields: dict[str, Any]) -> Rule:
    """Return a rule with these fields; its limits hold as if it were written by hand."""
    known = dataclasses.fields(cls) if _is_data(cls) else ()
    names = {field.name for field in known}
    said = {field.name for field in known if "unsaid" not in field.metadata}
    is_ours = ":" not in name
    if said - fields.keys() or (is_ours and fields.keys() - names):
        raise FileFormatError(
            f"the rule {name} has the fields {listed(sorted(names))}; in the file it has "
            f"{listed(sorted(fields))}. It was saved by another version of it"
        )
    hints = _hints(cls)
    for field, value in fields.items():
        if field in hints and not _may_be(hints[field], value):
            raise FileFormatError(
                f"the file has a rule that cannot be: {name} with the {field} {value!r:.60}"
            )
    try:
        return _constructed(cls, fields) if is_ours else _revived(cls, fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"the file has a rule that cannot be: {error}") from error


def _is_data(cls: Any) -> bool:
    return dataclasses.is_dataclass(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields that a class has from the library."""
    ours = next(base for base in cls.__mro__ if base.__module__.startswith(OURS))
    return {
        name: hint
        for name, hint in typing.get_type_hints(ours).items()
        if typing.get_origin(hint) is not typing.ClassVar
    }


_CONTAINERS = (Rule, tuple, list, dict)


def _may_be(hint: Any, value: Any) -> bool:
    """Tell whether a field can be a rule, a container or a dtype, if it is one, as its hint says.

    Numbers pass, since the rule itself looks at them.
    """
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_may_be(part, value) for part in parts)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, np.dtype):
        return isinstance(value, np.dtype)
    if isinstance(value, str | bytes):  # which could be spread out like a tuple
        return not issubclass(origin, _CONTAINERS)
    if not isinstance(value, (*_CONTAINERS, np.dtype)):
        return True
    if origin is tuple and isinstance(value, tuple | list):
        same = parts[:1] * len(value) if parts[1:] == (...,) else parts or (object,) * len(value)
        return len(same) == len(value) and all(map(_may_be, same, value))
    return isinstance(value, origin)


def _constructed(cls: Any, fields: dict[str, Any]) -> Rule:
    positional: list[Any] = []
    named = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += fields[name]
        elif name in fields:
            named[name] = fields[name]
    rule: Rule = cls(*positional, **named)
    return rule


def _revived(cls: Any, fields: dict[str, Any]) -> Rule:
    """Return a user's rule as it was; its `__init__` may want what is not kept."""
    rule: Rule = object.__new__(cls)
    for name, value in fields.items():
        if not may_have(cls, name):
            raise ValueError(f"{cls.__name__} cannot have a field {name!r:.60}")
        object.__setattr__(rule, name, value)
    Rule.__post_init__(rule)
    return rule


class NamedTuples:
    """The classes that are there when a file is read, by the names that a file has for them.

    A file can name very many, so what they are looked up in is gathered once.
    """

    def __init__(self) -> None:
        self._states: dict[str, list[Any]] | None = None
        self._modules: list[Any] = []

    def find(self, name: str, fields: list[Any]) -> type | None:
        """Return the named tuple of this name and with these fields, if there is one."""
        return next((cls for cls in self._named(name) if named_fields(cls) == fields), None)

    def newer_fields(self, name: str, fields: list[str]) -> list[str] | None:
        """Return the fields of a state of ours that had only these when a file was written.

        That is a named tuple with a static method `absent`, which is given what there is, by name,
        and returns the rest. None if there is no such state.
        """
        for cls in self._named(name):
            known = named_fields(cls) or []
            if "absent" in _in_class(cls) and [f for f in known if f in fields] == fields != known:
                return known
        return None

    def _named(self, name: str) -> Iterator[type]:
        """Yield the classes that have this name, the likeliest first."""
        if self._states is None:
            self._states = {}
            for state in [_own(cls).get("State") for cls in _rule_classes()]:
                if is_class(state):
                    self._states.setdefault(class_name(state), []).append(state)
            self._modules = [m for known, m in [*sys.modules.items()] if known.startswith(OURS)]
        found = [*self._states.get(name, ())]
        module, _, qualname = name.rpartition(":")
        parts = qualname.split(".")
        for place in [sys.modules.get(module)] if module else self._modules:
            for part in parts:
                place = _own(place).get(part)
                if place is None:
                    break
            found.append(place)
        return filter(is_class, reversed(found))


def supplied(cls: Any, values: list[Any]) -> list[Any]:
    """Return the values of a state, with those that a file of an earlier version did not have."""
    if not any(value is ABSENT for value in values):
        return values
    found = {f: v for f, v in zip(cls._fields, values, strict=True) if v is not ABSENT}
    found.update(cls.absent(found))
    return [found[f] for f in cls._fields]


_in_module: Any = vars(ModuleType)["__dict__"].__get__
_in_class: Any = vars(type)["__dict__"].__get__
_ancestors: Any = vars(type)["__mro__"].__get__


def _own(place: Any) -> Any:
    """Return what a module or class holds by itself, without asking it: that could run code."""
    if is_class(place):
        return _in_class(place)
    return (_in_module(place) if issubclass(type(place), ModuleType) else None) or {}


def is_class(x: Any) -> bool:
    """Tell whether this is a class, by what it is and not by what it says (`__class__`)."""
    return issubclass(type(x), type)


def named_fields(cls: type) -> list[Any] | None:
    """Return the fields of a named tuple; None for any other class."""
    if tuple not in _ancestors(cls):
        return None
    for base in _ancestors(cls):
        own = _in_class(base)
        if "n_sequence_fields" in own:  # a struct sequence, such as `time.struct_time`
            return None
        if "_fields" in own:
            fields = own["_fields"]
            return list(fields) if type(fields) is tuple else None
    return None


# --- arrays of each library --------------------------------------------------------------------


def typed(raw: np.ndarray, dtype: str, layout: View, library: Library, like: Array) -> Array:
    """Return the array that these bytes are, laid out in memory as it was.

    It is one of the library, beside `like`, if that makes arrays of bytes, else one of NumPy.
    """
    if library.reads_bytes:
        return library.from_bytes(raw, dtype, layout, like)
    x = form.typed(raw, dtype, layout.shape)
    if layout == c_order(layout.shape):
        return x
    return seen(np.array(unseen(x, layout), order="C"), layout)
