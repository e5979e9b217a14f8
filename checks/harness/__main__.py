"""The entry: `python -m harness COMMAND …`. A command's module is loaded when it is asked for; most need no torch."""

import sys
from collections.abc import Callable

from harness.commands.request import Request, parse, refuse
from harness.model.bank import BankError, BanksAbsent
from harness.model.exercise import SpecificationError, UsageError


def _check(request: Request) -> int:
    from harness.commands import devices

    return devices.check(request) if request.device != "cpu" else _judge(request)


def _judge(request: Request) -> int:
    from harness.commands import judge
    from harness.runner import session, supervisor

    return session.collected(lambda collected: judge.run(request, supervisor.Judge(collected.items)))


def _serve(request: Request) -> int:
    from harness.commands import judge
    from harness.runner import server, session, supervisor

    def run(arguments: list[str], one: supervisor.Judge) -> int:
        return _said(lambda: judge.run(_refused(parse(arguments)), one))

    return session.collected(lambda collected: server.serve(collected, set(request.owner), run))


def _bank(request: Request) -> int:
    from harness.commands import bank
    from harness.runner import session

    return session.collected(lambda collected: bank.run(collected.items, request), request.ex)


def _watch(request: Request) -> int:
    from harness.commands import watch

    return watch.run(request.ex)


def _reset(request: Request) -> int:
    from harness.commands import reset

    return reset.run(request.ex)


def _answer(request: Request) -> int:
    from harness.commands import answer

    return answer.run(request.ex, bool(request.force))


def _bench(request: Request) -> int:
    from harness.commands import bench

    return bench.run(request.ex)


def _new(request: Request) -> int:
    from harness.commands import new

    return new.run(request.ex, request.name)


def _check_exercise(request: Request) -> int:
    from harness.commands import check_exercise

    return check_exercise.run(request.ex)


COMMANDS: dict[str, Callable[[Request], int]] = {
    "check": _check,
    "grade": _judge,
    "save": _judge,
    "serve": _serve,
    "watch": _watch,
    "reset": _reset,
    "answer": _answer,
    "bench": _bench,
    "new": _new,
    "check-exercise": _check_exercise,
    "bank": _bank,
    "bank-quick": _bank,
}


def _refused(request: Request) -> Request:
    refuse(request)
    return request


def _said(run: Callable[[], int]) -> int:
    """Runs something; what cannot be done is one line."""
    try:
        return run()
    except (UsageError, SpecificationError, BanksAbsent, BankError) as error:
        print(error, flush=True)
        return 2


def main(arguments: list[str]) -> int:
    """Runs a command; what cannot be done is said before torch is loaded for it."""
    request = parse(arguments)
    return _said(lambda: COMMANDS[request.command](_refused(request)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
