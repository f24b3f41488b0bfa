"""The engine: updates leaves, all or none, each by the backend that suits it.

This is the only place that chooses a backend. The CPU kernels (`_kernels.pyx`) take what is a
plain float32 or float64 NumPy array with a rule whose steps they hold; everything else is
evaluated by the array library of the parameter, with the same steps. Whatever can be refused is
refused before anything is written: first everything is gathered and checked, then the leaves on
the array path are evaluated into new arrays, then the kernels run (a norm that throws does so
before they write), and only then is the rest stored.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import _kernels as baseline
from . import rules
from ._rule import ElementwiseRule, Rule, as_like
from ._tree import isnumeric, maywrite
from .compose import AccumGrad, ClipNorm, MixedPrecision, OptimiserChain
from .words import namespace

Array = Any

# --- which kernels ---------------------------------------------------------------------------


def _find_kernels() -> dict[str, Any]:
    """Import the twins of the kernels, by instruction set, widest first."""
    found = {}
    for name in baseline.instruction_sets():
        try:
            found[name] = importlib.import_module(f"{baseline.__name__}_{name}")
        except ImportError:  # built by a compiler that cannot
            continue
    return {**found, "baseline": baseline}


def _choose_kernels() -> tuple[str, Any]:
    wanted = os.environ.get("OPTIMISERS_ISA") or next(iter(available))
    if wanted not in available:
        raise ImportError(
            f"OPTIMISERS_ISA={wanted!r}: this build and processor have {', '.join(available)}"
        )
    return wanted, available[wanted]


available = _find_kernels()
isa, kernels = _choose_kernels()
available_isas = tuple(available)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=kernels.after_fork)


def set_num_threads(n: int) -> None:
    """Set the most threads that an update uses.

    Parameters
    ----------
    n : int
        At least 1; or 0 to do again what OpenMP says (``OMP_NUM_THREADS``, ``threadpoolctl``).
    """
    if n != int(n) or n < 0:
        raise ValueError(f"the number of threads must be a whole number, 0 or more; got {n!r}")
    kernels.set_num_threads(int(n))


def get_num_threads() -> int:
    """Return the most threads that an update uses; small ones use fewer."""
    return int(kernels.get_num_threads())


# --- making a rule ready for the kernels -----------------------------------------------------

_steps = {getattr(rules, name).step: index for name, index in kernels.step_index.items()}
_step_of: dict[type, int | None] = {}


def lower(rule: Rule) -> Any:
    """Return the plan by which the kernels run `rule`, or None if they cannot."""
    cls: Any = type(rule)
    if cls not in _step_of:
        _step_of[cls] = _find_step(cls)
    if (step := _step_of[cls]) is not None:
        return kernels.StepPlan(rule, step, cls.counts)
    if isinstance(rule, OptimiserChain):
        parts = tuple(map(lower, rule.rules))
        return None if None in parts else kernels.ChainPlan(rule, parts)
    if isinstance(rule, ClipNorm):
        return kernels.NormPlan(rule, _steps[rules._Scale.step], rule.p)
    if isinstance(rule, AccumGrad):
        hold, release = lower(rules._Hold()), lower(rules._Release(rule.n))
        return kernels.AccumulatePlan(rule, hold, release, rule.n)
    if isinstance(rule, MixedPrecision):
        inner = lower(rule.rule)
        return None if inner is None else kernels.MixedPlan(rule, inner)
    return None


def _find_step(cls: Any) -> int | None:
    """Return where the step of an elementwise rule stands in the kernels' table."""
    elementwise = issubclass(cls, ElementwiseRule) and cls.apply is ElementwiseRule.apply
    return _steps.get(cls.step) if elementwise and cls.move is Rule.move else None


# --- the array path --------------------------------------------------------------------------


def checked_gradient(g: Any, x: Array, where: Callable[[], str]) -> Array | None:
    """Return `g` as an array like `x`, or None where it says that there is no gradient.

    Raises
    ------
    TypeError, ValueError
        If `g` is no gradient for `x`; the message names the place, from `where()`.
    """
    if g is None or (type(g) is tuple and not g) or _is_symbolic_zero(g):
        return None
    wanted = f"expected an array of shape {tuple(x.shape)} and dtype {x.dtype}"
    if not hasattr(g, "dtype") and (not isinstance(g, numbers.Number) or x.shape != ()):
        raise TypeError(f"gradient at {where()}: {wanted}, got {g!r:.60} ({type(g).__name__})")
    if isinstance(x, np.ndarray):
        a = _as_numpy(g)
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
    if isinstance(x, np.ndarray):
        return _plain(a, x.dtype.newbyteorder("="))
    return as_like(x, a)


def _is_symbolic_zero(g: Any) -> bool:
    """Tell whether `g` is JAX's way to say that there is no gradient."""
    if type(g).__name__ in ("SymbolicZero", "Zero") and type(g).__module__.startswith("jax"):
        return True
    return getattr(getattr(g, "dtype", None), "names", None) == ("float0",)


