"""Memory (3.1): no tensor of all pairs, a peak that grows linearly; work (3.5): exponentials and operations counted."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, Trace, requirement

from .reference import (
    ABOUT,
    BLOCK,
    CALL,
    SLIM,
    WIDE,
    _Calls,
    _Elements,
    attend,
    call,
    quietly,
    reference,
    standard,
    wide,
)

# 3.1 memory


LAYOUTS = {  # block_size, and blocks of queries and of keys
    "one_by_one": (1, 3, 4),
    "many_keys": (2 * WIDE, 1, 36),
    "many_queries": (2 * WIDE, 18, 1),
    "key_mask": (WIDE, 1, 9),
    "query_mask": (WIDE, 9, 1),
}


@requirement("3.1")
@pytest.mark.parametrize(
    "kind",
    ["one_by_one", "many_keys", "many_queries", "mask", "causal_mask", "key_mask", "query_mask"],
)
def test_no_block_is_larger_than_asked_for(subject: Subject, close: Close, rng: torch.Generator, kind: str) -> None:
    """At inference nothing larger than a block of scores is made, from masks neither."""
    block, rows, columns = LAYOUTS.get(kind, (WIDE, 3, 3))
    n, m = block * rows, block * columns
    width = 1 if block == 1 else SLIM
    attention, given = wide(subject, rng, n, m, block, width)
    pairs = (torch.arange(n).view(1, 1, n, 1) + torch.arange(m)) % 3 != 1
    # One expanded, one transposed: neither fills its memory in order.
    masks = {"mask": pairs[:, :, :1].float().expand(1, 1, n, m), "causal_mask": pairs.int().mT.contiguous().mT}
    masks |= {"key_mask": pairs[:, :, :1], "query_mask": torch.ones(1, 1, n, 1)}
    expected = reference(given, mask=masks.get(kind), causal="causal" in kind)[0].float()

    with torch.no_grad(), _Elements([*given, masks.get(kind)]) as seen:
        output, _ = attend(attention, given, masks.get(kind), "causal" in kind)

    close(output, expected, f"{CALL}: output", tolerance=ABOUT)
    most = max(8 * block**2, (width + 2) * n)  # What is kept of each query may take more than a block of 1·1.
    assert seen.largest <= most, (
        f"{CALL}, {kind}, N = {n}, M = {m}, block_size = {block}: {seen}; at most {most} elements were wanted\n"
        f"{quietly(lambda: whole(attention, given, masks.get(kind), 'causal' in kind, most))}"
    )


def whole(attention: Any, given: list[Tensor], mask: Tensor | None, causal: bool, most: int) -> str:
    """What is not cut into blocks: the mask, causal positions, or all."""
    if mask is not None:
        with torch.no_grad(), _Elements(given) as seen:
            attend(attention, given, None, causal)
        if seen.largest <= most:
            return (
                f"it is made of the mask {[*mask.shape]} of {mask.dtype}: cut and convert a mask block by block too; "
                "an expanded view costs nothing, its copy does"
            )
    if causal:
        with torch.no_grad(), _Elements([*given, mask]) as seen:
            attend(attention, given, mask, False)
        if seen.largest <= most:
            return "it is made for causal alone: make positions block by block too"
    return "cut queries and keys into blocks: a block's size does not depend on N or M"


@requirement("3.1")
def test_forward_makes_no_tensor_of_all_pairs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """At inference the module makes no tensor of N·N elements, from its mask neither."""
    n = 3 * WIDE
    attention = wide(subject, rng, 1, 1)[0]
    x = torch.randn(1, n, SLIM, generator=rng)
    mask = (torch.arange(n) % 3 != 1).expand(1, 1, n, n)
    expected = standard(attention, x, mask, causal=True).detach().float()

    with torch.no_grad(), _Elements([x, mask]) as seen:
        output = call(attention, x, mask, causal=True)

    close(output, expected, "forward", tolerance=ABOUT)
    assert seen.largest < n * n, f"forward, N = {n}, causal and masked: {seen}; fewer than N·N = {n * n} were wanted"


@requirement("3.1")
def test_the_peak_grows_linearly(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """At inference twice the length takes about twice the memory."""
    attention = wide(subject, rng, 1, 1)[0]
    peaks, left = [], []
    for n in (3 * WIDE, 6 * WIDE):
        x = torch.randn(1, n, SLIM, generator=rng)
        expected = standard(attention, x).detach().float()
        with torch.no_grad(), Trace() as seen:
            output = call(attention, x)
        close(output, expected, "forward", tolerance=ABOUT)
        peaks.append(seen.peak_bytes)
        del output
        left.append(seen.alive_after_collection())

    assert left[1] <= left[0], (
        f"forward leaves {left[0]} bytes behind for N = {n // 2} and {left[1]} for N = {n}, its output not counted\n"
        "equal numbers were wanted: keep nothing of a call on the module"
    )
    assert peaks[1] < 2.2 * peaks[0], (
        f"forward: at most {peaks[0]} bytes are alive for N = {n // 2} and {peaks[1]} for N = {n}, "
        f"{peaks[1] / peaks[0]:.2f} times as many; less than 2.2 times are asked for\n"
        "hold one block of scores at a time, and let it go"
    )


@requirement("3.1")
def test_small_tensors_count_together(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With blocks of one pair, nothing is kept of a pair, nor is a mask of one row converted whole."""
    peaks = []
    for n in (1, 2):
        attention, given = wide(subject, rng, n, 11 * n, 1, 1)
        mask = (torch.arange(11 * n) % 3 != 1).view(1, 1, 1, -1).int()
        with torch.no_grad(), Trace() as seen:
            output, _ = attend(attention, given, mask)
        close(output, reference(given, mask)[0].float(), f"{CALL}: output", tolerance=ABOUT)
        peaks.append(seen.peak_bytes)
        assert n == 2 or seen.largest <= 8, (
            f"{CALL}, N = 1, M = 11, block_size = 1: a tensor of {seen.largest} elements came, at most 8 were wanted\n"
            f"{quietly(partial(whole, attention, given, mask, False, 8))}"
        )

    assert peaks[1] < 2.2 * peaks[0], (
        f"{CALL} with a mask, block_size = 1: at most {peaks[0]} bytes are alive for N = 1, M = 11 and {peaks[1]} for "
        f"N = 2, M = 22, {peaks[1] / peaks[0]:.2f} times as many; less than 2.2 times are asked for\n"
        "small tensors count together: keep nothing of a pair of blocks, no maximum and no factor"
    )


