"""Spectral lines with SciPy
=========================

Fit a spectrum with SciPy: a model with names, and the flat vector that SciPy wants.

::

    python examples/spectrum.py

A measured spectrum is a few lines on a sloping background. The model is a tree that says what each
number means: lines with a place, a width and a height, and two numbers for the background.
`scipy.optimize.minimize` knows nothing of trees, it wants one vector; `destructure` goes there and
back. `optimisers.scipy.method` makes a method for SciPy out of a rule of this library, with SciPy's
own options, bounds and result, so that it stands beside L-BFGS-B.
"""

from __future__ import annotations

import argparse
from typing import Any

import matplotlib
import numpy as np
from scipy.optimize import Bounds, OptimizeResult, minimize

import optimisers
from optimisers import Adam, destructure

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot

Array = np.ndarray
Model = dict[str, Any]

# %%
# The model
# ---------


def line(place: float, width: float, height: float) -> dict[str, Array]:
    numbers = {"place": place, "width": width, "height": height}
    return {name: np.array(number, float) for name, number in numbers.items()}


def profile(x: Array, line: dict[str, Array]) -> Array:
    """Return what a line adds to the spectrum at `x`: a Lorentzian."""
    return line["height"] / (1 + ((x - line["place"]) / line["width"]) ** 2)


def spectrum(model: Model, x: Array) -> Array:
    level, slope = model["background"]
    return level + slope * x + sum(profile(x, one) for one in model["lines"])


def misfit_and_gradient(model: Model, x: Array, y: Array) -> tuple[float, Model]:
    """Return half the mean square of what the model leaves over, and its gradient by hand."""
    residual = (spectrum(model, x) - y) / len(x)
    gradient: Model = {"lines": [], "background": np.array([residual.sum(), residual @ x])}
    for one in model["lines"]:
        u = (x - one["place"]) / one["width"]
        shape = 1 / (1 + u**2)
        bent = 2 * one["height"] / one["width"] * u * shape**2
        gradient["lines"].append(
            {"place": residual @ bent, "width": residual @ (bent * u), "height": residual @ shape}
        )
    return 0.5 * float(residual @ residual) * len(x), gradient


# %%
# A measurement, and a guess
# --------------------------

TRUTH: Model = {
    "lines": [line(2.1, 0.25, 3.0), line(3.0, 0.4, 1.6), line(6.4, 0.15, 2.2), line(7.9, 0.7, 1.2)],
    "background": np.array([0.8, 0.06]),
}


def measure(n: int, seed: int = 0) -> tuple[Array, Array]:
    x = np.linspace(0, 10, n)
    return x, spectrum(TRUTH, x) + np.random.default_rng(seed).normal(scale=0.08, size=n)


def guess() -> Model:
    """Return what one reads off the measurement by eye."""
    places = (1.8, 3.4, 6.2, 8.4)
    return {"lines": [line(p, 0.5, 1.0) for p in places], "background": np.array([1.0, 0.0])}


def limits(re: Any) -> Bounds:
    """Return bounds of the vector, from two models that hold the bounds of each number."""
    free = np.array([-np.inf, -np.inf])
    low = {"lines": [line(0, 0.05, 0) for _ in guess()["lines"]], "background": free}
    high = {"lines": [line(10, 2, np.inf) for _ in guess()["lines"]], "background": -free}
    return Bounds(re.flatten(low), re.flatten(high))


# %%
# The fit
# -------


def fit(x: Array, y: Array, method: Any, **options: Any) -> tuple[OptimizeResult, Model]:
    """Fit the model by a method of SciPy; return SciPy's result, and the model."""
    flat, re = destructure(guess())

    def fun(v: Array) -> tuple[float, Array]:
        misfit, gradient = misfit_and_gradient(re(v), x, y)
        return misfit, re.flatten_gradient(gradient)

    result = minimize(fun, flat, jac=True, method=method, bounds=limits(re), options=options)
    return result, re(result.x)


# %%
# The picture
# -----------


def draw(x: Array, y: Array, model: Model, out: str) -> None:
    """Draw the measurement, the fit and its lines, and below what is left over."""
    red = "#c0392b"
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 5.2), layout="constrained", sharex=True, height_ratios=(4, 1)
    )
    above.plot(x, y, ".", color="0.55", markersize=3)
    above.plot(x, spectrum(guess(), x), color="0.4", linewidth=1, linestyle=(0, (4, 3)))
    above.plot(x, spectrum(model, x), color=red, linewidth=1.6)
    level, slope = model["background"]
    for one in model["lines"]:
        above.fill_between(
            x,
            level + slope * x,
            level + slope * x + profile(x, one),
            color=red,
            alpha=0.15,
            linewidth=0,
        )
        top = float(spectrum(model, one["place"]))
        above.annotate(
            f"{one['place']:.2f}\nwidth {one['width']:.2f}",
            (float(one["place"]), top),
            (0, 10),
            textcoords="offset points",
            ha="center",
            color=red,
        )
    above.text(9.95, spectrum(guess(), x)[-1] - 0.22, "first guess", ha="right", color="0.4")
    above.set(ylabel="intensity", ylim=(0, 1.17 * y.max()))
    above.set_title("Four lines, where they are and how wide", loc="left")
    below.axhline(0, color=red, linewidth=1)
    below.plot(x, y - spectrum(model, x), ".", color="0.55", markersize=3)
    below.set(xlabel="wavelength", ylabel="left over", xlim=(0, 10))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer points and steps")
    parser.add_argument("--out", default="spectrum.png", help="where the picture goes")
    options = parser.parse_args()
    points, steps = (150, 300) if options.quick else (500, 5000)

    x, y = measure(points)
    adam = optimisers.scipy.method(Adam(0.03))
    print(f"{'':10} {'misfit':>10} {'calls':>6}  how it ended")
    for name, method in (("Adam", adam), ("L-BFGS-B", "L-BFGS-B")):
        result, found = fit(x, y, method, maxiter=steps, gtol=1e-6)
        print(f"{name:10} {result.fun:10.6f} {result.nfev:6d}  {result.message}")
        if method is adam:
            model = found
    draw(x, y, model, options.out)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
