"""Arguments in one another's place: which was meant, and the code to write instead.

Each function is given what came and returns the end of a message, from "; " on, or "" where nothing
is known. They are asked only once something has been refused, so they may look at everything; what
they look at may be of any class, and anything that it raises is its own affair.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np

from .._arrays.library import isnumeric
from .._arrays.states import named_parts
from .._trees.nodes import children, is_node
from .._trees.walks import walk
from ..rules._base import Rule, class_names, registry
from . import names as _names
from .text import short

Tree = Any


def no_rule(told: str, got: Any) -> TypeError:
    """Return the error that a rule was expected: `told` says by whom, and where it belongs."""
    return TypeError(f"{told}; got {short(got)}{for_rule(got)}")


def for_rule(got: Any) -> str:
    """Return the hint for a `got` that is no rule."""
    if isinstance(got, Rule):  # around which another cannot go
        return "; one is enough"
    if isinstance(got, type):
        return f"; write {got.__name__}()" if issubclass(got, Rule) else _in_our_words(got)
    if isinstance(got, str):
        own = {cls.__name__.casefold(): cls.__name__ for cls in registry()}
        if got.casefold() in own:
            return f"; write {own[got.casefold()]}()"
        return _after(_names.of_module(got, list(own.values())))
    if isinstance(got, list | tuple) and got and all(map(_is_rule_or_class, got)):
        return "; write OptimiserChain(*rules)" + _classes_among(got)
    if _is_of(got, "optimisers.scipy", "Method"):
        return "; write the rule that is in it, its .rule"
    if hasattr(type(got), "_fields") and callable(getattr(got, "init", None)):
        return "; optimisers.optax.from_optax makes a rule of a transformation of optax"
    if _is_of(got, "torch.optim.optimizer", "Optimizer"):
        return _in_our_words(type(got))
    if holds_leaf(got):
        return "; that is a state, and the rule in it is .rule of a Leaf"
    if _is_model(got):
        return "; is this the model?"
    return ""


def _classes_among(rules: Any) -> str:
    names = [f"{rule.__name__}()" for rule in rules if isinstance(rule, type)]
    return f", with {', '.join(names)}" if names else ""


def _in_our_words(cls: type) -> str:
    own = [rule.__name__ for rule in registry()]
    if cls.__name__ in own:
        return f"; write {cls.__name__}() of optimisers"
    return _after(_names.of_module(cls.__name__, own))


def for_state(got: Any) -> str:
    """Return the hint for a `got` that is no state tree, nor part of one."""
    if _is_rule_or_class(got):
        return f"; that is a rule: write state = setup({_call(got)}, model), and give the state"
    if got is None:
        return "; state = setup(rule, model) makes one"
    if isinstance(got, numbers.Number | str):
        return "; is this a part of the model? The state comes first"
    return "; is this the model?"


def for_model(got: Any) -> str:
    """Return the hint for a `got` that does not fit a state tree as its model."""
    if holds_leaf(got):
        return "; that is a state: the order is update(state, model, grad)"
    if _is_rule_or_class(got):
        return "; that is a rule: the order is update(state, model, grad)"
    if _is_module(got):
        return "; write dict(module.named_parameters()), for setup too"
    return "; call setup anew for this model"


def for_gradient(got: Any, x: Any) -> str:
    """Return the hint for a `got` that is no gradient of `x`, a parameter or a node."""
    is_vector = isnumeric(x) and x.ndim == 1
    if holds_leaf(got):
        return "; that is a state: the order is update(state, model, grad)"
    if isinstance(got, FunctionType | BuiltinFunctionType | MethodType | np.ufunc) or (
        callable(got) and type(got).__name__ in ("PjitFunction", "partial")
    ):
        return "; call it, and give what it returns"
    if _is_module(got):
        return "; write {name: p.grad for name, p in module.named_parameters()}"
    if _is_pair(got):
        return "; that is a value and a gradient: give the second, value_and_grad(...)[1]"
    if not isnumeric(x):
        if getattr(got, "ndim", 0) == 1:
            return "; re(...) makes a tree of a vector, re from vector, re = destructure(model)"
        return _table_hint(got)
    if is_vector and is_node(got) and any(isnumeric(leaf) for _, leaf in walk(got)):
        return "; re.flatten_gradient(...) makes the gradient of the vector of `destructure`"
    if isinstance(got, list | tuple):
        return "; write np.asarray(...) around it"
    return _table_hint(got)


def _table_hint(got: Any) -> str:
    for name in ("to_numpy", "to_array"):
        if not isinstance(got, type) and callable(getattr(got, name, None)):
            return f"; its .{name}() is an array"
    return ""


def for_number(got: Any) -> str:
    """Return the hint for a `got` in the place of a number of a rule."""
    if isinstance(got, Rule):
        return "; rules stand one after another: OptimiserChain(first, second)"
    if _is_rule_or_class(got):
        return f"; rules stand one after another: OptimiserChain(first, {got.__name__}())"
    if callable(got) and not isinstance(got, type):
        return (
            "; for a schedule, make the rule with the first number, and hand the others to "
            "adjust_(state, eta) between steps"
        )
    holds_arrays = isinstance(got, list | tuple) and any(hasattr(x, "shape") for x in got)
    if holds_arrays or isinstance(got, dict | Iterator) or hasattr(got, "parameters"):
        return "; a rule takes no parameters: call setup(rule, model)"
    return ""


# --- attributes --------------------------------------------------------------------------------


def no_attribute(rule: Rule, name: str) -> AttributeError:
    """Return the error that a rule has no such attribute; it says where one looks for it."""
    told = f"{type(rule).__name__!r} object has no attribute {name!r}"
    return AttributeError(told + _attribute_hint(rule, name), name=name, obj=rule)


def _attribute_hint(rule: Rule, name: str) -> str:
    if name == "lower":  # as SciPy asks a method that cannot be called
        return (
            "; as a method of scipy.optimize.minimize a rule is written "
            "method=optimisers.scipy.method(rule)"
        )
    try:
        fields = dict(rule.fields())
    except AttributeError:  # it is not made yet
        return ""
    if name in fields:
        return f"; the rules in it have one: dict(rule.fields())[{name!r}]"
    return _after(_names.of_known(name, list(fields), class_names(rule)))


def not_of_leaf(leaf: Any, name: str) -> AttributeError:
    """Return the error that a `Leaf` has no such attribute; its rule or its state may have it."""
    told = f"'Leaf' object has no attribute {name!r}"
    return AttributeError(told + _leaf_hint(leaf, name), name=name, obj=leaf)


def _leaf_hint(leaf: Any, name: str) -> str:
    rule = leaf.rule
    fields = [field for field, _ in rule.fields()]
    said = _names.of_known(name, fields, class_names(rule)).removeprefix("write ").split(",")[0]
    field = name if name in fields else said
    if field in fields:
        own = f"leaf.rule.{field}"
        own = own if hasattr(rule, field) else f"dict(leaf.rule.fields())[{field!r}]"
        return f"; it is {own}, and adjust_(state, {field}=...) changes it"
    for path in _slots(leaf.state, name):
        return f"; it is leaf.state{path}"
    return ""


def _slots(state: Any, name: str) -> Iterator[str]:
    """Yield the places at which a part of a state has a name."""
    for names, _ in named_parts(state, tuple):
        if name in names:
            upto = names[: names.index(name) + 1]
            yield "".join(f".{n}" if isinstance(n, str) else f"[{n}]" for n in upto)


# --- what things are ---------------------------------------------------------------------------


def _is_rule_or_class(x: Any) -> bool:
    return isinstance(x, Rule) or (isinstance(x, type) and issubclass(x, Rule))


def _call(rule: Any) -> str:
    return f"{rule.__name__}()" if isinstance(rule, type) else "rule"


def _after(hint: str) -> str:
    return f"; {hint}" if hint else ""


def _leaves(x: Tree) -> Iterator[Any]:
    try:
        for _, leaf in walk(x):
            yield leaf
    except ValueError:  # a tree that contains itself
        return


def holds_leaf(x: Tree) -> bool:
    """Tell whether `x` is a state tree, or has one in it."""
    return any(type(leaf).__name__ == "Leaf" and hasattr(leaf, "skipped") for leaf in _leaves(x))


def _is_model(x: Tree) -> bool:
    return any(map(isnumeric, _leaves(x)))


def _is_pair(x: Any) -> bool:
    """Tell whether `x` looks like the result of a `value_and_grad`."""
    if not isinstance(x, tuple) or len(x) != 2 or hasattr(x, "_fields"):
        return False
    value, gradient = x
    is_number = isinstance(value, int | float | np.generic) or getattr(value, "shape", None) == ()
    return is_number and (bool(getattr(gradient, "shape", ())) or bool(_node_children(gradient)))


def _node_children(x: Any) -> Any:
    return children(x) if is_node(x) else ()


def _is_module(x: Any) -> bool:
    return _is_of(x, "torch.nn", "Module")


def _is_of(x: Any, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(x, cls)
