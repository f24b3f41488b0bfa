"""Write the formulas of rules.py as typed block loops for Cython.

Each `step` becomes, for float and for double, one function over a block of numbers. The formula
itself is copied as it stands: the statements between the unpacking of `state` and `coefs` and the
`return`. Only the syntax tree is read; the package is not imported.

Run by setup.py; by hand: ``python tools/emit_steps.py optimisers/rules.py optimisers/_steps.pxi``.
"""

from __future__ import annotations

import ast
import pathlib
import sys
from dataclasses import dataclass

HEADER = """\
# Written by tools/emit_steps.py from the steps in rules.py. Do not edit.

# A block step: x, g and the old slots are read, dx and the new slots written, n numbers each.
"""


class StepError(SyntaxError):
    """A step that is not in the language of steps."""


@dataclass
class Step:
    """One formula, taken apart."""

    rule: str
    slots: list[str]
    coefs: list[str]
    body: list[ast.stmt]
    dx: ast.expr
    new: list[ast.expr]


def read_steps(source: str) -> list[Step]:
    """Return the steps of every class in `source`, in order."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    found = []
    for cls in classes:
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == "step":
                found.append(take_apart(cls.name, node))
    return found


def take_apart(rule: str, function: ast.FunctionDef) -> Step:
    """Split a step into the names it unpacks, its formula, and what it returns."""
    names: dict[str, list[str]] = {"state": [], "coefs": []}
    body: list[ast.stmt] = []
    *statements, last = function.body
    for statement in statements:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise StepError(f"{rule}.step, line {statement.lineno}: only `name = formula` works")
        target, value = statement.targets[0], statement.value
        if isinstance(value, ast.Name) and value.id in names:
            names[value.id] = [name.id for name in target.elts]
        elif isinstance(target, ast.Name):
            body.append(statement)
        else:
            raise StepError(f"{rule}.step, line {statement.lineno}: assign to one name at a time")
    if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Tuple):
        raise StepError(f"{rule}.step, line {last.lineno}: end with `return dx, (slots...)`")
    dx, new = last.value.elts
    for node in ast.walk(function):
        if isinstance(node, ast.Constant):
            raise StepError(
                f"{rule}.step, line {node.lineno}: the number {node.value!r} belongs into coefs"
            )
    if len(new.elts) != len(names["state"]):
        raise StepError(f"{rule}.step, line {last.lineno}: return as many slots as it unpacks")
    return Step(rule, names["state"], names["coefs"], body, dx, new.elts)


def emit_loop(step: Step, real: str) -> str:
    """Return the Cython functions of one step for one type: the loop, and its unpacking."""
    name = f"{step.rule}_{real}"
    assigned = {statement.targets[0].id for statement in step.body}
    local = [*sorted({"x", "dx", *step.slots, *assigned}), *(f"new_{slot}" for slot in step.slots)]
    lines = [
        f"cdef void {name}_loop(",
        f"    const_{real}_p x_in, const_{real}_p dx_in, {real}_p dx_out,",
        *(f"    {real}_p slot_{slot}," for slot in step.slots),
        f"    const_{real}_p coefs, Py_ssize_t length,",
        ") noexcept nogil:",
        "    cdef Py_ssize_t index",
        f"    cdef {real} {', '.join(local)}",
        *(f"    cdef {real} {coef} = coefs[{k}]" for k, coef in enumerate(step.coefs)),
        "    for index in range(length):",
        "        x = x_in[index]",
        "        dx = dx_in[index]",
        *(f"        {slot} = slot_{slot}[index]" for slot in step.slots),
        *(f"        {ast.unparse(statement)}" for statement in step.body),
        *(
            f"        new_{slot} = {ast.unparse(value)}"
            for slot, value in zip(step.slots, step.new, strict=True)
        ),
        f"        dx_out[index] = {ast.unparse(step.dx)}",
        *(f"        slot_{slot}[index] = new_{slot}" for slot in step.slots),
        "",
        "",
        f"cdef void {name}(",
        "    const void* x, const void* g, void* dx, void** slots, const void* coefs, Py_ssize_t n",
        ") noexcept nogil:",
        f"    {name}_loop(",
        f"        <const {real}*> x, <const {real}*> g, <{real}*> dx,",
        *(f"        <{real}*> slots[{k}]," for k in range(len(step.slots))),
        f"        <const {real}*> coefs, n,",
        "    )",
    ]
    return "\n".join(lines)


def generate(rules_source: str) -> str:
    """Return the text of _steps.pxi for the text of rules.py."""
    steps = read_steps(rules_source)
    loops = [emit_loop(step, real) for step in steps for real in ("float", "double")]
    table = [
        "cdef void fill_table() noexcept:",
        *(
            f"    add_step({step.rule!r}, {len(step.slots)}, {len(step.coefs)},"
            f" {step.rule}_float, {step.rule}_double)"
            for step in steps
        ),
    ]
    return HEADER + "\n\n" + "\n\n\n".join([*loops, "\n".join(table)]) + "\n"


if __name__ == "__main__":
    rules, target = map(pathlib.Path, sys.argv[1:])
    target.write_text(generate(rules.read_text()))
