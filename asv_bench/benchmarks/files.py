"""What it takes to save and to load a run, alone and beside the package `safetensors`.

The package writes and reads the same arrays, by name, without checksums, trees or rules. Ours ends
with the file on the disk, so the package's file is forced there too.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import optimisers as opt
from optimisers.io import load, save

from .measure import alternate
from .models import many_arrays, normal

Step = Callable[[], Any]


class Run:
    """A state and its model, in a file of ours and in one of the package.

    Parameters
    ----------
    model : tree
        The model.
    rule : Rule, optional
        The rule whose state is saved beside it. Without one, the model is saved by itself, as any
        tree of arrays.
    """

    def __init__(self, model: Any, rule: opt.Rule | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.ours, self.theirs = self.folder / "ours", self.folder / "theirs"
        self.trees = (model,) if rule is None else (opt.setup(rule, model), model)

    def steps(self) -> dict[str, Step]:
        """Return what saves and loads; the package's two are missing where it is not installed."""
        self.save()
        found: dict[str, Step] = {
            "save": self.save,
            "load": self.load,
            "load, like": self.load_like,
        }
        try:
            package: Any = importlib.import_module("safetensors.numpy")
        except ImportError:
            return found
        self.save_by(package)
        found["package's save"] = lambda: self.save_by(package)
        found["package's load"] = lambda: package.load_file(self.theirs)
        return found

    def save(self) -> None:
        save(self.ours, *self.trees)

    def load(self) -> Any:
        return load(self.ours)

    def load_like(self) -> Any:
        return load(self.ours, like=self.trees if len(self.trees) > 1 else self.trees[0])

    def save_by(self, package: Any) -> None:
        package.save_file(self.arrays(), self.theirs)
        with self.theirs.open("rb+") as file:
            os.fsync(file.fileno())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the same arrays by name: of a state without arrays, only those of its model."""
        leaves: list[Any] = []
        for tree in self.trees:
            opt.fmap(leaves.append, tree)
        xs = [x for leaf in leaves for x in (leaf.state if isinstance(leaf, opt.Leaf) else [leaf])]
        return {f"{k}": x for k, x in enumerate(xs)}

    def remove(self) -> None:
        shutil.rmtree(self.folder)


RUNS: dict[str, Callable[[], Run]] = {
    "1,000 arrays of 64": lambda: Run(many_arrays(1_000)),
    "20,000 arrays of 64": lambda: Run(many_arrays(20_000)),
    "1,000 arrays of 64 and Descent": lambda: Run(many_arrays(1_000), opt.Descent()),
    "20,000 arrays of 64 and Descent": lambda: Run(many_arrays(20_000), opt.Descent()),
    "1,000 arrays of 64 and Adam": lambda: Run(many_arrays(1_000), opt.Adam()),
    "20,000 arrays of 64 and Adam": lambda: Run(many_arrays(20_000), opt.Adam()),
    "20,000 arrays of 8 and Adam": lambda: Run(many_arrays(20_000, 8), opt.Adam()),
    "one array of 3M and Adam": lambda: Run(normal(3_000_000), opt.Adam()),
}


class Files:
    params = (list(RUNS),)
    param_names = ("trees",)
    timeout = 300

    def setup(self, name: str) -> None:
        self.run = RUNS[name]()
        self.run.save()

    def teardown(self, name: str) -> None:
        self.run.remove()

    def time_save(self, name: str) -> None:
        self.run.save()

    def time_load(self, name: str) -> None:
        self.run.load()

    def time_load_like(self, name: str) -> None:
        self.run.load_like()


class FileRatios:
    """Times the package's time."""

    params = (["save", "load", "load, like"], list(RUNS))
    param_names = ("work", "trees")
    unit = "of the package's time"
    timeout = 600

    def setup(self, work: str, name: str) -> None:
        self.run = RUNS[name]()
        self.steps = self.run.steps()
        if "package's load" not in self.steps:
            raise NotImplementedError  # asv's word for "leave this out"

    def teardown(self, work: str, name: str) -> None:
        self.run.remove()

    def track_file(self, work: str, name: str) -> float:
        theirs = f"package's {work.partition(',')[0]}"
        steps = {name: self.steps[name] for name in (theirs, work)}
        return alternate(steps, runs=7, least=0).ratio(work, theirs)
