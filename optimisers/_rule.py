"""What a rule is: `Rule`, its elementwise kind, the limits of its fields, the registry."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
import typing
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FunctionType
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np

from . import _device, _jax, _torch
from ._arrays import dtype_name, is_narrow, isnumeric, library_of
from ._construct import refuse, takes
from ._jax import (
    Maybe,
    Number,
    attributes,
    chosen,
    double,
    holds_traced,
    is_jax,
    is_tracer,
    lifted,
    promoting,
    settled,
    with_attributes,
)
from ._text import short
from ._torch import is_mapped, is_tensor
from .words import is_complex, maximum, minimum, namespace

# --- limits of fields ------------------------------------------------------------------------


class Limit(NamedTuple):
    """What the numbers of a field must satisfy; attached to the field's type with `Annotated`.

    On the type of a number it is about this number, on that of a tuple about all in it together.
    """

    text: str
    holds: Callable[[Any], bool]


class Limits(NamedTuple):
    """What a field must satisfy: each of its numbers, and then all of them together."""

    each: list[Limit]
    together: list[Limit]


Finite = Annotated[float, Limit("finite", math.isfinite)]
NonNegative = Annotated[float, Limit("finite and at least 0", lambda v: 0 <= v < math.inf)]
Upper = Annotated[float, Limit("at least 0", lambda v: v >= 0)]
"""An upper limit, and so inf where there is none."""

Decay = Annotated[float, Limit("in [0, 1)", lambda v: 0 <= v < 1)]
Decays = tuple[Decay, Decay]
Shrink = Annotated[float, Limit("in (0, 1)", lambda v: 0 < v < 1)]
Grow = Annotated[float, Limit("finite and above 1", lambda v: 1 < v < math.inf)]
Range = Annotated[
    tuple[NonNegative, Upper],
    Limit("(least, largest), in this order", lambda pair: pair[0] <= pair[1]),
]
Order = Annotated[float, Limit("a number, inf or -inf", lambda v: not math.isnan(v))]
Count = Annotated[int, Limit("a whole number, at least 1", lambda v: v >= 1 and v.is_integer())]


@functools.cache
def _limits(cls: type) -> dict[str, Limits]:
    """Return for each field of `cls` its limits: one, or one for each entry of a tuple."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception:  # a user's annotations that cannot be read here limit nothing
        return {}
    found: dict[str, Limits] = {}
    for name, hint in hints.items():
        together = _limits_on(hint)
        bare = hint.__origin__ if together else hint
        if typing.get_origin(bare) is tuple:
            each = [limit for part in typing.get_args(bare) for limit in _limits_on(part)]
        else:
            each, together = together, []
        if each:
            found[name] = Limits(each, together)
    return found


def _limits_on(hint: Any) -> list[Limit]:
    return [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Limit)]


_PLAIN = (bool, int, float, np.ndarray, np.generic)


def is_traced(value: Any) -> bool:
    """Tell whether JAX or HIPS autograd stands behind `value`, and records what is done to it.

    Or ``torch.vmap``, which does it for many values at once.
    """
    if isinstance(value, _PLAIN):
        return False
    if type(value) is Number:
        return value.is_traced
    tracer = sys.modules.get("autograd.tracer")
    is_boxed = tracer is not None and isinstance(value, tracer.Box)
    return is_boxed or is_tracer(value) or is_mapped(value)


def _is_unknown(value: Any) -> bool:
    """Tell whether nobody can say yet which number `value` is."""
    return is_traced(value) or (type(value) is Number and not value.is_scalar)


def _checked_number(where: str, limit: Limit, value: Any) -> Any:
    """Return `value` as a Python number, or as it is where it is traced."""
    if _is_unknown(value):
        return value
    try:
        if isinstance(value, str | bytes) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{where} must be a real number, {limit.text}; got {short(value)}{_way_out(value)}"
        ) from None
    except OverflowError:  # a whole number beyond all floats
        number = math.inf if value > 0 else -math.inf
    if not limit.holds(number):
        uphill = number < 0 and where.endswith(": eta")
        mend = "; to go uphill, give the gradient with the other sign" if uphill else ""
        raise ValueError(f"{where} must be {limit.text}; got {value!r}{mend}")
    return value if type(value) in (bool, int, float) and math.isfinite(number) else number


