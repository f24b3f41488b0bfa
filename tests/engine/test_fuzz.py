"""Random trees, arrays, states and calls, most of them such as nobody should hand over.

Whatever comes is refused, and then nothing has changed, bit for bit; or it is taken, and then the
kernels give what the array path gives, their slow twin. What was found here stands by a name in
test_hostile.py. `make fuzz` goes on for longer, `make fuzz-guided` along what the code covers.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from util import LAYOUTS, PUBLIC, arrays_in, assert_same_bits, bits, example, many, native

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    ElementwiseRule,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    adjust_,
    destructure,
    freeze_,
    isnumeric,
    setup,
    thaw_,
    update,
    update_,
)
from optimisers._engine import cpu

pytestmark = pytest.mark.sanitized


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    """Let even small arrays fill several blocks, and several threads."""
    *blocks, traffic = cpu.kernels.settings()
    cpu.kernels.set_block(32)
    cpu.kernels.set_work_per_thread(64)
    yield
    cpu.kernels.set_block(*blocks)
    cpu.kernels.set_work_per_thread(traffic)


class ArrayPath(cpu.kernels.Batch):
    """A batch that takes nothing."""

    def gather(self, leaves, xs, gs, lower, at_once=False):
        held = zip(leaves, xs, gs, strict=True)
        return [
            k
            for k, (leaf, x, g) in enumerate(held)
            if not leaf.frozen and (g is not None or isinstance(x, np.ma.MaskedArray))
        ]

    def take(self, *args):
        return False


def never(*args):
    return False


# --- rules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scribbler(Rule):
    """Writes into its state before it gives up, now and then."""

    limit: float = 3.0

    def init(self, x):
        return [np.zeros(x.shape), {"calls": 0}]

    def apply(self, state, x, dx):
        state[1]["calls"] += 1
        state[0] += abs(dx)
        if np.any(state[0] > self.limit):
            raise ArithmeticError("too much")
        return state, dx if state[1]["calls"] % 2 else None


@dataclass(frozen=True)
class Counted(ElementwiseRule):
    """With an `apply` of its own, so that it is array code everywhere."""

    slots = ("v",)

    def coefs(self, t):
        return (1.0 / t,)

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        (rate,) = coefs
        return rate * (v + dx), (dx,)

    def apply(self, state, x, dx, *higher):
        return super().apply(state, x, dx)


# A norm of order inf has the same bits in every order of evaluation.
plain_rules = st.sampled_from(
    [
        *(example(cls) for cls in PUBLIC if cls is not ClipNorm),
        *(ClipNorm(1.0, p, throw) for p in (np.inf, -np.inf, 0) for throw in (True, False)),
        Scribbler(),
        Counted(),
    ]
)
# Around a chain goes MixedPrecision, and at its end alone stands what owns the parameter.
inner_rules = plain_rules.filter(
    lambda rule: not (isinstance(rule, MixedPrecision) or rule._owns_parameter)
)
chains = st.lists(inner_rules, max_size=3)
rules = st.one_of(
    plain_rules,
    chains.map(lambda parts: OptimiserChain(*parts)),
    chains.map(lambda parts: MixedPrecision(OptimiserChain(*parts))),
    chains.map(lambda parts: OptimiserChain(AccumGrad(2), OptimiserChain(*parts), Adam())),
)

# --- arrays ----------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (3,), (40,), (2, 3), (3, 2), (7, 11), (2, 0, 3), (1, 1)]
DTYPES = ["f4", "f8", "f2", "g", "c8", "c16", "bfloat16", "float8_e4m3fn"]
FLOAT0 = np.dtype([("float0", "V")])  # what JAX gives for an integer: no gradient
OTHERS = ["i8", "u1", "?", "O", "U3", "S2", "M8[s]", "f4,i4", FLOAT0]
ROOMY = "efdFDlB"  # what any bytes are a number of
ROOM = 4096


def dtype_of(name):
    if isinstance(name, str) and name.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


class Subclass(np.ndarray):
    pass


def mapped(a):
    """Return a memory map that holds the numbers of `a`."""
    with tempfile.TemporaryFile() as file:
        view = np.memmap(file, a.dtype, "w+", shape=a.shape or (1,))
    view[...] = a
    return view.reshape(a.shape)


KINDS = {
    **LAYOUTS,
    "broadcast": lambda a: (
        np.broadcast_to(a.ravel()[:1].reshape((1,) * a.ndim), a.shape) if a.size else a
    ),
    "subclass": lambda a: a.view(Subclass),
    # NumPy cannot copy masked arrays of dtypes that are not its own, and rounds its 1e20 aloud
    "masked": lambda a: np.ma.masked_array(a, fill_value=0) if a.dtype.kind != "V" else a,
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "memory map": lambda a: mapped(a) if a.size else a,
}


@st.composite
def arrays(draw, room, shapes=SHAPES, dtypes=DTYPES):
    """Return an array of small numbers: on its own, or a view into the room that others share."""
    shape, dtype = draw(st.sampled_from(shapes)), dtype_of(draw(st.sampled_from(dtypes)))
    count = int(np.prod(shape))
    fits = 2 * count * dtype.itemsize + 32 * 8 <= room.size  # with any stride and offset below
    if dtype.char in ROOMY and fits and draw(st.integers(0, 3)) == 0:
        stride = draw(st.sampled_from([1, 1, 1, 2, -1])) * dtype.itemsize
        reach = abs(stride) * max(count - 1, 0)
        offset = draw(st.integers(0, 32)) * draw(st.sampled_from([8, 8, 1]))
        if stride < 0:
            offset += reach
        flat = np.ndarray((count,), dtype, room, offset, (stride,))
        view = flat.reshape(shape)
        view.flags.writeable = draw(st.integers(0, 4)) > 0
        return view
    numbers = np.resize(np.array(draw(st.lists(st.integers(-8, 8), min_size=1, max_size=5))), shape)
    with np.errstate(all="ignore"):
        if dtype.kind in "VUSMO" and dtype.name not in DTYPES:
            return np.zeros(shape, dtype)
        a = (numbers / 8).astype(dtype)
    kind = draw(st.sampled_from([*KINDS, "C", "C", "C", "C", "C"]))
    if (kind == "byte-swapped" and dtype.kind not in "fciu") or (shape == () and kind in FLAT):
        kind = "C"
    return KINDS[kind](np.asarray(a))


FLAT = {"strided", "reversed", "broadcast"}
"""What arrays without dimensions cannot be."""

JUNK = [
    None,
    (),
    [],
    {},
    "text",
    b"",
    1,
    1.5,
    1j,
    object(),
    Adam,
    len,
    [1.0, 2.0],
    Leaf(Adam(), ()),
]


@st.composite
def gradients(draw, room, x):
    """Return a gradient for a parameter, often one that fits."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(JUNK))
    if kind == 1:
        return draw(arrays(room, dtypes=[*DTYPES, *OTHERS]))
    dtypes = DTYPES if x.dtype.kind == "c" else [d for d in DTYPES if d[0] != "c"]
    if kind < 6:
        dtypes = [x.dtype.newbyteorder("=")]
    return draw(arrays(room, [x.shape], dtypes))


