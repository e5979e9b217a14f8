"""The child process that runs a lane of an exercise's checks: limited, in a session of its own, reporting by lines."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest

from harness import plugin
from harness.integrity import before_submissions
from harness.landlock import write_only_below
from harness.output import Output
from harness.processes import CAN_FORK, die_with_parent
from harness.specification import CHECKS, exercise_of
from harness.submission import describe
from harness.verdicts import Result

MEMORY_BYTES = 12 << 30
OUTPUT_BYTES = 16 << 20
_LIMITS = ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, OUTPUT_BYTES), (resource.RLIMIT_CORE, 0))
# What a hosting service tells its jobs, files to write to among it, is not for submissions.
_PRIVATE_VARIABLES = ("GITHUB_", "RUNNER_", "ACTIONS_", "CLASSROOM")

# By name: a look through all of sys.modules would have a fork copy the memory that they lie in, for 40 ms.
_OWN = [
    "conftest",
    "harness",
    *(f"harness.{path.stem}" for path in (CHECKS / "harness").glob("*.py")),
    *(path.stem for path in CHECKS.glob("test_ex*.py")),
]


def start(items: list[pytest.Item], folder: Path, writing: int, token: str, room: Path | None) -> int:
    """Starts a child that runs the lane's checks on the submission `folder` and reports to the descriptor `writing`.

    Args:
        token: what each report begins with.
        room: for grading: the one folder that the submission may write to; what it replaces is looked for too.

    Returns:
        The child's pid; it leads its session.
    """
    return (_fork if CAN_FORK else _spawn)(items, folder, writing, token, room)


def _fork(items: list[pytest.Item], folder: Path, writing: int, token: str, room: Path | None) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            die_with_parent()
            run(items, folder, writing, token, room)
            status = 0
        finally:
            os._exit(status)
    return pid


def _spawn(items: list[pytest.Item], folder: Path, writing: int, token: str, room: Path | None) -> int:
    exercise, lane = exercise_of(items[0].path).id, plugin.lane_of(items[0])
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-m",
        "harness.cold",
        exercise,
        lane,
        str(folder),
        str(writing),
        str(room or ""),
        "cpu" if plugin.earns(items[0]) else str(items[0].config.getoption("--device")),
    ]
    process = subprocess.Popen(command, pass_fds=[writing], start_new_session=True, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    with process.stdin as secret:
        print(token, file=secret)  # Not in the arguments, which every process may read.
    return process.pid


def run(items: list[pytest.Item], folder: Path, writing: int, token: str, room: Path | None) -> None:
    """In the child: runs the checks and reports the name of each that starts and the result of each that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for kind, limit in _LIMITS:
        if kind == resource.RLIMIT_AS and not plugin.earns(items[0]):
            continue  # CUDA reserves addresses for all memory that it might ever use.
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))
    output = Output()
    config = items[0].config
    config.option.submission = str(folder)

    def report(what: object) -> None:
        os.write(writing, f"{token} {json.dumps(what)}\n".encode())

    def sink(result: Result) -> None:
        if result.outcome != "passed" and not result.printed:
            result = replace(result, printed=output.tail())
        report(asdict(result))

    config.stash[plugin.SINK] = sink
    if room is not None:
        _guard(config, plugin.lane_of(items[0]), room)
    _hide()
    if plugin.lane_of(items[0]) == "own test":
        plugin.start_trials(config)
    for item, following in zip(items, [*items[1:], None], strict=True):
        if item.session.shouldfail:
            break
        output.redirect()
        report(item.name)
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        except BaseException as error:
            sink(Result(plugin.requirement_of(item), item.name, "failed", f"your code raises {describe(error)}"))


def _guard(config: pytest.Config, lane: str, room: Path) -> None:
    """What only grading does, since it costs time: the submission's code changes nothing that judges it."""
    if lane == "code":
        config.stash[plugin.INTEGRITY] = before_submissions()
    if lane != "lint":
        config.stash[plugin.FOLDER] = room
        os.environ["TMPDIR"] = str(room)
        tempfile.tempdir = None
        os.chdir(room)
        write_only_below(room)


def _hide() -> None:
    """Takes from a submission's reach what it could alter the judge by: its modules' names, and the surroundings."""
    for name in _OWN:
        sys.modules.pop(name, None)
    sys.modules["__main__"] = ModuleType("__main__")
    for variable in [name for name in os.environ if name.startswith(_PRIVATE_VARIABLES)]:
        del os.environ[variable]
