"""A race of all rules
===================

Race all rules of the library over two famous landscapes.

::

    python examples/race.py

Rosenbrock's valley is bent and narrow, with the finish far along its floor. Himmelblau's land has
four finishes, and which one a rule comes to is up to its manners. Every rule takes steps of its own
size, so each may choose its learning rate: it tries a dozen, and runs with the one that gets it
there first.

No rule is named in this file. Who takes part is found in the library: add one there, and it races.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from tqdm import tqdm

import optimisers
from optimisers import ElementwiseRule, Rule, setup, update_

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot

Array = np.ndarray

# %%
# The landscapes
# --------------


class Landscape(NamedTuple):
    name: str
    height: Callable[[Any, Any], Any]
    slope: Callable[[Array], Array]
    start: tuple[float, float]
    finishes: list[tuple[float, float]]
    window: tuple[float, float, float, float]


def rosenbrock_slope(p: Array) -> Array:
    x, y = p
    return np.array([2 * (x - 1) - 400 * x * (y - x * x), 200 * (y - x * x)])


def himmelblau_slope(p: Array) -> Array:
    x, y = p
    a, b = x * x + y - 11, x + y * y - 7
    return np.array([4 * a * x + 2 * b, 2 * a + 4 * b * y])


LANDSCAPES = [
    Landscape(
        "Rosenbrock",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
        rosenbrock_slope,
        (-1.2, 1.0),
        [(1.0, 1.0)],
        (-1.7, 1.7, -0.7, 2.1),
    ),
    Landscape(
        "Himmelblau",
        lambda x, y: (x * x + y - 11) ** 2 + (x + y * y - 7) ** 2,
        himmelblau_slope,
        (-0.6, -1.4),
        [(3.0, 2.0), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)],
        (-5.5, 5.5, -5.0, 5.0),
    ),
]

# %%
# The runners
# -----------


def runners() -> Iterator[type[Rule]]:
    """Yield the public rules that make steps of their own; others only prepare the gradient."""
    for cls in vars(optimisers).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, ElementwiseRule)
            and cls is not ElementwiseRule
        ):
            if any("value" in asked for asked in cls.asks.values()):
                continue  # it needs the value of the loss
            rule = cls()
            x, gradient = np.zeros(1), np.ones(1)
            if rule.apply(rule.init(x), x, gradient)[1] != gradient:
                yield cls


def rates(cls: type[Rule], count: int) -> Iterator[Rule]:
    """Yield the rule with many learning rates; once, if it has none."""
    if "eta" not in (field.name for field in dataclasses.fields(cls)):  # type: ignore[arg-type]
        yield cls()
        return
    for exponent in np.linspace(-4, 0.5, count):
        yield cls(eta=float(f"{10**exponent:.2g}"))  # type: ignore[call-arg]


class Run(NamedTuple):
    rule: Rule
    path: Array
    arrived: bool
    """Whether the last point is at a finish."""


def run(rule: Rule, land: Landscape, steps: int, near: float = 0.05, stay: int = 30) -> Run:
    """Follow a rule until it has come near a finish to stay, or has left the picture.

    To stay, since a rule that jumps about at random comes past every place at some time.
    """
    p = np.array(land.start)
    state = setup(rule, p)
    finishes = np.array(land.finishes)
    left, right, bottom, top = land.window
    path = [p.copy()]
    stayed = 0
    for _ in range(steps + stay):
        update_(state, p, land.slope(p))
        path.append(p.copy())
        if not (left < p[0] < right and bottom < p[1] < top):
            break
        stayed = stayed + 1 if ((finishes - p) ** 2).sum(axis=1).min() < near**2 else 0
        if stayed == stay:
            return Run(rule, np.array(path[: 1 - stay]), True)
    return Run(rule, np.array(path), False)


def best(cls: type[Rule], land: Landscape, steps: int, count: int) -> Run:
    """Return the quickest run of a rule; if none arrives, the one that ends lowest."""

    def merit(run: Run) -> tuple[bool, float]:
        return not run.arrived, len(run.path) if run.arrived else land.height(*run.path[-1])

    return min((run(rule, land, steps) for rule in rates(cls, count)), key=merit)


# %%
# The picture
# -----------


def draw(races: dict[str, list[Run]], out: str) -> None:
    """Draw a small map for each run, the quickest first, a block of maps for each landscape."""
    columns = 8
    rows = math.ceil(max(map(len, races.values())) / columns)
    figure = pyplot.figure(figsize=(15, 2.15 * rows * len(races)), layout="constrained")
    blocks = figure.subfigures(len(races), 1)
    for block, land in zip(np.atleast_1d(blocks), LANDSCAPES, strict=True):
        block.suptitle(f"{land.name}: steps to arrive", x=0.01, ha="left", fontsize=14)
        left, right, bottom, top = land.window
        x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
        heights = np.log1p(land.height(x, y))
        for axes in (panels := block.subplots(rows, columns, squeeze=False).ravel()):
            axes.set_axis_off()
        for axes, (rule, path, arrived) in zip(panels, races[land.name], strict=False):
            axes.contourf(x, y, heights, levels=14, cmap="Blues_r", alpha=0.75)
            axes.plot(*path.T, color="#c0392b", linewidth=1.1)
            axes.plot(*path[0], "o", color="black", markersize=3)
            axes.plot(*np.transpose(land.finishes), "*", color="white", markersize=7)
            axes.set(xlim=(left, right), ylim=(bottom, top))
            name = type(rule).__name__.removeprefix("_")
            rate = f"eta {rule.eta:g}" if hasattr(rule, "eta") else "no eta to choose"
            count = f"{len(path) - 1:,}" if arrived else "lost"
            axes.set_title(f"{name}  {count}", loc="left", fontsize=10, pad=3)
            axes.text(
                0.98,
                0.03,
                rate,
                transform=axes.transAxes,
                ha="right",
                fontsize=7,
                color="black",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 1},
            )
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter races, fewer learning rates")
    parser.add_argument("--out", default="race.png", help="where the picture goes")
    options = parser.parse_args()
    steps, count = (300, 4) if options.quick else (6000, 19)

    classes = list(runners())
    races: dict[str, list[Run]] = {}
    with tqdm(total=len(classes) * len(LANDSCAPES), unit="run", leave=False, disable=None) as bar:
        for land in LANDSCAPES:
            runs = []
            for cls in classes:
                bar.set_postfix_str(f"{cls.__name__} on {land.name}")
                runs.append(best(cls, land, steps, count))
                bar.update()
            races[land.name] = sorted(runs, key=lambda r: (not r.arrived, len(r.path)))

    for name, runs in races.items():
        print(f"\n{name}: steps to arrive")
        for r in runs:
            print(f"{len(r.path) - 1:8,d}  {r.rule}" if r.arrived else f"    lost  {r.rule}")
    draw(races, options.out)
    print(f"\nPicture: {options.out}")


if __name__ == "__main__":
    main()
