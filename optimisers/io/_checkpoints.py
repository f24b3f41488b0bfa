"""The files of a long run, and which of them a run that was cut off goes on from."""

from __future__ import annotations

import operator
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._messages.text import short
from ._atomic import sweep
from ._files import File, file_path, load, save
from ._json import FileFormatError, shown

Tree = Any


@dataclass(frozen=True)
class Checkpoint:
    """One file of a `Checkpointer`: of which step, and where."""

    step: int
    path: Path

    @property
    def metadata(self) -> Any:
        """What was saved as metadata; None if nothing was."""
        with File(self.path) as file:
            return file.metadata

    def load(self, like: Tree = None) -> Tree:
        """Return the state, or state and model, as `load` does."""
        return load(self.path, like)


_STEP = re.compile(r"step-(\d+)\.safetensors", re.ASCII)


class Checkpointer:
    """Numbered files in a folder, of which the newest are kept: for runs that may be cut off.

    Parameters
    ----------
    folder : str or path
        Where the files are; made if it is not there. Only one process may save into it at a time.
    keep : int
        How many files to keep: when one more is safe on the disk, the oldest is removed.
    every : int
        `save` writes if the step is a multiple of this.

    Raises
    ------
    ValueError
        If `keep` or `every` is below 1.
    OSError
        If the folder cannot be made.

    Notes
    -----
    A file has the state of the rules and the model. What else a run depends on, such as the state
    of a random generator, belongs into its metadata: then a run that was cut off and resumed ends
    at the same bits as one that was not.

    Examples
    --------
    >>> import tempfile, numpy as np, optimisers
    >>> from optimisers.io import Checkpointer
    >>> model = {"w": np.zeros(3)}
    >>> state = optimisers.setup(optimisers.Adam(), model)
    >>> rng = np.random.default_rng(0)
    >>> checkpoints = Checkpointer(tempfile.mkdtemp(), keep=2, every=10)
    >>> start = 0
    >>> if (checkpoint := checkpoints.latest()) is not None:
    ...     state, model = checkpoint.load(like=(state, model))
    ...     rng.bit_generator.state = checkpoint.metadata["rng"]
    ...     start = checkpoint.step
    >>> for step in range(start + 1, 36):
    ...     state, model = optimisers.update_(state, model, {"w": rng.normal(size=3)})
    ...     _ = checkpoints.save(step, state, model, {"rng": rng.bit_generator.state})
    >>> checkpoints.steps()
    [20, 30]
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, every: int = 1) -> None:
        self.folder = Path(file_path(folder, "Checkpointer(folder)"))
        self.keep = _at_least_one("keep", keep)
        self.every = _at_least_one("every", every)
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(os.fspath(self.folder), _STEP)

    def __repr__(self) -> str:
        return f"Checkpointer({str(self.folder)!r}, keep={self.keep}, every={self.every})"

    def save(
        self,
        step: int,
        state: Tree,
        model: Tree = None,
        metadata: Tree = None,
        *,
        force: bool = False,
        leave_out: bool = False,
    ) -> Path | None:
        """Save a step, if it is its turn, and then remove what is older than the last few.

        Parameters
        ----------
        step : int
            The number of the step; a file of this step is replaced. Files of later steps, which
            are there if a run went back, are not touched.
        state, model, metadata, leave_out
            As in `save`.
        force : bool
            Whether to save also if `step` is no multiple of `every`.

        Returns
        -------
        path or None
            The file; None if it was not the turn of this step.
        """
        if not hasattr(type(step), "__index__"):
            raise TypeError(
                "Checkpointer.save(step, state, model) takes the number of the step first; got "
                f"{short(step)}"
            )
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"a step is at least 0; got {step}")
        if step % self.every and not force:
            return None
        path = self._path(step)
        save(path, state, model, metadata, leave_out=leave_out)
        sweep(os.fspath(self.folder), _STEP)
        for old in [s for s in self.steps() if s <= step][: -self.keep]:
            try:
                self._path(old).unlink()
            except FileNotFoundError:
                pass
            except OSError as error:
                text = f"saved step {step}, but could not remove an old checkpoint: {error}"
                warnings.warn(text, stacklevel=2)
        return path

    def steps(self) -> list[int]:
        """Return the steps of which there are files, good or not, in order."""
        files = (entry for entry in os.scandir(self.folder) if not entry.is_dir())
        found = (_STEP.fullmatch(entry.name) for entry in files)
        return sorted(step for m in found if m and self._path(step := int(m[1])).name == m[0])

    def latest(self) -> Checkpoint | None:
        """Return the newest file that is whole, None if there is none.

        Files are read and checked against their checksums, newest first. One that is damaged is
        passed over with a warning.
        """
        passed: set[int] = set()
        gone: set[int] = set()
        steps = self.steps()
        while True:
            for step in reversed(steps):
                if step in passed:
                    continue
                path = self._path(step)
                try:
                    with File(path) as file:
                        file.verify()
                    return Checkpoint(step, path)
                except (FileFormatError, OSError, MemoryError) as error:
                    if isinstance(error, FileNotFoundError) and step not in gone:
                        gone.add(step)  # a later one may have taken its place
                        break
                    passed.add(step)
                    text = str(error) or f"{path}: it does not fit into the memory"
                    warnings.warn(f"passed over a checkpoint: {shown(text)}", stacklevel=2)
            before, steps = steps, self.steps()
            if steps == before and passed.issuperset(steps):
                return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:012d}.safetensors"


def _at_least_one(name: str, number: int) -> int:
    if not hasattr(type(number), "__index__"):
        raise TypeError(f"Checkpointer: {name} must be a whole number; got {short(number)}")
    number = operator.index(number)
    if number < 1:
        raise ValueError(f"Checkpointer: {name} must be at least 1; got {number}")
    return number