def _checked(where: str, limits: Limits, value: Any) -> Any:
    """Return a field's number, or its tuple of them, as Python numbers."""
    each, together = limits
    if len(each) == 1:
        return _checked_number(where, each[0], value)
    if not isinstance(value, tuple | list) or len(value) != len(each):
        raise TypeError(
            f"{where} must hold {len(each)} numbers; got {short(value)}{_way_out(value)}"
        )
    checked = tuple(
        _checked_number(f"{where}[{i}]", limit, number)
        for i, (limit, number) in enumerate(zip(each, value, strict=True))
    )
    for limit in together:
        if not any(map(_is_unknown, checked)) and not limit.holds(checked):
            raise ValueError(f"{where} must be {limit.text}; got {short(value)}")
    return checked


# --- higher derivatives ----------------------------------------------------------------------


def _taking_higher(method: Any) -> Any:
    """Return a user's `apply` or `move` as one that takes higher derivatives, and drops them.

    What it has names for it is handed. None where it takes any number of arguments already.
    """
    kind = type(method)
    if issubclass(kind, staticmethod | classmethod):
        # A static method has no self before the others.
        made = _dropping(method.__func__, _FIRST_ORDER - issubclass(kind, staticmethod))
        return made and kind(made)
    return _dropping(method, _FIRST_ORDER) if isinstance(method, FunctionType) else None


def _dropping(function: Any, least: int) -> Any:
    """Return a function that hands another only as many arguments as that takes, or None."""
    most = _most_arguments(function)
    if most is None:
        return None

    @functools.wraps(function)
    def taking_higher(*args: Any, **named: Any) -> Any:
        return function(*args[: max(most, least)], **named)

    return taking_higher


def _most_arguments(function: Any) -> int | None:
    """Return how many arguments a function takes by position; None if any number.

    One that names none of those hands all on to the function that it wraps, if it does.
    """
    while True:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        named = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return named
        function = getattr(function, "__wrapped__", None)
        if function is None or named >= _FIRST_ORDER:
            return None


_FIRST_ORDER = 4
"""The arguments of an `apply` without higher derivatives: self, state, x and dx."""


def _way_out(value: Any) -> str:
    """Return what to do with a value that somebody took for a hyperparameter."""
    if isinstance(value, Rule | type):
        from ._mixups import for_number

        return for_number(value)
    if callable(value) and not isinstance(value, type):
        return (
            "; for a schedule, make the rule with the first number, and hand the others to "
            "adjust_(state, eta) between steps"
        )
    holds_arrays = isinstance(value, list | tuple) and any(hasattr(x, "shape") for x in value)
    if holds_arrays or isinstance(value, dict | Iterator) or hasattr(value, "parameters"):
        return "; a rule takes no parameters: call setup(rule, model)"
    return ""


# --- Rule ------------------------------------------------------------------------------------

_registry: list[type[Rule]] = []
_new_object = object.__new__


def registry() -> list[type[Rule]]:
    """Return every public rule of the library, in the order of their definition."""
    return [c for c in _registry if c.__name__[0] != "_" and not inspect.isabstract(c)]


