"""Walks over a state: through tuples, namedtuples, lists and dicts, to the parts that they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

CONTAINERS: tuple[type, ...] = tuple, list, dict


def map_state(
    change: Callable[..., Any], *states: Any, into: Any = CONTAINERS, whole: str = ""
) -> Any:
    """Return the last of some states with each part changed to ``change(*parts)``.

    A part is an array, a number, or any object that is no plain tuple, namedtuple, list or dict.

    Parameters
    ----------
    change : callable
        Returns the new part for the parts in one position, of each state one. Where the states
        differ in form there, it is handed what each of them has.
    *states
        One or more states of one form.
    into : type or tuple of types
        The containers to walk through; others are parts.
    whole : str, optional
        The name of an attribute; states whose class has it are parts.

    Returns
    -------
    state
        A new state, or the last one given if each new part is the old one.
    """
    last = states[-1]
    cls = type(last)
    if not isinstance(last, into) or not (cls in CONTAINERS or hasattr(cls, "_make")):
        return change(*states)
    if whole and hasattr(cls, whole):
        return change(*states)
    new = []
    same = True
    if len(states) == 1:
        for old in last.values() if cls is dict else last:
            if isinstance(old, into):
                made = map_state(change, old, into=into, whole=whole)
            else:  # saves a call
                made = change(old)
            new.append(made)
            same &= made is old
    elif (rows := _side_by_side(states, last)) is not None:
        for row in rows:
            new.append(map_state(change, *row, into=into, whole=whole))
            same &= new[-1] is row[-1]
    else:
        return change(*states)
    if same:
        return last
    if cls is dict:
        return dict(zip(last, new, strict=True))
    return cls(new) if cls in CONTAINERS else cls._make(new)


def _side_by_side(states: tuple[Any, ...], last: Any) -> list[tuple[Any, ...]] | None:
    """Return the parts of some states in each position, or None if they differ in form."""
    if type(last) is dict:
        if any(not isinstance(s, dict) or s.keys() != last.keys() for s in states):
            return None
        return [tuple(s[key] for s in states) for key in last]
    if any(not isinstance(s, tuple | list) or len(s) != len(last) for s in states):
        return None
    return [*zip(*states, strict=True)]


def named_parts(
    state: Any, into: Any = CONTAINERS, names: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the parts of a state, subclasses of containers included, each after its name.

    A name is a tuple of fields, positions and keys, from the outermost container inwards.
    """
    if not isinstance(state, into):
        yield names, state
        return
    keys = state if isinstance(state, dict) else getattr(state, "_fields", range(len(state)))
    parts = state.values() if isinstance(state, dict) else state
    for key, part in zip(keys, parts, strict=True):
        yield from named_parts(part, into, (*names, key))


def parts_of_state(state: Any, into: Any = CONTAINERS) -> Iterator[Any]:
    """Yield the parts of a state, subclasses of containers included."""
    if not isinstance(state, into):
        yield state
        return
    for part in state.values() if isinstance(state, dict) else state:
        if isinstance(part, into):
            yield from parts_of_state(part, into)
        else:
            yield part
