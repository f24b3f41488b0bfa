"""Goals, and how a report with them is written as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# --- numbers as one reads them ---------------------------------------------------------------


def duration(seconds: float, digits: int = 3) -> str:
    seconds = float(f"{seconds:.{digits - 1}e}")
    unit, name = next((u for u in ((1, "s"), (1e-3, "ms")) if seconds >= u[0]), (1e-6, "µs"))
    return f"{seconds / unit:.12g} {name}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def percent(share: float) -> str:
    return f"{100 * share:z.0f} %"


def megabytes(n: float) -> str:
    return f"{n / 1e6:.1f} MB"


def per_second(n: float) -> str:
    return f"{n / 1e9:.1f} GB/s"


def counted(n: int) -> str:
    return f"{n / 1_000_000:g} M" if n >= 1_000_000 else f"{n:,}"


# --- goals -----------------------------------------------------------------------------------

MARKS = {True: "✓", False: "✗", None: "–"}


@dataclass(frozen=True)
class Goal:
    """What must be, what would be better still, and what is.

    Parameters
    ----------
    work, measure : str
        What is done, and what of it is measured.
    got : float or None
        None where a peer is missing.
    must, aim : float or None
        The limits.
    show : callable
        Writes such a number down.
    less : bool
        Whether smaller is better.
    """

    work: str
    measure: str
    got: float | None
    must: float | None
    aim: float | None
    show: Callable[[float], str] = times
    less: bool = False

    def meets(self, limit: float | None) -> bool | None:
        """Tell whether a limit is kept; None if there is none, or nothing was measured."""
        if limit is None or self.got is None:
            return None
        return self.got <= limit if self.less else self.got >= limit

    def cells(self) -> list[str]:
        got = "–" if self.got is None else self.show(self.got)
        return [self.work, self.measure, got, self._judged(self.must), self._judged(self.aim)]

    def _judged(self, limit: float | None) -> str:
        if limit is None:
            return ""
        return f"{'≤' if self.less else '≥'} {self.show(limit)} {MARKS[self.meets(limit)]}"


def summary(goals: Sequence[Goal]) -> str:
    """Say how many goals are met, and which musts are not."""
    musts = [met for goal in goals if (met := goal.meets(goal.must)) is not None]
    aims = [met for goal in goals if (met := goal.meets(goal.aim)) is not None]
    missed = [f"{g.work}, {g.measure}" for g in goals if g.meets(g.must) is False]
    text = (
        f"{sum(musts)} of {len(musts)} figures are as they *must* be, "
        f"{sum(aims)} of {len(aims)} reach their *aim*."
    )
    return text + (f" Missed musts: {'; '.join(missed)}." if missed else "")


# --- the report ------------------------------------------------------------------------------


@dataclass
class Section:
    """A part of the report: a table, and the goals that its figures are held against."""

    title: str
    text: str
    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.text}\n\n" if self.text else ""
        return f"## {self.title}\n\n{text}{table(self.head, self.rows)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page(
    intro: str, machine: list[list[str]], sections: Sequence[Section], picture: str | None
) -> str:
    """Return the whole report."""
    goals = [goal for section in sections for goal in section.goals]
    parts = [
        f"# How fast it is\n\n{intro}\n",
        table(["machine", ""], machine),
        f"![Time of one step of Adam against the number of parameters]({picture})\n"
        if picture
        else "",
        f"## Goals\n\n{summary(goals)}\n",
        table(["work", "measured", "got", "must", "aim"], (goal.cells() for goal in goals)),
        *map(str, sections),
    ]
    return "\n".join(part for part in parts if part)
