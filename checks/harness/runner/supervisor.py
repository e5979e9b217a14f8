"""Runs the checks of one exercise in child processes with limits, and collects what they report, whatever becomes of
them.

The supervising process never runs a learner's code. It knows which checks must report; what does not report earns
nothing.
"""

import os
import secrets
import select
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.model.exercise import Exercise, exercise_of, exercises
from harness.model.limits import SHARD_SECONDS, SLOW_SECONDS
from harness.model.results import Result
from harness.runner import plugin, shards, worker
from harness.runner.shards import Shard
from harness.sandbox.integrity import before_submissions
from harness.sandbox.processes import CAN_FORK, Lines, Stopwatch, adopt_orphans, end, end_children
from harness.testing.own_test import OwnTest, digest

# The kinds of checks, those that people wait for first.
KINDS = ("code", "ruff", "mypy", "own test")
FIRST = KINDS[:2]
# How often it is seen how long checks have run.
_TICK_SECONDS = 0.1


class Abandoned(Exception):
    """Whoever asked for the verdict has gone."""


class Judge:
    """Judges exercises by their collected checks.

    Args:
        items: the checks.
        hangup: a descriptor that becomes readable when nobody wants the verdict any more.
        halves: run the checks of the code in two processes where there are two processors: the second begins with the
            check marked `halfway`, or with the one in the middle.
    """

    def __init__(self, items: list[pytest.Item], hangup: int | None = None, *, halves: bool = True) -> None:
        self._items: dict[str, list[pytest.Item]] = {exercise: [] for exercise in exercises()}
        for item in items:
            self._items[exercise_of(item.path).id].append(item)
        self._hangup = hangup
        self._halves = halves and (os.cpu_count() or 1) > 1

    def items(self, exercise: Exercise) -> list[pytest.Item]:
        """The checks of an exercise, or of the part of it that has these requirements, as collected."""
        ids = {requirement.id for requirement in exercise.requirements}
        return [item for item in self._items[exercise.id] if plugin.requirement_of(item) in ids]

    def expected(self, exercise: Exercise) -> list[tuple[str, str]]:
        """The list of checks that must report: requirement and name of each."""
        return [(plugin.requirement_of(item), item.name) for item in self.items(exercise)]

    def names(self, exercise: Exercise, kind: str) -> set[str]:
        """The names of the checks of a kind."""
        return {item.name for item in self.items(exercise) if plugin.kind_of(item) == kind}

    def own_test(self, exercise: Exercise) -> OwnTest | None:
        """What the check file says of the exercise's own test."""
        modules = (getattr(item, "module", None) for item in self.items(exercise))
        return next((found for module in modules if (found := getattr(module, "OWN_TEST", None)) is not None), None)

    def read_banks(self) -> None:
        """Reads what own tests are judged on, so that no later reading of files is needed."""
        for exercise in exercises().values():
            if (own := self.own_test(exercise)) is not None:
                _ = own.unusual

    def own_test_in(self, exercise: Exercise, text: str) -> tuple[str, int]:
        """What the verdict on the own test in `text` depends on, as a digest, and the test's line; "" and 0 if the
        exercise has none, or the text does not parse.
        """
        own = self.own_test(exercise)
        try:
            return digest(text, own.test, own.swaps) if own is not None else ("", 0)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return "", 0

    def results(
        self,
        exercise: Exercise,
        folder: Path,
        kinds: tuple[str, ...] = KINDS,
        requirements: tuple[str, ...] = (),
        *,
        room: Path | None = None,
        at_first_failure: bool = False,
        walk_steps: int = 0,
        first: Callable[[list[Result]], None] | None = None,
        slow: Callable[[str], None] | None = None,
        seconds: float = SHARD_SECONDS,
    ) -> list[Result]:
        """Judges one exercise of the submission `folder` in workers, one per kind and two for the code, side by side.

        Args:
            kinds: which checks to run; others have no result.
            requirements: those whose checks to run; all of them if empty.
            room: for grading: the one folder that the submission may write to.
            at_first_failure: a worker ends with its first failure; what follows has no result.
            walk_steps: calls of a walk, in place of as many as its check says.
            first: called once with the results of the kinds FIRST, as soon as these are all there.
            slow: called once with the name of a check of the code that has taken SLOW_SECONDS.
            seconds: what a worker's checks may take together.

        Raises:
            Abandoned: nobody wants the verdict any more; the workers are gone.
        """
        adopt_orphans()
        items = [item for item in self.items(exercise) if plugin.kind_of(item) in kinds]
        items = [item for item in items if not requirements or plugin.requirement_of(item) in requirements]
        running: list[Shard] = []
        found: dict[str, Result] = {}

        def here(kind: str) -> None:
            share = [] if CAN_FORK else [item for item in items if plugin.kind_of(item) == kind]
            found.update(worker.here(worker.Work(share, folder)) if share else {})

        if not CAN_FORK and any(plugin.kind_of(item) == "own test" for item in items):
            plugin.start_trials(items[0].config)
        try:
            for kind in KINDS if CAN_FORK else KINDS[:1]:
                for share in self._shares([item for item in items if plugin.kind_of(item) == kind], room is not None):
                    running.append(_started(worker.Work(share, folder, room, at_first_failure, walk_steps), seconds))
            here("ruff")
            _supervise([shard for shard in running if shard.kind in FIRST], running, self._hangup, slow)
            shards.not_run_after_a_stop([shard for shard in running if shard.kind == "code"])
            if first is not None:
                early = [result for shard in running if shard.kind in FIRST for result in shard.results.values()]
                first([*early, *found.values()])
            here("mypy")
            here("own test")
            _supervise(running, running, self._hangup)
        finally:
            if not CAN_FORK and items:
                plugin.end_trials(items[0].config)
            for shard in running:
                end(shard.pid)
                os.close(shard.lines.descriptor)
                shard.stack.close()
            end_children()
        found |= {name: result for shard in running for name, result in shard.results.items()}
        return [found[item.name] for item in items if item.name in found]

    def _shares(self, items: list[pytest.Item], graded: bool) -> list[list[pytest.Item]]:
        """The checks of one kind, for one worker each. Graded, what forbids something has one of its own: there nothing
        can be kept from a check that does not.
        """
        if graded and CAN_FORK and (alone := [item for item in items if _forbids(item)]) and len(alone) < len(items):
            return [*self._shares([item for item in items if item not in alone], False), alone]
        if not (self._halves and CAN_FORK and len(items) > 1 and plugin.kind_of(items[0]) == "code"):
            return [items] if items else []
        marked = (place for place, item in enumerate(items) if item.get_closest_marker("halfway"))
        middle = next(marked, 0) or len(items) // 2
        return [items[:middle], items[middle:]]


