"""The batch of leaves that lie on CUDA devices.

`Rows` take leaves, see to it that nothing is written which is read elsewhere, measure norms, and
return the calls that make the update. Leaves of one `LaunchKey` go into one launch. Where the rows
of a launch are those of the last step, nothing is checked or sent anew.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arrays import devices
from .._arrays.devices import DeviceLibrary as Library
from .._arrays.dtypes import itemsize
from .._arrays.library import library_for, maywrite
from .._arrays.states import parts_of_state
from .._leaf import Item
from .._messages.text import short
from ..rules.accumulate import _Hold
from . import launch as _launch
from . import texts
from .jobs import Job, LaunchKey, Plan, plan_of
from .texts import KernelSpec

if TYPE_CHECKING:
    from .._engine.batch import Batch, Call, Update

Array = Any

REALS = ("float32", "float64")
"""The dtypes that kernels compute in."""
FLOATS = (*REALS, "float16", "bfloat16")
"""The dtypes that kernels read, and round to."""
MOST_IDLE = 4
"""How many launches are kept for a key, so that models which are updated by turns keep theirs."""


# --- all leaves ------------------------------------------------------------------------------


class _Group:
    """Leaves that go into one launch."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.launch: _launch.Launch
        self.is_known = False
        """Whether the launch had the same rows before."""


