"""What a file only names comes to life: rules, named tuples, arrays of each library.

Nothing in a file is code that is run. A rule is looked up among the subclasses of `Rule` that
exist, a named tuple among the classes that exist; no module is ever imported for a file.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from .._rule import Rule
from .._ties import View
from . import _safetensors as form
from ._safetensors import FileFormatError
from ._saved import OURS, class_name

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
    names = {field.name for field in dataclasses.fields(cls)} if _is_data(cls) else set()
    is_ours = ":" not in name
    if names - fields.keys() or (is_ours and fields.keys() - names):
        raise FileFormatError(
            f"the rule {name} has the fields {', '.join(sorted(names)) or 'none'}; in the file it "
            f"has {', '.join(sorted(fields)) or 'none'}. It was saved by another version of it"
        )
    try:
        return _constructed(cls, fields) if is_ours else _revived(cls, fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"the file has a rule that cannot be: {error}") from error


def _is_data(cls: Any) -> bool:
    return dataclasses.is_dataclass(cls)


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
        if not name.isidentifier() or name.startswith("__"):
            raise ValueError(f"{cls.__name__} cannot have a field {name!r:.60}")
        object.__setattr__(rule, name, value)
    Rule.__post_init__(rule)
    return rule


def named_class(name: str, fields: list[Any]) -> type | None:
    """Return the named tuple of this name and with these fields, if there is one."""
    states = (vars(cls).get("State") for cls in _rule_classes())
    found: list[Any] = [s for s in states if isinstance(s, type) and class_name(s) == name]
    module, _, qualname = name.rpartition(":")
    for known in [module] if module else [m for m in [*sys.modules] if m.startswith(OURS)]:
        place: Any = sys.modules.get(known)
        for part in qualname.split("."):  # only what is there: an attribute could run code
            place = vars(place).get(part) if isinstance(place, ModuleType | type) else None
        found.append(place)
    for cls in reversed(found):
        is_named = isinstance(cls, type) and issubclass(cls, tuple)
        if is_named and list(getattr(cls, "_fields", ())) == fields:
            named: type = cls
            return named
    return None


# --- arrays of each library --------------------------------------------------------------------


def typed(raw: np.ndarray, dtype: str, layout: View, library: str, like: Array) -> Array:
    """Return the array that these bytes are, laid out in memory as it was."""
    if library == "torch":
        torch: Any = sys.modules["torch"]
        kind = getattr(torch, dtype)
        flat = torch.from_numpy(raw).view(kind) if raw.size else torch.empty(0, dtype=kind)
        x = flat.reshape(layout.shape)
        x = layout.seen(layout.unseen(x).contiguous()) if layout != c_order(x.shape) else x
        return x.to(like.device)
    x = form.typed(raw, dtype, layout.shape)
    if layout == c_order(x.shape):
        return x
    return layout.seen(np.array(layout.unseen(x), order="C"))


def as_like(x: Array, library: str, like: Array) -> Array:
    """Return an array as one of another library, where and as the one given is."""
    if library == "torch":
        torch: Any = sys.modules["torch"]
        if isinstance(like, torch.nn.Parameter):
            return type(like)(x, like.requires_grad)
        return x.requires_grad_(like.requires_grad) if like.requires_grad else x
    if library == "jax":
        jax: Any = sys.modules["jax"]
        new = jax.numpy.array(x)
        return jax.device_put(new, like.sharding) if getattr(like, "committed", False) else new
    if library == "cupy":
        return sys.modules["cupy"].asarray(x)
    if library == "numba":
        return sys.modules["numba"].cuda.to_device(x)
    return x


def c_order(shape: tuple[int, ...]) -> View:
    """Return how a C-contiguous array of this shape is seen."""
    return View(shape, tuple(range(len(shape))), ())
