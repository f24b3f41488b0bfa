"""Rules as methods of `scipy.optimize.minimize`, held to SciPy's conventions."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest

scipy_optimize = pytest.importorskip("scipy.optimize")

from scipy.optimize import (  # noqa: E402
    Bounds,
    LinearConstraint,
    OptimizeResult,
    OptimizeWarning,
    basinhopping,
    minimize,
    rosen,
    rosen_der,
)
from util import PUBLIC, parametrize  # noqa: E402

import optimisers as opt  # noqa: E402
from optimisers.scipy import method  # noqa: E402

ADAM = method(opt.Adam(0.05))
CENTRE = np.array([3.0, -1.0, 2.0])


def bowl(x: Any) -> Any:
    return np.sum((x - CENTRE) ** 2)


def bowl_gradient(x: Any) -> Any:
    return 2 * (x - CENTRE)


def both(x: Any) -> Any:
    return bowl(x), bowl_gradient(x)


def test_the_call_of_the_specification(capsys: Any) -> None:
    seen: list[Any] = []
    result = minimize(
        both,
        np.zeros(3),
        jac=True,
        method=opt.scipy.method(opt.Adam(0.05)),
        callback=lambda intermediate_result: seen.append(intermediate_result),
        options={"maxiter": 500, "gtol": 1e-6, "disp": True},
    )
    assert isinstance(result, OptimizeResult)
    assert result.success is True
    assert result.status == 0
    assert result.message == "Optimization terminated successfully."
    assert np.abs(result.jac).max() <= 1e-6
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-6)
    np.testing.assert_array_equal(result.jac, bowl_gradient(result.x))
    assert result.fun == bowl(result.x)
    assert 0 < result.nit < 500
    assert result.nfev == result.njev == result.nit + 1
    assert len(seen) == result.nit
    assert seen[-1].fun == result.fun
    assert (seen[-1].x == result.x).all()
    assert f"Iterations: {result.nit}" in capsys.readouterr().out


def test_steps_are_those_of_update() -> None:
    rule = opt.OptimiserChain(opt.WeightDecay(0.1), opt.NAdam(0.05))
    options = {"maxiter": 20, "return_all": True}
    result = minimize(rosen, np.zeros(4), jac=rosen_der, method=method(rule), options=options)
    x = np.zeros(4)
    state = opt.setup(rule, x)
    for visited in result.allvecs:
        np.testing.assert_array_equal(visited, x)
        state, x = opt.update(state, x, rosen_der(x))
    assert len(result.allvecs) == 21


@parametrize("cls", [c for c in PUBLIC if c.__name__ in ("Adam", "Momentum", "Rprop", "AdaBelief")])
def test_agrees_with_scipys_own_methods(cls: Any) -> None:
    ours = minimize(both, np.zeros(3), jac=True, method=method(cls(eta=0.02)))
    theirs = minimize(both, np.zeros(3), jac=True, method="L-BFGS-B")
    assert ours.success
    assert theirs.success
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-5)
    own = {"hess_inv"}
    assert set(theirs) - own == set(ours)


def test_jac_may_be_a_function_a_pair_or_missing() -> None:
    by_function = minimize(bowl, np.zeros(3), jac=bowl_gradient, method=ADAM)
    by_pair = minimize(both, np.zeros(3), jac=True, method=ADAM)
    by_difference = minimize(bowl, np.zeros(3), method=ADAM, options={"gtol": 1e-4})
    np.testing.assert_array_equal(by_function.x, by_pair.x)
    assert by_difference.success
    np.testing.assert_allclose(by_difference.x, CENTRE, atol=1e-4)
    assert by_difference.nfev == 7 * by_difference.njev  # two for each number, and the value
    relative = minimize(
        bowl, np.zeros(3), method=ADAM, options={"gtol": 1e-4, "finite_diff_rel_step": 1e-6}
    )
    np.testing.assert_allclose(relative.x, CENTRE, atol=1e-4)


def quartic(x: Any) -> Any:
    return (x**4).sum()


@pytest.mark.parametrize(
    ("options", "calls", "digits"),
    [
        ({}, 5, 1e-8),
        ({"finite_diff": "3-point"}, 5, 1e-8),
        ({"finite_diff": "2-point"}, 3, 1e-5),
        ({"finite_diff": "cs"}, 3, 1e-14),
        ({"eps": 1e-3}, 5, 1e-4),
    ],
)
def test_finite_differences_have_the_digits_of_their_scheme(
    options: dict[str, Any], calls: int, digits: float
) -> None:
    for bounds in (None, [(-5, 5), (-5, 2)]):
        result = minimize(
            quartic, [1.0, 2.0], method=ADAM, bounds=bounds, options={"maxiter": 0, **options}
        )
        np.testing.assert_allclose(result.jac, [4, 32], rtol=digits)
        assert result.nfev == calls


@pytest.mark.parametrize("jac", ["2-point", "3-point", "cs"])
def test_no_scheme_is_less_precise_than_what_was_asked_for(jac: str) -> None:
    result = minimize(quartic, [1.0, 2.0], method=ADAM, jac=jac, options={"maxiter": 0})
    np.testing.assert_allclose(result.jac, [4, 32], rtol=1e-8)
    direct = ADAM(quartic, [1.0, 2.0], jac=jac, maxiter=0)  # where SciPy is not between
    assert direct.nfev == {"2-point": 3, "3-point": 5, "cs": 3}[jac]


@pytest.mark.parametrize("drop", [np.real, np.abs, lambda x: x.astype(float)])
def test_complex_steps_of_a_function_that_drops_them_are_refused(drop: Any) -> None:
    """It would have the derivative 0 everywhere, and so be at a minimum."""

    def fun(x: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (drop(x) ** 4).sum()

    with pytest.raises(TypeError, match=r'dropped the imaginary part of x.*finite_diff="3-point"'):
        minimize(fun, [1.0, 2.0], method=ADAM, options={"finite_diff": "cs"})
    assert minimize(fun, [1.0, 2.0], method=ADAM, options={"maxiter": 9}).nit == 9


def test_finite_differences_of_an_unknown_scheme_are_refused() -> None:
    with pytest.raises(ValueError, match='finite_diff must be "2-point", "3-point" or "cs"'):
        minimize(bowl, np.zeros(3), method=ADAM, options={"finite_diff": "5-point"})


@pytest.mark.parametrize("scheme", ["2-point", "3-point"])
@pytest.mark.parametrize(("start", "returned"), [("f4", "f4"), ("f4", "f8"), ("f8", "f4")])
def test_finite_differences_suit_single_precision(start: str, returned: str, scheme: str) -> None:
    def fun(x: Any) -> Any:
        return np.asarray(((x - 1) ** 2).sum(), returned)[()]

    result = minimize(
        fun, np.zeros(3, start), method=ADAM, options={"gtol": 1e-2, "finite_diff": scheme}
    )
    assert result.success
    assert result.nit > 0
    np.testing.assert_allclose(result.x, 1, atol=1e-2)


def test_args_are_handed_on() -> None:
    def fun(x: Any, a: float, b: float) -> Any:
        return np.sum((a * x - b) ** 2)

    def jac(x: Any, a: float, b: float) -> Any:
        return 2 * a * (a * x - b)

    for given in (jac, None):
        result = minimize(
            fun, [0.0], args=(2.0, 3.0), jac=given, method=ADAM, options={"gtol": 1e-4}
        )
        np.testing.assert_allclose(result.x, 1.5, atol=1e-4)


def test_x0_may_be_whole_numbers_and_stays_as_it_is() -> None:
    assert minimize(both, [0, 0, 0], jac=True, method=ADAM).x.dtype == np.float64
    x0 = np.zeros(3)
    minimize(both, x0, jac=True, method=ADAM)
    assert (x0 == 0).all()
    assert (
        method(opt.Adam(0.05))(bowl, np.zeros(3, np.float32), jac=bowl_gradient).x.dtype
        == np.float32
    )


def test_a_function_may_scribble_on_its_argument() -> None:
    def fun(x: Any) -> Any:
        value = both(x)
        x[:] = np.nan
        return value

    assert minimize(fun, np.zeros(3), jac=True, method=ADAM).success


# --- ends ------------------------------------------------------------------------------------


def test_running_out_of_iterations_is_no_success() -> None:
    result = minimize(both, np.zeros(3), jac=True, method=ADAM, options={"maxiter": 7})
    assert (result.success, result.status, result.nit) == (False, 1, 7)
    assert "iterations" in result.message
    assert result.fun == bowl(result.x)
    with pytest.warns(OptimizeWarning, match="iterations") as caught:
        minimize(both, np.zeros(3), jac=True, method=ADAM, options={"maxiter": 7, "disp": True})
    assert caught[0].filename == __file__


def test_a_start_that_is_a_minimum_takes_no_step() -> None:
    result = minimize(both, CENTRE, jac=True, method=ADAM)
    assert (result.success, result.nit, result.nfev) == (True, 0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_ends_it(bad: float) -> None:
    def value(x: Any) -> Any:
        return (bad if x[0] > 1 else bowl(x)), bowl_gradient(x)

    def gradient(x: Any) -> Any:
        return bowl(x), np.where(x[0] > 1, bad, 1.0) * bowl_gradient(x)

    for fun in (value, gradient):
        result = minimize(fun, np.zeros(3), jac=True, method=ADAM)
        assert (result.success, result.status) == (False, 3)
        assert "NaN" in result.message
        assert result.nit > 5
    result = minimize(lambda x: value(x)[0], np.zeros(3), method=ADAM)
    assert (result.success, result.status) == (False, 3)


def test_tolerances() -> None:
    def run(**options: Any) -> Any:
        return minimize(both, np.zeros(3), jac=True, method=ADAM, options=options)

    loose = run(gtol=1e-2)
    assert loose.nit < run().nit
    assert np.abs(loose.jac).max() <= 1e-2
    by_tol = minimize(both, np.zeros(3), jac=True, method=ADAM, tol=1e-2)
    assert by_tol.nit == loose.nit
    euclidean = run(gtol=1e-2, norm=2)
    assert np.linalg.norm(euclidean.jac) <= 1e-2
    for flat in (run(gtol=0, ftol=1e-6), run(gtol=0, xtol=1e-4)):
        assert flat.success
        assert 10 < flat.nit < 1000


def test_a_rule_that_waits_has_not_converged() -> None:
    rule = opt.OptimiserChain(opt.AccumGrad(4), opt.Descent(0.1))
    options = {"ftol": 1e-9, "xtol": 1e-9}
    result = minimize(both, np.zeros(3), jac=True, method=method(rule), options=options)
    assert result.success
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-4)


# --- callbacks -------------------------------------------------------------------------------


def test_an_old_callback_gets_x() -> None:
    seen: list[Any] = []
    result = minimize(both, np.zeros(3), jac=True, method=ADAM, callback=seen.append)
    assert len(seen) == result.nit
    assert all(type(x) is np.ndarray for x in seen)
    np.testing.assert_array_equal(seen[-1], result.x)
    assert not np.array_equal(seen[0], seen[1])  # copies


def test_stop_iteration_stops_as_in_scipy() -> None:
    def run(chosen: Any) -> Any:
        steps: list[Any] = []

        def callback(intermediate_result: OptimizeResult) -> None:
            steps.append(intermediate_result.x)
            if len(steps) == 3:
                raise StopIteration

        result = minimize(rosen, np.zeros(3), jac=rosen_der, method=chosen, callback=callback)
        np.testing.assert_array_equal(result.x, steps[-1])
        return result

    ours, theirs = run(ADAM), run("BFGS")
    for name in ("success", "status", "message", "nit"):
        assert ours[name] == theirs[name]
    assert ours.status == 99


# --- bounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("jac", [bowl_gradient, None], ids=["jac", "differences"])
@pytest.mark.parametrize(
    "bounds",
    [
        Bounds([-1, -0.5, -np.inf], [1, 5, np.inf]),
        [(-1, 1), (-0.5, 5), (None, None)],
        ((-1, 1), (-0.5, None), (None, np.inf)),
    ],
)
def test_bounds_hold_everywhere(bounds: Any, jac: Any) -> None:
    def fun(x: Any) -> Any:
        assert -1 <= x[0] <= 1
        assert x[1] >= -0.5
        return bowl(x)

    result = minimize(
        fun, [9.0, -9.0, 0.0], jac=jac, bounds=bounds, method=ADAM, options={"gtol": 1e-4}
    )
    assert result.success
    np.testing.assert_allclose(result.x, [1, -0.5, 2], atol=1e-4)
    theirs = minimize(fun, [9.0, -9.0, 0.0], jac=jac, bounds=bounds, method="L-BFGS-B")
    np.testing.assert_allclose(result.x, theirs.x, atol=1e-4)


@pytest.mark.parametrize("jac", [bowl_gradient, None], ids=["jac", "differences"])
def test_a_variable_may_be_fixed_by_its_bounds(jac: Any) -> None:
    bounds = [(None, None), (0.25, 0.25), (None, None)]
    result = minimize(
        bowl, np.zeros(3), jac=jac, bounds=bounds, method=ADAM, options={"gtol": 1e-4}
    )
    assert result.success
    np.testing.assert_allclose(result.x, [3, 0.25, 2], atol=1e-4)


# --- refusals --------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no constraints.*SLSQP"):
        minimize(bowl, np.zeros(3), method=ADAM, constraints=LinearConstraint(np.eye(3), 0, 1))
    with pytest.raises(ValueError, match="no constraints"):
        minimize(bowl, np.zeros(3), method=ADAM, constraints={"type": "eq", "fun": bowl})
    with pytest.raises(ValueError, match=r"bounds of x\[1\] have 2 below and 1 above"):
        minimize(bowl, np.zeros(3), method=ADAM, bounds=[(0, 1), (2, 1), (0, 1)])
    with pytest.raises(ValueError, match="2 pairs, x0 has 3"):
        minimize(bowl, np.zeros(3), method=ADAM, bounds=[(0, 1), (0, 1)])
    with pytest.raises(TypeError, match=r"must return a number.*jac=True"):
        minimize(lambda x: (bowl(x), bowl_gradient(x)[0], 1), np.zeros(3), method=ADAM)
    with pytest.raises(ValueError, match="gradient must have the shape"):
        minimize(bowl, np.zeros(3), jac=lambda x: np.zeros(2), method=ADAM)
    with pytest.raises(TypeError, match="x0 must be real"):
        minimize(bowl, np.zeros(3, complex), method=ADAM)
    with pytest.raises(TypeError, match=r"write Adam\(\)"):
        method(opt.Adam)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1-d"):
        ADAM(bowl, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="jac=True"):
        ADAM(both, np.zeros(3), jac=True)


def test_what_is_not_used_is_said() -> None:
    with pytest.warns(OptimizeWarning, match="Unknown solver options: maxcor") as caught:
        minimize(both, np.zeros(3), jac=True, method=ADAM, options={"maxcor": 3})
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="second derivatives"):
        minimize(both, np.zeros(3), jac=True, method=ADAM, hess=lambda x: np.eye(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimize(both, np.zeros(3), jac=True, method=ADAM, constraints=[])


# --- with others -----------------------------------------------------------------------------


def test_in_basinhopping() -> None:
    def fun(x: Any) -> Any:
        return np.cos(14.5 * x[0] - 0.3) + (x[0] + 0.2) * x[0]

    kwargs = {"method": method(opt.Adam(0.02)), "options": {"gtol": 1e-4}}
    result = basinhopping(fun, [1.0], minimizer_kwargs=kwargs, niter=20, rng=1)
    assert abs(result.x[0] + 0.195) < 1e-3
    assert result.minimization_failures == 0


def test_over_the_flat_vector_of_a_model() -> None:
    model = {"a": np.zeros(2), "b": np.zeros(1)}
    flat, re = opt.destructure(model)
    result = minimize(both, flat, jac=True, method=ADAM)
    np.testing.assert_allclose(re(result.x)["b"], [2.0], atol=1e-5)


def test_a_method_can_be_pickled_and_shown() -> None:
    again = pickle.loads(pickle.dumps(ADAM))
    assert again == ADAM
    assert repr(again) == f"Method(rule={opt.Adam(0.05)!r})"
