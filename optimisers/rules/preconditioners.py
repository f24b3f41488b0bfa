"""Rules that keep a matrix for each axis of an array, and precondition with it: SOAP, Shampoo.

These are plain rules, evaluated by the array library of the parameter. Matrices are decomposed
once in so many steps; while JAX traces, that is a branch of the compiled program, so that the steps
between do not pay for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

import numpy as np

from .._arrays.branches import either
from .._arrays.dtypes import dtype_name, is_narrow, itemsize
from .._arrays.library import is_abstract, library_for, namespace
from .._arrays.traced import promoting
from ..words import abs2, ema_weight, is_complex, sqrt, where
from ._base import Array, Rule, adjusted, checked_state, misfit, refuse_strange, started
from ._fields import Count, Decay, Decays, Finite, Limit, NonNegative
from ._numbers import applied, as_count, as_like, count_like, counted, ema_scale, full_like, widened
from .adam import Adam
from .matrices import refuse_plain_memory

Matrices = tuple[Array, ...]
"""One for each axis; an empty array where an axis has none."""

Share = Annotated[float, Limit("in [0, 1]", lambda v: 0 <= v <= 1)]


# --- tools -----------------------------------------------------------------------------------


def eigenvectors(m: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of a symmetric matrix, least first, and its vectors as columns."""
    values, vectors = namespace(m).linalg.eigh(_decomposable(m))
    return as_like(m, values), as_like(m, vectors)


def orthonormal(m: Array) -> Array:
    """Return the orthogonal factor of a matrix."""
    return as_like(m, namespace(m).linalg.qr(_decomposable(m))[0])


def _decomposable(m: Array) -> Array:
    """Return a matrix in a dtype that linear algebra takes: in double for longdouble.

    It is a constant, since eigenvectors have no derivative where two eigenvalues are equal.
    """
    m = library_for(m).constant(m)
    return m.astype(np.float64) if itemsize(dtype_name(m.dtype)) > 8 else m


def times(x: Array, matrices: Matrices, axis: int) -> Array:
    """Return an array summed along each of its axes with an axis of that one's matrix."""
    xp = namespace(x)
    for m in matrices:  # the axis in front goes to the end, and so all to their places
        x = xp.tensordot(x, m, axes=([0], [axis])) if len(m.shape) > 1 else xp.moveaxis(x, 0, -1)
    return x


def products(g: Array, most: int) -> Matrices:
    """Return the inner products of all slices along each axis that is at most so long."""
    xp = namespace(g)
    axes = range(len(g.shape))
    return tuple(
        xp.tensordot(g, g, axes=([k for k in axes if k != axis],) * 2)
        if g.shape[axis] <= most
        else xp.reshape(g, (-1,))[:0]
        for axis in axes
    )


def refuse_complex(rule: Rule, x: Array) -> None:
    """Raise if a parameter of a rule for real numbers is complex."""
    if is_complex(x):
        raise TypeError(f"{rule._shown_as} takes real parameters only; got {x.dtype}")


# --- SOAP ------------------------------------------------------------------------------------


class SOAPState(NamedTuple):
    """The averages of Adam, and for each axis the products of slices and their eigenvectors."""

    m: Array
    v: Array
    L: Matrices
    Q: Matrices
    t: Array


