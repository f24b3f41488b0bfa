"""Look through a built site: everything it loads lies in it, no link is dead, no name is missing.

python tools/check_site.py build/docs
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser loads by itself; `a` and the like wait until someone clicks.
LOADED = {
    ("script", "src"),
    ("img", "src"),
    ("img", "srcset"),
    ("source", "src"),
    ("source", "srcset"),
    ("iframe", "src"),
    ("embed", "src"),
    ("object", "data"),
    ("video", "src"),
    ("audio", "src"),
    ("link", "href"),
}
NOT_LOADED = {"author", "canonical", "help", "license", "next", "prev", "search", "index"}
IN_STYLE = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
IN_SCRIPT = re.compile(
    r"""(?:\bimport\b[^"'\n;]*|\.src\s*=\s*|importScripts\()["']((?:https?:)?//[^"']+)"""
)


class Page(HTMLParser):
    """What a page loads, where it links to, and where in it one can arrive."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attributes}
        self.inside = tag
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag == "link" and set(named.get("rel", "").split()) <= NOT_LOADED:
            return
        for name, value in named.items():
            if (tag, name) in LOADED:
                several = name == "srcset"
                self.loads += [v.split()[0] for v in value.split(",")] if several else [value]
            if name == "style":
                self.loads += styles(value)

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.loads += styles(data)
        if self.inside == "script":
            self.loads += IN_SCRIPT.findall(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def styles(text: str) -> list[str]:
    """Return the addresses that a style sheet loads."""
    return [one or other for one, other in IN_STYLE.findall(text)]


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def elsewhere(address: str) -> bool:
    split = urlsplit(address)
    return split.scheme in ("http", "https", "ftp") or bool(split.netloc)


def foreign(site: Path) -> Iterator[str]:
    """Yield what is loaded from elsewhere, with the file that loads it."""
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            loads = page(path).loads
        elif path.suffix == ".css":
            loads = styles(path.read_text(encoding="utf-8"))
        else:
            continue
        for address in filter(elsewhere, loads):
            yield f"{path.relative_to(site)} loads {address}"


def dead(site: Path) -> Iterator[str]:
    """Yield links to files of the site, or to places in them, that are not there."""
    for path in sorted(site.rglob("*.html")):
        for address in page(path).links:
            split = urlsplit(address)
            if split.scheme or split.netloc:
                continue
            target = path.parent / unquote(split.path) if split.path else path
            if target.is_dir():
                target /= "index.html"
            there = target.exists()
            is_route = split.fragment.startswith("/")  # which a script of asv reads
            if there and split.fragment and target.suffix == ".html" and not is_route:
                there = unquote(split.fragment) in page(target).anchors
            if not there:
                yield f"{path.relative_to(site)} links to {address}, which is not there"


def documented(site: Path) -> set[str]:
    """Return the full names that the site describes, read from the inventory it has for others."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(packed).decode().splitlines()
    return {line.split(" ")[0] for line in lines if line.split(" ")[1].startswith("py:")}


def missing(site: Path) -> Iterator[str]:
    """Yield public names of the library that the site does not describe."""
    from reference import homes

    described = documented(site)
    for home in sorted(set(homes().values()) - described):
        yield f"{home} is not described"


def main() -> None:
    site = Path(sys.argv[1])
    faults = [*foreign(site), *dead(site), *missing(site)]
    print(*faults, sep="\n", end="\n" * bool(faults))
    pages = len(list(site.rglob("*.html")))
    print(f"{site}: {pages} pages, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
