cimport numpy as cnp
from cpython.ref cimport PyObject, Py_DECREF, Py_INCREF, Py_XDECREF
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc

cdef enum Kind:             # of numbers, as seen from a leaf that is updated in float or double
    SAME                    # those in which it is updated
    FLOAT16                 # narrower: read through `widen`, written through `round_into`
    BFLOAT16
    FLOAT32

cdef struct Stage:          # one step on one leaf
    Step run
    Step finish             # may be NULL
    int index               # of the step in the table, or -1
    int slots
    Py_ssize_t coefs        # where its numbers stand among the batch's
    unsigned char of[MAX_SLOTS]     # their kinds
    char* old[MAX_SLOTS]    # where the slots are read ...
    char* new[MAX_SLOTS]    # ... and where they are written; the same for an update in place

cdef struct Segment:        # one leaf
    const char* x           # what the rule updates: the parameter, or a master copy of it
    const char* g
    char* out               # where x - dx goes; x itself for an update in place
    Kind of_x               # also that of out
    bint narrow             # whether x or one of the slots is not SAME
    Kind of_g
    bint is_copy            # whether x is a master copy of the parameter; if so:
    Kind of_parameter
    const char* unrounded   # the parameter before ...
    char* rounded           # ... and where it goes
    Py_ssize_t n
    Py_ssize_t place        # which of the caller's places it is
    Py_ssize_t held         # the first that is held for it ...
    Py_ssize_t held_end     # ... and the end of these
    Py_ssize_t first        # of its stages
    Py_ssize_t stages
    Py_ssize_t blocks       # in all segments up to and including this one
    Py_ssize_t block        # numbers in each of its own ...
    Py_ssize_t short_by     # ... and how many of them its first one lacks
    bint is_double
    bint c_order
    bint alone              # whether the leaf alone holds the tuple at hand of its state
    bint swallowed          # its rule makes no step this time
    int64_t is_bad          # whether infinity or NaN was found in its gradient

cdef struct Fused:          # a last stage that does what others ahead of it do
    Step finish
    Py_ssize_t ahead        # so many
    Py_ssize_t first        # coefs of the first of them, which no other stage has ...
    Py_ssize_t last         # ... and its own
    Py_ssize_t coefs        # those of all

cdef struct Norm:           # a barrier that waits for its number
    Py_ssize_t segment
    Py_ssize_t stage
    double p

cdef struct Count:          # a count of steps to be stored
    int64_t* where
    int64_t value

cdef struct Span:           # memory that the run writes
    uintptr_t low
    uintptr_t high
    Py_ssize_t place


cdef enum Reduction:
    LARGEST
    SMALLEST
    NONZERO
    ABSOLUTE
    SQUARES
    POWERS


cdef struct Held:           # an array whose address is in use
    PyObject* array
    char* data              # the address ...
    Py_ssize_t bytes        # ... and how far from there memory is read or written


cdef struct Vector:         # of any of the above
    char* data
    Py_ssize_t length
    Py_ssize_t room

cdef enum:
    PLANS = 8

cdef struct Work:           # the memory of a batch, lent from one to the next
    Vector segments
    Vector stages
    Vector numbers          # coefs, cast to the dtype of their leaf, one in eight bytes
    Vector norms
    Vector counts
    Vector spans            # of slots, then of all that is written
    Vector parameters       # spans of parameters
    Vector scratch          # blocks for each thread: see Batch.lend_scratch
    Vector held             # what is owned as long as its memory is in use: see held.pxi
    bint borrows            # whether something held has its memory from something else
    PyObject* rules[PLANS]  # the last rules met ...
    PyObject* plans[PLANS]  # ... and their plans: the next leaf or batch often has one of them
    int next_plan           # which of them makes room for another
    int64_t batch           # the number of the batch, among those that this memory was lent to

cdef enum:
    VECTORS = 9

cdef Work* spare = NULL


cdef Work* borrow() except NULL:
    """Return empty work memory: the spare one, unless another batch has it."""
    cdef Work* work = <Work*> exchange(<void**> &spare, NULL)
    if work is NULL:
        work = <Work*> calloc(1, sizeof(Work))
        if work is NULL:
            raise MemoryError
    work.batch += 1
    return work


cdef void give_back(Work* work) noexcept:
    cdef Vector* vectors = <Vector*> work
    cdef int k
    let_go(&work.held, 0)
    work.borrows = False
    for k in range(VECTORS):
        vectors[k].length = 0
    work = <Work*> exchange(<void**> &spare, work)
    if work is not NULL:
        vectors = <Vector*> work
        for k in range(VECTORS):
            free(vectors[k].data)
        for k in range(PLANS):
            Py_XDECREF(work.rules[k])
            Py_XDECREF(work.plans[k])
        free(work)


cdef void let_go(Vector* held, Py_ssize_t first) noexcept:
    """Let go of what is held, from some item on; code of users may run, when an object dies."""
    cdef Held* items = <Held*> held.data
    while held.length > first:
        held.length -= 1
        Py_DECREF(<object> items[held.length].array)


cdef inline int reserve(Vector* v, size_t size, Py_ssize_t more) except -1:
    """Make room for `more` items of `size` bytes."""
    if v.length + more > v.room:
        make_room(v, size, 2 * (v.length + more))
    return 0


cdef inline void* push(Vector* v, size_t size, Py_ssize_t more=1) except NULL:
    """Return new room for `more` items of `size` bytes at the end of `v`."""
    reserve(v, size, more)
    v.length += more
    return v.data + (v.length - more) * size


cdef int make_room(Vector* v, size_t size, Py_ssize_t room) except -1:
    cdef char* data = <char*> realloc(v.data, room * size)
    if data is NULL:
        raise MemoryError(f"no memory for {room} work items")
    v.data, v.room = data, room
    return 0
