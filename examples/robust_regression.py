"""A rule of your own
==================

Fit a line through data with gross errors, by a rule of our own that does not believe them all.

::

    python examples/robust_regression.py

The data: how diabetes went on in 442 patients, from ten things measured a year before (scikit-learn
brings them along). In about one of ten training examples the outcome is spoiled, as if someone had
typed a wrong number. Least squares believes every number and is led astray. There are two ways out:

- another loss, which grows more slowly than a square (Huber's, or that of Student's t);
- another rule. `RobustAdam` below weighs each gradient by how far it strays from those before, as
  Student's t distribution would. Then plain least squares will do.

The rule is one formula, written in a few lines. With Numba installed it is compiled and runs in the
same loop as the built-in rules, at their speed; without it, as array code, with the same numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from sklearn.datasets import load_diabetes
from tqdm import tqdm

from optimisers import Adam, ElementwiseRule, Rule, setup, update_
from optimisers.words import abs2, sqrt

Array = Any

# %%
# A rule of our own
# -----------------


@dataclass(frozen=True)
class RobustAdam(ElementwiseRule):
    """Adam that trusts a gradient the less, the further it strays.

    ::

        trust = (nu + 1) / (nu + (g - m)² / v)
        m     = m + (1 - b1) trust (g - m)
        v     = b2 v + (1 - b2) trust (g - m)²
        dx    = eta / (1 - b1^t) m / (sqrt(v) + epsilon)

    `trust` is the weight of an observation when the mean and the scale of a Student's t with `nu`
    degrees of freedom are fitted. The smaller `nu`, the less an outlier counts.
    """

    eta: float = 0.001
    beta: tuple[float, float] = (0.9, 0.999)
    nu: float = 0.3
    epsilon: float = 1e-8

    slots = ("m", "v")

    def start(self) -> tuple[float, ...]:
        return 0.0, 1.0

    # Every number that the formula needs, computed in double and then rounded once.
    def coefs(self, t: Any) -> tuple[Any, ...]:
        b1, b2 = self.beta
        return 1 - b1, b2, 1 - b2, self.eta / (1 - b1**t), self.nu, self.nu + 1, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: tuple[Array, ...], coefs: tuple[Any, ...]) -> Any:
        m, v = state
        rest1, b2, rest2, rate, nu, nu1, epsilon = coefs
        stray = dx - m
        trust = nu1 / (nu + abs2(stray) / (v + epsilon))
        m = m + rest1 * trust * stray
        v = b2 * v + rest2 * trust * abs2(stray)
        return rate * m / (sqrt(v) + epsilon), (m, v)


# %%
# Data
# ----


class Data(NamedTuple):
    """Ten measurements and an outcome for each patient, all with mean 0 and deviation 1."""

    inputs: Array
    outcomes: Array
    test_inputs: Array
    test_outcomes: Array
    spoiled: Array


def load(share: float = 0.1, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    inputs, outcomes = load_diabetes(return_X_y=True)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    outcomes = (outcomes - outcomes.mean()) / outcomes.std()
    order = rng.permutation(len(outcomes))
    train, test = order[:300], order[300:]
    spoiled = rng.random(len(train)) < share
    return Data(
        inputs[train], outcomes[train] + 20 * spoiled, inputs[test], outcomes[test], spoiled
    )


# %%
# Losses, by their derivatives
# ----------------------------


def square(residual: Array) -> Array:
    return residual


def huber(residual: Array, delta: float = 1.0) -> Array:
    return np.clip(residual, -delta, delta)


def student(residual: Array, nu: float = 3.0, scale: float = 0.5) -> Array:
    return (nu + 1) * residual / (nu * scale**2 + residual**2)


# %%
# Training
# --------

Model = dict[str, Array]


def predict(model: Model, inputs: Array) -> Array:
    return inputs @ model["slopes"] + model["height"]


def typical_error(model: Model, data: Data) -> float:
    """Return the median distance from outcomes that nobody spoiled."""
    return float(np.median(np.abs(predict(model, data.test_inputs) - data.test_outcomes)))


def train(
    rule: Rule, derivative: Callable[[Array], Array], data: Data, epochs: int, batch: int = 8
) -> tuple[Model, list[float]]:
    """Fit a linear model; return it and the error after each epoch."""
    rng = np.random.default_rng(1)
    model = {"slopes": np.zeros(data.inputs.shape[1]), "height": np.zeros(())}
    state = setup(rule, model)
    errors = [typical_error(model, data)]
    for _ in range(epochs):
        order = rng.permutation(len(data.outcomes))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = data.inputs[chosen]
            pull = derivative(predict(model, inputs) - data.outcomes[chosen]) / len(chosen)
            update_(state, model, {"slopes": pull @ inputs, "height": np.sum(pull)})
        errors.append(typical_error(model, data))
    return model, errors


def microseconds(rule: Rule, size: int) -> float:
    """Return how long an update of `size` parameters takes, the best of many."""
    model, gradient = np.zeros(size, np.float32), np.ones(size, np.float32)
    state = setup(rule, model)
    update_(state, model, gradient)  # the first compiles the step, if it is not built in
    times = []
    for _ in range(200):
        start = time.perf_counter()
        update_(state, model, gradient)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def draw(curves: dict[str, list[float]], models: dict[str, Model], data: Data, path: str) -> None:
    """Save a picture: the errors over time, and the worst and the best fit beside the data."""
    matplotlib.use("Agg")  # a file, not a window
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for title, errors in curves.items():
        left.plot(errors, label=title)
    left.set(xlabel="epoch", ylabel="median error on clean data")
    left.legend()

    first, *_, last = models
    across = predict(models[last], data.inputs)
    right.plot(across[~data.spoiled], data.outcomes[~data.spoiled], ".", color="grey", label="good")
    right.plot(across[data.spoiled], data.outcomes[data.spoiled], "rx", label="spoiled")
    order = np.argsort(across)
    for title in (first, last):
        fitted = predict(models[title], data.inputs)[order]
        middle = np.polynomial.Polynomial.fit(across[order], fitted, 1)
        right.plot(
            across[order], middle(across[order]), label=title, color=f"C{[*models].index(title)}"
        )
    right.set(xlabel=f"prediction by {last}", ylabel="outcome, in deviations")
    right.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60, help="times through the patients")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--out", default="robust_regression.png", help="where the picture goes")
    options = parser.parse_args()
    epochs = 5 if options.quick else options.epochs

    data = load()
    print(f"{len(data.outcomes)} patients to learn from, {np.sum(data.spoiled)} of them spoiled\n")
    ways: dict[str, tuple[Rule, Callable[[Array], Array]]] = {
        "least squares, Adam": (Adam(eta=0.003), square),
        "Huber's loss, Adam": (Adam(eta=0.003), huber),
        "Student's t, Adam": (Adam(eta=0.003), student),
        "least squares, RobustAdam": (RobustAdam(eta=0.003), square),
    }
    models, curves = {}, {}
    print(f"{'':27}median error on {len(data.test_outcomes)} others")
    for title, (rule, derivative) in tqdm(ways.items(), unit="fit", leave=False, disable=None):
        models[title], curves[title] = train(rule, derivative, data, epochs)
        tqdm.write(f"{title:27}{curves[title][-1]:.3f}")

    print("\nTime of an update of 10,000 parameters, in µs:")
    for rule in (Adam(), RobustAdam()):
        print(f"{type(rule).__name__:27}{microseconds(rule, 10_000):.1f}")
    draw(curves, models, data, options.out)
    print(f"\nPicture: {options.out}")


if __name__ == "__main__":
    main()
