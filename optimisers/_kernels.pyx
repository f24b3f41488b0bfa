# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""The CPU engine: runs the steps of many leaves, block by block, without the GIL.

a) A *step* is one rule's formula as a loop over a block of numbers. The steps are written by
   tools/emit_steps.py from rules.py into _steps.pxi, for float and double, and included below.
b) A `Plan` is a rule made ready: it knows how to stack its steps on a leaf.
c) A `Batch` gathers leaves: for each a *segment* (parameter, gradient, length) and for each step of
   its rule a *stage* (function, slots, coefs). What the kernels cannot take is handed back
   untouched; nothing that the caller can see is written while gathering.
   `update_one` does all this for a leaf on its own.
d) Every segment is cut into blocks. `Batch.run` runs the whole chain on a block, which stays in the
   first cache meanwhile, before it goes to the next, so that a chain of any length moves each
   array through memory once. The last step of the chain subtracts as it goes, in one loop with the
   clips and decays right ahead of it (`leads`). Threads (_team.h) share the blocks out among them.
   Blocks are independent, so the bits depend neither on their size nor on the number of threads.
e) A *barrier* (a norm) needs all of a leaf before its step can run. The steps ahead of it are then
   evaluated on copies of their slots, block by block, only to be reduced; the barrier itself
   becomes an ordinary step with the number found. Partial sums belong to fixed stretches of the
   leaf, so a norm too has the same bits for any number of threads.
f) *What user code can do meanwhile.* Between taking a leaf and running, code of users may run: a
   rule's `coefs` and `__float__` of what it returns, `lower` (which reads a rule), `blank` and the
   truth of `frozen` in `gather` and `take`; a barrier's `factor` in `run`; and all that a
   gradient's conversion and a rule's `apply` do in the engine between the calls of a batch. A
   signal, the collection of garbage, and other threads come wherever Python runs, the last also
   while the kernels run without the GIL. So a batch *holds* every array whose address it has: it
   owns a reference to the array itself (a tuple around it would not keep NumPy's `resize` from
   giving its memory back) from the moment when the address is read until the batch is gone. It
   trusts no length, type or address across such a call: lists are indexed with a check, what
   `coefs` returns is made a tuple of floats first, tuples are read by the C functions, never by
   their own `[]`, and before addresses are used, `check_held` asks whether they are still those of
   the arrays, for those who go behind NumPy's back (`refcheck=False`, `__setstate__`). After that
   check no Python runs until the numbers are written. `asked` says how many were held when Python
   last ran, which is all unless a batch does everything at one call.
g) *Narrow numbers*, float16 and bfloat16, are computed with in float. Blocks of the parameter, the
   gradient and the slots are widened into scratch memory, the same steps run there, and then each
   slot and the parameter is rounded, once (`keep`, `round_into`). A gradient and a slot may also be
   float beside a narrow parameter, and a slot narrow beside one that is float.
h) A run computes in the usual floating-point environment (_environment.h), in all threads: the bits
   do not depend on the caller's, which it has again afterwards.
"""

import os

cimport cython
cimport numpy as cnp
from cpython.dict cimport PyDict_Next
from cpython.list cimport PyList_GET_ITEM
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_REFCNT, Py_XDECREF, PyObject
from cpython.tuple cimport (
    PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_GetSlice, PyTuple_New,
    PyTuple_SET_ITEM,
)
from libc.math cimport INFINITY, fabs, fabsf, isfinite, pow
from libc.stdint cimport INT64_MAX, int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

cnp.import_array()

cdef extern from *:
    """
    #include <math.h>
    /* OpenMP is only asked how many threads there are to be, so that what users say to it counts
       here too. The threads are those of _team.h. */
    #if defined(_OPENMP)
    #include <omp.h>
    #else
    static int omp_get_max_threads(void) { return 0; }
    #endif
    /* Blocks never overlap (see Batch.settle), and the loops may rely on it. */
    #if defined(_MSC_VER)
    #define APART __restrict
    #else
    #define APART __restrict__
    #endif
    /* Where objects keep what a name in the `__slots__` of their class stands for; else 0. */
    #ifndef Py_T_OBJECT_EX
    #include <structmember.h>
    #define Py_T_OBJECT_EX T_OBJECT_EX
    #endif
    static Py_ssize_t slot_offset(PyObject *cls, const char *name) {
        PyObject *found = PyObject_GetAttrString(cls, name);
        Py_ssize_t offset = 0;
        if (found == NULL)
            PyErr_Clear();
        else if (Py_TYPE(found) == &PyMemberDescr_Type) {
            PyMemberDef *member = ((PyMemberDescrObject *) found)->d_member;
            /* The name may lead to the slot of another class, where these objects have none. */
            if (member->type == Py_T_OBJECT_EX
                    && PyType_IsSubtype((PyTypeObject *) cls, PyDescr_TYPE(found)))
                offset = member->offset;
        }
        Py_XDECREF(found);
        return offset;
    }
    #if defined(__x86_64__) && defined(__GNUC__)
    #include <cpuid.h>
    /* Whether it converts float16, too, is asked of the processor: older compilers do not know. */
    static int runs_avx2(void) {
        unsigned a, b, c = 0, d;
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    }
    static int runs_avx512(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl");
    }
    #else
    static int runs_avx2(void) { return 0; }
    static int runs_avx512(void) { return 0; }
    #endif
    /* Store a pointer and return the one before, undisturbed by other threads. */
    #if defined(_MSC_VER)
    #include <intrin.h>
    static void *exchange(void **at, void *p) { return _InterlockedExchangePointer(at, p); }
    #else
    static void *exchange(void **at, void *p) {
        return __atomic_exchange_n(at, p, __ATOMIC_ACQ_REL);
    }
    #endif
    typedef float *APART float_p;
    typedef double *APART double_p;
    typedef const float *APART const_float_p;
    typedef const double *APART const_double_p;
    """
    int omp_get_max_threads() nogil
    void* exchange(void** at, void* p) nogil
    Py_ssize_t slot_offset(object cls, const char* name)
    int runs_avx2()
    int runs_avx512()
    ctypedef float* float_p
    ctypedef double* double_p
    ctypedef const float* const_float_p
    ctypedef const double* const_double_p

cdef extern from "Python.h":
    int Py_EnterRecursiveCall(const char* where) except *
    void Py_LeaveRecursiveCall()

cdef extern from "_environment.h":
    ctypedef struct float_environment:
        pass
    float_environment environment_enter() nogil
    void environment_leave(float_environment before) nogil

cdef extern from "_team.h":
    enum:
        TEAM_MOST
    ctypedef void (*team_piece)(void* job, int64_t k, int member) noexcept nogil
    int team_take(int members)
    void team_leave()
    int64_t team_swap(int64_t* at, int64_t to) nogil
    void team_run(team_piece run, void* job, int64_t pieces, int members, bint wake) nogil
    void team_forked()

cdef extern from "_halves.h":
    void widen_float16s(const uint16_t* halves, float* to, Py_ssize_t n) nogil
    void widen_bfloat16s(const uint16_t* halves, float* to, Py_ssize_t n) nogil
    void narrow_float16s(const float* singles, uint16_t* to, Py_ssize_t n) nogil
    void narrow_bfloat16s(const float* singles, uint16_t* to, Py_ssize_t n) nogil
    void keep_float16s(const float* singles, uint16_t* to, Py_ssize_t n) nogil
    void keep_bfloat16s(const float* singles, uint16_t* to, Py_ssize_t n) nogil

cdef extern from "numpy/arrayobject.h":
    enum:
        NPY_HALF
        NPY_USERDEF
    object PyArray_NewLikeArray(cnp.ndarray like, int order, void* dtype, int subok)

cdef extern from "<math.h>" nogil:
    float sqrtf(float)
    double c_sqrt "sqrt"(double)

ctypedef void (*Step)(
    const void*, const void*, void*, void**, const void*, Py_ssize_t
) noexcept nogil

cdef enum:
    MAX_BLOCK = 4096        # numbers; more would not fit the first cache
    MAX_SLOTS = 8
    RUNNING = 3             # blocks of scratch memory that `chain` needs ...
    WIDENING = 4 + MAX_SLOTS    # ... and that it needs in a dry run, and for narrow numbers
    STRETCHES = 256         # most partial sums of a norm
    STRETCH = 16384         # fewest numbers in one of them
    LINE = 64               # bytes in a line of the caches
    LANES = 32              # running sums side by side, so that a reduction fills a vector
    WAKING = 60             # times the work for which a thread takes part is worth waking one
    PIECES = 32             # most pieces of an update for each thread ...
    PIECE = 32768           # ... and fewest bytes that one moves
    COPIED = 512            # most numbers in a block that is first copied into new arrays ...
    COPIED_FAR = 128        # ... out of the caches, where these are likely ...
    FAR = 1 << 24           # ... if so many bytes are moved
    LINED_UP = 2048         # numbers in a leaf from which it pays to align its blocks
    SHORT = 32768           # bytes that are moved before others could have had the GIL

cdef uint64_t GOLDEN = 0x9e3779b97f4a7c15   # spreads addresses over a table: Knuth's multiplier

ctypedef fused real:
    float
    double

ctypedef fused bits:        # of a number
    uint16_t
    uint32_t
    uint64_t

# --- words -----------------------------------------------------------------------------------
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

# --- steps -----------------------------------------------------------------------------------

cdef enum:
    MAX_STEPS = 256
    MAX_LEADS = 8
    LONGEST_LEAD = 2

cdef struct StepInfo:
    int index               # in the table; -1 for one that was compiled late
    int slots
    int coefs
    Step run[2]             # for float and for double
    Step finish[2]          # the same, which subtracts too: x comes and goes in place of dx
    Step led[MAX_LEADS][2]  # the same, with the steps of a lead ahead of it; or NULL

cdef struct Lead:           # steps without slots
    int length
    int steps[LONGEST_LEAD]     # which of the table

cdef StepInfo step_table[MAX_STEPS]
cdef Lead leads[MAX_LEADS]
cdef int leads_known = 0
max_slots = MAX_SLOTS
step_index = {}
"""Where the step of each class of rules.py stands in the table, by the name of the class."""

cdef int add_step(str name, int slots, int coefs, Step single, Step double_,
                  Step single_finish, Step double_finish) except -1:
    cdef int k = len(step_index)
    if k == MAX_STEPS or slots > MAX_SLOTS:
        raise ImportError(f"no room for the step of {name}")
    step_table[k].index = k
    step_table[k].slots = slots
    step_table[k].coefs = coefs
    step_table[k].run[0] = single
    step_table[k].run[1] = double_
    step_table[k].finish[0] = single_finish
    step_table[k].finish[1] = double_finish
    step_index[name] = k
    return 0

cdef int add_lead(tuple names) except -1:
    """Add a lead, for the steps that `add_led` adds next."""
    global leads_known
    if leads_known == MAX_LEADS or len(names) > LONGEST_LEAD:
        raise ImportError(f"no room for {names} ahead of a step")
    leads[leads_known].length = len(names)
    for k, name in enumerate(names):
        leads[leads_known].steps[k] = step_index[name]
    leads_known += 1
    return 0

cdef int add_led(str name, Step single, Step double_) except -1:
    cdef Step* led = step_table[<int> step_index[name]].led[leads_known - 1]
    led[0], led[1] = single, double_
    return 0

include "_steps.pxi"

fill_table()

# --- what a batch is made of -----------------------------------------------------------------

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

cdef struct Led:            # a last stage that does what others ahead of it do
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


cdef void sort_spans(Span* spans, Span* spare, Py_ssize_t n) noexcept nogil:
    """Sort by address; in one pass where, as arrays often do, a few rising runs come together."""
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
    """Tell whether span `k` is the first of the sorted ones that ends after `low`; `n` is none."""
    return (
        k <= n
        and (k == n or spans[k].high > low)
        and (k == 0 or spans[k - 1].high <= low)
    )


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

cdef struct Work:           # the memory of a batch, lent from one to the next
    Vector segments
    Vector stages
    Vector numbers          # coefs, cast to the dtype of their leaf, one in eight bytes
    Vector norms
    Vector counts
    Vector spans            # of slots, then of all that is written
    Vector parameters       # spans of parameters
    Vector scratch          # blocks for each thread: see Batch.lend_scratch
    Vector held             # what is owned as long as its memory is in use
    PyObject* rule          # the last rule met and its plan: the next batch often has the same
    PyObject* plan

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
    return work


cdef void give_back(Work* work) noexcept:
    cdef Vector* vectors = <Vector*> work
    cdef int k
    let_go(&work.held, 0)
    for k in range(VECTORS):
        vectors[k].length = 0
    work = <Work*> exchange(<void**> &spare, work)
    if work is not NULL:
        vectors = <Vector*> work
        for k in range(VECTORS):
            free(vectors[k].data)
        Py_XDECREF(work.rule)
        Py_XDECREF(work.plan)
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


cdef inline void hold(Work* work, cnp.ndarray a, Py_ssize_t bytes) noexcept:
    """Own an array from now on, of whose memory so many bytes are used (see f).

    There must be room: one question for all the arrays of a leaf is less than one for each.
    """
    cdef Held* held = <Held*> work.held.data + work.held.length
    Py_INCREF(a)
    held.array, held.data, held.bytes = <PyObject*> a, cnp.PyArray_BYTES(a), bytes
    work.held.length += 1


cdef inline Py_ssize_t bytes_of(cnp.ndarray a) noexcept:
    cdef Py_ssize_t bytes = cnp.PyArray_ITEMSIZE(a)
    cdef int k
    for k in range(cnp.PyArray_NDIM(a)):
        bytes *= cnp.PyArray_DIM(a, k)
    return bytes


cdef bint is_within(Held* held, PyObject* base) noexcept:
    """Tell whether the memory in use is still its owner's, if that is an array."""
    cdef char* start
    if base is NULL or not cnp.PyArray_Check(<object> base):
        return True
    if not cnp.PyArray_CHKFLAGS(<cnp.ndarray> base, cnp.NPY_ARRAY_OWNDATA):
        return True
    start = cnp.PyArray_BYTES(<cnp.ndarray> base)
    return (
        held.data >= start
        and held.data + held.bytes <= start + bytes_of(<cnp.ndarray> base)
    )


