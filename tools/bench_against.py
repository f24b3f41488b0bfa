"""Time this library beside another revision of it: rows, and which of them became slower.

Both are built with the same flags into a folder of their own below `build/against`, and timed by
the benchmarks of `asv_bench` in processes that take turns. Only public names are used, so that the
other revision may have other modules.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "against"
QUICK = 2e-6
"""Seconds of a call below which a row may differ by 10 %, and above which by 5 %."""


def build(name: str, files: Callable[[Path], None]) -> Path:
    """Return the folder of a library that is built of the files which a function puts there."""
    source, target = BUILD / name / "source", BUILD / name / "installed"
    shutil.rmtree(BUILD / name, ignore_errors=True)
    source.mkdir(parents=True)
    files(source)
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True)
    return target


def copy_tree(folder: Path) -> None:
    """Copy the files of the working tree that git knows, or would take."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def unpack(revision: str, folder: Path) -> None:
    """Write the files of a revision into a folder."""
    archive = ["git", "archive", "--format=tar", revision]
    tar = subprocess.run(archive, cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=tar, check=True)


def worker(quick: bool) -> None:
    """Print the seconds of each row, and where the library lies."""
    from benchmarks.against import rows
    from benchmarks.measure import alternate, import_time

    import optimisers

    times = dict(alternate(rows(quick), runs=1 if quick else 5, least=1e-5 if quick else 0.002))
    times["import"] = import_time(1 if quick else 5)[0]
    print(json.dumps({"from": optimisers.__file__, "times": times}))


def timed(library: Path, quick: bool) -> dict[str, float]:
    """Return the times of a library in a process of its own."""
    path = os.pathsep.join([str(library), str(ROOT / "asv_bench")])
    command = [sys.executable, "-P", str(Path(__file__)), "--worker", *["--quick"] * quick]
    run = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        cwd=BUILD,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    answer = json.loads(run.stdout.splitlines()[-1])
    assert Path(answer["from"]).is_relative_to(library), f"imported {answer['from']}"
    return dict(answer["times"])


def compare(
    old: Sequence[Mapping[str, float]], new: Sequence[Mapping[str, float]]
) -> Iterable[tuple[str, float, float, bool]]:
    """Yield each row: its name, the old time, the median ratio of the rounds, whether too slow."""
    for name in old[0]:
        before = median(times[name] for times in old)
        ratio = median(b[name] / a[name] for a, b in zip(old, new, strict=True))
        yield name, before, ratio, ratio > (1.10 if before < QUICK else 1.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", nargs="?", help="what git knows the other revision by")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see whether it runs")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a row is slower")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.quick)
        return 0
    if not options.revision:
        parser.error("name a revision: make bench-against REV=main")
    there = build("other", lambda folder: unpack(options.revision, folder))
    here = build("this", copy_tree)
    old, new = [], []
    for turn in range(options.rounds):
        pairs = [(there, old), (here, new)]
        for library, found in pairs if turn % 2 == 0 else reversed(pairs):
            found.append(timed(library, options.quick))
    table = list(compare(old, new))
    for name, before, ratio, slow in table:
        print(f"{name:36} {before * 1e6:12.2f} us  {ratio:6.3f}{'  slower' * slow}")
    slower = [name for name, _, _, slow in table if slow]
    print(f"slower: {', '.join(slower)}" if slower else "no row is slower")
    return 1 if slower and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
