"""`make interview`: begins one, goes on with it, or ends it with a report."""

from harness.commands.request import Request, one_exercise, whole_number
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import shown
from harness.practice import sessions
from harness.practice.interview import clock, report
from harness.practice.interview.statement import first_text
from harness.practice.opening import judged
from harness.practice.sessions import Session
from harness.report import terminal

MINUTES, LONGEST = 45, 240


def run(request: Request) -> int:
    """Opens an interview, or ends it."""
    exercise, out = one_exercise("interview", request.ex), terminal.console()
    session = _session(request, exercise)
    if request.end and not session.ended:
        terminal.begin(out, exercise, session.folder)
        # On all of the exercise, own test and style included.
        verdict = judged(exercise, lambda judge: judge.judge(exercise, session.folder).verdict(exercise))
        counting = {one.id for one in session.scope.requirements}
        how = "done" if report.earned_in_time(session) >= counting else "ended"
        session.end(how, lambda: report.text(session, verdict).splitlines())
        lines = report.summary(session, verdict)
    elif session.ended:
        lines = [f"{session.name} has ended: {shown(session.folder / report.NAME)}"]
    else:
        lines = [
            f"{session.name}: {exercise.title}, {clock.length(session)} minutes",
            f"  the problem and the signatures: {shown(session.file)}",
            f"  have every save judged: make watch EX={exercise.number}",
            f"  what counts: {' '.join(one.id for one in session.scope.requirements)}",
            f"  ask what is not said: make ask EX={exercise.number}",
            f"  think aloud, or note what you try: {shown(session.folder / 'notes.md')}",
            f"  end it, and get the report: {session.command} END=1",
            clock.reading(session),
            *(
                f"under way too: {one.name}; {one.command} END=1 ends it"
                for one in sessions.interviews()
                if one.name != session.name
            ),
        ]
    for line in lines:
        terminal.line(out, line)
    return 0


def _session(request: Request, exercise: Exercise) -> Session:
    minutes = whole_number("MINUTES", request.minutes, 1, LONGEST) if request.minutes.strip() else 0
    found = sessions.chosen("interview", exercise, request.seed, end=request.end)
    if found is None:
        if request.end:
            raise UsageError(f"no session to end: make interview EX={exercise.number} begins one")
        found = sessions.new("interview", exercise, request.seed, minutes=minutes or MINUTES)
    elif minutes and minutes != clock.length(found):
        begun = f"{shown(found.folder)} was begun with {clock.length(found)} minutes"
        raise UsageError(f"{begun}; go on: {found.command}, end it: {found.command} END=1, or take another SEED")
    if not found.ended:
        sessions.begin(found, first_text(exercise, found.scope, clock.length(found)))
        sessions.put(found.folder / "notes.md", f"{clock.notes_head(found)}\n\n")
    return found
