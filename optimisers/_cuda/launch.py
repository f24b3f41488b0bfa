"""Kernels for CUDA devices: Numba compiles them, a `Launch` sends their tables and runs them.

a) A `Kernel` is a compiled text of `texts`. The functions ``..._kernel_parts`` return its text, the
   words, steps and sums that its names stand for, and the types of its arguments.
b) A `Launch` has the tables of many arrays on the device. It sends a table again when that has
   changed, from pinned memory, so that nothing waits for the copy.
c) `Launch.norms` alone waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from .. import _fork
from .._arrays import numba_private
from .._steps.compiled import rebound
from .texts import SUMS, KernelSpec, combine_text, measure_text, step_text, sums_of_norm, width
from .words import LANES, is_simulated, memory_type, vocabulary

# --- settings --------------------------------------------------------------------------------


class Grid(NamedTuple):
    """How numbers are shared out among blocks and threads."""

    threads: int = 256
    """Threads of a block, a power of two."""
    stretch: int = 8192
    """Numbers that a block takes, a multiple of the numbers in 128 bits."""


grid = Grid()


def set_grid(threads: int, stretch: int) -> Grid:
    """Set the grid, and return the one before; for tests and measurements."""
    global grid
    if threads & (threads - 1) or not 1 <= threads <= 1024:
        raise ValueError(f"a block has a power of two of threads, at most 1024; got {threads}")
    if stretch < 1 or stretch % max(LANES.values()):
        raise ValueError(f"a stretch has a multiple of {max(LANES.values())} numbers")
    before, grid = grid, Grid(threads, stretch)
    return before


# --- compiled --------------------------------------------------------------------------------


class Kernel:
    """A compiled text.

    Numba compiles and loads it. It is launched by CUDA's own package, since Numba's launch, made
    for arguments of all types, takes longer than the rest of a step on the host.
    """

    def __init__(self, text: str, names: dict[str, Any], types: Sequence[str]) -> None:
        from numba import cuda

        function = function_of(text, names)
        self.is_simulated = is_simulated()
        self._loaded: dict[int, Any] = {}
        self._configs: dict[int, Any] = {}
        if self.is_simulated:
            self.simulated = cuda.jit(function)
        else:
            made = cuda.jit(signature(types))(function)
            (self.made,) = made.overloads.values()

    def call(self, blocks: int, stream: Stream, *args: Any) -> tuple[Any, ...]:
        """Return the call of a C function that enqueues the kernel.

        Its arguments are addresses, other whole numbers, and floats of NumPy.
        """
        if self.is_simulated:
            return self._simulate, blocks, *args
        config = self._configs.get(blocks)
        if config is None:
            config = self._config(blocks)
        kernel = self._loaded.get(stream.device)
        if kernel is None:
            kernel = self._loaded[stream.device] = numba_private.loaded(self.made)
        return _core().launch, stream.core, config, kernel, *args

    def _simulate(self, blocks: int, *args: Any) -> None:
        self.simulated[blocks, grid.threads](*args)

    def _config(self, blocks: int) -> Any:
        if len(self._configs) > 64:
            self._configs.clear()
        config = _core().LaunchConfig(grid=blocks, block=grid.threads)
        self._configs[blocks] = config
        return config


@functools.cache
def _core() -> Any:
    """Return the part of CUDA's own package that Numba launches with."""
    return importlib.import_module("cuda.core")


def function_of(text: str, names: dict[str, Any]) -> Callable[..., None]:
    """Return the function that `text` defines."""
    given = {"__name__": __name__, **names}
    exec(compile(text, "<kernel>", "exec"), given)
    made: Callable[..., None] = given["kernel"]
    return made


def signature(types: Sequence[str]) -> Any:
    """Return Numba's signature of a kernel; ``*float32`` is a pointer."""
    from numba.cuda import types as kinds

    return kinds.void(
        *(
            kinds.CPointer(memory_type(kind[1:])) if kind[0] == "*" else memory_type(kind)
            for kind in types
        )
    )


