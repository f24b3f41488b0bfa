# Written by tools/emit_steps.py from words.py and the steps of the rules. Do not edit.

# The words, for one number.


cdef extern from "<math.h>" nogil:
    float c_sqrtf "sqrtf"(float)
    double c_sqrt "sqrt"(double)
    float c_fabsf "fabsf"(float)
    double c_fabs "fabs"(double)


cdef inline real sqrt(real x) noexcept nogil:
    if real is float:
        return c_sqrtf(x)
    else:
        return c_sqrt(x)


cdef inline real absolute(real x) noexcept nogil:
    if real is float:
        return c_fabsf(x)
    else:
        return c_fabs(x)


cdef inline real abs2(real x) noexcept nogil:
    return x * x


cdef inline real sign(real x) noexcept nogil:
    return 1 if x > 0 else -1 if x < 0 else x + 0


cdef inline real maximum(real x, real y) noexcept nogil:
    return x if (x > y) | (x != x) else y


cdef inline real minimum(real x, real y) noexcept nogil:
    return x if (x < y) | (x != x) else y


cdef inline real clip(real x, real low, real high) noexcept nogil:
    if (low < 0) & (high > 0):
        x = low if low > x else x
        return high if high < x else x
    x = low if (x <= low) | (low != low) else x
    return high if (x >= high) | (high != high) else x


cdef inline real where(bint condition, real x, real y) noexcept nogil:
    return x if condition else y


cdef inline real zeros_like(real x) noexcept nogil:
    return 0


# A block step: x, g and the old slots are read, dx and the new slots written, n numbers each.
# One that finishes a chain finds x in place of dx, and leaves there x - dx. Where it is fused with
# others ahead of it, coefs are those of all, one after another.
# A measure reads x, g and the old slots, and writes its terms where further slots would stand.


