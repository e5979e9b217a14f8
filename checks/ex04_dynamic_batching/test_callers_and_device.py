"""Callers (4.3) and use of the device (4.4): who wakes when, and which calls of generate there are."""

from harness.testing import requirement

from .reference import Request
from .stage import NEVER, Stage, told

# 4.3 callers

# All checks but the second and the last one let the callers' loop beat, so that a caller who is handed a result but not
# woken fails there alone.


@requirement("4.3")
def test_the_event_loop_is_not_blocked(stage: Stage) -> None:
    """While generate runs, the event loop of its caller turns and takes new requests, also while shutdown waits."""
    first, second, third, late = stage.requests(9, 10, 11, 12)
    stage.start(max_batch_size=1)
    gate = stage.hold(first)

    callers = stage.ask(first)
    stage.reached(gate)
    callers += stage.ask(second)
    turns = stage.turns(stage.home)
    gate.open()

    assert not stage.model.on_a_loop, (
        "generate is called in the thread of the callers' event loop\n"
        "nothing else happens there until it returns: call it in another thread"
    )
    assert turns, (
        "the event loop of the callers is blocked while generate runs\n"
        "add_request awaits its result; it neither waits in the loop's thread nor needs a lock that generate holds up"
    )
    stage.served(*callers)

    gate = stage.hold(third)
    stage.ask(third)
    stage.reached(gate)
    stage.do(stage.batcher.shutdown)
    stage.settle()
    stage.ask(late)
    turns = stage.turns(stage.home)
    gate.open()

    assert turns, (
        "shutdown() waits in another thread, and add_request blocks the event loop of its caller\n"
        "what waits for a batch holds no lock that add_request needs"
    )


@requirement("4.3")
def test_an_idle_event_loop_is_woken(stage: Stage) -> None:
    """A caller wakes also if nothing else happens on its event loop."""
    idle = stage.loop(idle=True)
    (request,) = stage.requests(9)
    stage.start(idle, max_batch_size=1)
    gate = stage.hold(request)

    (caller,) = stage.ask(request, on=idle)
    stage.reached(gate)
    stage.settle()  # Now its event loop sleeps.
    gate.open()

    assert not stage.overslept(caller), (
        "the caller of request r0 was woken only when something else happened on its event loop\n"
        "set_result from another thread does not wake a loop: use loop.call_soon_threadsafe, or asyncio.wrap_future"
    )
    stage.served(caller)


@requirement("4.3")
def test_callers_wake_when_their_own_batch_is_done(stage: Stage) -> None:
    """A caller gets its result while the next batch still runs."""
    requests = stage.requests(9, 10, 17, 18)
    stage.start()
    gates = stage.hold(*requests[:2]), stage.hold(*requests[2:])

    first = stage.ask(*requests[:2])
    stage.reached(gates[0])
    second = stage.ask(*requests[2:])
    stage.settle()
    gates[0].open()
    stage.served(*first, hint="their batch is done, the next one still runs: hand results out after each batch")
    gates[1].open()

    stage.served(*second)


@requirement("4.3")
def test_event_loops_come_and_go(stage: Stage) -> None:
    """A batcher that was built outside any event loop serves one after the other, each closed after use."""
    stage.start(outside=True)

    for _ in range(2):
        loop = stage.loop()
        callers = stage.ask(*stage.requests(9, 10), on=loop)
        stage.served(
            *callers,
            hint="the batcher was built in a thread without an event loop, and earlier callers' loops are closed: "
            "nothing of the batcher may live on them",
        )
        stage.end(loop)


@requirement("4.3")
def test_callers_on_several_event_loops(stage: Stage) -> None:
    """Callers whose event loops run in three threads share a batch, and each wakes, also where nothing else happens,
    to a result or to an error.
    """
    requests, failing = stage.requests(10, 10, 10, new=(2,)), stage.requests(10, 10, 10, new=(2,))
    loops = [stage.loop(idle=True), stage.home, stage.loop(idle=True)]
    stage.model.errors += [(request, OSError("device lost")) for request in failing]
    stage.start(max_batch_size=3)
    gate = stage.occupy()

    callers = [stage.ask(request, on=loop)[0] for request, loop in zip(requests, loops, strict=True)]

    stage.settle()
    gate.open()

    stage.served(*callers, hint="each caller's future belongs to its own event loop; no loop is the batcher's only one")
    came = stage.batches(requests)
    assert len(came) == 1, told(
        f"3 requests of one bucket came, from 3 event loops, while a batch ran, max_batch_size 3: ran as {came}, "
        "not in one batch",
        stage.blocks(*callers),
    )

    gate = stage.occupy()
    callers = [stage.ask(request, on=loop)[0] for request, loop in zip(failing, loops, strict=True)]
    stage.settle()
    gate.open()

    for caller in callers:
        assert not stage.overslept(caller), (
            f"generate raised in a batch of 3 event loops: the caller of request {caller.request.name} was woken only "
            "when something else happened on its own\nan error, too, has to wake each caller's own event loop"
        )
        if not caller.finished.is_set():
            return  # Errors that never come are judged elsewhere.


# 4.4 use of the device


@requirement("4.4")
def test_a_full_batch_goes_at_once(stage: Stage) -> None:
    """max_batch_size requests of one bucket do not wait for max_wait_time."""
    stage.start(max_batch_size=3, max_wait_time=NEVER)

    callers = stage.ask(*stage.requests(9, 12, 10))

    stage.served(*callers, hint="3 requests wait, max_batch_size is 3, max_wait_time 60: a full batch goes at once")


