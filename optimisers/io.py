"""Saving and loading: state trees and models in files that survive anything.

>>> import tempfile, numpy as np, optimisers
>>> from optimisers.io import load, save
>>> model = {"w": np.array([1.0, 2.0])}
>>> state = optimisers.setup(optimisers.Momentum(), model)
>>> path = tempfile.mkdtemp() + "/model.safetensors"
>>> save(path, state, model)
>>> state, model = load(path)
>>> model
{'w': array([1., 2.])}

A file has the safetensors format: other programs read its arrays under names such as
``model.layers.0.weight``, and `load` and `File` read theirs. There is no pickle in it, no code.
A file is written beside its target and then takes its place in one step: whatever happens, there is
the new one or the old one.

Some arrays have no place in the format and are written as *views*: complex128 as float64 with real
and imaginary part along one more axis at the end, longdouble and clongdouble as their bytes (uint8)
along one more axis, the rarer floats and integers of ``ml_dtypes`` of up to 8 bits as uint8. They
come back as they were; an extended number only on a machine that has the same kind.
"""

from __future__ import annotations

import mmap
import operator
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from . import _safetensors as form
from ._archive import Archive
from ._atomic import sweep
from ._safetensors import FileFormatError
from ._saved import Encoder
from ._tree import is_node, walk
from .state import Leaf

__all__ = ["Checkpoint", "Checkpointer", "File", "FileFormatError", "load", "save"]

Tree = Any
Name = str | os.PathLike[str]


# --- save and load ---------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    state: Tree,
    model: Tree = None,
    metadata: Tree = None,
    *,
    leave_out: bool = False,
) -> None:
    """Save a state tree, and a model with it.

    Parameters
    ----------
    path : str or path
        Where to; what is there is replaced, in one step and when all is written.
    state : tree
        A state tree from `setup`; or any tree of arrays.
    model : tree, optional
        The model. Arrays that are one in memory, also views such as ``w`` and ``w.T``, stay one.
    metadata : tree, optional
        What else to keep: a step, losses, the state of a random generator. See `File.metadata`.
    leave_out : bool
        Whether to leave out what cannot be saved, such as functions. Loading then needs `like`.

    Raises
    ------
    TypeError
        If the trees hold what cannot be saved: anything but arrays, numbers, strings, truth values
        and None. The message names the path.
    ValueError
        If arrays overlap in memory only in part, or if a tree contains itself.
    OSError
        If the file cannot be written (`FileNotFoundError`, `PermissionError`, ... say why). What
        was there before is as it was.

    See Also
    --------
    Checkpointer : numbered files of a long run.

    Notes
    -----
    Saved are: arrays of NumPy, PyTorch, JAX, CuPy and Numba with their dtype, order in memory and
    ties; rules with their hyperparameters, to the last bit; what the rules remember; what is
    frozen. Not saved are attributes of objects that are no children of a node.

    Examples
    --------
    >>> import tempfile, numpy as np, optimisers
    >>> from optimisers.io import File, load, save
    >>> model = {"layers": [{"weight": np.ones((2, 3))}], "name": "tiny"}
    >>> state = optimisers.setup(optimisers.Adam(), model)
    >>> path = tempfile.mkdtemp() + "/tiny.safetensors"
    >>> save(path, state, model, metadata={"epoch": 3})
    >>> state, model = load(path)
    >>> state["layers"][0]["weight"].rule, model["name"]
    (Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08), 'tiny')
    >>> with File(path) as file:
    ...     print(file.metadata, *file, sep="; ")
    {'epoch': 3}; state.layers.0.weight.m; state.layers.0.weight.v; state.layers.0.weight.t;
    model.layers.0.weight
    """
    encoder = Encoder(leave_out)
    roots = {"state": encoder.add("state", state)}
    if model is not None:
        roots["model"] = encoder.add("model", model)
    if metadata is not None:
        roots["metadata"] = encoder.add("metadata", metadata)
    tensors, text = encoder.finish(roots)
    form.write(os.fspath(path), tensors, text)


def load(path: str | os.PathLike[str], like: Tree = None) -> Tree:
    """Load what `save` saved, or any safetensors file.

    Parameters
    ----------
    path : str or path
        The file.
    like : tree, or (state, model), optional
        Trees of the structure that is expected. They are not changed; what is returned has their
        classes, and arrays of their libraries, devices included. Without it, nodes must be
        built-in ones (dictionaries, lists, tuples, named tuples, namespaces), and arrays come as
        NumPy arrays.

    Returns
    -------
    state, or (state, model)
        The pair if a model was saved, else the state. With `like`, as much as that has: a state
        alone is loaded without its model. Of a file that `save` did not write: a dictionary of
        arrays by name. Hyperparameters, counts and what is frozen are those of the file.

    Raises
    ------
    FileFormatError
        If the file is damaged, or no such file, or has a rule that is unknown here: import the
        module that defines it first.
    ValueError
        If the file does not fit `like`: missing and unexpected parts, shapes, dtypes, rules and
        ties, all named in one message. Or if it needs `like`.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> import tempfile, numpy as np, optimisers
    >>> from optimisers.io import load, save
    >>> class Affine:
    ...     def __init__(self, n, m):
    ...         self.weight, self.bias = np.zeros((n, m)), np.zeros(m)
    >>> optimisers.functor(Affine) is Affine
    True
    >>> model = Affine(2, 3)
    >>> state = optimisers.setup(optimisers.Descent(), model)
    >>> path = tempfile.mkdtemp() + "/affine.safetensors"
    >>> save(path, state, model)
    >>> state, model = load(path, like=(state, model))
    >>> type(model).__name__
    'Affine'
    >>> load(path, like=(state, Affine(2, 4)))
    Traceback (most recent call last):
        ...
    ValueError: the file does not fit what was given as `like`:
      model.weight: the file has shape (2, 3), `like` (2, 4)
      model.bias: the file has shape (3,), `like` (4,)
    """
    with _named(path), open(path, "rb", buffering=0) as file:
        return _loaded(Archive(file), like)


def _loaded(archive: Archive, like: Tree) -> Tree:
    has_model = "model" in archive.roots
    if like is None:
        if not has_model:
            return archive.build("state")
        archive.refuse_unknown("state", "model")
        return archive.build("state"), archive.build("model")
    if not _is_pair(like) or archive.is_plain:
        return archive.fill({"state": like})["state"]
    if not has_model:
        state = archive.roots["state"]
        if state.is_pair():
            return archive.fill({"state": like})["state"]
        raise ValueError("the file holds no model: load it with like=state")
    made = archive.fill({"state": like[0], "model": like[1]})
    return made["state"], made["model"]


def _is_pair(like: Tree) -> bool:
    """Tell a state tree and a model from a state tree that happens to be a tuple of two."""
    if type(like) is not tuple or len(like) != 2:
        return False
    for _, x in walk(like[1]):
        return not isinstance(x, Leaf)
    return not any(isinstance(x, Leaf) for _, x in walk(like[0]))


class _named:
    """Puts the path of a file before what is wrong with it."""

    def __init__(self, path: Name) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind in (FileFormatError, ValueError):
            raise kind(f"{os.fspath(self.path)}: {error}") from error
