"""Steps of leaves while JAX traces: those that are alike are traced once, and called."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from .._arrays.traced import of_jax
from .._pytree import Crossed, classes_in
from ..rules._base import OURS, ElementwiseRule, Rule
from ..rules._measure import needs_value

Array = Any


class Steps:
    """Evaluates the leaves of one update; of leaves that JAX handed over, each kind once.

    Leaves are of one kind if they have equal structure, shapes and dtypes. JAX keeps a trace for
    as long as the function that it traced. That is a function of this object, so each update sees
    rules and settings as they are then, and no tracer outlives its trace.
    """

    def __init__(self, evaluate: Callable[..., tuple[Any, Array | None]]) -> None:
        self._evaluate = evaluate
        self._traced: Any = None

    def evaluate(self, leaf: Any, x: Array, gs: Sequence[Array | None]) -> tuple[Any, Array | None]:
        """Return new state and parameter, as `arrays.evaluate` does; or a `Crossed` as state."""
        crossed: Crossed | None = getattr(leaf, "crossed", None)
        if crossed is not None and crossed.is_traced and crossed.is_all_of(leaf):
            kind = crossed.structure[0]
            arrays = [x, *(g for g in gs if g is not None)]
            if _can_be_called(kind) and len(of_jax(arrays)) == len(arrays):
                try:
                    return self._called(crossed, x, gs)
                except _OtherFormError:
                    pass
        return self._evaluate(leaf.rule, leaf.state, x, gs)

    def _called(
        self, crossed: Crossed, x: Array, gs: Sequence[Array | None]
    ) -> tuple[Crossed, Array | None]:
        if self._traced is None:
            # JAX keeps one trace for equal functions, so each update has a new one.
            evaluate = self._evaluate

            def step(*args: Any) -> Any:
                return _step(evaluate, *args)

            self._traced = cast(Any, sys.modules["jax"]).jit(step, static_argnums=0)
        (vector, rest), new = self._traced(crossed.structure[0], crossed.children, x, [*gs])
        return Crossed(crossed.structure, (vector, *crossed.children[1:-1], rest)), new


class _OtherFormError(Exception):
    """A rule has made a state of another form than it was given."""


def _step(
    evaluate: Any, kind: Any, children: tuple[Any, ...], x: Array, gs: list[Any]
) -> tuple[tuple[Array, Any], Array | None]:
    crossed = Crossed((kind, False, None), children)
    state, new = evaluate(crossed.rule(), crossed.state(), x, gs)
    after = crossed.with_state(state)
    if after is None:
        raise _OtherFormError
    return (after.vector, after.children[-1]), new


@functools.lru_cache(maxsize=1024)
def _is_known(kind: Any) -> bool:
    return all(map(_is_pure, classes_in(kind[0])))


def _can_be_called(kind: Any) -> bool:
    """Tell whether a rule does the same for leaves of one kind; users' `apply` need not."""
    try:
        return _is_known(kind)
    except TypeError:  # a static value has no hash
        return False


def _is_pure(cls: type[Rule]) -> bool:
    if issubclass(cls, ElementwiseRule) and (cls.over == "tree" or needs_value(cls)):
        return False  # it depends on more than its leaf
    if cls.__module__.startswith(OURS):
        return True
    is_elementwise = issubclass(cls, ElementwiseRule)
    return is_elementwise and cls.apply is ElementwiseRule.apply and cls.move is Rule.move
