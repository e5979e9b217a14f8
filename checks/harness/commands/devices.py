"""`make check DEVICE=cuda`: the verdict as always, then the agreement checks on a GPU, shown and never counted.

Its own process stays without CUDA, so that the children that it forks can use it.
"""

import os
import sys

import torch
from rich.console import Console
from rich.markup import escape

from harness.commands import judge
from harness.commands.request import Request, submission_folder
from harness.model.exercise import UsageError, selected
from harness.model.results import Result, verdict_of
from harness.report import terminal
from harness.runner import session
from harness.runner.judge import Judge
from harness.sandbox.processes import CAN_FORK
from harness.testing.check import Check
from harness.testing.compare import ELSEWHERE


def check(request: Request) -> int:
    """Runs `check` and then its checks on the device; the exit code is that of the verdict.

    Raises:
        UsageError: the device is none that is known, or not here.
    """
    device = request.device
    if device not in ELSEWHERE:
        raise UsageError(f"DEVICE={device}: cpu or cuda is wanted")
    if device == "cuda" and not _cuda():
        fact = f"torch {torch.__version__} finds no GPU here"
        raise UsageError(f"DEVICE=cuda: {fact}; make check judges on the CPU, make doctor says more")

    def use(checks: list[Check]) -> int:
        code = judge.run(request, Judge(check for check in checks if check.counts))
        shown = Judge((check for check in checks if not check.counts), halves=False)
        _show(terminal.console(), request, shown)
        return code

    return session.collected(use, device=device)


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


def _show(out: Console, request: Request, judge: Judge) -> None:
    """A line per exercise, and the first failure of each."""
    folder = submission_folder(request.submission)
    out.print(f"\nagreement on {request.device}, shown but not counted:", soft_wrap=True)
    for exercise in selected(request.ex):
        results = judge.results(exercise, folder, ("code",))
        out.print(f"  {exercise.id}  {escape(exercise.title)}  {_summary(results)}", soft_wrap=True)
        verdict = verdict_of(exercise, results, untouched=False)
        failure = verdict.first_failure()
        if failure is not None and failure.kind != "not implemented":
            terminal.failure(out, folder / exercise.file_name, failure)
            out.print()
    sys.stdout.flush()


def _summary(results: list[Result]) -> str:
    passed = sum(result.outcome == "passed" for result in results)
    if not results:
        return "no check of it compares on a device"
    if all(result.kind == "not implemented" for result in results):
        return "to do"
    return f"{passed} of {len(results)} checks pass"
