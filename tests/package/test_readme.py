"""The code in README.md and in docs/ runs, from the first block of a file to the last."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_in_a_document_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) > 3 or path.name != "README.md"
    for block in blocks:
        for library in IMPORT.findall(block[1]):
            pytest.importorskip(library)
    if (
        "from numba import cuda" in text
        and not importlib.import_module("numba.cuda").is_available()
    ):
        pytest.skip("needs a GPU, or Numba's simulator: `make test-cuda`")
    monkeypatch.chdir(tmp_path)  # what the code writes, it writes there
    names = {"__name__": path.stem}
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that a traceback names the line there
        exec(compile("\n" * above + block[1], path, "exec", dont_inherit=True), names)
