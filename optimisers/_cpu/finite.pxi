from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef void check_piece(void* job, int64_t k, int member) noexcept nogil:
    """Mark the leaves whose gradients hold infinity or NaN in the blocks of piece `k`."""
    cdef Run* run = <Run*> job
    cdef Py_ssize_t first = k * run.blocks // run.pieces
    cdef Py_ssize_t last = (k + 1) * run.blocks // run.pieces
    cdef Py_ssize_t at = segment_of(run.segments, run.length, first), before, start, end
    cdef Segment* leaf
    while first < last:
        leaf = run.segments + at
        before = run.segments[at - 1].blocks if at else 0
        start = start_of(leaf, first - before)
        end = start_of(leaf, min(last, leaf.blocks) - before)
        if not all_finite(leaf, start, end - start):
            team_swap(&leaf.is_bad, 1)
            team_swap(&run.is_bad, 1)
        first = leaf.blocks
        at += 1


cdef bint all_finite(Segment* leaf, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    if leaf.of_g == FLOAT16:
        return none_holds[uint16_t](leaf.g, start, n, 0x7c00)
    if leaf.of_g == BFLOAT16:
        return none_holds[uint16_t](leaf.g, start, n, 0x7f80)
    if number_size(leaf, leaf.of_g) == 8:
        return none_holds[uint64_t](leaf.g, start, n, 0x7ff0000000000000)
    return none_holds[uint32_t](leaf.g, start, n, 0x7f800000)


cdef bint none_holds(const void* numbers, Py_ssize_t start, Py_ssize_t n,
                     bits exponent) noexcept nogil:
    """Tell whether all numbers are finite; infinity and NaN have all bits of the exponent set.

    One more in the lowest of these bits then carries into the sign. Four quarters are read side by
    side: memory hands out more along four ways than along one.
    """
    cdef const bits* a = <const bits*> numbers + start
    cdef Py_ssize_t lines = n * sizeof(bits) // (4 * LINE), i
    cdef Py_ssize_t quarter = lines * (LINE // sizeof(bits))
    cdef const bits* b = a + quarter
    cdef const bits* c = b + quarter
    cdef const bits* d = c + quarter
    cdef bits one = exponent & (~exponent + 1)
    cdef bits in_a = 0, in_b = 0, in_c = 0, in_d = 0
    for i in range(quarter):
        in_a |= (a[i] & exponent) + one
        in_b |= (b[i] & exponent) + one
        in_c |= (c[i] & exponent) + one
        in_d |= (d[i] & exponent) + one
    for i in range(4 * quarter, n):
        in_a |= (a[i] & exponent) + one
    return not (in_a | in_b | in_c | in_d) & ~(exponent | (one - 1))