class Rule(ABC):
    """A way to turn gradients into steps.

    Subclass it as a frozen dataclass whose fields are the hyperparameters, and give it `apply`
    (and `init`, if it remembers something from step to step). If the formula works element by
    element, subclass `ElementwiseRule` instead: it then runs as fast as the built-in rules.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import numpy as np, optimisers
    >>> @dataclass(frozen=True)
    ... class DecayDescent(optimisers.Rule):
    ...     eta: float = 0.1
    ...     def init(self, x): return 1
    ...     def apply(self, state, x, dx): return state + 1, dx * (self.eta / state**0.5)
    >>> model = {"w": np.array([1.0, 2.0])}
    >>> state = optimisers.setup(DecayDescent(), model)
    >>> state, model = optimisers.update(state, model, {"w": np.array([1.0, 1.0])})
    >>> model["w"], state["w"]
    (array([0.9, 1.9]), Leaf(DecayDescent(eta=0.1), 2))
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    """Fields that shape the state and so cannot be adjusted once there is one."""

    static: ClassVar[tuple[str, ...]] = ()
    """Fields of numbers on whose values the code of the rule depends, so that JAX compiles anew for
    others; these need to be named here, other numbers may be traced."""

    _widens: ClassVar[bool] = True
    """Whether it is handed float32 numbers in place of narrower ones: see `moved`."""

    _shown_as: ClassVar[str]
    """The name of the class in messages and in its state."""

    if not typing.TYPE_CHECKING:  # type checkers look at the constructor alone, as `help` does

        def __new__(cls, *args, **kwargs):
            known, most = takes(cls)
            if not known.issuperset(kwargs) or len(args) > most:
                refuse(cls, cls._shown_as, args, kwargs)
            make = super().__new__
            return make(cls) if make is _new_object else make(cls, *args, **kwargs)

        __new__.__signature__ = inspect.Signature(
            [inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)]
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._shown_as = cls.__dict__.get("_shown_as", cls.__name__)
        for name in ("apply", "move"):
            owner: type = next(c for c in cls.__mro__ if name in vars(c))
            is_new = owner is cls or not issubclass(owner, Rule)  # else it was seen to there
            if is_new and (made := _taking_higher(vars(owner)[name])):
                setattr(cls, name, made)
        if cls.__module__.startswith(f"{__package__}."):
            _registry.append(cls)

    def __post_init__(self) -> None:
        for field, limits in _limits(type(self)).items():
            checked = _checked(f"{self._shown_as}: {field}", limits, getattr(self, field))
            object.__setattr__(self, field, checked)

    def init(self, x: Any) -> Any:
        """Return the state this rule keeps for the parameter `x`; anything, by default ``()``."""
        return ()

    @abstractmethod
    def apply(self, state: Any, x: Any, dx: Any, *higher: Any) -> tuple[Any, Any]:
        """Turn a gradient into a step.

        Parameters
        ----------
        state
            What `init` or the last `apply` returned; it may be written into.
        x : array
            The parameter, not to be written; in float32 if its own numbers are narrower.
        dx : array
            The gradient, of the shape and dtype of `x`, not to be written.
        *higher : array
            Higher derivatives, where `update` was given them.

        Returns
        -------
        (state, dx)
            The new state, and what is subtracted from `x`. A `dx` of None means: no step.
        """

    def move(self, state: Any, x: Any, dx: Any, *higher: Any) -> tuple[Any, Any]:
        """Return the new state, and the new parameter: ``x - dx``, or None for no step."""
        state, dx = self.apply(state, x, dx, *higher)
        if hasattr(dx, "dtype") and is_complex(dx) and not is_complex(x):
            raise TypeError(f"{type(self).__name__} made a complex step of a real parameter")
        if isinstance(dx, Maybe):
            return state, chosen(dx.made, as_like(x, widened(x) - widened(dx.step)), x)
        return state, None if dx is None else as_like(x, widened(x) - widened(dx))

    def fields(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and value of each hyperparameter, those of inner rules included."""
        if dataclasses.is_dataclass(self):
            for field in dataclasses.fields(self):
                yield field.name, getattr(self, field.name)

    def adjust(self, **changes: Any) -> Self:
        """Return this rule with other values of those fields that it has.

        Rules inside this one, as in a chain, change where they have a field of that name. Fields
        that only other rules have are passed over.

        Raises
        ------
        TypeError
            If no rule at all has such a field, or if it shapes the state.
        """
        known = dict(self.fields())
        own = {name: value for name, value in changes.items() if name in known}
        if len(own) < len(changes):
            refuse_strange(self, changes)
        for name in own:
            if name in self.fixed:
                raise TypeError(
                    f"{self._shown_as}: {name} shapes the state and cannot be adjusted; "
                    f"call setup with a new rule"
                )
        cls = type(self)
        if cls.__post_init__ is Rule.__post_init__ and cls.__module__ == f"{__package__}.rules":
            return self._with(own)  # a tenth of what it takes to check all fields again
        return dataclasses.replace(self, **own) if own else self  # type: ignore[type-var]

    def _with(self, changes: dict[str, Any]) -> Self:
        """Return a copy with other values of some fields; these alone are checked."""
        limits = _limits(type(self))
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        for name, value in changes.items():
            if name in limits:
                value = _checked(f"{self._shown_as}: {name}", limits[name], value)
            vars(made)[name] = value
        return made

    if not typing.TYPE_CHECKING:  # type checkers know what there is

        def __getattr__(self, name):
            if name[0] == "_" or name in takes(type(self))[0]:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            from ._mixups import no_attribute

            raise no_attribute(self, name)


