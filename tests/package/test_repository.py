"""The files around the library: links, workflows, the recipe, the wheels' settings."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOME = "https://github.com/optimisers/optimisers"
YAML = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff", *ROOT.glob("*-recipe/*.yaml")]
TARGET = re.compile(r"^\[[\w-]+\]: (\S+)$|\]\(([^)]+)\)", re.MULTILINE)


def test_the_links_of_the_readme_are_absolute_and_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [one or other for one, other in TARGET.findall(text)]
    assert len(targets) > 20
    for target in targets:
        assert target.startswith("https://"), f"{target} is dead on the page of an index"
        raw = target.replace("raw.githubusercontent.com/optimisers/optimisers/", "")
        path = re.fullmatch(rf"(?:{HOME}/(?:blob|tree)/|https://)main/(.*)", raw)
        if target.startswith(HOME) or raw != target:
            assert path, target
            assert (ROOT / path[1]).exists(), target


def test_the_project_says_where_it_lives() -> None:
    urls = PROJECT["project"]["urls"]
    assert urls["Repository"] == HOME
    assert {"Documentation", "Issues", "Changelog"} <= urls.keys()


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_what_services_read_is_well_formed(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    if path.parent.name == "workflows":
        assert found["permissions"] == {"contents": "read"}, "more is given job by job"
        for job in found["jobs"].values():
            assert "uses" in job or job["steps"]
            for step in job.get("steps", []):
                assert "uses" in step or "run" in step


def test_a_release_needs_no_password() -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["jobs"]["publish"]["permissions"]["id-token"] == "write"
    assert not re.search(r"password|secrets\.", text.partition("steps:")[2])


def test_the_recipe_has_the_version_and_the_needs_of_the_project() -> None:
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / "conda-recipe/recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == PROJECT["project"]["version"]
    needed = {need.replace(" ", "") for need in recipe["requirements"]["run"]} - {"python"}
    assert needed == set(PROJECT["project"]["dependencies"])
    host = {need.replace(" ", "") for need in recipe["requirements"]["host"]}
    assert set(PROJECT["build-system"]["requires"]) <= host


@pytest.mark.skipif(sys.platform != "linux", reason="runs what the release runs on Linux")
def test_a_release_fills_in_the_sum_of_the_archive(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    (script,) = [step["run"] for step in workflow["jobs"]["recipe"]["steps"] if "run" in step]
    shutil.copytree(ROOT / "conda-recipe", tmp_path / "conda-recipe")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/optimisers-1.tar.gz").write_bytes(b"archive")
    said = subprocess.run(
        ["bash", "-ec", f'gh() {{ echo "$@"; }}\n{script}'],
        cwd=tmp_path,
        env={**os.environ, "TAG": "v1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == [
        "release",
        "upload",
        "v1",
        "dist/optimisers-1.tar.gz",
        "recipe.yaml",
    ]
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["source"]["sha256"] == hashlib.sha256(b"archive").hexdigest()


MARKED = re.compile(r"mark\.(\w+)")
CHOSEN = re.compile(r"pytest[^\n]* -m (?:\"([^\"]+)\"|(\w+))")


def test_commands_choose_tests_by_marks_that_tests_have() -> None:
    declared = {
        line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    }
    used = {mark for p in (ROOT / "tests").rglob("*.py") for mark in MARKED.findall(p.read_text())}
    assert declared <= used
    places = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".github/workflows/checks.yml"]
    for place in places:
        text = place.read_text(encoding="utf-8").replace("$(RACES)", "pytest")
        text = text.replace("$(SIMULATED)", "pytest")
        words = {word for found in CHOSEN.findall(text) for word in " ".join(found).split()}
        chosen = words - {"and", "not", "or"}
        assert chosen, f"{place.name} chooses no tests"
        assert chosen <= declared, f"{place.name} chooses {chosen - declared}, which is no mark"
        lists = re.findall(r"tests/\S*test_\w+(?:\.py)? +\S*test_\w+", text)
        assert not lists, f"{place.name} lists files of tests: give them a mark"


def test_wheels_are_built_for_every_python_and_processor() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    wanted = {f"cp3{minor}-*" for minor in range(11, 15)} | {"cp314t-*"}
    assert wanted <= set(settings["build"])
    assert {*settings["linux"]["archs"]} == {"x86_64", "aarch64"}
    assert settings["macos"]["archs"]
    assert settings["windows"]["archs"]


PROMISED = {"numba", "numba.cuda", "numba.cuda.types", "numba.cuda.extending"}
"""What numba-cuda documents for those who build on it."""
PRIVATE = re.compile(r"\b(?:cudadrv|cgutils|_ary|gpu_data|device_ctypes_pointer|get_cufunc)\b")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a program imports, and what it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = {"numba": {"cuda"}, "numba.cuda": {"types", "extending", "cgutils"}}
            yield node.module
            for name in node.names:
                if name.name in submodules.get(node.module, ()):
                    yield f"{node.module}.{name.name}"


def test_private_parts_of_the_compiler_for_gpus_are_used_in_one_file() -> None:
    users = set()
    for path in (ROOT / "optimisers").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        modules = {name for name in imported(ast.parse(text)) if name.startswith("numba.cuda")}
        if modules - PROMISED or PRIVATE.search(text):
            users.add(path.name)
    assert users == {"numba_private.py"}


def test_the_next_minor_version_of_the_compiler_for_gpus_is_allowed() -> None:
    for extra in ("cuda", "cuda12", "cuda13"):
        (need,) = [n for n in PROJECT["project"]["optional-dependencies"][extra] if "numba-" in n]
        (least,), (limit,) = re.findall(r">=0\.(\d+)", need), re.findall(r"<0\.(\d+)", need)
        assert int(limit) >= int(least) + 2, f"{need} has no room for the next minor version"


def lengths(folder: str, *suffixes: str) -> dict[str, int]:
    """Return the number of lines of each file of a folder that git knows, or may know."""
    paths = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    made = {"_kernels.c", "_steps.pxi", "dlpack.c"}
    return {
        p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines())
        for p in paths
        if p.name not in made and "golden" not in p.parts
    }


def test_no_file_of_tests_is_long() -> None:
    found = lengths("tests", ".py")
    assert found
    assert {path: n for path, n in found.items() if n > 700} == {}


def test_files_of_the_package_are_short_or_say_at_their_head_why_not() -> None:
    found = lengths("optimisers", ".py", ".pyx", ".pxi", ".pyi", ".h")
    assert found
    long = {path for path, n in found.items() if n > 600}
    unsaid = {
        path
        for path in long
        if "more than 600 lines" not in (ROOT / path).read_text(encoding="utf-8")[:400]
    }
    assert unsaid == set(), "too long without a reason"
