"""The modes of practice: what runs each, and what is said below the board of a judged save."""

from collections.abc import Callable

from harness.commands.request import Request
from harness.model.results import ExerciseVerdict
from harness.practice import debug, optimise, overview, review
from harness.practice.interview import clock
from harness.practice.sessions import Session

# Says, in a sentence each, what follows from a verdict; it may end the session.
Say = Callable[[Session, ExerciseVerdict], list[str]]
# The modes whose files a save judges.
SAYS: dict[str, Say] = {"debug": debug.says, "optimise": optimise.says, "interview": clock.says}
_RUNS: dict[str, Callable[[Request], int]] = {
    "debug": debug.run,
    "optimise": optimise.run,
    "review": review.run,
    "practice": overview.run,
}


def run(request: Request) -> int:
    """Runs a command of practice; its exit code."""
    return _RUNS[request.command](request)
