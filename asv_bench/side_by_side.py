"""Time optimisers beside NumPy, PyTorch and optax, in turn, in one process.

    python asv_bench/side_by_side.py

prints the page docs/benchmarks/benchmarks.md, and writes it there, with a picture. Whether a goal
is met is computed from what was measured. A peer that is not installed leaves a dash.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.files import Run
from benchmarks.measure import Limit, Times, alternate, import_time, memory_growth
from benchmarks.models import RULES, gradient_of, many_arrays, mlp, normal, resnet18
from benchmarks.peers import TWINS, Step, numpy_adam, optax_step, torch_step, torch_twins
from report import Goal, Section, counted, duration, megabytes, page, per_second, percent, times

import optimisers as opt
from optimisers._engine import cpu
from optimisers._info import installed

ROOT = Path(__file__).parent.parent

OURS = "optimisers"
NUMPY = "NumPy, in place"
FUSED = "PyTorch, fused"
DEFAULT = "PyTorch, default"
OPTAX = "optax, jitted, donated"
FRESH = "optax, jitted, not donated"

PEERS = (NUMPY, FUSED, DEFAULT, OPTAX)
IN_BRACKETS = "In brackets: how many times our time that is."

Tree = Any
Steps = dict[str, Step | None]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    runs: int = 31
    least: float = 0.002
    large: int = 10_000_000
    huge: int = 75_000_000
    medium: int = 100_000
    sizes: tuple[int, ...] = (*(k * 10**e for e in range(1, 7) for k in (1, 3)), 10_000_000)
    arrays: int = 1_000
    leaves: tuple[int, ...] = (1_000, 20_000)
    hidden: int = 128
    width: int = 64

    def alternate(self, steps: Steps) -> Times:
        return alternate(steps, self.runs, self.least)


QUICK = Plan(2, 0, 20_000, 30_000, 3_000, (10, 1_000, 3_000, 20_000), 20, (3, 7), 8, 2)

# --- contenders and ratios -------------------------------------------------------------------


def if_installed(make: Callable[..., Step], *args: Any, **options: Any) -> Step | None:
    with contextlib.suppress(ImportError):
        return make(*args, **options)
    return None


def update_of(rule: opt.Rule, model: Tree, grad: Tree) -> Step:
    return partial(opt.update_, opt.setup(rule, model), model, grad)


def contenders(model: Tree) -> Steps:
    """Return Adam for a model, by everyone."""
    grad = gradient_of(model)
    xs, gs = opt.trainables(model), opt.trainables(grad)
    return {
        FUSED: if_installed(torch_step, "Adam", xs, gs, fused=True),
        DEFAULT: if_installed(torch_step, "Adam", xs, gs),
        OPTAX: if_installed(optax_step, xs, gs),
        NUMPY: numpy_adam(xs, gs),
        OURS: update_of(opt.Adam(), model, grad),
    }


def faster_than(peer: str, took: Times, ours: str = OURS) -> float | None:
    """Return how many times our time a peer takes."""
    return took.ratio(peer, ours) if peer in took else None


def beside(peer: str, took: Times, ours: str = OURS) -> str:
    """Return a peer's time as text, and how many times ours it is."""
    ratio = faster_than(peer, took, ours)
    return "–" if ratio is None else f"{duration(took[peer])} ({times(ratio)})"


def faster_goal(
    work: str, peer: str, took: Times, must: float | None, aim: float | None, ours: str = OURS
) -> Goal:
    return Goal(work, f"times as fast as {peer}", faster_than(peer, took, ours), must, aim)


def limit_goal(work: str, share: float, must: float | None = None) -> Goal:
    return Goal(work, "of the memory limit", share, must, 0.95, percent)


# --- sections --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """What Adam took over one array of each size, and the memory limit at the largest."""

    took: Mapping[int, Times]
    limit: Limit
    bandwidth: float


def sweep(plan: Plan) -> Sweep:
    """Measure Adam over one array of each size; at the largest, beside the limit of memory."""
    took = {size: plan.alternate(contenders(normal(size))) for size in plan.sizes[:-1]}
    limit = Limit(16 * plan.large)
    took[plan.large] = plan.alternate(contenders(normal(plan.large)) | limit.steps | limit.copy)
    return Sweep(took, limit, limit.bandwidth(took[plan.large]))


