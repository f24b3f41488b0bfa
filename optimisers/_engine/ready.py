"""Rules made ready for the kernels: by which plan the CPU or a CUDA device runs a rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from .. import _fork
from .._arrays import torch as _torch
from .._arrays.jax import attributes, holds_traced, settled, with_attributes
from .._arrays.states import parts_of_state
from ..rules._base import ElementwiseRule, Rule, _registry
from ..rules.accumulate import AccumGrad, _Hold, _Release
from ..rules.chain import OptimiserChain
from ..rules.norms import ClipNorm, _Scale
from ..rules.precision import MixedPrecision
from . import cpu

Array = Any


_rules: dict[str, Any] = {cls.__name__: cls for cls in _registry}
_steps = {_rules[name].step: index for name, index in cpu.kernels.step_index.items()}
_array_only: set[type] = set()
"""Rules whose steps Numba could not compile."""
_found: dict[tuple[type, bool], tuple[int, int]] = {}


class _Kit(NamedTuple):
    """What plans for one kind of kernels are made of."""

    plans: Any
    """The module that has their classes."""
    step: Callable[[Any], Any]
    """Returns the plan of an elementwise rule, or None."""
    scale: Any
    """The step of a barrier, as its plan wants it."""


def lower(rule: Any) -> Any:
    """Return the plan by which the CPU kernels run `rule`, or None if they cannot."""
    return _lower(rule, _cpu_kit())


def lower_for_device(rule: Any) -> Any:
    """Return the plan by which the CUDA kernels run `rule`, or None if they cannot."""
    return _lower(rule, cuda_kit())


def _lower(rule: Any, kit: _Kit) -> Any:
    cls: Any = type(rule)
    numbers = attributes(rule).values()
    if not all(map(_is_python, numbers)):
        if any(map(holds_traced, numbers)) or any(map(_holds_mapped, numbers)):
            return None
        rule = with_attributes(rule, settled)
    if _is_elementwise(cls):
        return kit.step(rule)
    if _behaves_as(OptimiserChain, cls):
        parts = tuple(_lower(part, kit) for part in rule.rules)
        return None if None in parts else kit.plans.ChainPlan(rule, parts)
    if _behaves_as(ClipNorm, cls):
        return kit.plans.NormPlan(rule, kit.scale, rule.p)
    if _behaves_as(AccumGrad, cls):
        hold, release = _lower(_Hold(), kit), _lower(_Release(rule.n), kit)
        n = min(rule.n, np.iinfo(np.int64).max)
        return kit.plans.AccumulatePlan(rule, hold, release, n)
    if _behaves_as(MixedPrecision, cls):
        inner = _lower(rule.rule, kit)
        return None if inner is None else kit.plans.MixedPlan(rule, inner)
    return None


def _is_python(value: Any) -> bool:
    """Tell whether a value is a number of Python, or holds nothing else."""
    if type(value) in (float, bool, int):
        return True
    return type(value) is tuple and all(map(_is_number, parts_of_state(value, tuple)))


def _is_number(value: Any) -> bool:
    return type(value) in (float, bool, int)


def _holds_mapped(value: Any) -> bool:
    """Tell whether ``torch.vmap`` maps a number in `value`."""
    return any(map(_torch.is_mapped, parts_of_state(value, tuple)))


def _behaves_as(known: type[Rule], cls: type[Rule]) -> bool:
    """Tell whether `cls` is `known`, or a subclass that leaves to it what a step does."""
    return issubclass(cls, known) and cls.apply is known.apply and cls.move is known.move


def _is_elementwise(cls: Any) -> bool:
    """Tell whether all that a rule does is its step."""
    return (
        issubclass(cls, ElementwiseRule)
        and cls.apply is ElementwiseRule.apply
        and cls.move is Rule.move
        and isinstance(cls.step, FunctionType)
        and not hasattr(cls.step, "__wrapped__")
    )


def _cpu_step(rule: Any) -> Any:
    """Return the plan of an elementwise rule: its step is in a table, or is compiled late."""
    cls = type(rule)
    if cls.step in _steps:
        return cpu.kernels.StepPlan(rule, _steps[cls.step], cls.counts)
    if cls in _array_only or len(cls.slots) > cpu.kernels.max_slots:
        return None
    return cpu.kernels.LatePlan(rule, len(cls.slots), cls.counts, _compiled)


def _cpu_kit() -> _Kit:
    return _Kit(cpu.kernels, _cpu_step, _steps[_Scale.step])


@functools.cache
def cuda_kit() -> _Kit:
    with _fork.compiling:
        from .._cuda import batch

    return _Kit(batch, _cuda_step, _Scale.step)


def _cuda_step(rule: Any) -> Any:
    cls = type(rule)
    if cls.step not in _steps:
        _check_language(rule)
    return cuda_kit().plans.StepPlan(rule, cls.step, len(cls.slots), cls.counts)


def _check_language(rule: Any) -> int:
    """Return how many coefs a user's step takes.

    Raises
    ------
    StepError
        If the step is not in the language of steps.
    """
    with _fork.compiling:
        from .._steps import compiled, grammar

    cls = type(rule)
    coefs = len(rule.coefs(1) if cls.counts else rule.coefs())
    grammar.check(cls, coefs, compiled.WORDS)
    return coefs


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
    coefs = _check_language(rule)
    with _fork.compiling:
        from .._steps import compiled

        dtype = "float64" if is_double else "float32"
        address = compiled.block_step(cls.__name__, cls.step, len(cls.slots), coefs, dtype)
    if address is None:
        _array_only.add(cls)
        return None
    _found[cls, is_double] = address, coefs
    return address, coefs
