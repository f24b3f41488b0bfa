"""Versions of what is installed, and the instruction set and devices that were found."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from ._engine.cpu import available_isas, get_num_threads, isa

OPTIONAL = (
    "autograd",
    "cupy",
    "equinox",
    "flax",
    "jax",
    "ml_dtypes",
    "numba",
    "numba-cuda",
    "optree",
    "threadpoolctl",
    "torch",
)


def installed(distribution: str) -> str | None:
    """Return the version of a distribution, None where it is not installed; imports nothing."""
    from importlib import metadata  # late: it would be a quarter of `import optimisers`

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def gpus() -> str:
    """Return the names of the CUDA devices that Numba sees, or why there are none."""
    if installed("numba-cuda") is None:
        return "none (numba-cuda is not installed)"
    from numba import cuda

    if not cuda.is_available():
        return "none"
    return ", ".join(str(device.name) for device in cuda.gpus)


def facts() -> Iterator[tuple[str, str]]:
    """Yield the names and values that `show_versions` prints."""
    yield "optimisers", installed("optimisers") or "not installed"
    system = f"{platform.system()} {platform.machine()}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}, {system})"
    yield "numpy", installed("numpy") or "not installed"
    yield "array-api-compat", installed("array-api-compat") or "not installed"
    found = [f"{name} {version}" for name in OPTIONAL if (version := installed(name))]
    yield "optional", ", ".join(found) or "none"
    yield "kernels", f"{isa} (this processor runs {', '.join(available_isas)})"
    yield "threads", str(get_num_threads())
    yield "gpus", gpus()


def show_versions() -> None:
    """Print versions, instruction sets, threads, and which GPUs and optional libraries are here.

    ``python -m optimisers`` prints the same. A report of a fault should hold it.

    Examples
    --------
    >>> import optimisers
    >>> optimisers.show_versions()  # doctest: +ELLIPSIS
    optimisers        ...
    python            3...
    numpy             2...
    array-api-compat  1...
    optional          ...
    kernels           ...
    threads           ...
    gpus              ...
    """
    for name, value in facts():
        print(f"{name:<16}  {value}")
