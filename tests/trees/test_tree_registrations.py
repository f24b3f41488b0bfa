"""What JAX, optree, Equinox, Flax, PyTorch and autograd say about trees and arrays."""

from __future__ import annotations

import collections
import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from optimisers._arrays.library import isnumeric, maywrite
from optimisers._trees.nodes import children, is_node, mirror, rebuild, register_leaf, register_node
from optimisers._trees.paths import KeyPath
from optimisers._trees.walks import fmap, fold, getkeypath, setkeypath_, walk


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


@pytest.fixture(scope="module")
def eqx():
    return pytest.importorskip("equinox")


@pytest.fixture(scope="module")
def flax():
    pytest.importorskip("flax")
    return pytest.importorskip("flax.core")


@pytest.fixture(scope="module")
def optree():
    return pytest.importorskip("optree")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def autograd():
    return pytest.importorskip("autograd")


class Box:
    def __init__(self, *items):
        self.items = items


def flatten(box):
    return box.items, "static"


# JAX


def test_a_class_registered_with_jax_is_a_node_from_then_on(jax):
    class Late(Box):
        pass

    assert not is_node(Late(1.0))
    assert len(list(walk([Late(1.0)]))) == 1
    jax.tree_util.register_pytree_node(Late, flatten, lambda aux, items: Late(*items))
    late = Late(1.0, None)
    assert children(late) == {0: 1.0, 1: None}
    assert mirror(late, ["a", "b"]) == ("a", "b")
    assert rebuild(late, [2.0, 3.0]).items == (2.0, 3.0)
    assert type(fmap(lambda x: x, late)) is Late
    with pytest.raises(TypeError, match="immutable"):
        setkeypath_([late], (0, 1), 2)


def test_registration_is_by_exact_class(jax):
    class Base(Box):
        pass

    class Child(Base):
        pass

    jax.tree_util.register_pytree_node(Base, flatten, lambda aux, items: Base(*items))
    assert is_node(Base(1))
    assert not is_node(Child(1))


def test_keys_of_jax_are_names(jax):
    class Keyed(Box):
        pass

    jax.tree_util.register_pytree_with_keys(
        Keyed,
        lambda box: (
            [
                (jax.tree_util.GetAttrKey("w"), box.items[0]),
                (jax.tree_util.DictKey("b"), box.items[1]),
                (jax.tree_util.SequenceKey(7), box.items[2]),
            ],
            None,
        ),
        lambda aux, items: Keyed(*items),
    )
    assert children(Keyed(1, 2, None)) == {"w": 1, "b": 2, 7: None}
    assert mirror(Keyed(1, 2, 3), "abc") == ("a", "b", "c")


def test_keys_that_do_not_differ_are_replaced_by_positions(jax):
    class Same(Box):
        pass

    key = jax.tree_util.GetAttrKey("w")
    jax.tree_util.register_pytree_with_keys(
        Same,
        lambda box: ([(key, x) for x in box.items], None),
        lambda aux, items: Same(*items),
    )
    assert children(Same(1, 2)) == {0: 1, 1: 2}


def test_our_registration_goes_before_that_of_jax_and_jax_before_dataclass_fields(jax):
    @dataclasses.dataclass
    class Data:
        w: object
        name: str

    assert children(Data(1, "x")) == {"w": 1, "name": "x"}
    jax.tree_util.register_dataclass(Data, data_fields=["w"], meta_fields=["name"])
    assert children(Data(1, "x")) == {"w": 1}
    assert mirror(Data(1, "x"), [0]) == SimpleNamespace(w=0)
    assert rebuild(Data(1, "x"), [2]) == Data(2, "x")
    register_node(Data, children=("name",))
    assert children(Data(1, "x")) == {"name": "x"}
    register_leaf(Data)
    assert not is_node(Data(1, "x"))


def test_containers_are_ours_whatever_jax_says(jax):
    assert list(children({"b": 1, "a": None})) == ["b", "a"]
    assert list(walk(None)) == [(KeyPath(), None)]

    class Sorted(dict):
        pass

    jax.tree_util.register_pytree_node(
        Sorted, lambda d: (sorted(d.values()), None), lambda aux, values: Sorted()
    )
    assert children(Sorted(b=2, a=1)) == {"b": 2, "a": 1}
    assert rebuild(Sorted(b=2, a=1), [3, 4]) == {"b": 3, "a": 4}
    assert type(rebuild(Sorted(b=2), [3])) is Sorted


