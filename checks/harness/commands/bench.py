"""Measures an exercise's code beside its answer and the baselines that its bench names: a table and a picture.

`bench.py` in the exercise's folder says what is measured (`harness.testing.bench.Bench`): `cases(modules)` and, where
there is something to conclude, `conclude(measured)`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from rich.console import Console

from harness.commands import figures
from harness.commands.request import one_exercise
from harness.model import bank
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import BUILD, module_from, shown
from harness.model.submission import LoadError
from harness.report import charts, terminal
from harness.testing.bench import Bench, Case, Measured, measure
from harness.testing.subject import execute, load, neutral_state

_THREADS = torch.get_num_threads()
_INTERRUPTED = 130


def run(ex: str, *, full: bool = False) -> int:
    """Prints the tables, draws the picture, and says where it is.

    Args:
        full: also measure what takes long.
    """
    out = terminal.console()
    exercise = one_exercise("bench", ex)
    bench = bench_of(exercise)
    cases = list(bench.cases(contestants(exercise, out)))
    chosen = [case for case in cases if full or not case.long]
    minutes = "some minutes" if len(chosen) > sum(not case.long for case in cases) else f"about {bench.SECONDS} s"
    out.print(f"measuring; it takes {minutes}, Ctrl-C ends it with what is there", soft_wrap=True)
    measured = shown_beside(chosen, bench, out)
    if measured.whole:
        for sentence in bench.conclude(measured.series):
            out.print(sentence, markup=False, soft_wrap=True)
    if len(chosen) < len(cases):
        left = f"{len(cases) - len(chosen)} of {len(cases)} cases, which take minutes, are left out"
        out.print(f"{left}: make bench EX={exercise.number} FULL=1 measures them too", soft_wrap=True)
    drawn(BUILD / "bench" / f"{exercise.id}.png", exercise.title, bench, measured, out)
    return 0 if measured.whole else _INTERRUPTED


def shown_beside(cases: Sequence[Case], bench: Bench, out: Console) -> Measured:
    """Measures cases, prints the tables, and says how the learner's code compares."""
    measured = measure(cases, out)
    for table in figures.tables(measured.series, bench):
        out.print(table)
    if measured.series:
        out.print()
        out.print(figures.legend(bench), markup=False, soft_wrap=True)
    if not measured.whole:
        out.print(f"{measured.done} of {measured.asked} cases were measured")
    if measured.busy:
        out.print("the machine was busy with other work: times above are not to be compared", style="yellow")
    for sentence in figures.yours(measured.series, bench):
        out.print(sentence, markup=False, soft_wrap=True)
    return measured


def drawn(path: Path, title: str, bench: Bench, measured: Measured, out: Console) -> None:
    """Draws the picture, and says where it is."""
    if not measured.series:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    charts.draw(path, title, bench.X, figures.panels(measured.series), f"{bench.CAPTION}; {device}")
    out.print(f"picture: {shown(path)}", markup=False)


def bench_of(exercise: Exercise) -> Bench:
    """The module that says what is measured.

    Raises:
        UsageError: the exercise has no bench.
    """
    if not exercise.bench_file.exists():
        raise UsageError(f"{exercise.id} has no bench")
    return cast(Bench, module_from(exercise.bench_file, f"bench_{exercise.id}"))


def contestants(exercise: Exercise, out: Console) -> dict[str, ModuleType]:
    """The learner's module and the answer's, those that load."""
    found: dict[str, ModuleType] = {}
    try:
        found["yours"] = load(exercise.file)
    except LoadError as error:
        out.print(f"{shown(exercise.file)}:{error.line or 1}: {error.fact}; measured without it", markup=False)
    try:
        found["answer"] = execute(bank.answer(exercise), exercise.answer_file, f"answer_{exercise.id}")
    except bank.BanksAbsent as error:
        out.print(f"{error}; measured without the answer", markup=False)
    settle()
    return found


def settle() -> None:
    """Sets back what contestants did to torch when they were loaded, and lets them use all threads."""
    neutral_state()
    torch.set_num_threads(_THREADS)
