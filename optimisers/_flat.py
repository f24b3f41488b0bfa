"""The flat vector: all parameters of a model in one array, and the way back.

`destructure` looks at a model once and compiles what `re` needs to rebuild it:

a) a *table* with an entry for each parameter, then for each other view of one, then for what is
   kept and for the nodes, each after its children. To rebuild is to fill in the parameters, to
   make the nodes in order, and to return the last entry;
b) consecutive parameters of one shape are a *run*: one slice, cut into its rows by NumPy in C;
c) a *template* with a `_Slot` at each place of a parameter, and an *outline*: the model with
   blanks, which have shape and dtype but no memory, in place of its arrays. With these two any
   other model or gradient is walked (see `_trees.lockstep`). The arrays of the model itself are not
   kept alive.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from ._arrays.dtypes import (
    dtype_name,
    is_complex_dtype,
    is_narrow_dtype,
    is_number,
    native,
    numpy_dtype,
    promoted,
)
from ._arrays.layout import View
from ._arrays.library import (
    is_array,
    is_foreign,
    is_immutable,
    isnumeric,
    library_for,
    maywrite,
    of_class,
    plain,
    refuse_masked,
    refuse_masked_parameter,
)
from ._arrays.sharing import carry, spans_meet, view_of
from ._engine.arrays import at_once, fresh, writing
from ._engine.gradients import checked_gradient
from ._engine.tied import sum_of_two
from ._messages.text import short
from ._trees.lockstep import gather, place
from ._trees.lockstep import places as walk_places
from ._trees.nodes import mirror, rebuild, register_leaf, trainable_keys
from ._trees.parameters import owners, parameters
from ._trees.paths import KeyPath
from ._trees.untrained import refuse_no_tree, tell
from ._trees.walks import fold, walk

Array = Any
Tree = Any
Model = TypeVar("Model")

_MISFIT = "expected {expected}, as in the model that was destructured, got {got}"


def destructure(model: Model) -> tuple[Any, Restructure[Model]]:
    """Copy the parameters of a model into one vector, and return how to get back.

    Parameters
    ----------
    model : tree
        The model.

    Returns
    -------
    flat : array
        The trainable arrays, each in C order, one after the other as `trainables` lists them:
        contiguous, 1-d, a copy. Its dtype is what theirs promote to (``float32`` for ``float16``
        beside ``bfloat16``, and for different dtypes of 8 bits or less); float64 if there are
        none.
    re : Restructure
        ``re(v)`` rebuilds the model around a vector of this length, see `Restructure`.

    Raises
    ------
    TypeError
        If `model` is no tree: a module of PyTorch, an iterator, a class.
    ValueError
        If arrays overlap in memory only in part, or if the model contains itself.

    Warns
    -----
    UserWarning
        If nothing in the model trains, or an array does not, as in `setup`.

    Notes
    -----
    A parameter at several places is in the vector once. If those places are different views of
    it, it is laid out as its first C-contiguous place shows it, or else as its first place does.
    An array of JAX at several places is a parameter at each, and in the vector as often.

    JAX sorts the keys of the dictionaries that it hands to a traced function, and makes a tracer
    for each place of a tied parameter. An `re` made outside knows order and ties: in there,
    ``re.flatten(model)`` is what ``destructure(model)[0]`` is outside.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import destructure
    >>> model = {"weight": np.array([[1.0, 2.0], [3.0, 4.0]]), "bias": np.zeros(2), "name": "tiny"}
    >>> flat, re = destructure(model)
    >>> flat
    array([1., 2., 3., 4., 0., 0.])
    >>> model = re(flat)
    >>> flat += 10
    >>> model
    {'weight': array([[11., 12.], [13., 14.]]), 'bias': array([10., 10.]), 'name': 'tiny'}
    """
    re = Restructure._of(model)
    return re.flatten(model), re


class _Parameter(NamedTuple):
    """A stretch of the vector."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: Any
    """That of its library, in native byte order."""
    is_complex: bool
    is_summed: bool
    """Whether one gradient object at several places is one gradient, summed already."""


class _Run(NamedTuple):
    """Consecutive parameters of one shape, or one parameter alone."""

    stretch: slice
    shape: tuple[int, ...] | None
    """What to make of the stretch, if not a vector."""
    several: bool
    """Whether its rows are the parameters, rather than itself."""


