"""Names of other libraries, near misses, wrong values: each error says what to write."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from util import PUBLIC, example, parametrize

import optimisers as opt
from optimisers._messages import names as _names

PAGE = Path(__file__).parents[2] / "docs/coming-from/names.md"
FIELDS = _names._fields()
FOREIGN = sorted(
    {name for row in FIELDS for name in row.names if name} - {row.name for row in FIELDS}
)
FOREIGN_NAMES = sorted(
    {
        name
        for _, *there in _names._lines(_names.NAMES)
        for name in map(_names._asked, _names._code(" ".join(there)))
        if name.isidentifier() and name not in dir(opt)
    }
)


def message(call, error=TypeError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def own_fields(cls) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


# --- hyperparameters -------------------------------------------------------------------------


@parametrize("cls", PUBLIC)
def test_a_foreign_hyperparameter_says_what_to_write(cls):
    for name in {*FOREIGN}.difference(inspect.signature(cls).parameters):  # RMSProp(centered=True)
        text = message(lambda name=name: cls(**{name: 0.5}))
        assert text.startswith(f"{cls.__name__} has no {name!r}"), text
        hint = text.split(f"or {name}, ", 1)[1]
        named = [row for row in FIELDS if name in row.names]
        assert any(row.name in hint if row.name else row.text in hint for row in named), text


TOLD = [
    ("lr", "eta"),
    ("learning_rate", "eta"),
    ("η", "eta"),
    ("betas", "beta"),
    ("beta_1", "beta"),
    ("b2", "beta"),
    ("eps", "epsilon"),
    ("weight_decay", "lambda_"),
    ("lambda", "lambda_"),
    ("etas", "ell"),
    ("step_sizes", "gamma"),
    ("max_norm", "omega"),
    ("clipvalue", "delta"),
    ("every_k_schedule", "n"),
]


@parametrize("cls", PUBLIC)
def test_a_rule_that_has_the_field_is_told_its_name(cls):
    for name, field in TOLD:
        if field in own_fields(cls):
            text = message(lambda name=name: cls(**{name: 0.5}))
            assert f"For {name}, write {field}" in text


@parametrize(
    ("cls", "name", "hint"),
    [
        (opt.Momentum, "momentum", "write rho"),
        (opt.Nesterov, "momentum", "write rho"),
        (opt.RMSProp, "alpha", "write rho"),
        (opt.AdaDelta, "alpha", "write rho"),
        (opt.Adam, "alpha", "write eta"),
        (opt.RMSProp, "momentum", "take rho of Momentum, Nesterov"),  # its rho is another number
        (opt.Adam, "momentum", "take rho of Momentum, Nesterov"),
        (opt.Adam, "nesterov", "write the rule Nesterov"),
        (opt.Adam, "amsgrad", "write the rule AMSGrad"),
        (opt.Descent, "weight_decay", "write lambda_ of AdamW, or of WeightDecay ahead"),
        (opt.AdaDelta, "lr", "write eta of Descent behind the rule in an OptimiserChain"),
        (opt.Adam, "clipnorm", "write omega of ClipNorm ahead"),
        (opt.Adam, "lambda_", "write lambda_ of AdamW"),  # a field of other rules here
        (opt.Adam, "params", "call setup(rule, model)"),
        (opt.Momentum, "foreach", "leave it out"),
        (opt.Momentum, "dampening", "there is none here"),
        (opt.Descent, "eps", "other rules have epsilon"),
    ],
)
def test_what_a_name_means_depends_on_the_rule(cls, name, hint):
    assert f"For {name}, {hint}" in message(lambda: cls(**{name: 0.5}))


def test_several_names_are_answered_one_by_one():
    text = message(lambda: opt.Adam(lr=0.1, betas=(0.9, 0.99), epsilon=1e-8, colour="red"))
    assert "Adam has no 'lr', 'betas', 'colour'; there are eta, beta, epsilon" in text
    assert "For lr, write eta" in text
    assert "For betas, write beta" in text


@parametrize("cls", PUBLIC)
def test_near_misses_are_recognised(cls):
    for field in own_fields(cls):
        if len(field) > 3 and "rule" not in own_fields(cls)[-1]:
            assert f"did you mean {field}?" in message(lambda f=field: cls(**{f[:2] + f[1:]: 0.5}))


def test_rules_around_others_point_inward():
    for cls in (opt.OptimiserChain, opt.MixedPrecision):
        text = message(lambda cls=cls: cls(opt.Adam(), lr=0.1))
        assert "for lr, write eta in a rule inside it" in text


@dataclass(frozen=True)
class Own(opt.Rule):
    eta: float = 0.1
    sharpness: float = 1.0

    def apply(self, state, x, dx):
        return state, dx * self.eta


class Undecorated(opt.Rule):
    eta: float = 0.1

    def apply(self, state, x, dx):
        return state, dx * self.eta


class Child(opt.Adam):
    extra: float = 1.0


def test_rules_of_users_are_answered_too():
    assert "Own has no 'lr'; there are eta, sharpness. For lr, write eta" in message(
        lambda: Own(lr=1)
    )
    assert "did you mean sharpness?" in message(lambda: Own(sharpnes=1))


def test_a_rule_without_its_decorator_says_so():
    for call in (
        lambda: Undecorated(0.1),
        lambda: Undecorated(eta=0.1),
        lambda: Undecorated(lr=0.1),
        lambda: Child(extra=2.0),
    ):
        assert "write @dataclass(frozen=True) above the class" in message(call)
    assert Undecorated().eta == 0.1
    assert "For lr, write eta" in message(lambda: Child(lr=0.1))
    late = dataclass(frozen=True)(type("Late", (Undecorated,), {"__annotations__": {"nu": float}}))
    assert late(nu=3.0).nu == 3.0


def test_a_constructor_of_ones_own_takes_what_it_takes():
    class Free(Undecorated):
        def __init__(self, **options):
            object.__setattr__(self, "options", options)

    class Base:
        def __new__(cls, *args, **kwargs):
            new = super().__new__(cls)
            object.__setattr__(new, "seen", (args, kwargs))
            return new

    @dataclass(frozen=True)
    class Mixed(Own, Base):
        pass

    assert Free(lr=0.1).options == {"lr": 0.1}
    assert Mixed(0.5, sharpness=2.0).seen == ((0.5,), {"sharpness": 2.0})


@parametrize("cls", PUBLIC)
def test_constructors_are_what_they_were(cls):
    rule = example(cls)
    assert inspect.signature(cls) == inspect.signature(cls.__init__).replace(
        parameters=[*inspect.signature(cls.__init__).parameters.values()][1:]
    )
    for made in (
        copy.copy(rule),
        copy.deepcopy(rule),
        *(pickle.loads(pickle.dumps(rule, protocol)) for protocol in range(2, 6)),
    ):
        assert made == rule
        assert type(made) is cls
    assert "missing 1 required" in message(lambda: opt.AccumGrad())
    assert "positional argument" in message(lambda: opt.Descent(0.1, 0.2))


def test_replacing_a_field_by_a_foreign_name_is_answered():
    assert "For lr, write eta" in message(lambda: dataclasses.replace(opt.Adam(), lr=0.1))


@parametrize("cls", PUBLIC)
def test_an_assigned_field_says_what_changes_one(cls):
    rule = example(cls)
    for field in own_fields(cls):
        text = message(lambda f=field: setattr(rule, f, 1), dataclasses.FrozenInstanceError)
        assert f"cannot assign to field '{field}'" in text
        assert f"rule.adjust({field}=...)" in text
        assert f"adjust_(state, {field}=...)" in text
    child = Child()
    child.note = "kept"  # what is no field of a class that is not frozen itself
    assert child.note == "kept"


def test_a_schedule_as_a_number_names_adjust_():
    for cls in (opt.Adam, opt.Descent, opt.AdaDelta):
        field = own_fields(cls)[0]
        assert "adjust_(state, eta) between steps" in message(
            lambda c=cls, f=field: c(**{f: lambda t: 0.1 / t})
        )
    state = opt.setup(opt.Adam(), np.ones(2))
    assert "adjust_(state, eta) between steps" in message(lambda: opt.adjust_(state, lambda t: 0.1))


def test_parameters_given_to_a_rule_name_setup():
    for wrong in ({"w": np.ones(2)}, [np.ones(2)], iter([np.ones(2)])):
        assert "call setup(rule, model)" in message(lambda w=wrong: opt.Adam(w))


@parametrize("call", [opt.adjust, opt.adjust_])
def test_adjusting_by_a_foreign_name_is_answered(call):
    state = opt.setup(opt.Adam(), {"w": np.ones(2)})
    text = message(lambda: call(state, lr=0.1))
    known = "beta, epsilon, epsilon_hat, eta"
    assert f"no rule here has the field 'lr'; there are {known}. For lr, write eta" in text
    assert "did you mean beta?" in message(lambda: call(state, betta=(0.9, 0.99)))
    chain = opt.OptimiserChain(opt.ClipNorm(1.0), opt.MixedPrecision(opt.RMSProp()).rule)
    state = opt.setup(chain, {"w": np.ones(2)})
    assert "For max_norm, write omega" in message(lambda: call(state, max_norm=0.1))
    assert "take rho of Momentum" in message(lambda: call(state, momentum=0.1))


# --- names of the module ---------------------------------------------------------------------


@parametrize("name", FOREIGN_NAMES)
def test_a_foreign_name_says_what_to_write(name):
    assert not hasattr(opt, name)
    text = message(lambda: getattr(opt, name), AttributeError)
    start, _, hint = text.partition("; ")
    assert start == f"module 'optimisers' has no attribute {name!r}"
    assert hint.endswith("here") or hint.startswith("it is optimisers."), text


@parametrize(
    ("name", "hint"),
    [
        ("SGD", "SGD is Descent here, SGD(momentum=) is Momentum here"),
        ("chain", "OptimiserChain(a, b)"),
        ("save", "it is optimisers.io.save(path"),
        ("load", "it is optimisers.io.load(path)"),
        ("Checkpointer", "it is optimisers.io.Checkpointer"),
        ("Optimizer", "it is optimisers.torch.Optimizer(params, rule)"),
        ("clip_by_global_norm", "ClipGlobalNorm ahead of a rule"),
        ("global_norm", "norm(tree)"),
        ("clip_grad_norm_", "ClipGlobalNorm ahead of a rule"),
        ("adam", "Adam is Adam here".replace("Adam is", "adam is")),
        ("ADAM", "is Adam here"),
        ("Adam_W", "it is AdamW here"),
        ("adagrad", "is AdaGrad here"),
        ("apply_updates", "is update(state, model, grad) here"),
        ("OptimizerChain", "the nearest name is OptimiserChain"),
    ],
)
def test_what_some_names_are_here(name, hint):
    assert hint in message(lambda: getattr(opt, name), AttributeError)


def test_an_import_of_a_foreign_name_is_answered_too():
    def imports():
        from optimisers import SGD  # noqa: F401

    assert "SGD is Descent here" in message(imports, ImportError)
    assert getattr(opt, "SGD", None) is None


@parametrize("module", ["torch", "optax", "scipy", "io", "rules"])
def test_modules_are_asked_for_names_of_others_too(module):
    if module in ("torch", "optax", "scipy"):
        pytest.importorskip(module)
    found = importlib.import_module(f"optimisers.{module}")
    for name, hint in (
        ("SGD", "SGD is Descent here"),
        ("freeze_", "it is optimisers.freeze_"),
        ("Nadm", "the nearest name is NAdam"),
    ):
        text = message(lambda n=name: getattr(found, n), AttributeError)
        assert text.startswith(f"module 'optimisers.{module}' has no attribute {name!r}; {hint}")
        with pytest.raises(ImportError, match=f"cannot import name {name!r}.*; {hint}"):
            exec(f"from optimisers.{module} import {name}", {})
    assert "; " not in message(lambda: found._SGD, AttributeError)
    assert not hasattr(found, "__wrapped__")


def test_an_unknown_name_gets_no_guess():
    expected = "module 'optimisers' has no attribute 'quux'"
    assert message(lambda: opt.quux, AttributeError) == expected
    assert "; " not in message(lambda: opt._SGD, AttributeError)


def test_tab_offers_what_is_public():
    offered = [name for name in dir(opt) if name[0] != "_"]
    assert {"Adam", "setup", "io", "words", "minimize"} <= {*offered}
    for guest in ("torch", "scipy", "optax"):
        assert (guest in offered) is (importlib.util.find_spec(guest) is not None)
    assert len(inspect.getmembers(opt)) == len(dir(opt))
    assert not {"compose", "rules", "state", "minimise"} & {*offered}
    assert "__version__" in dir(opt)


def test_the_tables_are_loaded_on_a_miss_only():
    code = "import sys, optimisers; optimisers.Adam(eta=1.0); dir(optimisers); " + (
        "print('optimisers._names' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- the tables ------------------------------------------------------------------------------


def test_the_page_shows_the_tables():
    page = PAGE.read_text(encoding="utf-8")
    assert f"\n\n{_names.NAMES}\n" in page
    assert f"\n\n{_names.FIELDS}\n" in page
    assert page.endswith(_names.ARGUMENTS)


def test_the_tables_name_what_there_is():
    rules = {rule.__name__ for rule in PUBLIC}
    fields = {field for rule in PUBLIC for field in own_fields(rule)}
    for row in FIELDS:
        assert row.name in fields or not row.name
        assert row.rules <= rules
        for rule in row.rules:
            assert row.name in own_fields(getattr(opt, rule))
    said = {here for here, *_ in _names._lines(_names.NAMES)}
    named = {re.split(r"\W", code)[0] for here in said for code in _names._code(here)}
    assert rules <= named
    assert named <= {*dir(opt), "optimisers", "a", "jax", "scipy"}
    for code in re.findall(r"`optimisers\.(\w+)\.(\w+)", "".join(said)):
        pytest.importorskip({"io": "numpy"}.get(code[0], code[0]))
        assert hasattr(getattr(opt, code[0]), code[1])


def test_a_file_that_moved_is_found_by_its_former_name():
    found = importlib.import_module("optimisers")._numba
    assert found is importlib.import_module("optimisers._steps.compiled")
