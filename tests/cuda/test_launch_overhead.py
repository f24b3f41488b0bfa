"""The measurement of what a step of device arrays costs on the host runs, on small sizes.

It needs no GPU, but a process of its own, since a stub takes the place of Numba's driver. It checks
itself that a step is one launch, and how many functions of Python it calls; how long that takes is
not looked at here: no test depends on the speed of a machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")

pytestmark = [pytest.mark.compiled, pytest.mark.slow]

COMMAND = Path(__file__).parents[2] / "asv_bench" / "launch_overhead.py"


def test_a_step_is_one_launch() -> None:
    run = subprocess.run(
        [sys.executable, str(COMMAND), "--quick"], capture_output=True, text=True, check=True
    )
    times = {line[:24].strip(): line[24:].split() for line in run.stdout.splitlines()[1:]}
    assert {"Descent", "Adam", "chain of three"} <= times.keys()
    assert all(float(time) > 0 for row in times.values() for time in row)
