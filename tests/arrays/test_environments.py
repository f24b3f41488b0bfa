"""The bits of a step in any floating-point environment: flushed denormals, other roundings."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from util import (
    BOTH,
    EVERY_ELEMENTWISE,
    EXACT_CHAINS,
    LAYOUTS,
    assert_same_bits,
    layouts_of,
    many,
    normal,
    parametrize,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    set_num_threads,
    setup,
    update,
    update_,
)
from optimisers._engine import cpu

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="knows the registers of x86 alone",
)
FLUSH, UPWARD = 0x8040, 0x4000  # bits of MXCSR
ROUNDINGS = 0x0000, 0x0400, 0x0800, 0x0C00  # to nearest, down, up, towards zero: as fesetround


class environment:  # noqa: N801, a context
    """Sets bits of MXCSR in this thread, and how the older unit of x86 rounds."""

    def __init__(self, bits, rounding=0):
        self.bits, self.rounding = bits | rounding << 3, rounding
        self.libm = ctypes.CDLL("libm.so.6")

    def __enter__(self):
        self.before = (ctypes.c_uint32 * 8)()
        self.libm.fegetenv(self.before)
        odd = (ctypes.c_uint32 * 8)(*self.before)
        odd[0] |= self.rounding
        odd[7] |= self.bits
        self.libm.fesetenv(odd)

    def __exit__(self, *error):
        now = (ctypes.c_uint32 * 8)()
        self.libm.fegetenv(now)
        self.libm.fesetenv(self.before)
        assert now[7] & 0xE040 == self.bits | (self.before[7] & 0xE040), "not given back"
        assert now[0] & 0x0C00 == self.rounding | (self.before[0] & 0x0C00), "not given back"


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Let even small arrays fill several blocks, and several threads."""
    *blocks, traffic = cpu.kernels.settings()
    cpu.kernels.set_block(32)
    cpu.kernels.set_work_per_thread(64)
    yield
    cpu.kernels.set_block(*blocks)
    cpu.kernels.set_work_per_thread(traffic)


@pytest.fixture(autouse=True)
def _threads():
    yield
    set_num_threads(0)


@parametrize("bits", [FLUSH, UPWARD, FLUSH | UPWARD])
@parametrize("threads", [1, 3])
@parametrize("dtype", ["float32", "float64", "float16"])
@BOTH
def test_the_bits_of_tiny_numbers(call, dtype, threads, bits):
    set_num_threads(threads)
    tiny = np.finfo(dtype).smallest_subnormal
    rule = OptimiserChain(ClipNorm(3.0), Adam(0.1))

    def made(seed, scale=100):
        return (normal(1000, np.float64, seed) * scale * float(tiny)).astype(dtype)

    def trained(rule, odd, names=None):
        model = {name: made(1) for name in names} if names else made(1)
        state = setup(rule, model)
        for k in range(3):
            grad = {name: made(k, 50) for name in names} if names else made(k, 50)
            with environment(bits) if odd else contextlib.nullcontext():
                state, model = call(state, model, grad)
        return [state, model]

    results = []
    for odd in (False, True):
        rules = rule, Momentum(), MixedPrecision(rule), AccumGrad(2)
        results.append([trained(each, odd) for each in rules] + [trained(rule, odd, "ab")])
    assert_same_bits(*results)


RULES = [*EVERY_ELEMENTWISE, *EXACT_CHAINS, *map(ClipNorm, (0.5, 1e3))]
RULES += [MixedPrecision(dtype, Adam()) for dtype in ("float32", "float64")]
DTYPES = [np.float16, np.float32, np.float64, np.longdouble, np.complex64, np.complex128]
DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]


@many
@given(
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
    bits=st.sampled_from([0, FLUSH, 0x8000, 0x0040]),
    rounding=st.sampled_from(ROUNDINGS),
    threads=st.sampled_from([1, 2, 3, 4]),
    call=st.sampled_from([update, update_]),
)
def test_the_bits_of_any_step(rule, dtype, data, bits, rounding, threads, call):
    set_num_threads(threads)
    size = data.draw(st.sampled_from([1, 7, 33, 200, 3000]))
    power = data.draw(st.sampled_from([0, 0, -2, 3, -8, -37, -44, -307, -320]))
    layout = LAYOUTS[data.draw(st.sampled_from([x for x in layouts_of(dtype) if x != "read-only"]))]

    def made(seed):
        with np.errstate(all="ignore"):
            return (normal(size, np.float64, seed) * 10.0**power).astype(dtype)

    def trained(within):
        with np.errstate(all="ignore"):
            model = layout(made(1))
            state = setup(rule, model)
            for k in range(3):
                g = made(k + 2)
                with within():
                    state, model = call(state, model, g)
        return [state, model]

    try:
        usual = trained(contextlib.nullcontext)
    except FloatingPointError:  # an infinite norm
        return
    except (TypeError, ValueError) as error:
        if "real parameters" in str(error) or "overlap" in str(error):
            return
        raise
    assert_same_bits(trained(lambda: environment(bits, rounding)), usual)


@parametrize("bits", [FLUSH, UPWARD])
@parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_the_bits_of_a_step_of_an_optimizer_of_torch(dtype, bits):
    torch = pytest.importorskip("torch")
    from optimisers.torch._optimizer import Optimizer

    kind = getattr(torch, dtype)
    numbers = torch.tensor(normal(500, np.float64) * 1e-3).to(kind)
    tiny = torch.tensor(normal(500, np.float64, 1) * np.float64(1e-40)).to(kind)

    def trained(rule, odd):
        p = torch.nn.Parameter(numbers.clone())
        optimizer = Optimizer([p], rule)
        for k in range(3):
            p.grad = (tiny, numbers)[k % 2].clone()
            with environment(bits) if odd else contextlib.nullcontext():
                optimizer.step()
        kept = [p.detach(), *optimizer.state[p].values()]
        whole = [torch.view_as_real(x) if x.is_complex() else x for x in kept]
        return [bytes(x.contiguous().view(-1).view(torch.uint8).numpy()) for x in whole]

    for rule in (Momentum(), OptimiserChain(AccumGrad(2), Adam(0.1)), MixedPrecision(Adam())):
        assert trained(rule, odd=True) == trained(rule, odd=False)


def test_a_master_copy_is_rounded_to_nearest():
    x = normal(100, np.float64)
    with environment(UPWARD, 0x0800):
        state = setup(MixedPrecision("float32", Momentum()), x)
    assert_same_bits(state.state.master, x.astype("float32"))
