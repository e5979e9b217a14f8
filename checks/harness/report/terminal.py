"""The picture of all verdicts in a terminal; reads as well without colours, in a narrow one, and in a log."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.model import patterns
from harness.model.exercise import Exercise, Step
from harness.model.paths import PRACTICE, shown
from harness.model.results import ExerciseVerdict, RequirementVerdict, Result
from harness.model.source import todo_lines
from harness.model.submission import LoadError, read

_STYLES = {"done": "green", "in progress": "yellow", "not started": "", "does not import": "red"}
_DIFF_STYLES = {"+": "green", "-": "red", "@": "cyan"}
MESSAGE_LINES = 12
_NEXT_LINES = 2
_TITLE = 8


def console(stream: TextIO | None = None) -> Console:
    """A console on a stream (standard output by default): 80 columns where there is no terminal to ask."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 80, highlight=False, emoji=False)


def begin(out: Console, exercise: Exercise, folder: Path) -> None:
    """Says what is being judged; VS Code's problem matcher takes this line as the start of a run."""
    dots = "..." if out.options.ascii_only else "…"
    out.print(f"judging {shown(folder / exercise.file_name)} {dots}", soft_wrap=True)


def line(out: Console, text: str, style: str = "") -> None:
    """A line that is never cut: broken at words on a terminal, whole in a log and in VS Code's, whose links and
    Problems end with a line.
    """
    whole = not out.is_terminal or os.environ.get("TERM_PROGRAM") == "vscode"
    out.print(text, style=style, markup=False, soft_wrap=whole)


def diff(out: Console, lines: Iterable[str]) -> None:
    """The lines of a diff in their colours, each whole."""
    for text in lines:
        out.print(text, style=_DIFF_STYLES.get(text[0], ""), markup=False, soft_wrap=True)


def counted(number: int, what: str) -> str:
    """So many of something, in words."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def board(out: Console, verdicts: Sequence[ExerciseVerdict]) -> None:
    """One line per exercise: state and points, which are never cut; a title is."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for verdict in verdicts:
        style = _STYLES[verdict.state]
        state = f"[{style}]{verdict.state}[/]" if style else verdict.state
        table.add_row(verdict.exercise.id, escape(verdict.exercise.title), state, points(verdict))
    if len(verdicts) > 1:
        total = f"{sum(v.score for v in verdicts)}/{sum(v.max_score for v in verdicts)}"
        table.add_row("", "", "[bold]total[/]", f"[bold]{total}[/]")
    out.print(table)


def points(verdict: ExerciseVerdict) -> str:
    """Points out of how many."""
    return f"{verdict.score}/{verdict.max_score}"


def detail(
    out: Console,
    verdict: ExerciseVerdict,
    folder: Path,
    before: ExerciseVerdict | None = None,
    *,
    late: frozenset[str] = frozenset(),
    everything: bool = False,
) -> None:
    """The requirements of one exercise with their marks, and the first failure of each that has been begun.

    Args:
        before: the verdict on the last save: what is lost since then stands first.
        late: requirements whose marks are as of the last save, since their checks still run.
        everything: every failure in full.
    """
    exercise, path = verdict.exercise, folder / verdict.exercise.file_name
    gained = f"{verdict.score} of {verdict.max_score} points"
    left = sum(step.minutes for step in exercise.steps if _opened(verdict, step))
    practised = folder.parent == PRACTICE
    ahead = f", about {left} minutes to go" if left and verdict.state != "done" and not practised else ""
    name = folder.name if practised else exercise.id
    out.print(f"\n[bold]{name} {escape(exercise.title)}[/]: {gained}, {verdict.state}{ahead}")
    if verdict.reason and verdict.state == "not started":
        reset = f"make reset EX={exercise.number} brings the starter back"
        back = "make practice lists the sessions" if practised else reset
        out.print(f"  {shown(path)}: {verdict.reason}; {back}", soft_wrap=True)
        return
    if verdict.state == "does not import":
        cause = next(one for one in verdict.results() if one.kind == "load")
        failure(out, path, cause)
        return
    rows(out, _in_order(verdict), late, exercise.steps)
    if verdict.state == "not started":
        return
    found = (failed for failed in _failures(verdict, lost(verdict, before)) if failed[0].requirement not in late)
    if everything:
        for one in (one for failed in found for one in failed):
            failure(out, path, one)
        _resembles(out, verdict, folder)
        return
    # In a hunt, and of waste, the fact alone is said: what it means is to be found.
    hunted = practised and folder.name.startswith(("debug", "optimise"))
    alike: dict[tuple[int, str], list[Result]] = {}
    for failed in found:
        alike.setdefault((failed[0].line, failed[0].message.partition("\n")[0]), []).append(failed[0])
    for number, (one, *others) in enumerate(alike.values()):
        failure(out, path, one, full=not number, bare=hunted)
        if others:
            line(out, f"  the same: {' '.join(other.requirement for other in others)}")
    _resembles(out, verdict, folder)