def started(rule: Rule, x: Any, index: int) -> Any:
    """Return the first state of a rule for the parameter of this number in the tree.

    It is told to an `init` that names `index`: what is random differs from parameter to parameter.
    """
    return rule.init(x, index=index) if _takes_index(type(rule)) else rule.init(x)  # type: ignore[call-arg]


@functools.cache
def _takes_index(cls: type[Rule]) -> bool:
    return "index" in inspect.signature(cls.init).parameters


def adjusted(rule: Rule, changes: dict[str, Any]) -> Rule:
    """Return a rule with those of the changes that it has fields for."""
    own = {name: changes[name] for name, _ in rule.fields() if name in changes}
    return rule.adjust(**own) if own else rule


def refuse_strange(rule: Rule, names: Collection[str]) -> None:
    """Raise if neither this rule nor any other has a field of a name."""
    strange = {*names}.difference(name for name, _ in rule.fields())
    if strange:
        fields = {name for cls in _registry for name in getattr(cls, "__dataclass_fields__", ())}
        refuse_unknown([rule], strange - fields)


def refuse_unknown(rules: Collection[Rule], names: Iterable[str]) -> None:
    """Raise if none of these rules has a field of a name; says what to write instead."""
    known = {name for rule in rules for name, _ in rule.fields()}
    if unknown := [name for name in names if name not in known]:
        from . import _names

        of = {name for rule in rules for name in class_names(rule)}
        told = f"no rule here has the field {', '.join(map(repr, unknown))}"
        raise TypeError(_names.unknown(told, unknown, sorted(known), of))


# --- ElementwiseRule -------------------------------------------------------------------------


