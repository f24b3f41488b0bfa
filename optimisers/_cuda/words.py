"""The vocabulary of device code: numbers, words, memory; on a GPU and in Numba's simulator.

`vocabulary` returns the meaning of the names in the texts of kernels. On hardware, memory is a
typed pointer made from an address, and one access moves 128 bits; both need intrinsics, which write
LLVM code. In the simulator an address is one of host memory, shown by NumPy, so that texts, tables
and addresses are the same there.

Numba is imported at the first call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .._arrays.dtypes import numpy_dtype
from .._steps.compiled import DEVICE_WORDS, scalar_words

LANES = {"float32": 4, "float64": 2}
"""How many numbers 128 bits hold, by dtype."""


def is_simulated() -> bool:
    """Tell whether Numba simulates a GPU, by ``NUMBA_ENABLE_CUDASIM=1``."""
    return bool(importlib.import_module("numba").config.ENABLE_CUDASIM)


def vocabulary(real: str, grad: str, narrow: str) -> dict[str, Any]:
    """Return the names in the text of a kernel.

    Parameters
    ----------
    real, grad, narrow : str
        The dtypes of the computation, of the gradient, and of the rounded parameter.
    """
    made = _simulated if is_simulated() else _hardware
    return made(real, grad, narrow)


# --- hardware --------------------------------------------------------------------------------


def _hardware(real: str, grad: str, narrow: str) -> dict[str, Any]:
    from numba import cuda

    jit = cuda.jit(device=True)
    load, store = _vector_access(LANES[real])
    number = getattr(np, real)
    wide_words = scalar_words(DEVICE_WORDS, np.float64)
    return {
        **{name: jit(word) for name, word in scalar_words(DEVICE_WORDS, number).items()},
        **{f"wide_{name}": jit(word) for name, word in wide_words.items()},
        "jit": jit,
        "cuda": cuda,
        "math": math,
        "number": number,
        "double": np.float64,
        "power": math.pow,
        "isfinite": math.isfinite,
        "real_at": _pointer_to(real),
        "grad_at": _pointer_to(grad),
        "narrow_at": _pointer_to(narrow),
        "load": load,
        "store": store,
        "widen": jit(_widener(number, grad)),
        "round": jit(_rounder(narrow)),
    }


@functools.cache
def memory_type(dtype: str) -> Any:
    """Return Numba's type of a number in memory of this dtype; one of bfloat16 is its bits."""
    from numba.cuda import types

    return types.uint16 if dtype == "bfloat16" else getattr(types, dtype)


