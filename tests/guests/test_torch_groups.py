"""Entries of PyTorch's groups and states that are none of a rule's: told, refused, or kept."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

from optimisers import (
    AdaDelta,
    AdaGrad,
    Adam,
    AdamW,
    ClipNorm,
    Descent,
    Momentum,
    Nesterov,
    OptimiserChain,
    RMSProp,
)

torch: Any = pytest.importorskip("torch")
Optimizer: Any = importlib.import_module("optimisers.torch").Optimizer


def parameter() -> Any:
    return torch.nn.Parameter(torch.zeros(2))


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b)


def words(call) -> list[str]:
    """Return the UserWarnings of a call, which all point here."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    assert {w.category for w in seen} <= {UserWarning}
    assert {w.filename for w in seen} <= {__file__}
    return [str(w.message) for w in seen]


RULES_OF_GROUPS = [Adam(), AdamW(), Momentum(), AdaDelta(), OptimiserChain(ClipNorm(1.0), Adam())]


@pytest.mark.parametrize("rule", RULES_OF_GROUPS, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lamda_", "lambda_"),
        ("weigth_decay", "lambda_"),
        ("weight_dacay", "lambda_"),
        ("lambda", "lambda_"),
        ("epsilom", "epsilon"),
        ("momentun", "m"),
        ("gama", ""),
    ],
)
def test_a_misspelt_number_in_a_group_is_refused(rule, name, meant):
    with pytest.raises(TypeError, match=f"{name!r}, which no rule here has") as caught:
        Optimizer([{"params": [parameter()], name: 0.1}], rule)
    assert meant in str(caught.value).partition(f"For {name}, ")[2]
    p = parameter()
    optimizer = Optimizer([p], rule)
    with pytest.raises(TypeError, match=name):
        optimizer.add_param_group({"params": [parameter()], name: torch.tensor(0.1)})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {name: 0.1, "lr": 7.0}
    with pytest.raises(TypeError, match=name):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] != 7.0
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0][name] = 0.1
    for _ in range(2):
        with pytest.raises(TypeError, match=name):
            optimizer.step()
    assert same(p.detach(), torch.zeros(2))
    del optimizer.param_groups[0][name]
    optimizer.step()


@pytest.mark.parametrize("rule", RULES_OF_GROUPS, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("name", "value"), [("foo", 0.1), ("lr_scale", 2), ("k", 5), ("wd", 0.1)])
def test_a_number_that_is_somebody_elses_is_told_once_and_kept(rule, name, value):
    p, q = parameter(), parameter()
    plain = Optimizer([q], rule)
    made: list[Any] = []
    (text,) = words(lambda: made.append(Optimizer([{"params": [p], name: value}], rule)))
    assert f"{name}={value}" in text
    (optimizer,) = made
    p.grad = q.grad = torch.ones(2)

    def go_on():
        for _ in range(2):
            optimizer.step()
            plain.step()
        optimizer.param_groups[0][name] = value
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        plain.step()

    assert words(go_on) == []
    assert optimizer.param_groups[0][name] == value
    assert same(p.detach(), q.detach())
    later = Optimizer([p], rule)
    later.param_groups[0][name] = value
    assert len(words(later.step)) == 1
    assert words(later.step) == []


def test_what_is_no_number_or_a_schedulers_is_nobodys_business():
    group = {
        "params": [parameter()],
        "name": "body",
        "adaptive": True,
        "tags": ["a"],
        "initial_lr": 0.1,
        "max_lr": 1.0,
        "swa_lr": 0.1,
        "max_momentum": 0.9,
        "hook": None,
    }
    assert words(lambda: Optimizer([group], Adam())) == []