class ElementwiseRule(Rule):
    """A rule whose formula works element by element, written once, as a `step`.

    Subclass it as a frozen dataclass with

    ``slots``
        the names of the arrays it keeps, each like the parameter; they start at `start`.
    ``coefs(self)`` or ``coefs(self, t)``
        the numbers that the step needs, computed in double and then cast once to the parameter's
        real dtype, or to float32 if that is narrower. A rule whose `coefs` takes `t`, the 1-based
        count of steps, has a `t` in its state.
    ``step(x, dx, state, coefs)``
        a static method in straight lines, free of numbers, that calls only `optimisers.words` and
        returns ``dx, (slots...)``.

    A step consists of lines ``name = formula``; a formula, of names, ``+ - * /`` and calls of
    `optimisers.words`. A comparison may stand as the first argument of ``where``, and only there.
    So the same text means the same for arrays and for compiled code.

    Raises
    ------
    ValueError
        By `update`, where a step is not in this language and meets an array of NumPy or PyTorch of
        float32, float64, float16 or bfloat16. The message shows the line and says what to write
        instead. What does not fit into the language is a `Rule` with `apply`.

    Notes
    -----
    With Numba installed (``pip install optimisers[numba]``), such arrays are updated by compiled
    code, alone and in a chain with other rules, as fast as by a built-in rule. The first update
    then takes about half a second longer, to import Numba, and another third of a second for each
    of the two dtypes, to compile. What was compiled is kept, in ``NUMBA_CACHE_DIR`` or in the
    user's folder for caches, from where a later process loads it in some milliseconds.

    Without Numba the step is evaluated array by array: the same numbers, at a fraction of the
    speed. The same holds for other dtypes and array libraries, for a rule with an `apply` or `move`
    of its own, and for one with more than 8 slots.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import numpy as np, optimisers
    >>> from optimisers.words import sign
    >>> @dataclass(frozen=True)
    ... class SignMomentum(optimisers.ElementwiseRule):
    ...     eta: float = 0.01
    ...     rho: float = 0.9
    ...     slots = ("v",)
    ...     def coefs(self): return self.rho, self.eta
    ...     @staticmethod
    ...     def step(x, dx, state, coefs):
    ...         v, = state
    ...         rho, eta = coefs
    ...         v = rho * v + dx
    ...         return eta * sign(v), (v,)
    >>> rule = SignMomentum(eta=0.5)
    >>> state, dx = rule.apply(rule.init(np.zeros(2)), np.zeros(2), np.array([3.0, -4.0]))
    >>> dx, state
    (array([ 0.5, -0.5]), SignMomentumState(v=array([ 3., -4.])))
    """

    slots: ClassVar[tuple[str, ...]] = ()
    real_only: ClassVar[bool] = False
    """Whether the formula means nothing for complex numbers."""

    counts: ClassVar[bool]
    """Whether `coefs` takes `t`, so that the state counts steps."""
    State: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.counts = "t" in inspect.signature(cls.coefs).parameters
        names = (*cls.slots, "t") if cls.counts else cls.slots
        state = namedtuple(f"{cls._shown_as}State", names)  # type: ignore[misc]
        state.__module__, state.__qualname__ = cls.__module__, f"{cls.__qualname__}.State"
        cls.State = state

    def coefs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the numbers that `step` needs."""
        return ()

    @staticmethod
    @abstractmethod
    def step(x: Any, dx: Any, state: Any, coefs: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the step and the new slots."""

    def start(self) -> tuple[float, ...]:
        """Return the numbers that the slots are filled with at first."""
        return (0.0,) * len(self.slots)

    def init(self, x: Any) -> Any:
        """Return the state for `x`: an array for each slot, and a count `t` where there is one."""
        if self.real_only and is_complex(x):
            raise TypeError(
                f"{self._shown_as} compares numbers, so it takes real parameters only; "
                f"got {x.dtype}"
            )
        made: list[Any] = [full_like(x, v) for v in self.start()]
        if self.counts:
            made.append(count_like(x))
        return self.State(*made) if made else ()

    def apply(self, state: Any, x: Any, dx: Any, *higher: Any) -> tuple[Any, Any]:
        """Evaluate the step with the array library of `x`; writes into nothing.

        Narrow numbers are computed with in float32, and each result is rounded once.
        """
        state = checked_state(self, state, self.State)
        if self.counts:
            state = state._replace(t=as_count(state.t, x))
        kept = state[: len(self.slots)]
        given = x
        x, dx, *slots = map(widened, (x, dx, *map(read_only, kept)))
        for name, slot in zip(self.slots, slots, strict=True):
            if slot.shape != x.shape:
                raise ValueError(misfit(self, name, slot, x))
        t = counted(state.t) if self.counts else None
        held = {*map(id, (x, dx, *slots))}
        with promoting():
            dx, new = self.step(x, dx, tuple(slots), self._coefs_for(x, t))
        made = []
        for old, value in zip(kept, new, strict=True):
            made.append(kept_as(old, _copy(value) if id(value) in held else value))
            held.add(id(value))
        if self.counts:
            made.append(as_like(state.t, t))
        return (self.State(*made) if made else ()), as_like(given, dx)

    def _coefs_for(self, x: Any, t: Any) -> tuple[Any, ...]:
        """Return the numbers that the step needs at count `t`, computed in double, cast once."""
        if is_tracer(t) or any(map(holds_traced, attributes(self).values())):
            with double():
                rule = with_attributes(self, lifted)
                t = t.astype(np.int64) if is_jax(t) else t  # so that t + 1 is more, and 2 t too
                return cast_like(x, rule.coefs() if t is None else rule.coefs(t))
        rule = with_attributes(self, settled)
        if t is not None:
            if is_mapped(t):
                t = t.double()
            t = t if is_traced(t) else int(t)
        return cast_like(x, rule.coefs() if t is None else rule.coefs(t))


