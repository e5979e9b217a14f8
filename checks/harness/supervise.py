"""Runs the checks of one exercise in child processes with limits, and collects what they report, whatever becomes of
them.

The supervising process never runs a learner's code. It knows which checks must report; what does not report earns
nothing.
"""

import json
import os
import secrets
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import child, plugin
from harness.integrity import before_submissions
from harness.own_test import OwnTest, digest
from harness.processes import CAN_FORK, Lines, Stopwatch, adopt_orphans, end, end_children
from harness.specification import Exercise, exercise_of, exercises
from harness.verdicts import NOT_RUN, Result

HANG_SECONDS = 10.0
LANE_SECONDS = 100.0
# mypy without its cache; an own test that hangs on each of ten slips, which are all run at once.
_LIMITS = {"lint": 150.0, "own test": 60.0, "code": HANG_SECONDS}
LANES = ("lint", "own test", "code")


class Abandoned(Exception):
    """Whoever asked for the verdict has gone."""


@dataclass
class Lane:
    """One child process and the checks that it has to report, in their order.

    `stopped` is empty, or why what follows its last result is not run.
    """

    kind: str
    pid: int
    lines: Lines
    token: str
    expected: list[pytest.Item]
    watch: Stopwatch
    whole: Stopwatch
    results: dict[str, Result]
    running: pytest.Item | None = None
    stopped: str = ""

    def waiting(self) -> list[pytest.Item]:
        return [item for item in self.expected if item.name not in self.results]


class Judge:
    """Judges exercises from a session that has collected their checks.

    Args:
        hangup: a descriptor that becomes readable when nobody wants the verdict any more.
        halves: run the checks of the code in two processes where there are two processors: the second begins with the
            check marked `halfway`, or with the one in the middle.
    """

    def __init__(self, session: pytest.Session, hangup: int | None = None, *, halves: bool = True) -> None:
        self._items: dict[str, list[pytest.Item]] = {exercise: [] for exercise in exercises()}
        for item in session.items:
            self._items[exercise_of(item.path).id].append(item)
        self._hangup = hangup
        self._room: Path | None = None
        self._halves = halves and (os.cpu_count() or 1) > 1

    def items(self, exercise: Exercise) -> list[pytest.Item]:
        """The checks of an exercise, as collected."""
        return self._items[exercise.id]

    def expected(self, exercise: Exercise) -> list[tuple[str, str]]:
        """The list of checks that must report: requirement and name of each."""
        return [(plugin.requirement_of(item), item.name) for item in self.items(exercise)]

    def names(self, exercise: Exercise, lane: str) -> set[str]:
        """The names of the checks of a lane."""
        return {item.name for item in self.items(exercise) if plugin.lane_of(item) == lane}

    def own_test(self, exercise: Exercise) -> OwnTest | None:
        """What the check file says of the exercise's own test."""
        modules = (getattr(item, "module", None) for item in self.items(exercise))
        return next((found for module in modules if (found := getattr(module, "OWN_TEST", None)) is not None), None)

    @contextmanager
    def graded(self) -> Iterator[Path]:
        """While inside, code is graded: it may write to one folder only, and it is seen what it replaces of torch's
        and Python's. Gives an empty folder for a copy of the submission.
        """
        before_submissions()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            self._room, alone = Path(scratch, "room"), Path(scratch, "submission")
            self._room.mkdir()
            alone.mkdir()
            try:
                yield alone
            finally:
                self._room = None

    def read_banks(self) -> None:
        """Reads what own tests are judged on, so that no later reading of files is needed."""
        for exercise in exercises().values():
            if (own := self.own_test(exercise)) is not None:
                _ = own.texts

    def own_test_digest(self, exercise: Exercise, text: str) -> str:
        """What the verdict on the own test in `text` depends on; empty if the exercise has none, or the text does not
        parse.
        """
        own = self.own_test(exercise)
        try:
            return digest(text, own.swaps) if own is not None else ""
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ""

    def results(
        self, exercise: Exercise, folder: Path, lanes: tuple[str, ...] = LANES, requirements: tuple[str, ...] = ()
    ) -> list[Result]:
        """Judges one exercise of the submission `folder` in child processes, one per lane and two for the code's, side
        by side.

        Args:
            lanes: which lanes to run; the checks of others have no result.
            requirements: those whose checks to run; all of them if empty.

        Raises:
            Abandoned: nobody wants the verdict any more; the children are gone.
        """
        adopt_orphans()
        items = [item for item in self.items(exercise) if plugin.lane_of(item) in lanes]
        items = [item for item in items if not requirements or plugin.requirement_of(item) in requirements]
        running: list[Lane] = []
        try:
            for name in LANES:
                for share in self._shares([item for item in items if plugin.lane_of(item) == name]):
                    running.append(_started(share, folder, self._room))
            _supervise(running, self._hangup)
        finally:
            for lane in running:
                end(lane.pid)
                os.close(lane.lines.descriptor)
            end_children()
        _not_run_after_a_stop([lane for lane in running if lane.kind == "code"])
        found = {name: result for lane in running for name, result in lane.results.items()}
        return [found[item.name] for item in items]

    def _shares(self, items: list[pytest.Item]) -> list[list[pytest.Item]]:
        """A lane's checks, for one process each."""
        if not (self._halves and CAN_FORK and len(items) > 1 and plugin.lane_of(items[0]) == "code"):
            return [items] if items else []
        marked = (place for place, item in enumerate(items) if item.get_closest_marker("halfway"))
        middle = next(marked, 0) or len(items) // 2
        return [items[:middle], items[middle:]]


