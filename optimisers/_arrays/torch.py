"""What the engine needs to know of PyTorch's tensors.

PyTorch is never imported here: whoever hands over a tensor has done so. A *view* is a NumPy array
over the memory of a tensor; one is made whenever it is needed and never kept, since a tensor may
get other memory at any time. What has no view (other devices and dtypes, tensors that are being
traced or transformed) is left to the array path.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .dlpack import Viewer
from .library import dtype_name, is_narrow, maywrite
from .states import map_state, parts_of_state

Tensor = Any


def is_tensor(x: object) -> bool:
    """Tell whether `x` is a tensor of PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def places(xs: Sequence[object], among: Sequence[int]) -> list[int]:
    """Return the places, of those given, where there is a tensor."""
    torch = sys.modules.get("torch")
    return [] if torch is None else [k for k in among if isinstance(xs[k], torch.Tensor)]


def is_mapped(x: object) -> bool:
    """Tell whether `x` stands for one tensor of each member that ``torch.vmap`` maps.

    Nobody can ask it for a number.
    """
    if not is_tensor(x):
        return False
    functorch = sys.modules["torch"]._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return bool(functorch.is_batchedtensor(x))


# --- views -----------------------------------------------------------------------------------


def view(x: Tensor) -> np.ndarray | None:
    """Return a view of a tensor, or None; a NumPy array is its own."""
    if type(x) is np.ndarray:
        return x
    quick = _viewer()
    if quick is not None and (seen := quick.view(x)) is not None:
        return seen
    torch: Any = sys.modules["torch"]
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or not x.is_cpu or x.is_neg():
        return None  # what looks like a view of these would be a copy
    if is_given_back(x):
        return None
    try:
        if x.dtype is torch.bfloat16:
            bfloat16 = _bfloat16()
            return bfloat16 and x.detach().view(torch.int16).numpy().view(bfloat16)
        return np.asarray(x.numpy(force=True))  # force: also where it requires a gradient
    except (RuntimeError, TypeError):
        return None


def is_given_back(x: Any) -> bool:
    """Tell whether a tensor shows numbers without memory: its storage was resized to less.

    PyTorch itself does not always ask, and reads from address 0, or behind the end.
    """
    if not is_tensor(x):
        return False
    torch: Any = sys.modules["torch"]
    if x.layout is not torch.strided or x.is_meta or not x.numel():
        return False
    if hasattr(x, "__tensor_flatten__"):  # as of DTensor: its numbers are in other tensors
        return any(is_given_back(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    try:
        has = x.untyped_storage().nbytes()
        if not x.data_ptr():
            return not has
        last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        return bool((x.storage_offset() + last + 1) * x.element_size() > has)
    except RuntimeError:  # a tensor that is being traced or transformed
        return False


def refuse_given_back(x: Tensor, state: Any, where: Callable[[], str]) -> None:
    """Raise if a parameter, or a tensor of its state, has no memory any more."""
    if is_given_back(x):
        raise ValueError(_GIVEN_BACK.format(what="parameter", where=where()))
    for part in parts_of_state(state, tuple):
        if is_tensor(part) and is_given_back(part):
            raise ValueError(_GIVEN_BACK.format(what="state", where=where()))


_GIVEN_BACK = (
    "{what} at {where}: expected a tensor with memory, got one whose storage was given back "
    "(untyped_storage().resize_(0)); gather or allocate it before the step"
)


@functools.cache
def _viewer() -> Viewer | None:
    """Return what makes views in a third of the time, unless this PyTorch does not help with it."""
    torch: Any = sys.modules["torch"]
    try:
        api = torch.Tensor.__dlpack_c_exchange_api__
        return Viewer(api, torch.Tensor, torch.nn.Parameter, lambda: _bfloat16())
    except (AttributeError, ImportError):
        return None


@functools.cache
def _bfloat16() -> np.dtype[Any] | None:
    """Return the dtype that NumPy does not have by itself."""
    try:
        found: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return None
    return found


def _view_state(state: Any) -> Any:
    """Return a state with views in place of its tensors; what has none is None."""
    return map_state(lambda part: view(part) if is_tensor(part) else part, state, into=tuple)


def viewers() -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]]:
    """Return the quickest functions that make views, of a tensor and of those in a state."""
    quick = _viewer()
    return (view, _view_state) if quick is None else (quick.view, quick.view_state)


