"""Limits (4.5) and fairness (4.6): how many and how long, and which batch goes first."""

import time
from itertools import pairwise

import pytest

from harness.testing import halfway, requirement

from .reference import Request, names
from .stage import NEVER, Caller, Stage, mix, told

# 4.5 limits


@requirement("4.5")
def test_batches_keep_to_max_batch_size(stage: Stage) -> None:
    """However many requests wait, no batch is larger than max_batch_size."""
    for size, lengths in {1: (9, 12, 10), 3: (9, 12, 10, 11, 12, 9)}.items():
        stage.start(max_batch_size=size, max_wait_time=0.002)
        requests = stage.requests(*lengths)

        callers = stage.ask_at_once(*requests)

        stage.served(*callers)
        sizes = [len(call.ids) for call in stage.calls(requests)]
        assert max(sizes) <= size, f"max_batch_size {size}: batches of {sizes} requests ran"


# Ever longer time limits: one that is over before the batcher has looked at its queue says nothing.
GROWING = 0.004, 0.016, 0.064, 0.25, 0.5


@requirement("4.5")
def test_a_partial_batch_goes_by_itself(stage: Stage) -> None:
    """A lone request is served after max_wait_time although nothing else happens, and so is the next one."""
    for seconds in (0, *GROWING):
        stage.start(max_batch_size=4, max_wait_time=seconds)
        for length in (9, 11):
            start = time.monotonic()
            callers = stage.ask(*stage.requests(length))
            stage.settle()
            in_time = time.monotonic() < start + seconds
            stage.served(
                *callers, hint=f"max_wait_time is {seconds}, no other request comes: something has to wake by itself"
            )
        if in_time:
            break


@requirement("4.5")
def test_every_bucket_has_its_time(stage: Stage) -> None:
    """Batches that are not full go after max_wait_time in every bucket, beside full ones and after them."""
    for seconds in GROWING:
        stage.start(max_wait_time=seconds)
        start = time.monotonic()

        callers = stage.ask(*stage.requests(9, 20, 10, 11, 30))
        stage.settle()
        in_time = time.monotonic() < start + seconds

        rest = names([callers[i].request for i in (1, 3, 4)])
        stage.served(*callers, hint=f"max_wait_time is {seconds}; {rest} are the rest in their buckets")
        if in_time:
            break


@requirement("4.5")
def test_a_partial_batch_waits(stage: Stage) -> None:
    """A batch that is not full does not go before max_wait_time, neither by itself nor beside full ones."""
    requests = stage.requests(20, 21, 9, 12, 10, 11)
    stage.start(max_batch_size=3, max_wait_time=NEVER)

    for some in (requests[:1], requests[1:2], requests[2:]):
        stage.ask(*some)
        stage.settle()
    stage.exercise()

    ran = [request.name for request in requests if stage.calls([request])]
    assert len(ran) <= 3 and not {"r0", "r1"} & set(ran), (
        "max_batch_size 3, max_wait_time 60, buckets of 8, prompts of 20, 21, 9, 12, 10 and 11 tokens: "
        f"ran as {stage.batches(requests)}, [['r2', 'r3', 'r4']] was wanted\n"
        "only that one is a full batch of a bucket; the rest waits for its own max_wait_time"
    )


@requirement("4.5")
def test_each_batcher_has_its_own_limits(stage: Stage) -> None:
    """Of two batchers at a time, the one with the short max_wait_time serves its request, the other one waits."""
    patient, hasty = stage.requests(9, 10)
    batchers = [stage.start(max_batch_size=4, max_wait_time=seconds) for seconds in (NEVER, 0.002)]

    stage.ask(patient, batcher=batchers[0])
    callers = stage.ask(hasty, batcher=batchers[1])
    stage.served(*callers, hint="max_wait_time is 0.002")
    stage.exercise(batchers[0])

    assert not stage.calls([patient]), (
        "max_wait_time 60: a lone request went as soon as that of another batcher, with max_wait_time 0.002"
    )


