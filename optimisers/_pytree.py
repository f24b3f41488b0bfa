"""State trees as trees of JAX and optree: how a `Leaf` is taken apart, and put together again.

The children of a leaf are the numbers of its rule, each in two parts (see `_arrays.traced`), and
its state; its structure is all else: the class of the rule, switches, whole numbers, whether it is
frozen. Hence other numbers do not make `jax.jit` compile anew, other structure does.

Nothing is imported for that. `announce` registers what it can whenever it is called, which is
when leaves are made or unpickled, and in each call that takes a state tree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ._arrays.library import library_for
from ._arrays.traced import Number, attributes, number_of, parts_of
from ._trees.nodes import Namespace
from .rules._base import Rule

# --- ties ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tie:
    """What leaves have in common that were one before JAX made one for each place of it.

    Compares by places, so that equal models have equal structure and are compiled once; which
    leaves belong together is a matter of identity.
    """

    places: tuple[str, ...]


class _Crossed:
    """Whether any tied leaf was ever taken apart, so that others need not be looked at."""

    yet = False


def have_ties_crossed() -> bool:
    """Tell whether there may be leaves that are tied without being the same."""
    return _Crossed.yet


def note_crossing(tie: Tie | None) -> None:
    """Take note that there are such leaves, if this is the tie of one."""
    _Crossed.yet |= tie is not None


# --- rules -----------------------------------------------------------------------------------

# How a value comes back: from a number, a rule, a sequence of such, or as it was. The class of what
# stays is noted since True == 1 == 1.0.
_NUMBER, _RULE, _SEQUENCE, _STATIC = range(4)
Spec = tuple[Any, ...]


def _split_rule(rule: Rule, found: list[Any]) -> Spec:
    cls = type(rule)
    static = cls.static + cls.fixed
    specs = [
        (n, (_STATIC, type(v), v) if n in static else _split(v, getattr(cls, n, None), found))
        for n, v in attributes(rule).items()
    ]
    return _RULE, cls, tuple(specs)


def _split(value: Any, default: Any, found: list[Any]) -> Spec:
    """Append the numbers in a value, and return how to make the value of them."""
    cls = type(value)
    if (
        isinstance(value, (float, Number, np.floating))
        or (cls is int and isinstance(default, float))
        or library_for(value).enters_jax(value)
    ):
        found.append(value)
        return (_NUMBER,)
    if isinstance(value, Rule):
        return _split_rule(value, found)
    if cls is tuple or cls is list:
        count = len(found)
        defaults = default if isinstance(default, tuple) else ()
        specs = tuple(
            _split(v, defaults[i] if i < len(defaults) else None, found)
            for i, v in enumerate(value)
        )
        if len(found) > count or any(spec[0] == _RULE for spec in specs):
            return _SEQUENCE, cls, specs
    return _STATIC, cls, value


def _names(spec: Spec, name: str) -> Iterator[str]:
    """Yield the names of the numbers of a value, in the order of `_split`."""
    if spec[0] == _NUMBER:
        yield name
    elif spec[0] == _RULE:
        for field, below in spec[2]:
            yield from _names(below, f"{name}.{field}")
    elif spec[0] == _SEQUENCE:
        for i, below in enumerate(spec[2]):
            yield from _names(below, f"{name}[{i}]")


def _join(spec: Spec, numbers: Iterator[Any]) -> Any:
    kind = spec[0]
    if kind == _NUMBER:
        return number_of(next(numbers), next(numbers))
    if kind == _STATIC:
        return spec[2]
    if kind == _SEQUENCE:
        return spec[1](_join(below, numbers) for below in spec[2])
    rule = object.__new__(spec[1])
    for name, below in spec[2]:
        object.__setattr__(rule, name, _join(below, numbers))
    return rule


# --- leaves ----------------------------------------------------------------------------------


class Crossed:
    """The rule of a leaf as JAX or optree gave it back; put together when it is asked for.

    A number that JAX has is ready later than the call that returned it, so to make a float of it
    is to wait. A training loop, which hands the leaf to the next call, never asks; and the parts
    that it hands on are those that came, of the same types, so that nothing is compiled anew.
    """

    __slots__ = ("made", "parts", "spec")

    def __init__(self, spec: Spec, parts: list[Any]) -> None:
        self.spec = spec
        self.parts = parts
        self.made: Rule | None = None

    def rule(self) -> Rule:
        if self.made is None:
            self.made = cast(Rule, _join(self.spec, iter(self.parts)))
        return self.made


def _flatten(leaf: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """Return the children of a leaf, and its structure."""
    crossed, rule = leaf.crossed, _rule_at_hand(leaf)
    if crossed is not None and (rule is None or rule is crossed.made):
        return [*crossed.parts, leaf.state], (crossed.spec, leaf.frozen, leaf.tie)
    found: list[Any] = []
    spec = _split_rule(leaf.rule, found)
    children = [part for value in found for part in parts_of(value)]
    return [*children, leaf.state], (spec, leaf.frozen, leaf.tie)


def _rule_at_hand(leaf: Any) -> Rule | None:
    """Return the rule of a leaf, or None if it is not put together yet."""
    try:
        return cast(Rule, object.__getattribute__(leaf, "rule"))
    except AttributeError:
        return None


def _names_of(structure: tuple[Any, ...]) -> list[str]:
    """Return the names of the children of a leaf."""
    names = [part for n in _names(structure[0], "rule") for part in (n, f"{n}.low")]
    return [*names, "state"]


def _unflatten(cls: type, structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
    """Return a leaf of any children: nothing is checked, no `__init__` runs."""
    *numbers, state = children
    spec, frozen, tie = structure
    leaf: Any = object.__new__(cls)
    leaf.crossed, leaf.state = Crossed(spec, numbers), state
    leaf.frozen, leaf.skipped, leaf.job, leaf.tie = frozen, 0, None, tie
    note_crossing(tie)
    return leaf


# --- registering -----------------------------------------------------------------------------


def _register_with_jax(cls: type) -> None:
    tree_util = sys.modules["jax.tree_util"]
    key = tree_util.GetAttrKey

    def with_keys(leaf: Any) -> tuple[list[Any], Any]:
        children, structure = _flatten(leaf)
        names = map(key, _names_of(structure))
        return [*zip(names, children, strict=True)], structure

    tree_util.register_pytree_with_keys(
        cls,
        with_keys,
        lambda structure, children: _unflatten(cls, structure, children),
        _flatten,
    )
    tree_util.register_pytree_with_keys(
        Namespace,
        lambda node: ([(key(n), child) for n, child in vars(node).items()], tuple(vars(node))),
        lambda names, children: Namespace(**dict(zip(names, children, strict=True))),
        lambda node: (tuple(vars(node).values()), tuple(vars(node))),
    )


def _register_with_optree(cls: type) -> None:
    optree = sys.modules["optree"]
    everywhere = optree.registry.__GLOBAL_NAMESPACE

    def with_names(leaf: Any) -> tuple[list[Any], Any, list[str]]:
        children, structure = _flatten(leaf)
        return children, structure, _names_of(structure)

    optree.register_pytree_node(
        cls,
        with_names,
        lambda structure, children: _unflatten(cls, structure, children),
        namespace=everywhere,
    )
    optree.register_pytree_node(
        Namespace,
        lambda node: (tuple(vars(node).values()), tuple(vars(node)), tuple(vars(node))),
        lambda names, children: Namespace(**dict(zip(names, children, strict=True))),
        path_entry_type=optree.GetAttrEntry,
        namespace=everywhere,
    )


_JAX, _OPTREE = "jax.tree_util", "optree"
# What to do once a module has this name: until then it is not loaded, or only in part.
_pending: dict[str, Any] = {
    _JAX: ("register_pytree_with_keys", _register_with_jax),
    _OPTREE: ("register_pytree_node", _register_with_optree),
}


def announce(cls: type) -> None:
    """Register `cls`, the class of leaves, with JAX and optree, once they are loaded."""
    loaded = sys.modules  # a quick look comes first, since this is asked at each update
    if (_JAX in loaded and _JAX in _pending) or (_OPTREE in loaded and _OPTREE in _pending):
        for module in [*_pending]:
            if module in loaded:
                name, register = _pending[module]
                if hasattr(loaded[module], name) and _pending.pop(module, ()):
                    register(cls)
