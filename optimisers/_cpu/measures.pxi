from libc.math cimport INFINITY, fabs, isfinite, pow
from libc.stdint cimport int64_t

cdef struct Reducing:       # a job for the threads
    Run* run
    Segment* leaf
    Measured* measured
    Reduction kinds[MAX_TERMS]
    double units[MAX_TERMS]
    Py_ssize_t length       # of a stretch
    double parts[MAX_TERMS][STRETCHES]


cdef void measure(Run* run, Measured* measured) noexcept nogil:
    """Reduce the terms of a measure, in double, each to one number."""
    cdef Reducing job
    cdef double p = measured.order
    cdef int j
    job.run, job.leaf, job.measured = run, run.segments + measured.segment, measured
    for j in range(measured.info.terms):
        job.units[j] = 1
        if measured.info.how[j] == SUM:
            job.kinds[j] = PLAIN
        elif measured.info.how[j] == GREATEST:
            job.kinds[j] = MOST
        elif p == INFINITY:
            job.kinds[j] = LARGEST
        elif p == -INFINITY:
            job.kinds[j] = SMALLEST
        elif p == 0:
            job.kinds[j] = NONZERO
        elif p == 1:
            job.kinds[j] = ABSOLUTE
        elif p == 2:
            job.kinds[j] = SQUARES
        else:
            job.kinds[j] = LARGEST if p > 0 else SMALLEST
    reduce(&job)
    if p != 0 and p != 1 and fabs(p) != INFINITY:
        norms_of(&job, p)


cdef void norms_of(Reducing* job, double p) noexcept nogil:
    """Make norms of what was found of those terms whose norms are taken."""
    cdef Measured* measured = job.measured
    cdef double value
    cdef bint again = False
    cdef int j
    for j in range(measured.info.terms):
        if measured.info.how[j] != NORM or job.kinds[j] != SQUARES:
            if measured.info.how[j] != NORM:
                job.kinds[j] = NOTHING
            continue
        value = sqrt(measured.row[j])
        if not job.leaf.is_double or 1e-140 < value < 1e150 or value != value:
            measured.row[j], job.kinds[j] = value, NOTHING
        else:                   # a square overflowed, or lost its digits
            job.kinds[j] = LARGEST
            again = True
    if again:
        reduce(job)
    again = False
    for j in range(measured.info.terms):
        if job.kinds[j] == NOTHING:
            continue
        job.units[j] = measured.row[j]
        if job.units[j] == 0 or not isfinite(job.units[j]):
            job.kinds[j] = NOTHING
        else:
            job.kinds[j] = POWERS
            again = True
    if not again:
        return
    reduce(job)
    for j in range(measured.info.terms):
        if job.kinds[j] == POWERS:
            measured.row[j] = times_root(job.units[j], measured.row[j], p)


cdef inline double times_root(double unit, double value, double p) noexcept nogil:
    cdef double root
    if fabs(p) >= 1:
        return unit * pow(value, 1 / p)
    root = pow(value, 0.5 / p)  # by halves: for tiny p the whole root alone overflows
    return unit * root * root


cdef inline double first_of(Reduction kind) noexcept nogil:
    return INFINITY if kind == SMALLEST else -INFINITY if kind == MOST else 0


cdef void reduce(Reducing* job) noexcept nogil:
    """Combine the terms, stretch by stretch, in an order that the length alone decides."""
    cdef Segment* leaf = job.leaf
    cdef Measured* measured = job.measured
    cdef Py_ssize_t stretches, k
    cdef int j
    if leaf.n == 0:
        for j in range(measured.info.terms):
            measured.row[j] = 0
        return
    job.length = max(STRETCH, (leaf.n + STRETCHES - 1) // STRETCHES)
    stretches = (leaf.n + job.length - 1) // job.length
    share_out(job.run.members, reduce_stretch, job, stretches,
              traffic(job.run.stages, leaf, measured.stage))
    for j in range(measured.info.terms):
        if job.kinds[j] == NOTHING:
            continue
        measured.row[j] = first_of(job.kinds[j])
        for k in range(stretches):
            measured.row[j] = joined(job.kinds[j], measured.row[j], job.parts[j][k])


cdef void reduce_stretch(void* job_, int64_t k, int member) noexcept nogil:
    cdef Reducing* job = <Reducing*> job_
    cdef Segment* leaf = job.leaf
    cdef Measured* measured = job.measured
    cdef char* scratch = <char*> (job.run.scratch + member * job.run.room)
    cdef double lanes[MAX_TERMS][LANES]
    cdef const char* terms[MAX_TERMS]
    cdef Py_ssize_t start = k * job.length
    cdef Py_ssize_t end = min(start + job.length, leaf.n)
    cdef Step run = measured.info.run[leaf.is_double]
    # A gradient that is reduced as it is needs no scratch, and so no blocks.
    cdef bint as_it_is = run is NULL and measured.stage == leaf.first and leaf.of_g == SAME
    # Terms are short, so that they stay in the first cache.
    cdef Py_ssize_t most = leaf.n if as_it_is else min(leaf.block, chain_block)
    cdef Py_ssize_t n
    cdef double total
    cdef int i, j
    for j in range(measured.info.terms):
        for i in range(LANES):
            lanes[j][i] = first_of(job.kinds[j])
    while start < end:
        n = min(most, end - start)
        terms[0] = chain(job.run, leaf, measured.stage, start, n, scratch, True)
        if run is not NULL:
            evaluate(job.run, leaf, measured, run, start, n, scratch, terms)
        for j in range(measured.info.terms):
            if job.kinds[j] == NOTHING:
                continue
            if leaf.is_double:
                accumulate[double](terms[j], n, lanes[j], job.kinds[j], measured.order,
                                   job.units[j])
            else:
                accumulate[float](terms[j], n, lanes[j], job.kinds[j], measured.order,
                                  job.units[j])
        start += n
    for j in range(measured.info.terms):
        total = first_of(job.kinds[j])
        for i in range(LANES):
            total = joined(job.kinds[j], total, lanes[j][i])
        job.parts[j][k] = total


cdef void evaluate(Run* run, Segment* leaf, Measured* measured, Step terms_of, Py_ssize_t start,
                   Py_ssize_t n, char* scratch, const char** terms) noexcept nogil:
    """Evaluate the terms of a measure on a block, of which `terms[0]` is the gradient."""
    cdef Stage* stage = run.stages + measured.stage
    cdef Py_ssize_t size = number_size(leaf, SAME), room = leaf.block * size
    cdef const char* g = terms[0]
    cdef const char* x = leaf.x + start * size
    cdef void* arrays[MAX_SLOTS + MAX_TERMS]
    cdef int j
    if leaf.of_x != SAME:
        x = scratch + 3 * room
        widen(leaf.of_x, leaf.x + start * number_size(leaf, leaf.of_x), <char*> x, n)
    for j in range(measured.info.slots):
        if stage.of[j] == SAME:
            arrays[j] = stage.old[j] + start * size
        else:
            arrays[j] = scratch + (4 + j) * room
            widen(<Kind> stage.of[j], stage.old[j] + 2 * start, arrays[j], n)
    for j in range(measured.info.terms):
        terms[j] = scratch + (WIDENING + j) * room
        arrays[measured.info.slots + j] = <void*> terms[j]
    terms_of(x, g, NULL, arrays, run.numbers + measured.coefs, n)
