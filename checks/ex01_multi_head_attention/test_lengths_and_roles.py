"""Variable lengths (1.1), self- and cross-attention (1.4): any lengths and batches, one tensor in several roles."""

import pytest
import torch

from harness.testing import Close, Subject, requirement

from .reference import LK, LQ, VALUES, B, D, H, agree, build, inputs, some_mask, unpack

ROLES = ["all", "key-value", "query-key", "query-value"]


# 1.1 variable lengths


@requirement("1.1")
@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (1, 7), (5, 1), (9, 4), (4, 9), (67, 131)])
def test_any_lengths(subject: Subject, close: Close, rng: torch.Generator, lq: int, lk: int) -> None:
    """Any number of queries and keys gives the formula's output and weights."""
    hint = f"Lq = {lq}, Lk = {lk} keys, in float64; a small difference comes from a step in a lower precision"
    agree(close, build(subject), inputs(rng, lq=lq, lk=lk), hint=hint)


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
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_any_batch(subject: Subject, close: Close, rng: torch.Generator, batch: int) -> None:
    """Any number of batch rows gives the formula's output and weights."""
    given = [torch.randn(batch, n, D, generator=rng, dtype=torch.float64) for n in (LQ, LK, LK)]

    agree(close, build(subject), given, hint=f"with {batch} batch rows")


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
@pytest.mark.parametrize("same", [(0, 0, 0), (0, 1, 1), (0, 0, 1), (0, 1, 0)], ids=ROLES)
def test_one_tensor_in_several_roles(
    subject: Subject, close: Close, rng: torch.Generator, same: tuple[int, ...]
) -> None:
    """One tensor may serve in two roles or in all three; the others are their own."""
    x = [torch.randn(B, LQ, D, generator=rng, dtype=torch.float64) for _ in range(2)]

    agree(close, build(subject), [x[index] for index in same], hint="one tensor serves in several roles here")


@requirement("1.4")
def test_equal_key_and_value_lengths_of_the_query(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Nothing is mixed up where all lengths are equal but the tensors are not."""
    agree(close, build(subject), inputs(rng, lk=LQ), hint="all lengths are equal here, the tensors are not")


@requirement("1.4")
def test_overlapping_and_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Views of one storage, transposed and expanded ones too, are as good as copies."""
    base = torch.randn(9, D, B, generator=rng, dtype=torch.float64).permute(2, 0, 1)
    row = torch.randn(1, LK, D, generator=rng, dtype=torch.float64).expand(B, LK, D)
    attention = build(subject)

    agree(
        close,
        attention,
        [base[:, :5], base[:, 2:9], base[:, 1:8]],
        hint="the inputs are overlapping, transposed views here",
    )
    agree(close, attention, [base[:, ::2], row, base[:, 2:9]], hint="the key is an expanded view here")
    square = torch.randn(B, D, D, generator=rng, dtype=torch.float64)
    agree(close, attention, [square, square.mT, square], hint="the key is the query's transposed view here")


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
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64], ids=str)
def test_inputs_are_never_written_to(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """forward leaves query, key, value and mask as they were, and does not write to them and restore them either."""
    attention = build(subject)
    agree(close, attention, inputs(rng))

    for shape in ((B, 1, 1, LK), (1, 1, LQ, LK), (B, H, LQ, LK), (B, 1, LQ, 1)):
        given = [*inputs(rng), some_mask(shape, rng).to(dtype)]
        before, versions = [x.clone() for x in given], [x._version for x in given]
        attention(*given)
        with torch.no_grad():
            attention(*given)
        for name, x, kept, version in zip(("query", "key", "value", "mask"), given, before, versions, strict=True):
            close(x, kept, f"{name} after forward", tolerance=0, hint="an input is written to")
            assert x._version == version, f"forward: {name} is written to, and what was there is put back"
