"""A worker and the checks that it has to report: what it said, and what became of the rest."""

import json
import os
import signal
import time
from dataclasses import dataclass
from typing import IO

from harness.model.limits import HANG_SECONDS
from harness.model.results import NOT_RUN, Outcome, Result
from harness.runner import worker
from harness.sandbox.processes import Lines, Stopwatch
from harness.testing.check import Check, Kind


@dataclass
class Shard:
    """One worker and the checks that it has to report, in their order.

    `results` go by the names of checks. `stopped` is empty, or why what follows its last result is not run. `limit` is
    for all of its checks together. `watch` measures the check that runs; `moved` says that it is another one since the
    watch was set.
    """

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
    def kind(self) -> Kind:
        return self.work.checks[0].kind

    @property
    def running(self) -> Check | None:
        """The check that runs: the first without a result."""
        return self.work.checks[len(self.results)] if self.begun and not self.complete else None

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.work.checks)

    def waiting(self) -> list[Check]:
        return [check for check in self.work.checks if check.name not in self.results]


def not_run_after_a_stop(shards: list[Shard]) -> None:
    """What follows a hang or a crash is not run: the verdict is that of one process, however the work was shared."""
    stopped = ""
    for shard in shards:
        if stopped:
            shard.results = {check.name: check.result("missing", stopped) for check in shard.work.checks}
        stopped = stopped or shard.stopped


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
    elif (check := shard.running) is not None and report["name"] == check.name:
        shard.results[check.name] = Result(**{**report, "requirement": check.requirement})
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


def _end_at(shard: Shard, missing: list[Check], outcome: Outcome, message: str, line: int = 0) -> None:
    """The first of the missing checks is the one that ended the shard; the others were not run."""
    first, *others = missing
    shard.results[first.name] = first.result(outcome, message, line)
    shard.results |= {check.name: check.result("missing", shard.stopped) for check in others}


def limit_of(shard: Shard) -> float:
    """Seconds that the check which runs may take."""
    if shard.work.walk_steps:
        return shard.limit
    return shard.running.limit if shard.running is not None else HANG_SECONDS
