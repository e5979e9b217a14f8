"""What a save does where there are practice sessions: theirs are judged by the same checks, on the same board."""

import time
from collections.abc import Iterable

from rich.console import Console

from harness.commands import judge as judging
from harness.commands.request import Request
from harness.model.cache import VerdictCache, checks_version
from harness.model.exercise import selected
from harness.model.paths import shown
from harness.model.results import ExerciseVerdict
from harness.practice.interview import clock
from harness.practice.modes import SAYS
from harness.practice.sessions import Save, Session, sessions
from harness.report import terminal
from harness.report.saved import Saved
from harness.runner.judge import Judge

_MOMENT_SECONDS, _RECENT_SECONDS = 5.0, 3600.0


def save(request: Request, judge: Judge) -> int:
    """Judges the sessions whose files have no verdict of their present state, then the exercises as ever."""
    out, started = terminal.console(), time.perf_counter()
    wanted = selected(request.ex)
    there = [session for session in sessions() if session.exercise in wanted]
    changed = stale(there)
    for session in changed:
        judge_session(session, judge, out, whole=len(changed) == 1)
    recent = False
    for session in there if not changed else ():
        if not session.ended:
            recent = recent or time.time() - session.touched < _RECENT_SECONDS
            terminal.line(out, f"under way: {standing(session)}; {session.command} goes on")
            for sentence in clock.prompts(session):
                terminal.line(out, sentence)
        elif _just_saved(session):
            terminal.line(out, f"{session.name} has ended; {shown(session.folder / 'report.md')} says how")
    # Whoever practises does not look for the exercise's own board; make board shows it.
    if (changed or recent) and not request.once and not judging.stale_in(wanted, VerdictCache(checks_version())):
        judging.ended(out, [session.name for session in changed], started, once=False)
        return 0
    return judging.save(request, judge)


def standing(session: Session) -> str:
    """How a session stands, in a line: an interview by its clock."""
    if session.mode == "interview":
        return f"{session.name}: {session.points or 'no'} points, {clock.reading(session)}"
    return session.so_far


def _just_saved(session: Session) -> bool:
    """Whether the file of a session that has ended was saved after that, a moment ago."""
    try:
        saved = session.file.stat().st_mtime
    except OSError:
        return False
    return saved > session.ended and time.time() - saved < _MOMENT_SECONDS


def stale(there: Iterable[Session]) -> list[Session]:
    """Those under way whose files have no verdict of their present state."""
    under_way = (one for one in there if not one.ended and one.mode in SAYS)
    return [one for one in under_way if one.file.exists() and one.verdicts().stale(one.exercise, one.file)]


def judge_session(session: Session, judge: Judge, out: Console, *, whole: bool = True) -> ExerciseVerdict:
    """Judges a session's file, notes the verdict and shows it, with what its mode says of it; or, in short, a line."""
    exercise, cache = session.scope, session.verdicts()
    terminal.begin(out, exercise, session.folder)
    last = cache.entries.get(exercise.id)
    display = Saved(out, exercise, session.folder, last) if whole else None
    entry = judge.judge(exercise, session.folder, cache.own_tests[exercise.id], display=display)
    trouble, verdict = cache.store(exercise, entry), entry.verdict(exercise)
    if display is not None:
        display.rest(verdict)
    session.saves.append(Save(time.time(), tuple(one.requirement.id for one in verdict.requirements if one.score)))
    session.store()
    said = SAYS[session.mode](session, verdict)
    if whole or session.ended:
        out.print("\n".join(["", *said]), markup=False, soft_wrap=True)
    if trouble:
        terminal.line(out, trouble)
    terminal.line(out, terminal.closing(verdict, last.verdict(exercise) if last else None, session.name))
    return verdict
