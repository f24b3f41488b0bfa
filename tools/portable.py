"""Compile the extensions for systems that are not this one, as far as that can be done from here.

    python tools/portable.py build/portable

Zig's compiler is clang with the headers of Windows, macOS and Linux. Python's and NumPy's headers
are those of this machine, corrected in what the other system lacks: nothing is linked or run.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
TARGETS = ("x86_64-windows-gnu", "aarch64-macos", "aarch64-linux-gnu")
EXTENSIONS = ("_arrays.dlpack", "_kernels")

# What configure found out on this machine, and what is otherwise there. It is included ahead of
# all; the guards of these headers keep them from being read again.
CORRECTED = """
#include <pyconfig.h>
#include <numpy/numpyconfig.h>
#if !defined(__linux__)
#undef NPY_HAVE_ENDIAN_H
#undef HAVE_ENDIAN_H
#endif
#if !defined(__linux__) || !defined(__x86_64__)
#undef NPY_SIZEOF_LONGDOUBLE
#define NPY_SIZEOF_LONGDOUBLE __SIZEOF_LONG_DOUBLE__
#undef NPY_SIZEOF_COMPLEX_LONGDOUBLE
#define NPY_SIZEOF_COMPLEX_LONGDOUBLE (2 * __SIZEOF_LONG_DOUBLE__)
#endif
#if defined(_WIN32)
#undef HAVE_CLOCK_GETTIME
#undef HAVE_PTHREAD_H
#undef HAVE_SYS_SELECT_H
#undef HAVE_UNISTD_H
#undef NPY_SIZEOF_LONG
#define NPY_SIZEOF_LONG 4
#define NT_THREADS
#undef SIZEOF_LONG
#define SIZEOF_LONG 4
#undef SIZEOF_WCHAR_T
#define SIZEOF_WCHAR_T 2
#endif
"""


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    (corrected := out / "corrected.h").write_text(CORRECTED, encoding="utf-8")
    includes = [sysconfig.get_path("include"), np.get_include(), ROOT / "optimisers" / "_cpu"]
    options = [*(f"-I{path}" for path in includes), "-include", str(corrected)]
    options += ["-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION", "-w", "-O0", "-fno-sanitize=all"]
    for name in EXTENSIONS:
        written = out / f"{name}.c"
        cython = [sys.executable, "-m", "cython", "-3", "--module-name", f"optimisers.{name}"]
        source = f"optimisers/{name.replace('.', '/')}.pyx"
        subprocess.run([*cython, "-o", written.resolve(), source], check=True, cwd=ROOT)
        for target in TARGETS:
            compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target, *options]
            made = out / f"{name}-{target}.o"
            subprocess.run([*compiler, "-c", written, "-o", made], check=True)
            print(f"optimisers/{name}.pyx compiles for {target}", flush=True)


if __name__ == "__main__":
    main()
