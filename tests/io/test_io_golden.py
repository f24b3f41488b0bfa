"""Files that earlier versions of the library wrote are read, to the last bit.

``golden/version-1.safetensors`` is what the first version of the format gives for `trees`. It is
never written anew: a change of the format gets another number, and a file beside this one.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from saved import assert_equal

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    freeze_,
    setup,
    update,
    update_,
)
from optimisers.io import File, load, save

GOLDEN = Path(__file__).parent / "golden" / "version-1.safetensors"


def trees() -> tuple[Any, Any]:
    """Return a state and a model that has something of everything, of many dtypes and layouts."""
    w = np.arange(12.0).reshape(4, 3) / 7
    back = (w * w).copy()[::-1]
    model = {
        "w": w,
        "transposed": w.T,
        "deep": [w[::-1, ::-1]],
        "first": back,
        "second": back[::-1].reshape(2, 6),
        "half": np.ones(3, np.float16),
        "fortran": np.asfortranarray(w - 1),
        "mask": np.array([True, False]),
        "z": np.array([1 + 2j]),
        "values": [None, True, 7, 2**70, 0.5, float("inf"), "tëxt\n", b"b", (), np.float32(2)],
        "keys": {3: 4, None: 5, -(2**80): 6, False: 7},
        "nodes": (OrderedDict(b=1, a=2), SimpleNamespace(x=1.5, y=np.arange(3, dtype=np.int8))),
    }
    chain = OptimiserChain(ClipNorm(p=np.inf), Momentum(0.1), Adam(0.01, (0.8, 0.9)))
    state = setup(chain, model)
    state["half"] = setup(MixedPrecision(Momentum(rho=0.25)), model["half"])
    for key in ("w", "fortran", "z"):
        for k, x in enumerate(state[key].state[1]):
            x[...] = np.arange(x.size).reshape(x.shape) + k
    freeze_(state["fortran"])
    return state, model


def test_a_file_of_version_1_is_read() -> None:
    state, model = trees()
    assert_equal(load(GOLDEN), (state, model))
    assert_equal(load(GOLDEN, like=(state, model)), (state, model))
    with File(GOLDEN) as file:
        file.verify()
        assert file.metadata == {"epoch": 3}
        assert_equal(file["model.w"], model["w"])


def test_what_is_written_today_is_the_same_file(tmp_path: Path) -> None:
    save(tmp_path / "file", *trees(), metadata={"epoch": 3})
    assert (tmp_path / "file").read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize("library", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("given", [False, True])
def test_a_sum_that_was_kept_in_half_precision_goes_on(
    library: str, given: bool, tmp_path: Path
) -> None:
    """As `AccumGrad` once did; with `like` of today, too."""
    xp = pytest.importorskip(library)
    xp = xp.numpy if library == "jax" else xp

    def half(*values: float) -> Any:
        return xp.asarray(values, dtype=xp.float16)

    today = {"w": half(0, 0)}
    rule = OptimiserChain(AccumGrad(3), Descent(1.0))
    state, _ = update(setup(rule, today), today, {"w": half(30000, 1)})
    held, _ = state["w"].state
    state["w"].state = held._replace(sum=half(30000, 1)), ()
    path = tmp_path / "old.safetensors"
    save(path, state, today)

    like = setup(rule, today), today
    state, model = load(path, like if given else None)
    for _ in range(2):
        state, model = update_(state, model, {"w": np.array([60000, 1])})
    assert np.allclose([*map(float, model["w"])], [-50000, -1], rtol=1e-3)
    assert "float32" in str(state["w"].state[0].sum.dtype)

    other = setup(OptimiserChain(AccumGrad(3), Momentum()), today), today
    with pytest.raises(ValueError, match="does not fit"):
        load(path, other)
