"""The texts of kernels for CUDA devices.

a) A `KernelSpec` lists the steps that a kernel takes with each number of an array. `step_text`
   writes them as one kernel, in which the steps are the functions of the rules, and all other names
   are those of `words`.
b) The arrays of a launch are *rows* of a table of whole numbers, most of them addresses. A second
   table says which stretch of which row each block of the grid takes, so that it matters little
   whether a million numbers are one array or a thousand.
c) The numbers that steps need are arguments of the kernel if all rows share them, or else a table.
d) A *barrier* (a norm) ends a launch. `measure_text` writes a kernel that evaluates the steps ahead
   of the barrier without storing anything and adds up, in double, the numbers that reach it.
   `combine_text` writes one that joins the sums of each row, in an order that its length alone
   decides, and leaves the factor for the next launch. The host is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .words import LANES

# --- specs -----------------------------------------------------------------------------------


class KernelStep(NamedTuple):
    """One step in a kernel."""

    function: Any
    """That of the rule."""
    slots: int
    """How many arrays it keeps."""
    coefs: int
    """How many numbers it takes."""
    order: float | None = None
    """For a barrier, the order of the norm from which the step's one number is made."""


class KernelSpec(NamedTuple):
    """What a kernel is compiled for: its steps, and the dtypes that it reads and writes."""

    steps: tuple[KernelStep, ...]
    real: str
    """The dtype in which it computes."""
    grad: str
    """The dtype of the gradient."""
    narrow: str | None = None
    """The dtype of the parameter, if a master copy of it is updated."""
    moves: bool = True
    """Whether the parameter moves; if not, slots alone are written."""

    @property
    def slots(self) -> int:
        """How many arrays it keeps."""
        return sum(step.slots for step in self.steps)

    @property
    def coefs(self) -> int:
        """How many numbers it takes."""
        return sum(step.coefs for step in self.steps if step.order is None)

    @property
    def barriers(self) -> list[int]:
        """The positions of the steps that are barriers."""
        return [k for k, step in enumerate(self.steps) if step.order is not None]


# The head of a row; after it come the addresses of each slot, where it is read and written.
LENGTH, FIRST_BLOCK, ALIGNED, GRAD, PARAMETER, OUT, ROUNDED, SLOTS = range(8)
WORDS_OF_SLOT = 2


def width(spec: KernelSpec) -> int:
    """Return how many words a row has."""
    return SLOTS + WORDS_OF_SLOT * spec.slots


# --- texts -----------------------------------------------------------------------------------