def step_kernel_parts(spec: KernelSpec, varied: bool) -> tuple[str, dict[str, Any], list[str]]:
    """Return the arguments of `Kernel` for an update."""
    types = ["*int64", "*int64", "int64", f"*{spec.real}", *_number_types(spec, varied)]
    return step_text(spec, varied), _names_of(spec), types


def measure_kernel_parts(
    spec: KernelSpec, varied: bool, barrier: int, p: float, kind: str
) -> tuple[str, dict[str, Any], list[str]]:
    """Return the arguments of `Kernel` for the sums of the numbers that reach a barrier."""
    types = ["*int64", "*int64", "int64", f"*{spec.real}", "*float64", "*float64"]
    names = {**_names_of(spec), **_sum_names(kind, p, _names_of(spec))}
    return measure_text(spec, barrier, varied), names, types + _number_types(spec, varied)


def combine_kernel_parts(
    real: str, p: float, kind: str, is_last: bool
) -> tuple[str, dict[str, Any], list[str]]:
    """Return the arguments of `Kernel` for joining the sums of each row."""
    types = ["*int64", "int64", "int64", "*float64", "*float64", "*float64"]
    types += [f"*{real}", "*float64", "int64", "int64"]
    names = vocabulary(real, real, real)
    roots = {"root": np.float64(1 / p), "half_root": np.float64(0.5 / p)} if p else {}
    return combine_text(p, kind, is_last), {**names, **_sum_names(kind, p, names), **roots}, types


def _number_types(spec: KernelSpec, varied: bool) -> list[str]:
    return [f"*{spec.real}"] if varied else [spec.real] * spec.coefs


def _names_of(spec: KernelSpec) -> dict[str, Any]:
    names = vocabulary(spec.real, spec.grad, spec.narrow or spec.real)
    steps = {
        f"step{k}": names["jit"](rebound(step.function, names)) for k, step in enumerate(spec.steps)
    }
    return {**names, **steps}


def _sum_names(kind: str, p: float, names: dict[str, Any]) -> dict[str, Any]:
    """Return the meaning of `value`, `join`, `begin` and THREADS in the texts of sums."""
    how = SUMS[kind]
    given = {"__name__": __name__, **names, "order": np.float64(p)}
    exec(f"def value(v, unit): return {how.value}\ndef join(a, b): return {how.join}", given)
    return {
        "value": names["jit"](given["value"]),
        "join": names["jit"](given["join"]),
        "begin": np.float64(how.begin),
        "THREADS": grid.threads,
    }


@functools.lru_cache(maxsize=1024)
def _compiled(parts: Callable[..., Any], grid: Grid, *key: Any) -> Kernel:
    """Return a kernel, compiled once for each grid, since the number of threads is in its code."""
    return Kernel(*parts(*key))


def compiled(parts: Callable[..., Any], *key: Any) -> Kernel:
    """Return the kernel that ``parts(*key)`` describes."""
    with _fork.compiling:
        return _compiled(parts, grid, *key)


# --- devices and streams ---------------------------------------------------------------------


def is_installed() -> bool:
    """Tell whether the package that compiles for GPUs is there."""
    return importlib.util.find_spec("numba_cuda") is not None


@functools.cache
def devices() -> int:
    """Return how many devices there are."""
    from numba import cuda

    return 1 if is_simulated() else len(cuda.gpus)


def device(number: int) -> Any:
    """Return a context in which a device is the current one."""
    from numba import cuda

    return cuda.gpus[number]


class Stream:
    """A stream of a device, as an object of Numba and one of CUDA's own package."""

    def __init__(self, handle: int, device: int) -> None:
        from numba import cuda

        self.device = device
        self.numba: Any = 0
        self.core: Any = None
        if not is_simulated():
            self.numba = cuda.external_stream(handle) if handle else cuda.default_stream()
            self.core = _core().Stream.from_handle(handle)


@functools.lru_cache(maxsize=256)
def stream_of(handle: int, device: int) -> Stream:
    """Return the stream of a handle."""
    return Stream(handle, device)


# --- tables ----------------------------------------------------------------------------------


