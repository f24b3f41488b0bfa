"""Two spirals in JAX
==================

Train a JAX network to tell two spirals apart, with the whole training inside `jax.jit`.

::

    python examples/jax_mlp.py

Models of JAX arrays are plain trees, and so are states: gradient and `update` are traced together,
`jax.lax.scan` runs hundreds of steps in one call, and `adjust` lowers the learning rate between the
calls without a new compilation.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import matplotlib
import numpy as np

from optimisers import Adam, ClipNorm, OptimiserChain, adjust, setup, update

try:
    import jax
    from jax import numpy as jnp
except ImportError:
    print("This example needs JAX: pip install jax")
    sys.exit()

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot

Model = list[dict[str, Any]]

# %%
# The data
# --------


def make_spirals(n: int, seed: int = 0) -> tuple[Any, Any]:
    """Return `n` points of two spirals, shape (n, 2), and for each its spiral: 0 or 1."""
    rng = np.random.default_rng(seed)
    spiral = rng.integers(0, 2, n)
    radius = np.sqrt(rng.uniform(0.01, 1, n))
    angle = 10 * radius + np.pi * spiral
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points += rng.normal(scale=0.015, size=(n, 2))
    return jnp.asarray(points, jnp.float32), jnp.asarray(spiral)


# %%
# The network
# -----------


def make_model(sizes: tuple[int, ...] = (2, 64, 64, 1), seed: int = 0) -> Model:
    """Return a list of layers; each is a dict of JAX arrays."""
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return [
        {"weight": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, "bias": jnp.zeros(m)}
        for key, (n, m) in zip(keys, itertools.pairwise(sizes), strict=False)
    ]


def score(model: Model, points: Any) -> Any:
    """Return a number for each point: positive for the second spiral."""
    *hidden, last = model
    x = 3 * points
    for layer in hidden:
        x = jax.nn.silu(x @ layer["weight"] + layer["bias"])
    return (x @ last["weight"] + last["bias"])[..., 0]


def loss(model: Model, points: Any, labels: Any) -> Any:
    """Return the mean surprise of the model by the labels."""
    s = score(model, points)
    return jnp.mean(jnp.where(labels == 1, jax.nn.softplus(-s), jax.nn.softplus(s)))


# %%
# Training
# --------


@jax.jit
def train(state: Any, model: Model, points: Any, labels: Any, keys: Any) -> tuple[Any, Model, Any]:
    """Take a step for each key, which chooses 128 points; return the losses too."""

    def step(carry: tuple[Any, Model], key: Any) -> tuple[tuple[Any, Model], Any]:
        state, model = carry
        chosen = jax.random.choice(key, len(points), (128,))
        value, gradient = jax.value_and_grad(loss)(model, points[chosen], labels[chosen])
        return update(state, model, gradient), value  # pure: JAX arrays cannot be written

    (state, model), values = jax.lax.scan(step, (state, model), keys)
    return state, model, values


# %%
# The picture
# -----------


def draw(model: Model, points: Any, labels: Any, losses: Any, out: str) -> None:
    """Draw what the network has made of the plane, and how the loss fell."""
    figure, (plane, curve) = pyplot.subplots(
        1, 2, figsize=(10, 4.8), layout="constrained", width_ratios=(1, 1.1)
    )
    edge = 1.15
    x, y = np.meshgrid(*[np.linspace(-edge, edge, 400)] * 2)
    probability = jax.nn.sigmoid(score(model, jnp.stack([jnp.asarray(x), jnp.asarray(y)], axis=-1)))
    extent = (-edge, edge, -edge, edge)
    plane.imshow(probability, extent=extent, origin="lower", cmap="RdBu", vmin=0, vmax=1, alpha=0.5)
    colours = np.array(["#c0392b", "#1f77b4"])[np.asarray(labels)]
    plane.scatter(*np.asarray(points).T, s=8, color=colours, edgecolor="white", linewidth=0.3)
    plane.set(xticks=[], yticks=[])
    plane.spines[:].set_visible(False)
    plane.set_title("What the network has made of the plane", loc="left")

    curve.semilogy(losses, color="0.75", linewidth=0.6)
    window = max(1, len(losses) // 60)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    curve.semilogy(np.arange(len(smooth)) + window / 2, smooth, color="black")
    curve.spines[["top", "right"]].set_visible(False)
    curve.set(xlabel="step", ylabel="loss of a batch")
    curve.set_title("How the loss fell", loc="left")
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", default="jax_mlp.png", help="where the picture goes")
    options = parser.parse_args()
    steps = 150 if options.quick else 1500

    points, labels = make_spirals(800)
    model = make_model()
    state = setup(OptimiserChain(ClipNorm(1.0), Adam(eta=0.003)), model)
    losses = []
    print("  eta    loss  right")
    for part, eta in enumerate((0.003, 0.001, 0.0003)):
        state = adjust(state, eta)  # `train` stays compiled
        keys = jax.random.split(jax.random.key(part), steps)
        state, model, values = train(state, model, points, labels, keys)
        losses.append(np.asarray(values))
        right = jnp.mean((score(model, points) > 0) == labels)
        print(f"{eta:6}  {loss(model, points, labels):.4f}  {right:.1%}")
    draw(model, points, labels, np.concatenate(losses), options.out)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
