"""Tensors of PyTorch.

A *view* is a NumPy array over the memory of a tensor. It is made when it is needed and never kept,
since a tensor may be given other memory at any time. Tensors without a view (on other devices, of
other dtypes, traced or transformed) are left to the array path.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from . import traced
from .devices import DeviceLibrary
from .dlpack import Viewer
from .dtypes import dtype_name, is_narrow
from .layout import Memory, View, overlaps_itself
from .library import Call
from .states import map_state, parts_of_state

Tensor = Any


def is_tensor(x: object) -> bool:
    """Tell whether `x` is a tensor of PyTorch."""
    return isinstance(x, torch.Tensor)


class Torch(DeviceLibrary):
    """The CPU kernels take views of tensors, the CUDA kernels take tensors themselves."""

    key = "torch"
    name = "PyTorch"
    sums_truth = True
    to_host = ".cpu()"
    to_device = ".cuda()"
    has_views = True
    by_views = True
    loses_memory = True
    keeps_order = True
    reads_bytes = True
    sums_ties = True
    as_float = ".to(float)"

    # --- which arrays ------------------------------------------------------------------------

    def owns(self, cls: type) -> bool:
        return issubclass(cls, torch.Tensor)

    def is_numeric(self, x: Tensor) -> bool:
        return bool(x.dtype.is_floating_point or x.dtype.is_complex)

    def is_traced(self, x: Tensor) -> bool:
        return self.is_abstract(x)

    def is_abstract(self, x: Tensor) -> bool:
        """Tell whether `x` stands for one tensor of each member that ``torch.vmap`` maps."""
        functorch = torch._C._functorch
        while functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        return bool(functorch.is_batchedtensor(x))

    def may_write(self, x: Tensor) -> bool:
        return x.layout is not torch.strided or not overlaps_itself(x.shape, x.stride(), 1)

    def is_on_device(self, x: Tensor) -> bool:
        """Tell whether its memory holds its numbers, on a device of CUDA, not of ROCm."""
        return bool(
            x.is_cuda
            and torch.version.hip is None
            and x.layout is torch.strided
            and type(x) in (torch.Tensor, torch.nn.Parameter)
            and not (x.is_conj() or x.is_neg())
        )

    def has_lost(self, x: Tensor) -> bool:
        return is_given_back(x)

    def refuse_lost(self, x: Tensor, state: Any, where: Callable[[], str]) -> None:
        if is_given_back(x):
            raise ValueError(_GIVEN_BACK.format(what="parameter", where=where()))
        for part in parts_of_state(state, tuple):
            if is_tensor(part) and is_given_back(part):
                raise ValueError(_GIVEN_BACK.format(what="state", where=where()))

    # --- layout ------------------------------------------------------------------------------

    def byte_strides(self, x: Tensor) -> tuple[int, ...]:
        return tuple(step * x.element_size() for step in x.stride())

    def is_c_contiguous(self, x: Tensor) -> bool:
        return bool(x.is_contiguous())

    def memory(self, x: Tensor) -> Memory | None:
        if 0 in x.shape or x.layout is not torch.strided or x.is_meta:
            return None
        try:
            address = x.data_ptr()
        except RuntimeError:  # a tensor that is being traced or transformed
            return None
        if not address:
            return None
        meaning = x.dtype, x.is_conj(), x.is_neg()
        shape, size = tuple(x.shape), x.element_size()
        return Memory(address, shape, self.byte_strides(x), size, meaning, str(x.device))

    def transposed(self, x: Tensor, order: Sequence[int]) -> Tensor:
        return x.permute(tuple(order))

    def flipped(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.flip(tuple(axes))  # PyTorch has no negative strides

    def reshaped(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape(shape)

    def view(self, x: Tensor) -> np.ndarray | None:
        return view(x)

    def views(self, state: Any, x: Tensor, g: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
        return arrays(state, x, g)

    # --- on a device -------------------------------------------------------------------------

    def address(self, x: Tensor) -> int:
        return int(x.data_ptr())

    def layout(self, x: Tensor) -> tuple[Any, ...]:
        return x.shape, x.stride(), x.dtype

    def strides(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.stride())

    def device(self, x: Tensor) -> int:
        return int(x.get_device())

    def stream(self, x: Tensor) -> int:
        return int(torch.cuda.current_stream(x.device).cuda_stream)

    def assign(self, x: Tensor, values: Any) -> None:
        with torch.no_grad():
            if isinstance(values, float):
                x.fill_(values)
            else:
                x.copy_(self.adopt(values))

    def adopt(self, g: Any) -> Tensor:
        return g if is_tensor(g) else torch.as_tensor(g, device="cuda")

    # --- new arrays --------------------------------------------------------------------------

    def blank(self, x: Tensor, dtype: str | None = None) -> Tensor:
        if dtype is None:
            return torch.empty_like(x.detach())
        return torch.empty_like(x.detach(), dtype=getattr(torch, dtype))

    def fresh(self, x: Tensor) -> Tensor:
        return like(x, x.detach().clone())

    def copied(self, x: Tensor) -> Tensor:
        return x.clone()

    def constant(self, x: Tensor) -> Tensor:
        return x.detach()

    def count_like(self, x: Tensor) -> Tensor:
        # On the host, wherever new tensors would go by default.
        return torch.asarray(0, dtype=torch.int64, device="cpu")

    def counted(self, t: Tensor, largest: int) -> Tensor:
        return t.clamp(max=largest - 1) + 1  # it may be mapped, so that its value is not known

    def number_of(self, t: Tensor) -> Any:
        return t.double() if self.is_abstract(t) else int(t)

    def own_dtype(self, x: Tensor, dtype: Any) -> Any:
        return getattr(torch, dtype_name(dtype))

    def widened(self, x: Tensor) -> Tensor:
        """Return float32 of narrower numbers; derivatives back stay finite: `traced.widened`."""
        return _widening().apply(x) if x.requires_grad else x.to(torch.float32)

    def number(self, traced: Tensor, real: Any) -> Tensor:
        return traced.to(real)

    def numbers(self, x: Tensor, values: Sequence[Any]) -> tuple[Any, ...]:
        tensors = {k: n.to(x.real.dtype) for k, n in enumerate(values) if self._stays(n)}
        if not tensors:
            return super().numbers(x, values)
        others = super().numbers(x, [0.0 if k in tensors else n for k, n in enumerate(values)])
        return tuple(tensors.get(k, n) for k, n in enumerate(others))

    def _stays(self, n: Any) -> bool:
        """Tell whether a number stays a tensor: it is recorded, or the host would wait for it."""
        return is_tensor(n) and (n.requires_grad or self.is_on_device(n))

    # --- measured numbers --------------------------------------------------------------------

    def for_sums(self, x: Tensor) -> Tensor:
        if x.device.type == "mps":  # which has no double
            return super().for_sums(x)
        return x.to(torch.complex128 if x.is_complex() else torch.float64)

    def measured(self, value: Tensor) -> Any:
        return value if value.requires_grad else super().measured(value)

    def vector_like(self, x: Tensor, values: Sequence[float]) -> Tensor:
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        return torch.tensor([*values], dtype=dtype, device=x.device)

    def stacked(self, values: Sequence[Any], like: Tensor) -> Tensor:
        made = [torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in values]
        return torch.stack(made)

    # --- a step ------------------------------------------------------------------------------

    def bare(self, x: Tensor) -> Tensor:
        return x.detach()

    def unrecorded(self) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any] = torch.no_grad()
        return context

    def refuse_write(self, x: Tensor, new: Any, where: Callable[[], str]) -> None:
        if is_tensor(new) and self.is_abstract(new) and not self.is_abstract(x):
            raise TypeError(
                f"at {where()}: update_ cannot write what torch.vmap maps into a tensor that it "
                "does not map; use update, which returns new ones"
            )

    def can_hold(self, x: Tensor, new: Any) -> bool:
        if not is_tensor(new) or x.shape != new.shape or x.dtype != new.dtype:
            return False
        if x.device != new.device or x.layout is not torch.strided or not self.may_write(x):
            return False
        if x.is_inference() and not torch.is_inference_mode_enabled():
            return False
        try:
            x.data_ptr(), new.data_ptr()
        except RuntimeError:  # they are being traced or transformed
            return False
        return True

    def write_call(self, x: Tensor, new: Any) -> Call:
        """Return the call that writes into a tensor, also one that requires a gradient."""
        new = new if is_tensor(new) else from_numpy(np.array(new))
        return x.detach().copy_, new.detach()

    def note_call(self, xs: list[Tensor]) -> Call:
        """Return the call that tells autograd that these tensors change.

        Then it refuses graphs that hold them. The call is one of Python: the last, for `at_once`.
        """
        return torch.autograd.graph.increment_version, xs

    def like(self, x: Tensor, new: Any) -> Tensor:
        return like(x, new)

    def state_like(self, old: Any, new: Any, x: Tensor) -> Any:
        return state_like(old, new, x)

    def shown_like(self, x: Tensor, new: Tensor) -> Tensor:
        return like(x, new) if x.is_leaf else new

    def viewers(self) -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]]:
        quick = _viewer()
        return (view, _view_state) if quick is None else (quick.view, quick.view_state)

    # --- words of steps ----------------------------------------------------------------------

    def beside(self, x: Tensor, y: Any) -> Tensor:
        # On the host, wherever new tensors would go by default.
        return torch.asarray(y, dtype=x.dtype, device="cpu")

    def sqrt(self, x: Tensor) -> Tensor:
        differentiates = torch.is_grad_enabled()
        return traced.differentiable_sqrt(torch, x) if differentiates else torch.sqrt(x)

    def sign(self, x: Tensor) -> Tensor:
        """Return the sign, by `where`: tensors that are sharded or mapped take no mask."""
        if x.is_complex():
            zero = x == 0
            return torch.where(zero, torch.zeros_like(x), x / torch.where(zero, 1, x).abs())
        return torch.where(torch.isnan(x), x, torch.sign(x))

    # --- gradients ---------------------------------------------------------------------------

    def gradient(self, g: Any, x: Tensor, where: Callable[[], str]) -> Tensor:
        """Return `g` as a dense tensor of the dtype of a step on `x`, outside of any graph."""
        if not is_tensor(g):
            if self.is_on_device(x):
                return super().gradient(g, x, where)
            g = _tensor_of(g, x, where)
        if is_given_back(g):
            raise ValueError(_GIVEN_BACK.format(what="gradient", where=where()))
        if g.layout is not torch.strided:
            kind = str(g.layout).removeprefix("torch.")
            raise TypeError(
                f"{_wanted(x, where)}, got one with the layout {kind}; make it dense with "
                ".to_dense(), or the layer that it comes from with sparse=False"
            )
        if g.dtype.is_complex and not x.dtype.is_complex:
            raise TypeError(
                f"{_wanted(x, where)}, got complex numbers ({g.dtype}); "
                "take the real part if that is what is meant"
            )
        if g.shape != x.shape:
            raise ValueError(f"{_wanted(x, where)}, got shape {tuple(g.shape)}")
        if g.device != x.device:
            raise ValueError(
                f"{_wanted(x, where)} on {x.device}, got one on {g.device}; "
                f"move it with .to({str(x.device)!r})"
            )
        dtype = torch.float32 if is_narrow(x) else x.dtype
        return g.detach().to(dtype).resolve_conj().resolve_neg()

    def for_numpy(self, g: Tensor, x: np.ndarray, where: Callable[[], str]) -> np.ndarray:
        if g.layout is not torch.strided or not g.is_cpu:
            kind = g.device if g.layout is torch.strided else g.layout
            raise ValueError(
                f"gradient at {where()}: expected what NumPy can read, got a tensor on {kind}; "
                "write .cpu(), or .to_dense() where it is sparse"
            )
        if is_given_back(g):
            raise ValueError(_GIVEN_BACK.format(what="gradient", where=where()))
        return to_numpy(g)

    def is_nonzero(self, g: Tensor) -> bool:
        g = g if g.layout is torch.strided else g.to_dense()
        g = g.float() if is_narrow(g) else g  # PyTorch counts no zeros in 8 bits
        return bool(g.count_nonzero())

    # --- between libraries -------------------------------------------------------------------

    def to_numpy(self, x: Tensor) -> np.ndarray:
        seen = view(x.detach())  # also of bfloat16
        return to_numpy(x) if seen is None else seen

    def from_numpy(self, a: np.ndarray, like: Tensor) -> Tensor:
        return from_numpy(np.array(a)).to(like.device)

    def converted(self, x: Tensor, dtype: Any, copy: bool) -> Tensor:
        wanted = self.own_dtype(x, dtype)
        if x.dtype.is_complex and not wanted.is_complex:
            x = torch.real(x)
        if x.dtype != wanted:
            return x.to(wanted)
        return x.clone() if copy else x

    def _zeros(self, shape: tuple[int, ...], dtype: Any, like: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    # --- files -------------------------------------------------------------------------------

    def why_unsavable(self, x: Tensor) -> str:
        if x.is_meta:
            return "it has no data"
        return "" if x.layout is torch.strided else f"its layout is {x.layout}; make it dense"

    def on_host(self, x: Tensor) -> np.ndarray:
        """Return the bytes: NumPy does not have every dtype."""
        flat = x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)

    def from_bytes(self, raw: np.ndarray, dtype: str, layout: View, like: Tensor) -> Tensor:
        kind = getattr(torch, dtype)
        flat = torch.from_numpy(raw).view(kind) if raw.size else torch.empty(0, dtype=kind)
        x = flat.reshape(layout.shape)
        if not layout.is_c_order():
            x = self.seen(self.unseen(x, layout).contiguous(), layout)
        return x.to(like.device)

    def loaded(self, a: Tensor, like: Tensor) -> Tensor:
        if isinstance(like, torch.nn.Parameter):
            return type(like)(a, like.requires_grad)
        return a.requires_grad_(like.requires_grad) if like.requires_grad else a


def _wanted(x: Tensor, where: Callable[[], str]) -> str:
    shape = tuple(x.shape)
    return f"gradient at {where()}: expected a tensor of shape {shape} and dtype {x.dtype}"


def _tensor_of(g: Any, x: Tensor, where: Callable[[], str]) -> Tensor:
    """Return a gradient of another library, or a number, as a tensor where `x` lies."""
    a = np.asarray(g)
    if a.dtype.kind not in "biufc" and not is_narrow(a):
        raise TypeError(f"{_wanted(x, where)}, got dtype {a.dtype}")
    plain = np.array(a, a.dtype.newbyteorder("="), order="C")
    if plain.dtype == np.longdouble and plain.dtype != np.float64:
        plain = plain.astype(np.float64)
    return from_numpy(plain).to(x.device)


# --- views -----------------------------------------------------------------------------------


def view(x: Tensor) -> np.ndarray | None:
    """Return a view of a tensor, or None; a NumPy array is its own."""
    if type(x) is np.ndarray:
        return x
    quick = _viewer()
    if quick is not None and (seen := quick.view(x)) is not None:
        return seen
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or not x.is_cpu or x.is_neg():
        return None  # a view of these would be a copy
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


_GIVEN_BACK = (
    "{what} at {where}: expected a tensor with memory, got one whose storage was given back "
    "(untyped_storage().resize_(0)); gather or allocate it before the step"
)


@functools.cache
def _viewer() -> Viewer | None:
    """Return an object that makes views in a third of the time; None if it cannot be made."""
    try:
        api = torch.Tensor.__dlpack_c_exchange_api__
        return Viewer(api, torch.Tensor, torch.nn.Parameter, lambda: _bfloat16())
    except (AttributeError, ImportError):
        return None


@functools.cache
def _bfloat16() -> np.dtype[Any] | None:
    """Return NumPy's dtype for bfloat16, which `ml_dtypes` defines; None without that."""
    try:
        found: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return None
    return found


