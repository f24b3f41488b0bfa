"""The shape of the package: who imports whom, what an import loads, what the archives hold."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import optimisers
from optimisers import _info
from optimisers._engine import cpu
from optimisers.rules._base import registry

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "optimisers"

# A module imports from its own folder, and from folders and files on floors below.
FLOORS = [
    {"_fork", "_messages"},
    {"_arrays"},
    {"words", "_kernels", "_kernels_avx2", "_kernels_avx512"},
    {"_steps"},
    {"rules"},
    {"_trees"},
    {"_pytree"},
    {"_leaf"},
    {"_cuda"},
    {"_engine"},
    {"_state", "_flat", "optax"},
    {"_info", "_norms", "_training", "scipy", "torch", "io"},
    {"__init__"},
    {"__main__"},
]
ASKED_LATE = "_messages.mixups"
"""Asked, from any floor, once something is refused, so that it may look at everything."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""The file of each module, by its name in the package."""
MODULES = {*SOURCES, "_arrays.dlpack", "_kernels", "_kernels_avx2", "_kernels_avx512"}


def floor_of(module: str) -> int:
    room = module.split(".")[0]
    assert room in FLOOR, f"say in FLOORS on which floor {room} lies"
    return FLOOR["_engine" if module == ASKED_LATE else room]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk_what_runs(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `node`, functions included, but for what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from walk_what_runs(child)


def imported(source: str, package: str = "optimisers") -> set[str]:
    """Return the modules of the library that `source`, of this package, imports, now or later."""
    tree = ast.parse(source)
    now = set(tree.body)
    found: set[str] = set()
    for node in walk_what_runs(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, module = name.partition(".")
            while top == "optimisers" and module not in MODULES and "." in module:
                module = module.rpartition(".")[0]
            if top == "optimisers" and (node in now or module != ASKED_LATE):
                found.add(module if module in MODULES else "__init__")
    return found


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("from . import _state", {"_state"}),
        ("from .rules import Adam", {"rules"}),
        ("import optimisers._engine.advance", {"_engine.advance"}),
        ("from optimisers._state import Leaf", {"_state"}),
        ("from optimisers import Adam", {"__init__"}),
        ("from optimisers.io import load", {"io"}),
        ("from .io import _archive, load", {"io", "io._archive"}),
        ("import optimisers.io._atomic", {"io._atomic"}),
        ("def later():\n    from ._state import Leaf", {"_state"}),
        ("if TYPE_CHECKING:\n    from ._state import Leaf", set()),
        ("from ._messages.mixups import for_model", {"_messages.mixups"}),
        ("def refuse():\n    from ._messages.mixups import for_model", set()),
        ("def refuse():\n    from ._messages import mixups", set()),
        ("import numpy", set()),
    ],
)
def test_the_reader_of_imports_sees_each_kind(source: str, modules: set[str]) -> None:
    assert imported(source) == modules


def test_the_reader_of_imports_knows_where_a_package_lies() -> None:
    source = "from ._atomic import sweep\nfrom .._state import Leaf\nfrom .._trees import walks"
    assert imported(source, "optimisers.io") == {"io._atomic", "_state", "_trees.walks"}


IMPORTED = {
    module: imported(
        path.read_text(encoding="utf-8"), ".".join(path.parent.relative_to(ROOT).parts)
    )
    for module, path in SOURCES.items()
}
"""The modules that each imports, now or later."""


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downward_only(module: str) -> None:
    room = module.split(".")[0]
    upward = {
        name
        for name in IMPORTED[module]
        if floor_of(name) >= floor_of(module) and name.split(".")[0] != room
    }
    assert not upward, f"{module} may import from lower floors only, not from {upward}"


def test_no_files_of_a_folder_import_each_other() -> None:
    left = {module: names - {module} for module, names in IMPORTED.items()}
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import each other: {left}"


def test_no_rule_is_listed_by_hand() -> None:
    """The package and its tools find rules through the registry."""
    rules = {cls.__name__ for cls in registry()}
    assert "Adam" in rules
    sources = [*SOURCES.values(), *(ROOT / "tools").glob("*.py"), ROOT / "setup.py"]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
                inside = list(ast.walk(node))
                names = {n.id for n in inside if isinstance(n, ast.Name)}
                texts = {n.value for n in inside if isinstance(n, ast.Constant)}
                listed = rules & (names | texts)
                assert len(listed) < 4, f"{path.name}, line {node.lineno}, lists {listed}"


def test_import_loads_no_heavy_library() -> None:
    code = "import optimisers, sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert {"optimisers", "numpy"} <= loaded
    optional = "autograd cupy equinox flax jax ml_dtypes mpi4py numba optax optree scipy torch"
    assert not loaded & set(optional.split())


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert optimisers.__version__ == metadata.version("optimisers") == project["version"]


