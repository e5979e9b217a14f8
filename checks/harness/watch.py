"""Starts pytest-watch on exercises/ with the thin client as its runner.

Usage: python -P -m harness.watch [EX]
"""

import os
import sys
from pathlib import Path

from harness.processes import CAN_FORK
from harness.specification import TOP, UsageError, selected

FOLDER = "exercises"


def main(ex: str = "") -> int:
    """Becomes pytest-watch; returns only if it cannot start."""
    os.chdir(TOP)
    try:
        selected(ex)
    except UsageError as error:
        print(error)
        return 2
    if not Path(FOLDER).is_dir():
        print(f"{FOLDER}/: no such folder; make reset EX=1 brings a starter back")
        return 2
    if not CAN_FORK:
        print("this system cannot fork safely: each save is judged cold, which takes some seconds", flush=True)
    # pytest-watch splits the runner at single spaces, so no path in it may hold any: relative ones do not.
    # The client needs no package: without `site` it starts earlier.
    python = [os.path.relpath(sys.executable), "-P", "-S"]
    runner = [*python, "checks/harness/client.py", "save", *(["--ex", ex] if ex else [])]
    options = [
        "--nobeep",
        "--quiet",
        "--spool",
        "20",
        "--runner",
        " ".join(runner),
        *(["--poll"] if os.environ.get("POLL") else []),
    ]
    environment = {**os.environ, "EXERCISES_WATCH": str(os.getpid()), "PYTHONWARNINGS": "ignore"}
    os.execve(sys.executable, [sys.executable, "-P", "-m", "pytest_watch", *options, FOLDER], environment)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