def _view_state(state: Any) -> Any:
    """Return a state with views in place of its tensors; None where a tensor has no view."""
    return map_state(lambda part: view(part) if is_tensor(part) else part, state, into=tuple)


def arrays(state: Any, x: Tensor, g: Tensor) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """Return views of state and parameter, and the gradient, in one order of axes; or None.

    The axes are ordered so that a dense parameter is contiguous, and a gradient in another order
    is copied.
    """
    if x.dtype.is_complex:  # the kernels take none, and a view of NumPy pins its storage
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
    if not is_narrow(a) or a.dtype == np.float16:
        return torch.from_numpy(a)
    known = getattr(torch, dtype_name(a.dtype), None)
    if known is None:
        return torch.from_numpy(a.astype(np.float32))
    return torch.from_numpy(a.view(f"i{a.itemsize}")).view(known)


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a strided tensor on the host as an array; numbers that NumPy lacks in float32."""
    x = x.detach().resolve_conj().resolve_neg()
    if is_narrow(x) and x.dtype is not torch.float16:
        x = x.float()
    elif x.dtype is torch.complex32:
        x = x.to(torch.complex64)
    array: np.ndarray = x.numpy()
    return array


# --- narrow numbers ----------------------------------------------------------------------------


@functools.cache
def _widening() -> Any:
    """Return the function: a cast whose transpose is clipped to the range of the narrow dtype."""

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


LIBRARY = Torch()