@dataclass(frozen=True)
class SOAP(Rule):
    """Adam in the eigenbasis of Shampoo's preconditioner.

    ::

        g' = g turned into the bases Q
        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) g'²
        u  = (m turned / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + epsilon), turned back
        dx = eta u + eta lambda_ (x - eta u)
        L  = b2 L + (1 - b2) G Gᵀ             for each axis, with g unfolded along it as G

    where s counts the steps after the first gradient, which makes no step but the first ``L`` and,
    as its eigenvectors, ``Q``. Once in `every` steps each Q is made anew by one iteration with its
    L, the columns in order of size.

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` of the mean of g, ``b2`` of that of g'² and of L; in [0, 1).
    epsilon : float
        Added to what divides, in units of g.
    lambda_ : float
        Weight decay: per step, x shrinks by the share ``eta lambda_``.
    every : int
        In how many steps the bases are made anew once.
    max_dim : int
        Axes that are longer keep no matrix.

    Notes
    -----
    Keeps ``m``, ``v``, ``L``, ``Q``, all at least in float32, and the count ``t``; of arrays with
    fewer than two dimensions no matrices: there it is Adam one step late. Same numbers as the
    authors' code, which computes in float32. Derivatives through a step take the bases as
    constants.

    Raises
    ------
    TypeError
        In `setup`, for complex parameters and for arrays of Numba.

    References
    ----------
    N. Vyas et al.: SOAP: Improving and Stabilizing Shampoo using Adam, 2024, arXiv:2409.11321

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.zeros((2, 2)), np.array([[3.0, 1.0], [1.0, -4.0]])
    >>> rule = optimisers.SOAP(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([[0., 0.],
           [0., 0.]])
    """

    eta: NonNegative = 0.003
    beta: Decays = (0.95, 0.95)
    epsilon: NonNegative = 1e-8
    lambda_: Finite = 0.01
    every: Count = 10
    max_dim: Count = 10_000

    fixed = ("max_dim",)
    static = ("every",)
    real_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every", "max_dim"):
            object.__setattr__(self, name, int(getattr(self, name)))

    def init(self, x: Array) -> SOAPState:
        refuse_plain_memory(self, x)
        refuse_complex(self, x)
        m = full_like(widened(x), 0.0)
        L = self._products(m)
        return SOAPState(m, m * 1, L, tuple(a * 1 for a in L), count_like(x))

    def apply(self, state: Any, x: Array, dx: Array, *higher: Array) -> tuple[Any, Any]:
        if is_narrow(x):  # asked by hand: updates hand over float32
            state, dx = applied(self, state, x, dx, *higher)
            return state, as_like(x, dx)
        state = checked_state(self, state, SOAPState)
        if tuple(state.m.shape) != tuple(x.shape):
            raise ValueError(misfit(self, "m", state.m, x))
        t = counted(as_count(state.t, x))
        with promoting():
            parts = either(
                t == 1, lambda: self._first(state, x, dx), lambda: self._later(state, t, x, dx)
            )
        *made, step = parts
        return SOAPState._make([*made, as_like(t, t)]), as_like(x, step)

    def _products(self, g: Array) -> Matrices:
        return products(g, self.max_dim) if len(g.shape) > 1 else ()

    def _first(self, state: SOAPState, x: Array, g: Array) -> tuple[Any, ...]:
        L = tuple(
            as_like(a, (1 - self.beta[1]) * b)
            for a, b in zip(state.L, self._products(g), strict=True)
        )
        Q = tuple(
            namespace(a).flip(eigenvectors(a)[1], axis=1) if len(a.shape) > 1 else a * 1 for a in L
        )
        return state.m * 1, state.v * 1, L, Q, as_like(x, x * 0)

    def _later(self, state: SOAPState, t: Any, x: Array, g: Array) -> tuple[Any, ...]:
        b1, b2 = self.beta
        turned = times(g, state.Q, 0)
        m = b1 * state.m + (1 - b1) * g
        v = b2 * state.v + (1 - b2) * abs2(turned)
        rate, scale = 1 / ema_weight(b1, _less_one(t)), ema_scale(b2, _less_one(t))
        step = rate * times(m, state.Q, 0) / (scale * sqrt(v) + self.epsilon)
        step = self.eta * times(step, state.Q, 1)
        step = step + self.eta * self.lambda_ * (x - step)
        L = tuple(
            as_like(a, b2 * a + (1 - b2) * b)
            for a, b in zip(state.L, self._products(g), strict=True)
        )
        v = as_like(state.v, v)
        v, Q = either(
            (t - 1) % self.every == 0, lambda: _renewed(v, L, state.Q), lambda: (v, state.Q)
        )
        return as_like(state.m, m), v, L, Q, as_like(x, step)


def _less_one(t: Any) -> Any:
    return t - 1 if is_abstract(t) else int(t) - 1


def _renewed(v: Array, L: Matrices, Q: Matrices) -> tuple[Array, Matrices]:
    """Return the squares, and new bases, with all columns in order of their size."""
    xp = namespace(v)
    new = []
    for axis, (a, q) in enumerate(zip(L, Q, strict=True)):
        if len(a.shape) < 2:
            new.append(q)
            continue
        order = xp.argsort(-xp.sum(q * (a @ q), axis=0))
        v = xp.take(v, order, axis=axis)
        new.append(orthonormal(a @ xp.take(q, order, axis=1)))
    return v, tuple(new)


# --- Shampoo ---------------------------------------------------------------------------------


class ShampooState(NamedTuple):
    """The mean of the gradient, for each block and axis the products of slices and a root of them.

    And the state of the rule that gives the length of a step.
    """

    m: Array
    L: tuple[Matrices, ...]
    P: tuple[Matrices, ...]
    graft: Any
    t: Array


