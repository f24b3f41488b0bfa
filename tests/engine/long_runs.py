"""Settings of the kernels before any test, and rules for runs over all of them."""

from __future__ import annotations

import numpy as np
from util import ELEMENTWISE, EXACT_CHAINS, example

from optimisers import AccumGrad, Adam, ClipNorm, Momentum, OptimiserChain
from optimisers._engine import cpu

BLOCK, CHAIN_BLOCK, WORK_PER_THREAD = cpu.kernels.settings()
NORMS = [ClipNorm(1e-3, p) for p in (2, 1, 0, 0.5, 3, -1, np.inf, -np.inf)]
RULES = [
    *map(example, ELEMENTWISE),
    *EXACT_CHAINS[::7],
    *NORMS,
    OptimiserChain(Adam(), ClipNorm(1e-2, 2), AccumGrad(2), ClipNorm(1e-3, 3), Momentum()),
]
