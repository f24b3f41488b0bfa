from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

cdef void sort_spans(Span* spans, Span* spare, Py_ssize_t n) noexcept nogil:
    """Sort by address; in one pass where the spans, as is usual, are a few rising runs."""
    cdef Py_ssize_t start, middle, end, i, j, k, runs = 2
    if run_end(spans, 0, n) == n:
        return
    while runs > 1:
        start = runs = 0
        while start < n:                # merge each two runs
            middle = run_end(spans, start, n)
            end = run_end(spans, middle, n)
            i, j = start, middle
            for k in range(start, end):
                if j >= end or (i < middle and spans[i].low <= spans[j].low):
                    spare[k] = spans[i]
                    i += 1
                else:
                    spare[k] = spans[j]
                    j += 1
            start = end
            runs += 1
        memcpy(spans, spare, n * sizeof(Span))


cdef inline Py_ssize_t run_end(Span* spans, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(start + 1, n):
        if spans[k].low < spans[k - 1].low:
            return k
    return n


cdef inline bint is_first_above(Span* spans, Py_ssize_t n, Py_ssize_t k, uintptr_t low) noexcept:
    """Tell whether span `k` is the first of the sorted spans that ends after `low`; `n` if none."""
    return (
        k <= n
        and (k == n or spans[k].high > low)
        and (k == 0 or spans[k - 1].high <= low)
    )
