"""The time limit of plain pytest, as the Test Explorer runs it: there no supervisor watches over the learner's code.

A check of the code that does not end is interrupted in place and fails; the rest of its exercise is not run. Code that
no signal can interrupt ends the run some seconds later, by its last words: the line where it hangs. While somebody
debugs nothing is limited.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Generator
from types import FrameType

import pytest

from harness.model.limits import GRACE_SECONDS
from harness.model.results import Hang
from harness.runner.plugin import SINK
from harness.sandbox.processes import Stopwatch
from harness.testing.check import check_of

_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # Here nothing is captured yet: last words go where people read them.
    config.stash[_STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    cancel()
    os.close(config.stash[_STDERR])


def pytest_enter_pdb() -> None:
    """Whoever stands at a breakpoint takes their time."""
    cancel()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Limits a check of the learner's code, unless a supervisor does so or a debugger is attached."""
    check = check_of(item)
    supervised = SINK in item.config.stash or check.kind != "code" or not hasattr(signal, "setitimer")
    if supervised or debugged():
        return (yield)
    limit, watch, last_words = check.limit, Stopwatch(os.getpid()), item.config.stash[_STDERR]

    def arm(seconds: float) -> None:
        # Again every second: the code may catch what is raised.
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 1.0)
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=last_words)

    def ring(number: int, frame: FrameType | None) -> None:
        if (left := limit - watch.seconds()) > 0:
            arm(left)  # A busy machine is nobody's hang.
        else:
            raise Hang(f"did not end within {limit:g} s: an endless loop, or a wait that nothing ends")

    before = signal.signal(signal.SIGALRM, ring)
    arm(limit)
    try:
        return (yield)
    finally:
        cancel()
        signal.signal(signal.SIGALRM, before)


def cancel() -> None:
    """No limit from here on."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def debugged() -> bool:
    """Whether a debugger is attached to this process."""
    return sys.gettrace() is not None or "pydevd" in sys.modules
