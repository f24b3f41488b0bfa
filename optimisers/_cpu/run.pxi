from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcpy

cdef struct Run:            # what the threads share
    Segment* segments
    Py_ssize_t length
    Stage* stages
    double* numbers
    Py_ssize_t blocks       # in all segments
    Py_ssize_t bytes        # bytes that the update moves
    Py_ssize_t gradients    # bytes of the gradients
    Py_ssize_t pieces       # pieces into which the update is cut
    int members             # threads, with that of the caller
    double* scratch         # memory of the threads
    Py_ssize_t room         # numbers in the memory of each thread
    int64_t is_bad          # whether infinity or NaN was found in any gradient


cdef inline Py_ssize_t number_size(Segment* leaf, Kind kind) noexcept nogil:
    """Return how many bytes a number of some kind has at this leaf."""
    if kind == SAME:
        return 8 if leaf.is_double else 4
    return 4 if kind == FLOAT32 else 2


cdef inline Py_ssize_t shortage(Segment* leaf) noexcept nogil:
    """Return how many numbers the first block must lack, so that the others begin at a cache line.

    Large arrays of one model often begin equally far from one.
    """
    cdef Py_ssize_t ahead
    if leaf.n < LINED_UP:
        return 0
    ahead = (-<uintptr_t> leaf.out % LINE) // number_size(leaf, leaf.of_x)
    return leaf.block - ahead if ahead else 0


cdef inline Py_ssize_t start_of(Segment* leaf, Py_ssize_t k) noexcept nogil:
    """Return the start of a block of a leaf, which is the end of the block before."""
    return min(max(k * leaf.block - leaf.short_by, 0), leaf.n)


