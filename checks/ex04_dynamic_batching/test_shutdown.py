"""Shutdown (4.9): what waits is served, nobody hangs, and the threads end."""

import pytest

from harness.testing import requirement

from .reference import names
from .stage import NEVER, Job, Stage, spent_until


@requirement("4.9")
@pytest.mark.parametrize("place", ["other_thread", "loops_own_thread"])
def test_shutdown_serves_what_waits(stage: Stage, place: str) -> None:
    """Shutdown runs what waits, full or not, without waiting for max_wait_time."""
    requests = stage.requests(9, 20, 10)
    stage.start(max_batch_size=4, max_wait_time=NEVER)

    callers = stage.ask(*requests)
    stage.settle()
    stage.shut_down(stage.home if place == "loops_own_thread" else None)

    for caller in callers:
        name = caller.request.name
        why = stage.blocks(caller) or "all that waited is served first, without waiting for max_wait_time"
        stage.served(caller, hint=f"shutdown() has returned, and {name} was not served: {why}")


@requirement("4.9")
def test_shutdown_returns_when_all_is_served(stage: Stage) -> None:
    """While a batch runs shutdown waits; when it returns all is served, within the limits, and nothing runs."""
    requests = stage.requests(9, 10, 17, 25, 18, 19)
    stage.start()
    gate, last = stage.hold(*requests[:2]), stage.hold(requests[5])
    stage.model.errors.append((requests[3], OSError("device lost")))

    callers = stage.ask(*requests[:2])
    stage.reached(gate)
    callers += stage.ask(*requests[2:])
    stage.settle()
    job = stage.do(stage.batcher.shutdown)
    stage.settle(0.002)
    early = job.finished.is_set()
    gate.open()
    stage.reached(last)
    stage.settle(0.002)
    late = job.finished.is_set()
    last.open()
    stage.returned(job, "shutdown()")

    if job.error is None:
        assert not early, "shutdown() returned while a batch still ran and other requests still waited"
        assert not late, "shutdown() returned while the last batch still ran"
    returned = [call for call in stage.model.calls if call.returned]
    assert len(returned) == len(stage.model.calls) and all(stage.calls([request]) for request in requests), (
        f"shutdown() returned before {names(requests[2:])}, which waited, were served"
    )
    for call in stage.calls(requests):
        lengths = [request.tokens.size(1) for request in requests if call.serves(request)]
        assert len(lengths) <= 2, (
            f"max_batch_size 2: shutdown() ran prompts of {lengths} tokens in one batch\n"
            "what it serves keeps to max_batch_size, too"
        )
    stage.served(*callers[:3], *callers[4:], hint="generate raised for r3 only, while shutdown() waited")


@requirement("4.9")
def test_shutdown_may_be_called_again(stage: Stage) -> None:
    """Two threads may shut down at a time, both wait until all is served, a third call changes nothing, and add_request
    raises RuntimeError afterwards.
    """
    requests = stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)

    callers = stage.ask(*requests)
    stage.reached(gate)
    jobs = [stage.do(stage.batcher.shutdown) for _ in range(2)]
    stage.settle()
    early = [job.error is None for job in jobs if job.finished.is_set()]
    gate.open()

    assert not any(early), "shutdown() was called by two threads, and returned to one while a batch still ran"
    for job in jobs:
        stage.returned(job, "one of two calls of shutdown()", lambda: in_turn(stage, jobs))
    stage.served(*callers)
    stage.shut_down()
    (late,) = stage.ask(*stage.requests(11))
    stage.refused(late, RuntimeError, "the batcher is shut down")


def in_turn(stage: Stage, jobs: list[Job]) -> str:
    """Whether a call after another one has returned hangs, too."""
    if any(job.finished.is_set() for job in jobs):
        again = stage.do(stage.batcher.shutdown)
        spent_until(again.finished, 0.1)
        if not again.finished.is_set():
            return "a second shutdown() did not return, also when it was called after the first had returned"
    return "two threads called it at a time"


@requirement("4.9")
def test_nobody_hangs_who_comes_during_shutdown(stage: Stage) -> None:
    """A request that comes while shutdown waits is refused with RuntimeError or served, never forgotten."""
    requests = stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)

    stage.ask(*requests)
    stage.reached(gate)
    job = stage.do(stage.batcher.shutdown)
    stage.settle()
    (late,) = stage.ask(*stage.requests(11))
    stage.settle()
    gate.open()
    stage.returned(job, "shutdown()")

    error = stage.outcome(late, "it came while shutdown() waited for a batch: refuse it with RuntimeError")
    assert error is None or isinstance(error, RuntimeError), (
        f"{late.request} during shutdown(): {error!r} came, RuntimeError was wanted"
    )


@requirement("4.9")
def test_nobody_hangs_who_came_just_before_shutdown(stage: Stage) -> None:
    """Shutdown on an event loop right after add_request has begun there: it is served or refused, not forgotten."""
    stage.start(max_wait_time=NEVER)
    callers, job, loop = [], Job(), stage.home.loop

    def begin() -> None:
        callers.extend(stage.ask(*stage.requests(9)))
        loop.call_soon(loop.call_soon, job.call, stage.batcher.shutdown)  # Right after the first step of add_request.

    stage.returned(stage.do(begin, stage.home), "the event loop")
    stage.returned(job, "shutdown()")

    error = stage.outcome(callers[0], "shutdown() was called on its event loop right after add_request had begun")
    assert error is None or isinstance(error, RuntimeError), (
        f"{callers[0].request} just before shutdown(): {error!r} came, a result or RuntimeError was wanted"
    )


@requirement("4.9")
@pytest.mark.parametrize("kind", ["unused", "used"])
def test_the_threads_end(stage: Stage, kind: str) -> None:
    """After shutdown no thread of the batcher is alive, whatever happened before."""
    *requests, bad, late = stage.requests(9, 10, 11, 12, 20, 28, 9, 9)
    bad.new = 0
    stage.start(max_wait_time=NEVER)
    if kind == "used":
        stage.model.errors.append((requests[0], OSError("device lost")))
        callers = stage.ask(*requests, bad)
        stage.settle()
        stage.cancel(callers[4])
    stage.shut_down()
    if kind == "used":
        stage.ask(late)
        stage.settle()
    stage.end_loops()

    left = stage.left_threads()
    assert not left, (
        f"shutdown() has returned, and {len(left)} thread of the batcher is alive: {left[0]}\n"
        "what a request starts has to end with it, a timer too, however it ends (max_wait_time 60)"
    )
