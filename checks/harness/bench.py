"""Measures an exercise's code beside its answer and the baselines that its bench names: a table and a picture.

Usage: python -P -m harness.bench EX

`checks/benches/exNN.py` says what is measured: X (what the axis counts), REFERENCE (the contestant that ratios are
taken against), `cases(modules)` and, where there is something to conclude, `conclude(measured)`.
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from harness import banks, board
from harness.pictures import draw
from harness.probes import Trace
from harness.specification import CHECKS, TOP, Exercise, UsageError, selected
from harness.submission import LoadError, describe, execute, load, neutral_state

Run = Callable[[], Mapping[str, float] | None]
ROUNDS = 7
LONGEST_SECONDS = 3.0
FOLDER = TOP / "build" / "bench"


@dataclass(frozen=True)
class Case:
    """One place on one panel: what each contestant runs there.

    Args:
        panel: what is measured: "forward, causal".
        x: where on the panel's axis.
        runs: by contestant, what is timed; it may return further numbers by name ("tokens per second").
        memory: also measure the most bytes of tensors that one run allocates at once.
        timed: False where only the numbers that runs return are of interest.
    """

    panel: str
    x: float
    runs: Mapping[str, Run]
    memory: bool = False
    timed: bool = True


@dataclass
class Series:
    """One metric of one panel: a value per contestant and place."""

    panel: str
    metric: str
    values: dict[str, dict[float, float]] = field(default_factory=dict)


class Bench(Protocol):
    """What a file of checks/benches defines."""

    X: str
    REFERENCE: str

    def cases(self, modules: Mapping[str, ModuleType]) -> Iterable[Case]:
        """The cases; `modules` holds "yours", where it runs, and "answer"."""

    def conclude(self, measured: Sequence[Series]) -> Iterable[str]:
        """Sentences that compare what was measured with what is claimed."""


def measure(cases: Sequence[Case], out: Console) -> list[Series]:
    """Runs all cases: a warm-up each, then rounds in which the contestants take turns; the medians.

    A contestant that raises is left out of its case; its first error is printed.
    """
    series: dict[tuple[str, str], Series] = {}
    troubles: dict[str, str] = {}

    def note(case: Case, metric: str, contestant: str, value: float) -> None:
        one = series.setdefault((case.panel, metric), Series(case.panel, metric))
        one.values.setdefault(contestant, {})[case.x] = value

    with Progress(console=out, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(cases))
        for case in cases:
            progress.update(bar, description=f"{case.panel}, {case.x:g}")
            for contestant, numbers in _rounds(case, troubles).items():
                for metric, found in numbers.items():
                    if metric == "seconds" and not case.timed:
                        continue
                    note(case, metric, contestant, statistics.median(found))
                if case.memory:
                    note(case, "peak bytes", contestant, peak_bytes(case.runs[contestant]))
            progress.advance(bar)
    for contestant, trouble in troubles.items():
        out.print(f"{contestant} is left out: {trouble}", markup=False, soft_wrap=True)
    return list(series.values())


def _rounds(case: Case, troubles: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    slowest = 0.0
    for contestant, run in case.runs.items():
        try:
            slowest = max(slowest, _timed(run)["seconds"])
            found[contestant] = {}
        except Exception as error:
            troubles.setdefault(contestant, f"{case.panel}, {case.x:g}: {describe(error)}")
    rounds = max(1, min(ROUNDS, round(LONGEST_SECONDS / max(slowest, 1e-9))))
    for _ in range(rounds):
        for contestant, numbers in list(found.items()):
            try:
                for metric, value in _timed(case.runs[contestant]).items():
                    numbers.setdefault(metric, []).append(value)
            except Exception as error:  # Code that is right now and then only.
                troubles.setdefault(contestant, f"{case.panel}, {case.x:g}: {describe(error)}")
                del found[contestant]
    return found


def _timed(run: Run) -> dict[str, float]:
    _synchronize()
    begin = time.perf_counter()
    more = run()
    _synchronize()
    return {"seconds": time.perf_counter() - begin, **(more or {})}


def peak_bytes(run: Callable[[], Any]) -> float:
    """The most bytes of tensors that a run allocates at once, beyond those that were there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    with Trace() as seen:
        run()
    return float(seen.peak_bytes)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tables(measured: Sequence[Series], x: str, reference: str) -> Iterable[Table]:
    """A table per series; in brackets, the ratio to the reference."""
    for one in measured:
        table = Table(x, *one.values, title=f"{one.panel}: {one.metric}", title_justify="left")
        for place in sorted({place for values in one.values.values() for place in values}):
            base = one.values.get(reference, {}).get(place)
            table.add_row(f"{place:g}", *(_cell(one.metric, values.get(place), base) for values in one.values.values()))
        yield table


def _cell(metric: str, value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    ratio = f" ({value / base:.2f})" if base else ""
    if metric == "seconds":
        return f"{value * 1e3:.2f} ms{ratio}"
    return f"{value / 1e6:.2f} MB{ratio}" if metric.endswith("bytes") else f"{value:.4g}{ratio}"


def contestants(exercise: Exercise, out: Console) -> dict[str, ModuleType]:
    """The learner's module and the answer's, those that load."""
    found: dict[str, ModuleType] = {}
    yours = TOP / "exercises" / exercise.file_name
    try:
        found["yours"] = load(yours)
    except LoadError as error:
        out.print(f"{board.shown(yours)}:{error.line or 1}: {error.fact}; measured without it", markup=False)
    try:
        found["answer"] = execute(banks.answer(exercise), exercise.answer_file, f"answer_{exercise.id}")
    except banks.BanksAbsent as error:
        out.print(f"{error}; measured without the answer", markup=False)
    neutral_state()
    torch.set_num_threads(_THREADS)
    return found


_THREADS = torch.get_num_threads()


def bench_of(exercise: Exercise) -> Any:
    """The module that says what is measured.

    Raises:
        UsageError: the exercise has no bench.
    """
    path = CHECKS / "benches" / f"{exercise.id}.py"
    if not path.exists():
        raise UsageError(f"{exercise.id} has no bench")
    spec = importlib.util.spec_from_file_location(f"bench_{exercise.id}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(ex: str) -> int:
    """Prints the tables, draws the picture, and says where it is."""
    out = board.console()
    try:
        if not ex.strip():
            raise UsageError("make bench wants one exercise, as in: make bench EX=1")
        exercise = selected(ex)[0]
        bench = bench_of(exercise)
    except UsageError as error:
        out.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    measured = measure(list(bench.cases(contestants(exercise, out))), out)
    for table in tables(measured, bench.X, bench.REFERENCE):
        out.print(table)
    for sentence in bench.conclude(measured):
        out.print(sentence, markup=False, soft_wrap=True)
    path = FOLDER / f"{exercise.id}.png"
    draw(path, exercise.title, bench.X, [(f"{one.panel}: {one.metric}", one.values) for one in measured])
    out.print(f"picture: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
