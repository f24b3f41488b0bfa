"""The Optimizer of optimisers.torch, beside those of PyTorch."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import warnings
from typing import Any

import pytest
from tensors import loss_of, network, same
from util import name_of, normal

import optimisers
from optimisers import (
    AccumGrad,
    AdaDelta,
    AdaGrad,
    Adam,
    AdamW,
    ClipGrad,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    Nesterov,
    OptimiserChain,
    RMSProp,
    Rprop,
    Rule,
    WeightDecay,
)

torch: Any = pytest.importorskip("torch")
Optimizer: Any = importlib.import_module("optimisers.torch").Optimizer
TWINS: list[tuple[Any, Any]] = [
    (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (
        OptimiserChain(WeightDecay(0.1), Adam(0.01, (0.8, 0.95))),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    (AdamW(0.01, lambda_=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    (Descent(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (Momentum(0.1, 0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (Nesterov(0.1, 0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    (RMSProp(0.01, 0.9), lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9)),
    (
        AdaGrad(0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8, initial_accumulator_value=1e-8),
    ),
    (AdaDelta(0.9, 1e-6), lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.9, eps=1e-6)),
    (Rprop(0.01), lambda p: torch.optim.Rprop(p, lr=0.01)),
]


def train(net: Any, optimizer: Any, steps: Any, scheduler: Any = None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if scheduler is not None:
            takes_loss = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[losses[-1]] * takes_loss)
    return losses


def assert_twins(one: Any, other: Any) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rule", "judge"), TWINS, ids=name_of)
def test_it_trains_as_torch_does(rule, judge):
    net, twin = network().double(), network().double()
    loss_of_double = [loss_in_double(n) for n in (net, twin)]
    optimizer, other = Optimizer(net.parameters(), rule), judge(twin.parameters())
    for step in range(15):
        for o, loss in zip((optimizer, other), loss_of_double, strict=True):
            o.zero_grad()
            loss(step).backward()
            o.step()
    assert_twins(net, twin)


def loss_in_double(net: Any) -> Any:
    def loss(step: int) -> Any:
        x = torch.tensor(normal((16, 3), seed=step))
        return ((net(x / x.norm()) - (x / x.norm())[:, :2].sin()) ** 2).mean()

    return loss


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=40, cycle_momentum=False
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_work(name):
    nets = network(), network()
    ours = Optimizer(nets[0].parameters(), AdamW(0.02, lambda_=0.1))
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=0.02, weight_decay=0.1)
    rates: list[Any] = [[], []]
    for o, net, rate in zip((ours, theirs), nets, rates, strict=True):
        scheduler = SCHEDULERS[name](o)
        for step in range(20):
            train(net, o, [step], scheduler)
            rate.append(o.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_groups_have_numbers_of_their_own():
    net, twin = network(), network()
    ours = Optimizer(
        [
            {"params": net[0].parameters(), "eta": 0.1, "name": "body"},
            {"params": net[2].parameters(), "beta": (0.5, 0.9)},
        ],
        Adam(0.01),
    )
    theirs = torch.optim.Adam(
        [
            {"params": twin[0].parameters(), "lr": 0.1},
            {"params": twin[2].parameters(), "betas": (0.5, 0.9)},
        ],
        lr=0.01,
    )
    assert [g["lr"] for g in ours.param_groups] == [0.1, 0.01]
    assert ours.param_groups[0]["name"] == "body"
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
    train(net, ours, range(10), schedulers[0])
    train(twin, theirs, range(10), schedulers[1])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    ours.param_groups[1]["beta"] = (0.0, 0.9)
    w = net[2].bias
    ours.step()
    assert same(ours.state[w]["m"], w.grad)


def test_add_param_group():
    body, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    optimizer = Optimizer(body.parameters(), Momentum(0.1, 0.5))
    optimizer.add_param_group({"params": head.bias, "lr": 1.0, "momentum": 0.0})
    for p in (body.bias, head.bias):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in (body.bias, head.bias)]
    optimizer.step()
    torch.testing.assert_close(body.bias.detach(), before[0] - 0.1)
    torch.testing.assert_close(head.bias.detach(), before[1] - 1)


def test_lr_stands_for_the_last_rate_of_a_chain():
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rule = OptimiserChain(Momentum(0.25), OptimiserChain(Descent(0.5), ClipGrad(9.0)))
    for made in (rule, MixedPrecision("float64", rule)):
        optimizer = Optimizer([{"params": [w], "lr": 2.0}], made)
        w.data.zero_()
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert same(w.detach(), torch.full((2,), -0.5, dtype=torch.float64))
        assert optimizer.param_groups[0]["delta"] == 9.0
        assert Optimizer([w], made).param_groups[0]["lr"] == 0.5


def test_rules_without_a_rate_are_scaled():
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = Optimizer([w], MixedPrecision(OptimiserChain(ClipGrad(1.0))))
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer.param_groups[0]["lr"] = 0.25
    w.grad = torch.full((2,), 7.0)
    optimizer.step()
    assert same(w.detach(), torch.full((2,), -0.25))


def test_fields_on_which_a_chain_differs():
    w = torch.nn.Parameter(torch.zeros(2))
    rule = OptimiserChain(Adam(0.1, epsilon=0.5), Adam(0.1, epsilon=0.25))
    group = Optimizer([w], rule).param_groups[0]
    assert "epsilon" not in group
    assert group["beta"] == (0.9, 0.999)
    optimizer = Optimizer([{"params": [w], "epsilon": 1.0}], rule)
    made = optimizer._rule_of(0, optimizer.param_groups[0])
    assert made == OptimiserChain(Adam(0.1, epsilon=1.0), Adam(0.1, epsilon=1.0))


def test_a_rate_that_is_a_tensor_changed_in_place():
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rate = torch.tensor(0.5)
    optimizer = Optimizer([{"params": [w], "lr": rate}], Descent())
    w.grad = torch.ones_like(w)
    optimizer.step()
    rate.fill_(0.25)
    optimizer.step()
    assert w.item() == -0.75


@pytest.mark.parametrize(
    "rule",
    [
        Adam(0.01),
        Descent(0.1),
        OptimiserChain(ClipNorm(1.0), AccumGrad(3), AdamW(0.01, lambda_=0.1)),
        MixedPrecision("float64", Nesterov(0.1)),
        AdaDelta(),
    ],
    ids=repr,
)
def test_resuming_gives_the_same_bits(rule):
    net = network()
    optimizer = Optimizer(net.parameters(), rule)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(net, optimizer, range(5), scheduler)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    losses = train(net, optimizer, range(5, 12), scheduler)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network()
    other = Optimizer(twin.parameters(), rule)
    again = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert other.param_groups[0]["lr"] == pytest.approx(saved[1]["param_groups"][0]["lr"])
    assert train(twin, other, range(5, 12), again) == losses
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert same(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(same(a, other.state[q][name]) for name, a in optimizer.state[p].items())


def test_a_loaded_state_is_exact_and_a_copy():
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    w.grad = torch.ones_like(w)
    one, other = (Optimizer([w], MixedPrecision(Adam())) for _ in range(2))
    one.step()
    other.load_state_dict(one.state_dict())
    kept = other.state[w]
    assert list(kept) == ["master", "state.m", "state.v", "state.t"]
    assert kept["master"].dtype is torch.float32
    assert kept["state.t"].dtype is torch.int64
    for name, a in one.state[w].items():
        assert same(a, kept[name])
        assert a.data_ptr() != kept[name].data_ptr()


def test_loading_what_does_not_fit_changes_nothing():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    saved = Optimizer([w], Momentum(0.5))
    saved.step()
    optimizer = Optimizer([("weight", w)], Adam())
    optimizer.step()
    kept = dict(optimizer.state[w])
    with pytest.raises(ValueError, match=r"weight: expected 'm', 'v', 't' for Adam.*got 'v'"):
        optimizer.load_state_dict(saved.state_dict())
    other = Optimizer([torch.nn.Parameter(torch.zeros(3))], Adam())
    with pytest.raises(ValueError, match="'m' of shape"):
        other.load_state_dict(optimizer.state_dict())
    assert optimizer.state[w] == kept
    assert optimizer.param_groups[0]["lr"] == 0.001
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_users_hooks_see_and_change_what_is_loaded():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    optimizer = Optimizer([w], Adam())
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    seen = []

    def before(_, state_dict):
        state_dict["state"] = {0: {**state_dict["state"][0], "t": torch.tensor(7)}}
        return state_dict

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[w]["t"].item()))
    optimizer.load_state_dict(saved)
    assert seen == [7]
    optimizer.step()
    assert optimizer.state[w]["t"] == 8


def test_hooks_and_closures():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([w], Descent(0.5))
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        calls.append("loss")
        return loss

    assert isinstance(optimizer, torch.optim.Optimizer)
    with torch.no_grad():
        assert optimizer.step(closure).item() == 2.0
    assert calls == ["before", "loss", "after"]
    assert not w.any()


def test_grad_scaler():
    net, twin = network(), network()
    ours = Optimizer(net.parameters(), Adam(0.01))
    theirs = torch.optim.Adam(twin.parameters(), lr=0.01)
    for n, o in ((net, ours), (twin, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(6):
            o.zero_grad()
            loss = loss_of(n, step)
            scaler.scale(loss * (torch.inf if step == 3 else 1)).backward()
            scaler.step(o)
            scaler.update()
        assert scaler.get_scale() != 2.0**10
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert ours.state[p]["t"] == 5


def test_copies_and_pickles_go_on():
    net = network()
    optimizer = Optimizer(net.parameters(), Adam(0.01))
    train(net, optimizer, range(3))
    twin, other = copy.deepcopy((net, optimizer))
    third, again = pickle.loads(pickle.dumps((net, optimizer)))
    for n, o in ((net, optimizer), (twin, other), (third, again)):
        assert o.rule == Adam(0.01)
        train(n, o, range(3, 6))
    for p, q, r in zip(net.parameters(), twin.parameters(), third.parameters(), strict=True):
        assert same(p, q)
        assert same(p, r)


def test_state_that_was_replaced_or_cleared_is_seen():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    optimizer = Optimizer([w], Momentum(1.0, 0.5))
    optimizer.step()
    for state in optimizer.state.values():  # as one does to move it to another device
        for name, a in state.items():
            state[name] = torch.zeros_like(a)
    optimizer.step()
    assert same(w.detach(), torch.full((2,), -2.0))
    optimizer.state.clear()
    optimizer.step()
    assert same(w.detach(), torch.full((2,), -3.0))


def test_parameters_without_gradients_stay():
    w, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    w.grad = torch.ones(2)
    optimizer = Optimizer([w, b], Adam(0.5))
    optimizer.step()
    assert not b.any()
    assert b not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[w]["t"] == 1


def test_a_master_copy_is_made_when_it_is_first_needed():
    """Weights that are loaded after the optimiser was made are not overwritten."""
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = Optimizer([w], MixedPrecision(Descent(1.0)))
    w.data.fill_(5.0)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert same(w.detach(), torch.full((2,), 4.0, dtype=torch.float16))


def test_a_refused_step_changes_nothing():
    w, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = Optimizer([("weight", w), ("bias", b)], OptimiserChain(ClipNorm(1.0), Momentum()))
    w.grad, b.grad = torch.ones(2), torch.full((2,), torch.inf)
    with pytest.raises(FloatingPointError, match="at bias: ClipNorm"):
        optimizer.step()
    assert not w.any()
    assert not optimizer.state
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Optimizer(embedding.parameters(), Adam())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"param_groups\[0\]\[0\]: .*sparse_coo; make it dense"):
        optimizer.step()


def test_users_rules_with_any_state():
    class Slowing(Rule):
        def init(self, x):
            return 1

        def apply(self, state, x, dx):
            return state + 1, dx / state

    w = torch.nn.Parameter(torch.zeros(1))
    w.grad = torch.ones(1)
    optimizer = Optimizer([w], Slowing())
    optimizer.step()
    optimizer.step()
    assert w.item() == -1.5
    other = Optimizer([w], Slowing())
    other.load_state_dict(optimizer.state_dict())
    assert other.state[w] == {"0": 3}


def parameter() -> Any:
    return torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Optimizer([parameter()], Adam), TypeError, r"write Adam\(\)"),
        (lambda: Optimizer([parameter()], 0.1), TypeError, "takes a rule after the parameters"),
        (lambda: Optimizer([], Adam()), ValueError, "empty parameter list"),
        (
            lambda: Optimizer([{"params": [parameter()], "weight_decay": 0.1}], Adam()),
            TypeError,
            "'weight_decay'.*there are beta, epsilon, epsilon_hat, lr.*lambda_ of AdamW",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "betas": (0.1, 0.1)}], Adam()),
            TypeError,
            "write beta",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "lr": 1, "eta": 1}], Adam()),
            TypeError,
            "lr and eta",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "lr": -1.0}], Adam()),
            ValueError,
            "eta must be .* got -1.0",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "n": 3}], AccumGrad(2)),
            TypeError,
            "n shapes the state",
        ),
        (
            lambda: Optimizer([{"params": [parameter()], "differentiable": True}], Adam()),
            TypeError,
            "not differentiable",
        ),
        (lambda: Optimizer([parameter()] * 1 + [*[parameter()] * 2], Adam()), ValueError, "twice"),
        (
            lambda: Optimizer([torch.zeros(1).expand(3).detach()], Adam()),
            ValueError,
            "cannot be written in place",
        ),
    ],
)
def test_what_an_optimizer_refuses(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_differentiable_is_said_to_be_false():
    optimizer = Optimizer([parameter()], Adam())
    assert optimizer.defaults["differentiable"] is False
    assert "lr: 0.001" in repr(optimizer)
    assert optimisers.Adam() == optimizer.rule


@pytest.mark.parametrize(
    "rule",
    [Adam(0.1), Momentum(0.1), Descent(0.1), OptimiserChain(ClipNorm(1.0), Adam(0.1))],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_others_may_read_and_keep_what_they_like_in_the_state(rule, dtype):
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    guest, plain = Optimizer([p], rule), Optimizer([q], rule)
    assert len(guest.state[p]) == 0  # which leaves an empty dictionary behind
    for _ in range(3):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        guest.step()
        plain.step()
        guest.state[p].setdefault("slow", p.detach().clone())
        assert torch.equal(p, q)
    kept = dict(guest.state[p])
    assert torch.equal(kept.pop("slow"), guest.state[p]["slow"])
    assert kept.keys() == plain.state[q].keys()
    assert all(torch.equal(kept[name], value) for name, value in plain.state[q].items())


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=0.3, weight_decay=0.1), ["weight_decay=0.1"]),
        (lambda ps: torch.optim.Adam(ps, lr=0.3, betas=(0.5, 0.6)), ["betas=(0.5, 0.6)", "eps="]),
        (lambda ps: torch.optim.SGD(ps, lr=0.3), []),
    ],
)
def test_numbers_of_another_optimiser_in_a_checkpoint_are_warned_of(make, names):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([p], Descent(0.1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.load_state_dict(make([p]).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert len(seen) == bool(names)
    for name in names:
        assert name in str(seen[0].message)
        assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", 0.5), ("betas", (0.1, 0.1)), ("eps", 10.0)]
)
def test_numbers_that_do_nothing_are_warned_of_where_they_are_set_later(name, value):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([p], AdamW(0.1))
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    with pytest.warns(UserWarning, match=name) as seen:
        optimizer.step()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    optimizer.step()  # in silence: once is enough
