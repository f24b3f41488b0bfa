from cpython.dict cimport PyDict_Next
from cpython.list cimport PyList_GET_ITEM
from cpython.ref cimport PyObject
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport calloc, free


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
        if not in_a == in_b == in_c:    # other objects may be equal
            return [*a] == [*b] == [*c]
    return True


def are_distinct(list objects):
    """Tell whether no object is in a list twice."""
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
