"""Walks over states: `map_state` and its kin, and that nobody else writes that recursion."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import optimisers
from optimisers._arrays.states import map_state, named_parts, parts_of_state

PACKAGE = Path(optimisers.__file__).parent


class Pair(NamedTuple):
    a: object
    b: object


class Wide(NamedTuple):
    a: object

    @staticmethod
    def is_wide() -> bool:
        return True


class Odd(tuple):
    """A tuple that is no plain one."""


def twice(x):
    return 2 * x


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (3, 6),
        ((), ()),
        ((1, [2, {"k": 3}]), (2, [4, {"k": 6}])),
        (Pair(1, (2,)), Pair(2, (4,))),
        ([Pair([1], {})], [Pair([2], {})]),
        (Odd((1, 2)), (1, 2, 1, 2)),
    ],
)
def test_each_part_is_changed_in_a_state_of_the_same_form(state, expected):
    new = map_state(twice, state)
    assert new == expected
    assert type(new) is type(expected)


def test_the_last_of_several_states_gives_the_form():
    assert map_state(lambda a, b: (a, b), [1, 2], Pair(3, 4)) == Pair((1, 3), (2, 4))
    assert map_state(lambda a, b: a + b, {"x": 1, "y": 2}, {"y": 10, "x": 20}) == {"y": 12, "x": 21}


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), (1, 2)), (1, (1, 2)), ((1, 2), 1), ({"a": 1}, {"b": 1}), ((1,), {0: 1}), ({}, ())],
)
def test_states_of_different_form_are_handed_over_whole(one, other):
    assert map_state(lambda a, b: [a, b], one, other) == [one, other]
    assert map_state(lambda a, b: [a, b], (0, one), (0, other)) == ([0, 0], [one, other])


def test_a_state_whose_parts_stay_is_returned_itself():
    state = Pair([1, {"k": (2,)}], ())
    assert map_state(lambda x: x, state) is state
    assert map_state(lambda a, b: b, [[0, {"k": (0,)}], ()], state) is state


def test_other_containers_are_parts():
    assert map_state(repr, ([1], (2,)), into=(tuple,)) == ("[1]", ("2",))
    assert map_state(repr, (1, Wide(1)), whole="is_wide") == ("1", "Wide(a=1)")
    assert map_state(twice, (1, Wide(1))) == (2, Wide(2))


def test_parts_come_in_order_with_their_names():
    state = Pair([1, {"k": (2,)}], Odd((3, ())))
    assert [*named_parts(state)] == [
        (("a", 0), 1),
        (("a", 1, "k", 0), 2),
        (("b", 0), 3),
    ]
    assert [*parts_of_state(state)] == [1, 2, 3]
    assert [*parts_of_state(state, (tuple,))] == [[1, {"k": (2,)}], 3]
    assert [*parts_of_state(4)] == [4]


# --- nobody else walks through a state ---------------------------------------------------------

EXCEPTIONS = {
    "_engine.arrays._kept": "goes through nodes of all types, and notes what is written into them",
    "_pytree._split": "takes rules apart, and notes how to make each value again",
    "io._differences.signature": "goes through the rules in a rule",
    "io._encoder._value": "writes JSON, and counts how deep it is",
    "io._revive._may_be": "goes through types that are noted for fields",
    "io._rule_reader._is_state": "compares a state with the nodes of a file",
    "io._rule_reader._value": "goes through the nodes of a file",
    "rules._base.class_names": "goes through the rules in a rule",
    "rules._measure.measures": "goes through the rules in a rule",
    "rules._measure.shared_in": "asks each state for the class of its rule",
}
"""Functions that call themselves and ask for tuples, and what else they do than walk."""


def walkers(tree: ast.AST) -> Iterator[str]:
    """Yield the functions that refer to themselves, and to the type tuple in a question."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            inside = [*ast.walk(function)]
            if any(map(asks_for_tuples, inside)) and any(
                is_itself(node, function.name) for node in inside
            ):
                yield function.name


def asks_for_tuples(node: ast.AST) -> bool:
    is_question = isinstance(node, ast.Compare) or (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
    )
    named = (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
    return is_question and "tuple" in named


def is_itself(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr == name and node.value.id in ("self", "cls")
    return isinstance(node, ast.Name) and node.id == name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x):\n    return [f(y) for y in x] if type(x) is tuple else x", ["f"]),
        ("def f(x):\n    if isinstance(x, (tuple, list)):\n        return map(f, x)", ["f"]),
        ("class A:\n    def f(self, x):\n        x is tuple\n        self.f(x)", ["f"]),
        ("def f(x):\n    return [g(y) for y in x] if type(x) is tuple else x", []),
        ("def f(x):\n    return f(x - 1)", []),
    ],
)
def test_the_reader_of_functions_sees_each_kind(source: str, found: list[str]) -> None:
    assert [*walkers(ast.parse(source))] == found


def test_nobody_else_walks_through_a_state() -> None:
    found = {
        ".".join([*path.relative_to(PACKAGE).with_suffix("").parts, name])
        for path in PACKAGE.rglob("*.py")
        for name in walkers(ast.parse(path.read_text()))
    }
    assert found == {*EXCEPTIONS}
