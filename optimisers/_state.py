"""The state tree: set up, step, adjust, freeze.

A state tree has the shape of its model, with a `Leaf` for each trainable array: the rule that
updates it and what the rule remembers. A step gathers the leaves with their parameters and
gradients (`gather`), hands them to the engine, and puts what was not written in place back into
trees (`_replace`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from . import _pytree
from ._arrays.library import (
    is_immutable,
    isnumeric,
    maywrite,
    of_class,
    plain,
    refuse_masked_parameter,
)
from ._arrays.torch import is_tensor, refuse_given_back
from ._engine import advance as engine
from ._engine import cpu
from ._engine.arrays import Call, at_once, fresh, shown, writing
from ._kernels import are_distinct
from ._messages.calls import explained
from ._messages.text import short
from ._trees.lockstep import gather, place, places
from ._trees.nodes import is_node, mirror, rebuild, register_leaf, trainable_keys
from ._trees.parameters import carry, laid_out, overlap, parameters, same_elements
from ._trees.paths import KeyPath
from ._trees.untrained import refuse_no_tree, tell
from ._trees.walks import fmap, fold, walk
from .rules._base import Rule, adjusted, refuse_unknown, started
from .rules._numbers import read_only

Array = Any
Tree = Any
Model = TypeVar("Model")
OnNonfinite = Literal["ignore", "skip", "raise"]


@register_leaf
class Leaf:
    """What a state tree holds for one trainable array.

    Mutable; its identity says which parameters are tied: the same `Leaf` at two places of a state
    tree makes the arrays there one parameter, arrays of JAX too (which `setup` never ties).

    Parameters
    ----------
    rule : Rule
        The rule that updates the parameter.
    state
        What the rule remembers.
    frozen : bool
        Whether updates pass it by.
    skipped : int
        How many updates passed it by for a gradient that was not finite (see `update`).

    Notes
    -----
    To JAX and optree a leaf is a node: the numbers of its rule and its state are the children, so
    state trees go through `jax.jit`, `jax.lax.scan` and `jax.vmap`, and another learning rate does
    not compile anew. Both learn that when leaves are made or unpickled and whenever a state tree is
    handed to this library, if they are imported by then; so import them first. Each number crosses
    as two, what float32 holds of it and the rest. In a leaf that comes back it is a number again,
    put together when `rule` is looked at.

    JAX makes one leaf for each place of a tied parameter. `update` goes on to treat them as one and
    gives back one; `adjust_` and `freeze_` should until then be given all places. What was skipped
    is forgotten there: it is no part of a tree of JAX.

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> optimisers.setup(optimisers.Momentum(), np.zeros(2))
    Leaf(Momentum(eta=0.01, rho=0.9), MomentumState(v=array([0., 0.])))
    """

    __slots__ = ("__weakref__", "crossed", "frozen", "job", "rule", "skipped", "state", "tie")

    rule: Rule
    state: Any
    frozen: bool
    skipped: int
    job: Any
    """What the CUDA kernels keep from step to step, or None; never looked at elsewhere."""
    tie: _pytree.Tie | None
    """What it has in common with the leaves that JAX makes of it, one for each of its places."""
    crossed: _pytree.Crossed | None
    """The rule as JAX or optree gave it back, if they made this leaf; `rule` is then set late."""

    def __init__(self, rule: Rule, state: Any, frozen: bool = False, skipped: int = 0) -> None:
        _pytree.announce(Leaf)
        self.rule = rule
        self.state = state
        self.frozen = frozen
        self.skipped = skipped
        self.job = None
        self.tie = None
        self.crossed = None

    if not TYPE_CHECKING:  # type checkers know what there is

        def __getattr__(self, name: str) -> Any:
            if name == "rule" and self.crossed is not None:
                self.rule = rule = self.crossed.rule()
                return rule
            if name[0] == "_" or name in Leaf.__slots__:
                message = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(message, name=name, obj=self)
            from ._messages.mixups import not_of_leaf

            raise not_of_leaf(self, name)

    def renewed(self, rule: Rule, state: Any) -> Leaf:
        """Return another leaf for the same places."""
        new = Leaf(rule, state, self.frozen, self.skipped)
        new.tie = self.tie
        return new

    def __reduce__(self) -> Any:
        return _unpickled, (self.rule, self.state, self.frozen, self.tie, self.skipped)

    def __repr__(self) -> str:
        more = ", frozen=True" * self.frozen
        if self.skipped:
            more += f", skipped={self.skipped}"
        return f"Leaf({self.rule!r}, {self.state!r}{more})"


def _unpickled(
    rule: Rule, state: Any, frozen: bool, tie: _pytree.Tie | None, skipped: int = 0
) -> Leaf:
    leaf = Leaf(rule, state, frozen, skipped)
    leaf.tie = tie
    _pytree.note_crossing(tie)
    return leaf


_pytree.announce(Leaf)


# --- setup -----------------------------------------------------------------------------------


def _setup_hint(name: str) -> str:
    return "hyperparameters are the rule's" if name else "write setup(rule, model)"


@explained(_setup_hint)
def setup(rule: Rule, model: Tree) -> Tree:
    """Return a state tree for a model.

    Parameters
    ----------
    rule : Rule
        The rule for every parameter; several rules make one with `OptimiserChain`.
    model : tree
        The model; its trainable arrays of floating numbers, real or complex, are the parameters.

    Returns
    -------
    tree
        Of the shape of `model`: a `Leaf` for each parameter, the same one for parameters that are
        tied, and ``()`` for everything else.

    Raises
    ------
    TypeError
        If `rule` is no rule, or one that cannot take a parameter of this dtype; if `model` is no
        tree: a module of PyTorch, an iterator, a class.
    ValueError
        If parameters overlap in memory only in part, or if the model contains itself.

    Warns
    -----
    UserWarning
        If there is no parameter in the model, or in it an array of floating numbers that is none,
        since its library is not known, or a module of PyTorch. The message says what is there and
        what to write.

    Notes
    -----
    Places are tied where they hold the same array, or views of exactly the same numbers, if that
    array can be written. An array of JAX is immutable: at two places it is two parameters, as for
    optax. To tie these, hold the array once in the model, or put one `Leaf` at both places of the
    state tree; `jax.jit` takes that apart into one for each.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Descent, setup
    >>> setup(Descent(0.1), {"w": np.ones((2, 3)), "name": "encoder"})
    {'w': Leaf(Descent(eta=0.1), ()), 'name': ()}
    """
    if not isinstance(rule, Rule):
        from ._messages.mixups import no_rule

        raise no_rule("setup takes a rule first, then the model", rule)
    refuse_no_tree(model, "setup")
    unknown: list[tuple[KeyPath, Any]] = []
    arrays, owners = parameters(model, unknown)
    tell(model, bool(arrays), unknown)
    made: list[Leaf] = []
    index = 0  # of the parameter, which ties make one of several places
    for k, owner in enumerate(owners):
        made.append(_new_leaf(rule, index, *arrays[k]) if owner == k else made[owner])
        index += owner == k
    for owner, times in Counter(owners).items():
        if times > 1:
            places = (str(arrays[k][0]) for k, first in enumerate(owners) if first == owner)
            made[owner].tie = _pytree.Tie(tuple(places))
    leaves = iter(made)  # in the order in which `fold` comes by

    return fold(
        model,
        lambda path, x: next(leaves) if isnumeric(x) else (),
        lambda path, x, results: mirror(x, results),
        keys=trainable_keys,
        skipped=lambda child: (),
    )


def _new_leaf(rule: Rule, index: int, path: KeyPath, x: Array) -> Leaf:
    if is_tensor(x):
        refuse_given_back(x, (), path.__str__)
    try:
        with cpu.kernels.UsualEnvironment():
            return Leaf(rule, started(rule, x.detach() if is_tensor(x) else plain(x), index))
    except TypeError as error:
        raise TypeError(f"at {path}: {error}") from error


# --- update ----------------------------------------------------------------------------------


def update(
    state: Tree, model: Model, grad: Tree, *higher: Tree, on_nonfinite: OnNonfinite = "ignore"
) -> tuple[Tree, Model]:
    """Take one step; nothing given is written to.

    Parameters
    ----------
    state : tree
        From `setup`, or from the last `update`.
    model : tree
        The model.
    grad : tree
        The gradient, in the structure of `model`. ``None``, a missing key or attribute, or ``()``
        says that there is none here: no step, no change of state. An object node also takes a
        dictionary or namespace of its attributes.
    *higher : tree
        Higher derivatives, for rules that use them.
    on_nonfinite : {"ignore", "skip", "raise"}
        What to do about a gradient with NaN or infinity in it: let it through; pass by its
        parameter, whose state stays too, and count that in the `skipped` of its `Leaf`; or raise.
        Only "ignore" can be had while JAX traces. On a device the other two wait for the gradients.

    Returns
    -------
    (state, model)
        New trees, whose parameters and states share no memory with those given.

    Raises
    ------
    TypeError, ValueError
        If `grad` does not fit `model`; the message names the path. Also if it has a number or an
        array other than zero for what is not trained: a number, a list of numbers, an array of
        whole numbers. What `trainable` leaves out may have a gradient, which is not looked at.
    FloatingPointError
        If a norm is not finite (see `ClipNorm`), or a gradient, if asked for; the message names the
        path, and nothing was updated.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Momentum, setup, update
    >>> model = {"w": np.array([1.0, 2.0]), "b": np.array([0.0])}
    >>> state = setup(Momentum(eta=0.1), model)
    >>> state, model = update(state, model, {"w": np.array([1.0, 1.0])})
    >>> model
    {'w': array([0.9, 1.9]), 'b': array([0.])}
    """
    return _step(state, model, grad, higher, False, on_nonfinite)


def update_(
    state: Tree, model: Model, grad: Tree, *higher: Tree, on_nonfinite: OnNonfinite = "ignore"
) -> tuple[Tree, Model]:
    """Take one step in place.

    Like `update`, but writes into the writable arrays of `model` and into those of `state`, however
    they lie in memory: what else is a view of them sees the step. If it raises, both are as they
    were. An interrupt (Ctrl-C) finds the step not begun, or whole: in `state`, in what it counts,
    and in the arrays that can be written. Of others, such as those of JAX, the new ones are in the
    model that is returned: where an interrupt comes before that, `state` may be one step ahead of
    the model that you have. Only `update` leaves you both as they were.

    Parameters
    ----------
    state, model, grad, *higher, on_nonfinite
        As in `update`.

    Returns
    -------
    (state, model)
        The state tree given, and the model given, unless it holds read-only or immutable arrays:
        these are replaced in the model that is returned. Such arrays of a state are replaced in
        its leaves.

    Raises
    ------
    TypeError, ValueError, FloatingPointError
        As `update` does, and if two arrays that it would write overlap in memory.

    Notes
    -----
    Threads may update models of their own at the same time. Around updates of one model, or of
    models that share arrays, put a lock: without one nothing crashes, but the numbers are those of
    steps that mix, or the step is refused with a `RuntimeError`. A process may fork at any time,
    and its child update like any other.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Descent, setup, update_
    >>> w = np.array([1.0, 2.0])
    >>> state = setup(Descent(0.1), w)
    >>> state, _ = update_(state, w, np.array([1.0, 1.0]))
    >>> w
    array([0.9, 1.9])
    >>> update_(state, w, np.array([1.0, np.nan]), on_nonfinite="skip")
    (Leaf(Descent(eta=0.1), (), skipped=1), array([0.9, 1.9]))
    """
    if state.__class__ is Leaf and not higher:  # one array, such as a flat vector
        _pytree.announce(Leaf)
        if engine.advance_one(state, model, grad, on_nonfinite):
            return state, model
    return _step(state, model, grad, higher, True, on_nonfinite)


def _step(
    state: Tree,
    model: Model,
    grad: Tree,
    higher: Sequence[Tree],
    in_place: bool,
    on_nonfinite: OnNonfinite,
) -> tuple[Tree, Model]:
    _pytree.announce(Leaf)
    with cpu.kernels.UsualEnvironment():
        return _stepped(state, model, grad, higher, in_place, on_nonfinite)


def _stepped(
    state: Tree,
    model: Model,
    grad: Tree,
    higher: Sequence[Tree],
    in_place: bool,
    on_nonfinite: OnNonfinite,
) -> tuple[Tree, Model]:
    held, xs, gs = gather(Leaf, state, model, grad)
    leaves = _reunited(held) if _pytree.have_ties_crossed() else held
    higher = higher and [gather(Leaf, state, model, h)[2] for h in higher]

    def where(k: int) -> str:
        return place(Leaf, state, model, k)

    if len(leaves) == 1 or are_distinct(leaves):
        new_x, new_state, skipped = engine.advance(
            leaves, xs, gs, higher, where, in_place, on_nonfinite
        )
    else:
        tied = _Tied(leaves, held, xs, where)
        new_x, new_state, skipped = tied.advance(gs, higher, in_place, on_nonfinite)

    if in_place and not new_x:
        return state, model
    if not in_place:
        state = _renewed(state, held, leaves, new_state, skipped)
        for k, x in enumerate(xs):
            if k not in new_x:
                new_x[k] = fresh(x)
    return state, _replaced(state, model, xs, new_x)


def _replaced(state: Tree, model: Model, xs: list[Array], new_x: dict[int, Array]) -> Model:
    """Return a model with new arrays, by place."""
    by_id = {id(xs[k]): new for k, new in new_x.items()}
    apart = len(by_id) < len(new_x) and any(
        is_immutable(xs[k]) or by_id[id(xs[k])] is not new for k, new in new_x.items()
    )
    # which asks once for each array
    new_model = model if apart else fmap(lambda x: by_id.pop(id(x), x), model)
    # If one array has a leaf for each of its places, or if there is a node that makes its children
    # anew at each visit: go by the paths.
    if by_id:
        paths = enumerate(path for path, _ in places(Leaf, state, model))
        by_path = {path: new_x[k] for k, path in paths if k in new_x}
        new_model = fold(
            model,
            lambda path, x: by_path.get(path, x),
            lambda path, x, results: rebuild(x, results),
        )
    return cast("Model", new_model)


def _renewed(
    state: Tree,
    held: list[Leaf],
    leaves: list[Leaf],
    new_state: dict[int, Any],
    skipped: Sequence[int],
) -> Tree:
    """Return a state tree of new leaves, tied as before."""
    made: dict[int, Leaf] = {}
    for k, leaf in enumerate(leaves):
        if k in new_state or id(leaf) not in made:
            new = new_state[k] if k in new_state else fresh(leaf.state)
            made[id(leaf)] = leaf.renewed(leaf.rule, new)
    for k in skipped:
        made[id(leaves[k])].skipped += 1
    for leaf, other in zip(leaves, held, strict=True) if leaves is not held else ():
        made[id(other)] = made[id(leaf)]
    return fmap(lambda leaf: made.get(id(leaf), leaf), state)


# --- ties ------------------------------------------------------------------------------------


def _reunited(leaves: list[Leaf]) -> list[Leaf]:
    """Return for each leaf the first that it is tied to, where JAX has made several of one."""
    first: dict[int, Leaf] = {}
    return [leaf if leaf.tie is None else first.setdefault(id(leaf.tie), leaf) for leaf in leaves]


class _Tied:
    """The places of a model, grouped by leaf: one step for each group, spread to its places."""

    def __init__(
        self, leaves: list[Leaf], held: list[Leaf], xs: list[Array], where: Callable[[int], str]
    ) -> None:
        self.held, self.xs, self.where = held, xs, where
        groups: dict[int, list[int]] = {}
        for k, leaf in enumerate(leaves):
            groups.setdefault(id(leaf), []).append(k)
        self.groups = list(groups.values())
        self.leaves = [leaves[group[0]] for group in self.groups]

    def advance(
        self,
        gs: list[Any],
        higher: Sequence[list[Any]],
        in_place: bool,
        on_nonfinite: OnNonfinite,
    ) -> tuple[dict[int, Array], dict[int, Any], list[int]]:
        """Do what `_engine.advance` does, for all places."""
        groups = [*zip(self.leaves, self.groups, strict=True)]
        summed, *higher = [[self._sum(g, *group) for group in groups] for g in (gs, *higher)]
        xs = [self._primary(group) for group in self.groups]

        def where(j: int) -> str:
            return self.where(self.groups[j][0])

        first, states, skipped = engine.advance(
            self.leaves,
            xs,
            summed,
            higher,
            where,
            in_place,
            on_nonfinite,
            partial(self._beside, summed) if in_place else None,
        )
        new_x: dict[int, Array] = {}
        for j, group in enumerate(self.groups):
            moved = summed[j] is not None and not self.leaves[j].frozen
            x = self.xs[group[0]]
            new = plain(first.get(j))
            if new is None and not in_place:
                new = plain(fresh(x))
            if isinstance(new, np.ndarray) and any(self.xs[k] is not x for k in group):
                new = laid_out(new, x)  # so that each view of x has its like
            by_array = {id(x): of_class(x, new)}
            for k in group:
                other = self.xs[k]
                if id(other) not in by_array:
                    made = None
                    if same_elements(x, other):
                        made = None if new is None else of_class(other, shown(new, x, other))
                    elif moved and not (in_place and maywrite(other)):
                        made = of_class(other, plain(fresh(x if new is None else new)))
                    by_array[id(other)] = made
                if by_array[id(other)] is not None:
                    new_x[k] = by_array[id(other)]
        new_state = {self.groups[j][0]: state for j, state in states.items()}
        return new_x, new_state, [self.groups[j][0] for j in skipped]

    def _beside(
        self,
        summed: list[Any],
        new_x: dict[int, Array],
        new_state: dict[int, Any],
        skipped: Sequence[int],
    ) -> list[Call]:
        """Return the calls that write a group's new values into its separate arrays and leaves."""
        calls: list[Call] = []
        written = []
        for j, group in enumerate(self.groups):
            if summed[j] is None or self.leaves[j].frozen:
                continue
            x = self.xs[group[0]]
            if j not in new_x:
                written.append((group[0], x))
            for k in group[1:]:
                other = self.xs[k]
                if other is not x and not same_elements(x, other) and maywrite(other):
                    written.append((k, other))
                    calls.append(writing(other, new_x.get(j, x)))
        if calls and (clash := overlap(written)):
            raise engine.overlapping(*map(self.where, clash))
        return calls + self._told(new_state, skipped)

    def _told(self, new_state: dict[int, Any], skipped: Sequence[int]) -> list[Call]:
        """Return the calls that tell a group's other leaves what its first comes to hold."""
        calls: list[Call] = []
        passed = set(skipped)
        for j, (leaf, group) in enumerate(zip(self.leaves, self.groups, strict=True)):
            for other in {id(self.held[k]): self.held[k] for k in group}.values():
                if other is not leaf:
                    calls.append((setattr, other, "state", new_state.get(j, leaf.state)))
                    calls.append((setattr, other, "skipped", leaf.skipped + (j in passed)))
        return calls

    def _primary(self, group: list[int]) -> Array:
        """Return the group's first array, read-only if one of its places is."""
        x = self.xs[group[0]]
        return x if all(maywrite(self.xs[k]) for k in group) else read_only(x)

    def _sum(self, gs: list[Any], leaf: Any, group: list[int]) -> Any:
        """Return the sum of a group's gradients as its first place sees it; None if all are."""
        first = group[0]
        if len(group) == 1:
            return gs[first]  # which the engine checks
        given = {}
        x, g = self.xs[first], gs[first]
        # PyTorch has summed what it hands over as the one gradient of one tensor.
        once = is_tensor(x) and all(self.xs[k] is x and gs[k] is g for k in group)
        for k in group[:1] if once else group:
            as_seen = partial(self._carried, source=first, target=k)
            g = engine.checked(gs[k], leaf, self.xs[k], partial(self.where, k), as_seen)
            if g is not None:
                given[k] = g
        for k in group[1:] if given else ():
            self._refuse_misfit(first, k)
        seen = [self._carried(g, source=k, target=first) for k, g in given.items()]
        return reduce(engine.summed, seen) if seen else None

    def _carried(self, values: Array, source: int, target: int) -> Array:
        """Return values laid out like the array in one place as they appear through another's."""
        x, other = self.xs[source], self.xs[target]
        return values if x is other or not same_elements(x, other) else carry(values, x, other)

    def _refuse_misfit(self, first: int, k: int) -> None:
        """Raise if two places are not views of one array, nor can have the same numbers."""
        x, other = self.xs[first], self.xs[k]
        refuse_masked_parameter(other, partial(self.where, k))
        if other is x or (isnumeric(other) and same_elements(x, other)):
            return
        if not isnumeric(other) or other.shape != x.shape or other.dtype != x.dtype:
            raise ValueError(
                f"{self.where(first)} and {self.where(k)} share a Leaf, but are separate arrays, "
                f"{_kind(x)} and {_kind(other)}; call setup anew with this model"
            )


