"""What is asked of the harness: a command with its options, parsed once, and what can be refused by them alone."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.model.exercise import Exercise, UsageError, exercises, selected
from harness.model.paths import TOP

# The modes of practice that begin with the answer.
PRACTICE = {
    "debug": "mend what is planted in the answer",
    "optimise": "make right code cheap",
    "review": "review a change of the answer",
}


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


def parse(arguments: list[str]) -> Request:
    """The request that a command line makes: a command's name, then its options."""
    parser = argparse.ArgumentParser(prog="python -m harness", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, help: str, ex: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, allow_abbrev=False)
        if ex:
            added.add_argument("--ex", default="", help="the exercise: 3, 03 or ex03")
        return added

    check = command("check", "judge once")
    grade = command("grade", "write the gradesheet")
    for judged in (check, grade):
        judged.add_argument("--submission", default=Request.submission, help="a folder, relative to the top")
    check.add_argument("--device", default=Request.device, help="where the agreement checks run too, uncounted")
    grade.add_argument("--out", default=Request.out, help="where the gradesheet goes, relative to the top")
    grade.add_argument("--github", action="store_true", help="also write what GitHub Actions shows")
    grade.add_argument("--forget-banks", action="store_true", help="remove answers and banks once read")
    check.add_argument("--all", action="store_true", help="show every failure in full")
    save = command("save", "judge what has no verdict of its present state")
    save.add_argument("--all", action="store_true", help="show every failure in full")
    save.add_argument("--once", action="store_true", help="nothing waits for the next one")
    save.add_argument("watched", nargs="*", help="the folders that pytest-watch appends to its runner; not needed")
    serve = command("serve", "be the fork server", ex=False)
    serve.add_argument("--owner", type=int, action="append", help="a process for which it serves")
    command("watch", "judge each exercise when it is saved")
    command("reset", "bring the starter back")
    command("answer", "compare with the answer").add_argument("--force", action="store_true", help="before it is done")
    bench = command("bench", "measure beside the answer and others")
    bench.add_argument("--full", action="store_true", help="the whole table, which takes many minutes")
    interview = command("interview", "a mock interview")
    interview.add_argument("--minutes", default="", help="how long it takes")
    interview.add_argument("--seed", default="", help="which one")
    interview.add_argument("--end", action="store_true", help="the report at the end")
    command("ask", "what can be asked in an interview, or an answer").add_argument(
        "--n", default="", help="which topic"
    )
    command("hint", "one more hint on what is open")
    command("progress", "what happened so far", ex=False)
    command("attempts", "list or restore what reset kept").add_argument("--restore", default="", help="one of the list")
    for name, help in PRACTICE.items():
        mode = command(name, help)
        mode.add_argument("--seed", default="", help="which one: the same number gives the same session")
        mode.add_argument("--force", action="store_true", help="before the exercise is done")
        mode.add_argument("--end", action="store_true", help="the report at the end")
        if name == "debug":
            mode.add_argument("--bugs", default="", help="how many, 1 to 4")
    command("practice", "list the practice sessions")
    demo = command("demo", "let a language model write with the code")
    demo.add_argument("--submission", default=Request.submission, help="a folder, relative to the top")
    demo.add_argument("--prompt", default="", help="how the text begins")
    demo.add_argument("--model", default="", help="a folder with a Llama-format checkpoint; by default a toy")
    demo.add_argument("--draft", default="", help="a folder with a smaller one of the same tokens")
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    options.pop("watched", None)
    if "owner" in options:
        options["owner"] = tuple(options["owner"] or ())
    return Request(**options)


def one_exercise(command: str, ex: str) -> Exercise:
    """The exercise that EX names, for a command that wants one.

    Raises:
        UsageError: EX is empty, or there is no such exercise.
    """
    if not ex.strip():
        raise UsageError(f"make {command} wants one exercise, as in: make {command} EX=1")
    return selected(ex)[0]


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
