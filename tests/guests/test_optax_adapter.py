"""Our rules inside optax, and optax's transformations as rules: the same trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from jax import numpy as jnp  # noqa: E402
from util import UNMEASURED, decomposes, name_of, parametrize, variants  # noqa: E402

import optimisers as opt  # noqa: E402
from optimisers.optax import RuleState, from_optax, to_optax  # noqa: E402

Tree = Any

RULES = [rule for cls in UNMEASURED for rule in variants(cls)]
CHAINS = [
    opt.MixedPrecision("float64", opt.OptimiserChain(opt.AccumGrad(2), opt.Adam(0.05))),
    opt.OptimiserChain(),
    opt.OptimiserChain(opt.ClipNorm(0.5), opt.WeightDecay(0.1), opt.Adam(0.05)),
    opt.OptimiserChain(opt.AccumGrad(2), opt.OptimiserChain(opt.SignDecay(0.1), opt.Momentum(0.1))),
]


@pytest.fixture(autouse=True)
def in_double() -> Any:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def model(dtype: Any = np.float64) -> dict[str, Any]:
    draw = np.random.default_rng(7)
    return {
        "layers": [
            {"w": draw.normal(size=(3, 2)).astype(dtype), "b": draw.normal(size=2).astype(dtype)}
        ],
        "scale": np.array(1.5, dtype),
    }


def gradients(steps: int, dtype: Any = np.float64) -> list[Tree]:
    draw = np.random.default_rng(8)
    like = model()
    return [
        jax.tree.map(lambda x: draw.normal(size=x.shape).astype(dtype), like) for _ in range(steps)
    ]


def as_jax(tree: Tree) -> Tree:
    return jax.tree.map(jnp.asarray, tree)


def by_optax(tx: Any, params: Tree, grads: list[Tree], jit: bool = True) -> Tree:
    params = as_jax(params)
    state = tx.init(params)

    def step(params: Tree, state: Tree, grad: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    for grad in grads:
        params, state = step(params, state, as_jax(grad))
    return params


def by_us(rule: Any, model: Tree, grads: list[Tree]) -> Tree:
    state = opt.setup(rule, model)
    for grad in grads:
        state, model = opt.update(state, model, grad)
    return model


def assert_close(got: Tree, expected: Tree, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


# --- to_optax --------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@parametrize("rule", [*RULES, *CHAINS])
def test_a_rule_in_optax_goes_where_it_goes_here(rule: Any, jit: bool) -> None:
    grads = gradients(5)
    loose = {"rtol": 1e-6, "atol": 1e-7} if isinstance(rule, opt.MixedPrecision) else {}
    if decomposes(rule):  # optax rounds the parameter otherwise, and eigenvectors magnify that
        loose = {"rtol": 1e-9, "atol": 1e-11}
    assert_close(
        by_optax(to_optax(rule), model(), grads, jit), by_us(rule, model(), grads), **loose
    )


@parametrize("rule", [opt.Adam(0.1), opt.Lion(0.1), CHAINS[2]])
def test_in_single_precision(rule: Any) -> None:
    jax.config.update("jax_enable_x64", False)
    grads = gradients(8, np.float32)
    got = by_optax(to_optax(rule), model(np.float32), grads)
    assert_close(got, by_us(rule, model(np.float32), grads), 2e-6, 1e-6)


def test_mixed_precision_follows_its_master_copy() -> None:
    rule = opt.MixedPrecision(opt.Descent(2.0**-12))
    x = jnp.ones(3, jnp.bfloat16)
    tx = to_optax(rule)
    state = tx.init(x)
    for _ in range(64):  # each step alone is too small for bfloat16
        updates, state = tx.update(jnp.ones(3), state, x)
        x = optax.apply_updates(x, updates)
    assert x.dtype == jnp.bfloat16
    assert (x == jnp.bfloat16(1 - 2.0**-6)).all()
    assert (state.leaves.master == 1 - 2.0**-6).all()


@dataclass(frozen=True)
class DecayDescent(opt.Rule):
    eta: float = 0.1

    def init(self, x: Any) -> Any:
        return 1

    def apply(self, state: Any, x: Any, dx: Any, *higher: Any) -> Any:
        return state + 1, dx * (self.eta / state**0.5)


def test_a_users_rule_goes_too() -> None:
    grads = gradients(5)
    assert_close(
        by_optax(to_optax(DecayDescent()), model(), grads), by_us(DecayDescent(), model(), grads)
    )


def test_arguments_for_other_transformations_are_passed_over() -> None:
    params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, -1.0])}
    extra = {"value": 1.0, "grad": grads, "value_fn": lambda p: 1.0}
    tx = to_optax(opt.Adam(0.1))
    plain, _ = tx.update(grads, tx.init(params), params)
    found, _ = tx.update(grads, tx.init(params), params, **extra)
    np.testing.assert_array_equal(found["w"], plain["w"])
    together = optax.chain(tx, optax.scale(2.0))
    found, _ = together.update(grads, together.init(params), params, **extra)
    np.testing.assert_array_equal(found["w"], 2 * plain["w"])


def test_in_a_chain_with_optax() -> None:
    grads = gradients(5)
    ours = optax.chain(optax.clip_by_global_norm(0.3), to_optax(opt.Adam(0.01)))
    theirs = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.01))
    assert_close(by_optax(ours, model(), grads), by_optax(theirs, model(), grads))


def test_hyperparameters_are_scheduled_by_optax() -> None:
    grads = gradients(6)
    schedule = optax.linear_schedule(0.1, 0.01, 4)
    ours = optax.inject_hyperparams(lambda eta: to_optax(opt.Adam(eta)))(eta=schedule)
    theirs = optax.adam(schedule)
    assert_close(by_optax(ours, model(), grads), by_optax(theirs, model(), grads), rtol=1e-7)


def test_in_a_scan() -> None:
    tx = to_optax(opt.NAdam(0.1))
    x = jnp.array([1.0, -2.0])

    def step(carry: Any, _: Any) -> Any:
        x, state = carry
        updates, state = tx.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    _, xs = jax.lax.scan(step, (x, tx.init(x)), length=4)
    state = opt.setup(opt.NAdam(0.1), np.array(x))
    y = np.array(x)
    for k in range(4):
        state, y = opt.update(state, y, 2 * y)
        np.testing.assert_allclose(xs[k], y, rtol=1e-12)


def test_some_parameters_by_one_rule_and_some_by_another() -> None:
    params = as_jax(model())
    labels = {"layers": [{"w": "ours", "b": "theirs"}], "scale": "ours"}
    tx = optax.multi_transform(
        {"ours": to_optax(opt.Descent(0.5)), "theirs": optax.sgd(0.25)}, labels
    )
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    assert (updates["layers"][0]["w"] == -0.5).all()
    assert (updates["layers"][0]["b"] == -0.25).all()


def test_no_gradient_is_no_step() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "n": jnp.arange(3)}
    tx = to_optax(opt.Momentum(0.1))
    state = tx.init(params)
    assert isinstance(state, RuleState)
    updates, new = tx.update({"a": jnp.ones(2), "b": None, "n": None}, state, params)
    assert (updates["a"] == -0.1).all()
    assert (updates["b"] == 0).all()
    assert (new.leaves["b"].v == state.leaves["b"].v).all()
    params = optax.apply_updates(params, updates)
    assert params["n"].dtype == jnp.arange(3).dtype
    assert (params["n"] == jnp.arange(3)).all()


def test_what_does_not_fit_is_refused() -> None:
    params = {"w": jnp.ones(2)}
    tx = to_optax(opt.Adam())
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"\['w'\].*shape \(2,\).*got shape \(3,\)"):
        tx.update({"w": jnp.ones(3)}, state, params)
    with pytest.raises(TypeError, match=r"\['w'\].*Rprop"):
        to_optax(opt.Rprop()).init({"w": jnp.ones(2, complex)})
    with pytest.raises(TypeError, match=r"write Adam\(\)"):
        to_optax(opt.Adam)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rule of this library"):
        to_optax(optax.adam(0.1))


# --- from_optax ------------------------------------------------------------------------------

THEIRS = {
    "adam": lambda: optax.adam(0.05),
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(0.01),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.05),
    "chain": lambda: optax.chain(optax.trace(0.5), optax.scale(-0.1)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 5)),
}


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", THEIRS)
def test_an_optax_transformation_goes_where_it_goes_there(name: str, dtype: Any, of: Any) -> None:
    grads, start = gradients(6, dtype), jax.tree.map(of, model(dtype))
    got = by_us(from_optax(THEIRS[name]()), start, grads)
    assert {type(x) for x in jax.tree.leaves(got)} == {type(x) for x in jax.tree.leaves(start)}
    rtol, atol = (1e-12, 1e-14) if dtype is np.float64 else (1e-5, 1e-6)
    assert_close(got, by_optax(THEIRS[name](), model(dtype), grads), rtol, atol)


def test_numpy_keeps_double_precision_where_jax_does_not() -> None:
    grads = gradients(4)
    expected = by_optax(optax.adam(0.05), model(), grads)
    jax.config.update("jax_enable_x64", False)
    got = by_us(from_optax(optax.adam(0.05)), model(), grads)
    assert_close(got, jax.tree.map(np.asarray, expected))


def test_in_place_over_numpy() -> None:
    x = np.array([1.0, 2.0])
    state = opt.setup(from_optax(optax.chain(optax.sgd(0.5), optax.ema(0.5))), x)
    expected = by_optax(optax.chain(optax.sgd(0.5), optax.ema(0.5)), x.copy(), [np.ones(2)] * 5)
    for _ in range(5):
        state, y = opt.update_(state, x, np.ones(2))
        assert y is x
    np.testing.assert_allclose(x, expected, rtol=1e-14)


def test_state_shares_no_memory_with_numpy_parameters() -> None:
    def keep(x: Any) -> Any:
        return x

    tx = optax.GradientTransformation(keep, lambda g, s, x: (g, s))  # keeps the first parameter
    x = np.ones(1024)
    state = opt.setup(from_optax(tx), x)
    state, _ = opt.update_(state, x, np.ones(1024))
    assert (x == 2).all()
    assert (state.state == 1).all()


@parametrize("cls", [opt.Descent, opt.Adam, opt.Lion, opt.AdaBelief])
def test_there_and_back(cls: Any) -> None:
    grads = gradients(5)
    rule = cls(0.05)
    assert_close(by_us(from_optax(to_optax(rule)), model(), grads), by_us(rule, model(), grads))
    tx = optax.adam(0.05)
    assert_close(by_optax(to_optax(from_optax(tx)), model(), grads), by_optax(tx, model(), grads))


def test_in_a_chain_of_ours() -> None:
    grads = gradients(5)
    ours = opt.OptimiserChain(opt.WeightDecay(0.1), from_optax(optax.adam(0.05)))
    assert_close(
        by_us(ours, model(), grads),
        by_us(opt.OptimiserChain(opt.WeightDecay(0.1), opt.Adam(0.05)), model(), grads),
    )


def test_a_rule_sees_one_array_at_a_time() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    x = {"a": np.zeros(1), "b": np.zeros(1)}
    got = by_us(from_optax(tx), x, [{"a": np.array([3.0]), "b": np.array([4.0])}])
    np.testing.assert_allclose([got["a"], got["b"]], [[-1.0], [-1.0]])
    flat, re = opt.destructure(x)  # over which it is the whole tree
    flat = by_us(from_optax(tx), flat, [np.array([3.0, 4.0])])
    np.testing.assert_allclose(re(flat)["b"], [-0.8])


def test_what_is_no_transformation_is_refused() -> None:
    with pytest.raises(TypeError, match=r"write optax.adam\(...\)"):
        from_optax(optax.adam)
    with pytest.raises(TypeError, match=r"at \[0\].*computes with JAX"):
        opt.setup(from_optax(optax.sgd(0.1)), [np.zeros(2, np.longdouble)])
    with pytest.raises(TypeError, match="no rule here has the field 'eta'"):
        opt.adjust(opt.setup(from_optax(optax.sgd(0.1)), np.zeros(2)), 0.1)


def test_it_shows_what_it_is_and_is_not_in_the_registry() -> None:
    rule = from_optax(optax.sgd(0.1))
    assert repr(rule).startswith("from_optax(GradientTransformation")
    assert hash(rule) == hash(from_optax(rule.tx))
    assert not any("Optax" in name_of(cls) for cls in UNMEASURED)


@pytest.mark.parametrize("name", ["lbfgs", "polyak_sgd"])
def test_a_transformation_that_asks_for_the_value_is_refused_in_setup(name):
    rule = from_optax(getattr(optax, name)())
    with pytest.raises(TypeError, match=r"root.*asks for more than a gradient.*value"):
        opt.setup(rule, jnp.zeros(4))


# --- random numbers ---------------------------------------------------------------------------

NOISE = {
    "noise": lambda: optax.add_noise(0.1, 0.5, 3),
    "chain": lambda: optax.chain(optax.scale(2.0), optax.add_noise(0.1, 0.5, 3)),
    "injected": lambda: optax.inject_hyperparams(_noisy)(eta=0.1),
    "bare key": lambda: keyed(lambda: jax.random.PRNGKey(3)),
    "typed key": lambda: keyed(lambda: jax.random.key(3)),
}


def _noisy(eta: float) -> Any:
    return optax.chain(optax.add_noise(0.1, 0.5, 3), optax.scale(eta))


def keyed(make: Any) -> Any:
    """Return a transformation of noise alone, with a key in its state."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        key, own = jax.random.split(state["rng_key"])
        leaves, structure = jax.tree.flatten(grads)
        keys = jax.random.split(own, len(leaves))
        drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return structure.unflatten(drawn), {"rng_key": key}

    return optax.GradientTransformation(lambda params: {"rng_key": make()}, update)