def rows(
    out: Console,
    verdicts: Sequence[RequirementVerdict],
    late: frozenset[str] = frozenset(),
    steps: Sequence[Step] = (),
) -> None:
    """A line per requirement: mark, number, title, and how many of its checks pass. Where there is little room the
    title is cut. `steps` have a line of their own before their first requirement.
    """
    begins = {step.requirements[0]: f"{step.number}. {step.name} ({step.minutes} min)" for step in steps}
    then = {one.requirement.id: "as of the last save" if one.judged else "being judged" for one in verdicts}
    counts = [then[one.requirement.id] if one.requirement.id in late else _count(one) for one in verdicts]
    number = max(len(one.requirement.id) for one in verdicts)
    room = max(_TITLE, out.width - number - max(map(len, counts)) - len("  ✓   "))
    width = min(room, max(len(one.requirement.title) for one in verdicts))
    for one, count in zip(verdicts, counts, strict=True):
        if (begun := begins.get(one.requirement.id)) is not None:
            out.print(f" {begun}", markup=False, no_wrap=True, overflow="ellipsis")
        mark, style = _mark(one, out.options.ascii_only)
        title = one.requirement.title
        title = title if len(title) <= width else f"{title[: width - 1]}{'~' if out.options.ascii_only else '…'}"
        text = f"  [{style}]{mark}[/] {one.requirement.id:<{number}} {escape(f'{title:<{width}}')} {count}"
        out.print(text.rstrip(), soft_wrap=True)


def failure(out: Console, path: Path, one: Result, *, full: bool = True, bare: bool = False) -> None:
    """`file:line:column: error: …` at the start of a line, which editors make a link, then the message and what the
    code printed; or, in short, one line more, or none (`bare`).
    """
    head, *rest = one.message.splitlines() or [one.outcome]
    if one.kind == "not implemented":
        head = f"not written yet: {head.rpartition(': ')[2]}"
    number = "" if one.kind == "load" else f"{one.requirement} "
    out.print()
    place = f"{shown(path)}:{one.line or 1}:{_column(path, one.line)}"
    line(out, f"{place}: error: {number}{head}", "red")
    for text in rest[: 0 if bare else MESSAGE_LINES if full else _NEXT_LINES - 1]:
        line(out, f"  {text}")
    if not full:
        return
    if one.kind != "load":
        line(out, f"  check: {one.name}")
    if one.printed:
        out.print("  your code printed:")
        for text in one.printed.splitlines():
            out.print(f"  | {text}", markup=False, soft_wrap=True)


def _resembles(out: Console, verdict: ExerciseVerdict, folder: Path) -> None:
    """Names the known mistake that fails alike; not in practice, where finding it is the task."""
    if folder.parent != PRACTICE and (known := patterns.diagnosis(verdict.exercise, verdict.results())):
        out.print()
        line(out, f"looks like: {known}")


def lost(verdict: ExerciseVerdict, before: ExerciseVerdict | None) -> list[str]:
    """The requirements that were earned before and are not now."""
    earned = {one.requirement.id for one in before.requirements if one.score} if before is not None else set()
    return [one.requirement.id for one in verdict.requirements if one.requirement.id in earned and not one.score]