@pytest.mark.parametrize(
    ("rule", "name"),
    [(Momentum(0.1), "momentum"), (Nesterov(0.1), "momentum"), (RMSProp(0.1), "alpha")],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_the_rho_of_others_is_not_that_of_a_rule(rule, name):
    """Sharpness-aware minimisation writes its radius, `rho`, into all groups."""
    xs = [parameter() for _ in range(3)]
    made: list[Any] = []
    said = words(lambda: made.append(Optimizer([{"params": [xs[0]], "rho": 0.05}], rule)))
    assert len(said) == 1
    assert f"rho=0.05; the rho of the rule is {name} in a group" in said[0]
    made += [Optimizer([xs[1]], rule), Optimizer([{"params": [xs[2]], name: 0.5}], rule)]
    other = type(rule)(0.1, 0.5)
    twin = parameter()
    made.append(Optimizer([twin], other))
    for x in (*xs, twin):
        x.grad = torch.ones(2)
    assert words(lambda: [o.step() for o in made * 3]) == []
    assert same(xs[0].detach(), xs[1].detach())
    assert same(xs[2].detach(), twin.detach())
    assert not same(xs[2].detach(), xs[1].detach())
    assert made[0].param_groups[0]["rho"] == 0.05
    assert made[2].param_groups[0][name] == 0.5


@pytest.mark.parametrize("rule", [Adam(0.1), AdaDelta()], ids=lambda rule: type(rule).__name__)
def test_a_rho_where_there_is_none_and_where_it_is_pytorchs_name(rule):
    said = words(lambda: Optimizer([{"params": [parameter()], "rho": 0.05}], rule))
    assert len(said) == isinstance(rule, Adam)
    if isinstance(rule, AdaDelta):
        optimizer = Optimizer([{"params": [parameter()], "rho": 0.05}], rule)
        assert optimizer._rule_of(0, optimizer.param_groups[0]).rules[0].rho == 0.05


def test_a_checkpoint_from_when_groups_had_a_rho():
    p = parameter()
    optimizer = Optimizer([p], Momentum(0.1))
    p.grad = torch.ones(2)
    optimizer.step()
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    group["rho"] = 0.5
    del group["momentum"]
    assert words(lambda: optimizer.load_state_dict(saved)) == []
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert group["rho"] == 0.5


@pytest.mark.parametrize(
    "rule",
    [Adam(0.1), Momentum(0.1), Descent(0.1), OptimiserChain(ClipNorm(1.0), Adam(0.1))],
    ids=lambda rule: type(rule).__name__,
)
def test_what_others_keep_in_the_state_is_saved_and_loaded(rule):
    p = parameter()
    optimizer = Optimizer([p], rule)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[p] |= {"slow": torch.ones(2), "visits": [3]}
    other = Optimizer([p], rule)
    other.load_state_dict(optimizer.state_dict())
    assert same(other.state[p]["slow"], torch.ones(2))
    assert other.state[p]["slow"] is not optimizer.state[p]["slow"]
    assert other.state[p]["visits"] == [3]
    assert other.state[p]["visits"] is not optimizer.state[p]["visits"]
    other.step()
    assert other.state[p].keys() == optimizer.state[p].keys()


def test_a_state_of_another_rule_is_not_taken_for_a_guest():
    p = parameter()
    p.grad = torch.ones(2)
    for saver in (
        Optimizer([p], Adam()),
        Optimizer([p], OptimiserChain(ClipNorm(1.0), Adam())),
        torch.optim.SGD([p], lr=0.1, momentum=0.9),
        torch.optim.Adam([p]),
    ):
        saver.step()
        for rule in (Descent(), Momentum(), RMSProp(), AdaGrad()):
            with pytest.raises(ValueError, match="is it that of another rule"):
                Optimizer([p], rule).load_state_dict(saver.state_dict())


def test_a_scheduler_that_cycles_the_momentum():
    p, q = parameter(), parameter()
    ours, theirs = Optimizer([p], Momentum(0.1, 0.9)), torch.optim.SGD([q], 0.1, momentum=0.9)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (ours, theirs)
    ]
    seen: list[list[float]] = [[], []]
    for _ in range(8):
        p.grad = q.grad = torch.ones(2)
        for o, scheduler, momenta in zip((ours, theirs), schedulers, seen, strict=True):
            o.step()
            scheduler.step()
            momenta.append(o.param_groups[0]["momentum"])
    assert seen[0] == seen[1]
    assert ours._rule_of(0, ours.param_groups[0]).rho == seen[0][-1]
