"""Memory (1.3): nothing larger than the scores, no expanded mask, few tensors alive, nothing kept after a call."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage

from harness.testing import Close, DispatchMode, Subject, Trace, requirement

from .reference import Asked, B, D, H, build, carries, inputs, reference, same, some_mask, unpack

SMALL_MASKS = [(B, 1, 1, 25), (1, 1, 22, 25), (B, 1, 22, 25), (1, H, 1, 25), (B, 1, 22, 1)]
ALL_MASKS: list[tuple[int, ...]] = [(), (B, 1, 1, 25), (B, H, 22, 25)]
# What may differ between calls: dropout, training, whether a graph is made, a mask.
Call = tuple[float, bool, Callable[[], AbstractContextManager[Any]], bool]
CALLS: list[Call] = [
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
    if masked:
        shape = (B, H, given[0].size(1), given[1].size(1))
        assert weights.shape == shape, f"forward: weights of shape {tuple(weights.shape)} came, {shape} was wanted"
        sums = weights.detach().sum(-1).nan_to_num()
        close(sums, sums.round().clamp(0, 1), "forward with a mask: sums of the weights", tolerance=1e-2)
        return
    expected_output, expected_weights = reference(attention, *given)
    expected = expected_output.float(), expected_weights.float()
    same(close, (output, weights), expected, Asked(attention, given), tolerance=1e-2)


@requirement("1.3")
@pytest.mark.parametrize(("lq", "lk"), [(22, 25), (270, 16)])
def test_nothing_is_larger_than_the_scores(
    subject: Subject, close: Close, rng: torch.Generator, lq: int, lk: int
) -> None:
    """No tensor made in forward, in training, in eval or at inference, with or without a mask, or in backward has more
    elements than the scores.
    """
    attention, given, scores = large(subject, rng, lq, lk)

    for more in ([], [some_mask((B, 1, 1, lk), rng)]):
        with Trace() as seen:
            result = attention.train()(*given, *more)
            carries(unpack(result)[0], "forward in training: output").sum().backward()
            attention.eval()(*given, *more)
            with torch.inference_mode():
                attention(*given, *more)

        large_agree(close, attention, given, result, bool(more))
        assert seen.largest <= scores, (
            f"forward{' with a mask' if more else ''}: a tensor of {seen.largest} elements is made; the scores have "
            f"{scores}\nmultiply matrices (q @ k.mT) in place of a broadcast product that is summed afterwards"
        )


@requirement("1.3")
def test_the_mask_is_not_expanded(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Nothing of the scores' size is made from a smaller mask alone: broadcasting needs no copy."""
    attention, given, scores = large(subject, rng)

    for place, shape in enumerate(SMALL_MASKS):
        some = some_mask(shape, rng)
        for turn, mask in enumerate((some, some.float())):
            # Training and eval take turns: each meets every shape and every dtype.
            with Trace(sources=[mask]) as seen:
                result = attention.train((place + turn) % 2 == 0)(*given, mask)
                with torch.inference_mode():
                    attention.eval()(*given, mask)

            copied = seen.largest_from_sources
            assert copied < scores, (
                f"forward: a mask of shape {shape} and {mask.dtype} is copied to {copied} elements, the size of the "
                "scores\nlet the operation broadcast it: an expanded view costs nothing, repeat() and contiguous() do"
            )
        large_agree(close, attention, given, result, masked=True)


