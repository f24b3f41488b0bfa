"""What it costs to have the library: memory and the time of its import."""

from __future__ import annotations

import optimisers as opt

from .measure import memory_growth
from .models import MODELS, gradient_of


class Memory:
    """Peak memory of the whole process, model, gradient and state included."""

    params = (["update_", "update"], list(MODELS))
    param_names = ("call", "model")

    def setup(self, call: str, name: str) -> None:
        self.model = MODELS[name]()
        self.grad = gradient_of(self.model)
        self.state = opt.setup(opt.Adam(), self.model)

    def peakmem_step(self, call: str, name: str) -> None:
        getattr(opt, call)(self.state, self.model, self.grad)


class Growth:
    """By how much `update_` raises the peak; it should not depend on the size."""

    params = ([100_000, 10_000_000],)
    param_names = ("size",)
    unit = "bytes"

    def track_update_(self, size: int) -> int:
        grown = memory_growth(size)
        if grown is None:
            raise NotImplementedError  # asv's word for "leave this out"
        return grown


def timeraw_import() -> str:
    return "import optimisers"


def timeraw_import_beyond_numpy() -> tuple[str, str]:
    return "import optimisers", "import numpy"