# --- states ----------------------------------------------------------------------------------


class Tuple(tuple):
    pass


@st.composite
def mangled(draw, state, room, others):
    """Return a state with something wrong in it."""
    if isinstance(state, tuple) and state and draw(st.integers(0, 3)):
        parts = list(state)
        k = draw(st.integers(0, len(parts) - 1))
        parts[k] = draw(mangled(parts[k], room, others))
        kind = draw(st.integers(0, 7))
        if kind == 0:
            parts = parts[: draw(st.integers(0, len(parts)))]
        elif kind == 1:
            parts.append(np.zeros(3))
        elif kind == 2:
            return Tuple(parts)
        elif kind == 3:
            return parts
        if len(parts) == len(state) and hasattr(state, "_make"):
            return state._make(parts)
        return tuple(parts)
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return draw(st.sampled_from([*JUNK, *others]))
    if kind == 1 and isinstance(state, np.ndarray):
        return draw(arrays(room, [state.shape], [state.dtype]))
    if kind == 2 and isinstance(state, np.ndarray):
        layouts = [name for name in LAYOUTS if state.size and (state.shape or name not in FLAT)]
        return LAYOUTS[draw(st.sampled_from(layouts))](state) if layouts else state
    if kind == 3:
        count = draw(st.sampled_from([0, -1, -2, 5, 2**62, 2**63 - 1, -(2**63)]))
        return np.array(count, draw(st.sampled_from(["i8", "i8", "i8", ">i8", "f8", "O"])))
    if kind == 4:
        return draw(arrays(room, dtypes=[*DTYPES, *OTHERS]))
    return draw(st.sampled_from(others)) if others else state