class _Staging:
    """Pinned memory of the host; nothing waits for copies from there to the device."""

    def __init__(self) -> None:
        self.pieces: list[tuple[np.ndarray, Any]] = []

    def send(self, values: np.ndarray, target: Any, stream: Stream) -> None:
        """Enqueue a copy of `values` into the head of `target`."""
        raw = values.view(np.uint8)
        if is_simulated():
            numba_private.send(raw, target, 0)
            return
        piece, done = self._free(raw.size)
        piece[: raw.size] = raw
        numba_private.send(piece[: raw.size], target, stream.numba)
        done.record(stream.numba)

    def _free(self, size: int) -> tuple[np.ndarray, Any]:
        """Return a piece from which no copy is under way, and the event to record after one."""
        from numba import cuda

        for piece, done in self.pieces:
            if piece.size >= size and done.query():
                return piece, done
        made = cuda.pinned_array(max(4096, 2 * size), np.uint8), cuda.event(timing=False)
        self.pieces.append(made)
        return made


class Table:
    """Numbers on the device, sent there when they change."""

    def __init__(self, dtype: str, staging: _Staging) -> None:
        self.dtype, self.staging = np.dtype(dtype), staging
        self.values: Sequence[Any] | None = None
        self.memory: Any = None

    def hold(self, values: Sequence[Any], stream: Stream) -> None:
        """Send these values to the device, unless it has them."""
        if values != self.values:
            host = np.array(values, self.dtype)
            self.reserve(host.size)
            self.staging.send(host, self.memory, stream)
            self.values = values

    def reserve(self, size: int) -> None:
        """Allocate memory for so many numbers, unless there is enough."""
        from numba import cuda

        if self.memory is None or self.memory.size < size:
            self.memory = cuda.device_array(max(16, size + size // 2), self.dtype)
            self.values = None

    @property
    def argument(self) -> Any:
        """The argument by which a kernel finds the table."""
        if self.memory is None or is_simulated():
            return 0 if self.memory is None else self.memory
        return numba_private.address(self.memory)


# --- launches --------------------------------------------------------------------------------


class _Begun(NamedTuple):
    """A call that is the same in each step, except for numbers at its end."""

    call: tuple[Any, ...]
    takes_numbers: bool


class Launch:
    """A spec on many arrays of one device and stream; its tables serve from step to step."""

    def __init__(self, spec: KernelSpec, stream: Stream) -> None:
        staging = _Staging()
        self.spec, self.stream = spec, stream
        self.width, self.number = width(spec), np.dtype(spec.real)
        self.rows = Table("int64", staging)
        self.blocks = Table("int64", staging)
        self.numbers = Table(spec.real, staging)
        self.limits = Table("float64", staging)
        self.factors = Table(spec.real, staging)
        self.units, self.parts = Table("float64", staging), Table("float64", staging)
        self.found = Table("float64", staging)
        self.lengths: list[int] | None = None
        self.grid = grid
        self.firsts: list[int] = []
        self.cuts: list[int] = []
        self.count = 0
        self.varied = False
        self.first: tuple[float, ...] | None = None
        self.shared: tuple[Any, ...] = ()
        self.head: tuple[Any, ...] = ()
        self._kernels: list[tuple[Kernel, tuple[Any, ...]]] = []
        """The kernels of an update in turn, each with the arguments of `compiled` for it."""
        self.measuring: list[_Begun] = []
        """The calls that enqueue the norms, and the factors for the steps after them."""
        self.updating: list[_Begun] = []
        """The calls that enqueue the update; none if there are no numbers to update."""
        self.is_begun = False
        self.tokens: list[object] = []
        """The tokens of its jobs, which stand for the rows."""
        self.check: object = None
        """The mark of launches that were checked together and write nothing which another reads."""

    def lay_out(self, lengths: list[int]) -> list[int]:
        """Cut arrays of these lengths into stretches; return the first block of each."""
        if lengths != self.lengths or grid is not self.grid:
            counts = np.array([-(-n // grid.stretch) for n in lengths])
            firsts = np.cumsum(counts) - counts
            tensor = np.repeat(np.arange(len(lengths)), counts)
            start = (np.arange(len(tensor)) - firsts[tensor]) * grid.stretch
            self.cuts = np.stack([tensor, start], axis=1).ravel().tolist()
            self.firsts, self.count = firsts.tolist(), len(tensor)
            self.lengths, self.grid = lengths, grid
            self._kernels.clear()
        return self.firsts

    def prepare(
        self, rows: list[int], numbers: list[tuple[float, ...]], limits: list[float]
    ) -> None:
        """Compile missing kernels and send changed tables; write nothing that the caller sees.

        Parameters
        ----------
        rows : list of int
            The words of all rows, one after the other.
        numbers : list of tuple
            For each row the numbers that its steps take.
        limits : list of float
            For each row, and each of its barriers, the largest norm.
        """
        self.rows.hold(rows, self.stream)
        self.blocks.hold(self.cuts, self.stream)
        if limits:
            self.limits.hold(limits, self.stream)
            self.units.reserve(len(numbers))
            self.parts.reserve(self.count)
            self.found.reserve(len(limits))
            self.factors.reserve(len(limits))
        where = self.rows.argument, self.blocks.argument
        self.head = *where, self.grid.stretch, self.factors.argument
        self.is_begun = False
        self.renumber(numbers)

    def renumber(self, numbers: list[tuple[float, ...]]) -> None:
        """Do the part of `prepare` that new numbers need, where nothing else has changed."""
        first = numbers[0]
        varied = len(numbers) > 1 and any(own is not first and own != first for own in numbers)
        if varied is not self.varied or not self._kernels:
            self.varied = varied
            self._kernels = [(compiled(*key), key) for key in self._keys()]
            self.is_begun = False
        if varied:
            self.numbers.hold([number for own in numbers for number in own], self.stream)
            self.shared = (self.numbers.argument,)
        elif first is not self.first:
            self.shared = tuple(np.array(first, self.number))
        self.first = None if varied else first
        if not self.is_begun:
            self._begin()

    def _keys(self) -> Iterator[tuple[Any, ...]]:
        """Yield the arguments of `compiled` for each kernel of an update, in turn."""
        spec = self.spec
        for b, stage in enumerate(spec.barriers):
            p = cast(float, spec.steps[stage].order)
            kinds = sums_of_norm(p, spec.real)
            for kind in kinds:
                yield measure_kernel_parts, spec, self.varied, b, p, kind
                yield combine_kernel_parts, spec.real, p, kind, kind is kinds[-1]
        yield step_kernel_parts, spec, self.varied

    def _begin(self) -> None:
        """Make the calls that enqueue an update, without the numbers that its rows share."""
        self.measuring, self.updating = [], []
        barrier, barriers = 0, len(self.spec.barriers)
        sums = self.units.argument, self.parts.argument
        for kernel, (parts, *key) in self._kernels:
            if parts is combine_kernel_parts:
                call = kernel.call(
                    len(self.firsts), self.stream,
                    self.rows.argument, self.width, self.grid.stretch, *reversed(sums),
                    self.found.argument, self.factors.argument, self.limits.argument,
                    barrier, barriers,
                )  # fmt: skip
                self.measuring.append(_Begun(call, False))
            elif self.count and parts is measure_kernel_parts:
                barrier = key[2]
                call = kernel.call(self.count, self.stream, *self.head, *sums)
                self.measuring.append(_Begun(call, True))
            elif self.count:
                call = kernel.call(self.count, self.stream, *self.head)
                self.updating.append(_Begun(call, True))
        self.is_begun = True

    def measures(self) -> list[tuple[Any, ...]]:
        """Return the calls that enqueue the norms, and the factors for the steps after them."""
        return self._with_numbers(self.measuring)

    def run(self) -> list[tuple[Any, ...]]:
        """Return the call that enqueues the update, if there are numbers to update."""
        return self._with_numbers(self.updating)

    def _with_numbers(self, begun: list[_Begun]) -> list[tuple[Any, ...]]:
        shared = self.shared
        return [(*call, *shared) if takes_numbers else call for call, takes_numbers in begun]

    def norms(self) -> list[float]:
        """Wait for the norms, and return them row by row."""
        host = np.empty(len(self.spec.barriers) * len(self.firsts))
        numba_private.fetch(self.found.memory, host, self.stream.numba)
        if not is_simulated():
            self.stream.numba.synchronize()
        return host.tolist()
