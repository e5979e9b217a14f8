"""Caches (11.6): feed in any pieces, rewind, errors, no graph."""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.testing import Close, Subject, Where, also, halfway, is_tensor, refuses, requirement

from .reference import Fault, Small, Stop, Table, plain_attention, whole

TOKENS = (3, 0, 4, 4, 1, 2, 0, 3, 1)


def length_is(cache: Any, wanted: int, what: str) -> None:
    """Fails unless the cache says that it holds so many tokens."""
    assert cache.length == wanted, f"{what}: length is {cache.length}, {wanted} was wanted"


def begun(subject: Subject, model: Small) -> tuple[Any, list[int]]:
    """A new cache of the learner's, and the tokens that it has been fed."""
    return subject.CachedModel(model), []


def feed(cache: Any, model: Small, sequence: list[int], tokens: Sequence[int], close: Close, what: str) -> Tensor:
    """Feeds tokens behind a sequence; the call, the logits and the length are as they have to be."""
    start = len(sequence)
    model.calls.clear()
    sequence += tokens
    expected = whole(model, sequence)[start:]

    came = is_tensor(cache.feed(tokens), f"{what}: feed({list(tokens)})")

    called = f"{what}: feed({list(tokens)}) behind {start} tokens"
    wanted = [(list(tokens), list(range(start, len(sequence))))]
    assert model.calls == wanted, f"{called}: model calls (tokens, positions) {model.calls} came, {wanted} was wanted"
    with also(the_slip, came, model, sequence, tokens):
        close(came, expected, called)
    length_is(cache, len(sequence), called)
    assert not came.requires_grad, f"{called}: the logits ask for gradients; nothing is trained here"
    return came


def the_slip(came: Tensor, model: Small, sequence: Sequence[int], tokens: Sequence[int]) -> str:
    """What a wrong row looks like."""
    start = len(sequence) - len(tokens)
    with torch.no_grad():
        fresh = model(torch.tensor(tokens), torch.arange(start, len(sequence)), plain_attention)
    if came.shape == fresh.shape and came.double().isclose(fresh.double(), 1e-4, 1e-4).all():
        return "they are the logits of these tokens alone: nothing is kept"
    return "they are not those of one call with all tokens: are all keys and values there, each layer's own, no others?"


