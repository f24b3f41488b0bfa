"""State trees as trees of JAX and optree: how a `Leaf` is flattened and rebuilt.

JAX takes time for each array that crosses, so the children of a leaf are few: the numbers of its
rule and the counts of its state, packed into one vector (see `traced.Packed`), and the rest of its
state, with None in place of each count. A number that is no float (a whole number of JAX, an array)
is a child by itself. The structure of a leaf is the rest: the class of the rule, switches, whole
numbers, whether it is frozen. Hence `jax.jit` compiles anew for another structure, and not for
other numbers.

Neither library is imported here. `announce` registers the classes with those that are loaded. It is
called when leaves are made or unpickled, and in each call that takes a state tree.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from ._arrays.library import library_for
from ._arrays.states import map_state, parts_of_state
from ._arrays.traced import (
    Number,
    Packed,
    attributes,
    is_count,
    is_one_float,
    number_of,
    of_jax,
    parts_of,
)
from ._arrays.traced import packed as pack
from ._trees.nodes import Namespace
from .rules._base import Rule

# --- ties ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tie:
    """Shared by leaves that were one before JAX made one for each of its places.

    Ties compare by their places, so that equal models have equal structure and are compiled once.
    Leaves belong together if they share one tie by identity.
    """

    places: tuple[str, ...]


class _Crossed:
    """Whether a tied leaf was ever flattened; if not, no leaf has to be looked at."""

    yet = False


def have_ties_crossed() -> bool:
    """Tell whether there may be different leaves that are tied."""
    return _Crossed.yet


def note_crossing(tie: Tie | None) -> None:
    """Note that there are different leaves that are tied, if `tie` is not None."""
    _Crossed.yet |= tie is not None


# --- rules -----------------------------------------------------------------------------------

# A value is rebuilt from a number of the vector, from a number that is a child, as a rule, as a
# sequence of such, or kept as it was. The class of a kept value is noted since True == 1 == 1.0.
_PACKED, _CHILD, _RULE, _SEQUENCE, _STATIC = range(5)
Spec = tuple[Any, ...]


class _Found:
    """The numbers of a rule, in the order in which they come back."""

    def __init__(self) -> None:
        self.packed: list[Any] = []
        self.children: list[Any] = []


def _split_rule(rule: Rule, found: _Found) -> Spec:
    cls = type(rule)
    static = cls.static + cls.fixed
    specs = [
        (n, (_STATIC, type(v), v) if n in static else _split(v, getattr(cls, n, None), found))
        for n, v in attributes(rule).items()
    ]
    return _RULE, cls, tuple(specs)


def _split(value: Any, default: Any, found: _Found) -> Spec:
    """Note the numbers in a value, and return the spec by which they make it again."""
    cls = type(value)
    if is_one_float(value) or (cls is int and isinstance(default, float)):
        found.packed.append(value)
        return (_PACKED,)
    if cls is Number or library_for(value).enters_jax(value):
        found.children += parts_of(value)
        return (_CHILD,)
    if isinstance(value, Rule):
        return _split_rule(value, found)
    if cls is tuple or cls is list:
        defaults = default if isinstance(default, tuple) else ()
        specs = tuple(
            _split(v, defaults[i] if i < len(defaults) else None, found)
            for i, v in enumerate(value)
        )
        if any(spec[0] != _STATIC for spec in specs):
            return _SEQUENCE, cls, specs
    return _STATIC, cls, value


@functools.lru_cache(maxsize=1024)
def _shared(spec: Spec) -> Spec:
    """Return the first of equal specs, since JAX compares the structures at each call."""
    return spec


def _names(spec: Spec, name: str) -> Iterator[str]:
    """Yield the names of the numbers of a value that are children, in the order of `_split`."""
    if spec[0] == _CHILD:
        yield name
    elif spec[0] == _RULE:
        for field, below in spec[2]:
            yield from _names(below, f"{name}.{field}")
    elif spec[0] == _SEQUENCE:
        for i, below in enumerate(spec[2]):
            yield from _names(below, f"{name}[{i}]")


def classes_in(spec: Spec) -> Iterator[type[Rule]]:
    """Yield the classes of a rule and of the rules in it."""
    if spec[0] == _RULE:
        yield spec[1]
        for _, below in spec[2]:
            yield from classes_in(below)
    elif spec[0] == _SEQUENCE:
        for below in spec[2]:
            yield from classes_in(below)


def _join(spec: Spec, numbers: Iterator[Any], children: Iterator[Any]) -> Any:
    kind = spec[0]
    if kind == _PACKED:
        return next(numbers)
    if kind == _CHILD:
        return number_of(next(children), next(children))
    if kind == _STATIC:
        return spec[2]
    if kind == _SEQUENCE:
        return spec[1](_join(below, numbers, children) for below in spec[2])
    rule = object.__new__(spec[1])
    for name, below in spec[2]:
        object.__setattr__(rule, name, _join(below, numbers, children))
    return rule


# --- counts ----------------------------------------------------------------------------------


def _without_counts(state: Any) -> tuple[Any, list[Any]]:
    """Return a state with None in place of its counts, and the counts."""
    counts: list[Any] = []

    def emptied(part: Any) -> Any:
        if hasattr(type(part), "keeps_count") and is_count(part[-1]):
            counts.append(part[-1])
            return type(part)._make((*part[:-1], None))
        return part

    return map_state(emptied, state, into=tuple, whole="keeps_count"), counts


def _with_counts(state: Any, packed: Packed) -> Any:
    """Return a state that has its counts again."""
    places = itertools.count()
    like = next(iter(of_jax(parts_of_state(state, tuple))), None)

    def filled(part: Any) -> Any:
        if hasattr(type(part), "keeps_count") and part[-1] is None:
            return type(part)._make((*part[:-1], packed.count(next(places), like)))
        return part

    return map_state(filled, state, into=tuple, whole="keeps_count")


# --- leaves ----------------------------------------------------------------------------------

Structure = tuple[tuple[Spec, int], bool, "Tie | None"]
"""The spec of the rule and the number of packed numbers; whether it is frozen; the tie."""


class Crossed(Packed):
    """A leaf's rule and state as JAX or optree returned them; rebuilt at the first access.

    JAX computes a number after the call that returns it, so that a conversion to float waits. A
    training loop, which gives the leaf to the next call, never converts. The children that it gives
    on are those that came, of the same types, so that nothing is compiled anew.
    """

    __slots__ = ("children", "made", "structure")

    def __init__(self, structure: Structure, children: tuple[Any, ...]) -> None:
        self.structure = structure
        self.children = children
        """The vector, numbers that are not in it in two parts each, the state without counts."""
        self.made: Rule | None = None

    @property
    def vector(self) -> Any:
        return self.children[0]

    @property
    def length(self) -> int:
        return self.structure[0][1]

    def copied(self, copy: Callable[[Any], Any]) -> Crossed:
        """Return the same with a copy of the state."""
        return Crossed(self.structure, (*self.children[:-1], copy(self.children[-1])))

    def drop_state(self) -> None:
        """Forget the state, which the leaf keeps from now on."""
        self.children = *self.children[:-1], None

    def is_all_of(self, leaf: Any) -> bool:
        """Tell whether a leaf still has this rule and this state."""
        rule = _rule_at_hand(leaf)
        return (rule is None or rule is self.made) and _state_at_hand(leaf) is None

    def rule(self) -> Rule:
        if self.made is None:
            numbers, children = iter(self.numbers()), iter(self.children[1:-1])
            self.made = cast(Rule, _join(self.structure[0][0], numbers, children))
        return self.made

    def state(self) -> Any:
        """Return the state, with counts made anew each time, for the same reason as a `Number`."""
        return _with_counts(self.children[-1], self)

    def with_state(self, state: Any) -> Crossed | None:
        """Return the same rule with another state; None if its counts do not fit the vector."""
        rest, counts = _without_counts(state)
        if self.holds_arrays():
            if self.vector.shape != (2 * (self.length + len(counts)),):
                return None
        elif counts:
            return None
        return Crossed(self.structure, (self.counting(counts), *self.children[1:-1], rest))


def _flatten(leaf: Any) -> tuple[tuple[Any, ...], Structure]:
    """Return the children of a leaf, and its structure."""
    crossed = leaf.crossed
    if crossed is None:
        return _packed_anew(leaf)
    rule, state = _rule_at_hand(leaf), _state_at_hand(leaf)
    if rule is not None and rule is not crossed.made:
        return _packed_anew(leaf)
    if state is not None:
        crossed = crossed.with_state(state)
        if crossed is None:
            return _packed_anew(leaf)
    structure = crossed.structure
    if structure[1] is not leaf.frozen or structure[2] is not leaf.tie:
        structure = structure[0], leaf.frozen, leaf.tie
    return crossed.children, structure


def _packed_anew(leaf: Any) -> tuple[tuple[Any, ...], Structure]:
    found = _Found()
    spec = _split_rule(leaf.rule, found)
    crossed, state = leaf.crossed, _state_at_hand(leaf)
    counts: list[Any] = []
    if crossed is not None and state is None:
        rest = crossed.children[-1]
        ends = crossed.counts() if crossed.holds_arrays() else None
    else:
        rest, counts = _without_counts(leaf.state)
        ends = None
    length = len(found.packed)
    vector = None
    if length or counts or (ends is not None and ends.shape[-1]):
        vector = pack(found.packed, counts, ends)
    with contextlib.suppress(TypeError):  # a static value has no hash
        spec = _shared(spec)
    return (vector, *found.children, rest), ((spec, length), leaf.frozen, leaf.tie)


def _rule_at_hand(leaf: Any) -> Any:
    """Return the rule of a leaf, or None if it is not rebuilt yet."""
    try:
        return type(leaf).rule.__get__(leaf)  # unlike leaf.rule, does not make one
    except AttributeError:
        return None


def _state_at_hand(leaf: Any) -> Any:
    """Return the state of a leaf, or None if it is not rebuilt yet."""
    try:
        return type(leaf).state.__get__(leaf)
    except AttributeError:
        return None


def _names_of(structure: Structure) -> list[str]:
    """Return the names of the children of a leaf."""
    loose = [part for n in _names(structure[0][0], "rule") for part in (n, f"{n}.low")]
    return ["packed", *loose, "state"]


def _unflatten(cls: type, structure: Structure, children: Iterable[Any]) -> Any:
    """Return a leaf with any children; nothing is checked, and no `__init__` runs."""
    leaf: Any = object.__new__(cls)
    leaf.crossed = Crossed(structure, tuple(children))
    _, leaf.frozen, leaf.tie = structure
    leaf.skipped, leaf.job = 0, None
    if leaf.tie is not None:
        note_crossing(leaf.tie)
    return leaf


def carried(leaf: Any, crossed: Crossed) -> Any:
    """Return another leaf for the same places, whose rule and state are rebuilt late."""
    new: Any = object.__new__(type(leaf))
    new.crossed = crossed
    new.frozen, new.tie, new.skipped, new.job = leaf.frozen, leaf.tie, leaf.skipped, None
    return new


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

    def with_names(leaf: Any) -> tuple[tuple[Any, ...], Any, list[str]]:
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
# For each module the last name that it defines, and the function to call once that is there: before
# this the module is not loaded, or only in part.
_pending: dict[str, Any] = {
    _JAX: ("register_pytree_with_keys", _register_with_jax),
    _OPTREE: ("register_pytree_node", _register_with_optree),
}


def announce(cls: type) -> None:
    """Register `cls`, the class of leaves, with JAX and optree, once they are loaded."""
    loaded = sys.modules  # a quick test comes first, since each update calls this
    if (_JAX in loaded and _JAX in _pending) or (_OPTREE in loaded and _OPTREE in _pending):
        for module in [*_pending]:
            if module in loaded:
                name, register = _pending[module]
                if hasattr(loaded[module], name) and _pending.pop(module, ()):
                    register(cls)
