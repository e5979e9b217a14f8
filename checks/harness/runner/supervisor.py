"""Starts workers and reads what they report, whatever becomes of them; what does not report earns nothing."""

import os
import secrets
import select
import tempfile
import time
from collections.abc import Callable

from harness.model.limits import SLOW_SECONDS
from harness.runner import shards, worker
from harness.runner.shards import Shard
from harness.sandbox.processes import Lines, Stopwatch

# How often it is seen how long checks have run.
_TICK_SECONDS = 0.1


class Abandoned(Exception):
    """Whoever asked for the verdict has gone."""


def started(work: worker.Work, seconds: float) -> Shard:
    """A worker at work, whose checks may take so many seconds together."""
    reading, writing = os.pipe()
    token, stack = secrets.token_hex(8), tempfile.TemporaryFile()
    pid = worker.start(work, writing, token, stack)
    os.close(writing)
    return Shard(pid, Lines(reading), token, stack, work, seconds, Stopwatch(pid), Stopwatch(pid), {})


def supervise(
    wanted: list[Shard], running: list[Shard], hangup: int | None, slow: Callable[[str], None] | None = None
) -> None:
    """Reads the reports of all shards until the wanted ones have reported or ended; what hangs is given up.

    Args:
        hangup: a descriptor that becomes readable when nobody wants the verdict any more.
        slow: called once with the name of a check of the code that has taken SLOW_SECONDS.

    Raises:
        Abandoned: nobody wants the verdict any more.
    """
    # Clocks are not read at each report: that would cost the workers a tenth of their processors.
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
