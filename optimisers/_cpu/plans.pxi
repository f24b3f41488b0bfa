cimport numpy as cnp
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_GetSlice
from libc.stdint cimport int64_t, uintptr_t


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
