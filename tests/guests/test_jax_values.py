"""Arrays of JAX are values: one at several places is a parameter at each, as for optax."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from util import PUBLIC, assert_same_bits, example

import optimisers
from optimisers import (
    Adam,
    Descent,
    Leaf,
    Momentum,
    destructure,
    fmap,
    freeze_,
    setup,
    trainables,
    update,
    update_,
)
from optimisers.io import load, save

jax: Any = pytest.importorskip("jax")
jnp = jax.numpy


class Pair(NamedTuple):
    w: Any
    b: Any


@optimisers.functor
class Dense:
    def __init__(self, w):
        self.w = w


CONTAINERS = {
    "array": lambda x: x,
    "dict": lambda x: {"w": x},
    "list": lambda x: [x, 3],
    "deep": lambda x: {"layers": [[{"w": x}], "relu"]},
    "tuple": lambda x: Pair(x, None),
    "namespace": lambda x: SimpleNamespace(w=x),
    "object": Dense,
}


def ones():
    return jnp.array([1.0, 2.0])


def arrays(tree):
    return [np.asarray(x) for x in trainables(tree)]


@pytest.fixture(params=CONTAINERS)
def net(request):
    """A network that stands at two places, as a whole."""
    return CONTAINERS[request.param](ones())


@pytest.mark.parametrize("call", [update, update_])
def test_a_second_reference_stays_where_it_is(net, call):
    model = {"online": net, "target": net}
    state = setup(Adam(0.1), model)
    assert len(trainables(model)) == 2
    gradient = {"online": fmap(lambda x: jnp.ones_like(x) if hasattr(x, "shape") else None, net)}
    for _ in range(2):
        state, model = call(state, model, gradient)
    online, target = arrays(model)
    np.testing.assert_allclose(online, [0.8, 1.8], rtol=1e-6)
    assert target.tolist() == [1.0, 2.0]


def test_every_place_takes_its_own_step():
    z = jnp.zeros(2)
    model = {"free": jnp.ones(2), "one": z, "two": [z, (z,)]}
    gradient = {"free": None, "one": jnp.ones(2), "two": [2 * jnp.ones(2), (3 * jnp.ones(2),)]}
    apart = jax.tree.map(jnp.array, model)
    for rule in (Descent(1.0), Momentum(1.0)):
        for call in (update, update_, jax.jit(update)):
            _, new = call(setup(rule, model), model, gradient)
            _, expected = call(setup(rule, apart), apart, gradient)
            for x, y in zip(arrays(new), arrays(expected), strict=True):
                assert_same_bits(x, y)
            assert arrays(new)[2].tolist() == [-2.0, -2.0]


def test_freezing_one_place_leaves_the_other(net):
    model = [net, net]
    state = setup(Descent(1.0), model)
    freeze_(state[1])
    _, new = update(state, model, _like(model, [jnp.ones(2), jnp.ones(2)]))
    moved, kept = arrays(new)
    assert moved.tolist() == [0.0, 1.0]
    assert kept.tolist() == [1.0, 2.0]


def _like(model, gradients):
    """Return a gradient of the structure of a model, from those of its places."""
    found = iter(gradients)
    return fmap(lambda x: next(found) if hasattr(x, "shape") else None, model)


def test_the_vector_holds_each_place(net):
    model = {"online": net, "rest": jnp.zeros(1), "target": net}
    flat, re = destructure(model)
    assert flat.tolist() == [1, 2, 0, 1, 2]
    new = re(jnp.arange(5.0))
    assert [x.tolist() for x in arrays(new)] == [[0, 1], [2], [3, 4]]
    assert re.flatten(new).tolist() == [0, 1, 2, 3, 4]
    gradient = _like(model, [jnp.ones(2), None, 2 * jnp.ones(2)])
    assert re.flatten_gradient(gradient).tolist() == [1, 1, 0, 2, 2]


def test_a_state_that_crossed_jit_ties_nothing():
    z = jnp.zeros(2)
    model = [z, z]
    state = jax.jit(lambda s: s)(setup(Momentum(1.0), model))
    state, model = update(state, model, [jnp.ones(2), None])
    assert [x.tolist() for x in arrays(model)] == [[-1, -1], [0, 0]]
    state, model = jax.jit(update)(state, model, [None, jnp.ones(2)])
    assert [x.tolist() for x in arrays(model)] == [[-1, -1], [-1, -1]]
    _, model = update(state, model, [jnp.ones(2), jnp.zeros(2)])
    np.testing.assert_allclose(np.stack(arrays(model)), [[-2.9, -2.9], [-1.9, -1.9]], rtol=1e-6)


def test_a_file_keeps_places_apart(tmp_path, net):
    model = {"online": net, "target": net}
    state = setup(Momentum(1.0), model)
    path = str(tmp_path / "model.safetensors")
    save(path, state, model)
    state, model = load(path, like=(state, model))
    state, model = update(state, model, _like(model, [jnp.ones(2), None]))
    assert [x.tolist() for x in arrays(model)] == [[0, 1], [1, 2]]


def test_a_file_read_into_arrays_of_numpy_ties_nothing(tmp_path):
    z = jnp.zeros(2)
    path = str(tmp_path / "model.safetensors")
    save(path, setup(Descent(1.0), [z, z]), [z, z])
    state, model = load(path)
    _, model = update(state, model, [np.ones(2), None])
    assert [x.tolist() for x in arrays(model)] == [[-1, -1], [0, 0]]


def test_a_shared_leaf_ties_them_by_hand():
    z = jnp.zeros(2)
    for model in ([z, z], [z, jnp.zeros(2)]):
        state = setup(Momentum(1.0), model)
        state[1] = state[0]
        for call in (update, update_):
            made, new = call([copy_of(state[0])] * 2, model, [jnp.ones(2), 2 * jnp.ones(2)])
            assert made[0] is made[1]
            assert [x.tolist() for x in arrays(new)] == [[-3, -3], [-3, -3]]


def copy_of(leaf):
    return Leaf(leaf.rule, leaf.state)


def test_fmap_makes_an_array_of_each_place(net):
    made = fmap(lambda x: np.array(x) if hasattr(x, "shape") else x, [net, net])
    one, other = trainables(made)
    assert not np.shares_memory(one, other)
    _, new = update(setup(Descent(1.0), made), made, _like(made, [np.ones(2), None]))
    assert [x.tolist() for x in arrays(new)] == [[0, 1], [1, 2]]


def test_arrays_that_can_be_written_stay_tied_beside_them():
    w, z = np.ones(2), jnp.zeros(2)
    layer = {"w": w, "z": z}
    model = [layer, layer, w]
    state = setup(Descent(1.0), model)
    assert state[0]["w"] is state[1]["w"] is state[2]
    assert state[0]["z"] is not state[1]["z"]
    gradient = [{"w": np.ones(2), "z": jnp.ones(2)}, {"w": np.ones(2), "z": None}, np.ones(2)]
    _, new = update(state, model, gradient)
    assert new[0]["w"] is new[1]["w"] is new[2]
    assert [new[0]["w"].tolist(), new[0]["z"].tolist(), new[1]["z"].tolist()] == [
        [-2, -2],
        [-1, -1],
        [0, 0],
    ]


def test_containers_of_other_arrays_stay_shared():
    shared = {"w": np.ones(2), "key": jnp.arange(2)}
    new = fmap(lambda x: x, [shared, shared])
    assert new[0] is new[1]
    state, new = update(setup(Descent(), [shared, shared]), [shared, shared], None)
    assert state[0] is state[1]
    assert new[0] is new[1]


def test_a_traced_array_at_two_places():
    @jax.jit
    def step(x):
        model = [x, x]
        state = setup(Descent(1.0), model)
        return update(state, model, [jnp.ones(2), None])[1]

    assert [x.tolist() for x in step(jnp.zeros(2))] == [[-1, -1], [0, 0]]


@pytest.mark.parametrize("cls", PUBLIC)
def test_nothing_of_a_trace_outlives_it(cls):
    rule = example(cls)
    x = jnp.ones(2)
    state = setup(rule, x)
    with jax.checking_leaks():
        jax.jit(update)(state, x, x)
        jax.jit(lambda x: update(setup(rule, x), x, x))(x)
