"""Entries of PyTorch's parameter groups: which of them are numbers of a rule, and what others are.

A group is a plain dictionary, into which schedulers, wrappers and users write what they like. So
an entry can be

a) a field of the rule, by its name here, `lr` for its eta, or by PyTorch's name where ours is also
   what a well-known wrapper writes: `rho` is the radius of SAM;
b) a name of PyTorch's own optimisers that the rule does not have;
c) a number that looks like a misspelt one of these, which is refused;
d) any other number, which is somebody else's: kept, with a word.

What is no number, and what PyTorch's schedulers keep, is nobody's business.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from numbers import Number
from typing import Any

from .._arrays.states import parts_of_state
from .._messages import names as _names
from .._messages.text import plain
from ..rules._base import Rule, class_names, registry
from ..rules.accumulate import AccumGradState
from ..rules.precision import MixedPrecisionState

OTHERS = frozenset({"rho"})
"""Fields of rules that wrappers write into every group for a number of their own."""

_KEPT = frozenset(
    [
        "params",
        "param_names",
        "initial_lr",
        "max_lr",
        "min_lr",
        "swa_lr",
        "initial_momentum",
        "max_momentum",
        "base_momentum",
    ]
)
"""Keys that PyTorch and its schedulers write into groups."""


def entries(rule: Rule) -> dict[str, str]:
    """Return the entries that a group may have, and the field of the rule that each stands for."""
    found = {"lr": "eta"}
    for field, _ in rule.fields():
        found[entry(field, rule)] = field
    return found


def entry(field: str, rule: Rule) -> str:
    """Return the name that a field of a rule has in groups."""
    if field == "eta":
        return "lr"
    if field in OTHERS:
        for name in _names.torch_names(field, class_names(rule)):
            return name
    return field


def foreign(group: Mapping[str, Any], own: Collection[str]) -> list[str]:
    """Return the entries that are numbers of PyTorch's optimisers, and none of the rule's."""
    return [name for name in group if name not in own and name not in OTHERS
            and _names.in_torch(name)]  # fmt: skip


def refuse_misspelt(group: Mapping[str, Any], own: Collection[str], rule: Rule) -> None:
    """Raise if a number in a group has a name that resembles one that could be meant.

    Raises
    ------
    TypeError
        Which says what to write.
    """
    known = {_letters(name) for name in (*own, *_known()) if name not in OTHERS}
    for name in _unknown(group, own):
        letters = _letters(name)
        if len(letters) > 3 and get_close_matches(letters, known, 1, 0.85):
            told = f"a parameter group has {name!r}, which no rule here has"
            raise TypeError(_names.unknown(told, [name], sorted(own), class_names(rule)))


def others(group: Mapping[str, Any], own: Collection[str], rule: Rule) -> Iterator[tuple[str, str]]:
    """Yield the numbers in a group that other code owns, with the message for each."""
    for name in _unknown(group, own):
        means = ""
        if name in OTHERS and (acts := entry(name, rule)) != name:
            means = f"; the {name} of the rule is {acts} in a group, as in PyTorch"
        elif name not in OTHERS:
            means = _names.of_known(name, sorted(own), class_names(rule))
            means = f"; for {name}, {means}" if means else ""
        yield name, f"{name}={plain(group[name])}{means}"


def _unknown(group: Mapping[str, Any], own: Collection[str]) -> Iterator[str]:
    for name, value in group.items():
        is_known = name in own or name in _KEPT or (name not in OTHERS and _names.in_torch(name))
        if not is_known and _is_number(value):
            yield name


def _is_number(value: Any) -> bool:
    parts = [*parts_of_state(value, (list, tuple))]
    return bool(parts) and all(map(_is_one_number, parts))


def _is_one_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    tensor = sys.modules["torch"].Tensor
    return isinstance(value, Number) or (isinstance(value, tensor) and value.numel() == 1)


def _known() -> Iterator[str]:
    """Yield the names of PyTorch's groups, and the fields of all rules."""
    yield from _names.torch_names()
    for cls in registry():
        yield from getattr(cls, "__dataclass_fields__", ())


def _letters(name: str) -> str:
    return name.casefold().replace("_", "")


# --- entries of a saved state --------------------------------------------------------------------


def is_guest(name: str) -> bool:
    """Tell whether an entry of a state belongs to other code than the rule."""
    parts = name.split(".")
    return not parts[0].isdigit() and parts[-1] not in _slots()


@functools.cache
def _slots() -> frozenset[str]:
    found = {"state", *AccumGradState._fields, *MixedPrecisionState._fields}
    for cls in registry():
        found.update(getattr(getattr(cls, "State", None), "_fields", ()))
    return frozenset(found)
