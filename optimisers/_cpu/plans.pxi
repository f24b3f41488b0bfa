cimport numpy as cnp
from cpython.list cimport PyList_GET_ITEM
from cpython.ref cimport PyObject
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset


cdef enum Does:             # kinds of stages
    STEP
    MEASURED                # a step whose numbers are found by a measure
    HOLD
    PARTS

cdef struct Task:           # a stage of a program made ready
    Does does
    Py_ssize_t first        # position of the first index of its place, among those of the plan
    Py_ssize_t end          # position after the last one
    Py_ssize_t parts        # how many parts its state must have
    StepInfo step           # used by STEP and MEASURED, as are the next five
    bint is_late            # whether step or measure are compiled when they first meet a dtype
    bint is_made[2]         # whether they are compiled, for float and for double
    bint counts             # whether coefs takes t
    int64_t known_t[2]      # the count whose coefs the batch holds, for float and for double
    Py_ssize_t known[2]     # their position among the numbers of the batch; -1 if it holds none
    int64_t n               # used by HOLD, whose `add` and `release` are the next two tasks
    MeasureInfo measure     # used by MEASURED, as are the rest
    double order            # the order of its norms
    int keeps               # how many numbers its rule keeps, in a vector behind the slots
    bint of_tree            # whether it measures the tree
    int64_t before_t[2]     # the count whose numbers of measure_coefs the batch holds
    Py_ssize_t before[2]    # their position among the numbers of the batch; -1 if it holds none

cdef enum:
    TASKS_OF_HOLD = 3


cdef enum Form:             # in which coefs of a rule that measures asks
    ASKS_SUMS               # coefs(sums)
    ASKS_BOTH               # coefs(before, sums), after the numbers of measure_coefs
    ASKS_ELSE


cdef class Told:
    """What stays known of a rule that measures, while its program runs."""

    cdef object rule
    cdef object outer           # the rule of the leaf
    cdef int rank               # the how manieth of its class it is there
    cdef Form form
    cdef bint takes_t           # measure_coefs takes the count of steps
    cdef object before          # what it returned last


FORMS = {(("sums",), False): ASKS_SUMS, (("before", "sums"), False): ASKS_BOTH}


