"""`make optimise`: right but wasteful code, to be made cheap; at the end it is measured before and after."""

from harness.commands.request import Request
from harness.model.exercise import Requirement, UsageError
from harness.model.paths import shown
from harness.model.results import ExerciseVerdict
from harness.practice import planted
from harness.practice.opening import closed, opened, said_of, standing, tell, verdict_now
from harness.practice.planted import Fault
from harness.practice.sessions import Session
from harness.report import terminal


def run(request: Request) -> int:
    """Opens an optimisation, or ends it with its figures."""
    session, out = opened(request, first_text), terminal.console()
    if request.end and not session.ended:
        # torch is loaded only where something is measured, and before the checks, which are content with one thread.
        from harness.practice.measuring import figures

        how = "done" if verdict_now(session, out).state == "done" else "given up"
        # What the checks count before the change is said too: the bench may show nothing of it.
        (said,) = said_of(session, [waste(session)]).values()
        costs = ["what the check counted before:", *(f"   {line}" for line in said.splitlines())] if said else []
        lines = [*costs, *figures(session, first_text(session), out)]
        session.end(how, lambda: [*report(session, how), *lines])
    if session.ended:
        return closed(session, out)
    efficiency = ", ".join(f"{one.id} {one.title}" for one in _efficiency(session))
    tell(
        out,
        [
            f"{session.name}: {session.exercise.title}, right but wasteful",
            f"  open is {efficiency}; the other requirements are earned, and must stay so",
            f"  make {shown(session.file)} cheap; make watch judges every save",
            f"  at the end, or to give up: {session.command} END=1 measures before and after",
            *standing(session),
        ],
    )
    return 0


def says(session: Session, verdict: ExerciseVerdict) -> list[str]:
    """What follows from a verdict."""
    if verdict.state == "done":
        return [f"next: {session.command} END=1 measures before and after"]
    open_ones = {one.id for one in _efficiency(session)}
    missing = [one.requirement.id for one in verdict.requirements if not one.score]
    lost = [number for number in missing if number not in open_ones]
    if lost:
        return [f"next: {', '.join(lost)} must stay: only what the code costs is to change"]
    return [f"next: make it cheap, and save; give up, and see: {session.command} END=1"]


def first_text(session: Session) -> str:
    """What an optimisation's file begins as."""
    return planted.file_text(session.exercise, [waste(session)])


def waste(session: Session) -> Fault:
    """The wasteful change of the answer; it follows from seed and bank.

    Raises:
        UsageError: the bank holds none.
    """
    exercise = session.exercise
    for change in planted.mistaken(exercise, f"optimise {exercise.id} {session.seed}", wasteful=True):
        if not planted.too_long(change) and planted.unremarkable(planted.file_text(exercise, [change])):
            return change
    raise UsageError(f"{exercise.id} has nothing to optimise: its bank holds no code that is right but wasteful")


def report(session: Session, how: str) -> list[str]:
    """What was wasteful, and the smallest mend."""
    change = waste(session)
    line = planted.line_of(session.exercise, change.hunks[0], [change])
    return [
        f"{session.name}: {how}, {session.took}",
        f"wasteful was line {line}: {change.named} ({', '.join(change.mistake.requirements)})",
        "the smallest mend:",
        *planted.mend(session.exercise, change),
    ]


def _efficiency(session: Session) -> list[Requirement]:
    """The requirements that the wasteful code may cost."""
    caught_by = waste(session).mistake.requirements
    return [one for one in session.exercise.requirements if one.id in caught_by]
