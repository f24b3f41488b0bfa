"""Every rule of the registry in every dtype of the kernels, and chains of them."""

from __future__ import annotations

import optimisers as opt

from .models import RULES, gradient_of, normal


class EveryRule:
    """One step of a rule alone."""

    params = (list(RULES), ["float32", "float64"], [10, 10_000, 1_000_000])
    param_names = ("rule", "dtype", "size")

    def setup(self, rule: str, dtype: str, size: int) -> None:
        self.x = normal(size, dtype=dtype)
        self.grad = gradient_of(self.x)
        self.state = opt.setup(RULES[rule], self.x)
        opt.update_(self.state, self.x, self.grad)

    def time_update_(self, rule: str, dtype: str, size: int) -> None:
        opt.update_(self.state, self.x, self.grad)


CHAINS = {
    "ClipGrad, WeightDecay, Adam": (opt.ClipGrad(), opt.WeightDecay(), opt.Adam()),
    "ClipNorm, WeightDecay, Adam": (opt.ClipNorm(), opt.WeightDecay(), opt.Adam()),
    "Adam, ClipNorm": (opt.Adam(), opt.ClipNorm()),
    "AccumGrad, Adam": (opt.AccumGrad(4), opt.Adam()),
    "eight rules": (opt.WeightDecay(), opt.SignDecay(), opt.ClipGrad(), opt.Momentum()) * 2,
}


class Chains:
    """One step of a chain, over one array and over many."""

    params = (list(CHAINS), ["float32", "float64"], [(1, 1_000_000), (100, 1_000)])
    param_names = ("chain", "dtype", "arrays")

    def setup(self, chain: str, dtype: str, arrays: tuple[int, int]) -> None:
        count, size = arrays
        self.model = [normal(size, dtype=dtype) for _ in range(count)]
        self.grad = gradient_of(self.model)
        self.state = opt.setup(opt.OptimiserChain(*CHAINS[chain]), self.model)
        opt.update_(self.state, self.model, self.grad)

    def time_update_(self, chain: str, dtype: str, arrays: tuple[int, int]) -> None:
        opt.update_(self.state, self.model, self.grad)


class HalfPrecision:
    """One step of Adam over parameters of two bytes with a master copy of four."""

    params = (["float16", "bfloat16"], [10_000, 1_000_000])
    param_names = ("dtype", "size")

    def setup(self, dtype: str, size: int) -> None:
        if dtype == "bfloat16":
            try:
                import ml_dtypes  # noqa: F401 (makes the dtype known to NumPy)
            except ImportError:
                raise NotImplementedError from None  # asv's word for "leave this out"
        self.x = normal(size, dtype=dtype)
        self.grad = gradient_of(self.x)
        self.state = opt.setup(opt.MixedPrecision(opt.Adam()), self.x)
        opt.update_(self.state, self.x, self.grad)

    def time_update_(self, dtype: str, size: int) -> None:
        opt.update_(self.state, self.x, self.grad)


class Threads:
    """One step of Adam on one thread, and on all (0)."""

    params = ([1, 0], [10_000, 100_000, 1_000_000])
    param_names = ("threads", "size")

    def setup(self, threads: int, size: int) -> None:
        opt.set_num_threads(threads)
        self.x = normal(size)
        self.grad = gradient_of(self.x)
        self.state = opt.setup(opt.Adam(), self.x)
        opt.update_(self.state, self.x, self.grad)

    def teardown(self, threads: int, size: int) -> None:
        opt.set_num_threads(0)

    def time_update_(self, threads: int, size: int) -> None:
        opt.update_(self.state, self.x, self.grad)