cdef inline int enough(Py_ssize_t bytes) noexcept nogil:
    """Return how many threads have enough to do, if there are so many bytes to move."""
    return <int> max(1, min(<Py_ssize_t> TEAM_MOST, bytes // work_per_thread))


cdef int take_team(Py_ssize_t bytes):
    """Take as many threads as have enough to do, if they are free; return how many."""
    cdef int members = enough(bytes)
    return team_take(min(most_threads(), members)) if members > 1 else 1


cdef void share_out(int members, team_piece piece, void* job, Py_ssize_t pieces,
                    Py_ssize_t bytes) noexcept nogil:
    """Do all pieces of a job: together, if there is enough to do."""
    cdef Py_ssize_t k
    members = min(members, enough(bytes))
    if members > 1:
        team_run(piece, job, pieces, members, bytes >= WAKING * work_per_thread)
    else:
        for k in range(pieces):
            piece(job, k, 0)


cdef void work_on(Run* run, team_piece piece, Py_ssize_t bytes, bint keeps) noexcept:
    """Do all pieces of a run; if that takes a while, other threads of Python go on meanwhile."""
    if keeps:
        share_out(run.members, piece, run, run.pieces, bytes)
        return
    with nogil:
        share_out(run.members, piece, run, run.pieces, bytes)


cdef Py_ssize_t traffic(Stage* stages, Segment* leaf, Py_ssize_t end) noexcept nogil:
    """Return how many bytes the stages before `end` and the subtraction move."""
    cdef Py_ssize_t arrays = 3, k
    for k in range(leaf.first, end):
        arrays += 2 * stages[k].slots
    return arrays * leaf.n * (8 if leaf.is_double else 4)


cdef void update_piece(void* job, int64_t k, int member) noexcept nogil:
    """Update the blocks of piece `k`; blocks are counted over all segments."""
    cdef Run* run = <Run*> job
    cdef char* scratch = <char*> (run.scratch + member * run.room)
    cdef Py_ssize_t first = k * run.blocks // run.pieces
    cdef Py_ssize_t last = (k + 1) * run.blocks // run.pieces
    cdef Segment* leaf
    cdef Py_ssize_t at = segment_of(run.segments, run.length, first), before, start, n
    cdef const char* dx
    while first < last:
        leaf = run.segments + at
        before = run.segments[at - 1].blocks if at else 0
        while first < last and first < leaf.blocks:
            start = start_of(leaf, first - before)
            n = min(leaf.block - (0 if start else leaf.short_by), leaf.n - start)
            dx = chain(run, leaf, leaf.first + leaf.stages, start, n, scratch, False)
            if leaf.of_x != SAME:
                narrow_parameter(leaf, dx, start, n, scratch)
            elif dx is NULL:
                pass
            elif leaf.is_double:
                subtract[double](leaf.x, leaf.out, dx, start, n, leaf.withheld)
            else:
                subtract[float](leaf.x, leaf.out, dx, start, n, leaf.withheld)
            if leaf.is_copy:
                hand_on(leaf, start, n)
            first += 1
        at += 1


cdef Py_ssize_t segment_of(Segment* segments, Py_ssize_t n, Py_ssize_t wanted) noexcept nogil:
    """Return the position of the segment that holds a block; blocks are counted over all."""
    cdef Py_ssize_t low = 0, middle
    while low < n:
        middle = (low + n) // 2
        if segments[middle].blocks <= wanted:
            low = middle + 1
        else:
            n = middle
    return low


cdef const char* chain(Run* run, Segment* leaf, Py_ssize_t end, Py_ssize_t start, Py_ssize_t n,
                       char* scratch, bint dry) noexcept nogil:
    """Run the stages before `end` on one block; return the address of the step."""
    if leaf.narrow:     # a copy of the code, so that the usual one has no tests of slots
        return chain_of(run, leaf, end, start, n, scratch, dry, True)
    return chain_of(run, leaf, end, start, n, scratch, dry, False)


cdef inline const char* chain_of(Run* run, Segment* leaf, Py_ssize_t end, Py_ssize_t start,
                                 Py_ssize_t n, char* scratch, bint dry, bint narrow) noexcept nogil:
    """Run the stages before `end` on one block; return the address of the step.

    That is NULL if the last stage has subtracted it from the parameter.

    `scratch` holds three blocks: two that the stages use by turns and one for a gradient made
    wider. A dry run stores no slots; for these, and for others made wider, there are MAX_SLOTS
    blocks more, behind one for a parameter made wider, where what is left of it then lies.
    """
    cdef Py_ssize_t size = number_size(leaf, SAME)
    cdef Py_ssize_t offset = start * size
    cdef Py_ssize_t room = leaf.block * size
    cdef const char* g = leaf.g + start * number_size(leaf, leaf.of_g)
    cdef const char* x = leaf.x + offset
    cdef char* out = leaf.out + offset
    cdef char* dx = scratch
    cdef void* slots[MAX_SLOTS]
    cdef double* coefs
    cdef Stage* stage
    cdef Py_ssize_t last = -1 if dry or leaf.withheld else end - 1
    cdef Py_ssize_t k
    cdef int j
    if leaf.of_g != SAME:
        widen(leaf.of_g, g, scratch + 2 * room, n)
        g = scratch + 2 * room
    if narrow and leaf.of_x != SAME and leaf.first < end:
        x = out = scratch + 3 * room
        widen(leaf.of_x, leaf.x + start * number_size(leaf, leaf.of_x), out, n)
    for k in range(leaf.first, end):
        stage = run.stages + k
        for j in range(stage.slots):
            if narrow and stage.of[j] != SAME:
                slots[j] = scratch + (4 + j) * room
                widen(<Kind> stage.of[j], stage.old[j] + 2 * start, slots[j], n)
                continue
            slots[j] = scratch + (4 + j) * room if dry else stage.new[j] + offset
            if slots[j] != stage.old[j] + offset:
                copy(slots[j], stage.old[j] + offset, n * size)
        coefs = run.numbers + stage.coefs
        if k == last and stage.finish is not NULL:
            if out != x:
                copy(out, x, n * size)
            stage.finish(NULL, g, out, slots, coefs, n)
            if narrow:
                keep_slots(stage, slots, start, n)
            return NULL
        stage.run(x, g, dx, slots, coefs, n)
        if narrow and not dry:
            keep_slots(stage, slots, start, n)
        g = dx
        dx = scratch + room if dx == scratch else scratch
    return g


cdef void keep_slots(Stage* stage, void** slots, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """Round the new numbers of a stage into its narrow slots."""
    cdef int j
    for j in range(stage.slots):
        if stage.of[j] != SAME:
            if stage.new[j] != stage.old[j]:
                memcpy(stage.new[j] + 2 * start, stage.old[j] + 2 * start, 2 * n)
            keep(<Kind> stage.of[j], slots[j], stage.new[j] + 2 * start, n)


cdef void narrow_parameter(Segment* leaf, const char* dx, Py_ssize_t start, Py_ssize_t n,
                           char* scratch) noexcept nogil:
    """Round a block of a narrow parameter, less the step if `chain` has not subtracted it yet."""
    cdef char* wide = scratch + 3 * leaf.block * sizeof(float)
    cdef char* out = leaf.out + 2 * start
    if leaf.withheld:
        if leaf.out != leaf.x:
            memcpy(out, leaf.x + 2 * start, 2 * n)
        return
    if leaf.stages == 0:
        widen(leaf.of_x, leaf.x + 2 * start, wide, n)
    if dx is not NULL:
        subtract[float](wide, wide, dx, 0, n, False)
    round_into(leaf.of_x, wide, out, n, 2)