def class_names(rule: Rule) -> Iterator[str]:
    """Yield the names of the classes of a rule and of those in it, with what they inherit."""
    yield from (cls.__name__ for cls in type(rule).__mro__)
    for value in vars(rule).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Rule):
                yield from class_names(part)


ANEW = "call setup anew with this model"
"""How errors about a state that does not fit end: updates put the path before them."""


def misfit(rule: Rule, name: str, slot: Any, x: Any) -> str:
    """Return the message that what a rule keeps has not the shape of the parameter."""
    return (
        f"{type(rule).__name__} keeps {name} of shape {tuple(slot.shape)} for a parameter of "
        f"shape {tuple(x.shape)}; {ANEW}"
    )


def checked_state(rule: Rule, state: Any, kind: Any) -> Any:
    """Return a state as a namedtuple of this kind; its parts go by their positions."""
    parts = kind._fields
    if not isinstance(state, tuple | list) or len(state) != len(parts):
        raise TypeError(
            f"{type(rule).__name__} keeps {', '.join(parts) or 'no state'}, got {short(state)}; "
            f"{ANEW}"
        )
    return state if type(state) is kind else kind(*state)


# --- narrow numbers --------------------------------------------------------------------------


def moved(rule: Rule, state: Any, x: Any, *gs: Any) -> tuple[Any, Any]:
    """Return what ``rule.move(state, x, *gs)`` does, computed in float32 if `x` is narrower.

    Then each result is rounded once: the parameter, and what the rule keeps in such arrays. On the
    way nothing is, from the gradient through a whole chain to the subtraction.
    """
    if not (rule._widens and is_narrow(x)):
        return rule.move(state, x, *gs)
    wide = (read_only(widened(a)) for a in (x, *gs))
    made, new = rule.move(_each(widened, state), *wide)
    return _each(_narrowed, state, made), None if new is None else as_like(x, new)


def applied(rule: Rule, state: Any, x: Any, *gs: Any) -> tuple[Any, Any]:
    """Return what ``rule.apply(state, x, *gs)`` does, as `moved`; the step stays in float32."""
    if not (rule._widens and is_narrow(x)):
        return rule.apply(state, x, *gs)
    wide = (read_only(widened(a)) for a in (x, *gs))
    made, dx = rule.apply(_each(widened, state), *wide)
    return _each(_narrowed, state, made), dx


def widened(x: Any) -> Any:
    """Return an array in the dtype in which steps on it are computed; anything else as it is."""
    if not hasattr(x, "dtype") or not is_narrow(x):
        return x
    if _device.is_numba(x):
        return _device.astype(x, np.float32)
    if is_tracer(x):
        return _jax.widened(x)
    if _torch.is_tensor(x):
        return _torch.widened(x)
    cast = getattr(x, "astype", None)
    return cast(np.float32) if cast else namespace(x).astype(x, namespace(x).float32)


