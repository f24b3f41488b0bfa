"""The engine: updates leaves, all or none, each by the backend that suits it.

This is the only place that chooses a backend. The CPU kernels (`_kernels.pyx`) take what is a
plain float32 or float64 NumPy array, or a tensor that can be seen as one, with a rule whose steps
they hold or can have compiled; everything else goes the array path (`_arraypath`), with the same
steps. Whatever can be refused is refused before anything is written: first everything is gathered
and checked, then the leaves on the array path are evaluated into new arrays, then the kernels run
(a norm that throws does so before they write), and only then is the rest stored.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np

from . import _kernels as baseline
from . import _torch, rules, words
from ._arraypath import Call, at_once, blank, checked_gradient, evaluate, writing
from ._arrays import isnumeric, maywrite
from ._jax import attributes, holds_traced, is_jax, is_tracer, settled, with_attributes
from ._rule import ElementwiseRule, Rule
from ._ties import overlap
from .compose import AccumGrad, ClipNorm, MixedPrecision, OptimiserChain

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
        At least 1; or 0 to do again what OpenMP is told (``OMP_NUM_THREADS``, ``threadpoolctl``).

    Notes
    -----
    The threads are the library's own. An update never waits for one that sleeps, or that the
    system has put aside: the others do its share. Updates may be called from several threads of
    Python; while one uses the threads, the others run on their own.
    """
    if n != int(n) or n < 0:
        raise ValueError(f"the number of threads must be a whole number, 0 or more; got {n!r}")
    kernels.set_num_threads(int(n))


def get_num_threads() -> int:
    """Return the most threads that an update uses; small ones use fewer."""
    return int(kernels.get_num_threads())


# --- making a rule ready for the kernels -----------------------------------------------------

_steps = {getattr(rules, name).step: index for name, index in kernels.step_index.items()}
Finder = Callable[[Any, bool], tuple[int, int] | None]
_step_of: dict[type, int | Finder | None] = {}
_found: dict[tuple[type, bool], tuple[int, int]] = {}
_compiling = threading.Lock()


def lower(rule: Any) -> Any:
    """Return the plan by which the kernels run `rule`, or None if they cannot."""
    cls: Any = type(rule)
    if any(map(holds_traced, attributes(rule).values())):
        return None
    rule = with_attributes(rule, settled)
    if cls not in _step_of:
        _step_of[cls] = _find_step(cls)
    if isinstance(step := _step_of[cls], int):
        return kernels.StepPlan(rule, step, cls.counts)
    if step is not None:
        return kernels.LatePlan(rule, len(cls.slots), cls.counts, step)
    if _behaves_as(OptimiserChain, cls):
        parts = tuple(map(lower, rule.rules))
        return None if None in parts else kernels.ChainPlan(rule, parts)
    if _behaves_as(ClipNorm, cls):
        return kernels.NormPlan(rule, _steps[rules._Scale.step], rule.p)
    if _behaves_as(AccumGrad, cls):
        hold, release = lower(rules._Hold()), lower(rules._Release(rule.n))
        return kernels.AccumulatePlan(rule, hold, release, min(rule.n, np.iinfo(np.int64).max))
    if _behaves_as(MixedPrecision, cls):
        inner = lower(rule.rule)
        return None if inner is None else kernels.MixedPlan(rule, inner)
    return None


def _behaves_as(known: type[Rule], cls: type[Rule]) -> bool:
    """Tell whether `cls` is `known`, or a subclass that leaves to it what a step does."""
    return issubclass(cls, known) and cls.apply is known.apply and cls.move is known.move


def _find_step(cls: Any) -> int | Finder | None:
    """Return where a step stands in the kernels' table, or for a user's what finds it late.

    None for what has to stay array code.
    """
    if not issubclass(cls, ElementwiseRule) or cls.apply is not ElementwiseRule.apply:
        return None
    if cls.move is not Rule.move or not isinstance(cls.step, FunctionType):
        return None
    if cls.step in _steps:
        return int(_steps[cls.step])
    too_much = len(cls.slots) > kernels.max_slots or hasattr(cls.step, "__wrapped__")
    return None if too_much else _compiled


