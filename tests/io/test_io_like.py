"""Files loaded into trees that are given, and what cannot be saved."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved import Decayed, assert_equal, there_and_back
from util import arrays_in, normal

from optimisers import Adam, ClipNorm, Descent, Leaf, Momentum, OptimiserChain, fmap, functor, setup
from optimisers.io import load, save

pytestmark = pytest.mark.elsewhere


@functor
class Layer:
    def __init__(self, n, m, act=None):
        self.weight, self.bias = normal((n, m)).astype(np.float32), np.zeros(m)
        self.act = act


@dataclass
class Net:
    layers: list
    scale: Any
    steps: int = 0


def net(n: int = 2) -> Net:
    return Net([Layer(n, 3), Layer(3, 2)], normal(()), steps=3)


def test_objects_are_filled_and_those_given_stay(path: Path) -> None:
    model = net()
    state = setup(Adam(), model)
    save(path, state, model)
    like_model = fmap(lambda x: np.zeros_like(x) if isinstance(x, np.ndarray) else x, model)
    like_model.steps = 0
    like_state = setup(Adam(eta=7), like_model)
    got_state, got = load(path, like=(like_state, like_model))
    assert type(got) is Net
    assert type(got.layers[0]) is Layer
    assert got.steps == 3
    assert_equal([*arrays_in(got)], [*arrays_in(model)])
    assert_equal(got_state, state)
    assert not like_model.layers[0].weight.any()
    assert like_state.layers[0].weight.rule.eta == 7
    assert_equal(load(path, like=like_state), state)


def test_objects_need_like_and_the_error_names_them(path: Path) -> None:
    model = net()
    save(path, setup(Adam(), model), model)
    with pytest.raises(ValueError, match=rf"(?s)  model: {__name__}:Net\n.*like=\(state, model\)"):
        load(path)
    save(path, None, {"a": [net().layers[0]], "d": defaultdict(list, x=1)})
    layer = rf"model\['a'\]\[0\]: {__name__}:Layer\n.*model\['d'\]: coll"
    with pytest.raises(ValueError, match=layer):
        load(path)


def test_every_difference_is_named(path: Path) -> None:
    w = np.ones((2, 2))
    model = {
        "shape": np.ones((2, 3)), "dtype": np.ones(2), "gone": np.ones(1), "kind": [1.0],
        "array": np.ones(1), "tied": w, "to": w, "apart": np.ones(2), "from": np.ones(2),
        "list": [np.ones(1), np.ones(2)], "text": "a",
    }  # fmt: skip
    save(path, setup(Adam(), model), model)
    v = np.ones(2)
    like = {
        "shape": np.ones((3, 2)), "dtype": np.ones(2, np.float32), "new": {"x": 1}, "kind": (1.0,),
        "array": None, "tied": w, "to": w.copy(), "apart": v, "from": v,
        "list": [np.ones(1)], "text": print,
    }  # fmt: skip
    like_state = setup(Adam(), like)
    like_state["list"][0] = Leaf(Momentum(), ())
    before = repr(like)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load(path, like=(like_state, like))
    text = str(caught.value)
    for line in (
        "model['shape']: the file has shape (2, 3), `like` (3, 2)",
        "model['dtype']: the file has dtype float64, `like` float32",
        "model['gone']: the file has an array of shape (1,), `like` has nothing",
        "model['new']: the file has nothing, `like` has a dict",
        "model['kind']: the file has a list, `like` has a tuple",
        "model['array']: the file has an array of shape (1,), `like` has None",
        "model['list'][1]: the file has an array of shape (2,), `like` has nothing",
        "model['text']: the file has 'a', `like` has <built-in function print>",
        "model['tied'] and model['to'] are tied in the file and separate in `like`",
        "model['apart'] and model['from'] are tied in `like` and separate in the file",
        "state['shape'].state.m: the file has shape (2, 3), `like` (3, 2)",
        "state['dtype'].state.v: the file has dtype float64, `like` float32",
        "state['tied'] and state['to'] are tied in the file and separate in `like`",
        "state['apart'] and state['from'] are tied in `like` and separate in the file",
    ):
        assert f"  {line}\n" in f"{text}\n", line
    assert "state['list'][0]: the file has the rule Adam(" in text
    assert "`like` has Momentum(" in text
    assert repr(like) == before


def test_numbers_of_a_rule_are_those_of_the_file_and_its_class_must_fit(path: Path) -> None:
    x = np.ones(2)
    chain = OptimiserChain(ClipNorm(), Adam(eta=0.5))
    save(path, setup(chain, x))
    assert load(path, like=setup(OptimiserChain(ClipNorm(2.0), Adam()), x)).rule == chain
    with pytest.raises(ValueError, match="rule"):
        load(path, like=setup(OptimiserChain(Adam(), ClipNorm()), x))
    with pytest.raises(ValueError, match="rule"):
        load(path, like=setup(Adam(), x))


def test_what_like_is_for_state_alone_or_for_a_pair(path: Path) -> None:
    model = (np.ones(2), "text")  # its state is a pair too
    state = setup(Descent(), model)
    save(path, state, model)
    assert_equal(load(path, like=state), state)
    assert_equal(load(path, like=(state, model)), (state, model))
    model = (np.ones(2), np.ones(3))
    state = setup(Descent(), model)
    save(path, state, model)
    assert_equal(load(path, like=state), state)
    save(path, state)
    assert_equal(load(path, like=state), state)
    save(path, setup(Descent(), [np.ones(2)]))
    with pytest.raises(ValueError, match="holds no model"):
        load(path, like=(state, model))


def test_functions_are_refused_or_left_out(path: Path) -> None:
    model = {"w": np.ones(2), "act": np.tanh, "cls": Layer}
    with pytest.raises(TypeError, match=r"ufunc at model\['act'\].*leave_out=True"):
        save(path, None, model)
    assert not Path(path).exists()
    save(path, None, model, leave_out=True)
    with pytest.raises(ValueError, match=r"model\['act'\]: ufunc <ufunc 'tanh'>"):
        load(path)
    _, got = load(path, like=(None, {"w": np.zeros(2), "act": np.sin, "cls": int}))
    assert got["act"] is np.sin
    assert_equal(got["w"], model["w"])


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (np.array(["a"]), "dtype <U1"),
        (np.array([None]), "dtype object"),
        (np.zeros(2, [("a", "f4")]), "dtype"),
        (np.array(["2020-01-01"], "M8[D]"), "dtype datetime64"),
        (np.ma.masked_array([1.0], [True]), "np.asarray"),
        ({(1, 2): 3}, "key"),
        ({1.5: 3}, "key"),
        (object(), "object"),
        (slice(None), "slice"),
    ],
)
def test_what_cannot_be_saved_is_named(thing: Any, said: str, path: Path) -> None:
    save(path, {"old": 1})
    with pytest.raises(TypeError, match=rf"state\['a'\]\[1\].*{said}"):
        save(path, {"a": [0, thing]})
    assert load(path) == {"old": 1}


def test_a_rule_with_a_function_is_refused_by_path(path: Path) -> None:
    state = setup(OptimiserChain(Decayed(weights=[np.tanh])), {"x": np.ones(2)})
    with pytest.raises(TypeError, match=r"ufunc at state\['x'\].rule.rules\[0\].weights\[0\]"):
        save(path, state)


def test_rules_in_rules_are_kept_up_to_a_depth_that_can_be_read(path: Path) -> None:
    rule: Any = Adam()
    for _ in range(30):
        rule = OptimiserChain(rule)
    assert there_and_back(path, setup(rule, np.ones(1))).rule == rule
    for _ in range(100):
        rule = OptimiserChain(rule)
    with pytest.raises(TypeError, match="rules 100 deep"):
        save(path, setup(rule, np.ones(1)))


def test_a_tree_that_contains_itself_is_refused(path: Path) -> None:
    tree: list[Any] = [1]
    tree.append(tree)
    with pytest.raises(ValueError, match="contains itself"):
        save(path, tree)
