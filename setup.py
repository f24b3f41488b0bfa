"""Build the CPU kernels: the steps of the rules as Cython, compiled for each instruction set.

Everything else that a build needs to know stands in pyproject.toml. The same sources make the same
archives, byte for byte, whenever and wherever they are built with the same tools.
"""

from __future__ import annotations

import gzip
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, LinkError
from setuptools.modified import newer_group

sys.path.insert(0, "tools")
from emit_steps import FORMULAS, generate

STEPS = Path("optimisers/_steps.pxi")
KERNELS = Path("optimisers/_kernels.pyx")
PARTS = sorted(path for path in Path("optimisers/_cpu").iterdir() if path.suffix in {".pxi", ".h"})
DLPACK = Path("optimisers/_arrays/dlpack.pyx")

# Equal bits on every instruction set need separate roundings: no contraction to fma, no fast-math.
# The next flags let loops with `sqrt` and comparisons use vector instructions; that with a number
# has what `clip` asks of its limits asked ahead of the loop, also of a long one. The last one
# leaves `copy` a loop.
EXACT = [
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "--param=max-unswitch-insns=500",
    "-fno-tree-loop-distribute-patterns",
]
# Loops begin at a cache line. Short ones, as in a chain, lie in one line then; across two they take
# up to a third longer, and which of them do would depend on what is compiled before them.
ALIGNED = ["-falign-loops=64"]
OPENMP = "-fopenmp"
EXACT_MSVC = ["/O2", "/fp:precise"]
# For `make sanitize`: checks by the compiler's runtime, with the lines at which they fail.
CHECKS = os.environ.get("OPTIMISERS_SANITIZE", "")
CHECKED = [f"-fsanitize={CHECKS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
OPENMP_MSVC = "/openmp"

# An error in C shall end the process rather than be of use to someone: guarded stacks, checked
# copies, tables that are read-only once the module is loaded. None of this is felt in the loops.
HARDENED = [
    ["-fstack-protector-strong"],
    ["-fstack-clash-protection"],
    ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3"],
    ["-Wformat", "-Werror=format-security"],
]
HARDENED_LINK = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]

# What the archives say of when they were made, if nobody asks for another time: the first that a
# wheel can hold. The modes of their files are not those of whoever builds.
EPOCH = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800"))
os.umask(0o022)

# Modules made from the same source; `_engine` imports the widest that the processor runs.
VARIANTS: dict[str, list[str]] = {"optimisers._kernels": []}
if CHECKS:  # one variant tells as much about the source as three
    EXACT += CHECKED
elif platform.machine().lower() in {"x86_64", "amd64"} and sys.platform != "win32":
    VARIANTS["optimisers._kernels_avx2"] = ["-mavx2", "-mf16c"]
    VARIANTS["optimisers._kernels_avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

SOURCES = {name: [str(path) for path in (KERNELS, STEPS, *PARTS)] for name in VARIANTS}
SOURCES["optimisers._arrays.dlpack"] = [str(DLPACK)]


NO_COMPILER = """no C compiler works here; the kernels are compiled while optimisers is installed.
  Debian, Ubuntu   apt install gcc python3-dev
  Fedora           dnf install gcc python3-devel
  macOS            xcode-select --install
  Windows          Build Tools for Visual Studio, with "Desktop development with C++"
"""


def probe(folder: str) -> str:
    """Return the path of a program in `folder` that any compiler takes."""
    source = Path(folder, "probe.c")
    source.write_text("int main(void) { return 0; }\n")
    return str(source)


class BuildKernels(build_ext):
    """Write the steps, then make each variant a module: Cython and C compiler side by side."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def build_extensions(self) -> None:
        if not self.compiles():
            raise SystemExit(NO_COMPILER)
        steps = generate(*(file.read_text(encoding="utf-8") for file in FORMULAS))
        if not STEPS.exists() or STEPS.read_text(encoding="utf-8") != steps:
            STEPS.write_text(steps, encoding="utf-8")

        msvc = self.compiler.compiler_type == "msvc"
        flags = EXACT_MSVC if msvc else [flag for flag in EXACT + ALIGNED if self.takes(flag)]
        flags += [flag for pair in HARDENED if not msvc and self.takes(*pair) for flag in pair]
        hardened = [] if msvc else [flag for flag in HARDENED_LINK if self.takes(flag)]
        openmp = OPENMP_MSVC if msvc else OPENMP
        parallel = [openmp] if self.takes(openmp) else []
        own = {ext.name: VARIANTS.get(ext.name, []) for ext in self.extensions}
        self.extensions[:] = [ext for ext in self.extensions if self.takes(*own[ext.name])]
        for ext in self.extensions:
            ext.extra_compile_args = flags + parallel + own[ext.name]
            checks = CHECKED if CHECKS else []
            ext.extra_link_args = [] if msvc else parallel + hardened + checks
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        written = Path(self.build_temp, f"{ext.name}.c")
        if newer_group(ext.depends, written):
            written.parent.mkdir(parents=True, exist_ok=True)
            cython = [sys.executable, "-m", "cython", "-3", "--module-name", ext.name]
            subprocess.run([*cython, "-o", written, ext.depends[0]], check=True)
        ext.sources = [str(written)]
        super().build_extension(ext)

    def compiles(self) -> bool:
        """Tell whether there is a compiler that works."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.compiler.compile([probe(folder)], output_dir=folder)
            except (CompileError, OSError):
                return False
        return True

    def takes(self, *flags: str) -> bool:
        """Tell whether the compiler and linker take `flags`."""
        if not flags:
            return True
        with tempfile.TemporaryDirectory() as folder:
            try:
                objects = self.compiler.compile(
                    [probe(folder)], output_dir=folder, extra_postargs=list(flags)
                )
                self.compiler.link_executable(
                    objects, "probe", output_dir=folder, extra_postargs=list(flags)
                )
            except (CompileError, LinkError):
                return False
        return True


class PlainArchive(sdist):
    """Make the source archive of names and contents alone: no owners, no times of its files."""

    def make_archive(
        self,
        base_name: str,
        format: str,
        root_dir: str | None = None,
        base_dir: str | None = None,
        **owners: str | None,
    ) -> str:
        if format != "gztar" or root_dir is not None or base_dir is None:
            made: str = super().make_archive(base_name, format, root_dir, base_dir, **owners)
            return made

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = EPOCH
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", 9, file, EPOCH) as packed,
            tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=plain)
        return path


if __name__ == "__main__":
    setup(
        cmdclass={"build_ext": BuildKernels, "sdist": PlainArchive},
        ext_modules=[
            Extension(
                name,
                depends[:1],
                include_dirs=[np.get_include(), "optimisers/_cpu"],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
                depends=[*depends, "setup.py"],
            )
            for name, depends in SOURCES.items()
        ],
    )
