"""Fixtures of the tests of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from forged import trees

from optimisers.io import save


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a file may be written."""
    return tmp_path / "file.safetensors"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a file that is whole."""
    path = tmp_path_factory.mktemp("io") / "good"
    save(path, *trees(), metadata={"epoch": 3})
    return path.read_bytes()
