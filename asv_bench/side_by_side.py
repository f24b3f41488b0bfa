"""This library beside NumPy, PyTorch and optax, in turn, in one process.

    python asv_bench/side_by_side.py

prints the tables of docs/benchmarks.md, and writes them there with a picture. Whether a goal is
met is computed from what was measured. A peer that is not installed leaves a dash.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import optimisers as opt
from benchmarks.measure import Limit, alternate, copy_bandwidth, import_time, memory_growth
from benchmarks.models import RULES, gradient_of, many_arrays, mlp, normal, resnet18
from benchmarks.peers import TWINS, Step, numpy_adam, optax_step, torch_step, torch_twins
from optimisers import _engine
from optimisers._info import installed

ROOT = Path(__file__).parent.parent

OURS = "optimisers"
NUMPY = "NumPy, in place"
FUSED = "PyTorch, fused"
DEFAULT = "PyTorch, default"
OPTAX = "optax, jitted, donated"

Tree = Any
Times = Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """How large and how often."""

    runs: int = 15
    least: float = 0.002
    large: int = 10_000_000
    medium: int = 100_000
    sizes: tuple[int, ...] = tuple(k * 10**e for e in range(1, 7) for k in (1, 3)) + (10_000_000,)
    arrays: int = 1_000
    hidden: int = 128
    width: int = 64
    imports: int = 15


FULL = Plan()
QUICK = Plan(2, 0, 20_000, 3_000, (10, 1_000, 3_000, 20_000), 20, 8, 2, 2)


# --- goals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What must be, what would be better, and what is.

    Parameters
    ----------
    work, measure : str
        What is done, and what of it is measured.
    got : float or None
        None where a peer is missing.
    must, aim : float or None
        The limits.
    show : callable
        Writes such a number down.
    less : bool
        Whether smaller is better.
    """

    work: str
    measure: str
    got: float | None
    must: float | None
    aim: float | None
    show: Callable[[float], str]
    less: bool = False

    def meets(self, limit: float | None) -> bool | None:
        """Tell whether the limit is kept; None if nobody knows."""
        if limit is None or self.got is None:
            return None
        return self.got <= limit if self.less else self.got >= limit

    def cells(self) -> list[str]:
        got = "–" if self.got is None else self.show(self.got)
        return [self.work, self.measure, got, self._judged(self.must), self._judged(self.aim)]

    def _judged(self, limit: float | None) -> str:
        if limit is None:
            return ""
        return f"{'≤' if self.less else '≥'} {self.show(limit)} {MARKS[self.meets(limit)]}"


MARKS = {True: "✓", False: "✗", None: "–"}


def times_as(seconds: float) -> str:
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            break
    return f"{seconds / unit:.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:.0f} {name}"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def share(part: float) -> str:
    return f"{100 * part:.0f} %"


def megabytes(n: float) -> str:
    return f"{n / 1e6:.1f} MB"


def rate(n: float) -> str:
    return f"{n / 1e9:.1f} GB/s"


def ratio(times: Times, peer: str, ours: str = OURS) -> float | None:
    """Return how many times faster than a peer we are."""
    return times[peer] / times[ours] if peer in times else None


# --- sections --------------------------------------------------------------------------------


@dataclass
class Section:
    """A part of the report: a table, and the goals that are read from it."""

    title: str
    text: str
    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def counted(n: int) -> str:
    """Return a large number as one reads it."""
    return f"{n / 1_000_000:g} M" if n >= 1_000_000 else f"{n:,}"


def if_installed(make: Callable[..., Step], *args: Any, **options: Any) -> Step | None:
    with contextlib.suppress(ImportError):
        return make(*args, **options)
    return None


def update_of(rule: opt.Rule, model: Tree, grad: Tree) -> Step:
    return partial(opt.update_, opt.setup(rule, model), model, grad)


def contenders(model: Tree) -> dict[str, Step | None]:
    """Return Adam for a model by everyone."""
    grad = gradient_of(model)
    xs, gs = opt.trainables(model), opt.trainables(grad)
    return {
        FUSED: if_installed(torch_step, "Adam", xs, gs, fused=True),
        DEFAULT: if_installed(torch_step, "Adam", xs, gs),
        OPTAX: if_installed(optax_step, xs, gs),
        NUMPY: numpy_adam(xs, gs),
        OURS: update_of(opt.Adam(), model, grad),
    }