class Rows:
    """Leaves to be updated together: those of one `LaunchKey` are rows of the table of one launch.

    Parameters
    ----------
    blank : callable or None
        Given a state, returns an empty one of the same form, which the run then fills, as it fills
        a new array for each parameter. None updates in place.
    """

    failed = -1
    """The index at which `measure` raised; -1 if it did not."""

    def __init__(self, blank: Callable[[Any], Any] | None) -> None:
        self.blank = blank
        self.new_x: dict[int, Array] = {}
        self.new_state: dict[int, Any] = {}
        """States that are not written in place, by index, as `new_x` has the parameters."""
        self.is_measured = False
        self.clash: tuple[int, int] | None = None
        self.last_rule: Any = None
        self.last_plan: Plan | None = None
        self.jobs: list[Job] = []
        self.groups: dict[LaunchKey, _Group] = {}
        self.kept: list[Any] = []
        """Arrays that must live until the launches are enqueued."""
        self.lasting: list[tuple[Job, Any, Array, Array]] = []
        """Jobs that their leaves are to keep, with those, parameters and gradients."""
        self.streams: dict[tuple[str, int], int] = {}
        self.on = _call_on if _launch.devices() > 1 else _call

    def plan(self, rule: Any) -> Plan | None:
        """Return the plan of a rule; consecutive leaves often have the same."""
        if rule is not self.last_rule:
            self.last_rule, self.last_plan = rule, plan_of(rule)
        return self.last_plan

    def indices(self) -> list[int]:
        """Return the indices taken."""
        return [job.index for job in self.jobs]

    def take(self, k: int, leaf: Any, x: Array, g: Array, where: Callable[[], str]) -> bool:
        """Take one leaf if the kernels can; tell whether.

        Raises
        ------
        ImportError
            If they could, but there is no compiler for them; with the path, from `where()`.
        """
        state: Any = leaf.state
        plan, lib, of_g = self.plan(leaf.rule), devices.library(x), devices.library(g)
        if plan is None or lib is None or of_g is None or not isinstance(state, tuple):
            return False
        dtype, grad = lib.dtype(x), of_g.dtype(g)
        if dtype not in FLOATS or grad not in FLOATS:
            return False
        made = state if self.blank is None else self.blank(state)
        given, narrow = x, None
        if devices.axes(lib, x) is None:  # it has gaps: a copy without gaps takes its place
            x = lib.copy(x)
        old = new = x
        if plan.is_mixed:
            if len(state) != 2 or not devices.lies_like(lib, state[0], x):
                return False
            narrow, old, new = dtype, state[0], made[0]
        real = lib.dtype(old)
        if real not in REALS:
            return False
        if not _launch.is_installed():
            raise ImportError(
                f"at {where()}: arrays of {lib.name} on a GPU are updated by kernels that the "
                "package numba-cuda compiles, which is not installed; `pip install "
                "'optimisers[cuda13]'` brings it for drivers of CUDA 13, 'optimisers[cuda12]' for "
                "those of CUDA 12"
            )
        job = Job(lib, k, old, real)
        if not job.stack(plan, state, made):
            return False
        given_g, g = g, devices.laid_out(lib, g, x)
        of_g = of_g if g is given_g else lib
        target = x
        if self.blank is not None or given is not x:
            target = lib.blank(x)
            if self.blank is None and maywrite(given):
                job.back = given, target
            elif job.moves:
                self.new_x[k] = target
        if not plan.is_mixed:
            new = target
        if self.blank is not None:
            self.new_state[k] = made
            if plan.is_mixed and not job.moves:
                job.carried.append((state[:1], made[:1]))
        job.g = g
        job.lay_out(of_g.address(g), (job.address(old), job.address(new), job.address(target)))
        self.kept += x, g, target, state, made
        self._add(job, KernelSpec(tuple(job.kernel_steps), real, grad, narrow, job.moves), x)
        if self.blank is None and given is x and given_g is g and of_g is lib and job.repeats:
            self.lasting.append((job, leaf, x, g))
        return True

    def _add(self, job: Job, spec: KernelSpec, x: Array) -> None:
        stream = self._stream(job.lib, x, job.device)
        key: LaunchKey | None = getattr(job, "key", None)
        if key is None or key.stream != stream:
            key = job.key = LaunchKey.of(spec, job.device, stream)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = _Group()
        group.jobs.append(job)
        self.jobs.append(job)

    def _stream(self, lib: Library, x: Array, device: int) -> int:
        if lib.name == "Numba":  # each of its arrays has a stream
            return lib.stream(x)
        key = lib.name, device
        if key not in self.streams:
            self.streams[key] = lib.stream(x)
        return self.streams[key]

    # --- before anything is written ----------------------------------------------------------

    def settle(self, before: Sequence[Batch] = ()) -> tuple[int, int] | None:
        """Return what `lay_out` found when `measure` needed the launches."""
        return self.clash

    def lay_out(self) -> tuple[int, int] | None:
        """Compile kernels, send tables, and see to it that nothing is written which is read.

        Gradients that lie in memory which the run writes are copied. Where two leaves would write
        the same memory, their indices are returned, else None.
        """
        check = None
        is_checked = True
        for key, group in self.groups.items():
            self._lend(key, group)
            is_checked &= group.is_known and group.launch.check is (check or group.launch.check)
            check = group.launch.check
        if not is_checked:
            if clash := self._clash():
                return clash
            check = object()
            for group in self.groups.values():
                group.launch.check = check
        for key, group in self.groups.items():
            numbers = [job.numbers for job in group.jobs]
            if group.is_known:
                self.on(key.device, group.launch.renumber, numbers)
            else:
                self.on(key.device, self._prepare, key, group, numbers)
        return None

    def _lend(self, key: LaunchKey, group: _Group) -> None:
        """Give a group an idle launch: the one that had its rows, else one with the same first."""
        tokens, idle = [job.token for job in group.jobs], key.idle
        for k, launch in enumerate(idle):
            if launch.tokens == tokens and launch.grid is _launch.grid:
                group.launch, group.is_known = idle.pop(k), True
                return
        at = group.jobs[0].words[texts.PARAMETER]
        near = [k for k, a in enumerate(idle) if a.rows.values[texts.PARAMETER] == at]
        if near or len(idle) == MOST_IDLE:
            group.launch = idle.pop(near[0] if near else 0)
        else:
            group.launch = _launch.Launch(key.spec, _launch.stream_of(key.stream, key.device))
        group.launch.tokens = tokens

    def _clash(self) -> tuple[int, int] | None:
        """Return two indices that would write the same memory; copy gradients that lie in it."""
        spans = sorted(
            (*span, job.index) for job in self.jobs if job.length for span in self._written(job)
        )
        for before, after in itertools.pairwise(spans):
            if after[0] < before[1]:
                return before[2], after[2]
        starts, ends = [span[0] for span in spans], [span[1] for span in spans]
        for job in self.jobs:
            size = job.length * itemsize(job.key.spec.grad)
            low = job.words[texts.GRAD]
            at = bisect.bisect_right(ends, low)
            if job.length and at < len(spans) and starts[at] < low + size:
                self._copy_gradient(job)
        return None

    def _written(self, job: Job) -> list[tuple[int, int]]:
        """Return the given memory that is written, as spans of addresses."""
        if self.blank is not None:
            return []
        spec, words = job.key.spec, job.words
        real = job.length * itemsize(spec.real)
        spans = [(at, at + real) for at in job.addresses[1::2]]
        if job.moves:
            spans.append((words[texts.OUT], words[texts.OUT] + real))
        if job.moves and spec.narrow:
            size = job.length * itemsize(spec.narrow)
            spans.append((words[texts.ROUNDED], words[texts.ROUNDED] + size))
        counts = (count.ctypes.data for count, _ in job.counts if type(count) is np.ndarray)
        return [*spans, *((at, at + 8) for at in counts)]

    def _copy_gradient(self, job: Job) -> None:
        lib = devices.library(job.g)
        assert lib is not None
        copy = lib.copy(job.g)
        self.kept.append(copy)
        job.lay_out(lib.address(copy), job.words[texts.PARAMETER : texts.SLOTS])
        self.lasting = [entry for entry in self.lasting if entry[0] is not job]

    def _prepare(self, key: LaunchKey, group: _Group, numbers: list[tuple[float, ...]]) -> None:
        launch, jobs = group.launch, group.jobs
        rows = [word for job in jobs for word in job.words]
        firsts = launch.lay_out([job.length for job in jobs])
        rows[texts.FIRST_BLOCK :: texts.width(key.spec)] = firsts
        limits = [float(rule.omega) for job in jobs for rule in job.norms]
        launch.prepare(rows, numbers, limits)

    def measure(self, whole: Any) -> dict[int, list[type]]:
        """Find the norms; wait for them only where one that is not finite has to be refused.

        Raises
        ------
        FloatingPointError
            If such a norm is not finite; `failed` is the index.
        """
        if self.is_measured:
            return {}
        self.is_measured = True
        self.clash = self.lay_out()
        if self.clash is not None:
            return {}
        strict = []
        for key, group in self.groups.items():
            if key.has_norms:
                self.on(key.device, _make, group.launch.measures())
                if any(rule.throw for job in group.jobs for rule in job.norms):
                    strict.append((key, group))
        if not strict:
            return {}
        found: list[tuple[Job, list[float]]] = []
        for key, group in strict:
            norms = iter(self.on(key.device, group.launch.norms))
            found += [(job, [next(norms) for _ in job.norms]) for job in group.jobs]
        for job, norms_of_job in sorted(found, key=lambda pair: pair[0].index):
            self.failed = job.index
            for rule, norm in zip(job.norms, norms_of_job, strict=True):
                rule.accept((norm,))
        self.failed = -1
        return {}

    # --- running -----------------------------------------------------------------------------

    def calls(self) -> list[Call]:
        """Return the calls that enqueue the update of every leaf and count it."""
        calls: list[Call] = []
        for key, group in self.groups.items():
            for call in group.launch.run():
                calls.append(call if self.on is _call else (_call_on, key.device, *call))
            calls.append((key.idle.append, group.launch))
        for job in self.jobs:
            if job.back is not None and job.moves:
                calls.append((job.lib.assign, *job.back))
            for old, new in job.carried:
                calls.append((_carry_over, old, new))
            for count, value in job.counts:
                calls.append((operator.setitem, count, ..., value))
        calls += [(keep_job, *entry) for entry in self.lasting]
        return calls