def states_of(leaf_or_tree):
    """Return the arrays and tuples in the states of a tree."""
    found = []

    def visit(x):
        found.append(x)
        if isinstance(x, tuple | list):
            for part in x:
                visit(part)

    visit(leaf_or_tree)
    return found


@st.composite
def cases(draw):
    """Return the memory that is shared, a state tree, a model and a gradient."""
    room = np.frombuffer(bytearray(ROOM), np.uint8)
    room[...] = 0x3C  # tame numbers in every dtype
    model = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        again = draw(st.integers(0, 9)) == 0 and [x for x in model.values() if isnumeric(x)]
        model[name] = draw(st.sampled_from(again)) if again else draw(arrays(room))
    rule = draw(rules)
    shapes = {k: np.ones(x.shape, x.dtype.newbyteorder("=")) for k, x in model.items()}
    state = {}
    for k, x in shapes.items():
        try:
            state[k] = setup(draw(rules) if draw(st.integers(0, 4)) == 0 else rule, x)
        except TypeError:  # a rule for real numbers
            state[k] = setup(Momentum(), x)
    others = [x for leaf in state.values() for x in states_of(leaf.state)]
    others += [*model.values(), *JUNK]
    for leaf in state.values():
        kind = draw(st.integers(0, 9))
        if kind < 3:
            leaf.state = draw(mangled(leaf.state, room, others))
        elif kind == 3:
            leaf.rule = draw(st.sampled_from([*JUNK, Momentum(), Adam(), AccumGrad(2)]))
        elif kind == 4:
            leaf.frozen = True
    if draw(st.integers(0, 9)) == 0:  # one leaf for two parameters that are not one
        state[draw(st.sampled_from(list(state)))] = state[draw(st.sampled_from(list(state)))]
    grad = {}
    for k, x in model.items():
        if draw(st.integers(0, 7)):
            alias = draw(st.integers(0, 9)) == 0
            grad[k] = draw(st.sampled_from(others)) if alias else draw(gradients(room, x))
    return room, state, model, grad


# --- what must hold --------------------------------------------------------------------------


def content(x, seen=None):
    """Return all that can change in something, bit by bit, with who it is."""
    seen = {} if seen is None else seen
    if id(x) in seen:
        return "again", seen[id(x)]
    seen[id(x)] = len(seen)
    if isinstance(x, Leaf):
        return id(x), id(x.rule), x.frozen, content(x.state, seen)
    if isinstance(x, np.ndarray):
        raw = np.asarray(x)
        inside = raw.tolist() if raw.dtype.hasobject else raw.tobytes()
        return id(x), raw.shape, raw.strides, raw.dtype, raw.flags.writeable, inside
    if isinstance(x, dict):
        return id(x), [(k, content(v, seen)) for k, v in x.items()]
    if isinstance(x, list | tuple):
        return id(x), [content(v, seen) for v in x]
    return id(x), repr(x)


def outcome(call, *args, **fields):
    """Return what a call gives, or the exception."""
    try:
        return call(*args, **fields)
    except (SystemError, MemoryError):  # nothing that the engine may let happen
        raise
    except Exception as error:
        return error


def updated(state, grad, name):
    g = grad.get(name)
    says_none = g is None or g == () if not isinstance(g, np.ndarray) else g.dtype == FLOAT0
    return not says_none and not state[name].frozen


def compared(state, model):
    """Return the arrays only; by which name a tuple goes does not matter."""

    def plain(x):
        if isinstance(x, np.ndarray) and x.dtype.kind in "OUSMV" and not isnumeric(x):
            return repr(x)
        return tuple(map(plain, x)) if isinstance(x, tuple | list) else x

    parts = {k: plain(x) for k, x in model.items() if isinstance(x, np.ndarray)}
    return [{k: plain(leaf.state) for k, leaf in state.items()}, parts]


