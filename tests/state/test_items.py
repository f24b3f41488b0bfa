"""Items: one class for whatever is updated."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

import optimisers
from optimisers import Adam, Leaf, setup
from optimisers._leaf import Item

PACKAGE = Path(optimisers.__file__).parent


OTHERS = {
    "_cuda/jobs.py: _Memory": "what a job has seen of an item, compared at its next step",
    "io/_entries.py: LeafNode": "a leaf in a file: the numbers of its rule and its state there",
}
"""Classes that have a rule and a state, and are not updated."""


def names_of(cls: ast.ClassDef) -> set[str]:
    """Return the names that the body of a class annotates, or has in its slots."""
    found = set()
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            found |= {n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
    return found


def test_no_other_class_has_a_rule_and_a_state() -> None:
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and {"rule", "state"} <= names_of(node)
    }
    assert found == {f"_leaf.py: {Item.__name__}", *OTHERS}


def test_a_leaf_is_an_item() -> None:
    leaf = setup(Adam(), np.ones(2))
    assert isinstance(leaf, Item)
    assert type(leaf) is Leaf is optimisers.Leaf
    assert not hasattr(leaf, "__dict__")
    assert (leaf.frozen, leaf.job, leaf.skipped, leaf.tie) == (False, None, 0, None)
