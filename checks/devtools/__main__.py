"""The authors' commands: `python -m devtools (bank|bank-quick|patterns|new|check-exercise) …`."""

import argparse
import sys

from devtools import check_exercise, kill_matrix, new, patterns
from harness.model.bank import BankError, BanksAbsent, mistakes
from harness.model.exercise import SpecificationError, UsageError, selected
from harness.runner import session
from harness.runner.judge import Judge


def main(arguments: list[str]) -> int:
    """Runs a command; what cannot be done is one line."""
    parser = argparse.ArgumentParser(prog="python -m devtools", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, help, option in (
        ("bank", "every mistake and variant through every check", "--only"),
        ("bank-quick", "some mistakes through the checks of the requirement that they name", "--only"),
        ("patterns", "how each mistake fails, for what the board says of a file that fails alike", "--only"),
        ("new", "begin an exercise", "--name"),
        ("check-exercise", "say what an exercise lacks", ""),
    ):
        command = commands.add_parser(name, help=help, allow_abbrev=False)
        command.add_argument("--ex", default="", help="the exercise: 3, 03 or ex03")
        if option:
            command.add_argument(option, default="")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "new":
            return new.run(asked.ex, asked.name)
        if asked.command == "check-exercise":
            return check_exercise.run(asked.ex)
        chosen, full = selected(asked.ex), asked.command == "bank"
        for exercise in chosen:
            mistakes(exercise)  # Before the checks are collected, which read them too.
        if asked.command == "patterns":
            return session.collected(
                lambda checks: patterns.run(Judge(checks, halves=False), chosen, asked.only), asked.ex
            )
        return session.collected(lambda checks: kill_matrix.run(checks, chosen, asked.only, full), asked.ex)
    except (UsageError, SpecificationError, BanksAbsent, BankError) as error:
        print(error)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
