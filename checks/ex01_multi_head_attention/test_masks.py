"""Masks (1.2): what is forbidden has weight 0, every 0/1 dtype and shape works, fully masked rows, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, Where, is_tensor, refuses, requirement

from .reference import (
    LK,
    LQ,
    VALUES,
    B,
    D,
    H,
    agree,
    agrees_with_pytorch,
    build,
    inputs,
    reference,
    refuses_mask,
    some_mask,
    unpack,
)

MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]
BAD_MASK_SHAPES: list[tuple[int, ...]] = [(LQ, LK), (B, LK), (LK,), (B, 1, LK), (1, B, 1, 1, LK)]
BAD_MASK_SHAPES += [(B, 1, 1, LK + 1), (B + 1, 1, 1, LK), (B, H - 1, 1, LK), (B, 1, LQ + 1, LK)]
MASK_SHAPES = [(B, 1, 1, LK), (1, 1, LQ, LK), (B, H, LQ, LK), (1, H, 1, LK), (B, 1, LQ, 1), (1, 1, 1, 1)]


@requirement("1.2")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64], ids=str)
def test_apply_mask_forbids_exactly_what_is_false(subject: Subject, close: Close, dtype: torch.dtype) -> None:
    """True may attend: allowed scores stay as they are, forbidden ones get weight 0."""
    scores = torch.tensor([[[[1.0, 3.0, 2.0, -1.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[[True, False, True, False]]]])

    masked = is_tensor(build(subject).apply_mask(scores.clone(), mask.to(dtype)), "apply_mask(scores, mask)")

    hint = "true in the mask means: may attend, unchanged"
    close(masked[mask], scores[mask], "apply_mask: allowed scores", tolerance=VALUES, hint=hint)
    forbids(close, masked, scores, ~mask, "softmax of apply_mask", "false in the mask means: weight exactly 0")


@requirement("1.2")
def test_forbidden_weights_are_exactly_zero(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Forbidden scores lie so far below any others, large ones too, that their weight is 0 in the scores' own dtype."""
    mask = some_mask((B, 1, 1, LK), rng)
    forbidden = ~mask.expand(B, H, LQ, LK)

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scale = 3e4 if dtype == torch.float16 else 1e6
        scores = ((torch.rand(B, H, LQ, LK, generator=rng) * 2 - 1) * scale).to(dtype)
        attention = build(subject).to(dtype)

        masked = is_tensor(attention.apply_mask(scores.clone(), mask), "apply_mask(scores, mask)")

        what = f"apply_mask in {dtype}, scores between {-scale:g} and {scale:g}"
        assert masked.dtype == dtype, f"{what}: {masked.dtype} came, {dtype} was wanted"
        close(masked[~forbidden], scores[~forbidden], f"{what}: allowed scores", tolerance=0)
        forbids(close, masked, scores, forbidden, what, "fill with -inf or with the dtype's lowest number")