@requirement("3.1")
def test_nothing_outlives_a_call(subject: Subject, rng: torch.Generator) -> None:
    """Nor does anything that grows with M outlive causal or masked calls of few queries, or their backward."""
    left = []
    for m in (2200, 4400):  # More than in other checks: what those left behind does not serve.
        attention, given = wide(subject, rng, 2, m, 4400)
        mask = (torch.arange(m) % 3 != 1).view(1, 1, 1, m)
        expected = reference(given, causal=True)[0].float()
        with Trace() as seen:
            with torch.no_grad():
                output, logsumexp = attend(attention, given, causal=True)
            if output.shape != expected.shape or not torch.allclose(output, expected, ABOUT, ABOUT):
                return  # The output is wrong; 3.3 says so.
            output, logsumexp = attend(attention, [x.requires_grad_() for x in given], mask, True)
            if output.requires_grad:
                torch.autograd.grad(output, given, torch.ones_like(output), allow_unused=True)
        del output, logsumexp
        left.append(seen.alive_after_collection())

    assert left[1] <= left[0], (
        f"{CALL}, N = 2, causal: {left[0]} bytes stay behind for M = 2200 and {left[1]} for M = 4400\n"
        "equal numbers were wanted: keep nothing of a call, positions or masks neither, in the module or beside it"
    )


# 3.5 work

# Whatever computes an exponential per element. An implementation that uses none of them is judged by all its elements.
EXPONENTIALS = (
    *("exp", "exp_", "exp2", "exp2_", "expm1", "expm1_", "softmax", "log_softmax"),
    *("special_exp2", "special_expm1", "special_softmax", "special_log_softmax"),
)


def exponentials(
    close: Close, attention: Any, given: list[Tensor], causal: bool, mask: Tensor | None = None
) -> tuple[int, int]:
    """How many exponentials, and how many elements at all, flash_attention_forward computes at inference."""
    expected = reference(given, mask, causal)[0].float()
    with torch.no_grad(), _Calls() as seen:
        output, _ = attend(attention, given, mask, causal)
    close(output, expected, f"{CALL}, causal = {causal}: output", tolerance=ABOUT)
    return sum(seen.of[name] for name in EXPONENTIALS), seen.of.total()


