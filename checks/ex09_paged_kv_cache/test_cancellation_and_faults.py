"""Cancellation, requests that cannot be valid, and errors of the model (9.9)."""

from functools import partial
from typing import Any

import torch

from harness.testing import Subject, refuses, requirement

from .reference import SMALL, Sizes
from .stage import Stage, apart_from_preemption, distinct

CANCEL = ("tokens", "memory", "schedule", "cancelled", "finished", "preemptions")


@requirement("9.9")
def test_cancel_frees_blocks_at_once(subject: Subject, rng: torch.Generator) -> None:
    """Whether it waits or runs; its place is the next one's, and the others' answers are theirs."""
    stage = Stage(subject, 20, 3, size=2, sizes=SMALL, watch=CANCEL)
    prompts = distinct(rng, 4, 7, 2, 5, 3, 6)
    for prompt in prompts[:4]:
        stage.submit(prompt, 5)
    stage.cancel(2)
    stage.step()
    stage.cancel(0)
    stage.judge_metrics()
    stage.step()
    for prompt in prompts[4:]:
        stage.submit(prompt, 4)
    stage.step()
    stage.cancel(5)
    stage.drain()
    result = stage.engine.run()
    finished = [one.number for one in stage.rules.requests if one.state == "finished"]
    assert sorted(result) == finished, f"run(): answers of {sorted(result)} came, of {finished} were wanted"


@requirement("9.9")
def test_cancel_of_what_is_not_there(subject: Subject, rng: torch.Generator) -> None:
    """False for ids that are unknown, finished or cancelled, and nothing changes."""
    stage = Stage(subject, 20, 3, sizes=SMALL, watch=CANCEL)
    stage.cancel(0)
    for prompt, most in zip(distinct(rng, 4, 7, 2), (1, 5, 4), strict=True):
        stage.submit(prompt, most)
    stage.step()
    for number in (0, 3, -1, 700, 1, 1, 0):
        stage.cancel(number)
    stage.judge_metrics()
    stage.drain()
    for number in (0, 1, 2):
        stage.cancel(number)
    stage.judge_metrics()


@requirement("9.9")
def test_cancel_of_those_that_share(subject: Subject) -> None:
    """Those who share blocks with a cancelled request go on; blocks that nobody else holds are free."""
    base = [3, 1, 4, 1, 5, 9, 2, 6]
    for cancelled in ((0,), (2, 0)):
        stage = Stage(subject, 30, 3, sizes=SMALL, watch=("tokens", "memory"))
        for prompt in (base, [*base, 7], [*base[:6], 8, 8]):
            stage.submit(prompt, 5)
            stage.step()
        for number in cancelled:
            stage.cancel(number)
        stage.submit([*base, 7, 7], 2)
        stage.drain()


@requirement("9.9")
def test_cancel_of_one_that_was_preempted(subject: Subject, rng: torch.Generator) -> None:
    """It holds no blocks, and never comes back."""
    apart_from_preemption(subject, partial(cancelled_while_preempted, subject, distinct(rng, 6, 7)))


def cancelled_while_preempted(subject: Subject, prompts: list[list[int]]) -> None:
    stage = Stage(subject, 5, 4, sizes=SMALL, watch=CANCEL)
    for prompt in prompts:
        stage.submit(prompt, 7)
    while not stage.rules.preemptions and stage.live:
        stage.step()
    stage.cancel(1)
    stage.drain()


REFUSED: dict[str, tuple[list[int], int, tuple[int, ...]]] = {
    "an empty prompt": ([], 3, ()),
    "an empty prompt for 0 tokens": ([], 0, ()),
    "a token of vocab_size": ([1, 13, 2], 3, ()),
    "a last token beyond": ([1, 2, 700], 3, ()),
    "token -1": ([1, -1], 3, ()),
    "max_new_tokens 0": ([1, 2], 0, ()),
    "max_new_tokens -2": ([1, 2], -2, ()),
    "one block too many": ([1, 2, 3, 4], 14, (6, 5)),
    "a prompt that is too long": ([1] * 21, 1, (7, 5)),
    "max_new_tokens 700": ([1], 700, (234, 5)),
}


@requirement("9.9")
def test_an_impossible_request_leaves_no_trace(subject: Subject, rng: torch.Generator) -> None:
    """ValueError; the next request gets the next id, and what runs goes on."""
    stage = Stage(subject, 5, 3, sizes=SMALL, watch=CANCEL)
    prompts = distinct(rng, 4, 3)
    stage.submit(prompts[0], 4)
    for words, (prompt, most, numbers) in REFUSED.items():
        for _ in range(2):
            what = f"submit of {words}"
            if numbers:
                what = f"{what}, which needs {numbers[0]} blocks where there are {numbers[1]}"
            refuses(ValueError, partial(stage.engine.submit, prompt, most), what, *numbers)
        stage.judge_metrics()
        if words == "token -1":
            stage.step()
    stage.submit(prompts[1], 3)
    stage.drain()