def beside(times: Times, peer: str, ours: str = OURS) -> str:
    """Return a peer's time, and how many times ours it is."""
    if peer not in times:
        return "–"
    return f"{times_as(times[peer])} ({factor(times[peer] / times[ours])})"


class Adam:
    """The table of Adam over one array of each size and over models, and what the picture shows."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        peers = [NUMPY, FUSED, DEFAULT, OPTAX]
        self.section = Section(
            "Adam, float32, in place",
            "One step. In brackets: how many times our time that is.",
            ["work", OURS, *peers],
        )
        self.measure = partial(alternate, runs=plan.runs, least=plan.least)
        self.sweep: dict[int, Times] = {}
        self.bandwidth = 0.0

    def run(self) -> Section:
        for size in self.plan.sizes:
            self.one_array(size)
        self.many()
        self.model(f"MLP, hidden layer of {self.plan.hidden}", mlp(hidden=self.plan.hidden), None)
        self.model("ResNet-18 shapes", resnet18(self.plan.width), 1.0)
        return self.section

    def row(self, work: str, times: Times, ours: str = OURS) -> None:
        peers = (NUMPY, FUSED, DEFAULT, OPTAX)
        cells = [work, times_as(times[ours]), *(beside(times, peer, ours) for peer in peers)]
        self.section.rows.append(cells)

    def goal(
        self, work: str, times: Times, peer: str, must: float, aim: float | None, ours: str = OURS
    ) -> None:
        got = ratio(times, peer, ours)
        self.section.goals.append(
            Goal(work, f"times as fast as {peer}", got, must, aim, factor)
        )

    def one_array(self, size: int) -> None:
        work = f"one array of {counted(size)}"
        steps = contenders(normal(size))
        limit = Limit(16 * size) if size == self.plan.large else None
        if limit is not None:
            steps |= limit.steps | {"copy": copy_bandwidth(2 * size)}
        times = self.sweep[size] = self.measure(steps)
        if size == 10:
            self.goal(work, times, FUSED, 10, 30)
            took = Goal(work, "time", times[OURS], None, 2e-6, times_as, less=True)
            self.section.goals.append(took)
        elif size == 1_000:
            self.goal(work, times, FUSED, 10, 20)
        elif size == self.plan.medium:
            self.goal(work, times, FUSED, 1.3, 2)
        elif limit is not None:
            self.goal(work, times, FUSED, 1.0, None)
            self.bandwidth = limit.bandwidth(times)
            got = 28 * size / times[OURS] / self.bandwidth
            self.section.goals.append(
                Goal(work, "of the memory limit", got, None, 0.95, share)
            )
            pairs = [(name, 12 * limit.size) for name in limit.steps] + [("copy", 16 * size)]
            self.rates = {name: n / times[name] for name, n in pairs if name in times}
        else:
            return
        self.row(work, times)

    def many(self) -> None:
        model = many_arrays(self.plan.arrays)
        work = f"{self.plan.arrays:,} arrays of 64"
        steps = contenders(model)
        grad = gradient_of(model)
        flat, rebuild = opt.destructure(model)
        flat_grad = rebuild.flatten_gradient(grad)
        step = steps["flat"] = update_of(opt.Adam(), flat, flat_grad)

        def gathered() -> None:
            rebuild.flatten_gradient(grad, out=flat_grad)
            step()

        steps["gathered"] = gathered
        times = self.measure(steps)
        self.row(f"{work}, a dict", times)
        self.goal(f"{work}, a dict", times, FUSED, 6, 10)
        self.goal(f"{work}, a dict", times, OPTAX, 30, 50)
        self.row(f"{work}, flat: `update_` of the vector", times, "flat")
        self.goal(f"{work}, flat", times, FUSED, 60, 100, "flat")
        self.row(f"{work}, flat: `flatten_gradient`, then `update_`", times, "gathered")

    def model(self, work: str, model: Tree, must: float | None) -> None:
        times = self.measure(contenders(model))
        self.row(work, times)
        if must is not None:
            self.goal(work, times, FUSED, must, None)


def limit_section(adam: Adam) -> Section:
    size = adam.plan.large
    return Section(
        "The memory limit",
        f"Bandwidths over as much memory as Adam uses for {counted(size)} parameters, measured in "
        "turn with it. The limit is the faster `x += a g`.",
        ["what", "bandwidth"],
        [
            *([name, rate(got)] for name, got in adam.rates.items()),
            [f"`update_` of Adam, {counted(size)}", rate(28 * size / adam.sweep[size][OURS])],
        ],
    )


def chains(plan: Plan) -> Section:
    x, g = normal(plan.large), normal(plan.large)
    decay = opt.WeightDecay(5e-4)
    with_norm = opt.OptimiserChain(opt.ClipNorm(1.0), decay, opt.Adam())
    with_clip = opt.OptimiserChain(opt.ClipGrad(1.0), decay, opt.Adam())
    torch_adam = partial(torch_step, "Adam", [x], [g], fused=True, weight_decay=5e-4)
    torch_chain = "PyTorch, `clip_grad_norm_` + fused"

    def optax_chain(optax: Any) -> Any:
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.add_decayed_weights(5e-4), optax.adam(1e-3)
        )

    times = alternate(
        {
            torch_chain: if_installed(torch_adam, clip_norm=1.0),
            OPTAX: if_installed(optax_step, [x], [g], optax_chain),
            "norm": update_of(with_norm, x.copy(), g),
            "clip": update_of(with_clip, x.copy(), g),
            "Adam": update_of(opt.Adam(), x.copy(), g),
        },
        plan.runs,
        plan.least,
    )
    names = {
        "norm": "`ClipNorm → WeightDecay → Adam`",
        "clip": "`ClipGrad → WeightDecay → Adam`",
        "Adam": "`Adam`",
    }
    rows = [[work, times_as(times[name]), "", ""] for name, work in names.items()]
    rows[0][2:] = beside(times, torch_chain, "norm"), beside(times, OPTAX, "norm")
    excess = times["clip"] / times["Adam"] - 1
    return Section(
        f"Chains, one array of {counted(plan.large)}",
        "In brackets: how many times our time that is.",
        ["chain", OURS, torch_chain, OPTAX],
        rows,
        [
            Goal(
                names["norm"],
                "times as fast as PyTorch",
                ratio(times, torch_chain, "norm"),
                1.3,
                1.6,
                factor,
            ),
            Goal(names["clip"], "more than plain Adam takes", excess, 0.1, 0.05, share, less=True),
        ],
    )


def rules(plan: Plan) -> Section:
    """Measure every elementwise rule beside each mode of its PyTorch twin, and beside the limit."""
    section = Section(
        f"Every elementwise rule, one array of {counted(plan.large)}",
        "PyTorch in the fastest of its modes; in brackets: how many times our time that is. The "
        "limit is that of the bytes the rule itself reads and writes.",
        ["rule", OURS, "PyTorch", "twin and mode", "bandwidth", "of the memory limit"],
    )
    for name, rule in RULES.items():
        if not isinstance(rule, opt.ElementwiseRule):
            continue
        x, g = normal(plan.large), normal(plan.large)
        limit = Limit(4 * (2 + len(rule.slots)) * plan.large)
        try:
            twins = torch_twins(name, [x], [g])
        except ImportError:
            twins = {}
        steps: dict[str, Step | None] = {**twins, OURS: update_of(rule, x, g), **limit.steps}
        times = alternate(steps, plan.runs, plan.least)
        best = min(twins, key=times.__getitem__, default="")
        moved = 4 * (3 + 2 * len(rule.slots)) * plan.large / times[OURS]
        part = moved / limit.bandwidth(times)
        section.rows.append(
            [
                f"`{name}`",
                times_as(times[OURS]),
                beside(times, best),
                f"`{TWINS[name][0]}`, {best}" if best else "–",
                rate(moved),
                share(part),
            ]
        )
        if name in TWINS:
            twin = f"times as fast as PyTorch's {TWINS[name][0]}"
            section.goals.append(
                Goal(f"`{name}`", twin, ratio(times, best), 1.0, None, factor)
            )
        section.goals.append(Goal(f"`{name}`", "of the memory limit", part, None, 0.95, share))
    return section


def precision(plan: Plan) -> Section:
    section = Section(
        f"`MixedPrecision(Adam())`, one array of {counted(plan.large)}",
        "Parameters and gradients of two bytes, a master copy and momenta of four.",
        ["parameters", OURS, "bandwidth", "of the memory limit"],
    )
    dtypes = ["float16"]
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401 (makes the dtype known to NumPy)

        dtypes.append("bfloat16")
    for dtype in dtypes:
        x, g = normal(plan.large, dtype=dtype), normal(plan.large, dtype=dtype)
        limit = Limit(16 * plan.large)
        step = update_of(opt.MixedPrecision(opt.Adam()), x, g)
        times = alternate({OURS: step, **limit.steps}, plan.runs, plan.least)
        moved = 28 * plan.large / times[OURS]
        part = moved / limit.bandwidth(times)
        section.rows.append([dtype, times_as(times[OURS]), rate(moved), share(part)])
        work = f"`MixedPrecision(Adam())`, {dtype}"
        section.goals.append(Goal(work, "of the memory limit", part, None, 0.95, share))
    return section


def pure(plan: Plan) -> Section:
    x, g = normal(plan.large), normal(plan.large)
    model = x.copy()
    held = [opt.setup(opt.Adam(), model), model]

    def step() -> None:
        held[:] = opt.update(*held, g)

    fresh = "optax, jitted, not donated"
    times = alternate(
        {
            "update": step,
            "update_": update_of(opt.Adam(), x, g),
            fresh: if_installed(optax_step, [x], [g], donate=False),
            OPTAX: if_installed(optax_step, [x], [g]),
        },
        plan.runs,
        plan.least,
    )
    work = f"pure `update`, {counted(plan.large)}"
    slower = times["update"] / times["update_"]
    return Section(
        f"The pure `update` of Adam, one array of {counted(plan.large)}",
        "",
        ["`update`", "`update_`", fresh, OPTAX],
        [[times_as(times[name]) if name in times else "–" for name in ("update", "update_", fresh, OPTAX)]],
        [
            Goal(work, "times the time of `update_`", slower, 4, 2, factor, less=True),
            Goal(work, f"times as fast as {fresh}", ratio(times, fresh, "update"), 1.0, None, factor),
        ],
    )


def threads(plan: Plan) -> Section:
    count = opt.get_num_threads()
    section = Section(
        f"{count} threads against one, Adam",
        "",
        ["work", "1 thread", f"{count} threads", "gain", "of the memory limit"],
    )
    for size, floor in ((plan.medium, None), (plan.large, 0.85)):
        x, g = normal(size), normal(size)
        limit = Limit(16 * size)
        step = update_of(opt.Adam(), x, g)

        def on(n: int, step: Step = step) -> None:
            opt.set_num_threads(n)
            step()

        steps: dict[str, Step | None] = {"one": partial(on, 1), "all": partial(on, count)}
        times = alternate(steps | limit.steps, plan.runs, plan.least)
        opt.set_num_threads(0)
        gain = times["one"] / times["all"]
        part = 28 * size / times["all"] / limit.bandwidth(times)
        work = f"one array of {counted(size)}"
        section.rows.append(
            [work, times_as(times["one"]), times_as(times["all"]), factor(gain), share(part)]
        )
        if floor is None:
            goal = Goal(work, f"{count} threads against one", gain, 1.2, 1.5, factor)
        else:  # one thread may be near the limit, so that more of them have nothing to gain
            at_limit = gain < 1.3 and part >= floor
            must = None if at_limit else 1.3
            goal = Goal(work, f"{count} threads against one", gain, must, 1.5, factor)
            if at_limit:
                reached = "of the memory limit (or 1.3× one thread)"
                section.goals.append(Goal(work, reached, part, floor, None, share))
        section.goals.append(goal)
    return section


def footprint(plan: Plan) -> Section:
    seconds, big = import_time(plan.imports)
    flat, rebuild = opt.destructure(many_arrays(plan.arrays))
    rebuilt = alternate({OURS: partial(rebuild, flat)}, plan.runs, plan.least)[OURS]
    growth = memory_growth(plan.large)
    work = f"`re(flat)`, {plan.arrays:,} arrays"
    memory = f"peak memory during `update_`, {counted(plan.large)}"
    return Section(
        "The rest",
        "",
        ["what", "measured"],
        [
            ["`import optimisers`, beyond NumPy", times_as(seconds)],
            ["of JAX, Numba, PyTorch, SciPy it imports", ", ".join(sorted(big)) or "none"],
            [work, times_as(rebuilt)],
            [f"{memory}: growth", "–" if growth is None else megabytes(growth)],
        ],
        [
            Goal("`import optimisers`", "beyond NumPy", seconds, 0.15, 0.05, times_as, less=True),
            Goal(
                "`import optimisers`",
                "imports of JAX, Numba, PyTorch, SciPy",
                len(big),
                0,
                None,
                str,
                less=True,
            ),
            Goal(work, "time", rebuilt, 1e-3, 0.5e-3, times_as, less=True),
            Goal(memory, "growth", growth, 0.1 * 4 * plan.large, 1e6, megabytes, less=True),
        ],
    )


# --- the report ------------------------------------------------------------------------------


def machine() -> list[list[str]]:
    """Return what the figures hold for."""
    flags = next(
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXACT"
    )
    names = ("numpy", "torch", "jax", "jaxlib", "optax")
    versions = [f"{name} {version}" for name in names if (version := installed(name))]
    return [
        ["processor", processor()],
        ["cores, threads", f"{os.cpu_count()}, {opt.get_num_threads()}"],
        ["system", f"{platform.system()} {platform.machine()}"],
        ["kernels", f"{_engine.isa}, compiled with `{' '.join(flags)}`"],
        ["versions", ", ".join([f"Python {platform.python_version()}", *versions])],
    ]


def processor() -> str:
    """Return the model of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def report(plan: Plan, sections: Sequence[Section], picture: str | None) -> str:
    goals = [goal for section in sections for goal in section.goals]
    parts = [
        "# How fast it is\n",
        "`make bench` measured and wrote this page. All contenders take turns in one process, run "
        f"by run; times are medians of {plan.runs} runs after warm-up, each long enough to "
        "time well. Whether a goal is met is computed.\n",
        table(["", ""], machine()),
        f"![Time of a step of Adam against the number of parameters]({picture})\n" * bool(picture),
        f"## Goals\n\n{summary(goals)}\n",
        table(["work", "measured", "got", "must", "aim"], (goal.cells() for goal in goals)),
    ]
    for section in sections:
        text = f"\n\n{section.text}" if section.text else ""
        parts.append(f"## {section.title}{text}\n\n{table(section.head, section.rows)}")
    return "\n".join(part for part in parts if part)


