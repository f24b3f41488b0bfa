"""Rules as optax transformations, and optax transformations as rules.

>>> import jax, optax, optimisers
>>> from jax import numpy as jnp
>>> tx = optax.chain(
...     optax.clip_by_global_norm(1.0), optimisers.optax.to_optax(optimisers.OAdam(eta=0.1))
... )
>>> params = {"w": jnp.array([1.0, 2.0])}
>>> updates, state = tx.update({"w": jnp.array([3.0, -4.0])}, tx.init(params), params)
>>> optax.apply_updates(params, updates)
{'w': Array([0.8, 2.2], dtype=float32)}
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arrays.library import is_abstract, is_array, is_foreign, library_for
from ._arrays.traced import Maybe, double
from ._engine.gradients import checked_gradient
from ._messages.calls import no_name
from ._messages.text import short, warn_caller
from .rules._base import Rule, started
from .rules._measure import Pass, measures, one_round
from .rules._numbers import applied, as_like, for_step, moved

__all__ = ["RuleState", "from_optax", "to_optax"]

Array = Any
Tree = Any


class RuleState(NamedTuple):
    """The state of `to_optax`: the tree of parameters, with the state of the rule for each."""

    leaves: Tree


def to_optax(rule: Rule) -> Any:
    """Return a rule as an `optax.GradientTransformation`.

    Parameters
    ----------
    rule : Rule
        Any rule, chains and a user's own too. Its hyperparameters may be traced, so
        `optax.inject_hyperparams` can schedule them.

    Returns
    -------
    optax.GradientTransformation
        ``init(params)`` gives a `RuleState`; ``update(grads, state, params)`` gives the updates
        that `optax.apply_updates` *adds*, so ``-dx`` where the rule says ``dx``. It goes into
        `optax.chain`, `optax.masked`, `jax.jit`, `jax.lax.scan`. Extra arguments of ``update``
        (``value=``, ``grad=``, ...) are passed over, as `optax.adam` does. A rule that ends in a
        learning rate goes last in a chain; what follows it sees steps instead of gradients.

    Raises
    ------
    TypeError
        If `rule` is no rule; from ``init``, if it cannot take a parameter of this dtype.
    ValueError
        From ``update``, if `params` is missing or a gradient has another shape.

    Notes
    -----
    A gradient of None is no step, as everywhere in this library; the update is then zero. Whole
    numbers among `params` are carried along.

    `MixedPrecision` moves the parameter to where its master copy is: the updates are differences,
    and `optax.apply_updates` lands within rounding of the rounded master. The errors do not add
    up, but what stands behind it in a chain, or drops its updates, works against the master.

    For complex parameters, `jax.grad` gives the conjugate of the direction of ascent; conjugate
    its gradients here as before any other optax transformation.

    Examples
    --------
    >>> import jax, optax
    >>> from jax import numpy as jnp
    >>> from optimisers import Momentum
    >>> from optimisers.optax import to_optax
    >>> tx = to_optax(Momentum(eta=0.1))
    >>> @jax.jit
    ... def step(x, state):
    ...     updates, state = tx.update(jax.grad(lambda x: jnp.sum(x**2))(x), state, x)
    ...     return optax.apply_updates(x, updates), state
    >>> x = jnp.array([1.0, -2.0])
    >>> x, state = step(x, tx.init(x))
    >>> x
    Array([ 0.8, -1.6], dtype=float32)
    """
    import jax
    import optax

    if not isinstance(rule, Rule):
        from ._messages.mixups import no_rule

        raise no_rule("to_optax takes a rule of this library", rule)

    def init(params: Tree) -> RuleState:
        places, structure = jax.tree_util.tree_flatten_with_path(params)
        return RuleState(
            structure.unflatten([_init(rule, k, *place) for k, place in enumerate(places)])
        )

    def update(
        grads: Tree, state: RuleState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, RuleState]:
        if params is None:
            raise ValueError(
                "to_optax: rules look at the parameters, so hand them over: "
                "tx.update(grads, state, params)"
            )
        places, structure = jax.tree_util.tree_flatten_with_path(params)
        gs = structure.flatten_up_to(grads)
        states = structure.flatten_up_to(state.leaves)
        stepped: dict[int, Any] = {}

        def evaluate(k: int) -> None:
            path, x = places[k]
            stepped[k] = _step(rule, path, x, gs[k], states[k])

        def path_of(k: int) -> str:
            return str(jax.tree_util.keystr(places[k][0]))

        whole = Pass(lambda: states, extra.get("value"), path_of)
        waiting: Sequence[int] = range(len(places))
        while waiting := one_round(whole, waiting, evaluate):
            rules_of = dict.fromkeys(waiting, measures(rule))
            whole.combine(rules_of.copy)
        made = [stepped[k] for k in range(len(places))]
        updates = structure.unflatten([u for u, _ in made])
        return updates, RuleState(structure.unflatten([s for _, s in made]))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_parameter(x: Any) -> bool:
    from jax import numpy as jnp

    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _init(rule: Rule, index: int, path: Any, x: Array) -> Any:
    import jax

    if not _is_parameter(x):
        return ()
    try:
        return started(rule, jax.numpy.asarray(x), index)
    except TypeError as error:
        raise TypeError(f"at {jax.tree_util.keystr(path)}: {error}") from error


def _step(rule: Rule, path: Any, x: Array, g: Any, state: Any) -> tuple[Array, Any]:
    """Return the update of one array, to be added, and its state."""
    import jax
    from jax import numpy as jnp

    x = jnp.asarray(x)
    if _is_parameter(x):
        g = g if is_array(g) or g is None or g == () else jnp.asarray(g)
        g = checked_gradient(g, x, lambda: jax.tree_util.keystr(path))
        if g is not None:
            return _moved(rule, x, g, state)
    return jnp.zeros_like(x), state


def _moved(rule: Rule, x: Array, g: Array, state: Any) -> tuple[Array, Any]:
    from jax import numpy as jnp

    if type(rule).move is Rule.move:
        state, dx = applied(rule, state, x, g)
        if isinstance(dx, Maybe):
            step = for_step(x, -dx.step)
            return jnp.where(dx.made, step, jnp.zeros_like(step)), state
        return (jnp.zeros_like(x) if dx is None else for_step(x, -dx)), state
    state, new = moved(rule, state, x, g)
    if new is None:
        return jnp.zeros_like(x), state
    wide = jnp.promote_types(x.dtype, jnp.float32)  # a difference in double loses next to nothing
    return new.astype(wide) - x.astype(wide), state


# --- the other way ---------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _FromOptax(Rule):
    """An optax transformation as a rule."""

    tx: Any

    fixed = ("tx",)

    def __repr__(self) -> str:
        return f"from_optax({type(self.tx).__name__})"

    def init(self, x: Array, *, index: int = 0) -> Any:
        import jax

        with _at_precision_of(x):
            x = _as_jax(x)
            state = _with_keys_of_its_own(self.tx.init(x), index)
            try:
                jax.eval_shape(self.tx.update, x, state, x)
            except TypeError as error:
                if "required keyword-only argument" not in str(error):
                    raise
                raise TypeError(
                    f"from_optax: this transformation asks for more than a gradient ({error}), as "
                    "line searches do, which no update hands over; use it with optax alone"
                ) from error
            if index == 1 and not _has_keys(state) and _is_random(self.tx.update, x, state):
                warn_caller(
                    "from_optax: this transformation draws random numbers from a key that is not "
                    "in its state, and so the same for each array of one shape; over the vector of "
                    "`destructure` there is one array"
                )
            return state

    def apply(self, state: Any, x: Array, dx: Array, *higher: Array) -> tuple[Any, Array]:
        traced = is_abstract(x) or is_abstract(dx)
        update = self.tx.update if traced else _compiled(self.tx.update)
        with _at_precision_of(x):
            updates, state = update(_as_jax(dx), state, _as_jax(x))
            return state, as_like(x, -library_for(x).taken(updates, x))


def from_optax(tx: Any) -> Rule:
    """Return an optax transformation as a rule.

    Parameters
    ----------
    tx : optax.GradientTransformation
        Such as `optax.adam(1e-3)`, or a chain.

    Returns
    -------
    Rule
        For models of JAX arrays, also while they are traced, and of NumPy arrays up to double
        precision, which JAX computes in the precision of the parameter whatever its settings are.
        It goes into `OptimiserChain` and `MixedPrecision`. Its state is optax's own.

    Raises
    ------
    TypeError
        If `tx` is no transformation; from `setup`, if a parameter is of another library or dtype,
        or if `tx` asks for the value of the loss, as `optax.lbfgs` does.

    Notes
    -----
    **A rule sees one array at a time.** A transformation that looks at the whole tree, such as
    `optax.clip_by_global_norm`, `optax.apply_if_finite`, or a mask given as a tree,
    here looks at each array for itself. Over the flat vector of `destructure` each array is the
    whole model. Each array has a random key of its own, made of that of `tx` and of the number of
    the parameter in the tree that `setup` was given; the first has that of `tx`.

    Hyperparameters are inside `tx`, where `adjust` does not reach them: schedule them as optax
    does. An array costs a call of a compiled JAX function, some ten microseconds. Pickling works
    as far as that of `tx` does, and optax's own transformations do not pickle.

    Examples
    --------
    >>> import numpy as np, optax
    >>> from optimisers import setup, update_
    >>> from optimisers.optax import from_optax
    >>> model = {"w": np.array([1.0, 2.0])}
    >>> state = setup(from_optax(optax.sgd(0.1)), model)
    >>> state, model = update_(state, model, {"w": np.array([3.0, -4.0])})
    >>> model
    {'w': array([0.7, 2.4])}
    """
    if isinstance(tx, type) or not (hasattr(tx, "init") and hasattr(tx, "update")):
        name = getattr(tx, "__name__", None)
        hint = f"; write optax.{name}(...)" if callable(tx) and name else ""
        if isinstance(tx, Rule):
            hint = "; that is a rule already"
        raise TypeError(f"from_optax takes an optax.GradientTransformation; got {short(tx)}{hint}")
    return _FromOptax(tx)


def _with_keys_of_its_own(state: Any, index: int) -> Any:
    """Return a state whose random keys are those of the array of this number; 0 keeps optax's."""
    import jax

    def own(path: Any, x: Any) -> Any:
        return jax.random.fold_in(x, index) if _is_key(path, x) else x

    return jax.tree_util.tree_map_with_path(own, state) if index else state


