"""What the tests of device arrays share; `make test-cuda` and `make test-gpu` run them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from device import SIMULATED, reports


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if reports:
        terminalreporter.section("kernels")
        for line in sorted(reports):
            terminalreporter.write_line(line)


@pytest.fixture
def small_grid() -> Iterator[None]:
    """Cut arrays into many small stretches: each simulated thread takes half a millisecond."""
    from optimisers import _cuda

    before = _cuda.set_grid(2, 8) if SIMULATED else _cuda.set_grid(32, 64)
    yield
    _cuda.set_grid(*before)
