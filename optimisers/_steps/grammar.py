"""The language of steps: what the formula of a rule may say, and the reader that takes it apart.

A step is straight lines of `name = formula`, closed by ``return dx, (slots...)``. A formula is
made of names, ``+ - * /`` and *words*; a comparison stands only as the first argument of `where`.
Numbers come from `coefs`, so that each is cast once and no float64 creeps into float32.

tools/emit_steps.py reads the library's own rules with this at build time, by its path and before
the package can be imported; `_engine` reads the rules of users. So nothing else is imported here,
and the words are handed in.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, NoReturn

ARGUMENTS = ["x", "dx", "state", "coefs"]
NEARBY = {
    "abs": "absolute(v)",
    "fabs": "absolute(v)",
    "max": "maximum(v, w)",
    "min": "minimum(v, w)",
    "square": "abs2(v)",
    "pow": "abs2(v), sqrt(v) or v * v",
    "power": "abs2(v), sqrt(v) or v * v",
}
"""Advice for functions that are no words, by their last names."""

REDUCTIONS = "largest", "norm"
"""Words that stand around a whole term of a measure, and nowhere else."""

WORDS_MODULE = "optimisers.words"

MEASURED = "a measure ends with `return term, ...`, for each number one term"
ASSIGN = "a step is made of lines `name = formula`"
RETURN = "a step ends with `return dx, (slots...)`"
CHOOSE = "`where(condition, v, w)` chooses, element by element"


class StepError(ValueError):
    """A step that is not in the language of steps; the message shows where and what to write."""


@dataclass(frozen=True)
class Word:
    """A function that a step may call."""

    name: str
    arguments: tuple[str, ...]
    body: tuple[ast.stmt, ...]
    """Its text for one number, which ends with a `return`."""
    meaning: object = None
    """The function of arrays, if the word is read while the program runs; else None."""

    @functools.cached_property
    def comparisons(self) -> set[str]:
        """The positions of its arguments that are comparisons."""
        tests = [n.test for n in self._nodes() if isinstance(n, ast.If | ast.IfExp)]
        return {test.id for test in tests if isinstance(test, ast.Name)}

    @functools.cached_property
    def called(self) -> dict[str, int]:
        """The functions of C that its text calls, each with the number of its arguments."""
        calls = [node for node in self._nodes() if isinstance(node, ast.Call)]
        return {n.func.id: len(n.args) for n in calls if isinstance(n.func, ast.Name)}

    def _nodes(self) -> Iterator[ast.AST]:
        return (node for statement in self.body for node in ast.walk(statement))


def read_word(name: str, arguments: Iterable[str], text: str, meaning: object = None) -> Word:
    """Return the word whose text for one number in `optimisers.words` is `text`."""
    body = ast.parse(inspect.cleandoc(text)).body
    match body:
        case [ast.Expr(value=value)]:
            body = [ast.Return(value)]
    return Word(name, tuple(arguments), tuple(body), meaning)


def read_words(source: str) -> dict[str, Word]:
    """Return the words in the text of words.py."""
    found = {}
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(
                decorator_list=[
                    ast.Call(func=ast.Name(id="_step_word"), args=[ast.Constant(value=str(text))])
                ]
            ):
                found[node.name] = read_word(node.name, (a.arg for a in node.args.args), text)
    return found


def words_of(texts: Mapping[Callable[..., Any], str]) -> dict[str, Word]:
    """Return the words for these functions, each with its text for one number."""
    return {
        function.__name__: read_word(
            function.__name__, inspect.signature(function).parameters, text, function
        )
        for function, text in texts.items()
    }


@dataclass
class Step:
    """One formula, taken apart."""

    rule: str
    slots: list[str] = field(default_factory=list)
    coefs: list[str] = field(default_factory=list)
    body: list[ast.Assign] = field(default_factory=list)
    dx: ast.expr = field(default_factory=lambda: ast.Name("dx"))
    new: list[ast.expr] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)
    """The words in it, each with the first line that has it."""
    terms: list[ast.expr] = field(default_factory=list)
    """The terms that a measure returns; a step has none."""
    kinds: list[str] = field(default_factory=list)
    """How each term is reduced: "sum", or one of `REDUCTIONS`."""
    unpacked: dict[str, int] = field(default_factory=dict)
    """The lines that unpack state and coefs."""
    leads: bool = False
    """Whether it shares a loop with the step behind it: `ElementwiseRule._leads`."""
    follows: bool = True
    """Whether it shares a loop with those ahead of it that lead: `ElementwiseRule._follows`."""

    def reads(self, name: str) -> bool:
        """Tell whether its formula mentions a name."""
        formulas = [*self.body, self.dx, *self.new, *self.terms]
        names = (n for node in formulas for n in ast.walk(node) if isinstance(n, ast.Name))
        return any(n.id == name and isinstance(n.ctx, ast.Load) for n in names)


class Source:
    """The source that contains a step, for messages."""

    def __init__(
        self, rule: str, lines: Sequence[str], file: str | None = None, name: str = "step"
    ) -> None:
        self.rule, self.lines, self.file, self.name = rule, lines, file, name

    def refuse(self, advice: str, line: int, column: int | None = None) -> NoReturn:
        """Raise a `StepError` that shows a line and says what to write."""
        message = f"{self.rule}.{self.name}, line {line}: {advice}"
        if self.file is not None:
            message += f'\n  File "{self.file}", line {line}'
        if 0 < line <= len(self.lines):
            shown = self.lines[line - 1].rstrip()
            code = shown.lstrip()
            message += f"\n    {code}"
            if column is not None:
                # ast counts columns in bytes
                before = len(shown.encode()[:column].decode(errors="ignore"))
                message += f"\n    {' ' * (before - len(shown) + len(code))}^"
        raise StepError(message)


def take_apart(source: Source, function: ast.FunctionDef, words: Mapping[str, Word]) -> Step:
    """Split a step into the names it unpacks, its formula, and what it returns.

    Raises
    ------
    StepError
        If it is not in the language.
    """
    return _Reader(source, words).read(function)


class _Reader:
    """Reads one step from its first line to its last."""

    def __init__(self, source: Source, words: Mapping[str, Word]) -> None:
        self.source, self.words = source, words
        self.step = Step(source.rule)
        self.known = {"x", "dx"}
        self.arrays = {"x", "dx"}  # and what was made of them; coefs are single numbers

    def refuse(self, node: ast.AST, advice: str) -> NoReturn:
        self.source.refuse(advice, getattr(node, "lineno", 0), getattr(node, "col_offset", None))

    def read(self, function: ast.FunctionDef) -> Step:
        args = function.args
        names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
        if names != ARGUMENTS or args.kwonlyargs or args.vararg or args.kwarg or args.defaults:
            self.refuse(
                function,
                f"write `def {function.name}({', '.join(ARGUMENTS)})` below @staticmethod",
            )
        *statements, last = function.body
        for statement in statements:
            self.statement(statement)
        if function.name == "measure":
            self.terms(last)
        else:
            self.ending(last)
        return self.step

    def terms(self, node: ast.stmt) -> None:
        match node:
            case ast.Return(value=ast.Tuple(elts=[_, *_] as terms)):
                pass
            case _:
                self.refuse(node, f"{MEASURED}: `return norm(dx),` has one")
        for term in terms:
            kind = "sum"
            match term:
                case ast.Call(func=ast.Name(id=word), args=[value], keywords=[]):
                    if word in REDUCTIONS:
                        self.step.words.setdefault(word, term.lineno)
                        kind, term = word, value
            self.of_arrays(term)
            self.step.kinds.append(kind)
            self.step.terms.append(term)

    def of_arrays(self, value: ast.expr) -> None:
        """Refuse what is no formula of arrays."""
        self.formula(value)
        if not self.arrays & {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}:
            number = ast.unparse(value)
            self.refuse(
                value,
                f"`{number}` is one number, not an array: `zeros_like(x) + {number}` is one",
            )

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.If():
                self.refuse(node, f"a step has no branches: {ASSIGN}, and {CHOOSE}")
            case ast.For() | ast.While():
                self.refuse(node, f"a step has no loops, it runs on every element: {ASSIGN}")
            case ast.Assign(targets=[ast.Name(id=name) as target], value=value):
                if isinstance(value, ast.Name) and value.id in ("state", "coefs"):
                    self.refuse(node, f"unpack it: `({name},) = {value.id}`")
                self.formula(value)
                self.introduce(target)
                if self.arrays & {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}:
                    self.arrays.add(name)
                else:
                    self.arrays.discard(name)
                self.step.body.append(node)
            case ast.Assign(
                targets=[ast.Tuple(elts=elts) | ast.List(elts=elts)],
                value=ast.Name(id="state" | "coefs" as whole),
            ):
                self.unpack(whole, elts, node)
            case ast.Assign(targets=[ast.Tuple() | ast.List() | ast.Subscript() | ast.Attribute()]):
                self.refuse(node, "assign to one name at a time; only state and coefs are unpacked")
            case _:
                self.refuse(node, f"{ASSIGN}, and comments stand after #; nothing else works here")

    def unpack(self, whole: str, elts: Sequence[ast.expr], node: ast.stmt) -> None:
        found = self.step.slots if whole == "state" else self.step.coefs
        if whole in self.step.unpacked:
            self.refuse(node, f"unpack {whole} once")
        self.step.unpacked[whole] = node.lineno
        for name in elts:
            if not isinstance(name, ast.Name):
                self.refuse(name, f"unpack {whole} into plain names: `(a, b) = {whole}`")
            if name.id == "_":  # one that is not needed
                found.append(f"_{len(found)}")
                continue
            if name.id in self.known:
                self.refuse(name, f"`{name.id}` has a meaning already: choose another name")
            self.introduce(name)
            found.append(name.id)
            if whole == "state":
                self.arrays.add(name.id)

    def introduce(self, name: ast.Name) -> None:
        if name.id in (*self.words, *self.step.coefs, "state", "coefs"):
            self.refuse(name, f"`{name.id}` has a meaning already: choose another name")
        self.known.add(name.id)

    def ending(self, node: ast.stmt) -> None:
        match node:
            case ast.Return(value=ast.Tuple(elts=[dx, ast.Tuple(elts=new)])):
                pass
            case _:
                self.refuse(node, f"{RETURN}, or `return dx, ()` if it keeps nothing")
        for value in (dx, *new):
            self.of_arrays(value)
        if len(new) != len(self.step.slots):
            self.refuse(
                node,
                f"it returns {len(new)} slots and unpacks {len(self.step.slots)}: "
                "return as many slots as it unpacks, in the same order",
            )
        self.step.dx, self.step.new = dx, new

    def formula(self, node: ast.expr) -> None:
        """Refuse what is no formula."""
        match node:
            case ast.Name(id=name):
                self.name(node, name)
            case ast.Constant(value=value):
                self.refuse(
                    node,
                    f"the number {value!r} belongs into coefs: let `coefs` return it, and unpack "
                    "it by a name of its own",
                )
            case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
                self.formula(operand)
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
                self.formula(node.left)
                self.formula(node.right)
            case ast.BinOp(op=ast.Pow()):
                self.refuse(
                    node,
                    f"`{ast.unparse(node)}` is no formula: write abs2(v) or v * v for a square, "
                    "sqrt(v) for a root",
                )
            case ast.Call(func=function, args=args, keywords=keywords):
                for arg in args:
                    if not isinstance(arg, ast.Compare):
                        self.formula(arg)
                if not isinstance(function, ast.Name) or function.id not in self.words:
                    self.refuse(
                        node, f"{ast.unparse(function)} is no word: {self.instead(function)}"
                    )
                self.call(node, function.id, args, keywords)
            case ast.Compare():
                self.refuse(node, f"a comparison is no number: {CHOOSE}")
            case ast.IfExp():
                self.refuse(node, f"a step has no branches: {CHOOSE}")
            case ast.BoolOp():
                self.refuse(node, f"nothing joins comparisons: {CHOOSE}, also one inside another")
            case ast.Subscript(value=ast.Name(id="state" | "coefs" as whole)):
                self.refuse(node, f"unpack it: `(a, b) = {whole}`")
            case ast.Attribute():
                self.refuse(node, f"`{ast.unparse(node)}` is no word: {self.instead(node)}")
            case _:
                self.refuse(
                    node,
                    f"`{ast.unparse(node)}`: a formula has names, + - * / and words "
                    f"({', '.join(sorted(self.words))})",
                )

    def call(
        self, node: ast.Call, word: str, args: list[ast.expr], keywords: list[ast.keyword]
    ) -> None:
        known = self.words[word]
        if keywords or len(args) != len(known.arguments):
            self.refuse(node, f"{word} takes {len(known.arguments)} arguments, by position")
        self.step.words.setdefault(word, node.lineno)
        for argument, arg in zip(known.arguments, args, strict=True):
            if argument in known.comparisons:
                self.condition(arg)
            elif isinstance(arg, ast.Compare):
                self.formula(arg)

    def condition(self, node: ast.expr) -> None:
        match node:
            case ast.Compare(
                left=left, ops=[ast.Lt() | ast.LtE() | ast.Gt() | ast.GtE()], comparators=[right]
            ):
                self.formula(left)
                self.formula(right)
            case ast.Compare():
                self.refuse(node, "compare two numbers, by < <= > or >=; one `where` in another")
            case _:
                self.refuse(node, "where begins with a comparison: `where(v > w, a, b)`")

    def name(self, node: ast.Name, name: str) -> None:
        if name in self.known:
            return
        if name in ("state", "coefs"):
            self.refuse(node, f"unpack it: `(a, b) = {name}`")
        if name in self.words:
            self.refuse(node, f"{name} is a word: call it")
        self.refuse(
            node,
            f"nothing is called `{name}` here: what a step needs beside x, dx and its slots, "
            "`coefs` returns",
        )

    def instead(self, function: ast.expr) -> str:
        last = ast.unparse(function).rpartition(".")[2]
        if last in self.words:
            return f"write {last}(...), after `from optimisers.words import {last}`"
        if last in NEARBY:
            return f"write {NEARBY[last]}"
        known = ", ".join(sorted(self.words))
        return f"there are {known}. A rule that needs more subclasses Rule, with `apply`"


# --- steps of live classes -------------------------------------------------------------------


def check(rule: Any, coefs: int, words: Mapping[str, Word], name: str = "step") -> None:
    """Check the step, or the measure, of a user's rule.

    Where the text of the step is not to be had, its code is looked at as far as that goes.

    Parameters
    ----------
    rule : type
        A class with `slots` and a `step` that is a function.
    coefs : int
        How many numbers its `coefs`, or `measure_coefs`, returns.
    words : mapping
        The words; the step must not mean something else by one.
    name : {"step", "measure"}
        Which of them.

    Raises
    ------
    StepError
        If it is not in the language.
    """
    step = getattr(rule, name)
    code = step.__code__
    lines = linecache.getlines(code.co_filename, step.__globals__)
    source = Source(rule.__name__, lines, code.co_filename, name)
    first = code.co_firstlineno
    if not isinstance(inspect.getattr_static(rule, name), staticmethod):
        source.refuse("write @staticmethod above it", first)
    function = _find(lines, code)
    if function is None:
        _check_code(source, code, words)
        said = dict.fromkeys(_outer_names(code), first)
    else:
        taken = take_apart(source, function, words)
        said = taken.words
        for whole, names, given in (
            ("state", taken.slots, len(rule.slots)),
            ("coefs", taken.coefs, coefs),
        ):
            line = taken.unpacked.get(whole, function.lineno)
            if len(names) != given and (names or whole == "state"):
                of = "coefs" if name == "step" else "measure_coefs"
                giver = "`slots` names" if whole == "state" else f"`{of}` returns"
                source.refuse(f"it unpacks {len(names)} from {whole}, but {giver} {given}", line)
    known = visible(step)
    for word, line in said.items():
        if word in REDUCTIONS:
            is_ours = getattr(known.get(word), "__module__", None) == WORDS_MODULE
        else:
            is_ours = known.get(word) is words[word].meaning
        if not is_ours:
            what = f"is {known[word]!r:.60}" if word in known else "means nothing"
            source.refuse(
                f"{word} {what} here: write `from optimisers.words import {word}` above", line
            )


def visible(step: FunctionType) -> dict[str, object]:
    """Return the values of the names that a function takes from outside."""
    code = step.__code__
    given = {name: step.__globals__[name] for name in code.co_names if name in step.__globals__}
    for name, cell in zip(code.co_freevars, step.__closure__ or (), strict=True):
        try:
            given[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return given


def _outer_names(code: CodeType) -> tuple[str, ...]:
    return code.co_names + code.co_freevars


def _find(lines: Sequence[str], code: CodeType) -> ast.FunctionDef | None:
    """Return the definition from which `code` was compiled, None if it is not in these lines."""
    try:
        tree = ast.parse("".join(lines))
    except Exception:  # the lines may be any text
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno and _is_text_of(node, code):
                return node
    return None


def _is_text_of(node: ast.FunctionDef, code: CodeType) -> bool:
    """Tell whether a definition still is that of `code`: files change while programs run."""
    made = compile(ast.Module([node], []), "<step>", "exec", dont_inherit=True).co_consts
    return any(
        isinstance(other, CodeType)
        and other.co_varnames == code.co_varnames
        and other.co_consts == code.co_consts
        and {*_outer_names(other)} == {*_outer_names(code)}
        for other in made
    )


def _check_code(source: Source, code: CodeType, words: Mapping[str, Word]) -> None:
    """Refuse compiled code with instructions or names that the language does not have."""
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        position = instruction.positions
        line = (position and position.lineno) or line
        if instruction.opcode in {*dis.hasjrel, *dis.hasjabs}:
            source.refuse(f"a step has neither branches nor loops: {CHOOSE}", line)
        if instruction.opname.startswith("LOAD_") and isinstance(
            instruction.argval, bool | int | float | complex
        ):
            source.refuse(f"the number {instruction.argval!r} belongs into coefs", line)
    for name in _outer_names(code):
        if name not in words and not (source.name == "measure" and name in REDUCTIONS):
            source.refuse(
                f"{name} is no word; there are {', '.join(sorted(words))}. What else a step needs, "
                "`coefs` returns",
                code.co_firstlineno,
            )
