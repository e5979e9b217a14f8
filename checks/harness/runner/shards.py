"""A worker and the checks that it has to report: what it said, and what became of the rest."""

import json
import os
import signal
import time
from dataclasses import dataclass
from typing import IO

import pytest

from harness.model.limits import HANG_SECONDS, KIND_SECONDS
from harness.model.results import NOT_RUN, Result
from harness.runner import plugin, worker
from harness.sandbox.processes import Lines, Stopwatch


@dataclass
class Shard:
    """One worker and the checks that it has to report, in their order.

    `stopped` is empty, or why what follows its last result is not run. `limit` is for all of its checks together.
    `watch` measures the check that runs; `moved` says that it is another one since the watch was set.
    """

    kind: str
    pid: int
    lines: Lines
    token: str
    stack: IO[bytes]
    work: worker.Work
    limit: float
    watch: Stopwatch
    whole: Stopwatch
    results: dict[str, Result]
    begun: bool = False
    moved: bool = False
    stopped: str = ""
    ended: bool = False

    @property
    def running(self) -> pytest.Item | None:
        """The check that runs: the first without a result."""
        return self.work.items[len(self.results)] if self.begun and not self.complete else None

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.work.items)

    def waiting(self) -> list[pytest.Item]:
        return [item for item in self.work.items if item.name not in self.results]


def not_run_after_a_stop(shards: list[Shard]) -> None:
    """What follows a hang or a crash is not run: the verdict is that of one process, however the work was shared."""
    stopped = ""
    for shard in shards:
        if stopped:
            shard.results = {item.name: _missing(item, stopped) for item in shard.work.items}
        stopped = stopped or shard.stopped


def _missing(item: pytest.Item, why: str) -> Result:
    return Result(plugin.requirement_of(item), item.name, "missing", why)


def note(shard: Shard, line: str) -> None:
    """Takes one report: BEGUN, then the result of each check when it ends. Lines without the run's token are not
    reports.
    """
    token, _, body = line.partition(" ")
    if token != shard.token:
        return
    report = json.loads(body)
    shard.moved = True
    if report == worker.BEGUN:
        shard.begun = True
    elif report["name"] not in shard.results:
        shard.results[report["name"]] = Result(**report)
        if report["outcome"] == "timeout":
            shard.stopped = NOT_RUN


def close(shard: Shard) -> None:
    """A shard has ended: what it did not report has failed together with its process."""
    missing = shard.waiting()
    failed = any(result.outcome != "passed" for result in shard.results.values())
    if not missing or (shard.work.at_first_failure and failed):
        return
    status = os.waitstatus_to_exitcode(_reaped(shard.pid))
    how = (
        f"your code ended the process (exit code {status})"
        if status >= 0
        else f"the interpreter died ({signal.Signals(-status).name})"
    )
    shard.stopped = f"not run: {how} in {missing[0].name}"
    _end_at(shard, missing, "error", how)


def _reaped(pid: int) -> int:
    """The exit status of a child that has closed its reports: it is ending, or it lives on in silence and is killed."""
    for _ in range(20):
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is not None:
            return info.si_status << 8 if info.si_code == os.CLD_EXITED else info.si_status
        time.sleep(0.05)
    return signal.SIGKILL


def give_up(shard: Shard) -> None:
    missing = shard.waiting()
    shard.stopped, line = NOT_RUN, worker.where(shard.pid, shard.stack, shard.work)
    text = f"did not end within {limit_of(shard):g} s: an endless loop, or a wait that nothing ends"
    if shard.whole.seconds() > shard.limit:
        text = f"did not end: the checks of this exercise have taken {shard.limit:g} s together"
    _end_at(shard, missing, "timeout", f"{text}\nit was in line {line}" if line else text, line)


def _end_at(shard: Shard, missing: list[pytest.Item], outcome: str, message: str, line: int = 0) -> None:
    """The first of the missing checks is the one that ended the shard; the others were not run."""
    first, *others = missing
    shard.results[first.name] = Result(plugin.requirement_of(first), first.name, outcome, message, line)
    shard.results |= {item.name: _missing(item, shard.stopped) for item in others}


def limit_of(shard: Shard) -> float:
    item = shard.running
    if shard.work.walk_steps:
        return shard.limit
    mark = item.get_closest_marker("limit") if item is not None else None
    if mark is not None:
        return float(mark.args[0])
    return KIND_SECONDS[plugin.kind_of(item)] if item is not None else HANG_SECONDS
