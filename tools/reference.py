"""Write the pages of the reference, one for each public name that the library has.

    python tools/reference.py docs

A module is public if neither it nor a package around it begins with an underscore and if it says
what it offers, in ``__all__``; the package itself offers its names without an underscore that are
no modules. No name is listed here or in docs/ by hand.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import optimisers
from optimisers import ElementwiseRule
from optimisers.rules._base import registry


def public_modules() -> Iterator[ModuleType]:
    """Yield the package, then the modules in it that say what they offer."""
    yield optimisers
    for info in pkgutil.walk_packages(optimisers.__path__, "optimisers."):
        private = any(part.startswith("_") for part in info.name.split("."))
        if not private and hasattr(module := importlib.import_module(info.name), "__all__"):
            yield module


def public_names(module: ModuleType) -> list[str]:
    """Return the names that a module offers, but for modules, which have pages of their own."""
    named = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return [name for name in named if not inspect.ismodule(getattr(module, name))]


def homes() -> dict[str, str]:
    """Return the full name of every public name, and the one under which it is described.

    What several modules offer is described once, in the first of them.
    """
    described: dict[int, str] = {}
    found = {}
    for module in public_modules():
        for name in public_names(module):
            full = f"{module.__name__}.{name}"
            found[full] = described.setdefault(id(getattr(module, name)), full)
    return found


# --- pages ------------------------------------------------------------------------------------


def title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n\n"


def summary(thing: object) -> str:
    """Return the first sentence of a docstring."""
    first = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    return " ".join(first.split())


def page_of_name(module: ModuleType, name: str) -> str:
    thing = getattr(module, name)
    if inspect.isclass(thing):
        exception = issubclass(thing, BaseException)
        directive = "autoexception" if exception else "autoclass"
        options = "   :members:\n" + ("" if exception else "   :show-inheritance:\n")
    else:
        directive = "autofunction" if callable(thing) else "autodata"
        options = ""
    full = f"{module.__name__}.{name}"
    return title(full) + f".. {directive}:: {full}\n{options}"


def kind(thing: object) -> str:
    if inspect.isclass(thing):
        return "Rules" if thing in registry() else "Classes"
    return "Functions" if callable(thing) else "Values"


def page_of_module(module: ModuleType, described: dict[str, str]) -> str:
    """Return the page with the names of a module, by kind; the menu has those described there."""
    text = title(module.__name__)
    text += f".. automodule:: {module.__name__}\n   :no-members:\n\n"
    names = public_names(module)
    for group in ("Functions", "Classes", "Rules", "Values"):
        lines = [name for name in names if kind(getattr(module, name)) == group]
        if lines:
            text += f"{group}\n{'-' * len(group)}\n\n.. list-table::\n   :widths: auto\n\n"
        for name in lines:
            home = described[f"{module.__name__}.{name}"]
            text += f"   * - :py:obj:`{name} <{home}>`\n"
            text += f"     - {summary(getattr(module, name))}\n"
        text += "\n"
    own = [full for name in names if (full := f"{module.__name__}.{name}") == described[full]]
    return text + ".. toctree::\n   :hidden:\n\n" + "".join(f"   {full}\n" for full in own)


def table_of_rules() -> str:
    """Return a table of the registry: elementwise rules, and those that are not."""
    text = ""
    for elementwise, heading in (
        (True, "Elementwise rules, and those that measure"),
        (False, "Rules of rules and of matrices"),
    ):
        text += f"{heading}\n{'-' * len(heading)}\n\n"
        text += ".. list-table::\n   :header-rows: 1\n   :widths: auto\n\n"
        text += "   * - rule\n     - in a word\n" + "     - keeps\n" * elementwise
        for rule in registry():
            if issubclass(rule, ElementwiseRule) is elementwise:
                text += f"   * - :py:obj:`{rule.__name__} <optimisers.{rule.__name__}>`\n"
                text += f"     - {summary(rule)}\n"
                if issubclass(rule, ElementwiseRule):
                    slots = ", ".join(f"``{name}``" for name in (*rule.slots, *rule.kept))
                    text += f"     - {slots or 'nothing'}\n"
        text += "\n"
    return text


def pages() -> dict[str, str]:
    """Return the text of each page, by its path in docs/."""
    described = homes()
    found = {"rules/generated/table.rst": table_of_rules()}
    for module in public_modules():
        path = f"reference/generated/{module.__name__}.rst"
        found[path] = page_of_module(module, described)
        for name in public_names(module):
            if described[full := f"{module.__name__}.{name}"] == full:
                found[f"reference/generated/{full}.rst"] = page_of_name(module, name)
    modules = "".join(f"   generated/{module.__name__}\n" for module in public_modules())
    found["reference/generated/menu.rst"] = f".. toctree::\n   :maxdepth: 1\n\n{modules}"
    return found


def write(docs: Path) -> None:
    """Write the pages that are new or changed; remove those of names that are gone."""
    wanted = {docs / path: text for path, text in pages().items()}
    for folder in {path.parent for path in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
        for old in set(folder.glob("*.rst")) - wanted.keys():
            old.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
