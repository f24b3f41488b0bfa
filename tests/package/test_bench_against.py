"""The comparison with another revision: its rows run, and its verdict is right; no timings."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def bench_against(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "asv_bench"))
    return pytest.importorskip("bench_against")


def test_every_row_runs(bench_against) -> None:
    rows = importlib.import_module("benchmarks.against").rows(quick=True)
    for name in ["Descent: 10", "a user's rule: 500 {w, b}", "ClipNorm, Adam: flat vector"]:
        assert name in rows
    assert rows.keys() >= {"setup", "update", "destructure", "save", "load"}
    for step in rows.values():
        step()


def test_the_median_of_the_rounds_decides_by_the_size_of_a_row(bench_against) -> None:
    old = [{"long": 1e-3, "short": 1e-6}] * 3
    new = [{"long": r * 1e-3, "short": r * 1e-6} for r in (1.07, 1.06, 0.5)]
    found = {name: (ratio, slow) for name, _, ratio, slow in bench_against.compare(old, new)}
    assert found["long"] == (pytest.approx(1.06), True)
    assert found["short"] == (pytest.approx(1.06), False)


def test_sources_are_copied_without_what_was_built(bench_against, tmp_path: Path) -> None:
    bench_against.copy_tree(tmp_path)
    assert (tmp_path / "optimisers" / "__init__.py").exists()
    assert not list(tmp_path.glob("optimisers/*.so"))
