"""The code in docs/how-to/gpu.md runs, on a GPU and in Numba's simulator."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")

from device import needs_a_device
from readme import ROOT, run_blocks

pytestmark = [pytest.mark.simulated, needs_a_device]


def test_the_code_of_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the code writes there
    run_blocks(ROOT / "docs" / "how-to" / "gpu.md")
