"""How a session that begins with the answer is opened: the one to go on with, or a new one."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from harness.commands.answer import is_done
from harness.commands.request import Request, one_exercise
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import BUILD, shown, write_whole
from harness.model.results import ExerciseVerdict
from harness.practice import planted, sessions
from harness.practice.planted import Fault
from harness.practice.sessions import Session, digest

if TYPE_CHECKING:
    from harness.runner.judge import Judge
    from harness.testing.check import Check

Made = TypeVar("Made")
Text = Callable[[Session], str]
# Of what a check says: the fact and the hint, not every number.
_SAID_LINES = 4


def opened(request: Request, text: Text, options: dict[str, Any] | None = None, **usual: Any) -> Session:
    """The session that is asked for; its file is there.

    Args:
        text: what a session's file begins as.
        options: what is asked for of what the mode needs to make it again, and `usual` what it is where not asked for.

    Raises:
        UsageError: it cannot be opened; the text says why.
    """
    exercise, asked = one_exercise(request.command, request.ex), options or {}
    begins = f"make {request.command} EX={exercise.number}"
    session = sessions.chosen(request.command, exercise, request.seed, end=request.end)
    if session is None:
        if request.end:
            seed = f" SEED={request.seed.strip()}" if request.seed else ""
            raise UsageError(f"no session to end: {begins}{seed} begins one")
        if not request.force and not is_done(exercise):
            raise UsageError(
                f"{exercise.id} is not done yet by its last verdict; a session shows much of the answer\n"
                f"judge it now: make check EX={exercise.number}; open it all the same: {begins} FORCE=1"
            )
        session = sessions.new(request.command, exercise, request.seed, **{**usual, **asked})
        session.options["text"] = digest(text(session))
    elif any(session.options.get(name) != value for name, value in asked.items()):
        raise UsageError(f"{shown(session.folder)} was begun otherwise; take another SEED, or go on: {session.command}")
    if not session.ended:
        first = text(session)
        if digest(first) != session.options.get("text"):
            raise UsageError(f"{shown(session.folder)}: the bank has changed since; another one: {begins} SEED=…")
        sessions.begin(session, first)
    return session


def standing(session: Session) -> list[str]:
    """How a session stands that is gone on with, a line; nothing for a new one."""
    return [f"  so far: {session.so_far.partition(': ')[2]}"] if session.saves else []


def tell(out: Console, lines: Iterable[str]) -> None:
    """Prints lines as they are."""
    out.print("\n".join(lines), markup=False, soft_wrap=True)


def closed(session: Session, out: Console) -> int:
    """Shows the report of a session that has ended, and how to begin another; the exit code."""
    report = sessions.notes(session, "report.md").rstrip() or f"{session.name}: {session.how}"
    begin = f"make {session.mode} EX={session.exercise.number} SEED={sessions.free_seed()}"
    tell(out, [report, f"another one: {begin}; this one again: move {shown(session.folder)} away first"])
    return 0


def said_of(session: Session, changes: Sequence[Fault]) -> dict[Fault, str]:
    """What the checks say of each change alone: the fact and the hint of the first message on what it breaks."""
    exercise, folder = session.exercise, BUILD / "practice" / session.name

    def said(judge: "Judge", change: Fault) -> str:
        write_whole(folder / exercise.file_name, planted.file_text(exercise, [change]))
        failed = [one for one in judge.results(exercise, folder, ("code",)) if one.outcome != "passed"]
        first = next((one for one in failed if one.requirement in change.mistake.requirements), None)
        message = first.message.replace("your code", "the code") if first is not None else ""
        lines = message.splitlines()[:_SAID_LINES]
        return "\n".join([f"{first.requirement} {lines[0]}", *lines[1:]]) if first and lines else ""

    return judged(exercise, lambda judge: {change: said(judge, change) for change in changes})


def verdict_now(session: Session, out: Console) -> ExerciseVerdict:
    """The verdict on a session's file as it is now, judged where there is none yet."""
    cache, exercise = session.verdicts(), session.exercise
    if (there := cache.verdict(exercise, session.file)) is not None:
        return there
    # It loads torch.
    from harness.practice import saving

    return judged(exercise, lambda judge: saving.judge_session(session, judge, out))


def judged(exercise: Exercise, use: "Callable[[Judge], Made]") -> Made:
    """What is made with a judge of an exercise; torch is loaded only here.

    Raises:
        SystemExit: whoever read the output has gone.
    """
    from harness.runner import session as collecting
    from harness.runner.judge import Judge

    made: list[Made] = []

    def run(checks: "list[Check]") -> int:
        made.append(use(Judge(checks)))
        return 0

    code = collecting.collected(run, exercise.id)
    if not made:
        raise SystemExit(code)
    return made[0]
