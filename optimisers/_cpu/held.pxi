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
    """Own an array from now on; so many bytes of its memory are used (see f).

    The caller has reserved room, once for all the arrays of a leaf.
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


cdef enum:                  # the owner of memory: see `owner_of` in _arrays/dlpack.pyx
    MOVED = 1
    TENSOR

ctypedef int (*OwnerOf)(PyObject*, const char*, Py_ssize_t) noexcept

cdef OwnerOf owner_of = NULL


def know_tensors(uintptr_t owner):
    """Take the address of `owner_of`, which tells whether a tensor still has its memory."""
    global owner_of
    owner_of = <OwnerOf> <void*> owner


cdef inline bint owns_memory(PyObject* array) noexcept:
    return cnp.PyArray_CHKFLAGS(<cnp.ndarray> array, cnp.NPY_ARRAY_OWNDATA)


cdef inline PyObject* base_of(PyObject* array) noexcept:
    return (<PyArrayObject_fields*> array).base


cdef inline PyObject* origin(PyObject* array) noexcept:
    """Return the array of which an array is a view, or itself if it is a view of none.
    """
    cdef PyObject* base
    while not owns_memory(array):
        base = base_of(array)
        if base is NULL or not cnp.PyArray_Check(<object> base):
            break
        array = base
    return array


cdef inline PyObject* lender(PyObject* array) noexcept:
    """Return the object other than an array that lends an array its memory; NULL if none does."""
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
    """Tell whether the owner of the memory in use, an array or a tensor, still has it."""
    cdef PyObject* first = origin(array)
    if first != array and not covers(<cnp.ndarray> first, data, bytes):
        return False
    if owner_of is NULL or owns_memory(first) or base_of(first) is NULL:
        return True
    return owner_of(base_of(first), data, bytes) != MOVED


cdef Py_ssize_t first_moved(Work* work, Py_ssize_t first, Py_ssize_t end) noexcept:
    """Return the position of the first array held that has lost the memory in use; -1 if none."""
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
    """Owns the memory of arrays in their place while a run uses it without the GIL.

    NumPy resizes and frees only memory that an array owns, whatever ``refcheck`` says. Meanwhile
    the arrays do not own theirs: this object is their base.
    """

    cdef Vector arrays          # arrays of which this is the base

    def __dealloc__(self):
        free(self.arrays.data)

    cdef bint keep(self, Work* work) except -1:
        """Take over the memory of all arrays held; tell whether no other run has any of it."""
        cdef Held* held = <Held*> work.held.data
        cdef PyObject* array
        cdef PyObject* base
        cdef Py_ssize_t k
        reserve(&self.arrays, sizeof(PyObject*), work.held.length)
        for k in range(work.held.length):
            array = origin(held[k].array)
            base = base_of(array)
            if not owns_memory(array):      # another run may have it
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
