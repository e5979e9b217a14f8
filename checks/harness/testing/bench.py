"""Measures contestants side by side: seconds, bytes, and what their runs return."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.model.submission import describe
from harness.sandbox.processes import waited
from harness.testing.trace import Trace

Run = Callable[[], Mapping[str, float] | None]
ROUNDS = 7
LONGEST_SECONDS = 3.0
# What a machine with other work shows: it lets this process wait, or its figures are far apart.
_WAITED, _APART = 0.1, 0.15


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
    """One metric of one panel: a median per contestant and place, and by how much of it half the figures differ."""

    panel: str
    metric: str
    values: dict[str, dict[float, float]] = field(default_factory=dict)
    spreads: dict[str, dict[float, float]] = field(default_factory=dict)


@dataclass
class Measured:
    """What was measured, how much of what was asked for, and whether the machine had other work meanwhile."""

    series: list[Series]
    done: int
    asked: int
    busy: bool

    @property
    def whole(self) -> bool:
        """Whether nothing is missing: Ctrl-C ends it early."""
        return self.done == self.asked


class Bench(Protocol):
    """What an exercise's bench.py defines."""

    X: str  # what the axis counts
    REFERENCE: str  # the contestant that ratios are taken against
    CAPTION: str  # what all cases share: sizes
    SECONDS: int  # how long it takes on two idle cores, without the long cases
    HIGHER_IS_BETTER: Sequence[str]  # of its metrics; of seconds, bytes and all others, lower is

    def cases(self, modules: Mapping[str, ModuleType]) -> Iterable[Case]:
        """The cases; `modules` holds "yours", where it runs, and "answer"."""

    def conclude(self, measured: Sequence[Series]) -> Iterable[str]:
        """Sentences that compare what was measured with what is claimed."""


def measure(cases: Sequence[Case], out: Console) -> Measured:
    """Runs all cases: a warm-up each, then rounds in which the contestants take turns; the medians.

    A contestant that raises is left out of its case; its first error is printed. Ctrl-C ends it with what is there.
    """
    series: dict[tuple[str, str], Series] = {}
    troubles: dict[str, str] = {}
    done = 0
    begin, waits = time.monotonic(), waited(os.getpid())
    try:
        with _told(out, len(cases)) as tell:
            for case in cases:
                tell(case, done)
                found = _rounds(case, troubles)
                if case.memory:
                    for contestant, numbers in found.items():
                        numbers["peak bytes"] = [peak_bytes(case.runs[contestant])]
                _note(series, case, found)
                done += 1
    except KeyboardInterrupt:
        out.print("stopped")
    for contestant, trouble in troubles.items():
        out.print(f"{contestant} is left out: {trouble}", markup=False, soft_wrap=True)
    spreads = [spread for one in series.values() for line in one.spreads.values() for spread in line.values() if spread]
    share = (waited(os.getpid()) - waits) / (time.monotonic() - begin)
    busy = share > _WAITED or (len(spreads) > 1 and statistics.median(spreads) > _APART)
    return Measured(list(series.values()), done, len(cases), busy)


@contextmanager
def _told(out: Console, total: int) -> Iterator[Callable[[Case, int], None]]:
    """Tells how far it is: a bar on a terminal, some lines in a log."""
    if not out.is_terminal:
        step = max(1, total // 4)
        yield lambda case, done: out.print(f"{done} of {total} measured") if done and done % step == 0 else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        bar = progress.add_task("measuring", total=total)
        yield lambda case, done: progress.update(bar, completed=done, description=f"{case.panel}, {case.x:g}")


def _note(series: dict[tuple[str, str], Series], case: Case, found: Mapping[str, Mapping[str, list[float]]]) -> None:
    for contestant, numbers in found.items():
        for metric, figures in numbers.items():
            if metric == "seconds" and not case.timed:
                continue
            one = series.setdefault((case.panel, metric), Series(case.panel, metric))
            median = statistics.median(figures)
            one.values.setdefault(contestant, {})[case.x] = median
            if len(figures) > 1 and median:
                low, _, high = statistics.quantiles(figures, n=4, method="inclusive")
                one.spreads.setdefault(contestant, {})[case.x] = abs((high - low) / 2 / median)


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