def adam(plan: Plan, arrays: Sweep) -> Section:
    """Put Adam over single arrays and over models beside its peers."""
    section = Section("Adam, float32, in place", f"One step. {IN_BRACKETS}", ["work", OURS, *PEERS])

    def row(work: str, took: Times, ours: str = OURS) -> None:
        peers = (beside(peer, took, ours) for peer in PEERS)
        section.rows.append([work, duration(took[ours]), *peers])

    limits: dict[int, tuple[float, float | None]] = {
        10: (10, 30),
        1_000: (10, 20),
        plan.medium: (1.3, 2),
        plan.large: (1.0, None),
    }
    for size, (must, aim) in limits.items():
        work, took = f"one array of {counted(size)}", arrays.took[size]
        row(work, took)
        section.goals.append(faster_goal(work, FUSED, took, must, aim))
        if size == 10:
            section.goals.append(Goal(work, "time", took[OURS], None, 2e-6, duration, less=True))
    section.goals.append(limit_goal(work, arrays.limit.share(took, OURS, 28 * size)))

    many, work = many_arrays(plan.arrays), f"{plan.arrays:,} arrays of 64"
    as_dict, as_vector = f"{work}, a dict", f"{work}, one flat vector"
    grad = gradient_of(many)
    flat, rebuild = opt.destructure(many)
    flat_grad = rebuild.flatten_gradient(grad)
    update_flat = update_of(opt.Adam(), flat, flat_grad)

    def gather_and_update() -> None:
        rebuild.flatten_gradient(grad, out=flat_grad)
        update_flat()

    took = plan.alternate(contenders(many) | {"flat": update_flat, "gathered": gather_and_update})
    row(as_dict, took)
    row(as_vector, took, "flat")
    row(f"{as_vector}, `flatten_gradient` included", took, "gathered")
    section.goals += [
        faster_goal(as_dict, FUSED, took, 6, 10),
        faster_goal(as_dict, OPTAX, took, 30, 50),
        faster_goal(as_vector, FUSED, took, 60, 100, "flat"),
    ]

    row(f"MLP 784-{plan.hidden}-10, 4 arrays", plan.alternate(contenders(mlp(hidden=plan.hidden))))
    resnet, work = resnet18(plan.width), f"ResNet-18 shapes, width {plan.width}, 62 arrays"
    size = sum(x.size for x in opt.trainables(resnet))
    limit = Limit(16 * size)
    took = plan.alternate(contenders(resnet) | limit.steps)
    row(work, took)
    share = limit.share(took, OURS, 28 * size)
    section.goals += [faster_goal(work, FUSED, took, 1.0, None), limit_goal(work, share)]
    return section


def memory_limit(plan: Plan, arrays: Sweep) -> Section:
    took, limit = arrays.took[plan.large], arrays.limit
    ours = per_second(28 * plan.large / took[OURS])
    return Section(
        "The memory limit",
        f"Over as much memory as Adam uses for {counted(plan.large)} parameters, in turn with it: "
        "caches hold more of less. The limit is the faster `x += a g`.",
        ["what", "bandwidth"],
        [
            *([name, per_second(rate)] for name, rate in limit.rates(took).items()),
            [f"`update_` of Adam over one array of {counted(plan.large)}", ours],
        ],
    )


def chains(plan: Plan) -> Section:
    x, g = normal(plan.large), normal(plan.large)
    decay, plain = opt.WeightDecay(5e-4), opt.Adam()
    by_norm = "`ClipNorm → WeightDecay → Adam`"
    by_value = "`ClipGrad → WeightDecay → Adam`"
    by_torch = "PyTorch, `clip_grad_norm_`, then fused"

    # Both in the same memory: where arrays happen to lie can make twice the time.
    y = x.copy()
    alone = opt.setup(plain, y)
    chained = opt.setup(opt.OptimiserChain(opt.ClipGrad(1.0), decay, plain), y)
    chained.state = (*chained.state[:-1], alone.state)

    def optax_chain(optax: Any) -> Any:
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.add_decayed_weights(5e-4), optax.adam(1e-3)
        )

    took = plan.alternate(
        {
            by_torch: if_installed(
                torch_step, "Adam", [x], [g], clip_norm=1.0, fused=True, weight_decay=5e-4
            ),
            OPTAX: if_installed(optax_step, [x], [g], optax_chain),
            by_norm: update_of(opt.OptimiserChain(opt.ClipNorm(1.0), decay, plain), x.copy(), g),
            by_value: partial(opt.update_, chained, y, g),
            "`Adam`": partial(opt.update_, alone, y, g),
        }
    )
    more = took.ratio(by_value, "`Adam`") - 1
    peers = (beside(peer, took, by_norm) for peer in (by_torch, OPTAX))
    return Section(
        f"Chains, one array of {counted(plan.large)}",
        IN_BRACKETS,
        ["chain", OURS, by_torch, OPTAX],
        [
            [by_norm, duration(took[by_norm]), *peers],
            *([rule, duration(took[rule]), "", ""] for rule in (by_value, "`Adam`")),
        ],
        [
            faster_goal(by_norm, by_torch, took, 1.3, 1.6, by_norm),
            Goal(by_value, "beyond plain Adam", more, 0.1, 0.05, percent, less=True),
        ],
    )


