"""The rules of this library as an optimiser of PyTorch."""

from typing import TYPE_CHECKING

from .._messages.calls import no_name
from ._optimizer import Optimizer as Optimizer

__all__ = ["Optimizer"]

if not TYPE_CHECKING:  # type checkers know what there is

    def __getattr__(name):
        raise no_name(__name__, name)
