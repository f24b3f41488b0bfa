"""Programs and leaves made ready for the CUDA kernels.

A `Plan` is a rule's program made ready. A `Job` is a leaf on which its stages are stacked, with its
steps, its row and its counts. A leaf keeps its job: as long as rule and arrays stay the same, the
next step needs new numbers only.

Counts of steps lie on the host, so that no step waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np

from .._arrays import devices
from .._arrays.devices import DeviceLibrary as Library
from ..rules import _program as rules
from ..rules._program import (
    Hold,
    Master,
    Measure,
    Parts,
    Step,
    check_language,
    is_ours,
    numbers,
    program_of,
)
from . import texts
from .texts import KernelSpec, KernelStep

Array = Any


# --- plans -----------------------------------------------------------------------------------


class ReadyStep:
    """An elementwise step, with the numbers of the last count for which they were computed."""

    def __init__(self, rule: Any) -> None:
        cls = type(rule)
        self.rule, self.step = rule, cls.step
        self.slots, self.counts = len(cls.slots), cls.counts
        self.known_t = -1
        self.numbers: tuple[float, ...] = ()
        if not is_ours(cls):
            check_language(rule)

    def numbers_at(self, t: int) -> tuple[float, ...]:
        """Return the numbers of a step; one object while the count stays the same."""
        if t != self.known_t:
            self.numbers, self.known_t = numbers(self.rule, t), t
        return self.numbers


class Plan:
    """A program made ready: each stage with its steps.

    A `Step` has one, a `Hold` has two (`add` and `release`), other stages have none.
    """

    def __init__(self, program: rules.Program) -> None:
        self.is_mixed = isinstance(program[0], Master) if program else False
        self.stages = [(stage, _ready_steps(stage)) for stage in program]


def _ready_steps(stage: rules.Stage) -> list[ReadyStep]:
    if isinstance(stage, Step):
        return [ReadyStep(stage.rule)]
    return [ReadyStep(stage.add), ReadyStep(stage.release)] if isinstance(stage, Hold) else []


def plan_of(rule: Any) -> Plan | None:
    """Return the plan by which the CUDA kernels run a rule, or None if they cannot."""
    program = program_of(rule)
    if program is None or any(isinstance(stage, Master) for stage in program[1:]):
        return None
    if any(isinstance(stage, Measure) and not stage.rule._measured_by_cuda for stage in program):
        return None
    return Plan(program)


# --- one leaf --------------------------------------------------------------------------------


class LaunchKey:
    """The steps, dtypes, device and stream that leaves share which go into one launch."""

    def __init__(self, spec: KernelSpec, device: int, stream: int) -> None:
        self.spec, self.device, self.stream = spec, device, stream
        self.has_norms = bool(spec.barriers)
        self.idle: list[Any] = []
        """Launches that no batch uses."""

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(spec: KernelSpec, device: int, stream: int) -> LaunchKey:
        """Return the one key with these."""
        return LaunchKey(spec, device, stream)


class Job:
    """One leaf that is being updated; `x` is its parameter or the master copy of it."""

    def __init__(self, lib: Library, index: int, x: Array, real: str) -> None:
        self.lib, self.index, self.x, self.real = lib, index, x, real
        self.device, self.layout = lib.device(x), lib.layout(x)
        self.length = devices.size(x)
        self.kernel_steps: list[KernelStep] = []
        self.moves = True
        self.repeats = True
        """Whether the next step differs from this one in counts and numbers only."""
        self.steps: list[tuple[ReadyStep, Any]] = []
        """The elementwise steps, each with its count."""
        self.numbers: tuple[float, ...] = ()
        self.counts: list[tuple[Array, int]] = []
        self.norms: list[Any] = []
        self.slots: list[Array] = []
        self.addresses: list[int] = []
        """Two for each slot: where it is read, and where it is written."""
        self.alignment = 0
        """The bitwise or of all addresses but that of the gradient."""
        self.words: list[int] = []
        """The row."""
        self.token = object()
        """Stands for the row; a changed row has another token."""
        self.carried: list[tuple[Any, Any]] = []
        self.back: tuple[Array, Array] | None = None
        """A parameter with gaps between its elements, and the array from which it is written."""
        self.g: Array = None
        self.key: LaunchKey
        self.memory: _Memory | None = None

    # --- its stages --------------------------------------------------------------------------

    def stack(self, plan: Plan, old_state: Any, new_state: Any) -> bool:
        """Add the steps of a plan, from one state to the other; tell whether the states fit."""
        measure: Measure | None = None
        for stage, steps in plan.stages:
            old, new = _part(old_state, stage.at), _part(new_state, stage.at)
            if not isinstance(old, tuple):
                return False
            if not self.moves:
                if not isinstance(stage, Parts | Measure):
                    self.carried.append((old, new))
            elif isinstance(stage, Step):
                if len(old) != steps[0].slots + steps[0].counts:
                    return False
                if not self._add_step(steps[0], measure, old, new):
                    return False
                measure = None
            elif isinstance(stage, Measure) and stage.over == "array":
                measure = stage
            elif isinstance(stage, Hold):
                add, release = steps
                if not self._hold(stage, add, release, old, new):
                    return False
            elif isinstance(stage, Parts | Master):
                if len(old) != (stage.n if isinstance(stage, Parts) else 2):
                    return False
            else:
                return False
        return measure is None

    def _add_step(self, step: ReadyStep, measure: Measure | None, old: Any, new: Any) -> bool:
        """Add a step; tell whether the states fit it."""
        if measure is not None:
            self.kernel_steps.append(
                KernelStep(step.step, step.slots, 1, float(measure.rule.order))
            )
            self.norms.append(measure.rule)
            return not (step.slots or step.counts)
        count, t = None, 0
        if step.counts:
            count = new[step.slots]
            t = 1 + read_count(old[step.slots], count)
            if t == 0:
                return False
            self.counts.append((count, t))
        self.steps.append((step, count))
        self.numbers += tuple(map(float, step.numbers_at(t)))  # an error here gets its path
        self.kernel_steps.append(KernelStep(step.step, step.slots, len(step.numbers)))
        return all(self.add_slot(old[j], new[j]) for j in range(step.slots))

    def _hold(self, hold: Hold, add: ReadyStep, release: ReadyStep, old: Any, new: Any) -> bool:
        """Add the step of a gradient that is held back, or with which all are released."""
        if len(old) != 2:
            return False
        held = read_count(old[1], new[1])
        if held < 0:
            return False
        self.repeats = False
        self.moves = held + 1 >= hold.n
        self.counts.append((new[1], 0 if self.moves else held + 1))
        return self._add_step(release if self.moves else add, None, old, new)

    def address(self, a: Array) -> int:
        """Return the address of an array, and note it for the alignment."""
        found = self.lib.address(a)
        self.alignment |= found
        return found

    def add_slot(self, old: Any, new: Any) -> bool:
        """Add a slot to the row; tell whether it lies as the parameter does."""
        lib = self.lib
        if devices.library(old) is not lib or lib.device(old) != self.device:
            return False
        if lib.layout(old) != self.layout and not self._is_alike(old):
            return False
        self.addresses += self.address(old), self.address(new)
        self.slots.append(old)
        return True

    def _is_alike(self, a: Array) -> bool:
        """Tell whether an array differs from `x` in strides alone, and these along axes of one."""
        return self.lib.dtype(a) == self.real and devices.lies_like(self.lib, a, self.x)

    def lay_out(self, g_address: int, heads: Sequence[int]) -> None:
        """Write the row; `heads` are the addresses at which it is read, written and rounded."""
        is_aligned = (self.alignment | g_address) % 16 == 0
        self.words = [self.length, 0, int(is_aligned), g_address, *heads, *self.addresses]
        self.token = object()

    # --- from one step to the next -----------------------------------------------------------

    def remember(self, leaf: Any, x: Array, g: Array) -> None:
        """Prepare for the leaf to keep this job: hold no array but those of its state."""
        lib = self.lib
        self.memory = _Memory(leaf.rule, leaf.state, ref(x), ref(g), lib.layout(x), lib.layout(g))
        self.x = self.g = None

    def try_repeat(self, leaf: Any, x: Array, g: Array) -> bool:
        """Make this the job of one more step; tell whether it is: the same rule, the same memory.

        The gradient may lie elsewhere. A job is not repeated where an array has lost its memory:
        its address is another one then.
        """
        memory, lib = self.memory, self.lib
        if memory is None or leaf.rule is not memory.rule or leaf.state is not memory.state:
            return False
        if memory.x() is not x or not (lib.stays or self._is_still_there(memory, x)):
            return False
        if memory.g() is not g or not lib.stays:
            if devices.library(g) is not lib or lib.device(g) != self.device:
                return False
            if lib.layout(g) != memory.layout_of_g:
                return False
            at = lib.address(g)
            # The long way refuses a gradient whose memory was given back, with its path.
            is_other = at != self.words[texts.GRAD] or memory.g() is not g
            if is_other and lib.loses_memory and lib.has_lost(g):
                return False
            if at != self.words[texts.GRAD]:
                self.lay_out(at, self.words[texts.PARAMETER : texts.SLOTS])
            memory.g = ref(g)
        self.numbers, self.counts = (), []
        for step, count in self.steps:
            t = 0 if count is None else 1 + int(count)
            self.numbers += step.numbers if t == step.known_t else step.numbers_at(t)
            if count is not None:
                self.counts.append((count, t))
        return True

    def _is_still_there(self, memory: _Memory, x: Array) -> bool:
        """Tell whether arrays that can be given other memory have kept theirs."""
        lib, words = self.lib, self.words
        old = memory.state[0] if self.key.spec.narrow else x
        return (
            lib.layout(x) == memory.layout_of_x
            and lib.address(x) == words[texts.ROUNDED]
            and lib.address(old) == words[texts.PARAMETER]
            and [*map(lib.address, self.slots)] == self.addresses[::2]
        )


@dataclass(slots=True)
class _Memory:
    """The rule, arrays and layouts that must be the same for a job to be repeated."""

    rule: Any
    state: Any
    x: ref[Any]
    g: ref[Any]
    layout_of_x: tuple[Any, ...]
    layout_of_g: tuple[Any, ...]


def _part(state: Any, at: rules.Place) -> Any:
    """Return the part of a state at the place of a stage, or None if there is none."""
    for k in at:
        if not isinstance(state, tuple) or not 0 <= k < len(state):
            return None
        state = state[k]
    return state


def read_count(old: Any, new: Any) -> int:
    """Return the count in a 0-d array of the host; -1 if that is none, or is the largest."""
    if type(old) is np.ndarray:
        is_count = old.dtype == np.int64 and type(new) is np.ndarray and new.flags.writeable
    else:  # of PyTorch
        is_count = str(getattr(old, "dtype", "")) == "torch.int64" and not old.is_cuda
    if not is_count or old.shape != ():
        return -1
    value = int(old)
    return value if value < np.iinfo(np.int64).max else -1
