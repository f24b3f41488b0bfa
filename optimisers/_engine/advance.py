"""The engine: updates leaves, all or none, each by the backend that suits it.

This is the only place that chooses a backend. The CPU kernels (`_kernels.pyx`) take what is a
plain NumPy array of float32, float64, float16 or bfloat16, or a tensor that can be seen as one,
with a rule whose steps they hold or can have compiled; the CUDA kernels (`_cuda`) take what
is float32 or float64 on a device; everything else goes the array path (`arrays`), with the same
steps. Whatever can be refused is refused before anything is written: first everything is gathered
and checked, then the leaves on the array path are evaluated into new arrays, then the kernels run
(a norm that throws does so before they write), and only then is the rest stored.

A single array, such as the flat vector of a model, goes straight to the kernels (`advance_one`);
what is out of the ordinary about it, `advance` finds out.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from .._arrays import devices
from .._arrays import torch as _torch
from .._arrays.jax import is_jax, is_tracer
from .._arrays.library import isnumeric, library_of, maywrite, of_class, refuse_masked_parameter
from .._arrays.states import parts_of_state
from .._messages.text import short
from .._trees.parameters import overlap, span
from ..rules._base import ANEW
from ..rules._numbers import is_traced, widened
from ..rules.precision import MixedPrecisionState
from . import cpu
from .arrays import (
    Call,
    at_once,
    blank,
    checked_gradient,
    evaluate,
    is_finite,
    refuse_masked_state,
    rewritten,
    writing,
)
from .ready import cuda, lower
from .tensors import sights

Array = Any


Stored = tuple[int, Array, Array]
"""A place, an array of its parameter or state, and what is to be written into it."""

Beside = Callable[[dict[int, Array], dict[int, Any], Sequence[int]], list[Call]]
"""What tells `advance` what else is to be written with a step."""

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


NONFINITE = "ignore", "skip", "raise"
"""What can be done about a gradient with NaN or infinity in it."""


def advance_one(leaf: Any, x: Array, g: Any, on_nonfinite: str) -> bool:
    """Update a leaf that is the whole state tree in place, at one stroke; tell whether it could be.

    If not, nothing has happened: `advance` does it then, or says why not.
    """
    if not cpu.kernels.update_one(leaf, x, g, lower, on_nonfinite):
        return False
    for seen in _watchers:
        seen.append((0, "kernels"))
    return True


def advance(
    leaves: list[Any],
    xs: list[Array],
    gs: list[Any],
    higher: Sequence[list[Any]],
    where: Callable[[int], str],
    in_place: bool,
    on_nonfinite: str = "ignore",
    beside: Beside | None = None,
    skipped: Sequence[int] = (),
) -> tuple[dict[int, Array], dict[int, Any], list[int]]:
    """Update every leaf that has a gradient and is not frozen; all of them or none.

    All that is written in place is written at one stroke, which an interrupt finds not begun or
    done: a caller who has more to write hands it over as `beside`.

    Parameters
    ----------
    leaves, xs, gs, higher
        Beside each other: distinct leaves, their parameters, first and higher gradients.
    where : callable
        Gives the path of a place, for messages.
    in_place : bool
        Write into the writable parameters and into the states of the leaves; else into nothing
        given.
    on_nonfinite : {"ignore", "skip", "raise"}
        What to do about a gradient with NaN or infinity in it.
    beside : callable, optional
        Given, by place, the parameters that are not written in place and the states that are new,
        and the places that are skipped, returns what else is to be written when the rest has its
        values.
    skipped : sequence of int
        Places whose leaves count that they are passed by.

    Returns
    -------
    (new_x, new_state, skipped)
        By place, what was not written in place: parameters and states. If `in_place`, the leaves
        have their states already. And the places that were skipped: `gs` has None there now.

    Raises
    ------
    FloatingPointError
        If a gradient holds NaN or infinity, and that is to be raised.
    TypeError
        If JAX traces, which knows no numbers yet, and numbers are to be looked at.
    """
    judges = on_nonfinite != "ignore"
    if judges and on_nonfinite not in NONFINITE:
        known = ", ".join(map(repr, NONFINITE))
        raise ValueError(f"on_nonfinite must be one of {known}; got {short(on_nonfinite)}")
    _check_higher(leaves, xs, higher, where)
    batch = cpu.kernels.Batch(None if in_place else blank)
    try:
        rest = batch.gather(leaves, xs, gs, lower, not judges and beside is None and not skipped)
        tensors = _torch.places(xs, rest) if rest else []
        if tensors:
            *as_views, unseen = sights(leaves, xs, gs, tensors)
            unseen += batch.gather(*as_views, lower)
            rest = sorted({*rest}.difference(tensors).union(unseen))
    except Exception as error:
        if batch.ran:
            raise _located(error, batch.failed, where) from error
        if batch.failed >= 0:
            _note(error, leaves[batch.failed], where(batch.failed))
        raise
    new_x, new_state = batch.new_x, batch.new_state
    on_device: Any = None
    stored: list[Stored] = []
    bad: set[int] = set()
    for k in rest:
        leaf, x = leaves[k], xs[k]
        if _torch.is_tensor(x):
            _torch.refuse_given_back(x, leaf.state, partial(where, k))
        if judges and _holds_nonfinite(k, leaf, x, [gs, *higher], partial(where, k)):
            bad.add(k)
            continue
        if leaf.job is not None:
            on_device = on_device or _device_batch(batch, in_place)
            if on_device.try_repeat(k, leaf, x, gs[k]):
                continue
        if not isnumeric(x):
            from .._messages.mixups import for_model

            told = f"at {where(k)}: the state tree has a parameter, the model {short(x)}"
            raise TypeError(told + for_model(x))
        refuse_masked_parameter(x, partial(where, k))
        g = checked(gs[k], leaf, x, partial(where, k))
        if g is None:
            continue
        if devices.library(x) is not None:
            on_device = on_device or _device_batch(batch, in_place)
            try:
                if _take_on_device(on_device, k, leaf, x, g, partial(where, k)):
                    continue
            except Exception as error:
                _note(error, leaf, where(k))
                raise
        elif _take(batch, k, leaf, x, g):
            continue
        made, new = _evaluated(k, leaf, x, g, higher, where)
        if in_place and _torch.is_mapped(new) and not _torch.is_mapped(x):
            raise TypeError(
                f"at {where(k)}: update_ cannot write what torch.vmap maps into a tensor that it "
                "does not map; use update, which returns new ones"
            )
        is_known = _torch.is_mapped(new) or not is_traced(new)
        if in_place and new is not None and maywrite(x) and is_known:
            stored.append((k, x, new))
        elif new is not None:
            new_x[k] = new
        if in_place:
            made, writes = rewritten(leaf.state, made)
            stored += [(k, *write) for write in writes]
        new_state[k] = made
    if judges:
        bad.update(batch.nonfinite())
        for k in batch.places() if higher else ():
            if _holds_nonfinite(k, leaves[k], xs[k], higher, partial(where, k)):
                bad.add(k)
    if bad:
        if on_nonfinite == "raise":
            raise nonfinite(where(min(bad)), len(bad))
        for k in bad:
            gs[k] = None
        passed = sorted(bad)
        return advance(leaves, xs, gs, higher, where, in_place, beside=beside, skipped=passed)
    for k in rest:
        if k in new_x:
            new_x[k] = of_class(xs[k], new_x[k])
    clash = batch.settle() or (on_device and on_device.settle())
    by_cuda = on_device.places() if on_device else []
    if clash := clash or (stored and _clash(batch, leaves, xs, by_cuda, stored)):
        raise overlapping(*map(where, clash))
    try:
        if on_device:
            on_device.measure()
        if (in_place and (rest or tensors or skipped)) or beside is not None or on_device:
            calls: list[Call] = [(batch.run,)]
            if on_device:
                calls += on_device.calls()
            calls += [writing(x, values) for _, x, values in stored]
            if in_place:
                calls += [(setattr, leaves[k], "state", new) for k, new in new_state.items()]
                calls += _counts(leaves, skipped)
            if beside is not None:
                calls += beside(new_x, new_state, skipped)
            if in_place and tensors:
                seen_by_torch = {*batch.places(), *by_cuda}.intersection(tensors)
                calls.append(_torch.noting([xs[k] for k in seen_by_torch]))
            at_once(calls)
        elif not batch.ran:
            batch.run()
    except (FloatingPointError, RuntimeError) as error:
        failed = batch.failed if on_device is None or batch.failed >= 0 else on_device.failed
        raise _located(error, failed, where) from error
    if tensors:
        _give_tensors(batch, tensors, leaves, xs, in_place)
    for seen in _watchers:
        by_kernels = batch.places()
        arrays = {*new_state}.intersection(rest).difference(by_kernels, by_cuda)
        for backend, taken in (("kernels", by_kernels), ("cuda", by_cuda), ("arrays", arrays)):
            seen.extend(zip(sorted(taken), itertools.repeat(backend)))
    return new_x, new_state, [*skipped]


def _check_higher(
    leaves: list[Any], xs: list[Array], higher: Sequence[list[Any]], where: Callable[[int], str]
) -> None:
    """Raise if a higher derivative is none of its parameter, whether or not a rule looks at it."""
    for k, (leaf, x) in enumerate(zip(leaves, xs, strict=True)) if higher else ():
        if not leaf.frozen and isnumeric(x):
            for h, derivative in _named(higher, k, where):
                checked(h[k], leaf, x, derivative)


def _named(
    higher: Sequence[list[Any]], k: int, where: Callable[[int], str]
) -> Iterator[tuple[list[Any], Callable[[], str]]]:
    """Yield each list of higher derivatives, and what gives the name of its place `k`."""
    for order, h in enumerate(higher, 2):
        yield h, partial(_derivative, order, k, where)


def _derivative(order: int, k: int, where: Callable[[int], str]) -> str:
    return f"{where(k)} (derivative {order})"


def _evaluated(
    k: int, leaf: Any, x: Array, g: Array, higher: Sequence[list[Any]], where: Callable[[int], str]
) -> tuple[Any, Array | None]:
    """Return the state and the parameter that the array path makes; what it raises has the path."""
    others = [checked(h[k], leaf, x, derivative) for h, derivative in _named(higher, k, where)]
    refuse_masked_state(leaf.state, partial(where, k))
    try:
        return evaluate(leaf.rule, leaf.state, x, [g, *others])
    except FloatingPointError as error:
        raise FloatingPointError(f"at {where(k)}: {error}") from error
    except Exception as error:
        if type(error) in (TypeError, ValueError) and str(error).endswith(ANEW):
            raise type(error)(f"at {where(k)}: {error}") from None
        _note(error, leaf, where(k))
        raise


def _located(error: Exception, failed: int, where: Callable[[int], str]) -> Exception:
    """Return what a run raised, with the path of the place where it failed, if it was at one."""
    if failed < 0 or type(error) not in (FloatingPointError, RuntimeError):
        return error
    return type(error)(f"at {where(failed)}: {error}")


def _counts(leaves: list[Any], skipped: Sequence[int]) -> list[Call]:
    """Return the calls that count, in the leaves, that they were passed by."""
    return [(setattr, leaves[k], "skipped", leaves[k].skipped + 1) for k in skipped]


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


def _holds_nonfinite(
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


def nonfinite(path: str, places: int) -> FloatingPointError:
    """Return the error that gradients, the first one at `path`, hold infinity or NaN."""
    others = f" and {places - 1} other places" if places > 1 else ""
    return FloatingPointError(
        f"gradient at {path}{others}: expected finite numbers, got NaN or infinity; nothing was "
        "updated. on_nonfinite='skip' passes such arrays by"
    )


def _note(error: Exception, leaf: Any, path: str) -> None:
    error.add_note(f"raised by {leaf.rule!r} at {path}; nothing was updated")


def _take(batch: Any, k: int, leaf: Any, x: Array, g: Array) -> bool:
    """Let the kernels have a leaf after all, now that its gradient is plain; tell whether."""
    plan = None if is_jax(x) or is_jax(g) or is_traced(g) else lower(leaf.rule)
    if plan is None:
        return False
    sight: tuple[Any, np.ndarray, np.ndarray] | None
    if isinstance(x, np.ndarray):
        ordered = np.ascontiguousarray if x.flags.c_contiguous else np.asfortranarray
        sight = leaf.state, np.asarray(x), ordered(g).reshape(x.shape)
    else:
        sight = _torch.arrays(leaf.state, x, g) if _torch.is_tensor(x) else None
    return sight is not None and bool(batch.take(k, plan, *sight))


def overlapping(one: str, other: str) -> ValueError:
    """Return the error that what is to be written at these paths overlaps."""
    which = f"{one} and {other}" if one != other else f"{one} itself"
    return ValueError(
        f"the parameters or states at {which} overlap in memory; copy one of them, or call setup "
        "anew with the model that ties them"
    )


def _clash(
    batch: Any, leaves: list[Any], xs: list[Array], by_cuda: list[int], stored: list[Stored]
) -> tuple[int, int] | None:
    """Return two places where the same memory would be written, if one of them is in `stored`.

    `batch` is settled, and sees to it that nothing of its own clashes.
    """
    written = [(k, x) for k, x, _ in stored] + [(k, xs[k]) for k in by_cuda]
    if clash := overlap(written):
        return clash
    if not any(batch.writes(*extent) for _, x, _ in stored if (extent := span(x))):
        return None
    taken = [k for k in batch.places() if k not in batch.new_x]
    states = [(k, a) for k in taken for a in _arrays_in(leaves[k].state)]
    arrays = [*written, *((k, xs[k]) for k in taken), *states]
    return overlap(sorted(arrays, key=operator.itemgetter(0)))


def _arrays_in(state: Any) -> Iterator[np.ndarray]:
    """Yield the arrays of a state that the kernels have taken."""
    return (part for part in parts_of_state(state, tuple) if isinstance(part, np.ndarray))


def _device_batch(batch: Any, in_place: bool) -> Any:
    """Return what takes leaves on CUDA devices; it shares the results of `batch`."""
    return cuda().Batch(None if in_place else blank, batch.new_x, batch.new_state)


def _take_on_device(
    batch: Any, k: int, leaf: Any, x: Array, g: Array, where: Callable[[], str]
) -> bool:
    """Let the CUDA kernels have a leaf; tell whether they can.

    Raises
    ------
    ImportError
        If there is no compiler for them.
    TypeError
        If they cannot, and nothing else can compute with this array.
    """
    if batch.take(k, leaf, x, g, where):
        return True
    if devices.is_numba(x):
        raise TypeError(
            f"at {where()}: {short(leaf.rule)} cannot update an array of Numba of shape "
            f"{tuple(x.shape)} and dtype {x.dtype}. Kernels take float32 and float64, others "
            "inside MixedPrecision, and rules of the library or with a `step`; for anything else "
            "make the parameters arrays of CuPy or tensors of PyTorch. If the rule is one of "
            "these, the state is not of this parameter: call setup anew with this model"
        )
    return False


def summed(a: Array, b: Array) -> Array:
    """Return the sum of two gradients of one parameter, in a dtype in which steps are computed."""
    a, b = widened(a), widened(b)
    if not devices.is_numba(a):
        with np.errstate(over="ignore", invalid="ignore"):
            return a + b
    return cuda().summed(a, b)


def _give_tensors(
    batch: Any, places: list[int], leaves: list[Any], xs: list[Array], in_place: bool
) -> None:
    """Make tensors of what belongs in the place of tensors."""
    if not in_place:
        for k in {*batch.places()}.intersection(places):
            batch.new_state[k] = _torch.state_like(leaves[k].state, batch.new_state[k], xs[k])
    for k in places:
        if k in batch.new_x:
            batch.new_x[k] = _torch.like(xs[k], batch.new_x[k])
