"""Rules made of rules, and what is not elementwise: chains, norms, means over steps, precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from . import _device
from ._arrays import is_narrow, isnumeric
from ._jax import Maybe, chosen, is_tracer, promoting
from ._rule import (
    ANEW,
    Count,
    Order,
    Rule,
    Upper,
    adjusted,
    applied,
    as_count,
    as_like,
    checked_state,
    count_like,
    counted,
    for_step,
    full_like,
    is_traced,
    largest_count,
    misfit,
    moved,
    refuse_strange,
    started,
    widened,
)
from ._text import short
from ._torch import is_mapped, is_tensor
from .rules import _Hold, _Release, _Scale
from .words import absolute, is_complex, namespace, where

Array = Any


@dataclass(frozen=True, init=False, repr=False)
class OptimiserChain(Rule):
    """Rules one after another: each hands its step to the next as the gradient.

    Parameters
    ----------
    *rules : Rule
        Rules in the order in which they see the gradient; chains too. An empty chain steps by the
        gradient itself. `MixedPrecision` goes around a chain, not into it.

    Notes
    -----
    Keeps a tuple of the states of its rules. Where a rule makes no step, as `AccumGrad` may, the
    rules after it are not asked and keep their state. `adjust` changes the rules that have the
    field; the others stay.

    Raises
    ------
    TypeError
        If something is no rule, or `MixedPrecision`.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import ClipGrad, Descent, OptimiserChain
    >>> rule = OptimiserChain(ClipGrad(1.0), Descent(eta=0.1))
    >>> x = np.zeros(2)
    >>> rule.apply(rule.init(x), x, np.array([0.5, -3.0]))
    (((), ()), array([ 0.05, -0.1 ]))
    """

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise _no_rule("OptimiserChain takes rules, one after another", rule)
            if isinstance(rule, MixedPrecision):
                raise TypeError(
                    "MixedPrecision cannot stand inside a chain; put the chain inside it: "
                    "MixedPrecision(OptimiserChain(...))"
                )
        object.__setattr__(self, "rules", rules)

    def __repr__(self) -> str:
        return f"OptimiserChain({', '.join(map(repr, self.rules))})"

    def init(self, x: Array, *, index: int = 0) -> tuple[Any, ...]:
        return tuple(started(rule, x, index) for rule in self.rules)

    def apply(
        self, state: tuple[Any, ...], x: Array, dx: Array, *higher: Array
    ) -> tuple[tuple[Any, ...], Array]:
        if not isinstance(state, tuple | list) or len(state) != len(self.rules):
            raise TypeError(
                f"{type(self).__name__} keeps the states of its {len(self.rules)} rules, got "
                f"{short(state)}; {ANEW}"
            )
        if is_narrow(x):  # asked by hand: updates hand over float32, and round no step
            return _rounded(x, *applied(self, state, x, dx, *higher))
        new = list(state)
        made: Any = None
        for k, rule in enumerate(self.rules):
            new[k], dx = rule.apply(state[k], x, dx, *higher)
            if made is not None:
                new[k] = chosen(made, new[k], state[k])
            if isinstance(dx, Maybe):
                made = dx.made if made is None else made & dx.made
                dx = dx.step
            if dx is None:
                break
        return tuple(new), dx if made is None or dx is None else Maybe(step=dx, made=made)

    def fields(self) -> Iterator[tuple[str, Any]]:
        for rule in self.rules:
            yield from rule.fields()

    def adjust(self, **changes: Any) -> Self:
        refuse_strange(self, changes)
        return type(self)(*(adjusted(rule, changes) for rule in self.rules))


def _rounded(x: Array, state: Any, dx: Any) -> tuple[Any, Any]:
    """Return a state beside a step in the dtype of `x`."""
    if isinstance(dx, Maybe):
        return state, Maybe(step=as_like(x, dx.step), made=dx.made)
    return state, None if dx is None else as_like(x, dx)


@dataclass(frozen=True)
class ClipNorm(Rule):
    """The gradient of each array scaled down to a norm: put it ahead of another rule.

    ::

        dx = g min(omega / ‖g‖_p, 1)

    Parameters
    ----------
    omega : float
        Largest norm that passes, in units of g (for p of 0, a count); inf is no limit, and leaves
        what `throw` says.
    p : float
        Which norm, ``sum(|g|^p)^(1/p)``: 2 by default; inf and -inf take the largest and the
        smallest element, 0 counts those that are not zero.
    throw : bool
        Whether a norm that is infinite or NaN raises; if not, the step is NaN, or 0 where an
        infinite norm meets a finite element. While JAX traces, nothing can raise: as if False.

    Raises
    ------
    FloatingPointError
        From an update, with the path of the array and before anything is written.

    Notes
    -----
    Keeps no state. Norms are those of `numpy.linalg.norm`, taken in double where the library has
    it at hand, and neither overflow nor underflow on the way. Each array has a norm of its own,
    unlike in `torch.nn.utils.clip_grad_norm_` and `optax.clip_by_global_norm`.

    References
    ----------
    R. Pascanu, T. Mikolov, Y. Bengio: On the Difficulty of Training Recurrent Neural Networks,
    2012, arXiv:1211.5063

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> rule = optimisers.ClipNorm(omega=1.0)
    >>> rule.apply((), np.zeros(2), np.array([3.0, -4.0]))
    ((), array([ 0.6, -0.8]))
    """

    omega: Upper = 10.0
    p: Order = 2.0
    throw: bool = True

    static = ("p",)

    def apply(self, state: tuple[()], x: Array, dx: Array, *higher: Array) -> tuple[Any, Array]:
        with promoting():
            factor = self.factor(norm(dx, self.p))
        _, dx = _Scale(factor).apply((), x, dx)
        return state, dx

    def factor(self, norm: Any) -> Any:
        """Return what a gradient of this norm is multiplied with."""
        if is_traced(norm) or is_traced(self.omega):
            passes = (norm <= self.omega) | (self.omega == math.inf)
            return where(passes, 1.0, self.omega / where(passes, 1.0, norm))
        if self.throw and not math.isfinite(norm.detach() if is_tensor(norm) else norm):
            raise FloatingPointError(
                f"ClipNorm: the gradient has {self.p:g}-norm {norm}; "
                "ClipNorm(..., throw=False) lets such gradients through"
            )
        if norm <= self.omega or self.omega == math.inf:
            return 1.0
        return self.omega / norm


def norm(x: Array, p: float) -> Any:
    """Return the p-norm of all elements of `x`, at least in double for NumPy arrays.

    Numbers are divided by the largest before they are raised to a power (by the smallest, if `p`
    is negative), so that no norm of representable size overflows or underflows on the way.
    """
    if math.prod(x.shape) == 0:
        return 0.0
    xp = namespace(x)
    if xp is np:
        x = np.astype(
            x, np.result_type(np.float64, x.dtype if x.dtype.kind in "fc" else 0), copy=False
        )
    elif x.dtype.itemsize < 4:
        x = xp.astype(x, xp.float32)
    size = absolute(x)
    if p == 0:
        return xp.sum(size != 0)
    extreme = xp.max(size) if p > 0 else xp.min(size)
    if math.isinf(p):
        return extreme
    scales = (extreme > 0) & xp.isfinite(extreme)  # else the norm is the extreme: 0, inf or nan
    unit = xp.where(scales, extreme, xp.ones_like(extreme))
    part = size / unit
    some = part > 0  # a power of 0 may have no derivative
    total = xp.where(scales, xp.sum(xp.where(some, xp.where(some, part, 1.0) ** p, 0.0)), 1.0)
    if abs(p) >= 1:
        found = unit * total ** (1 / p)
    else:  # by halves: for tiny p the whole root alone would overflow
        found = unit * total ** (0.5 / p) * total ** (0.5 / p)
    return xp.where(scales, found, extreme)


class AccumGradState(NamedTuple):
    """The gradients held, added up, and how many they are."""

    sum: Array
    count: Array

    @staticmethod
    def is_wide() -> bool:
        """Tell that its arrays are not rounded to a parameter of narrow numbers."""
        return True


@dataclass(frozen=True)
class AccumGrad(Rule):
    """The mean of n gradients, once in n steps: put it ahead of another rule.

    ::

        sum = sum + g                     for n - 1 steps, which the parameter does not follow
        dx  = (sum + g) / n; sum = 0      on the n-th

    Parameters
    ----------
    n : int
        How many gradients make a step; it cannot be adjusted later.

    Notes
    -----
    Keeps ``sum`` and ``count``, the number of gradients in it, from 0 to n - 1. The sum is in
    float32 where the parameter's numbers are narrower, else in its dtype; to keep it in that range
    is up to the user. Rules after it count only the steps that are made. While JAX traces, the
    rules after it are evaluated every time, and what they give is used once in n.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import AccumGrad, Descent, OptimiserChain, setup, update_
    >>> x = np.array([0.0])
    >>> state = setup(OptimiserChain(AccumGrad(2), Descent(eta=1.0)), x)
    >>> for g in ([1.0], [3.0], [7.0]):
    ...     state, x = update_(state, x, np.array(g))
    >>> x, state.state[0]
    (array([-2.]), AccumGradState(sum=array([7.]), count=array(1)))
    """

    n: Count

    fixed = ("n",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n", int(self.n))

    def init(self, x: Array) -> AccumGradState:
        return AccumGradState(full_like(widened(x), 0.0), count_like(x))

    def apply(
        self, state: AccumGradState, x: Array, dx: Array, *higher: Array
    ) -> tuple[AccumGradState, Array | None]:
        state = checked_state(self, state, AccumGradState)
        if tuple(state.sum.shape) != tuple(x.shape):
            raise ValueError(misfit(self, "sum", state.sum, x))
        # Earlier versions kept the sum as narrow as the parameter is.
        state = AccumGradState(widened(state.sum), as_count(state.count, x))
        if is_tracer(state.count) or is_mapped(state.count):
            return self._traced(state, x, dx)
        if int(state.count) < self._last(state.count):
            (total,), _ = _Hold().apply((state.sum,), x, dx)
            return AccumGradState(total, as_like(state.count, counted(state.count))), None
        (total,), mean = _Release(self.n).apply((state.sum,), x, dx)
        return AccumGradState(total, as_like(state.count, state.count * 0)), mean

    def _last(self, count: Array) -> int:
        """Return how many gradients are held when the next one makes the step."""
        return min(self.n - 1, largest_count(count))

    def _traced(self, state: AccumGradState, x: Array, dx: Array) -> tuple[AccumGradState, Maybe]:
        made = state.count >= self._last(state.count)
        (total,), _ = _Hold().apply((state.sum,), x, dx)
        (zero,), mean = _Release(self.n).apply((state.sum,), x, dx)
        held = AccumGradState(total, as_like(state.count, counted(state.count)))
        emptied = AccumGradState(zero, as_like(state.count, state.count * 0))
        return chosen(made, emptied, held), Maybe(step=mean, made=made)


class MixedPrecisionState(NamedTuple):
    """The parameter in the precision in which it is updated, and the state of its rule."""

    master: Array
    state: Any


@dataclass(frozen=True, init=False, repr=False)
class MixedPrecision(Rule):
    """A rule that runs in higher precision than the parameter: put it around all others.

    A master copy of the parameter is updated and then rounded into the parameter, so that steps
    too small for the parameter's dtype add up.

    Parameters
    ----------
    dtype : dtype, default float32
        The floating dtype of the master copy and of the rule's state; complex parameters get the
        complex dtype of that precision. It cannot be adjusted later.
    rule : Rule
        The rule, often an `OptimiserChain`.

    Notes
    -----
    ``MixedPrecision(rule)`` does for ``MixedPrecision("float32", rule)``. Keeps ``master`` and
    ``state``. The master copy rules: a parameter changed by hand is overwritten by the next step.
    Gradients of another dtype than the parameter's are brought to that of the master copy, not
    rounded to the parameter's.

    Raises
    ------
    TypeError
        If `dtype` is no floating dtype, or `rule` no rule or itself a `MixedPrecision`.

    References
    ----------
    P. Micikevicius et al.: Mixed Precision Training, 2017, arXiv:1710.03740

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Descent, MixedPrecision, setup, update_
    >>> x = np.array([1.0], np.float16)
    >>> state = setup(MixedPrecision(Descent(eta=2**-13)), x)
    >>> for _ in range(8):
    ...     state, x = update_(state, x, np.array([1.0]))
    >>> x, state.state.master
    (array([0.999], dtype=float16), array([0.99902344], dtype=float32))
    """

    dtype: np.dtype[Any]
    rule: Rule

    fixed = ("dtype",)
    _widens = False

    def __init__(self, dtype: Any, rule: Rule | None = None) -> None:
        if rule is None:
            dtype, rule = np.float32, dtype
        if not isinstance(rule, Rule) or isinstance(rule, MixedPrecision):
            raise _no_rule("MixedPrecision takes a rule, after the dtype if any", rule)
        object.__setattr__(self, "dtype", _floating(dtype))
        object.__setattr__(self, "rule", rule)

    def __repr__(self) -> str:
        return f"MixedPrecision({self.dtype.name!r}, {self.rule!r})"

    def init(self, x: Array, *, index: int = 0) -> MixedPrecisionState:
        master = self._lift(x)
        return MixedPrecisionState(master, started(self.rule, master, index))

    def apply(
        self, state: MixedPrecisionState, x: Array, dx: Array, *higher: Array
    ) -> tuple[MixedPrecisionState, Array]:
        state, new = self.move(state, x, dx, *higher)
        return state, None if new is None else as_like(x, widened(x) - widened(new))

    def move(
        self, state: MixedPrecisionState, x: Array, dx: Array, *higher: Array
    ) -> tuple[MixedPrecisionState, Array]:
        state = checked_state(self, state, MixedPrecisionState)
        if isnumeric(state.master) and tuple(state.master.shape) != tuple(x.shape):
            raise ValueError(misfit(self, "master", state.master, x))
        inner, master = moved(
            self.rule, state.state, state.master,
            *(g if g is None else for_step(state.master, g) for g in (dx, *higher)),
        )  # fmt: skip
        if master is None:
            return MixedPrecisionState(state.master, inner), None
        new = as_like(x, master)
        if new.dtype == master.dtype:  # and so may be the same memory
            new = self._lift(new)
        return MixedPrecisionState(master, inner), new

    def _lift(self, x: Array) -> Array:
        """Return a copy of `x` in the master's precision."""
        dtype = np.result_type(self.dtype, np.complex64) if is_complex(x) else self.dtype
        if isinstance(x, np.ndarray):
            return np.array(x, dtype, order="K")
        if _device.is_numba(x):
            return _device.astype(x, dtype)
        xp = namespace(x)
        return xp.astype(x, getattr(xp, dtype.name), copy=True)

    def fields(self) -> Iterator[tuple[str, Any]]:
        yield "dtype", self.dtype
        yield from self.rule.fields()

    def adjust(self, **changes: Any) -> Self:
        refuse_strange(self, changes)
        if "dtype" in changes:
            return super().adjust(dtype=changes["dtype"])
        return type(self)(self.dtype, adjusted(self.rule, changes))


def _no_rule(told: str, got: Any) -> TypeError:
    from ._mixups import no_rule

    return no_rule(told, got)


def _floating(dtype: Any) -> np.dtype[Any]:
    """Return a real floating dtype, of NumPy or of `ml_dtypes`; PyTorch's are known by name."""
    name = str(dtype)
    try:
        found = np.dtype(name.removeprefix("torch.") if name.startswith("torch.") else dtype)
        # Those of `ml_dtypes` are of the kind V and registered; other such dtypes have any size.
        is_number = found.kind == "f" or found.isbuiltin == 2
        holds_half = dtype is not None and is_number and float(np.array(0.5).astype(found)) == 0.5
    except (TypeError, ValueError):
        holds_half = False
    if not holds_half:
        raise TypeError(f"MixedPrecision: dtype must be a real floating dtype; got {short(dtype)}")
    return found.newbyteorder("=")