def test_a_node_of_jax_that_holds_itself_is_a_cycle(jax):
    class Loop(Box):
        pass

    jax.tree_util.register_pytree_node(Loop, flatten, lambda aux, items: Loop(*items))
    loop = Loop()
    loop.items = (1, loop)
    with pytest.raises(ValueError, match=r"at \[1\] is the one at \(root\)"):
        list(walk(loop))
    loop.items = ()


def test_ten_thousand_levels_of_jax_nodes(jax):
    class Deep(Box):
        pass

    jax.tree_util.register_pytree_node(Deep, flatten, lambda aux, items: Deep(*items))
    tree = 1
    for _ in range(10_000):
        tree = Deep(tree)
    new = fmap(lambda x: x + 1, tree)
    ((path, leaf),) = walk(new)
    assert (len(path), leaf) == (10_000, 2)


def test_partial_of_jax_is_a_node(jax):
    part = jax.tree_util.Partial(max, 1, key=None)
    assert [x for _, x in walk(part)] == [1, None]
    assert fmap(lambda x: x, part)(2) == 2


def test_arrays_of_jax(jax):
    jnp = jax.numpy
    for dtype in ("float32", "bfloat16", "float16", "complex64"):
        x = jnp.ones(2, dtype)
        assert isnumeric(x)
        assert not maywrite(x)
        assert not is_node(x)
    assert isnumeric(jnp.float32(1.0))
    for x in (jnp.arange(2), jnp.ones(2, bool), jax.random.key(0)):
        assert not isnumeric(x)
        assert not is_node(x)
    assert not isnumeric(np.zeros(2, jax.dtypes.float0))
    assert not maywrite(np.asarray(jnp.ones(2)))


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap", "jvp", "vjp_of_jit"])
def test_tracers_of_jax(jax, transform):
    seen = []

    def f(tree):
        for _, x in walk(tree):
            seen.append((isnumeric(x), maywrite(x), is_node(x)))
        return fmap(lambda x: x * 2, tree)["w"].sum()

    w = jax.numpy.ones((2, 2))
    tree = {"w": w}
    if transform == "jvp":
        jax.jvp(f, (tree,), (tree,))
    elif transform == "vjp_of_jit":
        jax.vjp(jax.jit(f), tree)
    else:
        getattr(jax, transform)(f)(tree)
    assert seen
    assert set(seen) == {(True, False, False)}


def test_integer_tracers_are_not_numeric(jax):
    seen = []
    jax.jit(lambda x: seen.append(isnumeric(x)) or x)(jax.numpy.arange(3))
    assert seen == [False]


# Equinox and Flax


def test_an_equinox_module_keeps_its_static_fields_out(jax, eqx):
    class Linear(eqx.Module):
        weight: object
        size: int = eqx.field(static=True)
        bias: object = None

        def __init__(self, size):
            self.weight, self.bias = np.ones(size), None
            self.size = size

    class Model(eqx.Module):
        layers: list
        name: str = eqx.field(static=True)

        def __check_init__(self):
            assert self.name != "rebuilt", "checked again"

    model = Model([Linear(2), Linear(3)], "mine")
    assert [str(path) for path, _ in walk(model)] == [
        "layers[0].weight",
        "layers[0].bias",
        "layers[1].weight",
        "layers[1].bias",
    ]
    new = fmap(lambda x: None if x is None else x * 2, model)
    assert isinstance(new, Model)
    assert new.name == "mine"
    assert new.layers[1].size == 3
    np.testing.assert_array_equal(new.layers[1].weight, [2, 2, 2])
    np.testing.assert_array_equal(model.layers[1].weight, [1, 1, 1])

    state = fold(model, lambda path, x: 0, lambda path, x, results: mirror(x, results))
    assert state.layers[1] == SimpleNamespace(weight=0, bias=0)
    setkeypath_(state, ("layers", 1, "bias"), 5)
    assert getkeypath(state, ("layers", 1, "bias")) == 5
    with pytest.raises(TypeError, match=r"cannot set 'weight' at layers\[0\]: Linear is immutable"):
        setkeypath_(model, ("layers", 0, "weight"), None)


