cdef enum:
    MAX_STEPS = 256
    MAX_LEADS = 8
    LONGEST_LEAD = 2

cdef struct StepInfo:
    int index               # in the table; -1 for one that was compiled late
    int slots
    int coefs
    Step run[2]             # loops for float and for double
    Step finish[2]          # loops that subtract, too: they take and return x in place of dx
    Step fused[MAX_LEADS][2]    # the same with the steps of a lead ahead of it; or NULL

cdef enum How:              # a term of a measure is reduced
    SUM
    GREATEST
    NORM

KINDS = "sum", "largest", "norm"
"""How a term is reduced: the names of `How`, in this order."""

cdef struct MeasureInfo:
    int slots
    int coefs
    int terms
    unsigned char how[MAX_TERMS]
    Step run[2]             # for float and for double; NULL where the gradient is the one term

cdef struct Lead:           # steps without slots
    int length
    int steps[LONGEST_LEAD]     # positions in the table

cdef StepInfo step_table[MAX_STEPS]
cdef MeasureInfo measure_table[MAX_STEPS]
cdef Lead leads[MAX_LEADS]
cdef int leads_known = 0
max_slots = MAX_SLOTS
step_index = {}
"""The position of the step of each class of rules in the table, by the name of the class."""

measure_index = {}
"""Where the measure of each class of rules stands in its table."""
max_terms = MAX_TERMS

cdef int add_measure(str name, int slots, int coefs, tuple kinds, Step single,
                     Step double_) except -1:
    cdef int k = len(measure_index)
    if k == MAX_STEPS or len(kinds) > MAX_TERMS:
        raise ImportError(f"no room for the measure of {name}")
    describe(&measure_table[k], slots, coefs, kinds)
    measure_table[k].run[0], measure_table[k].run[1] = single, double_
    measure_index[name] = k
    return 0

cdef int describe(MeasureInfo* measure, int slots, int coefs, tuple kinds) except -1:
    """Note what a measure takes, and how its terms are reduced."""
    cdef int j
    measure.slots, measure.coefs, measure.terms = slots, coefs, len(kinds)
    for j in range(measure.terms):
        measure.how[j] = KINDS.index(kinds[j])
    return 0

cdef int add_step(str name, int slots, int coefs, Step single, Step double_,
                  Step single_finish, Step double_finish) except -1:
    cdef int k = len(step_index)
    if k == MAX_STEPS or slots > MAX_SLOTS:
        raise ImportError(f"no room for the step of {name}")
    step_table[k].index = k
    step_table[k].slots = slots
    step_table[k].coefs = coefs
    step_table[k].run[0] = single
    step_table[k].run[1] = double_
    step_table[k].finish[0] = single_finish
    step_table[k].finish[1] = double_finish
    step_index[name] = k
    return 0

cdef int add_lead(tuple names) except -1:
    """Add a lead, for the steps that `add_fused` adds next."""
    global leads_known
    if leads_known == MAX_LEADS or len(names) > LONGEST_LEAD:
        raise ImportError(f"no room for {names} ahead of a step")
    leads[leads_known].length = len(names)
    for k, name in enumerate(names):
        leads[leads_known].steps[k] = step_index[name]
    leads_known += 1
    return 0

cdef int add_fused(str name, Step single, Step double_) except -1:
    cdef Step* step = step_table[<int> step_index[name]].fused[leads_known - 1]
    step[0], step[1] = single, double_
    return 0
