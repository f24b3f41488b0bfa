"""A rule's step as machine code, made by Numba while the program runs.

a) `scalar_words` makes of each word a function of single numbers, by its text in `words`, and
   `rebound` gives a step these in place of the functions of arrays. So the function that the user
   wrote is compiled as it stands.
b) `block_step` compiles it into a loop of the signature that the kernels call. Numba neither fuses
   multiplications with additions nor reorders anything unless told so: the bits are those of the
   array code.
c) Numba caches only functions that stand in a file. So the loop is written to one, in the user's
   folder for caches (`cache`), under a name that is a digest of all that decides on the
   machine code.

Numba is imported when the first step is compiled, and is optional.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import hashlib
import math
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np

from .. import _fork, words
from . import cache as step_cache
from . import grammar

# --- words -----------------------------------------------------------------------------------


WORDS = grammar.words_of(words.TEXTS)
DEVICE_WORDS = grammar.words_of(words.TEXTS | words.DEVICE_TEXTS)


def check(cls: Any, coefs: int, name: str = "step") -> None:
    """Check the step of a user's rule, which takes so many coefs: `grammar.check`, asked once.

    Or its measure, if that is the name.

    Raises
    ------
    StepError
        If it is not in the language of steps.
    """
    _check(cls, getattr(cls, name), coefs, name)


@functools.lru_cache(maxsize=1024)
def _check(cls: Any, step: FunctionType, coefs: int, name: str) -> None:
    grammar.check(cls, coefs, WORDS, name)


def scalar_words(
    known: Mapping[str, grammar.Word], real: type, library: Any = math
) -> dict[str, Callable[..., Any]]:
    """Return words of a step for single numbers of the type `real`, as plain Python.

    Parameters
    ----------
    known : mapping
        `WORDS` or `DEVICE_WORDS`.
    real : type
        The type of the arguments, and of the numbers in a text.
    library : module
        Where functions of C are found: `math`, which compilers know, or NumPy. As plain Python
        `math` refuses the root of -1, and returns double for float32.
    """
    return {name: _scalar_word(word, real, library) for name, word in known.items()}


def _scalar_word(word: grammar.Word, real: type, library: Any) -> Callable[..., Any]:
    module = ast.parse(f"def {word.name}({', '.join(word.arguments)}): pass")
    body = [_TypedNumbers().visit(copy.deepcopy(statement)) for statement in word.body]
    module.body[0].body = body  # type: ignore[attr-defined]
    ast.fix_missing_locations(module)
    defined: dict[str, Any] = {}
    given = {"__name__": __name__, "real": real}
    given |= {called: getattr(library, called) for called in word.called}
    exec(compile(module, "<word>", "exec"), given, defined)
    made: Callable[..., Any] = defined[word.name]
    return made


class _TypedNumbers(ast.NodeTransformer):
    """Converts each number of a text to the type ``real``."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Call(ast.Name("real", ast.Load()), [node], [])


def rebound(step: FunctionType, meanings: Mapping[str, object]) -> FunctionType:
    """Return `step` with other meanings of the names that it takes from outside."""
    code = step.__code__
    cells = tuple(CellType(meanings[name]) for name in code.co_freevars)
    return FunctionType(code, {"__name__": __name__, **meanings}, code.co_name, None, cells)


# --- the loop over a block -------------------------------------------------------------------


def block_text(slots: int, coefs: int, terms: int = 0) -> str:
    """Return the text of a function with the C signature of a block step.

    Of a measure, which has terms, if there are any: these stand where further slots would.
    """

    def tuple_of(items: list[str]) -> str:
        return f"({''.join(f'{item}, ' for item in items)})"

    slot = [f"slot{k}" for k in range(slots)]
    lines = [
        "def block(x, g, dx, slots, coefs, n):",
        *(f"    {name} = slots[{k}]" for k, name in enumerate(slot)),
        f"    numbers = {tuple_of([f'coefs[{k}]' for k in range(coefs)])}",
        *(f"    term{k} = slots[{slots + k}]" for k in range(terms)),
        "    for i in range(n):",
        f"        old = {tuple_of([f'{name}[i]' for name in slot])}",
    ]
    if terms:
        lines += [
            "        new = step(x[i], g[i], old, numbers)",
            *(f"        term{k}[i] = new[{k}]" for k in range(terms)),
        ]
    else:
        lines += [
            "        dx[i], new = step(x[i], g[i], old, numbers)",
            *(f"        {name}[i] = new[{k}]" for k, name in enumerate(slot)),
        ]
    return "\n".join(lines) + "\n"


