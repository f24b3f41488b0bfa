"""The code in README.md runs, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_code_in_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) > 5
    names = {"__name__": "readme"}
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that a traceback names the line there
        exec(compile("\n" * above + block[1], README, "exec", dont_inherit=True), names)
