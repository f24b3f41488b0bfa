"""Locks, and imports while the program runs, that are whole in a child made by `os.fork`.

A child has one thread: the one that forked. A lock that another thread held is held there for
ever, by nobody, and so is Python's lock around a module that another thread was importing. So a
fork waits until nobody is at what is done here, which takes as long as to compile a rule at most.
"""

from __future__ import annotations

# A fork also takes the lock of `logging`, which compilers and many imports need. Hooks that were
# registered last run first, so that `logging` is imported here: our lock is then taken before its
# lock. Otherwise a fork that has the lock of `logging` could wait for a thread that compiles, and
# that thread for the lock of `logging`.
import logging  # noqa: F401
import os
import threading
from types import TracebackType

_LONGEST = 30.0
"""Seconds that a fork waits at most; then a child with a broken lock is better than none."""


class Turn:
    """A reentrant lock, made once for a module.

    A signal handler or a rule that forks while its thread holds the lock does not wait for it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_held = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._wait, after_in_parent=self._go_on, after_in_child=self._begin
            )

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def _wait(self) -> None:
        self._is_held = self._lock.acquire(timeout=_LONGEST)

    def _go_on(self) -> None:
        if self._is_held:
            self._is_held = False
            self._lock.release()

    def _begin(self) -> None:
        if not self._is_held:  # an interrupt came while the fork waited
            self._lock = threading.RLock()
        self._go_on()


compiling = Turn()
"""Held while a rule is compiled, or the modules for that are imported."""
