"""Gradient-based update rules for NumPy arrays, with the state in plain sight.

`setup` makes a state tree for a model, `update_` takes a step in place, `update` a pure one.

>>> import numpy as np, optimisers
>>> model = {"w": np.array([1.0, 2.0])}
>>> state = optimisers.setup(optimisers.Adam(eta=0.1), model)
>>> state, model = optimisers.update_(state, model, {"w": np.array([3.0, -4.0])})
>>> model["w"]
array([0.9, 2.1])
"""

import typing as _typing

try:
    from ._dlpack import Viewer as _Viewer  # noqa: F401 (compiled)
except ModuleNotFoundError as _error:
    if _error.name != "optimisers._dlpack":
        raise
    raise ImportError(
        f"these are the sources of optimisers, not built: {__path__[0]}. Leave the folder around "
        "them to import what you installed, or build them there by `pip install -e .`"
    ) from None

from . import words as words
from ._arrays import isnumeric as isnumeric
from ._arrays import maywrite as maywrite
from ._engine import get_num_threads as get_num_threads
from ._engine import set_num_threads as set_num_threads
from ._fork import compiling as _compiling
from ._info import show_versions as show_versions
from ._nodes import children as children
from ._nodes import functor as functor
from ._nodes import register_node as register_node
from ._nodes import trainable as trainable
from ._path import KeyPath as KeyPath
from ._rule import ElementwiseRule as ElementwiseRule
from ._rule import Rule as Rule
from ._rule import registry as _registry
from ._ties import trainables as trainables
from ._tree import fmap as fmap
from ._tree import getkeypath as getkeypath
from ._tree import haskeypath as haskeypath
from ._tree import setkeypath_ as setkeypath_
from .compose import AccumGrad as AccumGrad
from .compose import ClipNorm as ClipNorm
from .compose import MixedPrecision as MixedPrecision
from .compose import OptimiserChain as OptimiserChain
from .destructure import destructure as destructure
from .minimise import minimize as minimize
from .state import Leaf as Leaf
from .state import adjust as adjust
from .state import adjust_ as adjust_
from .state import freeze_ as freeze_
from .state import setup as setup
from .state import thaw_ as thaw_
from .state import update as update
from .state import update_ as update_

if _typing.TYPE_CHECKING:
    from . import io as io
    from . import optax as optax
    from . import scipy as scipy
    from . import torch as torch
    from .rules import *  # noqa: F403 (for type checkers; at run time the registry is asked)

    __version__: str
else:
    globals().update({rule.__name__: rule for rule in _registry()})

    _LATE = ("io", "optax", "scipy", "torch")  # modules that not everybody needs

    def __dir__():
        from importlib.util import find_spec

        public = {n for n, x in globals().items() if type(x) is not type(words) or x is words}
        late = {n for n in _LATE if n == "io" or find_spec(n)}  # a name that is offered works
        return sorted({n for n in public if n[0] != "_" or n[:2] == "__"} | late | {"__version__"})

    def __getattr__(name):
        if name in _LATE:
            from importlib import import_module

            with _compiling:
                return import_module(f"{__name__}.{name}")
        if name[0] == "_" and name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name != "__version__":
            import sys

            from . import _names

            raise _names.missing(__name__, name, __dir__(), sys._getframe(1))
        from importlib import metadata  # late: it would be a quarter of the whole import

        return metadata.version(__name__)