@parametrize("name", [*NOISE])
@parametrize("around", [lambda rule: rule, opt.OptimiserChain, opt.MixedPrecision])
def test_each_array_has_random_numbers_of_its_own(name: str, around: Any) -> None:
    model = {"a": jnp.zeros(100), "b": [jnp.zeros(100), jnp.zeros(3), np.zeros(100, np.float32)]}
    state = opt.setup(around(opt.optax.from_optax(NOISE[name]())), model)
    zeros = jax.tree.map(jnp.zeros_like, model)
    for _ in range(2):
        state, new = opt.update(state, model, zeros)
        steps = [np.asarray(new["a"]), np.asarray(new["b"][0]), np.asarray(new["b"][2])]
        assert np.abs(np.corrcoef(steps) - np.eye(3)).max() < 0.5
    again = opt.setup(around(opt.optax.from_optax(NOISE[name]())), model)
    for _ in range(2):
        again, twin = opt.update(again, model, zeros)
    assert np.array_equal(twin["b"][0], new["b"][0])


def test_one_array_has_the_random_numbers_of_optax() -> None:
    x = jnp.zeros(5)
    tx = NOISE["chain"]()
    updates, _ = tx.update(x, tx.init(x), x)
    _, new = opt.update(opt.setup(opt.optax.from_optax(tx), x), x, x)
    np.testing.assert_allclose(new, x + updates, rtol=1e-6)


