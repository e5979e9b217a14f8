"""What practice makes of an exercise's bank: hunts fail and are mended, right changes of a review pass, faults fail."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.model.exercise import Exercise, UsageError
from harness.model.paths import shown, write_whole
from harness.practice import debug, planted, refactorings, review
from harness.practice.planted import Change, Fault
from harness.practice.sessions import new
from harness.runner.judge import Judge
from harness.testing.check import Kind

# How many hunts, of which the last mends are tried too, and reviews `make bank` makes; and `make test`.
MANY, FEW_HUNTS = 50, 3


def problems(judge: Judge, exercise: Exercise, full: bool) -> Iterator[str]:
    """What does not hold, a sentence each: of many hunts and reviews, or of few hunts and one review."""
    for failure in _failures(judge, exercise, []):
        yield f"practice: the answer below the starter's docstring fails {failure}"
    for seed in range(MANY if full else FEW_HUNTS):
        yield from _hunt(judge, exercise, seed, full)
    for seed in range(MANY if full else 1):
        yield from _review(judge, exercise, seed)


def renew(judge: Judge, exercise: Exercise) -> Iterator[str]:
    """Judges every function of every variant by itself in the answer, and lists those that are right; a list that was
    there and says otherwise is a problem.
    """
    found = [
        one.name
        for one in refactorings.proposed(exercise)
        if not _failures(judge, exercise, [one.change])
        and not _failures(judge, exercise, [one.change], kinds=("ruff", "mypy"))
    ]
    there = exercise.refactorings_file.exists()
    if not there or found != refactorings.listed(exercise):
        write_whole(exercise.refactorings_file, "".join(f"{name}\n" for name in found))
    if there and found != refactorings.listed(exercise):
        yield f"{shown(exercise.refactorings_file)} was not what the checks say; it has been written anew"


def _hunt(judge: Judge, exercise: Exercise, seed: int, full: bool) -> Iterator[str]:
    """A hunt fails, and goes on failing until the last of its bugs is mended."""
    session = new("debug", exercise, str(seed), bugs=seed % debug.MOST + 1)
    try:
        bugs = debug.bugs(session)
    except UsageError:
        return  # It says so to whoever asks for as many.
    name = f"practice: {session.name} of {len(bugs)}"
    if not _failures(judge, exercise, bugs, *_of(bugs if full else bugs[:1])):
        yield f"{name} passes"
    for bug in bugs if full and len(bugs) > 1 else ():
        rest = [one for one in bugs if one is not bug]
        if not _failures(judge, exercise, rest, *_of(rest)):
            yield f"{name} passes once {bug.mistake.name} is mended"


def _review(judge: Judge, exercise: Exercise, seed: int) -> Iterator[str]:
    """The right changes of a review pass together; each fault fails beside them."""
    session = new("review", exercise, str(seed))
    try:
        made = review.change(session)
    except UsageError:
        return
    right = [one.change for one in made.right]
    if right and (failed := _failures(judge, exercise, right)):
        yield f"practice: the right changes of {session.name} fail {failed[0]}"
    for fault in made.faults:
        if not _failures(judge, exercise, [*right, fault], *_of([fault])):
            yield f"practice: {session.name}: {fault.mistake.name} passes"


def _of(faults: Sequence[Fault]) -> list[str]:
    """The requirements that catch some mistakes."""
    return [number for fault in faults for number in fault.mistake.requirements]


def _failures(
    judge: Judge, exercise: Exercise, changes: Sequence[Change], *requirements: str, kinds: Sequence[Kind] = ("code",)
) -> list[str]:
    """The first failing check of the code with some changes, if any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / exercise.file_name
        path.write_text(planted.file_text(exercise, changes), encoding="utf-8")
        results = judge.results(exercise, Path(folder), kinds, requirements, at_first_failure=True)
    return [f"{one.requirement} {one.name}: {one.message}" for one in results if one.outcome != "passed"]