@halfway
@requirement("11.6")
def test_feed_in_pieces(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Pieces of any length give the logits of one call with all tokens."""
    model = Small(rng)
    for pieces in ((9,), (1, 1, 1), (4, 1, 3)):
        cache, sequence = begun(subject, model)
        length_is(cache, 0, "CachedModel(model)")
        for size in pieces:
            feed(cache, model, sequence, TOKENS[len(sequence) :][:size], close, f"in pieces of {pieces}")


@requirement("11.6")
def test_feed_of_a_long_piece(subject: Subject, close: Close) -> None:
    """A prompt of 300 tokens is one model call too."""
    model, tokens = Table([[0.25, 0.75], [0.5, 0.5]]), [0, 1, 1] * 100
    came = is_tensor(subject.CachedModel(model).feed(tokens), "feed of 300 tokens")

    assert len(model.calls) == 1, f"feed of 300 tokens: {len(model.calls)} model calls came, 1 was wanted"
    close(came, model.table[0, tokens].detach(), "feed of 300 tokens")


@requirement("11.6")
def test_feed_agrees_on_every_device(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """In every dtype, on every device."""
    model = Small(rng).to(on.device, on.dtype)
    cache, sequence = begun(subject, model)

    for size in (3, 1, 2):
        feed(cache, model, sequence, list(TOKENS[len(sequence) :][:size]), close, f"a model of {on.dtype}")


@requirement("11.6")
def test_feed_in_float32(subject: Subject, rng: torch.Generator) -> None:
    """A float32 model has float32 keys, values and logits."""
    model = Small(rng, torch.float32)
    cache, sequence = begun(subject, model)

    for size in (2, 1, 1):
        feed(cache, model, sequence, TOKENS[len(sequence) :][:size], Close(2e-5), "a model of torch.float32")


@requirement("11.6")
def test_feed_on_another_device(subject: Subject, rng: torch.Generator) -> None:
    """What feed makes is on the model's device."""
    cache = subject.CachedModel(Small(rng).to("meta"))

    came = is_tensor(cache.feed([1, 3]), "feed on device meta")

    assert (came.device.type, tuple(came.shape)) == ("meta", (2, 5)), (
        f"feed on device meta: {came.device}, {tuple(came.shape)} came"
    )


@requirement("11.6")
def test_rewind_and_feed_again(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After any rewinding the cache is what it was with the first tokens alone."""
    model = Small(rng)
    cache, sequence = begun(subject, model)
    steps: list[tuple[int, Sequence[int]]] = [(4, (1, 1)), (5, (2,)), (6, (0, 3, 3)), (0, (4, 1, 0)), (1, (2, 2, 2))]
    feed(cache, model, sequence, TOKENS[:6], close, "at first")

    for length, tokens in steps:
        model.calls.clear()
        what = f"rewind({length}) from {len(sequence)}"
        cache.rewind(length)

        assert not model.calls, f"{what}: made a model call"
        length_is(cache, length, what)
        del sequence[length:]
        feed(cache, model, sequence, tokens, close, f"after {what}")


@requirement("11.6")
def test_two_caches_of_one_model(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What one is fed, or forgets, is nothing to the other; nor to one that is made later."""
    model = Small(rng)
    made = [begun(subject, model), begun(subject, model)]
    turns: list[tuple[int, int, Sequence[int]]] = [
        (0, 0, (1, 2, 3)),
        (1, 0, (4, 4)),
        (0, 3, (0,)),
        (1, 1, (2, 0, 1)),
        (0, 2, (3, 3)),
        (2, 0, (1, 2)),
        (1, 4, (4,)),
    ]
    for which, length, tokens in turns:
        if which == len(made):
            made.append(begun(subject, model))
        cache, sequence = made[which]
        cache.rewind(length)
        del sequence[length:]
        feed(cache, model, sequence, tokens, close, f"cache {which + 1} of {len(made)} of one model")


@requirement("11.6")
def test_an_error_leaves_the_cache_as_it_was(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A model that raises behind a layer's attention: the error goes through, and the next call is right."""
    model = Small(rng)
    cache, sequence = begun(subject, model)
    for tokens, layer in (((3, 1), 0), ((0,), 1), ((2,), 0)):
        model.fails_behind = layer
        what = f"feed({list(tokens)}) with a model that raises behind layer {layer}"
        refuses(Fault, partial(cache.feed, (*tokens, 4)), what, f"layer {layer} fails")
        model.error, what = Stop, f"{what} as KeyboardInterrupt does"
        with contextlib.suppress(Stop):
            cache.feed((*tokens, 4))
        model.fails_behind, model.error = -1, Fault
        assert torch.is_grad_enabled(), f"{what}: gradients are off afterwards"

        length_is(cache, len(sequence), f"after {what}")
        feed(cache, model, sequence, tokens, close, f"after a failed call, behind {len(sequence)} tokens")


@requirement("11.6")
def test_no_graph_is_kept(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Weights ask for gradients, and yet nothing of a call is kept for a backward."""
    model = Small(rng)
    cache, sequence = begun(subject, model)

    for tokens in ((1, 2, 3), (4,)):
        feed(cache, model, sequence, tokens, close, "weights that ask for gradients")

    alive = sum(one() is not None for one in model.inside)
    assert not alive, f"feed: {alive} tensors of the model's inside are alive after 2 calls; is a graph kept?"
    assert torch.is_grad_enabled(), "feed: gradients are off afterwards"


@requirement("11.6")
def test_rewinding_to_what_is_not_there(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """ValueError with both numbers, and nothing has changed."""
    model = Small(rng)
    cache, sequence = begun(subject, model)
    feed(cache, model, sequence, (2, 0, 1), close, "at first")

    for length in (4, 19, -1):
        refuses(ValueError, partial(cache.rewind, length), f"rewind({length}) of 3 tokens", length, 3)

    feed(cache, model, sequence, (4,), close, "after a refused rewind")
    for length in (1, -2):
        refuses(ValueError, partial(begun(subject, model)[0].rewind, length), f"rewind({length}), new cache", length, 0)