def in_native_order(x):
    """Return arrays in the processor's byte order: one that is written in place keeps its own."""
    if isinstance(x, dict):
        return {k: in_native_order(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(map(in_native_order, x))
    return x.astype(x.dtype.newbyteorder("=")) if isinstance(x, np.ndarray) else x


@many
@given(cases())
def test_what_is_refused_changes_nothing_and_what_is_taken_is_right(case):
    _, state, model, grad = case
    before = content(case)
    held = [
        a for leaf in state.values() for a in states_of(leaf.state) if isinstance(a, np.ndarray)
    ]
    old = {k: bits(x) for k, x in model.items() if isnumeric(x)}
    kernels = cpu.kernels
    with patch.object(kernels, "Batch", ArrayPath), patch.object(kernels, "update_one", never):
        twin = outcome(update, state, model, grad)
    assert content(case) == before
    new = outcome(update, state, model, grad)
    assert content(case) == before
    if isinstance(twin, Exception):
        assert isinstance(new, Exception), twin
    else:
        if isinstance(new, Exception):
            raise new
        assert_same_bits(compared(*new), compared(*twin))
        assert_apart(new, case)
    done = outcome(update_, state, model, grad)
    if isinstance(done, Exception):
        assert content(case) == before
        assert isinstance(twin, Exception) or "overlap in memory" in str(done), done
        return
    assert not isinstance(twin, Exception), twin
    assert done[0] is state
    # What was not to be written may lie in memory that was, which nobody is told. That goes for
    # states too, of which a rule that holds gradients back does not look at all.
    made = [k for k in state if updated(state, grad, k)]
    if len({*map(id, held)}) < len(held):
        made = [k for k in made if "AccumGrad" not in repr(state[k].rule)]
    moved = [k for k in made if isnumeric(model[k]) and bits(twin[1][k]) != old[k]]
    assert_same_bits(
        in_native_order(compared({k: state[k] for k in made}, {k: done[1][k] for k in moved})),
        in_native_order(compared({k: twin[0][k] for k in made}, {k: twin[1][k] for k in moved})),
    )


def assert_apart(new, case):
    """Check that what `update` returns shares no memory with what it was given."""
    room, state, model, grad = case
    given_arrays = [a for _, a in arrays_in([state, model, grad])] + [room]
    names = [k for k, x in model.items() if isnumeric(x)]
    made = arrays_in([{k: new[0][k] for k in names}, {k: new[1][k] for k in names}])
    for place, a in made:
        for b in given_arrays:
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
                assert not np.may_share_memory(a, b) or not np.shares_memory(a, b), place


@many
@given(cases(), st.data())
def test_flat_vectors_of_such_models(case, data):
    room, _, model, grad = case
    before = content(case)
    made = outcome(destructure, model)
    assert content(case) == before
    if isinstance(made, Exception):
        assert "overlap in memory" in str(made) or "masked" in str(made), made
        return
    flat, re = made
    assert not np.shares_memory(flat, room)
    assert_same_bits(re.flatten(model), flat)
    again = {k: x for k, x in re(flat, copy=True).items() if isnumeric(x)}
    assert_same_bits(again, {k: native(x) for k, x in model.items() if isnumeric(x)})
    hostile = st.one_of(arrays(room, [(len(re),)], [*DTYPES, *OTHERS]), st.sampled_from(JUNK))
    v, out = data.draw(hostile), data.draw(hostile)
    held = [case, v, out]
    before = content(held)
    for call in (re, re.flatten, re.flatten_gradient):
        outcome(call, v)
        assert content(held) == before
    with_gradient = outcome(re.flatten_gradient, grad)
    assert isinstance(with_gradient, Exception) or with_gradient.shape == flat.shape
    assert content(held) == before
    for call, args in ((re.flatten, (model, out)), (re.flatten_gradient, (grad, out))):
        done = outcome(call, *args)
        assert done is out or content(held) == before
        before = content(held)
    values = copy.deepcopy(v)
    done = outcome(re.copy_into_, model, v)
    if isinstance(done, Exception):
        assert content(held) == before
    else:
        assert_same_bits(re.flatten(model), re.flatten(re(values)))


@many
@given(cases(), st.data())
def test_changes_of_such_states(case, data):
    _, state, model, _ = case
    value = st.one_of(st.sampled_from([0.5, 0, -1, np.nan, (0.9, 0.99), "0.5", *JUNK]))
    fields = data.draw(
        st.dictionaries(st.sampled_from(["eta", "rho", "beta", "n", "dtype", "rule"]), value)
    )
    tree = data.draw(st.sampled_from([state, model, *state.values(), *JUNK]))
    held = [case, tree]
    for call in (adjust_, freeze_, thaw_):
        before = content(held)
        done = outcome(call, tree, **fields) if call is adjust_ else outcome(call, tree)
        assert not isinstance(done, Exception) or content(held) == before
