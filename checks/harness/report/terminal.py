"""The picture of all verdicts in a terminal; reads as well without colours, at 80 columns, and in a log."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.model.exercise import Exercise
from harness.model.paths import shown
from harness.model.results import ExerciseVerdict, RequirementVerdict, Result

_STYLES = {"done": "green", "in progress": "yellow", "not started": "dim", "does not import": "red"}
MESSAGE_LINES = 12


def console(stream: TextIO | None = None) -> Console:
    """A console on a stream (standard output by default): 80 columns where there is no terminal to ask."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 80, highlight=False, emoji=False)


def begin(out: Console, exercise: Exercise, folder: Path) -> None:
    """Says what is being judged; VS Code's problem matcher takes this line as the start of a run."""
    out.print(f"judging {shown(folder / exercise.file_name)} …", style="dim", soft_wrap=True)


def board(out: Console, verdicts: Sequence[ExerciseVerdict]) -> None:
    """One line per exercise: state and points."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for verdict in verdicts:
        style = _STYLES[verdict.state]
        points = f"{verdict.score}/{verdict.max_score}"
        table.add_row(verdict.exercise.id, verdict.exercise.title, f"[{style}]{verdict.state}[/]", points)
    if len(verdicts) > 1:
        total = f"{sum(v.score for v in verdicts)}/{sum(v.max_score for v in verdicts)}"
        table.add_row("", "", "[bold]total[/]", f"[bold]{total}[/]")
    out.print(table)


def detail(out: Console, verdict: ExerciseVerdict, folder: Path) -> None:
    """The requirements of one exercise with their marks, and its first failure."""
    exercise = verdict.exercise
    out.print(f"\n[bold]{exercise.id} {escape(exercise.title)}[/]: {verdict.score} of {verdict.max_score} points")
    if verdict.reason and verdict.state == "not started":
        back = f"make reset EX={exercise.number} brings the starter back"
        out.print(f"  {shown(folder / exercise.file_name)}: {verdict.reason}; {back}", soft_wrap=True)
        return
    width = max(len(v.requirement.id) for v in verdict.requirements)
    for one in verdict.requirements:
        mark, style = _mark(one)
        line = f"  [{style}]{mark}[/] {one.requirement.id:<{width}} {escape(one.requirement.title)}"
        out.print(line, f"[dim]{_count(one)}[/]", soft_wrap=True)
    if verdict.state != "not started" and (failure := verdict.first_failure()) is not None:
        first_failure(out, verdict, failure, folder / exercise.file_name)


def first_failure(out: Console, verdict: ExerciseVerdict, failure: Result, path: Path) -> None:
    """`file:line: error: …` at the start of a line, so that editors make it a link, then the message and what the
    code printed.
    """
    head, *rest = failure.message.splitlines() or [failure.outcome]
    out.print()
    if failure.kind == "load":
        out.print(f"{shown(path)}:{failure.line or 1}: error: {head}", style="red", markup=False, soft_wrap=True)
    else:
        where = f"{shown(path)}:{failure.line or 1}: error: {failure.requirement} {head}"
        out.print(where, style="red", markup=False, soft_wrap=True)
    for line in rest[:MESSAGE_LINES]:
        out.print(f"  {line}", markup=False, soft_wrap=True)
    if failure.kind != "load":
        out.print(f"  check: {failure.name}", style="dim", markup=False, soft_wrap=True)
    if failure.printed:
        out.print("  your code printed:", style="dim")
        for line in failure.printed.splitlines():
            out.print(f"  | {line}", markup=False, soft_wrap=True)


def _mark(one: RequirementVerdict) -> tuple[str, str]:
    if one.score:
        return "✓", "green"
    if not one.judged:
        return "?", "dim"
    return ("✗", "red") if one.passed < len(one.results) else ("-", "yellow")


def _count(one: RequirementVerdict) -> str:
    if not one.judged:
        return "judged when you push"
    if one.passed == len(one.results):
        return "" if one.score else "earns once half of the others do"
    if all(result.kind == "not implemented" for result in one.results if result.outcome != "passed"):
        return "to do"
    return f"{one.passed} of {len(one.results)} checks"