def for_step(x: Any, g: Any) -> Any:
    """Return a gradient of `x` in the dtype in which a step on `x` is computed."""
    if not is_narrow(x):
        return as_like(x, g)
    if is_narrow(g):
        return widened(g)
    cast = getattr(g, "astype", None)
    return cast(np.float32) if cast else namespace(g).astype(g, namespace(g).float32)


def _narrowed(old: Any, new: Any) -> Any:
    if not (hasattr(old, "dtype") and hasattr(new, "dtype") and is_narrow(old)):
        return new
    # NumPy makes scalars of what is calculated with 0-d arrays.
    return kept_as(old, new) if isinstance(new, np.inexact) or isnumeric(new) else new


def kept_as(old: Any, new: Any) -> Any:
    """Return `new` in the dtype of `old`, the slot whose place it takes; narrow numbers move on.

    They are rounded to nearest, with two exceptions. A change is not lost: where the nearest number
    is the old one, a change of more than a sixteenth of a unit counts twice, four or eight times,
    so that it comes to one unit. An average would else stand still far from what it averages: in
    bfloat16 that of ones, with a decay rate of 0.99, at 0.8. And what is finite stays so: a square
    beyond float16 would else make infinite for ever what divides.
    """
    if not is_narrow(old) or is_narrow(new) or tuple(old.shape) != tuple(new.shape):
        return as_like(old, new)
    most = largest(old.dtype)
    before = widened(old)

    def bounded(value: Any) -> Any:
        return minimum(maximum(value, -most), most)

    found = as_like(old, namespace(new).where(namespace(new).isfinite(new), bounded(new), new))
    is_lost = (widened(found) == before) & (new != before)
    for factor in LOST:
        tried = as_like(old, bounded(before + factor * (new - before)))
        is_same = widened(tried) == before
        found = as_like(old, namespace(tried).where(is_lost & ~is_same, tried, found))
        is_lost = is_lost & is_same
    return found


@functools.lru_cache(maxsize=64)
def largest(dtype: Any) -> float:
    """Return the largest finite number of a narrow dtype of any library."""
    if type(dtype).__module__ == "torch":
        return float(sys.modules["torch"].finfo(dtype).max)
    if dtype == np.float16:
        return 65504.0
    return float(sys.modules["ml_dtypes"].finfo(dtype).max)


LOST = 2.0, 4.0, 8.0
"""How often a change counts, one after the other, that rounding would lose."""


def _each(change: Callable[..., Any], *states: Any) -> Any:
    """Return the last of some states with each part changed; the others have parts to go by.

    A kind of state that has `is_wide` keeps no numbers that are to be rounded.
    """
    first, last = states[0], states[-1]
    if isinstance(first, dict) and isinstance(last, dict):
        same = first.keys() == last.keys() and type(last) is dict
        return {k: _each(change, *(s[k] for s in states)) for k in last} if same else last
    if not (isinstance(first, (tuple, list)) and isinstance(last, (tuple, list))):
        return change(*states)
    if len(first) != len(last) or hasattr(type(last), "is_wide"):
        return last
    parts = [_each(change, *parts) for parts in zip(*states, strict=True)]
    if hasattr(last, "_make"):
        return last._make(parts)
    return type(last)(parts) if type(last) in (tuple, list) else last


# --- arrays ----------------------------------------------------------------------------------


