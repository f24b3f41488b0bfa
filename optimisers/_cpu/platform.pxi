cimport numpy as cnp
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <math.h>
    /* OpenMP is only asked how many threads there are to be, so that what users say to it counts
       here too. The threads are those of team.h. */
    #if defined(_OPENMP)
    #include <omp.h>
    #else
    static int omp_get_max_threads(void) { return 0; }
    #endif
    #if defined(Py_GIL_DISABLED)
    #define HAS_GIL 0
    #else
    #define HAS_GIL 1
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
    bint HAS_GIL
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

cdef extern from "environment.h":
    ctypedef struct float_environment:
        pass
    float_environment environment_enter() nogil
    void environment_leave(float_environment before) nogil

cdef extern from "team.h":
    enum:
        TEAM_MOST
    ctypedef void (*team_piece)(void* job, int64_t k, int member) noexcept nogil
    int team_take(int members)
    void team_leave()
    int64_t team_swap(int64_t* at, int64_t to) nogil
    void team_run(team_piece run, void* job, int64_t pieces, int members, bint wake) nogil
    void team_forked()

cdef extern from "halves.h":
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

ctypedef void (*Step)(
    const void*, const void*, void*, void**, const void*, Py_ssize_t
) noexcept nogil

cdef enum:
    MAX_BLOCK = 4096        # numbers; more would not fit the first cache
    MAX_SLOTS = 8
    MAX_TERMS = 4           # of a measure
    RUNNING = 3             # blocks of scratch memory that `chain` needs
    WIDENING = 4 + MAX_SLOTS    # the same in a dry run, and for narrow numbers
    MEASURING = WIDENING + MAX_TERMS    # the same with the terms of a measure
    STRETCHES = 256         # most partial sums of a measure
    STRETCH = 16384         # fewest numbers in one of them
    LINE = 64               # bytes in a line of the caches
    LANES = 32              # running sums side by side, so that a reduction fills a vector
    WAKING = 60             # sleeping threads are woken from so many times `work_per_thread` on
    PIECES = 32             # most pieces of an update for each thread
    PIECE = 32768           # fewest bytes that a piece moves
    COPIED = 512            # most numbers in a block that is first copied into new arrays
    COPIED_FAR = 128        # the same where the arrays are likely to lie out of the caches
    FAR = 1 << 24           # bytes moved by an update from which they are likely to
    LINED_UP = 2048         # numbers in a leaf from which it pays to align its blocks
    SHORT = 32768           # a run that moves fewer bytes on one thread keeps the GIL
    SHORT_OF_EACH = 4096    # so does one that moves fewer bytes for each array: see held.pxi
    SHORT_OF_TENSORS = 1 << 20  # so does one that moves fewer bytes, if some are of tensors

cdef uint64_t GOLDEN = 0x9e3779b97f4a7c15   # spreads addresses over a table: Knuth's multiplier

ctypedef fused real:
    float
    double

ctypedef fused bits:        # of a number
    uint16_t
    uint32_t
    uint64_t