@functools.cache
def _pointer_to(dtype: str) -> Any:
    """Return an intrinsic that makes an address a pointer into the GPU's global memory."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    element = memory_type(dtype)

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.get_data_type(element)
            in_global = builder.inttoptr(args[0], ir.PointerType(data, 1))
            return builder.addrspacecast(in_global, ir.PointerType(data))

        return types.CPointer(element)(types.int64), generate

    return pointer


@functools.cache
def _vector_access(lanes: int) -> tuple[Any, Any]:
    """Return intrinsics that load and store so many numbers at once, aligned to their size."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    def place(context: Any, builder: Any, of: Any, pointer: Any, at: Any) -> tuple[Any, Any, int]:
        vector = ir.VectorType(context.get_data_type(of.dtype), lanes)
        whole = builder.bitcast(pointer, vector.as_pointer())
        # No access is wider than 128 bits, and the host has checked that alignment alone.
        align = min(lanes * of.dtype.bitwidth // 8, 16)
        return builder.gep(whole, [at]), vector, align

    @intrinsic
    def load(typing_context: Any, pointer: Any, at: Any) -> Any:
        signature = types.UniTuple(pointer.dtype, lanes)(pointer, types.int64)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, _, align = place(context, builder, signature.args[0], *args)
            vector = builder.load(source)
            vector.align = align
            index = map(ir.Constant, [ir.IntType(32)] * lanes, range(lanes))
            items = [builder.extract_element(vector, k) for k in index]
            return context.make_tuple(builder, signature.return_type, items)

        return signature, generate

    @intrinsic
    def store(typing_context: Any, pointer: Any, at: Any, values: Any) -> Any:
        signature = types.void(pointer, types.int64, types.UniTuple(pointer.dtype, lanes))

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, form, align = place(context, builder, signature.args[0], *args[:2])
            vector = ir.Constant(form, ir.Undefined)
            for k in range(lanes):
                item = builder.extract_value(args[2], k)
                vector = builder.insert_element(vector, item, ir.Constant(ir.IntType(32), k))
            builder.store(vector, target).align = align
            return context.get_dummy_value()

        return signature, generate

    return load, store


def _widener(number: type, grad: str) -> Callable[[Any], Any]:
    """Return a word that converts a number of the gradient to the dtype of the computation."""
    if grad != "bfloat16":

        def widen(x: Any) -> Any:
            return number(x)

        return widen
    from_bits, _ = _bfloat16_words()

    def widen_bits(x: Any) -> Any:
        return number(from_bits(x))

    return widen_bits


def _rounder(narrow: str) -> Callable[[Any], Any]:
    """Return a word that rounds a number to the dtype of a narrow parameter."""
    number = memory_type(narrow)
    if narrow != "bfloat16":

        def rounded(x: Any) -> Any:
            return number(x)

        return rounded
    _, to_bits = _bfloat16_words()
    single = np.float32

    def rounded_bits(x: Any) -> Any:
        return to_bits(single(x))

    return rounded_bits


@functools.cache
def _bfloat16_words() -> tuple[Any, Any]:
    """Return intrinsics that convert bits of bfloat16 to float32, and back to nearest even."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    word, half = ir.IntType(32), ir.IntType(16)

    @intrinsic
    def from_bits(typing_context: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            wide = builder.shl(builder.zext(args[0], word), word(16))
            return builder.bitcast(wide, ir.FloatType())

        return types.float32(types.uint16), generate

    @intrinsic
    def to_bits(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits = builder.bitcast(args[0], word)
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            near = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
            sign = builder.and_(builder.lshr(bits, word(16)), word(0x8000))
            size = builder.and_(bits, word(0x7FFFFFFF))
            is_nan = builder.icmp_unsigned(">", size, word(0x7F800000))
            found = builder.select(is_nan, builder.or_(sign, word(0x7FC0)), near)
            return builder.trunc(found, half)

        return types.uint16(types.float32), generate

    return from_bits, to_bits


# --- the simulator ---------------------------------------------------------------------------


def _simulated(real: str, grad: str, narrow: str) -> dict[str, Any]:
    from numba import cuda

    number, lanes, rounded = getattr(np, real), LANES[real], numpy_dtype(narrow).type

    def load(memory: Any, at: int) -> tuple[Any, ...]:
        return tuple(memory[lanes * at : lanes * (at + 1)])

    def store(memory: Any, at: int, values: tuple[Any, ...]) -> None:
        memory[lanes * at : lanes * (at + 1)] = values

    wide_words = scalar_words(DEVICE_WORDS, np.float64, np)
    return {
        **scalar_words(DEVICE_WORDS, number, np),
        **{f"wide_{name}": word for name, word in wide_words.items()},
        "jit": lambda function: function,
        "cuda": cuda,
        "number": number,
        "double": np.float64,
        "power": np.power,
        "isfinite": np.isfinite,
        "real_at": functools.partial(_host_memory, real),
        "grad_at": functools.partial(_host_memory, grad),
        "narrow_at": functools.partial(_host_memory, narrow),
        "load": load,
        "store": store,
        "widen": number,
        "round": rounded,
    }


def _host_memory(dtype: str, address: int) -> np.ndarray | None:
    """Return the memory from an address on as an array without an end, like a pointer."""
    if not address:
        return None
    number, room = numpy_dtype(dtype), 2**40
    endless: Any = (ctypes.c_char * (room * number.itemsize)).from_address(int(address))
    return np.ndarray((room,), number, endless)
