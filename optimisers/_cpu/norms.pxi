from libc.math cimport INFINITY, fabs, isfinite, pow
from libc.stdint cimport int64_t

cdef double norm_of(Run* run, Segment* leaf, Py_ssize_t stage, double p) noexcept nogil:
    """Return the p-norm of the numbers that reach `stage`, in double."""
    cdef double value, largest, root
    if p == INFINITY:
        return reduce(run, leaf, stage, LARGEST, 0, 1)
    if p == -INFINITY:
        return reduce(run, leaf, stage, SMALLEST, 0, 1)
    if p == 0:
        return reduce(run, leaf, stage, NONZERO, 0, 1)
    if p == 1:
        return reduce(run, leaf, stage, ABSOLUTE, 0, 1)
    if p == 2:
        value = sqrt(reduce(run, leaf, stage, SQUARES, 0, 1))
        if not leaf.is_double or 1e-140 < value < 1e150 or value != value:
            return value            # no square overflowed or lost digits
    largest = reduce(run, leaf, stage, LARGEST if p > 0 else SMALLEST, 0, 1)
    if largest == 0 or not isfinite(largest):
        return largest
    value = reduce(run, leaf, stage, POWERS, p, largest)
    if fabs(p) >= 1:
        return largest * pow(value, 1 / p)
    root = pow(value, 0.5 / p)
    return largest * root * root    # in two halves: for tiny p the whole root overflows


cdef struct Reducing:       # a job for the threads
    Run* run
    Segment* leaf
    Py_ssize_t stage
    Reduction kind
    double p
    double unit
    Py_ssize_t length       # of a stretch
    double parts[STRETCHES]


cdef double reduce(Run* run, Segment* leaf, Py_ssize_t stage, Reduction kind, double p,
                   double unit) noexcept nogil:
    """Combine the numbers that reach `stage`, stretch by stretch, in an order set by n alone."""
    cdef Reducing job
    cdef Py_ssize_t k, stretches
    cdef double total = INFINITY if kind == SMALLEST else 0
    if leaf.n == 0:
        return 0
    job.run, job.leaf, job.stage = run, leaf, stage
    job.kind, job.p, job.unit = kind, p, unit
    job.length = max(STRETCH, (leaf.n + STRETCHES - 1) // STRETCHES)
    stretches = (leaf.n + job.length - 1) // job.length
    share_out(run.members, reduce_stretch, &job, stretches, traffic(run.stages, leaf, stage))
    for k in range(stretches):
        total = joined(kind, total, job.parts[k])
    return total


cdef void reduce_stretch(void* job_, int64_t k, int member) noexcept nogil:
    cdef Reducing* job = <Reducing*> job_
    cdef Segment* leaf = job.leaf
    cdef char* scratch = <char*> (job.run.scratch + member * job.run.room)
    cdef double lanes[LANES]
    cdef double total = INFINITY if job.kind == SMALLEST else 0
    cdef Py_ssize_t start = k * job.length
    cdef Py_ssize_t end = min(start + job.length, leaf.n)
    # A gradient that reaches the norm as it is needs no scratch, and so no blocks.
    cdef bint as_it_is = job.stage == leaf.first and leaf.of_g == SAME
    cdef Py_ssize_t most = leaf.n if as_it_is else leaf.block
    cdef Py_ssize_t m
    cdef const char* g
    cdef int j
    for j in range(LANES):
        lanes[j] = total
    while start < end:
        m = min(most, end - start)
        g = chain(job.run, leaf, job.stage, start, m, scratch, True)
        if leaf.is_double:
            accumulate[double](g, m, lanes, job.kind, job.p, job.unit)
        else:
            accumulate[float](g, m, lanes, job.kind, job.p, job.unit)
        start += m
    for j in range(LANES):
        total = joined(job.kind, total, lanes[j])
    job.parts[k] = total