def _forbids(item: pytest.Item) -> bool:
    """Whether a check names `forbid`, which makes it one of "from scratch"."""
    code = getattr(getattr(item, "function", None), "__code__", None)
    return code is not None and "forbid" in code.co_names


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


def _started(work: worker.Work, seconds: float) -> Shard:
    reading, writing = os.pipe()
    token, stack = secrets.token_hex(8), tempfile.TemporaryFile()
    pid = worker.start(work, writing, token, stack)
    os.close(writing)
    kind = plugin.kind_of(work.items[0])
    return Shard(kind, pid, Lines(reading), token, stack, work, seconds, Stopwatch(pid), Stopwatch(pid), {})


def _supervise(
    wanted: list[Shard], running: list[Shard], hangup: int | None, slow: Callable[[str], None] | None = None
) -> None:
    """Reads the reports of all shards until the wanted ones have reported or ended; what hangs is given up.

    Clocks are read ten times a second: doing so at each report would cost the workers a tenth of their processors.
    """
    due = time.monotonic() + _TICK_SECONDS
    while any(not shard.ended for shard in wanted):
        open_shards = [shard for shard in running if not shard.ended]
        waiting = [shard.lines.descriptor for shard in open_shards]
        ready, _, _ = select.select([*waiting, *([hangup] if hangup is not None else [])], [], [], _TICK_SECONDS)
        if hangup in ready:
            raise Abandoned
        for shard in open_shards:
            if shard.lines.descriptor in ready:
                for line in shard.lines.take():
                    shards.note(shard, line)
            if shard.lines.ended or shard.complete:
                shards.close(shard)
                shard.ended = True
        if time.monotonic() < due:
            continue
        due = time.monotonic() + _TICK_SECONDS
        for shard in open_shards:
            if shard.ended:
                continue
            if shard.moved:
                shard.watch.restart()
                shard.moved = False
            check = shard.running if shard.kind == "code" and shard.watch.seconds() > SLOW_SECONDS else None
            if slow is not None and check is not None:
                slow(check.name)
                slow = None
            if shard.watch.seconds() > shards.limit_of(shard) or shard.whole.seconds() > shard.limit:
                shards.give_up(shard)
                shard.ended = True
