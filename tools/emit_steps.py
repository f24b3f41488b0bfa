"""Write the words of steps and the formulas of the rules for Cython: functions, block loops.

A word becomes an inline function of one float or one double, by its text in words.py.

Each `step` becomes, for float and for double, one function over a block of numbers. The formula
itself is copied as it stands: the statements between the unpacking of `state` and `coefs` and the
`return`. Only the syntax tree is read; the package is not imported.

A loop that finishes a chain is also written fused with the steps of each of `find_leads` ahead of
it, so that a number passes through them without a way to memory and back.

Run by setup.py; by hand, of some files:
``python tools/emit_steps.py words.py RULES.py ... _steps.pxi``.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Mapping

PACKAGE = pathlib.Path(__file__).parent.parent / "optimisers"
FORMULAS = [PACKAGE / "words.py", *sorted(PACKAGE.glob("rules/[a-z]*.py"))]
"""What `generate` takes the texts of, for the library."""

# By its path, since the package cannot be imported before it is built.
spec = importlib.util.spec_from_file_location("grammar", PACKAGE / "_steps" / "grammar.py")
language = sys.modules["grammar"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(language)
Step, StepError, Word = language.Step, language.StepError, language.Word

FLAGS = "leads", "follows"
"""Fields of a step that the class of its rule says, with an underscore ahead."""

HEADER = """\
# Written by tools/emit_steps.py from words.py and the steps of the rules. Do not edit.

# The words, for one number."""

STEPS = """\
# A block step: x, g and the old slots are read, dx and the new slots written, n numbers each.
# One that finishes a chain finds x in place of dx, and leaves there x - dx. Where it is fused with
# others ahead of it, coefs are those of all, one after another.
# A measure reads x, g and the old slots, and writes its terms where further slots would stand."""