class CudaBatch(Rows):
    """Leaves that the CUDA kernels update, with the protocol of `_engine.batch`.

    It inherits from its rows instead of holding them, since each call in between is a part of what
    a step on a device costs.
    """

    name = "cuda"

    def __init__(self, update: Update, blank: Callable[[Any], Any]) -> None:
        super().__init__(None if update.in_place else blank)
        self.update = update

    def gather(self, ks: Sequence[int]) -> list[int]:
        update, rest = self.update, []
        leaves, xs, gs, repeats = update.leaves, update.xs, update.gs, self.blank is None
        for k in ks:
            leaf, x = leaves[k], xs[k]
            job: Job | None = leaf.job
            if job is not None and repeats and job.try_repeat(leaf, x, gs[k]):
                job.index = k
                self._add(job, job.key.spec, x)
            elif not self._take(k):
                leaf.job = None  # it may have left the device: the CPU kernels take it next time
                rest.append(k)
        return rest

    def _take(self, k: int) -> bool:
        """Take a leaf on a device, or find it without a gradient; tell whether one was so."""
        update, leaf, x = self.update, self.update.leaves[k], self.update.xs[k]
        if devices.library(x) is None:
            return False
        g = update.gradient(k)
        if g is None:
            return True
        try:
            if self.take(k, leaf, x, g, update.path(k)):
                return True
            if not library_for(x).computes:
                raise TypeError(
                    f"at {update.path_of(k)}: {short(leaf.rule)} cannot update an array of Numba "
                    f"of shape {tuple(x.shape)} and dtype {x.dtype}. Kernels take float32 and "
                    "float64, others inside MixedPrecision, and rules of the library or with a "
                    "`step`; for anything else make the parameters arrays of CuPy or tensors of "
                    "PyTorch. If the rule is one of these, the state is not of this parameter: "
                    "call setup anew with this model"
                )
        except Exception as error:
            error.add_note(f"raised by {leaf.rule!r} at {update.path_of(k)}; nothing was updated")
            raise
        return False

    def nonfinite(self) -> list[int]:
        gradients = [self.update.gs, *self.update.higher]
        return [k for k in self.indices() if self.update.is_bad(k, gradients)]

    def may_write(self, arrays: Sequence[Array]) -> bool:
        return True

    def written(self) -> list[tuple[int, Array]]:
        return [(k, self.update.xs[k]) for k in self.indices()]

    def results(self) -> tuple[dict[int, Array], dict[int, Any]]:
        xs = self.update.xs
        for k, new in self.new_x.items():
            self.new_x[k] = library_for(new).like(xs[k], new)
        return self.new_x, self.new_state

    def unrecorded(self) -> list[Any]:
        return [self.update.xs[job.index] for job in self.jobs if job.lib.by_views]


