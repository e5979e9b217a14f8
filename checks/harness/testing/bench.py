"""Measures contestants side by side: seconds, bytes, and what their runs return."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress

from harness.model.paths import TOP
from harness.model.submission import describe
from harness.testing.trace import Trace

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
        long: measured with FULL=1 alone.
    """

    panel: str
    x: float
    runs: Mapping[str, Run]
    memory: bool = False
    timed: bool = True
    long: bool = False


@dataclass
class Series:
    """One metric of one panel: a value per contestant and place."""

    panel: str
    metric: str
    values: dict[str, dict[float, float]] = field(default_factory=dict)


class Bench(Protocol):
    """What an exercise's bench.py defines."""

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
