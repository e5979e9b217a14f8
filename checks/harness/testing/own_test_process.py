"""Throw-away processes in which a learner's own test is run on other code than theirs.

A process that has computed with several threads cannot fork safely: a helper forks them, started before any check.
"""

import asyncio
import inspect
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness.model.limits import LOAD_SECONDS, OWN_TEST_SECONDS
from harness.model.submission import LoadError, describe, line_in, read
from harness.sandbox.output import print_to, tail
from harness.sandbox.processes import CAN_FORK, Lines, Stopwatch, cpu_seconds, die_with_parent, end
from harness.testing.subject import execute, neutral_state

_PROCESSORS = min(2, os.cpu_count() or 1)
_MOST = 16
_LOOK_SECONDS = 0.1


How = Literal["returned", "raised", "not written", "hung", "died", "unloadable", "not tried"]


@dataclass(frozen=True)
class Trial:
    """One throw-away run: the file's `test`, with the names of `swaps` taken from `implementation`."""

    path: str
    test: str
    swaps: tuple[str, ...]
    implementation: str
    hang_seconds: float


@dataclass(frozen=True)
class Ending:
    """How a trial ended, with what there is to say."""

    how: How
    text: str = ""
    line: int = 0
    seconds: float = 0.0
    printed: str = ""


class Trials:
    """Runs trials, through a helper process that forks each. Start it before any tensor work; it ends with this object.

    Where forking is not safe, fresh interpreters run them, one after the other as long as each leaves nothing behind:
    to start one costs seconds, so that they are started ahead.
    """

    def __init__(self) -> None:
        self._pid = 0
        if not CAN_FORK:
            self._spare = [_interpreter() for _ in range(_PROCESSORS)]
            return
        ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            die_with_parent()
            ours.close()
            _serve(theirs)
            os._exit(0)
        theirs.close()
        self._stream = ours.makefile("rw", encoding="utf-8")
        ours.close()

    def run(self, trials: list[Trial]) -> list[Ending]:
        """Runs trials to their ends or limits, side by side; the endings in the same order."""
        if not self._pid:
            return _run(trials, self._take, self._spare.append)
        print(json.dumps([asdict(trial) for trial in trials]), file=self._stream, flush=True)
        return [Ending(**fields) for fields in json.loads(self._stream.readline())]

    def close(self) -> None:
        """Ends the helper process."""
        if self._pid:
            self._stream.close()
            os.waitpid(self._pid, 0)
            return
        for process in self._spare:
            process.close()

    def _take(self, trial: Trial) -> "_Process":
        process = self._spare.pop() if self._spare else _interpreter()
        process.tell(json.dumps(asdict(trial)))
        return process


def _serve(connection: socket.socket) -> None:
    stream = connection.makefile("rw", encoding="utf-8")
    for line in stream:
        endings = _run([_trial(fields) for fields in json.loads(line)], _forked)
        print(json.dumps([asdict(ending) for ending in endings]), file=stream, flush=True)


def _trial(fields: dict[str, Any]) -> Trial:
    return Trial(**{**fields, "swaps": tuple(fields["swaps"])})


class _Process:
    """A process that runs trials: its output, and what it reports by.

    Args:
        start: starts it with descriptors for its output, its report and, where it runs more than one, its orders;
            returns its pid.
    """

    def __init__(self, start: Callable[[int, int, int], int]) -> None:
        self.output = tempfile.TemporaryFile()
        self.reading, writing = os.pipe()
        orders, self._orders = os.pipe()
        self.pid = start(self.output.fileno(), writing, orders)
        os.close(writing)
        os.close(orders)
        self.lines = Lines(self.reading)

    def tell(self, order: str) -> None:
        """Gives it a trial."""
        self.output.seek(0)  # The process's own place in it, too.
        self.output.truncate()
        with suppress(BrokenPipeError):  # It has died meanwhile, which its report will say.
            os.write(self._orders, f"{order}\n".encode())

    def close(self) -> None:
        """Ends it."""
        end(self.pid)
        for descriptor in (self.reading, self._orders):
            os.close(descriptor)
        self.output.close()


