"""One of two computations; JAX may know which one only while the compiled program runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from .library import is_abstract
from .traced import chosen, is_jax

T = TypeVar("T")


def either(made: Any, first: Callable[[], T], second: Callable[[], T]) -> T:
    """Return what one of two functions returns; while JAX traces, the program holds both.

    Under ``torch.vmap``, where each model may have another answer, both are evaluated.
    """
    if not is_abstract(made):
        return first() if made else second()
    if is_jax(made):
        return cast(T, cast(Any, sys.modules["jax"]).lax.cond(made, first, second))
    return chosen(made, first(), second())
