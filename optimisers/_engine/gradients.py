"""The one check of a gradient, and whether it is finite."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from .._arrays import devices
from .._arrays import torch as _torch
from .._arrays.jax import is_jax, is_tracer
from .._arrays.library import is_narrow, isnumeric, library_of, refuse_masked
from .._messages.text import short
from ..rules._numbers import for_step
from ..rules.precision import MixedPrecisionState
from ..words import is_complex, namespace

Array = Any


def checked_gradient(g: Any, x: Array, where: Callable[[], str]) -> Array | None:
    """Return `g` as an array like `x`, or None where it says that there is no gradient.

    Its dtype is the one in which a step on `x` is computed.

    Raises
    ------
    TypeError, ValueError
        If `g` is no gradient for `x`; the message names the place, from `where()`.
    """
    if g is None or (type(g) is tuple and not g) or _is_symbolic_zero(g):
        return None
    refuse_masked(
        g,
        lambda: f"gradient at {where()}",
        ".filled(0) takes it for zeros, and None says that there is no gradient",
    )
    on_device = devices.library(x) is not None
    if on_device and devices.library(g) is not None and not _torch.is_tensor(g):
        return devices.gradient(g, x, where)
    wanted = f"expected an array of shape {tuple(x.shape)} and dtype {x.dtype}"
    if not hasattr(g, "dtype") and (not isinstance(g, numbers.Number) or x.shape != ()):
        from .._messages.mixups import for_gradient

        raise TypeError(f"gradient at {where()}: {wanted}, got {short(g)}{for_gradient(g, x)}")
    if _torch.is_tensor(x) and (_torch.is_tensor(g) or not on_device):
        return _torch.gradient(g, x, where)
    if on_device:
        return devices.gradient(g, x, where)
    if isinstance(x, np.ndarray) and not _torch.is_tensor(g):
        devices.refuse_for_host(g, x, where)
    if is_jax(x) or is_tracer(g):
        return _jax_gradient(g, x, wanted, where)
    is_boxed = library_of(type(g)) == "autograd"  # which records what is done to it
    if isinstance(x, np.ndarray):
        a = _torch.as_numpy(g, where) if _torch.is_tensor(g) else g if is_boxed else _as_numpy(g)
        if a.dtype.kind not in "biufc" and not isnumeric(a):
            raise TypeError(f"gradient at {where()}: {wanted}, got dtype {a.dtype}")
        if a.dtype.kind == "c" and x.dtype.kind != "c":
            raise TypeError(
                f"gradient at {where()}: {wanted}, got complex numbers ({a.dtype}); "
                "take the real part if that is what is meant"
            )
    else:
        xp = namespace(x)
        a = g if hasattr(g, "shape") and hasattr(g, "dtype") else xp.asarray(g, dtype=x.dtype)
    if tuple(a.shape) != tuple(x.shape):
        raise ValueError(f"gradient at {where()}: {wanted}, got shape {tuple(a.shape)}")
    if isinstance(x, np.ndarray) and not is_boxed:
        return plain(a, np.dtype(np.float32) if is_narrow(x) else x.dtype.newbyteorder("="))
    return for_step(x, a)


def is_finite(g: Array) -> bool:
    """Tell whether all numbers of a checked gradient are finite; waits for its device."""
    if devices.is_numba(g):
        g = g.copy_to_host()
    return bool(namespace(g).all(namespace(g).isfinite(g)))


def _jax_gradient(g: Any, x: Array, wanted: str, where: Callable[[], str]) -> Array:
    """Return `g` as an array of JAX like `x`, which may be NumPy's if `g` is traced."""
    xp = namespace(g if is_jax(g) else x)
    a = g if hasattr(g, "dtype") else np.asarray(g)
    if tuple(a.shape) != tuple(x.shape):
        raise ValueError(f"gradient at {where()}: {wanted}, got shape {tuple(a.shape)}")
    kind = str(a.dtype).removeprefix("torch.")
    if kind.startswith("complex") and not is_complex(x):
        raise TypeError(
            f"gradient at {where()}: {wanted}, got complex numbers ({a.dtype}); "
            "take the real part if that is what is meant"
        )
    if not kind.startswith(("bool", "int", "uint", "float", "bfloat", "complex")):
        raise TypeError(f"gradient at {where()}: {wanted}, got dtype {a.dtype}")
    if is_jax(a):
        return for_step(x, a)
    a = _torch.as_numpy(a, where) if _torch.is_tensor(a) else _as_numpy(a)
    return xp.asarray(for_step(x, a))


def _is_symbolic_zero(g: Any) -> bool:
    """Tell whether `g` is JAX's way to say that there is no gradient."""
    if type(g).__name__ in ("SymbolicZero", "Zero") and type(g).__module__.startswith("jax"):
        return True
    return getattr(getattr(g, "dtype", None), "names", None) == ("float0",)


def _as_numpy(g: Any) -> np.ndarray:
    if isinstance(g, np.ndarray):
        return g
    return np.asarray(g.detach() if hasattr(g, "detach") else g)


def plain(a: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return `a` as an aligned array in native byte order, itself if it is one."""
    with np.errstate(all="ignore"):
        return np.require(np.asarray(a), dtype, "A")


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
        If `g` is no gradient for `x`; the message names the place, from `where()`.
    """
    if isinstance(leaf.state, MixedPrecisionState) and getattr(g, "dtype", x.dtype) != x.dtype:
        master = as_seen(leaf.state.master)
        if library_of(type(master)) == library_of(type(x)) and master.shape == x.shape:
            return checked_gradient(g, master, where)
    return checked_gradient(g, x, where)


def holds_nonfinite(
    k: int, leaf: Any, x: Array, gradients: Sequence[list[Any]], where: Callable[[], str]
) -> bool:
    """Tell whether one of the gradients in place `k`, first or higher, holds infinity or NaN."""
    if not isnumeric(x):
        return False
    for each in gradients:
        g = checked(each[k], leaf, x, where)
        if is_tracer(g) or _torch.is_mapped(g):
            raise TypeError(
                f"at {where()}: on_nonfinite cannot look at numbers while JAX traces or torch.vmap "
                "maps; leave it out, or call update outside of jit, grad, scan, vmap, ..."
            )
        if g is not None and not is_finite(g):
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
    """Yield each list of higher derivatives, and what gives the name of its place `k`."""
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