cdef int check_held(Work* work, Py_ssize_t first, Py_ssize_t end) except -1:
    """Raise if what is held from `first` to `end` no longer has the memory that is in use."""
    cdef Held* held = <Held*> work.held.data
    cdef Py_ssize_t k
    for k in range(first, end):
        if (
            cnp.PyArray_BYTES(<cnp.ndarray> held[k].array) != held[k].data
            or bytes_of(<cnp.ndarray> held[k].array) < held[k].bytes
            or not is_within(held + k, cnp.PyArray_BASE(<cnp.ndarray> held[k].array))
        ):
            raise RuntimeError(
                "an array of the parameter, its gradient or its state was given other memory while "
                "the step was under way; nothing was updated"
            )
    return 0


cdef int make_room(Vector* v, size_t size, Py_ssize_t room) except -1:
    cdef char* data = <char*> realloc(v.data, room * size)
    if data is NULL:
        raise MemoryError(f"no memory for {room} work items")
    v.data, v.room = data, room
    return 0

# --- settings --------------------------------------------------------------------------------

# Numbers in a block, if one loop does all to them: then blocks only have to be shared out. Those of
# a chain stay in the cache from step to step, and are short, so that the processor can fetch the
# next one meanwhile.
cdef Py_ssize_t block = 4096
cdef Py_ssize_t chain_block = 256
cdef Py_ssize_t work_per_thread = 200_000   # bytes read and written: see set_work_per_thread
cdef int threads_wanted = 0             # 0: as OpenMP says
cdef int processors = os.cpu_count() or 1


def instruction_sets():
    """Return the names of the twins of this module that the processor runs, widest first."""
    return ["avx512"] * bool(runs_avx512()) + ["avx2"] * bool(runs_avx2())


def set_block(Py_ssize_t alone, Py_ssize_t in_chain=0):
    """Set how many numbers a block has for one step, and for a chain; for tests, measurements."""
    global block, chain_block
    in_chain = in_chain or alone
    for numbers in (alone, in_chain):
        if not LANES <= numbers <= MAX_BLOCK or numbers % LANES:
            raise ValueError(f"a block has a multiple of {LANES} numbers, at most {MAX_BLOCK}")
    block, chain_block = alone, in_chain


def set_work_per_thread(Py_ssize_t bytes):
    """Set how many bytes each thread must have to move, to be worth its while.

    The default, and `WAKING`, are where a second thread began to pay on the machines it was
    measured on, awake and asleep, by ``python asv_bench/threads.py``.
    """
    global work_per_thread
    work_per_thread = max(1, bytes)


def settings():
    """Return numbers in a block, in a block of a chain, bytes that a thread must have to move."""
    return block, chain_block, work_per_thread


def set_num_threads(int n):
    """Set the most threads that a run uses; 0 leaves it to OpenMP."""
    global threads_wanted
    threads_wanted = n


def get_num_threads():
    """Return the most threads that a run uses."""
    return most_threads()


def after_fork():
    """Give a forked child threads of its own: those there were stayed with the parent."""
    team_forked()


cdef int most_threads() noexcept nogil:
    return threads_wanted or omp_get_max_threads() or processors

cdef tuple floats(numbers):
    """Return a tuple of nothing but floats; code of users may run."""
    cdef tuple items = tuple(numbers)
    cdef Py_ssize_t k
    for k in range(len(items)):
        if type(items[k]) is not float:
            return tuple([float(number) for number in items])
    return items

cdef inline object item(object a_tuple, Py_ssize_t k):
    """Return an item of a tuple, also of a named one, unchecked."""
    return <object> PyTuple_GET_ITEM(a_tuple, k)