def _kind(x: Any) -> str:
    if not isnumeric(x):
        return short(x)
    return f"of shape {tuple(x.shape)} and dtype {x.dtype}"


# --- adjust, freeze, thaw --------------------------------------------------------------------


def _leaves(state: Tree) -> list[Leaf]:
    """Return the leaves of a state tree, each once."""
    _pytree.announce(Leaf)
    if isinstance(state, Rule) or not (isinstance(state, Leaf) or is_node(state)):
        raise _no_state(state)
    found: dict[int, Leaf] = {}
    for path, x in walk(state, is_leaf=_is_rule):
        if isinstance(x, Leaf):
            found[id(x)] = x
        elif x is not None:
            raise _no_state(x, f" at {path}")
    return list(found.values())


def _no_state(x: Any, at: str = "") -> TypeError:
    from ._messages.mixups import for_state

    told = f"expected a state tree, as setup returns it, got {short(x)}{at}"
    return TypeError(told + for_state(x))


def _is_rule(x: Any) -> bool:
    return isinstance(x, Rule)


def _adjusted(leaves: list[Leaf], eta: Any, fields: dict[str, Any]) -> dict[int, Rule]:
    """Return the new rule of each leaf, by the leaf's id."""
    if isinstance(eta, Rule):
        raise TypeError(
            "adjust changes numbers of the rules that a state has: adjust(state, eta, rho=...); "
            f"got {short(eta)}, and another rule needs setup(rule, model)"
        )
    if eta is not None:
        if "eta" in fields:
            raise TypeError("adjust got eta twice, by position and by name")
        fields = {"eta": eta, **fields}
    rules = {id(leaf.rule): leaf.rule for leaf in leaves}  # rules that leaves share stay shared
    if rules:
        refuse_unknown([*rules.values()], fields)
    made = {key: adjusted(rule, fields) for key, rule in rules.items()}
    return {id(leaf): made[id(leaf.rule)] for leaf in leaves}


