"""Write the formulas of the rules as typed block loops for Cython.

Each `step` becomes, for float and for double, one function over a block of numbers. The formula
itself is copied as it stands: the statements between the unpacking of `state` and `coefs` and the
`return`. Only the syntax tree is read; the package is not imported.

A loop that finishes a chain is also written with the steps of each of `LEADS` ahead of it, so that
a number passes through them without a way to memory and back.

Run by setup.py; by hand, of some files: ``python tools/emit_steps.py RULES.py ... _steps.pxi``.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib.util
import pathlib
import sys

# By its path, since the package cannot be imported before it is built.
PATH = pathlib.Path(__file__).parent.parent / "optimisers" / "_steps" / "grammar.py"
spec = importlib.util.spec_from_file_location("grammar", PATH)
language = sys.modules["grammar"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(language)
Step, StepError = language.Step, language.StepError

LEADS = [
    ("ClipGrad", "WeightDecay"),
    ("_Scale", "WeightDecay"),
    ("ClipGrad",),
    ("_Scale",),
    ("WeightDecay",),
]
"""Steps without slots that users put ahead of a rule, longest first; `_Scale` is ClipNorm's."""

HEADER = """\
# Written by tools/emit_steps.py from the steps of the rules. Do not edit.

# A block step: x, g and the old slots are read, dx and the new slots written, n numbers each.
# One that finishes a chain finds x in place of dx, and leaves there x - dx. Where it is led by
# others, coefs are those of all, one after another.
"""


def read_steps(source: str) -> list[Step]:
    """Return the steps of every class in `source`, in order."""
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    found = []
    for cls in classes:
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == "step":
                found.append(language.take_apart(language.Source(cls.name, lines), node))
    return found


class Renamed(ast.NodeTransformer):
    """Names with a prefix, so that two steps in one loop do not meet."""

    def __init__(self, step: Step) -> None:
        self.prefix = step.rule
        self.own = {*step.coefs, *(statement.targets[0].id for statement in step.body)} - {"dx"}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"{self.prefix}_{node.id}") if node.id in self.own else node


def led_by(step: Step, lead: Step) -> Step:
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


def emit_loops(step: Step, finish: bool) -> list[str]:
    """Return the functions of one step for each type."""
    return [emit_loop(step, real, finish) for real in ("float", "double")]


def generate(*sources: str) -> str:
    """Return the text of _steps.pxi for the texts of the files of rules."""
    steps = {step.rule: step for source in sources for step in read_steps(source)}
    leads = [lead for lead in LEADS if {*lead} <= {*steps}]
    followers = [step for step in steps.values() if not any(step.rule in lead for lead in leads)]
    loops, table = [], ["cdef int fill_table() except -1:"]
    for name, step in steps.items():
        loops += emit_loops(step, finish=False) + emit_loops(step, finish=True)
        table += [
            f"    add_step({name!r}, {len(step.slots)}, {len(step.coefs)},",
            f"             {name}_float, {name}_double,",
            f"             {name}_float_finish, {name}_double_finish)",
        ]
    for lead in leads:
        table.append(f"    add_lead({lead!r})")
        for step in followers:
            whole = functools.reduce(led_by, (steps[rule] for rule in reversed(lead)), step)
            loops += emit_loops(whole, finish=True)
            table += [
                f"    add_led({step.rule!r},",
                f"            {whole.rule}_float_finish, {whole.rule}_double_finish)",
            ]
    return HEADER + "\n\n" + "\n\n\n".join([*loops, "\n".join([*table, "    return 0"])]) + "\n"


if __name__ == "__main__":
    *rules, target = map(pathlib.Path, sys.argv[1:])
    target.write_text(generate(*(file.read_text() for file in rules)))
