"""State trees as trees of JAX and optree: how a `Leaf` is taken apart, and put together again.

The children of a leaf are the numbers of its rule, each in two parts (see `_jax`), and its state;
its structure is all else: the class of the rule, switches, whole numbers, whether it is frozen.
Hence other numbers do not make `jax.jit` compile anew, other structure does.

Nothing is imported for that. `announce` registers what it can whenever it is called, which is
when leaves are made or unpickled, and in each call that takes a state tree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._jax import Number, attributes, is_jax, number_of, parts_of
from ._nodes import Namespace
from ._rule import Rule

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


def _split_rule(rule: Rule, name: str, found: list[tuple[str, Any]]) -> tuple[Any, ...]:
    cls = type(rule)
    static = cls.static + cls.fixed
    specs = [
        (n, (_STATIC, type(v), v))
        if n in static
        else (n, _split(v, getattr(cls, n, None), f"{name}.{n}", found))
        for n, v in attributes(rule).items()
    ]
    return _RULE, cls, tuple(specs)


def _split(value: Any, default: Any, name: str, found: list[tuple[str, Any]]) -> tuple[Any, ...]:
    """Append the numbers in a value, and return how to make the value of them."""
    cls = type(value)
    if (
        isinstance(value, (float, Number, np.floating))
        or (cls is int and isinstance(default, float))
        or is_jax(value)
        or (isinstance(value, np.ndarray) and value.dtype.kind in "fc")
    ):
        found.append((name, value))
        return (_NUMBER,)
    if isinstance(value, Rule):
        return _split_rule(value, name, found)
    if cls is tuple or cls is list:
        count = len(found)
        defaults = default if isinstance(default, tuple) else ()
        specs = tuple(
            _split(v, defaults[i] if i < len(defaults) else None, f"{name}[{i}]", found)
            for i, v in enumerate(value)
        )
        if len(found) > count or any(spec[0] == _RULE for spec in specs):
            return _SEQUENCE, cls, specs
    return _STATIC, cls, value


def _join(spec: tuple[Any, ...], numbers: Iterator[Any]) -> Any:
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


def _flatten(leaf: Any) -> tuple[list[Any], tuple[Any, ...], list[str]]:
    """Return the children of a leaf, its structure, and the names of the children."""
    found: list[tuple[str, Any]] = []
    rule = _split_rule(leaf.rule, "rule", found)
    children: list[Any] = []
    names: list[str] = []
    for name, value in found:
        children += parts_of(value)
        names += name, f"{name}.low"
    return [*children, leaf.state], (rule, leaf.frozen, leaf.tie), [*names, "state"]


def _unflatten(cls: type, structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
    """Return a leaf of any children: nothing is checked, no `__init__` runs."""
    *numbers, state = children
    rule, frozen, tie = structure
    leaf: Any = object.__new__(cls)
    leaf.rule, leaf.state = _join(rule, iter(numbers)), state
    leaf.frozen, leaf.skipped, leaf.job, leaf.tie = frozen, 0, None, tie
    note_crossing(tie)
    return leaf


# --- registering -----------------------------------------------------------------------------


def _register_with_jax(cls: type) -> None:
    tree_util = sys.modules["jax.tree_util"]
    key = tree_util.GetAttrKey

    def with_keys(leaf: Any) -> tuple[list[Any], Any]:
        children, structure, names = _flatten(leaf)
        return [(key(n), child) for n, child in zip(names, children, strict=True)], structure

    tree_util.register_pytree_with_keys(
        cls,
        with_keys,
        lambda structure, children: _unflatten(cls, structure, children),
        lambda leaf: _flatten(leaf)[:2],
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
    optree.register_pytree_node(
        cls,
        _flatten,
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
