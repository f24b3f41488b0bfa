"""The protocol of a batch: the leaves of an update that one backend takes.

The protocol has an implementation for the CPU kernels (`cpu`), for CUDA devices (`_cuda.batch`) and
for the rest, by the array library of the parameter (`arrays`). Another device is another batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from .._arrays.library import Call, isnumeric, library_for, refuse_masked_parameter
from .._messages.text import short
from ..rules._measure import Pass
from .gradients import checked, holds_nonfinite

Array = Any
__all__ = ["Batch", "Call", "Update", "note"]


class Update:
    """One update: distinct leaves, and lists of their parameters and gradients by index."""

    def __init__(
        self,
        leaves: list[Any],
        xs: list[Array],
        gs: list[Any],
        higher: Sequence[list[Any]],
        path_of: Callable[[int], str],
        in_place: bool,
        value: Any = None,
    ) -> None:
        self.leaves, self.xs, self.gs, self.higher = leaves, xs, gs, higher
        self.path_of, self.in_place, self.value = path_of, in_place, value
        self._gradients: dict[int, Array | None] = {}

    def path(self, k: int) -> Callable[[], str]:
        """Return a function that returns the path of index `k`."""
        return partial(self.path_of, k)

    def states(self) -> list[Any]:
        """Return the states of all leaves."""
        return [leaf.state for leaf in self.leaves]

    def gradient(self, k: int) -> Array | None:
        """Return a gradient, checked once; None says that there is none.

        Raises
        ------
        TypeError, ValueError
            If it is no gradient, or if its parameter cannot be updated.
        """
        if k not in self._gradients:
            x, path = self.xs[k], self.path(k)
            library_for(x).refuse_lost(x, self.leaves[k].state, path)
            if not isnumeric(x):
                from .._messages.mixups import for_model

                told = f"at {path()}: the state tree has a parameter, the model {short(x)}"
                raise TypeError(told + for_model(x))
            refuse_masked_parameter(x, path)
            self._gradients[k] = checked(self.gs[k], self.leaves[k], x, path)
        return self._gradients[k]

    def is_bad(self, k: int, gradients: Sequence[list[Any]]) -> bool:
        """Tell whether one of the gradients at an index holds infinity or NaN."""
        return holds_nonfinite(k, self.leaves[k], self.xs[k], gradients, self.path(k))


class Batch(Protocol):
    """Leaves that one backend updates. Nothing that was given is written before its calls run."""

    name: str
    """The name of the backend, as `watching` notes it."""

    @property
    def failed(self) -> int:
        """The index at which `measure` or a call raised; -1 if it was at none."""

    def gather(self, ks: Sequence[int]) -> list[int]:
        """Take leaves at some indices, pass over those without a gradient, and return the rest.

        All that can be refused is refused here, with its path.
        """

    def indices(self) -> list[int]:
        """Return the indices taken."""

    def nonfinite(self) -> list[int]:
        """Return the indices taken whose gradients hold infinity or NaN."""

    def settle(self, before: Sequence[Batch]) -> tuple[int, int] | None:
        """Copy gradients and parameters that would be read after they are written.

        It is called after `measure`.

        Returns two indices that would write the same memory, one of them of this batch and the
        other of this or of the batches before; else None.
        """

    def measure(self, whole: Pass) -> dict[int, list[type]]:
        """Compute the numbers that steps need, up to those of the tree; raise if one is refused.

        Returns, for each index that waits for numbers of the tree, the classes of its rules that
        measure the tree. It is called again after `whole` has combined numbers.
        """

    def calls(self) -> list[Call]:
        """Return the calls that make the update, all of C functions (see `at_once`)."""

    def may_write(self, arrays: Sequence[Array]) -> bool:
        """Tell whether the calls may write memory of some arrays, True in doubt; after `settle`."""

    def written(self) -> list[tuple[int, Array]]:
        """Return the arrays, with their indices, that the calls write."""

    def results(self) -> tuple[dict[int, Array], dict[int, Any]]:
        """Return, by index, the parameters and states that are not written in place.

        The calls may fill their arrays.
        """

    def unrecorded(self) -> list[Any]:
        """Return the tensors that are written unknown to autograd."""


def note(error: Exception, leaf: Any, path: str) -> None:
    """Add to an error the rule that raised it, and the path."""
    error.add_note(f"raised by {leaf.rule!r} at {path}; nothing was updated")
