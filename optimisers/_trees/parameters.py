"""Ties: one parameter at several places of a model.

Two places are tied if they hold the same array object, or views of exactly the same elements of
memory, such as ``w`` and ``w.T`` (NumPy, PyTorch, CuPy). Arrays of JAX tie nothing: they are
immutable, so that one at two places says no more than that both have the same values.

`parameters` finds every trainable array of a model, and `owners` which of them are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

from .._arrays.layout import Memory
from .._arrays.library import is_immutable, isnumeric, refuse_masked_parameter
from .._arrays.sharing import crowds, has_own_memory, memory, overlapping
from .nodes import trainable_keys
from .paths import KeyPath
from .untrained import refuse_ours, seems_to_train
from .walks import fold

Array = Any
Tree = Any
Place = tuple[KeyPath, Array]

# --- the parameters of a model ---------------------------------------------------------------


@overload
def trainables(model: Tree, path: Literal[False] = False) -> list[Array]: ...
@overload
def trainables(model: Tree, path: Literal[True]) -> list[Place]: ...
@overload
def trainables(model: Tree, path: bool) -> list[Any]: ...
def trainables(model: Tree, path: bool = False) -> list[Any]:
    """Return the trainable arrays of a model, each once, in the order of its flat vector.

    Parameters
    ----------
    model : tree
        The model.
    path : bool
        Whether to give the place of each array too.

    Returns
    -------
    list of array, or of (KeyPath, array)
        The arrays themselves, not copies. Of a parameter that is at several places, the array at
        the first. An array of JAX at several places is a parameter at each.

    Raises
    ------
    ValueError
        If arrays overlap in memory only in part, or if the model contains itself.

    See Also
    --------
    destructure : copies them into one vector.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import trainables
    >>> w = np.ones((2, 3))
    >>> model = {"encoder": w, "bias": np.zeros(2), "decoder": w.T, "name": "tied", "step": 7}
    >>> [x.shape for x in trainables(model)]
    [(2, 3), (2,)]
    >>> [str(path) for path, x in trainables(model, path=True)]
    ["['encoder']", "['bias']"]
    >>> sum(x.size for x in trainables(model))
    8
    """
    places, owner = parameters(model)
    if not places:
        refuse_ours(model)
    found = [place for k, place in enumerate(places) if owner[k] == k]
    return found if path else [x for _, x in found]


def parameters(model: Tree, unknown: list[Place] | None = None) -> tuple[list[Place], list[int]]:
    """Return every place of a trainable array, and for each the first place tied to it.

    The places of arrays that seem to be parameters, but are none, are added to `unknown`.
    """
    places: list[Place] = []

    def leaf(path: KeyPath, x: Any) -> None:
        if isnumeric(x):
            refuse_masked_parameter(x, lambda: path)
            places.append((path, x))
        elif unknown is not None and seems_to_train(x):
            unknown.append((path, x))

    fold(model, leaf, lambda path, x, results: None, keys=trainable_keys)
    return places, owners(places)


# --- which arrays are one --------------------------------------------------------------------


def owners(arrays: Sequence[Place]) -> list[int]:
    """Return for each array the position of the first array tied to it; often its own.

    Raises
    ------
    ValueError
        If two arrays share some elements but are not views of exactly the same.
    """
    first: dict[int, int] = {}
    owner = [
        k if is_immutable(x) else first.setdefault(id(x), k) for k, (_, x) in enumerate(arrays)
    ]
    if all(has_own_memory(arrays[k][1]) for k in first.values()):
        return owner
    for crowd in crowds(arrays, first.values()):
        shown: dict[Any, int] = {}
        for k in sorted(crowd):
            elements = cast(Memory, memory(arrays[k][1])).elements()
            owner[k] = shown.setdefault(k if elements is None else elements, k)
        if found := len(shown) > 1 and overlapping([arrays[k] for k in shown.values()]):
            raise ValueError(_overlap_text(*found))
    return [owner[k] for k in owner]


def _overlap_text(a: Place, b: Place) -> str:
    kinds = ""
    if a[1].dtype != b[1].dtype:
        kinds = f", dtypes {a[1].dtype} and {b[1].dtype}"
    return (
        f"the arrays at {a[0]} and {b[0]} overlap in memory without being views of exactly the "
        f"same elements: shapes {tuple(a[1].shape)} and {tuple(b[1].shape)}{kinds}; "
        "copy one of them"
    )
