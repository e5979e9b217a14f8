"""Measures an exercise's code beside its answer and the baselines that its bench names: a table and a picture.

`bench.py` in the exercise's folder says what is measured: X (what the axis counts), REFERENCE (the contestant that
ratios are taken against), `cases(modules)` and, where there is something to conclude, `conclude(measured)`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from harness.commands.request import one_exercise
from harness.model import bank
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import BUILD, module_from, shown
from harness.model.submission import LoadError
from harness.report import terminal
from harness.report.charts import draw
from harness.testing.bench import Bench, Case, Series, measure
from harness.testing.subject import execute, load, neutral_state

_THREADS = torch.get_num_threads()


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
    measured = shown_beside(chosen, bench, out)
    for sentence in bench.conclude(measured):
        out.print(sentence, markup=False, soft_wrap=True)
    if len(chosen) < len(cases):
        left = f"{len(cases) - len(chosen)} of {len(cases)} cases, which take minutes, are left out"
        out.print(f"{left}: make bench EX={exercise.number} FULL=1 measures them too", soft_wrap=True)
    drawn(BUILD / "bench" / f"{exercise.id}.png", exercise.title, bench, measured, out)
    return 0


def shown_beside(cases: Sequence[Case], bench: Bench, out: Console) -> list[Series]:
    """Measures cases and prints the tables."""
    measured = measure(cases, out)
    for table in tables(measured, bench.X, bench.REFERENCE):
        out.print(table)
    return measured


def drawn(path: Path, title: str, bench: Bench, measured: Sequence[Series], out: Console) -> None:
    """Draws the picture, and says where it is."""
    draw(path, title, bench.X, [(f"{one.panel}: {one.metric}", one.values) for one in measured])
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


def tables(measured: Sequence[Series], x: str, reference: str) -> Iterable[Table]:
    """A table per series; in brackets, the ratio to the reference."""
    for one in measured:
        table = Table(x, *one.values, title=f"{one.panel}: {one.metric}", title_justify="left")
        for place in sorted({place for values in one.values.values() for place in values}):
            base = one.values.get(reference, {}).get(place)
            table.add_row(f"{place:g}", *(cell(one.metric, values.get(place), base) for values in one.values.values()))
        yield table


def cell(metric: str, value: float | None, base: float | None) -> str:
    """A value in its unit; in brackets, its ratio to `base`, where there is one."""
    if value is None:
        return ""
    ratio = f" ({value / base:.2f})" if base else ""
    if metric == "seconds":
        return f"{value * 1e3:.2f} ms{ratio}"
    return f"{value / 1e6:.2f} MB{ratio}" if metric.endswith("bytes") else f"{value:.4g}{ratio}"