class _Running:
    """A trial in a process."""

    def __init__(self, trial: Trial, process: _Process) -> None:
        self.process, self.again = process, False
        self._watch = Stopwatch(process.pid)
        self._load, self._limit = True, trial.hang_seconds
        self._spent, self._looked, self.busy = 0.0, time.monotonic(), True

    def ending(self, readable: bool) -> Ending | None:
        """How it ended, once it has; `again` says then whether its process can run another one."""
        found: Ending | None = None
        for line in self.process.lines.take() if readable else []:
            if line != "loaded":
                self.again, fields = json.loads(line)
                found = Ending(**fields)
                break
            self._load = False
            self._watch.restart()
        limit = LOAD_SECONDS if self._load else self._limit
        if found is None and self.process.lines.ended:
            found = Ending("died", "it exits or crashes the interpreter")
        elif found is None and self._watch.seconds() > limit:
            found = Ending("unloadable", f"did not load within {limit:g} s") if self._load else Ending("hung")
        return None if found is None else replace(found, printed=tail(self.process.output.fileno()))

    def look(self) -> None:
        """Notes whether it has computed since the last look."""
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            spent = cpu_seconds(self.process.pid)
            self.busy, self._spent, self._looked = spent is None or spent > self._spent, spent or 0.0, now


def _run(
    trials: list[Trial], take: Callable[[Trial], _Process], keep: Callable[[_Process], None] = _Process.close
) -> list[Ending]:
    """Runs as many at a time as there are processors, not counting those that sleep.

    Args:
        take: a process that runs a trial.
        keep: what to do with one that could run another trial.
    """
    endings: dict[int, Ending] = {}
    running: dict[int, _Running] = {}
    waiting = list(range(len(trials)))
    while waiting or running:
        while waiting and len(running) < _MOST and sum(one.busy for one in running.values()) < _PROCESSORS:
            number = waiting.pop(0)
            running[number] = _Running(trials[number], take(trials[number]))
        readable = select.select([one.process.reading for one in running.values()], [], [], 0.02)[0]
        for number, one in list(running.items()):
            one.look()
            if (ending := one.ending(one.process.reading in readable)) is not None:
                endings[number] = ending
                keep(one.process) if one.again else one.process.close()
                del running[number]
    return [endings[number] for number in range(len(trials))]


def _forked(trial: Trial) -> _Process:
    def start(output: int, writing: int, _: int) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                die_with_parent()
                print_to(output)
                _try(trial, writing)
            finally:
                os._exit(1)
        return pid

    return _Process(start)


def _interpreter() -> _Process:
    def start(output: int, writing: int, orders: int) -> int:
        command = [sys.executable, "-P", "-W", "ignore", "-m", "harness.testing.own_test_process", str(writing)]
        process = subprocess.Popen(
            command, stdin=orders, stdout=output, stderr=output, pass_fds=[writing], start_new_session=True
        )
        return process.pid

    return _Process(start)


def _try(trial: Trial, writing: int) -> None:
    """In the throw-away process: load, swap, run, tell."""

    def tell(line: str) -> None:
        os.write(writing, (line + "\n").encode())

    def finish(ending: Ending) -> None:
        """What a thread goes on with would disturb the next trial."""
        with suppress(Exception):
            sys.stdout.flush()
        tell(json.dumps([threading.active_count() == 1, asdict(ending)]))

    path = Path(trial.path)
    try:
        module = execute(read(path), path, path.stem)
    except LoadError as error:
        return finish(Ending("unloadable", error.fact, error.line))
    if trial.test not in vars(module):
        return finish(Ending("raised", f"{path.name} defines no {trial.test}"))
    other = execute(trial.implementation, Path("implementation.py"), "implementation")
    for name in trial.swaps:
        theirs = vars(module).get(name)
        for alias in [
            key for key, value in vars(module).items() if key == name or (theirs is not None and value is theirs)
        ]:
            setattr(module, alias, getattr(other, name))
    neutral_state()
    tell("loaded")
    run = vars(module)[trial.test]
    finish(_called(run, path))


def _called(run: Any, path: Path) -> Ending:
    seconds = 0.0
    for _ in range(2):
        watch = Stopwatch(os.getpid())
        try:
            result = run()
            if inspect.iscoroutine(result):
                asyncio.run(result)
        except NotImplementedError as error:
            return Ending("not written", describe(error), line_in(error, path))
        except BaseException as error:
            return Ending("raised", describe(error), line_in(error, path))
        seconds = watch.seconds()
        if seconds <= OWN_TEST_SECONDS:
            break  # The first run may have been slow because it imported; only the second then counts.
    return Ending("returned", seconds=seconds)


if __name__ == "__main__":
    print_to(1)
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # A test that reads gets nothing.
    for order in orders:
        _try(_trial(json.loads(order)), int(sys.argv[1]))
