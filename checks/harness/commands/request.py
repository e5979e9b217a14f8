"""What is asked of the harness: a command with its options, parsed once, and what can be refused by them alone."""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.model.exercise import Exercise, UsageError, exercises, selected
from harness.model.paths import TOP

# The modes of practice that begin with the answer.
PRACTICE = ("debug", "optimise", "review")


@dataclass(frozen=True)
class Request:
    """A command and its options; those of other commands keep their defaults."""

    command: str
    ex: str = ""
    submission: str = "exercises"
    device: str = "cpu"
    out: str = "gradesheet.json"
    github: bool = False
    forget_banks: bool = False
    once: bool = False
    force: bool = False
    all: bool = False
    full: bool = False
    restore: str = ""
    seed: str = ""
    bugs: str = ""
    end: bool = False
    minutes: str = ""
    n: str = ""
    prompt: str = ""
    model: str = ""
    draft: str = ""
    owner: tuple[int, ...] = ()


# What an option is for. Those that are False by default are flags.
_OPTIONS = {
    "ex": "the exercise: 3, 03 or ex03",
    "submission": "a folder, relative to the top",
    "device": "where the agreement checks run too, uncounted",
    "out": "where the gradesheet goes, relative to the top",
    "github": "also write what GitHub Actions shows",
    "forget_banks": "remove answers and banks once read",
    "once": "nothing waits for the next one",
    "force": "before the exercise is done",
    "all": "show every failure in full",
    "full": "the whole table, which takes many minutes",
    "restore": "one of the list",
    "seed": "which one: the same number gives the same session",
    "bugs": "how many, 1 to 4",
    "end": "the report at the end",
    "minutes": "how long it takes",
    "n": "which topic",
    "prompt": "how the text begins",
    "model": "a folder with a Llama-format checkpoint; by default a toy",
    "draft": "a folder with a smaller one of the same tokens",
}
# What a command does, and its options.
_COMMANDS = {
    "check": ("judge once", "ex submission device all"),
    "grade": ("write the gradesheet", "ex submission out github forget_banks"),
    "save": ("judge what has no verdict of its present state", "ex all once"),
    "serve": ("be the fork server", ""),
    "watch": ("judge each exercise when it is saved", "ex"),
    "reset": ("bring the starter back", "ex"),
    "answer": ("compare with the answer", "ex force"),
    "bench": ("measure beside the answer and others", "ex full"),
    "interview": ("a mock interview", "ex minutes seed end"),
    "ask": ("what can be asked in an interview, or an answer", "ex n"),
    "hint": ("one more hint on what is open", "ex"),
    "progress": ("what happened so far", ""),
    "attempts": ("list or restore what reset kept", "ex restore"),
    "debug": ("mend what is planted in the answer", "ex seed force end bugs"),
    "optimise": ("make right code cheap", "ex seed force end"),
    "review": ("review a change of the answer", "ex seed force end"),
    "practice": ("list the practice sessions", "ex"),
    "demo": ("let a language model write with the code", "ex submission prompt model draft"),
}


def parse(arguments: list[str]) -> Request:
    """The request that a command line makes: a command's name, then its options."""
    parser = argparse.ArgumentParser(prog="python -m harness", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (does, options) in _COMMANDS.items():
        command = commands.add_parser(name, help=does, allow_abbrev=False)
        for option in options.split():
            flag, usual = f"--{option.replace('_', '-')}", getattr(Request, option)
            if usual is False:
                command.add_argument(flag, action="store_true", help=_OPTIONS[option])
            else:
                command.add_argument(flag, default=usual, help=_OPTIONS[option])
        if name == "save":
            command.add_argument("watched", nargs="*", help="the folders that pytest-watch appends; not needed")
        if name == "serve":
            command.add_argument("--owner", type=int, action="append", default=[], help="a process for which it serves")
    asked: dict[str, Any] = vars(parser.parse_args(arguments))
    asked.pop("watched", None)
    return Request(**{**asked, "owner": tuple(asked.get("owner", ()))})


def one_exercise(command: str, ex: str) -> Exercise:
    """The exercise that EX names, for a command that wants one.

    Raises:
        UsageError: EX is empty, or there is no such exercise.
    """
    if not ex.strip():
        raise UsageError(f"make {command} wants one exercise, as in: make {command} EX=1")
    return selected(ex)[0]


def whole_number(option: str, text: str, least: int, most: int, more: str = "") -> int:
    """The number that an option gives. `more` is said beside what is wanted instead.

    Raises:
        UsageError: it is none, or out of bounds.
    """
    text = text.strip()
    if not re.fullmatch(rf"[0-9]{{1,{len(str(most))}}}", text) or not least <= int(text) <= most:
        raise UsageError(f"{option}={text}: a number from {least} to {most} is wanted{more}")
    return int(text)


def submission_folder(name: str) -> Path:
    """The folder that SUBMISSION names, absolute.

    Raises:
        UsageError: it is missing, no folder, or holds no exercise.
    """
    folder = folder_to_grade(name)
    if none := no_exercise_in(folder):
        raise UsageError(f"SUBMISSION={name}: {none}")
    return folder


def folder_to_grade(name: str) -> Path:
    """The folder that SUBMISSION names, absolute, whatever it holds.

    Raises:
        UsageError: it is missing, or no folder.
    """
    folder = (TOP / name).resolve()
    if not folder.is_dir():
        raise UsageError(f"SUBMISSION={name}: no such folder; it is relative to {TOP.name}/, as in SUBMISSION=answers")
    return folder


def no_exercise_in(folder: Path) -> str:
    """Says, where a folder holds no exercise, how one is named; else nothing."""
    names = [exercise.file_name for exercise in exercises().values()]
    if any((folder / name).exists() for name in names):
        return ""
    return f"holds no exercise; files are named like {names[0]}"


def out_path(name: str) -> Path:
    """Where the gradesheet goes that OUT names, absolute.

    Raises:
        UsageError: it is a folder, or the name of the table beside the gradesheet.
    """
    path = (TOP / name).resolve()
    if path.is_dir() or path.suffix == ".md":
        raise UsageError(f"OUT={name}: a file name such as gradesheet.json is wanted")
    return path


def refuse(request: Request) -> None:
    """Says at once what cannot be done, before torch and the checks are loaded for it.

    Raises:
        UsageError: an option names what is not there, or must not be used here.
    """
    if request.command in ("bench", "demo"):
        one_exercise(request.command, request.ex)
    elif request.command not in ("reset", "answer", "hint", "attempts", *PRACTICE):
        selected(request.ex)
    if request.command in ("check", "demo"):
        submission_folder(request.submission)
    if request.command == "grade":
        folder_to_grade(request.submission)
        out_path(request.out)
    if request.forget_banks and not os.environ.get("CI"):
        raise UsageError("FORGET_BANKS=1 removes answers and banks; only where CI is set, in a throw-away checkout")
