"""Judges the test that a learner wrote: it must pass on right code and fail on each slip.

The contract's names in the learner's file are swapped for another implementation's, all together, and the test is run,
each time in
a throw-away process. A process that has computed with several threads cannot fork safely, so these processes are
forked by a
helper that is itself started before any check has run.
"""

import ast
import asyncio
import hashlib
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.banks import BanksAbsent, right_code, wrong_code
from harness.output import tail
from harness.processes import CAN_FORK, Lines, Stopwatch, die_with_parent, end
from harness.specification import Exercise, exercise_of
from harness.submission import LoadError, describe, execute, line_in, neutral_state, read
from harness.verdicts import Hang

SECONDS = 1.0
HANG_SECONDS = 2.0
RIGHT_SECONDS = 5.0
LOAD_SECONDS = 10.0


class NotJudged(Exception):
    """This check cannot be judged here, through no fault of the learner's."""


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


class OwnTestError(AssertionError):
    """The learner's test failed a check; `line` is where in their file, `printed` what it printed."""

    def __init__(self, message: str, ending: Ending) -> None:
        super().__init__(message)
        self.line = ending.line
        self.printed = ending.printed


class OwnTestNotWritten(NotImplementedError):
    """The learner's test still raises NotImplementedError."""


def digest(text: str, swaps: tuple[str, ...]) -> str:
    """What an own test's verdict depends on: the file without the definitions that are swapped out, and without
    comments.

    Raises:
        SyntaxError: the text does not parse.
    """
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if getattr(node, "name", "") not in swaps]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


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


class OwnTest:
    """What a check file says of its exercise's own test.

    Args:
        check_file: the check file's `__file__`.
        test: the name of the learner's test function.
        swaps: all contract names of the exercise but the test, which are swapped together.
        right: implementations that the test must pass on: "answer" and slugs of variants.
    """

    def __init__(
        self, check_file: str, test: str, swaps: tuple[str, ...], right: tuple[str, ...] = ("answer",)
    ) -> None:
        self.exercise: Exercise = exercise_of(Path(check_file))
        self.test = test
        self.swaps = swaps
        self.right = list(right)
        self.slips = list(self.exercise.slips)

    def passes_on(self, right: str, trials: Trials, path: Path) -> None:
        """Fails unless the learner's test returns, within SECONDS, on a right implementation."""
        ending = self._run(trials, path, right, hang_seconds=RIGHT_SECONDS)
        if ending.how == "raised":
            raise OwnTestError(f"{self.test}() fails on right code: {ending.text}", ending)
        if ending.how == "hung":
            raise Hang(f"{self.test}() did not end within {RIGHT_SECONDS:g} s on right code")
        if ending.how == "died":
            raise OwnTestError(f"{self.test}() ended its process on right code: {ending.text}", ending)
        if ending.seconds > SECONDS:
            raise OwnTestError(
                f"{self.test}() took {ending.seconds:.1f} s on right code; at most {SECONDS:g} s is asked for", ending
            )

    def catches(self, slip: str, trials: Trials, path: Path) -> None:
        """Fails if the learner's test passes although the code has the slip."""
        ending = self._run(trials, path, slip, hang_seconds=HANG_SECONDS)
        if ending.how == "returned":
            fact = f"{self.test}() passes although the code under it is wrong: {self.exercise.slips[slip]} ({slip})"
            raise OwnTestError(fact, ending)

    def _run(self, trials: Trials, path: Path, code: str, hang_seconds: float) -> Ending:
        try:
            choose = wrong_code if code in self.exercise.slips else right_code
            text = choose(self.exercise, code)
        except BanksAbsent:
            raise NotJudged("judged when you push") from None
        ending = trials.run(Trial(str(path), self.test, self.swaps, text, hang_seconds))
        if ending.how == "unloadable":
            raise LoadError(ending.text, ending.line, missing=ending.text == "no file")
        if ending.how == "not written":
            raise OwnTestNotWritten(ending.text)
        return ending


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
    command = [sys.executable, "-P", "-m", "harness.own_test", str(writing), json.dumps(asdict(trial))]
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
        if seconds <= SECONDS:
            break  # The first run may have been slow because it imported; only the second then counts.
    sys.stdout.flush()
    return Ending("returned", seconds=seconds)


if __name__ == "__main__":
    _try(_trial(sys.argv[2]), int(sys.argv[1]))
