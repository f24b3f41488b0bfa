"""Walking a template, a model and a gradient side by side.

A *template* has the structure of a model, as `mirror` makes it, with a *mark* at each parameter
and ``()`` for what holds none. A state tree is one, its marks are its leaves. `gather` is the
quick walk, which keeps no paths; only if something does not fit are the trees walked again, for
an error that says where.

A gradient may be less than the model: ``None``, ``()`` or a missing key says that there is none.
One for what holds no parameter is refused if it says something, unless `trainable` left that out.
One of an object may say more, since what differentiates objects does not know which of their
attributes are children: the others are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from .._arrays.traced import is_boxed_container
from .._kernels import all_are, same_keys
from .._messages.text import short
from ..rules._base import Rule
from .nodes import carries, children, is_node, rebuild, trainable_keys
from .paths import KeyPath
from .untrained import holds_lost, is_configuration, is_lost, lost
from .walks import child_path, refuse_cycle, walk

Array = Any
Tree = Any


class Mark(Protocol):
    """The mark of a parameter in a template."""

    @property
    def frozen(self) -> bool:
        """Whether gradients here are passed over."""


M = TypeVar("M", bound=Mark)

_STATE = "the state tree has {expected}, the model has {got}{hint}"


def gather(
    mark: type[M], template: Tree, model: Tree, grad: Tree, misfit: str = _STATE
) -> tuple[list[M], list[Array], list[Any]]:
    """Return beside each other every mark, the parameter there and its gradient, or None.

    Parameters
    ----------
    mark : type
        The class of the template's marks.
    template, model, grad : tree
        The trees.
    misfit : str
        The message for a model that does not fit, with ``{expected}``, ``{got}`` and ``{hint}``.

    Raises
    ------
    TypeError, ValueError
        If the trees do not fit each other; the message names the path.
    """
    if template.__class__ is mark:
        return [template], [model], [grad]
    marks: list[M] = []
    xs: list[Array] = []
    gs: list[Any] = []
    items: Iterator[tuple[Any, Any]] = iter(enumerate((template,)))
    ms, grads = [model], [grad]  # the nodes beside them, with the same keys
    above: list[tuple[Any, ...]] = []
    deep = _DEEP
    has_looked = False
    try:
        while True:
            for key, s in items:
                kind = s.__class__
                if kind is mark:
                    marks.append(s)
                    xs.append(ms[key])
                    gs.append(grads[key])
                elif kind is not tuple or s:
                    above.append((s, items, ms, grads))
                    if len(above) == deep:
                        deep *= 2
                        if len({id(node) for node, *_ in above}) < len(above):
                            raise _CycleError
                    ms, grads = ms[key], grads[key]
                    plain = kind is dict or kind is list
                    plain = plain and kind is ms.__class__ is grads.__class__
                    if not plain or len(s) != len(ms) or len(s) != len(grads):
                        s, ms, grads = _beside(mark, s, ms, grads, misfit)
                    elif len(s) >= _MANY and _add_all(mark, s, ms, grads, marks, xs, gs):
                        s = ()
                    items = iter(s.items() if s.__class__ is dict else enumerate(s))
                    break
                elif (g := grads[key]) is not None and not has_looked and is_lost(ms[key], g):
                    has_looked = True
                    _refuse_lost(mark, template, model, grad, misfit)
            else:
                if not above:
                    return marks, xs, gs
                _, items, ms, grads = above.pop()
    except (_MisfitError, _CycleError, KeyError, IndexError):
        # The walk with paths raises the error, unless gradients there are passed over.
        rows = [row for _, *row in _rows(mark, template, model, grad, misfit)]
        return [s for s, _, _ in rows], [m for _, m, _ in rows], [g for _, _, g in rows]


_DEEP = 8
"""The depth at which the quick walk first looks for a cycle."""

_MANY = 8
"""The number of children from which it pays to test whether all are marks."""


def _add_all(
    mark: type[M], s: Any, m: Any, g: Any, marks: list[M], xs: list[Array], gs: list[Any]
) -> bool:
    """Add the children of three nodes at one stroke, if all are marks with the keys in order.

    Another thread, or an ``==`` of the keys, may change the nodes meanwhile.
    """
    found = [*s.values()] if type(s) is dict else [*s]
    if not all_are(mark, found):
        return False
    if type(s) is dict:
        if not same_keys(s, m, g):
            return False
        m, g = m.values(), g.values()
    marks += found
    xs += m
    gs += g
    if not len(marks) == len(xs) == len(gs):
        raise RuntimeError(_CHANGED)
    return True


_CHANGED = (
    "the state, the model or the gradient was changed by other code while a step walked over it; "
    "nothing was updated. Where several threads use them, put a lock around"
)


def places(
    mark: type[M], template: Tree, model: Tree, misfit: str = _STATE
) -> Iterator[tuple[KeyPath, M]]:
    """Yield the marks that `gather` finds, with their paths."""
    return ((path, s) for path, s, _, _ in _rows(mark, template, model, None, misfit))


def _rows(
    mark: type[M], template: Tree, model: Tree, grad: Tree, misfit: str
) -> Iterator[tuple[KeyPath, M, Array, Any]]:
    """Yield what `gather` finds, with paths, or raise its error with the path."""
    open_nodes: dict[int, tuple[KeyPath, Any]] = {}
    stack: list[tuple[Any, Iterator[tuple[Any, ...]]]] = [
        (None, iter([(KeyPath(), template, model, grad, (None, None))]))
    ]
    while stack:
        node, rows = stack[-1]
        for path, s, m, g, above in rows:
            if isinstance(s, mark):
                yield path, s, m, g
            elif s.__class__ is not tuple or s:
                refuse_cycle(open_nodes, path, s)
                open_nodes[id(s)] = path, s
                stack.append((s, iter(_rows_below(mark, path, s, m, g, misfit))))
                break
            elif g is not None and is_lost(m, g) and (not path or _is_meant(above, path[-1], m, g)):
                raise TypeError(f"at {path}: {lost(m)}")
        else:
            open_nodes.pop(id(node), None)
            stack.pop()


def _rows_below(
    mark: type[Any], path: KeyPath, s: Tree, m: Tree, g: Tree, misfit: str
) -> list[tuple[Any, ...]]:
    """Return the children of three nodes beside each other, with paths and these nodes."""
    _refuse_rule(path, s)
    try:
        below = list(zip(*_beside(mark, s, m, g, misfit), strict=True))
    except _MisfitError as error:
        raise error.kind(f"at {path}: {error}") from None
    keys = _keys(children(s), children(m), s) or ()
    paths = [child_path(path, m, key) for key in keys]
    return [(p, *b, (m, g)) for p, b in zip(paths, below, strict=True)]


def _refuse_rule(path: KeyPath, s: Tree) -> None:
    """Raise if a rule, which is also a node, is in the place of a state."""
    if isinstance(s, Rule):
        raise TypeError(f"at {path}: {_no_state(s)}")


def _no_state(s: Tree) -> str:
    return f"expected a state tree, as setup returns it, got {short(s)}{_mixups().for_state(s)}"


def _is_meant(above: tuple[Tree, Tree], key: Any, x: Any, g: Any) -> bool:
    """Tell whether a gradient seems meant to train a child that is no parameter."""
    node, beside = above
    keys = trainable_keys(node)
    return (keys is None or key in keys) and not is_configuration(node, beside, x, g)


def _mixups() -> Any:
    """Return the module of messages, which is needed only for errors."""
    from .._messages import mixups

    return mixups


def _refuse_lost(mark: type[M], template: Tree, model: Tree, grad: Tree, misfit: str) -> None:
    """Raise if a gradient would be lost; the quick walk does not see parts that do not train."""
    for _ in _rows(mark, template, model, grad, misfit):
        pass


def place(mark: type[M], template: Tree, model: Tree, k: int) -> str:
    """Return the path of the k-th mark that `gather` finds, as text."""
    return str(next(islice(places(mark, template, model), k, None))[0])


class _CycleError(Exception):
    """The quick walk has met a node inside itself."""


class _MisfitError(Exception):
    """Two trees do not fit each other; the path is not known yet."""

    def __init__(self, kind: type[Exception], message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _beside(
    mark: type[M], s: Tree, m: Tree, g: Tree, misfit: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the children of a node of the template, those of the model and of the gradient."""
    if type(s) is type(m) is type(g) is dict and s.keys() == m.keys() and g.keys() <= m.keys():
        return [*s.values()], [m[key] for key in s], [g.get(key) for key in s]
    if not is_node(s):
        raise _MisfitError(TypeError, _no_state(s))
    below_s, below_m = children(s), children(m)
    keys = _keys(below_s, below_m, s)
    if keys is None:
        hint = _mixups().for_model(m)
        text = misfit.format(expected=_keys_text(s), got=_keys_text(m), hint=hint)
        raise _MisfitError(ValueError, text)
    if not below_s and isinstance(s, Rule):  # one without fields looks like an empty node
        raise _MisfitError(TypeError, _no_state(s))
    try:
        below_g = _below_gradient(m, below_m, g)
    except _MisfitError:
        marks = [x for _, x in walk(s) if isinstance(x, mark)]
        if any(not x.frozen for x in marks):
            raise
        if not marks and holds_lost(m, g):
            raise _MisfitError(TypeError, lost(m)) from None
        below_g = {}  # gradients below frozen marks are passed over
    return [*below_s.values()], [below_m[k] for k in keys], [below_g.get(k) for k in keys]