@requirement("1.3")
def test_at_most_five_scores_are_alive_at_inference(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Under no_grad and inference_mode at most 5 float32 tensors of the scores' size are alive at once."""
    attention, given, scores = large(subject, rng)
    attention.eval()

    for mode in (torch.no_grad, torch.inference_mode):
        for shape in ALL_MASKS:
            more = [some_mask(shape, rng)] if shape else []
            with mode(), Trace(at_least=scores) as seen:
                result = attention(*given, *more)
            large_agree(close, attention, given, result, bool(more))
            alive = seen.peak_bytes / (4 * scores)
            what = f"forward under {mode.__name__}" + (f" with a mask of shape {shape}" if shape else "")
            assert alive <= 5, (
                f"{what}: {alive:.2f} tensors of the scores' size are alive at once; at most 5 are asked for"
            )


@requirement("1.3")
def test_at_most_four_scores_are_kept_for_backward(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With dropout 0, what forward leaves for backward is at most 4 float32 tensors of the scores' size."""
    attention, given, scores = large(subject, rng)

    for shape in ALL_MASKS:
        more = [some_mask(shape, rng)] if shape else []
        large_agree(close, attention, given, attention(*given, *more), bool(more))
        for training in (True, False):
            with Trace(at_least=scores) as seen:
                output = unpack(attention.train(training)(*given, *more))[0]
            kept = seen.alive_bytes if seen.alive_bytes <= 16 * scores else seen.alive_after_collection()

            what = f"forward in {'training' if training else 'eval'}" + (
                f" with a mask of shape {shape}" if shape else ""
            )
            carries(output, f"{what}: output")
            assert kept <= 16 * scores, (
                f"{what}: {kept / (4 * scores):.2f} float32 tensors of the scores' size are kept for backward"
                f"{kept_by_dtype(attention, [*given, *more], scores, kept)}; at most 4 are wanted"
            )
            del output


@requirement("1.3")
def test_nothing_of_the_last_call_stays_alive(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Once output and weights are gone, so is everything that forward made, wherever it hung, and the inputs too; also
    after a call that was refused.
    """
    for call in CALLS:
        left, held = stays(subject, close, rng, call)

        when = after(subject, close, rng, call) if left >= 4 * D or held else ""
        assert left < 4 * D, f"forward: {left} bytes stay alive {when} and its results are gone; your code keeps them"
        assert not held, f"forward: {held[0]} stays alive {when}; your code keeps it"


def stays(
    subject: Subject, close: Close, rng: torch.Generator, call: Call, refused: bool = True
) -> tuple[int, list[str]]:
    """The bytes and the inputs that stay alive after a call and, if `refused`, one that is refused."""
    dropout, training, graph, masked = call
    given = inputs(rng, torch.float32, 22, 25)
    if masked:
        given.append(some_mask((B, 1, 22, 25), rng))
    attention = build(subject, dropout=dropout).float().train(training)
    bad = torch.ones(B, 1, 1, 24)

    with graph():  # A first call may make a small constant.
        attention(*(x[:, :9].contiguous() for x in given[:3]))
    with graph(), Trace() as seen:
        result = attention(*given)
        if refused:
            with suppress(Exception):  # Whether it is refused is for 1.2 to say.
                attention(*given[:3], bad)
    if not (training and dropout):
        large_agree(close, attention, given[:3], result, masked)
    del result
    left = seen.alive_after_collection()
    held = [weakref.ref(x.untyped_storage()) for x in given]
    del given
    if any(storage() is not None for storage in held):
        gc.collect()
    names = zip(("query", "key", "value", "mask"), held, strict=False)
    return left, [name for name, storage in names if storage() is not None]


def after(subject: Subject, close: Close, rng: torch.Generator, call: Call) -> str:
    """After which call it is that something stays alive."""
    with suppress(Exception):
        left, held = stays(subject, close, rng, call, refused=False)
        if left < 4 * D and not held:
            return "after a call whose mask was refused"
    return "after the call"


class Made(DispatchMode):
    """Notes the dtype of every storage that comes of an operation, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: weakref.WeakKeyDictionary[UntypedStorage, torch.dtype] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.dtypes.setdefault(x.untyped_storage(), x.dtype)
        return result


def kept_by_dtype(attention: Any, given: list[Tensor], scores: int, kept: int) -> str:
    """What forward leaves for backward, by dtype: ", 4 of float32 and 1 of bool"; nothing if another call keeps other
    things.
    """
    counts: dict[torch.dtype, float] = {}
    sizes = 0
    with suppress(Exception):
        with Made() as made:
            output = unpack(attention(*given))[0]
        gc.collect()
        theirs = [x.untyped_storage() for x in given]
        for storage, dtype in list(made.dtypes.items()):
            elements = storage.nbytes() // dtype.itemsize
            if elements >= scores and all(storage is not other for other in theirs):
                counts[dtype] = counts.get(dtype, 0) + elements / scores
                sizes += storage.nbytes()
        del output
    if sizes != kept:
        return ""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    words = [f"{count:.3g} of {str(dtype).removeprefix('torch.')}" for dtype, count in ordered]
    return ", " + " and ".join(words)
