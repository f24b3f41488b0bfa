import os

from cpython.tuple cimport PyTuple_GET_ITEM

# Numbers in a block for which one loop does all: such blocks are only shared out among threads. The
# blocks of a chain stay in the cache from step to step. They are shorter, so that the processor can
# fetch the next one meanwhile.
cdef Py_ssize_t block = 4096
cdef Py_ssize_t chain_block = 256
cdef Py_ssize_t work_per_thread = 200_000   # bytes read and written: see set_work_per_thread
cdef int threads_wanted = 0             # 0: as OpenMP says
cdef int processors = os.cpu_count() or 1


def instruction_sets():
    """Return the names of the twins of this module that the processor runs, widest first."""
    return ["avx512"] * bool(runs_avx512()) + ["avx2"] * bool(runs_avx2())


def set_block(Py_ssize_t alone, Py_ssize_t in_chain=0):
    """Set how many numbers a block has for one step, and for a chain; for tests, measurements."""
    global block, chain_block
    in_chain = in_chain or alone
    for numbers in (alone, in_chain):
        if not LANES <= numbers <= MAX_BLOCK or numbers % LANES:
            raise ValueError(f"a block has a multiple of {LANES} numbers, at most {MAX_BLOCK}")
    block, chain_block = alone, in_chain


def set_work_per_thread(Py_ssize_t bytes):
    """Set how many bytes each thread must have to move, to be worth its while.

    The default, and `WAKING`, are where a second thread began to pay on the machines it was
    measured on, awake and asleep, by ``python asv_bench/threads.py``.
    """
    global work_per_thread
    work_per_thread = max(1, bytes)


def settings():
    """Return numbers in a block, in a block of a chain, bytes that a thread must have to move."""
    return block, chain_block, work_per_thread


def set_num_threads(int n):
    """Set the most threads that a run uses; 0 leaves it to OpenMP."""
    global threads_wanted
    threads_wanted = n


def get_num_threads():
    """Return the most threads that a run uses."""
    return most_threads()


def after_fork():
    """Give a forked child threads of its own: those there were stayed with the parent."""
    team_forked()


cdef int most_threads() noexcept nogil:
    return threads_wanted or omp_get_max_threads() or processors

cdef tuple floats(numbers):
    """Return a tuple of nothing but floats; code of users may run."""
    cdef tuple items = tuple(numbers)
    cdef Py_ssize_t k
    for k in range(len(items)):
        if type(items[k]) is not float:
            return tuple([float(number) for number in items])
    return items

cdef inline object item(object a_tuple, Py_ssize_t k):
    """Return an item of a tuple, also of a named one, unchecked."""
    return <object> PyTuple_GET_ITEM(a_tuple, k)
