"""How `make docs` builds the site; everything that it needs lies in the repository."""

from __future__ import annotations

import sys
import tomllib
import zlib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BUILT = ROOT / "build"
sys.path.insert(0, str(ROOT / "tools"))

import reference  # noqa: E402 (it lies in tools/)

reference.write(DOCS)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "optimisers"
author = "the optimisers authors"
copyright = author
release = version = PROJECT["version"]
html_title = f"optimisers {release}"
language = "en"

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = [
    "inventories/*",
    "reference/generated/menu.rst",  # included in the page above it
    "rules/generated/*",
    "gallery/*.ipynb",
    "gallery/*.py",
]
default_role = "py:obj"
suppress_warnings = ["config.cache"]  # the gallery's settings hold a function

# --- pages ------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist", "smartquotes"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the docstrings
numpydoc_show_class_members = False
numpydoc_xref_param_type = True
numpydoc_xref_ignore = {"array", "arrays"}  # of any library

# --- other libraries ----------------------------------------------------------------------------


def inventories() -> dict[str, tuple[str, str]]:
    """Return, by library, its address and a file with the places of its names.

    The files in inventories/ say this in lines of text: the address, then lines ``role pattern
    names...``, where `$` in the pattern is a name. They hold what these pages mention. Sphinx
    wants such a list packed.
    """
    found = {}
    for source in sorted((DOCS / "inventories").glob("*.txt")):
        address, *lines = source.read_text(encoding="utf-8").splitlines()
        entries = []
        for line in filter(None, lines):
            role, pattern, *names = line.split()
            entries += [f"{name} {role} 1 {pattern.replace('$', name)} -\n" for name in names]
        head = f"# Sphinx inventory version 2\n# Project: {source.stem}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        packed = BUILT / "inventories" / f"{source.stem}.inv"
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(head.encode() + zlib.compress("".join(entries).encode()))
        found[source.stem] = (address, str(packed))
    return found


intersphinx_mapping = inventories()

# --- the gallery ------------------------------------------------------------------------------


def small(_: Any, script: dict[str, Any]) -> list[str]:
    """Return the arguments of an example: a small size, its picture where nobody looks for it."""
    picture = BUILT / "gallery" / Path(script["src_file"]).with_suffix(".png").name
    picture.parent.mkdir(parents=True, exist_ok=True)
    return ["--quick", "--out", str(picture)]


sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"\.py$",
    "reset_argv": small,
    "reset_modules": (),
    "abort_on_example_error": True,
    "write_computation_times": False,  # its table loads scripts from elsewhere
    "min_reported_time": 1e9,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "remove_config_comments": True,
    "plot_gallery": True,
}

# --- how it looks -----------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "github_url": REPOSITORY,
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {"default_mode": "auto"}
pygments_style = "friendly"

if (BUILT / "published" / "asv").is_dir():  # `make asv` was here
    tags.add("asv")  # noqa: F821 (Sphinx hands it over)
    html_extra_path = [str(BUILT / "published")]
