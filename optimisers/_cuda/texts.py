"""Programs for CUDA devices and the texts of their kernels.

a) A `Program` says what happens to each number of an array: the steps of a chain, one after the
   other. `step_text` writes it as one kernel, in which the steps are the functions of the rules,
   and all else has the names of `words`.
b) The arrays of a launch are *rows* of a table of whole numbers, most of them addresses. A second
   table says which stretch of which row each block of the grid takes, so that it matters little
   whether a million numbers are one array or a thousand.
c) The numbers that steps need are arguments of the kernel if all rows share them, or else a table.
d) A *barrier* (a norm) ends a launch: `measure_text` writes a kernel that evaluates the steps ahead
   of it without storing anything and adds up, in double, what reaches it; `combine_text` one that
   joins the sums of each row, in an order that its length alone decides, and leaves the factor for
   the next launch. The host is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .words import LANES

# --- programs --------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One step of a program."""

    step: Any
    """The function."""
    slots: int
    coefs: int
    """How many numbers it takes."""
    order: float | None = None
    """For a barrier the order of its norm, which leaves the one number that the step takes."""


class Program(NamedTuple):
    """What happens to each number of an array."""

    stages: tuple[Stage, ...]
    real: str
    """The dtype that is computed in."""
    grad: str
    """The dtype of the gradient."""
    narrow: str | None = None
    """The dtype of the parameter, if what is computed with is a master copy of it."""
    moves: bool = True
    """Whether there is a step to subtract; if not, slots alone are written."""

    @property
    def slots(self) -> int:
        """How many arrays it keeps."""
        return sum(stage.slots for stage in self.stages)

    @property
    def coefs(self) -> int:
        """How many numbers it takes."""
        return sum(stage.coefs for stage in self.stages if stage.order is None)

    @property
    def barriers(self) -> list[int]:
        """Which of its stages are barriers."""
        return [k for k, stage in enumerate(self.stages) if stage.order is not None]


# The head of a row; after it come the addresses of each slot, where it is read and written.
LENGTH, FIRST_BLOCK, ALIGNED, GRAD, PARAMETER, OUT, ROUNDED, SLOTS = range(8)
WORDS_OF_SLOT = 2


def width(program: Program) -> int:
    """Return how many words a row has."""
    return SLOTS + WORDS_OF_SLOT * program.slots


# --- texts -----------------------------------------------------------------------------------


def _tuple_of(items: Sequence[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{k}" for k in range(count)]


def _heading(name: str, program: Program, stages: int, varied: bool, extra: str) -> list[str]:
    """Return the lines that find the stretch of a block and name what the stages need."""
    used = program.stages[:stages]
    numbers = _names("c", sum(s.coefs for s in used if s.order is None))
    given = "numbers" if varied else ", ".join(_names("c", program.coefs))
    slots = range(sum(s.slots for s in used))
    lines = [
        f"def {name}(rows, blocks, stretch, factors, {extra}{given}):",
        "    block = cuda.blockIdx.x",
        "    tensor = blocks[2 * block]",
        "    start = blocks[2 * block + 1]",
        f"    row = tensor * {width(program)}",
        f"    end = min(start + stretch, rows[row + {LENGTH}])",
        f"    g = grad_at(rows[row + {GRAD}])",
        f"    x = real_at(rows[row + {PARAMETER}])",
        *(f"    old{j} = real_at(rows[row + {SLOTS + WORDS_OF_SLOT * j}])" for j in slots),
    ]
    barriers = program.barriers
    lines += [
        f"    f{b} = factors[tensor * {len(barriers)} + {b}]"
        for b, stage in enumerate(barriers)
        if stage < stages
    ]
    if varied:
        lines += [
            f"    {c} = numbers[tensor * {program.coefs} + {k}]" for k, c in enumerate(numbers)
        ]
    return lines


def _chain(program: Program, stages: int, lane: int) -> list[str]:
    """Return the lines that run the first stages on one number; it and the slots are named.

    Then ``d`` is what is to be subtracted, and ``v0``, ``v1``, ... are the new slots.
    """
    lines = []
    slot = coef = barrier = 0
    for k, stage in enumerate(program.stages[:stages]):
        values = [f"v{j}_{lane}" for j in range(slot, slot + stage.slots)]
        if stage.order is not None:
            numbers = [f"f{barrier}"]
            barrier += 1
        else:
            numbers = [f"c{j}" for j in range(coef, coef + stage.coefs)]
            coef += stage.coefs
        args = f"x_{lane}, d_{lane}, {_tuple_of(values)}, {_tuple_of(numbers)}"
        lines.append(f"d_{lane}, new = step{k}({args})")
        lines += [f"{value} = new[{j}]" for j, value in enumerate(values)]
        slot += stage.slots
    return lines


def step_text(program: Program, varied: bool) -> str:
    """Return the text of the kernel that runs a program on many arrays.

    Parameters
    ----------
    program : Program
        The program.
    varied : bool
        Whether each row has numbers of its own.
    """
    lanes, slots = LANES[program.real], range(program.slots)
    stages = len(program.stages)
    lines = _heading("kernel", program, stages, varied, "")
    lines += [f"    new{j} = real_at(rows[row + {SLOTS + WORDS_OF_SLOT * j + 1}])" for j in slots]
    if program.moves:
        lines.append(f"    out = real_at(rows[row + {OUT}])")
    if program.moves and program.narrow:
        lines.append(f"    rounded = narrow_at(rows[row + {ROUNDED}])")

    def body(count: int, load: Callable[[str, str], str], store: Callable[..., str]) -> list[str]:
        """Return the lines that update `count` numbers at once."""
        each = range(count)
        inner = [load("x", "x"), load("d", "g"), *(load(f"v{j}", f"old{j}") for j in slots)]
        for lane in each:
            inner.append(f"d_{lane} = widen(d_{lane})")
            inner += _chain(program, stages, lane)
            if program.moves:
                inner.append(f"y_{lane} = x_{lane} - d_{lane}")
        inner += [store(f"new{j}", f"v{j}_{{}}") for j in slots]
        if program.moves:
            inner.append(store("out", "y_{}"))
        if program.moves and program.narrow:
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
    """How numbers are reduced to one, as text."""

    value: str
    """The summand of a number of size ``v``; ``unit`` is the result of the sum before."""
    join: str = "a + b"
    """How two sums, ``a`` and ``b``, are one."""
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
    """Return which sums a norm needs, one after the other.

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


def measure_text(program: Program, barrier: int, varied: bool) -> str:
    """Return the text of a kernel that sums up, block by block, what reaches a barrier."""
    stage = program.barriers[barrier]
    slots = range(sum(s.slots for s in program.stages[:stage]))
    inner = [
        "x_0 = x[i]",
        "d_0 = widen(g[i])",
        *(f"v{j}_0 = old{j}[i]" for j in slots),
        *_chain(program, stage, 0),
        "a = join(a, value(wide_absolute(double(d_0)), unit))",
        "i += cuda.blockDim.x",
    ]
    lines = [
        *_heading("kernel", program, stage, varied, "units, parts, "),
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
            # by halves where the whole root alone would overflow
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