def measuring(plan: Plan) -> Section:
    """Put rules that measure beside the limit of the bytes that they read and write."""
    by_torch = "PyTorch, `clip_grad_norm_`, then fused"
    section = Section(
        f"Rules that measure, one array of {counted(plan.large)}",
        f"{IN_BRACKETS} What a measure mentions is read once more.",
        ["rule", OURS, by_torch, OPTAX, "bandwidth", "of the memory limit"],
    )
    clipped = "`ClipGlobalNorm → Adam`"
    works: dict[str, tuple[opt.Rule, int, Callable[[Any], Any]]] = {
        clipped: (
            opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Adam()),
            32,
            lambda optax: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        ),
        "`LAMB`": (opt.LAMB(), 44, lambda optax: optax.lamb(1e-3)),
    }
    for name, (rule, nbytes, in_optax) in works.items():
        x, g = normal(plan.large), normal(plan.large)
        limit = Limit(16 * plan.large)
        peers = {OPTAX: if_installed(optax_step, [x], [g], in_optax)}
        if name == clipped:
            peers[by_torch] = if_installed(torch_step, "Adam", [x], [g], clip_norm=1.0, fused=True)
        took = plan.alternate({OURS: update_of(rule, x.copy(), g), **peers, **limit.steps})
        share = limit.share(took, OURS, nbytes * plan.large)
        section.rows.append(
            [
                name,
                duration(took[OURS]),
                beside(by_torch, took) if name == clipped else "–",
                beside(OPTAX, took),
                per_second(nbytes * plan.large / took[OURS]),
                percent(share),
            ]
        )
        section.goals.append(limit_goal(name, share, 0.9))
    return section


def rules(plan: Plan) -> Section:
    """Put every elementwise rule beside its twin in PyTorch, in all modes, and the limit."""
    section = Section(
        f"Every elementwise rule, one array of {counted(plan.large)}",
        f"PyTorch in its fastest mode. {IN_BRACKETS} The limit is that of the bytes which the rule "
        "itself reads and writes.",
        ["rule", OURS, "PyTorch", "its class and mode", "bandwidth", "of the memory limit"],
    )
    for name, rule in RULES.items():
        if not isinstance(rule, opt.ElementwiseRule) or rule.measure is not None:
            continue
        x, g = normal(plan.large), normal(plan.large)
        arrays = 2 + len(rule.slots)
        limit = Limit(4 * arrays * plan.large)
        twins: Mapping[str, Step] = {}
        with contextlib.suppress(ImportError):
            twins = torch_twins(name, [x], [g])
        took = plan.alternate({**twins, OURS: update_of(rule, x, g), **limit.steps})
        mode = min(twins, key=took.__getitem__, default="")
        nbytes = 4 * (2 * arrays - 1) * plan.large  # only the gradient is not written
        share = limit.share(took, OURS, nbytes)
        section.rows.append(
            [
                f"`{name}`",
                duration(took[OURS]),
                beside(mode, took),
                f"`{TWINS[name][0]}`, {mode}" if mode else "–",
                per_second(nbytes / took[OURS]),
                percent(share),
            ]
        )
        if name in TWINS:
            measure = f"times as fast as PyTorch's {TWINS[name][0]}"
            section.goals.append(Goal(f"`{name}`", measure, faster_than(mode, took), 1.0, None))
        section.goals.append(limit_goal(f"`{name}`", share))
    return section


def precision(plan: Plan) -> Section:
    section = Section(
        f"`MixedPrecision(Adam())`, one array of {counted(plan.large)}",
        "Parameters and gradients of two bytes; a master copy and momenta of four.",
        ["parameters", OURS, "bandwidth", "of the memory limit"],
    )
    rule, dtypes = opt.MixedPrecision(opt.Adam()), ["float16"]
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401 (makes the dtype known to NumPy)

        dtypes.append("bfloat16")
    for dtype in dtypes:
        x, g = normal(plan.large, dtype=dtype), normal(plan.large, dtype=dtype)
        limit = Limit(16 * plan.large)
        took = plan.alternate({OURS: update_of(rule, x, g), **limit.steps})
        nbytes = 28 * plan.large  # g, x: 2 each; the rest is read and written
        share = limit.share(took, OURS, nbytes)
        rate = per_second(nbytes / took[OURS])
        section.rows.append([dtype, duration(took[OURS]), rate, percent(share)])
        section.goals.append(limit_goal(f"`MixedPrecision(Adam())`, {dtype}", share))
    return section


