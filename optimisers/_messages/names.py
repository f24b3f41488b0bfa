"""Names of other libraries and their names here, looked up when a name is not found.

The three tables are the text of `docs/coming-from/names.md`, and the only place of these names. A
cell has code in backticks, as one writes it there; `_asked` finds the names in it. In `FIELDS` a
cell on the left begins with a field and says of which rules, if it does not have this meaning in
all; or it says what else there is.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from opcode import opmap
from types import FrameType
from typing import NamedTuple

NAMES = """\
| here | PyTorch | optax | Keras, others | Optimisers.jl |
|---|---|---|---|---|
| `setup(rule, model)` | `Adam(model.parameters())` | `tx.init(params)` | `compile(optimizer)` | `setup(rule, model)` |
| `update(state, model, grad)` | – | `tx.update(grads, state)`, `apply_updates(params, updates)` | `stateless_apply` | `update(state, model, grad)` |
| `update_(state, model, grad)` | `opt.step()` | – | `apply_gradients(pairs)` | `update!(state, model, grad)` |
| `minimize(loss, model, rule, steps)` | – | – | `fit(x, y)` | – |
| `adjust_(state, eta)`, `adjust_(state, beta=...)` | `lr_scheduler` | `inject_hyperparams` | `LearningRateScheduler`, `schedules` | `adjust!(state, eta)` |
| `adjust_(state, eta)` before each step | `StepLR`, `ExponentialLR`, `CosineAnnealingLR`, `OneCycleLR`, `LambdaLR` | `exponential_decay`, `cosine_decay_schedule`, `linear_schedule`, `warmup_cosine_decay_schedule` | `ExponentialDecay`, `CosineDecay` | – |
| `evaluation(state, model)` | – | `schedule_free_eval_params(state, params)` | – | – |
| `freeze_(state)`, `thaw_(state)` | `requires_grad_(False)` | `set_to_zero`, `masked`, `freeze` | `trainable = False` | `freeze!`, `thaw!` |
| a `setup` for each part, the states put together as the model is | parameter groups | `partition`, `multi_transform` | – | a `setup` for each part |
| `destructure(model)` | `parameters_to_vector` | `ravel_pytree` | – | `destructure(model)` |
| `trainables(model)` | `model.parameters()`, `named_parameters` | `jax.tree.leaves(params)` | `trainable_weights`, `trainable_variables` | `trainables(model)` |
| `functor`, `register_node`, `trainable` | `nn.Module`, `nn.Parameter` | `register_pytree_node`, `register_dataclass` | `Layer` | `@functor`, `trainable` |
| `fmap(function, tree)` | – | `tree_map`, `jax.tree.map(f, tree)` | – | `fmap` |
| `OptimiserChain(a, b)` | – | `chain(a, b)`, `named_chain` | – | `OptimiserChain(a, b)` |
| `optimisers.torch.Optimizer(params, rule)` | `Optimizer` | – | – | – |
| `Rule` | – | `GradientTransformation` | `Optimizer` | `AbstractRule` |
| `optimisers.optax.to_optax(rule)`, `optimisers.optax.from_optax(tx)` | – | – | – | – |
| `optimisers.scipy.method(rule)` | – | – | – | – |
| `optimisers.io.save(path, state, model)`, `optimisers.io.load(path)` | `torch.save`, `torch.load`, `state_dict`, `load_state_dict` | – | `save_weights`, `load_weights` | – |
| `optimisers.io.Checkpointer(folder)` | – | `CheckpointManager` | `ModelCheckpoint` | – |
| `optimisers.io.File(path)` | `safe_open(path)` | – | – | – |
| `Descent` | `SGD` | `sgd`, `scale_by_learning_rate`, `scale` | `SGD` | `Descent`, `Optimiser` |
| `Momentum` | `SGD(momentum=)` | `sgd(momentum=)`, `trace` | `SGD(momentum=)` | `Momentum` |
| `Nesterov` | `SGD(momentum=, nesterov=True)` | `sgd(momentum=, nesterov=True)` | `SGD(nesterov=True)` | `Nesterov` |
| `RMSProp` | `RMSprop` | `rmsprop`, `scale_by_rms` | `RMSprop` | `RMSProp` |
| `RMSProp(centred=True)` | `RMSprop(centered=True)` | `rmsprop(centered=True)`, `scale_by_stddev` | `RMSprop(centered=True)` | `RMSProp(centred = true)` |
| `Rprop` | `Rprop` | `rprop` | – | `Rprop` |
| `Adam` | `Adam` | `adam`, `scale_by_adam` | `Adam` | `Adam`, `ADAM` |
| `AdamW` | `AdamW` | `adamw` | `AdamW` | `AdamW`, `ADAMW` |
| `NAdam` | `NAdam` | `nadam` | `Nadam` | `NAdam` |
| `RAdam` | `RAdam` | `radam` | – | `RAdam` |
| `AMSGrad` | `Adam(amsgrad=True)` | `amsgrad`, `scale_by_amsgrad` | `Adam(amsgrad=True)` | `AMSGrad` |
| `AdaMax` | `Adamax` | `adamax` | `Adamax` | `AdaMax` |
| `OAdam` | – | `optimistic_adam` | – | `OAdam` |
| `AdaBelief` | – | `adabelief`, `scale_by_belief` | – | `AdaBelief` |
| `Lion` | – | `lion`, `scale_by_lion` | `Lion` | `Lion` |
| `SignDescent` | – | `sign_sgd`, `scale_by_sign` | – | – |
| `Signum` | – | `signum` | – | – |
| `NAdamW` | – | `nadamw` | – | – |
| `AdEMAMix` | – | `ademamix` | – | – |
| `Adan` | – | `adan` | – | – |
| `ADOPT` | – | `adopt` | – | – |
| `Yogi` | – | `yogi`, `scale_by_yogi` | – | – |
| `ScheduleFreeDescent` | `SGDScheduleFree` | `schedule_free_sgd` | – | – |
| `ScheduleFreeAdamW` | `AdamWScheduleFree` | `schedule_free_adamw` | – | – |
| `COCOB` | – | `cocob` | – | – |
| `Muon` | `Muon` | `muon` | `Muon` | – |
| `Scion` | – | – | – | – |
| `Sophia` | – | `sophia` | – | – |
| `SOAP` | – | – | – | – |
| `Shampoo` | `DistributedShampoo` | – | – | – |
| `AdaGrad` | `Adagrad` | `adagrad`, `scale_by_rss` | `Adagrad` | `AdaGrad` |
| `AdaDelta` | `Adadelta` | `adadelta` | `Adadelta` | `AdaDelta` |
| `WeightDecay` ahead of a rule | `SGD(weight_decay=)` | `add_decayed_weights` | `regularizers.L2` | `WeightDecay` |
| `SignDecay` ahead of a rule | – | – | `regularizers.L1` | `SignDecay` |
| `ZeroNaN` ahead of a rule | – | `zero_nans` | – | – |
| `Grokfast` ahead of a rule | – | – | – | – |
| `ClipGrad` ahead of a rule | `clip_grad_value_` | `clip`, `clip_by_value` | `SGD(clipvalue=)` | `ClipGrad` |
| `ClipNorm` ahead of a rule | – | `clip_by_block_rms` | `SGD(clipnorm=)` | `ClipNorm` |
| `ClipGlobalNorm` ahead of a rule | `clip_grad_norm_`, `clip_grad_norm` | `clip_by_global_norm` | `SGD(global_clipnorm=)` | – |
| `norm(tree)`, `norms(state)` | `get_total_norm` | `global_norm`, `tree_norm` | – | – |
| `all_finite(tree)` | – | `apply_if_finite` | – | – |
| `Centralise` ahead of a rule | – | `centralize` | – | – |
| `ClipAdaptive` ahead of a rule | – | `adaptive_grad_clip` | – | – |
| `TrustRatio` behind a rule | – | `scale_by_trust_ratio` | – | – |
| `LAMB` | – | `lamb` | `Lamb` | – |
| `Prodigy` | – | `prodigy` | – | – |
| `Polyak` | – | `polyak_sgd`, `scale_by_polyak` | – | – |
| `AccumGrad(n)` | several `backward()` | `MultiSteps`, `apply_every` | `SGD(gradient_accumulation_steps=)` | `AccumGrad(n)` |
| `MixedPrecision(rule)` | `torch.amp`, `GradScaler` | – | `LossScaleOptimizer` | `MixedPrecision(rule)` |
| a gradient from `jax.value_and_grad` or another library | `opt.zero_grad()`, `backward()` | `value_and_grad` | `GradientTape` | `gradient(loss, model)` |
| `scipy.optimize.minimize(method="L-BFGS-B")` over the vector of `destructure` | `LBFGS` | `lbfgs` | – | – |
"""  # noqa: E501

FIELDS = """\
| here | in a rule without it | PyTorch | optax | Keras | elsewhere |
|---|---|---|---|---|---|
| `eta` | `eta` of `Descent` behind the rule in an `OptimiserChain` | `lr` | `learning_rate`, `step_size` | `learning_rate` | `η`, `alpha`, `eta0`, `stepsize`, `rate`, `learning_rate_init` |
| `beta`, the pair of both | – | `betas` | `b1`, `b2` | `beta_1`, `beta_2` | `β`, `beta1`, `beta2` |
| `rho` of `Momentum`, `Nesterov` | – | `momentum` | `momentum` | `momentum` | `ρ`, `mass`, `mu` |
| `rho` of `RMSProp` | – | `alpha` | `decay` | `rho` | `ρ`, `gamma`, `decay_rate` |
| `rho` of `AdaDelta` | – | `rho` | `rho` | `rho` | `ρ`, `alpha`, `gamma`, `decay`, `decay_rate` |
| `epsilon` | – | `eps` | `eps` | – | `ϵ`, `ε` |
| `lambda_` | `lambda_` of `AdamW`, or of `WeightDecay` ahead of the rule in an `OptimiserChain` | `weight_decay` | `weight_decay` | `weight_decay` | `λ`, `lambda`, `wd`, `l2` |
| `epsilon_hat` of `Adam`, `AdamW` | – | – | – | – | `epsilon_hat` |
| `epsilon_inside` of `RMSProp` | – | – | `eps_in_sqrt` | – | – |
| `initial` of `RMSProp` | – | – | `initial_scale` | – | – |
| `initial` of `AdaGrad` | – | `initial_accumulator_value` | `initial_accumulator_value` | `initial_accumulator_value` | – |
| `centred` of `RMSProp` | – | `centered` | `centered` | `centered` | – |
| `ell` of `Rprop`, the pair of both factors | – | `etas` | `eta_minus`, `eta_plus` | – | `ℓ` |
| `gamma` of `Rprop`, the smallest and the largest step | – | `step_sizes` | `min_step_size`, `max_step_size` | – | `Γ` |
| `delta` of `ClipGrad` | `delta` of `ClipGrad` ahead of the rule in an `OptimiserChain` | `clip_grad_value_(clip_value=)` | `clip(max_delta=)` | `clipvalue` | `δ` |
| `omega` of `ClipGlobalNorm` | `omega` of `ClipGlobalNorm` ahead of the rule in an `OptimiserChain` | `clip_grad_norm_(max_norm=)` | `clip_by_global_norm(max_norm=)` | `global_clipnorm` | `ω` |
| `omega` of `ClipNorm` | `omega` of `ClipNorm` ahead of the rule in an `OptimiserChain` | – | – | `clipnorm` | – |
| `p` of `ClipNorm`, `ClipGlobalNorm` | – | `clip_grad_norm_(norm_type=)` | – | – | `ord` |
| `throw` of `ClipNorm`, `ClipGlobalNorm` | – | `clip_grad_norm_(error_if_nonfinite=)` | – | – | – |
| `n` of `AccumGrad` | `n` of `AccumGrad` ahead of the rule in an `OptimiserChain` | – | `MultiSteps(every_k_schedule=)`, `apply_every(k=)` | `gradient_accumulation_steps` | `accumulation_steps`, `every`, `steps` |
| write the rule `Nesterov` | – | `nesterov` | `nesterov` | `nesterov` | `nesterovs_momentum` |
| write the rule `AMSGrad` | – | `amsgrad` | – | `amsgrad` | – |
| give gradients with the other sign | – | `maximize` | – | – | – |
| there is none here | – | `dampening`, `momentum_decay` | `eps_root` | – | – |
| call `adjust_(state, eta)` between steps, or take a scheduler of PyTorch | – | `lr_decay` | – | – | `power_t`, `schedule` |
| call `freeze_` on a part of the state, or `setup` for each part | – | – | `mask` | – | – |
| put `MixedPrecision` around the rule | – | – | `mu_dtype`, `accumulator_dtype` | `loss_scale_factor` | – |
| leave it out | – | `foreach`, `fused`, `capturable`, `differentiable` | – | `jit_compile`, `name` | `use_locking` |
| call `setup(rule, model)`, which takes the parameters | – | `Adam(params=)` | `params` | – | `parameters`, `model` |
"""  # noqa: E501


ARGUMENTS = """\
| here, in `minimize` | `scipy.optimize.minimize` | elsewhere |
|---|---|---|
| `loss` | `fun` | `func`, `f`, `objective`, `loss_fn`, `criterion` |
| `model` | `x0` | `params`, `parameters`, `init_params` |
| `rule`, the third argument | `method` | `optimizer`, `optimiser`, `opt`, `solver`, `tx` |
| `steps`, the fourth argument | `maxiter`, `options` | `max_iter`, `n_iter`, `n_steps`, `num_steps`, `max_steps`, `iterations`, `epochs` |
| `value_and_grad=jax.value_and_grad`, or a loss that returns `(value, gradient)` | `jac` | `grad`, `gradient`, `grad_fn`, `has_aux` |
| a loss of the model alone: `lambda model: loss(model, *args)` | `args` | `kwargs`, `data`, `batch` |
| a `callback` that returns True to end the run | `tol`, `gtol`, `ftol`, `xtol` | `patience`, `early_stopping`, `tolerance`, `atol`, `rtol` |
| a rule with that number, such as `Adam(eta=0.1)` | – | `eta`, `lr`, `learning_rate`, `step_size` |
| `progress` | `disp` | `verbose`, `bar` |
| `scipy.optimize.minimize(..., method=optimisers.scipy.method(rule))` | `bounds`, `constraints`, `hess`, `hessp` | – |
"""  # noqa: E501


class _Row(NamedTuple):
    here: str
    there: tuple[str, ...]
    """The pieces of code in the other columns."""


class _Field(NamedTuple):
    """A row of `FIELDS`."""

    name: str
    """The field; "" in a row of another kind."""
    rules: frozenset[str]
    """The rules that it has this meaning in; none says: in all."""
    text: str
    otherwise: str
    names: frozenset[str]
    in_groups: frozenset[str]
    """The hyperparameters that a parameter group of PyTorch may have."""

    def fits(self, fields: Collection[str], rules: frozenset[str]) -> bool:
        return self.name in fields and (not self.rules or not rules or bool(self.rules & rules))


def _lines(table: str) -> Iterator[list[str]]:
    for line in table.splitlines()[2:]:
        yield line.strip("| ").split(" | ")


def _code(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def _asked(code: str) -> str:
    """Return the name in a piece of code: ``step`` of ``opt.step()``."""
    return re.split(r"[(\s=!]", code.lstrip("@"), maxsplit=1)[0].rpartition(".")[2]


def _plain(text: str) -> str:
    return text.replace("`", "")


# --- names of the module ---------------------------------------------------------------------


def missing(
    module: str, name: str, public: Collection[str], asks: FrameType, within: str = ""
) -> Exception:
    """Return the error for the code of a frame that asks a module for a name it does not have.

    The names are those of the module, or `within` another.
    """
    hint = f"it is {within}{name}" if within and name in public else of_module(name, public)
    said = hint and f"; {hint}"
    if asks.f_code.co_code[asks.f_lasti] == opmap["IMPORT_FROM"]:  # would drop the other's text
        return ImportError(f"cannot import name {name!r} from {module!r}{said}", name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}{said}")


def missing_in(module: str, name: str, asks: FrameType) -> Exception:
    """Return the error of `missing` for a module of this package, whatever the name."""
    package = sys.modules[module.partition(".")[0]]
    public = dir(package)
    return missing(module, name, public, asks, f"{package.__name__}.")


def of_module(name: str, public: Collection[str]) -> str:
    """Return the hint for a name that the module does not have; "" if nothing is known."""
    same: Callable[[str], str]
    for same in (str, str.casefold):
        if found := _answers(name, same):
            return found
        own = [known for known in public if same(known).replace("_", "") == _alike(name)]
        if own:
            return f"it is {own[0]} here"
    by_letters = {known.casefold(): known for known in public}
    near = get_close_matches(name.casefold(), by_letters, 1, 0.75)
    return f"the nearest name is {by_letters[near[0]]}" if near else ""  # Python asks, too


def _answers(name: str, same: Callable[[str], str]) -> str:
    """Return one sentence with the rows of the table for a name."""
    rows = [_Row(here, _code(" ".join(there))) for here, *there in _lines(NAMES)]
    for code in _code(" ".join(row.here for row in rows)):
        if code.startswith("optimisers.") and same(_asked(code)) == same(name):
            return f"it is {code}"
    found: dict[str, str] = {}
    for row in rows:
        for code in row.there:
            if same(_asked(code)) == same(name):
                found.setdefault(row.here, code)
    told = [f"{code} is {_plain(here)} here" for here, code in found.items()]
    return ", ".join(told[:3])


def _alike(name: str) -> str:
    return name.casefold().replace("_", "")


def of_argument(name: str) -> str:
    """Return the hint for an argument that `minimize` does not have."""
    for here, *there in _lines(ARGUMENTS):
        if name in _code(" ".join(there)):
            return f"write {_plain(here)}"
    return ""


# --- hyperparameters -------------------------------------------------------------------------


@functools.cache
def _fields() -> tuple[_Field, ...]:
    made = []
    for here, otherwise, *there in _lines(FIELDS):
        field, *rules = _code(here) if here.startswith("`") else ("",)
        of = frozenset(rules) if " of `" in here else frozenset()
        names = frozenset((*map(_argument, _code(" ".join(there))), field))
        in_groups = frozenset(code for code in _code(there[0]) if "(" not in code)
        text = _plain(here), _plain(otherwise).strip("–")
        made.append(_Field(field, of, *text, names, in_groups))
    return tuple(made)


def _argument(code: str) -> str:
    """Return the argument in a piece of code: ``k`` of ``apply_every(k=)``."""
    return code.partition("(")[2].partition("=")[0] or code


def in_torch(name: str) -> list[_Field]:
    """Return the meaning of a name in a parameter group of PyTorch, if it is a number."""
    return [row for row in _fields() if name in row.in_groups and row.text != "leave it out"]


def torch_names(field: str = "", rules: Iterable[str] = ()) -> Iterator[str]:
    """Yield the names that PyTorch has for a field of one of some rules; by default, for all."""
    of = {*rules}
    for row in _fields():
        if row.text != "leave it out" and (not field or (row.name == field and of & row.rules)):
            yield from sorted(row.in_groups)


def of_inner(name: str) -> str:
    """Return the code for a field of a rule inside another."""
    return of_field(name, [row.name for row in _fields() if row.name]) or "give it"


def of_field(
    name: str,
    fields: Collection[str],
    rules: Iterable[str] = (),
    rows: Sequence[_Field] | None = None,
) -> str:
    """Return the hint for an unknown hyperparameter; "" if nothing is known.

    Parameters
    ----------
    name : str
        What was written.
    fields : collection of str
        The names that there are.
    rules : iterable of str
        The names of the rules that have them. Without any, a field means what it means anywhere.
    rows : sequence, optional
        What the name may mean, by default to any library.
    """
    of = frozenset(rules)
    if hint := of_known(name, fields, of, rows):
        return hint
    everywhere = [n for row in _fields() for n in row.names if n]
    known = {_alike(n): n for n in (*everywhere, *fields)}
    near = get_close_matches(_alike(name), known, 1, 0.75)
    if not near:
        return ""
    meant = known[near[0]]
    return f"did you mean {meant}?" if meant in fields else of_field(meant, fields, of)


def of_known(
    name: str,
    fields: Collection[str],
    rules: Iterable[str] = (),
    rows: Sequence[_Field] | None = None,
) -> str:
    """Return the hint of `of_field` for a name in the table, and "" for any other."""
    of = frozenset(rules)
    found = [row for row in rows or _fields() if name in row.names]
    for row in sorted(found, key=lambda row: not row.rules):  # rows for few rules come first
        if row.fits(fields, of):
            return f"write {re.sub(r' of [A-Z][A-Za-z, ]+(?=, the|$)', '', row.text)}"
    return "; or ".join(dict.fromkeys(_elsewhere(name, row) for row in found))


def _elsewhere(name: str, row: _Field) -> str:
    """Return the hint for a name that is no field of the rule."""
    if not row.name:
        return row.text
    if row.otherwise:
        return f"write {row.otherwise}"
    return f"take {row.text}" if row.rules else f"other rules have {row.name}"


def unknown(
    told: str,
    names: Iterable[str],
    fields: Collection[str],
    rules: Iterable[str] = (),
    rows: Sequence[_Field] | None = None,
) -> str:
    """Return the message `told`, with hints for unknown hyperparameters."""
    rules = list(rules)
    there = f"there {'is' if len(fields) == 1 else 'are'} {', '.join(fields)}" if fields else ""
    told = f"{told}; {there}".rstrip("; ")
    for name in names:
        if hint := of_field(name, fields, rules, rows):
            told += f". For {name}, {hint}"
    return told
