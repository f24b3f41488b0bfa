# One file of more than 600 lines, since it is one class: a cdef class has one body, and its methods
# share the memory of the batch. They come in three parts: gathering, keeping apart, running.

cimport cython
cimport numpy as cnp
from cpython.ref cimport PyObject, Py_INCREF, Py_XDECREF
from cpython.tuple cimport (
    PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM,
)
from libc.stdint cimport INT64_MAX, int64_t, uintptr_t
from libc.string cimport memcpy, memset


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
    cdef Fused fused            # the last fused stage that was found
    cdef Py_ssize_t blocks      # blocks in all segments
    cdef Py_ssize_t longest     # most numbers in a block
    cdef Py_ssize_t bytes       # bytes that the update moves
    cdef Py_ssize_t gradients   # bytes of the gradients
    cdef Py_ssize_t asked       # how many arrays were held when code of users last may have run
    cdef bint busy              # whether a call is under way, or has failed
    cdef bint settled
    cdef bint widens            # whether a leaf has narrow numbers, but for gradient and master
    cdef object clash           # the answer of `settle`
    cdef list measuring         # for each stage that waits for numbers, its `Told`
    cdef list storages          # storages of tensors that are held; None if there are none
    cdef Keeper keeper          # keeps memory during runs without the GIL; None before the first
    cdef cnp.ndarray like       # the parameter that is taken at the moment
    cdef public object told     # the value of the loss, and the function that gives paths
    cdef readonly dict new_x
    """By index, the new array of each parameter that was not written in place."""
    cdef readonly dict new_state
    """By index, the new state of each leaf whose state was not written in place."""
    cdef readonly Py_ssize_t failed
    """The index of the leaf at which `gather` or `run` raised; -1 if neither did."""
    cdef readonly bint ran
    """Whether `gather` has also run the batch."""

    def __cinit__(self, blank=None):
        self.work = borrow()
        self.blank = blank
        self.measuring = []
        self.new_x, self.new_state = {}, {}
        self.failed = self.fused.last = -1
        self.busy = self.ran = self.settled = self.widens = False
        self.asked = self.blocks = self.longest = self.bytes = self.gradients = 0

    def __dealloc__(self):
        if self.work is not NULL:
            give_back(self.work)

    def places(self):
        """Return the indices taken."""
        return self.places_of(bad=False)

    def loops(self):
        """Return, by index, through how many loops the numbers of a leaf pass; for tests."""
        cdef Py_ssize_t k
        cdef Segment* leaves = <Segment*> self.work.segments.data
        return {leaves[k].place: leaves[k].stages for k in range(self.work.segments.length)}

    cdef list places_of(self, bint bad):
        """Return the indices taken, or those of them with a bad gradient.

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
        """Take every leaf that the kernels can update; return the indices of the others.

        Leaves without a gradient and frozen leaves are neither taken nor returned, except for
        arrays of a subclass of ndarray without a gradient, which are returned. `lower` makes a rule
        a plan, or None. If there are no others, and `at_once` is true, the batch runs, unless two
        leaves would write the same memory.
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
            if g is None:
                if cnp.PyArray_Check(x) and not cnp.PyArray_CheckExact(x):
                    if not self.is_frozen(leaf, slots):
                        rest.append(place)  # it may have a mask, which Python checks
                continue
            if self.is_frozen(leaf, slots):
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
        """Refuse a call by code of users in the middle of another, or after an error."""
        if self.busy:
            raise RuntimeError("this batch is at work, or has failed")
        self.busy = True
        return 0

    cdef Plan plan(self, rule, lower):
        """Return the plan of a rule, or None; those of the rules met last are kept.

        A rule without a plan is not kept: it may hold what JAX traces, which must not outlive the
        trace.
        """
        cdef Plan plan
        cdef int k = 0
        cdef PyObject *last_rule
        cdef PyObject *last_plan
        while k < PLANS and self.work.rules[k] != <PyObject*> rule:
            k += 1
        if k < PLANS:
            plan = <Plan> <object> self.work.plans[k]
            if plan.batch != self.work.batch:
                plan.forget()
                plan.batch = self.work.batch
            return plan
        plan = lower(rule)
        self.asked = self.work.held.length
        if plan is not None:
            k, plan.batch = self.work.next_plan, self.work.batch
            self.work.next_plan = (k + 1) % PLANS
            last_rule, last_plan = self.work.rules[k], self.work.plans[k]
            Py_INCREF(rule)
            Py_INCREF(plan)
            self.work.rules[k], self.work.plans[k] = <PyObject*> rule, <PyObject*> plan
            Py_XDECREF(last_rule)
            Py_XDECREF(last_plan)
        return plan

    cdef bint add(self, Py_ssize_t place, Plan plan, state, x, g) except -1:
        """Add a segment for one leaf if the kernels can take it; tell whether."""
        cdef cnp.ndarray xa, ga, old, new
        cdef Segment leaf
        cdef int kind, of_x, of_g
        cdef Py_ssize_t size
        leaf.unshared = is_unshared(<PyObject*> state, 2)     # held by the leaf and the caller
        if not cnp.PyArray_CheckExact(x) or not cnp.PyArray_CheckExact(g):
            return False
        xa, ga = <cnp.ndarray> x, <cnp.ndarray> g
        leaf.c_order = cnp.PyArray_IS_C_CONTIGUOUS(xa)
        leaf.is_copy = plan.master >= 0
        kind = plan.master if leaf.is_copy else updated_in(xa)
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

        old, new = xa, xa
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

        self.like = xa
        leaf.n = cnp.PyArray_SIZE(xa)
        leaf.is_double = kind == cnp.NPY_DOUBLE
        leaf.place = place
        leaf.withheld = False
        leaf.is_bad = 0
        leaf.first = self.work.stages.length
        leaf.held = self.work.held.length
        measures, counts, spans = (
            self.work.measures.length, self.work.counts.length, self.work.spans.length
        )
        keepings = self.work.keepings.length
        if not plan.stack(self, &leaf, state, made):
            self.work.stages.length = leaf.first
            self.work.measures.length = measures
            self.work.keepings.length = keepings
            self.work.counts.length = counts
            self.work.spans.length = spans
            let_go(&self.work.held, leaf.held)
            del self.measuring[measures:]
            return False
        if self.work.stages.length > leaf.first + 1:
            self.fuse(&leaf, measures)
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
        """Return an empty state of the same form; `blank` makes the parts that are no plain arrays.
        """
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
        cdef bint unshared
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
            unshared = leaf.unshared and owns(PyTuple_GET_ITEM(old, k))
            a, b = <cnp.ndarray> item(old, k), <cnp.ndarray> item(new, k)
            if not ready(a, own, leaf.c_order) or not same_shape(a, self.like):
                return NULL
            stage.of[k] = of
            if a is b:
                if not cnp.PyArray_ISWRITEABLE(a):
                    return NULL
                if not unshared:
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

    cdef int fuse(self, Segment* leaf, Py_ssize_t measures) except -1:
        """Fuse the last step with those ahead of it, if there is a loop that does them all.

        One that measures may begin such a loop, since all it waits for comes before. The leaf's own
        are those after the first `measures`.
        """
        cdef Stage* stages = <Stage*> self.work.stages.data
        cdef Py_ssize_t last = self.work.stages.length - 1, start = leaf.first, first
        if leaf.withheld or stages[last].index < 0:
            return 0
        if self.work.measures.length > measures:
            start = (<Measured*> self.work.measures.data)[self.work.measures.length - 1].stage
        first = last - self.fused.ahead
        if (
            first < start
            or stages[first].coefs != self.fused.first
            or stages[last].coefs != self.fused.last
        ):
            if not self.find_lead(leaf, stages, start, last):
                return 0
            first = last - self.fused.ahead
        stages[first] = stages[last]
        stages[first].finish, stages[first].coefs = self.fused.finish, self.fused.coefs
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
            finish = step_table[stages[last].index].fused[k][leaf.is_double]
            if finish is not NULL and first >= start and is_lead(&leads[k], stages + first):
                self.fused.ahead, self.fused.finish = leads[k].length, finish
                self.fused.first, self.fused.last = stages[first].coefs, stages[last].coefs
                self.fused.coefs = self.join_numbers(stages + first, last - first + 1, leaf)
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

    cdef bint add_measured(self, Segment* leaf, Task* task, Told told, old, new,
                           int64_t t) except -1:
        """Note that the last stage waits for numbers; tell whether the state fits."""
        cdef Measured* measured
        cdef cnp.ndarray a, b
        if task.keeps:
            if not cnp.PyArray_CheckExact(item(old, task.step.slots)):
                return False
            a = <cnp.ndarray> item(old, task.step.slots)
            b = <cnp.ndarray> item(new, task.step.slots)
            if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_SIZE(a) != task.keeps + task.of_tree:
                return False
            if not ready(a, cnp.NPY_DOUBLE, True) or not ready(b, cnp.NPY_DOUBLE, True):
                return False
            if not cnp.PyArray_ISWRITEABLE(b):
                return False
            reserve(&self.work.held, sizeof(Held), 2)
            hold(self.work, a, cnp.PyArray_SIZE(a) * sizeof(double))
            if b is not a:
                hold(self.work, b, cnp.PyArray_SIZE(a) * sizeof(double))
        measured = <Measured*> push(&self.work.measures, sizeof(Measured))
        memset(measured, 0, sizeof(Measured))
        measured.segment, measured.stage = self.work.segments.length, self.work.stages.length - 1
        measured.rule, measured.coefs = len(self.measuring), task.before[leaf.is_double]
        measured.of_step, measured.info, measured.order = (
            task.step.coefs, task.measure, task.order
        )
        measured.t, measured.keeps, measured.of_tree = t, task.keeps, task.of_tree
        if task.keeps:
            measured.kept = <double*> cnp.PyArray_DATA(b)
            measured.changes = (<double*> cnp.PyArray_DATA(a))[task.keeps] if task.of_tree else 0
        self.measuring.append(told)
        return True

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
        if not is_within(<PyObject*> count, cnp.PyArray_BYTES(count), sizeof(int64_t)):
            return -1
        value = (<int64_t*> cnp.PyArray_DATA(count))[0]
        return value if value < INT64_MAX else -1

    cdef int store_count(self, state, Py_ssize_t k, int64_t value, Segment* leaf) except -1:
        """See to it that the run stores a count into item `k` of a state."""
        cdef bint unshared = leaf.unshared and owns(PyTuple_GET_ITEM(state, k))
        cdef cnp.ndarray a = <cnp.ndarray> item(state, k)
        cdef Count* count = <Count*> push(&self.work.counts, sizeof(Count))
        count.where = <int64_t*> cnp.PyArray_DATA(a)
        count.value = value
        reserve(&self.work.held, sizeof(Held), 1)
        hold(self.work, a, sizeof(int64_t))
        if not unshared:
            self.add_span(&self.work.spans, a, 1, leaf.place)
        return 0

    cdef bint carry_over(self, old, new) except -1:
        """Copy a state that this step does not change; tell whether it is made of arrays."""
        cdef Py_ssize_t k
        if old is new:
            return True
        if cnp.PyArray_Check(old):
            new[...] = old
            self.asked = self.work.held.length      # a subclass may run code
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
        Where two leaves would write the same memory, or one leaf twice, their indices are returned,
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
        """Return the address of these numbers, or of a copy if the run would write over them."""
        cdef cnp.ndarray copy
        if not self.is_written(<uintptr_t> numbers, bytes):
            return numbers
        self.check_held(leaf.held, leaf.held_end)
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
        """Return the indices of the leaves whose gradients hold infinity or NaN."""
        self.asked = self.work.held.length
        return self.places_of(bad=True) if self.check_finite() else []

    cdef bint check_finite(self) except -1:
        """Mark the leaves whose gradients hold infinity or NaN; tell whether there are any."""
        cdef Run run
        cdef bint keeps
        self.prepare(&run)
        run.is_bad = 0
        run.members = take_team(run.gradients)
        run.pieces = min(run.blocks, run.gradients // PIECE + 1, run.members * PIECES)
        try:
            keeps = self.keeps_gil(&run, run.gradients)
            self.check_held(0, self.asked)
            work_on(&run, check_piece, run.gradients, keeps)
            if not keeps:       # other threads have run
                self.asked = self.work.held.length
        finally:
            self.give_memory_back()
            if run.members > 1:
                team_leave()
        return run.is_bad

    def measure(self):
        """Find the numbers for which stages wait, up to those of the tree.

        Returns groups of the leaves that wait for numbers of the tree, one for each rule: a list of
        the rule, the rule of the leaves, the how manieth of its class it is there, how its terms
        are reduced, the count of steps, the places, and the numbers found in each of these.
        """
        cdef list groups = []
        self.asked = self.work.held.length
        if self.work.measures.length:
            self.find_numbers(groups)
        return groups

    def receive(self, list answers):
        """Take ``(coefs, kept)`` for each group that `measure` has returned; None: wait longer."""
        cdef Measured* measured
        cdef Py_ssize_t k
        self.asked = self.work.held.length
        for k in range(self.work.measures.length):
            measured = <Measured*> self.work.measures.data + k
            if measured.waits:
                answer = answers[measured.group]
                if answer is not None:
                    measured.waits = False
                    coefs, kept = answer
                    self.set_numbers(measured, coefs, kept)

    def run(self):
        """Update every leaf. Raises, if at all, before anything is written."""
        self.asked = self.work.held.length
        self.finish()

    cdef int find_numbers(self, list groups) except -1:
        """Measure in turn what can be; add to `groups` the leaves that wait for others."""
        cdef Run run
        cdef float_environment before = environment_enter()
        cdef Py_ssize_t k, blocked = -1
        cdef Measured* measured
        cdef Segment* leaf
        cdef dict known = {}
        cdef bint keeps
        run.members = 1
        try:
            self.begin()
            self.prepare(&run)
            run.members = take_team(run.bytes)
            self.lend_scratch(&run)
            keeps = self.keeps_gil(&run, run.bytes)
            for k in range(self.work.measures.length):
                measured = <Measured*> self.work.measures.data + k
                if measured.is_done or measured.segment == blocked:
                    continue
                leaf = run.segments + measured.segment
                self.failed = leaf.place
                if not measured.is_known:
                    self.check_held(leaf.held, min(leaf.held_end, self.asked))
                    if keeps:
                        measure(&run, measured)
                    else:
                        with nogil:
                            measure(&run, measured)
                    measured.is_known = True
                    if not is_finite_row(measured):
                        (<Told> self.measuring[measured.rule]).rule.accept(row_of(measured))
                        self.asked = self.work.held.length
                if measured.of_tree:
                    blocked = measured.segment
                    self.wait(measured, leaf.place, groups, known)
                else:
                    self.find_own(measured, leaf.n)
                    self.asked = self.work.held.length
            self.failed = -1
            self.busy = False
            return 0
        finally:
            self.give_memory_back()
            if run.members > 1:
                team_leave()
            environment_leave(before)

    cdef int wait(self, Measured* measured, Py_ssize_t place, list groups, dict known) except -1:
        """Put a leaf into the group of those that wait with the same rule."""
        cdef Told told = self.measuring[measured.rule]
        key = id(told), measured.t
        measured.waits = True
        if key not in known:
            known[key] = len(groups)
            kinds = kinds_of(measured)
            groups.append([told.rule, told.outer, told.rank, kinds, measured.t, [], []])
        measured.group = known[key]
        group = groups[measured.group]
        group[5].append(place)
        group[6].append(row_of(measured))
        return 0

    cdef int find_own(self, Measured* measured, Py_ssize_t size) except -1:
        """Give a stage the numbers that its rule makes of what was found in its own array."""
        cdef Told told = self.measuring[measured.rule]
        rule, row = told.rule, row_of(measured)
        if told.form == ASKS_SUMS:
            coefs, kept = rule.coefs(row), ()
        elif told.form == ASKS_BOTH:
            coefs, kept = rule.coefs(told.before, row), ()
        else:
            coefs, kept = numbers_of(rule, row, measured.t, size)
        self.set_numbers(measured, coefs, kept)
        return 0

    cdef int set_numbers(self, Measured* measured, coefs, kept) except -1:
        """Give a stage its numbers, and note what its rule keeps."""
        cdef tuple numbers = floats(coefs), keeps = floats(kept)
        cdef Segment* leaf = <Segment*> self.work.segments.data + measured.segment
        cdef Py_ssize_t at = (<Stage*> self.work.stages.data)[measured.stage].coefs
        cdef void* cells = <double*> self.work.numbers.data + at
        cdef Keeping* keeping
        cdef Py_ssize_t k
        if len(numbers) != measured.of_step or len(keeps) != measured.keeps:
            rule = (<Told> self.measuring[measured.rule]).rule
            raise ValueError(
                f"{type(rule).__name__}.coefs returned {len(numbers)} numbers and keeps "
                f"{len(keeps)}; its step takes {measured.of_step}, and `kept` names "
                f"{measured.keeps}"
            )
        for k in range(len(numbers)):
            if leaf.is_double:
                (<double*> cells)[k] = numbers[k]
            else:
                (<float*> cells)[k] = <float> <double> numbers[k]
        for k in range(measured.keeps + measured.of_tree if measured.keeps else 0):
            keeping = <Keeping*> push(&self.work.keepings, sizeof(Keeping))
            keeping.where = measured.kept + k
            keeping.value = keeps[k] if k < measured.keeps else measured.changes + 1
        measured.is_done = True
        return 0

    cdef int ask_tree(self) except -1:
        """Find all numbers for which stages wait, where no other batch has leaves."""
        groups = self.measure()
        if not groups:
            return 0
        asked = tree_of(self.told)
        while groups:
            self.receive(asked.answers(groups))
            groups = self.measure()
        return 0

    @cython.boundscheck(True)
    cdef int finish(self) except -1:
        cdef Run run
        cdef float_environment before
        cdef Py_ssize_t k
        cdef Count* count
        cdef Keeping* keeping
        cdef bint keeps
        if self.work.measures.length and not self.is_measured():
            self.ask_tree()
        before = environment_enter()
        run.members = 1
        try:
            self.begin()
            self.prepare(&run)
            run.members = take_team(run.bytes)
            run.pieces = min(run.blocks, run.bytes // PIECE + 1, run.members * PIECES)
            self.lend_scratch(&run)
            keeps = self.keeps_gil(&run, run.bytes)
            self.check_held(0, self.asked)
            work_on(&run, update_piece, run.bytes, keeps)
            for k in range(self.work.counts.length):
                count = <Count*> self.work.counts.data + k
                count.where[0] = count.value
            for k in range(self.work.keepings.length):
                keeping = <Keeping*> self.work.keepings.data + k
                keeping.where[0] = keeping.value
            self.busy = False
            return 0
        finally:
            self.give_memory_back()
            if run.members > 1:
                team_leave()
            environment_leave(before)

    cdef bint is_measured(self) noexcept:
        """Tell whether no stage waits for a number."""
        cdef Py_ssize_t k
        for k in range(self.work.measures.length):
            if not (<Measured*> self.work.measures.data)[k].is_done:
                return False
        return True

    cdef int check_held(self, Py_ssize_t first, Py_ssize_t end) except -1:
        """Raise if an array no longer has the memory that is in use of it."""
        cdef Segment* leaves = <Segment*> self.work.segments.data
        cdef Py_ssize_t moved = first_moved(self.work, first, end), k
        if moved < 0:
            return 0
        for k in range(self.work.segments.length):
            if leaves[k].held <= moved < leaves[k].held_end:
                self.failed = leaves[k].place
        raise RuntimeError(
            "an array of the parameter, its gradient or its state was given other memory while the "
            "step was under way, or has less than it shows; nothing was updated"
        )

    cdef bint keeps_gil(self, Run* run, Py_ssize_t bytes) except -1:
        """Tell whether a run keeps the GIL; if not, keep the memory in use from others (see f).

        After such a run, `give_memory_back` must be called.
        """
        cdef Py_ssize_t n = self.work.held.length
        cdef bint is_short = bytes < SHORT_OF_TENSORS
        if bytes < SHORT and run.members == 1 or bytes < SHORT_OF_EACH * n:
            return True
        if self.work.borrows and self.storages is None and self.has_tensors(not is_short):
            if is_short:
                return True
        if not HAS_GIL:
            return False
        if self.keeper is None:
            self.keeper = Keeper()
        if self.keeper.keep(self.work):
            return False
        self.keeper.give_back()
        return True

    cdef bint has_tensors(self, bint owns) except -1:
        """Tell whether there are views of tensors; if so, and if `owns`, own their storages.

        A thread that gives a tensor another storage does no harm then. A storage itself may still
        be given other memory.
        """
        cdef Held* held = <Held*> self.work.held.data
        cdef PyObject* base
        cdef Py_ssize_t k
        cdef int found
        if owner_of is NULL:
            return False
        self.asked = self.work.held.length      # collected garbage may run code of users
        for k in range(self.work.held.length):
            base = lender(held[k].array)
            if base is NULL:
                continue
            found = owner_of(base, held[k].data, held[k].bytes)
            if found == MOVED:
                self.check_held(k, k + 1)
            if found == TENSOR and not owns:
                return True
            if found == TENSOR:
                self.storages = self.storages or []
                self.storages.append((<object> base).untyped_storage())
        return self.storages is not None

    cdef void give_memory_back(self) noexcept:
        if self.keeper is not None:
            self.keeper.give_back()

    cdef void prepare(self, Run* run) noexcept:
        """Fill in the run: its segments, stages, numbers and sizes."""
        run.segments = <Segment*> self.work.segments.data
        run.length = self.work.segments.length
        run.stages = <Stage*> self.work.stages.data
        run.numbers = <double*> self.work.numbers.data
        run.blocks, run.bytes, run.gradients = self.blocks, self.bytes, self.gradients

    cdef int lend_scratch(self, Run* run) except -1:
        """Give each thread memory for its blocks, from the start of a cache line.

        This memory is not on the stacks of the threads, which users of Python may make small.
        """
        cdef Py_ssize_t blocks = (
            MEASURING if self.work.measures.length else WIDENING if self.widens else RUNNING
        )
        cdef uintptr_t start
        run.room = blocks * self.longest
        self.work.scratch.length = 0
        start = <uintptr_t> push(&self.work.scratch, sizeof(double), run.members * run.room + 8)
        run.scratch = <double*> ((start + 63) & ~<uintptr_t> 63)
        return 0


cdef tuple row_of(Measured* measured):
    """Return what was found for the terms of a measure."""
    cdef list row = []
    cdef int j
    for j in range(measured.info.terms):
        row.append(measured.row[j])
    return tuple(row)


cdef bint is_finite_row(Measured* measured) noexcept:
    cdef int j
    for j in range(measured.info.terms):
        if not isfinite(measured.row[j]):
            return False
    return True


cdef tuple kinds_of(Measured* measured):
    """Return how the terms of a measure are reduced."""
    cdef list kinds = []
    cdef int j
    for j in range(measured.info.terms):
        kinds.append(KINDS[measured.info.how[j]])
    return tuple(kinds)


numbers_of = tree_of = None


def know_measures(numbers, tree):
    """Learn what makes coefs of measured numbers, and what combines those of the tree.

    ``numbers(rule, row, t, size)`` returns the coefs of a rule that measures an array, and what it
    keeps; ``tree(told)`` an object whose ``answers(groups)`` returns these for each group that
    `Batch.measure` returns.
    """
    global numbers_of, tree_of
    numbers_of, tree_of = numbers, tree
