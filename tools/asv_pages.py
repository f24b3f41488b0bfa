"""Make the pages that asv published whole: what they load from elsewhere comes to lie beside them.

    python tools/asv_pages.py build/published/asv

The libraries come from npm, each in the version that asv names, and their sums are compared. Where
that cannot be done the pages are removed, so that no site links them; the results stay.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# The SHA-256 of each package.
PACKAGES = {
    "blueimp-md5@2.19.0": "0fff5798c7733b21f3e4c0de69ccba12af266e0f01c3e3a41051c0e49a655512",
    "bootstrap@3.1.1": "23b27da4dd80b8fbe8972ac4be87037627e007ad5dd1edb27435844f0a4646a0",
    "flot-orderbars@1.0.0": "e5523ee7cca778f194b34fc31afb6dda40bf1557e6669fda4730c29f53e87101",
    "flot@0.8.3": "5e4cea78a9efa2d3dbba363ac76c688951e6c638ee916883c36e23516208b1ed",
    "jquery@3.3.1": "2c7c70a1e796c1568ff05d45a8cb2da2a0fc6e37426c65e4eef6ee55e217933e",
    "stupid-table-plugin@1.1.3": "1186089584b7c2f7fec9ad4232e9aa1adbfea273eaa233b713beb8c2c916b4ac",
}

# By the end of the address that asv's page has: where the file lies.
FILES = {
    "/jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "/flot/0.8.3/jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "/flot/0.8.3/jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "/flot/0.8.3/jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "/flot/0.8.3/jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "/jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    # npm has no 1.0.1
    "/stupidtable/1.0.1/stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "/blueimp-md5/2.19.0/js/md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "/bootstrap@3.1.1/dist/js/bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "/bootstrap@3.1.1/dist/css/bootstrap.min.css": (
        "bootstrap@3.1.1",
        "dist/css/bootstrap.min.css",
    ),
}

FROM_ELSEWHERE = re.compile(r"""(src|href)="(https://[^"]+)"[^>]*?integrity="[^"]+"[^>]*>""")


def file_of(address: str) -> tuple[str, str]:
    """Return the package and the path in it of what lies at an address."""
    for end, place in FILES.items():
        if address.endswith(end):
            return place
    sys.exit(f"asv's page loads {address}, which FILES in tools/asv_pages.py does not have")


def fetch(package: str, folder: Path) -> Path:
    """Return the folder of an npm package, fetched and compared."""
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name}-{version}.tgz"
    if not archive.exists():
        npm = shutil.which("npm") or sys.exit("npm is needed to fetch what asv's pages load")
        command = [npm, "pack", "--silent", "--ignore-scripts", package]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != PACKAGES[package]:
            sys.exit(f"{package} has the sum {found}, not {PACKAGES[package]}")
        with tarfile.open(archive) as packed:
            packed.extractall(folder / name, filter="data")
    return folder / name / "package"


def made_whole(page: str, beside: Path, packages: Path) -> str:
    """Return the text of a page that loads its own copies, which are put into `beside`."""

    def copied(match: re.Match[str]) -> str:
        package, path = file_of(match[2])
        source = fetch(package, packages) / path
        beside.mkdir(exist_ok=True)
        shutil.copyfile(source, beside / source.name)
        if source.suffix == ".css":  # it looks for fonts in the folder beside its own
            shutil.copytree(source.parent.parent / "fonts", beside.parent / "fonts")
        return f'{match[1]}="{beside.name}/{source.name}">'

    return FROM_ELSEWHERE.sub(copied, page)


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        with tempfile.TemporaryDirectory() as packages:
            for path in sorted(folder.glob("*.html")):
                text = path.read_text(encoding="utf-8")
                whole = made_whole(text, folder / "vendor", Path(packages))
                path.write_text(whole, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder)
        raise


if __name__ == "__main__":
    main()
