"""Shows a hint on the requirement at hand: a question, then the idea, then the idea with numbers, one per attempt."""

import re

from harness.commands.request import one_exercise
from harness.model import history
from harness.model.cache import VerdictCache, checks_version
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import shown
from harness.model.results import ExerciseVerdict, verdict_of
from harness.model.submission import LoadError, read
from harness.practice.interview import clock
from harness.practice.sessions import digest, sessions
from harness.report import terminal

WANTED = 3
_SECTION = re.compile(r"^## (\S+)\n", re.MULTILINE)
_HINT = re.compile(r"^\d\. ", re.MULTILINE)


def run(ex: str) -> int:
    """Prints the hints on the first open requirement that have been shown, and one more after a new attempt."""
    exercise, out = one_exercise("hint", ex), terminal.console()
    if any(clock.is_on(session) for session in sessions() if session.exercise == exercise):
        raise UsageError(
            f"an interview on {exercise.id} is on: no hints; make interview EX={exercise.number} END=1 ends it"
        )
    text = _text(exercise)
    verdict = _verdict(exercise, text)
    if verdict.state == "done":
        out.print(terminal.following(verdict, exercise.file.parent), soft_wrap=True, markup=False)
        return 0
    step = terminal.open_step(verdict)
    number, _ = terminal.open_requirement(verdict, step, exercise.file)
    hints = all_hints(exercise).get(number, ())
    if not hints:
        raise UsageError(f"{exercise.id}: has no hints on {number}")
    shown_now = _next(exercise, number, len(hints), text)
    title = next(one.title for one in exercise.requirements if one.id == number)
    terminal.line(out, f"{exercise.id} {number} {title} (step {step.number} of {len(exercise.steps)}, {step.name})")
    for place, hint in enumerate(hints[:shown_now], start=1):
        terminal.line(out, f"  {place}. {hint}")
    last = f"it was the last; make answer EX={exercise.number} FORCE=1 shows the answer"
    then = last if shown_now == len(hints) else "the next one comes after another attempt, once that is judged"
    terminal.line(out, f"hint {shown_now} of {len(hints)}; {then}")
    return 0


def all_hints(exercise: Exercise) -> dict[str, tuple[str, ...]]:
    """An exercise's hints by requirement, each on one line; empty where it has no file of them.

    The file has a section `## 3.2` for each requirement, in which hints are numbered `1. …`.
    """
    if not exercise.hints_file.exists():
        return {}
    _, *sections = _SECTION.split(exercise.hints_file.read_text(encoding="utf-8"))
    of = zip(sections[::2], sections[1::2], strict=True)
    return {number: tuple(" ".join(hint.split()) for hint in _HINT.split(text)[1:]) for number, text in of}


def _text(exercise: Exercise) -> str:
    try:
        return read(exercise.file)
    except LoadError as error:
        raise UsageError(
            f"{shown(exercise.file)}: {error.fact}; make reset EX={exercise.number} brings the starter back"
        ) from None


def _verdict(exercise: Exercise, text: str) -> ExerciseVerdict:
    """The verdict on the file as it is now; a starter needs no judge."""
    if text == exercise.starter:
        return verdict_of(exercise, [], untouched=True)
    verdict = VerdictCache(checks_version()).verdict(exercise, exercise.file)
    if verdict is None:
        raise UsageError(
            f"{shown(exercise.file)}: not judged as it is now; make check EX={exercise.number} first, or save it while "
            "make watch runs"
        )
    return verdict


def _next(exercise: Exercise, number: str, count: int, text: str) -> int:
    """How many hints on a requirement are to be shown now; another one only if the file is another one."""
    tracks = history.load()
    hints = tracks.setdefault(exercise.id, history.Track()).hints
    before, now = hints.get(number), digest(text)
    if before is not None and (before.digest == now or before.shown >= count):
        return min(before.shown, count)
    hints[number] = history.Hint(before.shown + 1 if before is not None else 1, now)
    history.store(tracks)
    return hints[number].shown
