"""Faults (4.7) and a full queue (4.8): what is refused, and that a fault costs its own requests only."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.testing import requirement

from .reference import CodedError, Request, names
from .stage import NEVER, Caller, Stage, told

# 4.7 faults

BAD: list[tuple[Callable[[Tensor], Tensor], int]] = [
    (lambda x: x[:, :0], 2),
    (lambda x: x[0], 2),
    (lambda x: x.expand(2, -1), 2),
    (lambda x: x[None], 2),
    (lambda x: x[0, -1], 2),
    (lambda x: x.float(), 2),
    (lambda x: x.int(), 2),
    (lambda x: x.bool(), 2),
    (lambda x: x, 0),
    (lambda x: x, -3),
]


@requirement("4.7")
def test_an_impossible_request_is_refused(stage: Stage) -> None:
    """A request that cannot be valid gets ValueError, and the requests around it are served."""
    good, bad = stage.requests(9, 10), stage.requests(*[11] * len(BAD))
    for index, (request, (change, new)) in enumerate(zip(bad, BAD, strict=True)):
        request.tokens, request.new = change(request.tokens), new
        request.id = good[0].id if index % 2 else request.id  # Of one that was valid.
    stage.start()

    first, *refused, last = stage.ask(good[0], *bad, good[1])

    for caller in refused:
        stage.refused(caller, ValueError, partial(what_is_bad, stage, caller.request, good[0]))
    stage.served(
        first, last, hint="an invalid request came between r0 and r1: refuse it in add_request, before it is queued"
    )


def what_is_bad(stage: Stage, request: Request, valid: Request) -> str:
    """What alone makes a request invalid; and whether it is refused under another id than that of a valid one."""
    tokens, fact = request.tokens, f"max_length is {request.new}, at least 1 was wanted"
    if tokens.dtype != torch.int64:
        fact = f"input_tokens are {tokens.dtype}, torch.int64 was wanted"
    elif tokens.dim() != 2 or tokens.size(0) != 1 or tokens.size(1) == 0:
        wanted = "[1, L]" if tokens.dim() != 2 else "one row" if tokens.size(0) != 1 else "at least one token"
        fact = f"shape {tuple(tokens.shape)} came, {wanted} was wanted"
    if request.id == valid.id:
        (other,) = stage.ask(replace(request, id=request.name))
        stage.settle()
        if isinstance(other.error, ValueError):
            fact += "; a request of the same request_id was accepted before: each is checked"
    return fact


@requirement("4.7")
def test_an_error_of_the_model_reaches_every_caller(stage: Stage) -> None:
    """When generate raises, each caller of the batch gets an error of this type and text."""
    errors = CodedError(3), KeyError("layer 3"), ArithmeticError(), RuntimeError("out of memory in layer 3")
    batches = [stage.requests(length, length + 1, length + 2) for length in (9, 17, 25, 33)]
    stage.model.errors += [(requests[1], error) for requests, error in zip(batches, errors, strict=True)]
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*[request for requests in batches for request in requests])

    for place, (requests, error) in enumerate(zip(batches, errors, strict=True)):
        for caller in callers[3 * place : 3 * place + 3]:
            why = "every caller of the batch gets the error, and the worker has to live on"
            came = stage.outcome(caller, f"generate raised in its batch: {why}")
            assert type(came) is type(error) and str(came) == str(error), told(
                f"{caller.request}: {'no error came, a result did' if came is None else f'{came!r} came as error'}, "
                f"the same type and text as generate's {error!r} were wanted",
                partial(how_it_ran, stage, callers[3 * place : 3 * place + 3]),
            )
        assert len(stage.calls(requests)) == 1, told(
            f"generate raised {error!r}: {len(stage.calls(requests))} calls came for three requests, one was wanted",
            partial(how_it_ran, stage, callers[3 * place : 3 * place + 3]),
        )


def how_it_ran(stage: Stage, callers: list[Caller]) -> str:
    """What is to be said of the calls of a batch, unless there was one for all."""
    requests = [caller.request for caller in callers]
    if any(len(stage.calls([request])) > 1 for request in requests):
        return f"the batch was tried again: ran as {stage.batches(requests)}"
    if not all(call.serves(request) for call in stage.calls(requests) for request in requests):
        return stage.blocks(*callers) or f"the requests did not share a call: ran as {stage.batches(requests)}"
    return ""


@requirement("4.7")
def test_the_next_batch_works_after_an_error(stage: Stage) -> None:
    """An error of the model ends its batch only: what waits is served, and so is what comes later, again and again."""
    requests = stage.requests(9, 10, 17, 18, 11, 12)
    stage.start()
    again = stage.requests(13, 14)
    stage.model.errors += [(request, OSError("device lost")) for request in (*requests[:2], *again)]
    gate = stage.hold(*requests[:2])

    failing = stage.ask(*requests[:2])
    stage.reached(gate)
    waiting = stage.ask(*requests[2:])
    stage.settle()
    gate.open()

    for caller in failing:
        stage.outcome(caller, "generate raised in its batch: every caller of the batch gets the error")
    stage.served(*waiting, hint="generate raised in the batch before; the worker has to live on")
    for caller in stage.ask(*again):
        stage.outcome(caller, "generate raised in its batch: every caller of the batch gets the error")
    stage.served(
        *stage.ask(*stage.requests(9, 10)), hint="generate raised in an earlier batch; the worker has to live on"
    )


@requirement("4.7")
def test_a_caller_may_be_cancelled_while_its_batch_runs(stage: Stage) -> None:
    """The others of the batch get their results, and the next batch works; also where all of a batch are cancelled."""
    requests, waiting, both = stage.requests(9, 10), stage.requests(11, 12, 13), stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)
    for request in waiting:
        request.id = "same"

    callers = stage.ask(*requests)
    stage.reached(gate)
    others = stage.ask(*waiting)
    stage.settle()
    stage.cancel(callers[0], others[1])
    gate.open()

    hint = "r0 was cancelled while its batch ran: a cancelled future takes no result"
    stage.served(callers[1], hint=hint)
    stage.served(others[0], others[2], hint=f"{waiting[1].name}, of the same request_id, was cancelled; {hint}")

    gate = stage.hold(*both)
    callers = stage.ask(*both)
    stage.reached(gate)
    stage.cancel(*callers)
    gate.open()

    hint = f"{names(both)} were cancelled while their batch ran: a cancelled future takes no result"
    stage.served(*stage.ask(*stage.requests(9, 10)), hint=hint)


@requirement("4.7")
def test_a_callers_event_loop_may_be_gone(stage: Stage) -> None:
    """A caller whose event loop was closed while its batch ran harms no other caller."""
    requests = stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)
    other = stage.loop()

    stage.ask(requests[0], on=other)
    stage.settle()
    callers = stage.ask(requests[1])
    stage.reached(gate)
    stage.end(other)
    gate.open()

    hint = "the event loop of r0 was closed while its batch ran: call_soon_threadsafe then raises RuntimeError"
    stage.served(*callers, hint=hint)
    stage.served(*stage.ask(*stage.requests(9, 10)), hint=hint)


# 4.8 back-pressure


@requirement("4.8")
def test_a_full_queue_refuses(stage: Stage) -> None:
    """max_queue_size requests may wait, in all buckets together and beside those that run; one more is refused, then
    and later, when a caller of the running batch has gone.
    """
    most = 3
    requests = stage.requests(9, 10, 17)
    extra, last = stage.requests(25, 26)
    stage.start(max_batch_size=1, max_queue_size=most)
    gate = stage.occupy()

    callers = stage.ask(*requests)
    stage.settle()
    late = stage.ask(extra)[0]
    stage.refused(late, stage.full_queue, f"{most} requests wait, in two buckets, max_queue_size is {most}")
    gate.open()

    stage.served(*callers, hint=f"max_queue_size is {most}: {most} may wait beside the one that runs")
    stage.served(*stage.ask(last))
    assert not stage.calls([extra]), "a request that was refused with QueueFullError was run"

    plug, later, *requests = stage.requests(1, 26, 9, 10, 17)
    gate = stage.hold(plug)
    running = stage.ask(plug)
    stage.reached(gate)
    callers = stage.ask(*requests)
    stage.settle()
    stage.served(*[caller for caller in callers if caller.error], hint="those that were refused earlier hold no place")
    stage.cancel(*running)
    why = f"{most} requests wait, max_queue_size is {most}; the one that runs and has lost its caller held no place"
    stage.refused(stage.ask(later)[0], stage.full_queue, why)
    gate.open()


@requirement("4.8")
def test_places_are_free_again(stage: Stage) -> None:
    """What has left the queue makes room for others, again and again."""
    stage.start(max_batch_size=1, max_queue_size=1)
    (failing,) = stage.requests(9)
    stage.model.errors.append((failing, OSError("device lost")))

    for caller in stage.ask(failing):
        stage.outcome(caller)

    for length in (9, 10, 11):
        callers = stage.ask(*stage.requests(length))
        stage.served(*callers, hint="max_queue_size is 1; earlier requests were served or have failed, none waits")


@requirement("4.8")
def test_a_queue_may_be_smaller_than_a_batch(stage: Stage) -> None:
    """max_queue_size counts callers of all event loops, and also holds where it is less than max_batch_size."""
    requests, (extra,) = stage.requests(9, 10), stage.requests(11)
    stage.start(max_batch_size=5, max_wait_time=NEVER, max_queue_size=2)

    stage.ask(requests[0], on=stage.loop())
    stage.ask(requests[1])
    stage.settle()
    (late,) = stage.ask(extra)

    why = "2 requests came before (from two event loops) and are to wait, max_queue_size is 2, max_batch_size is 5"
    stage.refused(late, stage.full_queue, f"{why}: the queue's limit holds below max_batch_size and across loops")


@requirement("4.8")
def test_a_cancelled_request_frees_its_place(stage: Stage) -> None:
    """A request that was cancelled while it waited counts no more, though the device is still busy."""
    requests = stage.requests(9, 10, 17)
    after, extra = stage.requests(11, 12)
    stage.start(max_batch_size=1, max_queue_size=3)
    gate = stage.occupy()

    callers = stage.ask(*requests)
    stage.settle()
    stage.cancel(callers[0])
    late, later = stage.ask(after, extra)
    why = "3 waited, max_queue_size is 3, one was cancelled"
    stage.refused(later, stage.full_queue, f"{why}, another one came")
    gate.open()

    stage.served(late, hint=f"{why}: there is room for one more at once")
    stage.served(*callers[1:])
