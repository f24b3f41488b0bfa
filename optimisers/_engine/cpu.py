"""The CPU kernels: the twin for this processor, the plans of rules, and the batch."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from .. import _kernels as baseline
from .._arrays import devices, dlpack
from .._arrays.library import by_views, is_array, is_traced, library_for, of_class
from .._arrays.sharing import host_span
from .._arrays.states import parts_of_state
from .._messages.text import short
from ..rules._base import _registry
from ..rules._measure import Pass, after_measure, measures
from ..rules._program import (
    Hold,
    Master,
    Measure,
    Parts,
    Program,
    Step,
    check_language,
    compiler,
    measure_form,
    program_of,
    told_numbers,
)
from .arrays import blank
from .batch import Batch, Call, Update, note
from .tensors import sights

Array = Any


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
for twin in available.values():
    twin.know_tensors(dlpack.owner())
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
    told = "the number of threads must be a whole number, 0 or more"
    if not isinstance(n, Real):
        raise TypeError(f"{told}; got {short(n)}")
    if n != int(n) or n < 0:
        raise ValueError(f"{told}; got {n!r}")
    kernels.set_num_threads(int(n))


def get_num_threads() -> int:
    """Return the most threads that an update uses; small ones use fewer."""
    return int(kernels.get_num_threads())


# --- rules -----------------------------------------------------------------------------------


_rules: dict[str, Any] = {cls.__name__: cls for cls in _registry}
_steps = {_rules[name].step: index for name, index in kernels.step_index.items()}
_measures = {_rules[name].measure: index for name, index in kernels.measure_index.items()}


def lower(rule: Any) -> Any:
    """Return the plan by which the CPU kernels run `rule`, or None if they cannot."""
    program = program_of(rule)
    return None if program is None else _ready(rule, program)


def _ready(rule: Any, program: Program) -> Any:
    """Return the plan of a program, or None if the CPU kernels cannot run one of its stages."""
    plan = kernels.Plan(rule, _compiled)
    measure: Measure | None = None
    ranks: Counter[type] = Counter()
    for k, stage in enumerate(program):
        if measure is not None:
            cls = type(measure.rule)
            if not isinstance(stage, Step) or not _add_measured(plan, measure, stage, ranks[cls]):
                return None
            ranks[cls] += 1
            measure = None
        elif isinstance(stage, Step):
            if not _add_step(plan, stage):
                return None
        elif isinstance(stage, Parts):
            plan.add_parts(stage.at, stage.n)
        elif isinstance(stage, Measure):
            measure = stage
        elif isinstance(stage, Hold):
            if not _add_hold(plan, stage):
                return None
        elif isinstance(stage, Master) and k == 0 and not stage.at:
            plan.set_master(stage.dtype)
        else:
            return None
    return plan if measure is None else None


def _add_step(plan: Any, step: Step) -> bool:
    """Add a step; tell whether it can be run."""
    cls = type(step.rule)
    index = _index_of(step.rule)
    if index is None:
        return False
    plan.add_step(step.rule, step.at, index, len(cls.slots), cls.counts)
    return True


def _add_measured(plan: Any, measure: Measure, step: Step, rank: int) -> bool:
    """Add a step that takes what `measure` finds; tell whether it can be."""
    rule, cls = step.rule, type(step.rule)
    if measure.rule is not rule or measure.at != step.at or cls.measure is None:
        return False
    index, found, late = _index_of(rule), _measures.get(cls.measure, -1), None
    known = {*cls.asks["measure_coefs"]} <= {"t"} and "kept" not in cls.asks["coefs"]
    if index is None or measure.over == "axes" or not known:
        return False
    if found < 0:
        compiler().check(cls, len(told_numbers(rule, "measure_coefs", {"t": 1})[0]), "measure")
        late = measure_form(rule)
        if len(late[1]) > kernels.max_terms:
            return False
    plan.add_measured(rule, step.at, index, found, measure.over == "tree", rank, late)
    return True


def _add_hold(plan: Any, hold: Hold) -> bool:
    steps = [(rule, _index_of(rule)) for rule in (hold.add, hold.release)]
    for rule, index in steps:
        if index is None or len(rule.slots) != 1 or rule.counts:
            return False
    plan.add_hold(hold.at, min(hold.n, np.iinfo(np.int64).max), *steps)
    return True


def _index_of(rule: Any) -> int | None:
    """Return the index of a step in the table; -1 if it is compiled late, None if it cannot be."""
    cls = type(rule)
    index: int | None = _steps.get(cls.step)
    if index is not None:
        return index
    return None if len(cls.slots) > kernels.max_slots else -1


def _compiled(rule: Any, is_double: bool) -> tuple[int, int, int | None] | None:
    """Return the address of a user's step as machine code and the number of its coefs, or None.

    Raises
    ------
    StepError
        If the step is not in the language of steps, whether or not it can be compiled.
    """
    cls, coefs = type(rule), check_language(rule)
    dtype = "float64" if is_double else "float32"
    slots = len(cls.slots)
    address = compiler().block_step(cls.__name__, cls.step, slots, coefs, dtype)
    measure = None
    if address is not None and cls.measure is not None and cls.measure not in _measures:
        before, kinds = measure_form(rule)
        measure = compiler().block_step(cls.__name__, cls.measure, slots, before, dtype, len(kinds))
        if measure is None:
            return None
    return None if address is None else (address, coefs, measure)


# --- measures --------------------------------------------------------------------------------


class TreeMeasures:
    """Numbers of the tree for the leaves of compiled batches."""

    def __init__(self, told: Any = None, whole: Pass | None = None) -> None:
        value, path_of = told or (None, str)
        self.whole = Pass(tuple, value, path_of) if whole is None else whole

    def add(self, groups: Sequence[Any]) -> dict[int, list[type]]:
        """Add what was measured of leaves; return for each the classes of its rules of the tree."""
        for rule, _, rank, kinds, _, places, rows in groups:
            self.whole.add(rule, rank, kinds, places, rows)
        return self.waiting(groups)

    def waiting(self, groups: Sequence[Any]) -> dict[int, list[type]]:
        return {k: measures(outer) for _, outer, _, _, _, places, _ in groups for k in places}

    def found(self, groups: Sequence[Any]) -> list[Any]:
        """Return for each group the coefs and the numbers kept; None if it waits longer."""
        return [
            (sums := self.whole.found(rule, rank)) and after_measure(rule, sums, t, 0, self.whole)
            for rule, _, rank, _, t, _, _ in groups
        ]

    def answers(self, groups: Sequence[Any]) -> list[Any]:
        """Return `found` where no other batch has leaves."""
        for rule, _, rank, kinds, _, places, rows in groups:
            self.whole.add(rule, rank, kinds, places, rows)
        self.whole.combine(lambda: self.waiting(groups))
        return self.found(groups)


for twin in available.values():
    twin.know_measures(after_measure, TreeMeasures)


# --- leaves ----------------------------------------------------------------------------------


class KernelBatch:
    """Leaves that the CPU kernels update: NumPy arrays, and tensors that have views.

    It holds the compiled `Batch`. A leaf that this refuses as it is, it may take with a checked
    gradient, or with views in place of tensors.
    """

    name = "kernels"

    def __init__(self, update: Update, begun: tuple[Any, list[int]] | None = None) -> None:
        self.update = update
        self.begun = begun
        """A compiled batch that has gathered already, and the indices that it left."""
        self.batch: Any = begun[0] if begun else kernels.Batch(None if update.in_place else blank)
        self.tensors: list[int] = []
        self.waiting: list[Any] = []
        self.late: list[int] = []
        """The indices that were taken after their gradients were checked."""

    def gather(self, ks: Sequence[int]) -> list[int]:
        update = self.update
        try:
            rest: list[int]
            if self.begun:
                rest = self.begun[1]
            else:
                rest = self.batch.gather(update.leaves, update.xs, update.gs, lower)
            library, self.tensors = by_views(update.xs, rest) if rest else (None, [])
            if library is not None:
                *as_views, unseen = sights(
                    library, update.leaves, update.xs, update.gs, self.tensors
                )
                unseen += self.batch.gather(*as_views, lower)
                rest = sorted({*rest}.difference(self.tensors).union(unseen))
        except Exception as error:
            note_failed(error, self.batch, update.leaves, update.path_of)
            raise
        leaves = update.leaves
        return [k for k in rest if leaves[k].job is not None or not self._take(k)]

    def _take(self, k: int) -> bool:
        """Take a leaf with a checked gradient; tell whether it is taken or has no gradient."""
        leaf, x = self.update.leaves[k], self.update.xs[k]
        if devices.library(x) is not None:
            return False
        g = self.update.gradient(k)
        if g is None:
            return True
        library = library_for(x)
        plan = None if is_traced(g) or not library.has_views else lower(leaf.rule)
        if plan is None:
            return False
        seen = library.views(leaf.state, x, g)
        if seen is None or not self.batch.take(k, plan, *seen):
            return False
        self.late.append(k)
        return True

    @property
    def failed(self) -> int:
        return int(self.batch.failed)

    def indices(self) -> list[int]:
        return list(self.batch.places())

    def nonfinite(self) -> list[int]:
        higher = self.update.higher
        bad: list[int] = self.batch.nonfinite()
        return bad + [k for k in self.indices() if higher and self.update.is_bad(k, higher)]

    def settle(self, before: Sequence[Batch]) -> tuple[int, int] | None:
        clash: tuple[int, int] | None = self.batch.settle()
        return clash

    def measure(self, whole: Pass) -> dict[int, list[type]]:
        if self.waiting:
            self.batch.receive(TreeMeasures(whole=whole).found(self.waiting))
        self.waiting = self.batch.measure()
        return TreeMeasures(whole=whole).add(self.waiting)

    def calls(self) -> list[Call]:
        return [(self.batch.run,)]

    def may_write(self, arrays: Sequence[Any]) -> bool:
        return any(self.batch.writes(*extent) for x in arrays if (extent := host_span(x)))

    def written(self) -> list[tuple[int, Any]]:
        update = self.update
        taken = [k for k in self.batch.places() if k not in self.batch.new_x]
        return [(k, update.xs[k]) for k in taken] + [
            (k, part)
            for k in taken
            for part in parts_of_state(update.leaves[k].state, tuple)
            if is_array(part)
        ]

    def results(self) -> tuple[dict[int, Any], dict[int, Any]]:
        update, new_x, new_state = self.update, dict(self.batch.new_x), dict(self.batch.new_state)
        for k in self.late:
            if k in new_x:
                new_x[k] = of_class(update.xs[k], new_x[k])
        for k in self.tensors:
            if k in new_state:
                new_state[k] = library_for(update.xs[k]).state_like(
                    update.leaves[k].state, new_state[k], update.xs[k]
                )
            if k in new_x:
                new_x[k] = library_for(update.xs[k]).like(update.xs[k], new_x[k])
        return new_x, new_state

    def unrecorded(self) -> list[Any]:
        taken = {*self.indices()}.intersection(self.tensors)
        return [self.update.xs[k] for k in sorted(taken)]


def note_failed(
    error: Exception, batch: Any, leaves: Sequence[Any], path_of: Callable[[int], str]
) -> None:
    """Add to an error of a compiled `gather` the rule that raised it, and the path."""
    if batch.failed >= 0:
        note(error, leaves[batch.failed], path_of(batch.failed))
