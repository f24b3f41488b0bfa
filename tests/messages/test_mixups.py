"""One thing in the place of another: each error says what was meant, and what to write."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from util import parametrize, snapshot

import optimisers as opt
from optimisers import AccumGrad, Adam, ClipNorm, Descent, MixedPrecision, OptimiserChain, setup
from optimisers._messages.text import short
from optimisers.io import Checkpointer, File, load, save

SETUP = "write state = setup("


@dataclass(frozen=True)
class Fieldless(opt.Rule):
    """A rule that looks like an empty node."""

    def apply(self, state, x, dx):
        return state, dx


def model():
    return {"w": np.ones((3, 2)), "b": np.zeros(2)}


def said(call, *args, error=TypeError, **named) -> str:
    """Return what a call raises; whatever it is given stays as it was."""
    before = snapshot([x for x in args if isinstance(x, dict)])
    with pytest.raises(error) as caught:
        call(*args, **named)
    assert snapshot([x for x in args if isinstance(x, dict)]) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- a rule where a state belongs ---------------------------------------------------------------


@parametrize("rule", [Adam(), OptimiserChain(ClipNorm(1.0), Adam()), Fieldless(), Adam, Fieldless])
@parametrize("call", [opt.update, opt.update_])
def test_a_rule_for_a_state_in_an_update(call, rule):
    w = np.ones(3)
    for m in (model(), w, [w], {}):
        assert SETUP in said(call, rule, m, m)
    assert SETUP in said(call, rule, model(), None)
    if not isinstance(rule, type):
        assert "at ['w']: expected a state tree" in said(call, {"w": rule}, {"w": w}, {"w": w})
    assert np.array_equal(w, np.ones(3))


def test_a_rule_whose_field_is_a_key_of_the_model():
    w = np.ones(2)
    assert "at (root): expected a state tree" in said(
        opt.update_, Descent(), {"eta": w}, {"eta": w}
    )


@parametrize("wrong", [Adam(), Adam, [Adam()], Fieldless()])
@parametrize(
    "call", [opt.freeze_, opt.thaw_, lambda s: opt.adjust_(s, 0.1), lambda s: opt.adjust(s, 0.1)]
)
def test_a_rule_for_a_state_elsewhere(call, wrong):
    assert SETUP in said(call, wrong)


@parametrize("wrong", [0.1, "adam", None, 3, np.ones(2), {"w": np.ones(2)}, {"a": 0.5}])
@parametrize("call", [opt.freeze_, opt.thaw_, lambda s: opt.adjust_(s, 0.1)])
def test_what_is_no_state_is_not_passed_over(call, wrong):
    assert "expected a state tree" in said(call, wrong)


def test_a_state_without_parameters_is_one():
    for state in ((), {}, {"name": ()}):
        opt.freeze_(state)
        opt.adjust_(state, 0.1)


def test_no_state_at_all():
    assert "state = setup(rule, model) makes one" in said(opt.update, None, model(), model())


def test_states_and_models_in_the_wrong_order():
    m, w = model(), np.ones(3)
    s, t = setup(Adam(), m), setup(Adam(), w)
    order = "the order is update(state, model, grad)"
    for call in (opt.update, opt.update_):
        assert "is this the model?" in said(call, m, s, m)
        assert order in said(call, s, s, m)
        assert order in said(call, t, t, w)
        assert order in said(call, s, m, s)
        assert order in said(call, t, w, t)
        assert "that is a rule" in said(call, s, Adam(), m, error=ValueError)


@parametrize("taker", [lambda m: setup(Adam(), m), opt.destructure, opt.trainables])
def test_a_rule_or_a_state_for_a_model(taker):
    assert "Adam(" in said(taker, Adam())
    assert "is a state tree, in the place of the model" in said(taker, setup(Adam(), model()))


# --- no rule ------------------------------------------------------------------------------------

TAKERS = {
    "setup": lambda rule: setup(rule, model()),
    "minimize": lambda rule: opt.minimize(lambda m: (1.0, m), model(), rule, 1),
    "chain": lambda rule: OptimiserChain(ClipNorm(1.0), rule),
    "mixed": lambda rule: MixedPrecision("float32", rule),
    "mixed alone": lambda rule: MixedPrecision(rule),
    "scipy": lambda rule: opt.scipy.method(rule),
    "optax": lambda rule: opt.optax.to_optax(rule),
    "torch": lambda rule: opt.torch.Optimizer([], rule),
}


@parametrize(
    ("wrong", "hint"),
    [
        (Adam, "write Adam()"),
        ("adam", "write Adam()"),
        ("SGD", "SGD is Descent here"),
        ([ClipNorm(1.0), Adam()], "write OptimiserChain(*rules)"),
        ((ClipNorm, Adam()), "write OptimiserChain(*rules), with ClipNorm()"),
        ({"w": np.ones(2)}, "is this the model?"),
    ],
)
@parametrize("taker", [*TAKERS])
def test_what_is_no_rule(taker, wrong, hint):
    if taker in ("scipy", "optax", "torch"):
        pytest.importorskip(taker)
    if taker == "optax":
        pytest.importorskip("jax")
    assert f"; {hint}" in said(TAKERS[taker], wrong)


def test_rules_of_others():
    scipy = pytest.importorskip("optimisers.scipy")
    assert "write the rule that is in it" in said(setup, scipy.method(Adam()), model())
    optax = pytest.importorskip("optax")
    assert "from_optax makes a rule of" in said(setup, optax.adam(0.1), model())


def test_a_torch_optimizer_as_a_rule():
    torch = pytest.importorskip("torch")
    theirs = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert "SGD is Descent here" in said(setup, theirs, model())
    assert "SGD is Descent here" in said(setup, torch.optim.SGD, model())
    assert "write Adam() of optimisers" in said(setup, torch.optim.Adam, model())


@parametrize("wrong", [Adam(), Adam])
def test_a_rule_for_a_number(wrong):
    hint = "; rules stand one after another: OptimiserChain(first, "
    for call in (
        lambda: AccumGrad(wrong),
        lambda: AccumGrad(2, wrong),
        lambda: ClipNorm(wrong),
        lambda: ClipNorm(1.0, wrong),
        lambda: Adam(0.1, wrong),
        lambda: opt.WeightDecay(wrong),
    ):
        assert hint in said(call)


def test_numbers_of_the_wrong_kind():
    assert "the number of threads must be a whole number" in said(opt.set_num_threads, "4")
    assert "the number of threads must be a whole number" in said(opt.set_num_threads, None)
    assert "beta must hold 2 numbers; got 0.9 (float)" in said(Adam, 0.1, 0.9)
    assert "give the gradient with the other sign" in said(Descent, -0.1, error=ValueError)
    assert "sign" not in said(opt.Adam, 0.1, (0.9, 0.99), -1.0, error=ValueError)
    assert "adjust_(state, eta) between steps" in said(Adam, 0.1, lambda t: 0.9)


# --- gradients ----------------------------------------------------------------------------------


class Frame:
    """A table, as pandas and others have it."""

    shape = (3, 2)

    def to_numpy(self):
        return np.ones(self.shape)


@parametrize("call", [opt.update, opt.update_])
def test_what_is_no_gradient(call):
    m = model()
    s = setup(Adam(), m)
    for wrong in ([[1.0, 1.0]] * 3, ((1.0, 1.0),) * 3):
        text = said(call, s, m, {"w": wrong})
        assert "gradient at ['w']: expected an array of shape (3, 2)" in text
        assert "write np.asarray(...) around it" in text
    assert "its .to_numpy() is an array" in said(call, s, m, {"w": Frame()})
    for function in (lambda m: m, np.sin, model):
        assert "call it, and give what it returns" in said(call, s, m, function)
        assert "call it, and give what it returns" in said(call, s, m, {"w": function})
    assert "give the second" in said(call, s, m, (1.0, m))
    assert "None means no gradient" in said(call, s, m, "gradient")


def test_a_table_of_pandas_as_a_gradient_or_a_model():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0, 3.0]})
    x = np.ones((3, 1))
    assert ".to_numpy()" in said(opt.update_, setup(Adam(), x), x, frame)
    with pytest.warns(UserWarning, match=r"its \.to_numpy\(\) trains"):
        setup(Adam(), frame)


@parametrize("call", [opt.update, opt.update_])
def test_vectors_and_trees_of_gradients(call):
    m = model()
    vector, re = opt.destructure(m)
    for given in (m, {"w": m["w"]}, [m["b"]]):
        assert "re.flatten_gradient(...)" in said(call, setup(Adam(), vector), vector, given)
    text = said(call, setup(Adam(), m), m, vector)
    assert "re(...) makes a tree of a vector" in text
    assert "re(...) makes a tree of a vector" in said(re.flatten_gradient, vector)
    matrix = np.ones((2, 2))
    assert "flatten_gradient" not in said(call, setup(Adam(), matrix), matrix, m)


def test_a_module_as_a_gradient():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 1)
    m = dict(module.named_parameters())
    assert "{name: p.grad for" in said(opt.update_, setup(Adam(), m), m, module)
    assert "dict(module.named_parameters())" in said(
        opt.update_, setup(Adam(), m), module, m, error=ValueError
    )


@parametrize(
    "rule",
    [
        Adam(),
        OptimiserChain(ClipNorm(1.0), Adam()),
        OptimiserChain(AccumGrad(2), Adam()),
        MixedPrecision(Adam()),
    ],
)
@parametrize("dtype", ["float64", "float32", "float16", "complex64"])
@parametrize("call", [opt.update, opt.update_])
def test_a_parameter_that_grew_is_named(call, dtype, rule):
    old = {"a": np.ones(2, dtype), "w": np.ones(3, dtype)}
    new = {"a": np.ones(2, dtype), "w": np.ones(4, dtype)}
    text = said(call, setup(rule, old), new, new, error=ValueError)
    assert "at ['w']: " in text
    assert "of shape (3,) for a parameter of shape (4,); call setup anew with this model" in text


# --- attributes and numbers ---------------------------------------------------------------------


def test_a_leaf_says_where_its_numbers_are():
    leaf = setup(Adam(), np.ones(2))
    for name in ("eta", "lr", "beta", "betas"):
        text = said(getattr, leaf, name, error=AttributeError)
        field = {"lr": "eta", "betas": "beta"}.get(name, name)
        assert f"it is leaf.rule.{field}, and adjust_(state, {field}=...) changes it" in text
    assert "it is leaf.state.m" in said(getattr, leaf, "m", error=AttributeError)
    chain = setup(OptimiserChain(ClipNorm(1.0), MixedPrecision(Adam()).rule), np.ones(2))
    assert "dict(leaf.rule.fields())['eta']" in said(getattr, chain, "eta", error=AttributeError)
    assert "it is leaf.state[1].m" in said(getattr, chain, "m", error=AttributeError)
    for name in ("colour", "shape", "_hidden", "__array__"):
        assert said(getattr, leaf, name, error=AttributeError).endswith(f"attribute {name!r}")
        assert not hasattr(leaf, name)
    bare = opt.Leaf.__new__(opt.Leaf)
    assert not hasattr(bare, "rule")
    assert not hasattr(bare, "eta")


def test_a_rule_says_where_its_numbers_are():
    assert said(getattr, Adam(), "lr", error=AttributeError).endswith("; write eta")
    assert "'Momentum'" in said(getattr, opt.Momentum(), "momentum", error=AttributeError)
    for rule in (OptimiserChain(ClipNorm(1.0), Adam()), MixedPrecision(Adam())):
        assert "dict(rule.fields())['eta']" in said(getattr, rule, "eta", error=AttributeError)
    for name in ("colour", "shape", "_hidden", "__array__"):
        assert said(getattr, Adam(), name, error=AttributeError).endswith(f"attribute {name!r}")
    unmade = Adam.__new__(Adam)
    assert not hasattr(unmade, "lr")
    assert not hasattr(OptimiserChain.__new__(OptimiserChain), "eta")


@parametrize(
    "rule",
    [Adam(), OptimiserChain(ClipNorm(1.0), Adam()), MixedPrecision(OptimiserChain(Adam()))],
)
def test_a_rule_is_not_adjusted_by_a_name_that_it_does_not_have(rule):
    state = setup(rule, np.ones(2))
    for name, hint in (("lr", "For lr, write eta"), ("betta", "did you mean beta?")):
        text = said(rule.adjust, **{name: 0.5})
        assert f"no rule here has the field {name!r}" in text
        assert hint in text
        assert text == said(opt.adjust, state, **{name: 0.5})
        assert text == said(opt.adjust_, state, **{name: 0.5})
    assert dict(rule.adjust(eta=0.5).fields())["eta"] == 0.5
    assert rule.adjust() == rule


def test_a_rule_to_adjust_by_names_setup():
    state = setup(Adam(), np.ones(2))
    for call in (opt.adjust, opt.adjust_):
        assert "another rule needs setup(rule, model)" in said(call, state, Descent(0.1))


def test_parts_of_a_tree_may_have_different_fields():
    state = {"a": setup(Adam(), np.ones(1)), "b": setup(opt.Momentum(), np.ones(1))}
    opt.adjust_(state, 0.5, rho=0.7)
    assert state["a"].rule == Adam(0.5)
    assert state["b"].rule == opt.Momentum(0.5, 0.7)


# --- minimize -----------------------------------------------------------------------------------


def loss(m):
    return 1.0, m


@parametrize(
    ("name", "hint"),
    [
        ("args", "lambda model: loss(model, *args)"),
        ("tol", "a callback that returns True to end the run"),
        ("method", "write rule, the third argument"),
        ("jac", "value_and_grad=jax.value_and_grad"),
        ("options", "write steps"),
        ("maxiter", "write steps"),
        ("epochs", "write steps"),
        ("bounds", "optimisers.scipy.method(rule)"),
        ("x0", "write model"),
        ("fun", "write loss"),
        ("lr", "such as Adam(eta=0.1)"),
        ("optimizer", "write rule"),
    ],
)
def test_arguments_of_other_loops(name, hint):
    text = said(opt.minimize, loss, model(), Adam(), 3, **{name: 1})
    assert f"got an unexpected keyword argument {name!r}; for {name}, " in text
    assert hint in text


def test_arguments_of_minimize_that_are_missing_or_misplaced():
    call = "write minimize(loss, model, rule, steps)"
    for args, named in (((loss, model()), {"steps": 3}), ((loss, model(), 3), {})):
        assert call in said(opt.minimize, *args, **named)
    assert call in said(opt.minimize, loss, model(), Adam(), 3, colour=1)
    order = "minimize takes a loss, a model, a rule and a number of steps, in this order"
    assert order in said(opt.minimize, model(), loss, Adam(), 3)
    assert order in said(opt.minimize, loss, model(), 3, Adam())
    assert order in said(opt.minimize, loss, model(), Adam(), None)
    assert SETUP in said(opt.minimize, loss, model(), None, 3, state=Adam())
    assert "is this the model?" in said(opt.minimize, loss, model(), None, 3, state=model())
    assert "callback must be a function" in said(opt.minimize, loss, model(), Adam(), 3, callback=3)
    assert "value_and_grad must be a function" in said(
        opt.minimize, loss, model(), Adam(), 3, value_and_grad=model()
    )


def test_what_a_loss_raises_is_not_explained():
    def failing(m):
        raise TypeError("of its own")

    assert said(opt.minimize, failing, model(), Adam(), 3) == "of its own"
    assert "write setup(rule, model)" in said(setup, Adam())
    assert "hyperparameters are the rule's" in said(setup, Adam(), model(), lr=0.1)


# --- SciPy, PyTorch -----------------------------------------------------------------------------


def test_a_rule_as_a_method_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    args = optimize.rosen, np.zeros(2)
    for rule in (Adam(), OptimiserChain(Adam()), Fieldless()):
        text = said(optimize.minimize, *args, method=rule, error=AttributeError)
        assert "method=optimisers.scipy.method(rule)" in text
    for cls in (Adam, Fieldless):
        text = said(optimize.minimize, *args, method=cls)
        assert f"method=optimisers.scipy.method({cls.__name__}(...))" in text
    text = said(optimize.minimize, *args, method=opt.scipy.method)
    assert "method=optimisers.scipy.method(rule)" in text


def test_what_an_optimizer_of_torch_is_called_with():
    torch = pytest.importorskip("torch")
    from optimisers.torch._optimizer import Optimizer

    module = torch.nn.Linear(2, 1)
    params = list(module.parameters())
    assert "Optimizer(params, Adam(eta=0.1))" in said(Optimizer, params, lr=0.1)
    text = said(Optimizer, params, Adam(), lr=0.1)
    assert "for lr, write eta in the rule: Optimizer(params, Adam(eta=0.1))" in text
    text = said(Optimizer, params, Adam(), weight_decay=0.1, foreach=True)
    assert "for weight_decay, write lambda_ in the rule" in text
    assert "for foreach, leave it out" in text
    assert "with a rule such as Adam(eta=0.1)" in said(Optimizer, params)
    assert "write module.parameters()" in said(Optimizer, module, Adam())


# --- files --------------------------------------------------------------------------------------


def test_files_are_named_by_paths(tmp_path):
    m = model()
    s, path = setup(Adam(), m), tmp_path / "a.safetensors"
    for call in (lambda: save(s, path), lambda: save(s, m, path), lambda: save(None, s)):
        assert "save(path, state, model) takes a path" in said(call)
    for given in (path, str(path), os.fsencode(path)):
        save(given, s, m)
        assert load(given)[1].keys() == m.keys()
        with File(given) as file:
            assert "model.w" in file
    for call in (lambda: load(s, path), lambda: load((s, m), path), lambda: load(None)):
        assert "load(path, like=...) takes a path" in said(call)
    assert "(state, model), in this order" in said(load, path, like=(m, s), error=ValueError)
    assert "Checkpointer(folder) takes a path" in said(Checkpointer, s)
    checkpoints = Checkpointer(os.fsencode(tmp_path / "many"))
    for call in (lambda: checkpoints.save(s, m), lambda: checkpoints.save(s, 3, m)):
        assert "takes the number of the step first" in said(call)
    assert "keep must be a whole number" in said(Checkpointer, tmp_path, keep="3")
    assert checkpoints.steps() == []


@parametrize("call", [load, File, lambda n: save(n, ()), Checkpointer])
def test_numbers_of_open_files_are_left_alone(call):
    with tempfile.TemporaryFile() as file:
        file.write(b"kept")
        file.seek(0)
        for wrong in (file.fileno(), True, file):
            assert "takes a path" in said(call, wrong)
        assert file.read() == b"kept"
    before = os.fstat(0) if Path("/dev/fd/0").exists() else None
    assert "takes a path" in said(call, 0)
    assert before is None or os.path.samestat(before, os.fstat(0))


# --- what messages show -------------------------------------------------------------------------


class Loud:
    def __repr__(self):
        return "\x1b[2J\r" + "loud" * 100


class Broken:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "value",
    [Loud(), Broken(), "a\nb" * 99, {"\x1b[2J": Loud()}, [Loud()] * 20],
    ids=["loud", "broken", "text", "dict", "list"],
)
def test_values_in_messages_are_short_and_printable(value):
    m, s = model(), setup(Adam(), model())
    for call in (
        lambda: setup(value, m),
        lambda: OptimiserChain(value),
        lambda: MixedPrecision("float32", value),
        lambda: MixedPrecision(value, Adam()),
        lambda: opt.update_(value, m, m),
        lambda: opt.update_(s, m, {"w": value}),
        lambda: opt.update_(s, {"w": value, "b": m["b"]}, m),
        lambda: opt.minimize(loss, m, value, 3),
        lambda: opt.minimize(loss, m, Adam(), 3, callback=value),
        lambda: opt.minimize(lambda _: (value, m), m, Adam(), 3),
        lambda: Adam(value),
        lambda: Adam(0.1, value),
        lambda: opt.freeze_(value),
        lambda: load(value if not isinstance(value, str) else [value]),
    ):
        text = said(call, error=(TypeError, ValueError, RuntimeError))
        assert len(text) < 400, text
    assert short(value).isprintable()
    assert len(short(value)) < 200
