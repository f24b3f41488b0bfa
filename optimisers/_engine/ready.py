"""Rules made ready for the kernels: by which plan the CPU or a CUDA device runs a rule."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .. import _fork
from ..rules._base import _registry
from ..rules._program import (
    Hold,
    Master,
    Measure,
    Parts,
    Program,
    Step,
    check_language,
    program_of,
)
from ..rules.norms import _Scale
from . import cpu

Array = Any


_rules: dict[str, Any] = {cls.__name__: cls for cls in _registry}
_steps = {_rules[name].step: index for name, index in cpu.kernels.step_index.items()}
_array_only: set[type] = set()
"""Rules whose steps Numba could not compile."""
_found: dict[tuple[type, bool], tuple[int, int]] = {}


def lower(rule: Any) -> Any:
    """Return the plan by which the CPU kernels run `rule`, or None if they cannot."""
    program = program_of(rule)
    return None if program is None else _ready(rule, program)


def _ready(rule: Any, program: Program) -> Any:
    """Return the plan of a program, or None if the CPU kernels cannot run one of its stages."""
    plan = cpu.kernels.Plan(rule, _compiled)
    measure: Measure | None = None
    for k, stage in enumerate(program):
        if measure is not None or isinstance(stage, Step):
            if not isinstance(stage, Step) or not _add_step(plan, stage, measure):
                return None
            measure = None
        elif isinstance(stage, Parts):
            plan.add_parts(stage.at, stage.n)
        elif isinstance(stage, Measure) and stage.over == "array":
            measure = stage
        elif isinstance(stage, Hold):
            if not _add_hold(plan, stage):
                return None
        elif isinstance(stage, Master) and k == 0 and not stage.at:
            plan.set_master(stage.dtype)
        else:
            return None
    return plan if measure is None else None


def _add_step(plan: Any, step: Step, measure: Measure | None) -> bool:
    """Add a step, which takes what `measure` finds, if there is one; tell whether it can be."""
    cls = type(step.rule)
    index = _index_of(step.rule)
    if index is None:
        return False
    if measure is None:
        plan.add_step(step.rule, step.at, index, len(cls.slots), cls.counts)
        return True
    if cls is not _Scale or measure.at != step.at:
        return False
    plan.add_measured(measure.rule, step.at, index, measure.rule.p)
    return True


def _add_hold(plan: Any, hold: Hold) -> bool:
    steps = [(rule, _index_of(rule)) for rule in (hold.add, hold.release)]
    for rule, index in steps:
        if index is None or len(rule.slots) != 1 or rule.counts:
            return False
    plan.add_hold(hold.at, min(hold.n, np.iinfo(np.int64).max), *steps)
    return True


def _index_of(rule: Any) -> int | None:
    """Return where the table has a step; -1 if it is compiled late, None if it cannot be."""
    cls = type(rule)
    index: int | None = _steps.get(cls.step)
    if index is not None:
        return index
    return None if cls in _array_only or len(cls.slots) > cpu.kernels.max_slots else -1


@functools.cache
def cuda() -> Any:
    """Return the module that takes leaves on CUDA devices."""
    with _fork.compiling:
        from .._cuda import batch

    return batch


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
    coefs = check_language(rule)
    with _fork.compiling:
        from .._steps import compiled

        dtype = "float64" if is_double else "float32"
        address = compiled.block_step(cls.__name__, cls.step, len(cls.slots), coefs, dtype)
    if address is None:
        _array_only.add(cls)
        return None
    _found[cls, is_double] = address, coefs
    return address, coefs