@requirement("4.5")
def test_the_time_counts_from_the_oldest(stage: Stage) -> None:
    """A batch goes max_wait_time after its oldest request came, not before, and not after its newest one."""
    for seconds in GROWING:
        stage.start(max_batch_size=3, max_wait_time=seconds)
        first, second = stage.requests(9, 10)
        start = time.monotonic()

        callers = stage.ask(first)
        stage.settle(0.5 * seconds)
        newest = time.monotonic()
        callers += stage.ask(second)
        stage.settle()
        in_time = time.monotonic() < start + seconds  # Else the first may have gone before the second came.
        stage.served(*callers, hint=f"max_wait_time is {seconds}")

        came = stage.calls([first])[0].came
        assert came > start + seconds - 0.0005, (
            f"max_wait_time {seconds}: a request went {came - start:.4f} s after it came, with no full batch"
        )
        if came < newest + seconds and in_time:
            return
    raise AssertionError(
        f"max_wait_time {seconds}, of two requests the second came {seconds / 2} s after the first: "
        f"the batch went {came - newest:.2f} s after the second\n"
        "the time counts from the oldest request of a batch, not from the newest"
    )


@requirement("4.5")
@pytest.mark.parametrize("how", ["served", "cancelled"])
def test_the_time_of_one_that_has_gone_is_forgotten(stage: Stage, how: str) -> None:
    """A lone request waits for its own max_wait_time, not for that of others that went, or gave up, just before."""
    for seconds in GROWING[1:]:
        stage.start(max_batch_size=2 if how == "served" else 3, max_wait_time=seconds)
        first, second, third, other = stage.requests(9, 10, 11, 18)
        start = time.monotonic()

        earlier = stage.ask(first, second) if how == "served" else stage.ask(first)
        stage.settle(0.5 * seconds)
        asked = time.monotonic()
        callers = stage.ask(*([third] if how == "served" else [third, other]))
        stage.settle()
        if how == "cancelled":
            stage.cancel(*earlier)
        in_time = time.monotonic() < start + 0.9 * seconds
        stage.served(*callers, hint=f"max_wait_time is {seconds}")

        # One that was overdue before it could be cancelled may have gone, and its mate with it.
        calls = stage.calls([other] if how == "cancelled" and not in_time else [third, other])
        call = min(calls, key=lambda call: call.came)
        came = call.came
        assert came > asked + seconds - 0.0005, (
            f"max_wait_time {seconds}: a request went {came - asked:.4f} s after it came, with no full batch; "
            f"{seconds} s was wanted\nan older request of {'its' if call.serves(third) else 'another'} bucket, which "
            f"came {asked - start:.4f} s before it, was {how}: its waiting time counts for no other"
        )
        if in_time:
            return


@halfway
@requirement("4.5")
def test_the_time_counts_while_the_device_is_busy(stage: Stage) -> None:
    """What is overdue when the device is free goes at once, as does the rest of its bucket; other rests go in time."""
    for seconds in GROWING[1:]:
        stage.start(max_wait_time=seconds)
        requests = stage.requests(9, 10, 11, 17, 18, 19)
        gate = stage.occupy()

        callers = stage.ask(*requests[:3])
        stage.settle(0.8 * seconds)
        asked = time.monotonic()
        callers += stage.ask(*requests[3:])
        stage.settle(0.2 * seconds)
        gate.open()
        opened = time.monotonic()
        stage.served(*callers, hint=f"max_wait_time is {seconds}")

        in_time = stage.calls([requests[3]])[0].came < asked + seconds
        came = [stage.calls([rest])[0].came - opened for rest in (requests[2], requests[5])]
        # Full batches that never go in time are judged elsewhere.
        if max(came) < 0.9 * seconds and (in_time or seconds >= GROWING[2]):
            return
    if came[0] >= 0.9 * seconds:
        late, after, wanted = callers[2], came[0], "at once"
        when = "was overdue when the device was free"
    else:
        late, after, wanted = callers[5], came[1], f"{max(asked + seconds - opened, 0):.2f} s"
        when = f"came {opened - asked:.2f} s before the device was free"
    raise AssertionError(
        told(
            f"max_wait_time {seconds}, max_batch_size 2, three came for each of two buckets while a batch ran: "
            f"{late.request.name} {when}; it went {after:.2f} s after that, {wanted} was wanted",
            stage.blocks(late) or "its time counts from its add_request, also while the device is busy",
        )
    )


