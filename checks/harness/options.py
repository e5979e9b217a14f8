"""The options of the judging commands, and what can be refused by them alone."""

import argparse
import os
from pathlib import Path

from harness.specification import TOP, UsageError, exercises, selected


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command: its name first."""
    parser = argparse.ArgumentParser(prog="harness", allow_abbrev=False)
    parser.add_argument("command", choices=["check", "grade", "save"])
    parser.add_argument("watched", nargs="*", help="the folders that pytest-watch appends to its runner; not needed")
    parser.add_argument("--ex", default="")
    parser.add_argument("--submission", default="exercises")
    parser.add_argument("--device", default="cpu", help="check: where the agreement checks run too, uncounted")
    parser.add_argument("--out", default="gradesheet.json", help="where grade writes the gradesheet")
    parser.add_argument("--forget-banks", action="store_true", help="grade: remove answers and banks once read")
    parser.add_argument("--once", action="store_true", help="save: nothing waits for the next one")
    parser.add_argument("--github", action="store_true", help="grade also writes what GitHub Actions shows")
    return parser.parse_intermixed_args(arguments)


def submission_folder(name: str) -> Path:
    """The folder that SUBMISSION names, absolute.

    Raises:
        UsageError: it is missing, no folder, or holds no exercise.
    """
    folder = (TOP / name).resolve()
    if not folder.is_dir():
        raise UsageError(f"SUBMISSION={name}: no such folder; it is relative to {TOP.name}/, as in SUBMISSION=answers")
    if not any((folder / exercise.file_name).exists() for exercise in exercises().values()):
        names = ", ".join(exercise.file_name for exercise in exercises().values())
        raise UsageError(f"SUBMISSION={name}: holds no exercise; files are named like {names}")
    return folder


def out_path(name: str) -> Path:
    """Where the gradesheet goes that OUT names, absolute.

    Raises:
        UsageError: it is a folder, or the name of the table beside the gradesheet.
    """
    path = (TOP / name).resolve()
    if path.is_dir() or path.suffix == ".md":
        raise UsageError(f"OUT={name}: a file name such as gradesheet.json is wanted")
    return path


def refuse(options: argparse.Namespace) -> None:
    """Says at once what cannot be done, before torch and the checks are loaded for it.

    Raises:
        UsageError: an option names what is not there, or must not be used here.
    """
    selected(options.ex)
    if options.command != "save":
        submission_folder(options.submission)
    if options.command == "grade":
        out_path(options.out)
    if options.forget_banks and not os.environ.get("CI"):
        raise UsageError("FORGET_BANKS=1 removes answers and banks; only where CI is set, in a throw-away checkout")
