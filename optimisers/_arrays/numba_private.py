"""Parts of numba-cuda that it does not promise to keep; no other file of the package uses them.

Its extras allow the next minor version. What a version changes is mended here. Which classes its
arrays have `_arrays` knows by their names, since they must be told apart before it is loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def is_simulated(x: Any) -> bool:
    """Tell whether an array of Numba lies in the simulator's memory."""
    return type(x).__name__ == "FakeCUDAArray"


def address(x: Any) -> int:
    """Return the address of the numbers of an array."""
    if is_simulated(x):
        return int(x._ary.ctypes.data)
    return x.device_ctypes_pointer.value or 0


def device(x: Any) -> int:
    """Return the number of the device on which an array lies."""
    return 0 if is_simulated(x) or not x.size else int(x.gpu_data.context.device.id)


def assign_simulated(x: Any, values: Any) -> None:
    """Write into an array of the simulator."""
    x._ary[...] = getattr(values, "_ary", values)


def view(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Return a view of an array on a device, with another shape and other strides."""
    return type(x)(shape, strides, x.dtype, stream=x.stream, gpu_data=x.gpu_data)


def loaded(made: Any) -> Any:
    """Return a compiled kernel on the current device, as an object of CUDA's own package."""
    made.bind()
    return made.library.get_cufunc().kernel


def send(values: np.ndarray, target: Any, stream: Any) -> None:
    """Enqueue a copy of bytes of the host into the head of an array of a device."""
    from numba.cuda.cudadrv import driver

    driver.host_to_device(target, values, values.size, stream)


def fetch(source: Any, host: np.ndarray, stream: Any) -> None:
    """Enqueue a copy of the head of an array of a device into one of the host."""
    from numba.cuda.cudadrv import driver

    driver.device_to_host(host, source, host.nbytes, stream)
