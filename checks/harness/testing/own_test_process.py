"""Throw-away processes in which a learner's own test is run on other code than theirs.

A process that has computed with several threads cannot fork safely: a helper forks them, started before any check.
"""

import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.model.limits import LOAD_SECONDS, OWN_TEST_SECONDS
from harness.model.submission import LoadError, describe, line_in, read
from harness.sandbox.output import tail
from harness.sandbox.processes import CAN_FORK, Lines, Stopwatch, die_with_parent, end
from harness.testing.subject import execute, neutral_state


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
    """How a trial ended: "returned", "raised", "not written", "hung", "died" or "unloadable", with what there is to
    say.
    """

    how: str
    text: str = ""
    line: int = 0
    seconds: float = 0.0
    printed: str = ""


class Trials:
    """Runs trials, through a helper process that forks each. Start it before any tensor work; it ends with this object.

    Where forking is not safe, each trial is a fresh interpreter instead, which costs seconds.
    """

    def __init__(self) -> None:
        self._pid = 0
        if not CAN_FORK:
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

    def run(self, trial: Trial) -> Ending:
        """Runs one trial to its end or its limit."""
        if not self._pid:
            return _watched(trial, _spawn)
        print(json.dumps(asdict(trial)), file=self._stream, flush=True)
        return Ending(**json.loads(self._stream.readline()))

    def close(self) -> None:
        """Ends the helper process."""
        if self._pid:
            self._stream.close()
            os.waitpid(self._pid, 0)


def _serve(connection: socket.socket) -> None:
    stream = connection.makefile("rw", encoding="utf-8")
    for line in stream:
        print(json.dumps(asdict(_watched(_trial(line), _fork))), file=stream, flush=True)


def _trial(line: str) -> Trial:
    request = json.loads(line)
    return Trial(**{**request, "swaps": tuple(request["swaps"])})


def _watched(trial: Trial, start: Callable[[Trial, int, int], int]) -> Ending:
    """Runs a trial in a process of its own, which `start` starts with descriptors for its output and its report."""
    with tempfile.TemporaryFile() as output:
        reading, writing = os.pipe()
        pid = start(trial, output.fileno(), writing)
        os.close(writing)
        try:
            ending = _await(pid, reading, trial.hang_seconds)
        finally:
            end(pid)
            os.close(reading)
        return replace(ending, printed=tail(output.fileno()))


def _fork(trial: Trial, output: int, writing: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            die_with_parent()
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            _try(trial, writing)
        finally:
            os._exit(1)
    return pid


def _spawn(trial: Trial, output: int, writing: int) -> int:
    command = [sys.executable, "-P", "-m", "harness.testing.own_test_process", str(writing), json.dumps(asdict(trial))]
    process = subprocess.Popen(command, stdout=output, stderr=output, pass_fds=[writing], start_new_session=True)
    return process.pid


def _await(pid: int, reading: int, hang_seconds: float) -> Ending:
    """Reads the child's two lines: "loaded", and how it ended."""
    lines, watch = Lines(reading), Stopwatch(pid)
    first = lines.next(watch, LOAD_SECONDS)
    if first is None:
        return Ending("unloadable", f"did not load within {LOAD_SECONDS:g} s")
    if first not in ("", "loaded"):
        return Ending(**json.loads(first))
    watch.restart()
    second = lines.next(watch, hang_seconds)
    if second is None:
        return Ending("hung")
    return Ending(**json.loads(second)) if second else Ending("died", "it exits or crashes the interpreter")


def _try(trial: Trial, writing: int) -> None:
    """In the throw-away process: load, swap, run, tell."""

    def tell(line: str) -> None:
        os.write(writing, (line + "\n").encode())

    path = Path(trial.path)
    try:
        module = execute(read(path), path, path.stem)
    except LoadError as error:
        return tell(json.dumps(asdict(Ending("unloadable", error.fact, error.line))))
    if trial.test not in vars(module):
        return tell(json.dumps(asdict(Ending("raised", f"{path.name} defines no {trial.test}"))))
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
    tell(json.dumps(asdict(_run(run, path))))


def _run(run: Any, path: Path) -> Ending:
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
    with suppress(Exception):
        sys.stdout.flush()
    return Ending("returned", seconds=seconds)


if __name__ == "__main__":
    _try(_trial(sys.argv[2]), int(sys.argv[1]))
