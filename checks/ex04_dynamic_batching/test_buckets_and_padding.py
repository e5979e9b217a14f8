"""Buckets (4.1) and padding (4.2): who shares a call, and that each gets what it gets alone."""

from dataclasses import replace

import torch
from torch import Tensor

from harness.testing import requirement

from .reference import Request
from .stage import NEVER, Caller, Stage, mix, told

# 4.1 buckets


@requirement("4.1")
def test_bucket_edges(stage: Stage) -> None:
    """A bucket is named by its upper edge, which belongs to it."""
    edges = {
        32: {1: 32, 32: 32, 33: 64, 64: 64, 65: 96},
        10: {1: 10, 10: 10, 11: 20, 95: 100},
        7: {6: 7, 7: 7, 8: 14},
        1: {1: 1, 2: 2, 13: 13},
    }
    for tolerance, wanted in edges.items():
        batcher = stage.start(length_tolerance=tolerance)

        for length, edge in wanted.items():
            came = batcher.get_length_bucket(length)
            what = f"get_length_bucket({length}) with length_tolerance {tolerance}"
            assert isinstance(came, int) and came == edge, f"{what}: {came!r} came, {edge} was wanted"


@requirement("4.1")
def test_one_bucket_shares_a_call(stage: Stage) -> None:
    """Prompts of 9 and 16 tokens share a call where buckets are 8 wide, however many new tokens each wants."""
    requests = stage.requests(9, 16, 12, 10, new=(1, 3, 2, 9))
    stage.start(max_batch_size=4)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    came = stage.batches(requests)
    assert any({"r0", "r1"} <= set(batch) for batch in came), told(
        f"prompts of 9, 16, 12 and 10 tokens, length_tolerance 8, max_batch_size 4: ran as {came}, not in one batch",
        stage.blocks(*callers) or "the prompt's length alone chooses the bucket; 9 … 16 share one",
    )


@requirement("4.1")
def test_two_buckets_never_share_a_call(stage: Stage) -> None:
    """Prompts of 16 and 17 tokens never share a call where buckets are 8 wide, not even when shutdown serves them."""
    # The long ones are 1280 and 1000 buckets above those of 16 and of 17 tokens.
    requests = stage.requests(8 * 1280 + 9, 8 * 1000 + 17, 16, 17, 25, 9, 24, 32)
    stage.start(max_wait_time=0.002)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    requests += stage.requests(16, 17)
    stage.start(max_batch_size=3, max_wait_time=NEVER)
    stage.ask(*requests[-2:])
    stage.settle()
    stage.do(stage.batcher.shutdown)  # What it owes to those who wait is judged elsewhere.
    stage.settle()
    for call in stage.calls(requests):
        lengths = [request.tokens.size(1) for request in requests if call.serves(request)]
        buckets = {(length + 7) // 8 * 8 for length in lengths}
        assert len(buckets) == 1, (
            f"generate got prompts of {lengths} tokens in one batch\n"
            f"with length_tolerance 8 these are {len(buckets)} buckets"
        )


@requirement("4.1")
def test_little_of_a_mix_is_padding(stage: Stage) -> None:
    """On a mix of short and long prompts, fewer than 1.3 positions are sent per real token."""
    requests = mix(stage)
    stage.start(max_batch_size=4)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    sent = sum(call.ids.numel() for call in stage.calls(requests))
    real = sum(request.tokens.size(1) for request in requests)
    assert sent < 1.3 * real, (
        f"8 prompts of 25 to 32 tokens and 4 of 90 to 96: {sent} positions were sent for {real} tokens, "
        f"{sent / real:.2f} for each\nbatch prompts of one bucket only, and pad to the longest of a batch"
    )


# 4.2 padding


@requirement("4.2")
def test_padding_goes_on_the_left(stage: Stage) -> None:
    """In what generate gets, each row ends with its prompt, and exactly the prompt is unmasked; pads are token 0."""
    requests = stage.requests(9, 12)
    stage.start()

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    prompts = {request.mark: request.asked[0] for request in requests}
    rows = [
        (call, row, prompts[mark])
        for call in stage.calls(requests)
        for row, mark in enumerate(call.marks)
        if mark in prompts
    ]
    for call, row, prompt in rows:
        width, length = call.ids.size(1), len(prompt)
        what = f"a prompt of {length} tokens in input_ids of width {width}"
        assert call.ids[row, width - length :].equal(prompt), (
            f"{what}: its row does not end with it\npad on the left: a decoder continues from the last position"
        )
        if width > length:
            assert call.mask is not None, f"{what}: generate got no attention_mask, so that pads are attended to"
            came, wanted = call.mask[row].long().tolist(), [0] * (width - length) + [1] * length
            assert came == wanted, f"{what}: its attention_mask is {came}, {wanted} was wanted"
    assert any(len(call.ids) > 1 for call, _, _ in rows), told(
        "prompts of 9 and 12 tokens ran alone: nothing was padded", stage.blocks(*callers)
    )
    no_flaw(stage)


@requirement("4.2")
def test_each_caller_gets_its_own_row(stage: Stage) -> None:
    """Prompts of one length need no padding; for as many new tokens each there is nothing to cut, else there is."""
    stage.start(max_batch_size=3)
    for new, hint in {
        (2,): "row i belongs to request i, as [1, L + max_length]: the prompt and the new tokens",
        (1, 4, 2): "a batch generates what its longest request asks for; cut each row to [1, L + its own max_length]",
    }.items():
        callers = stage.ask_at_once(*stage.requests(10, 10, 10, new=new))

        stage.right(*callers, hint=hint)


@requirement("4.2")
def test_padded_prompts_get_what_they_get_alone(stage: Stage) -> None:
    """Prompts of different lengths in one batch are all continued as if they were alone."""
    stage.start(max_batch_size=4)

    callers = stage.ask_at_once(*stage.requests(9, 16, 13, 11, new=(3,)))

    stage.right(
        *callers, hint="the result is the prompt without its padding, and what follows it; each caller gets its own row"
    )


@requirement("4.2")
def test_a_prompt_may_hold_the_padding_token(stage: Stage) -> None:
    """A token 0 of a prompt is no pad: it is attended to, and it is returned."""
    requests = stage.requests(10, 13, 11)
    requests[0].tokens[0, :4] = 0
    requests[1].tokens[0, 5:9] = 0
    requests[2].tokens[0, :-1] = 0
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*requests)

    stage.right(
        *callers, hint="the prompt holds token 0: neither the mask nor the cut may come from the tokens' values"
    )


