cimport numpy as cnp
from cpython.ref cimport PyObject, Py_DECREF, Py_INCREF
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free

cdef extern from "numpy/ndarraytypes.h":
    ctypedef struct PyArrayObject_fields:
        PyObject* base
    void PyArray_CLEARFLAGS(cnp.ndarray a, int flags)
    void PyArray_ENABLEFLAGS(cnp.ndarray a, int flags)


cdef inline void hold(Work* work, cnp.ndarray a, Py_ssize_t bytes) noexcept:
    """Own an array from now on, of whose memory so many bytes are used (see f).

    There must be room: one question for all the arrays of a leaf is less than one for each.
    """
    cdef Held* held = <Held*> work.held.data + work.held.length
    Py_INCREF(a)
    held.array, held.data, held.bytes = <PyObject*> a, cnp.PyArray_BYTES(a), bytes
    if not cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_OWNDATA):
        work.borrows = True
    work.held.length += 1


cdef inline Py_ssize_t bytes_of(cnp.ndarray a) noexcept:
    cdef Py_ssize_t bytes = cnp.PyArray_ITEMSIZE(a)
    cdef int k
    for k in range(cnp.PyArray_NDIM(a)):
        bytes *= cnp.PyArray_DIM(a, k)
    return bytes


cdef enum:                  # what owns memory: see `owner_of` in _arrays/dlpack.pyx
    MOVED = 1
    TENSOR

ctypedef int (*OwnerOf)(PyObject*, const char*, Py_ssize_t) noexcept

cdef OwnerOf owner_of = NULL


def know_tensors(uintptr_t owner):
    """Take the address of what tells whether a tensor of PyTorch still has its memory."""
    global owner_of
    owner_of = <OwnerOf> <void*> owner


cdef inline bint owns_memory(PyObject* array) noexcept:
    return cnp.PyArray_CHKFLAGS(<cnp.ndarray> array, cnp.NPY_ARRAY_OWNDATA)


cdef inline PyObject* base_of(PyObject* array) noexcept:
    return (<PyArrayObject_fields*> array).base


cdef inline PyObject* origin(PyObject* array) noexcept:
    """Return the array that an array is a view of, or itself: its memory is its own, or no array's.
    """
    cdef PyObject* base
    while not owns_memory(array):
        base = base_of(array)
        if base is NULL or not cnp.PyArray_Check(<object> base):
            break
        array = base
    return array


cdef inline PyObject* lender(PyObject* array) noexcept:
    """Return the object, no array, that an array has its memory from; NULL if there is none."""
    array = origin(array)
    return NULL if owns_memory(array) else base_of(array)


cdef bint covers(cnp.ndarray a, const char* low, Py_ssize_t bytes) noexcept:
    """Tell whether an array reaches over so many bytes from an address on."""
    cdef const char* start = cnp.PyArray_BYTES(a)
    cdef const char* end = start + cnp.PyArray_ITEMSIZE(a)
    cdef Py_ssize_t reach
    cdef int k
    for k in range(cnp.PyArray_NDIM(a)):
        reach = (cnp.PyArray_DIM(a, k) - 1) * cnp.PyArray_STRIDE(a, k)
        if cnp.PyArray_DIM(a, k) == 0:
            return bytes == 0
        if reach < 0:
            start += reach
        else:
            end += reach
    return start <= low and low + bytes <= end


cdef bint is_within(PyObject* array, const char* data, Py_ssize_t bytes) noexcept:
    """Tell whether the memory in use is still its owner's, if that is an array or a tensor."""
    cdef PyObject* first = origin(array)
    if first != array and not covers(<cnp.ndarray> first, data, bytes):
        return False
    if owner_of is NULL or owns_memory(first) or base_of(first) is NULL:
        return True
    return owner_of(base_of(first), data, bytes) != MOVED


cdef Py_ssize_t first_moved(Work* work, Py_ssize_t first, Py_ssize_t end) noexcept:
    """Return the first, of what is held, that no longer has the memory in use; -1 if all do."""
    cdef Held* held = <Held*> work.held.data
    cdef Py_ssize_t k
    for k in range(first, end):
        if (
            cnp.PyArray_BYTES(<cnp.ndarray> held[k].array) != held[k].data
            or bytes_of(<cnp.ndarray> held[k].array) < held[k].bytes
            or not is_within(held[k].array, held[k].data, held[k].bytes)
        ):
            return k
    return -1


cdef class Keeper:
    """Has the memory of arrays, in their place, while a run uses it without the GIL.

    NumPy resizes and frees, whatever ``refcheck`` says, no memory but that which an array owns.
    So arrays do not own theirs meanwhile: this is their base.
    """

    cdef Vector arrays          # which are owned

    def __dealloc__(self):
        free(self.arrays.data)

    cdef bint keep(self, Work* work) except -1:
        """Take over the memory of all that is held; tell whether nobody else has any of it."""
        cdef Held* held = <Held*> work.held.data
        cdef PyObject* array
        cdef PyObject* base
        cdef Py_ssize_t k
        reserve(&self.arrays, sizeof(PyObject*), work.held.length)
        for k in range(work.held.length):
            array = origin(held[k].array)
            base = base_of(array)
            if not owns_memory(array):      # it may be another run's
                if base is NULL or base == <PyObject*> self or type(<object> base) is not Keeper:
                    continue
                return False
            if base is not NULL:
                return False
            PyArray_CLEARFLAGS(<cnp.ndarray> array, cnp.NPY_ARRAY_OWNDATA)
            (<PyArrayObject_fields*> array).base = <PyObject*> self
            Py_INCREF(self)
            Py_INCREF(<object> array)
            (<PyObject**> self.arrays.data)[self.arrays.length] = array
            self.arrays.length += 1
        return True

    cdef void give_back(self) noexcept:
        """Give each array its memory back.

        Those that have other memory by now, from `__setstate__`, have another base. The memory that
        they had is lost, and not freed.
        """
        cdef PyObject* array
        while self.arrays.length:
            self.arrays.length -= 1
            array = (<PyObject**> self.arrays.data)[self.arrays.length]
            if base_of(array) == <PyObject*> self:
                (<PyArrayObject_fields*> array).base = NULL
                PyArray_ENABLEFLAGS(<cnp.ndarray> array, cnp.NPY_ARRAY_OWNDATA)
                Py_DECREF(self)
            Py_DECREF(<object> array)
