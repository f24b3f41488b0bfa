"""Arrays of a library that the package has no file for: the array API standard is enough.

array_api_strict knows nothing beyond the standard, mixes with no other library, and has no memory
that anybody could write into. `Library` itself answers for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

xp = pytest.importorskip("array_api_strict")

from util import (  # noqa: E402
    ALONE,
    EVERY_ELEMENTWISE,
    EXACT_CHAINS,
    assert_same_bits,
    by_arrays,
    example,
    normal,
    parametrize,
)

from optimisers import (  # noqa: E402
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    MixedPrecision,
    OptimiserChain,
    WeightDecay,
    adjust,
    destructure,
    minimize,
    setup,
    trainables,
    update,
    update_,
)
from optimisers._arrays import library  # noqa: E402
from optimisers.io import load, save  # noqa: E402

BOTH = pytest.mark.parametrize("call", [update, update_])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def strict(a: np.ndarray) -> Any:
    """Return an array of NumPy as one of the library."""
    return xp.asarray(a, copy=True)


def on_numpy(tree: Any) -> Any:
    """Return what a rule keeps, or a parameter, with arrays of NumPy."""
    if isinstance(tree, tuple):
        parts = [on_numpy(part) for part in tree]
        return type(tree)._make(parts) if hasattr(tree, "_make") else tuple(parts)
    if library.is_array(tree):
        assert type(tree) is type(strict(np.zeros(1)))
        return np.asarray(tree)
    return tree


def check_steps(rule: Any, dtype: Any, call: Any) -> None:
    """Take steps on arrays of the library, and compare with NumPy's array path."""
    model = {"w": normal((3, 4), dtype), "b": normal((), dtype, 1)}
    theirs = {k: strict(x) for k, x in model.items()}
    state = setup(rule, theirs)
    kept = {k: leaf.state for k, leaf in setup(rule, model).items()}
    for seed in range(4):
        grad = {k: normal(x.shape, dtype, 7 + seed) for k, x in model.items()}
        state, theirs = call(state, theirs, {k: strict(g) for k, g in grad.items()})
        for k, g in grad.items():
            kept[k], model[k] = by_arrays(rule, kept[k], model[k], g)
            assert_same_bits(np.asarray(theirs[k]), model[k])
            assert_same_bits(on_numpy(state[k].state), kept[k])


def test_no_file_is_needed() -> None:
    x = strict(np.ones(3))
    assert type(library.library_of(x)) is library.Library
    assert library.isnumeric(x)
    assert not library.isnumeric(xp.asarray([1, 2]))
    assert not library.maywrite(x)


@BOTH
@DTYPES
@parametrize("rule", EVERY_ELEMENTWISE)
def test_elementwise_rules_have_the_bits_of_numpy(rule: Any, dtype: Any, call: Any) -> None:
    check_steps(rule, dtype, call)


@BOTH
@parametrize("rule", [*EXACT_CHAINS, *map(example, ALONE), ClipNorm(0.5, 0), ClipNorm(0.5, 3)])
def test_rules_of_rules_have_the_bits_of_numpy(rule: Any, call: Any) -> None:
    check_steps(rule, np.float64, call)


@parametrize("rule", [Adam(), OptimiserChain(ClipNorm(1.0), Descent(0.1)), AccumGrad(2)])
def test_complex_parameters_have_the_bits_of_numpy(rule: Any) -> None:
    model = {"w": normal((3,), np.complex128)}
    theirs = {"w": strict(model["w"])}
    state, kept = setup(rule, theirs), setup(rule, model)["w"].state
    for seed in range(2):
        g = normal((3,), np.complex128, seed)
        state, theirs = update(state, theirs, {"w": strict(g)})
        kept, model["w"] = by_arrays(rule, kept, model["w"], g)
        assert_same_bits(np.asarray(theirs["w"]), model["w"])


@BOTH
def test_nothing_that_is_given_changes(call: Any) -> None:
    model, g = {"w": strict(np.ones(3))}, strict(np.full(3, 0.5))
    state = setup(AccumGrad(2), model)
    state, new = call(state, model, {"w": g})
    state, new = call(state, new, {"w": g})
    np.testing.assert_array_equal(np.asarray(model["w"]), np.ones(3))
    np.testing.assert_array_equal(np.asarray(g), np.full(3, 0.5))
    np.testing.assert_array_equal(np.asarray(new["w"]), np.full(3, 0.5))


def test_gradients_of_numpy_are_taken() -> None:
    model = {"w": strict(np.ones(3))}
    state = setup(Descent(1.0), model)
    _, new = update(state, model, {"w": np.full(3, 0.25, np.float32)})
    assert type(new["w"]) is type(model["w"])
    np.testing.assert_array_equal(np.asarray(new["w"]), np.full(3, 0.75))


