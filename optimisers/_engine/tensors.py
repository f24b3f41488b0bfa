"""Arrays that the CPU kernels take by views, as PyTorch's: items with views in their states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._arrays.library import Library, library_of
from .._leaf import Item


def sights(
    library: Library,
    leaves: Sequence[Item],
    xs: Sequence[Any],
    gs: Sequence[Any],
    places: Sequence[int],
) -> tuple[list[Item | None], list[Any], list[Any], list[int]]:
    """Return what the kernels may take for the arrays at `places`, and the other places.

    The lists are as long as those given, with None elsewhere.
    """
    n = len(leaves)
    stand_ins: list[Item | None] = [None] * n
    views: list[Any] = [None] * n
    grads: list[Any] = [None] * n
    others: list[int] = []
    see, see_state = library.viewers()
    for k in places:
        g, leaf = gs[k], leaves[k]
        seen = see(g) if library_of(g) is library else None
        if seen is None:  # NumPy's own, or in need of a check
            others.append(k)
            continue
        views[k], grads[k] = see(xs[k]), seen
        stand_ins[k] = Item(leaf.rule, see_state(leaf.state))
    return stand_ins, views, grads, others