def summary(goals: Sequence[Goal]) -> str:
    """Say how many goals are met and which musts are not."""
    lines = []
    for name, verdicts in (
        ("must", [(goal, goal.meets(goal.must)) for goal in goals]),
        ("aim", [(goal, goal.meets(goal.aim)) for goal in goals]),
    ):
        known = [met for _, met in verdicts if met is not None]
        lines.append(f"Of {len(known)} figures with a *{name}*, {sum(known)} meet it.")
        missed = [f"{goal.work} ({goal.measure})" for goal, met in verdicts if met is False]
        if name == "must" and missed:
            lines.append(f"Missed: {'; '.join(missed)}.")
    return " ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and few runs: figures mean nothing"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="folder for benchmarks.md and .png"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL

    def say(what: str) -> None:
        print(f"measuring: {what}", file=sys.stderr, flush=True)

    say("Adam")
    adam = Adam(plan)
    sections = [adam.run(), limit_section(adam)]
    for section in (chains, rules, precision, pure, threads, footprint):
        say(section.__name__)
        sections.append(section(plan))
    picture = None
    if not options.no_write:
        from picture import draw

        options.out.mkdir(parents=True, exist_ok=True)
        picture = "benchmarks.png"
        draw(adam.sweep, adam.bandwidth, options.out / picture)
    text = report(plan, sections, picture)
    print(text)
    if not options.no_write:
        (options.out / "benchmarks.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