def pure(plan: Plan) -> Section:
    x, g = normal(plan.large), normal(plan.large)
    model = x.copy()
    held = [opt.setup(opt.Adam(), model), model]

    def step() -> None:
        held[:] = opt.update(*held, g)

    took = plan.alternate(
        {
            "`update`": step,
            "`update_`": update_of(opt.Adam(), x, g),
            FRESH: if_installed(optax_step, [x], [g], donate=False),
            OPTAX: if_installed(optax_step, [x], [g]),
        }
    )
    names = ["`update`", "`update_`", FRESH, OPTAX]
    work = f"`update`, one array of {counted(plan.large)}"
    ratio = took.ratio("`update`", "`update_`")
    return Section(
        f"The pure `update` of Adam, one array of {counted(plan.large)}",
        "",
        names,
        [[duration(took[name]) if name in took else "–" for name in names]],
        [
            Goal(work, "times the time of `update_`", ratio, 4, 2, less=True),
            faster_goal(work, FRESH, took, 1.0, None, "`update`"),
        ],
    )


def finite(plan: Plan) -> Section:
    """Measure what it costs to look for NaN and infinity before anything is written."""
    section = Section(
        "Adam, told to refuse gradients that are not finite",
        "Each gradient is read once more: of the seven arrays that Adam moves, one.",
        ["work", "`on_nonfinite='ignore'`", "`'raise'`", "more"],
    )
    models = {f"one array of {counted(n)}": normal(n) for n in (1_000, plan.medium, plan.large)}
    models[f"{counted(plan.arrays)} arrays of 64"] = many_arrays(plan.arrays)
    for work, model in models.items():
        step = update_of(opt.Adam(), model, gradient_of(model))
        took = plan.alternate({w: partial(step, on_nonfinite=w) for w in ("ignore", "raise")})
        more = took.ratio("raise", "ignore") - 1
        section.rows.append([work, *map(duration, took.values()), percent(more)])
        section.goals.append(
            Goal(work, "beyond what it takes unwatched", more, 0.05, None, percent, less=True)
        )
    return section


def threads(plan: Plan) -> Section:
    every = opt.get_num_threads()
    against = f"{every} threads against one"
    section = Section(
        f"Adam, {against}",
        "",
        ["work", "1 thread", f"{every} threads", "gain", "of the memory limit"],
    )
    for size in (plan.medium, plan.large):
        x, g = normal(size), normal(size)
        update = update_of(opt.Adam(), x, g)

        def on(count: int, update: Step = update) -> None:
            opt.set_num_threads(count)
            update()

        limit = Limit(16 * size)
        took = plan.alternate({"one": partial(on, 1), "all": partial(on, every), **limit.steps})
        opt.set_num_threads(0)
        gain = took.ratio("one", "all")
        share = limit.share(took, "all", 28 * size)
        work = f"one array of {counted(size)}"
        section.rows.append(
            [work, duration(took["one"]), duration(took["all"]), times(gain), percent(share)]
        )
        must: float | None = 1.2
        if size == plan.large:  # there either will do: a gain, or the limit
            must = 1.3 if share < 0.85 else None
            section.goals.append(
                limit_goal(f"{work}, {every} threads", share, 0.85 if gain < 1.3 else None)
            )
        section.goals.append(Goal(work, against, gain, must, 1.5))
    return section