class _Node(NamedTuple):
    """How to rebuild a node."""

    entry: int
    """Where it goes in the table."""
    keys: tuple[Any, ...] | None
    """Those of a plain dictionary, which is made by these alone."""
    make: Callable[[Any], Any]
    get: Callable[[list[Any]], Any]
    """How to get its children from the table."""


@register_leaf
class _Slot:
    """The mark of a place in the template: which parameter is there, and through which view."""

    frozen = False

    def __init__(
        self, k: int, x: Array, source: View | None = None, view: View | None = None
    ) -> None:
        self.k = k
        self.like = None if plain(x) is x or isinstance(x, np.memmap) else _Like.of(x)
        self.source = source
        self.view = view

    def seen(self, values: Array) -> Array:
        """Return the values of the parameter as this place shows them."""
        if self.source is None or self.view is None:
            return values
        return carry(values, self.source, self.view)

    def unseen(self, values: Array) -> Array:
        """Return what this place shows as the parameter has it."""
        if self.source is None or self.view is None:
            return values
        return carry(values, self.view, self.source)


class _Blank(np.ndarray):
    """Stands for an array that is not there: its shape, its dtype, one element of memory."""

    def __reduce__(self) -> Any:
        return _blank, (self.shape, self.dtype)

    def __deepcopy__(self, memo: Any) -> _Blank:
        return self


def _blank(shape: tuple[int, ...], dtype: Any) -> _Blank:
    blank = _Blank(shape, dtype, np.zeros((), dtype), strides=(0,) * len(shape))
    blank.flags.writeable = False
    return blank


class _Like:
    """An array of a subclass of NumPy's, without its memory: its class and what it carries."""

    def __init__(self, blank: np.ndarray) -> None:
        self.blank = blank

    @classmethod
    def of(cls, x: np.ndarray) -> _Like:
        return cls(of_class(x, _blank(x.shape, x.dtype)))

    def __reduce__(self) -> Any:
        carried = getattr(self.blank, "__dict__", {})
        return _like, (type(self.blank), self.blank.shape, self.blank.dtype, carried)


def _like(cls: type, shape: tuple[int, ...], dtype: Any, carried: dict[str, Any]) -> _Like:
    blank: Any = np.ndarray.view(_blank(shape, dtype), cls)
    if carried:
        vars(blank).update(carried)
    return _Like(blank)


