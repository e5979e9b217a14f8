"""`make check DEVICE=cuda`: the verdict as always, then the agreement checks on a GPU, shown and never counted.

Its own process stays without CUDA, so that the children that it forks can use it.
"""

import os
import sys

import pytest
import torch
from rich.console import Console
from rich.markup import escape

from harness import board, commands, plugin, verdicts, warm
from harness.compare import ELSEWHERE
from harness.options import parse, submission_folder
from harness.processes import CAN_FORK
from harness.specification import Exercise, UsageError, selected
from harness.supervise import Judge
from harness.verdicts import Result


def check(arguments: list[str], device: str) -> int:
    """Runs `check` and then its checks on the device; the exit code is that of the verdict.

    Raises:
        UsageError: the device is none that is known, or not here, or the command is another one.
    """
    options = parse(arguments)
    if device not in ELSEWHERE:
        raise UsageError(f"DEVICE={device}: cpu or cuda is wanted")
    if options.command != "check":
        raise UsageError(f"DEVICE={device}: only make check uses a device; points are earned on the CPU")
    if device == "cuda" and not _cuda():
        fact = f"torch {torch.__version__} finds no GPU here"
        raise UsageError(f"DEVICE=cuda: {fact}; make check judges on the CPU, make doctor says more")

    def use(session: pytest.Session) -> int:
        earning, shown = _parted(session)
        code = commands.run(arguments, earning)
        if code in (0, 1):
            _show(board.console(), selected(options.ex), options.submission, shown, device)
        return code

    return warm.collected(use, device=device)


def _cuda() -> bool:
    """Whether torch can use a GPU, asked in a fork: a process that has looked for one cannot fork for it any more."""
    if not CAN_FORK:
        return torch.cuda.is_available()
    pid = os.fork()
    if pid == 0:
        found = False
        try:
            found = torch.cuda.is_available()
        finally:
            os._exit(0 if found else 1)
    return os.waitpid(pid, 0)[1] == 0


def _parted(session: pytest.Session) -> tuple[Judge, Judge]:
    """One judge for the checks that earn, one for those on the device."""
    items = session.items
    session.items = [item for item in items if plugin.earns(item)]
    earning = Judge(session)
    session.items = [item for item in items if not plugin.earns(item)]
    return earning, Judge(session, halves=False)


def _show(out: Console, chosen: list[Exercise], submission: str, judge: Judge, device: str) -> None:
    """A line per exercise, and the first failure of each."""
    folder = submission_folder(submission)
    out.print(f"\nagreement on {device}, shown but not counted:", soft_wrap=True)
    for exercise in chosen:
        results = judge.results(exercise, folder, ("code",))
        out.print(f"  {exercise.id}  {escape(exercise.title)}  {_summary(results)}", soft_wrap=True)
        verdict = verdicts.judge(exercise, results, untouched=False)
        failure = verdict.first_failure()
        if failure is not None and failure.kind != "not implemented":
            board.first_failure(out, verdict, failure, folder / exercise.file_name)
            out.print()
    sys.stdout.flush()


def _summary(results: list[Result]) -> str:
    passed = sum(result.outcome == "passed" for result in results)
    if not results:
        return "no check of it compares on a device"
    if all(result.kind == "not implemented" for result in results):
        return "to do"
    return f"{passed} of {len(results)} checks pass"