@pytest.mark.parametrize(
    ("g", "error", "text"),
    [
        (np.ones(2), ValueError, r"expected an array of shape \(3,\).*got shape \(2,\)"),
        (np.ones(3, complex), TypeError, "got complex numbers"),
        ([1.0, 2.0, 3.0], TypeError, r"gradient at \['w'\]"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(g: Any, error: Any, text: str) -> None:
    model = {"w": strict(np.ones(3))}
    if isinstance(g, np.ndarray):
        g = strict(g)
    with pytest.raises(error, match=text):
        update(setup(Adam(), model), model, {"w": g})


def test_gradients_that_are_not_finite_are_seen() -> None:
    model = {"w": strict(np.ones(3))}
    state = setup(Adam(), model)
    g = {"w": strict(np.array([1.0, np.nan, 0.0]))}
    with pytest.raises(FloatingPointError, match=r"\['w'\]"):
        update(state, model, g, on_nonfinite="raise")
    state, new = update(state, model, g, on_nonfinite="skip")
    assert state["w"].skipped == 1
    np.testing.assert_array_equal(np.asarray(new["w"]), np.ones(3))


def test_ties_are_of_one_object() -> None:
    w = strict(np.ones(2))
    model = {"a": w, "b": w}
    assert len(trainables(model)) == 1
    g = strict(np.array([1.0, 2.0]))
    _, new = update(setup(Descent(1.0), model), model, {"a": g, "b": g})
    assert new["a"] is new["b"]
    np.testing.assert_array_equal(np.asarray(new["a"]), [-1.0, -3.0])


def test_flat_vectors() -> None:
    model = {"a": strict(np.array([[1.0, 2.0]])), "b": strict(np.array(3.0)), "n": 4}
    flat, re = destructure(model)
    assert type(flat) is type(model["a"])
    np.testing.assert_array_equal(np.asarray(flat), [1.0, 2.0, 3.0])
    again = re(flat * 2)
    np.testing.assert_array_equal(np.asarray(again["a"]), [[2.0, 4.0]])
    assert again["b"].shape == ()
    gradient = re.flatten_gradient({"a": model["a"]})
    np.testing.assert_array_equal(np.asarray(gradient), [1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="cannot be written"):
        re.copy_into_(model, flat)


def test_files(tmp_path: Any) -> None:
    model = {"w": strict(normal((2, 3)))}
    state = setup(Adam(), model)
    state, model = update(state, model, {"w": strict(normal((2, 3), seed=1))})
    save(tmp_path / "it.safetensors", {"model": model, "state": state})
    found = load(tmp_path / "it.safetensors", like={"model": model, "state": state})
    assert type(found["model"]["w"]) is type(model["w"])
    assert_same_bits(on_numpy(found["model"]["w"]), on_numpy(model["w"]))
    assert_same_bits(on_numpy(found["state"]["w"].state), on_numpy(state["w"].state))
    g = {"w": strict(normal((2, 3), seed=2))}
    assert_same_bits(
        on_numpy(update(found["state"], found["model"], g)[1]["w"]),
        on_numpy(update(state, model, g)[1]["w"]),
    )


def test_other_ways_to_use_a_state() -> None:
    model = {"w": strict(np.ones(3))}
    state = adjust(setup(OptimiserChain(WeightDecay(0.1), Adam()), model), eta=0.5)
    assert state["w"].rule.rules[1].eta == 0.5
    mixed = setup(MixedPrecision(np.float64, Adam()), {"w": strict(np.ones(3, np.float32))})
    assert mixed["w"].state.master.dtype == xp.float64

    def both(model: Any) -> Any:
        return float(xp.sum(model["w"] ** 2)), {"w": 2 * model["w"]}

    new, *_ = minimize(both, model, Descent(0.25), 3, progress=False)
    np.testing.assert_array_equal(np.asarray(new["w"]), np.full(3, 0.125))


def test_a_library_with_a_class_of_its_own_comes_first() -> None:
    """The way of the files in `_arrays`: what is registered answers for what it owns."""

    class Strict(library.Library):
        key, name, asked = "array_api_strict", "array-api-strict", 0

        def owns(self, cls: type) -> bool:
            return cls is type(strict(np.zeros(1)))

        def full_like(self, x: Any, value: Any) -> Any:
            self.asked += 1
            return super().full_like(x, value)

    known = dict(library._libraries)
    try:
        own = Strict()
        library.register(own)
        assert library.library_of(strict(np.ones(1))) is own
        assert library.library_of(np.ones(1)) is not own
        check_steps(Adam(), np.float64, update)
        assert own.asked > 0
    finally:
        library._libraries.clear()
        library._libraries.update(known)
        library._by_class.clear()
    assert library.library_of(strict(np.ones(1))) is not own
