"""The entry: `python -m harness COMMAND …`. A command's module is loaded when it is asked for; most need no torch."""

import sys
from collections.abc import Callable

from harness.commands.request import PRACTICE, Request, parse, refuse
from harness.model.bank import BanksAbsent
from harness.model.exercise import SpecificationError, UsageError


def main(arguments: list[str]) -> int:
    """Runs a command; what cannot be done is said before torch is loaded for it."""

    def run() -> int:
        request = parse(arguments)
        refuse(request)
        return _run(request)

    return _said(run)


def _run(request: Request) -> int:
    if request.command in ("check", "grade", "save", "serve"):
        return _run_on_checks(request)
    if request.command in ("hint", "progress", "attempts"):
        return _help(request)
    if request.command in ("interview", "ask"):
        from harness.practice.interview import asking, opening

        return opening.run(request) if request.command == "interview" else asking.run(request.ex, request.n)
    if request.command == "practice" or request.command in PRACTICE:
        from harness.practice import modes

        return modes.run(request)
    from harness.commands import answer, reset, watch

    if request.command == "bench":
        from harness.commands import bench

        return bench.run(request.ex, full=request.full)
    if request.command == "demo":
        from harness.commands import demo

        return demo.run(request)
    if request.command == "answer":
        return answer.run(request.ex, request.force)
    return watch.run(request.ex) if request.command == "watch" else reset.run(request.ex)


def _help(request: Request) -> int:
    from harness.practice.help import attempts, hints, progress

    if request.command == "hint":
        return hints.run(request.ex)
    return progress.run() if request.command == "progress" else attempts.run(request.ex, request.restore)


def _run_on_checks(request: Request) -> int:
    from harness.commands import devices, judge
    from harness.practice import saving
    from harness.practice.interview import clock
    from harness.runner import server, session
    from harness.runner.judge import Judge

    def judged(asked: Request, one: Judge) -> int:
        return saving.save(asked, one) if asked.command == "save" else judge.run(asked, one)

    def answer(arguments: list[str], one: Judge) -> int:
        """What the fork server does with a client's command line."""

        def run() -> int:
            asked = parse(arguments)
            refuse(asked)
            return judged(asked, one)

        return _said(run)

    if request.command == "serve":
        return session.collected(lambda checks: server.serve(checks, set(request.owner), answer, clock.bell()))
    if request.device != "cpu":
        return devices.check(request)
    return session.collected(lambda checks: judged(request, Judge(checks)), request.ex)


def _said(run: Callable[[], int]) -> int:
    """Runs something; what cannot be done is one line."""
    try:
        return run()
    except (UsageError, SpecificationError, BanksAbsent) as error:
        print(error, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
