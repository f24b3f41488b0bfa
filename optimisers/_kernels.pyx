# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""The CPU engine: runs the steps of many leaves, block by block, without the GIL.

a) A *step* is one rule's formula as a loop over a block of numbers. The steps, and the words that
   they call, are written by tools/emit_steps.py from words.py and the rules into _steps.pxi, for
   float and double, and included below.
b) A `Plan` is the program of a rule made ready, stage by stage: it stacks its steps on a leaf.
c) A `Batch` gathers leaves: for each a *segment* (parameter, gradient, length) and for each step of
   its rule a *stage* (function, slots, coefs). What the kernels cannot take is handed back
   untouched; nothing that the caller can see is written while gathering.
   `update_one` does all this for a leaf on its own.
d) Every segment is cut into blocks. `Batch.run` runs the whole chain on a block, which stays in the
   first cache meanwhile, before it goes to the next, so that a chain of any length moves each
   array through memory once. The last step of the chain subtracts as it goes, in one loop with the
   clips and decays right ahead of it (`leads`). Threads (team.h) share the blocks out among them.
   Blocks are independent, so the bits depend neither on their size nor on the number of threads.
e) A *measure* needs all of a leaf, or of all leaves, before its step can run. The steps ahead of it
   are then evaluated on copies of their slots, block by block, only to be reduced, with the terms
   of the measure if it has a formula of its own. `measure` does that for each leaf in turn, and
   stops at numbers of the tree, which are known when all leaves have reached theirs (`receive`).
   The stage then is an ordinary step, with the coefs that its rule made of the numbers. Partial
   sums belong to fixed stretches of the leaf, so they have the same bits for any number of threads.
f) *Code of users.* Between the taking of a leaf and the run, code of users may run: a
   rule's `coefs` and `__float__` of what it returns, `lower` (which reads a rule), `blank` and the
   truth of `frozen` in `gather` and `take`; the `coefs` of rules that measure; and all that a
   gradient's conversion and a rule's `apply` do in the engine between the calls of a batch. A
   signal, the collection of garbage, and other threads come wherever Python runs, the last also
   while the kernels run without the GIL. So a batch *holds* every array whose address it has: it
   owns a reference to the array itself (a tuple around it would not keep NumPy's `resize` from
   giving its memory back) from the moment when the address is read until the batch is gone. It
   trusts no length, type or address across such a call: lists are indexed with a check, what
   `coefs` returns is made a tuple of floats first, tuples are read by the C functions, never by
   their own `[]`, and before addresses are used, `check_held` asks whether they are still those of
   the arrays, which `refcheck=False` and `__setstate__` can change, and of the tensors of PyTorch
   of which the arrays are views: these may be given other memory at any time
   (``x.data = y``, ``storage.resize_``). After that check no Python runs until the numbers are
   written. `asked` is how many arrays were held when Python last ran: all of them, unless a batch
   gathers and runs in one call.
   A short run keeps the GIL. A long one lets other threads have it, so that they must not be able
   to take its memory away meanwhile. A `Keeper` is the base of all arrays of NumPy then: these do
   not own their memory, so that NumPy refuses to resize it and does not free it. If another run
   keeps an array, this one keeps the GIL. Of tensors it owns the storages, which a thread may
   replace then, but not resize: *that may end the process*, as while PyTorch itself computes.
   PyTorch has nothing by which to hold the memory of a storage (a view by ``tensor.numpy()``
   forbids to resize it for good), and the GIL is no lock on it, since ``Tensor.resize_`` and
   ``out=`` copy and free without it (beside a `resize_` of 240 MB, which took 1.4 s, another thread
   of Python ran all the time). To keep the GIL would stop ``storage.resize_`` alone, and halt other
   threads for the whole run: 20 to 30 ms for 10 million numbers, where Python switches every 5 ms.
   A Python without the GIL has no Keeper: there NumPy's own calls are not safe either.
g) *Narrow numbers*, float16 and bfloat16, are computed with in float. Blocks of the parameter, the
   gradient and the slots are widened into scratch memory, the same steps run there, and then each
   slot and the parameter is rounded, once (`keep`, `round_into`). A gradient and a slot may also be
   float beside a narrow parameter, and a slot narrow beside one that is float.
h) A run computes in the usual floating-point environment (environment.h), in all threads: the bits
   do not depend on the caller's, which it has again afterwards.
"""

cimport numpy as cnp

cnp.import_array()

include "_cpu/platform.pxi"   # the compiler, the processor, Python, NumPy; sizes that were measured
include "_cpu/steps.pxi"      # the table of steps, which the generated file fills
include "_steps.pxi"          # the words and the steps, written by tools/emit_steps.py
fill_table()
include "_cpu/work.pxi"       # the memory of a batch: leaves, their stages, what is held
include "_cpu/held.pxi"       # arrays whose memory is in use
include "_cpu/spans.pxi"      # memory that is written, sorted by address
include "_cpu/settings.pxi"   # blocks and threads
include "_cpu/plans.pxi"      # programs of rules made ready
include "_cpu/walk.pxi"       # questions of the walk, for many leaves at once
include "_cpu/leaves.pxi"     # questions to a leaf and its arrays
include "_cpu/batch.pxi"      # leaves gathered, kept apart, run
include "_cpu/one.pxi"        # a leaf on its own, the whole way
include "_cpu/run.pxi"        # blocks shared out among threads, and the chain of steps on a block
include "_cpu/measures.pxi"   # reductions whose bits do not depend on the threads
include "_cpu/finite.pxi"     # gradients that hold infinity or NaN
include "_cpu/loops.pxi"      # copies, conversions, subtraction
