"""The site: every public name has its page, and the look through what was built sees faults."""

from __future__ import annotations

import pkgutil
import re
import zlib
from pathlib import Path

import pytest

import optimisers
from optimisers.rules._base import registry

check_site = pytest.importorskip("check_site")

ROOT = Path(__file__).parents[2]


def test_every_public_name_has_a_page() -> None:
    for library in ("torch", "optax", "scipy"):
        pytest.importorskip(library)
    import reference

    pages = reference.pages()
    described = reference.homes()
    modules = {module.__name__: module for module in reference.public_modules()}
    assert {"optimisers", "optimisers.io", "optimisers.words", "optimisers.torch"} <= modules.keys()
    for module in modules.values():
        assert f"generated/{module.__name__}\n" in pages["reference/generated/menu.rst"]
        of_module = pages[f"reference/generated/{module.__name__}.rst"]
        for name in reference.public_names(module):
            home = described[f"{module.__name__}.{name}"]
            assert f"{name} <{home}>" in of_module
            assert f":: {home}\n" in pages[f"reference/generated/{home}.rst"]
    for rule in registry():
        assert described[f"optimisers.{rule.__name__}"] == f"optimisers.{rule.__name__}"
        assert f"`{rule.__name__} <" in pages["rules/generated/table.rst"]
    for name in ("setup", "update_", "minimize", "Leaf", "destructure"):
        assert f"reference/generated/optimisers.{name}.rst" in pages
    assert not [path for path in pages if "._" in path]
    assert "optimisers.words" not in described  # a module is no name
    assert optimisers.words in modules.values()


def site(folder: Path, body: str, names: tuple[str, ...] = ()) -> Path:
    (folder / "index.html").write_text(f"<html><body id='top'>{body}</body></html>")
    lines = "".join(f"{name} py:class 1 x.html -\n" for name in names).encode()
    (folder / "objects.inv").write_bytes(b"#\n#\n#\n#\n" + zlib.compress(lines))
    return folder


@pytest.mark.parametrize(
    "body",
    [
        "<script src='https://cdn.example.org/x.js'></script>",
        "<script src='//cdn.example.org/x.js'></script>",
        "<link rel='stylesheet' href='https://example.org/x.css'>",
        "<link rel='preload' as='font' href='https://example.org/x.woff2'>",
        "<img src='http://example.org/badge.svg'>",
        "<style>@import 'https://example.org/x.css';</style>",
        "<p style='background: url(https://example.org/x.png)'>",
        "<script>import x from 'https://example.org/x.mjs';</script>",
    ],
)
def test_what_comes_from_elsewhere_is_seen(body: str, tmp_path: Path) -> None:
    (fault,) = check_site.foreign(site(tmp_path, body))
    assert "example.org" in fault


def test_fonts_that_a_style_sheet_loads_are_seen(tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("@font-face { src: url('https://example.org/x.woff2') }")
    (fault,) = check_site.foreign(site(tmp_path, ""))
    assert fault.startswith("x.css")


def test_links_elsewhere_are_no_fault_and_dead_ones_here_are(tmp_path: Path) -> None:
    body = "<a href='https://example.org/'>x</a><a href='#top'>x</a><a href='index.html'>x</a>"
    assert not [*check_site.foreign(site(tmp_path, body)), *check_site.dead(tmp_path)]
    check_site.page.cache_clear()
    site(tmp_path, "<a href='gone.html'>x</a><a href='#gone'>x</a>")
    assert len(list(check_site.dead(tmp_path))) == 2


def test_a_name_without_a_description_is_missed(tmp_path: Path) -> None:
    for library in ("torch", "optax", "scipy"):
        pytest.importorskip(library)
    from reference import homes

    names = sorted(set(homes().values()))
    assert not list(check_site.missing(site(tmp_path, "", tuple(names))))
    (fault,) = check_site.missing(site(tmp_path, "", tuple(names[1:])))
    assert fault == f"{names[0]} is not described"


ASV_PAGE = """<script src="https://cdn.example.org/jquery-3.3.1.min.js" integrity="sha256-x"
    crossorigin="anonymous" onerror="js_load_failure()"></script>
<link rel="stylesheet" href="https://cdn.example.org/bootstrap@3.1.1/dist/css/bootstrap.min.css"
    integrity="sha256-y" crossorigin="anonymous"><a href="https://example.org/">x</a>"""


def test_pages_of_asv_load_their_own_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asv_pages = pytest.importorskip("asv_pages")
    package = tmp_path / "package"
    for name in ("dist/jquery.min.js", "dist/css/bootstrap.min.css", "dist/fonts/x.woff"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    monkeypatch.setattr(asv_pages, "fetch", lambda *_: package)
    out = tmp_path / "asv"
    out.mkdir()
    page = asv_pages.made_whole(ASV_PAGE, out / "vendor", tmp_path)
    (out / "index.html").write_text(page)
    assert not list(check_site.foreign(out))
    assert 'src="vendor/jquery.min.js"' in page
    assert (out / "vendor/jquery.min.js").read_text() == "dist/jquery.min.js"
    assert (out / "fonts/x.woff").exists()


def test_a_library_of_asv_that_is_not_known_is_refused() -> None:
    asv_pages = pytest.importorskip("asv_pages")
    assert {package for package, _ in asv_pages.FILES.values()} == asv_pages.PACKAGES.keys()
    with pytest.raises(SystemExit, match="does not have"):
        asv_pages.file_of("https://cdn.example.org/other.js")


def test_routes_of_a_script_are_no_dead_links(tmp_path: Path) -> None:
    check_site.page.cache_clear()
    assert not list(check_site.dead(site(tmp_path, "<a href='#/summarylist'>x</a>")))


LIBRARIES = {"numpy", "scipy", "torch", "jax"}
REFERRED = re.compile(r"(?<!`)`~?((?:numpy|scipy|torch|jax)\.[\w.]+)`(?!`)")


def inventory(library: str) -> set[str]:
    """Return the names that a file in docs/inventories has."""
    text = (ROOT / f"docs/inventories/{library}.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines()[1:] if line]
    return {name for role, _, *names in lines if role.startswith("py:") for name in names}


def test_what_docstrings_refer_to_is_in_the_inventories() -> None:
    known = set[str]().union(*map(inventory, LIBRARIES))
    files = [path.relative_to(ROOT) for path in (ROOT / "optimisers").rglob("*.py")]
    for path in [path for path in files if not any(part[0] == "_" for part in path.parts)]:
        referred = set(REFERRED.findall((ROOT / path).read_text(encoding="utf-8")))
        assert referred <= known | LIBRARIES, path.name


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_what_the_inventories_name_is_there(library: str) -> None:
    pytest.importorskip(library)
    for name in inventory(library):
        assert name.startswith(f"{library}.")
        pkgutil.resolve_name(name)
