"""The numbers of a rule that JAX had, or has: floats again, or numbers in two parts."""

import copy
import json
import math
import operator
import pickle

import numpy as np
import pytest
from util import PUBLIC, example

from optimisers import Adam, ClipNorm, Descent, Leaf, OptimiserChain, adjust, adjust_, setup, update
from optimisers.io import load, save

jax = pytest.importorskip("jax")
jnp = jax.numpy

ARITHMETIC = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]


def crossed(tree):
    return jax.jit(lambda tree: tree)(tree)


def flat(value):
    """Yield the numbers in the fields of a rule."""
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from flat(v)
    else:
        yield value


# --- a number that came back ---------------------------------------------------------------------

WAYS = {
    "jit": crossed,
    "scan": lambda state: jax.lax.scan(lambda s, _: (s, None), state, None, 3)[0],
    "cond": lambda state: jax.lax.cond(True, lambda s: s, lambda s: s, state),
    "update": lambda state: jax.jit(update)(state, jnp.ones(2), jnp.ones(2))[0],
    "device_put": jax.device_put,
    "device_get": lambda state: jax.device_get(crossed(state)),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_float_that_it_was(way):
    state = WAYS[way](setup(Adam(0.001, (0.9, 0.999)), jnp.ones(2)))
    assert [*flat([v for _, v in state.rule.fields()])] == [0.001, 0.9, 0.999, 1e-8, False]
    for value in state.rule.eta, *state.rule.beta, state.rule.epsilon:
        assert type(value) is float


@pytest.mark.parametrize("cls", PUBLIC)
def test_the_numbers_of_every_rule_have_their_types(cls):
    rule = example(cls)
    before, after = ([*flat([v for _, v in r.fields()])] for r in (rule, crossed_rule(rule)))
    for one, other in zip(before, after, strict=True):
        assert type(other) is (float if isinstance(one, float) else type(one))
        assert other == pytest.approx(one, rel=1e-14) if isinstance(one, float) else other == one


def crossed_rule(rule):
    return crossed(setup(rule, jnp.ones(2))).rule


def test_functions_of_every_library_take_it():
    eta = crossed_rule(Descent(0.001)).eta
    assert json.dumps({"eta": eta}) == '{"eta": 0.001}'
    assert (f"{eta:.2e}", f"{eta}", repr(eta), round(eta, 2)) == ("1.00e-03", "0.001", "0.001", 0.0)
    assert (hash(eta), {eta: 1}[0.001]) == (hash(0.001), 1)
    assert pickle.loads(pickle.dumps(eta)) == copy.deepcopy(eta) == 0.001
    assert math.log10(eta) == pytest.approx(-3)
    for xp in np, jnp:
        for name in ["exp", "log", "sqrt", "sin", "asarray", "abs", "floor"]:
            np.testing.assert_allclose(getattr(xp, name)(eta), getattr(np, name)(0.001), rtol=1e-6)
        assert xp.minimum(eta, 1) == pytest.approx(0.001)
        np.testing.assert_allclose(xp.where(True, eta, 1.0), 0.001, rtol=1e-6)
    for name in ARITHMETIC + COMPARISONS:
        op = getattr(operator, name)
        assert op(eta, 3) == op(0.001, 3)
        assert op(3, eta) == op(3, 0.001)
    assert divmod(3, eta) == divmod(3, 0.001)
    np.testing.assert_allclose(jax.jit(jnp.exp)(eta), math.exp(0.001), rtol=1e-6)


def test_numbers_that_are_no_floats_come_back_as_they_are():
    def back(value):
        leaf = jax.tree_util.tree_map(lambda x: x, setup(Descent(), jnp.ones(2)))
        object.__setattr__(leaf.rule, "eta", value)
        leaf.rule = copy.copy(leaf.rule)
        return crossed(leaf).rule.eta

    assert (back(jnp.asarray(3)), type(back(jnp.asarray(3)))) == (3, int)
    assert back(jnp.asarray(1 + 2j)) == 1 + 2j
    assert back(jnp.asarray(0.5, jnp.bfloat16)) == 0.5
    np.testing.assert_array_equal(np.asarray(back(jnp.asarray([0.5, 1.0]))), [0.5, 1.0])


def test_looking_at_numbers_compiles_nothing_anew():
    traces = []

    @jax.jit
    def step(state, x):
        traces.append(1)
        return update(adjust(state, eta=state.rule.eta * jnp.float32(0.5)), x, x)

    state, x = setup(Adam(0.5), jnp.ones(2)), jnp.ones(2)
    for _ in range(2):  # first its rate is a Python number, then one of float32
        state, x = step(state, x)
    count = len(traces)
    for k in range(3):
        assert state.rule.eta == 0.5 ** (k + 3)
        assert f"{state.rule.eta:.3f}" in repr(state) or state.rule.eta < 0.1
        state, x = step(state, x)
    assert len(traces) == count


def test_other_numbers_take_the_place_of_those_that_came_back():
    for look in False, True:
        state = crossed(setup(Adam(0.5), jnp.ones(2)))
        if look:
            assert state.rule.eta == 0.5
        assert adjust(state, eta=0.25).rule.eta == 0.25
        assert crossed(adjust(state, eta=0.25)).rule.eta == 0.25
        adjust_(state, 0.125)
        assert (state.rule.eta, crossed(state).rule.eta) == (0.125, 0.125)
        state.rule = Adam(1.0)
        assert crossed(state).rule.eta == 1.0
    state = crossed(setup(Adam(0.5), jnp.ones(2)))
    state.rule = Adam(1.0)
    assert crossed(state).rule.eta == 1.0


def test_a_leaf_has_no_other_attributes():
    leaf = setup(Descent(), jnp.ones(2))
    for state in leaf, crossed(leaf):
        with pytest.raises(AttributeError, match="'Leaf' object has no attribute 'ruel'"):
            _ = state.ruel
    del leaf.rule
    with pytest.raises(AttributeError, match="'Leaf' object has no attribute 'rule'"):
        _ = leaf.rule
    assert isinstance(crossed(setup(Descent(), jnp.ones(2))), Leaf)


def test_a_file_keeps_them(tmp_path):
    state, model = crossed(setup(Adam(0.001), jnp.ones(2))), jnp.ones(2)
    save(tmp_path / "a", state, model)
    assert load(tmp_path / "a")[0].rule == Adam(0.001)


# --- a number that is traced ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ARITHMETIC + COMPARISONS)
def test_it_calculates_while_it_is_traced(name):
    op = getattr(operator, name)

    @jax.jit
    def calculated(state):
        eta, rho = state.rule.eta, state.rule.beta[0]
        return op(eta, 0.25), op(0.25, eta), op(eta, rho), op(eta, jnp.float32(0.25))

    found = calculated(setup(Adam(0.5, (0.25, 0.9)), jnp.ones(2)))
    expected = op(0.5, 0.25), op(0.25, 0.5), op(0.5, 0.25), op(0.5, 0.25)
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), rtol=1e-6)