def closing(verdict: ExerciseVerdict, before: ExerciseVerdict | None, name: str = "") -> str:
    """What counts, in a line: points, what changed, what is open. `name` is the session's, in practice."""
    change = verdict.score - before.score if before is not None else 0
    facts = [f"{name or verdict.exercise.id} {points(verdict)}" + (f" ({change:+d})" if change else "")]
    if gone := lost(verdict, before):
        facts.append(f"lost: {' '.join(gone)}")
    if opened := [one.requirement.id for one in _in_order(verdict) if not one.score and one.judged]:
        facts.append(f"open {' '.join(opened)}")
    return ", ".join(facts) if opened or gone else f"{facts[0]}, done"


def following(verdict: ExerciseVerdict, folder: Path) -> str:
    """What to do next: the first open step, and the first TODO of it that is left in the file."""
    path, exercise = folder / verdict.exercise.file_name, verdict.exercise
    if verdict.state == "done":
        measured = f"; make bench EX={exercise.number} measures" if exercise.bench_file.exists() else ""
        return f"next: make answer EX={exercise.number} compares with the answer{measured}"
    step = open_step(verdict)
    about = f"step {step.number} of {len(exercise.steps)}, {step.name} (about {step.minutes} minutes)"
    if verdict.state == "not started":
        return f"next: open {shown(path)}: {about}; every save is judged"
    number, line = open_requirement(verdict, step, path)
    over = f"make reset EX={exercise.number} starts it over"
    if line:
        return f"next: {about}: {shown(path)}:{line} TODO({number}); {over}"
    return f"next: {about}: edit {shown(path)} and save; {over}"


def open_step(verdict: ExerciseVerdict) -> Step:
    """The first step of which something is still to be earned, or the last."""
    steps = verdict.exercise.steps
    return next(step for step in steps if _opened(verdict, step) or step is steps[-1])


def open_requirement(verdict: ExerciseVerdict, step: Step, path: Path) -> tuple[str, int]:
    """The requirement to work on in a step, and its line: that of the first TODO that is left in the file; without
    any, the first that is open, and 0.
    """
    try:
        places = todo_lines(read(path))
    except LoadError:
        places = {}
    opened = [one.requirement.id for one in _in_order(verdict) if not one.score and one.judged]
    wanted = [number for number in opened if number in step.requirements]
    number = min(wanted, key=lambda one: places.get(one, sys.maxsize), default=step.requirements[0])
    return number, places.get(number, 0)


def _opened(verdict: ExerciseVerdict, step: Step) -> bool:
    """Whether something of a step is still to be earned."""
    return any(not one.score and one.judged for one in verdict.requirements if one.requirement.id in step.requirements)


def _in_order(verdict: ExerciseVerdict) -> list[RequirementVerdict]:
    """The requirements in the order of the steps."""
    of = {one.requirement.id: one for one in verdict.requirements}
    return [of[number] for step in verdict.exercise.steps for number in step.requirements]


def _failures(verdict: ExerciseVerdict, gone: Sequence[str]) -> Iterator[list[Result]]:
    """The failures of each requirement that has been begun: those that were lost first, unwritten ones last."""
    found = {one.requirement.id: list(one.failures()) for one in _in_order(verdict)}

    def rank(number: str) -> tuple[bool, bool]:
        return found[number][0].kind == "not implemented", number not in gone

    yield from (found[number] for number in sorted((number for number in found if found[number]), key=rank))


def _column(path: Path, line: int) -> int:
    """Where a line's text begins."""
    try:
        text = read(path).splitlines()[line - 1] if line else ""
    except (LoadError, IndexError):
        return 1
    return len(text) - len(text.lstrip()) + 1


def _mark(one: RequirementVerdict, ascii_only: bool) -> tuple[str, str]:
    passed, failed = ("+", "x") if ascii_only else ("✓", "✗")
    if one.score:
        return passed, "green"
    if not one.judged:
        return "?", "default"
    if one.passed < len(one.results):
        return (failed, "red") if not one.unwritten else ("-", "default")
    return "-", "yellow"


def _count(one: RequirementVerdict) -> str:
    if not one.judged:
        return "judged when you push"
    if one.passed == len(one.results):
        return "" if one.score else "with half of the others"
    return "to do" if one.unwritten else f"{one.passed} of {len(one.results)} checks"