def _started(items: list[pytest.Item], folder: Path, room: Path | None) -> Lane:
    reading, writing = os.pipe()
    token = secrets.token_hex(8)
    pid = child.start(items, folder, writing, token, room)
    os.close(writing)
    return Lane(plugin.lane_of(items[0]), pid, Lines(reading), token, items, Stopwatch(pid), Stopwatch(pid), {})


def _not_run_after_a_stop(lanes: list[Lane]) -> None:
    """What follows a hang or a crash is not run: the verdict is that of one process, however the work was shared."""
    stopped = ""
    for lane in lanes:
        if stopped:
            lane.results = {item.name: _missing(item, stopped) for item in lane.expected}
        stopped = stopped or lane.stopped


def _missing(item: pytest.Item, why: str) -> Result:
    return Result(plugin.requirement_of(item), item.name, "missing", why)


def _supervise(lanes: list[Lane], hangup: int | None) -> None:
    """Reads the lanes' reports until each has reported or ended; a lane that hangs stops its exercise's code."""
    open_lanes = list(lanes)
    while open_lanes:
        waiting = [lane.lines.descriptor for lane in open_lanes]
        ready, _, _ = select.select([*waiting, *([hangup] if hangup is not None else [])], [], [], 0.1)
        if hangup in ready:
            raise Abandoned
        for lane in list(open_lanes):
            if lane.lines.descriptor in ready:
                for line in lane.lines.take():
                    _note(lane, line)
            if lane.lines.ended or not lane.waiting():
                _close(lane)
                open_lanes.remove(lane)
            elif lane.watch.seconds() > _limit(lane.running) or lane.whole.seconds() > LANE_SECONDS:
                _give_up(lane)
                open_lanes.remove(lane)


def _note(lane: Lane, line: str) -> None:
    """Takes one report: a check's name when it starts, its result when it ends. Lines without the run's token are not
    reports.
    """
    token, _, body = line.partition(" ")
    if token != lane.token:
        return
    report = json.loads(body)
    if isinstance(report, str):
        lane.running = next((item for item in lane.expected if item.name == report), None)
        lane.watch.restart()
    elif report["name"] not in lane.results:
        lane.results[report["name"]] = Result(**report)
        if report["outcome"] == "timeout":
            lane.stopped = NOT_RUN


def _close(lane: Lane) -> None:
    """A lane has ended: what it did not report has failed together with its process."""
    missing = lane.waiting()
    if not missing:
        return
    status = os.waitstatus_to_exitcode(_reaped(lane.pid))
    how = (
        f"your code ended the process (exit code {status})"
        if status >= 0
        else f"the interpreter died ({signal.Signals(-status).name})"
    )
    lane.stopped = f"not run: {how} in {missing[0].name}"
    _end_at(lane, missing, "error", how)


def _reaped(pid: int) -> int:
    """The exit status of a child that has closed its reports: it is ending, or it lives on in silence and is killed."""
    for _ in range(20):
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is not None:
            return info.si_status << 8 if info.si_code == os.CLD_EXITED else info.si_status
        time.sleep(0.05)
    return signal.SIGKILL


def _give_up(lane: Lane) -> None:
    missing = lane.waiting()
    lane.stopped = NOT_RUN
    text = f"did not end within {_limit(lane.running):g} s: an endless loop, or a wait that nothing ends"
    if lane.whole.seconds() > LANE_SECONDS:
        text = f"did not end: the checks of this exercise have taken {LANE_SECONDS:g} s together"
    _end_at(lane, missing, "timeout", text)


def _end_at(lane: Lane, missing: list[pytest.Item], outcome: str, message: str) -> None:
    """The first of the missing checks is the one that ended the lane; the others were not run."""
    first, *others = missing
    lane.results[first.name] = Result(plugin.requirement_of(first), first.name, outcome, message)
    lane.results |= {item.name: _missing(item, lane.stopped) for item in others}


def _limit(item: pytest.Item | None) -> float:
    mark = item.get_closest_marker("limit") if item is not None else None
    if mark is not None:
        return float(mark.args[0])
    return _LIMITS[plugin.lane_of(item)] if item is not None else HANG_SECONDS
