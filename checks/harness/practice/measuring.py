"""The figures of an optimisation: the bench's cases with the code before, after, and the answer."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from harness.commands.bench import bench_of, drawn, settle, shown_beside
from harness.commands.figures import said
from harness.model.exercise import UsageError
from harness.model.paths import BUILD, write_whole
from harness.model.submission import LoadError, read
from harness.practice.sessions import Session
from harness.testing.bench import Case, Run, Series
from harness.testing.subject import execute

# Code that takes longer than this is not run at larger places: there it may take minutes, and all memory.
LONGEST_SECONDS = 1.0
# A difference that is no noise.
_NOTABLE = 0.1


def figures(session: Session, before: str, out: Console) -> list[str]:
    """Measures, prints the tables, draws the picture, and returns what differs, a line each.

    Raises:
        UsageError: Ctrl-C ended it.
    """
    exercise = session.exercise
    try:
        bench = bench_of(exercise)
    except UsageError as error:
        return [str(error)]
    kept = BUILD / "practice" / session.name / exercise.file_name
    write_whole(kept, before)
    modules = {}
    for name, path in (("before", kept), ("after", session.file), ("answer", exercise.answer_file)):
        try:
            modules[name] = execute(read(path), path, f"{name}_{exercise.id}")
        except LoadError as error:
            out.print(f"{name} is left out: {error.fact}", markup=False, soft_wrap=True)
    settle()
    out.print(f"measuring; it takes about {2 * bench.SECONDS} s, Ctrl-C leaves the session open", soft_wrap=True)
    measured = shown_beside(bounded(case for case in bench.cases(modules) if not case.long), bench, out)
    if not measured.whole:
        raise UsageError(f"{session.name} stays as it is; {session.command} END=1 measures again")
    picture = session.folder / "before-and-after.png"
    drawn(picture, f"{exercise.title}: before and after", bench, measured, out)
    compared = [one for one in measured.series if not (measured.busy and timed(one.metric))]
    none = "the bench shows no difference: what was wasteful costs little at its sizes, or is not among what it counts"
    return list(differences(compared)) or ["the machine was busy: times are not compared" if measured.busy else none]


def timed(metric: str) -> bool:
    """Whether a metric depends on how busy the machine is."""
    return "second" in metric or metric.endswith(", ms")


def bounded(cases: Iterable[Case]) -> list[Case]:
    """The cases, in each of which code is left out that took long at a smaller place of the same panel."""
    slow: dict[tuple[str, str], str] = {}

    def timed(case: Case, name: str, run: Run) -> Run:
        def once() -> Mapping[str, float] | None:
            if (why := slow.get((case.panel, name), "")) and not why.endswith(f"at {case.x:g}"):
                raise TimeoutError(why)
            begin = time.perf_counter()
            numbers = run()
            if (took := time.perf_counter() - begin) > LONGEST_SECONDS:
                slow.setdefault((case.panel, name), f"it takes {took:.1f} s at {case.x:g}")
            return numbers

        return once

    def runs(case: Case) -> dict[str, Run]:
        """A session's code is timed; the answer and the baselines are as they are."""
        ours = {name: timed(case, name, run) for name, run in case.runs.items() if "before" in name or "after" in name}
        return {**case.runs, **ours}

    return [replace(case, runs=runs(case)) for case in sorted(cases, key=lambda case: case.x)]


def differences(measured: Sequence[Series]) -> Iterator[str]:
    """What differs before and after, at the largest place of each series."""
    for one in measured:
        before, after, answer = (one.values.get(name, {}) for name in ("before", "after", "answer"))
        place = max(before.keys() & after.keys(), default=None)
        if place is None or abs(before[place] - after[place]) <= _NOTABLE * abs(before[place]):
            continue
        was, now = (said(one.metric, values[place]) for values in (before, after))
        ideal = f", {said(one.metric, answer[place])} the answer" if place in answer else ""
        yield f"{one.panel}, {one.metric} at {place:g}: {was} before, {now} after{ideal}"