# --- plans -----------------------------------------------------------------------------------

cdef class Plan:
    """A rule made ready for the kernels."""

    cdef readonly object rule

    def __cinit__(self, rule, *args):
        self.rule = rule

    cdef int forget(self) except -1:
        """Forget what holds for one batch only."""
        return 0

    cdef bint stack(self, Batch batch, Segment* leaf, old, new) except -1:
        """Add stages that read the state `old` and write `new`; tell whether they can."""
        return False


cdef class StepPlan(Plan):
    """An elementwise rule whose step stands at `index` of the table."""

    cdef StepInfo step
    cdef bint counts            # whether coefs takes t
    cdef object coefs
    cdef int64_t known_t[2]     # for float and for double: the count of steps ...
    cdef Py_ssize_t known[2]    # ... for which the batch holds the coefs, and where

    def __init__(self, rule, int index, bint counts):
        self.step = step_table[index]
        self.counts = counts
        self.coefs = rule.coefs
        self.forget()

    cdef int forget(self) except -1:
        self.known[0] = self.known[1] = -1
        return 0

    cdef bint stack(self, Batch batch, Segment* leaf, old, new) except -1:
        cdef int64_t t = 0
        cdef int kind = leaf.is_double
        cdef Stage* stage
        if PyTuple_GET_SIZE(old) != self.step.slots + self.counts:
            return False
        if self.counts:
            t = batch.read_count(item(old, self.step.slots)) + 1
            if t == 0:
                return False
        if self.known[kind] < 0 or self.known_t[kind] != t:
            # Code of users: first, while no address of this leaf's state has been read.
            numbers = floats(self.coefs(t) if self.counts else self.coefs())
            batch.asked = batch.work.held.length
            if len(numbers) != self.step.coefs:
                return False
            self.known[kind] = batch.add_numbers(numbers, kind)
            self.known_t[kind] = t
        stage = batch.add_stage(leaf, &self.step, old, new)
        if stage is NULL:
            return False
        stage.coefs = self.known[kind]
        if self.counts:
            batch.store_count(new, self.step.slots, t, leaf)
        return True


cdef class LatePlan(StepPlan):
    """An elementwise rule whose step is compiled when it first meets a dtype.

    `find(rule, is_double)` returns the address of its step (see `Step`) and how many coefs that
    takes, or None.
    """

    cdef object find

    def __init__(self, rule, int slots, bint counts, find):
        self.step.index, self.step.slots = -1, slots
        self.step.run[0] = self.step.run[1] = NULL
        self.step.finish[0] = self.step.finish[1] = NULL
        self.counts = counts
        self.coefs = rule.coefs
        self.find = find
        self.forget()

    cdef bint stack(self, Batch batch, Segment* leaf, old, new) except -1:
        cdef uintptr_t address
        if self.step.run[leaf.is_double] is NULL:
            found = None if self.find is None else self.find(self.rule, leaf.is_double)
            if found is None:
                self.find = None
                return False
            address, self.step.coefs = found
            self.step.run[leaf.is_double] = <Step> <void*> address
        return StepPlan.stack(self, batch, leaf, old, new)


cdef class ChainPlan(Plan):
    """Rules one after another."""

    cdef tuple parts

    def __init__(self, rule, tuple parts):
        self.parts = parts

    cdef int forget(self) except -1:
        cdef Plan part
        for part in self.parts:
            part.forget()
        return 0

    cdef bint stack(self, Batch batch, Segment* leaf, old, new) except -1:
        cdef Plan part
        cdef Py_ssize_t k
        cdef bint alone = leaf.alone
        if PyTuple_GET_SIZE(old) != PyTuple_GET_SIZE(self.parts):
            return False
        for k in range(PyTuple_GET_SIZE(self.parts)):
            leaf.alone = alone and is_alone(PyTuple_GET_ITEM(old, k))
            part = <Plan> item(self.parts, k)
            if not PyTuple_Check(item(old, k)):
                return False
            if leaf.swallowed:
                if not batch.carry_over(item(old, k), item(new, k)):
                    return False
            elif not part.stack(batch, leaf, item(old, k), item(new, k)):
                return False
        return True


cdef class NormPlan(Plan):
    """A barrier: `rule.factor` turns the p-norm of what comes into the number of a step."""

    cdef StepInfo step
    cdef double p

    def __init__(self, rule, int index, double p):
        self.step = step_table[index]
        self.p = p

    cdef bint stack(self, Batch batch, Segment* leaf, old, new) except -1:
        cdef Stage* stage
        if PyTuple_GET_SIZE(old):       # not this rule's; a new one would stay empty
            return False
        stage = batch.add_stage(leaf, &self.step, (), ())
        stage.coefs = batch.add_numbers((1.0,), leaf.is_double)
        batch.add_norm(self.rule, self.p)
        return True


cdef class AccumulatePlan(Plan):
    """A rule that holds n - 1 gradients back and releases the mean with the n-th."""

    cdef Plan hold
    cdef Plan release
    cdef int64_t n

    def __init__(self, rule, Plan hold, Plan release, int64_t n):
        self.hold, self.release, self.n = hold, release, n

    cdef int forget(self) except -1:
        self.hold.forget()
        return self.release.forget()

    cdef bint stack(self, Batch batch, Segment* leaf, old, new) except -1:
        cdef int64_t held
        if PyTuple_GET_SIZE(old) != 2:
            return False
        held = batch.read_count(item(old, 1))
        if held < 0:
            return False
        leaf.swallowed = held + 1 < self.n
        batch.asked = batch.work.held.length    # a new object may be the one that garbage waits for
        old_sum, new_sum = PyTuple_GetSlice(old, 0, 1), PyTuple_GetSlice(new, 0, 1)
        if not leaf.is_double and not is_single(item(old, 0)):     # a narrow one goes on as float
            return False
        batch.store_count(new, 1, held + 1 if leaf.swallowed else 0, leaf)
        return (self.hold if leaf.swallowed else self.release).stack(
            batch, leaf, old_sum, new_sum
        )


cdef class MixedPlan(Plan):
    """A rule that updates a master copy of a parameter, which may be narrower."""

    cdef Plan inner
    cdef int kind           # of the master's numbers

    def __init__(self, rule, Plan inner):
        self.inner = inner
        self.kind = rule.dtype.num

    cdef int forget(self) except -1:
        return self.inner.forget()


cdef int bfloat16 = -1      # NumPy's number of it; to ask for names takes as long as an update


cdef inline bint is_single(a) noexcept:
    return cnp.PyArray_Check(a) and cnp.PyArray_TYPE(<cnp.ndarray> a) == cnp.NPY_FLOAT


cdef inline int updated_in(cnp.ndarray x) noexcept:
    """Return the NumPy type in which a step on a parameter is computed, if it is computed here."""
    return cnp.NPY_DOUBLE if cnp.PyArray_TYPE(x) == cnp.NPY_DOUBLE else cnp.NPY_FLOAT


cdef int kind_beside(cnp.ndarray a, int updated) except -2:
    """Return the `Kind` of an array where this NumPy type is updated; -1 if there is none."""
    global bfloat16
    cdef int kind = cnp.PyArray_TYPE(a)
    if updated != cnp.NPY_FLOAT and updated != cnp.NPY_DOUBLE:
        return -1
    if kind == updated:
        return SAME
    if updated == cnp.NPY_DOUBLE:
        return FLOAT32 if kind == cnp.NPY_FLOAT else -1
    if kind == NPY_HALF:
        return FLOAT16
    if kind >= NPY_USERDEF and kind != bfloat16 and a.dtype.name == "bfloat16":
        bfloat16 = kind
    return BFLOAT16 if kind == bfloat16 else -1


cdef class UsualEnvironment:
    """A context in which this thread computes in the usual floating-point environment.

    So that what is summed, cast and computed by NumPy around a run has the same bits as well.
    """

    cdef float_environment before

    def __enter__(self):
        self.before = environment_enter()

    def __exit__(self, *error):
        environment_leave(self.before)


# --- what the walk asks of many leaves at once -----------------------------------------------


def all_are(kind, list objects):
    """Tell whether all objects of a list are of this class itself."""
    cdef Py_ssize_t k
    for k in range(len(objects)):
        if type(objects[k]) is not kind:
            return False
    return True


def same_keys(dict a, dict b, dict c):
    """Tell whether three dictionaries have the same keys, in the same order."""
    cdef PyObject *in_a
    cdef PyObject *in_b
    cdef PyObject *in_c
    cdef Py_ssize_t i = 0, j = 0, k = 0
    if not len(a) == len(b) == len(c):
        return False
    while PyDict_Next(a, &i, &in_a, NULL):
        PyDict_Next(b, &j, &in_b, NULL)
        PyDict_Next(c, &k, &in_c, NULL)
        if not in_a == in_b == in_c:    # equal all the same?
            return [*a] == [*b] == [*c]
    return True