def test_random_numbers_from_a_hidden_key_are_told_of() -> None:
    def update(grads: Any, state: Any, params: Any = None) -> Any:
        key = jax.random.fold_in(jax.random.key(0), state)
        return jax.tree.map(lambda g: g + jax.random.normal(key, g.shape), grads), state + 1

    tx = optax.GradientTransformation(lambda params: jnp.zeros((), int), update)
    with pytest.warns(UserWarning, match="random numbers from a key") as seen:
        opt.setup(opt.optax.from_optax(tx), [jnp.zeros(2), jnp.zeros(2), jnp.zeros(2)])
    assert len(seen) == 1
    assert seen[0].filename == __file__
    opt.setup(opt.optax.from_optax(tx), [jnp.zeros(2)])
    opt.setup(opt.optax.from_optax(optax.adam(0.1)), [jnp.zeros(2), jnp.zeros(2)])


def test_a_rule_is_told_the_number_of_its_parameter() -> None:
    @dataclass(frozen=True)
    class Numbered(opt.Rule):
        def init(self, x: Any, *, index: int = 0) -> Any:
            return index

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, dx

    w = np.ones(2)
    model = {"a": w, "b": [np.ones(1), w], "c": np.ones(3)}
    state = opt.setup(opt.OptimiserChain(opt.MixedPrecision(Numbered()).rule), model)
    found = [state["a"].state[0], state["b"][0].state[0], state["b"][1].state[0]]
    assert [*found, state["c"].state[0]] == [0, 1, 0, 2]
    assert opt.setup(opt.MixedPrecision(Numbered()), model)["c"].state.state == 2
    tx = opt.optax.to_optax(Numbered())
    assert tx.init({"a": jnp.ones(1), "b": jnp.ones(1)}).leaves == {"a": 0, "b": 1}
