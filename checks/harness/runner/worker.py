"""A worker, the process that runs a shard of an exercise's checks: limited, in its own session, reporting by lines."""

import faulthandler
import gc
import linecache
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from json.encoder import c_make_encoder, encode_basestring_ascii  # type: ignore[attr-defined]
from pathlib import Path
from types import ModuleType
from typing import IO

import pytest

from harness.model.limits import LATER, MEMORY_BYTES, OUTPUT_BYTES
from harness.model.paths import CHECKS
from harness.model.results import Result
from harness.model.submission import describe
from harness.runner import plugin
from harness.sandbox import audit, seccomp
from harness.sandbox.integrity import before_submissions
from harness.sandbox.landlock import confine
from harness.sandbox.output import Output
from harness.sandbox.processes import CAN_FORK, die_with_parent
from harness.testing import compare
from harness.testing.check import Check, check_of, start_trials

_LIMITS = ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, OUTPUT_BYTES), (resource.RLIMIT_CORE, 0))
# What a hosting service tells its jobs, files to write to among it, is not for submissions.
_PRIVATE_VARIABLES = ("GITHUB_", "RUNNER_", "ACTIONS_", "CLASSROOM")
# The first report of a worker.
BEGUN = "begun"
_own_modules: list[str] = []


@dataclass(frozen=True)
class Work:
    """What a worker is told to do.

    Args:
        checks: all of one kind, in their order.
        folder: the submission.
        room: for grading: the one folder that the submission may write to; what it replaces is looked for too.
        at_first_failure: end with the first check that fails.
        walk_steps: calls of a walk, in place of as many as its check says.
    """

    checks: list[Check]
    folder: Path
    room: Path | None = None
    at_first_failure: bool = False
    walk_steps: int = 0


def prepared() -> bool:
    """Whether `prepare` has been called."""
    return bool(_own_modules)


def prepare(checks: Iterable[Check]) -> None:
    """Does once, before forks of this process, what each of them would do: loads modules, lists the judge's and torch's
    (a look through all of sys.modules copies the memory that they lie in, for 40 ms), and looks up what reports say of
    each check.
    """
    plugin.load_late_modules()
    _list_own_modules()
    audit.loaded()
    for check in checks:
        _ = check.item.location
    # What is there now is there to stay: forks neither walk nor copy it when they collect garbage.
    linecache.clearcache()
    gc.freeze()


def _list_own_modules() -> None:
    """Notes the judge's modules, whose names no submission is to find."""
    _own_modules[:] = [name for name in sys.modules if name.partition(".")[0] in ("checks", "conftest", "harness")]


def start(work: Work, writing: int, token: str, stack: IO[bytes]) -> int:
    """Starts a worker that reports to the descriptor `writing`, each report beginning with `token`, and that writes to
    the file `stack` where it is when `where` asks.

    Returns:
        Its pid; it leads its session.
    """
    return _fork(work, writing, token, stack) if CAN_FORK else _spawn(work, writing, token)


def here(work: Work) -> dict[str, Result]:
    """Runs in this process what runs no code of a learner's in it: ruff, mypy, own tests, each trial of which has a
    process of its own. Where forking is not safe a worker would cost seconds.
    """
    found: list[Result] = []
    items, config = [check.item for check in work.checks], work.checks[0].item.config
    config.option.submission, config.stash[plugin.SINK] = str(work.folder), found.append
    for item, following in zip(items, [*items[1:], None], strict=True):
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return {result.name: result for result in found}


def where(pid: int, stack: IO[bytes], work: Work) -> int:
    """The line of the submission that a worker is in; 0 if it cannot be had."""
    if not CAN_FORK:
        return 0
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.1)
    said = os.pread(stack.fileno(), 100_000, 0).decode(errors="replace")
    path = work.folder / work.checks[0].exercise.file_name
    found = re.search(rf'"{re.escape(str(path))}", line (\d+)', said)
    return int(found[1]) if found else 0


