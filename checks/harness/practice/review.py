"""`make review`: a change of the answer, some of it right and some wrong, to be reviewed like a pull request."""

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from harness.commands.request import Request
from harness.model import bank
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import shown
from harness.practice import planted, refactorings, sessions
from harness.practice.opening import closed, opened, tell
from harness.practice.planted import Change, Hunk
from harness.practice.refactorings import Refactoring
from harness.practice.sessions import Session
from harness.report import terminal

FEWEST, MOST = 4, 7
# Lines around a hunk of the diff; hunks stand further apart.
CONTEXT = 2
# A mistake may be larger than in a hunt: right changes are large too.
_MOST_LINES = 12
_FORM, _DIFF = "review.md", "change.diff"
_ROW = re.compile(r"^\|([^|]*)\|([^|]*)\|(.*?)\|?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Reviewed:
    """What a review is of: mistakes, and right changes."""

    faults: tuple[Change, ...]
    right: tuple[Refactoring, ...]

    @property
    def changes(self) -> list[Change]:
        return [*self.faults, *(one.change for one in self.right)]


@dataclass(frozen=True)
class Row:
    """A row of the form. `line` is of the new file, 0 where none is named; `requirement` may be empty."""

    line: int
    requirement: str
    why: str


def run(request: Request) -> int:
    """Opens a review, or judges it."""
    session, out = opened(request, first_text), terminal.console()
    if request.end and not session.ended:
        rows = filled(session)
        if not rows and not request.force:
            raise UsageError(
                f"{shown(session.folder / _FORM)} names no fault yet\n"
                f"see the model review all the same: {session.command} END=1 FORCE=1"
            )
        named, alarms, report = judged(session, rows)
        session.end(f"{named}, {alarms}", lambda: report)
    if session.ended:
        return closed(session, out)
    diff = difference(session)
    sessions.put(session.folder / _DIFF, "\n".join([*diff, ""]))
    sessions.put(session.folder / _FORM, _form(session))
    tell(
        out,
        [
            f"{session.name}: a change of the answer to {session.exercise.title}, some of it right, some wrong",
            f"  the change: {shown(session.folder / _DIFF)}, below; after it: {shown(session.file)}",
            f"  name each fault in {shown(session.folder / _FORM)}: line, requirement, why",
            f"  then have it judged: {session.command} END=1",
            "",
        ],
    )
    for line in diff:
        out.print(line, style=terminal.DIFF_STYLES.get(line[0], ""), markup=False, soft_wrap=True)
    return 0


def first_text(session: Session) -> str:
    """The file after the change."""
    return planted.file_text(session.exercise, change(session).changes)


def difference(session: Session) -> list[str]:
    """The unified diff that makes the answer the file."""
    before, after = planted.file_text(session.exercise).splitlines(), first_text(session).splitlines()
    names = (f"a/{session.exercise.file_name}", f"b/{session.exercise.file_name}")
    return list(difflib.unified_diff(before, after, *names, n=CONTEXT, lineterm=""))


def change(session: Session) -> Reviewed:
    """What is changed: it follows from seed and bank.

    Raises:
        UsageError: the bank holds no mistake to review.
    """
    return _drawn(session.exercise, f"review {session.exercise.id} {session.seed}")


@cache
def _drawn(exercise: Exercise, seed: str) -> Reviewed:
    drawn = random.Random(seed)
    hunks = drawn.randint(FEWEST, MOST)
    wrong = drawn.randint(2, hunks - 1)
    right: list[Refactoring] = []
    taken: list[range] = []
    for one in planted.shuffled(refactorings.right(exercise), seed):
        if len(right) < hunks - wrong and _free(one.around, taken):
            right.append(one)
            taken.append(one.around)
    faults: list[Change] = []
    for fault in planted.mistaken(exercise, seed):
        fits = max(fault.size, len(fault.lines)) <= _MOST_LINES and not planted.too_long(fault)
        if fits and _free(fault.lines, taken) and planted.parses(planted.file_text(exercise, [fault])):
            faults.append(fault)
            taken.append(fault.lines)
        if len(faults) + len(right) == hunks:
            break
    if not faults:
        raise UsageError(f"{exercise.id} has no mistake that can be reviewed")
    return Reviewed(tuple(faults), tuple(right))


def filled(session: Session) -> list[Row]:
    """The rows of the form that name something.

    Raises:
        UsageError: a row names a line that is no number or a requirement that there is not.
    """
    ids = {requirement.id for requirement in session.exercise.requirements}
    rows = []
    for line, requirement, why in _ROW.findall(sessions.notes(session, _FORM)):
        line, requirement = line.strip(), requirement.strip()
        if (line in ("line", "") and requirement in ("requirement", "")) or (set(line) <= set("-: ") and line):
            continue
        if line and not line.isdecimal():
            raise UsageError(f"{shown(session.folder / _FORM)}: line {line}: a number is wanted, of the new file")
        if requirement and requirement not in ids:
            there = ", ".join(one.id for one in session.exercise.requirements)
            raise UsageError(f"{shown(session.folder / _FORM)}: requirement {requirement}: there are {there}")
        rows.append(Row(int(line or 0), requirement, why.strip()))
    return rows


def judged(session: Session, rows: Sequence[Row]) -> tuple[str, str, list[str]]:
    """How many faults were named, how many rows name none, and the report."""
    made, exercise = change(session), session.exercise
    faults = sorted(made.faults, key=lambda one: one.lines.start)
    places = {fault: _lines(session, fault.hunks, made.changes) for fault in faults}
    of: dict[Change, list[Row]] = {fault: [] for fault in faults}
    alarms = []
    for row in rows:
        there = next((fault for fault in faults if row.line in places[fault]), None)
        alike = [fault for fault in faults if row.requirement in _requirements(fault)]
        found = there or min(alike, key=lambda fault: len(of[fault]), default=None)
        alarms.append(row) if found is None else of[found].append(row)
    named = f"{sum(bool(of[fault]) for fault in faults)} of {_number(len(faults), 'fault')} named"
    false = _number(len(alarms), "false alarm")
    lines = [f"{session.name}: {named}, {false}, {session.minutes:.0f} minutes", "the model review:"]
    for fault in faults:
        assert fault.mistake is not None
        name = fault.mistake.name.replace("_", " ")
        said = f"; the check says: {fault.mistake.says}" if fault.mistake.says else ""
        place, numbers = places[fault].start + 1, ", ".join(_requirements(fault))
        lines.append(f"- line {place}, {numbers}, {'named' if of[fault] else 'missed'}: {name}{said}")
        lines += [f"   yours: {_shown(row)}" for row in of[fault]]
        lines += ["   the smallest mend:", *(f"   {line}" for line in planted.mend(exercise, fault))]
    for one in sorted(made.right, key=lambda one: one.around.start):
        place = _lines(session, one.change.hunks, made.changes).start + 1
        lines.append(f"- line {place}, right: {one.function} as it is in another right answer")
        lines.append(f"   {bank.unusual(exercise, one.variant).splitlines()[0]}")
    lines += [f"- false alarm: {_shown(row)}" for row in alarms]
    return named, false, lines


def _lines(session: Session, hunks: Sequence[Hunk], changes: Sequence[Change]) -> range:
    """The lines of the new file from a change's first to its last, with one around it."""
    first, last = (planted.line_of(session.exercise, hunk, changes) for hunk in (hunks[0], hunks[-1]))
    return range(first - 1, last + max(1, len(hunks[-1].new)) + 1)


def _requirements(fault: Change) -> tuple[str, ...]:
    return fault.mistake.requirements if fault.mistake is not None else ()


def _free(lines: range, taken: Sequence[range]) -> bool:
    """Whether lines stand so far from others that a diff shows them in a hunk of their own."""
    room = 2 * CONTEXT + 1
    return all(lines.stop + room <= other.start or other.stop + room <= lines.start for other in taken)


def _shown(row: Row) -> str:
    named = [f"line {row.line}" if row.line else "", row.requirement]
    return ": ".join(part for part in (", ".join(part for part in named if part), row.why) if part)


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _form(session: Session) -> str:
    return f"""# {session.name}

`{_DIFF}` changes the answer to {session.exercise.title}; some of it is right, some is wrong. What would you object to?
A row for each fault: its line in `{session.exercise.file_name}` here, the requirement that breaks, and why.
A row counts by its line, or else by its requirement. Nothing is judged before `{session.command} END=1`.

| line | requirement | why |
|---|---|---|
|  |  |  |
|  |  |  |
|  |  |  |
"""
