# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""Views of another library's arrays through the C functions of DLPack.

https://dmlc.github.io/dlpack: a type has them in a capsule, `__dlpack_c_exchange_api__`. They
describe an array without making an object of it, in a fifth of the time of ``tensor.numpy()``; a
model has thousands of tensors. The structs are those of version 1.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF, PyObject
from cpython.tuple cimport (
    PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM,
)
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

cnp.import_array()

cdef extern from "Python.h":
    int Py_EnterRecursiveCall(const char* where) except *
    void Py_LeaveRecursiveCall()

cdef extern from "numpy/arrayobject.h":
    enum:
        NPY_HALF
    object PyArray_NewFromDescr(
        object kind, cnp.dtype dtype, int axes, const cnp.npy_intp* shape,
        const cnp.npy_intp* strides, void* data, int flags, object like,
    )

cdef enum:
    CPU = 1
    SIGNED = 0              # codes of dtypes
    FLOATING = 2
    BFLOAT = 4
    MOST_AXES = 32
    SMALL = 1024            # bytes below which a view is made without a look at the storage

cdef struct DLTensor:
    char* data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

ctypedef int (*Describe)(void*, DLTensor*) except -1

cdef struct DLPackExchangeAPI:
    uint32_t major
    uint32_t minor
    void* previous
    void* allocate
    void* from_object
    void* to_object
    Describe describe       # may be NULL
    void* stream


cdef object known = None, known_too = None  # the types of tensors of the last viewer
cdef Describe describe_known = NULL

cdef enum Owner:                # owners of the memory of a view
    OTHER                       # no tensor
    MOVED                       # a tensor that has other memory now
    TENSOR


cdef int owner_of(PyObject* base, const char* low, Py_ssize_t bytes) noexcept:
    """Return the `Owner` of a view that uses so many bytes from an address on, by its base."""
    cdef DLTensor t
    if type(<object> base) is not known and type(<object> base) is not known_too:
        return OTHER
    if bytes == 0 or describe_known is NULL:
        return OTHER
    try:
        describe_known(<void*> base, &t)
        if low == t.data + t.byte_offset and bytes <= reach_of(&t):
            return TENSOR
        return TENSOR if has(<object> base, low, bytes) else MOVED
    except Exception:
        return MOVED


cdef inline int64_t reach_of(DLTensor* t) noexcept:
    """Return how many bytes there are from the first number to the end of the last."""
    cdef int64_t last = 0
    cdef int k
    for k in range(t.ndim):
        last += (t.shape[k] - 1) * t.strides[k]
    return (last + 1) * (t.bits // 8)


cdef bint has(x, const char* low, int64_t bytes) except -1:
    """Tell whether the storage of a tensor has so many bytes from an address on."""
    storage = x.untyped_storage()
    cdef uintptr_t start = storage.data_ptr()
    cdef int64_t size = storage.nbytes()
    return <uintptr_t> low >= start and <uintptr_t> low + bytes <= start + size


def owner():
    """Return the address of `owner_of`, for kernels."""
    return <uintptr_t> <void*> &owner_of


cdef class Viewer:
    """Makes views of PyTorch's tensors.

    A view owns its tensor. The tensor may be given other memory at any time, for example by
    ``x.data = y``, and the old memory may then be gone: before it is used, `owner_of` tells whether
    the tensor still has it (see f in _kernels.pyx).

    Parameters
    ----------
    capsule
        What the types have as `__dlpack_c_exchange_api__`.
    cls, other : type
        The types of tensors, subclasses not included.
    bfloat16 : callable
        Returns the dtype that stands for bfloat16, or None if there is none.

    Raises
    ------
    ImportError
        If it is of a version that is not known here.
    """

    cdef Describe describe
    cdef object cls
    cdef object other
    cdef object bfloat16

    def __cinit__(self, capsule, cls, other, bfloat16):
        global known, known_too, describe_known
        api = <DLPackExchangeAPI*> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if api.major != 1 or api.describe is NULL:
            raise ImportError(f"no way to describe arrays in DLPack {api.major}.{api.minor}")
        self.describe, self.cls, self.other = api.describe, cls, other
        self.bfloat16 = bfloat16
        known, known_too, describe_known = cls, other, api.describe

    cpdef view(self, x):
        """Return a NumPy array over the memory of `x`; None if `x` is no plain tensor."""
        cdef DLTensor t
        cdef cnp.npy_intp shape[MOST_AXES]
        cdef cnp.npy_intp strides[MOST_AXES]
        cdef cnp.ndarray seen
        cdef cnp.dtype dtype
        cdef int k
        cdef bint empty
        if type(x) is not self.cls and type(x) is not self.other:
            return None
        if x.is_neg():                  # a flag of which DLPack knows nothing
            return None
        try:
            self.describe(<void*> x, &t)
        except RuntimeError:            # no memory: traced, transformed, on no device
            return None
        if t.device_type != CPU or t.lanes != 1 or t.strides is NULL or t.ndim > MOST_AXES:
            return None
        if t.code == FLOATING and t.bits in (16, 32, 64):
            dtype = cnp.PyArray_DescrFromType(
                cnp.NPY_DOUBLE if t.bits == 64 else cnp.NPY_FLOAT if t.bits == 32 else NPY_HALF
            )
        elif t.code == SIGNED and t.bits == 64:
            dtype = cnp.PyArray_DescrFromType(cnp.NPY_INT64)
        elif t.code == BFLOAT and t.bits == 16:
            dtype = self.bfloat16()
            if dtype is None:
                return None
        else:
            return None
        empty = False
        for k in range(t.ndim):
            empty = empty or t.shape[k] == 0
            shape[k] = t.shape[k]
            strides[k] = t.strides[k] * (t.bits // 8)
        if not empty and not self.has_memory(x, &t):
            return None
        Py_INCREF(dtype)                # which the array takes over
        seen = PyArray_NewFromDescr(
            cnp.ndarray, dtype, t.ndim, shape, strides, t.data + t.byte_offset,
            cnp.NPY_ARRAY_WRITEABLE, <object> NULL,
        )
        cnp.PyArray_UpdateFlags(seen, cnp.NPY_ARRAY_UPDATE_ALL)
        cnp.set_array_base(seen, x)
        return seen

    cdef bint has_memory(self, x, DLTensor* t) except -1:
        """Tell whether a tensor has the memory of its numbers; without any, NumPy would make new.
        """
        if t.data is NULL:
            return False
        return reach_of(t) < SMALL or has(x, t.data + t.byte_offset, reach_of(t))

    cpdef view_state(self, state):
        """Return a state with views of its arrays; what has none is None there."""
        cdef Py_ssize_t k
        cdef tuple seen
        if not PyTuple_Check(state):
            return state if cnp.PyArray_Check(state) else self.view(state)
        seen = PyTuple_New(PyTuple_GET_SIZE(state))
        Py_EnterRecursiveCall(b" while a state is read")
        try:
            for k in range(PyTuple_GET_SIZE(state)):
                part = self.view_state(<object> PyTuple_GET_ITEM(state, k))
                Py_INCREF(part)
                PyTuple_SET_ITEM(seen, k, part)
        finally:
            Py_LeaveRecursiveCall()
        return seen