def _compiled(rule: Any, is_double: bool) -> tuple[int, int] | None:
    """Return the address of a user's step as machine code and the number of its coefs, or None.

    Raises
    ------
    StepError
        If the step is not in the language of steps, whether or not it can be compiled.
    """
    cls = type(rule)
    if found := _found.get((cls, is_double)):
        return found
    from . import _language, _numba

    coefs = len(rule.coefs(1) if cls.counts else rule.coefs())
    with _compiling:
        _language.check(cls, coefs, {name: getattr(words, name) for name in _language.WORDS})
        dtype = "float64" if is_double else "float32"
        address = _numba.block_step(cls.__name__, cls.step, len(cls.slots), coefs, dtype)
    if address is None:
        _step_of[cls] = None
        return None
    _found[cls, is_double] = address, coefs
    return address, coefs


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
    beside: Callable[[dict[int, Array]], list[Call]] | None = None,
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
    beside : callable, optional
        Given the parameters that are not written in place, by place, returns what else is to be
        written when they have their values.

    Returns
    -------
    (new_x, new_state)
        By place, what was not written in place: parameters and states. If `in_place`, the leaves
        have their states already.
    """
    batch = kernels.Batch(None if in_place else blank)
    try:
        rest = batch.gather(leaves, xs, gs, lower)
        tensors = _torch.places(xs, rest) if rest else []
        if tensors:
            *sights, unseen = _torch.sights(leaves, xs, gs, tensors)
            unseen += batch.gather(*sights, lower)
            rest = sorted({*rest}.difference(tensors).union(unseen))
    except Exception as error:
        if batch.failed >= 0:
            _note(error, leaves[batch.failed], where(batch.failed))
        raise
    new_x, new_state = batch.new_x, batch.new_state
    stored: dict[int, Array] = {}
    for k in rest:
        leaf, x = leaves[k], xs[k]
        if not isnumeric(x):
            raise TypeError(
                f"at {where(k)}: the state tree has a parameter, the model {x!r:.40} "
                f"({type(x).__name__}); call setup anew for this model"
            )
        g = checked_gradient(gs[k], x, partial(where, k))
        if g is None or _take(batch, k, leaf, x, g):
            continue
        others = [checked_gradient(h[k], x, partial(where, k)) for h in higher]
        try:
            new_state[k], new = evaluate(leaf.rule, leaf.state, x, [g, *others])
        except FloatingPointError as error:
            raise FloatingPointError(f"at {where(k)}: {error}") from error
        except Exception as error:
            _note(error, leaf, where(k))
            raise
        if new is None:
            continue
        if in_place and maywrite(x) and not is_tracer(new):
            stored[k] = new
        else:
            new_x[k] = new
    if clash := batch.settle() or (stored and _clash(batch, xs, [*stored])):
        raise overlapping(*map(where, clash))
    try:
        if (in_place and rest) or beside is not None:
            states = new_state.items() if in_place else ()
            writes = [writing(xs[k], new) for k, new in stored.items()]
            writes += [(setattr, leaves[k], "state", new) for k, new in states]
            writes += beside(new_x) if beside is not None else ()
            at_once([(batch.run,), *writes])
        else:
            batch.run()
    except FloatingPointError as error:
        raise FloatingPointError(f"at {where(batch.failed)}: {error}") from error
    if tensors:
        _give_tensors(batch, tensors, leaves, xs, in_place)
    for seen in _watchers:
        seen.extend((k, "kernels") for k in batch.places())
        seen.extend((k, "arrays") for k in rest if k in new_state and k not in batch.places())
    return new_x, new_state


def _note(error: Exception, leaf: Any, path: str) -> None:
    error.add_note(f"raised by {leaf.rule!r} at {path}; nothing was updated")


def _take(batch: Any, k: int, leaf: Any, x: Array, g: Array) -> bool:
    """Let the kernels have a leaf after all, now that its gradient is plain; tell whether."""
    plan = None if is_jax(x) or is_jax(g) else lower(leaf.rule)
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


def _clash(batch: Any, xs: list[Array], stored: list[int]) -> tuple[int, int] | None:
    """Return two places whose parameters share memory, if two of those that are written do."""
    written = [k for k in (*batch.places(), *stored) if k not in batch.new_x]
    return overlap([(k, xs[k]) for k in sorted(written)])


def _give_tensors(
    batch: Any, places: list[int], leaves: list[Any], xs: list[Array], in_place: bool
) -> None:
    """Make tensors of what belongs in the place of tensors; tell autograd which were written."""
    by_kernels = {*batch.places()}.intersection(places)
    if in_place:
        _torch.note_written([xs[k] for k in by_kernels])
    else:
        for k in by_kernels:
            batch.new_state[k] = _torch.state_like(leaves[k].state, batch.new_state[k], xs[k])
    for k in places:
        if k in batch.new_x:
            batch.new_x[k] = _torch.like(xs[k], batch.new_x[k])