def _fork(work: Work, writing: int, token: str, stack: IO[bytes]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            die_with_parent()
            faulthandler.register(signal.SIGUSR1, file=stack)
            run(work, writing, token)
            status = 0
        finally:
            os._exit(status)
    return pid


def _spawn(work: Work, writing: int, token: str) -> int:
    first = work.checks[0]
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-m",
        "harness.runner.session",
        first.exercise.id,
        first.kind,
        str(work.folder),
        str(writing),
        str(work.room or ""),
        "cpu" if first.counts else str(first.item.config.getoption("--device")),
    ]
    process = subprocess.Popen(command, pass_fds=[writing], start_new_session=True, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    with process.stdin as secret:
        print(token, file=secret)  # Not in the arguments, which every process may read.
    return process.pid


def run(work: Work, writing: int, token: str) -> None:
    """In the worker: runs the checks and reports that it begins, then the result of each that ends."""
    checks, room, ended = work.checks, work.room, False
    first, config = checks[0], checks[0].item.config
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if first.kind in ("mypy", "own test"):
        os.nice(LATER)  # People wait for the verdict on the code.
    for kind, limit in _LIMITS:
        if kind == resource.RLIMIT_AS and not first.counts:
            continue  # CUDA reserves addresses for all memory that it might ever use.
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))
    output = Output()
    config.option.submission, config.option.walk_steps = str(work.folder), work.walk_steps

    # Bound before a submission is loaded, and in C: what it replaces changes no word on the way out.
    encode, write = c_make_encoder({}, None, encode_basestring_ascii, None, ": ", ", ", False, False, True), os.write

    def report(what: str | dict[str, str | int]) -> None:
        write(writing, f"{token} {''.join(encode(what, 0))}\n".encode())

    results: list[Result] = []
    sink = results.append
    integrity = before_submissions() if room is not None and first.kind == "code" else None
    look, changes = (integrity.look, integrity.changes) if integrity is not None else (None, None)
    voids = [_void(check) for check in checks]

    config.stash[plugin.SINK] = sink
    sys.breakpointhook = _no_debugger
    if first.kind == "code":
        audit.watch(first.file, graded=room is not None)
    if room is not None:
        _guard(first, room, work.folder)
    _hide()
    if first.kind == "own test":
        start_trials(config)
    report(BEGUN)
    items = [check.item for check in checks]
    for check, following, void in zip(checks, [*items[1:], None], voids, strict=True):
        if ended:
            break
        output.redirect()
        results.clear()
        try:
            config.hook.pytest_runtest_protocol(item=check.item, nextitem=following)
        except BaseException as error:
            results.clear()
            sink(check.result("failed", f"your code raises {describe(error)}"))
        # What is replaced of ours is seen first, by what nothing replaced can reach; nothing of ours is asked then.
        if integrity is not None and look and changes and (replaced := look() or ", ".join(changes()[:3])):
            integrity.restore()
            report({**void, "message": void["message"].format(replaced)})
            continue
        result = results[0]
        if result.outcome != "passed" and not result.printed:
            result = replace(result, printed=output.tail())
        ended = work.at_first_failure and result.outcome != "passed"
        report({**vars(result)})


def _no_debugger(*_: object, **__: object) -> None:
    raise RuntimeError("breakpoint() stops nobody here; VS Code's Test Explorer debugs a check (Debug Test)")


def _guard(first: Check, room: Path, folder: Path) -> None:
    """What only grading does, since it costs time: the submission's code changes nothing that judges it."""
    if first.kind == "code":
        compare.looks[:] = [before_submissions().look]
        _forget_banks(first.item.session)
    if first.kind in ("code", "own test"):
        first.item.config.stash[plugin.FOLDER] = room
        os.environ["TMPDIR"] = str(room)
        tempfile.tempdir = None
        os.chdir(room)
        # pytest reads the packages around a check when it comes to it.
        packages = (path for path in first.item.path.parents if CHECKS in (path, path.parent))
        confine(room, folder, *(path / "__init__.py" for path in packages))
    if first.kind == "code":
        seccomp.alone()


def _void(check: Check) -> dict[str, str]:
    """The report of a check during which something was replaced; made before any submission is loaded."""
    why = f"{check.exercise.file_name} replaces {{}}; a check that runs with it proves nothing"
    return {"requirement": check.requirement, "name": check.name, "outcome": "failed", "message": why}


def _forget_banks(session: pytest.Session) -> None:
    """Takes the texts of answers and mistakes out of this process's memory."""
    for own in {check_of(item).own_test for item in session.items}:
        for name in ("texts", "unusual"):
            vars(own).pop(name, None) if own is not None else None


def _hide() -> None:
    """Takes from a submission's reach what it could alter the judge by: its modules' names, and the surroundings."""
    if not _own_modules:
        _list_own_modules()
    for name in _own_modules:
        sys.modules.pop(name, None)
    sys.modules["__main__"] = ModuleType("__main__")
    for variable in [name for name in os.environ if name.startswith(_PRIVATE_VARIABLES)]:
        del os.environ[variable]
