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
    Py_ssize_t coefs        # position of its numbers among those of the batch
    unsigned char of[MAX_SLOTS]     # the kinds of the slots
    char* old[MAX_SLOTS]    # addresses at which the slots are read
    char* new[MAX_SLOTS]    # addresses at which they are written; the same for an update in place

cdef struct Segment:        # one leaf
    const char* x           # numbers that the rule updates: the parameter, or its master copy
    const char* g
    char* out               # x - dx is written here; x itself for an update in place
    Kind of_x               # the kind of x and of out
    bint narrow             # whether x or one of the slots is not SAME
    Kind of_g
    bint is_copy            # whether x is a master copy of the parameter
    Kind of_parameter       # used if is_copy, as are the next two
    const char* unrounded   # the parameter before the step
    char* rounded           # the rounded parameter is written here
    Py_ssize_t n            # numbers in x
    Py_ssize_t place        # index among the lists of the caller
    Py_ssize_t held         # position of the first array that is held for it
    Py_ssize_t held_end     # position after the last one
    Py_ssize_t first        # position of its first stage
    Py_ssize_t stages       # how many it has
    Py_ssize_t blocks       # in all segments up to and including this one
    Py_ssize_t block        # numbers in each of its blocks
    Py_ssize_t short_by     # numbers that its first block has less
    bint is_double
    bint c_order
    bint unshared           # whether the leaf alone holds the current tuple of its state
    bint withheld           # whether its rule makes no step this time
    int64_t is_bad          # whether infinity or NaN was found in its gradient

cdef struct Fused:          # a last stage whose loop does the stages ahead of it, too
    Step finish
    Py_ssize_t ahead        # how many stages are ahead of it
    Py_ssize_t first        # coefs of the first of them; no other stage has these
    Py_ssize_t last         # its own coefs
    Py_ssize_t coefs        # the coefs of all of them, joined

cdef struct Measured:       # a stage that waits for numbers
    Py_ssize_t segment
    Py_ssize_t stage
    Py_ssize_t rule         # position of its `Told` in the list of the batch
    Py_ssize_t group        # position of its group among those that wait for the tree
    Py_ssize_t coefs        # position of the coefs of its measure among the numbers of the batch
    int of_step             # how many coefs its step takes
    MeasureInfo info
    double order            # the order of its norms
    int64_t t               # the count of steps; 0 if coefs takes none
    double* kept            # where the numbers that its rule keeps are written
    int keeps               # how many these are, without the count behind them
    double changes          # the count behind them, before this step
    bint of_tree            # whether it measures the tree
    bint waits              # whether it waits for other leaves
    bint is_known           # whether the numbers in `row` are known
    bint is_done            # whether its step has its coefs
    double row[MAX_TERMS]   # the reduced terms

cdef struct Count:          # a count of steps to be stored
    int64_t* where
    int64_t value

cdef struct Span:           # memory that the run writes
    uintptr_t low
    uintptr_t high
    Py_ssize_t place


cdef struct Keeping:        # a number to be stored
    double* where
    double value


cdef enum Reduction:
    PLAIN                   # the sum of the numbers
    MOST                    # the largest number
    LARGEST                 # the largest absolute value
    SMALLEST
    NONZERO
    ABSOLUTE
    SQUARES
    POWERS
    NOTHING                 # the result is known already


cdef struct Held:           # an array whose address is in use
    PyObject* array
    char* data              # its address
    Py_ssize_t bytes        # how many bytes are read or written from there on


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
    Vector measures
    Vector counts
    Vector keepings
    Vector spans            # of slots, then of all that is written
    Vector parameters       # spans of parameters
    Vector scratch          # blocks for each thread: see Batch.lend_scratch
    Vector held             # what is owned as long as its memory is in use: see held.pxi
    bint borrows            # whether an array that is held has its memory from another object
    PyObject* rules[PLANS]  # the last rules met: the next leaf or batch often has one of them
    PyObject* plans[PLANS]  # their plans
    int next_plan           # position of the plan that the next new one replaces
    int64_t batch           # number of the batch among those to which this memory was lent

cdef enum:
    VECTORS = 10

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
