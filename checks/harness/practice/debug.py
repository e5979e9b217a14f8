"""`make debug`: the answer with planted mistakes, to be found and mended."""

import re

from harness.commands.request import Request, whole_number
from harness.model.exercise import UsageError
from harness.model.paths import shown
from harness.model.results import ExerciseVerdict
from harness.practice import planted, sessions
from harness.practice.opening import closed, opened, standing, tell, verdict_now
from harness.practice.planted import Fault
from harness.practice.sessions import Session
from harness.report import terminal

MOST = 4
# "- line 12: …", as the form has it, and what people make of it: "* L12-14 …", "lines 12: …".
_NOTE = re.compile(r"^[-*\s]*(?:lines?|l)?\s*(\d+)(?![\d.]*\d)(?:\s*[-–]\s*\d+)?\s*[:,.)]?\s*(\S.*)$", re.IGNORECASE)
# A note is on the bug that is nearest, if its line is as near as this.
_NEAR = 3
# A larger one is seen by its size.
_MOST_LINES = 3


def run(request: Request) -> int:
    """Opens a hunt, or ends it."""
    asked = {"bugs": whole_number("BUGS", request.bugs, 1, MOST)} if request.bugs.strip() else {}
    session, out = opened(request, first_text, asked, bugs=1), terminal.console()
    if request.end and not session.ended:
        state = verdict_now(session, out).state
        if state == "does not import" and not request.force:
            raise UsageError(
                f"{shown(session.file)} does not import; mend that first, "
                f"or give up all the same: {session.command} END=1 FORCE=1"
            )
        if not session.ended:  # A verdict that finds it done has ended it.
            session.end("done" if state == "done" else "given up", lambda: report(session))
    if session.ended:
        return closed(session, out)
    sessions.put(session.folder / "notes.md", _form(session))
    lines = [
        f"{session.name}: the answer to {session.exercise.title} with {_count(session)} in it",
        f"  say first what is wrong and why, in {shown(session.folder / 'notes.md')}",
        f"  then mend {shown(session.file)}; make watch judges every save",
        f"  give up, and see: {session.command} END=1",
        *standing(session),
    ]
    tell(out, lines)
    return 0


def says(session: Session, verdict: ExerciseVerdict) -> list[str]:
    """What follows from a verdict: the report once all is mended."""
    if verdict.state != "done":
        return [f"next: mend {shown(session.file)} and save; give up, and see: {session.command} END=1"]
    if not _notes(session)[0]:
        where = shown(session.folder / "notes.md")
        return [f"all is mended; say what was wrong and why in {where}, then: {session.command} END=1"]
    return session.end("done", lambda: report(session))


def first_text(session: Session) -> str:
    """What a hunt's file begins as."""
    return planted.file_text(session.exercise, bugs(session))


def bugs(session: Session) -> list[Fault]:
    """The mistakes that are planted, in the order of their lines; they follow from seed and bank.

    Raises:
        UsageError: the bank holds too few that go together.
    """
    exercise, wanted = session.exercise, int(session.options.get("bugs", 1))
    found: list[Fault] = []
    for change in planted.mistaken(exercise, f"debug {exercise.id} {session.seed}"):
        small = change.size <= _MOST_LINES and not planted.too_long(change)
        fits = small and all(planted.apart(change, other) for other in found)
        if fits and planted.unremarkable(planted.file_text(exercise, [*found, change])):
            found.append(change)
        if len(found) == wanted:
            return sorted(found, key=lambda change: change.hunks[0].first)
    raise UsageError(f"{exercise.id} has no {wanted} mistakes that go together; {len(found)} at most")


def report(session: Session) -> list[str]:
    """Each bug: found or not, its line, the note on it, and the smallest mend."""
    exercise, there = session.exercise, bugs(session)
    earned = set(session.saves[-1].earned) if session.saves else set()
    text, (notes, unread) = sessions.notes(session, session.file.name).splitlines(), _notes(session)
    mended = [_state(change, earned, text) for change in there]
    places = [[planted.line_of(exercise, hunk, there) for hunk in change.hunks] for change in there]
    on = [_nearest(line, places) for line, _ in notes]
    lines = [f"{session.name}: {mended.count('found')} of {_count(session)} found, {session.took}"]
    for number, (change, state) in enumerate(zip(there, mended, strict=True)):
        state = "named, not mended" if state == "not found" and number in on else state
        requirements = ", ".join(change.mistake.requirements)
        lines.append(f"{number + 1}. line {places[number][0]}, {state}: {change.named} ({requirements})")
        said = [
            f"   your note, line {line}: {note}" for (line, note), bug in zip(notes, on, strict=True) if bug == number
        ]
        lines += said or ["   no note of yours is on it"]
        lines += ["   the smallest mend:", *planted.mend(exercise, change)]
    lines += [f"   on no bug: line {line}: {note}" for (line, note), bug in zip(notes, on, strict=True) if bug is None]
    return lines + [f"   names no line: {line}" for line in unread]


def _nearest(line: int, places: list[list[int]]) -> int | None:
    """The bug that a line is on: the nearest, if it is near."""
    distances = [min(abs(line - place) for place in of_it) for of_it in places]
    nearest = min(range(len(places)), key=distances.__getitem__)
    return nearest if distances[nearest] <= _NEAR else None


def _state(change: Fault, earned: set[str], text: list[str]) -> str:
    """Whether a bug was found: what it costs is earned, or else its lines are no longer as planted; where a hunk has
    none, what it removed is not looked for.
    """
    if earned.issuperset(change.mistake.requirements):
        return "found"
    there = {tuple(text[place : place + len(hunk.new)]) for hunk in change.hunks for place in range(len(text))}
    return "not found" if all(hunk.new in there for hunk in change.hunks) else "changed, not mended"


def _notes(session: Session) -> tuple[list[tuple[int, str]], list[str]]:
    """The notes with the lines that they name, and the lines of notes.md that name none."""
    form = {line.strip() for line in _form(session).splitlines()}
    written = [line.strip() for line in sessions.notes(session).splitlines() if line.strip() not in form]
    found = [(line, _NOTE.match(line)) for line in written]
    read_ones = [(int(match[1]), match[2].strip()) for _, match in found if match is not None]
    return read_ones, [line for line, match in found if match is None and line.strip("-*# ")]


def _form(session: Session) -> str:
    line = "- line : \n"
    return f"""# {session.name}: {_count(session)}

What is wrong, and why? A line for each, before you mend it, as in
`- line 123: sums over the keys, where the rows have to sum to 1`

{line * int(session.options["bugs"])}"""


def _count(session: Session) -> str:
    return terminal.counted(int(session.options["bugs"]), "bug")
