"""The report at the end of an interview: Markdown beside the file, and a picture of the points over the minutes."""

import time
from collections.abc import Iterator

from harness.model.exercise import CRITERIA, POINTS
from harness.model.paths import shown
from harness.model.results import READABILITY, ExerciseVerdict, RequirementVerdict
from harness.practice import sessions
from harness.practice.interview import clock
from harness.practice.interview.asking import questions
from harness.practice.interview.statement import discussion, topics
from harness.practice.sessions import Session
from harness.report import terminal, timeline

NAME, PICTURE = "report.md", "report.png"
_WORDS = {"correctness": "correct", "efficiency": "efficient", "robustness": "robust", "readability": "readable"}
_ROOM = "\n   _your answer:_\n"


def summary(session: Session, verdict: ExerciseVerdict) -> list[str]:
    """What to say of a report; draws its picture."""
    counting = session.scope.requirements
    lines = [
        f"{session.name}: {POINTS * len(earned_in_time(session))} of {POINTS * len(counting)} points in "
        f"{clock.minute(session):.0f} of {clock.length(session)} minutes",
        *(f"  {line}" for line in _scores(session, verdict)),
        f"report: {shown(session.folder / NAME)}; its questions are yours to answer",
    ]
    if sentence := timeline.missing():
        return [*lines, sentence]
    times, points = _line(session)
    bars = ("% of what counts", {_WORDS[name]: 100 * n / of for name, n, of in scores(session, verdict) if of})
    timeline.draw(session.folder / PICTURE, session.name, "minutes", [("what counts", times, points)], bars)
    return [*lines, f"picture: {shown(session.folder / PICTURE)}"]


def text(session: Session, verdict: ExerciseVerdict) -> str:
    """The report as Markdown."""
    exercise = session.exercise
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.created))
    there, asked = topics(session.scope), questions(session)
    never = [topic for place, topic in enumerate(there, start=1) if place not in {one for _, one in asked}]
    own = next((one for one in verdict.requirements if one.requirement.title == "Write your own test"), None)
    parts = [
        f"# {session.name}: {exercise.title}\n",
        f"Begun {began}; {clock.minute(session):.0f} of {clock.length(session)} minutes, {len(session.saves)} saves.\n",
        "## What was earned and lost\n",
        *(changes(session) or ["Nothing yet."]),
        "\n## The success criteria\n",
        *(f"- {line}" for line in _scores(session, verdict)),
        *_findings(verdict),
        "\n## Your own test\n",
        _own_test(session, own),
        "\n## What you asked\n",
        *([f"- minute {at:.0f}: {there[number - 1].name}" for at, number in asked] or ["Nothing."]),
        "\n## Your notes\n",
        sessions.notes(session).removeprefix(clock.notes_head(session)).strip() or "None.",
        "\n## To discuss\n",
        *(f"{place}. {question}\n{_ROOM}" for place, question in enumerate(discussion(exercise), start=1)),
        "## What you never asked\n",
        *([f"- **{topic.name}**\n{_indented(topic.text)}" for topic in never] or ["Nothing: you asked it all."]),
    ]
    return "\n".join(parts) + "\n"


def changes(session: Session) -> list[str]:
    """A line for each requirement that a save earned or lost, with its minute."""
    titles = {one.id: one.title for one in session.exercise.requirements}
    lines: list[str] = []
    before: set[str] = set()
    for save in session.saves:
        at, now = clock.minute(session, save.at), set(save.earned)
        late = ", after the time" if at > clock.length(session) else ""
        for number in sorted(now ^ before):
            how = "earned" if number in now else "lost"
            lines.append(f"- minute {at:.0f}: {number} {titles[number]} {how}{late}")
        before = now
    return lines


def earned_in_time(session: Session) -> set[str]:
    """What was earned at the last save before time was over."""
    in_time = [save for save in session.saves if clock.minute(session, save.at) <= clock.length(session)]
    return set(in_time[-1].earned) if in_time else set()


def scores(session: Session, verdict: ExerciseVerdict) -> Iterator[tuple[str, int, int]]:
    """Each criterion with how many of the requirements that count are earned, out of how many. How it reads counts in
    any time.
    """
    counting = {one.id for one in session.scope.requirements}
    for name in CRITERIA:
        of_it = [one for one in verdict.requirements if one.requirement.criterion == name]
        of_it = [one for one in of_it if one.requirement.id in counting or name == READABILITY]
        earned = sum(one.passed == len(one.results) for one in of_it)
        yield name, earned if session.saves else 0, len(of_it)


def _scores(session: Session, verdict: ExerciseVerdict) -> list[str]:
    return [
        f"{_WORDS[name]}: "
        + (f"{earned} of {terminal.counted(of, 'requirement')}" if of else "nothing of it counts in this time")
        for name, earned, of in scores(session, verdict)
    ]


def _findings(verdict: ExerciseVerdict) -> list[str]:
    """Why it does not read well, where it does not."""
    failed = [result for result in verdict.results() if result.name.startswith(("test_ruff", "test_mypy"))]
    return [f"  {' '.join(one.message.split())}" for one in failed if one.outcome != "passed"]


def _own_test(session: Session, one: RequirementVerdict | None) -> str:
    if one is None:
        return "This exercise has none."
    if one.requirement not in session.scope.requirements:
        return "None is asked for in this time."
    if not one.judged:
        return "Judged when you push: this copy has no answers to run it on."
    if one.unwritten and not one.score:
        return "Not written."
    return f"{'Earned' if one.score else 'Not earned'}: {one.passed} of {len(one.results)} checks."


def _line(session: Session) -> tuple[list[float], list[int]]:
    """The minutes of the saves and the points after each, from none at the beginning to the end."""
    times, points = [0.0], [0]
    for save in session.saves:
        times.append(clock.minute(session, save.at))
        points.append(POINTS * len(save.earned))
    return [*times, clock.minute(session)], [*points, points[-1]]


def _indented(text: str) -> str:
    """A text as it stands, below its topic."""
    return "\n".join(["  ```", *(f"  {line}" for line in text.splitlines()), "  ```"])
