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
    from ._arrays.dlpack import Viewer as _Viewer  # noqa: F401 (compiled)
except ModuleNotFoundError as _error:
    if _error.name != "optimisers._arrays.dlpack":
        raise
    raise ImportError(
        f"these are the sources of optimisers, not built: {__path__[0]}. Leave the folder around "
        "them to import what you installed, or build them there by `pip install -e .`"
    ) from None

from . import words as words
from ._arrays.library import isnumeric as isnumeric
from ._arrays.library import maywrite as maywrite
from ._engine.cpu import get_num_threads as get_num_threads
from ._engine.cpu import set_num_threads as set_num_threads
from ._flat.restructure import destructure as destructure
from ._fork import compiling as _compiling
from ._info import show_versions as show_versions
from ._leaf import Leaf as Leaf
from ._norms import all_finite as all_finite
from ._norms import norm as norm
from ._norms import norms as norms
from ._state import adjust as adjust
from ._state import adjust_ as adjust_
from ._state import evaluation as evaluation
from ._state import freeze_ as freeze_
from ._state import setup as setup
from ._state import thaw_ as thaw_
from ._state import update as update
from ._state import update_ as update_
from ._training import minimize as minimize
from ._trees.nodes import children as children
from ._trees.nodes import functor as functor
from ._trees.nodes import register_node as register_node
from ._trees.nodes import trainable as trainable
from ._trees.parameters import trainables as trainables
from ._trees.paths import KeyPath as KeyPath
from ._trees.walks import fmap as fmap
from ._trees.walks import getkeypath as getkeypath
from ._trees.walks import haskeypath as haskeypath
from ._trees.walks import setkeypath_ as setkeypath_
from .rules._base import ElementwiseRule as ElementwiseRule
from .rules._base import Rule as Rule
from .rules._base import registry as _registry
from .rules.accumulate import AccumGrad as AccumGrad
from .rules.chain import OptimiserChain as OptimiserChain
from .rules.norms import ClipNorm as ClipNorm
from .rules.precision import MixedPrecision as MixedPrecision

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
    _MOVED = {"_numba": "_steps.compiled"}  # files that programs know by the name they had before

    def __dir__():
        from importlib.util import find_spec

        public = {n for n, x in globals().items() if type(x) is not type(words) or x is words}
        late = {n for n in _LATE if n == "io" or find_spec(n)}  # a name that is offered works
        return sorted({n for n in public if n[0] != "_" or n[:2] == "__"} | late | {"__version__"})

    def __getattr__(name):
        if name in _LATE or name in _MOVED:
            from importlib import import_module

            with _compiling:
                return import_module(f"{__name__}.{_MOVED.get(name, name)}")
        if name[0] == "_" and name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name != "__version__":
            import sys

            from ._messages import names as _names

            raise _names.missing(__name__, name, __dir__(), sys._getframe(1))
        from importlib import metadata  # late: it would be a quarter of the whole import

        return metadata.version(__name__)
