"""Code of users at random: whatever runs in the middle of an update, the process lives on.

A scenario is a model, its state and a gradient, in which something runs code when the library looks
at it, or a thread runs code meanwhile. The code clears, resizes, replaces, writes, forks, raises.
The step is taken or refused, no lock stays held, and all arrays can be read afterwards.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from util import LAYOUTS, PUBLIC, example

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
    adjust,
    adjust_,
    destructure,
    freeze_,
    functor,
    get_num_threads,
    set_num_threads,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)

# --- things that run code when they are looked at ----------------------------------------------

Code = Callable[[], None]
idle: Code = lambda: None  # noqa: E731
running: list[Code] = [idle]


def run() -> None:
    """Run the code of the scenario, once: what it calls runs none."""
    code, running[0] = running[0], idle
    try:
        code()
    finally:
        running[0] = code


class Key(str):
    """A key that runs code when it is compared, or looked up."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        run()
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        run()
        return str.__hash__(self)


class Gradient:
    """A gradient that runs code when anything of it is asked for."""

    def __init__(self, array: np.ndarray, when: str) -> None:
        self.array, self.when = array, when

    def __getattribute__(self, name: str) -> Any:
        get = object.__getattribute__
        if name == get(self, "when"):
            run()
        if name in ("shape", "dtype", "ndim", "size"):
            return getattr(get(self, "array"), name)
        return get(self, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.when == "__array__":
            run()
        return self.array


class Number:
    """A number that runs code when it is converted."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        run()
        return self.value


class Array(np.ndarray):
    """An array that runs code when another is made of it."""

    def __array_finalize__(self, old: Any) -> None:
        run()


class Map(dict):
    """A dictionary that runs code when it is gone through, or asked."""

    def __iter__(self) -> Iterator[Any]:
        run()
        return super().__iter__()

    def items(self) -> Any:
        run()
        return super().items()

    def __getitem__(self, key: Any) -> Any:
        run()
        return super().__getitem__(key)


class Items(list):
    """A list that runs code when it is gone through, or asked."""

    def __iter__(self) -> Iterator[Any]:
        run()
        return super().__iter__()

    def __len__(self) -> int:
        run()
        return super().__len__()

    def __getitem__(self, key: Any) -> Any:
        run()
        return super().__getitem__(key)


@functor
class Thing:
    """An object that runs code when its attributes are asked for."""

    def __init__(self, **names: Any) -> None:
        vars(self).update(names)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__"):
            run()
        return object.__getattribute__(self, name)


class State(tuple):
    """A state that runs code when its parts are asked for."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        run()
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        run()
        return super().__iter__()


@dataclass(frozen=True)
class Coefs(Momentum):
    """Runs code when it is asked for its coefs, which are numbers that do, too."""

    def coefs(self) -> Any:
        run()
        return [Number(c) for c in super().coefs()]


@dataclass(frozen=True)
class Counting(Adam):
    """Runs code when it is asked for the coefs of a step."""

    def coefs(self, t: Any) -> Any:
        run()
        return super().coefs(t)


@dataclass(frozen=True)
class Clip(ClipNorm):
    """Runs code when it has seen a norm."""

    def coefs(self, sums: Any) -> Any:
        run()
        return super().coefs(sums)

    def accept(self, sums: Any) -> None:
        run()


@dataclass(frozen=True)
class Own(ElementwiseRule):
    """Runs code in its step, which is array code."""

    slots = ("v",)

    def coefs(self) -> Any:
        return (0.5,)

    def init(self, x: Any) -> Any:
        run()
        return super().init(x)

    def apply(self, state: Any, x: Any, dx: Any, *higher: Any) -> Any:
        run()
        state, dx = super().apply(state, x, dx)
        run()
        return state, dx

    @staticmethod
    def step(x: Any, dx: Any, state: Any, coefs: Any) -> Any:
        (v,) = state
        (eta,) = coefs
        v = v + eta * dx
        return v, (v,)


@dataclass(frozen=True)
class Free(Rule):
    """Runs code in a rule that is no step of elements."""

    def init(self, x: Any) -> Any:
        run()
        return [np.zeros(x.shape), {"calls": 0}]

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        run()
        state[0] += abs(dx)
        return state, dx


RULES: list[Any] = [*map(example, PUBLIC), Coefs(), Counting(), Clip(), Own(), Free()]
RULES += [OptimiserChain(*pair) for pair in ((Clip(1.0), Coefs()), (AccumGrad(2), Counting()))]
RULES += [MixedPrecision("float64", rule) for rule in (Coefs(), OptimiserChain(Clip(), Own()))]

# --- scenarios ---------------------------------------------------------------------------------


def recurse() -> None:
    recurse()


HARMLESS = {"raise", "collect", "set_threads", "fork", "recurse"}
"""What code does without changing anything."""


class Scenario:
    """A model with a state and a gradient, and code that changes them behind the library's back."""

    rules: Sequence[Any] = RULES
    kinds: tuple[Any, ...] = (np.ndarray,)
    """What counts as an array."""
    has_thread = False
    """Whether a thread runs the code.

    It must not free memory of arrays behind NumPy's back: NumPy computes without the GIL, and
    ``x += 1`` then ends the process without any library. The kernels alone do not (test_user_code).
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.pick = self.draw.choice
        self.error: BaseException | None = None
        self.done: list[str] = []
        running[0] = idle
        count = self.pick([1, 2, 3, 10, 40])
        arrays = [self.array() for _ in range(count)]
        self.model = self.tree(arrays)
        rules = self.draw.sample(self.rules, 2)
        try:
            self.state = setup(rules[0], self.model)
        except TypeError:  # a rule for real numbers, and complex ones
            self.state = setup(Momentum(), self.model)
        for leaf in self.leaves():
            if self.draw.random() < 0.2:
                self.replace(leaf, rules[1])
        self.grad = self.tree([self.gradient(a) for a in arrays], self.model)

    # what it is made of

    def array(self) -> np.ndarray:
        shape = self.pick([(), (0,), (1,), (3,), (5, 2), (100,), (1000,), (30_000,)])
        dtype = self.pick(["f4", "f8", "f8", "f2", "c16", "longdouble"])
        made = np.ones(shape, dtype)
        if self.draw.random() < 0.2 and made.ndim and made.size and dtype != "longdouble":
            made = LAYOUTS[self.pick(["C", "Fortran", "strided", "reversed"])](made)
        return made.view(Array) if self.draw.random() < 0.1 else made

    def gradient(self, like: np.ndarray) -> Any:
        g = np.ones(like.shape, self.pick([like.dtype, like.dtype, np.dtype("f8")]))
        kind = self.draw.random()
        if kind < 0.05:
            return None
        if kind < 0.1:
            return g.view(Array)
        if kind < 0.3:
            return Gradient(g, self.pick(["shape", "dtype", "__array__", "__class__"]))
        return g

    def tree(self, items: list[Any], like: Any = None) -> Any:
        """Return a tree of these, of the shape of `like` if it is given."""
        form = self.draw.randrange(7) if like is None else None
        names = [f"k{k}" for k in range(len(items))]
        if isinstance(like, dict):
            form = self.pick([0, 1, 2])
        elif isinstance(like, list):
            form = self.pick([3, 4])
        elif like is not None:
            form = 5 if isinstance(like, SimpleNamespace) else 6
        if form == 0:
            return dict(zip(names, items, strict=True))
        if form == 1:
            return Map(zip(names, items, strict=True))
        if form == 2:
            return dict(zip(map(Key, names), items, strict=True))
        if form == 3:
            return list(items)
        if form == 4:
            return Items(items)
        return (SimpleNamespace if form == 5 else Thing)(**dict(zip(names, items, strict=True)))

    # what it is made of by now

    def nodes(self, tree: Any) -> list[Any]:
        held = vars(tree) if isinstance(tree, SimpleNamespace | Thing) else tree
        return list(held.values() if isinstance(held, dict) else held or ())

    def leaves(self) -> list[Leaf]:
        return [x for x in self.nodes(self.state) if isinstance(x, Leaf)]

    def arrays(self) -> list[np.ndarray]:
        found: list[Any] = [*self.nodes(self.model), *self.nodes(self.grad)]
        found = [x.array if isinstance(x, Gradient) else x for x in found]
        todo = [getattr(leaf, "state", ()) for leaf in self.leaves()]
        while todo:
            part = todo.pop()
            if isinstance(part, tuple | list):
                todo += part
            found.append(part)
        return [x for x in found if isinstance(x, self.kinds)]

    def content(self) -> Any:
        """Return all numbers of the model and its state; runs no code."""
        code, running[0] = running[0], idle
        try:
            return [self.numbers(x) for x in self.arrays()]
        finally:
            running[0] = code

    def numbers(self, array: Any) -> str:
        return f"{id(array)} {array.dtype} {array.shape} {zlib.crc32(array.tobytes())}"

    # what is done to it

    def replace(self, leaf: Leaf, rule: Any) -> None:
        size = self.pick([0, 3, 50_000])
        with contextlib.suppress(Exception):
            leaf.rule, leaf.state = rule, rule.init(np.ones(size))

    def act(self) -> None:
        """Do something to it."""
        names = [name.removeprefix("do_") for name in dir(self) if name.startswith("do_")]
        for _ in range(self.pick([1, 1, 2, 5])):
            self.done.append(self.pick(names))
            with contextlib.suppress(Exception):
                getattr(self, f"do_{self.done[-1]}")()
        if self.error is not None:
            raise self.error

    def do_change_a_tree(self) -> None:
        tree = self.pick([self.state, self.model, self.grad])
        held = vars(tree) if isinstance(tree, SimpleNamespace | Thing) else tree
        what = self.draw.randrange(5)
        if what == 0 or len(held) > 5000:
            held.clear()
        elif what == 1:
            held.pop(*([] if isinstance(held, list) else [next(iter(held))]))
        elif what == 2:
            key = self.draw.randrange(len(held)) if isinstance(held, list) else next(iter(held))
            held[key] = self.pick([None, 3, (), np.ones(3), tree, self.model, self.state])
        elif what == 3 and isinstance(held, list):
            held += [np.ones(3)] * 1000
        else:
            held.update({f"new{k}": np.ones(3) for k in range(1000)})

    def do_change_a_leaf(self) -> None:
        leaf = self.pick(self.leaves())
        what = self.draw.randrange(7)
        if what == 0:
            leaf.state = self.pick([(), None, 3, State(leaf.state), self.pick(self.leaves()).state])
        elif what == 1:
            self.replace(leaf, self.pick(self.rules))
        elif what == 2:
            delattr(leaf, self.pick(["state", "rule", "frozen", "skipped", "job", "tie"]))
        elif what == 3:
            leaf.frozen = self.pick([True, False, None, 3])
        elif what == 4:
            leaf.rule = self.pick([None, 3, *self.rules])
        elif what == 5:
            leaf.state = tuple(np.array(part) for part in leaf.state)
        else:
            leaf.state = type(leaf.state)(*[self.pick(self.arrays()) for _ in leaf.state])

    def do_change_memory(self) -> None:
        array = self.pick(self.arrays())
        what = self.draw.randrange(6)
        if what < 2:
            refcheck = what == 0 or self.has_thread
            array.resize(self.pick([0, 1, 7, 100_000]), refcheck=refcheck)
        elif what == 2 and not self.has_thread:
            array.__setstate__((1, (2,), array.dtype, False, bytes(2 * array.itemsize)))
        elif what == 3:
            array.shape = self.pick([(array.size,), (1, array.size), (array.size, 1, 1)])
        elif what == 4:
            array.setflags(write=self.pick([True, False]))
        else:
            array[...] = self.pick([0.0, np.nan, np.inf])

    def do_call_the_library(self) -> None:
        call = self.pick([update_, update, self.other])
        call() if call == self.other else call(self.state, self.model, self.grad)

    def do_raise(self) -> None:
        if self.draw.random() < 0.3:
            self.error = self.pick(
                [ValueError(), KeyboardInterrupt(), MemoryError(), StopIteration()]
            )

    def do_recurse(self) -> None:
        if self.draw.random() < 0.1:
            recurse()

    def do_collect(self) -> None:
        gc.collect(0)

    def do_set_threads(self) -> None:
        set_num_threads(self.pick([1, 2, 3, 4]))

    def do_fork(self) -> None:
        if self.draw.random() < 0.05:
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)

    # what is called

    def call(self) -> Any:
        return self.pick([self.step, self.step, self.step, self.other])()

    def step(self) -> None:
        """Take a step: a call that is refused changes nothing."""
        before, earlier, self.done = self.content(), self.done, []
        try:
            self.pick([update_, update_, update])(
                self.state, self.model, self.grad,
                on_nonfinite=self.pick(["ignore", "ignore", "skip", "raise"]),
            )  # fmt: skip
        except BaseException:
            if HARMLESS.issuperset(self.done) and running[0] is not idle:
                assert self.content() == before, "half done"
            raise
        finally:
            self.done = earlier + self.done

    def other(self) -> Any:
        state, model, grad = self.state, self.model, self.grad

        def flat() -> Any:
            _, re = destructure(model)
            return re.flatten_gradient(grad), re.flatten(model)

        calls = [
            lambda: adjust_(state, eta=self.pick([0.1, 0.5])),
            lambda: adjust(state, eta=0.1),
            lambda: freeze_(state),
            lambda: thaw_(state),
            lambda: setup(self.pick(self.rules), model),
            lambda: trainables(model),
            flat,
        ]
        return self.pick(calls)()

    def play(self) -> None:
        """Take a few steps while code runs."""
        for _ in range(3):
            thread = None
            self.has_thread = self.draw.random() < 0.3
            if self.has_thread:
                thread = threading.Thread(target=self.meddle, args=(stop := threading.Event(),))
                thread.start()
            else:
                running[0] = self.after(self.pick([0, 0, 1, 2, 5, 20, 100]))
            try:
                self.call()
            except (SystemError, AssertionError):
                raise
            except (Exception, KeyboardInterrupt):
                pass
            finally:
                running[0] = idle
                if thread is not None:
                    stop.set()
                    thread.join()
            self.error = None
        self.content()

    def after(self, delay: int) -> Code:
        """Return code that does something when it has been run so often."""

        def code() -> None:
            nonlocal delay
            delay -= 1
            if delay < 0:
                self.act()

        return code

    def meddle(self, stop: threading.Event) -> None:
        """Do something to it again and again, as another thread."""
        while not stop.is_set():
            with contextlib.suppress(BaseException):
                self.act()
            self.error = None


class Tensors(Scenario):
    """The same with tensors of PyTorch; they keep their memory, which PyTorch itself relies on."""

    rules = (*map(example, PUBLIC), Coefs(), Counting(), Clip(), Own())

    def __init__(self, seed: int) -> None:
        import torch

        self.torch: Any = torch
        self.kinds = (torch.Tensor,)
        super().__init__(seed)

    def array(self) -> Any:
        torch = self.torch
        shape = self.pick([(), (0,), (1,), (3,), (5, 2), (1000,), (30_000,)])
        dtype = self.pick([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        made = torch.ones(shape, dtype=dtype)
        if self.draw.random() < 0.2 and made.ndim == 2:
            made = made.T.contiguous().T
        return torch.nn.Parameter(made) if self.draw.random() < 0.3 else made

    def gradient(self, like: Any) -> Any:
        g = self.torch.ones(like.shape, dtype=like.dtype)
        kind = self.draw.random()
        if kind < 0.05:
            return None
        if kind < 0.3:
            when = self.pick(["shape", "dtype", "__array__", "__class__"])
            return Gradient(np.ones(tuple(like.shape), "f4"), when)
        return g

    def numbers(self, array: Any) -> str:
        bits = array.detach().contiguous().view(self.torch.uint8) if array.ndim else array.item()
        return f"{id(array)} {array.dtype} {array.shape} {zlib.crc32(repr(bits).encode())}"

    def do_change_memory(self) -> None:
        tensor = self.pick(self.arrays())
        with self.torch.no_grad():
            calls = [
                lambda: tensor.fill_(float("nan")),
                lambda: tensor.t_(),
                lambda: tensor.requires_grad_(not tensor.requires_grad),
            ]
            self.pick(calls)()


def play(kind: type[Scenario], first: int, count: int) -> None:
    """Play scenarios; say which, so that the last word of a process that ends is its seed."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    threads = get_num_threads()
    sys.setswitchinterval(1e-5)
    sys.unraisablehook = lambda _: None
    with np.errstate(all="ignore"):
        for seed in range(first, first + count):
            print(seed, end=" ", flush=True)
            faulthandler.dump_traceback_later(300, exit=True)
            kind(seed).play()
            set_num_threads(threads)
    faulthandler.cancel_dump_traceback_later()


def survives(kind: str, first: int, count: int, allocator: str) -> None:
    """Play scenarios in a process of its own, in which memory that is let go of is overwritten."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {__name__} as t; t.play(t.{kind}, {first}, {count})"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MALLOC_PERTURB_": "165",
            "PYTHONMALLOC": allocator,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-20:], done.stderr[-4000:])


@pytest.mark.parametrize("part", range(4))
def test_code_of_users_ends_no_process(part: int, scenarios: int) -> None:
    count = scenarios // 4
    survives("Scenario", part * count, count, ("malloc", "debug")[part % 2])


def test_code_of_users_ends_no_process_over_tensors(scenarios: int) -> None:
    pytest.importorskip("torch")
    survives("Tensors", 0, scenarios // 8, "malloc")
