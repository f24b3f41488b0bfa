cimport numpy as cnp


def update_one(leaf, x, g, lower, on_nonfinite):
    """Update one leaf in place if all about it is ordinary; tell whether it was updated.

    If not, nothing was written: the long way updates it, or raises an error. A gradient that holds
    infinity or NaN is ordinary if `on_nonfinite` is "ignore".
    """
    cdef Batch batch
    cdef Slots slots = slots_of(leaf)
    cdef Plan plan
    cdef float_environment before
    cdef bint checks = on_nonfinite != "ignore"
    if checks and on_nonfinite != "raise" and on_nonfinite != "skip":
        return False
    before = environment_enter()
    batch = Batch()
    try:
        if not cnp.PyArray_CheckExact(x) or g is None or batch.is_frozen(leaf, slots):
            return False
        plan = batch.plan(batch.slot(leaf, slots.rule, "rule"), lower)
        if plan is None or not batch.add(0, plan, batch.slot(leaf, slots.state, "state"), x, g):
            return False
        if batch.new_x or batch.settle() is not None or (checks and batch.check_finite()):
            return False
        batch.finish()
    except Exception:
        return False
    finally:
        environment_leave(before)
    return True
