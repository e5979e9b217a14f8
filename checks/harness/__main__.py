"""Runs a command without a warm process: `python -m harness check …`, or `bank exNN [name]` for authors; `bank-quick`
runs, on most mistakes, the checks of the requirement that they name only.
"""

import sys

from harness.options import parse, refuse
from harness.specification import UsageError, selected


def main(arguments: list[str]) -> int:
    """Collects the checks and runs a command on them; what cannot be done is said before torch is loaded for it."""
    bank = arguments[0] in ("bank", "bank-quick")
    if bank:
        selected(arguments[1])
    else:
        options = parse(arguments)
        refuse(options)

    from harness import commands, devices, kill_matrix, supervise, warm

    try:
        if bank:
            return warm.collected(lambda session: kill_matrix.run(session, *arguments))
        if options.device != "cpu":
            return devices.check(arguments, options.device)
        return warm.collected(lambda session: commands.run(arguments, supervise.Judge(session)))
    except warm.CollectionFailed as error:
        print(error)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(error)
        sys.exit(2)
