"""`minimize`: the training loop, for those who do not want to write it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from ._arrays.dtypes import dtype_name
from ._arrays.library import isnumeric, library_for
from ._leaf import Leaf
from ._messages.calls import explained
from ._messages.text import short
from ._state import setup, update, update_
from ._trees.untrained import refuse_no_tree, tell
from ._trees.walks import fmap, walk
from .rules._base import Rule

Tree = Any
Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True, repr=False)
class History:
    """How the loss went, and when.

    Parameters
    ----------
    loss : ndarray, shape (n,), float64
        ``loss[k]`` is the loss after k steps.
    time : ndarray, shape (n,), float64
        Seconds from the start until each loss was known.
    message : str
        Why it ended.
    """

    loss: np.ndarray
    time: np.ndarray
    message: str

    def __repr__(self) -> str:
        if not len(self.loss):
            return f"History({self.message})"
        return f"History({self.message}; loss {self.loss[0]:.4g} to {self.loss[-1]:.4g})"

    def plot(self, axes: Any = None, against: str = "step", **line: Any) -> Any:
        """Draw the loss, on a logarithmic scale where it is positive throughout.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, optional
            Where to draw; new ones by default.
        against : {"step", "time"}
            What goes along the horizontal axis.
        **line
            For `matplotlib.axes.Axes.plot`: ``label``, ``color``, ...

        Returns
        -------
        matplotlib.axes.Axes
        """
        if against not in ("step", "time"):
            raise ValueError(f'against must be "step" or "time"; got {short(against)}')
        if axes is None:
            from matplotlib import pyplot

            _, axes = pyplot.subplots(layout="constrained")
            axes.spines[["top", "right"]].set_visible(False)
        axes.plot(self.time if against == "time" else np.arange(len(self.loss)), self.loss, **line)
        axes.set(xlabel="seconds" if against == "time" else "step", ylabel="loss")
        if (self.loss > 0).all():
            axes.set_yscale("log")
        return axes


class Minimized(NamedTuple, Generic[Model]):
    """The result of `minimize`."""

    model: Model
    state: Tree
    history: History


def _hint(name: str) -> str:
    from ._messages import names as _names

    if not name:
        return "write minimize(loss, model, rule, steps)"
    return _names.of_argument(name)


@explained(_hint)
def minimize(
    loss: Callable[..., Any],
    model: Model,
    rule: Rule | None,
    steps: int,
    *,
    value_and_grad: Callable[..., Any] | None = None,
    callback: Callable[[int, Model, float], Any] | None = None,
    progress: bool = True,
    state: Tree = None,
) -> Minimized[Model]:
    """Take steps down a loss, from a model of any shape.

    Parameters
    ----------
    loss : callable
        ``loss(model)`` is the number to minimise. Without `value_and_grad` it returns the gradient
        too: ``(value, gradient)``.
    model : tree
        Where to start. Its arrays are copied first and stay as they are.
    rule : Rule
        The rule for every parameter; None if `state` brings it.
    steps : int
        How many steps to take at most.
    value_and_grad : callable, optional
        What differentiates `loss`: `jax.value_and_grad`, `autograd.value_and_grad`, or
        ``lambda f: jax.jit(jax.value_and_grad(f))``. Or what does so already: a function of the
        model that returns ``(value, gradient)``, and then `loss` is not called. They are told
        apart by what comes of ``value_and_grad(model)``: a pair is the first value and gradient.
    callback : callable, optional
        ``callback(step, model, loss)``, called before each step: `loss` is that of `model`, after
        `step` steps. It ends the run by returning True or raising StopIteration; that model is
        then the result. Steps write into the model: copy what you keep.
    progress : bool
        Whether to show a bar with the loss, where tqdm is installed and a person looks.
    state : tree, optional
        A state tree to go on with, such as the one from the last call; it is copied too.

    Returns
    -------
    Minimized
        A named tuple: ``model`` and ``state`` after the last step, and a `History` of the loss.
        ``history.plot()`` draws it, ``history.message`` tells why it ended.

    Raises
    ------
    TypeError, ValueError
        If a value or a gradient is not what it should be, or the model no tree.

    Warns
    -----
    UserWarning
        If nothing in the model trains, or an array does not, as in `setup`.
    RuntimeWarning
        If the loss is infinite or NaN. The run then ends; the model returned is the one with that
        loss, after the step that spoilt it.

    Notes
    -----
    ``len(history.loss)`` is the number of times the loss was computed: one for each step, and one
    more if the callback or a loss that is not finite ended the run. The loss of the last model is
    not computed.

    The gradient of a complex parameter points uphill here, as PyTorch's does: dL/da + i dL/db for
    a + ib. JAX and HIPS autograd give its conjugate, which `minimize` turns round: for every
    gradient that is a JAX array, and for those of `autograd.value_and_grad`.

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> def loss(model):
    ...     residual = model["w"] - 3
    ...     return np.sum(residual**2), {"w": 2 * residual}
    >>> model = {"w": np.zeros(2)}
    >>> model, state, history = optimisers.minimize(loss, model, optimisers.Descent(0.25), steps=8)
    >>> model
    {'w': array([2.98828125, 2.98828125])}
    >>> history
    History(took all 8 steps; loss 18 to 0.001099)
    """
    _refuse_misfits(loss, model, rule, steps, state)
    for name, function in (("value_and_grad", value_and_grad), ("callback", callback)):
        if function is not None and not callable(function):
            raise TypeError(f"minimize: {name} must be a function; got {short(function)}")
    refuse_no_tree(model, "minimize")
    if rule is not None:
        state = setup(rule, model)
    state, model = update(state, model, None)  # copies of both, ties kept
    if rule is None and not any(isinstance(leaf, Leaf) for _, leaf in walk(state)):
        tell(model, False, ())

    losses: list[float] = []
    times: list[float] = []
    message = f"took all {steps} steps"
    start = time.perf_counter()
    evaluate = _Evaluation(loss, value_and_grad, any_complex=_any_complex(model))
    with _bar(int(steps), progress) as show:
        for step in range(int(steps)):
            value, gradient = evaluate(model)
            losses.append(value)
            times.append(time.perf_counter() - start)
            show(value)
            if _stops(callback, step, model, value):
                message = f"stopped by the callback after {_count(step)}"
                break
            if not math.isfinite(value):
                message = f"the loss was {value} after {_count(step)}"
                warnings.warn(
                    f"minimize: {message}; a smaller eta or ClipNorm may help",
                    RuntimeWarning,
                    stacklevel=3,
                )
                break
            state, model = update_(state, model, gradient, value=value)
    return Minimized(model, state, History(np.array(losses), np.array(times), message))


def _refuse_misfits(loss: Any, model: Any, rule: Any, steps: Any, state: Any) -> None:
    """Raise if an argument is in the place of another."""
    told = "minimize takes a loss, a model, a rule and a number of steps, in this order"
    if not callable(loss):
        raise TypeError(f"{told}; got {short(loss)} as the loss")
    is_number = isinstance(steps, numbers.Real) and not isinstance(steps, bool | np.bool)
    if not is_number and not hasattr(type(steps), "__index__"):
        raise TypeError(f"{told}; got {short(steps)} as the number of steps")
    if steps != int(steps) or steps < 0:
        raise ValueError(f"steps must be a whole number, 0 or more; got {steps!r}")
    if (rule is None) == (state is None):
        raise TypeError(
            "minimize takes a rule, or None in its place and the state to go on with, which holds "
            f"rules; got rule={short(rule)}, state={type(state).__name__}"
        )
    if rule is not None and not isinstance(rule, Rule):
        from ._messages.mixups import no_rule

        raise no_rule(told, rule)


# --- value and gradient ----------------------------------------------------------------------


class _Evaluation:
    """The function from a model to (value, gradient), from what `minimize` was given."""

    def __init__(
        self,
        loss: Callable[..., Any],
        value_and_grad: Callable[..., Any] | None,
        *,
        any_complex: bool,
    ) -> None:
        self.any_complex = any_complex
        self.by_autograd = _is_of_autograd(loss) or _is_of_autograd(value_and_grad)
        self.loss = self._watched(loss) if any_complex else loss
        self.transform = value_and_grad
        self.function = loss if value_and_grad is None else None

    def __call__(self, model: Tree) -> tuple[float, Tree]:
        pair = self._first(model) if self.function is None else self.function(model)
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(
                f"minimize: expected (value, gradient), got {type(pair).__name__}; "
                "if loss returns the value alone, say what differentiates it: "
                "value_and_grad=jax.value_and_grad"
            )
        value, gradient = pair
        if self.any_complex:
            gradient = fmap(self._uphill, gradient)
        return _number(value), gradient

    def _uphill(self, g: Any) -> Any:
        """Return an array of the gradient in the convention of the rules."""
        library = library_for(g)
        turned = library.has_conjugates or (self.by_autograd and library.is_differentiated)
        return g.conj() if turned and g.dtype.kind == "c" else g

    def _watched(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """Return the loss; it notes whether HIPS autograd calls it, to differentiate it."""

        @functools.wraps(loss)
        def watched(model: Tree) -> Any:
            self.by_autograd = self.by_autograd or any(
                library_for(x).differentiates_numpy for _, x in walk(model)
            )
            return loss(model)

        return watched

    def _first(self, model: Tree) -> Any:
        """Tell a transformation from a function by the first evaluation of `value_and_grad`."""
        assert self.transform is not None
        try:
            answer = self.transform(model)
        except Exception:
            # A transformation may refuse a model, and then takes the loss.
            try:
                made = self.transform(self.loss)
            except Exception:
                made = None
            if not callable(made):
                raise
            answer = made
        else:
            if not callable(answer):
                self.function = self.transform
                return answer
            answer = self.transform(self.loss)
        self.function = answer
        return answer(model)


def _any_complex(model: Tree) -> bool:
    return any(isnumeric(x) and "complex" in dtype_name(x.dtype) for _, x in walk(model))


def _is_of_autograd(function: Any) -> bool:
    """Tell whether HIPS autograd made the function."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("autograd.")


def _number(value: Any) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"minimize: the loss must be one real number; got {short(value)}")


def _stops(callback: Callable[..., Any] | None, step: int, model: Tree, value: float) -> bool:
    if callback is None:
        return False
    try:
        answer = callback(step, model, value)
    except StopIteration:
        return True
    return isinstance(answer, bool | np.bool) and bool(answer)


def _count(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


# --- the bar ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(steps: int, progress: bool) -> Iterator[Callable[[float], None]]:
    """Show a progress bar if wanted and possible; return the function that advances it."""
    tqdm = _find_tqdm() if progress else None
    if tqdm is None:
        yield lambda value: None
        return
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    with tqdm(total=steps, unit="step", disable=False if in_notebook else None) as bar:

        def show(value: float) -> None:
            bar.set_postfix_str(f"loss {value:.4g}", refresh=False)
            bar.update()

        yield show


def _find_tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
