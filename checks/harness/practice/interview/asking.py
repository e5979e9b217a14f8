"""`make ask`: the topics of the interview that runs, or the answer to one; what was asked is in the report."""

from harness.commands.request import whole_number
from harness.model.exercise import UsageError, selected
from harness.practice.interview import clock
from harness.practice.interview.statement import topics
from harness.practice.sessions import Session, interviews
from harness.report import terminal


def run(ex: str, number: str) -> int:
    """Lists the topics, or answers the one that N names."""
    session, out = under_way(ex), terminal.console()
    there = topics(session.scope)
    if not number.strip():
        asked = {one for _, one in questions(session)}
        terminal.line(out, f"{session.name}: what you may ask")
        for place, topic in enumerate(there, start=1):
            terminal.line(out, f" {place:>2}. {topic.name}{' (asked)' if place in asked else ''}")
        terminal.line(out, f"ask: make ask EX={session.exercise.number} N=1; {clock.reading(session)}")
        return 0
    chosen = whole_number("N", number, 1, len(there), "; make ask lists the topics")
    session.options.setdefault("asked", []).append([round(clock.minute(session), 1), chosen])
    session.store()
    topic = there[chosen - 1]
    terminal.line(out, f"{chosen}. {topic.name}")
    terminal.line(out, topic.text)
    terminal.line(out, f"{session.name}: {clock.reading(session)}")
    return 0


def under_way(ex: str) -> Session:
    """The last interview that has not ended.

    Raises:
        UsageError: there is none.
    """
    wanted = selected(ex)
    there = interviews()
    found = [one for one in there if one.exercise in wanted]
    if not found:
        others = "".join(f"; make ask EX={one.exercise.number} asks in {one.name}" for one in there)
        raise UsageError(f"no interview is under way; make interview EX={wanted[0].number} begins one{others}")
    return max(found, key=lambda one: one.touched)


def questions(session: Session) -> list[tuple[float, int]]:
    """The minute and the topic's number of each question."""
    return [(float(minute), int(number)) for minute, number in session.options.get("asked", [])]
