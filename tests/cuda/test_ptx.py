"""What kernels are compiled to, for GPUs that need not be here.

Runs in a process of its own, without the simulator: Numba is told of a device that is not there.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda")
nvjitlink = pytest.importorskip("cuda.bindings.nvjitlink")

from device import reports  # noqa: E402
from numba import config, cuda  # noqa: E402
from util import ELEMENTWISE, example, parametrize  # noqa: E402

from optimisers import rules  # noqa: E402
from optimisers._cuda import launch as _launch  # noqa: E402
from optimisers._cuda.texts import KernelSpec, KernelStep, sums_of_norm  # noqa: E402
from optimisers.rules.norms import Scaling  # noqa: E402

if config.ENABLE_CUDASIM:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

pytestmark = pytest.mark.compiled

ARCHITECTURES = [(8, 0), (9, 0)]
REALS = ["float32", "float64"]
MOST_REGISTERS = 80
"""With no more, an SM of either architecture holds 768 threads, each with at least two accesses of
128 bits under way: twice what its share of the memory's bandwidth needs."""


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba.cuda.dispatcher as dispatcher

    there = SimpleNamespace(compute_capability=ARCHITECTURES[0])
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: there)


def stage(rule: Any) -> KernelStep:
    coefs = rule.coefs(1) if rule.counts else rule.coefs()
    return KernelStep(type(rule).step, len(rule.slots), len(coefs))


def barrier(p: float) -> KernelStep:
    return KernelStep(Scaling.step, 0, 1, p)


def ptx_of(parts: tuple[str, dict[str, Any], list[str]], cc: tuple[int, int]) -> str:
    text, names, types = parts
    made, _ = cuda.compile_ptx(_launch.function_of(text, names), _launch.signature(types), cc=cc)
    return str(made)


def opcodes(ptx: str) -> set[str]:
    """Return the instructions of a text; registers are called after types, too."""
    return {*re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]+)\s", ptx, re.MULTILINE)}


def linked(ptx: str, cc: tuple[int, int]) -> tuple[int, int]:
    """Return how many registers a thread takes, and how many bytes it spills."""
    options = [f"-arch=sm_{cc[0]}{cc[1]}", "-verbose", "-Xptxas=-v"]
    handle = nvjitlink.create(len(options), options)
    text = ptx.encode()
    nvjitlink.add_data(handle, nvjitlink.InputType.PTX, text, len(text), "kernel")
    nvjitlink.complete(handle)
    log = bytearray(nvjitlink.get_info_log_size(handle))
    nvjitlink.get_info_log(handle, log)
    said = log.decode()
    spilt = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    (registers,) = re.findall(r"Used (\d+) registers", said)
    return int(registers), spilt


def check(name: str, parts: Any, real: str, wide: bool, most: int = MOST_REGISTERS) -> set[str]:
    """Compile for each architecture, and return the instructions.

    Parameters
    ----------
    name : str
        For the report.
    parts
        What `_cuda.Kernel` takes.
    real : str
        The dtype that is computed in.
    wide : bool
        Whether other dtypes than `real` are computed in, too.
    most : int
        The most registers.
    """
    found: set[str] = set()
    taken = []
    for cc in ARCHITECTURES:
        ptx = ptx_of(parts, cc)
        found |= opcodes(ptx)
        assert not re.search(r"\.local\b", ptx), "a kernel keeps nothing in local memory"
        power = "__internal_accurate_pow" in ptx  # of libdevice, which is a function of its own
        assert power or not re.search(r"\bcall\b", ptx), "all functions are part of the kernel"
        registers, spilt = linked(ptx, cc)
        assert spilt == 0
        assert registers <= most
        taken.append(f"{registers:3d} registers on sm_{cc[0]}{cc[1]}")
    double = {op for op in found if op.endswith("f64")}
    if real == "float32" and not wide:
        assert not double
    elif real == "float64" and not wide:
        assert double
        assert not {op for op in found if op.endswith(".f32")}
    reports.append(f"{real}  {', '.join(taken)}  {name}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("real", REALS)
@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
def test_every_rule(rule: Any, real: str) -> None:
    parts = _launch.step_kernel_parts(KernelSpec((stage(rule),), real, real), False)
    found = check(type(rule).__name__, parts, real, wide=False)
    lanes = {"float32": "v4.f32", "float64": "v2.f64"}[real]
    assert f"ld.global.{lanes}" in found
    assert f"st.global.{lanes}" in found


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("varied", [False, True])
def test_a_chain_of_three_is_one_kernel(real: str, varied: bool) -> None:
    chain = tuple(map(stage, (rules.ClipGrad(), rules.WeightDecay(), rules.Adam())))
    parts = _launch.step_kernel_parts(KernelSpec(chain, real, real), varied)
    found = check(f"ClipGrad, WeightDecay, Adam{' (varied)' * varied}", parts, real, wide=False)
    assert any(op.startswith("sqrt.rn") for op in found)


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_masters_of_narrow_parameters(narrow: str) -> None:
    program = KernelSpec((stage(rules.Adam()),), "float32", narrow, narrow)
    parts = _launch.step_kernel_parts(program, False)
    found = check(f"MixedPrecision(Adam) of {narrow}", parts, "float32", wide=False)
    assert {"ld.global.v4.u16", "st.global.v4.u16"} <= found


@pytest.mark.slow
def test_a_gradient_of_another_dtype_is_read_as_it_is() -> None:
    program = KernelSpec((stage(rules.Descent()),), "float32", "float64")
    found = check("Descent of float64", _launch.step_kernel_parts(program, False), "float32", True)
    assert {op for op in found if op.endswith("f64")} <= {
        "ld.global.f64",
        "ld.global.v2.f64",
        "cvt.rn.f32.f64",
    }


@pytest.mark.slow
@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("p", [2.0, 3.0, 0.5, 0.0, 1.0, np.inf, -np.inf, -2.0])
def test_norms(p: float, real: str) -> None:
    program = KernelSpec((stage(rules.Momentum()), barrier(p), stage(rules.Adam())), real, real)
    kinds = sums_of_norm(p, real)
    for kind in kinds:
        measure = _launch.measure_kernel_parts(program, False, 0, p, kind)
        found = check(f"norm {p:g}, {kind}", measure, real, True)
        assert "bar.sync" in found
        is_last = kind is kinds[-1]
        combine = _launch.combine_kernel_parts(real, p, kind, is_last)
        check(f"norm {p:g}, {kind}, combined", combine, real, True)


@pytest.mark.slow
def test_no_stage_is_stored_while_a_norm_is_measured() -> None:
    program = KernelSpec((stage(rules.Adam()), barrier(2.0)), "float32", "float32")
    parts = _launch.measure_kernel_parts(program, False, 0, 2.0, "squares")
    stores = {op for op in opcodes(ptx_of(parts, (9, 0))) if op.startswith("st.global")}
    assert stores == {"st.global.f64"}  # the sum of a block
