"""The flat vector: all parameters of a model in one array, and the way back.

`destructure` looks at a model once and compiles what `re` needs to rebuild it:

a) a *table* with an entry for each parameter, then for each other view of one, then for what is
   kept and for the nodes, each after its children. To rebuild is to fill in the parameters, to
   make the nodes in order, and to return the last entry;
b) consecutive parameters of one shape are a *run*: one slice, cut into its rows by NumPy in C;
c) a *template* with a `_Slot` at each place of a parameter, and an *outline*: the model with
   blanks, which have shape and dtype but no memory, in place of its arrays. With these two any
   other model or gradient is walked (see `_lockstep`). The arrays of the model itself are not
   kept alive.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from ._engine import checked_gradient
from ._lockstep import gather, place
from ._ties import View, carry, owners, parameters
from ._tree import (
    KeyPath,
    fold,
    isnumeric,
    maywrite,
    mirror,
    rebuild,
    register_leaf,
    trainable_keys,
)
from .words import namespace

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
    ValueError
        If arrays overlap in memory only in part, or if the model contains itself.

    Notes
    -----
    A parameter at several places is in the vector once. If those places are different views of
    it, it is laid out as its first C-contiguous place shows it, or else as its first place does.

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


@register_leaf
class _Slot:
    """The mark of a place in the template: which parameter is there, and through which view."""

    frozen = False

    def __init__(self, k: int, source: View | None = None, view: View | None = None) -> None:
        self.k = k
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
    return np.broadcast_to(np.zeros((), dtype), shape).view(_Blank)


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
    _table: list[Any]
    _nodes: list[tuple[int, Callable[[Any], Any], Callable[[list[Any]], Any]]]
    """Of each node where it goes in the table, how to make it, and how to get its children."""
    _template: Tree
    _outline: Any
    _dtype: Any
    _size: int
    _own_dtype: Any
    """The one dtype that all parameters have, else None."""
    _runs: list[tuple[int, int, tuple[int, ...] | None]]

    @classmethod
    def _of(cls, model: Model) -> Restructure[Model]:
        re = cls.__new__(cls)
        places, owner = parameters(model)
        groups: dict[int, list[int]] = {}
        for j, k in enumerate(owner):
            groups.setdefault(k, []).append(j)
        re._parameters, re._slots = [], []
        slot_of: dict[Any, _Slot] = {}
        others: list[_Slot] = []
        stop = 0
        for k, group in enumerate(groups.values()):
            xs = [places[j][1] for j in group]
            x = next(filter(_is_c_contiguous, xs), xs[0])
            start, stop = stop, stop + math.prod(x.shape)
            re._parameters.append(_Parameter(start, stop, tuple(x.shape), _native(x.dtype)))
            own = _Slot(k)
            re._slots.append(own)
            slot_of[id(x)] = own
            for other in xs:
                if id(other) not in slot_of:
                    slot_of[id(other)] = slot = _Slot(k, View.of(x), View.of(other))
                    others.append(slot)
        re._slots += others
        # An array may be made anew each time its place is visited; then its path tells.
        slot_at = {path: slot_of[id(x)] for path, x in places}
        re._size = stop
        re._dtype = _promoted([p.dtype for p in re._parameters])
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
            self._nodes.append((entry, _maker(bare), get))
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
        if len(args) == 2:
            x, v = args
            model: Any = self(v, copy=copy)
            return model(x)
        (v,) = args
        table = self._table.copy()
        count = len(self._parameters)
        table[:count] = values = self._split(self._checked(v), copy)
        if len(self._slots) > count:
            for i, slot in enumerate(self._slots[count:], count):
                table[i] = slot.seen(values[slot.k])
        for entry, make, get in self._nodes:
            table[entry] = make(get(table))
        return table[self._root]

    def _checked(self, v: Any) -> Array:
        """Return `v` as an array, of the right length."""
        if type(v) is not np.ndarray and not _is_foreign(v):
            v = np.asarray(v)
        if isinstance(v, np.ndarray) and v.dtype.kind not in "fciub" and not isnumeric(v):
            raise TypeError(
                f"expected a vector of {self._size} numbers, got dtype {v.dtype}"
                f"{'; re.flatten makes a vector of a model' * (v.dtype == object)}"
            )
        shape = tuple(v.shape)
        if shape != (self._size,):
            got = f"one of length {shape[0]}" if len(shape) == 1 else f"shape {shape}"
            raise ValueError(f"expected a vector of length {self._size}, got {got}")
        return v

    def _split(self, v: Array, copy: bool) -> list[Array]:
        """Return the parameters that `v` holds."""
        if not isinstance(v, np.ndarray):
            return [
                _cast(v[p.start : p.stop].reshape(p.shape), p.dtype, copy) for p in self._parameters
            ]
        values: list[Array] = []
        for start, stop, shape in self._runs:
            if shape is None:
                values.append(v[start:stop].reshape(()))
            else:
                values.extend(v[start:stop].reshape(shape))
        if copy or v.dtype != self._own_dtype:
            with np.errstate(all="ignore"):
                values = [
                    _cast(x, p.dtype, copy) for x, p in zip(values, self._parameters, strict=True)
                ]
        return values

    # --- from the model to the vector ---

    def flatten(self, model: Model, out: Any = None) -> Any:
        """Return the parameters of another model of the same structure as a vector.

        Parameters
        ----------
        model : tree
            A model with the structure and shapes of the one that was destructured. Of tied
            places that differ, the first that is not a mere view counts.
        out : ndarray, optional
            A writable vector to write into.

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
        pieces: list[Any] = [None] * len(self._parameters)
        for slot, x in self._places(model):
            if pieces[slot.k] is None or slot.view is None:
                pieces[slot.k] = slot.unseen(x)
        return self._joined(pieces, out)

    def flatten_gradient(self, grad: Tree, out: Any = None) -> Any:
        """Return a gradient in the structure of the model as a vector.

        Parameters
        ----------
        grad : tree
            The gradient, as `update` takes it. Where there is none (``None``, a missing key, or
            ``()``), the vector is zero; gradients of tied places are summed.
        out : ndarray, optional
            A writable vector to write into.

        Returns
        -------
        array
            `out`, or a new vector of the dtype of ``destructure(model)[0]``.

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
        pieces: list[Any] = [None] * len(self._parameters)
        for i, (slot, blank, g) in enumerate(zip(slots, blanks, gs, strict=True)):
            if not (type(g) is np.ndarray and g.dtype == blank.dtype and g.shape == blank.shape):
                where = functools.partial(place, _Slot, self._template, self._outline, i)
                g = _gradient(g, blank, where, traced=out is None)
                if g is None:
                    continue
            g = slot.unseen(g)
            before = pieces[slot.k]
            pieces[slot.k] = g if before is None else before + g
        return self._joined(pieces, out)

    def _places(self, model: Tree) -> Iterable[tuple[_Slot, Array]]:
        """Return the slots beside what `model` has there, checked."""
        slots, xs, _ = gather(_Slot, self._template, model, None, _MISFIT)
        for i, (slot, x) in enumerate(zip(slots, xs, strict=True)):
            shape = self._parameters[slot.k].shape if slot.view is None else slot.view.shape
            if not isnumeric(x) or tuple(x.shape) != shape:
                got = f"shape {tuple(x.shape)}" if isnumeric(x) else f"{x!r:.60}"
                where = place(_Slot, self._template, model, i)
                kind = ValueError if isnumeric(x) else TypeError
                raise kind(f"at {where}: expected an array of shape {shape}, got {got}")
            if x.dtype.kind == "c" if isinstance(x, np.ndarray) else False:
                if not _is_complex(self._parameters[slot.k].dtype):
                    where = place(_Slot, self._template, model, i)
                    raise TypeError(
                        f"at {where}: expected an array of real numbers, got dtype {x.dtype}; "
                        "take the real part if that is what is meant"
                    )
        return zip(slots, xs, strict=True)

    def _joined(self, pieces: list[Any], out: Any) -> Any:
        """Write the pieces of the vector into `out`, or into a new vector; None is zeros."""
        foreign = [piece for piece in pieces if _is_foreign(piece)]
        if foreign and out is None:
            return self._concatenated(pieces, foreign[0])
        fresh = out is None
        if fresh:
            out = np.empty(self._size, self._dtype)
        else:
            _check_out(out, self._size, self._dtype)
        parts: list[np.ndarray] = []
        for piece, p in zip(pieces, self._parameters, strict=True):
            if piece is None:
                parts.append(np.broadcast_to(np.zeros((), out.dtype), p.stop - p.start))
            else:
                parts.append(_numpy(piece).reshape(-1))
        if not parts:
            return out
        target = out
        if not fresh and any(np.may_share_memory(part, out) for part in parts):
            target = np.empty_like(out)
        with np.errstate(all="ignore"):
            np.concatenate(parts, out=target, casting="unsafe")
        if target is not out:
            out[...] = target
        return out

    def _concatenated(self, pieces: list[Any], like: Array) -> Array:
        """Return the vector as an array of the library of `like`, which may be traced."""
        xp = namespace(like)
        dtype = _dtype_for(like, self._dtype)
        parts = []
        for piece, p in zip(pieces, self._parameters, strict=True):
            part = xp.zeros(p.shape, dtype=dtype) if piece is None else piece
            if isinstance(part, np.ndarray) and not xp.__name__.startswith("autograd"):
                part = xp.asarray(part)
            parts.append(_cast(xp.reshape(part, (-1,)), dtype, False))
        concatenate = getattr(xp, "concatenate", None) or xp.concat
        return concatenate(parts)

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
        places = list(self._places(model))
        for i, (_, x) in enumerate(places):
            if not maywrite(x):
                raise ValueError(
                    f"the array at {place(_Slot, self._template, model, i)} cannot be written in "
                    f"place (read-only, immutable or broadcast); re(v) makes a new model"
                )
        self._refuse_other_ties(model, places)
        if isinstance(v, np.ndarray) and any(
            isinstance(x, np.ndarray) and np.may_share_memory(x, v) for _, x in places
        ):
            v = v.copy()
        values = self._split(v, False)
        for slot, x in places:
            _write(x, slot.seen(values[slot.k]))

    def _refuse_other_ties(self, model: Tree, places: list[tuple[_Slot, Array]]) -> None:
        """Raise if different parameters are one in `model`: they could not all be written."""

        def path(i: int) -> Any:
            return _LazyPath(self._template, model, i)

        owner = owners([(path(i), x) for i, (_, x) in enumerate(places)])
        for i, j in enumerate(owner):
            if places[i][0].k != places[j][0].k:
                raise ValueError(
                    f"{path(j)} and {path(i)} are one parameter in this model, and were two in the "
                    "one that was destructured; copy one of them"
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
