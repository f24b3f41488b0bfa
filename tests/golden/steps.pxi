# Written by tools/emit_steps.py from the steps in rules.py. Do not edit.

# A block step: x, g and the old slots are read, dx and the new slots written, n numbers each.
# One that finishes a chain finds x in place of dx, and leaves there x - dx.


cdef void Scaled_float_loop(
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


cdef void Scaled_float(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Scaled_float_loop(
        <const float*> x, <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void Scaled_float_finish_loop(
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


cdef void Scaled_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Scaled_float_finish_loop(
        <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void Scaled_double_loop(
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


cdef void Scaled_double(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Scaled_double_loop(
        <const double*> x, <const double*> g, <double*> dx,
        <const double*> coefs, n,
    )


cdef void Scaled_double_finish_loop(
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


cdef void Scaled_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Scaled_double_finish_loop(
        <const double*> g, <double*> dx,
        <const double*> coefs, n,
    )


cdef void Plain_float_loop(
    const_float_p x_in, const_float_p dx_in, float_p dx_out,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, x
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        dx_out[index] = dx - x


cdef void Plain_float(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Plain_float_loop(
        <const float*> x, <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void Plain_float_finish_loop(
    const_float_p dx_in, float_p x_out,
    const_float_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef float dx, x
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        x_out[index] = x - (dx - x)


cdef void Plain_float_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Plain_float_finish_loop(
        <const float*> g, <float*> dx,
        <const float*> coefs, n,
    )


cdef void Plain_double_loop(
    const_double_p x_in, const_double_p dx_in, double_p dx_out,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, x
    for index in range(length):
        x = x_in[index]
        dx = dx_in[index]
        dx_out[index] = dx - x


cdef void Plain_double(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Plain_double_loop(
        <const double*> x, <const double*> g, <double*> dx,
        <const double*> coefs, n,
    )


cdef void Plain_double_finish_loop(
    const_double_p dx_in, double_p x_out,
    const_double_p coefs, Py_ssize_t length,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef double dx, x
    for index in range(length):
        x = x_out[index]
        dx = dx_in[index]
        x_out[index] = x - (dx - x)


cdef void Plain_double_finish(
    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n
) noexcept nogil:
    Plain_double_finish_loop(
        <const double*> g, <double*> dx,
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


cdef void fill_table() noexcept:
    add_step('Scaled', 0, 1,
             Scaled_float, Scaled_double,
             Scaled_float_finish, Scaled_double_finish)
    add_step('Plain', 0, 0,
             Plain_float, Plain_double,
             Plain_float_finish, Plain_double_finish)
    add_step('TwoSlots', 2, 3,
             TwoSlots_float, TwoSlots_double,
             TwoSlots_float_finish, TwoSlots_double_finish)
