"""The code in README.md and in docs/ runs, from the first block of a file to the last."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from readme import DOCUMENTS, ROOT, libraries, run_blocks


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_in_a_document_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for library in libraries(path):
        pytest.importorskip(library)
    if (
        "from numba import cuda" in path.read_text("utf-8")
        and not importlib.import_module("numba.cuda").is_available()
    ):
        pytest.skip("needs a GPU, or Numba's simulator: `make test-cuda`")
    monkeypatch.chdir(tmp_path)  # the code writes there
    assert run_blocks(path) > 3 or path.name != "README.md"
