"""The clock of an interview, and what it asks for at set minutes."""

import time
from collections.abc import Callable
from contextlib import suppress

from harness.model.paths import PRACTICE, shown, write_whole
from harness.model.results import ExerciseVerdict
from harness.practice.sessions import Session, interviews

# Parts of the time after which the learner is asked to think aloud.
_PROMPTS = (0.1, 0.35, 0.7)


def minute(session: Session, at: float | None = None) -> float:
    """Minutes from the beginning to a time, or to now, or to the end of one that has ended."""
    return ((at or session.ended or time.time()) - session.created) / 60


def length(session: Session) -> int:
    """How many minutes it may take."""
    return int(session.options["minutes"])


def notes_head(session: Session) -> str:
    """The first line of its notes."""
    return f"# {session.name}: what I try, and why"


def is_on(session: Session) -> bool:
    """Whether it is an interview that runs."""
    return session.mode == "interview" and not session.ended and minute(session) < length(session)


def reading(session: Session) -> str:
    """The clock in words."""
    gone, whole = minute(session), length(session)
    if gone >= whole:
        return f"clock: time is over ({whole} minutes); {session.command} END=1 writes the report"
    return f"clock: {gone:.0f} of {whole} minutes, {whole - gone:.0f} left"


def says(session: Session, verdict: ExerciseVerdict) -> list[str]:
    """What an interviewer says after a save: the time; at set minutes, that thoughts are to be said or noted."""
    lines = [reading(session), *prompts(session)]
    if verdict.state == "done" and is_on(session):
        lines.append(f"all that counts is earned; test more, or end it: {session.command} END=1")
    return lines


def prompts(session: Session) -> list[str]:
    """Asks, at set minutes, to think aloud; once each."""
    if not is_on(session) or (due := _passed(session)) <= session.options.get("prompts", 0):
        return []
    session.options["prompts"] = due
    session.store()
    return [f"say aloud what you are about to try, and why, or note it in {shown(session.folder / 'notes.md')}"]


def bell() -> Callable[[], None]:
    """What has the watch say the time, at set minutes and at the end, to somebody who saves nothing: the watch runs
    when a Python file changes, and this one is nobody's work.
    """
    passed: dict[str, int] = {}

    def ring() -> None:
        with suppress(OSError):
            for session in interviews():
                before, passed[session.name] = passed.get(session.name), _passed(session)
                if before is not None and passed[session.name] > before:
                    write_whole(PRACTICE / "clock.py", f"# {reading(session)}\n")

    return ring


def _passed(session: Session) -> int:
    """How many of the set minutes have passed, the end among them."""
    return sum(minute(session) >= part * length(session) for part in (*_PROMPTS, 1.0))
