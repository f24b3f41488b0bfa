"""Rules that see an array as a matrix and step along its orthogonal factor: Muon, Scion.

The matrix of an array has a row for each output: an array of two dimensions as it is, of more with
all other axes as columns. These are plain rules, evaluated by the array library of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from .._arrays.dtypes import is_narrow
from .._arrays.library import library_for, namespace
from .._arrays.traced import promoting
from .._messages.text import short
from ..words import abs2, is_complex, sqrt
from ._base import Array, Rule, adjusted, checked_state, misfit, refuse_strange, started
from ._fields import Axis, Count, Decay, Finite, NonNegative
from ._numbers import applied, as_like, full_like, widened
from .adam import AdamW

Triple = tuple[float, float, float]

COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
"""The triples (a, b, c) of an iteration, by the name under which they are known; it goes on with
the last. They map singular values to about 1: to 0.7 and 1.2, as "jordan" does, suffices."""

SCALES = "original", "rms", "spectral"

OTHER = AdamW(3e-4, (0.9, 0.95), 0.0, 1e-10)
"""The rule beside Muon, as its author has it."""


def orthogonal(u: Array, triples: tuple[Triple, ...], safety: float = 1.0) -> Array:
    """Return about ``U Vᵀ`` for a matrix ``U S Vᵀ``, by a Newton-Schulz iteration.

    Its length is divided by its 2-norm of all elements times `safety` first, so that no singular
    value is above 1. A matrix of zeros stays so.
    """
    xp = namespace(u)
    is_tall = u.shape[0] > u.shape[1]
    u = u.T if is_tall else u
    u = u / (safety * sqrt(xp.sum(abs2(u))) + 1e-7)
    for a, b, c in triples:
        gram = u @ (xp.conj(u.T) if is_complex(u) else u.T)
        u = a * u + (b * gram + c * (gram @ gram)) @ u
    return u.T if is_tall else u


def as_matrix(x: Array, outputs: int) -> Array:
    """Return an array of two or more dimensions with a row for each entry of the axis `outputs`."""
    xp = namespace(x)
    rows = x.shape[outputs]
    return xp.reshape(xp.moveaxis(x, outputs, 0), (rows, math.prod(x.shape) // max(rows, 1)))


def from_matrix(m: Array, x: Array, outputs: int) -> Array:
    """Return a matrix that `as_matrix` made of an array like `x` as such an array."""
    xp = namespace(m)
    shape = list(x.shape)
    shape.insert(0, shape.pop(outputs))
    return xp.moveaxis(xp.reshape(m, tuple(shape)), 0, outputs)


def triples_of(rule: Rule, coefficients: Any, steps: int) -> tuple[Triple, ...]:
    """Return `steps` triples: the first of those that are named or given, and then the last."""
    found = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
    return tuple(found[min(k, len(found) - 1)] for k in range(steps))


def refuse_plain_memory(rule: Rule, x: Array) -> None:
    """Raise if the library of `x` cannot multiply matrices."""
    library = library_for(x)
    if not library.computes:
        raise TypeError(
            f"{type(rule).__name__} multiplies matrices, which arrays of {library.name} cannot; "
            "make the parameters arrays of CuPy, PyTorch or JAX"
        )


class MuonState(NamedTuple):
    """The mean of the gradient."""

    m: Array


class NormalisedMuonState(NamedTuple):
    """The mean of the gradient, and for each row one of the squares of the orthogonal factor."""

    m: Array
    v: Array


@dataclass(frozen=True)
class Muon(Rule):
    """Steps along the orthogonal factor of a mean of the gradient, for matrices; others by `other`.

    ::

        m  = rho m + (1 - rho) g
        u  = (1 - rho) g + rho m         if nesterov, else m
        O  = U Vᵀ, where u = U S Vᵀ      about, by `steps` products of matrices
        dx = eta (s O + lambda_ x)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: with scale "original" the size of the singular values of a
        step.
    rho : float
        Decay rate of the mean, in [0, 1).
    lambda_ : float
        Weight decay: per step, x shrinks by the share ``eta lambda_``.
    scale : {"original", "rms", "spectral"}
        The factor s of a matrix of r rows and c columns: ``sqrt(max(1, r/c))``, by which the author
        scales; ``0.2 sqrt(max(r, c))``, which makes steps as long as Adam's, so that its eta fits;
        ``sqrt(r/c)``.
    coefficients : {"jordan", "quintic", "polar"} or tuple of triples
        The polynomials of the iteration; triples ``(a, b, c)`` of your own stand for
        ``a X + (b A + c A²) X`` with ``A = X Xᵀ``.
    steps : int
        How many of them; where there are fewer, the last one is repeated.
    nesterov : bool
        Whether the mean looks ahead.
    rows : float, optional
        Decay rate of a mean of the squares in each row of O, by whose root the row is divided, the
        whole then having its length again (NorMuon); None for no such mean.
    other : Rule
        The rule of arrays with fewer than two dimensions.
    outputs : int
        The axis that counts outputs, the rows of the matrix: 0 in PyTorch's layout, -1 in that of
        Flax and Keras.

    Notes
    -----
    Keeps ``m``, with `rows` also ``v``; for other arrays the state of `other`. Same numbers as
    `torch.optim.Muon` in double, whose decay is 0.1 unless set, and as the author's. Embeddings and
    the last layer are matrices, and yet better left to another rule: give them one of their own.
    `adjust` changes `eta` and `lambda_` of this rule alone.

    References
    ----------
    K. Jordan et al.: Muon: An optimizer for hidden layers in neural networks, 2024.
    J. Liu et al.: Muon is Scalable for LLM Training, 2025, arXiv:2502.16982 ("rms").
    N. Amsel et al.: The Polar Express, 2025, arXiv:2505.16932 ("polar").
    Z. Li et al.: NorMuon, 2025, arXiv:2510.05491 (`rows`)

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.zeros((2, 2)), np.array([[3.0, 0.0], [0.0, -4.0]])
    >>> rule = optimisers.Muon(eta=0.1, coefficients="polar")
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> np.round(dx, 1)
    array([[ 0.1,  0. ],
           [ 0. , -0.1]])
    """

    eta: NonNegative = 0.02
    rho: Decay = 0.95
    lambda_: Finite = 0.0
    scale: str = "original"
    coefficients: str | tuple[Triple, ...] = "jordan"
    steps: Count = 5
    nesterov: bool = True
    rows: Decay | None = None
    other: Rule = OTHER
    outputs: Axis = 0

    fixed = ("rows", "outputs")
    static = ("steps",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "outputs"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.scale not in SCALES:
            known = ", ".join(map(repr, SCALES))
            raise ValueError(f"Muon: scale must be one of {known}; got {short(self.scale)}")
        object.__setattr__(self, "coefficients", _checked_triples(self.coefficients))
        if not isinstance(self.other, Rule):
            from .._messages.mixups import no_rule

            raise no_rule("Muon: other must be a rule, for arrays that are no matrices", self.other)

    def init(self, x: Array, *, index: int = 0) -> Any:
        if len(x.shape) < 2:
            return started(self.other, x, index)
        refuse_plain_memory(self, x)
        m = full_like(x, 0.0)
        if self.rows is None:
            return MuonState(m)
        squares = abs2(as_matrix(widened(m), self.outputs))
        return NormalisedMuonState(m, namespace(x).sum(squares, axis=1))

    def apply(self, state: Any, x: Array, dx: Array, *higher: Array) -> tuple[Any, Any]:
        if len(x.shape) < 2:
            return self.other.apply(state, x, dx, *higher)
        if is_narrow(x):  # asked by hand: updates hand over float32
            state, dx = applied(self, state, x, dx, *higher)
            return state, as_like(x, dx)
        kind = MuonState if self.rows is None else NormalisedMuonState
        state = checked_state(self, state, kind)
        if tuple(state.m.shape) != tuple(x.shape):
            raise ValueError(misfit(self, "m", state.m, x))
        rest = 1 - self.rho
        with promoting():
            m = self.rho * state.m + rest * dx
            u = as_matrix(rest * dx + self.rho * m if self.nesterov else m, self.outputs)
            triples = triples_of(self, self.coefficients, self.steps)
            o = orthogonal(u, triples, 1.02 if self.coefficients == "polar" else 1.0)
            made = {"m": as_like(state.m, m)}
            if self.rows is not None:
                o, v = _normalised(o, state.v, self.rows)
                made["v"] = as_like(state.v, v)
            step = from_matrix(self._factor(*u.shape) * o, x, self.outputs)
            return kind(**made), as_like(x, self.eta * (step + self.lambda_ * x))

    def _evaluated(self, state: Any, x: Array) -> Array:
        return self.other._evaluated(state, x) if len(x.shape) < 2 else x

    def _factor(self, rows: int, columns: int) -> float:
        if self.scale == "rms":
            return 0.2 * math.sqrt(max(rows, columns))
        ratio = rows / max(columns, 1)
        return math.sqrt(ratio if self.scale == "spectral" else max(1.0, ratio))

    def fields(self) -> Iterator[tuple[str, Any]]:
        own = dict(super().fields())
        yield from own.items()
        yield from ((name, value) for name, value in self.other.fields() if name not in own)

    def adjust(self, **changes: Any) -> Self:
        refuse_strange(self, changes)
        own = dict(super().fields())
        inward = {name: value for name, value in changes.items() if name not in own}
        changes = {name: value for name, value in changes.items() if name in own}
        if inward:
            changes["other"] = adjusted(changes.get("other", self.other), inward)
        return super().adjust(**changes)


def _normalised(o: Array, v: Array, rho: float) -> tuple[Array, Array]:
    """Return a factor whose rows have about the same length, and the mean of their squares."""
    xp = namespace(o)
    squares = abs2(o)
    v = rho * v + (1 - rho) * xp.sum(squares, axis=1) / max(o.shape[1], 1)
    before = sqrt(xp.sum(squares))
    o = o / (sqrt(v)[:, None] + 1e-10)
    return o * (before / (sqrt(xp.sum(abs2(o))) + 1e-10)), v


def _checked_triples(given: Any) -> Any:
    """Return the name of triples, or triples of Python numbers."""
    if isinstance(given, str) and given in COEFFICIENTS:
        return given
    try:
        triples = tuple((float(a), float(b), float(c)) for a, b, c in given)
        if not triples or not all(math.isfinite(n) for triple in triples for n in triple):
            raise ValueError
    except (TypeError, ValueError):
        known = ", ".join(map(repr, COEFFICIENTS))
        raise ValueError(
            f"Muon: coefficients must be one of {known}, or triples (a, b, c) of finite numbers; "
            f"got {short(given)}"
        ) from None
    return triples


@dataclass(frozen=True)
class Scion(Rule):
    """Steps of one size in a norm that fits the array: the spectral norm for matrices.

    ::

        m  = rho m + (1 - rho) g
        dx = eta (radius l + x)      if constrained, else eta radius l

    with ``l = sqrt(out / in) O`` for matrices, where O is about the orthogonal factor of m, as in
    `Muon`; divided by the size of the kernel for arrays of more dimensions; and
    ``l = m / (rms(m) + 1e-8)`` for arrays of fewer.

    Parameters
    ----------
    eta : float
        Learning rate; constrained, the share of the way to the ball's border.
    rho : float
        Decay rate of the mean, in [0, 1).
    radius : float
        Radius of the ball, in units of x.
    constrained : bool
        Whether x is drawn into the ball by weight decay.
    outputs : int
        The axis that counts outputs: 0 in PyTorch's layout, -1 in that of Flax and Keras. The axis
        of inputs is the one beside it.

    Notes
    -----
    Keeps ``m``. Same numbers as the authors' code in double.

    References
    ----------
    T. Pethick et al.: Training Deep Learning Models with Norm-Constrained LMOs, 2025,
    arXiv:2502.07529

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.zeros(2), np.array([3.0, -4.0])
    >>> rule = optimisers.Scion(eta=0.1, radius=1.0)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.08485281, -0.11313708])
    """

    eta: NonNegative = 0.001
    rho: Decay = 0.9
    radius: NonNegative = 50.0
    constrained: bool = True
    outputs: Axis = 0

    fixed = ("outputs",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "outputs", int(self.outputs))

    def init(self, x: Array) -> MuonState:
        refuse_plain_memory(self, x)
        return MuonState(full_like(x, 0.0))

    def apply(self, state: Any, x: Array, dx: Array, *higher: Array) -> tuple[Any, Any]:
        if is_narrow(x):  # asked by hand: updates hand over float32
            state, dx = applied(self, state, x, dx, *higher)
            return state, as_like(x, dx)
        state = checked_state(self, state, MuonState)
        if tuple(state.m.shape) != tuple(x.shape):
            raise ValueError(misfit(self, "m", state.m, x))
        with promoting():
            m = self.rho * state.m + (1 - self.rho) * dx
            step = self.radius * self._direction(m)
            step = self.eta * (step + x if self.constrained else step)
            return MuonState(as_like(state.m, m)), as_like(x, step)

    def _direction(self, m: Array) -> Array:
        """Return the array of size 1 along which the mean has the largest inner product."""
        xp = namespace(m)
        if len(m.shape) < 2:
            size = max(math.prod(m.shape), 1)
            return m / (sqrt(xp.sum(abs2(m)) / size) + 1e-8)
        triples = triples_of(self, "jordan", 5)
        o = from_matrix(orthogonal(as_matrix(m, self.outputs), triples), m, self.outputs)
        out = m.shape[self.outputs]
        inside = m.shape[1 if self.outputs == 0 else self.outputs - 1]
        kernel = math.prod(m.shape) // max(out * inside, 1)
        return o * (math.sqrt(out / max(inside, 1)) / max(kernel, 1))
