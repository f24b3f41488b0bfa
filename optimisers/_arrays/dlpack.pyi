from collections.abc import Callable
from typing import Any

import numpy as np

def owner() -> int: ...

class Viewer:
    def __init__(
        self,
        capsule: Any,
        cls: type,
        other: type,
        bfloat16: Callable[[], np.dtype[Any] | None],
    ) -> None: ...
    def view(self, x: Any) -> np.ndarray | None: ...
    def view_state(self, state: Any) -> Any: ...
