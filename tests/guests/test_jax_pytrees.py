"""State trees as pytrees of JAX and optree, and the modules of Equinox and Flax."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from re import sub as substitute
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax_models import NAMED, RULES, counts_as_numpy, jnp, leaves_of, structure_of, tree_map
from util import assert_near, assert_same_bits, normal

from optimisers import (
    AccumGrad,
    Adam,
    AdamW,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RAdam,
    RMSProp,
    adjust,
    adjust_,
    destructure,
    freeze_,
    setup,
    update,
    update_,
)

jax = pytest.importorskip("jax")


# --- state trees are pytrees -----------------------------------------------------------------


def test_numbers_and_state_are_children_all_else_is_structure():
    x = jnp.ones(2)
    state = {"w": setup(OptimiserChain(ClipNorm(3.0), AccumGrad(2), RMSProp(0.25)), x)}
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in pairs}
    assert list(found) == ["['w'].packed", "['w'].state[1].sum", "['w'].state[2].q"]
    packed = found["['w'].packed"]
    numbers = [3.0, 0.25, 0.9, 1e-8]
    np.testing.assert_array_equal(packed[:4], np.float32(numbers))
    np.testing.assert_array_equal(packed[:4] + packed[4:8], numbers)
    np.testing.assert_array_equal(packed[8:], [0, 0])  # a count, in two halves


def test_a_round_trip_changes_nothing():
    def rounded(tree):  # 0.7200000000000001 comes back as 0.72
        return substitute(r"\d+\.\d{9,}", lambda digits: f"{float(digits[0]):.12g}", repr(tree))

    state = {name: setup(rule, np.ones(3, np.float32)) for name, rule in NAMED.items()}
    assert "0.72," in rounded(state) != repr(state)
    assert repr(tree_map(lambda x: x, state)) == repr(state)
    assert repr(jax.device_get(state)) == repr(state)
    there = jax.jit(lambda s: s)(state)
    home = jax.device_get(there)
    for name, leaf in state.items():
        assert type(home[name].rule) is type(leaf.rule)
        assert rounded(there[name].rule) == rounded(home[name].rule) == rounded(leaf.rule)
        assert_near(counts_as_numpy(home[name].state), leaf.state)
    assert structure_of(state) == structure_of(there) == structure_of(home)


def test_structure():
    x = jnp.ones(2)

    def same(one, other):
        return structure_of(setup(one, x)) == structure_of(setup(other, x))

    assert same(Adam(), Adam(0.5, (0.1, 0.2), 1e-3))
    assert same(Descent(1), Descent(0.5))
    assert same(ClipNorm(1.0), ClipNorm(2.0))
    assert not same(ClipNorm(p=1.0), ClipNorm(p=2.0))
    assert not same(ClipNorm(), ClipNorm(throw=False))
    assert not same(AccumGrad(2), AccumGrad(3))
    assert not same(AdamW(), AdamW(couple=False))
    assert not same(MixedPrecision("float32", Adam()), MixedPrecision("bfloat16", Adam()))
    assert not same(Adam(), RAdam())
    frozen = setup(Adam(), x)
    freeze_(frozen)
    assert structure_of(frozen) != structure_of(setup(Adam(), x))


@pytest.mark.parametrize(
    "thing", [None, "text", True, object(), 1j, (1, 2)], ids=lambda x: type(x).__name__
)
def test_leaves_are_made_of_anything(thing):
    """JAX puts what it likes into trees: nothing is checked then, and no `__init__` runs."""
    for rule in RULES:
        state = setup(rule, jnp.ones(2))
        leaves, structure = jax.tree_util.tree_flatten(state)
        made = jax.tree_util.tree_unflatten(structure, [thing] * len(leaves))
        assert isinstance(made, Leaf)
        assert type(made.rule) is type(rule)
        same = [x is thing for x in structure.flatten_up_to(made)]
        assert same == [True] * len(leaves)
        assert isinstance(repr(made), str)


def test_numbers_beyond_float32():
    state = setup(OptimiserChain(ClipNorm(1e300), Adam(epsilon=1e-60)), jnp.ones(2))
    _, new = jax.jit(update)(state, jnp.ones(2), jnp.asarray([1.0, -1.0]))
    np.testing.assert_allclose(new, [0.999, 1.001], rtol=1e-6)
    with jax.enable_x64(True):
        there = jax.jit(lambda s: s)(setup(Adam(epsilon=1e-60, eta=1 / 3), jnp.ones(2)))
        assert (float(there.rule.epsilon), float(there.rule.eta)) == (1e-60, 1 / 3)


def test_what_came_back_from_jit_is_used_like_any_other():
    x, g = jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, -1.0])
    rule = OptimiserChain(ClipNorm(1.0), Adam(0.1))
    plain = setup(rule, x)
    there = jax.jit(lambda s: s)(plain)
    for call in (update, update_):
        one, other = call(copy.deepcopy(plain), x, g), call(copy.deepcopy(there), x, g)
        assert_same_bits(np.asarray(one[1]), np.asarray(other[1]))
    assert repr(adjust(there, beta=(0.5, 0.6)).rule) == repr(rule.adjust(beta=(0.5, 0.6)))
    adjust_(there, 0.3)
    assert there.rule.rules[1].eta == 0.3
    again = pickle.loads(pickle.dumps(there))
    assert repr(again) == repr(there)
    at_home = jax.device_get(there)
    _, moved = update(at_home, np.asarray(x), np.asarray(g))  # by the kernels
    np.testing.assert_allclose(moved, update(there, x, g)[1], rtol=1e-6)


def test_a_numpy_model_beside_numbers_of_jax():
    there = jax.jit(lambda s: s)(setup(Momentum(0.5), jnp.ones(2)))
    leaf = Leaf(there.rule, setup(Momentum(0.5), np.ones(2)).state)
    for call in (update, update_):
        _, new = call(copy.deepcopy(leaf), np.ones(2), np.ones(2))
        assert_same_bits(new, np.array([0.5, 0.5]))


# --- Equinox, Flax ---------------------------------------------------------------------------


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox")


def test_an_equinox_module_trains(eqx):
    mlp = eqx.nn.MLP(2, 1, 8, 1, activation=jax.nn.tanh, key=jax.random.key(0))
    xs = jnp.asarray(normal((16, 2), np.float32)) / 10
    ys = xs.sum(axis=1)

    def loss(mlp):
        return jnp.mean((jax.vmap(mlp)(xs)[:, 0] - ys) ** 2)

    state = setup(OptimiserChain(ClipNorm(1.0), Adam(0.02)), mlp)
    assert isinstance(state, SimpleNamespace)
    assert isinstance(state.layers[0].weight, Leaf)
    assert repr(state).startswith("namespace(layers=")
    _, eager = update(state, mlp, eqx.filter_grad(loss)(mlp))
    traces = []

    @eqx.filter_jit
    def step(state, mlp):
        traces.append(1)
        return update(state, mlp, eqx.filter_grad(loss)(mlp))

    first = float(loss(mlp))
    state, mlp = step(state, mlp)
    assert type(mlp) is type(eager)
    np.testing.assert_allclose(mlp.layers[0].weight, eager.layers[0].weight, rtol=1e-5)
    for _ in range(60):
        state, mlp = step(state, mlp)
    assert float(loss(mlp)) < 0.2 * first
    assert len(traces) == 1
    assert mlp.in_size == 2


def test_a_module_with_all_kinds_of_fields(eqx):
    class Module(eqx.Module):
        w: jax.Array
        bias: None
        act: Any
        steps: jax.Array
        rate: float
        name: str = eqx.field(static=True)

    module = Module(jnp.ones(2), None, jnp.tanh, jnp.arange(2), 0.5, "first")
    grad = eqx.filter_grad(lambda m: jnp.sum(m.act(m.w) * m.rate))(module)
    state = setup(Descent(1.0), module)
    assert (state.bias, state.act, state.steps, state.rate) == ((), (), (), ())
    assert not hasattr(state, "name")
    _, new = update(state, module, grad)
    np.testing.assert_allclose(new.w, 1 - 0.5 / np.cosh(1) ** 2, rtol=1e-6)
    assert (new.bias, new.act, new.rate, new.name) == (None, jnp.tanh, 0.5, "first")
    assert new.steps is module.steps
    # A state crosses plain jit, too, with the module's arrays.
    params, static = eqx.partition(module, eqx.is_inexact_array)
    _, again = jax.jit(update)(state, params, eqx.filter(grad, eqx.is_array))
    np.testing.assert_allclose(eqx.combine(again, static).w, new.w, rtol=1e-6)
    back = tree_map(lambda x: x, state)
    assert type(back) is type(state)
    assert repr(back) == repr(state)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [".w.packed"]
    assert pickle.loads(pickle.dumps(state)) is not None
    flat, re = destructure(module)
    slope = jax.grad(lambda v: jnp.sum(re(v).w ** 2))(flat)
    np.testing.assert_allclose(slope, [2.0, 2.0])


def test_flax_parameters_train():
    linen = pytest.importorskip("flax.linen")
    core = pytest.importorskip("flax.core")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.tanh(linen.Dense(8)(x)))

    xs = jnp.asarray(normal((16, 2), np.float32)) / 10
    network = Network()
    params = network.init(jax.random.key(0), xs)

    def loss(params):
        return jnp.mean((network.apply(params, xs)[:, 0] - xs.sum(axis=1)) ** 2)

    for model in (params, core.freeze(params)):
        state, new = setup(Adam(0.02), model), model
        step = jax.jit(lambda s, m: update(s, m, jax.grad(loss)(m)))
        for _ in range(60):
            state, new = step(state, new)
        assert type(new) is type(model)
        assert float(loss(new)) < 0.2 * float(loss(model))
        flat, re = destructure(model)
        g = jax.grad(lambda v, re=re: loss(re(v)))(flat)
        np.testing.assert_allclose(
            g, re.flatten_gradient(jax.grad(loss)(model)), rtol=1e-4, atol=1e-6
        )


# --- registering -----------------------------------------------------------------------------

SCRIPT = """
import pickle, sys
import numpy as np
import optimisers
from optimisers import Adam, setup, update
assert "jax" not in sys.modules and "optree" not in sys.modules
early = setup(Adam(), {"w": np.ones(2)})
pickled = pickle.dumps(early)
import jax, optree
step = jax.jit(update)
g = {"w": np.ones(2)}
{use}
assert float(new["w"][0]) < 1
assert len(optree.tree_leaves(state)) == 3
"""


@pytest.mark.parametrize(
    "use",
    [
        "state, new = step(pickle.loads(pickled), g, g)",
        "state, new = step(setup(Adam(), g), g, g)",
        "optimisers.thaw_(early); state, new = step(early, g, g)",
        "update(early, g, g); state, new = step(early, g, g)",
    ],
)
def test_leaves_are_known_to_jax_when_it_is_imported_late(use):
    script = SCRIPT.replace("{use}", use)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_leaves_are_known_to_jax_when_it_is_imported_first():
    """Unpickling imports this library."""
    pickled = pickle.dumps(setup(Adam(), {"w": np.ones(2)}))
    script = (
        "import jax, pickle, sys\n"
        f"state = pickle.loads({pickled!r})\n"
        "assert len(jax.tree_util.tree_leaves(state)) == 3"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_optree_sees_the_same_leaves():
    optree = pytest.importorskip("optree")
    eqx = pytest.importorskip("equinox")
    state = setup(Adam(), {"w": jnp.ones(2), "m": eqx.nn.Linear(2, 1, key=jax.random.key(0))})
    leaves, spec = optree.tree_flatten(state)
    for x, y in zip(leaves, leaves_of(state), strict=True):
        np.testing.assert_array_equal(x, y)
    back = optree.tree_unflatten(spec, leaves)
    assert repr(back) == repr(state)
    assert repr(optree.tree_map(lambda x: x, state)) == repr(state)
    paths = optree.tree_paths(state)
    assert ("w", "packed") in paths
    assert ("m", "weight", "state", 0) in paths