@requirement("4.2")
def test_request_ids_may_repeat(stage: Stage) -> None:
    """Requests with one and the same id, and with one and the same prompt, get their own results."""
    stage.start(max_batch_size=3)

    earlier: list[Request] = []
    for shared in (False, True):
        requests = stage.requests(10, 12, 11)
        for request in requests:
            request.id = "same"
            request.tokens = requests[0].tokens if shared else request.tokens
        callers = stage.ask(*requests)
        try:
            stage.right(*callers)
        except AssertionError as error:
            hint = "request_ids repeat here: nothing may be kept by them"
            if shared and not any(same(caller.value, request.expected) for caller in callers for request in earlier):
                hint = "one tensor is the prompt of several requests with different max_length: keep nothing by it"
            raise type(error)(told(str(error), hint)) from error.__cause__
        earlier = requests


@requirement("4.2")
def test_strided_prompts_are_left_alone(stage: Stage) -> None:
    """Prompts may be views with any strides, and are not written to."""
    requests = stage.requests(12, 10, 10)
    requests[0].tokens = torch.stack([requests[0].tokens, requests[0].tokens + 1], dim=-1)[..., 0]
    base = torch.randint(99, (19,), generator=stage.rng)
    base[9], base[18] = requests[1].mark, requests[2].mark
    requests[1].tokens, requests[2].tokens = base[None, :10], base[None, ::2]  # They begin at the same place.
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*requests)

    stage.right(*callers, hint="the prompts are strided views here")
    for request in requests:
        assert request.tokens.equal(request.asked), f"{request}: the prompt was written to"


@requirement("4.2")
def test_one_batch_leaves_nothing_to_the_next(stage: Stage) -> None:
    """Later batches are right too: the same again of a model that has changed, others as wide, narrow ones."""
    stage.start(max_batch_size=3)
    first, second, third = stage.requests(15, 16, 9), stage.requests(10, 16, 12), stage.requests(1, 3, 2)

    for batch, hint in (
        (first, "in the batcher's first batch"),
        (first, "in its second batch: the same requests again, after the model's weights have changed"),
        (second, "in a later batch of the same batcher: other prompts in a batch as wide as one before"),
        (third, "in a later batch of the same batcher, of shorter prompts"),
    ):
        stage.model.state += 1
        callers = stage.ask(*batch)
        try:
            stage.right(*callers, hint=hint)
        except AssertionError:
            if old := outdated(callers):
                raise AssertionError(
                    f"{old[0]}, again after the model's weights have changed: the old model's tokens came, those of "
                    "the changed model were wanted\na prompt that comes again is run again"
                ) from None
            raise
    no_flaw(stage)


def no_flaw(stage: Stage) -> None:
    """What this model lets pass, and another one may not, has not come."""
    for call in stage.model.calls:
        assert not call.flaw, f"in call {stage.model.calls.index(call) + 1} of generate: {call.flaw}"


def outdated(callers: list[Caller]) -> list[Request]:
    """The requests that got what the model gave before it changed last, and gives no more, once all have ended."""
    if not all(caller.finished.is_set() for caller in callers):
        return []
    older = [(caller, replace(caller.request, state=caller.request.state - 1).expected) for caller in callers]
    return [one.request for one, old in older if same(one.value, old) and not old.equal(one.request.expected)]


def same(value: object, tensor: Tensor) -> bool:
    return type(value) is Tensor and value.dtype == tensor.dtype and value.equal(tensor)
