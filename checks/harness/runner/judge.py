"""Judges an exercise of a submission by its checks. The judging process never runs a learner's code: workers do."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from harness.model.cache import Entry, OwnTests, stamp
from harness.model.exercise import Exercise, exercises
from harness.model.limits import SHARD_SECONDS
from harness.model.results import Cause, Result
from harness.model.submission import LoadError, read
from harness.runner import shards, worker
from harness.runner.shards import Shard
from harness.runner.supervisor import started, supervise
from harness.sandbox.integrity import before_submissions
from harness.sandbox.processes import CAN_FORK, adopt_orphans, end, end_children
from harness.testing.check import KINDS, Check, Kind, end_trials, start_trials
from harness.testing.own_test import OwnTest, digest

# What the verdict on the code waits for.
_FIRST = KINDS[:2]


class Display(Protocol):
    """Shows the verdict on one save as it comes."""

    def slow(self, name: str) -> None:
        """A check of the code takes long."""

    def first(self, entry: Entry, later: Sequence[Result]) -> None:
        """What the checks of the code and ruff say. `later` stands for the checks that still run."""


class Judge:
    """Judges exercises by their collected checks.

    Args:
        hangup: a descriptor that becomes readable when nobody wants the verdict any more.
        halves: run the checks of the code in two processes where there are two processors: the second begins with the
            check marked `halfway`, or with the one in the middle.
    """

    def __init__(self, checks: Iterable[Check], hangup: int | None = None, *, halves: bool = True) -> None:
        self._checks: dict[str, list[Check]] = {exercise: [] for exercise in exercises()}
        for check in checks:
            self._checks[check.exercise.id].append(check)
        self._hangup = hangup
        self._halves = halves and (os.cpu_count() or 1) > 1

    def checks(self, exercise: Exercise) -> list[Check]:
        """All that must report on an exercise, or on the part of it that has these requirements."""
        ids = {requirement.id for requirement in exercise.requirements}
        return [check for check in self._checks[exercise.id] if check.requirement in ids]

    def names(self, exercise: Exercise, kind: Kind) -> list[str]:
        """The names of the checks of a kind, in their order."""
        return [check.name for check in self.checks(exercise) if check.kind == kind]

    def prepare(self) -> None:
        """Does what workers of the learner's code would each do otherwise; a second time does nothing. Where torch is
        compared before and after a submission, this comes first.
        """
        if CAN_FORK and not worker.prepared():
            worker.prepare(check for checks in self._checks.values() for check in checks)

    def read_banks(self) -> None:
        """Reads what own tests are judged on, so that no later reading of files is needed."""
        for exercise in exercises().values():
            if (own := self._own_test(exercise)) is not None:
                _ = own.unusual

    def judge(
        self,
        exercise: Exercise,
        folder: Path,
        own_tests: OwnTests | None = None,
        *,
        room: Path | None = None,
        display: Display | None = None,
    ) -> Entry:
        """The verdict on an exercise of the submission `folder`, by all of its checks.

        Args:
            own_tests: what is known of own tests: one that is among them is not run again.
            room: for grading: the one folder that the submission may write to.

        Raises:
            Abandoned: nobody wants the verdict any more.
        """
        path, checks = folder / exercise.file_name, self.checks(exercise)
        at, start = stamp(path), time.perf_counter()
        try:
            text = read(path)
        except LoadError as error:
            if display is None:  # What no check can read needs no process that says so.
                kind: Cause = "no file" if error.missing else "load"
                unread = (check.result("error", error.fact, error.line, kind) for check in checks)
                return Entry(at, False, time.perf_counter() - start, tuple(unread))
            text = ""
        depends, line = self._own_test_in(exercise, text)
        kept = {result.name: result for result in own_tests.find(depends, line)} if own_tests is not None else {}

        def entry(results: Iterable[Result]) -> Entry:
            found = {result.name: result for result in results} | kept
            ordered = tuple(found[check.name] for check in checks if check.name in found)
            return Entry(at, text == exercise.starter, time.perf_counter() - start, ordered)

        def later(results: Iterable[Result]) -> list[Result]:
            there = {result.name for result in results} | kept.keys()
            return [check.result("missing", kind="unjudged") for check in checks if check.name not in there]

        kinds = [kind for kind in KINDS if not (kept and kind == "own test")]
        if display is None:
            results = self.results(exercise, folder, kinds, room=room)
        else:
            results = self.results(
                exercise, folder, kinds, first=lambda some: display.first(entry(some), later(some)), slow=display.slow
            )
        if own_tests is not None and not kept:
            names = self.names(exercise, "own test")
            own_tests.keep(depends, line, [result for result in results if result.name in names])
        return entry(results)

    def results(
        self,
        exercise: Exercise,
        folder: Path,
        kinds: Sequence[Kind] = KINDS,
        requirements: Sequence[str] = (),
        *,
        room: Path | None = None,
        at_first_failure: bool = False,
        walk_steps: int = 0,
        first: Callable[[list[Result]], None] | None = None,
        slow: Callable[[str], None] | None = None,
        seconds: float = SHARD_SECONDS,
    ) -> list[Result]:
        """What the checks of some kinds say, run in workers side by side: one per kind and two for the code.

        Args:
            kinds: which checks to run; others have no result.
            requirements: those whose checks to run; all of them if empty.
            room: for grading: the one folder that the submission may write to.
            at_first_failure: a worker ends with its first failure; what follows has no result.
            walk_steps: calls of a walk, in place of as many as its check says.
            first: called once with the results of the code and of ruff, as soon as these are all there.
            slow: called once with the name of a check of the code that has taken SLOW_SECONDS.
            seconds: what a worker's checks may take together.

        Raises:
            Abandoned: nobody wants the verdict any more; the workers are gone.
        """
        adopt_orphans()
        wanted = [check for check in self.checks(exercise) if check.kind in kinds]
        wanted = [check for check in wanted if not requirements or check.requirement in requirements]
        of_kind = {kind: [check for check in wanted if check.kind == kind] for kind in KINDS}
        running: list[Shard] = []
        found: dict[str, Result] = {}

        def here(kind: Kind) -> None:
            if of_kind[kind] and not CAN_FORK:
                found.update(worker.here(worker.Work(of_kind[kind], folder)))

        if of_kind["own test"] and not CAN_FORK:
            start_trials(wanted[0].item.config)
        try:
            # In a process that is not prepared the linters, which need no torch, run meanwhile.
            order = KINDS if worker.prepared() else ("ruff", "mypy", "code", "own test")
            for kind in order if CAN_FORK else KINDS[:1]:
                if kind == "code":
                    self.prepare()
                for share in self._shares(of_kind[kind], room is not None):
                    running.append(started(worker.Work(share, folder, room, at_first_failure, walk_steps), seconds))
            here("ruff")
            supervise([shard for shard in running if shard.kind in _FIRST], running, self._hangup, slow)
            shards.not_run_after_a_stop([shard for shard in running if shard.kind == "code"])
            if first is not None:
                early = [result for shard in running if shard.kind in _FIRST for result in shard.results.values()]
                first([*early, *found.values()])
            here("mypy")
            here("own test")
            supervise(running, running, self._hangup)
        finally:
            if wanted and not CAN_FORK:
                end_trials(wanted[0].item.config)
            for shard in running:
                end(shard.pid)
                os.close(shard.lines.descriptor)
                shard.stack.close()
            end_children()
        found |= {name: result for shard in running for name, result in shard.results.items()}
        return [found[check.name] for check in wanted if check.name in found]

    def _shares(self, checks: list[Check], graded: bool) -> list[list[Check]]:
        """The checks of one kind, for one worker each. Graded, what forbids something has one of its own: there nothing
        can be kept from a check that does not.
        """
        if graded and CAN_FORK and (alone := [check for check in checks if check.forbids]) and len(alone) < len(checks):
            return [*self._shares([check for check in checks if not check.forbids], False), alone]
        if not (self._halves and CAN_FORK and len(checks) > 1 and checks[0].kind == "code"):
            return [checks] if checks else []
        middle = next((place for place, check in enumerate(checks) if check.halfway), 0) or len(checks) // 2
        return [checks[:middle], checks[middle:]]

    def _own_test(self, exercise: Exercise) -> OwnTest | None:
        """What the check files say of the exercise's own test."""
        return next((check.own_test for check in self.checks(exercise) if check.own_test is not None), None)

    def _own_test_in(self, exercise: Exercise, text: str) -> tuple[str, int]:
        """What the verdict on the own test in `text` depends on, as a digest, and the test's line; "" and 0 if the
        exercise has none, or the text does not parse.
        """
        own = self._own_test(exercise)
        try:
            return digest(text, own.test, own.swaps) if own is not None else ("", 0)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return "", 0


@contextmanager
def graded() -> Iterator[tuple[Path, Path]]:
    """Two empty folders for grading a submission: for a copy of it, and the one that it may write to. What is there of
    torch's and Python's before it is loaded has been looked at.
    """
    before_submissions()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        alone, room = Path(scratch, "submission"), Path(scratch, "room")
        alone.mkdir()
        room.mkdir()
        yield alone, room
