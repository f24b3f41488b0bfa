"""What a rule is: `Rule`, its elementwise kind, the registry."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Collection, Iterable, Iterator
from types import FunctionType
from typing import Any, ClassVar, Self

from .._arrays.library import library_for
from .._arrays.traced import Maybe, chosen, promoting
from .._messages.calls import refuse, takes
from .._messages.text import short
from ..words import is_complex
from ._coefs import coefs_for
from ._fields import _checked, _limits, unsaid
from ._measure import first_kept, measured
from ._numbers import (
    as_count,
    as_like,
    count_like,
    counted,
    full_like,
    kept_as,
    read_only,
    widened,
)
from ._program import Measure, Program, Step, asked_by

Array = Any
Numbers = tuple[Any, ...]
Arrays = tuple[Array, ...]
Stepped = tuple[Array, Arrays]

OURS = f"{__name__.partition('.')[0]}."
"""How the names of our own modules begin."""

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

# --- Rule ------------------------------------------------------------------------------------

_registry: list[type[Rule]] = []

_new_object = object.__new__

OVER = "array", "axes", "tree"
"""Over what a measure may be reduced."""


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

    real_only: ClassVar[bool] = False
    """Whether the formula means nothing for complex numbers."""

    _widens: ClassVar[bool] = True
    """Whether it is handed float32 numbers in place of narrower ones: see `moved`."""

    _is_outermost: ClassVar[bool] = False
    """Whether it stands around all other rules, and inside none."""

    _is_idle: ClassVar[bool] = False
    """Whether it does nothing; a property where that depends on its fields."""

    _owns_parameter: ClassVar[bool] = False
    """Whether its step leads to a value of the parameter that all it keeps is of, so that nothing
    behind it in a chain may change the step."""

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
        if cls.__module__.startswith(OURS):
            _registry.append(cls)

    def __post_init__(self) -> None:
        for field, limits in _limits(type(self)).items():
            checked = _checked(f"{self._shown_as}: {field}", limits, getattr(self, field))
            object.__setattr__(self, field, checked)

    def __repr__(self) -> str:
        if not dataclasses.is_dataclass(self):
            return super().__repr__()
        hidden = unsaid(self)
        names = [f.name for f in dataclasses.fields(self) if f.name not in hidden]
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        return f"{self._shown_as}({', '.join(shown)})"

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

    def _evaluated(self, state: Any, x: Any) -> Any:
        """Return the parameter at which the model is evaluated; `x` itself if that is it."""
        return x

    def program(self) -> Program | None:
        """Return what `apply` and `move` do as stages, or None, if these alone say it.

        Compiled code runs the stages (see `rules._program`). A subclass that overrides `apply` or
        `move` overrides this too, or else it has no program.
        """
        return None

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
        if cls.__post_init__ is Rule.__post_init__ and cls.__module__.startswith(f"{__package__}."):
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
            from .._messages.mixups import no_attribute

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
        from .._messages import names as _names

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
    _leads: ClassVar[bool] = False
    """Whether users put it ahead of many rules, so that those with `_follows` are also compiled in
    one loop with it; it keeps no slots. tools/emit_steps.py reads this where the class has a line
    ``_leads = True``, and says which pairs are compiled."""

    _follows: ClassVar[bool] = True
    """Whether users put it behind those that lead. Where not, as where a clip ahead changes
    nothing, the loops run one after another; a class says so by ``_follows = False``."""

    measure: ClassVar[Any] = None
    """A static method ``measure(x, dx, state, coefs)`` whose terms are reduced for `coefs`."""
    over: ClassVar[str] = "array"
    """Over what a measure is reduced: "array", "axes" (see `axes`) or "tree"."""
    order: Any = 2.0
    """The order of `words.norm`; a rule with a field for it has a property here."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Numbers, in double, that `coefs` hands on to the next step; over the tree, all leaves share
    them. `keep` says how they begin."""
    keeps_wide: ClassVar[bool] = False
    """Whether its slots are in float32 beside narrower parameters, whose range is too small."""
    common: ClassVar[tuple[str, ...]] = ()
    """Fields in which all leaves of a tree that is measured must agree."""

    _measured_by_cuda: ClassVar[bool] = False
    """Whether the CUDA kernels know its measure; else arrays of Numba, which no array code takes,
    are refused."""

    asks: ClassVar[dict[str, tuple[str, ...]]]
    """What `coefs` and `measure_coefs` ask for, by the names of their parameters."""
    is_told: ClassVar[bool]
    """Whether they take more than `t`, so that they are called after what is told is known."""
    counts: ClassVar[bool]
    """Whether one of them takes `t`, so that the state counts steps."""
    State: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.asks = {name: asked_by(getattr(cls, name)) for name in ("coefs", "measure_coefs")}
        cls.counts = any("t" in asked for asked in cls.asks.values())
        if cls.kept and cls.over == "tree":
            cls.counts = False  # the tree has one count, among the numbers that it keeps
        cls.is_told = cls.measure is not None or any({*a} - {"t"} for a in cls.asks.values())
        cls._measured_by_cuda = bool(vars(cls).get("_measured_by_cuda"))
        if cls.over not in OVER:
            raise TypeError(f"{cls.__name__}: over must be one of {OVER}; got {short(cls.over)}")
        names = (*cls.slots, *(("kept",) if cls.kept else ()), *(("t",) if cls.counts else ()))
        state = namedtuple(f"{cls._shown_as}State", names)  # type: ignore[misc]
        if cls.counts:
            setattr(state, "keeps_count", True)  # noqa: B010 (in its last part; see `_pytree`)
        if cls.kept and cls.over == "tree":
            setattr(state, "shared_by", cls)  # noqa: B010 (see `_measure`)
        if cls.keeps_wide:
            setattr(state, "is_wide", staticmethod(lambda: True))  # noqa: B010 (see `moved`)
        for k, name in enumerate(cls.kept):
            setattr(state, name, property(functools.partial(_kept_number, k)))
        state.__module__, state.__qualname__ = cls.__module__, f"{cls.__qualname__}.State"
        cls.State = state

    def coefs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the numbers that `step` needs; with those to be kept, ``(coefs, kept)``."""
        return ()

    def measure_coefs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the numbers that `measure` needs, which may ask for `t`, `kept` and `value`."""
        return ()

    def keep(self) -> tuple[float, ...]:
        """Return how the numbers of `kept` begin."""
        return (0.0,) * len(self.kept)

    def axes(self, ndim: int) -> tuple[int, ...] | None:
        """Return over which axes of an array the measure is reduced, if it is over axes.

        None means that the rule hands such an array's gradient on as it is.
        """
        return tuple(range(ndim))

    def accept(self, sums: tuple[Any, ...]) -> None:
        """Raise `FloatingPointError` if the numbers measured of one array are refused."""

    @staticmethod
    @abstractmethod
    def step(x: Any, dx: Any, state: Any, coefs: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the step and the new slots."""

    def start(self) -> tuple[float | str, ...]:
        """Return the numbers that the slots are filled with at first; "x" for a copy of `x`."""
        return (0.0,) * len(self.slots)

    def init(self, x: Any) -> Any:
        """Return the state for `x`: an array for each slot, and a count `t` where there is one."""
        if self.real_only and is_complex(x):
            raise TypeError(
                f"{self._shown_as} compares numbers, so it takes real parameters only; "
                f"got {x.dtype}"
            )
        if self.is_told and not self._measured_by_cuda and not library_for(x).computes:
            raise TypeError(
                f"{self._shown_as} measures, for which there is no kernel for arrays of Numba; "
                "make the parameters arrays of CuPy or JAX, or tensors of PyTorch"
            )
        like = widened(x) if self.keeps_wide else x
        made: list[Any] = [
            library_for(x).copied(as_like(full_like(like, 0.0), x))
            if isinstance(value, str)
            else full_like(like, value)
            for value in self.start()
        ]
        if self.kept:
            made.append(first_kept(self, x))
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
            if self.is_told:
                coefs, vector = measured(self, x, dx, tuple(slots), state, t)
            else:
                coefs, vector = coefs_for(self, x, t), None
            if coefs is None:
                new = tuple(slots)
            else:
                dx, new = self.step(x, dx, tuple(slots), coefs)
        made: list[Any] = []
        for old, value in zip(kept, new, strict=True):
            made.append(
                kept_as(old, library_for(value).copied(value) if id(value) in held else value)
            )
            held.add(id(value))
        if self.kept:
            made.append(vector)
        if self.counts:
            made.append(as_like(state.t, t))
        return (self.State(*made) if made else ()), as_like(given, dx)

    def program(self) -> Program | None:
        cls = type(self)
        # A decorated one is another function than its text says.
        texts = [cls.step] if cls.measure is None else [cls.step, cls.measure]
        if not all(isinstance(f, FunctionType) and not hasattr(f, "__wrapped__") for f in texts):
            return None
        if cls.measure is not None:
            return Measure(self, over=self.over), Step(self)
        return None if self.is_told else (Step(self),)


def class_names(rule: Rule) -> Iterator[str]:
    """Yield the names of the classes of a rule and of those in it, with what they inherit."""
    yield from (cls.__name__ for cls in type(rule).__mro__)
    for value in vars(rule).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Rule):
                yield from class_names(part)


ANEW = "call setup anew with this model"
"""How errors about a state that does not fit end: updates put the path before them."""


def _kept_number(k: int, state: Any) -> Any:
    """Return a number that a state keeps, by its position."""
    return state.kept[..., k]


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
