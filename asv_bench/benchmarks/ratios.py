"""Our time as a part of a peer's, measured in turn; the peers need not be installed."""

from __future__ import annotations

import optimisers as opt

from .measure import alternate
from .models import MODELS, gradient_of, normal
from .peers import optax_step, torch_step

PEERS = {
    "PyTorch, fused": lambda xs, gs: torch_step("Adam", xs, gs, fused=True),
    "optax, jitted, donated": optax_step,
}
SMALL = {"one array of 10": lambda: normal(10), "one array of 1,000": lambda: normal(1_000)}


class Ratios:
    """Adam's `update_`; asv takes a rise for a loss, so the peer stands below the line."""

    params = (list(PEERS), [*SMALL, *MODELS])
    param_names = ("peer", "model")
    unit = "of the peer's time"
    timeout = 180

    def setup(self, peer: str, name: str) -> None:
        self.model = (SMALL | MODELS)[name]()
        self.grad = gradient_of(self.model)
        self.state = opt.setup(opt.Adam(), self.model)
        try:
            self.peer = PEERS[peer](opt.trainables(self.model), opt.trainables(self.grad))
        except ImportError:
            raise NotImplementedError from None  # asv's word for "leave this out"

    def track_update_(self, peer: str, name: str) -> float:
        def ours() -> None:
            opt.update_(self.state, self.model, self.grad)

        return alternate({"ours": ours, "peer": self.peer}, runs=7).ratio("ours", "peer")