class Restructure(Generic[Model]):
    """The way between a model and its flat vector; made by `destructure`, and called `re` there.

    ``re(v)``
        rebuilds the model around a vector. Where `v` is a NumPy array of a parameter's own dtype,
        the parameter is a *view* of `v`: writing into one writes into the other, and a read-only
        `v` gives a read-only model. PyTorch tensors behave alike. Otherwise the stretch is cast
        to the parameter's dtype, for a real parameter in a complex vector from its real part,
        and the array is one of its own: a model of mixed dtypes cannot follow its vector.
        Byte order does not count as dtype: what is rebuilt has the native one.
    ``re(v, copy=True)``
        gives arrays that share no memory with `v`, nor with each other.
    ``re(x, v)``
        is ``re(v)(x)``, for a model that can be called.
    ``len(re)``
        is the length of the vector.

    What holds no parameter is kept as it was, not copied: ``re(v)`` shares it with the model that
    was given to `destructure`. Ties are restored, and shared containers stay shared. Where tied
    places are different views, the one that the vector is laid out by is a view of `v`, and the
    others are views of that wherever strides allow; else they are copies, which do not follow.
    Strides always allow it if one of the places was C-contiguous.

    It keeps no parameter of the model alive, and pickles if the rest of the model does.

    Raises
    ------
    TypeError
        If `v` holds no numbers.
    ValueError
        If `v` is not 1-d, or of another length.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import destructure
    >>> flat, re = destructure([np.ones(2), {"step": 3, "scale": np.array(0.5)}])
    >>> re
    Restructure(list, 3 numbers in 2 arrays, float64)
    >>> re(np.arange(3.0))
    [array([0., 1.]), {'step': 3, 'scale': array(2.)}]
    >>> len(re)
    3
    """

    _parameters: list[_Parameter]
    _slots: list[_Slot]
    """A slot for each entry of the table that shows a parameter, its own place first."""
    _libraries: frozenset[str]
    """Those that the parameters belong to."""
    _likes: list[tuple[int, _Like]]
    """The entries of the table that are of a subclass of NumPy's arrays, and what they are like."""
    _table: list[Any]
    _nodes: list[_Node]
    _template: Tree
    _outline: Any
    _dtype: Any
    _size: int
    _own_dtype: Any
    """The one dtype that all parameters have, else None."""
    _runs: list[_Run]
    _in_turn: bool
    """Whether each parameter has one place, and the places come in the order of the vector."""

    @classmethod
    def _of(cls, model: Model) -> Restructure[Model]:
        re = cls.__new__(cls)
        refuse_no_tree(model, "destructure")
        unknown: list[tuple[KeyPath, Any]] = []
        places, owner = parameters(model, unknown)
        tell(model, bool(places), unknown)
        groups: dict[int, list[int]] = {}
        for j, k in enumerate(owner):
            groups.setdefault(k, []).append(j)
        re._parameters, re._slots = [], []
        slot_of: dict[int, _Slot] = {}
        # One array may be several parameters (see `_trees.parameters`), and may be made anew each
        # time its place is visited; then the path tells.
        slot_at: dict[KeyPath, _Slot] = {}
        others: list[_Slot] = []
        stop = 0
        for k, group in enumerate(groups.values()):
            xs = [places[j][1] for j in group]
            x = next(filter(_is_c_contiguous, xs), xs[0])
            start, stop = stop, stop + math.prod(x.shape)
            dtype = native(x.dtype)
            re._parameters.append(
                _Parameter(
                    start,
                    stop,
                    tuple(x.shape),
                    dtype,
                    is_complex_dtype(dtype),
                    library_for(x).sums_ties,
                )
            )
            shown = {id(x): _Slot(k, x)}
            re._slots.append(shown[id(x)])
            for other in xs:
                if id(other) not in shown:
                    others.append(_Slot(k, other, view_of(x), view_of(other)))
                    shown[id(other)] = others[-1]
            slot_at.update((places[j][0], shown[id(places[j][1])]) for j in group)
            if not is_immutable(x):
                slot_of.update(shown)
        re._libraries = frozenset(library_for(x).key for _, x in places if not is_immutable(x))
        re._slots += others
        re._likes = [(i, s.like) for i, s in enumerate(re._slots) if s.like is not None]
        re._size = stop
        re._dtype = promoted([p.dtype for p in re._parameters])
        dtypes = {p.dtype for p in re._parameters}
        re._own_dtype = dtypes.pop() if len(dtypes) == 1 else None
        re._runs = _runs(re._parameters)

        def slot(path: KeyPath, x: Any) -> _Slot | None:
            if not isnumeric(x):
                return None
            found = slot_of.get(id(x))
            return slot_at.get(path) if found is None else found

        re._compile(model, slot)
        re._template = fold(
            model,
            lambda path, x: slot(path, x) or (),
            lambda path, x, results: mirror(x, results),
            keys=trainable_keys,
            skipped=lambda child: (),
        )
        turns = [slot.k for _, slot in walk(re._template) if isinstance(slot, _Slot)]
        re._in_turn = turns == [*range(len(re._parameters))]
        return re

    def _compile(self, model: Model, slot: Callable[[KeyPath, Any], _Slot | None]) -> None:
        blank_dtypes = [_gradient_dtype(p.dtype, self._dtype) for p in self._parameters]
        blanks = [_blank(p.shape, d) for p, d in zip(self._parameters, blank_dtypes, strict=True)]
        outline: list[Any] = [s.seen(blanks[s.k]) for s in self._slots]
        at = {id(s): i for i, s in enumerate(self._slots)}
        self._table = [None] * len(outline)
        self._nodes = []

        def leaf(path: KeyPath, x: Any) -> int | _Kept:
            found = slot(path, x)
            return _Kept(x) if found is None else at[id(found)]

        def node(path: KeyPath, x: Any, results: list[int | _Kept]) -> int | _Kept:
            if all(isinstance(result, _Kept) for result in results):
                return _Kept(x)
            where = [enter(r.x, r.x) if isinstance(r, _Kept) else r for r in results]
            get = _getter(where)
            bare = rebuild(x, get(outline))
            entry = enter(None, bare)
            self._nodes.append(
                _Node(entry, tuple(bare) if type(bare) is dict else None, _maker(bare), get)
            )
            return entry

        def enter(kept: Any, bare: Any) -> int:
            self._table.append(kept)
            outline.append(bare)
            return len(outline) - 1

        root = fold(model, leaf, node)
        if isinstance(root, _Kept):
            root = enter(root.x, root.x)
        self._root = root
        self._outline = outline[root]

    # --- from the vector to the model ---

    @overload
    def __call__(self, v: Any, /, *, copy: bool = False) -> Model: ...
    @overload
    def __call__(self, x: Any, v: Any, /, *, copy: bool = False) -> Any: ...
    def __call__(self, *args: Any, copy: bool = False) -> Any:
        """Rebuild the model around a vector."""
        *x, v = args or (None,)
        if len(args) not in (1, 2):
            raise TypeError(f"expected re(v) or re(x, v), got {len(args)} arguments")
        if x:
            model: Any = self(v, copy=copy)
            return model(*x)
        table = self._table.copy()
        count = len(self._parameters)
        table[:count] = values = self._split(self._checked(v), copy)
        if len(self._slots) > count:
            for i, slot in enumerate(self._slots[count:], count):
                table[i] = slot.seen(values[slot.k])
        for i, like in self._likes:
            table[i] = of_class(like.blank, table[i])
        for entry, keys, make, get in self._nodes:
            if keys is None:
                table[entry] = make(get(table))
            else:
                table[entry] = dict(zip(keys, get(table), strict=False))
        return table[self._root]

    def _checked(self, v: Any) -> Array:
        """Return `v` as an array, of the right length."""
        refuse_masked(v, lambda: "the vector", "its .filled(0) is an array")
        v = v if is_foreign(v) else np.asarray(v)
        if not is_number(v.dtype):
            raise TypeError(
                f"expected a vector of {self._size} numbers, got dtype {v.dtype}"
                f"{'; re.flatten makes a vector of a model' * (v.dtype == object)}"
            )
        shape = tuple(v.shape)
        if shape != (self._size,):
            got = f"one of length {shape[0]}" if len(shape) == 1 else f"shape {shape}"
            raise ValueError(f"expected a vector of length {self._size}, got {got}")
        if library_for(v).has_lost(v):
            raise ValueError("expected a vector with memory, got a tensor whose storage is gone")
        return v

    def _split(self, v: Array, copy: bool) -> list[Array]:
        """Return the parameters that `v` holds."""
        if is_foreign(v):
            library = library_for(v)
            return [
                library.converted(library.piece(v, p.start, p.shape), p.dtype, copy)
                for p in self._parameters
            ]
        values: list[Array] = []
        for stretch, shape, several in self._runs:
            piece = v[stretch]
            if shape is not None:
                piece = piece.reshape(shape)
            if several:
                values.extend(piece)
            else:
                values.append(piece)
        if not copy and self._own_dtype is not None and v.dtype == self._own_dtype:
            return values
        with np.errstate(all="ignore"):
            reals = [x.real for x in values] if v.dtype.kind == "c" else values
            return [
                (x if p.is_complex else real).astype(numpy_dtype(p.dtype))
                if copy or x.dtype != p.dtype
                else x
                for x, real, p in zip(values, reals, self._parameters, strict=True)
            ]

    # --- from the model to the vector ---

    def flatten(self, model: Model, out: Any = None) -> Any:
        """Return the parameters of another model of the same structure as a vector.

        Parameters
        ----------
        model : tree
            A model with the structure and shapes of the one that was destructured. Should its
            places of a tied parameter hold different numbers, those count by which the vector is
            laid out.
        out : array, optional
            A writable vector to write into: of NumPy, or of the library of the model's arrays.

        Returns
        -------
        array
            `out`, or a new vector of the dtype of ``destructure(model)[0]``.

        Raises
        ------
        TypeError, ValueError
            If `model` or `out` does not fit; the message names the path. Nothing is written then.

        Examples
        --------
        >>> import numpy as np
        >>> from optimisers import destructure
        >>> flat, re = destructure({"a": np.zeros(2), "b": np.zeros(())})
        >>> re.flatten({"a": np.array([1.0, 2.0]), "b": np.array(3.0)})
        array([1., 2., 3.])
        """
        slots, xs = self._places(model)
        if self._in_turn:
            return self._joined(xs, out)
        pieces: list[Any] = [None] * len(self._parameters)
        for slot, x in zip(slots, xs, strict=True):
            if slot.view is None and pieces[slot.k] is None:
                pieces[slot.k] = x
        return self._joined(pieces, out)

    def flatten_gradient(self, grad: Tree, out: Any = None) -> Any:
        """Return a gradient in the structure of the model as a vector.

        Parameters
        ----------
        grad : tree
            The gradient, as `update` takes it. Where there is none (``None``, a missing key, or
            ``()``), the vector is zero; gradients of tied places are summed.
        out : array, optional
            A writable vector to write into: of NumPy, or of the library of the model's arrays.

        Returns
        -------
        array
            `out`, or a new vector of the dtype of ``destructure(model)[0]``; of float32 where that
            is narrower and a gradient is not, or gradients were summed. It is for `update` with
            the flat vector as it is: nothing of it was rounded.

        Raises
        ------
        TypeError, ValueError
            If `grad` or `out` does not fit; the message names the path. Nothing is written then.

        Examples
        --------
        >>> import numpy as np
        >>> from optimisers import destructure
        >>> w = np.ones((1, 2))
        >>> flat, re = destructure({"encoder": w, "bias": np.zeros(2), "decoder": w.T})
        >>> re.flatten_gradient({"encoder": np.array([[1, 2]]), "decoder": np.array([[10], [20]])})
        array([11., 22., 0., 0.])
        """
        slots, blanks, gs = gather(_Slot, self._template, self._outline, grad)
        if self._are_plain(gs):
            return self._joined(gs, out)
        pieces: list[Any] = [None] * len(self._parameters)
        counted = self._counted(slots, gs)
        for i, (slot, blank, g) in enumerate(zip(slots, blanks, gs, strict=True)):
            if i in counted:
                continue
            if not (type(g) is np.ndarray and g.dtype == blank.dtype and g.shape == blank.shape):
                where = functools.partial(place, _Slot, self._template, self._outline, i)
                g = _gradient(g, blank, where, traced=out is None)
                if g is None:
                    continue
            g = slot.unseen(g)
            pieces[slot.k] = g if pieces[slot.k] is None else _sum(pieces[slot.k], g)
        return self._joined(pieces, out, self._dtype_of_step(pieces))

    def _dtype_of_step(self, pieces: list[Any]) -> Any:
        """Return the dtype of a vector of gradients: one in which none of them is rounded."""
        if not is_narrow_dtype(self._dtype):
            return self._dtype
        own = dtype_name(self._dtype)
        are_own = all(piece is None or dtype_name(piece.dtype) == own for piece in pieces)
        return self._dtype if are_own else np.dtype(np.float32)

    def _counted(self, slots: list[_Slot], gs: list[Any]) -> set[int]:
        """Return the places whose gradient is counted already.

        PyTorch has summed what it hands over as the one gradient of one tensor.
        """
        found: set[int] = set()
        if len(slots) == len(self._parameters):
            return found
        groups: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            groups.setdefault(slot.k, []).append(i)
        for k, (first, *others) in groups.items():
            if self._parameters[k].is_summed and all(
                slots[i] is slots[first] and gs[i] is gs[first] for i in others
            ):
                found.update(others)
        return found

    def _are_plain(self, xs: list[Any]) -> bool:
        """Tell whether these are the parameters one by one, or what takes their place as it is."""
        return (
            self._in_turn
            and self._own_dtype is not None
            and {*map(type, xs)} == {np.ndarray}
            and [x.dtype for x in xs].count(self._own_dtype) == len(xs)
            and [x.shape for x in xs] == [p.shape for p in self._parameters]
        )

    def _places(self, model: Tree) -> tuple[list[_Slot], list[Array]]:
        """Return the slots beside what `model` has there, checked."""
        slots, xs, _ = gather(_Slot, self._template, model, None, _MISFIT)
        if self._are_plain(xs):
            return slots, xs
        fault: type[Exception]
        for i, (slot, x) in enumerate(zip(slots, xs, strict=True)):
            p = self._parameters[slot.k]
            shape = p.shape if slot.view is None else slot.view.shape
            if type(x) is np.ndarray and x.shape == shape and x.dtype == p.dtype:
                continue
            refuse_masked_parameter(x, functools.partial(place, _Slot, self._template, model, i))
            if not isnumeric(x):
                fault, got = TypeError, short(x)
            elif tuple(x.shape) != shape:
                fault, got = ValueError, f"shape {tuple(x.shape)}"
            elif not p.is_complex and is_complex_dtype(x.dtype):
                fault, got = TypeError, f"complex numbers ({x.dtype})"
            elif library_for(x).has_lost(x):
                fault, got = ValueError, "a tensor whose storage was given back"
            else:
                continue
            where = place(_Slot, self._template, model, i)
            wanted = f"expected an array of shape {shape} and dtype {p.dtype}"
            raise fault(f"at {where}: {wanted}, got {got}")
        return slots, xs

    def _joined(self, pieces: list[Any], out: Any, dtype: Any = None) -> Any:
        """Write the pieces of the vector into `out`, or into a new vector; None is zeros.

        A new one has the dtype given, or else that of the flat model.
        """
        if out is not None:
            _check_out(out, self._size, self._dtype, self._libraries)
        if is_foreign(out):
            at_once([writing(out, self._concatenated(pieces, out, out.dtype))])
            return out
        dtype = self._dtype if dtype is None else dtype
        are_numpy = {*map(type, pieces)} <= {np.ndarray}
        if out is None and not are_numpy:
            foreign = [piece for piece in pieces if is_foreign(piece)]
            if foreign:
                return self._concatenated(pieces, foreign[0], dtype)
        fresh = out is None
        if fresh:
            out = np.empty(self._size, numpy_dtype(dtype))
        if are_numpy:
            parts = pieces
        else:
            nothing = np.zeros((), out.dtype)
            parts = [
                np.broadcast_to(nothing, p.shape)
                if piece is None
                else library_for(piece).to_numpy(piece)
                for piece, p in zip(pieces, self._parameters, strict=True)
            ]
        if not parts:
            return out
        memory = target = np.asarray(out)
        if not fresh and _may_overlap(parts, memory):
            target = np.empty_like(memory)
        with np.errstate(all="ignore"):
            np.concatenate(parts, axis=None, out=target, casting="unsafe")
        if target is not memory:
            memory[...] = target
        return out

    def _concatenated(self, pieces: list[Any], like: Array, dtype: Any) -> Array:
        """Return the vector as an array of the library of `like`, which may be traced."""
        shapes = [p.shape for p in self._parameters]
        return library_for(like).concatenated(pieces, shapes, like, dtype)

    def copy_into_(self, model: Model, v: Any) -> None:
        """Write a vector into the arrays of a model, in place.

        Parameters
        ----------
        model : tree
            A model with the structure and shapes of the one that was destructured.
        v : array
            The vector; cast as in ``re(v)``.

        Raises
        ------
        TypeError, ValueError
            If `model` or `v` does not fit, or if an array cannot be written in place; the message
            names the path. Nothing is written then.

        Examples
        --------
        >>> import numpy as np
        >>> from optimisers import destructure
        >>> model = {"a": np.zeros(2), "b": np.zeros(())}
        >>> flat, re = destructure(model)
        >>> re.copy_into_(model, [1.0, 2.0, 3.0])
        >>> model
        {'a': array([1., 2.]), 'b': array(3.)}
        """
        v = self._checked(v)
        places = [*zip(*self._places(model), strict=True)]
        for i, (_, x) in enumerate(places):
            if not maywrite(x):
                raise ValueError(
                    f"the array at {place(_Slot, self._template, model, i)} cannot be written in "
                    f"place (read-only, immutable or broadcast); re(v) makes a new model"
                )
        self._refuse_other_ties(model, places)
        if any(spans_meet(x, v) for _, x in places):
            v = fresh(v)
        values = self._split(v, False)
        with np.errstate(all="ignore"):
            at_once(
                [
                    writing(x, library_for(x).taken(slot.seen(values[slot.k]), x))
                    for slot, x in places
                ]
            )

    def _refuse_other_ties(self, model: Tree, places: list[tuple[_Slot, Array]]) -> None:
        """Raise if different parameters are one in `model`: they could not all be written."""
        try:
            owner = owners([(KeyPath(), x) for _, x in places])
        except ValueError:
            paths = (path for path, _ in walk_places(_Slot, self._template, model))
            owners([(path, x) for path, (_, x) in zip(paths, places, strict=True)])
            raise
        for i, j in enumerate(owner):
            if places[i][0].k != places[j][0].k:
                one, other = (place(_Slot, self._template, model, k) for k in (j, i))
                raise ValueError(
                    f"{one} and {other} are one parameter in this model, and were two in the one "
                    "that was destructured; copy one of them"
                )

    def __len__(self) -> int:
        """Return the length of the vector."""
        return self._size

    def __repr__(self) -> str:
        n, name = len(self._parameters), type(self._outline).__name__
        name = "array" if name == "_Blank" else name
        dtype = getattr(self._dtype, "name", self._dtype)
        return (
            f"Restructure({name}, {self._size} number{'s' * (self._size != 1)} "
            f"in {n} array{'s' * (n != 1)}, {dtype})"
        )


