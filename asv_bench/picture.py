"""The picture: time of one step of Adam against the number of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from report import counted, duration

Array = np.ndarray

INK, FAINT, GRID = "#26262e", "#83838f", "#e9e9ee"
OURS = "#0a5ab8"
PEERS = ("#c4472b", "#e0987f", "#3d8c66", "#8a76b8")


def draw(took: Mapping[int, Mapping[str, float]], bandwidth: float, path: Path, ours: str) -> None:
    """Write the picture to `path`.

    Parameters
    ----------
    took : mapping
        For each number of parameters, in rising order, the seconds that each contender took.
    bandwidth : float
        What memory gives, in bytes per second; a step of Adam moves 28 bytes per parameter.
    path : Path
        The file to write.
    ours : str
        The contender that stands out.
    """
    sizes = np.array(list(took))
    names = list(took[sizes[0]])
    lines = {name: np.array([took[n][name] for n in sizes]) for name in names}
    peers = [name for name in names if name != ours]
    colours = {**dict(zip(peers, PEERS, strict=False)), ours: OURS}

    figure, axes = plt.subplots(figsize=(8.4, 5.2))
    figure.subplots_adjust(left=0.255, right=0.925, top=0.915, bottom=0.11)
    _frame(axes, sizes, lines)
    for name, seconds in lines.items():
        width, dot, order = (2.6, 5, 4) if name == ours else (1.5, 3.2, 3)
        axes.plot(
            sizes, seconds, "o-", lw=width, ms=dot, color=colours[name], zorder=order, clip_on=False
        )
    _limit(axes, sizes, bandwidth)
    _names(axes, lines, colours, ours)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)


def _frame(axes: Any, sizes: Array, lines: Mapping[str, Array]) -> None:
    every = np.concatenate(list(lines.values()))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(every.min() / 2, every.max() * 1.5)
    decades = 10.0 ** np.arange(np.ceil(np.log10(sizes[0])), np.log10(sizes[-1]) + 0.01)
    axes.xaxis.set_major_locator(FixedLocator(list(decades)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: counted(round(n))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda s, _: duration(s, 1)))
    axes.yaxis.tick_right()  # the names stand on the left, where the lines are apart
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=FAINT, labelsize=9, pad=7)
    axes.set_xlabel("float32 parameters, in one array", color=FAINT, fontsize=9.5, labelpad=8)
    axes.figure.text(
        0.018, 0.945, "One step of Adam, in place", color=INK, fontsize=13, weight="bold"
    )


def _limit(axes: Any, sizes: Array, bandwidth: float) -> None:
    """Draw the least time that memory allows, and write along the line what it is."""
    low, _ = axes.get_ylim()
    least = 28 * sizes / bandwidth
    axes.plot(sizes, least, "--", color=INK, lw=1, dashes=(5, 4), zorder=2)
    y = 5 * low
    axes.annotate(
        f"memory limit at {counted(int(sizes[-1]))}: 28 bytes for each\n"
        f"parameter, at {bandwidth / 1e9:.0f} GB/s; caches allow more",
        (max(y * bandwidth / 28, sizes[0]), y),
        (12, 0),
        textcoords="offset points",
        va="top",
        color=INK,
        fontsize=9,
        linespacing=1.4,
    )


def _names(axes: Any, lines: Mapping[str, Array], colours: Mapping[str, str], ours: str) -> None:
    """Write the names left of their lines, with room between them."""
    names = sorted(lines, key=lambda name: lines[name][0])
    to_axes = axes.transScale + axes.transLimits
    at = [to_axes.transform((1, lines[name][0]))[1] for name in names]
    for name, y, label in zip(names, at, _apart(at, 0.052), strict=True):
        axes.annotate(
            "",
            (0, y),
            (-0.035, label),
            xycoords="axes fraction",
            arrowprops={
                "arrowstyle": "-",
                "color": colours[name],
                "lw": 0.8,
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )
        axes.text(
            -0.042,
            label,
            f"{name}  {duration(lines[name][0], 2)}",
            transform=axes.transAxes,
            ha="right",
            va="center",
            color=colours[name],
            fontsize=10 if name == ours else 9,
            weight="bold" if name == ours else "normal",
        )


def _apart(at: Sequence[float], least: float) -> list[float]:
    """Return rising heights near those given, at least so far apart."""
    groups: list[list[float]] = []
    for y in at:
        groups.append([y])
        while (
            len(groups) > 1
            and _spread(groups[-2], least)[-1] + least > _spread(groups[-1], least)[0]
        ):
            last = groups.pop()
            groups[-1] += last
    return [y for group in groups for y in _spread(group, least)]


def _spread(group: Sequence[float], least: float) -> list[float]:
    """Return heights around the middle of a group, evenly apart."""
    middle, half = sum(group) / len(group), (len(group) - 1) / 2
    return [middle + least * (k - half) for k in range(len(group))]
