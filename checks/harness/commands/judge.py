"""What `make check`, `make grade` and `make watch` do once all checks are at hand: in the process that asked, or in a
fork of the server.
"""

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from harness.commands.request import Request, folder_to_grade, no_exercise_in, out_path, submission_folder
from harness.model import bank, history
from harness.model.cache import VerdictCache, checks_version
from harness.model.exercise import Exercise, UsageError, selected
from harness.model.paths import EXERCISES, shown
from harness.model.results import ExerciseVerdict
from harness.model.submission import isolated
from harness.report import github, gradesheet, terminal
from harness.report.saved import Saved
from harness.runner.judge import Judge, graded
from harness.sandbox import landlock


def check(request: Request, judge: Judge) -> int:
    """Judges everything asked for once; 0 if all of it is done."""
    chosen, folder = selected(request.ex), submission_folder(request.submission)
    out = terminal.console()
    cache = VerdictCache(checks_version()) if folder == EXERCISES else None
    verdicts, trouble = [], ""
    for exercise in chosen:
        entry = judge.judge(exercise, folder, cache.own_tests[exercise.id] if cache is not None else None)
        verdicts.append(entry.verdict(exercise))
        if cache is not None:
            trouble = cache.store(exercise, entry) or history.note(verdicts[-1], entry.stamp) or trouble
    terminal.board(out, verdicts)
    _details(out, verdicts, folder, request.all)
    terminal.line(out, "\n".join([trouble, _next_step(verdicts, folder)]))
    return 0 if all(verdict.state == "done" for verdict in verdicts) else 1


def grade(request: Request, judge: Judge) -> int:
    """Judges everything asked for and writes the gradesheet; 0 whatever the points are."""
    chosen, folder, path = selected(request.ex), folder_to_grade(request.submission), out_path(request.out)
    out = terminal.console()
    token = github.mute() if request.github else ""
    if not landlock.version():
        out.print(
            "this system has no Landlock: what is graded can read the answers, and write to files", soft_wrap=True
        )
    judge.prepare()
    judge.read_banks()
    version = checks_version()
    if request.forget_banks:
        bank.forget()
    verdicts = []
    for exercise in track(chosen, "grading", console=out, transient=True, disable=not out.is_terminal):
        with graded() as (alone, room):
            copied = isolated(folder / exercise.file_name, alone)
            verdict = judge.judge(exercise, copied, room=room).verdict(exercise)
        verdicts.append(verdict)
        reason = f" ({github.plain(verdict.reason)})" if verdict.reason else ""
        line = f"{exercise.id} {verdict.score}/{verdict.max_score} {verdict.state}{reason}, {verdict.seconds:.1f} s"
        out.print(line, markup=False, soft_wrap=True)
    origin = github.origin(os.environ, datetime.now(UTC)) if request.github else {}
    sheet = gradesheet.sheet(verdicts, version, torch.__version__.partition("+")[0], origin)
    try:
        beside = gradesheet.write(sheet, path, gradesheet.places(verdicts, folder))
    except OSError as error:
        raise UsageError(f"OUT={request.out}: cannot be written: {error.strerror}") from None
    if none := no_exercise_in(folder):
        out.print(f"SUBMISSION={request.submission}: {none}", markup=False, soft_wrap=True)
    out.print(f"total {sheet['score']}/{sheet['max_score']}; {shown(path)}, {shown(beside)}", soft_wrap=True)
    if request.github:
        github.publish(verdicts, sheet, folder, token)
    return 0


def save(request: Request, judge: Judge) -> int:
    """Judges what has no verdict of its present state. The verdict on a single save comes in two steps."""
    chosen, folder = selected(request.ex), EXERCISES
    out, started = terminal.console(), time.perf_counter()
    cache = VerdictCache(checks_version())
    stale = stale_in(chosen, cache)
    one: Saved | None = None
    trouble = ""
    for exercise in stale:
        terminal.begin(out, exercise, folder)
        if len(stale) == 1 and not request.once:
            one = Saved(out, exercise, folder, cache.entries.get(exercise.id))
        entry = judge.judge(exercise, folder, cache.own_tests[exercise.id], display=one)
        trouble = cache.store(exercise, entry) or history.note(entry.verdict(exercise), entry.stamp) or trouble
    verdicts = [cache.entries[exercise.id].verdict(exercise) for exercise in chosen]
    saved = [verdict for verdict in verdicts if verdict.exercise in stale]
    if one is not None:
        one.rest(saved[0])
    else:
        terminal.board(out, verdicts)
        _details(out, saved or _at_hand(verdicts), folder, request.all)
    terminal.line(out, "\n".join([trouble, _next_step(saved if one is not None else verdicts, folder)]))
    if one is not None:
        terminal.line(out, terminal.closing(saved[0], one.before))
    ended(out, [exercise.id for exercise in stale], started, request.once)
    return 0


def stale_in(chosen: list[Exercise], cache: VerdictCache) -> list[Exercise]:
    """The exercises among some whose files have no verdict of their present state."""
    return [exercise for exercise in chosen if cache.stale(exercise, exercise.file)]


def ended(out: Console, names: list[str], started: float, once: bool) -> None:
    """The last line of a save, which editors wait for: it is one line everywhere."""
    took = f"{time.strftime('%H:%M:%S')} judged {', '.join(names) or 'nothing new'} in "
    then = "make watch judges every save" if once else "waiting for the next save, Ctrl-C ends"
    out.print(f"{took}{time.perf_counter() - started:.2f} s; {then}", soft_wrap=True)


def _at_hand(verdicts: list[ExerciseVerdict]) -> list[ExerciseVerdict]:
    """The exercise that is being worked on: after a restart its failure is there again."""
    return [verdict for verdict in verdicts if verdict.state in ("in progress", "does not import")][:1]


def _details(out: Console, verdicts: list[ExerciseVerdict], folder: Path, everything: bool) -> None:
    for verdict in verdicts:
        if len(verdicts) == 1 or verdict.state not in ("done", "not started"):
            terminal.detail(out, verdict, folder, everything=everything)


def _next_step(verdicts: list[ExerciseVerdict], folder: Path) -> str:
    opened = next((verdict for verdict in verdicts if verdict.state != "done"), None)
    if opened is not None:
        return terminal.following(opened, folder)
    return terminal.following(verdicts[0], folder) if len(verdicts) == 1 else "all done"


_COMMANDS = {"check": check, "grade": grade}


def run(request: Request, judge: Judge) -> int:
    """Runs a judging command; its exit code."""
    return _COMMANDS[request.command](request, judge)
