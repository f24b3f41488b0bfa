cimport numpy as cnp


def update_one(leaf, x, g, lower, on_nonfinite):
    """Update one leaf in place, unless anything at all is out of the ordinary; tell whether it did.

    If not, nothing was written, and who takes the long way finds out what it is. A gradient that
    holds infinity or NaN is ordinary if these are to be ignored.
    """
    cdef Batch batch
    cdef Slots slots = slots_of(leaf)
    cdef Plan plan
    cdef float_environment before
    cdef bint judges = on_nonfinite != "ignore"
    if judges and on_nonfinite != "raise" and on_nonfinite != "skip":
        return False
    before = environment_enter()
    batch = Batch()
    try:
        if not cnp.PyArray_CheckExact(x) or g is None or batch.is_frozen(leaf, slots):
            return False
        plan = batch.plan(batch.slot(leaf, slots.rule, "rule"), lower)
        if plan is None or not batch.add(0, plan, batch.slot(leaf, slots.state, "state"), x, g):
            return False
        if batch.new_x or batch.settle() is not None or (judges and batch.judge()):
            return False
        batch.finish()
    except Exception:
        return False
    finally:
        environment_leave(before)
    return True
