"""The benchmarks run, on tiny sizes, with and without the libraries they compare with.

What they measure is not looked at: no test depends on the speed of a machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from optimisers import ElementwiseRule
from optimisers.rules._base import registry

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "asv_bench"
ELEMENTWISE = [
    cls.__name__ for cls in registry() if issubclass(cls, ElementwiseRule) and cls.measure is None
]

WITHOUT_PEERS = """
import runpy, sys
for peer in ("torch", "jax", "optax", "ml_dtypes"):
    sys.modules[peer] = None  # now an import of it fails
sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--quick", "--no-write"]
runpy.run_path(sys.path[0] + "/side_by_side.py", run_name="__main__")
"""


def output_of(*args: object, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, encoding="utf-8", **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tables_in(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of each table of a Markdown page, by their heading; all are as wide."""
    tables: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            tables.setdefault(heading, []).append([c.strip() for c in line.split("|")[1:-1]])
    for heading, (head, rule, *rows) in tables.items():
        assert all(cell == "---" for cell in rule), heading
        assert rows, heading
        assert {len(row) for row in rows} == {len(head)} == {len(rule)}, heading
        tables[heading] = [head, *rows]
    return tables


def table_about(what: str, page: str) -> list[list[str]]:
    (found,) = [rows for heading, rows in tables_in(page).items() if what in heading]
    return found


@pytest.fixture(scope="module")
def alone() -> str:
    """Return the page as it is where no peer is installed."""
    return output_of("-c", WITHOUT_PEERS, BENCH)


def test_without_peers_their_columns_are_dashes(alone: str) -> None:
    head, *rows = table_about("Adam, float32", alone)
    assert head[1:3] == ["optimisers", "NumPy, in place"]
    for row in rows:
        assert row[3:] == ["–"] * 3
        assert "–" not in row[1:3]
    goals = [row for row in table_about("Goals", alone)[1:] if "PyTorch" in row[1]]
    assert any(row[2] == "–" for row in goals)
    assert all("✓" not in "".join(row) for row in goals if row[2] == "–")


def test_every_elementwise_rule_has_its_row(alone: str) -> None:
    rows = table_about("Every elementwise rule", alone)[1:]
    assert [row[0].strip("`") for row in rows] == ELEMENTWISE


def test_the_page_names_the_machine_but_no_path(alone: str) -> None:
    facts = dict(table_about("How fast it is", alone)[1:])
    assert {"processor", "cores, threads", "kernels", "versions"} <= facts.keys()
    assert "-ffp-contract=off" in facts["kernels"]
    assert str(BENCH.parent) not in alone


def test_beside_peers_with_a_picture(tmp_path: Path) -> None:
    for peer in ("torch", "jax", "optax", "matplotlib"):
        pytest.importorskip(peer)
    page = output_of(BENCH / "side_by_side.py", "--quick", "--out", tmp_path)
    assert (tmp_path / "benchmarks.md").read_text(encoding="utf-8") + "\n" == page
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    assert "(benchmarks.png)" in page
    for row in table_about("Adam, float32", page)[1:]:
        assert all("×" in cell for cell in row[2:])
    for row in table_about("Goals", page)[1:]:
        assert row[2] != "–"
        assert {cell[-1] for cell in row[3:] if cell} <= {"✓", "✗"}
    by_rule = {row[0].strip("`"): row for row in table_about("Every elementwise rule", page)[1:]}
    assert "×" in by_rule["Momentum"][2]
    assert by_rule["Lion"][2] == "–"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import report

    return report


def test_verdicts_are_computed(report: ModuleType) -> None:
    faster = report.Goal("work", "times as fast", 1.3, 1.3, 1.5)
    assert faster.cells() == ["work", "times as fast", "1.30×", "≥ 1.30× ✓", "≥ 1.50× ✗"]
    slower = report.Goal("work", "time", 0.02, 0.01, None, report.duration, less=True)
    assert slower.cells() == ["work", "time", "20 ms", "≤ 10 ms ✗", ""]
    unknown = report.Goal("work", "times as fast", None, 1.3, None)
    assert unknown.cells()[2:] == ["–", "≥ 1.30× –", ""]
    assert "1 of 2 figures" in report.summary([faster, slower, unknown])
    assert report.summary([faster, slower, unknown]).endswith("Missed musts: work, time.")


def test_numbers_are_written_in_the_unit_that_suits_them(report: ModuleType) -> None:
    seconds = [0.0, 2.5e-7, 1.234e-6, 9.999e-4, 0.0123, 3.0]
    shown = ["0 µs", "0.25 µs", "1.23 µs", "1 ms", "12.3 ms", "3 s"]
    assert [report.duration(s) for s in seconds] == shown
    assert [report.counted(n) for n in (10, 1_000, 30_000, 10_000_000)] == [
        "10",
        "1,000",
        "30,000",
        "10 M",
    ]


def test_ratios_are_taken_within_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from benchmarks.measure import Times

    times = Times({"ours": [1.0, 9.0, 2.0], "peer": [2.0, 2.0, 8.0]})
    assert times == {"ours": 2.0, "peer": 2.0}
    assert times.ratio("peer", "ours") == 2.0
    assert times.ratio("ours", "peer") == 0.5


def test_every_row_of_the_goals_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from benchmarks import goals

    monkeypatch.setattr(goals.LargeRule, "size", 100)
    ran = set()
    for name, work in vars(goals).items():
        if not (isinstance(work, type) and hasattr(work, "params")):
            continue
        sides, *others = work.params
        smallest = [values[0] for values in others]
        for side in sides:
            if name in ("Compilation", "AfterGradient"):  # they compile, or multiply large matrices
                continue
            benchmark = work()
            try:
                benchmark.setup(side, *smallest)
            except NotImplementedError:
                continue
            benchmark.time_step(side, *smallest)
            ran.add((name, side))
            getattr(benchmark, "teardown", lambda *_: None)(side, *smallest)
    ours = {name for name, _ in ran}
    assert {"Adam", "Chain", "LargeRule", "Pure", "Watched", "Team", "Leaves"} <= ours
    assert ("Leaves", "save") in ran


def test_asv_takes_the_suite(tmp_path: Path) -> None:
    pytest.importorskip("asv")
    home = {**os.environ, "HOME": str(tmp_path)}
    said = output_of("-m", "asv", "check", "-E", "existing", cwd=BENCH, env=home)
    assert "No problems found" in said
