"""The rules of this library as methods of `scipy.optimize.minimize`.

>>> import numpy as np, optimisers
>>> from scipy.optimize import minimize, rosen, rosen_der
>>> method = optimisers.scipy.method(optimisers.Adam(0.05))
>>> result = minimize(rosen, np.zeros(3), jac=rosen_der, method=method)
>>> result.success, result.x.round(3)
(True, array([1., 1., 1.]))
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays.library import refuse_masked
from ._messages.calls import explained, no_name
from ._messages.text import short
from ._state import setup, update_
from .rules._base import Rule

__all__ = ["Method", "method"]

Array = np.ndarray[Any, Any]

CONVERGED = "Optimization terminated successfully."
REACHED_LIMIT = "Maximum number of iterations has been exceeded."
NOT_FINITE = "NaN or infinite result encountered."
STOPPED = "`callback` raised `StopIteration`."


def _hint(name: str) -> str:
    return "" if name else "write method=optimisers.scipy.method(rule), called with the rule alone"


@explained(_hint)
def method(rule: Rule) -> Method:
    """Return a rule as a `method` for `scipy.optimize.minimize`.

    Parameters
    ----------
    rule : Rule
        Any rule, such as ``Adam(0.05)`` or an `OptimiserChain`.

    Returns
    -------
    Method
        What SciPy takes as ``method=``; its docstring tells options and results.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.optimize import Bounds, minimize
    >>> from optimisers import Momentum
    >>> from optimisers.scipy import method
    >>> def fun(x):
    ...     return np.sum((x - 3) ** 2), 2 * (x - 3)
    >>> result = minimize(
    ...     fun, [0.0, 0.0], jac=True, method=method(Momentum(0.1, 0.5)), bounds=Bounds(-1, [2, 5])
    ... )
    >>> result.x.round(4), result.message
    (array([2., 3.]), 'Optimization terminated successfully.')
    """
    if not isinstance(rule, Rule):
        from ._messages.mixups import no_rule

        raise no_rule("method takes a rule of this library", rule)
    return Method(rule)


@dataclass(frozen=True)
class Method:
    """A rule that SciPy calls as one of its methods; made by `method`.

    It takes what ``method="L-BFGS-B"`` takes. `jac` is a function, or True where `fun` returns
    ``(value, gradient)``; without it the gradient is a finite difference, which does not leave the
    bounds. SciPy keeps the text of ``jac="2-point"``, ``"3-point"`` and ``"cs"`` from methods of
    others, so that the option ``finite_diff`` says which. `bounds` hold by projection after each
    step, for `x0` too. `callback` is ``callback(intermediate_result)`` or ``callback(xk)``, after
    each step, and may raise StopIteration. `constraints` are refused; `hess` and `hessp` are not
    used.

    There is no line search: an iteration is one step of the rule and one call each of `fun` and
    `jac`, so `fun` need not fall from step to step. The result is, as with SciPy's own methods,
    where the last step ended, not the best point on the way; a `callback` can keep that.

    The options are

    ``maxiter``
        Most iterations, 10,000 by default.
    ``gtol``
        Ends when the norm of the projected gradient is at most this, 1e-5 by default.
    ``norm``
        Order of that norm, inf by default.
    ``ftol``
        Ends when `fun` changed by at most ``ftol * max(|f|, |f before|, 1)``; off by default.
    ``xtol``
        Ends when the step is at most ``xtol * (xtol + norm of x)``; off by default.
    ``disp``
        Whether to print how it ended; a failure is then a warning.
    ``return_all``
        Whether to return every `x`, as ``allvecs``.
    ``finite_diff``
        "3-point", the default: central differences, two calls of `fun` for each number of `x`.
        "2-point": one call each, with half the digits. "cs": complex steps, as precise as `fun`,
        which must then take complex numbers.
    ``eps``, ``finite_diff_rel_step``
        Absolute or relative step of finite differences. By default the relative one that suits
        the scheme and the dtypes of `x` and of what `fun` returns.

    ``tol`` of `scipy.optimize.minimize` means ``gtol``.

    The `scipy.optimize.OptimizeResult` has ``x``, ``fun``, ``jac``, ``nit``, ``nfev``, ``njev``,
    ``message``, ``status``: 0 where a tolerance was met, 1 where ``maxiter`` was, 3 where `fun` or
    its gradient is not finite, 99 where the callback stopped it; and ``success``, which is status
    0 and nothing else.

    Parameters
    ----------
    rule : Rule
        The rule.
    """

    rule: Rule

    def __call__(
        self,
        fun: Callable[..., Any],
        x0: Any,
        args: tuple[Any, ...] = (),
        *,
        jac: Any = None,
        hess: Any = None,
        hessp: Any = None,
        bounds: Any = None,
        constraints: Any = (),
        callback: Callable[..., Any] | None = None,
        maxiter: int | None = None,
        gtol: float | None = None,
        norm: float = np.inf,
        ftol: float | None = None,
        xtol: float | None = None,
        disp: bool = False,
        return_all: bool = False,
        finite_diff: str = "3-point",
        eps: Any = None,
        finite_diff_rel_step: Any = None,
        tol: float | None = None,
        **unknown: Any,
    ) -> Any:
        """Minimise `fun`; called by `scipy.optimize.minimize`."""
        from scipy.optimize import OptimizeResult

        _refuse(constraints)
        _warn_of_unused(unknown, hess, hessp)
        gtol = next((value for value in (gtol, tol) if value is not None), 1e-5)
        maxiter = 10_000 if maxiter is None else maxiter
        x = _floating_vector(x0)
        low, high = _limits(bounds, x)
        np.clip(x, low, high, out=x)
        difference = _Difference(finite_diff, low, high, eps, finite_diff_rel_step)
        problem = _Problem(fun, args, jac, difference)
        report = _callback(callback)

        state = setup(self.rule, x)
        f, g = problem(x)
        visited = [x.copy()]
        nit, status, message = 0, None, ""
        while status is None:
            if not (np.isfinite(f) and np.isfinite(g).all() and np.isfinite(x).all()):
                status, message = 3, NOT_FINITE
            elif np.linalg.norm(_projected(g, x, low, high), norm) <= gtol:
                status, message = 0, CONVERGED
            elif nit >= maxiter:
                status, message = 1, REACHED_LIMIT
            else:
                f_before, x_before = f, x.copy()
                update_(state, x, g, value=f)
                np.clip(x, low, high, out=x)
                f, g = problem(x)
                nit += 1
                if return_all:
                    visited.append(x.copy())
                try:
                    report(OptimizeResult(x=x.copy(), fun=f))
                except StopIteration:
                    status, message = 99, STOPPED
                    break
                step = np.linalg.norm(x - x_before, norm)
                if step == 0:  # the rule waits, as AccumGrad does
                    continue
                flat = ftol is not None and _is_flat(f_before, f, ftol)
                small = xtol is not None and step <= xtol * (xtol + np.linalg.norm(x, norm))
                if flat or small:
                    status, message = 0, CONVERGED

        result = OptimizeResult(
            x=x,
            fun=f,
            jac=g,
            nit=nit,
            nfev=problem.nfev,
            njev=problem.njev,
            status=status,
            success=status == 0,
            message=message,
        )
        if return_all:
            result["allvecs"] = visited
        if disp:
            _display(result)
        return result


# --- what SciPy hands over -------------------------------------------------------------------


def _refuse(constraints: Any) -> None:
    given = constraints is not None
    if isinstance(constraints, list | tuple | Mapping):
        given = len(constraints) > 0
    if given:
        raise ValueError(
            "optimisers.scipy.method takes bounds but no constraints; add a penalty to fun, or "
            'take method="SLSQP" or "trust-constr"'
        )


def _warn_of_unused(unknown: Mapping[str, Any], hess: Any, hessp: Any) -> None:
    from scipy.optimize import OptimizeWarning

    if unknown:
        warnings.warn(
            f"Unknown solver options: {', '.join(map(str, unknown))}", OptimizeWarning, stacklevel=4
        )
    if hess is not None or hessp is not None:
        warnings.warn(
            "optimisers.scipy.method does not use second derivatives (hess, hessp)",
            RuntimeWarning,
            stacklevel=4,
        )


def _floating_vector(x0: Any) -> Array:
    """Return a copy of `x0`; what is not floating becomes double, as in SciPy."""
    refuse_masked(x0, lambda: "x0", "its .filled(0) is an array")
    x = np.atleast_1d(np.asarray(x0))
    if x.ndim != 1:
        raise ValueError(f"x0 must be 1-d; got shape {x.shape} (destructure makes a model 1-d)")
    if x.dtype.kind == "c":
        raise TypeError("x0 must be real; got complex numbers")
    return np.array(x, x.dtype.newbyteorder("=") if x.dtype.kind == "f" else np.float64)


def _limits(bounds: Any, x: Array) -> tuple[Array, Array]:
    """Return the bounds as two arrays like `x`: from a `Bounds`, or from pairs (low, high)."""
    if bounds is None:
        low, high = np.full_like(x, -np.inf), np.full_like(x, np.inf)
    elif hasattr(bounds, "lb"):
        low = np.broadcast_to(np.asarray(bounds.lb, x.dtype), x.shape)
        high = np.broadcast_to(np.asarray(bounds.ub, x.dtype), x.shape)
    else:
        pairs = list(bounds)
        if len(pairs) != len(x):
            raise ValueError(f"bounds has {len(pairs)} pairs, x0 has {len(x)} numbers")
        low = np.array([-np.inf if a is None else a for a, _ in pairs], x.dtype)
        high = np.array([np.inf if b is None else b for _, b in pairs], x.dtype)
    if not (low <= high).all():
        at = int(np.argmin(low <= high))
        raise ValueError(f"bounds of x[{at}] have {low[at]:g} below and {high[at]:g} above")
    return low, high


def _projected(g: Array, x: Array, low: Array, high: Array) -> Array:
    """Return the projected gradient, as L-BFGS-B has it: without parts that bounds stop."""
    return np.clip(g, x - high, x - low)


def _is_flat(f_before: float, f: float, ftol: float) -> bool:
    return abs(f - f_before) <= ftol * max(abs(f), abs(f_before), 1)


def _callback(callback: Callable[..., Any] | None) -> Callable[[Any], Any]:
    """Return the callback as a function of an intermediate result, told apart as SciPy does."""
    if callback is None:
        return lambda intermediate_result: None
    if set(inspect.signature(callback).parameters) == {"intermediate_result"}:
        return lambda result: callback(intermediate_result=result)
    return lambda result: callback(result.x)


class _Problem:
    """Value and gradient of the function, counted as SciPy counts."""

    def __init__(
        self, fun: Callable[..., Any], args: tuple[Any, ...], jac: Any, difference: _Difference
    ) -> None:
        if jac is True:
            raise ValueError("jac=True is for scipy.optimize.minimize(..., method=...)")
        if isinstance(jac, str):
            difference = replace(difference, scheme=jac)
        self.fun, self.args = fun, args
        self.jac = jac if callable(jac) else None
        self.difference = difference
        self.nfev = self.njev = 0

    def __call__(self, x: Array) -> tuple[float, Array]:
        f = self.value(x)
        self.njev += 1
        if self.jac is None:
            return float(f), self.difference(self.value, x, f)
        g = self.jac(x.copy(), *self.args)
        refuse_masked(g, lambda: "the gradient", ".filled(0) takes it for zeros")
        g = np.array(g, x.dtype)
        if g.size != x.size:
            raise ValueError(f"the gradient must have the shape of x, {x.shape}; got {g.shape}")
        return float(f), g.reshape(x.shape)

    def value(self, x: Array) -> Any:
        """Return the value of the function in its own dtype, by which it was rounded."""
        self.nfev += 1
        f = np.asarray(self.fun(x.copy(), *self.args))
        if f.size != 1:
            raise TypeError(
                f"fun must return a number; got an array of shape {f.shape} "
                "(jac=True says that it returns a pair)"
            )
        if f.dtype.kind == "c" and x.dtype.kind != "c":
            raise TypeError(f"fun must return a real number; got {f.item()!r}")
        if x.dtype.kind == "c" and f.dtype.kind != "c":
            raise TypeError(
                "fun dropped the imaginary part of x, which complex steps carry the derivative in "
                f'(it returned {f.item()!r}); finite_diff="3-point" does without'
            )
        return f.reshape(())[()] if f.dtype.kind in "fc" else np.float64(f.item())


@dataclass(frozen=True)
class _Difference:
    """Finite differences within bounds."""

    scheme: str
    low: Array
    high: Array
    eps: Any
    relative: Any

    def __post_init__(self) -> None:
        if self.scheme not in ("2-point", "3-point", "cs"):
            raise ValueError(
                f'finite_diff must be "2-point", "3-point" or "cs"; got {short(self.scheme)}'
            )

    def __call__(self, value: Callable[[Array], Any], x: Array, f: Any) -> Array:
        """Return the gradient at `x`; zero where the bounds leave no room for a difference."""
        if not np.isfinite(f):
            return np.full_like(x, np.nan)
        from scipy.optimize._numdiff import approx_derivative

        free = self.low < self.high

        def along(part: Array) -> Any:
            moved = x.astype(part.dtype)  # complex, if steps are
            moved[free] = part
            return value(moved)

        def of(step: Any) -> Any:
            return step if step is None or np.ndim(step) == 0 else np.asarray(step)[free]

        g = np.zeros_like(x)
        if free.any():
            g[free] = approx_derivative(
                along,
                x[free],
                method=self.scheme,
                rel_step=of(self.relative),
                abs_step=of(self.eps) if self.relative is None else None,
                f0=f,
                bounds=(self.low[free], self.high[free]),
            )
        return g


def _display(result: Any) -> None:
    from scipy.optimize import OptimizeWarning

    if result.success:
        print(result.message)
    else:
        warnings.warn(result.message, OptimizeWarning, stacklevel=4)
    print(f"         Current function value: {result.fun:f}")
    print(f"         Iterations: {result.nit:d}")
    print(f"         Function evaluations: {result.nfev:d}")
    print(f"         Gradient evaluations: {result.njev:d}")


if not TYPE_CHECKING:  # type checkers know what there is

    def __getattr__(name):
        raise no_name(__name__, name)
