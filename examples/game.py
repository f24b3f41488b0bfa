"""A game for two
==============

Play a game that Adam cannot finish: a tiny GAN, in which two players pull at one function.

::

    python examples/game.py

A generator shifts noise by `theta`, and wants it to look like data from around `CENTRE`. A critic
tells the two apart by a linear score with the weights `w`. What one wins, the other loses::

    score(theta, w) = w · (mean of the data - mean of the noise - theta)

The generator goes down this score, the critic goes up. They are done where theta = CENTRE and
w = 0. But at any other place, each gradient points *around* that place, not towards it, so plain
gradient descent spirals out, and so does Adam. OAdam steps by what Adam would do now, plus what
has changed since the last time: a guess at the other player's next move.

C. Daskalakis, A. Ilyas, V. Syrgkanis, H. Zeng: Training GANs with Optimism, 2018, arXiv:1711.00141
"""

from __future__ import annotations

import argparse
from typing import Any

import matplotlib
import numpy as np

from optimisers import Adam, OAdam, Rule, setup, update_

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot

CENTRE = np.array([1.0, -0.5])

# %%
# The game
# --------


def gradients(players: dict[str, Any]) -> dict[str, Any]:
    """Return for each player the direction in which it loses; `update_` goes the other way."""
    theta, w = players["theta"], players["w"]
    return {
        "theta": -w,  # the generator minimises the score ...
        "w": -(CENTRE - theta),  # ... and the critic its negative
    }


def play(rule: Rule, steps: int) -> np.ndarray:
    """Return where the four numbers of the two players were: an array of shape (steps + 1, 4)."""
    players = {"theta": np.zeros(2), "w": np.full(2, 0.3)}
    state = setup(rule, players)  # one tree for both: to the library a game is just a model
    path = [np.concatenate([*players.values()])]
    for _ in range(steps):
        update_(state, players, gradients(players))
        path.append(np.concatenate([*players.values()]))
    return np.array(path)


def distances(path: np.ndarray) -> np.ndarray:
    """Return how far each place is from the end of the game."""
    return np.linalg.norm(path - np.concatenate([CENTRE, np.zeros(2)]), axis=1)


# %%
# The picture
# -----------


def draw(paths: dict[str, np.ndarray], colours: dict[str, str], out: str) -> None:
    """Draw where the players go, and how far from the end they are; names stand by the lines."""
    figure, (plane, away) = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for name, path in paths.items():
        plane.plot(path[:, 0], path[:, 2], color=colours[name], linewidth=1, alpha=0.9)
        distance = distances(path)
        away.semilogy(distance, color=colours[name], linewidth=1.2)
        at = len(distance) // 2
        away.annotate(
            f"{name} ends {distance[-1]:.2g} away",
            (at, distance[at]),
            (6, -16) if name == "Adam" else (-6, -14),
            ha="left" if name == "Adam" else "right",
            textcoords="offset points",
            color=colours[name],
        )
    start, end = paths["Adam"][0, [0, 2]], (CENTRE[0], 0)
    plane.plot(*start, "o", color="black", markersize=5)
    plane.plot(*end, "*", color="black", markersize=14, markeredgecolor="white", zorder=3)
    for text, place, shift in (("start", start, (0, 12)), ("end of the game", end, (0, -20))):
        plane.annotate(
            text,
            place,
            shift,
            textcoords="offset points",
            ha="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )
    plane.set(
        xlabel="generator: first shift", ylabel="critic: first weight", title="The players' path"
    )
    away.set(xlabel="step", title="Distance to the end of the game")
    for axes in (plane, away):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--out", default="game.png", help="where the picture goes")
    options = parser.parse_args()

    steps = 400 if options.quick else 3000
    beta = (0.0, 0.999)  # no momentum: in a game it carries the players past each other
    rules = {"Adam": Adam(0.02, beta), "OAdam": OAdam(0.02, beta)}
    paths = {name: play(rule, steps) for name, rule in rules.items()}
    for name, path in paths.items():
        print(f"{name:>6} after {steps} steps: {distances(path)[-1]:.2g} away from the end")
    draw(paths, {"Adam": "#c0392b", "OAdam": "#1f77b4"}, options.out)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
