"""The engine: updates leaves, all or none, each by the first backend that takes it.

This is the only place that orders the batches (see `batch`). The CPU kernels (`_kernels.pyx`) take
plain NumPy arrays of float32, float64, float16 or bfloat16, and tensors with such views, if they
can run the program of the rule; the CUDA kernels (`_cuda`) take arrays of float32 or float64 on a
device; all others are evaluated by array code (`arrays`), with the same steps. All that can be
refused is refused before anything is written: first all leaves are gathered and checked, then those
on the array path are evaluated into new arrays, then the kernels run (a norm that throws does so
before they write), and only then are the new arrays stored.

If the CPU kernels take all leaves, their first call also updates these. A single array, such as the
flat vector of a model, goes straight to them (`advance_one`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import _fork
from .._arrays import devices
from .._arrays.library import library_for
from .._messages.text import short
from ..rules._measure import Pass
from . import cpu
from .arrays import ArrayBatch, at_once, blank
from .batch import Batch, Call, Update
from .cpu import KernelBatch
from .gradients import check_higher, nonfinite

Array = Any
Results = tuple[dict[int, Array], dict[int, Any], list[int]]

Beside = Callable[[dict[int, Array], dict[int, Any], Sequence[int]], list[Call]]
"""Returns further calls for `advance` to make with those of a step."""

_watchers: list[list[tuple[int, str]]] = []


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[int, str]]]:
    """Note (index, backend) for each leaf that is updated meanwhile; for tests."""
    seen: list[tuple[int, str]] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


NONFINITE = "ignore", "skip", "raise"
"""The ways to treat a gradient with NaN or infinity in it."""


def advance_one(leaf: Any, x: Array, g: Any, on_nonfinite: str) -> bool:
    """Update a leaf that is the whole state tree in place, at one stroke; tell whether it was.

    If not, nothing has happened: `advance` then updates it, or raises an error.
    """
    if not cpu.kernels.update_one(leaf, x, g, cpu.lower, on_nonfinite):
        return False
    for seen in _watchers:
        seen.append((0, "kernels"))
    return True


def advance(
    leaves: list[Any],
    xs: list[Array],
    gs: list[Any],
    higher: Sequence[list[Any]],
    path_of: Callable[[int], str],
    in_place: bool,
    on_nonfinite: str = "ignore",
    beside: Beside | None = None,
    value: Any = None,
) -> Results:
    """Update every leaf that has a gradient and is not frozen; all of them or none.

    All that is written in place is written at one stroke, which an interrupt finds not begun or
    done. A caller with more to write gives it as `beside`.

    Parameters
    ----------
    leaves, xs, gs, higher
        Beside each other: distinct leaves, their parameters, first and higher gradients.
    path_of : callable
        Gives the path of an index, for messages.
    in_place : bool
        Write into the writable parameters and into the states of the leaves; else into nothing
        given.
    on_nonfinite : {"ignore", "skip", "raise"}
        What to do about a gradient with NaN or infinity in it.
    beside : callable, optional
        Given, by index, the parameters that are not written in place and the states that are new,
        and the indices that are skipped, returns what else is to be written when the rest has its
        values.
    value : optional
        The value of the loss, for rules that ask for it.

    Returns
    -------
    (new_x, new_state, skipped)
        By index, what was not written in place: parameters and states. If `in_place`, the leaves
        have their states already. And the indices that were skipped: `gs` has None there now.

    Raises
    ------
    FloatingPointError
        If a gradient holds NaN or infinity, and that is to be raised.
    TypeError
        If JAX traces, which knows no numbers yet, and numbers are to be looked at.
    """
    if on_nonfinite not in NONFINITE:
        known = ", ".join(map(repr, NONFINITE))
        raise ValueError(f"on_nonfinite must be one of {known}; got {short(on_nonfinite)}")
    if higher:
        check_higher(leaves, xs, higher, path_of)
    begun = None
    if on_nonfinite == "ignore" and beside is None:
        batch = cpu.kernels.Batch(None if in_place else blank)
        batch.told = value, path_of
        try:
            rest = batch.gather(leaves, xs, gs, cpu.lower, True)
        except Exception as error:
            if batch.ran:
                raise _located(error, batch.failed, path_of) from error
            cpu.note_failed(error, batch, leaves, path_of)
            raise
        if batch.ran:
            if _watchers:
                _tell_watchers("kernels", batch.places())
            return batch.new_x, batch.new_state, []
        begun = batch, rest
    update = Update(leaves, xs, gs, higher, path_of, in_place, value)
    batches = _gathered(update, begun)
    skipped: list[int] = []
    if on_nonfinite != "ignore":
        skipped = sorted({k for batch in batches for k in batch.nonfinite()})
    if skipped and on_nonfinite == "raise":
        raise nonfinite(path_of(skipped[0]), len(skipped))
    if skipped:
        for k in skipped:
            gs[k] = None
        update = Update(leaves, xs, gs, higher, path_of, in_place, value)
        batches = _gathered(update, None)
    return *_made(update, batches, skipped, beside), skipped


def _gathered(update: Update, begun: tuple[Any, list[int]] | None) -> list[Batch]:
    """Return batches that take all that is to be updated."""
    leaves = update.leaves
    batches: list[Batch] = []
    if begun is not None and not begun[0].places() and _have_jobs(leaves, begun[1]):
        rest = begun[1]  # as in each step of a model on a device but the first
    else:
        kernels = KernelBatch(update, begun)
        rest = kernels.gather(range(len(leaves)))
        # A batch without leaves is left out: on a device the calls are what a step costs.
        batches = [kernels] if kernels.indices() else []
    for k in rest:
        if leaves[k].job is None and devices.library(update.xs[k]) is None:
            continue
        batches.append(cuda().CudaBatch(update, blank))
        rest = batches[-1].gather(rest)
        break
    if rest:
        batches.append(ArrayBatch(update))
        batches[-1].gather(rest)
    return batches


def _have_jobs(leaves: Sequence[Any], ks: Sequence[int]) -> bool:
    """Tell whether each of these leaves has the job of its last step on a device."""
    return None not in [leaves[k].job for k in ks]


def _made(
    update: Update, batches: list[Batch], skipped: list[int], beside: Beside | None
) -> tuple[dict[int, Array], dict[int, Any]]:
    """Make the update at one stroke; return what was not written in place."""
    path_of = update.path_of
    try:
        _measure(update, batches)
        for number, batch in enumerate(batches):
            if clash := batch.settle(batches[:number]):
                raise overlapping(*map(path_of, clash))
        new_x: dict[int, Array] = {}
        new_state: dict[int, Any] = {}
        calls: list[Call] = []
        unrecorded: list[Any] = []
        for batch in batches:
            calls += batch.calls()
            made_x, made_state = batch.results()
            new_x.update(made_x)
            new_state.update(made_state)
            unrecorded += batch.unrecorded()
        if update.in_place and skipped:
            leaves = update.leaves
            calls += [(setattr, leaves[k], "skipped", leaves[k].skipped + 1) for k in skipped]
        if beside is not None:
            calls += beside(new_x, new_state, skipped)
        if update.in_place and unrecorded:
            calls.append(library_for(unrecorded[0]).note_call(unrecorded))
        at_once(calls)
    except (FloatingPointError, RuntimeError) as error:
        failed = next((batch.failed for batch in batches if batch.failed >= 0), -1)
        raise _located(error, failed, path_of) from error
    if _watchers:
        for batch in batches:
            _tell_watchers(batch.name, batch.indices())
    return new_x, new_state


def _measure(update: Update, batches: list[Batch]) -> None:
    """Find the numbers that steps need; those of the tree when all batches have come to theirs."""
    whole = Pass(update.states, update.value, update.path_of)
    while waiting := {
        k: rules for batch in batches[::-1] for k, rules in batch.measure(whole).items()
    }:
        whole.combine(waiting.copy)


def _tell_watchers(backend: str, taken: Sequence[int]) -> None:
    for seen in _watchers:
        seen.extend(zip(sorted(taken), itertools.repeat(backend)))


@functools.cache
def cuda() -> Any:
    """Return the module of the batch for CUDA devices, loaded when first needed."""
    with _fork.compiling:
        from .._cuda import batch

    return batch


def _located(error: Exception, failed: int, path_of: Callable[[int], str]) -> Exception:
    """Return an error of a run with the path of the index at which it failed, if there is one."""
    if failed < 0 or type(error) not in (FloatingPointError, RuntimeError):
        return error
    return type(error)(f"at {path_of(failed)}: {error}")


def overlapping(one: str, other: str) -> ValueError:
    """Return the error for arrays that would be written at these paths and overlap."""
    which = f"{one} and {other}" if one != other else f"{one} itself"
    return ValueError(
        f"the parameters or states at {which} overlap in memory; copy one of them, or call setup "
        "anew with the model that ties them"
    )
