"""Arrays of more than 2^31 numbers: no index may be kept in 32 bits.

They need 18 GB and some minutes, so they run by `make big` alone.
"""

from __future__ import annotations

import numpy as np
import pytest

from optimisers import (
    ClipNorm,
    Descent,
    MixedPrecision,
    OptimiserChain,
    destructure,
    setup,
    update_,
)
from optimisers._engine import advance as engine
from optimisers._engine import cpu

pytestmark = pytest.mark.big

LONG = 2**31 + 5
"""Numbers in the arrays; the last are beyond what 32 bits can count, signed."""
WHERE = [0, 1, 2**31 - 1, 2**31, LONG - 1]


@pytest.fixture(autouse=True)
def _big(request):
    if not request.config.getoption("--big"):
        pytest.skip("needs 18 GB and some minutes: `make big`")


def sparse(dtype):
    """Return a gradient that is zero but at some places; the zeros take no memory until read."""
    g = np.zeros(LONG, dtype)
    g[WHERE] = [1, 2, 3, 4, 5]
    return g


def kernels_update(state, x, g):
    with engine.watching() as seen:
        update_(state, x, g)
    assert seen == [(0, "kernels")]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_and_a_norm(threads):
    cpu.set_num_threads(threads)
    try:
        x, g = np.zeros(LONG, np.float32), sparse(np.float32)
        norm = np.sqrt(1.0 + 4 + 9 + 16 + 25)
        kernels_update(setup(OptimiserChain(ClipNorm(1.0), Descent(1.0)), x), x, g)
    finally:
        cpu.set_num_threads(0)
    np.testing.assert_allclose(x[WHERE], -g[WHERE] / norm, rtol=1e-6)
    assert np.count_nonzero(x) == len(WHERE)


def test_a_gradient_that_is_the_parameter():
    """It is copied, whole, before it is written over."""
    x = sparse(np.float32)
    kernels_update(setup(Descent(0.5), x), x, x)
    assert x[WHERE].tolist() == [0.5, 1, 1.5, 2, 2.5]
    assert np.count_nonzero(x) == len(WHERE)


def test_half_precision_over_a_master_copy():
    x = np.zeros(LONG, np.float16)
    state = setup(MixedPrecision(Descent(1.0)), x)
    kernels_update(state, x, sparse(np.float16))
    assert x[WHERE].tolist() == [-1, -2, -3, -4, -5]
    assert np.count_nonzero(x) == len(WHERE)


def test_the_flat_vector():
    """Two arrays of which the second begins beyond 2^31 numbers."""
    model = {"long": np.zeros(LONG, np.float16), "short": np.arange(3, dtype=np.float16)}
    flat, re = destructure(model)
    del model["long"]
    assert len(re) == flat.size == LONG + 3
    assert flat[-3:].tolist() == [0, 1, 2]
    flat[LONG - 1] = 7
    again = re(flat)
    assert again["long"][-1] == 7
    assert again["long"].size == LONG
    again["short"][2] = 9
    assert flat[-1] == 9
    state = setup(Descent(1.0), again)
    with pytest.raises(ValueError, match=rf"shape \({LONG},\)"):
        update_(state, again, {"long": np.ones(3)})
    assert re.flatten_gradient({"short": np.ones(3)})[-4:].tolist() == [0, 1, 1, 1]


def test_many_arrays_beyond_32_bits_together():
    model = {k: np.zeros(2**26, np.float32) for k in range(33)}
    assert sum(x.size for x in model.values()) > 2**31
    grad = dict.fromkeys(model, np.ones(2**26, np.float32))
    update_(setup(Descent(1.0), model), model, grad)
    assert all((x == -1).all() for x in model.values())