def summed(a: Array, b: Array) -> Array:
    """Return the sum of two arrays of Numba."""
    lib = devices.library(a)
    assert lib is not None
    if devices.axes(lib, a) is None:
        a = lib.copy(a)
    rows = Rows(lambda state: tuple(map(lib.blank, state)))
    was_taken = rows.take(0, Item(_Hold(), (a,)), a, b, str)
    assert was_taken, "gradients are checked before they are summed"
    rows.lay_out()
    _make(rows.calls())
    return rows.new_state[0][0]


def _carry_over(old: Any, new: Any) -> None:
    """Copy a state that this step does not change."""
    for a, b in zip(parts_of_state(old, tuple), parts_of_state(new, (tuple,)), strict=True):
        if a is b:
            continue
        if (lib := devices.library(b)) is not None:
            lib.assign(b, a)
        else:
            b[...] = a


def keep_job(job: Job, leaf: Any, x: Array, g: Array) -> None:
    """Let a leaf keep its job for the next step."""
    job.remember(leaf, x, g)
    leaf.job = job


def _make(calls: Iterable[Call]) -> None:
    for function, *args in calls:
        function(*args)


def _call_on(device: int, function: Callable[..., Any], *args: Any) -> Any:
    """Make a call while `device` is the current device of Numba."""
    with _launch.device(device):
        return function(*args)


def _call(device: int, function: Callable[..., Any], *args: Any) -> Any:
    """Make a call, where there is one device only."""
    return function(*args)
