"""What the tests of device arrays share; `make test-cuda` and `make test-gpu` run them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from device import SIMULATED, reports


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended = terminalreporter.stats.get("", [])  # setups and teardowns
    told = {line for report in ended for what, line in report.user_properties if what == "kernel"}
    if told:
        terminalreporter.section("kernels")
        for line in sorted(told):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _hand_on_what_is_reported(request: pytest.FixtureRequest) -> Iterator[None]:
    """Send the lines along with the result, which may come from another process."""
    yield
    request.node.user_properties += [("kernel", line) for line in reports]
    reports.clear()


@pytest.fixture
def small_grid() -> Iterator[None]:
    """Cut arrays into many small stretches: each simulated thread takes half a millisecond."""
    from optimisers._cuda import launch as _launch

    before = _launch.set_grid(2, 8) if SIMULATED else _launch.set_grid(32, 64)
    yield
    _launch.set_grid(*before)