def test_functions_take_it_while_it_is_traced():
    @jax.jit
    def calculated(state):
        eta = state.rule.eta
        assert f"{eta}"
        assert divmod(eta, 2)
        assert divmod(2, eta)
        return -eta, +eta, abs(eta), np.exp(eta), np.minimum(1, eta), jnp.asarray(eta) * 1

    found = calculated(setup(Descent(0.5), jnp.ones(2)))
    np.testing.assert_allclose(found, [-0.5, 0.5, 0.5, math.exp(0.5), 0.5, 0.5], rtol=1e-6)


def test_what_must_be_known_is_refused_while_it_is_traced():
    state = setup(OptimiserChain(ClipNorm(1.0), Descent(0.5)), jnp.ones(2))
    for ask in bool, float, int, math.floor, math.sqrt:
        with pytest.raises(jax.errors.JAXTypeError):
            jax.jit(lambda s, ask=ask: ask(s.rule.rules[1].eta))(state)


def test_one_for_each_of_many_models_is_an_array():
    state = setup(Descent(0.5), jnp.ones(2))
    many = jax.vmap(lambda k: adjust(state, eta=state.rule.eta * k))(jnp.arange(3.0))
    eta = many.rule.eta
    np.testing.assert_array_equal(np.asarray(eta), [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(eta * 2, [0.0, 1.0, 2.0])
    assert "0.5" in f"{many}"
    seen = jax.vmap(lambda s: s.rule.eta + 0.0)(crossed(many))
    np.testing.assert_array_equal(seen, [0.0, 0.5, 1.0])