def are_distinct(list objects):
    """Tell whether no object stands twice in a list."""
    cdef Py_ssize_t n = len(objects), width = 2, k, at
    cdef uintptr_t* table
    cdef uintptr_t p
    cdef bint found = False
    while n > <Py_ssize_t> 1 << (width - 1):    # so that half the table stays empty
        width += 1
    table = <uintptr_t*> calloc(<size_t> 1 << width, sizeof(uintptr_t))
    if table is NULL:
        raise MemoryError
    for k in range(n):
        p = <uintptr_t> PyList_GET_ITEM(objects, k)
        at = <Py_ssize_t> (<uint64_t> p * GOLDEN >> (64 - width))
        while table[at] and table[at] != p:
            at = (at + 1) & ((<Py_ssize_t> 1 << width) - 1)
        if table[at]:
            found = True
            break
        table[at] = p
    free(table)
    return not found


# --- gathering -------------------------------------------------------------------------------

cdef class Slots:
    """Where the leaves of a class keep their attributes: see `slot_offset`."""

    cdef object kind
    cdef Py_ssize_t frozen
    cdef Py_ssize_t rule
    cdef Py_ssize_t state

    def __init__(self, kind):
        self.kind = kind
        self.frozen = slot_offset(kind, b"frozen")
        self.rule = slot_offset(kind, b"rule")
        self.state = slot_offset(kind, b"state")


cdef Slots known_slots = Slots(object)


cdef inline Slots slots_of(leaf):
    global known_slots
    cdef Slots slots = known_slots
    if type(leaf) is not slots.kind:
        known_slots = slots = Slots(type(leaf))
    return slots


cdef inline bint ready(cnp.ndarray a, int kind, bint c_order) noexcept:
    """Tell whether `a` is plain memory of one type, in the order asked for."""
    cdef int order = cnp.NPY_ARRAY_C_CONTIGUOUS if c_order else cnp.NPY_ARRAY_F_CONTIGUOUS
    return (
        cnp.PyArray_TYPE(a) == kind
        and cnp.PyArray_CHKFLAGS(a, order | cnp.NPY_ARRAY_ALIGNED)
        and cnp.PyArray_ISNOTSWAPPED(a)
    )


cdef inline bint is_alone(PyObject* held, Py_ssize_t holders=1) noexcept:
    """Tell whether nobody holds an object but so many holders that are known."""
    return Py_REFCNT(<object> held) <= holders


cdef inline bint owns(PyObject* array) noexcept:
    """Tell whether the memory of an array in a tuple is no other array's, so far as that goes.

    One that owns its memory shares it with views alone, and these would hold it as well.
    """
    return is_alone(array) and cnp.PyArray_CHKFLAGS(<cnp.ndarray> array, cnp.NPY_ARRAY_OWNDATA)


cdef inline bint is_lead(Lead* lead, Stage* stages) noexcept:
    """Tell whether these stages are those of a lead."""
    cdef int k
    for k in range(lead.length):
        if stages[k].index != lead.steps[k]:
            return False
    return True


cdef inline bint same_shape(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int k
    if cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for k in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, k) != cnp.PyArray_DIM(b, k):
            return False
    return True