@requirement("9.9")
def test_what_fits_is_accepted(subject: Subject) -> None:
    """The last token needs no slot; tokens 0 and vocab_size - 1 and one new token are all right."""
    for prompt, most in (([12] * 15, 1), ([0] * 13, 3)):
        stage = Stage(subject, 5, 3, sizes=SMALL, watch=CANCEL)
        try:
            stage.submit(prompt, most)
        except ValueError as error:
            blocks = (len(prompt) + most - 1) / 3
            raise AssertionError(
                f"submit({prompt}, {most}): ValueError ({error}) came; {blocks:g} blocks of 3 slots are needed, 5 there"
            ) from error
        stage.step()
        try:
            stage.submit([7] * 13, 3)
        except ValueError as error:
            raise AssertionError(
                f"submit({[7] * 13}, 3) while another runs: ValueError ({error}) came; it may wait"
            ) from error
        stage.step()
        stage.drain()


class OddError(Exception):
    """An error that cannot be made from its text alone."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{reason}: {code}")


def errors(subject: Subject) -> list[Exception]:
    """What a model may raise, what an engine itself may catch among it."""
    own: Exception = subject.OutOfBlocksError("the model's own")
    odd = OddError(3, reason="device lost")
    return [RuntimeError("device lost"), odd, own, ValueError("of the model"), KeyError(0), StopIteration(1)]


@requirement("9.9")
def test_an_error_of_the_model_costs_nothing(subject: Subject, rng: torch.Generator) -> None:
    """It goes through unchanged; the next step feeds what the failed one fed, and all answers are right."""
    stage = Stage(subject, 30, 3, size=2, sizes=Sizes(heads=2), watch=CANCEL)
    for prompt, most in zip(distinct(rng, 4, 7, 2), (4, 2, 5), strict=True):
        stage.submit(prompt, most)
    places = ("between its layers", "at its end", "at its start") * 2
    for place, error in zip(places, errors(subject), strict=True):
        stage.fails(place, error)
        assert torch.is_grad_enabled(), "step(), in which the model raises: gradients are off after it"
        if stage.live:
            stage.step()
    stage.drain()


@requirement("9.9")
def test_an_error_again_and_again(subject: Subject, rng: torch.Generator) -> None:
    """Several failures one after the other, in the first step too, change nothing."""
    stage = Stage(subject, 30, 3, sizes=Sizes(heads=2), watch=CANCEL)
    for prompt in distinct(rng, 4, 7):
        stage.submit(prompt, 4)
    for place in ("between its layers", "at its end", "between its layers"):
        stage.fails(place, RuntimeError("device lost"))
    stage.step()
    for place in ("at its end", "at its start"):
        stage.fails(place, RuntimeError("device lost"))
    stage.drain()


@requirement("9.9")
def test_an_error_out_of_blocks(subject: Subject, rng: torch.Generator) -> None:
    """A step that preempts, or admits who was preempted, and fails is done again as it was to be, and counted once."""
    apart_from_preemption(subject, partial(fails_out_of_blocks, subject, distinct(rng, 5, 4, 2)))


def fails_out_of_blocks(subject: Subject, prompts: list[list[int]]) -> None:
    stage = Stage(subject, 4, 3, sizes=Sizes(heads=2), watch=CANCEL)
    for prompt in prompts:
        stage.submit(prompt, 4)
    while stage.live:
        stage.fails("between its layers", RuntimeError("device lost"))
        came = stage.generated
        stage.step()
        assert stage.generated > came, "step() after one that failed: no token came, and requests are left"
    stage.judge_answers()


@requirement("9.9")
def test_after_an_error_anything_may_come(subject: Subject, rng: torch.Generator) -> None:
    """Requests that are cancelled after a failed step leave no blocks behind; those that come get their answers."""
    for act in ("cancel all", "cancel one", "submit"):
        after_an_error(subject, rng, act)


def after_an_error(subject: Subject, rng: torch.Generator, act: str) -> None:
    stage = Stage(subject, 8, 3, sizes=Sizes(heads=2), watch=("tokens", "memory"))
    prompts = distinct(rng, 4, 7, 2, 5)
    stage.submit(prompts[0], 3)
    stage.step()
    stage.submit(prompts[1], 2)
    stage.submit(prompts[2], 2)
    stage.fails("between its layers", RuntimeError("device lost"))
    stage.loose = True
    if act == "cancel one":
        stage.cancel(1)
    elif act == "cancel all":
        for number in (1, 0, 2):
            stage.cancel(number)
        free: Any = stage.cache.allocator.num_free
        assert free == 8, f"cache.allocator.num_free once all are cancelled after an error: {free} came, 8 was wanted"
    stage.submit(prompts[3], 2)
    stage.drain()
    free = stage.cache.allocator.num_free
    assert free == 8, f"cache.allocator.num_free once nothing is left: {free} came, 8 was wanted"