def adjust(state: Tree, eta: float | None = None, /, **fields: Any) -> Tree:
    """Return a state tree with other hyperparameters; what the rules remember is kept.

    Parameters
    ----------
    state : tree
        A state tree, or a part of one. It stays as it is, and shares no memory with the result.
    eta : float, optional
        The new learning rate.
    **fields
        Other fields by name. Rules of a chain that have no such field stay as they are.

    Raises
    ------
    TypeError
        If no rule has a field of this name, or if the field shapes the state (as `n` of
        `AccumGrad`).
    ValueError
        If a rule does not take the value.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Momentum, adjust, setup
    >>> state = setup(Momentum(), np.zeros(2))
    >>> adjust(state, 0.5, rho=0.8)
    Leaf(Momentum(eta=0.5, rho=0.8), MomentumState(v=array([0., 0.])))
    """
    leaves = _leaves(state)
    rules = _adjusted(leaves, eta, fields)
    made = {id(leaf): leaf.renewed(rules[id(leaf)], fresh(leaf.state)) for leaf in leaves}
    return fmap(lambda x: made.get(id(x), x), state)


def adjust_(state: Tree, eta: float | None = None, /, **fields: Any) -> None:
    """Change hyperparameters in a state tree, or in the part of one that is given.

    Like `adjust`, but in place and without a copy. If it raises, nothing has changed.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Descent, adjust_, setup
    >>> state = setup(Descent(), {"encoder": np.zeros(2), "decoder": np.zeros(2)})
    >>> adjust_(state["decoder"], 0.5)
    >>> state
    {'encoder': Leaf(Descent(eta=0.1), ()), 'decoder': Leaf(Descent(eta=0.5), ())}
    """
    leaves = _leaves(state)
    rules = _adjusted(leaves, eta, fields)
    at_once([(setattr, leaf, "rule", rules[id(leaf)]) for leaf in leaves])


def freeze_(state: Tree) -> None:
    """Stop updates of the parameters below a state tree, or a part of one, until `thaw_`.

    Neither the parameters nor what the rules remember of them then change.

    Raises
    ------
    TypeError
        If given a model instead of a state tree.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Descent, freeze_, setup
    >>> state = setup(Descent(), {"encoder": np.zeros(2), "decoder": np.zeros(2)})
    >>> freeze_(state["encoder"])
    >>> state
    {'encoder': Leaf(Descent(eta=0.1), (), frozen=True), 'decoder': Leaf(Descent(eta=0.1), ())}
    """
    at_once([(setattr, leaf, "frozen", True) for leaf in _leaves(state)])


def thaw_(state: Tree) -> None:
    """Undo `freeze_` for the parameters below a state tree, or a part of one."""
    at_once([(setattr, leaf, "frozen", False) for leaf in _leaves(state)])
