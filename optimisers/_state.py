"""The state tree: set up, step, evaluate, adjust, freeze.

A state tree has the shape of its model, with a `Leaf` for each trainable array: the rule that
updates it and the state that the rule keeps. A step gathers the leaves with their parameters and
gradients (`gather`), gives them to the engine, and puts arrays and states that were not written in
place into new trees (`_replaced`, `_renewed`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

from . import _pytree
from ._arrays.library import bare, is_immutable, isnumeric, library_for
from ._engine import advance as engine
from ._engine import cpu
from ._engine.arrays import at_once, fresh
from ._engine.tied import Tied, reunited
from ._kernels import are_distinct
from ._leaf import Leaf
from ._messages.calls import explained
from ._messages.text import short
from ._trees.lockstep import gather, place, places
from ._trees.nodes import is_node, mirror, rebuild, trainable_keys
from ._trees.parameters import parameters
from ._trees.paths import KeyPath
from ._trees.untrained import refuse_no_tree, tell
from ._trees.walks import fmap, fold, walk
from .rules._base import Rule, adjusted, refuse_unknown, started
from .rules._measure import Pass, passing

Array = Any
Tree = Any
Model = TypeVar("Model")
OnNonfinite = Literal["ignore", "skip", "raise"]


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
    whole = Pass()  # in which leaves share the numbers that belong to the tree
    with passing(whole):
        for k, owner in enumerate(owners):
            whole.begin(k)
            made.append(_new_leaf(rule, index, *arrays[k]) if owner == k else made[owner])
            index += owner == k
    for owner, times in Counter(owners).items():
        if times > 1:
            places = (str(arrays[k][0]) for k, first in enumerate(owners) if first == owner)
            made[owner].tie = _pytree.Tie(tuple(places))
    leaves = iter(made)  # in the order in which `fold` visits them

    return fold(
        model,
        lambda path, x: next(leaves) if isnumeric(x) else (),
        lambda path, x, results: mirror(x, results),
        keys=trainable_keys,
        skipped=lambda child: (),
    )


def _new_leaf(rule: Rule, index: int, path: KeyPath, x: Array) -> Leaf:
    library_for(x).refuse_lost(x, (), path.__str__)
    try:
        with cpu.kernels.UsualEnvironment():
            return Leaf(rule, started(rule, bare(x), index))
    except TypeError as error:
        raise TypeError(f"at {path}: {error}") from error


# --- update ----------------------------------------------------------------------------------


def update(
    state: Tree,
    model: Model,
    grad: Tree,
    *higher: Tree,
    value: Any = None,
    on_nonfinite: OnNonfinite = "ignore",
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
    value : float, optional
        The value of the loss here, a number or a 0-d array, for rules that ask for it (`Polyak`).
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
    return _step(state, model, grad, higher, False, value, on_nonfinite)


def update_(
    state: Tree,
    model: Model,
    grad: Tree,
    *higher: Tree,
    value: Any = None,
    on_nonfinite: OnNonfinite = "ignore",
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
    state, model, grad, *higher, value, on_nonfinite
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
    return _step(state, model, grad, higher, True, value, on_nonfinite)


def _step(
    state: Tree,
    model: Model,
    grad: Tree,
    higher: Sequence[Tree],
    in_place: bool,
    value: Any,
    on_nonfinite: OnNonfinite,
) -> tuple[Tree, Model]:
    _pytree.announce(Leaf)
    with cpu.kernels.UsualEnvironment():
        return _stepped(state, model, grad, higher, in_place, value, on_nonfinite)


def _stepped(
    state: Tree,
    model: Model,
    grad: Tree,
    higher: Sequence[Tree],
    in_place: bool,
    value: Any,
    on_nonfinite: OnNonfinite,
) -> tuple[Tree, Model]:
    held, xs, gs = gather(Leaf, state, model, grad)
    leaves = reunited(held) if _pytree.have_ties_crossed() else held
    higher = higher and [gather(Leaf, state, model, h)[2] for h in higher]

    def where(k: int) -> str:
        return place(Leaf, state, model, k)

    if len(leaves) == 1 or are_distinct(leaves):
        new_x, new_state, skipped = engine.advance(
            leaves, xs, gs, higher, where, in_place, on_nonfinite, value=value
        )
    else:
        tied = Tied(leaves, held, xs, where)
        new_x, new_state, skipped = tied.advance(gs, higher, in_place, on_nonfinite, value)

    if in_place and not new_x:
        return state, model
    if not in_place:
        state = _renewed(state, held, leaves, new_state, skipped)
        for k, x in enumerate(xs):
            if k not in new_x:
                new_x[k] = fresh(x)
    return state, _replaced(state, model, xs, new_x)


def _replaced(state: Tree, model: Model, xs: list[Array], new_x: dict[int, Array]) -> Model:
    """Return a model with new arrays, by index."""
    by_id = {id(xs[k]): new for k, new in new_x.items()}
    apart = len(by_id) < len(new_x) and any(
        is_immutable(xs[k]) or by_id[id(xs[k])] is not new for k, new in new_x.items()
    )
    # `fmap` asks once for each array.
    new_model = model if apart else fmap(lambda x: by_id.pop(id(x), x), model)
    # Paths decide where one array has a leaf for each of its places, or where a node makes its
    # children anew at each visit.
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
            made[id(leaf)] = _renewed_one(leaf, new_state.get(k, leaf.crossed), k in new_state)
    for k in skipped:
        made[id(leaves[k])].skipped += 1
    for leaf, other in zip(leaves, held, strict=True) if leaves is not held else ():
        made[id(other)] = made[id(leaf)]
    return fmap(lambda leaf: made.get(id(leaf), leaf), state)


def _renewed_one(leaf: Leaf, new: Any, is_new: bool) -> Leaf:
    """Return a leaf with a new state, or a copy if there is none."""
    if type(new) is _pytree.Crossed and (is_new or (new.is_traced and new.is_all_of(leaf))):
        return leaf.carried(new)
    return leaf.renewed(leaf.rule, new if is_new else fresh(leaf.state))


def evaluation(state: Tree, model: Model) -> Model:
    """Return the model to evaluate, where that is another one than the model to train.

    Rules that average their path, as `ScheduleFreeAdamW` does, give the average; others the
    parameter itself, which the result shares. It changes nothing: go on with the model that you
    have.

    Parameters
    ----------
    state : tree
        The state tree of the model.
    model : tree
        The model, as the last update left it.

    Returns
    -------
    tree
        A model like `model`, or `model` itself where no rule has another one.

    Raises
    ------
    TypeError, ValueError
        If state and model do not fit each other; the message names the path.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import ScheduleFreeDescent, evaluation, setup, update
    >>> model = {"w": np.array([1.0, 2.0])}
    >>> state = setup(ScheduleFreeDescent(0.1), model)
    >>> for _ in range(2):
    ...     state, model = update(state, model, {"w": np.array([3.0, -4.0])})
    >>> model["w"], evaluation(state, model)["w"]
    (array([0.535, 2.62 ]), array([0.55, 2.6 ]))
    """
    _pytree.announce(Leaf)
    held, xs, _ = gather(Leaf, state, model, None)
    new_x, made = {}, {}
    for k, (leaf, x) in enumerate(zip(held, xs, strict=True)):
        pair = id(leaf), id(x)  # one for all places of a tied parameter
        if pair not in made:
            made[pair] = leaf.rule._evaluated(leaf.state, x)
        if made[pair] is not x:
            new_x[k] = made[pair]
    return _replaced(state, model, xs, new_x) if new_x else model


# --- adjust, freeze, thaw --------------------------------------------------------------------


def leaves_of(state: Tree) -> list[Leaf]:
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
    leaves = leaves_of(state)
    rules = _adjusted(leaves, eta, fields)
    made = {id(leaf): _with_rule(leaf, rules[id(leaf)]) for leaf in leaves}
    return fmap(lambda x: made.get(id(x), x), state)


def _with_rule(leaf: Leaf, rule: Rule) -> Leaf:
    """Return a copy of a leaf with another rule; content of JAX stays as it is."""
    crossed = leaf.crossed
    if crossed is None or not crossed.is_all_of(leaf):
        return leaf.renewed(rule, fresh(leaf.state))
    new = leaf.carried(crossed.copied(fresh))
    new.rule = rule
    return new


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
    leaves = leaves_of(state)
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
    at_once([(setattr, leaf, "frozen", True) for leaf in leaves_of(state)])


def thaw_(state: Tree) -> None:
    """Undo `freeze_` for the parameters below a state tree, or a part of one."""
    at_once([(setattr, leaf, "frozen", False) for leaf in leaves_of(state)])