cdef void _Scale_float_loop(
    const_float_p x_in, const_float_p dx_in, float_p dx_out,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, x
    cdef float eta = coefs[0]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        dx_out[index] = eta * dx


cdef void _Scale_float(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_float_loop(
        <const float*> x, <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void _Scale_double_loop(
    const_double_p x_in, const_double_p dx_in, double_p dx_out,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, x
    cdef double eta = coefs[0]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        dx_out[index] = eta * dx


cdef void _Scale_double(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_double_loop(
        <const double*> x, <const double*> g, <double*> dx,
        <const double*> coefs, n,
    )


cdef void _Scale_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, x
    cdef float eta = coefs[0]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        x_out[index] = x - (eta * dx)


cdef void _Scale_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_float_finish_loop(
        <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void _Scale_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, x
    cdef double eta = coefs[0]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        x_out[index] = x - (eta * dx)


cdef void _Scale_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_double_finish_loop(
        <const double*> g, <double*> dx,
        <const double*> coefs, n,
    )


cdef void WeightDecay_float_loop(
    const_float_p x_in, const_float_p dx_in, float_p dx_out,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, m, x
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = dx - x
        dx_out[index] = m + dx


cdef void WeightDecay_float(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_float_loop(
        <const float*> x, <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void WeightDecay_double_loop(
    const_double_p x_in, const_double_p dx_in, double_p dx_out,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, m, x
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = dx - x
        dx_out[index] = m + dx


cdef void WeightDecay_double(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_double_loop(
        <const double*> x, <const double*> g, <double*> dx,
        <const double*> coefs, n,
    )


cdef void WeightDecay_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, m, x
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = dx - x
        x_out[index] = x - (m + dx)


cdef void WeightDecay_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_float_finish_loop(
        <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void WeightDecay_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, m, x
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = dx - x
        x_out[index] = x - (m + dx)


cdef void WeightDecay_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_double_finish_loop(
        <const double*> g, <double*> dx,
        <const double*> coefs, n,
    )


cdef void Measured_float_loop(
    const_float_p x_in, const_float_p dx_in, float_p dx_out,
    float_p slot_m,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, m, x, new_m
    cdef float rho = coefs[0]
    cdef float factor = coefs[1]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = slot_m[index]
        m = rho * m + dx
        new_m = m
        dx_out[index] = factor * m
        slot_m[index] = new_m


cdef void Measured_float(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Measured_float_loop(
        <const float*> x, <const float*> g, <float*> dx,
        <float*> slots[0],
        <const float*> coefs, n,
    )


cdef void Measured_double_loop(
    const_double_p x_in, const_double_p dx_in, double_p dx_out,
    double_p slot_m,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, m, x, new_m
    cdef double rho = coefs[0]
    cdef double factor = coefs[1]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = slot_m[index]
        m = rho * m + dx
        new_m = m
        dx_out[index] = factor * m
        slot_m[index] = new_m


cdef void Measured_double(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Measured_double_loop(
        <const double*> x, <const double*> g, <double*> dx,
        <double*> slots[0],
        <const double*> coefs, n,
    )


cdef void Measured_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, m, x, new_m
    cdef float rho = coefs[0]
    cdef float factor = coefs[1]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void Measured_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Measured_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <const float*> coefs, n,
    )


cdef void Measured_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, m, x, new_m
    cdef double rho = coefs[0]
    cdef double factor = coefs[1]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void Measured_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Measured_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <const double*> coefs, n,
    )


cdef void TwoSlots_float_loop(
    const_float_p x_in, const_float_p dx_in, float_p dx_out,
    float_p slot_m,
    float_p slot_v,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, grown, m, v, x, new_m, new_v
    cdef float rho = coefs[0]
    cdef float rest = coefs[1]
    cdef float zero = coefs[2]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        dx_out[index] = dx
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void TwoSlots_float(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    TwoSlots_float_loop(
        <const float*> x, <const float*> g, <float*> dx,
        <float*> slots[0],
        <float*> slots[1],
        <const float*> coefs, n,
    )


cdef void TwoSlots_double_loop(
    const_double_p x_in, const_double_p dx_in, double_p dx_out,
    double_p slot_m,
    double_p slot_v,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, grown, m, v, x, new_m, new_v
    cdef double rho = coefs[0]
    cdef double rest = coefs[1]
    cdef double zero = coefs[2]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        dx_out[index] = dx
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void TwoSlots_double(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    TwoSlots_double_loop(
        <const double*> x, <const double*> g, <double*> dx,
        <double*> slots[0],
        <double*> slots[1],
        <const double*> coefs, n,
    )


cdef void TwoSlots_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    float_p slot_v,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, grown, m, v, x, new_m, new_v
    cdef float rho = coefs[0]
    cdef float rest = coefs[1]
    cdef float zero = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void TwoSlots_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    TwoSlots_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <float*> slots[1],
        <const float*> coefs, n,
    )


cdef void TwoSlots_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    double_p slot_v,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, grown, m, v, x, new_m, new_v
    cdef double rho = coefs[0]
    cdef double rest = coefs[1]
    cdef double zero = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void TwoSlots_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    TwoSlots_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <double*> slots[1],
        <const double*> coefs, n,
    )


cdef void _Scale_WeightDecay_Measured_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float WeightDecay_m, dx, m, x, new_m
    cdef float _Scale_eta = coefs[0]
    cdef float rho = coefs[1]
    cdef float factor = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        dx = _Scale_eta * dx
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void _Scale_WeightDecay_Measured_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_WeightDecay_Measured_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <const float*> coefs, n,
    )


cdef void _Scale_WeightDecay_Measured_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double WeightDecay_m, dx, m, x, new_m
    cdef double _Scale_eta = coefs[0]
    cdef double rho = coefs[1]
    cdef double factor = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        dx = _Scale_eta * dx
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void _Scale_WeightDecay_Measured_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_WeightDecay_Measured_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <const double*> coefs, n,
    )


cdef void _Scale_WeightDecay_TwoSlots_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    float_p slot_v,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float WeightDecay_m, dx, grown, m, v, x, new_m, new_v
    cdef float _Scale_eta = coefs[0]
    cdef float rho = coefs[1]
    cdef float rest = coefs[2]
    cdef float zero = coefs[3]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        dx = _Scale_eta * dx
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void _Scale_WeightDecay_TwoSlots_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_WeightDecay_TwoSlots_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <float*> slots[1],
        <const float*> coefs, n,
    )


cdef void _Scale_WeightDecay_TwoSlots_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    double_p slot_v,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double WeightDecay_m, dx, grown, m, v, x, new_m, new_v
    cdef double _Scale_eta = coefs[0]
    cdef double rho = coefs[1]
    cdef double rest = coefs[2]
    cdef double zero = coefs[3]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        dx = _Scale_eta * dx
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void _Scale_WeightDecay_TwoSlots_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_WeightDecay_TwoSlots_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <double*> slots[1],
        <const double*> coefs, n,
    )


cdef void _Scale_Measured_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, m, x, new_m
    cdef float _Scale_eta = coefs[0]
    cdef float rho = coefs[1]
    cdef float factor = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        dx = _Scale_eta * dx
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void _Scale_Measured_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_Measured_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <const float*> coefs, n,
    )


cdef void _Scale_Measured_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, m, x, new_m
    cdef double _Scale_eta = coefs[0]
    cdef double rho = coefs[1]
    cdef double factor = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        dx = _Scale_eta * dx
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void _Scale_Measured_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_Measured_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <const double*> coefs, n,
    )


cdef void _Scale_TwoSlots_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    float_p slot_v,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, grown, m, v, x, new_m, new_v
    cdef float _Scale_eta = coefs[0]
    cdef float rho = coefs[1]
    cdef float rest = coefs[2]
    cdef float zero = coefs[3]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        dx = _Scale_eta * dx
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void _Scale_TwoSlots_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_TwoSlots_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <float*> slots[1],
        <const float*> coefs, n,
    )


cdef void _Scale_TwoSlots_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    double_p slot_v,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, grown, m, v, x, new_m, new_v
    cdef double _Scale_eta = coefs[0]
    cdef double rho = coefs[1]
    cdef double rest = coefs[2]
    cdef double zero = coefs[3]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        dx = _Scale_eta * dx
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void _Scale_TwoSlots_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    _Scale_TwoSlots_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <double*> slots[1],
        <const double*> coefs, n,
    )


cdef void WeightDecay_Measured_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float WeightDecay_m, dx, m, x, new_m
    cdef float rho = coefs[0]
    cdef float factor = coefs[1]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void WeightDecay_Measured_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_Measured_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <const float*> coefs, n,
    )


cdef void WeightDecay_Measured_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double WeightDecay_m, dx, m, x, new_m
    cdef double rho = coefs[0]
    cdef double factor = coefs[1]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        m = rho * m + dx
        new_m = m
        x_out[index] = x - (factor * m)
        slot_m[index] = new_m


cdef void WeightDecay_Measured_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_Measured_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <const double*> coefs, n,
    )


cdef void WeightDecay_TwoSlots_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    float_p slot_m,
    float_p slot_v,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float WeightDecay_m, dx, grown, m, v, x, new_m, new_v
    cdef float rho = coefs[0]
    cdef float rest = coefs[1]
    cdef float zero = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void WeightDecay_TwoSlots_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_TwoSlots_float_finish_loop(
        <const float*> g, <float*> dx,
        <float*> slots[0],
        <float*> slots[1],
        <const float*> coefs, n,
    )


cdef void WeightDecay_TwoSlots_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    double_p slot_m,
    double_p slot_v,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double WeightDecay_m, dx, grown, m, v, x, new_m, new_v
    cdef double rho = coefs[0]
    cdef double rest = coefs[1]
    cdef double zero = coefs[2]
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        m = slot_m[index]
        v = slot_v[index]
        WeightDecay_m = dx - x
        dx = WeightDecay_m + dx
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        new_m = grown
        new_v = m
        x_out[index] = x - (dx)
        slot_m[index] = new_m
        slot_v[index] = new_v


cdef void WeightDecay_TwoSlots_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    WeightDecay_TwoSlots_double_finish_loop(
        <const double*> g, <double*> dx,
        <double*> slots[0],
        <double*> slots[1],
        <const double*> coefs, n,
    )


cdef void Measured_measure_float_loop(
    const_float_p x_in, const_float_p dx_in,
    float_p slot_m,
    float_p term_0,
    float_p term_1,
    float_p term_2,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, m, x
    cdef float rho = coefs[0]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = slot_m[index]
        m = rho * m + dx
        term_0[index] = m * x
        term_1[index] = absolute(dx)
        term_2[index] = m


cdef void Measured_measure_float(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Measured_measure_float_loop(
        <const float*> x, <const float*> g,
        <float*> slots[0],
        <float*> slots[1],
        <float*> slots[2],
        <float*> slots[3],
        <const float*> coefs, n,
    )


cdef void Measured_measure_double_loop(
    const_double_p x_in, const_double_p dx_in,
    double_p slot_m,
    double_p term_0,
    double_p term_1,
    double_p term_2,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, m, x
    cdef double rho = coefs[0]
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        m = slot_m[index]
        m = rho * m + dx
        term_0[index] = m * x
        term_1[index] = absolute(dx)
        term_2[index] = m


cdef void Measured_measure_double(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Measured_measure_double_loop(
        <const double*> x, <const double*> g,
        <double*> slots[0],
        <double*> slots[1],
        <double*> slots[2],
        <double*> slots[3],
        <const double*> coefs, n,
    )


cdef int fill_table() except -1:
    add_step('_Scale', 0, 1,
             _Scale_float, _Scale_double,
             _Scale_float_finish, _Scale_double_finish)
    add_step('WeightDecay', 0, 0,
             WeightDecay_float, WeightDecay_double,
             WeightDecay_float_finish, WeightDecay_double_finish)
    add_step('Measured', 1, 2,
             Measured_float, Measured_double,
             Measured_float_finish, Measured_double_finish)
    add_step('TwoSlots', 2, 3,
             TwoSlots_float, TwoSlots_double,
             TwoSlots_float_finish, TwoSlots_double_finish)
    add_lead(('_Scale', 'WeightDecay'))
    add_fused('Measured',
              _Scale_WeightDecay_Measured_float_finish, _Scale_WeightDecay_Measured_double_finish)
    add_fused('TwoSlots',
              _Scale_WeightDecay_TwoSlots_float_finish, _Scale_WeightDecay_TwoSlots_double_finish)
    add_lead(('_Scale',))
    add_fused('Measured',
              _Scale_Measured_float_finish, _Scale_Measured_double_finish)
    add_fused('TwoSlots',
              _Scale_TwoSlots_float_finish, _Scale_TwoSlots_double_finish)
    add_lead(('WeightDecay',))
    add_fused('Measured',
              WeightDecay_Measured_float_finish, WeightDecay_Measured_double_finish)
    add_fused('TwoSlots',
              WeightDecay_TwoSlots_float_finish, WeightDecay_TwoSlots_double_finish)
    add_measure('Measured', 1, 1,
                ('sum', 'largest', 'norm'),
                Measured_measure_float, Measured_measure_double)
    add_measure('OfGradient', 0, 0,
                ('norm',),
                NULL, NULL)
    return 0
