"""What the tests left out, and why; `--peers=required` makes a missing library an error."""

from __future__ import annotations

import gc
import importlib.util
import re
from collections import Counter
from collections.abc import Generator

import pytest
from hypothesis import settings

settings.register_profile("long", max_examples=20_000)  # for `make fuzz`

MISSING = re.compile(r"could not import '([\w.]+)'")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peers",
        choices=("optional", "required"),
        default="optional",
        help="whether a test whose library is not installed is skipped or fails",
    )
    parser.addoption(
        "--threads-seconds",
        type=float,
        default=1.0,
        help="how long the tests of threads train",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=100,
        help="how many saves are killed or interrupted",
    )
    parser.addoption(
        "--interrupts",
        type=int,
        default=40,
        help="how many instructions of a call are interrupted, and of its last ones as many",
    )
    parser.addoption(
        "--forks",
        type=int,
        default=4,
        help="how many times a process forks while something is compiled",
    )
    parser.addoption(
        "--big",
        action="store_true",
        help="whether to test arrays of more than 2^31 numbers, which takes 18 GB",
    )


@pytest.fixture
def kills(pytestconfig: pytest.Config) -> int:
    """Return how many saves a test kills or interrupts."""
    return int(pytestconfig.getoption("--kills"))


@pytest.fixture
def interrupts(pytestconfig: pytest.Config) -> int:
    """Return how many instructions of a call a test interrupts."""
    return int(pytestconfig.getoption("--interrupts"))


@pytest.fixture
def forks(pytestconfig: pytest.Config) -> int:
    """Return how many times a process forks in a test."""
    return int(pytestconfig.getoption("--forks"))


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test, or a file of tests, was skipped."""
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return why.removeprefix("Skipped: ")


def demand_peers(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    """Turn a skip for want of a library into a failure, where libraries are required."""
    if report.skipped and config.getoption("--peers") == "required":
        missing = MISSING.search(skip_reason(report))
        if missing:
            report.outcome = "failed"
            report.longrepr = f"{missing[1]} is required here; `make oracles` installs it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the examples in the docstrings of a module named like a library not installed."""
    for item in items:
        name = item.path.stem
        of_a_peer = isinstance(item, pytest.DoctestItem) and name in ("optax", "scipy", "torch")
        if of_a_peer and importlib.util.find_spec(name) is None:
            item.add_marker(pytest.mark.skip(reason=f"could not import {name!r}"))


def pytest_collection_finish() -> None:
    """Spare `gc.collect` in the tests what is there by now: millions of objects that stay."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    demand_peers(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    demand_peers(report, collector.config)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section("left out")
    for reason, count in Counter(map(skip_reason, skipped)).most_common():
        missing = MISSING.search(reason)
        if missing:
            reason = f"{missing[1]} is not installed; `make oracles` installs what we compare with"
        terminalreporter.write_line(f"{count:5d} skipped: {reason}")
