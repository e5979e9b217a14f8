"""The fixtures of the checks: a stage for each, and one patience for all, in whichever file they stand."""

import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from harness.testing import Close, Hang, Subject

from .stage import Patience, Stage


@pytest.fixture(scope="package")
def patience(request: pytest.FixtureRequest) -> Iterator[Patience]:
    """One for all checks of a run."""
    before = set(threading.enumerate())
    yield Patience()
    if set(threading.enumerate()) - before:
        threading.Thread(target=end_anyway, args=(request.session,), daemon=True).start()


def end_anyway(session: pytest.Session) -> None:
    """Ends the process once only threads that a batcher left behind keep it: Python would wait for them for ever."""
    main = threading.main_thread().ident or 0
    frame = None
    while frame is None or frame.f_code.co_name != "_shutdown":
        time.sleep(0.3)
        frame = sys._current_frames().get(main)
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
    time.sleep(0.3)
    os._exit(int(session.exitstatus))


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, subject: Subject, close: Close, rng: torch.Generator, patience: Patience
) -> Iterator[Stage]:
    """Where a check plays."""
    number = request.node.get_closest_marker("requirement").args[0]
    if patience.is_over:
        raise Hang("not run after the hang")
    if patience.is_over_for(number):
        raise AssertionError("not run: earlier checks of this requirement have waited for what never comes")
    stage = Stage(subject, close, rng, patience, number)
    try:
        yield stage
    finally:
        stage.tidy()
