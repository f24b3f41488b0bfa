"""Everything that walks a whole model, over models of well-known shapes."""

from __future__ import annotations

import optimisers as opt

from .models import MODELS, gradient_of


class Trees:
    """Adam over a model, and the ways between a model and its flat vector."""

    params = (list(MODELS),)
    param_names = ("model",)

    def setup(self, name: str) -> None:
        self.model = MODELS[name]()
        self.grad = gradient_of(self.model)
        self.state = opt.setup(opt.Adam(), self.model)
        opt.update_(self.state, self.model, self.grad)
        self.flat, self.rebuild = opt.destructure(self.model)
        self.flat_grad = self.rebuild.flatten_gradient(self.grad)
        self.flat_state = opt.setup(opt.Adam(), self.flat)
        opt.update_(self.flat_state, self.flat, self.flat_grad)

    def time_setup(self, name: str) -> None:
        opt.setup(opt.Adam(), self.model)

    def time_update(self, name: str) -> None:
        opt.update(self.state, self.model, self.grad)

    def time_update_(self, name: str) -> None:
        opt.update_(self.state, self.model, self.grad)

    def time_update_of_flat_vector_(self, name: str) -> None:
        opt.update_(self.flat_state, self.flat, self.flat_grad)

    def time_destructure(self, name: str) -> None:
        opt.destructure(self.model)

    def time_rebuild(self, name: str) -> None:
        self.rebuild(self.flat)

    def time_flatten_gradient(self, name: str) -> None:
        self.rebuild.flatten_gradient(self.grad, out=self.flat_grad)

    def time_trainables(self, name: str) -> None:
        opt.trainables(self.model)
