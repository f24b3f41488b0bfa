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

from typing import TYPE_CHECKING

from .._messages.calls import no_name
from ._checkpoints import Checkpoint, Checkpointer
from ._files import File, load, save
from ._json import FileFormatError

__all__ = ["Checkpoint", "Checkpointer", "File", "FileFormatError", "load", "save"]


if not TYPE_CHECKING:  # type checkers know what there is

    def __getattr__(name):
        raise no_name(__name__, name)
