"""Which leaves are numeric, and which may be written."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from node_classes import Array

from optimisers._arrays.library import isnumeric, maywrite


@pytest.mark.parametrize("name", ["f2", "f4", "f8", "g", "c8", "c16", "G", ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2)])
def test_arrays_of_floats_are_numeric(name, shape):
    assert isnumeric(np.zeros(shape, name))
    assert isnumeric(np.zeros(shape, name).view(Array))


@pytest.mark.parametrize(
    "x",
    [
        1.0, 1j, 1, True, None, "x", [1.0], np.float64(1), np.complex64(1), np.arange(3),
        np.zeros(3, bool), np.array([None]), np.array(["a"]), np.zeros(2, "M8[s]"),
        np.zeros(2, "V4"), np.zeros(2, [("a", "f4")]), SimpleNamespace(dtype=np.dtype("f4")),
    ],
)  # fmt: skip
def test_nothing_else_is_numeric(x):
    assert not isnumeric(x)


def test_only_arrays_whose_elements_stand_alone_may_be_written():
    base = np.zeros((4, 6))
    readonly = base.copy()
    readonly.flags.writeable = False
    windows = np.lib.stride_tricks.as_strided(np.zeros(5), (3, 3), (8, 8))
    for x in (base, base.T, base[::-1, ::2], base[:0], np.array(1.0), np.zeros((0, 3))[:, ::2]):
        assert maywrite(x)
    for view in (
        np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,)),
        np.lib.stride_tricks.as_strided(np.zeros(2), (2, 3), (8, 0)),
        windows,
    ):
        assert view.flags.writeable
        assert not maywrite(view)
    assert maywrite(np.lib.stride_tricks.as_strided(np.zeros(3), (3, 1), (8, 0)))
    assert not maywrite(np.broadcast_to(np.zeros(3), (2, 3)))
    assert not maywrite(readonly)
    assert not maywrite(1.0)
    assert not maywrite([1.0])
