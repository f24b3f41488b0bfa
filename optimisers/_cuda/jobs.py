"""Rules and leaves made ready for the CUDA kernels.

A `Plan` is a rule made ready: it stacks its steps on a `Job`, which is one leaf: its stages, its
row, its counts. A leaf keeps its job: as long as rule and arrays stay the same, the next step needs
no more than new numbers.

Counts of steps lie on the host. So no step has to ask the device for one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import ref

import numpy as np

from .._arrays import devices
from .._arrays.devices import Library
from . import texts
from .texts import Program, Stage

Array = Any


# --- plans -----------------------------------------------------------------------------------


class Plan:
    """A rule made ready for the kernels."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def stack(self, job: Job, old: Any, new: Any) -> bool:
        """Add stages that read the state `old` and write `new`; tell whether they can."""
        return False


class StepPlan(Plan):
    """An elementwise rule."""

    def __init__(self, rule: Any, step: FunctionType, slots: int, counts: bool) -> None:
        super().__init__(rule)
        self.step, self.slots, self.counts = step, slots, counts
        self.known_t = -1
        self.numbers: tuple[float, ...] = ()

    def stack(self, job: Job, old: Any, new: Any) -> bool:
        if len(old) != self.slots + self.counts:
            return False
        count, t = None, 0
        if self.counts:
            count = new[self.slots]
            t = 1 + read_count(old[self.slots], count)
            if t == 0:
                return False
            job.counts.append((count, t))
        job.steps.append((self, count))
        job.numbers += tuple(map(float, self.numbers_at(t)))  # an error here gets its path
        job.stages.append(Stage(self.step, self.slots, len(self.numbers)))
        return all(job.add_slot(old[j], new[j]) for j in range(self.slots))

    def numbers_at(self, t: int) -> tuple[float, ...]:
        """Return the numbers of a step; the same object for the same count, one after another."""
        if t != self.known_t:
            self.numbers = tuple(self.rule.coefs(t) if self.counts else self.rule.coefs())
            self.known_t = t
        return self.numbers


class ChainPlan(Plan):
    """Rules one after another."""

    def __init__(self, rule: Any, parts: tuple[Plan, ...]) -> None:
        super().__init__(rule)
        self.parts = parts

    def stack(self, job: Job, old: Any, new: Any) -> bool:
        if len(old) != len(self.parts):
            return False
        for part, a, b in zip(self.parts, old, new, strict=True):
            if not isinstance(a, tuple):
                return False
            if not job.moves:
                job.carried.append((a, b))
            elif not part.stack(job, a, b):
                return False
        return True


class NormPlan(Plan):
    """A barrier: a norm of what comes decides on the number of a step."""

    def __init__(self, rule: Any, step: FunctionType, p: float) -> None:
        super().__init__(rule)
        self.stage = Stage(step, 0, 1, float(p))

    def stack(self, job: Job, old: Any, new: Any) -> bool:
        if len(old):
            return False
        job.stages.append(self.stage)
        job.norms.append(self.rule)
        return True


class AccumulatePlan(Plan):
    """A rule that holds n - 1 gradients back and releases the mean with the n-th."""

    def __init__(self, rule: Any, hold: Plan, release: Plan, n: int) -> None:
        super().__init__(rule)
        self.hold, self.release, self.n = hold, release, n

    def stack(self, job: Job, old: Any, new: Any) -> bool:
        if len(old) != 2:
            return False
        held = read_count(old[1], new[1])
        if held < 0:
            return False
        job.repeats = False
        job.moves = held + 1 >= self.n
        job.counts.append((new[1], 0 if job.moves else held + 1))
        return (self.release if job.moves else self.hold).stack(job, old[:1], new[:1])


class MixedPlan(Plan):
    """A rule that updates a master copy of a parameter of another dtype."""

    def __init__(self, rule: Any, inner: Plan) -> None:
        super().__init__(rule)
        self.inner = inner


# --- one leaf --------------------------------------------------------------------------------


class Kind:
    """What leaves have in common that go into one launch."""

    def __init__(self, program: Program, device: int, stream: int) -> None:
        self.program, self.device, self.stream = program, device, stream
        self.has_norms = bool(program.barriers)
        self.idle: list[Any] = []
        """Launches that no batch uses."""

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(program: Program, device: int, stream: int) -> Kind:
        """Return the one kind of these."""
        return Kind(program, device, stream)


