"""Write the formulas of rules.py as typed block loops for Cython.

Each `step` becomes, for float and for double, one function over a block of numbers. The formula
itself is copied as it stands: the statements between the unpacking of `state` and `coefs` and the
`return`. Only the syntax tree is read; the package is not imported.

Run by setup.py; by hand: ``python tools/emit_steps.py optimisers/rules.py optimisers/_steps.pxi``.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import sys

# By its path, since the package cannot be imported before it is built.
PATH = pathlib.Path(__file__).parent.parent / "optimisers" / "_language.py"
spec = importlib.util.spec_from_file_location("_language", PATH)
language = sys.modules["_language"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(language)
Step, StepError = language.Step, language.StepError

HEADER = """\
# Written by tools/emit_steps.py from the steps in rules.py. Do not edit.

# A block step: x, g and the old slots are read, dx and the new slots written, n numbers each.
# One that finishes a chain finds x in place of dx, and leaves there x - dx.
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


def generate(rules_source: str) -> str:
    """Return the text of _steps.pxi for the text of rules.py."""
    steps = read_steps(rules_source)
    loops = [
        emit_loop(step, real, finish)
        for step in steps
        for real in ("float", "double")
        for finish in (False, True)
    ]
    table = [
        "cdef void fill_table() noexcept:",
        *(
            f"    add_step({step.rule!r}, {len(step.slots)}, {len(step.coefs)},\n"
            f"             {step.rule}_float, {step.rule}_double,\n"
            f"             {step.rule}_float_finish, {step.rule}_double_finish)"
            for step in steps
        ),
    ]
    return HEADER + "\n\n" + "\n\n\n".join([*loops, "\n".join(table)]) + "\n"


if __name__ == "__main__":
    rules, target = map(pathlib.Path, sys.argv[1:])
    target.write_text(generate(rules.read_text()))