def _tuple_of(items: Sequence[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{k}" for k in range(count)]


def _heading(name: str, spec: KernelSpec, steps: int, varied: bool, extra: str) -> list[str]:
    """Return the lines that find the stretch of a block and name the values for the steps."""
    used = spec.steps[:steps]
    numbers = _names("c", sum(s.coefs for s in used if s.order is None))
    given = "numbers" if varied else ", ".join(_names("c", spec.coefs))
    slots = range(sum(s.slots for s in used))
    lines = [
        f"def {name}(rows, blocks, stretch, factors, {extra}{given}):",
        "    block = cuda.blockIdx.x",
        "    tensor = blocks[2 * block]",
        "    start = blocks[2 * block + 1]",
        f"    row = tensor * {width(spec)}",
        f"    end = min(start + stretch, rows[row + {LENGTH}])",
        f"    g = grad_at(rows[row + {GRAD}])",
        f"    x = real_at(rows[row + {PARAMETER}])",
        *(f"    old{j} = real_at(rows[row + {SLOTS + WORDS_OF_SLOT * j}])" for j in slots),
    ]
    barriers = spec.barriers
    lines += [
        f"    f{b} = factors[tensor * {len(barriers)} + {b}]"
        for b, step in enumerate(barriers)
        if step < steps
    ]
    if varied:
        lines += [f"    {c} = numbers[tensor * {spec.coefs} + {k}]" for k, c in enumerate(numbers)]
    return lines


def _chain(spec: KernelSpec, steps: int, lane: int) -> list[str]:
    """Return the lines that run the first steps on one number, whose names end with the lane.

    Afterwards ``d`` is the step to be subtracted, and ``v0``, ``v1``, ... are the new slots.
    """
    lines = []
    slot = coef = barrier = 0
    for k, step in enumerate(spec.steps[:steps]):
        values = [f"v{j}_{lane}" for j in range(slot, slot + step.slots)]
        if step.order is not None:
            numbers = [f"f{barrier}"]
            barrier += 1
        else:
            numbers = [f"c{j}" for j in range(coef, coef + step.coefs)]
            coef += step.coefs
        args = f"x_{lane}, d_{lane}, {_tuple_of(values)}, {_tuple_of(numbers)}"
        lines.append(f"d_{lane}, new = step{k}({args})")
        lines += [f"{value} = new[{j}]" for j, value in enumerate(values)]
        slot += step.slots
    return lines


def step_text(spec: KernelSpec, varied: bool) -> str:
    """Return the text of the kernel that updates many arrays.

    Parameters
    ----------
    spec : KernelSpec
        Its steps and dtypes.
    varied : bool
        Whether each row has numbers of its own.
    """
    lanes, slots = LANES[spec.real], range(spec.slots)
    steps = len(spec.steps)
    lines = _heading("kernel", spec, steps, varied, "")
    lines += [f"    new{j} = real_at(rows[row + {SLOTS + WORDS_OF_SLOT * j + 1}])" for j in slots]
    if spec.moves:
        lines.append(f"    out = real_at(rows[row + {OUT}])")
    if spec.moves and spec.narrow:
        lines.append(f"    rounded = narrow_at(rows[row + {ROUNDED}])")

    def body(count: int, load: Callable[[str, str], str], store: Callable[..., str]) -> list[str]:
        """Return the lines that update `count` numbers at once."""
        each = range(count)
        inner = [load("x", "x"), load("d", "g"), *(load(f"v{j}", f"old{j}") for j in slots)]
        for lane in each:
            inner.append(f"d_{lane} = widen(d_{lane})")
            inner += _chain(spec, steps, lane)
            if spec.moves:
                inner.append(f"y_{lane} = x_{lane} - d_{lane}")
        inner += [store(f"new{j}", f"v{j}_{{}}") for j in slots]
        if spec.moves:
            inner.append(store("out", "y_{}"))
        if spec.moves and spec.narrow:
            inner.append(store("rounded", "round(y_{})"))
        return inner

    def loop(first: str, stop: str, inner: list[str]) -> list[str]:
        return [
            f"i = {first} + cuda.threadIdx.x",
            f"while i < {stop}:",
            *(f"    {line}" for line in inner),
            "    i += cuda.blockDim.x",
        ]

    def all_lanes(form: str) -> str:
        return _tuple_of([form.format(lane) for lane in range(lanes)])

    wide = body(
        lanes,
        lambda value, memory: f"{all_lanes(value + '_{}')} = load({memory}, i)",
        lambda memory, value: f"store({memory}, i, {all_lanes(value)})",
    )
    single = body(
        1,
        lambda value, memory: f"{value}_0 = {memory}[i]",
        lambda memory, value: f"{memory}[i] = {value.format(0)}",
    )
    lines += [
        "    first = start",
        f"    if rows[row + {ALIGNED}] != 0:",
        f"        first = end // {lanes} * {lanes}",
        *(f"        {line}" for line in loop(f"start // {lanes}", f"end // {lanes}", wide)),
        *(f"    {line}" for line in loop("first", "end", single)),
    ]
    return "\n".join(lines) + "\n"


class Sum(NamedTuple):
    """The text of a reduction of many numbers to one."""

    value: str
    """The summand for a magnitude ``v``; ``unit`` is the result of the sum before."""
    join: str = "a + b"
    """The sum of two sums, ``a`` and ``b``."""
    begin: float = 0.0
    """The sum of nothing."""


SUMS = {
    "largest": Sum("v", "wide_maximum(a, b)"),
    "smallest": Sum("v", "wide_minimum(a, b)", math.inf),
    "nonzero": Sum("wide_where(v != double(0), double(1), double(0))"),
    "absolute": Sum("v"),
    "squares": Sum("v * v"),
    "powers": Sum("power(v / unit, order)"),
}


def sums_of_norm(p: float, real: str) -> list[str]:
    """Return the sums that a norm needs, one after the other.

    Squares of float32 numbers neither overflow nor vanish in double. For all other powers the
    numbers are first divided by the largest, or by the smallest if the order is negative.
    """
    simple = {math.inf: "largest", -math.inf: "smallest", 0.0: "nonzero", 1.0: "absolute"}
    if p in simple:
        return [simple[p]]
    if p == 2 and real == "float32":
        return ["squares"]
    return ["largest" if p > 0 else "smallest", "powers"]


_JOIN_THREADS = [
    "    me = cuda.threadIdx.x",
    "    shared = cuda.shared.array(THREADS, double)",
    "    shared[me] = a",
    "    cuda.syncthreads()",
    "    half = THREADS // 2",
    "    while half > 0:",
    "        if me < half:",
    "            shared[me] = join(shared[me], shared[me + half])",
    "        cuda.syncthreads()",
    "        half //= 2",
]


def measure_text(spec: KernelSpec, barrier: int, varied: bool) -> str:
    """Return the text of a kernel that sums up, in each block, the numbers before a barrier."""
    step = spec.barriers[barrier]
    slots = range(sum(s.slots for s in spec.steps[:step]))
    inner = [
        "x_0 = x[i]",
        "d_0 = widen(g[i])",
        *(f"v{j}_0 = old{j}[i]" for j in slots),
        *_chain(spec, step, 0),
        "a = join(a, value(wide_absolute(double(d_0)), unit))",
        "i += cuda.blockDim.x",
    ]
    lines = [
        *_heading("kernel", spec, step, varied, "units, parts, "),
        "    unit = units[tensor]",
        "    a = begin",
        "    i = start + cuda.threadIdx.x",
        "    while i < end:",
        *(f"        {line}" for line in inner),
        *_JOIN_THREADS,
        "    if me == 0:",
        "        parts[block] = shared[0]",
    ]
    return "\n".join(lines) + "\n"


def combine_text(p: float, kind: str, is_last: bool) -> str:
    """Return the text of a kernel that joins the sums of each row.

    The result becomes the unit of the next sum, or, if this is the last, the norm and the factor
    that brings it down to its limit.
    """
    lines = [
        "def kernel(rows, words, stretch, parts, units, norms, factors, limits, at, barriers):",
        "    tensor = cuda.blockIdx.x",
        f"    length = rows[tensor * words + {LENGTH}]",
        f"    begins = rows[tensor * words + {FIRST_BLOCK}]",
        "    count = (length + stretch - 1) // stretch",
        "    a = begin",
        "    i = cuda.threadIdx.x",
        "    while i < count:",
        "        a = join(a, parts[begins + i])",
        "        i += cuda.blockDim.x",
        *_JOIN_THREADS,
        "    if me == 0:",
        "        total = shared[0]",
        "        if length == 0:",
        "            total = double(0)",
    ]
    if not is_last:
        return "\n".join([*lines, "        units[tensor] = total"]) + "\n"
    found = "total"
    if kind == "squares":
        found = "wide_sqrt(total)"
    elif kind == "powers":
        lines += [
            "        unit = units[tensor]",
            "        norm = unit",
            "        if isfinite(unit) and unit > double(0):",
            # The root is taken in two halves where the whole would overflow.
            *(
                ["            norm = unit * power(total, root)"]
                if abs(p) >= 1
                else [
                    "            norm = power(total, half_root)",
                    "            norm = unit * norm * norm",
                ]
            ),
        ]
        found = "norm"
    lines += [
        f"        norm = {found}",
        "        limit = limits[tensor * barriers + at]",
        "        factor = limit / norm",
        "        if norm <= limit or not isfinite(limit):",
        "            factor = double(1)",
        "        norms[tensor * barriers + at] = norm",
        "        factors[tensor * barriers + at] = number(factor)",
    ]
    return "\n".join(lines) + "\n"
