"""Logistic regression
===================

Logistic regression from scratch: a model, a gradient by hand, and a loop of three lines.

::

    python examples/logistic.py

Two clouds of points in the plane; the model says for each place how probable it is that a point
there belongs to the second cloud. This is the smallest use of the library: NumPy is all it needs.
"""

from __future__ import annotations

import argparse
from typing import Any

import matplotlib
import numpy as np

from optimisers import Adam, setup, update_

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot

Array = np.ndarray
Model = dict[str, Any]


def make_data(n: int, seed: int = 0) -> tuple[Array, Array]:
    """Return `n` points, shape (n, 2), and for each whether it is of the second cloud: 0 or 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    middles = np.array([[-1.0, -0.4], [1.0, 0.6]])
    spread = np.array([[0.8, 0.5], [0.0, 0.6]])
    return middles[labels] + rng.standard_normal((n, 2)) @ spread, labels


# %%
# The model and its gradient
# --------------------------


def predict(model: Model, points: Array) -> Array:
    """Return how probable the second cloud is."""
    return 1 / (1 + np.exp(-(points @ model["weight"] + model["bias"])))


def loss_and_gradient(model: Model, points: Array, labels: Array) -> tuple[float, Model]:
    """Return the mean surprise, and its gradient in the shape of the model."""
    p = predict(model, points)
    loss = -np.mean(np.log(np.where(labels == 1, p, 1 - p)))
    error = (p - labels) / len(labels)  # the derivative by the score of each point
    return float(loss), {"weight": points.T @ error, "bias": error.sum()}


def train(points: Array, labels: Array, steps: int) -> list[Model]:
    """Return the model after each step."""
    model: Model = {"weight": np.array([0.5, -1.5]), "bias": np.array(0.5)}  # a bad start
    state = setup(Adam(eta=0.05), model)
    models = []
    for step in range(steps + 1):
        loss, gradient = loss_and_gradient(model, points, labels)
        if step % (steps // 5) == 0:
            print(f"{step:5d}  {loss:.4f}")
        models.append({name: array.copy() for name, array in model.items()})
        update_(state, model, gradient)  # writes into the arrays of the model
    return models


# %%
# The picture
# -----------


def draw(points: Array, labels: Array, models: list[Model], out: str) -> None:
    """Draw the points, the probability, and how the boundary swung to its place."""
    colours = np.array(["#c0392b", "#1f77b4"])
    figure, axes = pyplot.subplots(figsize=(6.4, 5.6), layout="constrained")
    edge = 3.4
    x, y = np.meshgrid(*[np.linspace(-edge, edge, 300)] * 2)
    probability = predict(models[-1], np.stack([x, y], axis=-1))
    axes.imshow(
        probability, extent=(-edge, edge, -edge, edge), origin="lower", cmap="RdBu", alpha=0.3
    )
    axes.scatter(*points.T, s=10, color=colours[labels], linewidth=0, alpha=0.8)

    last = len(models) - 1
    for k in [0, *np.unique(np.geomspace(1, last, 14).astype(int))]:
        (a, b), c = models[k]["weight"], models[k]["bias"]
        style = {"linewidth": 2.2} if k == last else {"linewidth": 0.8, "alpha": 0.4}
        # a x + b y + c = 0 is where both clouds are as probable
        axes.axline(
            (-a * c / (a * a + b * b), -b * c / (a * a + b * b)),
            slope=-a / b,
            color="black",
            **style,
        )
        if k in (0, last):
            text = f"after {k} steps" if k else "at first"
            if abs(x := -(b * edge + c) / a) < edge:  # the line leaves through the top
                axes.text(x, edge + 0.1, text, ha="center")
            else:
                axes.text(edge + 0.1, -(a * edge + c) / b, text, va="center")

    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.text(-edge, edge + 0.1, "Which cloud is it?", fontsize=13)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer points and steps")
    parser.add_argument("--out", default="logistic.png", help="where the picture goes")
    options = parser.parse_args()

    points, labels = make_data(100 if options.quick else 600)
    print(" step  loss")
    models = train(points, labels, steps=50 if options.quick else 400)
    right = np.mean((predict(models[-1], points) > 0.5) == labels)
    print(f"{right:.1%} of the points are on their side of the boundary.")
    draw(points, labels, models, options.out)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