@cython.freelist(2)
cdef class Batch:
    """Leaves to be updated together.

    Parameters
    ----------
    blank : callable or None
        Given a state, returns an empty one of the same form, which the run then fills, as it fills
        a new array for each parameter. None updates in place.
    """

    cdef object blank
    cdef Work* work
    cdef Py_ssize_t hint
    cdef Led led                # the last that was found
    cdef Py_ssize_t blocks      # in all segments ...
    cdef Py_ssize_t longest     # ... and most numbers in one
    cdef Py_ssize_t bytes       # that the update moves
    cdef Py_ssize_t gradients   # bytes of them
    cdef Py_ssize_t asked       # how many were held when code of users may have run
    cdef bint busy              # something is under way, or has failed
    cdef bint settled
    cdef bint widens            # whether a leaf has narrow numbers, but for gradient and master
    cdef object clash           # what `settle` found
    cdef list norm_rules
    cdef cnp.ndarray like       # the parameter that is being taken
    cdef readonly dict new_x
    """Place: array that takes the parameter's place, where it was not written in place."""
    cdef readonly dict new_state
    """Place: state that takes the place of the leaf's, where it was not written in place."""
    cdef readonly Py_ssize_t failed
    """Place of the leaf at which `gather` or `run` raised."""
    cdef readonly bint ran
    """Whether `gather` has run the batch, too."""

    def __cinit__(self, blank=None):
        self.work = borrow()
        self.blank = blank
        self.norm_rules = []
        self.new_x, self.new_state = {}, {}
        self.failed = self.led.last = -1
        self.busy = self.ran = self.settled = self.widens = False
        self.asked = self.blocks = self.longest = self.bytes = self.gradients = 0

    def __dealloc__(self):
        if self.work is not NULL:
            give_back(self.work)

    def places(self):
        """Return the places taken."""
        return self.places_of(bad=False)

    def loops(self):
        """Return for each place taken through how many loops its numbers pass; for tests."""
        cdef Py_ssize_t k
        cdef Segment* leaves = <Segment*> self.work.segments.data
        return {leaves[k].place: leaves[k].stages for k in range(self.work.segments.length)}

    cdef list places_of(self, bint bad):
        """Return the places taken, or those of them with a bad gradient.

        No comprehension: of those that Cython 3.3 makes, one without memory frees an item twice.
        """
        cdef Py_ssize_t k
        cdef Segment* leaves = <Segment*> self.work.segments.data
        cdef list found = []
        for k in range(self.work.segments.length):
            if leaves[k].is_bad or not bad:
                found.append(leaves[k].place)
        return found

    @cython.final
    cdef inline object slot(self, object leaf, Py_ssize_t offset, str name):
        """Return an attribute, without a search for it if its offset is known."""
        cdef PyObject* found = NULL
        if offset:
            found = (<PyObject**> (<char*> <PyObject*> leaf + offset))[0]
        if found is not NULL:
            return <object> found
        value = getattr(leaf, name)
        self.asked = self.work.held.length
        return value

    @cython.final
    cdef inline bint is_frozen(self, object leaf, Slots slots) except -1:
        frozen = self.slot(leaf, slots.frozen, "frozen")
        if frozen is True or frozen is False:
            return frozen is True
        is_true = bool(frozen)
        self.asked = self.work.held.length
        return is_true

    @cython.boundscheck(True)
    def gather(self, list leaves, list xs, list gs, lower, bint at_once=False):
        """Take every leaf that the kernels can update; return the places of the others.

        Places without a gradient and frozen leaves are neither taken nor returned. `lower` turns
        a rule into a plan, or None. If there are no others, and `at_once` says so, the batch runs,
        unless places clash.
        """
        cdef list rest = []
        cdef Py_ssize_t place
        cdef Plan plan = None
        cdef Slots slots = known_slots
        last = self             # no rule
        self.begin()
        for place in range(len(leaves)):
            leaf, x, g = leaves[place], xs[place], gs[place]
            if type(leaf) is not slots.kind:
                slots = slots_of(leaf)
            if g is None or self.is_frozen(leaf, slots):
                continue
            self.failed = place
            rule = self.slot(leaf, slots.rule, "rule")
            if rule is not last:
                last = rule
                plan = self.plan(rule, lower)
            if plan is None or not self.add(
                place, plan, self.slot(leaf, slots.state, "state"), x, g
            ):
                rest.append(place)
        self.failed = -1
        self.busy = False
        if at_once and not rest and self.settle() is None:
            self.ran = True
            self.finish()
        return rest

    def take(self, Py_ssize_t place, Plan plan, state, x, g):
        """Take one leaf if the kernels can; tell whether."""
        self.begin()
        cdef bint taken = self.add(place, plan, state, x, g)
        self.busy = False
        return taken

    cdef int begin(self) except -1:
        """Refuse what code of users might ask in the middle of something, or after an error."""
        if self.busy:
            raise RuntimeError("this batch is at work, or has failed")
        self.busy = True
        return 0

    cdef Plan plan(self, rule, lower):
        """Return the plan of a rule, or None; often that of the last batch.

        A rule without a plan is not kept: it may hold what JAX traces, which must not outlive the
        trace.
        """
        cdef Plan plan
        cdef PyObject *last_rule
        cdef PyObject *last_plan
        if self.work.rule == <PyObject*> rule:
            plan = <Plan> <object> self.work.plan
            plan.forget()
            return plan
        plan = lower(rule)
        self.asked = self.work.held.length
        if plan is not None:
            last_rule, last_plan = self.work.rule, self.work.plan
            Py_INCREF(rule)
            Py_INCREF(plan)
            self.work.rule, self.work.plan = <PyObject*> rule, <PyObject*> plan
            Py_XDECREF(last_rule)
            Py_XDECREF(last_plan)
        return plan

    cdef bint add(self, Py_ssize_t place, Plan plan, state, x, g) except -1:
        """Add a segment for one leaf if the kernels can take it; tell whether."""
        cdef cnp.ndarray xa, ga, old, new
        cdef Segment leaf
        cdef int kind, of_x, of_g
        cdef Py_ssize_t size
        leaf.alone = is_alone(<PyObject*> state, 2)     # the leaf, and who calls this
        if not cnp.PyArray_CheckExact(x) or not cnp.PyArray_CheckExact(g):
            return False
        xa, ga = <cnp.ndarray> x, <cnp.ndarray> g
        leaf.c_order = cnp.PyArray_IS_C_CONTIGUOUS(xa)
        leaf.is_copy = isinstance(plan, MixedPlan)
        kind = (<MixedPlan> plan).kind if leaf.is_copy else updated_in(xa)
        of_x, of_g = self.kind_of(xa, kind), self.kind_of(ga, kind)
        if of_x < 0 or of_g < 0:
            return False
        leaf.of_parameter, leaf.of_g = <Kind> of_x, <Kind> of_g
        leaf.of_x = SAME if leaf.is_copy else leaf.of_parameter
        leaf.narrow = leaf.of_x != SAME
        if not ready(xa, cnp.PyArray_TYPE(xa), leaf.c_order):
            return False
        if not ready(ga, cnp.PyArray_TYPE(ga), leaf.c_order):
            return False
        if not PyTuple_Check(state) or not same_shape(xa, ga):
            return False
        if self.blank is not None:
            self.asked = self.work.held.length
        made = state if self.blank is None else self.blank_like(state)

        old_state, new_state, old, new = state, made, xa, xa
        if leaf.is_copy:
            if PyTuple_GET_SIZE(state) != 2:
                return False
            if not cnp.PyArray_CheckExact(item(state, 0)) or not PyTuple_Check(item(state, 1)):
                return False
            old, new = <cnp.ndarray> item(state, 0), <cnp.ndarray> item(made, 0)
            if not ready(old, kind, leaf.c_order) or not same_shape(old, xa):
                return False
            if not cnp.PyArray_ISWRITEABLE(new):
                return False
            leaf.alone = leaf.alone and is_alone(PyTuple_GET_ITEM(state, 1))
            plan, old_state, new_state = (<MixedPlan> plan).inner, item(state, 1), item(made, 1)

        self.like = xa
        leaf.n = cnp.PyArray_SIZE(xa)
        leaf.is_double = kind == cnp.NPY_DOUBLE
        leaf.place = place
        leaf.swallowed = False
        leaf.is_bad = 0
        leaf.first = self.work.stages.length
        leaf.held = self.work.held.length
        norms, counts, spans = (
            self.work.norms.length, self.work.counts.length, self.work.spans.length
        )
        if not plan.stack(self, &leaf, old_state, new_state):
            self.work.stages.length = leaf.first
            self.work.norms.length = norms
            self.work.counts.length = counts
            self.work.spans.length = spans
            let_go(&self.work.held, leaf.held)
            del self.norm_rules[norms:]
            return False
        if self.work.stages.length > leaf.first + 1:
            self.draw_in(&leaf, norms)
        leaf.stages = self.work.stages.length - leaf.first
        if self.blank is not None:
            self.new_state[place] = made
        elif leaf.is_copy:
            self.add_span(&self.work.spans, new, leaf.n, place)
        leaf.unrounded = cnp.PyArray_BYTES(xa)
        size = leaf.n * number_size(&leaf, leaf.of_parameter)
        reserve(&self.work.held, sizeof(Held), 5)
        hold(self.work, xa, size)
        hold(self.work, ga, leaf.n * number_size(&leaf, leaf.of_g))
        if leaf.is_copy:
            hold(self.work, old, leaf.n * number_size(&leaf, SAME))
            if new is not old:
                hold(self.work, new, leaf.n * number_size(&leaf, SAME))
        if self.blank is not None or not cnp.PyArray_ISWRITEABLE(xa):
            xa = PyArray_NewLikeArray(xa, cnp.NPY_KEEPORDER, NULL, 0)
            self.new_x[place] = xa
            hold(self.work, xa, size)
        else:
            self.add_span(&self.work.parameters, xa, leaf.n, place)
        leaf.g, leaf.x = cnp.PyArray_BYTES(ga), cnp.PyArray_BYTES(old)
        leaf.out = cnp.PyArray_BYTES(new if leaf.is_copy else xa)
        leaf.rounded = cnp.PyArray_BYTES(xa)
        leaf.held_end = self.work.held.length
        self.widens |= leaf.narrow
        self.cut(&leaf)
        (<Segment*> push(&self.work.segments, sizeof(Segment)))[0] = leaf
        return True

    cdef void cut(self, Segment* leaf) noexcept:
        """Cut a segment into blocks, and add to what there is to do."""
        cdef Stage* stages = <Stage*> self.work.stages.data
        cdef Py_ssize_t bytes = traffic(stages, leaf, leaf.first + leaf.stages)
        cdef bint at_once = (
            leaf.stages == 1 and stages[leaf.first].finish is not NULL
            and leaf.of_g == SAME and not leaf.is_copy and not leaf.narrow
        )
        leaf.block = block if at_once else chain_block
        if leaf.narrow:
            leaf.block = min(2 * leaf.block, <Py_ssize_t> MAX_BLOCK)    # half as many bytes come
        if self.blank is not None:
            leaf.block = min(leaf.block, <Py_ssize_t> (COPIED_FAR if bytes >= FAR else COPIED))
        leaf.short_by = shortage(leaf)
        self.longest = max(self.longest, leaf.block)
        self.blocks += (leaf.short_by + leaf.n + leaf.block - 1) // leaf.block
        leaf.blocks = self.blocks
        self.bytes += bytes
        self.gradients += leaf.n * number_size(leaf, leaf.of_g)

    cdef object blank_like(self, state):
        """Return an empty state of the same form; `blank` is asked for what is no plain array."""
        cdef Py_ssize_t k
        cdef tuple made
        if cnp.PyArray_CheckExact(state):
            return PyArray_NewLikeArray(<cnp.ndarray> state, cnp.NPY_KEEPORDER, NULL, 0)
        if not PyTuple_Check(state):
            return self.blank(state)
        made = PyTuple_New(PyTuple_GET_SIZE(state))
        Py_EnterRecursiveCall(b" while a state is copied")
        try:
            for k in range(PyTuple_GET_SIZE(state)):
                part = self.blank_like(item(state, k))
                Py_INCREF(part)             # which the tuple takes over
                PyTuple_SET_ITEM(made, k, part)
        finally:
            Py_LeaveRecursiveCall()
        self.asked = self.work.held.length
        return made if type(state) is tuple else tuple.__new__(type(state), made)

    cdef Stage* add_stage(self, Segment* leaf, StepInfo* step, old, new) except? NULL:
        """Add a stage whose slots stand at the head of `old` and `new`; NULL if they cannot."""
        cdef Stage* stage = <Stage*> push(&self.work.stages, sizeof(Stage))
        cdef cnp.ndarray a, b
        cdef int k, own, of
        cdef bint alone
        cdef int kind = cnp.NPY_DOUBLE if leaf.is_double else cnp.NPY_FLOAT
        cdef Py_ssize_t whole = leaf.n * number_size(leaf, SAME), size
        stage.run, stage.finish = step.run[leaf.is_double], step.finish[leaf.is_double]
        stage.index, stage.slots = step.index, step.slots
        reserve(&self.work.held, sizeof(Held), 2 * step.slots)
        for k in range(step.slots):
            if not cnp.PyArray_CheckExact(item(old, k)):
                return NULL
            own = cnp.PyArray_TYPE(<cnp.ndarray> PyTuple_GET_ITEM(old, k))
            of, size = SAME, whole
            if own != kind:
                of = self.kind_of(<cnp.ndarray> item(old, k), kind)
                if of != FLOAT16 and of != BFLOAT16:
                    return NULL
                leaf.narrow = True
                size = 2 * leaf.n
            alone = leaf.alone and owns(PyTuple_GET_ITEM(old, k))
            a, b = <cnp.ndarray> item(old, k), <cnp.ndarray> item(new, k)
            if not ready(a, own, leaf.c_order) or not same_shape(a, self.like):
                return NULL
            stage.of[k] = of
            if a is b:
                if not cnp.PyArray_ISWRITEABLE(a):
                    return NULL
                if not alone:
                    self.add_span(&self.work.spans, a, leaf.n, leaf.place)
            stage.old[k], stage.new[k] = cnp.PyArray_BYTES(a), cnp.PyArray_BYTES(b)
            hold(self.work, a, size)
            if a is not b:
                hold(self.work, b, size)
        return stage

    @cython.final
    cdef inline int kind_of(self, cnp.ndarray a, int updated) except -2:
        """Return the `Kind` of an array where this NumPy type is updated; -1 if there is none."""
        cdef int of = SAME
        if cnp.PyArray_TYPE(a) != updated or updated > cnp.NPY_DOUBLE:
            of = kind_beside(a, updated)
            if cnp.PyArray_TYPE(a) >= NPY_USERDEF:
                self.asked = self.work.held.length      # Python may run: a dtype's name is its own
        return of

    cdef int draw_in(self, Segment* leaf, Py_ssize_t norms) except -1:
        """Let the last step's loop do those ahead of it too, if there is one that does.

        A barrier may begin such a loop, since all it waits for comes before. The leaf's own are
        those after the first `norms`.
        """
        cdef Stage* stages = <Stage*> self.work.stages.data
        cdef Py_ssize_t last = self.work.stages.length - 1, start = leaf.first, first
        if leaf.swallowed or stages[last].index < 0:
            return 0
        if self.work.norms.length > norms:
            start = (<Norm*> self.work.norms.data)[self.work.norms.length - 1].stage
        first = last - self.led.ahead
        if (
            first < start
            or stages[first].coefs != self.led.first
            or stages[last].coefs != self.led.last
        ):
            if not self.find_lead(leaf, stages, start, last):
                return 0
            first = last - self.led.ahead
        stages[first] = stages[last]
        stages[first].finish, stages[first].coefs = self.led.finish, self.led.coefs
        self.work.stages.length = first + 1
        return 0

    cdef bint find_lead(self, Segment* leaf, Stage* stages, Py_ssize_t start,
                        Py_ssize_t last) except -1:
        """Find the longest lead of stage `last` that does not begin before `start`."""
        cdef Step finish
        cdef Py_ssize_t first
        cdef int k
        for k in range(leads_known):
            first = last - leads[k].length
            finish = step_table[stages[last].index].led[k][leaf.is_double]
            if finish is not NULL and first >= start and is_lead(&leads[k], stages + first):
                self.led.ahead, self.led.finish = leads[k].length, finish
                self.led.first, self.led.last = stages[first].coefs, stages[last].coefs
                self.led.coefs = self.join_numbers(stages + first, last - first + 1, leaf)
                return True
        return False

    cdef Py_ssize_t join_numbers(self, Stage* stages, Py_ssize_t n, Segment* leaf) except -1:
        """Return where a copy of the coefs of `n` stages begins, one after another."""
        cdef Py_ssize_t at = self.work.numbers.length, size = number_size(leaf, SAME), k
        cdef Py_ssize_t coefs = 0
        cdef char* target
        for k in range(n):
            coefs += step_table[stages[k].index].coefs
        target = <char*> push(&self.work.numbers, sizeof(double), coefs)
        for k in range(n):
            coefs = step_table[stages[k].index].coefs
            memcpy(target, <double*> self.work.numbers.data + stages[k].coefs, coefs * size)
            target += coefs * size
        return at

    cdef Py_ssize_t add_numbers(self, tuple numbers, bint is_double) except -1:
        cdef Py_ssize_t at = self.work.numbers.length
        cdef Py_ssize_t k, n = len(numbers)
        cdef void* cells = push(&self.work.numbers, sizeof(double), n + 1)
        cdef double number
        for k in range(n):
            number = numbers[k]
            if is_double:
                (<double*> cells)[k] = number
            else:
                (<float*> cells)[k] = <float> number
        return at

    cdef int add_norm(self, rule, double p) except -1:
        cdef Norm* norm = <Norm*> push(&self.work.norms, sizeof(Norm))
        norm.segment, norm.stage, norm.p = self.work.segments.length, self.work.stages.length - 1, p
        self.norm_rules.append(rule)
        return 0

    cdef int64_t read_count(self, a) except? -1:
        """Return the count in the 0-d array `a`; -1 if it is no such thing, or cannot go on."""
        cdef cnp.ndarray count
        cdef int64_t value
        if not cnp.PyArray_CheckExact(a):
            return -1
        count = <cnp.ndarray> a
        if cnp.PyArray_NDIM(count) or not ready(count, cnp.NPY_INT64, True):
            return -1
        if not cnp.PyArray_ISWRITEABLE(count):
            return -1
        value = (<int64_t*> cnp.PyArray_DATA(count))[0]
        return value if value < INT64_MAX else -1

    cdef int store_count(self, state, Py_ssize_t k, int64_t value, Segment* leaf) except -1:
        """See to it that the run stores a count into item `k` of a state."""
        cdef bint alone = leaf.alone and owns(PyTuple_GET_ITEM(state, k))
        cdef cnp.ndarray a = <cnp.ndarray> item(state, k)
        cdef Count* count = <Count*> push(&self.work.counts, sizeof(Count))
        count.where = <int64_t*> cnp.PyArray_DATA(a)
        count.value = value
        reserve(&self.work.held, sizeof(Held), 1)
        hold(self.work, a, sizeof(int64_t))
        if not alone:
            self.add_span(&self.work.spans, a, 1, leaf.place)
        return 0

    cdef bint carry_over(self, old, new) except -1:
        """Copy a state that this step leaves alone, if it is made of arrays; tell whether it is."""
        cdef Py_ssize_t k
        if old is new:
            return True
        if cnp.PyArray_Check(old):
            new[...] = old
            return True
        if not PyTuple_Check(old):
            return False
        Py_EnterRecursiveCall(b" while a state is copied")
        try:
            for k in range(min(PyTuple_GET_SIZE(old), PyTuple_GET_SIZE(new))):
                if not self.carry_over(item(old, k), item(new, k)):
                    return False
        finally:
            Py_LeaveRecursiveCall()
        return True

    cdef inline int add_span(self, Vector* spans, cnp.ndarray a, Py_ssize_t n,
                             Py_ssize_t place) except -1:
        """Note that the run writes the `n` numbers of an array."""
        cdef Span* span
        if n:
            span = <Span*> push(spans, sizeof(Span))
            span.low = <uintptr_t> cnp.PyArray_DATA(a)
            span.high = span.low + n * cnp.PyArray_ITEMSIZE(a)
            span.place = place
        return 0

    cpdef settle(self):
        """See to it that nothing is written which is read elsewhere.

        Gradients and read-only parameters that lie in memory which the run writes are copied.
        Where two leaves would write the same memory, or one leaf twice, their places are returned,
        else None.
        """
        if self.settled:
            return self.clash
        self.settled = True
        self.clash = self.find_clash()
        if self.clash is None:
            self.keep_apart()
        return self.clash

    cdef object find_clash(self):
        cdef Py_ssize_t parameters = self.work.parameters.length
        cdef Py_ssize_t n = parameters + self.work.spans.length
        cdef Span* spans
        cdef Py_ssize_t k
        push(&self.work.spans, sizeof(Span), 1 + n + parameters)    # as many again to sort in
        spans = <Span*> self.work.spans.data
        self.work.spans.length = n
        if parameters:                  # else `data` may be NULL
            memcpy(spans + n - parameters, self.work.parameters.data, parameters * sizeof(Span))
        sort_spans(spans, spans + n, n)
        for k in range(1, self.work.spans.length):
            if spans[k].low < spans[k - 1].high:
                return spans[k - 1].place, spans[k].place
        return None

    cdef int keep_apart(self) except -1:
        cdef Segment* leaf
        cdef Py_ssize_t k
        cdef Py_ssize_t bytes
        for k in range(self.work.segments.length):
            leaf = <Segment*> self.work.segments.data + k
            leaf.g = self.apart(leaf, leaf.g, leaf.n * number_size(leaf, leaf.of_g))
            bytes = leaf.n * number_size(leaf, leaf.of_parameter)
            if leaf.is_copy:
                if leaf.rounded != leaf.unrounded:
                    leaf.unrounded = self.apart(leaf, leaf.unrounded, bytes)
            elif leaf.out != leaf.x:
                leaf.x = self.apart(leaf, leaf.x, bytes)
        return 0

    cdef const char* apart(self, Segment* leaf, const char* numbers,
                           Py_ssize_t bytes) except NULL:
        """Return where these numbers are not written over: as they lie, or in a copy."""
        cdef cnp.ndarray copy
        if not self.is_written(<uintptr_t> numbers, bytes):
            return numbers
        check_held(self.work, leaf.held, leaf.held_end)
        copy = cnp.PyArray_SimpleNew(1, <cnp.npy_intp*> &bytes, cnp.NPY_BYTE)
        reserve(&self.work.held, sizeof(Held), 1)
        hold(self.work, copy, bytes)
        memcpy(cnp.PyArray_DATA(copy), numbers, bytes)
        return cnp.PyArray_BYTES(copy)

    def writes(self, uintptr_t low, uintptr_t high):
        """Tell whether the run writes between two addresses; after `settle`."""
        return self.is_written(low, high - low)

    cdef bint is_written(self, uintptr_t low, Py_ssize_t bytes) noexcept:
        """Tell whether the run writes any of these bytes (spans are sorted and apart)."""
        cdef Span* spans = <Span*> self.work.spans.data
        cdef Py_ssize_t n = self.work.spans.length, first = 0, last = n, middle
        # Gradients often lie in the order of their parameters: look where the last one led.
        if is_first_above(spans, n, self.hint, low):
            first = last = self.hint
        elif is_first_above(spans, n, self.hint + 1, low):
            first = last = self.hint + 1
        while first < last:             # the first span that ends after `low`
            middle = (first + last) // 2
            if spans[middle].high <= low:
                first = middle + 1
            else:
                last = middle
        self.hint = first
        return first < n and spans[first].low < low + <uintptr_t> bytes

    # --- running -----------------------------------------------------------------------------

    def nonfinite(self):
        """Return the places of the leaves whose gradients hold infinity or NaN."""
        self.asked = self.work.held.length
        return self.places_of(bad=True) if self.judge() else []

    cdef bint judge(self) except -1:
        """Mark the leaves whose gradients hold infinity or NaN; tell whether there are any."""
        cdef Run run
        check_held(self.work, 0, self.asked)
        self.prepare(&run)
        run.is_bad = 0
        run.members = take_team(run.gradients)
        run.pieces = min(run.blocks, run.gradients // PIECE + 1, run.members * PIECES)
        work_on(&run, judge_piece, run.gradients)
        if run.members > 1:
            team_leave()
        return run.is_bad

    def run(self):
        """Update every leaf. Raises, if at all, before anything is written."""
        self.asked = self.work.held.length
        self.finish()

    @cython.boundscheck(True)
    cdef int finish(self) except -1:
        cdef Run run
        cdef float_environment before = environment_enter()
        cdef Py_ssize_t k
        cdef Segment* leaf
        cdef Norm* norm
        cdef Count* count
        cdef double value
        run.members = 1
        try:
            self.begin()
            self.prepare(&run)
            run.members = take_team(run.bytes)
            run.pieces = min(run.blocks, run.bytes // PIECE + 1, run.members * PIECES)
            self.lend_scratch(&run)
            for k in range(self.work.norms.length):
                norm = <Norm*> self.work.norms.data + k
                leaf = run.segments + norm.segment
                self.failed = leaf.place
                check_held(self.work, leaf.held, min(leaf.held_end, self.asked))
                with nogil:
                    value = norm_of(&run, leaf, norm.stage, norm.p)
                self.set_number(leaf, norm.stage, self.norm_rules[k].factor(value))
                self.asked = self.work.held.length
            self.failed = -1
            check_held(self.work, 0, self.asked)
            work_on(&run, update_piece, run.bytes)
            for k in range(self.work.counts.length):
                count = <Count*> self.work.counts.data + k
                count.where[0] = count.value
            self.busy = False
            return 0
        finally:
            if run.members > 1:
                team_leave()
            environment_leave(before)

    cdef void prepare(self, Run* run) noexcept:
        """Say what there is to do."""
        run.segments = <Segment*> self.work.segments.data
        run.length = self.work.segments.length
        run.stages = <Stage*> self.work.stages.data
        run.numbers = <double*> self.work.numbers.data
        run.blocks, run.bytes, run.gradients = self.blocks, self.bytes, self.gradients

    cdef int lend_scratch(self, Run* run) except -1:
        """Lend each thread memory for its blocks, from the start of a cache line.

        It does not lie on their stacks, which Python lets users make small.
        """
        cdef Py_ssize_t blocks = WIDENING if self.work.norms.length or self.widens else RUNNING
        cdef uintptr_t start
        run.room = blocks * self.longest
        self.work.scratch.length = 0
        start = <uintptr_t> push(&self.work.scratch, sizeof(double), run.members * run.room + 8)
        run.scratch = <double*> ((start + 63) & ~<uintptr_t> 63)
        return 0

    cdef int set_number(self, Segment* leaf, Py_ssize_t stage, double value) except -1:
        cdef Py_ssize_t at = (<Stage*> self.work.stages.data)[stage].coefs
        cdef void* cell = <double*> self.work.numbers.data + at
        if leaf.is_double:
            (<double*> cell)[0] = value
        else:
            (<float*> cell)[0] = <float> value
        return 0


def update_one(leaf, x, g, lower, on_nonfinite):
    """Update one leaf in place, unless anything at all is out of the ordinary; tell whether it did.

    If not, nothing was written, and who takes the long way finds out what it is. A gradient that
    holds infinity or NaN is ordinary if these are to be ignored.
    """
    cdef Batch batch
    cdef Slots slots = slots_of(leaf)
    cdef Plan plan
    cdef float_environment before
    cdef bint judges = on_nonfinite != "ignore"
    if judges and on_nonfinite != "raise" and on_nonfinite != "skip":
        return False
    before = environment_enter()
    batch = Batch()
    try:
        if not cnp.PyArray_CheckExact(x) or g is None or batch.is_frozen(leaf, slots):
            return False
        plan = batch.plan(batch.slot(leaf, slots.rule, "rule"), lower)
        if plan is None or not batch.add(0, plan, batch.slot(leaf, slots.state, "state"), x, g):
            return False
        if batch.new_x or batch.settle() is not None or (judges and batch.judge()):
            return False
        batch.finish()
    except Exception:
        return False
    finally:
        environment_leave(before)
    return True


# --- a run -----------------------------------------------------------------------------------

cdef struct Run:            # what the threads share
    Segment* segments
    Py_ssize_t length
    Stage* stages
    double* numbers
    Py_ssize_t blocks       # in all segments
    Py_ssize_t bytes        # that the update moves
    Py_ssize_t gradients    # bytes of them
    Py_ssize_t pieces       # into which it is cut
    int members             # threads, the caller's among them
    double* scratch         # their memory ...
    Py_ssize_t room         # ... and how much of it each has
    int64_t is_bad          # whether infinity or NaN was found in any gradient


cdef inline Py_ssize_t number_size(Segment* leaf, Kind kind) noexcept nogil:
    """Return how many bytes a number of some kind has at this leaf."""
    if kind == SAME:
        return 8 if leaf.is_double else 4
    return 4 if kind == FLOAT32 else 2


cdef inline Py_ssize_t shortage(Segment* leaf) noexcept nogil:
    """Return how many numbers the first block must lack, so that the others begin at a cache line.

    Large arrays of one model often begin equally far from one.
    """
    cdef Py_ssize_t ahead
    if leaf.n < LINED_UP:
        return 0
    ahead = (-<uintptr_t> leaf.out % LINE) // number_size(leaf, leaf.of_x)
    return leaf.block - ahead if ahead else 0


cdef inline Py_ssize_t start_of(Segment* leaf, Py_ssize_t k) noexcept nogil:
    """Return where a block of a leaf starts, and so the one before it ends."""
    return min(max(k * leaf.block - leaf.short_by, 0), leaf.n)


cdef inline int enough(Py_ssize_t bytes) noexcept nogil:
    """Return how many threads have enough to do, if there are so many bytes to move."""
    return <int> max(1, min(<Py_ssize_t> TEAM_MOST, bytes // work_per_thread))


cdef int take_team(Py_ssize_t bytes):
    """Take as many threads as have enough to do, if they are free; return how many."""
    cdef int members = enough(bytes)
    return team_take(min(most_threads(), members)) if members > 1 else 1


cdef void share_out(int members, team_piece piece, void* job, Py_ssize_t pieces,
                    Py_ssize_t bytes) noexcept nogil:
    """Do all pieces of a job: together, if there is enough to do."""
    cdef Py_ssize_t k
    members = min(members, enough(bytes))
    if members > 1:
        team_run(piece, job, pieces, members, bytes >= WAKING * work_per_thread)
    else:
        for k in range(pieces):
            piece(job, k, 0)


cdef void work_on(Run* run, team_piece piece, Py_ssize_t bytes) noexcept:
    """Do all pieces of a run; if that takes a while, other threads of Python go on meanwhile."""
    if bytes < SHORT and run.members == 1:
        share_out(1, piece, run, run.pieces, bytes)
        return
    with nogil:
        share_out(run.members, piece, run, run.pieces, bytes)


cdef Py_ssize_t traffic(Stage* stages, Segment* leaf, Py_ssize_t end) noexcept nogil:
    """Return how many bytes the stages before `end` and the subtraction move."""
    cdef Py_ssize_t arrays = 3, k
    for k in range(leaf.first, end):
        arrays += 2 * stages[k].slots
    return arrays * leaf.n * (8 if leaf.is_double else 4)


cdef void update_piece(void* job, int64_t k, int member) noexcept nogil:
    """Update the blocks of piece `k`; blocks are counted over all segments."""
    cdef Run* run = <Run*> job
    cdef char* scratch = <char*> (run.scratch + member * run.room)
    cdef Py_ssize_t first = k * run.blocks // run.pieces
    cdef Py_ssize_t last = (k + 1) * run.blocks // run.pieces
    cdef Segment* leaf
    cdef Py_ssize_t at = segment_of(run.segments, run.length, first), before, start, n
    cdef const char* dx
    while first < last:
        leaf = run.segments + at
        before = run.segments[at - 1].blocks if at else 0
        while first < last and first < leaf.blocks:
            start = start_of(leaf, first - before)
            n = min(leaf.block - (0 if start else leaf.short_by), leaf.n - start)
            dx = chain(run, leaf, leaf.first + leaf.stages, start, n, scratch, False)
            if leaf.of_x != SAME:
                narrow_parameter(leaf, dx, start, n, scratch)
            elif dx is NULL:
                pass
            elif leaf.is_double:
                subtract[double](leaf.x, leaf.out, dx, start, n, leaf.swallowed)
            else:
                subtract[float](leaf.x, leaf.out, dx, start, n, leaf.swallowed)
            if leaf.is_copy:
                hand_on(leaf, start, n)
            first += 1
        at += 1


cdef Py_ssize_t segment_of(Segment* segments, Py_ssize_t n, Py_ssize_t wanted) noexcept nogil:
    """Return which of `n` segments holds a block, counted over all of them."""
    cdef Py_ssize_t low = 0, middle
    while low < n:
        middle = (low + n) // 2
        if segments[middle].blocks <= wanted:
            low = middle + 1
        else:
            n = middle
    return low


cdef const char* chain(Run* run, Segment* leaf, Py_ssize_t end, Py_ssize_t start, Py_ssize_t n,
                       char* scratch, bint dry) noexcept nogil:
    """Run the stages before `end` on one block; return where the step then lies."""
    if leaf.narrow:     # in a copy of the code, so that the usual one asks nothing of slots
        return chain_of(run, leaf, end, start, n, scratch, dry, True)
    return chain_of(run, leaf, end, start, n, scratch, dry, False)


cdef inline const char* chain_of(Run* run, Segment* leaf, Py_ssize_t end, Py_ssize_t start,
                                 Py_ssize_t n, char* scratch, bint dry, bint narrow) noexcept nogil:
    """Run the stages before `end` on one block; return where the step then lies.

    That is NULL if the last stage has subtracted it from the parameter.

    `scratch` holds three blocks: two that the stages use by turns and one for a gradient made
    wider. A dry run stores no slots; for these, and for others made wider, there are MAX_SLOTS
    blocks more, behind one for a parameter made wider, where what is left of it then lies.
    """
    cdef Py_ssize_t size = number_size(leaf, SAME)
    cdef Py_ssize_t offset = start * size
    cdef Py_ssize_t room = leaf.block * size
    cdef const char* g = leaf.g + start * number_size(leaf, leaf.of_g)
    cdef const char* x = leaf.x + offset
    cdef char* out = leaf.out + offset
    cdef char* dx = scratch
    cdef void* slots[MAX_SLOTS]
    cdef double* coefs
    cdef Stage* stage
    cdef Py_ssize_t last = -1 if dry or leaf.swallowed else end - 1
    cdef Py_ssize_t k
    cdef int j
    if leaf.of_g != SAME:
        widen(leaf.of_g, g, scratch + 2 * room, n)
        g = scratch + 2 * room
    if narrow and leaf.of_x != SAME and leaf.first < end:
        x = out = scratch + 3 * room
        widen(leaf.of_x, leaf.x + start * number_size(leaf, leaf.of_x), out, n)
    for k in range(leaf.first, end):
        stage = run.stages + k
        for j in range(stage.slots):
            if narrow and stage.of[j] != SAME:
                slots[j] = scratch + (4 + j) * room
                widen(<Kind> stage.of[j], stage.old[j] + 2 * start, slots[j], n)
                continue
            slots[j] = scratch + (4 + j) * room if dry else stage.new[j] + offset
            if slots[j] != stage.old[j] + offset:
                copy(slots[j], stage.old[j] + offset, n * size)
        coefs = run.numbers + stage.coefs
        if k == last and stage.finish is not NULL:
            if out != x:
                copy(out, x, n * size)
            stage.finish(NULL, g, out, slots, coefs, n)
            if narrow:
                keep_slots(stage, slots, start, n)
            return NULL
        stage.run(x, g, dx, slots, coefs, n)
        if narrow and not dry:
            keep_slots(stage, slots, start, n)
        g = dx
        dx = scratch + room if dx == scratch else scratch
    return g


cdef void keep_slots(Stage* stage, void** slots, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """Round what a stage has made of its narrow slots."""
    cdef int j
    for j in range(stage.slots):
        if stage.of[j] != SAME:
            if stage.new[j] != stage.old[j]:
                memcpy(stage.new[j] + 2 * start, stage.old[j] + 2 * start, 2 * n)
            keep(<Kind> stage.of[j], slots[j], stage.new[j] + 2 * start, n)


cdef void narrow_parameter(Segment* leaf, const char* dx, Py_ssize_t start, Py_ssize_t n,
                           char* scratch) noexcept nogil:
    """Round a block of a narrow parameter, less the step if `chain` has not subtracted it yet."""
    cdef char* wide = scratch + 3 * leaf.block * sizeof(float)
    cdef char* out = leaf.out + 2 * start
    if leaf.swallowed:
        if leaf.out != leaf.x:
            memcpy(out, leaf.x + 2 * start, 2 * n)
        return
    if leaf.stages == 0:
        widen(leaf.of_x, leaf.x + 2 * start, wide, n)
    if dx is not NULL:
        subtract[float](wide, wide, dx, 0, n, False)
    round_into(leaf.of_x, wide, out, n, 2)

# --- norms -----------------------------------------------------------------------------------

cdef double norm_of(Run* run, Segment* leaf, Py_ssize_t stage, double p) noexcept nogil:
    """Return the p-norm of what reaches `stage`, in double."""
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
        value = c_sqrt(reduce(run, leaf, stage, SQUARES, 0, 1))
        if not leaf.is_double or 1e-140 < value < 1e150 or value != value:
            return value            # no square overflowed or lost its digits
    largest = reduce(run, leaf, stage, LARGEST if p > 0 else SMALLEST, 0, 1)
    if largest == 0 or not isfinite(largest):
        return largest
    value = reduce(run, leaf, stage, POWERS, p, largest)
    if fabs(p) >= 1:
        return largest * pow(value, 1 / p)
    root = pow(value, 0.5 / p)
    return largest * root * root    # by halves: for tiny p the whole root alone overflows


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
    """Combine what reaches `stage`, stretch by stretch, in an order that n alone decides."""
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

# --- gradients that are not finite -----------------------------------------------------------

cdef void judge_piece(void* job, int64_t k, int member) noexcept nogil:
    """Note which gradients hold infinity or NaN in the blocks of piece `k`."""
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
    """Tell whether no number has all bits of its exponent set, as infinity and NaN do.

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


# --- loops over one block --------------------------------------------------------------------

cdef inline double joined(Reduction kind, double a, double b) noexcept nogil:
    if kind == LARGEST:
        return maximum(a, b)
    if kind == SMALLEST:
        return minimum(a, b)
    return a + b


cdef void subtract(const void* x_, void* out_, const void* dx_, Py_ssize_t start, Py_ssize_t n,
                   bint swallowed, real unused=0) noexcept nogil:
    cdef const real* x = <const real*> x_ + start
    cdef const real* dx = <const real*> dx_
    cdef real* out = <real*> out_ + start
    cdef Py_ssize_t i
    if not swallowed:
        for i in range(n):
            out[i] = x[i] - dx[i]
    elif out != x:
        memcpy(out, x, n * sizeof(real))


cdef inline void copy(void* to, const void* from_, Py_ssize_t bytes) noexcept nogil:
    """Copy bytes onward, from the first to the last, which need not be what memcpy does.

    Between places equally far into a page, where the same numbers of large arrays often lie, that
    of glibc goes backwards, and the processor does not fetch ahead.
    """
    cdef Py_ssize_t i
    for i in range(bytes):
        (<unsigned char*> to)[i] = (<const unsigned char*> from_)[i]


cdef void widen(Kind kind, const void* source, void* target, Py_ssize_t n) noexcept nogil:
    """Bring numbers of a narrow kind to the dtype of their master."""
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
    """Bring a block of a master copy to the parameter."""
    cdef Py_ssize_t size = number_size(leaf, leaf.of_parameter)
    cdef const char* before = leaf.unrounded + start * size
    cdef char* target = leaf.rounded + start * size
    if not leaf.swallowed:
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
    """Bring numbers to a narrow slot, whose own are still there: see `_rule.kept_as`."""
    if kind == FLOAT16:
        keep_float16s(<const float*> source, <uint16_t*> slot, n)
    else:
        keep_bfloat16s(<const float*> source, <uint16_t*> slot, n)


def kept(cnp.ndarray slot, cnp.ndarray singles):
    """Return what a narrow slot keeps of as many numbers in float32; for tests."""
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
    else:
        whole = 0
    for i in range(LANES * whole, n):
        j = i % LANES
        v = fabs(<double> g[i])
        if kind == SQUARES:
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
