"""The code in docs/how-to/gpu.md runs, on a GPU and in Numba's simulator."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")

import test_readme
from device import needs_a_device

pytestmark = needs_a_device


def test_the_code_of_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = test_readme.ROOT / "docs" / "how-to" / "gpu.md"
    test_readme.test_the_code_in_a_document_runs(page, monkeypatch, tmp_path)
