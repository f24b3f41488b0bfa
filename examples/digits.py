"""Handwritten digits
==================

Train a small network on handwritten digits, in the two ways this library offers.

::

    python examples/digits.py

The first way keeps the parameters in a tree: a list of layers, each a dict of arrays. The second
keeps them in one flat vector, and the layers are windows into it. Both use the same network, the
same batches and the same rule, so they should end at the same numbers; the last lines tell.

The gradients come from HIPS autograd. The library does not care where they come from: it takes
anything that has the structure of the model.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import autograd.numpy as np  # NumPy, with calls recorded so that they can be differentiated
import matplotlib
from autograd import value_and_grad
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optimisers import Adam, OptimiserChain, WeightDecay, destructure, setup, update_

Model = dict[str, Any]
Array = np.ndarray

# %%
# The data: 1,797 images of 8 by 8 pixels
# ---------------------------------------


class Data(NamedTuple):
    images: Array
    test_images: Array
    labels: Array
    test_labels: Array


def load() -> Data:
    """Return the digits with pixels between 0 and 1, a fifth of them kept for the test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return Data(*train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels))


# %%
# The network: plain functions of a plain tree
# --------------------------------------------


def make_model(seed: int = 0, sizes: tuple[int, ...] = (64, 64, 10)) -> Model:
    """Return weights and biases. Nothing here is special: arrays in dicts in a list."""
    rng = np.random.default_rng(seed)

    def layer(n: int, m: int) -> dict[str, Array]:
        weight = rng.normal(scale=n**-0.5, size=(n, m)).astype(np.float32)
        return {"weight": weight, "bias": np.zeros(m, np.float32)}

    return {"layers": [layer(n, m) for n, m in itertools.pairwise(sizes)]}


def predict(model: Model, images: Array) -> Array:
    """Return for each image the logarithm of how probable each digit is."""
    *hidden, last = model["layers"]
    x = images
    for layer in hidden:
        x = np.tanh(x @ layer["weight"] + layer["bias"])
    scores = x @ last["weight"] + last["bias"]
    scores = scores - np.max(scores, axis=1, keepdims=True)
    return scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))


def cross_entropy(model: Model, images: Array, labels: Array) -> Array:
    """Return how surprised the model is by the labels, on average."""
    return -np.mean(predict(model, images)[np.arange(len(labels)), labels])


def accuracy(model: Model, images: Array, labels: Array) -> float:
    """Return the share of images that the model names rightly."""
    return float(np.mean(np.argmax(predict(model, images), axis=1) == labels))


loss_and_gradient = value_and_grad(cross_entropy)

# %%
# Training
# --------

# Weight decay first adds a little of each parameter to its gradient; Adam then makes it a step.
RULE = OptimiserChain(WeightDecay(1e-4), Adam(eta=0.003))

Step = Callable[[Array, Array], float]


def over_the_tree() -> tuple[Model, Step]:
    """Keep the parameters in the tree: a state for each array, gradients shaped like the model."""
    model = make_model()
    state = setup(RULE, model)

    def step(images: Array, labels: Array) -> float:
        loss, gradient = loss_and_gradient(model, images, labels)
        update_(state, model, gradient)  # writes into the arrays of the model
        return float(loss)

    return model, step


def over_the_flat_vector() -> tuple[Model, Step]:
    """Keep the parameters in one vector: a single state, and a model made of views."""
    flat, re = destructure(make_model())
    model = re(flat)  # no copy: what is written into `flat` shows in `model`
    state = setup(RULE, flat)

    def step(images: Array, labels: Array) -> float:
        loss, gradient = loss_and_gradient(model, images, labels)
        update_(state, flat, re.flatten_gradient(gradient))  # and so moves the model
        return float(loss)

    return model, step


def train(title: str, model: Model, step: Step, data: Data, epochs: int, batch: int) -> list[float]:
    """Go `epochs` times through the images in random order; return the loss of each epoch."""
    rng = np.random.default_rng(1)  # the same order of images for both ways
    losses: list[float] = []
    starts = range(0, len(data.labels), batch)
    print(f"\n{title}\n epoch      loss  test accuracy")
    with tqdm(total=epochs * len(starts), unit="step", leave=False, disable=None) as bar:
        for epoch in range(1, epochs + 1):
            order = rng.permutation(len(data.labels))
            total = 0.0
            for start in starts:
                chosen = order[start : start + batch]
                total += step(data.images[chosen], data.labels[chosen])
                bar.update()
            losses.append(total / len(starts))
            right = accuracy(model, data.test_images, data.test_labels)
            tqdm.write(f"{epoch:6d}  {losses[-1]:8.4f}  {right:13.2%}")
    return losses


def draw(curves: dict[str, list[float]], path: str) -> None:
    """Save a picture of the losses; the first curve is broad, to be seen behind the second."""
    matplotlib.use("Agg")  # a file, not a window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (title, losses), width in zip(curves.items(), (6, 1.5), strict=True):
        axes.semilogy(range(1, len(losses) + 1), losses, label=title, linewidth=width)
    axes.set(xlabel="epoch", ylabel="cross entropy", title="Handwritten digits")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="times through the images")
    parser.add_argument("--quick", action="store_true", help="two epochs only")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    parser.add_argument("--out", default="digits.png", help="where the picture goes")
    options = parser.parse_args()
    options.epochs = 2 if options.quick else options.epochs

    data = load()
    print(f"{len(data.labels)} images to learn from, {len(data.test_labels)} to test with")

    tree, tree_step = over_the_tree()
    flat, flat_step = over_the_flat_vector()
    curves = {
        title: train(title, model, step, data, options.epochs, options.batch)
        for title, model, step in (
            ("over the tree", tree, tree_step),
            ("over the flat vector", flat, flat_step),
        )
    }

    ours, _ = destructure(tree)
    theirs, _ = destructure(flat)
    if np.array_equal(ours, theirs):
        print(f"\nBoth ways ended at the same {ours.size} parameters, bit for bit.")
    else:
        print(f"\nThe two ways differ by up to {np.max(np.abs(ours - theirs)):.3g}.")
    print(f"Test accuracy: {accuracy(tree, data.test_images, data.test_labels):.2%}")
    draw(curves, options.out)
    print(f"Loss curves: {options.out}")


if __name__ == "__main__":
    main()
