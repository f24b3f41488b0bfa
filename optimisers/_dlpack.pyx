# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""Views of another library's arrays through the C functions of DLPack.

https://dmlc.github.io/dlpack: a type has them in a capsule, `__dlpack_c_exchange_api__`. They
describe an array without making an object of it, which takes a fifth of the time that
``tensor.numpy()`` does, and a model has thousands. The structs are those of version 1.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport (
    PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM,
)
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cnp.import_array()

cdef extern from "Python.h":
    int Py_EnterRecursiveCall(const char* where) except *
    void Py_LeaveRecursiveCall()

cdef extern from "numpy/arrayobject.h":
    enum:
        NPY_HALF

cdef enum:
    CPU = 1
    SIGNED = 0              # codes of dtypes
    FLOATING = 2
    BRAIN = 4
    MOST_AXES = 32

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


cdef class Viewer:
    """Makes views of the arrays of some types.

    Parameters
    ----------
    capsule
        What the types have as `__dlpack_c_exchange_api__`.
    cls, other : type
        The types, subclasses not included.
    bfloat16 : callable
        Returns NumPy's dtype of that name, or None; asked when there is such an array.

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
        api = <DLPackExchangeAPI*> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if api.major != 1 or api.describe is NULL:
            raise ImportError(f"no way to describe arrays in DLPack {api.major}.{api.minor}")
        self.describe, self.cls, self.other = api.describe, cls, other
        self.bfloat16 = bfloat16

    cpdef view(self, x):
        """Return a NumPy array over the memory of `x`; None if there is no plain way."""
        cdef DLTensor t
        cdef cnp.npy_intp shape[MOST_AXES]
        cdef cnp.npy_intp strides[MOST_AXES]
        cdef cnp.ndarray seen
        cdef int k, kind
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
            kind = (
                cnp.NPY_DOUBLE if t.bits == 64 else cnp.NPY_FLOAT if t.bits == 32 else NPY_HALF
            )
        elif t.code == SIGNED and t.bits == 64:
            kind = cnp.NPY_INT64
        elif t.code == BRAIN and t.bits == 16 and (dtype := self.bfloat16()) is not None:
            kind = dtype.num
        else:
            return None
        empty = False
        for k in range(t.ndim):
            empty = empty or t.shape[k] == 0
            shape[k] = t.shape[k]
            strides[k] = t.strides[k] * (t.bits // 8)
        if t.data is NULL and not empty:    # given back; NumPy would make new memory
            return None
        seen = cnp.PyArray_New(
            cnp.ndarray, t.ndim, shape, kind, strides, t.data + t.byte_offset, 0,
            cnp.NPY_ARRAY_WRITEABLE, <object> NULL,
        )
        cnp.PyArray_UpdateFlags(seen, cnp.NPY_ARRAY_UPDATE_ALL)
        Py_INCREF(x)
        cnp.PyArray_SetBaseObject(seen, x)
        return seen

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
