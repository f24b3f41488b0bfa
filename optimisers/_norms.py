"""Norms over a whole tree."""

from __future__ import annotations

import math
from typing import Any

from ._arrays.library import is_abstract, library_for
from ._messages.text import short
from ._state import leaves_of
from ._trees.parameters import trainables
from .rules._measure import combined, known, latest, reduced, shared_in
from .rules.tree import ClipGlobalNorm
from .words import Reduced

Array = Any
Tree = Any


def _size(x: Array) -> int:
    return math.prod(x.shape)


def norm(tree: Tree, p: float = 2.0) -> Any:
    """Return the p-norm of all numbers in the arrays of a tree.

    Parameters
    ----------
    tree : tree
        A model or its gradient. Arrays that are tied count once; what is no array of floating
        numbers is passed over.
    p : float
        Which norm, ``sum(|x|^p)^(1/p)``: inf and -inf take the largest and the smallest element, 0
        counts those that are not zero.

    Returns
    -------
    float, or 0-d array
        An array where JAX traces, or where the numbers are on a device.

    Raises
    ------
    TypeError
        If `p` is no number.
    ValueError
        If arrays overlap in memory only in part, or if the tree contains itself.

    Notes
    -----
    Sums are in double, where the library of the arrays has it, and neither overflow nor underflow
    on the way.

    See Also
    --------
    ClipGlobalNorm : scales gradients to a norm.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import norm
    >>> norm({"w": np.array([1.0, -2.0]), "b": np.array([2.0])})
    3.0
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or math.isnan(p):
        raise TypeError(f"p must be a number, inf or -inf; got {short(p)}")
    rows = [(known(reduced(Reduced("norm", x), p)[1]),) for x in trainables(tree) if _size(x)]
    return combined(("norm",), rows, p)[0] if rows else 0.0


def all_finite(tree: Tree) -> Any:
    """Tell whether all numbers in the arrays of a tree are finite.

    Parameters
    ----------
    tree : tree
        A model or its gradient.

    Returns
    -------
    bool, or 0-d array
        An array where JAX traces.

    See Also
    --------
    update : `on_nonfinite` says what is done about a gradient that is not.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import all_finite
    >>> all_finite({"w": np.array([1.0, np.inf])}), all_finite({"w": np.zeros(2), "name": "layer"})
    (False, True)
    """
    found: Any = True
    for x in trainables(tree):
        library = library_for(x)
        if is_abstract(x):
            found = library.namespace(x).all(library.namespace(x).isfinite(x)) & found
        elif not library.is_finite(x):
            return False
    return found


def norms(state: Tree) -> tuple[Any, ...]:
    """Return the norms that the `ClipGlobalNorm` rules of a state found at the last update.

    Parameters
    ----------
    state : tree
        A state tree, or a part of one.

    Returns
    -------
    tuple of float
        One for each such rule, in the order of the chain: ahead of another rule it is the norm of
        the gradients, behind it that of the steps. Before the first update each is 0.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import ClipGlobalNorm, Descent, OptimiserChain, norms, setup, update_
    >>> x = np.zeros(2)
    >>> measure = ClipGlobalNorm(omega=np.inf)
    >>> state = setup(OptimiserChain(measure, Descent(0.1), measure), x)
    >>> state, x = update_(state, x, np.array([3.0, 4.0]))
    >>> norms(state)
    (5.0, 0.5)
    """
    by_rank: dict[int, list[Array]] = {}
    for leaf in leaves_of(state):
        vectors = [v for cls, v in shared_in(leaf.state) if cls is ClipGlobalNorm]
        for rank, vector in enumerate(vectors):
            by_rank.setdefault(rank, []).append(vector)
    return tuple(known(latest(by_rank[rank])[0]) for rank in sorted(by_rank))
