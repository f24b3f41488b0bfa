"""The rules of this library as an optimiser of PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

try:
    import torch
except ImportError as error:  # pragma: no cover
    raise ImportError("optimisers.torch needs PyTorch: install the package torch") from error

from .._arrays.library import maywrite
from .._arrays.states import map_state, named_parts, parts_of_state
from .._engine import advance as engine
from .._engine import cpu
from .._engine.batch import Call
from .._leaf import Item
from .._messages import names as _names
from .._messages.calls import explained
from .._messages.text import plain, short, warn_caller
from ..rules._base import Rule, class_names
from ..rules.chain import OptimiserChain, owner_in
from ..rules.descent import Descent
from ..rules.precision import MixedPrecision
from . import _groups

__all__ = ["Optimizer"]

Tensor = Any
Group = dict[str, Any]


def _hint(name: str) -> str:
    if not name:
        return "write Optimizer(params, rule), with a rule such as Adam(eta=0.1)"
    hint = _names.of_inner(name)
    return f"{hint} in the rule: Optimizer(params, Adam(eta=0.1))" if hint[:2] != "le" else hint


class Optimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """Any rule or chain of this library, in place of an optimiser of `torch.optim`.

    A dense float32, float64 or float16 parameter on the CPU is updated by the compiled kernels, in
    place; so is a bfloat16 one where `ml_dtypes` is installed.
    Every other parameter is updated by PyTorch's own operations, on its device.

    Parameters
    ----------
    params : iterable
        What `torch.optim` takes: tensors, ``module.named_parameters()``, or parameter groups. A
        group may have fields of the rule of its own, by their names here, and ``lr``, for which
        ``eta`` may be written too. The ``rho`` of a rule is there by PyTorch's name, ``momentum``
        or ``alpha``: `rho` is what sharpness-aware minimisation writes into groups.
    rule : Rule
        The rule for all parameters.

    Attributes
    ----------
    rule : Rule
        The rule; in a group, with the fields that the group has.

    Raises
    ------
    TypeError
        If `rule` is no rule, or if a group has a number that no rule has, by one of PyTorch's names
        or by one that resembles a known name.
    ValueError
        If a rule does not take a group's number, or if a parameter is given twice.

    Warns
    -----
    UserWarning
        Once for each name, if a group has another number that no rule has. It is kept.

    Notes
    -----
    Each of `param_groups` holds the rule's fields, which one may change between steps. ``lr`` is
    the ``eta`` of the rule, of a chain's last rule that has one, so that schedulers scale the
    step. Where no rule has an ``eta`` (`AdaDelta`), the step is multiplied by ``lr``, at first 1.
    A field on which the rules of a chain differ is not listed; in a group it is set for all of
    them. Fields that shape the state (`centred`, `n`, a dtype) stay as they are. Schedulers that
    cycle a momentum too need ``cycle_momentum=False``, but where a group has ``momentum``.

    ``state[p]`` maps names to tensors; in a chain, the name begins with the position of the rule.
    `load_state_dict` copies them exactly: it does not cast them to the parameter's dtype.
    What others keep there under names of their own is left alone by `step`, saved and loaded.

    Unlike optimisers of PyTorch, `step` updates all parameters or, if it raises, none. Gradients
    must be dense, and `step` is not differentiable.

    See Also
    --------
    optimisers.update_ : the same for a tree of tensors.

    Examples
    --------
    >>> import torch
    >>> from optimisers import Adam, ClipNorm, OptimiserChain
    >>> from optimisers.torch import Optimizer
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = Optimizer(model.parameters(), OptimiserChain(ClipNorm(1.0), Adam(0.1)))
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     scheduler.step()
    >>> optimizer.param_groups[0]["lr"]
    0.025
    >>> list(optimizer.state[model.bias])
    ['1.m', '1.v', '1.t']
    """

    rule: Rule

    @explained(_hint)
    def __init__(self, params: Any, rule: Rule) -> None:
        if not isinstance(rule, Rule):
            from .._messages.mixups import no_rule

            raise no_rule("Optimizer takes a rule after the parameters", rule)
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"Optimizer takes parameters; got {type(params).__name__}, a module; write "
                "module.parameters(), or module.named_parameters()"
            )
        self.rule = rule if _rate(rule) is not None else _scaled(rule)
        self._names = _groups.entries(self.rule)
        self._told: set[str] = set()
        self._forget()
        super().__init__(params, {**_defaults(self.rule), "differentiable": False})

    def _forget(self) -> None:
        self._rules: dict[int, tuple[Any, Rule]] = {}
        self._lengths: dict[int, int] = {}  # the entries of the groups when they were last checked
        self._start: tuple[Rule, Group] | None = None  # the rule, and what groups start with
        self._fillers: dict[tuple[str, ...], Callable[[dict[str, Any]], Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.setdefault("_told", set())
        super().__setstate__(state)

    # --- groups ---

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with numbers of their own where they are to differ.

        Parameters
        ----------
        param_group : dict
            ``{"params": tensors, ...}``, with ``lr`` and other fields of the rule. Other entries,
            such as a name, are kept.

        Examples
        --------
        >>> import torch
        >>> from optimisers import Momentum
        >>> from optimisers.torch import Optimizer
        >>> body, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        >>> optimizer = Optimizer(body.parameters(), Momentum(0.01))
        >>> optimizer.add_param_group({"params": head.parameters(), "lr": 0.1, "momentum": 0.5})
        >>> [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
        [(0.01, 0.9), (0.1, 0.5)]
        """
        if isinstance(param_group, dict):
            param_group = self._checked(dict(param_group))
        super().add_param_group(param_group)

    def _checked(self, group: Group) -> Group:
        if "eta" in group:
            if "lr" in group:
                raise TypeError("a parameter group has lr and eta, which are one; leave one out")
            group["lr"] = group.pop("eta")
        if group.get("differentiable"):
            raise TypeError("a step of these rules is not differentiable")
        for name in _groups.foreign(group, self._names):
            told = f"a parameter group has {name!r}, which no rule here has"
            names, rules = sorted(self._names), class_names(self.rule)
            raise TypeError(_names.unknown(told, [name], names, rules, _names.in_torch(name)))
        self._look_at([group])
        self._adjusted(self._numbers(group))
        if not isinstance(group["params"], torch.Tensor | set):
            group["params"] = list(group["params"])
            tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            if len({*map(id, tensors)}) < len(tensors):
                raise ValueError("a parameter appears twice in a parameter group")
            for k, p in enumerate(tensors):
                if isinstance(p, torch.Tensor) and not maywrite(p):
                    raise ValueError(
                        f"parameter {k} of a group shows elements several times (shape "
                        f"{tuple(p.shape)}, strides {p.stride()}), so it cannot be written in "
                        "place; give the tensor that it is made from, or a .clone()"
                    )
        return group

    def _numbers(self, group: Group) -> dict[str, Any]:
        """Return the entries of a group that replace fields of the rule, as numbers of Python."""
        return {
            name: _number(name, value) if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
            if name in self._names
        }

    def _adjusted(self, numbers: dict[str, Any]) -> Rule:
        """Return the rule with other fields."""
        if self._start is None or self._start[0] is not self.rule:
            self._start = self.rule, _defaults(self.rule)
        start = self._start[1]
        changed = {n: v for n, v in numbers.items() if n not in start or start[n] != v}
        rate = changed.pop("lr", None)
        fields = {self._names[name]: value for name, value in changed.items()}
        rule = self.rule.adjust(**fields) if fields else self.rule
        return rule if rate is None else _with_rate(rule, rate)

    def _rule_of(self, number: int, group: Group) -> Rule:
        """Return the rule of a group; the same object as long as its numbers are the same."""
        if self._lengths.get(number) != len(group):  # other code has added an entry
            self._look_at(self.param_groups)
            self._warn_of_unused()
        numbers = self._numbers(group)
        known, rule = self._rules.get(number, (None, self.rule))
        if known != numbers:
            rule = self._adjusted(numbers)
            self._rules[number] = numbers, rule
        return rule

    # --- steps ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; all of them, or none if it raises.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss and its gradients anew, and returns the loss.

        Returns
        -------
        Tensor or None
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with cpu.kernels.UsualEnvironment():
            self._advance(loss)
        return loss

    def _advance(self, loss: Any) -> None:
        leaves: list[Item] = []
        xs: list[Tensor] = []
        gs: list[Tensor] = []
        begun: list[int] = []
        for number, group in enumerate(self.param_groups):
            rule = self._rule_of(number, group)
            for p in group["params"]:
                if (g := p.grad) is not None:
                    kept = self.state.get(p)
                    state = self._state(p, rule, kept)
                    if kept is None or (not kept and not _is_empty(state)):
                        begun.append(len(xs))
                    leaves.append(Item(rule, state))
                    xs.append(p)
                    gs.append(g)

        def keep(_: object, new: dict[int, Any], __: object) -> list[Call]:
            made = {
                k: {**(self.state.get(xs[k]) or {}), **dict(_named(new.get(k, leaves[k].state)))}
                for k in {*begun, *new}
            }
            # One call of C; to enter them one by one would ask each tensor for its hash.
            return [(self.state.update, {xs[k]: state for k, state in made.items()})]

        engine.advance(
            leaves, xs, gs, (), lambda k: self._path(xs[k]), True, beside=keep, value=loss
        )

    def _state(self, p: Tensor, rule: Rule, kept: dict[str, Any] | None) -> Any:
        """Return the state of the rule for a parameter, from the entries with its names."""
        if kept is None:
            return rule.init(p.detach())
        names = tuple(kept)
        fill = self._fillers.get(names)
        if fill is None:
            start = rule.init(p.detach())
            if not kept and not _is_empty(start):
                return start  # other code has read it, which leaves an empty dictionary behind
            expected = dict(_named(start))
            if not expected.keys() <= kept.keys():  # others may keep entries of their own
                _check_names(expected, kept, rule, self._path(p))
            fill = self._fillers[names] = _filler(_form_of(start), names)
        return fill(kept)

    def _path(self, x: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is x:
                    named = "param_names" in group
                    return str(group["param_names"][j] if named else f"param_groups[{i}][{j}]")
        raise KeyError(x)

    # --- saving ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where an optimiser with the same rule was saved, bit for bit.

        Parameters
        ----------
        state_dict : dict
            From `state_dict`. Its tensors are copied, to the devices of their parameters.

        Raises
        ------
        ValueError
            If it does not fit the parameters or the rule; the optimiser is then as it was.
        TypeError
            If a group has a number that resembles a known name, and that no rule here has.

        Warns
        -----
        UserWarning
            If a group has a number of another optimiser, such as PyTorch's ``weight_decay``.

        Examples
        --------
        >>> import torch
        >>> from optimisers import Adam
        >>> from optimisers.torch import Optimizer
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.ones(2)
        >>> one, other = Optimizer([w], Adam()), Optimizer([w], Adam(0.5))
        >>> one.step()
        >>> other.load_state_dict(one.state_dict())
        >>> other.state[w]["t"], other.param_groups[0]["lr"]
        (tensor(1), 0.001)
        """
        given: dict[str, Any] = {}

        def look(_: Any, final: dict[str, Any]) -> None:
            final["param_groups"] = [self._renamed(group) for group in final["param_groups"]]
            given.update(final)  # registered last, so that it sees what other hooks made of it
            self._check_saved(final)
            for group in final["param_groups"]:
                _groups.refuse_misspelt(group, self._names, self.rule)

        def restore(_: Any) -> None:  # PyTorch has cast these to the dtypes of the parameters
            for index, p in self._indexed(given):
                if index in given["state"]:
                    kept = given["state"][index]
                    if not all(isinstance(value, torch.Tensor) for value in kept.values()):
                        kept = _as_tensors(kept, dict(_named(self.rule.init(p.detach()))))
                    self.state[p] = {name: _copied(value, p) for name, value in kept.items()}

        hooks = (
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._look_at(self.param_groups)
        self._warn_of_unused()

    def _look_at(self, groups: list[Group]) -> None:
        """Refuse numbers with misspelt names, and warn once of those that other code owns."""
        for group in groups:
            _groups.refuse_misspelt(group, self._names, self.rule)
        for group in groups:
            found = dict(_groups.others(group, self._names, self.rule))
            if new := [text for name, text in found.items() if name not in self._told]:
                warn_caller(f"a parameter group has numbers that do nothing here: {'; '.join(new)}",
                            through="torch")  # fmt: skip
                self._told.update(found)

    def _warn_of_unused(self) -> None:
        """Warn of numbers of PyTorch's own optimisers in a group, which do nothing here."""
        self._lengths = dict(enumerate(map(len, self.param_groups)))
        unused = {
            name: group[name]
            for group in self.param_groups
            for name in _groups.foreign(group, self._names)
            if group[name]  # no decay and no momentum are what there is here
        }
        if unused:
            own, rules = sorted(self._names), [*class_names(self.rule)]
            texts = (
                f"{name}={plain(value)}: {_names.of_field(name, own, rules, _names.in_torch(name))}"
                for name, value in sorted(unused.items())
            )
            warn_caller(
                f"the parameter groups have what does nothing here: {'; '.join(texts)}",
                through="torch",
            )

    def _renamed(self, group: Group) -> Group:
        """Return a saved group with the names of today; once, it had fields under their own."""
        old = {field: name for name, field in self._names.items() if field in _groups.OTHERS}
        has_old = {field for field, name in old.items() if name not in group}
        return {old[n] if n in has_old else n: value for n, value in group.items()}

    def _indexed(self, saved: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
        """Yield the indices of a saved state beside the parameters."""
        for there, group in zip(saved["param_groups"], self.param_groups, strict=False):
            yield from zip(there["params"], group["params"], strict=False)

    def _check_saved(self, saved: dict[str, Any]) -> None:
        theirs = {
            index
            for group in saved["param_groups"]
            for index in group["params"]
            if _groups.foreign(group, self._names)  # an optimiser of PyTorch has saved it
        }
        for index, p in self._indexed(saved):
            found = saved["state"].get(index)
            if found is None:
                continue
            expected = dict(_named(self.rule.init(p.detach())))
            ours = {n: x for n, x in found.items() if n in expected or not _groups.is_guest(n)}
            _check_names(expected, found if index in theirs else ours, self.rule, self._path(p))
            for name, value in expected.items():
                shape, got = _shape(value), _shape(found[name])
                if shape != got:
                    raise ValueError(
                        f"the state of {self._path(p)}: expected {name!r} of shape {shape}, "
                        f"got {got}"
                    )


# --- rules in groups ---------------------------------------------------------------------------


def _rate(rule: Rule) -> Any:
    """Return the eta of a rule, of a chain's last rule that has one; None if there is none.

    A rule that owns its parameter, and finds the length of its steps, has the rate 1 for ever.
    """
    found = [value for name, value in rule.fields() if name == "eta"]
    return found[-1] if found else 1.0 if owner_in(rule) is not None else None


def _has_eta(rule: Rule) -> bool:
    return any(name == "eta" for name, _ in rule.fields())


def _with_rate(rule: Rule, rate: Any) -> Rule:
    """Return a rule with another eta where `_rate` found it."""
    if not _has_eta(rule):
        if rate == 1:
            return rule
        name = cast("Rule", owner_in(rule))._shown_as  # others are `_scaled`
        raise TypeError(f"{name} finds the length of its steps, so lr stays 1; got {short(rate)}")
    if isinstance(rule, MixedPrecision):
        return MixedPrecision(rule.dtype, _with_rate(rule.rule, rate))
    if isinstance(rule, OptimiserChain):
        rules = list(rule.rules)
        last = max(k for k, part in enumerate(rules) if _has_eta(part))
        rules[last] = _with_rate(rules[last], rate)
        return OptimiserChain(*rules)
    return rule.adjust(eta=rate)


def _scaled(rule: Rule) -> Rule:
    """Return a rule with an eta, of 1, for one that has none."""
    if isinstance(rule, MixedPrecision):
        return MixedPrecision(rule.dtype, _scaled(rule.rule))
    return OptimiserChain(rule, Descent(1.0))


def _defaults(rule: Rule) -> Group:
    """Return the fields that a group may change and on which all rules of a chain agree."""
    found: Group = {"lr": _rate(rule)}
    fields = [(name, value) for name, value in rule.fields() if name != "eta"]
    for name, value in fields:
        if all(other == value for also, other in fields if also == name) and _is_plain(value):
            try:
                rule.adjust(**{name: value})
            except TypeError:  # it shapes the state
                continue
            found[_groups.entry(name, rule)] = value
    return found


def _number(name: str, value: Tensor) -> Any:
    if value.numel() != 1:
        raise TypeError(
            f"a parameter group has a tensor of shape {tuple(value.shape)} as {name}, which must "
            "be one number; give each rate a group of its own"
        )
    return value.item()


def _is_plain(value: Any) -> bool:
    return all(isinstance(v, bool | int | float | str) for v in parts_of_state(value, tuple))


# --- states as dictionaries --------------------------------------------------------------------


def _named(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a state with names such as ``m``, or ``1.m`` in a chain."""
    for names, part in named_parts(state, tuple):
        yield ".".join(map(str, names)) or "state", part


def _is_empty(state: Any) -> bool:
    return not any(True for _ in parts_of_state(state, tuple))


def _form_of(state: Any) -> Any:
    """Return a state with the names of `_named` in place of its parts."""
    names = (name for name, _ in _named(state))
    return map_state(lambda _: next(names), state, into=tuple)


def _filler(form: Any, names: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
    """Return a function that makes a state of this form from a dictionary with these names."""
    if getattr(form, "_fields", None) == names:
        make = form._make
        return lambda kept: make(kept.values())
    return lambda kept: map_state(kept.__getitem__, form, into=tuple)


def _check_names(expected: dict[str, Any], found: dict[str, Any], rule: Rule, path: str) -> None:
    if found.keys() != expected.keys():
        raise ValueError(
            f"the state of {path}: expected {_listed(expected)} for {rule!r}, got "
            f"{_listed(found)}; is it that of another rule?"
        )


def _copied(value: Any, p: Tensor) -> Any:
    """Return a copy for a parameter; numbers of floating point go to its device."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    device = p.device if value.is_floating_point() or value.is_complex() else value.device
    return value.detach().to(device, copy=True)


def _shape(value: Any) -> Any:
    return torch.Size() if isinstance(value, int | float) else getattr(value, "shape", None)


def _as_tensors(kept: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose counts are tensors, where a tool made plain numbers of them."""
    return {
        name: torch.as_tensor(np.asarray(value)).to(like[name].device, like[name].dtype)
        if isinstance(value, int | float | np.number) and isinstance(like.get(name), torch.Tensor)
        else value
        for name, value in kept.items()
    }


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"
