cimport numpy as cnp
from libc.math cimport fabs, pow
from libc.stdint cimport uint16_t
from libc.string cimport memcpy

cdef inline double joined(Reduction kind, double a, double b) noexcept nogil:
    if kind == LARGEST or kind == MOST:
        return maximum(a, b)
    if kind == SMALLEST:
        return minimum(a, b)
    return a + b


cdef void subtract(const void* x_, void* out_, const void* dx_, Py_ssize_t start, Py_ssize_t n,
                   bint withheld, real unused=0) noexcept nogil:
    cdef const real* x = <const real*> x_ + start
    cdef const real* dx = <const real*> dx_
    cdef real* out = <real*> out_ + start
    cdef Py_ssize_t i
    if not withheld:
        for i in range(n):
            out[i] = x[i] - dx[i]
    elif out != x:
        memcpy(out, x, n * sizeof(real))


cdef inline void copy(void* to, const void* from_, Py_ssize_t bytes) noexcept nogil:
    """Copy bytes in order, from the first to the last; memcpy promises no order.

    Between places equally far into a page, where the same numbers of large arrays often lie, that
    of glibc goes backwards, and the processor does not fetch ahead.
    """
    cdef Py_ssize_t i
    for i in range(bytes):
        (<unsigned char*> to)[i] = (<const unsigned char*> from_)[i]


cdef void widen(Kind kind, const void* source, void* target, Py_ssize_t n) noexcept nogil:
    """Convert numbers of a narrow kind to the dtype of their master."""
    cdef const float* singles = <const float*> source
    cdef Py_ssize_t i
    if kind == FLOAT16:
        widen_float16s(<const uint16_t*> source, <float*> target, n)
    elif kind == BFLOAT16:
        widen_bfloat16s(<const uint16_t*> source, <float*> target, n)
    else:
        for i in range(n):
            (<double*> target)[i] = singles[i]


cdef void hand_on(Segment* leaf, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """Round a block of a master copy into the parameter."""
    cdef Py_ssize_t size = number_size(leaf, leaf.of_parameter)
    cdef const char* before = leaf.unrounded + start * size
    cdef char* target = leaf.rounded + start * size
    if not leaf.withheld:
        round_into(leaf.of_parameter, leaf.out + start * number_size(leaf, SAME), target, n, size)
    elif target != before:
        memcpy(target, before, n * size)


cdef void round_into(Kind kind, const void* source, void* target, Py_ssize_t n,
                     Py_ssize_t size) noexcept nogil:
    cdef const double* doubles = <const double*> source
    cdef Py_ssize_t i
    if kind == SAME:
        memcpy(target, source, n * size)
    elif kind == FLOAT16:
        narrow_float16s(<const float*> source, <uint16_t*> target, n)
    elif kind == BFLOAT16:
        narrow_bfloat16s(<const float*> source, <uint16_t*> target, n)
    else:
        for i in range(n):
            (<float*> target)[i] = <float> doubles[i]


cdef inline void keep(Kind kind, const void* source, void* slot, Py_ssize_t n) noexcept nogil:
    """Round numbers into a narrow slot that still has its old ones: see `rules._numbers.kept_as`.
    """
    if kind == FLOAT16:
        keep_float16s(<const float*> source, <uint16_t*> slot, n)
    else:
        keep_bfloat16s(<const float*> source, <uint16_t*> slot, n)


def kept(cnp.ndarray slot, cnp.ndarray singles):
    """Return the new numbers of a narrow slot for as many in float32; for tests."""
    cdef cnp.ndarray made = slot.copy()
    cdef int kind = kind_beside(slot, cnp.NPY_FLOAT)
    if kind != FLOAT16 and kind != BFLOAT16:
        raise TypeError(f"expected float16 or bfloat16, got {slot.dtype}")
    if not ready(singles, cnp.NPY_FLOAT, True) or not same_shape(slot, singles):
        raise TypeError("expected an array of float32 in C order, of the shape of the slot")
    if not ready(made, cnp.PyArray_TYPE(slot), True):
        raise TypeError("expected a slot in native byte order")
    keep(<Kind> kind, cnp.PyArray_DATA(singles), cnp.PyArray_DATA(made), cnp.PyArray_SIZE(made))
    return made


cdef void accumulate(const void* g_, Py_ssize_t n, double* lanes, Reduction kind, double p,
                     double unit, real unused=0) noexcept nogil:
    """Combine number i of a block into lane i % LANES."""
    cdef const real* g = <const real*> g_
    cdef double sums[LANES]             # a copy, which stays in registers
    cdef Py_ssize_t whole = n // LANES, i
    cdef int j
    cdef double v
    memcpy(sums, lanes, sizeof(sums))
    if kind == SQUARES:
        for i in range(whole):
            for j in range(LANES):
                v = g[LANES * i + j]
                sums[j] += v * v
    elif kind == ABSOLUTE:
        for i in range(whole):
            for j in range(LANES):
                sums[j] += fabs(<double> g[LANES * i + j])
    elif kind == LARGEST:
        for i in range(whole):
            for j in range(LANES):
                sums[j] = maximum(sums[j], fabs(<double> g[LANES * i + j]))
    elif kind == PLAIN:
        for i in range(whole):
            for j in range(LANES):
                sums[j] += g[LANES * i + j]
    else:
        whole = 0
    for i in range(LANES * whole, n):
        j = i % LANES
        v = fabs(<double> g[i])
        if kind == PLAIN:
            sums[j] += g[i]
        elif kind == MOST:
            sums[j] = maximum(sums[j], <double> g[i])
        elif kind == SQUARES:
            sums[j] += v * v
        elif kind == ABSOLUTE:
            sums[j] += v
        elif kind == LARGEST:
            sums[j] = maximum(sums[j], v)
        elif kind == SMALLEST:
            sums[j] = minimum(sums[j], v)
        elif kind == NONZERO:
            sums[j] += v != 0
        else:
            sums[j] += pow(v / unit, p)
    memcpy(lanes, sums, sizeof(sums))
