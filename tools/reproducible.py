"""Build the archives in two places, under other circumstances, and compare them byte for byte.

    python tools/reproducible.py FOLDER

What may differ between two who build the same sources: where these lie, when they were written, who
may read what is made, the time zone, the order of hashes. What may not: one byte of the archives.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

CIRCUMSTANCES = {
    "here": {"umask": 0o077, "time": 1_000_000_000, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1"},
    "in/another/place": {"umask": 0o002, "time": 1_500_000_000, "TZ": "UTC", "PYTHONHASHSEED": "2"},
}


def build(source: Path, out: Path, *options: str, **circumstances: str | int) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    env |= {key: str(value) for key, value in circumstances.items() if key.isupper()}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options]
    return subprocess.Popen(
        [*command, str(source)],
        env=env,
        umask=int(circumstances.get("umask", -1)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen) -> None:
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{said[-4000:]}\nthe build failed")


def unpacked(archive: Path, folder: Path, time: int) -> Path:
    """Return the sources, unpacked in this folder, as if they had been written at this time."""
    folder.mkdir(parents=True)
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    for name in ("PKG-INFO", "setup.cfg"):  # what the archive has beside the sources
        (source / name).unlink()
    shutil.rmtree(*source.glob("*.egg-info"))
    for path in folder.rglob("*"):
        os.utime(path, (time, time))
    return source


def members(archive: Path) -> dict[str, str]:
    """Return what is in an archive, and a checksum of each."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.namelist()}
    with tarfile.open(archive) as sources:
        files = {m.name: sources.extractfile(m) for m in sources if m.isfile()}
        return {name: hashlib.sha256(f.read()).hexdigest() for name, f in files.items() if f}


def compare(one: Path, other: Path) -> bool:
    """Print whether two archives are the same, and if not, where they differ."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, other)]
    if digests[0] == digests[1]:
        print(f"{digests[0]}  {one.name}")
        return True
    left, right = members(one), members(other)
    differing = [n for n in sorted(left.keys() | right.keys()) if left.get(n) != right.get(n)]
    what = ", ".join(differing) or "names, times or modes of its members"
    print(f"{one.name} differs: {what}\n  {one}\n  {other}")
    return False


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    finished(build(ROOT, folder / "first", "--sdist"))
    (first,) = (folder / "first").iterdir()
    outs = [folder / place / "dist" for place in CIRCUMSTANCES]
    builds = []
    for out, circumstances in zip(outs, CIRCUMSTANCES.values(), strict=True):
        source = unpacked(first, out.parent / "source", int(circumstances["time"]))
        builds.append(build(source, out, **circumstances))
    for process in builds:
        finished(process)
    made = [sorted(out.iterdir()) for out in outs]
    if not len(made[0]) == len(made[1]) == 2:
        sys.exit(f"a source archive and a wheel should have been made twice, not {made}")
    pairs = [*zip(*made, strict=True), (first, outs[0] / first.name)]
    same = [compare(*pair) for pair in pairs]
    if not all(same):
        sys.exit("the archives are not reproducible")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