def _keys(below_s: dict[Any, Any], below_m: dict[Any, Any], s: Tree) -> list[Any] | None:
    """Return the model's keys in the order of the template; None if they do not match."""
    if below_s.keys() == below_m.keys():
        return list(below_s)
    if type(s) is tuple and len(below_s) == len(below_m):  # an object whose keys are no names
        return list(below_m)
    return None


def _below_gradient(m: Tree, below_m: dict[Any, Any], g: Tree) -> dict[Any, Any]:
    if g is None or (type(g) is tuple and not g):
        return {}
    m, g = _unboxed(m), _unboxed(g)
    expected = f"expected a gradient like the model's {_keys_text(m)}"
    if isinstance(m, list | tuple) and isinstance(g, list | tuple):
        if len(g) != len(m):
            raise _MisfitError(ValueError, f"{expected}, got {_keys_text(g)}{_no_gradient(g, m)}")
        return dict(zip(below_m, g, strict=True))
    if isinstance(m, list | tuple) or not isinstance(g, (dict, SimpleNamespace, type(m))):
        raise _MisfitError(TypeError, f"{expected}, got {_keys_text(g)}{_no_gradient(g, m)}")
    below_g = children(g)
    if unknown := [key for key in below_g if key not in below_m and not carries(m, key)]:
        raise _MisfitError(
            ValueError,
            f"{expected}, got {', '.join(map(repr, unknown[:9]))}, which the model does not have",
        )
    return below_g


def _no_gradient(g: Tree, m: Tree) -> str:
    return _mixups().for_gradient(g, m) or "; None means no gradient"


def _unboxed(node: Tree) -> Tree:
    """Return the container, with boxes in it, for which HIPS autograd hands over a box."""
    if not is_boxed_container(node):
        return node
    return rebuild(node, [*children(node).values()])


def _keys_text(node: Tree) -> str:
    name = type(node).__name__
    if isinstance(node, list | tuple) and not hasattr(node, "_fields"):
        return f"{name} of {len(node)}"
    keys = list(children(node))
    if not keys:
        text = short(node)
        end = f" ({name})"
        return f"{name} ({text.removesuffix(end)})" if text.endswith(end) else text
    return f"{name} with {', '.join(map(repr, keys[:9]))}{', ...' * (len(keys) > 9)}"