# 4.6 fairness


@requirement("4.6")
def test_of_overdue_and_full_ones_the_oldest_goes_first(stage: Stage) -> None:
    """Of batches that are full or overdue, the one goes first whose oldest request has waited longest."""
    stage.start(max_wait_time=0.0005)

    for lengths, order in {
        (10, 11, 40, 12, 14, 13, 15): [[0, 1], [2], [3, 4], [5, 6]],
        (26, 42, 9, 10, 27): [[0, 4], [1], [2, 3]],
    }.items():
        requests = stage.requests(*lengths, new=(1,))
        in_order(stage, requests, stage.ask_at_once(*requests, seconds=0.001), order)  # All are overdue.


@requirement("4.6")
def test_of_full_ones_the_oldest_goes_first(stage: Stage) -> None:
    """The order follows the ages of requests, not the order in which buckets were first used, nor their lengths; those
    who stay when others are cancelled keep theirs.
    """
    stage.start()

    for lengths, gone, order in (
        ((12, 14, 42, 43, 13, 15, 26, 27), (), [[0, 1], [2, 3], [4, 5], [6, 7]]),  # 13 is nearer to 12 than 14 is.
        ((9, 42, 26, 27, 43, 10), (), [[0, 5], [1, 4], [2, 3]]),
        ((9, 42, 12, 43, 10, 13, 14, 15), (0, 4), [[1, 3], [2, 5], [6, 7]]),
    ):
        requests = stage.requests(*lengths, new=(1,))
        in_order(stage, requests, stage.ask_at_once(*requests, gone=gone), order, gone)


@requirement("4.6")
def test_what_may_go_is_looked_at_before_each_batch(stage: Stage) -> None:
    """An old batch that fills while another runs goes before those that could go earlier but are younger."""
    requests, plugs = stage.requests(42, 9, 10, 26, 27, 43), stage.requests(1, 1)
    stage.start(max_wait_time=NEVER)
    gates = stage.hold(*plugs), stage.hold(requests[1])

    stage.ask(*plugs)
    if not stage.waits(gates[0].news):
        return  # Full batches that never go are judged elsewhere.
    callers = stage.ask(*requests[:5])
    stage.settle()
    gates[0].open()
    stage.reached(gates[1])
    callers += stage.ask(requests[5])
    stage.settle()
    gates[1].open()

    in_order(stage, requests, callers, [[1, 2], [0, 5], [3, 4]])


def in_order(
    stage: Stage, requests: list[Request], callers: list[Caller], order: list[list[int]], gone: tuple[int, ...] = ()
) -> None:
    """The groups of `order` ran one after the other; the callers in the places `gone` were cancelled."""
    if stage.calls([requests[place] for place in gone]):
        return  # That those who were cancelled run all the same is judged elsewhere.
    stage.served(*[callers[i] for group in order for i in group])
    lengths = [request.tokens.size(1) for request in requests]
    calls = stage.calls(requests)
    ran = [next((i for i, call in enumerate(calls) if call.serves(request)), -1) for request in requests]
    wanted = [[lengths[i] for i in group] for group in order]
    for earlier, later in pairwise(order):
        if max(ran[i] for i in earlier) > min(ran[i] for i in later):
            came = [[request.tokens.size(1) for request in requests if call.serves(request)] for call in calls]
            rule = "the batch that may go and whose oldest request has waited longest goes first"
            left = "".join(f"; the one of {lengths[i]} was cancelled while it waited" for i in gone)
            raise AssertionError(
                told(
                    f"prompts of {lengths} tokens came in this order, in buckets of 8{left}: "
                    f"batches of these lengths ran as {came}, {wanted} was wanted",
                    stage.blocks(*callers) or f"{rule}; it takes its bucket's oldest",
                )
            )


@requirement("4.6")
def test_all_of_a_mix_are_served(stage: Stage) -> None:
    """Short and long prompts that come at once are all served."""
    stage.start(max_batch_size=5, max_wait_time=0.001)

    callers = stage.ask(*mix(stage))

    stage.served(*callers, hint="8 prompts of 25 to 32 tokens and 4 of 90 to 96, max_batch_size 5, max_wait_time 0.001")