def test_an_equinox_network_of_its_own_layers(jax, eqx):
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    arrays = [str(path) for path, x in walk(mlp) if isnumeric(x)]
    assert arrays == [
        "layers[0].weight",
        "layers[0].bias",
        "layers[1].weight",
        "layers[1].bias",
    ]
    new = fmap(lambda x: 0 * x if isnumeric(x) else x, mlp)
    assert float(new(jax.numpy.ones(2))[0]) == 0.0


def test_a_frozen_dict_of_flax(jax, flax):
    tree = flax.FrozenDict({"b": {"kernel": np.ones(2)}, "a": None})
    assert {str(path) for path, _ in walk(tree)} == {"['b']['kernel']", "['a']"}
    new = fmap(lambda x: None if x is None else x + 1, tree)
    assert type(new) is flax.FrozenDict
    np.testing.assert_array_equal(new["b"]["kernel"], [2, 2])
    assert getkeypath(tree, ("b", "kernel")) is tree["b"]["kernel"]
    state = mirror(tree, [0] * len(children(tree)))
    assert state == SimpleNamespace(a=0, b=0)
    with pytest.raises(TypeError, match="FrozenDict is immutable"):
        setkeypath_(tree, ("a",), 1)


def test_a_flax_struct(jax, flax):
    struct = pytest.importorskip("flax.struct")

    @struct.dataclass
    class Params:
        w: object
        name: str = struct.field(pytree_node=False, default="x")

    assert children(Params(1, "kept")) == {"w": 1}
    assert rebuild(Params(1, "kept"), [2]) == Params(2, "kept")


# optree


def everywhere(optree):
    return vars(optree.registry)["__GLOBAL_NAMESPACE"]


def test_the_global_namespace_of_optree_counts_and_no_other(optree):
    class Global(Box):
        pass

    class Local(Box):
        pass

    assert not is_node(Global(1))
    optree.register_pytree_node(
        Global, flatten, lambda aux, items: Global(*items), namespace=everywhere(optree)
    )
    optree.register_pytree_node(
        Local, flatten, lambda aux, items: Local(*items), namespace="elsewhere"
    )
    assert not is_node(Local(1))
    assert children(Global(1, None)) == {0: 1, 1: None}
    assert rebuild(Global(1, None), [2, 3]).items == (2, 3)
    assert mirror(Global(1, None), [2, 3]) == (2, 3)
    optree.unregister_pytree_node(Global, namespace=everywhere(optree))
    assert not is_node(Global(1))


def test_entries_of_optree_are_names_and_go_before_dataclass_fields(optree):
    @dataclasses.dataclass
    class Named:
        w: object
        label: str = "kept"

    optree.register_pytree_node(
        Named,
        lambda x: ((x.w,), x.label, ("w",)),
        lambda label, items: Named(*items, label),
        namespace=everywhere(optree),
    )
    assert children(Named(1)) == {"w": 1}
    assert rebuild(Named(1), [2]) == Named(2)
    assert mirror(Named(1), [0]) == SimpleNamespace(w=0)
    tree = [Named(1)]
    setkeypath_(tree, (0, "w"), 3)
    assert tree == [Named(3)]


def test_jax_goes_before_optree(jax, optree):
    class Both(Box):
        pass

    optree.register_pytree_node(
        Both, flatten, lambda aux, items: Both(*items), namespace=everywhere(optree)
    )
    assert children(Both(1, 2)) == {0: 1, 1: 2}
    jax.tree_util.register_pytree_node(
        Both, lambda box: (box.items[:1], None), lambda aux, items: Both(*items)
    )
    assert children(Both(1, 2)) == {0: 1}


def test_what_optree_itself_registers_is_a_node(optree):
    node = collections.deque([1, 2], maxlen=2)
    new = fmap(lambda x: x * 10, node)
    assert new == collections.deque([10, 20])
    assert new.maxlen == 2


# PyTorch, ml_dtypes, HIPS autograd, Numba


