"""Locks, and imports while the program runs, that are whole in a child made by `os.fork`.

A child has one thread: the one that forked. A lock that another thread held is held there for
ever, by nobody, and so is Python's lock around a module that another thread was importing. So a
fork waits until nobody is at what is done here, which takes as long as to compile a rule at most.
"""

from __future__ import annotations

# A fork takes the lock of `logging` too, which compilers and many imports need; those registered
# last come first. If ours came behind it, one who has it could wait for one who needs it.
import logging  # noqa: F401
import os
import threading
from types import TracebackType

_LONGEST = 30.0
"""Seconds that a fork waits: if it came to that, a child with one broken lock is better than none.
"""


class Turn:
    """A lock for one thread at a time, as often as it wants to; made once, for a module.

    A handler of signals that forks in the middle, or a rule that does, comes in: it is that thread.
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
"""Whose turn it is to compile a rule, or to import what that needs."""