def files(plan: Plan) -> Section:
    """Put saving and loading, checksums included, beside the package of that format."""
    section = Section(
        "Saving and loading",
        "The package `safetensors` writes the same arrays by name, without checksums, and its file "
        "is forced to the disk as ours is. In brackets: how many times its time ours is. Adam "
        "keeps three arrays for each of the model; Descent keeps none, so that the package writes "
        "the model alone.",
        ["work", "save", "load", "load with `like`", "the package's save", "its load"],
    )
    runs = {}
    for count in plan.leaves:
        runs[f"a dict of {count:,} arrays of 64"] = Run(many_arrays(count))
        for rule in (opt.Descent(), opt.Adam()):
            work = f"{count:,} leaves of 64 and their state of {type(rule).__name__}"
            runs[work] = Run(many_arrays(count), rule)
    runs[f"one array of {counted(plan.huge)}"] = Run(normal(plan.huge))
    for work, run in runs.items():
        took = alternate(run.steps(), min(plan.runs, 7), 0)
        run.remove()

        def of_package(name: str, kind: str, took: Times = took) -> float | None:
            theirs = f"package's {kind}"
            return took.ratio(name, theirs) if theirs in took else None

        row = [work]
        for name, kind in (("save", "save"), ("load", "load"), ("load, like", "load")):
            ratio = of_package(name, kind)
            row.append(duration(took[name]) + ("" if ratio is None else f" ({times(ratio)})"))
            limit = 2 if work.startswith("one array") else 3
            measure = "times the safetensors package"
            goal = Goal(f"{name}, {work}", measure, ratio, limit, 1, times, less=True)
            section.goals.append(goal)
        for kind in ("save", "load"):
            theirs = f"package's {kind}"
            row.append(duration(took[theirs]) if theirs in took else "–")
        section.rows.append(row)
    return section


def footprint(plan: Plan) -> Section:
    seconds, big = import_time(plan.runs)
    flat, rebuild = opt.destructure(many_arrays(plan.arrays))
    rebuilt = plan.alternate({OURS: partial(rebuild, flat)})[OURS]
    growth = memory_growth(plan.large)
    imports = "`import optimisers`"
    views = f"`re(flat)`, {plan.arrays:,} arrays"
    memory = f"`update_`, one array of {counted(plan.large)}"
    return Section(
        "The rest",
        "",
        ["what", "measured"],
        [
            [f"{imports}, beyond NumPy, byte code cached", duration(seconds)],
            ["which of JAX, Numba, PyTorch, SciPy it imports", ", ".join(sorted(big)) or "none"],
            [views, duration(rebuilt)],
            [f"{memory}, growth of peak memory", "–" if growth is None else megabytes(growth)],
        ],
        [
            Goal(imports, "time beyond NumPy", seconds, 0.15, 0.05, duration, less=True),
            Goal(
                imports, "imports of JAX, Numba, PyTorch, SciPy", len(big), 0, None, str, less=True
            ),
            Goal(views, "time", rebuilt, 1e-3, 0.5e-3, duration, less=True),
            # a tenth of one of its arrays: less cannot grow with the model
            Goal(
                memory, "growth of peak memory", growth, 0.4 * plan.large, 1e6, megabytes, less=True
            ),
        ],
    )


# --- the machine -----------------------------------------------------------------------------


def machine() -> list[list[str]]:
    """Return what the figures hold for."""
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
    flags = next(
        ast.literal_eval(line.value)
        for line in setup
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "EXACT"
    )
    names = ("numpy", "torch", "jax", "jaxlib", "optax")
    versions = [f"{name} {version}" for name in names if (version := installed(name))]
    return [
        ["processor", processor()],
        ["cores, threads", f"{os.cpu_count()}, {opt.get_num_threads()}"],
        ["system", f"{platform.system()} {platform.machine()}"],
        ["kernels", f"{cpu.isa}, compiled with `{' '.join(flags)}`"],
        ["versions", ", ".join([f"Python {platform.python_version()}", *versions])],
    ]


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


# --- all of it -------------------------------------------------------------------------------


def say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny and few: only to try the program"
    )
    parser.add_argument("--no-write", action="store_true", help="print only, draw nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="FOLDER")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()

    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        say(f"on a busy machine (load {load:.1f}): the figures will not be worth much")
    say("Adam")
    arrays = sweep(plan)
    sections = [adam(plan, arrays), memory_limit(plan, arrays)]
    for section in (chains, measuring, rules, precision, pure, finite, threads, files, footprint):
        say(section.__name__)
        sections.append(section(plan))

    intro = (
        "`make bench` measures all this and writes this page. The contenders take turns in one "
        f"process, run by run; times are medians of {plan.runs} runs after warm-up. Ratios are "
        "medians over the rounds, within which a machine that is slow for a while is so for all. "
        "Whether a goal is met is computed."
    )
    if options.no_write:
        print(page(intro, machine(), sections, None))
        return
    from picture import draw

    options.out.mkdir(parents=True, exist_ok=True)
    draw(arrays.took, arrays.bandwidth, options.out / "benchmarks.png", OURS)
    text = page(intro, machine(), sections, "benchmarks.png")
    (options.out / "benchmarks.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