def arrays(state: Any, x: Tensor, g: Tensor) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """Return views of state and parameter, and the gradient, in one order of axes; or None.

    The axes are ordered so that a dense parameter is contiguous, and a gradient in another order
    is copied.
    """
    if x.dtype.is_complex:  # which kernels do not take; and a view of NumPy pins a storage
        return None
    seen, grad = view(x), view(g)
    if seen is None or grad is None:
        return None
    state = _view_state(state)
    axes = _axes(seen)
    if axes is not None:
        seen, grad, state = seen.transpose(axes), grad.transpose(axes), _reordered(state, axes)
    ordered = np.ascontiguousarray if seen.flags.c_contiguous else np.asfortranarray
    return state, seen, ordered(grad).reshape(seen.shape)


def _axes(x: np.ndarray) -> tuple[int, ...] | None:
    """Return the axes by falling stride; None if `x` is contiguous as it stands."""
    if x.flags.c_contiguous or x.flags.f_contiguous:
        return None
    return tuple(sorted(range(x.ndim), key=lambda axis: (-x.strides[axis], -x.shape[axis])))


def _reordered(state: Any, axes: Sequence[int]) -> Any:
    def reordered(part: Any) -> Any:
        is_like_parameter = isinstance(part, np.ndarray) and part.ndim == len(axes)
        return part.transpose(axes) if is_like_parameter else part

    return map_state(reordered, state, into=tuple)


# --- what takes the place of a tensor ----------------------------------------------------------


def like(x: Tensor, new: Any) -> Tensor:
    """Return `new`, a tensor or what the kernels made of ``arrays(_, x, _)``, as one like `x`.

    It requires a gradient if `x` does, and is a `torch.nn.Parameter` if `x` is one.
    """
    torch: Any = sys.modules["torch"]
    new = _tensor(new, x).detach()
    if isinstance(x, torch.nn.Parameter):
        return type(x)(new, x.requires_grad)
    if x.requires_grad != new.requires_grad:
        with contextlib.suppress(RuntimeError):  # where `torch.func` sees to it
            new.requires_grad_(x.requires_grad)
    return new


def state_like(old: Any, new: Any, x: Tensor) -> Any:
    """Return the state that the kernels made of ``arrays(old, x, _)``, with tensors."""
    return map_state(lambda made, _: _tensor(made, x), new, old, into=tuple)


def _tensor(a: Any, x: Tensor) -> Tensor:
    if not isinstance(a, np.ndarray):
        return a
    seen = view(x)
    axes = None if seen is None or a.ndim != seen.ndim else _axes(seen)
    if axes is not None:
        a = a.transpose(np.argsort(axes))
    return from_numpy(a)


def from_numpy(a: np.ndarray) -> Tensor:
    """Return an array of NumPy as a tensor over the same memory, if PyTorch knows its dtype.

    Narrow numbers that it does not know become float32.
    """
    torch: Any = sys.modules["torch"]
    if not is_narrow(a) or a.dtype == np.float16:
        return torch.from_numpy(a)
    known = getattr(torch, dtype_name(a.dtype), None)
    if known is None:
        return torch.from_numpy(a.astype(np.float32))
    return torch.from_numpy(a.view(f"i{a.itemsize}")).view(known)


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a strided tensor on the host as an array; numbers that NumPy lacks in float32."""
    torch: Any = sys.modules["torch"]
    x = x.detach().resolve_conj().resolve_neg()
    if is_narrow(x) and x.dtype is not torch.float16:
        x = x.float()
    elif x.dtype is torch.complex32:
        x = x.to(torch.complex64)
    array: np.ndarray = x.numpy()
    return array


def fresh(x: Tensor) -> Tensor:
    """Return a copy that shares no memory, and no graph, with `x`."""
    return like(x, x.detach().clone())


def blank(x: Tensor) -> Tensor:
    """Return an empty tensor like `x`, outside of any graph."""
    return sys.modules["torch"].empty_like(x.detach())


def can_hold(x: Tensor, new: Any) -> bool:
    """Tell whether the numbers of `new` can be written into a tensor as they are."""
    torch: Any = sys.modules["torch"]
    if not is_tensor(new) or x.shape != new.shape or x.dtype != new.dtype:
        return False
    if x.device != new.device or x.layout is not torch.strided or not maywrite(x):
        return False
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return False
    try:
        x.data_ptr(), new.data_ptr()
    except RuntimeError:  # they are being traced or transformed
        return False
    return True


def writing(x: Tensor, new: Any) -> tuple[Any, Tensor]:
    """Return the call that writes into a tensor, also one that requires a gradient."""
    new = new if is_tensor(new) else from_numpy(np.array(new))
    return x.detach().copy_, new.detach()


def noting(xs: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """Return the call that tells autograd that these tensors change.

    Then it refuses graphs that hold them. The call is one of Python: the last, for `at_once`.
    """
    torch: Any = sys.modules["torch"]
    return torch.autograd.graph.increment_version, xs


def unrecorded(x: object) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autograd records nothing, if `x` is a tensor."""
    if not is_tensor(x):
        return contextlib.nullcontext()
    torch: Any = sys.modules["torch"]
    context: contextlib.AbstractContextManager[Any] = torch.no_grad()
    return context


