"""`make review`: a change of the answer, some of it right and some wrong, to be reviewed like a pull request."""

import difflib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from harness.commands.request import Request
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import shown
from harness.practice import planted, refactorings, sessions
from harness.practice.opening import closed, opened, said_of, tell
from harness.practice.planted import Change, Fault, Hunk
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
_LINES = re.compile(r"(?:lines?|l)?\s*(\d+)(?:\s*[-–]\s*(\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Reviewed:
    """What a review is of: mistakes, and right changes."""

    faults: tuple[Fault, ...]
    right: tuple[Refactoring, ...]

    @property
    def changes(self) -> list[Change]:
        return [*self.faults, *(one.change for one in self.right)]


@dataclass(frozen=True)
class Row:
    """A row of the form. `lines` are of the new file, none where none is named; so with requirements."""

    lines: range
    requirements: tuple[str, ...]
    why: str


def run(request: Request) -> int:
    """Opens a review, or judges it."""
    session, out = opened(request, first_text), terminal.console()
    if request.end and not session.ended:
        rows = filled(session)
        if not rows and not request.force:
            raise UsageError(
                f"{shown(session.folder / _FORM)} names no fault yet; what counts is a row of its table\n"
                f"see the model review all the same: {session.command} END=1 FORCE=1"
            )
        named, alarms, report = judged(session, rows, said_of(session, change(session).faults))
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
            "",
        ],
    )
    terminal.diff(out, diff)
    tell(
        out,
        [
            "",
            f"the change again: {shown(session.folder / _DIFF)}",
            f"name each fault in {shown(session.folder / _FORM)}: line, requirement, why",
            f"then have it judged: {session.command} END=1",
        ],
    )
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
    faults: list[Fault] = []
    for fault in planted.mistaken(exercise, seed):
        fits = max(fault.size, len(fault.lines)) <= _MOST_LINES and not planted.too_long(fault)
        if fits and _free(fault.lines, taken) and planted.unremarkable(planted.file_text(exercise, [fault])):
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
        UsageError: rows name a line that is no number or a requirement that there is not; all are listed.
    """
    ids = [requirement.id for requirement in session.exercise.requirements]
    rows, wrong = [], []
    for line, named, why in _ROW.findall(sessions.notes(session, _FORM)):
        line, requirements = line.strip(), tuple(re.split(r"[,;\s]+", named.strip())) if named.strip() else ()
        if (line in ("line", "") and requirements in (("requirement",), ())) or (set(line) <= set("-: ") and line):
            continue
        lines = _LINES.fullmatch(line) if line else None
        if line and lines is None:
            wrong.append(f"line {line}: a number is wanted, of the new file, or two: 12-14")
        wrong += [f"requirement {one}: there are {', '.join(ids)}" for one in requirements if one not in ids]
        first = int(lines[1]) if lines is not None else 0
        last = int(lines[2] or first) if lines is not None else -1
        rows.append(Row(range(first, last + 1), requirements, why.strip()))
    if wrong:
        raise UsageError("\n".join(f"{shown(session.folder / _FORM)}: {one}" for one in wrong))
    return rows


def judged(session: Session, rows: Sequence[Row], says: Mapping[Fault, str]) -> tuple[str, str, list[str]]:
    """How many faults were named, how many rows name none, and the report.

    Args:
        says: what the checks say of each fault.
    """
    made, exercise = change(session), session.exercise
    faults = sorted(made.faults, key=lambda one: one.lines.start)
    places = {one: _lines(session, one.hunks, made.changes) for one in made.changes}
    of: dict[Change, list[Row]] = {one: [] for one in made.changes}
    alarms = []
    for row in rows:
        found = _on(row, places) or _by_requirement(row, faults, of)
        alarms.append(row) if found is None else of[found].append(row)
    named = f"{sum(bool(of[fault]) for fault in faults)} of {terminal.counted(len(faults), 'fault')} named"
    unjust = [row for one in made.right for row in of[one.change]]
    false = terminal.counted(len(alarms) + len(unjust), "false alarm")
    lines = [f"{session.name}: {named}, {false}, {session.took}", "the model review:"]
    for fault in faults:
        place, numbers = places[fault].start + 1, ", ".join(fault.mistake.requirements)
        lines.append(f"- line {place}, {numbers}, {'named' if of[fault] else 'missed'}: {fault.named}")
        lines += [f"   {line}" for line in says.get(fault, "").splitlines()]
        lines += [f"   yours: {_shown(row)}{_elsewhere(row, fault)}" for row in of[fault]]
        lines += ["   the smallest mend:", *planted.mend(exercise, fault)]
    for one in sorted(made.right, key=lambda one: one.around.start):
        lines.append(f"- line {places[one.change].start + 1}, right: {one.function} by other means")
        lines += [f"   false alarm: {_shown(row)}" for row in of[one.change]]
    lines += [f"- false alarm: {_shown(row)}" for row in alarms]
    return named, false, lines


def _on(row: Row, places: Mapping[Change, range]) -> Change | None:
    """The change whose lines a row names."""
    return next((one for one, lines in places.items() if any(line in lines for line in row.lines)), None)


def _by_requirement(row: Row, faults: Sequence[Fault], of: Mapping[Change, Sequence[Row]]) -> Fault | None:
    """The fault that breaks what a row names, where its lines are on no change; of several, one that has no row yet."""
    alike = [fault for fault in faults if set(row.requirements) & set(fault.mistake.requirements)]
    return min(alike, key=lambda fault: len(of[fault]), default=None)


def _elsewhere(row: Row, fault: Fault) -> str:
    """A remark where a row names another requirement than the fault breaks."""
    other = row.requirements and not set(row.requirements) & set(fault.mistake.requirements)
    return f" (what breaks is {', '.join(fault.mistake.requirements)})" if other else ""


def _lines(session: Session, hunks: Sequence[Hunk], changes: Sequence[Change]) -> range:
    """The lines of the new file from a change's first to its last, with one around it."""
    first, last = (planted.line_of(session.exercise, hunk, changes) for hunk in (hunks[0], hunks[-1]))
    return range(first - 1, last + max(1, len(hunks[-1].new)) + 1)


def _free(lines: range, taken: Sequence[range]) -> bool:
    """Whether lines stand so far from others that a diff shows them in a hunk of their own."""
    room = 2 * CONTEXT + 1
    return all(lines.stop + room <= other.start or other.stop + room <= lines.start for other in taken)


def _shown(row: Row) -> str:
    first, last = row.lines[:1], row.lines[1:][-1:]
    named = [f"line {first[0]}{f'-{last[0]}' if last else ''}" if first else "", ", ".join(row.requirements)]
    return ": ".join(part for part in (", ".join(part for part in named if part), row.why) if part)


def _form(session: Session) -> str:
    return f"""# {session.name}

`{_DIFF}` changes the answer to {session.exercise.title}; some of it is right, some is wrong. What would you object to?
A row for each fault: its line in `{session.exercise.file_name}` here, the requirement that breaks, and why.
A row counts by its line, or else by its requirement; the why is for you, to lay beside the model review.
Nothing is judged before `{session.command} END=1`.

| line | requirement | why |
|---|---|---|
|  |  |  |
|  |  |  |
|  |  |  |
"""
