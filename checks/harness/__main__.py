"""Runs a command without a warm process: `python -m harness check …`, or `bank exNN [name]` for authors; `bank-quick`
runs, on most mistakes, the checks of the requirement that they name only.
"""

import sys

import pytest

from harness import board, commands, devices, kill_matrix, supervise, warm
from harness.specification import UsageError, selected


def bank(session: pytest.Session, command: str, ex: str, only: str = "") -> int:
    """Prints the kill matrix of an exercise, or of each; 1 if anything does not hold."""
    judge, problems = supervise.Judge(session, halves=False), 0
    for exercise in selected(ex):
        matrix = kill_matrix.build(judge, exercise, only, command == "bank")
        kill_matrix.show(matrix, board.console())
        problems += len(matrix.problems)
    return 1 if problems else 0


def main(arguments: list[str]) -> int:
    """Collects the checks and runs a command on them."""
    if arguments[:1] in (["bank"], ["bank-quick"]):
        return warm.collected(lambda session: bank(session, *arguments))
    if (device := commands.parse(arguments).device) != "cpu":
        return devices.check(arguments, device)
    return warm.collected(lambda session: commands.run(arguments, supervise.Judge(session)))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (warm.CollectionFailed, UsageError) as error:
        print(error)
        sys.exit(2)