def _has_keys(state: Any) -> bool:
    from jax import tree_util

    return any(_is_key(path, x) for path, x in tree_util.tree_flatten_with_path(state)[0])


def _is_key(path: Any, x: Any) -> bool:
    """Tell whether a part of a state is a random key, of today's kind or of bare numbers."""
    import jax

    if not isinstance(x, jax.Array):
        return False
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return bool(x.shape == ())
    named = str(path[-1]).lower() if path else ""
    is_bare = x.dtype == np.uint32 and x.shape == jax.random.PRNGKey(0).shape
    return bool(is_bare) and ("key" in named or "rng" in named)


def _is_random(update: Any, x: Array, state: Any) -> bool:
    """Tell whether an update draws random numbers."""
    import jax

    text = str(jax.make_jaxpr(update)(x, state, x))
    return any(f"{word}[" in text for word in ("random_bits", "threefry2x32", "rng_bit_generator"))


@functools.lru_cache(maxsize=64)
def _compiled(update: Any) -> Any:
    import jax

    return jax.jit(update)


def _at_precision_of(x: Array) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which JAX computes in double, if a NumPy array is in double."""
    if is_foreign(x) or x.dtype.itemsize < (16 if x.dtype.kind == "c" else 8):
        return contextlib.nullcontext()
    import jax  # noqa: F401 (which `double` finds where it is loaded)

    return double()


def _as_jax(x: Array) -> Array:
    """Return `x` as a JAX array that shares no memory with a NumPy array."""
    import jax

    if isinstance(x, jax.Array):
        return x
    if is_array(x) and not is_foreign(x) and x.dtype.char not in "gG":  # long doubles
        return jax.numpy.array(np.asarray(x, x.dtype.newbyteorder("=")))
    dtype = getattr(x, "dtype", "no dtype")
    raise TypeError(
        "from_optax computes with JAX: parameters are JAX arrays, or NumPy arrays of a dtype that "
        f"JAX has; got {type(x).__module__}.{type(x).__name__} ({dtype})"
    )


if not TYPE_CHECKING:  # type checkers know what there is

    def __getattr__(name):
        raise no_name(__name__, name)