@requirement("1.2")
def test_every_mask_dtype(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Boolean and 0/1 masks of every dtype mean the same."""
    some, many = some_mask((B, 1, LQ, LK), rng), inputs(rng, torch.float32, 2, 256)
    modules = [(build(subject).to(dtype), inputs(rng, dtype)) for dtype in (torch.float64, torch.float32)]

    for dtype in MASK_DTYPES:
        mask, ones = some.to(dtype), torch.ones(1, 1, 1, 256, dtype=dtype)
        for attention, given in modules:
            hint = f"with a mask of {dtype} on {given[0].dtype}"
            agree(close, attention, given, mask, hint=hint, tolerance=2e-5)
        agree(close, attention, many, ones, hint=f"256 keys, all allowed by {dtype}", tolerance=2e-5)


@requirement("1.2")
def test_every_mask_shape(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Masks per batch row, per head, per query and per key all work, with one query too."""
    attention = build(subject)

    for lq, shape in [*((LQ, shape) for shape in MASK_SHAPES), (1, (B, 1, 1, LK))]:
        hint = f"with a mask of shape {shape} for {lq} queries"
        agree(close, attention, inputs(rng, lq=lq), some_mask(shape, rng), hint=hint)


@requirement("1.2")
def test_a_mask_edited_in_place_counts_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The same mask with other values in it is another mask, also where its version does not tell."""
    given, some, attention = inputs(rng), some_mask((B, 1, LQ, LK), rng), build(subject)
    mask = some.clone()
    agree(close, attention, given, mask)

    hint = "the mask was edited in place since the last call"
    mask.logical_not_()
    agree(close, attention, given, mask, hint=hint)
    mask = torch.ones_like(some)
    for values in (mask, some):
        mask.data.copy_(values)
        agree(close, attention, given, mask, hint=hint)


@requirement("1.2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padded_keys_change_nothing(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Keys that are masked out give what their absence gives, even with values of 1e6."""
    query, key, value = inputs(rng, dtype)
    mask = torch.ones(B, 1, 1, LK, dtype=torch.bool)
    mask[..., 4:] = False
    attention = build(subject).to(dtype)
    expected, _ = reference(attention, query, key[:, :4], value[:, :4])
    key[:, 4:] = value[:, 4:] = 1e6

    output, weights = unpack(attention(query, key, value, mask))

    hint = "the padded positions hold 1e6: mask before the softmax, with weights of exactly 0"
    close(
        weights[..., 4:],
        torch.zeros(B, H, LQ, LK - 4, dtype=dtype),
        "forward: weights of padded keys",
        tolerance=0,
        hint=hint,
    )
    hint = "the padded positions hold 1e6: the formula without them, over the first 4 keys, gives what was wanted"
    close(output, expected.to(dtype), "forward: output", tolerance=2e-5, hint=hint)


@requirement("1.2")
def test_a_long_run_of_hidden_keys(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Wherever the allowed ones lie among 1100 keys, in one batch row last, in the other first, they count alone."""
    mask = torch.zeros(B, 1, 1, 1100, dtype=torch.bool)
    mask[0, ..., -3:] = mask[1, ..., :3] = True

    agree(
        close, build(subject), inputs(rng, lq=2, lk=1100), mask, hint="all but the last or the first 3 keys are hidden"
    )


@requirement("1.2")
def test_each_of_many_queries_has_its_own_row(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A mask [1, 1, Lq, Lk] hides from each of 1031 queries what its own row hides."""
    given, mask = [x[:1] for x in inputs(rng, lq=1031)], some_mask((1, 1, 1031, LK), rng)
    attention = build(subject)

    _, weights = unpack(attention(*given, mask))

    what = "forward with a mask of shape (1, 1, 1031, 7): weights"
    # Allowed weights that are wrong for many queries cost 1.1.
    wanted = reference(attention, given[0][:, :LQ], *given[1:], mask=mask[:, :, :LQ])[1]
    close(weights[:, :, :LQ], wanted, f"{what} of the first queries", tolerance=VALUES)
    hidden = torch.zeros(1, H, 1031, LK, dtype=torch.float64)
    came = weights * ~mask if weights.shape == hidden.shape else weights
    close(came, hidden, f"{what} of hidden keys", tolerance=0)


@requirement("1.2")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_fully_masked_row_gives_zeros(subject: Subject, close: Close, rng: torch.Generator, training: bool) -> None:
    """A query that may attend to nothing has zero weights; its output is output_linear's bias."""
    given = inputs(rng)
    mask = some_mask((B, 1, LQ, LK), rng)
    mask[0, 0, 2] = mask[1, 0, 4] = False
    attention = build(subject).train(training)

    _, weights = unpack(attention(*given, mask))

    hint = "a query that may attend to nothing has zero weights, not NaN and not a uniform row"
    close(
        weights[0, :, 2],
        torch.zeros(H, LK, dtype=torch.float64),
        "forward: weights of a fully masked row",
        tolerance=0,
        hint=hint,
    )
    agree(close, attention, given, mask, hint="the mask hides a whole row of each batch row")


@requirement("1.2")
def test_a_row_masked_in_one_head_gives_zeros_there(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A query that may attend to nothing in one head has zero weights in that head alone."""
    mask = some_mask((B, H, LQ, LK), rng)
    mask[0, 1, 2] = False

    agree(close, build(subject), inputs(rng), mask, hint="row 2 of head 1 may attend to nothing, in other heads it may")


@requirement("1.2")
def test_everything_masked(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With nothing to attend to anywhere, weights are zeros and every output row is output_linear's bias."""
    agree(close, build(subject), inputs(rng), torch.zeros(B, 1, 1, LK), hint="the mask allows nothing at all")


@requirement("1.2")
def test_gradients_of_fully_masked_rows_are_finite(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A fully masked row sends no NaN back, and masked keys get a gradient of exactly 0."""
    query, key, value = (x.requires_grad_() for x in inputs(rng))
    mask = torch.ones(B, 1, LQ, LK, dtype=torch.bool)
    mask[..., 5:] = mask[0, 0, 2] = False
    probe = torch.randn(B, LQ, D, generator=rng, dtype=torch.float64)
    attention = build(subject)

    output, weights = unpack(attention(query, key, value, mask))
    ((output * probe).sum() + weights.square().sum()).backward()

    grads = {"query": query.grad, "key": key.grad, "value": value.grad}
    grads |= {name: parameter.grad for name, parameter in attention.named_parameters()}
    for name, grad in grads.items():
        assert grad is not None, f"backward: {name} gets no gradient"
        assert grad.isfinite().all(), f"backward: {name}'s gradient is not finite although only one row is fully masked"
    for name in ("key", "value"):
        padded = is_tensor(grads[name], f"{name}.grad")[:, 5:]
        close(padded, torch.zeros_like(padded), f"backward: gradient of masked {name}s", tolerance=0)
    agree(close, attention, [query.detach(), key.detach(), value.detach()], mask)


@requirement("1.2")
@pytest.mark.parametrize("kind", ["padding", "causal"])
def test_masks_agree_with_pytorch(subject: Subject, close: Close, rng: torch.Generator, on: Where, kind: str) -> None:
    """Under a padding or a causal mask output, weights and gradients equal nn.MultiheadAttention's."""
    mask = some_mask((B, 1, 1, LK), rng) if kind == "padding" else torch.ones(1, 1, LK, LK).tril() == 1
    agrees_with_pytorch(subject, close, rng, on, LK, LK, mask, tolerance=VALUES)


@requirement("1.2")
def test_a_mask_of_a_bad_shape_is_refused(subject: Subject, rng: torch.Generator) -> None:
    """forward refuses a mask without 4 dimensions, or whose sizes do not fit, with both shapes; a [B, Lk] mask also
    where B = Lq, so that it would broadcast.
    """
    attention = build(subject)

    for lq, shapes in ((LQ, BAD_MASK_SHAPES), (B, [(B, LK)])):
        given, scores = inputs(rng, lq=lq), (B, H, lq, LK)
        for shape in shapes:
            is_refused(attention, given, shape, scores)


@requirement("1.2")
def test_a_mask_that_would_enlarge_the_scores_is_refused(subject: Subject, rng: torch.Generator) -> None:
    """A size of 1 in the scores is not stretched by the mask."""
    given = [x[:1, :1] for x in inputs(rng)]
    attention = build(subject, heads=1)

    for shape in ((B, 1, 1, 1), (1, 1, LQ, 1), (1, 1, 1, LK), (1, H, 1, 1)):
        is_refused(attention, given, shape, (1, 1, 1, 1))


@requirement("1.2")
def test_a_mask_that_fitted_is_refused_for_other_lengths(subject: Subject, rng: torch.Generator) -> None:
    """What was a good shape in one call is a bad one in a call of other lengths."""
    query, key, value = inputs(rng)
    attention, mask = build(subject), torch.ones(B, 1, 1, LK)
    unpack(attention(query, key, value, mask))

    what = f"forward with a mask of shape {(B, 1, 1, LK)}, which fitted the last call, for 5 keys"
    refuses_mask(lambda: attention(query, key[:, :5], value[:, :5], mask), what)


@requirement("1.2")
@pytest.mark.parametrize(("d_model", "heads"), [(10, 4), (3, 6)])
def test_a_bad_d_model_is_refused(subject: Subject, d_model: int, heads: int) -> None:
    """A d_model that num_heads does not divide is refused with both numbers."""
    what = f"MultiHeadAttention({d_model}, {heads})"
    refuses(ValueError, lambda: subject.MultiHeadAttention(d_model, heads), what, d_model, heads)


def forbids(close: Close, masked: Tensor, scores: Tensor, forbidden: Tensor, what: str, hint: str) -> None:
    """The softmax of masked scores is 0 where the mask forbids."""
    weights = masked.softmax(-1)[forbidden]
    try:
        close(weights, torch.zeros_like(weights), f"{what}: forbidden weights", tolerance=0)
    except AssertionError as error:
        came = masked[forbidden].double() + 0.0  # Not -0.
        found = f"forbidden scores came back between {came.min():g} and {came.max():g}"
        if torch.equal(masked, scores):
            found = "the scores came back unchanged"
        raise AssertionError(f"{error}\n{hint}\n{found}") from None


def is_refused(attention: Any, given: list[Tensor], shape: tuple[int, ...], scores: tuple[int, ...]) -> None:
    """forward refuses a mask of a shape for scores of another, and names both as Python prints them."""
    what = f"forward with a mask of shape {shape} for scores of shape {scores}"
    printed = [", ".join(map(str, sizes)) for sizes in (shape, scores)]
    refuses_mask(lambda: attention(*given, torch.ones(shape)), what, *printed)
