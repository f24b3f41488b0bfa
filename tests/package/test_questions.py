"""Only `_arrays/` asks whose array it is: elsewhere, a method of its `Library` answers."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optimisers

PACKAGE = Path(optimisers.__file__).parent
OF_NUMPY = {"np.ndarray", "numpy.ndarray"}
"""Classes by which to ask whether an array is NumPy's; `np.generic` asks for numbers."""
ASKING = {"is_tensor", "is_jax", "is_numba", "is_mapped", "is_tracer", "is_numpy"}
"""Names of functions that would ask for one library."""

ROWS = "rows of arrays that are all NumPy's are compared, or joined, in C"
SAVED = "most arrays of a file are NumPy's, and a large model has 10,000"
FITS = "a parameter or gradient that fits as it is needs no check"
COUNT = "a count on the host, which a kernel reads and writes by its address"
REASONS = {
    "_cuda/batch.py: type(count) is np.ndarray": [COUNT],
    "_cuda/jobs.py: type(new) is np.ndarray": [COUNT],
    "_cuda/jobs.py: type(old) is np.ndarray": [COUNT],
    "_flat/restructure.py: {*map(type, pieces)} <= {np.ndarray}": [ROWS],
    "_flat/restructure.py: {*map(type, xs)} == {np.ndarray}": [ROWS],
    "_flat/restructure.py: type(g) is np.ndarray": [FITS],
    "_flat/restructure.py: type(x) is np.ndarray": [FITS],
    "io/_encoder.py: type(x) is np.ndarray": [SAVED] * 3,
    "io/_encoder.py: type(x) is not np.ndarray": [SAVED],
    "io/_pairs.py: type(x) is np.ndarray": [SAVED],
    "io/_pairs.py: {*map(type, xs)} == {np.ndarray}": [ROWS],
    "io/_safetensors.py: type(x) is np.ndarray": [SAVED],
}
"""The questions that are left, first lines of quick ways, each with its reason."""


def test_the_reader_finds_each_kind_of_question() -> None:
    asked = """
        isinstance(x, np.ndarray)
        isinstance(x, int | np.ndarray)
        isinstance(x, (np.ndarray, list))
        isinstance(x, _NUMPY)
        type(x) is np.ndarray
        type(x) is not np.ndarray
        {*map(type, xs)} == {np.ndarray}
        is_tensor(x)
        jax.is_jax(x)
        library_of(x) == "jax"
        library_of(x) is NUMPY
        library_of(type(x)) in ("torch", None)
        library.key == "numpy"
        xp.__name__.startswith("jax")
        xp is np
        type(x).__module__ == "torch"
        issubclass(cls, np.ndarray)
    """
    other = """
        isinstance(x, np.dtype)
        isinstance(x, np.generic)
        f"got {type(x).__module__}"
        library_of(g) is library
        isinstance(x, int | float)
        isinstance(x, jax.Array)
        library_of(x) is None
        library_of(x) is not None
        library_of(a) is library_of(b)
        library.is_immutable
        np.asarray(x)
        cls.__name__
        type(rule).__name__
        x is None
        def f(x: np.ndarray) -> None: pass
    """
    constants = "_NUMPY = (np.ndarray, np.generic)\n"
    for line in filter(None, map(str.strip, asked.splitlines())):
        assert len([*questions(ast.parse(constants + line))]) == 1, line
    for line in filter(None, map(str.strip, other.splitlines())):
        assert not [*questions(ast.parse(constants + line))], line


def test_only_arrays_asks_whose_array_it_is() -> None:
    found: Counter[str] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith("_arrays/"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found.update(f"{place}: {text}" for text in questions(tree))
    known = Counter({question: len(reasons) for question, reasons in REASONS.items()})
    assert found == known, "let a method of Library answer, or give the reason in REASONS"
    assert known.total() < 15


def questions(tree: ast.AST) -> Iterator[str]:
    """Yield the questions in a program, as texts."""
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _names_numpy(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in _walk(tree):
        if (
            (isinstance(node, ast.Call) and _is_asking(node, names))
            or (isinstance(node, ast.Compare) and _compares_libraries(node))
            or (isinstance(node, ast.Attribute) and _names_a_module(node))
        ):
            yield ast.unparse(node)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a program, but for the texts of messages."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from _walk(child)


def _is_asking(node: ast.Call, names: set[str]) -> bool:
    """Tell whether a call is ``isinstance(x, np.ndarray)`` or ``is_tensor(x)``, or the like."""
    name = ast.unparse(node.func).rpartition(".")[2]
    if name in ("isinstance", "issubclass"):
        return _names_numpy(node.args[1], names)
    return name in ASKING


def _names_numpy(node: ast.AST, names: set[str]) -> bool:
    """Tell whether an expression is a class of NumPy's arrays, or a choice with one in it."""
    if isinstance(node, ast.Tuple | ast.Set):
        return any(_names_numpy(part, names) for part in node.elts)
    if isinstance(node, ast.BinOp):
        return any(_names_numpy(part, names) for part in (node.left, node.right))
    if isinstance(node, ast.Starred):
        return _names_numpy(node.value, names)
    text = ast.unparse(node)
    return text in OF_NUMPY or text in names


def _compares_libraries(node: ast.Compare) -> bool:
    """Tell whether a comparison asks which library, class or namespace an array has."""
    sides = [node.left, *node.comparators]
    if any(_names_numpy(side, set()) for side in sides):
        return True
    texts = [ast.unparse(side) for side in sides]
    if {"xp", "np"} <= {*texts}:
        return True
    asks = [text.startswith("library_of") or text.endswith("library.key") for text in texts]
    named = [text[0] in "'(" or text.isupper() for text in texts]
    return any(asks) and any(named)


def _names_a_module(node: ast.Attribute) -> bool:
    """Tell whether this is ``xp.__name__``, or ``type(x).__module__``."""
    text = ast.unparse(node)
    return text == "xp.__name__" or (text.startswith("type(") and text.endswith(".__module__"))
