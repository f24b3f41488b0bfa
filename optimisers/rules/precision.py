"""A rule that runs in another precision than its parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from .._arrays.library import isnumeric, library_for
from .._messages.text import short
from ..words import is_complex
from ._base import Array, Rule, adjusted, checked_state, misfit, refuse_strange, started
from ._numbers import (
    as_like,
    for_step,
    moved,
    widened,
)
from ._program import Master, Program, placed, program_of


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
    _is_outermost = True

    def __init__(self, dtype: Any, rule: Rule | None = None) -> None:
        if rule is None:
            dtype, rule = np.float32, dtype
        if not isinstance(rule, Rule) or isinstance(rule, MixedPrecision):
            from .._messages.mixups import no_rule

            raise no_rule("MixedPrecision takes a rule, after the dtype if any", rule)
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

    def _evaluated(self, state: MixedPrecisionState, x: Array) -> Array:
        master = state.master
        found = self.rule._evaluated(state.state, master)
        return x if found is master else as_like(x, found)

    def program(self) -> Program | None:
        inner = program_of(self.rule)
        return None if inner is None else (Master(self.dtype), *placed(inner, 1))

    def _lift(self, x: Array) -> Array:
        """Return a copy of `x` in the master's precision."""
        dtype = np.result_type(self.dtype, np.complex64) if is_complex(x) else self.dtype
        return library_for(x).astype(x, dtype)

    def fields(self) -> Iterator[tuple[str, Any]]:
        yield "dtype", self.dtype
        yield from self.rule.fields()

    def adjust(self, **changes: Any) -> Self:
        refuse_strange(self, changes)
        if "dtype" in changes:
            return super().adjust(dtype=changes["dtype"])
        return type(self)(self.dtype, adjusted(self.rule, changes))


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