def test_tensors(torch):
    w = torch.ones(2, 3)
    for x in (
        w,
        w.to(torch.bfloat16),
        w.to(torch.complex64),
        torch.nn.Parameter(w),
        w.t(),
        w[:, ::2],
        torch.tensor(1.0),
        w.to_sparse(),
    ):
        assert isnumeric(x)
        assert maywrite(x)
        assert not is_node(x)
    assert not maywrite(w[:1].expand(4, 3))
    assert not isnumeric(torch.arange(3))
    assert not isnumeric(torch.ones(2, dtype=torch.bool))


def test_what_torch_returns_is_a_tuple(torch):
    result = torch.ones(2, 2).max(0)
    new = fmap(lambda x: x + 1, result)
    assert type(new) is type(result)
    assert new.values.tolist() == [2.0, 2.0]


def test_a_torch_module_is_a_leaf_unless_registered(torch):
    class Own(torch.nn.Module):
        pass

    assert not is_node(Own())
    assert not is_node(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "numeric"),
    [("bfloat16", True), ("float8_e4m3fn", True), ("float8_e5m2", True), ("int4", False)],
)
def test_ml_dtypes(name, numeric):
    dtype = getattr(pytest.importorskip("ml_dtypes"), name)
    assert isnumeric(np.zeros(2, dtype)) is numeric
    assert not isnumeric(np.zeros(2, dtype)[0])


def test_boxes_of_autograd(autograd):
    from autograd import numpy as anp

    seen = []

    def f(tree):
        for path, x in walk(tree):
            seen.append((str(path), isnumeric(x), maywrite(x), is_node(x)))
        new = fmap(lambda x: x * 2 if isnumeric(x) else x, tree)
        assert type(new) is dict
        assert type(new["l"]) is list
        assert type(new["t"]) is tuple
        return anp.sum(new["w"]) + anp.sum(new["l"][0]) + new["t"][0]

    tree = {"w": np.ones(2), "l": [np.ones(3)], "t": (np.array(1.0), 2.0)}
    grad = autograd.grad(f)(tree)
    assert seen == [
        ("['w']", True, False, False),
        ("['l'][0]", True, False, False),
        ("['t'][0]", True, False, False),
        ("['t'][1]", False, False, False),
    ]
    np.testing.assert_array_equal(grad["w"], [2, 2])
    np.testing.assert_array_equal(grad["l"][0], [2, 2, 2])
    assert float(grad["t"][0]) == 2.0
    assert float(grad["t"][1]) == 0.0


def test_boxes_within_boxes(autograd):
    seen = []

    def f(x):
        seen.append(isnumeric(x))
        return (x**3).sum()

    second = autograd.elementwise_grad(autograd.grad(f))(np.ones(2))
    assert seen == [True]
    np.testing.assert_array_equal(second, [6, 6])


def test_boxes_of_integers_are_not_numeric(autograd):
    from autograd.numpy.numpy_boxes import ArrayBox
    from autograd.tracer import new_box

    assert type(new_box(np.arange(2), 0, None)) is ArrayBox
    assert not isnumeric(new_box(np.arange(2), 0, None))
    assert not isnumeric(new_box(2.0, 0, None))


def test_device_arrays_of_numba_in_the_simulator():
    pytest.importorskip("numba")
    code = """
import numpy as np
from numba import cuda
from optimisers._arrays.library import isnumeric, maywrite
from optimisers._trees.nodes import is_node
x = cuda.to_device(np.ones((2, 3), np.float32))
assert isnumeric(x) and maywrite(x) and not is_node(x), type(x).__mro__
assert not isnumeric(cuda.to_device(np.arange(2)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_arrays_of_cupy_by_their_class(monkeypatch):
    class ndarray:  # noqa: N801
        def __init__(self, like):
            self.shape, self.strides, self.dtype = like.shape, like.strides, like.dtype

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=ndarray))
    x = np.ones((2, 3), np.float32)
    assert isnumeric(ndarray(x))
    assert maywrite(ndarray(x))
    assert not is_node(ndarray(x))
    assert not isnumeric(ndarray(x.astype(int)))
    assert not maywrite(ndarray(np.broadcast_to(x, (4, 2, 3))))


def test_no_library_is_imported():
    code = """
import sys
from optimisers import fmap, isnumeric, maywrite
import numpy as np
class A: pass
fmap(lambda x: isnumeric(x) or maywrite(x), {"a": [np.ones(1), A(), 1.0]})
found = {"jax", "torch", "optree", "autograd", "cupy", "numba", "ml_dtypes"} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