class _Kept(NamedTuple):
    """What holds no parameter, so that the model that is rebuilt shares it."""

    x: Any


# --- making the nodes --------------------------------------------------------------------------


def _maker(bare: Any) -> Callable[[Any], Any]:
    """Return how to make a node like `bare` from its children; something that can be pickled."""
    cls = type(bare)
    if cls is list or cls is tuple:
        return cls
    if cls is SimpleNamespace:
        return functools.partial(_make_namespace, tuple(vars(bare)))
    return functools.partial(rebuild, bare)


def _make_namespace(keys: tuple[str, ...], values: Iterable[Any]) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(keys, values, strict=True)))


def _getter(where: list[int]) -> Callable[[list[Any]], Any]:
    """Return how to get these entries of the table, as a sequence."""
    if where == list(range(where[0], where[0] + len(where))):
        return itemgetter(slice(where[0], where[0] + len(where)))
    return itemgetter(*where)


def _runs(found: Sequence[_Parameter]) -> list[_Run]:
    runs: list[_Run] = []
    for shape, same in itertools.groupby(found, key=lambda p: p.shape):
        run = list(same)
        if len(run) > 1 and shape:  # rows of a vector would be scalars, not 0-d arrays
            runs.append(_Run(slice(run[0].start, run[-1].stop), (len(run), *shape), True))
        else:
            reshape = None if len(shape) == 1 else shape
            runs.extend(_Run(slice(p.start, p.stop), reshape, False) for p in run)
    return runs