# --- narrow numbers ----------------------------------------------------------------------------


def widened(x: Tensor) -> Tensor:
    """Return float32 of narrower numbers; derivatives back stay finite, as `_jax.widened` says."""
    return _widening().apply(x) if x.requires_grad else x.to(sys.modules["torch"].float32)


@functools.cache
def _widening() -> Any:
    """Return the function: a cast whose transpose is bounded by the dtype that it goes back to."""
    torch: Any = sys.modules["torch"]

    class Widened(torch.autograd.Function):  # type: ignore[misc]
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.to(torch.float32)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.dtype = inputs[0].dtype

        @staticmethod
        def backward(ctx: Any, derivative: Tensor) -> Tensor:
            most = torch.finfo(ctx.dtype).max
            return derivative.clamp(-most, most).to(ctx.dtype)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return tangent.to(torch.float32)

    return Widened


# --- gradients ---------------------------------------------------------------------------------


def gradient(g: Any, x: Tensor, where: Callable[[], str]) -> Tensor:
    """Return `g` as a dense tensor of the dtype of a step on `x`, outside of any graph.

    Raises
    ------
    TypeError, ValueError
        If `g` is no gradient for `x`; the message names the place, from `where()`.
    """
    torch: Any = sys.modules["torch"]

    def wanted() -> str:
        shape = tuple(x.shape)
        return f"gradient at {where()}: expected a tensor of shape {shape} and dtype {x.dtype}"

    if not is_tensor(g):
        a = np.asarray(g)
        if a.dtype.kind not in "biufc" and not is_narrow(a):
            raise TypeError(f"{wanted()}, got dtype {a.dtype}")
        plain = np.array(a, a.dtype.newbyteorder("="), order="C")
        if plain.dtype == np.longdouble and plain.dtype != np.float64:
            plain = plain.astype(np.float64)
        g = from_numpy(plain).to(x.device)
    if is_given_back(g):
        raise ValueError(_GIVEN_BACK.format(what="gradient", where=where()))
    if g.layout is not torch.strided:
        kind = str(g.layout).removeprefix("torch.")
        raise TypeError(
            f"{wanted()}, got one with the layout {kind}; make it dense with .to_dense(), or the "
            "layer that it comes from with sparse=False"
        )
    if g.dtype.is_complex and not x.dtype.is_complex:
        raise TypeError(
            f"{wanted()}, got complex numbers ({g.dtype}); "
            "take the real part if that is what is meant"
        )
    if g.shape != x.shape:
        raise ValueError(f"{wanted()}, got shape {tuple(g.shape)}")
    if g.device != x.device:
        raise ValueError(
            f"{wanted()} on {x.device}, got one on {g.device}; move it with .to({str(x.device)!r})"
        )
    dtype = torch.float32 if is_narrow(x) else x.dtype
    return g.detach().to(dtype).resolve_conj().resolve_neg()


def as_numpy(g: Tensor, where: Callable[[], str]) -> np.ndarray:
    """Return a tensor, given as the gradient of a NumPy array, as an array."""
    torch: Any = sys.modules["torch"]
    if g.layout is not torch.strided or not g.is_cpu:
        kind = g.device if g.layout is torch.strided else g.layout
        raise ValueError(
            f"gradient at {where()}: expected what NumPy can read, got a tensor on {kind}; "
            "write .cpu(), or .to_dense() where it is sparse"
        )
    if is_given_back(g):
        raise ValueError(_GIVEN_BACK.format(what="gradient", where=where()))
    return to_numpy(g)
