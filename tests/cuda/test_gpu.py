"""What only a GPU can show: other libraries' arrays, their streams, arrays of billions of numbers.

`make test-gpu` runs these; PyTorch and CuPy are compared with where they are installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda")

from device import SIMULATED, needs_a_device
from numba import cuda
from util import BOTH, assert_near, example, normal, parametrize, step

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    destructure,
    setup,
    update_,
)
from optimisers._cuda import launch as _launch
from optimisers._cuda.texts import KernelSpec, KernelStep
from optimisers.rules import _base

pytestmark = [
    pytest.mark.gpu,
    needs_a_device,
    pytest.mark.skipif(SIMULATED, reason="the simulator has neither streams nor other libraries"),
]

CHAIN = OptimiserChain(ClipNorm(1.0), AccumGrad(2), Adam(0.1))


def in_torch(tree: dict[str, np.ndarray], torch: Any, device: str) -> dict[str, Any]:
    return {k: torch.tensor(x, device=device) for k, x in tree.items()}


def a_model(seed: int) -> dict[str, np.ndarray]:
    return {
        "w": normal((300, 70), np.float32, seed),
        "b": normal((70,), np.float32, seed + 1),
        "s": normal((), np.float32, seed + 2),
    }


# --- PyTorch -----------------------------------------------------------------------------------


@BOTH
@parametrize("rule", [*map(example, _base.registry()), CHAIN])
def test_tensors_of_pytorch(rule: Any, call: Any) -> None:
    torch = pytest.importorskip("torch")
    here, there = (in_torch(a_model(0), torch, device) for device in ("cpu", "cuda"))
    state_here, state_there = setup(rule, here), setup(rule, there)
    for seed in (10, 20, 30):
        grad = a_model(seed)
        state_here, here = call(state_here, here, in_torch(grad, torch, "cpu"))
        state_there, there, used = step(call, state_there, there, in_torch(grad, torch, "cuda"))
        assert set(used.values()) == {"cuda"}
    assert all(x.is_cuda for x in there.values())
    assert_near(
        {k: x.cpu().numpy() for k, x in there.items()}, {k: x.numpy() for k, x in here.items()}
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masters_of_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    rule = MixedPrecision(Adam(0.01))
    here = torch.tensor(normal((1001,), np.float32)).to(kind)
    there = here.cuda()
    state_here, state_there = setup(rule, here), setup(rule, there)
    for seed in (1, 2, 3):
        g = torch.tensor(normal((1001,), np.float32, seed)).to(kind)
        update_(state_here, here, g)
        update_(state_there, there, g.cuda())
    master = state_there.state.master.cpu().numpy()
    assert_near({"x": master}, {"x": state_here.state.master.numpy()})
    assert torch.equal(there, state_there.state.master.to(kind))


def test_a_module_is_trained_where_it_lies() -> None:
    torch = pytest.importorskip("torch")
    from optimisers.torch._optimizer import Optimizer

    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3).cuda()
    optimizer = Optimizer(module.parameters(), Adam(0.1))
    x, y = torch.randn(64, 5).cuda(), torch.randn(64, 3).cuda()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((module(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_channels_last_is_taken_as_it_lies() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(4, 3, 5, 6, device="cuda").to(memory_format=torch.channels_last)
    g = torch.randn(4, 3, 5, 6, device="cuda")
    expected = x - g
    state = setup(Descent(1.0), x)
    _, _, used = step(update_, state, x, g)
    assert used == {"(root)": "cuda"}
    assert torch.allclose(x, expected)


def test_work_is_enqueued_on_the_current_stream() -> None:
    """An update behind slow work on a stream of its own must see the work's result."""
    torch = pytest.importorskip("torch")
    n = 1 << 22
    x = torch.zeros(n, device="cuda")
    state = setup(Descent(1.0), x)
    big = torch.randn(4000, 4000, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(30):
            big = big @ big * 1e-4
        g = torch.ones(n, device="cuda") + 0 * big.flatten()[:n].nan_to_num()
        update_(state, x, g)
        assert not stream.query(), "the update has waited for the device"
        y = x.clone()
    stream.synchronize()
    assert torch.equal(y, -torch.ones_like(y))


def test_a_norm_that_does_not_throw_is_not_waited_for() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(1000, device="cuda")
    rule = OptimiserChain(ClipNorm(1.0, throw=False), Momentum())
    state = setup(rule, x)
    g = torch.ones(1000, device="cuda")
    update_(state, x, g)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    update_(state, x, g)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_a_gradient_on_another_device_names_the_path() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(3, device="cuda")
    state = setup(Descent(), {"w": x})
    with pytest.raises(ValueError, match=r"gradient at \['w'\].*on cuda:0, got one on cpu"):
        update_(state, {"w": x}, {"w": torch.ones(3)})
    with pytest.raises(ValueError, match=r"gradient at \['w'\].*got one on the host"):
        update_(state, {"w": x}, {"w": np.ones(3, np.float32)})


# --- CuPy --------------------------------------------------------------------------------------


@BOTH
@parametrize("rule", [*map(example, _base.registry()), CHAIN])
def test_arrays_of_cupy(rule: Any, call: Any) -> None:
    cupy = pytest.importorskip("cupy")
    here = a_model(0)
    there = {k: cupy.asarray(x) for k, x in here.items()}
    state_here, state_there = setup(rule, here), setup(rule, there)
    for seed in (10, 20, 30):
        grad = a_model(seed)
        state_here, here = call(state_here, here, grad)
        state_there, there, used = step(
            call, state_there, there, {k: cupy.asarray(g) for k, g in grad.items()}
        )
        assert set(used.values()) == {"cuda"}
    assert_near({k: x.get() for k, x in there.items()}, here)


def test_the_flat_vector_of_cupy_is_seen_by_the_model() -> None:
    cupy = pytest.importorskip("cupy")
    flat, re = destructure({"w": cupy.ones((4, 3)), "b": cupy.zeros(3)})
    model = re(flat)
    update_(setup(Descent(1.0), flat), flat, cupy.ones(15))
    assert_near({"w": model["w"].get()}, {"w": np.zeros((4, 3))})


def test_gradients_of_cupy_for_arrays_of_numba() -> None:
    cupy = pytest.importorskip("cupy")
    x = cuda.to_device(np.zeros(1000, np.float32))
    update_(setup(Descent(1.0), x), x, cupy.ones(1000, np.float32))
    np.testing.assert_array_equal(x.copy_to_host(), -1)


# --- Numba -------------------------------------------------------------------------------------


def test_a_stream_of_numba() -> None:
    stream = cuda.stream()
    x = cuda.to_device(np.zeros(100_000, np.float32), stream=stream)
    g = cuda.to_device(np.ones(100_000, np.float32), stream=stream)
    state = setup(Momentum(1.0), x)
    for _ in range(3):
        update_(state, x, g)
    stream.synchronize()
    np.testing.assert_allclose(x.copy_to_host(), -(1 + 1.9 + 2.71), rtol=1e-5)


def test_more_elements_than_32_bits_count() -> None:
    n = 2**31 + 12_345
    free, _ = cuda.current_context().get_memory_info()
    if free < 2.5 * 4 * n:
        pytest.skip(f"needs {2.5 * 4 * n / 2**30:.0f} GiB of the device's memory")
    x, g = (cuda.device_array(n, np.float32) for _ in range(2))
    x[...] = 1.0
    g[...] = 0.5
    for k, at in enumerate((0, 2**31 - 1, 2**31, n - 1)):
        g[at : at + 1] = float(k + 2)
    update_(setup(Descent(1.0), x), x, g)
    for k, at in enumerate((0, 2**31 - 1, 2**31, n - 1)):
        assert x[at] == 1 - (k + 2)
    assert x[2**31 + 5] == 0.5


@parametrize("rule", [Adam(), Momentum()])
def test_kernels_keep_nothing_in_local_memory(rule: Any) -> None:
    coefs = rule.coefs(1) if rule.counts else rule.coefs()
    stage = KernelStep(type(rule).step, len(rule.slots), len(coefs))
    program = KernelSpec((stage,), "float32", "float32")
    kernel = _launch.compiled(_launch.step_kernel_parts, program, False)
    assert kernel.made.local_mem_per_thread == 0
    assert kernel.made.regs_per_thread <= 80
