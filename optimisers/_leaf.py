"""`Item`, which the engine updates, and `Leaf`, the item of a state tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from . import _pytree
from ._trees.nodes import register_leaf
from .rules._base import Rule


class Item:
    """A unit of update: the rule of an array, and the state that the rule keeps for it."""

    __slots__ = ("frozen", "job", "rule", "state")

    rule: Rule
    state: Any
    frozen: bool
    """Whether updates pass it by."""
    job: Any
    """The `Job` that the CUDA kernels keep from step to step, or None; used by them alone."""

    def __init__(self, rule: Rule, state: Any, frozen: bool = False) -> None:
        self.rule = rule
        self.state = state
        self.frozen = frozen
        self.job = None


@register_leaf
class Leaf(Item):
    """The entry of a state tree for one trainable array.

    It is mutable. Its identity says which parameters are tied: the same `Leaf` at two places of a
    state tree makes the arrays there one parameter, arrays of JAX too (which `setup` never ties).

    Parameters
    ----------
    rule : Rule
        The rule that updates the parameter.
    state
        The state that the rule keeps.
    frozen : bool
        Whether updates pass it by.
    skipped : int
        How many updates passed it by for a gradient that was not finite (see `update`).

    Notes
    -----
    To JAX and optree a leaf is a node: its children are a vector of the numbers of its rule and the
    counts of its state, and the arrays of its state. So state trees go through `jax.jit`,
    `jax.lax.scan` and `jax.vmap`, and another learning rate does not compile anew. Leaves are
    registered with both libraries when a leaf is made or unpickled, and whenever a state tree is
    given to this library, if those are imported by then; so import them first. Each number crosses
    as two, the value in float32 and the rest. In a leaf that comes back, numbers and counts are
    taken out of the vector at the first access to `rule` or `state`.

    JAX makes one leaf for each place of a tied parameter. `update` still treats them as one and
    returns one; until then, give `adjust_` and `freeze_` all places. `skipped` is no part of a tree
    of JAX, and starts again at 0 there.

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> optimisers.setup(optimisers.Momentum(), np.zeros(2))
    Leaf(Momentum(eta=0.01, rho=0.9), MomentumState(v=array([0., 0.])))
    """

    __slots__ = ("__weakref__", "crossed", "skipped", "tie")

    skipped: int
    tie: _pytree.Tie | None
    """Shared with the leaves that JAX makes of it, one for each of its places; else None."""
    crossed: _pytree.Crossed | None
    """The content of a leaf that JAX or optree made, whose rule and state are then set late."""

    def __init__(self, rule: Rule, state: Any, frozen: bool = False, skipped: int = 0) -> None:
        _pytree.announce(Leaf)
        self.rule = rule
        self.state = state
        self.frozen = frozen
        self.skipped = skipped
        self.job = None
        self.tie = None
        self.crossed = None

    if not TYPE_CHECKING:  # type checkers know the attributes

        def __getattr__(self, name: str) -> Any:
            crossed = getattr(self, "crossed", None) if name in ("rule", "state") else None
            if crossed is not None:
                if name == "rule":
                    self.rule = rule = crossed.rule()
                    return rule
                state = crossed.state()
                if not crossed.is_traced:
                    self.state = state
                    crossed.drop_state()
                return state
            if name[0] == "_" or name in _SLOTS:
                message = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(message, name=name, obj=self)
            from ._messages.mixups import not_of_leaf

            raise not_of_leaf(self, name)

    def renewed(self, rule: Rule, state: Any) -> Leaf:
        """Return another leaf for the same places."""
        crossed = self.crossed
        if crossed is not None and crossed.is_traced and rule is crossed.made:
            crossed = crossed.with_state(state)
            if crossed is not None:
                return self.carried(crossed)
        new = Leaf(rule, state, self.frozen, self.skipped)
        new.tie = self.tie
        return new

    def carried(self, crossed: _pytree.Crossed) -> Leaf:
        """Return another leaf for the same places, with content of JAX."""
        return cast(Leaf, _pytree.carried(self, crossed))

    def __reduce__(self) -> Any:
        return _unpickled, (self.rule, self.state, self.frozen, self.tie, self.skipped)

    def __repr__(self) -> str:
        more = ", frozen=True" * self.frozen
        if self.skipped:
            more += f", skipped={self.skipped}"
        return f"Leaf({self.rule!r}, {self.state!r}{more})"


_SLOTS = {*Item.__slots__, *Leaf.__slots__}


def _unpickled(
    rule: Rule, state: Any, frozen: bool, tie: _pytree.Tie | None, skipped: int = 0
) -> Leaf:
    leaf = Leaf(rule, state, frozen, skipped)
    leaf.tie = tie
    _pytree.note_crossing(tie)
    return leaf


_pytree.announce(Leaf)