# --- arrays and dtypes -------------------------------------------------------------------------


def _is_c_contiguous(x: Array) -> bool:
    return library_for(x).is_c_contiguous(x)


def _gradient_dtype(dtype: Any, flat: Any) -> np.dtype:
    """Return the dtype in which gradients for a parameter go into the vector."""
    wanted = numpy_dtype(flat)
    if is_complex_dtype(wanted) and not is_complex_dtype(dtype):
        return np.zeros((), wanted).real.dtype
    return wanted


def _may_overlap(parts: list[np.ndarray], out: np.ndarray) -> bool:
    """Tell whether one of the arrays may share memory with `out`."""
    if out.flags.owndata:  # then only views can, and itself
        parts = [part for part in parts if part.base is not None or part is out]
    return any(np.may_share_memory(part, out) for part in parts)


def _gradient(g: Any, blank: np.ndarray, where: Callable[[], str], traced: bool) -> Any:
    """Return a gradient, checked; where `traced`, one of another library stays there."""
    if not (traced and is_foreign(g)):
        return checked_gradient(g, blank, where)
    if library_for(g).has_lost(g):
        raise ValueError(
            f"gradient at {where()}: expected a tensor with memory, its was given back"
        )
    if tuple(g.shape) != blank.shape or (
        is_complex_dtype(g.dtype) and not is_complex_dtype(blank.dtype)
    ):
        raise (ValueError if tuple(g.shape) != blank.shape else TypeError)(
            f"gradient at {where()}: expected an array of shape {blank.shape} and dtype "
            f"{blank.dtype}, got shape {tuple(g.shape)} and dtype {g.dtype}"
        )
    return g


def _sum(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return sum_of_two(a, b)


def _check_out(out: Any, size: int, dtype: Any, libraries: frozenset[str]) -> None:
    """Raise if `out` cannot take the vector of a model that holds arrays of these libraries."""
    wanted = f"out: expected a writable vector of length {size} and dtype {dtype}"
    refuse_masked(out, lambda: "out", "give a plain array")
    known = {"numpy", *libraries}
    if not is_array(out) or library_for(out).key not in known or is_immutable(out):
        raise TypeError(
            f"{wanted}, of {' or '.join(sorted(known))}, got "
            f"{type(out).__name__}; leave it out, and a new vector is returned"
        )
    if tuple(out.shape) != (size,):
        raise ValueError(f"{wanted}, got shape {tuple(out.shape)}")
    if not isnumeric(out) or (is_complex_dtype(dtype) and not is_complex_dtype(out.dtype)):
        raise TypeError(f"{wanted}, got dtype {out.dtype}")
    if not maywrite(out):
        raise ValueError(f"{wanted}, got one that is read-only or broadcast")
