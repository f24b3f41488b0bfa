"""A PyTorch module in place
=========================

Train a PyTorch module that says how sure it is, with the parameters written in place.

::

    python examples/torch_module.py

Noisy measurements, noisier in some places than in others. A small network learns for each place the
expected value and how far the measurements scatter there. The module, the loss and `backward` are
PyTorch's. The model that this library sees is the dict of the module's own parameters; `update_`
writes into them without a copy.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import matplotlib
import numpy as np
from tqdm import trange

from optimisers import AdamW, ClipNorm, OptimiserChain, adjust_, setup, update_

try:
    import torch
except ImportError:
    print("This example needs PyTorch: pip install torch")
    sys.exit()

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot

# %%
# The data
# --------


def truth(x: Any) -> tuple[Any, Any]:
    """Return the mean of the measurements at `x`, and their standard deviation."""
    return np.sin(1.5 * x) + 0.3 * x, 0.06 + 0.45 * np.exp(-((x - 1) ** 2))


def measure(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-4, 4, n)
    mean, deviation = truth(x)
    return x, mean + deviation * rng.standard_normal(n)


# %%
# The module
# ----------


class Forecast(torch.nn.Module):
    """A network from a place to a mean, and the logarithm of a standard deviation."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(1, width),
            torch.nn.Tanh(),
            torch.nn.Linear(width, width),
            torch.nn.Tanh(),
        )
        self.mean = torch.nn.Linear(width, 1)
        self.log_deviation = torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x[:, None])
        return self.mean(features)[:, 0], self.log_deviation(features)[:, 0]


def surprise(module: Forecast, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the negative logarithm of the likelihood, for one measurement on average."""
    mean, log_deviation = module(x)
    return (0.5 * ((y - mean) / log_deviation.exp()) ** 2 + log_deviation).mean()


def train(module: Forecast, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    parameters = dict(module.named_parameters())  # the tensors themselves, not copies
    state = setup(OptimiserChain(ClipNorm(1.0), AdamW(0.005, lambda_=1e-3)), parameters)
    progress = trange(steps, unit="step", leave=False, disable=None)
    for step in progress:
        adjust_(state, 0.005 * 0.5 * (1 + math.cos(math.pi * step / steps)))  # down a cosine
        chosen = torch.randint(len(x), (64,))
        module.zero_grad()
        loss = surprise(module, x[chosen], y[chosen])
        loss.backward()
        update_(state, parameters, {name: p.grad for name, p in parameters.items()})
        if step % (steps // 5) == 0:
            whole = surprise(module, x, y).item()
            progress.write(f"{step:6d}  {whole:8.4f}")
    print(f"{steps:6d}  {surprise(module, x, y).item():8.4f}")


# %%
# The picture
# -----------


def draw(module: Forecast, x: np.ndarray, y: np.ndarray, out: str) -> None:
    """Draw the measurements, and where the network expects two thirds and nearly all of them."""
    blue = "#1f77b4"
    places = np.linspace(-5, 5, 400)
    with torch.no_grad():
        mean, log_deviation = (t.numpy() for t in module(torch.tensor(places, dtype=torch.float32)))
    deviation = np.exp(log_deviation)
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for width, alpha in ((2, 0.18), (1, 0.28)):
        band = mean - width * deviation, mean + width * deviation
        axes.fill_between(places, *band, color=blue, alpha=alpha, linewidth=0)
    axes.plot(places, mean, color=blue, linewidth=2)
    axes.plot(x, y, ".", color="black", markersize=3, alpha=0.5)
    true_mean, true_deviation = truth(places)
    for line in (true_mean - 2 * true_deviation, true_mean + 2 * true_deviation):
        axes.plot(places, line, color="#c0392b", linewidth=1, linestyle=(0, (4, 3)))
    end = 5.1
    axes.text(end, mean[-1], "learned mean,\n± 1 and 2 deviations", color=blue, va="center")
    axes.text(1.7, 2.2, "true ± 2 deviations", color="#c0392b")
    axes.text(-4, y.min() - 0.35, "measurements from here ...", ha="left", fontsize=8)
    axes.text(4, y.min() - 0.35, "... to here", ha="right", fontsize=8)
    axes.set(xlim=(-5, 5), xlabel="place", ylabel="value", ylim=(y.min() - 0.5, y.max() + 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", default="torch_module.png", help="where the picture goes")
    options = parser.parse_args()

    torch.manual_seed(0)
    x, y = measure(600)
    module = Forecast()
    print("  step  surprise")
    train(
        module,
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y, dtype=torch.float32),
        steps=250 if options.quick else 2500,
    )
    draw(module, x, y, options.out)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