# --- show_versions ------------------------------------------------------------------------------


def printed_versions() -> dict[str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module("optimisers", run_name="__main__")
    return dict(line.split(maxsplit=1) for line in out.getvalue().splitlines())


def test_python_dash_m_prints_versions_kernels_and_threads() -> None:
    said = printed_versions()
    assert said["optimisers"] == optimisers.__version__
    assert said["python"].startswith(platform.python_version())
    assert said["numpy"] == metadata.version("numpy")
    assert said["kernels"].startswith(cpu.isa)
    assert said["threads"] == str(optimisers.get_num_threads())
    assert f"optree {metadata.version('optree')}" in said["optional"]


def test_what_is_not_installed_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_info, "OPTIONAL", ("no-such-library", "optree"))
    assert dict(_info.facts())["optional"] == f"optree {metadata.version('optree')}"
    monkeypatch.setattr(_info, "OPTIONAL", ("no-such-library",))
    assert dict(_info.facts())["optional"] == "none"


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        (None, "none (numba-cuda is not installed)"),
        (SimpleNamespace(is_available=lambda: False), "none"),
        (
            SimpleNamespace(
                is_available=lambda: True,
                gpus=[SimpleNamespace(name="H100"), SimpleNamespace(name="A100")],
            ),
            "H100, A100",
        ),
    ],
)
def test_gpus_are_named(cuda: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_info, "installed", lambda name: None if cuda is None else "1.0")
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    assert _info.gpus() == said


# --- the archives -------------------------------------------------------------------------------


UNBUILT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
sys.path.insert(0, sys.argv[1])
import optimisers
"""


def test_sources_that_are_not_built_say_so(tmp_path: Path) -> None:
    """A clone shadows what is installed as long as one stays in its folder."""
    shutil.copytree(
        PACKAGE, tmp_path / "optimisers", ignore=shutil.ignore_patterns("*.so", "*.pyd")
    )
    command = [sys.executable, "-c", UNBUILT, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode
    *_, last = run.stderr.strip().splitlines()
    assert last.startswith("ImportError: these are the sources of optimisers, not built")
    assert "pip install -e ." in last


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is named by a variable")
def test_a_missing_compiler_is_told_with_what_to_install(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copytree(PACKAGE, tmp_path / "optimisers", ignore=shutil.ignore_patterns("*.so"))
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")],
        env={**os.environ, "CC": "/nonexistent/cc"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode
    assert "apt install gcc python3-dev" in run.stderr
    assert run.stderr.count("/nonexistent/cc") <= 1


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Return the names in the source archive, and in the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        sources = {member.name.partition("/")[2] for member in archive if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        return sources, set(archive.namelist())


@pytest.mark.slow
def test_the_source_archive_holds_all_that_a_build_needs(
    archives: tuple[set[str], set[str]],
) -> None:
    sources, _ = archives
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "tools/emit_steps.py",
        "optimisers/rules/adam.py",
        "optimisers/_kernels.pyx",
        "optimisers/_kernels.pyi",
        "optimisers/_cpu/batch.pxi",
        "optimisers/_cpu/team.h",
        "optimisers/py.typed",
        "examples/digits.py",
        "tests/conftest.py",
    ):
        assert name in sources
    generated = {name for name in sources if name.endswith((".c", ".so", ".pyc", "_steps.pxi"))}
    assert not generated


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(archives: tuple[set[str], set[str]]) -> None:
    _, wheel = archives
    folders = {name.partition("/")[0] for name in wheel}
    assert folders == {"optimisers", f"optimisers-{optimisers.__version__}.dist-info"}
    inside = {name.removeprefix("optimisers/") for name in wheel if name.startswith("optimisers/")}
    python = {path.relative_to(PACKAGE).as_posix() for path in SOURCES.values()}
    assert python | {"py.typed", "_kernels.pyi"} <= inside
    rest = {name for name in inside - python if not name.endswith((".so", ".pyd", ".pyi"))}
    assert rest == {"py.typed"}
    assert any(name.endswith("LICENSE") for name in wheel)


@pytest.mark.skipif(
    platform.machine() not in {"x86_64", "AMD64"} or sys.platform != "linux",
    reason="one set of instructions on this machine",
)
@pytest.mark.slow
def test_the_wheel_holds_kernels_for_each_instruction_set(
    archives: tuple[set[str], set[str]],
) -> None:
    kernels = {name.partition(".")[0] for name in archives[1] if name.endswith(".so")}
    kernels.discard("optimisers/_arrays/dlpack")
    assert kernels == {f"optimisers/_kernels{twin}" for twin in ("", "_avx2", "_avx512")}