cdef class Plan:
    """A program made ready for the kernels: its stages side by side.

    `find(rule, is_double)` returns the address of a late step (see `Step`), how many coefs that
    takes, and the address of its measure or None; or None.
    """

    cdef readonly object rule
    cdef object find
    cdef list rules             # the rule of each task, or None
    cdef list coefs             # its bound method, or None
    cdef Vector tasks
    cdef Vector places          # indices into a state, one place after the other
    cdef int master             # the NumPy type of a master copy; -1 if there is none
    cdef int64_t batch          # the number of the last batch that took leaves by it

    def __cinit__(self, rule, find=None):
        self.rule, self.find = rule, find
        self.rules, self.coefs = [], []
        self.master = -1

    def __dealloc__(self):
        free(self.tasks.data)
        free(self.places.data)

    # --- making ready ------------------------------------------------------------------------

    def add_step(self, rule, at, int index, int slots, bint counts):
        """Add an elementwise step; `index` is that in the table, or -1 for a late one."""
        cdef Task* task = self.add(STEP, rule, at, slots + counts)
        if index >= 0:
            task.step = step_table[index]
        task.step.index, task.step.slots = index, slots
        task.is_late, task.counts = index < 0, counts
        self.coefs[self.tasks.length - 1] = rule.coefs

    def add_measured(self, rule, at, int index, int measure, bint of_tree, int rank, late=None):
        """Add a step whose numbers `coefs` makes of what a measure finds.

        `measure` is its index in their table, or -1 for a late one; then `late` says how many coefs
        it takes, and how its terms are reduced. Of a rule of the tree, `rank` says the how manieth
        of its class it is.
        """
        cdef Told told = Told()
        cdef int slots = len(rule.slots), keeps = len(rule.kept)
        cdef Task* task = self.add(MEASURED, rule, at, slots + (keeps > 0) + rule.counts)
        if index >= 0:
            task.step = step_table[index]
        task.step.index, task.step.slots = index, slots
        if measure >= 0:
            task.measure = measure_table[measure]
        else:
            describe(&task.measure, slots, late[0], late[1])
        task.is_late, task.counts, task.of_tree = index < 0 or measure < 0, rule.counts, of_tree
        task.keeps, task.order = keeps, rule.order
        task.before[0] = task.before[1] = -1
        told.rule, told.outer, told.rank, told.before = rule, self.rule, rank, ()
        told.takes_t = "t" in rule.asks["measure_coefs"]
        told.form = FORMS.get((rule.asks["coefs"], keeps > 0), ASKS_ELSE)
        self.coefs[self.tasks.length - 1] = told

    def add_hold(self, at, int64_t n, add, release):
        """Add a stage that holds n - 1 gradients back; `add` and `release` are rule and index."""
        cdef Task* task = self.add(HOLD, None, at, 2)
        cdef Py_ssize_t k
        task.n = n
        for rule, index in (add, release):
            self.add_step(rule, at, index, 1, False)
        for k in range(self.tasks.length - 2, self.tasks.length):
            (<Task*> self.tasks.data)[k].parts = 2      # the count is the other

    def add_parts(self, at, Py_ssize_t n):
        """Add a stage that wants a tuple of n parts."""
        self.add(PARTS, None, at, n)

    def set_master(self, dtype):
        """Have a master copy of this dtype updated in place of the parameter."""
        self.master = dtype.num

    cdef Task* add(self, Does does, rule, at, Py_ssize_t parts) except NULL:
        cdef Task* task
        cdef Py_ssize_t first = self.places.length
        for index in at:
            (<Py_ssize_t*> push(&self.places, sizeof(Py_ssize_t)))[0] = index
        self.rules.append(rule)
        self.coefs.append(None)
        task = <Task*> push(&self.tasks, sizeof(Task))
        memset(task, 0, sizeof(Task))
        task.does, task.parts = does, parts
        task.first, task.end = first, self.places.length
        task.known[0] = task.known[1] = -1
        return task

    # --- leaves ------------------------------------------------------------------------------

    cdef void forget(self) noexcept:
        """Forget the positions of coefs, which belong to one batch."""
        cdef Task* tasks = <Task*> self.tasks.data
        cdef Py_ssize_t k
        for k in range(self.tasks.length):
            tasks[k].known[0] = tasks[k].known[1] = -1
            tasks[k].before[0] = tasks[k].before[1] = -1

    cdef bint stack(self, Batch batch, Segment* leaf, old, new) except -1:
        """Add stages that read the state `old` and write `new`; tell whether they can."""
        cdef Task* task
        cdef PyObject* a
        cdef PyObject* b
        cdef Py_ssize_t k = 0, d, index
        cdef bint unshared = leaf.unshared
        while k < self.tasks.length:
            task = <Task*> self.tasks.data + k
            a, b, leaf.unshared = <PyObject*> old, <PyObject*> new, unshared
            for d in range(task.first, task.end):
                index = (<Py_ssize_t*> self.places.data)[d]
                if not PyTuple_Check(<object> a) or not 0 <= index < PyTuple_GET_SIZE(<object> a):
                    return False
                a, b = PyTuple_GET_ITEM(<object> a, index), PyTuple_GET_ITEM(<object> b, index)
                leaf.unshared = leaf.unshared and is_unshared(a)
            if not PyTuple_Check(<object> a):
                return False
            if leaf.withheld:
                if task.does != PARTS and not batch.carry_over(<object> a, <object> b):
                    return False
            elif task.does == HOLD:
                if not self.hold(batch, task, leaf, <object> a, <object> b):
                    return False
                if not leaf.withheld:
                    k += 1                          # `release` comes next
                elif not self.step(batch, k + 1, leaf, <object> a, <object> b):
                    return False
            elif PyTuple_GET_SIZE(<object> a) != task.parts:
                return False
            elif task.does != PARTS and not self.step(batch, k, leaf, <object> a, <object> b):
                return False
            k += TASKS_OF_HOLD if task.does == HOLD and leaf.withheld else 1
        return True

    cdef bint step(self, Batch batch, Py_ssize_t k, Segment* leaf, old, new) except -1:
        """Add the stage of a step; tell whether it can be."""
        cdef Task* task = <Task*> self.tasks.data + k
        cdef int kind = leaf.is_double
        cdef int64_t t = 0
        cdef Stage* stage
        if task.is_late and not task.is_made[kind] and not self.compile(batch, k, kind):
            return False
        if task.counts:
            t = batch.read_count(item(old, task.parts - 1)) + 1
            if t == 0:
                return False
        if task.does == MEASURED:
            if not self.ask_for_measure(batch, k, kind, t):
                return False
        elif task.known[kind] < 0 or task.known_t[kind] != t:
            # Code of users: first, while no address of this leaf's state has been read.
            coefs = <object> PyList_GET_ITEM(self.coefs, k)
            numbers = floats(coefs(t) if task.counts else coefs())
            batch.asked = batch.work.held.length
            if len(numbers) != task.step.coefs:
                return False
            task.known[kind] = batch.add_numbers(numbers, kind)
            task.known_t[kind] = t
        stage = batch.add_stage(leaf, &task.step, old, new)
        if stage is NULL:
            return False
        stage.coefs = task.known[kind]
        if task.does == MEASURED:
            if not batch.add_measured(leaf, task, self.coefs[k], old, new, t):
                return False
        if task.counts:
            batch.store_count(new, task.parts - 1, t, leaf)
        return True

    cdef bint ask_for_measure(self, Batch batch, Py_ssize_t k, int kind, int64_t t) except -1:
        """Ask for the numbers of a measure, and make room for those of its step."""
        cdef Task* task = <Task*> self.tasks.data + k
        cdef bint is_new = task.before[kind] < 0 or task.before_t[kind] != t
        if is_new and task.measure.coefs:
            rule = self.rules[k]
            takes_t = (<Told> self.coefs[k]).takes_t
            numbers = floats(rule.measure_coefs(t) if takes_t else rule.measure_coefs())
            batch.asked = batch.work.held.length
            if len(numbers) != task.measure.coefs:
                return False
            (<Told> self.coefs[k]).before = numbers
            task.before[kind] = batch.add_numbers(numbers, kind)
        elif is_new:
            task.before[kind] = 0
        task.before_t[kind] = t
        if is_new or not task.of_tree:          # leaves have numbers of their own
            task.known[kind] = batch.add_numbers((1.0,) * task.step.coefs, kind)
        return True

    cdef bint compile(self, Batch batch, Py_ssize_t k, int kind) except -1:
        """Have a late step compiled for a dtype; tell whether it could be."""
        cdef uintptr_t address
        cdef Task* task = <Task*> self.tasks.data + k
        found = None if self.find is None else self.find(self.rules[k], kind)
        batch.asked = batch.work.held.length
        if found is None:
            self.find = None
            return False
        address, task.step.coefs, measure = found
        if task.step.index < 0:
            task.step.run[kind] = <Step> <void*> address
        task.is_made[kind] = True
        if measure is not None:
            address = measure
            task.measure.run[kind] = <Step> <void*> address
        return True

    cdef bint hold(self, Batch batch, Task* task, Segment* leaf, old, new) except -1:
        """Decide whether a gradient is held back, and count it; tell whether the state fits."""
        cdef int64_t held
        if PyTuple_GET_SIZE(old) != task.parts:
            return False
        held = batch.read_count(item(old, 1))
        if held < 0:
            return False
        if not leaf.is_double and not is_single(item(old, 0)):     # a narrow one goes on as float
            return False
        leaf.withheld = held + 1 < task.n
        batch.store_count(new, 1, held + 1 if leaf.withheld else 0, leaf)
        return True


cdef int bfloat16 = -1      # the type number of bfloat16; a comparison of names is too slow


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

    Results that NumPy computes around a run then have the same bits, too.
    """

    cdef float_environment before

    def __enter__(self):
        self.before = environment_enter()

    def __exit__(self, *error):
        environment_leave(self.before)
