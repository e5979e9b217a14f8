"""Variable lengths (1.1), self- and cross-attention (1.4): any lengths and batches, one tensor in several roles."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch

from harness.testing import Close, Subject, requirement

from .reference import LK, LQ, VALUES, B, D, H, agree, build, inputs, some_mask, unpack

# 1.1 variable lengths


@requirement("1.1")
@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (1, 7), (5, 1), (9, 4), (4, 9), (67, 131)])
def test_any_lengths(subject: Subject, close: Close, rng: torch.Generator, lq: int, lk: int) -> None:
    """Any number of queries and keys gives the formula's output and weights."""
    hint = f"Lq = {lq}, Lk = {lk} keys, in float64"
    agree(close, build(subject), inputs(rng, lq=lq, lk=lk), hint=hint)


@requirement("1.1")
@pytest.mark.parametrize(("lq", "lk"), [(4099, 2), (2, 4099)])
def test_thousands(subject: Subject, close: Close, rng: torch.Generator, lq: int, lk: int) -> None:
    """Thousands of queries or keys give the formula's output and weights, at inference too."""
    given = [torch.randn(1, length, 4, generator=rng, dtype=torch.float64) for length in (lq, lk, lk)]
    attention = build(subject, d_model=4, heads=2)

    for graph in (nullcontext, torch.no_grad):
        hint = f"Lq = {lq}, Lk = {lk} keys, in float64{', in eval under no_grad' * (graph is torch.no_grad)}"
        with graph():
            agree(close, attention.train(graph is nullcontext), given, hint=hint, heads=2)


@requirement("1.1")
def test_a_batch_row_gives_what_it_gives_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The rows of a batch do not see each other."""
    given = inputs(rng)
    attention = build(subject)

    together = unpack(attention(*given))

    for row in range(B):
        alone = unpack(attention(*(x[row : row + 1] for x in given)))
        hint = f"batch row {row} alone gives something else: rows must not see each other"
        close(together[0][row : row + 1], alone[0].detach(), "forward: output", hint=hint, tolerance=VALUES)
    agree(close, attention, given)


@requirement("1.1")
def test_any_batch(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any number of batch rows gives the formula's output and weights."""
    attention = build(subject)

    for batch, lq, lk in ((1, LQ, LK), (3, LQ, LK), (1031, 1, 2)):
        given = [torch.randn(batch, n, D, generator=rng, dtype=torch.float64) for n in (lq, lk, lk)]
        agree(close, attention, given, hint=f"with {batch} batch rows")


@requirement("1.1")
def test_one_module_serves_lengths_in_any_order(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call leaves nothing behind that changes the next one of another length."""
    attention = build(subject)

    for lq, lk in ((9, 4), (2, 3), (9, 4)):
        agree(close, attention, inputs(rng, lq=lq, lk=lk), hint=f"in a later call, with {lq} queries and {lk} keys")


# 1.4 self- and cross-attention


@requirement("1.4")
def test_cross_attention(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Query, key and value are three different things."""
    hint = "query, key and value are all different here: each has its own projection"
    agree(close, build(subject), inputs(rng), hint=hint)


@requirement("1.4")
def test_one_tensor_in_several_roles(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One tensor may serve in two roles or in all three; the others are their own, where all lengths are equal too."""
    x, attention = inputs(rng, lk=LQ), build(subject)

    for (first, second, third), roles in (
        ((0, 0, 0), "query, key and value"),
        ((0, 1, 1), "key and value, not query"),
        ((0, 0, 1), "query and key, not value"),
        ((0, 1, 0), "query and value, not key"),
    ):
        hint = f"one tensor serves in several roles here: {roles}; all lengths are equal"
        agree(close, attention, [x[first], x[second], x[third]], hint=hint)
    agree(close, attention, x, hint="all lengths are equal here, the tensors are not")


@requirement("1.4")
def test_overlapping_and_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Views of one storage, transposed and expanded ones too, are as good as copies."""
    base = torch.randn(9, D, B, generator=rng, dtype=torch.float64).permute(2, 0, 1)
    row = torch.randn(1, LK, D, generator=rng, dtype=torch.float64).expand(B, LK, D)
    square = torch.randn(B, D, D, generator=rng, dtype=torch.float64)
    first = square[:, :1].expand(B, D, D)
    attention = build(subject)

    for graph in (nullcontext, torch.no_grad):
        for what, given in (
            ("the inputs are overlapping, transposed views", [base[:, :5], base[:, 2:9], base[:, 1:8]]),
            ("the key is an expanded view", [base[:, ::2], row, base[:, 2:9]]),
            ("the key is the query's transposed view", [square, square.mT, square]),
            ("the value is an expanded view of the query", [square, square, first]),
        ):
            with graph():
                agree(close, attention, given, hint=f"{what} here{' under no_grad' * (graph is torch.no_grad)}")


@requirement("1.4")
def test_inputs_edited_in_place_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The same tensors with other values in them are other inputs, also without gradients."""
    given, attention = inputs(rng), build(subject)

    with torch.no_grad():
        agree(close, attention, given)
        for name, x in zip(("query", "key", "value"), given, strict=True):
            x.data.neg_()
            agree(close, attention, given, hint=f"{name} was edited in place since the last call")


@requirement("1.4")
def test_inputs_are_never_written_to(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """forward leaves query, key, value and mask as they were, and does not write to them and restore them either."""
    attention, shapes = build(subject), ((B, 1, 1, LK), (1, 1, LQ, LK), (B, H, LQ, LK), (B, 1, LQ, 1))
    agree(close, attention, inputs(rng))

    for shape, dtype in product(shapes, (torch.bool, torch.int64, torch.float64)):
        given = [*inputs(rng), some_mask(shape, rng).to(dtype)]
        before, versions = [x.clone() for x in given], [x._version for x in given]
        attention(*given)
        with torch.no_grad():
            attention(*given)
        for name, x, kept, version in zip(("query", "key", "value", "mask"), given, before, versions, strict=True):
            close(x, kept, f"{name} after forward", tolerance=0, hint="an input is written to")
            assert x._version == version, f"forward: {name} is written to, and what was there is put back"