@dataclass(frozen=True)
class Shampoo(Rule):
    """Steps preconditioned by a root of the products of the gradient's slices along each axis.

    ::

        L  = b2 L + (1 - b2) G Gᵀ              for each of k axes; G Gᵀ is added where b2 is 1
        P  = (L / (1 - b2^t) + epsilon I)^(-1/2k)       once in `every` steps, and at first
        m  = b1 m + (1 - b1) g
        u  = m / (1 - b1^t), multiplied along each axis with its P
        dx = eta (u ‖a‖ / ‖u‖ + lambda_ x)     with the step a of the rule `graft`

    Parameters
    ----------
    eta : float
        Learning rate; with a graft of eta 1, in units of that rule's.
    beta : tuple of two floats
        Decay rates ``b1`` of the mean of g, in [0, 1), and ``b2`` of L, in [0, 1]: 1 for a sum.
    epsilon : float
        Added to the eigenvalues, in units of g² times the number of slices.
    every : int
        In how many steps roots are taken once.
    max_dim : int
        Longer axes are cut into blocks of this length, each with matrices of its own.
    graft : Rule, optional
        The rule whose step has the length that is taken, over the whole array; None for the length
        of u.
    lambda_ : float
        Weight decay: per step, x shrinks by the share ``eta lambda_``.

    Notes
    -----
    Keeps ``m``, ``L`` and ``P``, at least in float32, the state of `graft` and the count ``t``.
    Same numbers as Meta's ``DistributedShampoo`` where axes are not merged. Eigenvalues below 0, by
    rounding, are lifted to it.

    Raises
    ------
    TypeError
        In `setup`, for complex parameters and for arrays of Numba.

    References
    ----------
    V. Gupta, T. Koren, Y. Singer: Shampoo: Preconditioned Stochastic Tensor Optimization, 2018,
    arXiv:1802.09568; H. M. Shi et al., 2023, arXiv:2309.06497

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.zeros((2, 2)), np.array([[2.0, 0.0], [0.0, -0.5]])
    >>> rule = optimisers.Shampoo(eta=0.1, epsilon=0.0, graft=None)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> np.round(dx, 6) + 0.0
    array([[ 0.1,  0. ],
           [ 0. , -0.1]])
    """

    eta: NonNegative = 0.01
    beta: tuple[Decay, Share] = (0.9, 1.0)
    epsilon: NonNegative = 1e-6
    every: Count = 10
    max_dim: Count = 1024
    graft: Rule | None = Adam(1.0)  # noqa: RUF009
    lambda_: Finite = 0.0

    fixed = ("max_dim", "graft")
    static = ("every",)
    real_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every", "max_dim"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.graft is not None and not isinstance(self.graft, Rule):
            from .._messages.mixups import no_rule

            raise no_rule("Shampoo: graft must be a rule, or None", self.graft)

    def init(self, x: Array, *, index: int = 0) -> ShampooState:
        refuse_plain_memory(self, x)
        refuse_complex(self, x)
        m = full_like(widened(x), 0.0)
        L = tuple(products(m[block], self.max_dim) for block in self._blocks(x))
        P = tuple(tuple(a * 1 for a in matrices) for matrices in L)
        graft = () if self.graft is None else started(self.graft, x, index)
        return ShampooState(m, L, P, graft, count_like(x))

    def apply(self, state: Any, x: Array, dx: Array, *higher: Array) -> tuple[Any, Any]:
        if is_narrow(x):  # asked by hand: updates hand over float32
            state, dx = applied(self, state, x, dx, *higher)
            return state, as_like(x, dx)
        state = checked_state(self, state, ShampooState)
        if tuple(state.m.shape) != tuple(x.shape):
            raise ValueError(misfit(self, "m", state.m, x))
        b1, b2 = self.beta
        t = counted(as_count(state.t, x))
        count = t if is_abstract(t) else int(t)
        with promoting():
            m = b1 * state.m + (1 - b1) * dx
            blocks = [*self._blocks(x)]
            share = where(b2 == 1, 1.0, 1 - b2)
            L = tuple(
                tuple(
                    as_like(a, b2 * a + share * b)
                    for a, b in zip(old, products(dx[block], self.max_dim), strict=True)
                )
                for old, block in zip(state.L, blocks, strict=True)
            )
            seen = where(b2 == 1, 1.0, ema_weight(b2, count))
            P = either(
                (t == 1) | (t % self.every == 0), lambda: self._roots(L, seen), lambda: state.P
            )
            step = m / ema_weight(b1, count)
            step = _joined(
                step, blocks, [times(step[b], p, 0) for b, p in zip(blocks, P, strict=True)]
            )
            graft = state.graft
            if self.graft is not None:
                graft, like = self.graft.apply(graft, x, dx, *higher)
                step = step * _ratio(like, step)
            step = self.eta * (step + self.lambda_ * x)
        return ShampooState(as_like(state.m, m), L, P, graft, as_like(t, t)), as_like(x, step)

    def _blocks(self, x: Array) -> Iterator[tuple[slice, ...]]:
        """Yield the parts of an array of which no axis is longer than `max_dim`."""
        most = self.max_dim
        cuts = [
            [slice(k, min(k + most, n)) for k in range(0, n, most)] or [slice(0, 0)]
            for n in x.shape
        ]
        yield from itertools.product(*cuts)

    def _roots(self, L: tuple[Matrices, ...], seen: Any) -> tuple[Matrices, ...]:
        return tuple(
            tuple(self._root(as_like(a, a / seen), len(matrices)) for a in matrices)
            for matrices in L
        )

    def _root(self, a: Array, axes: int) -> Array:
        """Return ``(a + epsilon I)^(-1/(2 axes))``, with eigenvalues below 0 taken for 0."""
        if a.shape[0] == 0:
            return a * 1
        xp = namespace(a)
        values, vectors = eigenvectors(a)
        values = values + (self.epsilon - xp.minimum(xp.min(values), values[0] * 0))
        safe = xp.where(values > 0, values, xp.ones_like(values))  # for slices that are always 0
        power = -0.5 / axes
        powers = xp.where(values > 0, safe**power, xp.zeros_like(values))
        root = (vectors * powers) @ vectors.T
        still = library_for(a).constant(a)
        if still is not a:
            slopes = _slopes(xp.where(values > 0, values, xp.zeros_like(values)), powers, power)
            change = vectors.T @ (a - still) @ vectors
            root = root + vectors @ (slopes * change) @ vectors.T
        return as_like(a, root)

    def fields(self) -> Iterator[tuple[str, Any]]:
        own = dict(super().fields())
        yield from own.items()
        inner = self.graft.fields() if self.graft is not None else ()
        yield from ((name, value) for name, value in inner if name not in own)

    def adjust(self, **changes: Any) -> Self:
        refuse_strange(self, changes)
        own = dict(super().fields())
        inward = {name: value for name, value in changes.items() if name not in own}
        made = super().adjust(**{n: value for n, value in changes.items() if n in own})
        if made.graft is not None and inward:
            made = made._with({"graft": adjusted(made.graft, inward)})
        return made


