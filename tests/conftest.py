"""What the tests left out, and why; `--peers=required` makes a missing library an error."""

from __future__ import annotations

import gc
import importlib.util
import re
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("long", max_examples=20_000)  # for `make attack` and `make fuzz`

COUNTS: dict[str, tuple[int, int, str]] = {
    "kills": (100, 2000, "how many saves are killed or interrupted"),
    "interrupts": (40, 400, "how many instructions of a call are interrupted, of its last as many"),
    "forks": (4, 60, "how many times a process forks while something is compiled"),
    "scenarios": (100, 20_000, "how many models are updated while code of users meddles with them"),
    "seconds": (1, 20, "how long the tests of threads go on"),
}
"""What tests repeat: how often in `make test`, how often in `make attack`, and what it is.

Each is an option, and a fixture; a test that asks for one is an attack.
"""

ALONE = {"compiled", "elsewhere", "portable", "races", "racy", "sanitized", "simulated"}
"""Marks of tests that run where not all libraries are, or under checks that few libraries stand."""

MISSING = re.compile(r"could not import '([\w.]+)'")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peers",
        choices=("optional", "required"),
        default="optional",
        help="whether a test whose library is not installed is skipped or fails",
    )
    parser.addoption(
        "--attack",
        action="store_true",
        help="take the large counts, and Hypothesis's profile `long`",
    )
    for name, (usual, large, meaning) in COUNTS.items():
        text = f"{meaning} (default: {usual}, with --attack {large})"
        parser.addoption(f"--{name}", type=int, default=None, help=text)
    parser.addoption(
        "--big",
        action="store_true",
        help="whether to test arrays of more than 2^31 numbers, which takes 18 GB",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--attack"):
        settings.load_profile("long")


def _count(name: str) -> Any:
    """Return a fixture that says how often a test repeats something."""
    usual, large, meaning = COUNTS[name]

    def count(pytestconfig: pytest.Config) -> int:
        given = pytestconfig.getoption(f"--{name}")
        return (large if pytestconfig.getoption("--attack") else usual) if given is None else given

    count.__doc__ = f"Return {meaning}."
    return pytest.fixture(name=name)(count)


kills, interrupts, forks, scenarios, seconds = map(_count, COUNTS)


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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file that has none of the tests asked for, since its imports may fail there."""
    wanted = ALONE.intersection(config.option.markexpr.split(" and "))
    if not wanted or not re.fullmatch(r"test_.*\.py", collection_path.name):
        return None
    text = collection_path.read_text("utf-8")
    return not all(f"mark.{name}" in text for name in wanted) or None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark attacks; leave out examples in the docstring of a module that needs a library."""
    for item in items:
        if not COUNTS.keys().isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("attack")
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
