"""`destructure`, and the way between a model and its flat vector, in both directions.

`destructure` looks at a model once and makes a `Table`, from which ``re(v)`` rebuilds the model,
and a *template*, a tree with a `Slot` at each place of a parameter. By the template, and by the
model with blanks in place of its arrays, any other model or gradient is walked (see
`_trees.lockstep`).
"""

from __future__ import annotations

import functools
import math
from typing import Any, Generic, TypeVar, overload

import numpy as np

from .._arrays.dtypes import (
    dtype_name,
    is_complex_dtype,
    is_narrow_dtype,
    is_number,
    native,
    numpy_dtype,
    promoted,
)
from .._arrays.library import (
    is_foreign,
    is_immutable,
    isnumeric,
    library_for,
    maywrite,
    of_class,
    refuse_masked,
    refuse_masked_parameter,
)
from .._arrays.sharing import spans_meet, view_of
from .._engine.arrays import at_once, fresh, writing
from .._messages.text import short
from .._trees.lockstep import gather, place
from .._trees.lockstep import places as walk_places
from .._trees.nodes import mirror, trainable_keys
from .._trees.parameters import owners, parameters
from .._trees.paths import KeyPath
from .._trees.untrained import refuse_no_tree, tell
from .._trees.walks import fold, walk
from .table import Blank, Like, Parameter, Run, Slot, Table, blank_of, runs_of
from .vectors import check_out, gradient_dtype, gradient_for, is_c_contiguous, may_overlap, summed

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

    _parameters: list[Parameter]
    _slots: list[Slot]
    """A slot for each entry of the table that shows a parameter, its own place first."""
    _libraries: frozenset[str]
    """The keys of the libraries of the parameters."""
    _likes: list[tuple[int, Like]]
    """The entries of the table that are arrays of a subclass of NumPy's, each with its like."""
    _table: Table
    _template: Tree
    """The model with slots in place of its parameters."""
    _dtype: Any
    _size: int
    _own_dtype: Any
    """The one dtype that all parameters have, else None."""
    _runs: list[Run]
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
        slot_of: dict[int, Slot] = {}
        # One array may be several parameters (see `_trees.parameters`), and may be made anew each
        # time its place is visited; then the path tells.
        slot_at: dict[KeyPath, Slot] = {}
        others: list[Slot] = []
        stop = 0
        for k, group in enumerate(groups.values()):
            xs = [places[j][1] for j in group]
            x = next(filter(is_c_contiguous, xs), xs[0])
            start, stop = stop, stop + math.prod(x.shape)
            dtype = native(x.dtype)
            re._parameters.append(
                Parameter(
                    start,
                    stop,
                    tuple(x.shape),
                    dtype,
                    is_complex_dtype(dtype),
                    library_for(x).sums_ties,
                )
            )
            shown = {id(x): Slot(k, x)}
            re._slots.append(shown[id(x)])
            for other in xs:
                if id(other) not in shown:
                    others.append(Slot(k, other, view_of(x), view_of(other)))
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
        re._runs = runs_of(re._parameters)

        def slot(path: KeyPath, x: Any) -> Slot | None:
            if not isnumeric(x):
                return None
            found = slot_of.get(id(x))
            return slot_at.get(path) if found is None else found

        dtypes_of_gradients = [gradient_dtype(p.dtype, re._dtype) for p in re._parameters]
        blanks = list(map(blank_of, (p.shape for p in re._parameters), dtypes_of_gradients))
        re._table = Table(model, slot, re._slots, [s.seen(blanks[s.k]) for s in re._slots])
        re._template = fold(
            model,
            lambda path, x: slot(path, x) or (),
            lambda path, x, results: mirror(x, results),
            keys=trainable_keys,
            skipped=lambda child: (),
        )
        turns = [slot.k for _, slot in walk(re._template) if isinstance(slot, Slot)]
        re._in_turn = turns == [*range(len(re._parameters))]
        return re

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
        entries = self._table.entries.copy()
        count = len(self._parameters)
        entries[:count] = values = self._split(self._checked(v), copy)
        if len(self._slots) > count:
            for i, slot in enumerate(self._slots[count:], count):
                entries[i] = slot.seen(values[slot.k])
        for i, like in self._likes:
            entries[i] = of_class(like.blank, entries[i])
        return self._table.rebuilt(entries)

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
        slots, blanks, gs = gather(Slot, self._template, self._table.outline, grad)
        if self._are_plain(gs):
            return self._joined(gs, out)
        pieces: list[Any] = [None] * len(self._parameters)
        counted = self._counted(slots, gs)
        for i, (slot, blank, g) in enumerate(zip(slots, blanks, gs, strict=True)):
            if i in counted:
                continue
            if not (type(g) is np.ndarray and g.dtype == blank.dtype and g.shape == blank.shape):
                where = functools.partial(place, Slot, self._template, self._table.outline, i)
                g = gradient_for(g, blank, where, traced=out is None)
                if g is None:
                    continue
            g = slot.unseen(g)
            pieces[slot.k] = g if pieces[slot.k] is None else summed(pieces[slot.k], g)
        return self._joined(pieces, out, self._dtype_of_step(pieces))

    def _dtype_of_step(self, pieces: list[Any]) -> Any:
        """Return the dtype of a vector of gradients: one in which none of them is rounded."""
        if not is_narrow_dtype(self._dtype):
            return self._dtype
        own = dtype_name(self._dtype)
        are_own = all(piece is None or dtype_name(piece.dtype) == own for piece in pieces)
        return self._dtype if are_own else np.dtype(np.float32)

    def _counted(self, slots: list[Slot], gs: list[Any]) -> set[int]:
        """Return the places whose gradient is counted already.

        PyTorch gives one gradient object of one tensor, summed over its places.
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
        """Tell whether these arrays are the parameters in turn, or can replace them as they are."""
        return (
            self._in_turn
            and self._own_dtype is not None
            and {*map(type, xs)} == {np.ndarray}
            and [x.dtype for x in xs].count(self._own_dtype) == len(xs)
            and [x.shape for x in xs] == [p.shape for p in self._parameters]
        )

    def _places(self, model: Tree) -> tuple[list[Slot], list[Array]]:
        """Return the slots beside what `model` has there, checked."""
        slots, xs, _ = gather(Slot, self._template, model, None, _MISFIT)
        if self._are_plain(xs):
            return slots, xs
        fault: type[Exception]
        for i, (slot, x) in enumerate(zip(slots, xs, strict=True)):
            p = self._parameters[slot.k]
            shape = p.shape if slot.view is None else slot.view.shape
            if type(x) is np.ndarray and x.shape == shape and x.dtype == p.dtype:
                continue
            refuse_masked_parameter(x, functools.partial(place, Slot, self._template, model, i))
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
            where = place(Slot, self._template, model, i)
            wanted = f"expected an array of shape {shape} and dtype {p.dtype}"
            raise fault(f"at {where}: {wanted}, got {got}")
        return slots, xs

    def _joined(self, pieces: list[Any], out: Any, dtype: Any = None) -> Any:
        """Write the pieces of the vector into `out`, or into a new vector; None is zeros.

        A new one has the dtype given, or else that of the flat model.
        """
        if out is not None:
            check_out(out, self._size, self._dtype, self._libraries)
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
        if not fresh and may_overlap(parts, memory):
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
                    f"the array at {place(Slot, self._template, model, i)} cannot be written in "
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

    def _refuse_other_ties(self, model: Tree, places: list[tuple[Slot, Array]]) -> None:
        """Raise if different parameters are one in `model`: they could not all be written."""
        try:
            owner = owners([(KeyPath(), x) for _, x in places])
        except ValueError:
            paths = (path for path, _ in walk_places(Slot, self._template, model))
            owners([(path, x) for path, (_, x) in zip(paths, places, strict=True)])
            raise
        for i, j in enumerate(owner):
            if places[i][0].k != places[j][0].k:
                one, other = (place(Slot, self._template, model, k) for k in (j, i))
                raise ValueError(
                    f"{one} and {other} are one parameter in this model, and were two in the one "
                    "that was destructured; copy one of them"
                )

    def __len__(self) -> int:
        """Return the length of the vector."""
        return self._size

    def __repr__(self) -> str:
        n, name = len(self._parameters), type(self._table.outline).__name__
        name = "array" if name == Blank.__name__ else name
        dtype = getattr(self._dtype, "name", self._dtype)
        return (
            f"Restructure({name}, {self._size} number{'s' * (self._size != 1)} "
            f"in {n} array{'s' * (n != 1)}, {dtype})"
        )