def _as_numpy(g: Any) -> np.ndarray:
    if isinstance(g, np.ndarray):
        return g
    return np.asarray(g.detach() if hasattr(g, "detach") else g)


def _plain(a: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return `a` as an aligned array in native byte order, itself if it is one."""
    with np.errstate(all="ignore"):
        return np.require(a, dtype, "A").view(np.ndarray)


def read_only(a: Array) -> Array:
    """Return a view that a user's rule cannot write into."""
    if isinstance(a, np.ndarray):
        a = a.view()
        a.flags.writeable = False
    return a


def evaluate(
    rule: Rule, state: Any, x: Array, gs: Sequence[Array | None]
) -> tuple[Any, Array | None]:
    """Return new state and parameter by the array library of `x`; write into nothing given.

    The parameter is None where the rule makes no step.
    """
    if isinstance(x, np.ndarray):
        x = _plain(x, x.dtype.newbyteorder("="))
    if type(rule).apply is not ElementwiseRule.apply:
        state = fresh(state)
    dx, *higher = map(read_only, gs)
    with np.errstate(all="ignore"):
        state, new = rule.move(state, read_only(x), dx, *higher)
    if new is not None and tuple(new.shape) != tuple(x.shape):
        raise ValueError(
            f"{type(rule).__name__}.apply returned a step that makes the parameter's shape "
            f"{tuple(new.shape)} out of {tuple(x.shape)}"
        )
    return state, new


def fresh(state: Any) -> Any:
    """Return a copy of a state that shares no memory with it."""
    if isinstance(state, np.ndarray):
        return np.array(state, order="K", subok=True)
    if type(state) is tuple:
        return tuple(map(fresh, state))
    if isinstance(state, tuple) and hasattr(state, "_make"):
        return type(state)._make(map(fresh, state))
    if isnumeric(state):
        return state.clone() if hasattr(state, "clone") else state
    return copy.deepcopy(state)


def _blank(state: Any) -> Any:
    """Return a state of the same form whose arrays are still empty."""
    if isinstance(state, np.ndarray):
        return np.empty_like(state)
    if type(state) is tuple:
        return tuple(map(_blank, state))
    return type(state)._make(map(_blank, state))


# --- all leaves ------------------------------------------------------------------------------

_watchers: list[list[tuple[int, str]]] = []


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[int, str]]]:
    """Note (place, backend) for each leaf that is updated meanwhile; for tests."""
    seen: list[tuple[int, str]] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def advance(
    leaves: list[Any],
    xs: list[Array],
    gs: list[Any],
    higher: Sequence[list[Any]],
    where: Callable[[int], str],
    in_place: bool,
) -> tuple[dict[int, Array], dict[int, Any]]:
    """Update every leaf that has a gradient and is not frozen; all of them or none.

    Parameters
    ----------
    leaves, xs, gs, higher
        Beside each other: distinct leaves, their parameters, first and higher gradients.
    where : callable
        Gives the path of a place, for messages.
    in_place : bool
        Write into the writable parameters and into the states of the leaves; else into nothing
        given.

    Returns
    -------
    (new_x, new_state)
        By place, what was not written in place: parameters, and the states that leaves are to get.
    """
    batch = kernels.Batch(None if in_place else _blank)
    rest = batch.gather(leaves, xs, gs, lower)
    new_x, new_state = batch.new_x, batch.new_state
    stored: list[tuple[Array, Array]] = []
    for k in rest:
        leaf, x = leaves[k], xs[k]
        g = checked_gradient(gs[k], x, partial(where, k))
        if g is None:
            continue
        plan = lower(leaf.rule)
        if plan is not None and isinstance(x, np.ndarray):
            ordered = np.ascontiguousarray if x.flags.c_contiguous else np.asfortranarray
            if batch.take(k, plan, leaf.state, x, ordered(g).reshape(x.shape)):
                continue
        others = [checked_gradient(h[k], x, partial(where, k)) for h in higher]
        try:
            new_state[k], new = evaluate(leaf.rule, leaf.state, x, [g, *others])
        except FloatingPointError as error:
            raise FloatingPointError(f"at {where(k)}: {error}") from error
        except Exception as error:
            error.add_note(f"raised by {leaf.rule!r} at {where(k)}; nothing was updated")
            raise
        if new is None:
            continue
        if in_place and maywrite(x):
            stored.append((x, new))
        else:
            new_x[k] = new
    if clash := batch.settle():
        raise ValueError(
            f"the parameters or states at {where(clash[0])} and {where(clash[1])} overlap in "
            "memory; copy one of them, or call setup anew with the model that ties them"
        )
    try:
        batch.run()
    except FloatingPointError as error:
        raise FloatingPointError(f"at {where(batch.failed)}: {error}") from error
    for x, new in stored:
        x[...] = new
    for seen in _watchers:
        seen.extend((k, "kernels") for k in batch.places())
        seen.extend((k, "arrays") for k in rest if k in new_state and k not in batch.places())
    return new_x, new_state
