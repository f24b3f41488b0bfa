"""Tensors of PyTorch through the CUDA kernels, without a GPU: the simulator reads host memory.

What says whether a tensor lies on a device is put aside, so that those of the host take its way.
Their streams alone are not there to be tested.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda")
torch = pytest.importorskip("torch")

from device import SIMULATED  # noqa: E402
from util import BOTH, PUBLIC, assert_near, decomposes, example, normal, parametrize, step  # noqa: E402

from optimisers import (  # noqa: E402
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    setup,
    update_,
)
from optimisers._arrays import torch as _torch  # noqa: E402
from optimisers.rules._program import program_of  # noqa: E402

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(not SIMULATED, reason="needs Numba's simulator"),
    pytest.mark.usefixtures("small_grid"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch.Torch, "is_on_device", lambda self, x: x.ndim > 0)  # not counts
    monkeypatch.setattr(_torch.Torch, "device", lambda self, x: 0)
    monkeypatch.setattr(_torch.Torch, "stream", lambda self, x: 0)
    monkeypatch.setattr(_torch, "_viewer", lambda: None)
    monkeypatch.setattr(_torch, "view", lambda x: x if type(x) is np.ndarray else None)


def tensors(tree: dict[str, np.ndarray]) -> dict[str, Any]:
    return {k: torch.tensor(x) for k, x in tree.items()}


def a_model(seed: int) -> dict[str, np.ndarray]:
    return {"w": normal((4, 3), np.float32, seed), "b": normal((3,), np.float32, seed + 1)}


@pytest.mark.slow
@BOTH
@parametrize("rule", [*map(example, PUBLIC), OptimiserChain(AccumGrad(2), Adam())])
def test_every_rule(rule: Any, call: Any) -> None:
    measures = getattr(rule, "measure", None) is not None
    has_kernels = program_of(rule) is not None and (not measures or rule._measured_by_cuda)
    here, there = a_model(0), tensors(a_model(0))
    state_here, state_there = setup(rule, here), setup(rule, there)
    for seed in (10, 20, 30):
        state_here, here = call(state_here, here, a_model(seed))
        state_there, there, used = step(call, state_there, there, tensors(a_model(seed)))
        assert set(used.values()) == {"cuda" if has_kernels else "arrays"}
    if not decomposes(rule):
        assert_near({k: x.numpy() for k, x in there.items()}, here)


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masters(dtype: str, call: Any) -> None:
    kind = getattr(torch, dtype)
    x = torch.tensor(normal((11,), np.float32)).to(kind)
    rule = MixedPrecision(OptimiserChain(ClipNorm(1.0, np.inf), Adam(0.1)))
    state = setup(rule, x)
    master = state.state.master.clone()
    for seed in (1, 2):
        g = torch.tensor(normal((11,), np.float32, seed)).to(kind)
        state, x, used = step(call, state, x, g)
        assert used == {"(root)": "cuda"}
    assert torch.equal(x, state.state.master.to(kind))
    assert not torch.equal(master, state.state.master)


def test_a_parameter_that_got_other_memory_is_found_there() -> None:
    x = torch.nn.Parameter(torch.zeros(5))
    state = setup(Descent(1.0), x)
    g = torch.ones(5)
    for _ in range(2):
        update_(state, x, g)
    old = x.data
    x.data = torch.full((5,), 10.0)
    update_(state, x, g)
    assert torch.equal(old, torch.full((5,), -2.0))
    assert torch.equal(x.detach(), torch.full((5,), 9.0))
    for value in (2.0, 3.0):  # as after zero_grad: another tensor each time
        update_(state, x, torch.full((5,), value))
    assert torch.equal(x.detach(), torch.full((5,), 4.0))


@BOTH
@parametrize("steps", [0, 1, 3])
@parametrize("which", ["parameter", "gradient", "a new gradient", "state"])
@parametrize("left", [0, 8])
def test_memory_that_was_given_back_is_refused_at_each_step(
    call: Any, which: str, left: int, steps: int
) -> None:
    x, g, other = torch.ones(50), torch.full((50,), 0.5), torch.full((50,), 0.25)
    state = setup(Momentum(1.0, 0.5), {"w": x})
    for _ in range(steps):
        update_(state, {"w": x}, {"w": g})
    slot = state["w"].state.v
    gone = {"parameter": x, "gradient": g, "a new gradient": other, "state": slot}[which]
    gone.untyped_storage().resize_(left)
    given = other if which == "a new gradient" else g
    refused = rf"{which.split()[-1]} at \['w'\]: .*storage was given back"
    with pytest.raises(ValueError, match=refused):
        call(state, {"w": x}, {"w": given})


def test_a_parameter_that_leaves_the_device_is_updated_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(5)
    state = setup(Descent(1.0), {"w": x})
    used = [step(update_, state, {"w": x}, {"w": torch.ones(5)})[2] for _ in range(2)]
    monkeypatch.undo()
    used += [step(update_, state, {"w": x}, {"w": torch.ones(5)})[2] for _ in range(2)]
    assert used[:2] == [{"['w']": "cuda"}] * 2
    assert used[3] == {"['w']": "kernels"}
    assert torch.equal(x, torch.full((5,), -4.0))


@BOTH
def test_parameters_stay_parameters(call: Any) -> None:
    x = torch.nn.Parameter(torch.ones(5))
    _, new = call(setup(Descent(1.0), x), x, torch.ones(5))
    assert isinstance(new, torch.nn.Parameter)
    assert new.requires_grad
    assert torch.equal(new.detach(), torch.zeros(5))
    version = x._version
    call(setup(Descent(1.0), x), x, torch.ones(5))
    assert (x._version > version) is (call is update_)
