"""Print what keeps pip to the oldest versions that pyproject.toml admits.

    python tools/floors.py oldest

With another word nothing is printed: the newest may come.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
    if ">=" in requirement and sys.argv[1:] == ["oldest"]:
        print(requirement.replace(">=", "=="))
