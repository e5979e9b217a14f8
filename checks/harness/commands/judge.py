"""What `make check`, `make grade` and `make watch` do once all checks are at hand: in the process that asked, or in a
fork of the server.
"""

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from harness.commands.request import Request, out_path, submission_folder
from harness.model import bank
from harness.model.cache import Entry, VerdictCache, checks_version, stamp
from harness.model.exercise import Exercise, selected
from harness.model.paths import EXERCISES, shown
from harness.model.results import ExerciseVerdict, Result
from harness.model.submission import LoadError, isolated, read
from harness.report import github, gradesheet, terminal
from harness.runner.supervisor import KINDS, Judge, graded
from harness.sandbox import landlock


def judge_file(
    exercise: Exercise, folder: Path, judge: Judge, before: Entry | None = None, room: Path | None = None
) -> Entry:
    """Judges a submission's file now. An own test that passed `before` is not run again while nothing it depends on has
    changed; `room` is for grading, the one folder that the submission may write to.
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
    kinds = tuple(kind for kind in KINDS if not (kept and kind == "own test"))
    found = {result.name: result for result in judge.results(exercise, folder, kinds, room=room)} | kept
    results = tuple(found[name] for _, name in judge.expected(exercise))
    return Entry(at, text == exercise.starter, time.perf_counter() - start, own, results)


def check(request: Request, judge: Judge) -> int:
    """Judges everything asked for once; 0 if all of it is done."""
    chosen, folder = selected(request.ex), submission_folder(request.submission)
    out = terminal.console()
    cache = VerdictCache(checks_version()) if folder == EXERCISES else None
    verdicts = []
    for exercise in chosen:
        entry = judge_file(exercise, folder, judge)
        verdicts.append(entry.verdict(exercise))
        if cache is not None:
            cache.store(exercise, entry)
    terminal.board(out, verdicts)
    _details(out, verdicts, folder)
    out.print("\n" + _next_step(verdicts, folder), style="dim", soft_wrap=True)
    return 0 if all(verdict.state == "done" for verdict in verdicts) else 1


def grade(request: Request, judge: Judge) -> int:
    """Judges everything asked for and writes the gradesheet; 0 whatever the points are."""
    chosen, folder, path = selected(request.ex), submission_folder(request.submission), out_path(request.out)
    out = terminal.console()
    token = github.mute() if request.github else ""
    if not landlock.version():
        out.print(
            "this system has no Landlock: what is graded can read the answers, and write to files", soft_wrap=True
        )
    judge.read_banks()
    version = checks_version()
    if request.forget_banks:
        bank.forget()
    verdicts = []
    for exercise in track(chosen, "grading", console=out, transient=True, disable=not out.is_terminal):
        with graded() as (alone, room):
            copied = isolated(folder / exercise.file_name, alone)
            verdict = judge_file(exercise, copied, judge, room=room).verdict(exercise)
        verdicts.append(verdict)
        reason = f" ({github.plain(verdict.reason)})" if verdict.reason else ""
        line = f"{exercise.id} {verdict.score}/{verdict.max_score} {verdict.state}{reason}, {verdict.seconds:.1f} s"
        out.print(line, markup=False, soft_wrap=True)
    sheet = gradesheet.sheet(verdicts, version, torch.__version__.partition("+")[0])
    beside = gradesheet.write(sheet, path)
    out.print(f"total {sheet['score']}/{sheet['max_score']}; {shown(path)}, {shown(beside)}", soft_wrap=True)
    if request.github:
        github.publish(verdicts, sheet, folder, token)
    return 0


def save(request: Request, judge: Judge) -> int:
    """Judges what has no verdict of its present state, and shows the whole board."""
    chosen, folder = selected(request.ex), EXERCISES
    out, started = terminal.console(), time.perf_counter()
    cache = VerdictCache(checks_version())
    stale = [exercise for exercise in chosen if cache.stale(exercise, folder / exercise.file_name)]
    for exercise in stale:
        terminal.begin(out, exercise, folder)
        cache.store(exercise, judge_file(exercise, folder, judge, cache.entries.get(exercise.id)))
    verdicts = [cache.entries[exercise.id].verdict(exercise) for exercise in chosen]
    terminal.board(out, verdicts)
    _details(out, [verdict for verdict in verdicts if verdict.exercise in stale], folder)
    names = ", ".join(exercise.id for exercise in stale) or "nothing new"
    took = f"{time.strftime('%H:%M:%S')} judged {names} in {time.perf_counter() - started:.2f} s"
    out.print(f"\n{_next_step(verdicts, folder)}", style="dim", soft_wrap=True)
    then = "make watch judges every save" if request.once else "waiting for the next save, Ctrl-C ends"
    out.print(f"{took}; {then}", style="dim", soft_wrap=True)
    return 0


def _details(out: Console, verdicts: list[ExerciseVerdict], folder: Path) -> None:
    for verdict in verdicts:
        if len(verdicts) == 1 or verdict.state not in ("done", "not started"):
            terminal.detail(out, verdict, folder)


def _next_step(verdicts: list[ExerciseVerdict], folder: Path) -> str:
    for verdict in verdicts:
        if verdict.state == "done":
            continue
        path = shown(folder / verdict.exercise.file_name)
        if verdict.state == "not started":
            return f"next: open {path} and work on its TODOs; every save is judged"
        return f"next: edit {path} and save; make reset EX={verdict.exercise.number} starts it over"
    return "all done"


_COMMANDS = {"check": check, "grade": grade, "save": save}


def run(request: Request, judge: Judge) -> int:
    """Runs a judging command; its exit code."""
    return _COMMANDS[request.command](request, judge)
