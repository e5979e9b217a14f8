"""Memory (1.3): nothing larger than the scores, no expanded mask, few tensors alive, nothing kept after a call."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, Trace, requirement

from .reference import B, D, H, build, inputs, reference, some_mask, unpack

LARGE_MASKS = ["keys", "pairs", "batch", "heads", "queries"]
# What may differ between calls: dropout, training, whether a graph is made, a mask.
CALLS: list[tuple[float, bool, Callable[[], AbstractContextManager[Any]], bool]] = [
    (0.5, True, nullcontext, True),
    (0.0, True, nullcontext, False),
    (0.5, False, nullcontext, True),
    (0.5, False, torch.no_grad, True),
    (0.0, False, torch.inference_mode, False),
    (0.0, False, torch.inference_mode, True),
]


# H·Lk > 3·D and B·H·Lq·Lk > 3·D² make the scores larger than any projection or fused weight.
def large(subject: Subject, rng: torch.Generator, lq: int = 22, lk: int = 25) -> tuple[Any, list[Tensor], int]:
    """A float32 module with H = 3 heads, inputs, and the number of scores."""
    return build(subject).float(), inputs(rng, torch.float32, lq, lk), B * H * lq * lk


def large_agree(close: Close, attention: Any, given: list[Tensor], result: Any, masked: bool) -> None:
    """The result is right; with a mask, whose values are 1.2's business, rows of weights at least sum to 1 or 0."""
    output, weights = unpack(result)
    expected_output, expected_weights = reference(attention, *given)
    if masked:
        assert weights.shape == expected_weights.shape, f"forward: weights of shape {tuple(weights.shape)} came"
        sums = weights.detach().sum(-1).nan_to_num()
        close(sums, sums.round().clamp(0, 1), "forward with a mask: sums of the weights", tolerance=1e-2)
    else:
        close(weights, expected_weights.float(), "forward: weights", tolerance=1e-2)
        close(output, expected_output.float(), "forward: output", tolerance=1e-2)


@requirement("1.3")
@pytest.mark.parametrize(("lq", "lk"), [(22, 25), (270, 16)])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_nothing_is_larger_than_the_scores(
    subject: Subject, close: Close, rng: torch.Generator, masked: bool, lq: int, lk: int
) -> None:
    """No tensor made in forward, in training, in eval or at inference, or in backward has more elements than the
    scores.
    """
    attention, given, scores = large(subject, rng, lq, lk)
    more = [some_mask((B, 1, 1, lk), rng)] if masked else []

    with Trace() as seen:
        result = attention(*given, *more)
        unpack(result)[0].sum().backward()
        attention.eval()(*given, *more)
        with torch.inference_mode():
            attention(*given, *more)

    large_agree(close, attention, given, result, masked)
    assert seen.largest <= scores, (
        f"forward: a tensor of {seen.largest} elements is made; the scores have {scores}\n"
        "multiply matrices (q @ k.mT) in place of a broadcast product that is summed afterwards"
    )


@requirement("1.3")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(B, 1, 1, 25), (1, 1, 22, 25), (B, 1, 22, 25), (1, H, 1, 25), (B, 1, 22, 1)], ids=LARGE_MASKS
)
def test_the_mask_is_not_expanded(
    subject: Subject, close: Close, rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Nothing of the scores' size is made from a smaller mask alone: broadcasting needs no copy."""
    attention, given, scores = large(subject, rng)
    mask = some_mask(shape, rng).to(dtype)

    with Trace(sources=[mask]) as seen:
        result = attention(*given, mask)
        attention.eval()(*given, mask)
        with torch.inference_mode():
            attention(*given, mask)

    assert seen.largest_from_sources < scores, (
        f"forward: a mask of shape {shape} is copied to {seen.largest_from_sources} elements, the size of the scores\n"
        "let the operation broadcast it: an expanded view costs nothing, repeat() and contiguous() do"
    )
    large_agree(close, attention, given, result, masked=True)


@requirement("1.3")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_at_most_five_scores_are_alive_at_inference(
    subject: Subject, close: Close, rng: torch.Generator, masked: bool
) -> None:
    """Under no_grad and inference_mode at most 5 float32 tensors of the scores' size are alive at once."""
    attention, given, scores = large(subject, rng)
    shapes = [(B, 1, 1, 25), (B, H, 22, 25)] if masked else [()]
    attention.eval()

    for mode in (torch.no_grad, torch.inference_mode):
        for shape in shapes:
            more = [some_mask(shape, rng)] if shape else []
            with mode(), Trace(at_least=scores) as seen:
                result = attention(*given, *more)
            large_agree(close, attention, given, result, masked)
            alive = seen.peak_bytes / (4 * scores)
            what = f"forward under {mode.__name__}" + (f" with a mask of shape {shape}" if shape else "")
            assert alive <= 5, (
                f"{what}: {alive:.2f} tensors of the scores' size are alive at once; at most 5 are asked for"
            )


@requirement("1.3")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_at_most_four_scores_are_kept_for_backward(
    subject: Subject, close: Close, rng: torch.Generator, masked: bool
) -> None:
    """With dropout 0, what forward leaves for backward is at most 4 float32 tensors of the scores' size."""
    attention, given, scores = large(subject, rng)
    shapes = [(B, 1, 1, 25), (B, H, 22, 25)] if masked else [()]

    for shape in shapes:
        more = [some_mask(shape, rng)] if shape else []
        large_agree(close, attention, given, attention(*given, *more), masked)
        for training in (True, False):
            with Trace(at_least=scores) as seen:
                output = unpack(attention.train(training)(*given, *more))[0]
                kept = seen.alive_after_collection() / (4 * scores)

            what = f"forward in {'training' if training else 'eval'}" + (
                f" with a mask of shape {shape}" if shape else ""
            )
            assert output.requires_grad, f"{what}: the output carries no gradient"
            assert kept <= 4, (
                f"{what}: {kept:.2f} tensors of the scores' size are kept for backward; at most 4 are asked for"
            )
            del output


@requirement("1.3")
def test_nothing_of_the_last_call_stays_alive(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Once output and weights are gone, so is everything that forward made, wherever it hung, and the inputs too."""
    for dropout, training, graph, masked in CALLS:
        _, given, _ = large(subject, rng)
        if masked:
            given.append(some_mask((B, 1, 22, 25), rng))
        attention = build(subject, dropout=dropout).float().train(training)

        for _ in range(2):  # A first call may make a small constant.
            with graph(), Trace() as seen:
                result = attention(*given)
        if not (training and dropout):
            large_agree(close, attention, given[:3], result, masked)
        del result
        left = seen.alive_after_collection()
        held = [weakref.ref(x.untyped_storage()) for x in given]
        del given
        if any(storage() is not None for storage in held):
            gc.collect()

        assert left < 4 * D, f"forward: {left} bytes stay alive after its results are gone; your code keeps them"
        for name, storage in zip(("query", "key", "value", "mask"), held, strict=False):
            assert storage() is None, f"forward: {name} stays alive after the call; your code keeps it"