class Job:
    """One leaf that is being updated; `x` is its parameter or the master copy of it."""

    def __init__(self, lib: Library, place: int, x: Array, real: str) -> None:
        self.lib, self.place, self.x, self.real = lib, place, x, real
        self.device, self.layout = lib.device(x), lib.layout(x)
        self.length = devices.size(x)
        self.stages: list[Stage] = []
        self.moves = True
        self.repeats = True
        """Whether the next step is the same, but for counts."""
        self.steps: list[tuple[StepPlan, Any]] = []
        """The elementwise rules, each with its count."""
        self.numbers: tuple[float, ...] = ()
        self.counts: list[tuple[Array, int]] = []
        self.norms: list[Any] = []
        self.slots: list[Array] = []
        self.addresses: list[int] = []
        """Those of the slots, where each is read and written."""
        self.alignment = 0
        """All addresses but that of the gradient, joined by or."""
        self.words: list[int] = []
        """The row."""
        self.token = object()
        """Stands for the row, and is another one when that is."""
        self.carried: list[tuple[Any, Any]] = []
        self.back: tuple[Array, Array] | None = None
        """A parameter with gaps between its elements, and the array that it is written from."""
        self.g: Array = None
        self.kind: Kind
        self.memory: _Memory | None = None

    def address(self, a: Array) -> int:
        """Return where an array lies, and note it for the alignment."""
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
        """Tell whether strides alone are different, and only where an axis has one element."""
        return self.lib.dtype(a) == self.real and devices.lies_like(self.lib, a, self.x)

    def lay_out(self, g_address: int, heads: Sequence[int]) -> None:
        """Write the row; `heads` are the addresses of what is read, written and rounded to."""
        is_aligned = (self.alignment | g_address) % 16 == 0
        self.words = [self.length, 0, int(is_aligned), g_address, *heads, *self.addresses]
        self.token = object()

    # --- from one step to the next -----------------------------------------------------------

    def remember(self, leaf: Any, x: Array, g: Array) -> None:
        """Get ready to be kept by the leaf: hold no array but those of its state."""
        lib = self.lib
        self.memory = _Memory(leaf.rule, leaf.state, ref(x), ref(g), lib.layout(x), lib.layout(g))
        self.x = self.g = None

    def again(self, leaf: Any, x: Array, g: Array) -> bool:
        """Make this the job of one more step; tell whether it is: the same rule, the same memory.

        The gradient may have come to lie elsewhere.
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
            if (at := lib.address(g)) != self.words[texts.GRAD]:
                self.lay_out(at, self.words[texts.PARAMETER : texts.SLOTS])
            memory.g = ref(g)
        self.numbers, self.counts = (), []
        for plan, count in self.steps:
            t = 0 if count is None else 1 + int(count)
            self.numbers += plan.numbers if t == plan.known_t else plan.numbers_at(t)
            if count is not None:
                self.counts.append((count, t))
        return True

    def _is_still_there(self, memory: _Memory, x: Array) -> bool:
        """Tell whether arrays that can get other memory have not."""
        lib, words = self.lib, self.words
        old = memory.state[0] if self.kind.program.narrow else x
        return (
            lib.layout(x) == memory.layout_of_x
            and lib.address(x) == words[texts.ROUNDED]
            and lib.address(old) == words[texts.PARAMETER]
            and [*map(lib.address, self.slots)] == self.addresses[::2]
        )


@dataclass(slots=True)
class _Memory:
    """What must be the same for a job to do again."""

    rule: Any
    state: Any
    x: ref[Any]
    g: ref[Any]
    layout_of_x: tuple[Any, ...]
    layout_of_g: tuple[Any, ...]


def read_count(old: Any, new: Any) -> int:
    """Return the count in a 0-d array of the host; -1 if it is no such thing, or cannot go on."""
    if type(old) is np.ndarray:
        is_count = old.dtype == np.int64 and type(new) is np.ndarray and new.flags.writeable
    else:  # of PyTorch
        is_count = str(getattr(old, "dtype", "")) == "torch.int64" and not old.is_cuda
    if not is_count or old.shape != ():
        return -1
    value = int(old)
    return value if value < np.iinfo(np.int64).max else -1
