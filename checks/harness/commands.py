"""What `make check` and `make watch` do once a session with all checks is at hand; runs in the process that asked or
in a fork.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from harness import banks, board, github, gradesheet
from harness.ledger import Entry, Ledger, checks_version, stamp
from harness.options import out_path, parse, refuse, submission_folder
from harness.specification import TOP, Exercise, UsageError, selected
from harness.submission import LoadError, isolated, read
from harness.supervise import LANES, Judge
from harness.verdicts import ExerciseVerdict, Result


def judge_file(exercise: Exercise, folder: Path, judge: Judge, before: Entry | None) -> Entry:
    """Judges a submission's file now. An own test that passed before is not run again while nothing it depends on has
    changed.
    """
    path = folder / exercise.file_name
    at, start = stamp(path), time.perf_counter()
    try:
        text = read(path)
    except LoadError:
        text = ""
    own = judge.own_test_digest(exercise, text)
    kept: dict[str, Result] = {}
    if before is not None and own and own == before.own_test:
        names = judge.names(exercise, "own test")
        kept = {result.name: result for result in before.results if result.name in names}
    if any(result.outcome != "passed" for result in kept.values()):
        kept = {}
    lanes = tuple(lane for lane in LANES if not (kept and lane == "own test"))
    found = {result.name: result for result in judge.results(exercise, folder, lanes)} | kept
    results = tuple(found[name] for _, name in judge.expected(exercise))
    return Entry(at, text == exercise.starter, time.perf_counter() - start, own, results)


def check(options: argparse.Namespace, judge: Judge) -> int:
    """Judges everything asked for once; 0 if all of it is done."""
    chosen, folder = selected(options.ex), submission_folder(options.submission)
    out = board.console()
    ledger = Ledger(checks_version()) if folder == TOP / "exercises" else None
    verdicts = []
    for exercise in chosen:
        entry = judge_file(exercise, folder, judge, None)
        verdicts.append(entry.verdict(exercise))
        if ledger is not None:
            ledger.store(exercise, entry)
    board.board(out, verdicts)
    _details(out, verdicts, folder)
    out.print("\n" + _next_step(verdicts, folder), style="dim", soft_wrap=True)
    return 0 if all(verdict.state == "done" for verdict in verdicts) else 1


def grade(options: argparse.Namespace, judge: Judge) -> int:
    """Judges everything asked for and writes the gradesheet; 0 whatever the points are."""
    chosen, folder, path = selected(options.ex), submission_folder(options.submission), out_path(options.out)
    out = board.console()
    token = github.mute() if options.github else ""
    judge.read_banks()
    version = checks_version()
    if options.forget_banks:
        banks.forget()
    verdicts = []
    for exercise in track(chosen, "grading", console=out, transient=True, disable=not out.is_terminal):
        with judge.graded() as alone:
            copied = isolated(folder / exercise.file_name, alone)
            verdict = judge_file(exercise, copied, judge, None).verdict(exercise)
        verdicts.append(verdict)
        reason = f" ({github.plain(verdict.reason)})" if verdict.reason else ""
        line = f"{exercise.id} {verdict.score}/{verdict.max_score} {verdict.state}{reason}, {verdict.seconds:.1f} s"
        out.print(line, markup=False, soft_wrap=True)
    graded = gradesheet.sheet(verdicts, version, torch.__version__.partition("+")[0])
    beside = gradesheet.write(graded, path)
    out.print(
        f"total {graded['score']}/{graded['max_score']}; {board.shown(path)}, {board.shown(beside)}", soft_wrap=True
    )
    if options.github:
        github.publish(verdicts, graded, folder, token)
    return 0


def save(options: argparse.Namespace, judge: Judge) -> int:
    """Judges what has no verdict of its present state, and shows the whole board."""
    chosen, folder = selected(options.ex), TOP / "exercises"
    out, started = board.console(), time.perf_counter()
    ledger = Ledger(checks_version())
    stale = [exercise for exercise in chosen if ledger.stale(exercise, folder / exercise.file_name)]
    for exercise in stale:
        board.begin(out, exercise, folder)
        ledger.store(exercise, judge_file(exercise, folder, judge, ledger.entries.get(exercise.id)))
    verdicts = [ledger.entries[exercise.id].verdict(exercise) for exercise in chosen]
    board.board(out, verdicts)
    _details(out, [verdict for verdict in verdicts if verdict.exercise in stale], folder)
    names = ", ".join(exercise.id for exercise in stale) or "nothing new"
    took = f"{time.strftime('%H:%M:%S')} judged {names} in {time.perf_counter() - started:.2f} s"
    out.print(f"\n{_next_step(verdicts, folder)}", style="dim", soft_wrap=True)
    then = "make watch judges every save" if options.once else "waiting for the next save, Ctrl-C ends"
    out.print(f"{took}; {then}", style="dim", soft_wrap=True)
    return 0


def _details(out: Console, verdicts: list[ExerciseVerdict], folder: Path) -> None:
    for verdict in verdicts:
        if len(verdicts) == 1 or verdict.state not in ("done", "not started"):
            board.detail(out, verdict, folder)


def _next_step(verdicts: list[ExerciseVerdict], folder: Path) -> str:
    for verdict in verdicts:
        number = int(verdict.exercise.id[2:])
        if verdict.state == "done":
            continue
        path = board.shown(folder / verdict.exercise.file_name)
        if verdict.state == "not started":
            return f"next: open {path} and work on its TODOs; every save is judged"
        return f"next: edit {path} and save; make reset EX={number} starts it over"
    return "all done"


COMMANDS = {"check": check, "grade": grade, "save": save}


def run(arguments: list[str], judge: Judge) -> int:
    """Runs a command; what cannot be done is said in one line."""
    options = parse(arguments)
    try:
        refuse(options)
        return COMMANDS[options.command](options, judge)
    except UsageError as error:
        board.console().print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