def _slopes(values: Array, powers: Array, power: float) -> Array:
    """Return the slope of a power between each two values, and its derivative where they are equal.

    By these a matrix with such eigenvalues changes in its eigenbasis, when another one is added to
    what it is the power of (Daleckii and Krein). A change of zero carries the first derivative of
    the matrix, and no further ones.
    """
    xp = namespace(values)
    apart = values[:, None] - values[None, :]
    mean = (values[:, None] + values[None, :]) / 2
    is_apart = xp.abs(apart) > 1e-4 * mean
    has_slope = (values[:, None] > 0) & (values[None, :] > 0)
    safe = xp.where(has_slope, mean, xp.ones_like(mean))
    slope = xp.where(has_slope, power * safe ** (power - 1), xp.zeros_like(mean))
    change = powers[:, None] - powers[None, :]
    return xp.where(is_apart, change / xp.where(is_apart, apart, xp.ones_like(apart)), slope)


def _joined(x: Array, blocks: list[tuple[slice, ...]], parts: list[Array]) -> Array:
    """Return an array like `x` that is made of its blocks."""
    if len(blocks) == 1:
        return parts[0]
    xp = namespace(x)
    for axis in reversed(range(len(x.shape))):
        starts = sorted({block[axis].start for block in blocks})
        if len(starts) > 1:
            n = len(starts)
            parts = [xp.concat(parts[k : k + n], axis=axis) for k in range(0, len(parts), n)]
    return parts[0]


def _ratio(a: Array, b: Array) -> Array:
    """Return the ratio of the 2-norms of two arrays, and 0 where the second is zero."""
    xp = namespace(b)
    size = sqrt(xp.sum(abs2(b)))
    is_zero = size == 0
    size = xp.where(is_zero, xp.ones_like(size), size)
    return xp.where(is_zero, xp.zeros_like(size), sqrt(xp.sum(abs2(a))) / size)