@requirement("3.5")
def test_causal_computes_fewer_exponentials(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Over 16 by 16 blocks, causal attention computes at most 0.65 of the exponentials of full attention."""
    n = 16
    attention = subject.FlashAttention(4, 2, 1)
    q, k, v = (torch.randn(1, 2, n, 2, generator=rng) for _ in range(3))
    one_query = exponentials(close, attention, [q[:, :, :1], k, v], causal=False)

    causal = exponentials(close, attention, [q, k, v], causal=True, mask=torch.ones(1, 2, n, n, dtype=torch.bool))

    index = 0 if one_query[0] >= 2 * n else 1
    share = causal[index] / (n * one_query[index])
    assert share <= 0.65, (
        f"{CALL} over {n}·{n} blocks: causal, with a mask, computes {share:.2f} of the exponentials of full attention, "
        "at most 0.65 are asked for\nleave out the blocks in which no query may see a key"
    )


@requirement("3.5")
def test_causal_leaves_out_as_much_with_any_mask(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without a mask, or with one of fewer dimensions, it computes no more exponentials than with one of all pairs."""
    n = 3
    attention = subject.FlashAttention(4, 2, 1)
    given = [torch.randn(1, 2, n, 2, generator=rng) for _ in range(3)]
    pairs = torch.ones(1, 2, n, n)
    most = exponentials(close, attention, given, causal=True, mask=pairs)

    for mask in (None, pairs[:, :1, :1], pairs[:, :1].bool(), pairs[..., :1].int()):
        came = exponentials(close, attention, given, causal=True, mask=mask)
        index = 0 if most[0] >= n else 1
        kind = "without a mask" if mask is None else f"with a mask {tuple(mask.shape)} of {mask.dtype}"
        assert came[index] <= 1.2 * most[index], (
            f"{CALL} over {n}·{n} blocks, causal: {came[index]} exponentials {kind}, {most[index]} with one "
            f"{tuple(pairs.shape)} of {pairs.dtype}\n"
            "leave out the blocks in which no query may see a key, whatever the mask"
        )


@requirement("3.5")
def test_operations_grow_with_block_pairs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A larger block takes no more operations; twice the blocks on both sides take about four times as many."""

    def operations(n: int, block: int, m: int = 0, mask: Tensor | None = None) -> int:
        attention, given = wide(subject, rng, n, m or n, block)
        if m:  # Scores rise from key to key.
            given[0][..., 0] = 20
            given[1][..., 0] = torch.arange(m)
        expected = reference(given, mask, mask is not None)[0].float()
        with torch.no_grad(), _Calls() as seen:
            output, _ = attend(attention, given, mask, mask is not None)
        if n % block == 0 and not m and mask is None:  # Else 3.3, 3.2 or 3.4 judges the output.
            close(output, expected, f"{CALL}: output", tolerance=ABOUT)
        return seen.operations

    small, large = operations(4, 4), operations(64, 64)
    assert large <= 1.5 * small, (
        f"{CALL}: {small} operations for N = M = block_size = 4, {large} for N = M = block_size = 64, one block each\n"
        "about as many were wanted: compute a block by operations on the whole block, not by a loop over its rows"
    )
    small, large = (operations(n, n, mask=(torch.arange(n) > 1).view(1, 1, n, 1)) for n in (4, 64))
    assert large <= 1.5 * small, (
        f"{CALL}, causal, with a mask that leaves two rows nothing: {small} operations for N = M = block_size = 4, "
        f"{large} for 64\nabout as many were wanted: hide what is not seen, and treat rows that see nothing, by "
        "operations on the whole block, not row by row"
    )
    few, many = operations(2 * WIDE, WIDE), operations(4 * WIDE - 1, WIDE)
    assert many <= 5 * few, (
        f"{CALL}: {few} operations for 2·2 blocks, {many} for 4·4 blocks of which the last ones are smaller by 1, "
        f"{many / few:.1f} times as many; at most 5 times are asked for\n"
        "visit each pair of blocks once, and what is left over as one block too"
    )
    few, many = (operations(BLOCK, BLOCK, columns * BLOCK) for columns in (2, 8))
    assert many <= 6 * few, (  # 4 times and what joins their results
        f"{CALL}: {few} operations for 2 blocks of keys, {many} for 8, in which scores rise from key to key, "
        f"{many / few:.1f} times as many; at most 6 times are asked for\n"
        "visit each pair of blocks once, and rescale what is there when the maximum rises"
    )
