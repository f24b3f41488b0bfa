"""Array libraries: a class for each, whose methods are all that depends on whose array it is.

`library_of(x)` gives the object that answers for an array. This file has more than 600 lines, since
the base class, `Library`, lists every question that a library may be asked, with its answer by the
array's namespace of the Python array API standard; it takes the arrays of any library that has one.
A library that needs another answer has a file in this folder, of the name by which it is imported,
which ends with ``LIBRARY = ...``. The file is imported once an array is met and that library is
loaded, never before: no array library but NumPy is imported here.

To add a library, add its file. Nothing else changes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import operator
import pkgutil  # not late: a fork during its import would leave the child with a broken lock
import sys
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat
import numpy as np

from .. import _fork
from . import dtypes
from .dtypes import FLOAT32, is_complex_dtype, is_narrow
from .layout import Memory, Span, View, c_strides

__all__ = [
    "Call",
    "Library",
    "as_like",
    "bare",
    "beside",
    "by_views",
    "check_fit",
    "common_namespace",
    "for_step",
    "for_sums",
    "is_abstract",
    "is_array",
    "is_foreign",
    "is_immutable",
    "is_masked",
    "is_traced",
    "isnumeric",
    "library_for",
    "library_of",
    "library_of_class",
    "maywrite",
    "namespace",
    "of_class",
    "package_of",
    "plain",
    "refuse_masked",
    "refuse_masked_parameter",
    "register",
    "wanted_of",
    "widened",
]

Array = Any
Call = tuple[Any, ...]
"""A function and its arguments."""


class Library:
    """The arrays of one library, and what is done with them.

    This class serves arrays with ``__array_namespace__``. Nothing is known of their memory, so that
    they are not written in place: new arrays take their places.
    """

    key = "array-api"
    """Its name in Python, that of its file."""
    name = "another library"
    """Its name in messages."""
    is_immutable = False
    """Whether its arrays cannot be written at all."""
    has_views = False
    """Whether kernels of the host may work on its arrays as arrays of NumPy (see `views`)."""
    by_views = False
    """Whether they take only such views, made for each step (see `viewers`)."""
    sums_truth = False
    """Whether truth values can be summed, which the standard does not say."""
    computes = True
    """Whether its arrays have arithmetic."""
    keeps_order = False
    """Whether files keep in which order the elements of its arrays lie in memory."""
    mixes_with_numpy = False
    """Whether its arrays calculate beside counts of NumPy."""
    reads_bytes = False
    """Whether it makes arrays of the bytes of a file; else NumPy does, which then are copied."""
    sums_ties = False
    """Whether it hands over one gradient object, summed, for a parameter at several places."""
    has_conjugates = False
    """Whether its gradients of complex parameters are conjugates of the gradients for rules."""
    differentiates_numpy = False
    """Whether its arrays stand for those of NumPy while these are differentiated."""
    is_differentiated = False
    """Whether it has conjugates for gradients if another library differentiates its arrays."""
    as_float = ".astype(float)"
    """How a user makes floating numbers of an array."""

    # --- which arrays ------------------------------------------------------------------------

    def owns(self, cls: type) -> bool:
        """Tell whether the arrays of a class are of this library."""
        return hasattr(cls, "__array_namespace__")

    def namespace(self, x: Array) -> Any:
        """Return the module whose functions take an array, or a number of NumPy."""
        return np if isinstance(x, np.generic) else array_api_compat.array_namespace(x)

    def is_numeric(self, x: Array) -> bool:
        """Tell whether an array has real or complex floating numbers."""
        return dtypes.is_floating(getattr(x, "dtype", None))

    def enters_jax(self, x: Array) -> bool:
        """Tell whether an array in the place of a rule's number is one that JAX may trace."""
        return False

    def seems_to_train(self, x: Array) -> bool:
        """Tell whether an array that is not numeric looks as if it were."""
        return False

    def is_traced(self, x: Array) -> bool:
        """Tell whether an array stands for another, and records operations on it."""
        return False

    def is_abstract(self, x: Array) -> bool:
        """Tell whether the numbers of an array cannot be known, as while JAX traces."""
        return False

    def may_write(self, x: Array) -> bool:
        """Tell whether the elements of an array may be written in place, each on its own."""
        return False

    def is_on_device(self, x: Array) -> bool:
        """Tell whether an array lies on a CUDA device, where kernels may work on it."""
        return False

    def has_lost(self, x: Array) -> bool:
        """Tell whether the memory of an array was given back."""
        return False

    def refuse_lost(self, x: Array, state: Any, where: Callable[[], str]) -> None:
        """Raise if a parameter, or an array of its state, has no memory any more."""

    # --- layout ------------------------------------------------------------------------------

    def byte_strides(self, x: Array) -> tuple[int, ...]:
        """Return the strides, in bytes; those of a C-contiguous array where it has none."""
        strides = getattr(x, "strides", None)
        return c_strides(x.shape) if strides is None else tuple(strides)

    def is_c_contiguous(self, x: Array) -> bool:
        """Tell whether an array lies in C order, as far as that can be said."""
        return True

    def memory(self, x: Array) -> Memory | None:
        """Return where an array lies; None if that is nowhere, or not known (JAX, traced)."""
        return None

    def span(self, x: Array) -> Span | None:
        """Return between which addresses an array lies; None as in `memory`."""
        memory = self.memory(x)
        return None if memory is None else memory.span()

    def transposed(self, x: Array, order: Sequence[int]) -> Array:
        """Return an array with its axes in another order; a view where there are views."""
        return self.namespace(x).permute_dims(x, tuple(order))

    def flipped(self, x: Array, axes: Sequence[int]) -> Array:
        """Return an array with some axes reversed; a view where strides may be negative."""
        return x[tuple(slice(None, None, -1 if k in axes else 1) for k in range(x.ndim))]

    def reshaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Return an array in another shape; a view where strides allow."""
        return self.namespace(x).reshape(x, shape)

    def seen(self, x: Array, view: View) -> Array:
        """Return values in the order of addresses as a view shows them.

        A view of `x` where strides allow, which they do if `x` is C-contiguous.
        """
        shape = tuple(view.shape[axis] for axis in view.order)
        x = x if tuple(x.shape) == shape else self.reshaped(x, shape)
        x = x if view.is_ordered() else self.transposed(x, view.back())
        return self.flipped(x, view.flips) if view.flips else x

    def unseen(self, x: Array, view: View) -> Array:
        """Return values, laid out like a view, with their axes by falling stride."""
        x = self.flipped(x, view.flips) if view.flips else x
        return x if view.is_ordered() else self.transposed(x, view.order)

    def view(self, x: Array) -> np.ndarray | None:
        """Return an array of NumPy over the memory of `x`; None where there is none."""
        return None

    def views(self, state: Any, x: Array, g: Array) -> tuple[Any, np.ndarray, np.ndarray] | None:
        """Return views of state and parameter, and the gradient, in one order of axes; or None."""
        return None

    def viewers(self) -> tuple[Callable[[Array], Any], Callable[[Any], Any]]:
        """Return the quickest functions that make views, of an array and of those in a state."""
        raise NotImplementedError

    # --- new arrays --------------------------------------------------------------------------

    def full_like(self, x: Array, value: Any) -> Array:
        """Return an array of the shape, dtype and device of `x`, in native byte order."""
        return self.namespace(x).full_like(x, value)

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        """Return an array like `x` whose elements may be anything."""
        return x if self.is_immutable else self.namespace(x).empty_like(x)

    def fresh(self, x: Array) -> Array:
        """Return an array that shares no memory, and no graph, with `x`: itself if immutable."""
        return x if self.is_immutable else self.namespace(x).asarray(x, copy=True)

    def copied(self, x: Array) -> Array:
        """Return a copy; the recording, if there is one, has it as one more operation."""
        return self.namespace(x).asarray(x, copy=True)

    def constant(self, x: Array) -> Array:
        """Return the numbers of `x` as ones that have no derivative."""
        return x

    def count_like(self, x: Array) -> Array:
        """Return a 0-d count of zero, on the host for an array on a device."""
        xp = self.namespace(x)
        return xp.asarray(0, dtype=xp.int64)

    def counted(self, t: Array, largest: int) -> Array:
        """Return a count that is one higher, or the same if it is the largest."""
        return t + 1 if int(t) < largest else t

    def number_of(self, t: Array) -> Any:
        """Return a count as the number from which a rule's own are computed."""
        return int(t)

    def own_dtype(self, x: Array, dtype: Any) -> Any:
        """Return a dtype of any library as that of `x` has it."""
        return getattr(self.namespace(x), dtypes.dtype_name(dtype))

    def astype(self, x: Array, dtype: Any) -> Array:
        """Return a copy in another dtype, which may be NumPy's."""
        return self.namespace(x).astype(x, self.own_dtype(x, dtype), copy=True)

    def cast(self, x: Array, dtype: Any) -> Array:
        """Return an array in another dtype of its library, itself if it has that already."""
        if x.dtype == dtype:
            return x
        cast = getattr(x, "astype", None)
        return cast(dtype) if cast else self.namespace(x).astype(x, dtype)

    def as_like(self, x: Array, value: Array) -> Array:
        """Return `value`, a result of calculating with `x`, as an array of the dtype of `x`."""
        return library_for(value).cast(value, x.dtype)

    def widened(self, x: Array) -> Array:
        """Return float32 of narrower numbers."""
        return self.astype(x, FLOAT32)

    def number(self, traced: Any, real: Any) -> Any:
        """Return a number that is being traced in the dtype `real`."""
        # It may be a box around a number of Python, which has no dtype.
        traced = traced * real.type(1)
        if traced.dtype == real:  # under NumPy 2.0 the way back through a cast is an error
            return traced
        return traced.astype(real)

    def numbers(self, x: Array, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return numbers, cast once to the real dtype of `x`, which computes with them."""
        if not any(map(is_traced, values)):
            return tuple(map(float, values))
        real = self.namespace(x).real(x).dtype if is_complex_dtype(x.dtype) else x.dtype
        return tuple(library_for(n).number(n, real) if is_traced(n) else float(n) for n in values)

    # --- a step ------------------------------------------------------------------------------

    def bare(self, x: Array) -> Array:
        """Return an array outside of any graph, of no subclass."""
        return x

    def plain(self, x: Array) -> Array:
        """Return an array of a subclass of NumPy's as one of NumPy's own; others as they are."""
        return x

    def for_rule(self, x: Array) -> Array:
        """Return a parameter as rules take it."""
        return self.bare(x)

    def restored(self, new: Array, x: Array) -> Array:
        """Return the result of a rule on ``for_rule(x)`` as the array that replaces `x`."""
        return new

    def unrecorded(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which operations on arrays are not recorded."""
        return contextlib.nullcontext()

    def read_only(self, x: Array) -> Array:
        """Return an array, or a view of it where a rule could write into it."""
        return x

    def apart(self, x: Array, others: Sequence[Any]) -> Array:
        """Return an array, or a copy if it may share memory with one of the others."""
        return self.fresh(x) if any(x is other for other in others) else x

    def refuse_write(self, x: Array, new: Any, where: Callable[[], str]) -> None:
        """Raise if `new` cannot be written into an array for what stands behind both."""

    def can_hold(self, x: Array, new: Any) -> bool:
        """Tell whether the numbers of `new` can be written into an array as they are."""
        return False

    def write_call(self, x: Array, new: Array) -> Call:
        """Return the call that writes `new` into an array; one of C, or the last of several."""
        return operator.setitem, x, ..., new

    def like(self, x: Array, new: Array) -> Array:
        """Return `new` as the array that replaces `x`."""
        return new

    def state_like(self, old: Any, new: Any, x: Array) -> Any:
        """Return the state that kernels made of ``views(old, x, _)``, with its own arrays."""
        return new

    def note_call(self, xs: list[Array]) -> Call:
        """Return the call that says that kernels write into these, if `by_views`."""
        raise NotImplementedError

    def shown_like(self, x: Array, new: Array) -> Array:
        """Return `new` as the array that replaces `x`, another view of the parameter."""
        return new

    def of_class(self, x: Array, values: Any) -> Any:
        """Return an array of NumPy as one of the class of `x`, made from `x`."""
        return values

    # --- words of steps ----------------------------------------------------------------------

    def beside(self, x: Array, y: Any) -> Any:
        """Return a bare number as an array beside `x`, where functions take nothing else."""
        return self.namespace(x).asarray(y, dtype=x.dtype)

    def sqrt(self, x: Array) -> Array:
        """Return the square root, whose derivative at 0 is 0 where derivatives are taken."""
        return self.namespace(x).sqrt(x)

    def sign(self, x: Array) -> Array:
        """Return the sign: -1, 0 or 1, nan for nan, and ``z/|z|`` for complex z."""
        return self.namespace(x).sign(x)

    def for_sums(self, x: Array) -> Array:
        """Return an array in a dtype in which sums over it are kept."""
        return self.astype(x, FLOAT32) if is_narrow(x) else x

    def count_nonzero(self, x: Array) -> Array:
        """Return how many of some real numbers are not zero."""
        xp = self.namespace(x)
        if self.sums_truth:
            return xp.sum(x != 0)
        return xp.sum(xp.astype(x != 0, x.dtype))

    # --- measured numbers --------------------------------------------------------------------

    def measured(self, value: Array) -> Any:
        """Return a measured number as a float, unless it is traced or waits on a device."""
        if value.ndim or self.is_traced(value) or self.is_on_device(value):
            return value
        return complex(value) if is_complex_dtype(value.dtype) else float(value)

    def vector_like(self, x: Array, values: Sequence[float]) -> Array:
        """Return a vector of numbers beside `x`, in double or in the widest dtype there is."""
        xp = self.namespace(x)
        return xp.asarray([*values], dtype=xp.float64)

    def items(self, vector: Array) -> tuple[Any, ...]:
        """Return the numbers of a vector."""
        return tuple(self.measured(vector[k]) for k in range(vector.shape[0]))

    def stacked(self, values: Sequence[Any], like: Array) -> Array:
        """Return numbers as a vector, in the dtype of another one or of one of them."""
        xp = self.namespace(like)
        return xp.stack([xp.asarray(v, dtype=like.dtype) for v in values])

    # --- gradients ---------------------------------------------------------------------------

    def gradient(self, g: Any, x: Array, where: Callable[[], str]) -> Array:
        """Return `g` as an array beside `x`, in the dtype in which a step on `x` is computed.

        Raises
        ------
        TypeError, ValueError
            If `g` is no gradient for `x`; the message names the place, from `where()`.
        """
        of_g = library_of(g)
        if of_g is not None and of_g is not self and of_g.is_abstract(g):
            return of_g.gradient(g, x, where)
        check_fit(g if hasattr(g, "dtype") else np.asarray(g), x, where)
        if of_g is not self:
            g = self.from_numpy(library_for(g).to_numpy(g), x)
        return for_step(x, g)

    def for_numpy(self, g: Any, x: np.ndarray, where: Callable[[], str]) -> Any:
        """Return a gradient that is given for an array of NumPy as one, or itself if traced."""
        return self.to_numpy(g)

    def is_finite(self, g: Array) -> bool:
        """Tell whether all numbers of a checked gradient are finite; waits for its device."""
        xp = self.namespace(g)
        return bool(xp.all(xp.isfinite(g)))

    def is_nonzero(self, g: Array) -> bool:
        """Tell whether an array has a number other than zero, as far as can be seen."""
        return bool(self.namespace(g).any(g != 0))

    # --- between libraries -------------------------------------------------------------------

    def to_numpy(self, x: Array) -> np.ndarray:
        """Return an array of the host as one of NumPy; numbers that NumPy lacks in float32."""
        return np.asarray(x)

    def from_numpy(self, a: np.ndarray, like: Array) -> Array:
        """Return a new array of this library, where `like` lies."""
        return self.namespace(like).asarray(a, device=getattr(like, "device", None), copy=True)

    def taken(self, values: Array, x: Array) -> Array:
        """Return values of any library as an array that `write_call` can write into `x`."""
        if library_of(values) is self:
            return values
        return self.from_numpy(library_for(values).to_numpy(values), x)

    def converted(self, x: Array, dtype: Any, copy: bool) -> Array:
        """Return an array in another dtype, by its real part if that is real; else itself."""
        wanted = self.own_dtype(x, dtype)
        if is_complex_dtype(x.dtype) and not is_complex_dtype(wanted):
            x = self.namespace(x).real(x)
        if x.dtype != wanted:
            return self.cast(x, wanted)
        return self.copied(x) if copy and not self.is_immutable else x

    def piece(self, v: Array, start: int, shape: tuple[int, ...]) -> Array:
        """Return the numbers of a vector from `start` on, in a shape; a view where there is."""
        return self.reshaped(v[start : start + math.prod(shape)], shape)

    def concatenated(
        self, pieces: Sequence[Any], shapes: Sequence[tuple[int, ...]], like: Array, dtype: Any
    ) -> Array:
        """Return pieces as one vector beside `like`, which may be traced; None is zeros."""
        xp = self.namespace(like)
        dtype = self.own_dtype(like, dtype)
        parts = []
        for piece, shape in zip(pieces, shapes, strict=True):
            part = self._zeros(shape, dtype, like) if piece is None else self.adopted(piece, like)
            parts.append(library_for(part).converted(xp.reshape(part, (-1,)), dtype, False))
        return self._concat(xp, parts)

    def _zeros(self, shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
        return self.namespace(like).zeros(shape, dtype=dtype)

    def _concat(self, xp: Any, parts: list[Array]) -> Array:
        return xp.concat(parts)

    def adopted(self, values: Array, like: Array) -> Array:
        """Return an array of NumPy as one of this library; others as they are."""
        return self.from_numpy(values, like) if isinstance(values, np.ndarray) else values

    # --- files -------------------------------------------------------------------------------

    def why_unsavable(self, x: Array) -> str:
        """Return why a file cannot hold an array, as text; empty if it can."""
        return ""

    def on_host(self, x: Array) -> np.ndarray:
        """Return the numbers of an array, or their bytes, in C order, as an array of NumPy."""
        return self.to_numpy(x)

    def from_bytes(self, raw: np.ndarray, dtype: str, layout: View, like: Array) -> Array:
        """Return the array that these bytes are, where `like` lies, if `reads_bytes`."""
        raise NotImplementedError

    def loaded(self, a: Array, like: Array) -> Array:
        """Return an array read from a file, by `from_bytes` or by NumPy, as one like `like`."""
        return self.from_numpy(a, like)


# --- which library ---------------------------------------------------------------------------

_MOST = 4096
"""How many classes are remembered; beyond, all are forgotten and found again."""

_libraries: dict[str, Library | None] = {}
"""The libraries whose files have been imported, by the names of these. It only grows."""

_by_class: dict[type, Library | None] = {}
"""The answers of `library_of`, by class. An entry never changes, since a class does not."""


def library_of(x: object) -> Library | None:
    """Return the library of the array `x`; None if `x` is no array."""
    try:
        return _by_class[type(x)]
    except KeyError:
        return library_of_class(type(x))


def library_of_class(cls: type) -> Library | None:
    """Return the library of the arrays of a class; None if it is no class of arrays."""
    if cls not in _by_class:
        if len(_by_class) >= _MOST:
            _by_class.clear()
        _by_class[cls] = _found(cls)
    return _by_class[cls]


def library_for(x: object) -> Library:
    """Return the library of `x`; if `x` is a number, an object of the base class."""
    return library_of(x) or _ANY


def register(library: Library) -> None:
    """Let a library answer for the arrays that it owns, before those registered earlier."""
    known = {library.key: library, **_libraries}
    _libraries.clear()
    _libraries.update(known)
    _by_class.clear()


def _found(cls: type) -> Library | None:
    if issubclass(cls, np.generic | type):
        return None
    for name in _names():
        if sys.modules.get(name) is not None and name not in _libraries:
            with _fork.compiling:
                module = importlib.import_module(f"{__package__}.{name}")
            _libraries[name] = getattr(module, "LIBRARY", None)
    owners = (library for library in [*_libraries.values()] if library and library.owns(cls))
    return next(owners, _ANY if _ANY.owns(cls) else None)


@functools.cache
def _names() -> list[str]:
    """Return the names of the files of this folder, each perhaps that of a library."""
    path = importlib.import_module(__package__).__path__
    return [found.name for found in pkgutil.iter_modules(path)]


_ANY = Library()


# --- questions that a number may be asked, too -------------------------------------------------

# Named here since `X | Y` is made anew each time it is evaluated.
_NUMPY = (np.ndarray, np.generic)
_PLAIN = (bool, int, float, *_NUMPY)


def isnumeric(x: object) -> bool:
    """Whether `x` is an array of real or complex floating numbers, of any dimension, 0 included.

    These arrays are the parameters of a model: NumPy arrays (also of ``ml_dtypes`` floats such as
    ``bfloat16``), PyTorch tensors, JAX arrays and tracers, CuPy and Numba device arrays, boxes of
    HIPS autograd, and those of any library with the array API standard. Python and NumPy scalars,
    and arrays of integers or booleans, are not.

    Examples
    --------
    >>> isnumeric(np.ones(3)), isnumeric(np.array(1j)), isnumeric(np.arange(3)), isnumeric(1.0)
    (True, True, False, False)
    """
    if type(x) is np.ndarray:  # quick, since asked of every leaf
        return x.dtype.kind in dtypes.FLOATING or dtypes.is_floating(x.dtype)
    library = library_of(x)
    return library is not None and library.is_numeric(x)


def maywrite(x: object) -> bool:
    """Whether the elements of the array `x` may be written in place, each on its own.

    False for what is no array, for read-only and immutable arrays (JAX, traced ones), and for
    arrays that store one element at several places, as a broadcast view does.

    Examples
    --------
    >>> maywrite(np.ones(3)), maywrite(np.broadcast_to(1.0, 3)), maywrite(1.0)
    (True, False, False)
    """
    library = library_of(x)
    return library is not None and library.may_write(x)


def is_array(x: object) -> bool:
    """Tell whether `x` is an array of a known library, whatever its dtype."""
    return library_of(x) is not None


def is_immutable(x: object) -> bool:
    """Tell whether the array `x` cannot be written at all, like those of JAX, traced ones included.

    A read-only array of NumPy may be a view of one that is written elsewhere. A box of HIPS
    autograd stands for an array of NumPy.
    """
    library = library_of(x)
    return library is not None and library.is_immutable


def is_foreign(x: object) -> bool:
    """Tell whether `x` is an array of numbers, but not NumPy's."""
    return not isinstance(x, np.ndarray) and isnumeric(x)


def is_abstract(x: object) -> bool:
    """Tell whether the numbers of `x` are not known: JAX traces it, or ``torch.vmap`` maps it."""
    library = library_of(x)
    return library is not None and library.is_abstract(x)


def by_views(xs: Sequence[Any], among: Sequence[int]) -> tuple[Any, list[int]]:
    """Return the library whose arrays kernels take by views alone, and where these are.

    None and nothing if there are no such arrays among those at the positions given.
    """
    classes = {}
    for cls in {*map(type, map(xs.__getitem__, among))}:
        if (library := library_of_class(cls)) is not None and library.by_views:
            classes[cls] = library
    if not classes:
        return None, []
    return next(iter(classes.values())), [k for k in among if type(xs[k]) in classes]


def is_traced(x: Any) -> bool:
    """Tell whether JAX or HIPS autograd stands behind `x`, and records what is done to it.

    Or ``torch.vmap``, which does it for many values at once. A hyperparameter in two parts (see
    `traced`) says it itself.
    """
    if isinstance(x, _PLAIN):
        return False
    if (library := library_of(x)) is not None:
        return library.is_traced(x)
    boxes = sys.modules.get("autograd.tracer")  # of lists and dictionaries, too
    return bool(getattr(x, "is_traced", False)) or (boxes is not None and isinstance(x, boxes.Box))


def namespace(x: Any) -> Any:
    """Return the module whose functions take `x`: NumPy's, JAX's, PyTorch's, ..."""
    return np if isinstance(x, _NUMPY) else library_for(x).namespace(x)


def common_namespace(*values: Any) -> Any:
    """Return the module whose functions take all `values`; one may stand beside NumPy's arrays."""
    for value in values:
        if hasattr(value, "dtype") and not isinstance(value, _NUMPY):
            return namespace(value)
    return np


def beside(x: Any, y: Any) -> Any:
    """Return `y` as an array of the library of `x`, where a bare number would not do."""
    if hasattr(y, "dtype") or isinstance(x, _NUMPY):
        return y
    return library_for(x).beside(x, y)


def for_sums(x: Any) -> Any:
    """Return an array, or a number of NumPy, in a dtype in which sums over it are kept."""
    x = np.asarray(x) if isinstance(x, np.generic) else x
    return library_for(x).for_sums(x)


def of_class(x: object, values: Any) -> Any:
    """Return an array of NumPy as one of the class of `x`, made from `x`, over the same memory.

    `__array_finalize__` then copies the attributes of `x`. For a mapped file, whose memory is
    elsewhere, a plain array is returned.
    """
    return values if type(x) is np.ndarray else library_for(x).of_class(x, values)


def package_of(x: object) -> str:
    """Return the name of the package that an array of an unknown library is of."""
    return type(x).__module__.partition(".")[0]


def plain(x: Any) -> Any:
    """Return an array of a subclass of NumPy's as one of NumPy's own; anything else as it is."""
    return library_for(x).plain(x)


def bare(x: Any) -> Any:
    """Return an array outside of any graph, of no subclass."""
    return library_for(x).bare(x)


# --- steps in wider numbers --------------------------------------------------------------------


def widened(x: Any) -> Any:
    """Return an array in the dtype in which steps on it are computed; anything else as it is."""
    if not hasattr(x, "dtype") or not is_narrow(x):
        return x
    return library_for(x).widened(x)


def for_step(x: Any, g: Any) -> Any:
    """Return a gradient of `x` in the dtype in which a step on `x` is computed."""
    if not is_narrow(x):
        return as_like(x, g)
    return widened(g) if is_narrow(g) else library_for(g).astype(g, FLOAT32)


def as_like(old: Any, value: Any) -> Any:
    """Return `value` as an array of the dtype of `old` (0-d arithmetic makes scalars in NumPy)."""
    return library_for(old).as_like(old, value)


# --- gradients ---------------------------------------------------------------------------------


def check_fit(g: Any, x: Any, where: Callable[[], str]) -> None:
    """Raise if an array is no gradient for the parameter `x`, by its dtype or its shape."""
    error: type[Exception] = TypeError
    if not dtypes.is_number(g.dtype):
        got = f"dtype {g.dtype}"
    elif is_complex_dtype(g.dtype) and not is_complex_dtype(x.dtype):
        got = f"complex numbers ({g.dtype}); take the real part if that is what is meant"
    elif tuple(g.shape) != tuple(x.shape):
        error, got = ValueError, f"shape {tuple(g.shape)}"
    else:
        return
    raise error(f"gradient at {where()}: {wanted_of(x)}, got {got}")


def wanted_of(x: Any) -> str:
    """Return the part of a message that says what a gradient for `x` is."""
    return f"expected an array of shape {tuple(x.shape)} and dtype {x.dtype}"


# --- masks -------------------------------------------------------------------------------------


def is_masked(x: object) -> bool:
    """Tell whether `x` is an array with a mask; masked elements have no value."""
    for module, name in (("numpy.ma", "MaskedArray"), ("torch.masked", "MaskedTensor")):
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and isinstance(x, cls):
            return True
    return False


def refuse_masked(x: object, what: Callable[[], str], mend: str) -> None:
    """Raise if `x` is an array with a mask; `what()` says what is expected and where."""
    if type(x) is not np.ndarray and is_masked(x):
        raise TypeError(
            f"{what()}: expected an array of numbers, got a masked one ({type(x).__name__}), and "
            f"under a mask there is no number; {mend}"
        )


def refuse_masked_parameter(x: object, where: Callable[[], object]) -> None:
    """Raise if `x`, which is to be trained, is an array with a mask."""
    refuse_masked(x, lambda: f"at {where()}", "train its .data, or its .filled(0)")
