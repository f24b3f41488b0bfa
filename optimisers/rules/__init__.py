"""The rules, a file for each family: fields, slots, coefs, step and docstring, side by side.

To add a rule, write one class in the file of its family. Exports, kernels, tests and benchmarks
find it by themselves. A file for a new family is named here.
"""

from typing import TYPE_CHECKING

from .._messages.calls import no_name
from .descent import *
from .scaled import *
from .adam import *
from .momenta import *
from .schedulefree import *
from .signs import *
from .ahead import *
from .chain import *
from .norms import *
from .trust import *
from .tree import *
from .accumulate import *
from .precision import *
from .matrices import *
from .preconditioners import *
from .curvature import *

if not TYPE_CHECKING:  # type checkers know what there is

    def __getattr__(name):
        raise no_name(__name__, name)
