cimport numpy as cnp
from cpython.ref cimport PyObject, Py_REFCNT


cdef class Slots:
    """The offsets of the attributes in leaves of one class: see `slot_offset`."""

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
    """Tell whether `a` is plain memory of one type, in the order that is wanted."""
    cdef int order = cnp.NPY_ARRAY_C_CONTIGUOUS if c_order else cnp.NPY_ARRAY_F_CONTIGUOUS
    return (
        cnp.PyArray_TYPE(a) == kind
        and cnp.PyArray_CHKFLAGS(a, order | cnp.NPY_ARRAY_ALIGNED)
        and cnp.PyArray_ISNOTSWAPPED(a)
    )


cdef inline bint is_unshared(PyObject* held, Py_ssize_t holders=1) noexcept:
    """Tell whether an object has no more references than so many that are known."""
    return Py_REFCNT(<object> held) <= holders


cdef inline bint owns(PyObject* array) noexcept:
    """Tell whether an array in a tuple owns its memory and nothing else refers to the array.

    Only views could share memory that an array owns, and each view refers to its array.
    """
    return is_unshared(array) and cnp.PyArray_CHKFLAGS(<cnp.ndarray> array, cnp.NPY_ARRAY_OWNDATA)


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