class Typed(ast.NodeTransformer):
    """The functions of C for one type, which has this at the end of their names."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        return ast.Call(ast.Name(f"c_{node.func.id}{self.suffix}"), node.args, [])


def emit_functions(words: Iterable[Word]) -> str:
    """Return the declarations of the functions of C that words call.

    They begin with ``c_``, since words have names of functions of C.
    """
    called = {name: count for word in words for name, count in word.called.items()}
    lines = ['cdef extern from "<math.h>" nogil:']
    for name, count in called.items():
        lines += [
            f'    float c_{name}f "{name}f"({", ".join(["float"] * count)})',
            f'    double c_{name} "{name}"({", ".join(["double"] * count)})',
        ]
    return "\n".join(lines)


def emit_word(word: Word) -> str:
    """Return a word as a Cython function."""
    arguments = [f"{'bint' if a in word.comparisons else 'real'} {a}" for a in word.arguments]

    def text(suffix: str, indent: str) -> str:
        body = [Typed(suffix).visit(copy.deepcopy(statement)) for statement in word.body]
        return textwrap.indent("\n".join(map(ast.unparse, body)), indent)

    lines = [f"cdef inline real {word.name}({', '.join(arguments)}) noexcept nogil:"]
    if word.called:
        lines += ["    if real is float:", text("f", " " * 8), "    else:", text("", " " * 8)]
    else:
        lines.append(text("", " " * 4))
    return "\n".join(lines)


def read_steps(source: str, words: Mapping[str, Word], method: str = "step") -> list[Step]:
    """Return the steps, or the measures, of every class in `source`, in order."""
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    found = []
    for cls in classes:
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == method:
                step = language.take_apart(language.Source(cls.name, lines), node, words)
                flags = {name: says(cls, f"_{name}", getattr(step, name)) for name in FLAGS}
                found.append(dataclasses.replace(step, **flags))
    return found


def says(cls: ast.ClassDef, name: str, default: bool) -> bool:
    """Return what the class of a rule says in a line like ``_leads = True``."""
    for node in cls.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=told)], value=ast.Constant(value=bool(said))):
                if told == name:
                    return said
    return default


def find_leads(steps: Iterable[Step]) -> list[tuple[Step, ...]]:
    """Return what is fused with a step behind it: steps that lead, and pairs of them.

    In a pair one that reads the gradient alone, as a clip does, stands ahead of one that reads the
    parameter too, as a decay does: gradients are clipped as they come, and decay belongs to the
    rule behind. Pairs come first, since the first lead that fits is taken.
    """
    leading = [step for step in steps if step.leads]
    of_gradient = [step for step in leading if not step.reads("x")]
    of_both = [step for step in leading if step.reads("x")]
    return [*itertools.product(of_gradient, of_both), *((step,) for step in leading)]


class Renamed(ast.NodeTransformer):
    """Names with a prefix, so that two steps in one loop do not meet."""

    def __init__(self, step: Step) -> None:
        self.prefix = step.rule
        self.own = {*step.coefs, *(statement.targets[0].id for statement in step.body)} - {"dx"}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"{self.prefix}_{node.id}") if node.id in self.own else node


def fused(step: Step, lead: Step) -> Step:
    """Return one step that does what `lead`, which has no slots, and then `step` does."""
    renamed = Renamed(lead)
    body = [*lead.body, ast.Assign([ast.Name("dx")], lead.dx, lineno=0)]
    return dataclasses.replace(
        step,
        rule=f"{lead.rule}_{step.rule}",
        coefs=[*(f"{lead.rule}_{coef}" for coef in lead.coefs), *step.coefs],
        body=[*(renamed.visit(copy.deepcopy(statement)) for statement in body), *step.body],
    )


def emit_loop(step: Step, real: str, finish: bool) -> str:
    """Return the Cython functions of one step for one type: the loop, and its unpacking.

    A step that finishes a chain reads x where it stands and subtracts from it, so that x passes
    through the processor together with all else.
    """
    name = f"{step.rule}_{real}{'_finish' * finish}"
    assigned = {statement.targets[0].id for statement in step.body}
    local = [*sorted({"x", "dx", *step.slots, *assigned}), *(f"new_{slot}" for slot in step.slots)]
    target = "x_out" if finish else "dx_out"
    x_in = f"const_{real}_p x_in, " * (not finish)
    dx = ast.unparse(step.dx)
    lines = [
        f"cdef void {name}_loop(",
        f"    {x_in}const_{real}_p dx_in, {real}_p {target},",
        *(f"    {real}_p slot_{slot}," for slot in step.slots),
        f"    const_{real}_p coefs, Py_ssize_t length,",
        ") noexcept nogil:",
        "    cdef Py_ssize_t index",
        f"    cdef {real} {', '.join(local)}",
        *(f"    cdef {real} {coef} = coefs[{k}]" for k, coef in enumerate(step.coefs)),
        "    for index in range(length):",
        f"        x = {'x_out' if finish else 'x_in'}[index]",
        "        dx = dx_in[index]",
        *(f"        {slot} = slot_{slot}[index]" for slot in step.slots),
        *(f"        {ast.unparse(statement)}" for statement in step.body),
        *(
            f"        new_{slot} = {ast.unparse(value)}"
            for slot, value in zip(step.slots, step.new, strict=True)
        ),
        f"        {target}[index] = " + (f"x - ({dx})" if finish else dx),
        *(f"        slot_{slot}[index] = new_{slot}" for slot in step.slots),
        "",
        "",
        f"cdef void {name}(",
        "    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n",
        ") noexcept nogil:",
        f"    {name}_loop(",
        f"        {f'<const {real}*> x, ' * (not finish)}<const {real}*> g, <{real}*> dx,",
        *(f"        <{real}*> slots[{k}]," for k in range(len(step.slots))),
        f"        <const {real}*> coefs, n,",
        "    )",
    ]
    return "\n".join(lines)


def is_gradient(measure: Step) -> bool:
    """Tell whether the one term of a measure is what reaches the rule, as it is."""
    return not measure.body and [ast.unparse(term) for term in measure.terms] == ["dx"]


def emit_measure(measure: Step, real: str) -> str:
    """Return the Cython function of one measure for one type: its terms, number by number."""
    name = f"{measure.rule}_measure_{real}"
    assigned = {statement.targets[0].id for statement in measure.body}
    local = sorted({"x", "dx", *measure.slots, *assigned})
    terms = [f"term_{k}" for k in range(len(measure.terms))]
    arrays = [*(f"slot_{slot}" for slot in measure.slots), *terms]
    lines = [
        f"cdef void {name}_loop(",
        f"    const_{real}_p x_in, const_{real}_p dx_in,",
        *(f"    {real}_p {array}," for array in arrays),
        f"    const_{real}_p coefs, Py_ssize_t length,",
        ") noexcept nogil:",
        "    cdef Py_ssize_t index",
        f"    cdef {real} {', '.join(local)}",
        *(f"    cdef {real} {coef} = coefs[{k}]" for k, coef in enumerate(measure.coefs)),
        "    for index in range(length):",
        "        x = x_in[index]",
        "        dx = dx_in[index]",
        *(f"        {slot} = slot_{slot}[index]" for slot in measure.slots),
        *(f"        {ast.unparse(statement)}" for statement in measure.body),
        *(
            f"        {term}[index] = {ast.unparse(value)}"
            for term, value in zip(terms, measure.terms, strict=True)
        ),
        "",
        "",
        f"cdef void {name}(",
        "    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n",
        ") noexcept nogil:",
        f"    {name}_loop(",
        f"        <const {real}*> x, <const {real}*> g,",
        *(f"        <{real}*> slots[{k}]," for k in range(len(arrays))),
        f"        <const {real}*> coefs, n,",
        "    )",
    ]
    return "\n".join(lines)


def emit_loops(step: Step, finish: bool) -> list[str]:
    """Return the functions of one step for each type."""
    return [emit_loop(step, real, finish) for real in ("float", "double")]


def generate(vocabulary: str, *sources: str) -> str:
    """Return the text of _steps.pxi for the texts of words.py and of the files of rules."""
    words = language.read_words(vocabulary)
    steps = [step for source in sources for step in read_steps(source, words)]
    followers = [step for step in steps if step.follows and not step.leads]
    measures = [m for source in sources for m in read_steps(source, words, "measure")]
    loops, table = [], ["cdef int fill_table() except -1:"]
    for step in steps:
        name = step.rule
        loops += emit_loops(step, finish=False) + emit_loops(step, finish=True)
        table += [
            f"    add_step({name!r}, {len(step.slots)}, {len(step.coefs)},",
            f"             {name}_float, {name}_double,",
            f"             {name}_float_finish, {name}_double_finish)",
        ]
    for lead in find_leads(steps):
        table.append(f"    add_lead({tuple(step.rule for step in lead)!r})")
        for step in followers:
            whole = functools.reduce(fused, reversed(lead), step)
            loops += emit_loops(whole, finish=True)
            table += [
                f"    add_fused({step.rule!r},",
                f"              {whole.rule}_float_finish, {whole.rule}_double_finish)",
            ]
    for measure in measures:
        name = f"{measure.rule}_measure"
        made = not is_gradient(measure)
        if made:
            loops += [emit_measure(measure, real) for real in ("float", "double")]
        table += [
            f"    add_measure({measure.rule!r}, {len(measure.slots)}, {len(measure.coefs)},",
            f"                {tuple(measure.kinds)!r},",
            f"                {f'{name}_float, {name}_double' if made else 'NULL, NULL'})",
        ]
    functions = [emit_functions(words.values()), *map(emit_word, words.values())]
    table.append("    return 0")
    return "\n\n\n".join([HEADER, *functions, STEPS, *loops, "\n".join(table)]) + "\n"


if __name__ == "__main__":
    *sources, target = map(pathlib.Path, sys.argv[1:])
    target.write_text(generate(*(file.read_text() for file in sources)))