@requirement("4.4")
def test_a_full_batch_passes_an_older_one_that_may_not_go(stage: Stage) -> None:
    """A full batch does not wait behind a bucket that is older but neither full nor overdue."""
    older, *full = stage.requests(20, 9, 12)
    stage.start(max_wait_time=NEVER)

    stage.ask(older)
    stage.settle()
    callers = stage.ask(*full)

    stage.served(*callers, hint="another bucket's request is older, but may not go yet: look at all buckets")


@requirement("4.4")
def test_a_full_batch_goes_once_the_device_is_free(stage: Stage) -> None:
    """A batch that fills while another runs goes right after it."""
    requests = stage.requests(9, 10, 17, 18, 19)
    stage.start(max_wait_time=NEVER)
    gate = stage.hold(*requests[:2])

    first = stage.ask(*requests[:2])
    stage.reached(gate)
    second = stage.ask(*requests[2:])[1]  # In the batch, whether the oldest or the newest are taken.
    stage.settle()
    gate.open()

    stage.served(
        *first, second, hint="the batch was full before the device was free: it goes at once, max_wait_time is 60"
    )


@requirement("4.4")
def test_one_call_per_batch(stage: Stage) -> None:
    """Six requests that wait are two batches of three: a call each, for as many tokens as its longest one asks for."""
    requests = stage.requests(9, 11, 10, 12, 9, 10, new=(2, 3, 1, 2, 5000, 1))
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    calls, came = stage.calls(requests), stage.batches(requests)
    if len(calls) != 2 and (again := next((batch for batch in came if came.count(batch) > 1), None)):
        most = max(request.new for request in requests if request.name in again)
        news = [call.new for call, batch in zip(calls, came, strict=True) if batch == again]
        raise AssertionError(
            f"{', '.join(again)} are a batch and ask for up to {most} tokens: {len(news)} calls of generate came, "
            f"with max_new_tokens {news}; one call was wanted"
        )
    assert len(calls) == 2, told(
        f"6 requests of one bucket wait, max_batch_size 3: they ran as {came}, in {len(calls)} calls of generate; "
        "2 were wanted",
        stage.blocks(*callers),
    )
    for call in calls:
        asked = [request.new for request in requests if call.serves(request)]
        assert call.new == max(asked), f"requests for {asked} tokens in a batch: generate was asked for {call.new}"
        assert len(call.ids) == len(asked), f"{len(asked)} requests in a batch: generate got {len(call.ids)} rows"


@requirement("4.4")
def test_never_two_calls_at_a_time(stage: Stage) -> None:
    """While generate runs, no other call starts, not even for another bucket."""
    requests = stage.requests(9, 10, 17, 18, 11, 12)
    stage.start()
    gate = stage.hold(*requests[:2])

    callers = stage.ask(*requests[:2])
    stage.reached(gate)
    callers += stage.ask(*requests[2:])
    stage.settle(0.002)
    gate.open()

    stage.served(*callers)
    most = stage.model.most_active
    assert most == 1, f"{most} calls of generate ran at a time; a model serves one batch after the other"


@requirement("4.4")
def test_cancelled_requests_are_not_run(stage: Stage) -> None:
    """What was cancelled while it waited is in no call, makes no call of its own, and makes no call longer."""
    requests = stage.requests(17, 18, 9, 10, 11, new=(2, 3, 7, 4, 2))
    stage.start()
    gate = stage.occupy()

    callers = stage.ask(*requests)
    stage.settle()
    stage.cancel(*callers[:3])
    gate.open()

    stage.served(*callers[3:], hint="r0, r1 and r2 were cancelled while they waited: keep them out of calls")
    for request in requests[:3]:
        assert not stage.calls([request]), (
            f"request {request.name} was cancelled while it waited, and generate was called for it all the same"
        )
    assert all(len(call.ids) for call in stage.model.calls), "generate was called for a batch without rows"
    most = max(call.new for call in stage.calls(requests))
    assert most <= 4, (
        f"requests for 4 and 2 tokens, and one for 7 that was cancelled while it waited: generate was asked for {most}"
    )

    gate = stage.occupy()
    requests = stage.requests(9, 10, 17)
    callers = stage.ask(*requests)
    stage.settle()
    stage.cancel(callers[0], callers[2])
    stage.do(stage.batcher.shutdown)
    stage.settle()
    gate.open()
    stage.settle()

    for request in (requests[0], requests[2]):
        assert not stage.calls([request]), (
            f"request {request.name} was cancelled while it waited, and shutdown() had generate called for it"
        )


@requirement("4.4")
def test_a_cancelled_request_fills_no_batch(stage: Stage) -> None:
    """A request that was cancelled while it waited does not count towards a full batch."""
    requests = stage.requests(9, 10, 11)
    stage.start(max_batch_size=3, max_wait_time=NEVER)

    callers = stage.ask(*requests[:2])
    stage.settle()
    stage.cancel(callers[0])
    stage.ask(requests[2])
    stage.settle()
    stage.exercise()

    assert not stage.calls(requests), told(
        "a batch of fewer than 3 waiting requests went: max_batch_size 3, max_wait_time 60, r0 and r1 waited, r0 was "
        f"cancelled, r2 came: ran as {stage.batches(requests)}, none was wanted",
        lambda: why_it_went(stage, requests),
    )


def why_it_went(stage: Stage, requests: list[Request]) -> str:
    """What is known of it: what came last, before or after it, is a full batch of others."""
    calls, first = stage.model.calls, stage.calls(requests)[0]
    if any(call not in stage.calls(requests) for call in calls[: calls.index(first)]):
        return "it went after a batch of others; what is not full waits for its own max_wait_time"
    if first.serves(requests[1]) and first.serves(requests[2]):
        return "it went when r2 came: a cancelled request waits no more"
    return "what is not full waits for its own max_wait_time"
