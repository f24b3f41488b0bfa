from libc.math cimport fabs, fabsf

# The values are NumPy's, bit for bit, so that a step means the same here and there. Each is one
# expression without `or`, which compilers turn into vector instructions.

cdef inline real sqrt(real x) noexcept nogil:
    if real is float:
        return sqrtf(x)
    else:
        return c_sqrt(x)

cdef inline real absolute(real x) noexcept nogil:
    if real is float:
        return fabsf(x)
    else:
        return fabs(x)

cdef inline real abs2(real x) noexcept nogil:
    return x * x

cdef inline real sign(real x) noexcept nogil:
    return 1 if x > 0 else -1 if x < 0 else x + 0       # nan stays nan, -0 becomes 0

cdef inline real maximum(real x, real y) noexcept nogil:
    return x if (x > y) | (x != x) else y

cdef inline real minimum(real x, real y) noexcept nogil:
    return x if (x < y) | (x != x) else y

cdef inline real clip(real x, real low, real high) noexcept nogil:
    if (low < 0) & (high > 0):      # asked before the loop: then no limit ties with another zero,
        x = low if low > x else x   # and each line is one instruction, which keeps nan
        return high if high < x else x
    x = low if x <= low else x
    return high if x >= high else x

cdef inline real where(bint condition, real x, real y) noexcept nogil:
    return x if condition else y

cdef inline real zeros_like(real x) noexcept nogil:
    return 0