_made: dict[str, Any] = {}
"""Compiled block steps by their digests; None for a step that stays array code. Nothing else
remembers them: classes with the same step share one, for as long as the process lives."""

DTYPES = "float32", "float64"


def block_step(
    rule: str, step: FunctionType, slots: int, coefs: int, dtype: str, terms: int = 0
) -> int | None:
    """Return the address of a compiled block step, None where it has to stay array code.

    Parameters
    ----------
    rule : str
        Name of the rule, for the warning.
    step : function
        In the language of steps.
    slots, coefs : int
        How many of each it takes.
    dtype : str
        "float32" or "float64".
    terms : int
        Of a measure, how many terms it has.

    Warns
    -----
    RuntimeWarning
        Once, if Numba is there but cannot compile it.
    """
    key = _digest(step, slots, coefs, dtype, terms)
    if key not in _made:
        with _fork.compiling:
            if key not in _made:  # another thread has compiled it meanwhile
                _make(rule, step, slots, coefs, dtype, terms)
    made = _made[key]
    return None if made is None else int(made.address)


def _make(rule: str, step: FunctionType, slots: int, coefs: int, dtype: str, terms: int) -> None:
    key = _digest(step, slots, coefs, dtype, terms)
    try:
        _made[key] = _compile(step, slots, coefs, dtype, terms, key)
    except Exception as error:
        for name in DTYPES:  # not tried for the other one, so that this is told once
            _made.setdefault(_digest(step, slots, coefs, name, terms), None)
        reason = str(error).strip() or type(error).__name__
        warnings.warn(
            f"Numba cannot compile {rule}.{step.__name__}, so it runs as array code: same numbers, "
            f"slower. The reason: {reason}",
            RuntimeWarning,
            stacklevel=8,  # the caller of `update`
        )


def _compile(step: FunctionType, slots: int, coefs: int, dtype: str, terms: int, key: str) -> Any:
    """Return the compiled block step, None where Numba is not installed or switched off."""
    try:
        import numba
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return None
        raise
    if numba.config.DISABLE_JIT:
        return None
    options = {"error_model": "numpy"}  # x / 0 is inf or nan
    jit = numba.njit(**options)
    meanings = {name: jit(word) for name, word in scalar_words(WORDS, getattr(np, dtype)).items()}
    meanings |= dict.fromkeys(grammar.REDUCTIONS, jit(_term))
    text = block_text(slots, coefs, terms)

    numbers = numba.types.CPointer(numba.from_dtype(np.dtype(dtype)))
    signature = numba.types.void(
        numbers, numbers, numbers, numba.types.CPointer(numbers), numbers, numba.types.intp
    )

    def made(file: str, cache: bool) -> Any:
        given = {"__name__": __name__, "step": jit(rebound(step, meanings))}
        exec(compile(text, file, "exec"), given)
        if not cache:
            return numba.cfunc(signature, **options)(given["block"])
        folder = numba.core.caching.FunctionCache(given["block"]).cache_path
        if not step_cache.is_safe(folder):
            return None
        found = numba.cfunc(signature, cache=True, **options)(given["block"])
        step_cache.close_to_others(folder)
        return found

    file = step_cache.written(text, f"{key}_{numba.__version__}")
    if file is not None:
        with contextlib.suppress(Exception):  # if the cache is broken, compile without it
            if (found := made(file, True)) is not None:
                return found
    return made("<step>", False)


def _term(x: Any) -> Any:
    """Stand for a word that says how a term is reduced, which is done behind the loop."""
    return x


# --- its name -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _digest(step: FunctionType, slots: int, coefs: int, dtype: str, terms: int) -> str:
    """Return a name for the machine code: everything that changes the code changes the name.

    The processor is not in it: Numba keeps the code for each apart.
    """
    codes = [step.__code__, *(word.__code__ for word in scalar_words(WORDS, float).values())]
    facts = [
        platform.python_implementation(),
        sys.version_info[:3],
        dtype,
        block_text(slots, coefs, terms),
        *map(_code_facts, codes),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _code_facts(code: CodeType) -> tuple[object, ...]:
    names = code.co_varnames, code.co_names, code.co_freevars
    return code.co_code, code.co_consts, *names
