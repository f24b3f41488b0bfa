"""The code in README.md and in docs/, for the tests that run it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


def libraries(path: Path) -> list[str]:
    """Return the libraries that the code in a document imports."""
    return [
        name for code in BLOCK.findall(path.read_text("utf-8")) for name in IMPORT.findall(code)
    ]


def run_blocks(path: Path) -> int:
    """Run the code in a document, from the first block to the last, and return their number."""
    text = path.read_text("utf-8")
    names = {"__name__": path.stem}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that a traceback names the line there
        exec(compile("\n" * above + block[1], path, "exec", dont_inherit=True), names)
    return len(blocks)
