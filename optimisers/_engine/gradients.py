"""The one check of gradients, and the question whether they are finite."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from .._arrays.dtypes import dtype_name
from .._arrays.library import (
    is_abstract,
    isnumeric,
    library_for,
    library_of,
    refuse_masked,
    wanted_of,
)
from .._arrays.traced import is_symbolic_zero
from .._messages.text import short
from ..rules.precision import MixedPrecisionState

Array = Any


def checked_gradient(g: Any, x: Array, where: Callable[[], str]) -> Array | None:
    """Return `g` as an array like `x`, or None where there is no gradient.

    Its dtype is the one in which a step on `x` is computed.

    Raises
    ------
    TypeError, ValueError
        If `g` is no gradient for `x`; the message has the path, from `where()`.
    """
    if g is None or (type(g) is tuple and not g) or is_symbolic_zero(g):
        return None
    refuse_masked(
        g,
        lambda: f"gradient at {where()}",
        ".filled(0) takes it for zeros, and None says that there is no gradient",
    )
    if not hasattr(g, "dtype") and (not isinstance(g, numbers.Number) or x.shape != ()):
        from .._messages.mixups import for_gradient

        raise TypeError(
            f"gradient at {where()}: {wanted_of(x)}, got {short(g)}{for_gradient(g, x)}"
        )
    return library_for(x).gradient(g, x, where)


# --- of a leaf ---------------------------------------------------------------------------------


def checked(
    g: Any,
    leaf: Any,
    x: Array,
    where: Callable[[], str],
    as_seen: Callable[[Array], Array] = lambda master: master,
) -> Array | None:
    """Return `g` as an array for `leaf` and its parameter; None says that there is no gradient.

    One of another dtype than the parameter's is brought to the dtype of the master copy, if there
    is one: rounded to the parameter's, which may be float16, small gradients would be lost.
    `as_seen` returns the master as `x` shows it, where that is another view than the leaf's own.

    Raises
    ------
    TypeError, ValueError
        If `g` is no gradient for `x`; the message has the path, from `where()`.
    """
    if _differ(g, x) and isinstance(leaf.state, MixedPrecisionState):
        master = as_seen(leaf.state.master)
        if library_of(master) is library_of(x) and master.shape == x.shape:
            return checked_gradient(g, master, where)
    return checked_gradient(g, x, where)


def _differ(g: Any, x: Any) -> bool:
    """Tell whether both have a dtype and not the same; those of two libraries go by their names."""
    given, wanted = getattr(g, "dtype", None), getattr(x, "dtype", None)
    if given is None or wanted is None or given is wanted:
        return False
    return dtype_name(given) != dtype_name(wanted)


def holds_nonfinite(
    k: int, leaf: Any, x: Array, gradients: Sequence[list[Any]], where: Callable[[], str]
) -> bool:
    """Tell whether one of the gradients at index `k`, first or higher, holds infinity or NaN."""
    if not isnumeric(x):
        return False
    for each in gradients:
        g = checked(each[k], leaf, x, where)
        if is_abstract(g):
            raise TypeError(
                f"at {where()}: on_nonfinite cannot look at numbers while JAX traces or torch.vmap "
                "maps; leave it out, or call update outside of jit, grad, scan, vmap, ..."
            )
        if g is not None and not library_for(g).is_finite(g):
            return True
    return False


def check_higher(
    leaves: list[Any], xs: list[Array], higher: Sequence[list[Any]], where: Callable[[int], str]
) -> None:
    """Raise if a higher derivative is none of its parameter, whether or not a rule looks at it."""
    for k, (leaf, x) in enumerate(zip(leaves, xs, strict=True)):
        if not leaf.frozen and isnumeric(x):
            for h, derivative in named(higher, k, where):
                checked(h[k], leaf, x, derivative)


def named(
    higher: Sequence[list[Any]], k: int, where: Callable[[int], str]
) -> Iterator[tuple[list[Any], Callable[[], str]]]:
    """Yield each list of higher derivatives, and a function that names its entry `k`."""
    for order, h in enumerate(higher, 2):
        yield h, partial(_derivative, order, k, where)


def _derivative(order: int, k: int, where: Callable[[int], str]) -> str:
    return f"{where(k)} (derivative {order})"


def nonfinite(path: str, places: int) -> FloatingPointError:
    """Return the error that gradients, the first one at `path`, hold infinity or NaN."""
    others = f" and {places - 1} other places" if places > 1 else ""
    return FloatingPointError(
        f"gradient at {path}{others}: expected finite numbers, got NaN or infinity; nothing was "
        "updated. on_nonfinite='skip' passes such arrays by"
    )