def _copy(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x.copy()
    return x * 1 if library_of(type(x)) == "autograd" else namespace(x).asarray(x, copy=True)


def read_only(x: Any) -> Any:
    """Return `x`, or a view of it where NumPy would let a rule write into it."""
    if isinstance(x, np.ndarray):
        x = x.view()
        x.flags.writeable = False
    return x


def full_like(x: Any, value: float) -> Any:
    """Return an array of the shape, dtype and device of `x`, in native byte order."""
    if dtype_name(x.dtype) == "float8_e8m0fnu":
        raise TypeError(
            "float8_e8m0fnu has no zero, from which what a rule keeps could start; "
            "MixedPrecision(rule) keeps it in float32"
        )
    if isinstance(x, np.ndarray):
        if not is_tracer(value):
            return np.full_like(x, value, dtype=x.dtype.newbyteorder("="), subok=False)
        return namespace(value).full_like(x, value)
    if _device.is_numba(x):
        return _device.full_like(x, value)
    return namespace(x).full_like(x, value)


def count_like(x: Any) -> Any:
    """Return a 0-d count of zero, made by the library of `x`; on the host for one on a GPU."""
    if _device.counts_in_numpy(x):
        return np.zeros((), np.int64)
    xp = namespace(x)
    if xp is np or xp.__name__ == "autograd.numpy":
        return np.zeros((), np.int64)
    if xp.__name__.startswith("jax"):
        return xp.zeros((), int)
    if "torch" in xp.__name__:  # on the host, wherever new tensors would go by default
        return xp.asarray(0, dtype=xp.int64, device="cpu")
    return xp.asarray(0, dtype=xp.int64)


def as_count(t: Any, x: Any) -> Any:
    """Return a count of the library of `x`, where it is a plain number, as a file may have it."""
    is_foreign = isinstance(t, np.ndarray) and is_tensor(x)
    if not is_foreign and not isinstance(t, int | float | np.number):
        return t
    zero = count_like(x)
    return as_like(zero, zero + min(int(t), largest_count(zero)))


def largest_count(t: Any) -> int:
    """Return the largest number that a count like `t` can be."""
    return int(namespace(t).iinfo(t.dtype).max)


def counted(t: Any) -> Any:
    """Return a count that is one higher, or the same if it is the largest that its dtype holds.

    Counts of JAX arrays are of 32 bits unless it is set to 64. The formulas do not change any more
    where a count stops; one that went over to negative numbers would stop the parameter.
    """
    largest = largest_count(t)
    if is_tracer(t):
        return namespace(t).minimum(t, largest - 1) + 1
    if hasattr(t, "clamp"):  # of PyTorch, which may be mapped, so that nobody knows it
        return t.clamp(max=largest - 1) + 1
    return t + 1 if int(t) < largest else t


def cast_like(x: Any, numbers: Iterable[Any]) -> tuple[Any, ...]:
    """Cast numbers once to the real dtype of `x`, which computes with them."""
    if isinstance(x, np.ndarray):
        real = x.real.dtype if x.dtype.kind == "c" else x.dtype
        return tuple(_cast(n, real) if is_traced(n) else real.type(n) for n in numbers)
    if not any(map(is_traced, numbers := tuple(numbers))):
        return tuple(map(float, numbers))
    real = namespace(x).real(x).dtype if is_complex(x) else x.dtype
    return tuple(_cast(n, real) if is_traced(n) else float(n) for n in numbers)


def _cast(traced: Any, real: Any) -> Any:
    if is_tensor(traced):
        return traced.to(real)
    if not is_tracer(traced):  # then a box, and perhaps of a Python number, which has no dtype
        traced = traced * real.type(1)
        if traced.dtype == real:  # under NumPy 2.0 the way back through a cast is an error
            return traced
    return traced.astype(real)


def as_like(old: Any, value: Any) -> Any:
    """Return `value` as an array of the dtype of `old` (0-d arithmetic makes scalars in NumPy)."""
    if isinstance(old, np.ndarray) and not is_traced(value):
        native = old.dtype.newbyteorder("=")
        return np.array(value, dtype=native, copy=True if value is old else None)
    if type(value).__module__ == "autograd.numpy.numpy_boxes" and value.shape == ():
        value = namespace(value).array(value)
    if value.dtype == old.dtype:
        return value
    if is_jax(value):  # which warns of a dtype that it is not set to
        return value.astype(sys.modules["jax"].dtypes.canonicalize_dtype(old.dtype))
    cast = getattr(value, "astype", None)
    return cast(old.dtype) if cast else namespace(value).astype(value, old.dtype)
